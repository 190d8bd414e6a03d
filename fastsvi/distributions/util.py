"""Shapes, masks and the validation switch: small functions that every distribution file uses."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "SCALAR",
    "Shape",
    "broadcast_shape",
    "enable_validation",
    "eye_like",
    "is_identically_one",
    "is_identically_zero",
    "is_validation_enabled",
    "scalar_like",
    "scale_and_mask",
    "sum_leftmost",
    "sum_rightmost",
    "validation_enabled",
]

Shape = torch.Size | list[int] | tuple[int, ...]
"""What callers may pass for a shape."""

SCALAR = torch.Size()
"""Shape of a single number; also the empty sample shape."""


def broadcast_shape(*shapes: Iterable[int], strict: bool = False) -> torch.Size:
    """Shape that tensors of ``shapes`` broadcast to.

    With ``strict=True`` a shape may be extended on the left, but a size of 1 is not stretched.

    >>> broadcast_shape((3, 1), (5,))
    torch.Size([3, 5])
    >>> broadcast_shape((3, 1), (5,), strict=True)
    Traceback (most recent call last):
    ...
    ValueError: shapes (3, 1) and (5,) do not broadcast (a size of 1 is not stretched here)
    """
    result: list[int] = []
    sizes = [tuple(shape) for shape in shapes]
    for shape in sizes:
        for i, size in enumerate(reversed(shape)):
            if i >= len(result):
                result.append(size)
            elif result[i] == 1 and not strict:
                result[i] = size
            elif result[i] != size and (strict or size != 1):
                why = " (a size of 1 is not stretched here)" if strict else ""
                listed = " and ".join(map(str, sizes))
                raise ValueError(f"shapes {listed} do not broadcast{why}")
    return torch.Size(reversed(result))


def sum_rightmost(value: Any, dim: int | float) -> Any:
    """Sum out the ``dim`` rightmost dimensions; a negative ``dim`` keeps ``-dim`` on the left.

    >>> sum_rightmost(torch.ones(2, 3, 4), 2)
    tensor([12., 12.])
    >>> sum_rightmost(torch.ones(2, 3, 4), -2).shape
    torch.Size([2, 3])
    """
    if isinstance(value, numbers.Number):
        return value
    if dim < 0:
        dim += value.dim()
    if dim == 0:
        return value
    if dim >= value.dim():
        return value.sum()
    return value.sum(tuple(range(-int(dim), 0)))


def sum_leftmost(value: Any, dim: int | float) -> Any:
    """Sum out the ``dim`` leftmost dimensions; a negative ``dim`` keeps ``-dim`` on the right.

    >>> sum_leftmost(torch.ones(2, 3, 4), 1).shape
    torch.Size([3, 4])
    >>> sum_leftmost(torch.ones(2, 3, 4), -1).shape
    torch.Size([4])
    """
    if isinstance(value, numbers.Number):
        return value
    if dim < 0:
        dim += value.dim()
    if dim == 0:
        return value
    if dim >= value.dim():
        return value.sum()
    return value.sum(tuple(range(int(dim))))


def is_identically_zero(x: Any) -> bool:
    """Whether ``x`` is the number zero. A tensor never is: reading it would wait for the device."""
    return isinstance(x, numbers.Number) and x == 0


def is_identically_one(x: Any) -> bool:
    """Whether ``x`` is the number one. A tensor never is: reading it would wait for the device."""
    return isinstance(x, numbers.Number) and x == 1


def scale_and_mask(
    tensor: Tensor | float, scale: Tensor | float = 1.0, mask: Tensor | bool | None = None
) -> Any:
    """Multiply by ``scale`` and put zeros where ``mask`` is false, skipping what changes nothing.

    ``tensor`` may be the number zero, which is returned as it is.

    >>> scale_and_mask(torch.ones(3), 2.0, torch.tensor([True, False, True]))
    tensor([2., 0., 2.])
    """
    if is_identically_zero(tensor):
        return tensor
    if mask is False:
        return torch.zeros_like(tensor)  # type: ignore[arg-type]
    if not is_identically_one(scale):
        tensor = tensor * scale
    if mask is None or mask is True:
        return tensor
    return torch.where(mask, tensor, 0.0)


def scalar_like(prototype: Tensor, fill_value: float) -> Tensor:
    """A tensor of shape ``()`` with the dtype and device of ``prototype``."""
    return torch.tensor(fill_value, dtype=prototype.dtype, device=prototype.device)


def eye_like(value: Tensor, m: int, n: int | None = None) -> Tensor:
    """The ``m`` by ``n`` identity (``n`` defaults to ``m``), dtype and device as ``value``."""
    return torch.eye(m, m if n is None else n, dtype=value.dtype, device=value.device)


def enable_validation(is_validate: bool = True) -> None:
    """Switch the checks of arguments and values on or off for all distributions.

    This is the switch of ``torch.distributions``, so it also covers torch's own classes. A
    distribution built with ``validate_args=`` keeps its own choice.
    """
    torch.distributions.Distribution.set_default_validate_args(bool(is_validate))


def is_validation_enabled() -> bool:
    """Whether distributions check their arguments and values by default."""
    return torch.distributions.Distribution._validate_args


@contextmanager
def validation_enabled(is_validate: bool = True) -> Iterator[None]:
    """Switch the checks on (or off) for the length of a ``with`` block.

    >>> with validation_enabled(False):
    ...     is_validation_enabled()
    False
    """
    before = is_validation_enabled()
    enable_validation(is_validate)
    try:
        yield
    finally:
        enable_validation(before)
