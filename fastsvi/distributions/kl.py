"""Closed-form KL divergences that torch does not have. ``kl_divergence`` finds them by type."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence, register_kl

from fastsvi.distributions.delta import Delta
from fastsvi.distributions.distribution import Distribution
from fastsvi.distributions.torch_distribution import (
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
)
from fastsvi.distributions.torch_families import InverseGamma
from fastsvi.distributions.util import scale_and_mask, sum_rightmost

__all__ = ["kl_divergence", "register_kl"]


@register_kl(Delta, Distribution)
def _kl_delta(p: Delta, q: Any) -> Tensor:
    # As in Pyro, without the entropy of p: its log_density plays no part.
    return -q.log_prob(p.v)


@register_kl(Independent, Independent)
def _kl_independent(p: Independent, q: Independent) -> Tensor:
    shared = min(p.reinterpreted_batch_ndims, q.reinterpreted_batch_ndims)
    return sum_rightmost(kl_divergence(p.to_event(-shared), q.to_event(-shared)), shared)


@register_kl(Independent, MultivariateNormal)
def _kl_independent_mvn(p: Independent, q: MultivariateNormal) -> Tensor:
    base = p.base_dist
    if p.reinterpreted_batch_ndims == 1 and isinstance(base, Delta):
        return -q.log_prob(base.v)
    if p.reinterpreted_batch_ndims == 1 and isinstance(base, torch.distributions.Normal):
        dim = q.event_shape[0]
        precision = q.precision_matrix.diagonal(dim1=-2, dim2=-1)
        spread = 0.5 * (base.scale**2 * precision).sum(-1)
        entropy = 0.5 * dim * (1 + math.log(2 * math.pi)) + base.scale.log().sum(-1)
        return spread - entropy - q.log_prob(base.loc)
    raise NotImplementedError(f"no KL divergence from {p!r} to a MultivariateNormal")


@register_kl(InverseGamma, InverseGamma)
def _kl_inverse_gamma(p: InverseGamma, q: InverseGamma) -> Tensor:
    # torch's rule for transformed distributions looks at the exponents, which are -1 in both.
    return kl_divergence(p.base_dist, q.base_dist)


@register_kl(MaskedDistribution, MaskedDistribution)
def _kl_masked(p: MaskedDistribution, q: MaskedDistribution) -> Tensor | float:
    if p._mask is False or q._mask is False:
        return 0.0  # A number: nothing says on which device it should be.
    mask = q._mask if p._mask is True else p._mask
    if p._mask is not True and q._mask is not True and p._mask is not q._mask:
        mask = p._mask & q._mask
    return scale_and_mask(kl_divergence(p.base_dist, q.base_dist), mask=mask)


@register_kl(ExpandedDistribution, ExpandedDistribution)
def _kl_expanded(p: ExpandedDistribution, q: ExpandedDistribution) -> Tensor:
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    return kl_divergence(p.base_dist, q.base_dist).expand(shape)
