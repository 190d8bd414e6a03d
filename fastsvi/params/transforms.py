"""From a parameter's constraint to its transform, and from a constrained value to a leaf.

``transform_to`` of torch is the registry: a constraint that is registered there, by
``fastsvi.distributions``, by Pyro or by a user, can be a parameter's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from numbers import Real
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.distributions import transforms as tt
from torch.distributions.constraints import Constraint

from fastsvi import settings
from fastsvi.errors import ConstraintError, DtypeError, FastSVIError, ShapeError, describe
from fastsvi.kernels.transforms import Kind

Reader = Callable[[Tensor], Tensor]


class UnknownConstraintError(FastSVIError, NotImplementedError):
    """No transform is registered for a constraint, so nothing can be optimized under it."""


class Affine(NamedTuple):
    """An elementwise transform as ``y = shift + scale * f(x)``, with ``f`` named by ``kind``."""

    kind: Kind
    shift: float
    scale: float


class Coding(NamedTuple):
    """How a parameter is stored and read."""

    transform: tt.Transform  # unconstrained to constrained
    read: Reader | None  # the same as a function; None where both spaces are one
    affine: Affine | None  # None where the transform is not elementwise with scalar bounds


_codings: WeakKeyDictionary[Constraint, tuple[Any, Coding]] = WeakKeyDictionary()


def coding_of(constraint: Constraint, name: str) -> Coding:
    """Transform of the parameter ``name`` with this constraint.

    Raises:
        UnknownConstraintError: ``transform_to`` has nothing for it.
    """
    factory = _factory(constraint)
    known = _codings.get(constraint) if isinstance(constraint, Hashable) else None
    if known is not None and known[0] is factory:
        return known[1]
    try:
        transform = transform_to(constraint)
    except NotImplementedError as error:
        raise UnknownConstraintError(
            f"param {name!r} cannot have the constraint {constraint!r}: no transform from "
            "unconstrained space is registered for it. Use another constraint (discrete and "
            "dependent ones have none), or register one with "
            "torch.distributions.transform_to.register"
        ) from error
    affine = _as_affine(transform)
    coding = Coding(transform, _reader(transform, affine), affine)
    if isinstance(constraint, Hashable):
        _codings[constraint] = (factory, coding)
    return coding


def _factory(constraint: Constraint) -> Any:
    """What the registry would call, so that a later registration is noticed."""
    return getattr(transform_to, "_registry", {}).get(type(constraint))


def _reader(transform: tt.Transform, affine: Affine | None) -> Reader | None:
    if affine == (Kind.IDENTITY, 0.0, 1.0):
        return None
    if affine == (Kind.EXP, 0.0, 1.0):
        return torch.exp  # the most common one; 0 + 1 * exp(x), as torch has it, is the same bits
    return transform


_FUNCTIONS: dict[str, Kind] = {
    "ExpTransform": Kind.EXP,
    "SigmoidTransform": Kind.SIGMOID,
    "SoftplusTransform": Kind.SOFTPLUS,
}


def _as_affine(transform: tt.Transform) -> Affine | None:
    """Recognise an elementwise transform by its parts; None if it is anything else."""
    kind, shift, scale = Kind.IDENTITY, 0.0, 1.0
    for position, part in enumerate(_parts(transform)):
        if isinstance(part, tt.AffineTransform):
            a, b = _scalar(part.loc), _scalar(part.scale)
            if a is None or b is None or b == 0.0:
                return None
            shift, scale = a + b * shift, b * scale
        elif position == 0 and type(part).__name__ in _FUNCTIONS and _is_standard(part):
            kind = _FUNCTIONS[type(part).__name__]
        else:
            return None
    return Affine(kind, shift, scale)


def _parts(transform: tt.Transform) -> list[tt.Transform]:
    if isinstance(transform, tt.IndependentTransform):
        return _parts(transform.base_transform)
    if isinstance(transform, tt.ComposeTransform):
        return [part for whole in transform.parts for part in _parts(whole)]
    return [transform]


def _is_standard(transform: tt.Transform) -> bool:
    # Pyro has a SoftplusTransform of its own; a user's class of the same name may be anything.
    return type(transform).__module__.split(".")[0] in ("torch", "pyro", "fastsvi")


def _scalar(bound: Any) -> float | None:
    """A bound as one finite number, or None: a bound per element, or an infinite one."""
    if isinstance(bound, Tensor) and bound.dim() == 0:
        bound = bound.item()
    if isinstance(bound, Real) and abs(number := float(bound)) < float("inf"):
        return number
    return None


# --- constrained value to leaf --------------------------------------------------------------


def make_leaf(name: str, value: Any, constraint: Constraint) -> Tensor:
    """The unconstrained leaf for a constrained value.

    Where both spaces are one (``real``) this is ``value`` itself, made to require gradients. It is
    copied where it is not contiguous, or not a leaf.

    Raises:
        DtypeError: not a tensor, or one that cannot have gradients.
        ConstraintError: the value is outside its constraint.
        ShapeError: the constraint does not take this shape.
        UnknownConstraintError: no transform is registered for the constraint.
    """
    _check_tensor(name, value)
    value = _without_tracking(value)
    coding = coding_of(constraint, name)
    if coding.read is None and value.is_floating_point() and _can_be_leaf(value):
        return value.requires_grad_(True)
    with torch.inference_mode(False), torch.no_grad():
        leaf = _invert(name, value, constraint, coding)
        # Of the leaf, for the logarithm of an integer is a float: Pyro takes such values.
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise DtypeError(
                f"param {name!r} must have a dtype that gradients exist for, found "
                f"{describe(value)}; convert it with .float()"
            )
        if not _can_be_leaf(leaf):
            leaf = leaf.detach().clone(memory_format=torch.contiguous_format)
    return leaf.requires_grad_(True)


def _can_be_leaf(tensor: Tensor) -> bool:
    return tensor.is_leaf and tensor.is_contiguous() and not tensor.is_inference()


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise DtypeError(
            f"param {name!r} needs a tensor, found {describe(value)}; write "
            f"torch.tensor({value!r}) instead"
            if isinstance(value, (bool, int, float))
            else f"param {name!r} needs a tensor or a function that returns one, "
            f"found {describe(value)}"
        )
    if value.layout != torch.strided:
        raise DtypeError(
            f"param {name!r} must be a dense tensor, found layout {value.layout}; "
            "convert it with .to_dense()"
        )
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise DtypeError(
            f"param {name!r} cannot be a {type(value).__name__}, which only stands for a tensor; "
            "register the param outside of tracing, from a plain tensor"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise DtypeError(
            f"param {name!r} was first met inside torch.func.vmap or grad, where its value is a "
            "batch of values; run the program once outside, or register the param beforehand"
        )


def _interceptor(cls: type) -> Any:
    function = cls.__torch_function__  # type: ignore[attr-defined]
    return getattr(function, "__func__", function)


def _without_tracking(value: Tensor) -> Tensor:
    """The tensor inside one that intercepts operations, such as Pyro's provenance tensors."""
    if _interceptor(type(value)) in (_interceptor(Tensor), _interceptor(nn.Parameter)):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


def _invert(name: str, value: Tensor, constraint: Constraint, coding: Coding) -> Tensor:
    if coding.read is None:
        return value
    try:
        leaf: Tensor = coding.transform.inv(value)
        if settings.get("validate") != "never":
            _check_inside(name, value, leaf, constraint, coding)
    except ConstraintError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        raise ShapeError(
            f"param {name!r} with constraint {constraint!r} cannot take the value "
            f"{describe(value)}: {_first_line(error)}"
        ) from error
    return leaf


def _check_inside(
    name: str, value: Tensor, leaf: Tensor, constraint: Constraint, coding: Coding
) -> None:
    """Refuse a value that would not be read back, unless the constraint is a projection.

    Pyro programs rely on projections: a simplex given as counts, a sphere as any vector, a
    Cholesky factor as a full matrix. What they get must satisfy the constraint.
    """
    inside = constraint.check(value)
    if bool(inside.all()):
        return
    # In float64, for the tolerances of torch's checks are too tight for long float32 vectors.
    wide = leaf if leaf.device.type == "mps" else leaf.double()
    back = coding.transform(wide)
    if _is_elementwise(constraint):
        accepted = bool(leaf.isfinite().all()) and _equal_to_rounding(back, value)
    else:
        accepted = bool(constraint.check(back).all()) or _equal_to_rounding(back, value)
    if not accepted:
        outside = "" if inside.dim() == 0 else f"; {int((~inside).sum())} of {inside.numel()} fail"
        raise ConstraintError(
            f"param {name!r}: the value is outside its constraint {constraint!r}: found "
            f"{describe(value)}{outside}. Pass a value in constrained space (the value itself, "
            "not its logarithm or logit), or another constraint"
        )


def _is_elementwise(constraint: Any) -> bool:
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return bool(constraint.event_dim == 0)


def _equal_to_rounding(back: Tensor, value: Tensor) -> bool:
    if back.shape != value.shape:
        return False
    rounding = 16 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    return torch.allclose(back, value.to(back.dtype), rtol=rounding, atol=rounding)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
