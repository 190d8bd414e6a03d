"""Shape and dtype of what an operation gives, without computing it.

A recording needs no more than that of a value which depends on its inputs. The values of a model
with ten million parameters would take memory and seconds; the memory that an outline asks for is
never touched, so that none is taken. (Tensors on the device "meta" tell the same of every
operation; their first use imports 900 modules.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsvi.engine.graph import members, replaced


class NeedsValues(Exception):
    """An operation whose result is not known here before it is computed."""


def outline(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A tensor like ``func(*args, **kwargs)``, but for the values; a view is one.

    Raises:
        NeedsValues: there is no rule for this operation.

    >>> one = outline(torch.ops.aten.sum.dim_IntList, (torch.ones(4, 3), [1]), {})
    >>> one.shape, one.dtype
    (torch.Size([4]), torch.float32)
    """
    if any(result.alias_info is not None for result in func._schema.returns):
        return func(*args, **kwargs)
    rule = _RULES.get(func._schema.name.partition("::")[2])
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = _broadcast
    if rule is None:
        raise NeedsValues(str(func))
    named = {argument.name: argument.default_value for argument in func._schema.arguments}
    named |= dict(zip(named, args, strict=False)) | kwargs
    shape = rule(named)
    if func._schema.name in _DRAWS:
        return torch.empty(shape, dtype=named["dtype"], device=named["key"].device)
    # Dtype and device are those for single elements.
    one = lambda x: x.new_ones((1,) * x.dim())  # noqa: E731
    single = func(*replaced(args, Tensor, one), **replaced(kwargs, Tensor, one))
    if not isinstance(single, Tensor):
        raise NeedsValues(str(func))
    return torch.empty(shape, dtype=single.dtype, device=single.device)


def is_larger(func: Any, args: tuple[Any, ...], limit: int) -> bool:
    """Whether an operation reads or draws a tensor of ``limit`` elements or more."""
    if func._schema.name in _DRAWS:
        return math.prod(args[3:6]) >= limit
    return any(x.numel() >= limit for x in members(args, Tensor))


def _broadcast(named: dict[str, Any]) -> torch.Size:
    tensors = list(members(named, Tensor))
    shape: list[int] = []  # torch.broadcast_shapes would import SymPy
    for x in tensors:
        shape = [1] * (x.dim() - len(shape)) + shape
        for d in range(1, x.dim() + 1):
            shape[-d] = x.shape[-d] if x.shape[-d] != 1 else shape[-d]
    return torch.Size(shape)


def _reduced(named: dict[str, Any]) -> list[int]:
    shape, dims = list(named["self"].shape), named.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or range(len(shape))
    gone = {d % len(shape) for d in dims}
    if named.get("keepdim"):
        return [1 if d in gone else n for d, n in enumerate(shape)]
    return [n for d, n in enumerate(shape) if d not in gone]


def _joined(named: dict[str, Any]) -> list[int]:
    tensors = [x for x in named["tensors"] if x.shape != (0,)]
    shape = list(tensors[0].shape)
    shape[named["dim"]] = sum(x.shape[named["dim"]] for x in tensors)
    return shape


_DRAWS = ("fastsvi::normal_noise", "fastsvi::uniform_noise")

_RULES: dict[str, Callable[[dict[str, Any]], Any]] = {
    **dict.fromkeys(("sum", "mean", "amax", "amin", "all", "any"), _reduced),
    **dict.fromkeys(
        ("clone", "_to_copy", "where", "fill", "masked_fill", "sum_of_rounds"), _broadcast
    ),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), _broadcast),
    **dict.fromkeys(
        ("normal_noise", "uniform_noise"),
        lambda named: [named["fits"], named["particles"], named["elements"]],
    ),
    "cat": _joined,
}
