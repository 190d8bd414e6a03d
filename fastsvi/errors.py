"""Typed errors, and the words they use.

Every error of fastsvi says what was found (with values), the likely cause and the remedy, and
names the site, parameter, argument or file. Each type also derives from the builtin that a Pyro
user's ``except`` clause expects: programs that catch ``ValueError`` or ``KeyError`` go on working.
"""

from __future__ import annotations

from typing import Any

import torch

from fastsvi.torch_private import is_batched


class FastSVIError(Exception):
    """Base of all errors raised by fastsvi."""


class ConstraintError(FastSVIError, ValueError):
    """A value lies outside the constraint of its parameter or the support of its site."""


class ShapeError(FastSVIError, ValueError):
    """A tensor has another shape than its parameter, site or plate asks for."""


class DtypeError(FastSVIError, TypeError):
    """A value has the wrong type or dtype, such as a float where a tensor is needed."""


class DeviceError(FastSVIError, ValueError):
    """Tensors that must live together are on different devices."""


class MissingParamError(FastSVIError, KeyError):
    """A parameter was asked for by a name that the store does not hold."""

    # KeyError prints the repr of its argument, which would show newlines as "\\n".
    __str__ = Exception.__str__


class SiteError(FastSVIError, RuntimeError):
    """A sample or param site is used wrongly: a duplicate name, a missing value, a bad plate."""


class MissingSiteError(FastSVIError, KeyError):
    """A site was asked for by a name that the trace, model or guide does not have."""

    __str__ = Exception.__str__


class NonFiniteError(FastSVIError, ArithmeticError):
    """A loss, log-density or gradient is NaN or infinite."""


class CheckpointError(FastSVIError, RuntimeError):
    """A checkpoint or store file is truncated, unsafe, or of another format."""


class OutOfMemoryError(FastSVIError, MemoryError):
    """A step needs more memory than there is; the message names sizes that would fit."""


class CaptureError(FastSVIError, RuntimeError):
    """A step cannot be recorded as a graph; the message names the statement at fault."""


class KernelError(FastSVIError, ValueError):
    """A kernel was called with arguments it cannot serve, or its back end is not available."""


class FastSVIWarning(UserWarning):
    """Base of all warnings issued by fastsvi."""


def describe(value: Any) -> str:
    """Say in one line what ``value`` is: type, shape, dtype, device, range and non-finite entries.

    Meant for error messages only: it copies to the host and so synchronises.

    >>> describe(torch.tensor([1.0, float("nan"), 3.0]))
    'tensor of shape (3,), float32 on cpu, range [1, 3], 1 of 3 entries NaN (first at index 1)'
    >>> describe(0.5)
    'float 0.5'
    """
    if not isinstance(value, torch.Tensor):
        text = repr(value)
        return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
    dtype = str(value.dtype).removeprefix("torch.")
    head = f"tensor of shape {tuple(value.shape)}, {dtype} on {value.device}"
    if value.numel() == 0 or value.is_complex() or is_batched(value):
        return head
    flat = value.detach().reshape(-1)
    if flat.numel() == 1:
        return f"{head}, value {flat.item():g}"
    finite = torch.isfinite(flat)
    parts = [head]
    if bool(finite.any()):
        inside = flat[finite]
        parts.append(f"range [{inside.min().item():g}, {inside.max().item():g}]")
    for word, mask in (("NaN", torch.isnan(flat)), ("infinite", torch.isinf(flat))):
        count = int(mask.sum())
        if count:
            where = index_of_first(mask.reshape(value.shape))
            parts.append(f"{count} of {flat.numel()} entries {word} (first at index {where})")
    return ", ".join(parts)


def index_of_first(mask: torch.Tensor) -> str:
    """Index of the first true entry of ``mask``, as it would be written between brackets."""
    position = tuple(int(i) for i in torch.nonzero(mask)[0])
    return ", ".join(map(str, position)) if position else "()"
