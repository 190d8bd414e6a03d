"""From the unconstrained scale of a normal to the scale, its logarithm, and their derivatives."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

ScaleMap = Literal["exp", "softplus", "identity"]

SCALE_MAPS: tuple[str, ...] = get_args(ScaleMap)

# Below this softplus(x) = exp(x) to the last bit of float64, so its log is x.
_SOFTPLUS_IS_EXP = -37.0


def scale_of(raw_scale: Tensor, scale_map: ScaleMap) -> Tensor:
    """The scale, from its unconstrained value."""
    if scale_map == "exp":
        return raw_scale.exp()
    return softplus(raw_scale) if scale_map == "softplus" else raw_scale


def log_scale_of(raw_scale: Tensor, scale: Tensor, scale_map: ScaleMap) -> Tensor:
    """log(scale), right also where the scale has underflowed."""
    if scale_map == "exp":
        return raw_scale
    if scale_map == "softplus":
        return torch.where(raw_scale < _SOFTPLUS_IS_EXP, raw_scale, scale.log())
    return scale.log()


def scale_slope(raw_scale: Tensor, scale: Tensor, scale_map: ScaleMap) -> Tensor | None:
    """d scale / d raw_scale, or None where it is 1."""
    if scale_map == "exp":
        return scale
    return raw_scale.sigmoid() if scale_map == "softplus" else None


def log_scale_slope(
    raw_scale: Tensor, scale: Tensor, slope: Tensor | None, scale_map: ScaleMap
) -> Tensor | None:
    """d log(scale) / d raw_scale, or None where it is 1."""
    if scale_map == "exp":
        return None
    if slope is None:
        return scale.reciprocal()
    return torch.where(raw_scale < _SOFTPLUS_IS_EXP, 1.0, slope / scale)
