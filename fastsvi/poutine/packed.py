"""Packed tensors: the dimensions of size one are squeezed out and the others have a letter."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import torch

from fastsvi.errors import ShapeError


def symbol(index: int) -> str:
    """The ``index``-th dimension symbol of einsum notation: a to z, A to Z, then beyond ASCII."""
    return string.ascii_letters[index] if index < 52 else chr(index + 140)


def pack(value: Any, dim_to_symbol: Mapping[int, str]) -> Any:
    """Squeeze ``value`` and note the symbols of its dimensions in ``_pyro_dims``.

    Anything but a tensor is returned as it is.
    """
    if not isinstance(value, torch.Tensor):
        return value
    wide = [dim - value.dim() for dim, size in enumerate(value.shape) if size > 1]
    unknown = [dim for dim in wide if dim not in dim_to_symbol]
    if unknown:
        raise ShapeError(
            f"a tensor of shape {tuple(value.shape)} has more than one entry along dim "
            f"{unknown[-1]}, which is neither a plate's nor an enumerated site's (those are "
            f"{sorted(dim_to_symbol)}); enclose the site in a plate with dim={unknown[-1]}, or "
            "declare the dim part of the event by .to_event(...)"
        )
    packed = value.squeeze()
    packed._pyro_dims = "".join(dim_to_symbol[dim] for dim in wide)  # type: ignore[attr-defined]
    return packed
