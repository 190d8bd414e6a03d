"""Determinants and systems of equations, by the factorization that torch keeps for gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _of_determinant(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LU factors and pivots, as torch's gradient of a determinant expects them, and the diagonal.

    Of a contiguous matrix torch factors the transpose: Fortran reads it without a copy.
    """
    factors, pivots, _ = aten.linalg_lu_factor_ex(a.mT if a.is_contiguous() else a)
    return factors, pivots, factors.diagonal(dim1=-2, dim2=-1)


def _parity(factors: Tensor, pivots: Tensor) -> Tensor:
    stay = torch.arange(1, pivots.shape[-1] + 1, device=pivots.device)
    return torch.where(pivots == stay, 1.0, -1.0).to(factors.dtype).prod(-1)


def _determinant(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    factors, pivots, diagonal = _of_determinant(a)
    return _parity(factors, pivots) * diagonal.prod(-1), factors, pivots


def _log_determinant(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factors, pivots, diagonal = _of_determinant(a)
    sign = _parity(factors, pivots) * diagonal.sign().prod(-1)
    return sign, diagonal.abs().log().sum(-1), factors, pivots


def _solve(
    a: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factors, pivots, info = aten.linalg_lu_factor_ex(a)
    is_vector = b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1])
    columns = b.unsqueeze(-1) if is_vector else b
    found = aten.linalg_lu_solve(factors, pivots, columns, left=left)
    return found.squeeze(-1) if is_vector else found, factors, pivots, info


def _cholesky_solve(b: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    lower = factor.mT if upper else factor
    half = aten.linalg_solve_triangular(lower, b, upper=False)
    return aten.linalg_solve_triangular(lower.mT, half, upper=True)


def _cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:
    unit = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return _cholesky_solve(unit.expand(factor.shape), factor, upper)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten._linalg_det.default: _determinant,
    aten._linalg_slogdet.default: _log_determinant,
    aten._linalg_solve_ex.default: _solve,
    aten.cholesky_solve.default: _cholesky_solve,
    aten.cholesky_inverse.default: _cholesky_inverse,
    # What cannot be factored shows as NaN; nothing is read back to be told sooner.
    aten._linalg_check_errors.default: lambda *args, **kwargs: None,
}
