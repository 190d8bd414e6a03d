"""Transforms between vectors, and between matrices, that mix their entries."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import biject_to, transform_to
from torch.distributions.transforms import (
    ComposeTransform,
    ExpTransform,
    SoftplusTransform,
    Transform,
)

from fastsvi.distributions import constraints
from fastsvi.distributions.stick_breaking import CorrCholeskyTransform
from fastsvi.errors import ShapeError

__all__ = [
    "CholeskyTransform",
    "CorrLCholeskyTransform",
    "CorrMatrixCholeskyTransform",
    "LowerCholeskyAffine",
    "Normalize",
    "OrderedTransform",
    "SimplexToOrderedTransform",
    "SoftplusLowerCholeskyTransform",
    "UnitLowerCholeskyTransform",
]


class CholeskyTransform(Transform):
    """The Cholesky factor of a positive definite matrix."""

    domain = constraints.positive_definite
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def _call(self, x: Tensor) -> Tensor:
        return torch.linalg.cholesky(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return y @ y.mT

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        # Of the lower triangle of x to that of y: |dx/dy| = 2**n * prod_i y_ii**(n - i), i from 0.
        n = x.shape[-1]
        powers = torch.arange(n, 0, -1, dtype=x.dtype, device=x.device)
        diagonal = y.diagonal(dim1=-2, dim2=-1)
        return -n * math.log(2) - (powers * diagonal.log()).sum(-1)


class CorrMatrixCholeskyTransform(CholeskyTransform):
    """The Cholesky factor of a correlation matrix."""

    domain = constraints.corr_matrix  # type: ignore[assignment]
    codomain = constraints.corr_cholesky  # type: ignore[assignment]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        # Of the strictly lower triangles, as the diagonals are determined by them.
        n = x.shape[-1]
        powers = torch.arange(n - 1, -1, -1, dtype=x.dtype, device=x.device)
        diagonal = y.diagonal(dim1=-2, dim2=-1)
        return -(powers * diagonal.log()).sum(-1)


class CorrLCholeskyTransform(CorrCholeskyTransform):
    """Deprecated name of :class:`CorrCholeskyTransform`."""

    def __init__(self, cache_size: int = 0) -> None:
        warnings.warn(
            "CorrLCholeskyTransform is deprecated; use CorrCholeskyTransform",
            FutureWarning,
            stacklevel=2,
        )
        super().__init__(cache_size=cache_size)


class LowerCholeskyAffine(Transform):
    """``scale_tril @ x + loc`` for a lower triangular ``scale_tril`` ``(..., D, D)``."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    volume_preserving = False

    def __init__(self, loc: Tensor, scale_tril: Tensor, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        if scale_tril.dim() < 2 or scale_tril.shape[-2:] != loc.shape[-1:] * 2:
            raise ShapeError(
                "LowerCholeskyAffine: loc (..., D) and scale_tril (..., D, D) must agree, found "
                f"{tuple(loc.shape)} and {tuple(scale_tril.shape)}"
            )
        self.loc, self.scale_tril = loc, scale_tril

    def _call(self, x: Tensor) -> Tensor:
        return (self.scale_tril @ x.unsqueeze(-1)).squeeze(-1) + self.loc

    def _inverse(self, y: Tensor) -> Tensor:
        centred = (y - self.loc).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.scale_tril, centred, upper=False).squeeze(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        return log_det.expand(torch.broadcast_shapes(x.shape[:-1], log_det.shape))

    def with_cache(self, cache_size: int = 1) -> LowerCholeskyAffine:
        if self._cache_size == cache_size:
            return self
        return LowerCholeskyAffine(self.loc, self.scale_tril, cache_size=cache_size)


class Normalize(Transform):
    """``x / |x|_p``; a zero vector is mapped to ``[1, 0, ..., 0]``. Not a bijection."""

    domain = constraints.real_vector
    codomain = constraints.sphere
    bijective = False

    def __init__(self, p: float = 2, cache_size: int = 0) -> None:
        if not p >= 0:
            raise ValueError(f"Normalize: the norm exponent p must not be negative, found {p!r}")
        self.p = p
        super().__init__(cache_size=cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Normalize) and self.p == other.p

    def _call(self, x: Tensor) -> Tensor:
        return safe_normalize(x, p=self.p)

    def _inverse(self, y: Tensor) -> Tensor:
        return y

    def with_cache(self, cache_size: int = 1) -> Normalize:
        return self if self._cache_size == cache_size else Normalize(self.p, cache_size)


class OrderedTransform(Transform):
    """First entry as it is, then steps of size ``exp(x)``: a real vector to an increasing one."""

    domain = constraints.real_vector
    codomain = constraints.ordered_vector
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OrderedTransform)

    def _call(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., :1], x[..., 1:].exp()], -1).cumsum(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., :1], y.diff(dim=-1).log()], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., 1:].sum(-1)


class SimplexToOrderedTransform(Transform):
    """Log-odds of cumulative probabilities plus ``anchor_point``: K entries to K - 1 cutpoints.

    It turns a Dirichlet prior on category probabilities into one on the cutpoints of
    :class:`~fastsvi.distributions.OrderedLogistic` (Betancourt, Ordinal Regression, section 2.2).
    """

    domain = constraints.simplex
    codomain = constraints.ordered_vector
    bijective = True

    def __init__(self, anchor_point: Tensor | float | None = None, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.anchor_point = torch.as_tensor(0.0 if anchor_point is None else anchor_point)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SimplexToOrderedTransform):
            return False
        return torch.equal(self.anchor_point, other.anchor_point)

    def _call(self, x: Tensor) -> Tensor:
        return x[..., :-1].cumsum(-1).logit() + self.anchor_point.unsqueeze(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        at_most = (y - self.anchor_point.unsqueeze(-1)).sigmoid()
        return F.pad(at_most, (0, 1), value=1.0).diff(dim=-1, prepend=torch.zeros_like(y[..., :1]))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        centred = y - self.anchor_point.unsqueeze(-1)
        return (F.softplus(centred) + F.softplus(-centred)).sum(-1)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] - 1))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def with_cache(self, cache_size: int = 1) -> SimplexToOrderedTransform:
        if self._cache_size == cache_size:
            return self
        return SimplexToOrderedTransform(self.anchor_point, cache_size)


class SoftplusLowerCholeskyTransform(Transform):
    """Square matrix to a lower triangular one, its diagonal through softplus."""

    domain = constraints.independent(constraints.real, 2)
    codomain = constraints.softplus_lower_cholesky

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SoftplusLowerCholeskyTransform)

    def _call(self, x: Tensor) -> Tensor:
        return x.tril(-1) + F.softplus(x.diagonal(dim1=-2, dim2=-1)).diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        return y.tril(-1) + SoftplusTransform().inv(y.diagonal(dim1=-2, dim2=-1)).diag_embed()


class UnitLowerCholeskyTransform(Transform):
    """Square matrix to a lower triangular one with ones on the diagonal."""

    domain = constraints.independent(constraints.real, 2)
    codomain = constraints.unit_lower_cholesky

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnitLowerCholeskyTransform)

    def _call(self, x: Tensor) -> Tensor:
        return x.tril(-1) + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

    def _inverse(self, y: Tensor) -> Tensor:
        return y


def safe_normalize(x: Tensor, *, p: float = 2) -> Tensor:
    """``x / |x|_p`` over the last dimension; ``[1, 0, ..., 0]`` for a zero vector."""
    norm = torch.linalg.vector_norm(x, p, dim=-1, keepdim=True)
    is_zero = (x == 0).all(-1, keepdim=True)
    first = (torch.arange(x.shape[-1], device=x.device) == 0).to(x.dtype)
    # The inner where keeps the gradient of the branch that is not taken finite.
    return torch.where(is_zero, first, x / torch.where(is_zero, 1.0, norm))


# Registration: how inference reaches each of the constraints that torch does not know ---------


@transform_to.register(constraints.sphere)
def _(constraint: Any) -> Transform:
    return Normalize()


@biject_to.register(constraints.corr_matrix)
@transform_to.register(constraints.corr_matrix)
def _(constraint: Any) -> Transform:
    return ComposeTransform([CorrCholeskyTransform(), CorrMatrixCholeskyTransform().inv])


@biject_to.register(constraints.ordered_vector)
@transform_to.register(constraints.ordered_vector)
def _(constraint: Any) -> Transform:
    return OrderedTransform()


@biject_to.register(constraints.positive_ordered_vector)
@transform_to.register(constraints.positive_ordered_vector)
def _(constraint: Any) -> Transform:
    return ComposeTransform([OrderedTransform(), ExpTransform()])


@biject_to.register(constraints.softplus_positive)
@transform_to.register(constraints.softplus_positive)
def _(constraint: Any) -> Transform:
    return SoftplusTransform()


@transform_to.register(constraints.softplus_lower_cholesky)
def _(constraint: Any) -> Transform:
    return SoftplusLowerCholeskyTransform()


@transform_to.register(constraints.unit_lower_cholesky)
def _(constraint: Any) -> Transform:
    return UnitLowerCholeskyTransform()
