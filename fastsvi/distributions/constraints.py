"""torch's constraints and the ones Pyro adds; ``biject_to`` and ``transform_to`` know them.

A constraint says where values live: ``constraint.check(value)`` gives a boolean for each event,
and the last ``constraint.event_dim`` dimensions of ``value`` are the event.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints as _torch
from torch.distributions.constraints import *  # noqa: F403
from torch.distributions.constraints import (
    Constraint,
    corr_cholesky,
    lower_cholesky,
    lower_triangular,
    positive,
    positive_definite,
)

__all__ = [
    *_torch.__all__,
    "corr_cholesky_constraint",
    "corr_matrix",
    "integer",
    "ordered_vector",
    "positive_ordered_vector",
    "softplus_lower_cholesky",
    "softplus_positive",
    "sphere",
    "unit_lower_cholesky",
]


class _Integer(Constraint):
    """Whole numbers of either sign."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        return value % 1 == 0


class _Sphere(Constraint):
    """Vectors of Euclidean norm 1."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        # Rounding of D squares moves the norm by about eps * sqrt(D); the 10 is the user's share.
        tolerance = 10 * torch.finfo(value.dtype).eps * value.shape[-1] ** 0.5
        return (torch.linalg.vector_norm(value, dim=-1) - 1).abs() < tolerance


class _CorrMatrix(Constraint):
    """Positive definite matrices with ones on the diagonal."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        ones = (value.diagonal(dim1=-2, dim2=-1) - 1).abs() < 1e-6
        return positive_definite.check(value) & ones.all(-1)


class _OrderedVector(Constraint):
    """Vectors whose entries strictly increase."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value[..., 1:] > value[..., :-1]).all(-1)


class _PositiveOrderedVector(Constraint):
    """Vectors of positive entries that strictly increase."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return ordered_vector.check(value) & (value > 0).all(-1)


class _SoftplusPositive(type(positive)):  # type: ignore[misc]
    """Positive numbers, reached through softplus instead of exp."""

    def __init__(self) -> None:
        super().__init__(lower_bound=0.0)


class _SoftplusLowerCholesky(type(lower_cholesky)):  # type: ignore[misc]
    """Lower triangular matrices with a positive diagonal, reached through softplus."""


class _UnitLowerCholesky(Constraint):
    """Lower triangular matrices with ones on the diagonal."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        ones = value.diagonal(dim1=-2, dim2=-1) == 1
        return lower_triangular.check(value.contiguous()) & ones.all(-1)


corr_cholesky_constraint = corr_cholesky  # Deprecated name.
corr_matrix = _CorrMatrix()
integer = _Integer()
ordered_vector = _OrderedVector()
positive_ordered_vector = _PositiveOrderedVector()
softplus_lower_cholesky = _SoftplusLowerCholesky()
softplus_positive = _SoftplusPositive()
sphere = _Sphere()
unit_lower_cholesky = _UnitLowerCholesky()
