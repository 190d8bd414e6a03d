"""Checks of arguments and values, and the words in which they fail.

Nothing here runs while validation is off. The checks read tensors back to the host, also under
``torch.func.vmap``: there they look at all particles or fits at once.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from fastsvi.errors import (
    ConstraintError,
    DeviceError,
    DtypeError,
    ShapeError,
    describe,
    index_of_first,
)

_functorch = torch._C._functorch


class ArgumentError(DtypeError, ValueError):
    """An argument is not a number or tensor; also a ``ValueError``, which torch raises here."""


class BroadcastError(ShapeError, RuntimeError):
    """Shapes do not broadcast; also a ``RuntimeError``, which torch raises here."""


def check_arguments(
    family: str, arguments: Mapping[str, Any], arg_constraints: Mapping[str, Constraint]
) -> None:
    """Raise if an argument violates its constraint or lives on another device than the rest."""
    _check_devices(family, arguments)
    for name, constraint in arg_constraints.items():
        if name not in arguments or constraints.is_dependent(constraint):
            continue
        value = arguments[name]
        valid = _check(constraint, value)
        if not _everywhere(valid):
            raise ConstraintError(
                f"{family}: argument {name} must satisfy {constraint!r}, "
                f"but {_offence(constraint, value, valid)}. {_remedy(constraint, value, name)}"
            )


def check_value(
    family: str,
    value: Tensor,
    batch_shape: torch.Size,
    event_shape: torch.Size,
    support: Constraint | None,
) -> None:
    """Raise if ``value`` has a shape that cannot be scored, or lies outside ``support``."""
    start = value.dim() - len(event_shape)
    if start < 0 or value.shape[start:] != event_shape:
        raise ShapeError(
            f"{family}: the value must end in the event shape {tuple(event_shape)}, found "
            f"{describe(value)}. Check to_event(n) and the trailing dimensions of the value"
        )
    for here, there in zip(reversed(value.shape[:start]), reversed(batch_shape), strict=False):
        if here != there and here != 1 and there != 1:
            raise ShapeError(
                f"{family}: a value of shape {tuple(value.shape)} does not broadcast against "
                f"batch shape {tuple(batch_shape)} and event shape {tuple(event_shape)}. "
                "Dimensions are aligned from the right: add one with unsqueeze(-1), or expand "
                "the distribution"
            )
    if support is None:
        return
    valid = _check(support, value)
    if not _everywhere(valid):
        raise ConstraintError(
            f"{family}: the value must lie in the support {support!r}, "
            f"but {_offence(support, value, valid)}. {_remedy_for_value(support, value)} "
            "(validate_args=False skips this check)"
        )


def arguments_of(dist: Any) -> dict[str, Any]:
    """Arguments of a torch distribution that its constraints can be checked on.

    An argument that torch would derive from another one (``logits`` from ``probs``) is left out.
    """
    try:
        names: Iterable[str] = dist.arg_constraints
    except NotImplementedError:
        warnings.warn(
            f"{type(dist).__name__} defines no arg_constraints, so its arguments cannot be "
            "checked; set arg_constraints = {} on the class or pass validate_args=False",
            stacklevel=4,
        )
        return {}
    lazy = torch.distributions.utils.lazy_property
    return {
        name: getattr(dist, name)
        for name in names
        if name in vars(dist) or not isinstance(getattr(type(dist), name), lazy)
    }


def as_operand(family: str, name: str, value: Any) -> Tensor | float:
    """``value`` as a tensor or a Python float; numpy scalars and integers are converted."""
    if isinstance(value, Tensor) or hasattr(value, "__torch_function__"):
        return value
    if isinstance(value, (numbers.Real, np.number, np.bool_)):
        return float(value)
    hint = " (torch.as_tensor converts it)" if isinstance(value, (np.ndarray, list, tuple)) else ""
    raise ArgumentError(
        f"{family}: argument {name} must be a number or a tensor{hint}, found {describe(value)}"
    )


def as_value(family: str, value: Any, prototype: Tensor | None) -> Tensor:
    """``value`` as a tensor: numbers and numpy arrays take the dtype and device of ``prototype``.

    ``prototype=None`` stands for the default dtype on the CPU.
    """
    if isinstance(value, Tensor) or hasattr(value, "__torch_function__"):
        return value
    if isinstance(value, (numbers.Number, np.generic, np.ndarray)):
        if prototype is None:
            return torch.as_tensor(value, dtype=torch.get_default_dtype())
        return torch.as_tensor(value, dtype=prototype.dtype, device=prototype.device)
    raise ArgumentError(
        f"{family}: the value to be scored must be a tensor or a number, found {describe(value)}"
    )


def shapes_clash(family: str, arguments: Mapping[str, Any]) -> BroadcastError:
    """The error for arguments that do not broadcast against each other."""
    shapes = ", ".join(
        f"{name} {tuple(value.shape)}"
        for name, value in arguments.items()
        if hasattr(value, "shape")
    )
    return BroadcastError(
        f"{family}: the shapes of the arguments do not broadcast: {shapes}. Dimensions are "
        "aligned from the right: insert one with unsqueeze(-1) or transpose"
    )


def _check_devices(family: str, arguments: Mapping[str, Any]) -> None:
    # A 0-dimensional CPU tensor mixes with any device, as in torch's arithmetic.
    devices = {
        name: value.device
        for name, value in arguments.items()
        if isinstance(value, Tensor) and (value.dim() or value.device.type != "cpu")
    }
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise DeviceError(
            f"{family}: arguments are on different devices: {found}. Move them with .to(device)"
        )


def _check(constraint: Constraint, value: Any) -> Any:
    """``constraint.check(value)``: a bool for a number, else booleans of the batch shape."""
    # Some checks branch on their result, which vmap forbids. Without bounds that might be mapped
    # themselves, a constraint can look at all particles at once.
    if isinstance(value, Tensor) and not vars(constraint):
        value = _concrete(value)
    return constraint.check(value)


def _concrete(tensor: Tensor) -> Tensor:
    """The ordinary tensor below vmap and grad wrappers, mapped dimensions in front."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        batched = _functorch.is_batchedtensor(tensor)
        bdim = _functorch.maybe_get_bdim(tensor)
        tensor = _functorch.get_unwrapped(tensor)
        if batched:
            tensor = tensor.movedim(bdim, 0)
    return tensor


def _everywhere(valid: Any) -> bool:
    if not isinstance(valid, Tensor):
        return bool(valid)
    valid = _concrete(valid)
    return valid.is_meta or bool(valid.all())  # A meta tensor has a shape and no values.


def _offence(constraint: Constraint, value: Any, valid: Any) -> str:
    """The first entry at fault and its index, then what the whole value looks like."""
    if not isinstance(value, Tensor):
        return f"found {value!r}"
    if not isinstance(valid, Tensor):
        return f"found {describe(value)}"
    value, valid = _concrete(value.detach()), _concrete(valid)
    event = value.shape[value.dim() - constraint.event_dim :]
    try:
        entries = value.expand(torch.broadcast_shapes(value.shape, valid.shape + event))
        invalid = ~valid.expand(entries.shape[: entries.dim() - len(event)])
    except RuntimeError:  # A constraint with a result of its own shape, such as cat.
        return f"found {describe(value)}"
    if invalid.dim() == 0:
        return f"found {_entry(entries)}"
    first = tuple(int(i) for i in invalid.nonzero()[0])
    count = f"{int(invalid.sum())} of {invalid.numel()}"
    return (
        f"found {_entry(entries[first])} at index ({index_of_first(invalid)}), "
        f"{count} entries at fault in a {describe(value)}"
    )


def _entry(entry: Tensor) -> str:
    if entry.dim() == 0:
        return f"{entry.item():g}" if entry.is_floating_point() else str(entry.item())
    if entry.numel() <= 16:
        return str(entry.tolist())
    return f"a {describe(entry)}"


def _remedy(constraint: Constraint, value: Any, name: str) -> str:
    if _any_nan(value):
        return _NAN
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    for kind, remedy in _REMEDIES:
        if isinstance(constraint, kind):
            return remedy
    return f"Pass {name} inside the constraint, or validate_args=False to skip the check"


def _remedy_for_value(support: Constraint, value: Tensor) -> str:
    if _any_nan(value):
        return f"{_NAN}; missing data can be masked with .mask()"
    if support.is_discrete:
        return "Check how the data are coded (whole numbers? counted from 0?) or change the family"
    return (
        "Check the data, or for a latent site its guide, or choose a family whose support contains "
        "the value"
    )


_NAN = (
    "NaN comes from an earlier step: look for a division by zero, the log of a negative number, "
    "or a step size that is too large"
)


def _any_nan(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return value != value
    return value.is_floating_point() and not _everywhere(~torch.isnan(value))


_REMEDIES: tuple[tuple[type, str], ...] = (
    (
        type(constraints.positive),
        "Declare its param with constraint=constraints.positive, or map it with exp or softplus",
    ),
    (
        type(constraints.nonnegative),
        "Check its sign; a param can be declared with constraint=constraints.positive",
    ),
    (
        type(constraints.unit_interval),
        "Check the bounds; for probabilities pass logits= instead of probs=, or apply sigmoid",
    ),
    (type(constraints.simplex), "Normalise it with x / x.sum(-1, keepdim=True), or use softmax"),
    (
        type(constraints.lower_cholesky),
        "Pass torch.linalg.cholesky of a positive definite matrix",
    ),
    (
        type(constraints.positive_definite),
        "Symmetrise it with (x + x.mT) / 2 and add a small multiple of the identity",
    ),
    (
        type(constraints.nonnegative_integer),
        "Only whole numbers from the lower bound on are possible; round or clamp it",
    ),
    (constraints.less_than, "Exchange or separate the two bounds"),
)
