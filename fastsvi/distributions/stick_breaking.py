"""Stick-breaking transforms, to the simplex and to Cholesky factors of correlation matrices.

torch has both. Its forms multiply up what is left of the stick, and the gradient of ``cumprod``
reads the data back to look for zeros, which neither a capture nor a CUDA graph survives. Here the
logarithms are added up: the values are the same up to rounding, in the tails they are better, and
log-determinants need nothing but the unconstrained coordinates. What ``biject_to`` and
``transform_to`` give for these constraints are the transforms of this file, also to others who
use torch's registries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions import transforms as td
from torch.nn.functional import logsigmoid, pad, softplus

__all__ = ["CorrCholeskyTransform", "StickBreakingTransform"]


class StickBreakingTransform(td.StickBreakingTransform):
    """From ``(..., K - 1)`` real numbers to the simplex ``(..., K)``.

    The first number says what share of a stick to break off, the next one what share of the rest,
    and so on; all zeros give equal parts. No part is smaller than the smallest normal number.

    >>> StickBreakingTransform()(torch.zeros(3))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def _call(self, x: Tensor) -> Tensor:
        x = x - _parts_left(x).log()
        left = logsigmoid(-x).cumsum(-1)  # log of what is left after each cut
        log_y = pad(logsigmoid(x), [0, 1]) + pad(left, [1, 0])
        return _exp(log_y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-determinant, shape ``(...)``; of ``y`` only the existence is needed."""
        count = _parts_left(x)
        x = x - count.log()
        # Each cut but the last shortens all that follow, so log(1 - share) counts again for those.
        return (logsigmoid(x) + count * logsigmoid(-x)).sum(-1)


class CorrCholeskyTransform(td.CorrCholeskyTransform):
    """From ``(..., D (D - 1) / 2)`` real numbers to Cholesky factors of correlation matrices.

    The factors are ``(..., D, D)``. ``tanh`` of the numbers are canonical partial correlations
    (Lewandowski, Kurowicka and Joe, 2009). No diagonal entry is smaller than the smallest normal
    number.

    >>> CorrCholeskyTransform()(torch.zeros(1))
    tensor([[1., 0.],
            [0., 1.]])
    """

    def _call(self, x: Tensor) -> Tensor:
        dim = _dim(x)
        matrix = _lower(x, dim)
        left = _log_rest(matrix).cumsum(-1)  # log of what each row has left of its unit length
        left = pad(left[..., :-1], [1, 0])
        diagonal = torch.eye(dim, dtype=x.dtype, device=x.device)
        return (matrix.tanh() + diagonal) * _exp(0.5 * left)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, intermediates: Any = None) -> Tensor:
        """Log-determinant, shape ``(...)``; of ``y`` only the existence is needed."""
        dim = _dim(x)
        rows, columns = torch.tril_indices(dim, dim, -1, device=x.device).unbind()
        # d tanh(x) / dx = exp(log rest); the entries right of it in its row shrink by its root.
        weight = 1 + 0.5 * (rows - columns - 1).to(x.dtype)
        return (_log_rest(x) * weight).sum(-1)


def _parts_left(x: Tensor) -> Tensor:
    """``n, n - 1, ..., 1`` for ``x`` of shape ``(..., n)``."""
    return torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device)


def _exp(log_y: Tensor) -> Tensor:
    return log_y.clamp(min=math.log(torch.finfo(log_y.dtype).tiny)).exp()


def _log_rest(x: Tensor) -> Tensor:
    """``log(1 - tanh(x)**2)``."""
    return 2 * (math.log(2.0) - x - softplus(-2 * x))


def _dim(x: Tensor) -> int:
    """``D`` of ``D (D - 1) / 2`` numbers."""
    dim = (1 + math.isqrt(1 + 8 * x.shape[-1])) // 2
    if dim * (dim - 1) // 2 != x.shape[-1]:
        raise ValueError(
            f"CorrCholeskyTransform takes D (D - 1) / 2 numbers (1, 3, 6, 10, ...), "
            f"found shape {tuple(x.shape)}"
        )
    return dim


def _lower(x: Tensor, dim: int) -> Tensor:
    """The strictly lower triangular matrix with the entries ``x``, row by row."""
    row = torch.arange(dim, device=x.device).unsqueeze(-1)
    column = torch.arange(dim, device=x.device)
    # One more entry, a zero, for all places on and above the diagonal.
    place = torch.where(column < row, row * (row - 1) // 2 + column, x.shape[-1])
    return pad(x, [0, 1])[..., place]


@biject_to.register(constraints.simplex)
def _to_simplex(constraint: Any) -> StickBreakingTransform:
    return StickBreakingTransform()


@biject_to.register(constraints.corr_cholesky)
@transform_to.register(constraints.corr_cholesky)
def _to_corr_cholesky(constraint: Any) -> CorrCholeskyTransform:
    return CorrCholeskyTransform()
