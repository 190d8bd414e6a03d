"""The primitives that models and guides are written in: sample, param, plate, module, ...

Under handlers (inference is made of them) each call becomes a message that they may see and change.
Outside of all handlers a primitive does the plain thing: ``sample`` draws, ``param`` reads the
default store.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.distributions import constraints

from fastsvi import distributions as dist
from fastsvi import poutine, settings
from fastsvi.errors import DtypeError, FastSVIWarning, ShapeError, SiteError, describe
from fastsvi.params import ParamStore
from fastsvi.params.names import MODULE_NAMESPACE_DIVIDER, param_with_module_name
from fastsvi.poutine.errors import PlateError
from fastsvi.poutine.plate_messenger import PlateMessenger
from fastsvi.poutine.rng import set_rng_seed
from fastsvi.poutine.runtime import (
    PARAM_STORE,
    STACK,
    InferDict,
    Message,
    apply_stack,
    check_name,
    effectful,
)
from fastsvi.poutine.subsample_messenger import SubsampleMessenger

__all__ = [
    "barrier",
    "clear_param_store",
    "deterministic",
    "enable_validation",
    "factor",
    "get_param_store",
    "iarange",
    "irange",
    "module",
    "param",
    "plate",
    "plate_stack",
    "random_module",
    "sample",
    "set_rng_seed",
    "subsample",
    "validation_enabled",
]

# ---- params ----


def get_param_store() -> ParamStore:
    """The default parameter store, always the same object."""
    return PARAM_STORE


def clear_param_store() -> None:
    """Empty the default store, so that the next training run does not go on from the last one."""
    PARAM_STORE.clear()


def param(
    name: str,
    init_tensor: torch.Tensor | Callable[[], torch.Tensor] | None = None,
    constraint: constraints.Constraint = constraints.real,
    event_dim: int | None = None,
) -> torch.Tensor:
    """A learnable parameter, made at its first use and read from the store from then on.

    Args:
        name: its name in the store.
        init_tensor: the first value, constrained, or a function that computes it. Ignored if the
            parameter exists.
        constraint: set that the value lies in; it is stored unconstrained.
        event_dim: number of rightmost dimensions that are not batch dimensions. With it, a
            parameter of a plate's full size is subsampled inside of the plate.

    Returns:
        The constrained value. Its method ``unconstrained()`` gives the leaf that is optimized.

    Raises:
        MissingParamError: it does not exist and there is no ``init_tensor``.
        ConstraintError: ``init_tensor`` lies outside of ``constraint``.
        DtypeError: ``init_tensor`` is no tensor, or one mapped by ``torch.func.vmap``.

    >>> param("rate", torch.tensor(2.0), constraint=constraints.positive)
    tensor(2., grad_fn=<ExpBackward0>)
    >>> param("rate").unconstrained()
    tensor(0.6931, requires_grad=True)
    """
    check_name(name, "param")
    args = (name,) if init_tensor is None else (name, init_tensor)
    if not STACK:
        return _get_param(*args, constraint=constraint, event_dim=event_dim)
    kwargs = {"constraint": constraint, "event_dim": event_dim}
    msg = Message("param", name, _get_param, args, kwargs)
    apply_stack(msg)
    return msg.value


def _get_param(*args: Any, **kwargs: Any) -> torch.Tensor:
    # A function and not the store's method: a pickled trace must not carry the store with it.
    return PARAM_STORE.get_param(*args, **kwargs)


# ---- random variables ----


def sample(
    name: str,
    fn: Any,
    *args: Any,
    obs: Any = None,
    obs_mask: torch.Tensor | bool | None = None,
    infer: InferDict | None = None,
    **kwargs: Any,
) -> Any:
    """A random variable with distribution ``fn``: latent, or observed as ``obs``.

    Args:
        name: its name, used once in a run.
        fn: a distribution, or a function to be called with ``*args, **kwargs``.
        obs: observed value, a tensor or a number; broadcasts with ``batch_shape + event_shape``.
        obs_mask: bool tensor that broadcasts with the batch shape: where it is false, ``obs`` is
            ignored and the value imputed. This makes two sites, ``<name>_observed`` and the latent
            ``<name>_unobserved``, and a deterministic one with the name.
        infer: options of inference, such as ``{"enumerate": "parallel"}``.

    Returns:
        The value.

    >>> sample("x", dist.Delta(torch.tensor(1.5)))
    tensor(1.5000)
    """
    if name.__class__ is not str:
        check_name(name, "sample")
    if not callable(fn):
        raise _not_a_distribution(name, fn)
    if obs_mask is not None:
        return _sample_partly_observed(name, fn, obs, obs_mask, args, infer, kwargs)
    if infer is None:
        infer = {}
        is_observed = obs is not None
    else:
        infer = dict(infer)
        is_observed = infer.pop("is_observed", obs is not None)
    if STACK:
        msg = Message("sample", name, fn, args, kwargs, obs, is_observed, 1.0, None, (), infer)
        apply_stack(msg)
        return msg.value
    if obs is not None and not infer.get("_deterministic"):
        warnings.warn(
            f"trying to observe a value outside of inference at {name}",
            RuntimeWarning,
            stacklevel=2,
        )
        return obs
    return fn(*args, **kwargs)


def _not_a_distribution(name: str, fn: Any) -> DtypeError:
    family = type(fn).__name__
    if isinstance(fn, torch.distributions.Distribution):
        remedy = f"use fastsvi.distributions.{family} instead of torch.distributions.{family}"
    else:
        remedy = 'give a distribution, as in sample("x", dist.Normal(0.0, 1.0))'
    return DtypeError(f"site {name!r}: cannot sample from {describe(fn)}; {remedy}")


def _sample_partly_observed(
    name: str,
    fn: Any,
    obs: Any,
    obs_mask: torch.Tensor | bool,
    args: tuple[Any, ...],
    infer: InferDict | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    mask = torch.as_tensor(obs_mask)
    with poutine.mask(mask=mask):
        observed = sample(f"{name}_observed", fn, *args, obs=obs, infer=infer, **kwargs)
    with poutine.mask(mask=~mask):
        unobserved = sample(f"{name}_unobserved", fn, *args, infer=infer, **kwargs)
    is_observed = mask.reshape(mask.shape + (1,) * fn.event_dim)
    try:
        value = torch.where(is_observed, observed, unobserved)
    except RuntimeError as error:
        shape = torch.broadcast_shapes(getattr(observed, "shape", ()), unobserved.shape)
        raise ShapeError(
            f"site {name!r}: obs_mask of shape {tuple(mask.shape)} does not broadcast with the "
            f"batch shape {tuple(shape[: len(shape) - fn.event_dim])}"
        ) from error
    return deterministic(name, value, event_dim=fn.event_dim)


def factor(name: str, log_factor: torch.Tensor | float, *, has_rsample: bool | None = None) -> None:
    """Add ``log_factor`` (shape: batch shape; in log space) to the log-density of the program.

    In a guide ``has_rsample`` must say whether the factor comes from reparameterized sampling
    (``True``, e.g. the log-determinant of a transform of such a sample) or not (``False``).
    """
    unit = dist.Unit(log_factor, has_rsample=has_rsample)
    sample(name, unit, obs=unit.sample(), infer={"is_auxiliary": True})


def deterministic(name: str, value: Any, event_dim: int | None = None) -> torch.Tensor:
    """Record ``value`` as a site, without an effect on the density.

    ``event_dim`` is the number of rightmost dimensions that belong to the event; all by default.

    >>> with poutine.trace() as tracer:
    ...     x = deterministic("x", torch.ones(2))
    >>> tracer.trace.nodes["x"]["value"], tracer.trace.log_prob_sum()
    (tensor([1., 1.]), tensor(0.))
    """
    value = torch.as_tensor(value)
    event_dim = value.dim() if event_dim is None else event_dim
    fn = dist.Delta(value, event_dim=event_dim).mask(False)
    return sample(name, fn, obs=value, infer={"_deterministic": True})


@effectful(type="barrier")
def barrier(data: Any) -> Any:
    """``data`` itself. Kept for programs written for Pyro's lazy evaluation."""
    return data


# ---- plates ----


def subsample(data: torch.Tensor, event_dim: int) -> torch.Tensor:
    """The part of ``data`` that the enclosing plates have drawn.

    ``data`` has shape ``[*batch, *event]`` with ``event_dim`` event dimensions, and the plates'
    full sizes (or 1) along their dims. So a model can be given all data, whatever it subsamples.

    >>> with plate("data", 10, subsample_size=3):
    ...     subsample(torch.arange(10.0), event_dim=0).shape
    torch.Size([3])
    """
    if not isinstance(event_dim, int) or event_dim < 0:
        raise PlateError(
            f"subsample: event_dim is the number of event dimensions, found {describe(event_dim)}"
        )
    if not STACK:
        return data
    # event_dim must be a keyword of the message, where the plates look for it.
    msg = Message("subsample", fn=_identity, args=(data,), kwargs={"event_dim": event_dim})
    apply_stack(msg)
    return msg.value


def _identity(data: torch.Tensor, event_dim: int) -> torch.Tensor:
    return data


class plate(PlateMessenger):
    """Declares that what is computed under it is independent along a batch dimension.

    As a context manager it is vectorized: it takes a batch dim, yields the indices as a tensor
    ``[subsample_size]``, and expands distributions to its size. As an iterable it is sequential and
    yields the indices one by one. It may be used several times, and as a decorator.

    With ``subsample_size`` or ``subsample`` it shows a part of the indices, and log-densities are
    scaled by ``size / subsample_size``, which makes them unbiased for the whole.

    Args:
        name: its name; model and guide share a plate's indices by it.
        size: number of independent parts. Without it, the plate takes any size.
        subsample_size: how many of them to draw at random, without repetition.
        subsample: the indices, drawn by the caller; anything with a length.
        dim: batch dim, counted from the right (negative). By default the rightmost free one.
        device: where the indices live; by default where tensors are made.
        use_cuda: deprecated, use ``device``.

    Raises:
        PlateError: sizes that contradict each other, a name or dim in use.
        ShapeError: a site's distribution, or a param, has another size along the plate's dim.

    >>> data = torch.randn(6)
    >>> with plate("data", 6) as i:
    ...     x = sample("x", dist.Normal(0.0, 1.0))
    >>> i.shape, x.shape
    (torch.Size([6]), torch.Size([6]))
    >>> with plate("columns", 2, dim=-1), plate("rows", 3, dim=-2):
    ...     sample("table", dist.Normal(0.0, 1.0)).shape
    torch.Size([3, 2])
    >>> [i for i in plate("loop", 3)]
    [0, 1, 2]
    """


class iarange(plate):
    """Deprecated name of the vectorized :class:`plate`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _warn_deprecated("iarange")
        super().__init__(*args, **kwargs)


class irange(SubsampleMessenger):
    """Deprecated name of the sequential :class:`plate`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _warn_deprecated("irange")
        super().__init__(*args, **kwargs)


def _warn_deprecated(name: str) -> None:
    warnings.warn(f"{name} is deprecated; use plate instead", DeprecationWarning, stacklevel=3)


@contextmanager
def plate_stack(prefix: str, sizes: Sequence[int], rightmost_dim: int = -1) -> Iterator[None]:
    """Plates ``<prefix>_0``, ``<prefix>_1``, ... at ``rightmost_dim`` and leftwards of it, so that
    the batch shape under them ends in ``sizes``.

    >>> with plate_stack("image", (3, 4)):
    ...     sample("pixels", dist.Normal(0.0, 1.0)).shape
    torch.Size([3, 4])
    """
    if rightmost_dim >= 0:
        raise PlateError(f"plate_stack: rightmost_dim must be negative, found {rightmost_dim}")
    with ExitStack() as stack:
        for i, size in enumerate(reversed(sizes)):
            stack.enter_context(plate(f"{prefix}_{i}", size, dim=rightmost_dim - i))
        yield


# ---- modules ----


def module(
    name: str, nn_module: torch.nn.Module, update_module_params: bool = False
) -> torch.nn.Module:
    """Register the parameters of a torch module in the store, as ``<name>$$$<parameter>``.

    Parameters with ``requires_grad=False`` are left out, with a warning if the module is in
    training mode; buffers are not parameters. If the store holds other tensors under these names
    (after loading a checkpoint, or with a second module), the module keeps its own unless
    ``update_module_params=True`` puts the store's in their place, everywhere where they are shared.

    Returns ``nn_module``. Consider :class:`~fastsvi.nn.PyroModule` instead.
    """
    check_name(name, "module")
    if MODULE_NAMESPACE_DIVIDER in name:
        raise SiteError(
            f"the module name {name!r} contains {MODULE_NAMESPACE_DIVIDER!r}, which is reserved"
        )
    if not isinstance(nn_module, torch.nn.Module):
        hint = "make an instance of it" if isinstance(nn_module, type) else "give a torch.nn.Module"
        raise DtypeError(f"module {name!r}: found {describe(nn_module)}; {hint}")
    replaced: dict[int, Any] = {}  # by identity of the module's own parameter
    for param_name, own in nn_module.named_parameters():
        if own.requires_grad:
            stored = param(param_with_module_name(name, param_name), own)
            if stored is not own:
                replaced[id(own)] = stored
        elif nn_module.training:
            warnings.warn(
                f"{param_name} of module {name!r} was not registered in the param store because "
                "requires_grad=False; nn_module.train(False) silences this warning",
                FastSVIWarning,
                stacklevel=2,
            )
    if replaced and update_module_params:
        for part in nn_module.modules():
            for key, shared in part._parameters.items():
                if id(shared) in replaced:
                    # Not by setattr: under lift the value is a plain tensor, no Parameter.
                    part._parameters[key] = replaced[id(shared)]
    return nn_module


def random_module(
    name: str, nn_module: torch.nn.Module, prior: Any, *args: Any, **kwargs: Any
) -> Callable[[], torch.nn.Module]:
    """Deprecated; use :class:`~fastsvi.nn.PyroModule`. A function that samples copies of
    ``nn_module`` with parameters drawn from ``prior`` (see ``poutine.lift``).
    """
    warnings.warn(
        "random_module is deprecated; use fastsvi.nn.PyroModule to make Bayesian modules",
        FutureWarning,
        stacklevel=2,
    )
    lifted = poutine.lift(module, prior=prior)

    def draw() -> torch.nn.Module:
        kwargs["update_module_params"] = True  # or the draws would not reach the copy
        return lifted(name, copy.deepcopy(nn_module), *args, **kwargs)

    return draw


# ---- validation ----


def enable_validation(is_validate: bool = True) -> None:
    """Check models, guides and distributions at every step (``True``) or never (``False``).

    By default (setting ``validate="first"``) the first step of each inference run is checked.
    """
    poutine.enable_validation(is_validate)
    dist.enable_validation(is_validate)


@contextmanager
def validation_enabled(is_validate: bool = True) -> Iterator[None]:
    """:func:`enable_validation` for the length of a ``with`` block."""
    validate = "always" if is_validate else "never"
    with settings.context(validate=validate), dist.validation_enabled(is_validate):
        yield
