"""LKJ distributions over correlation matrices."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsvi.distributions import constraints
from fastsvi.distributions.elementwise import Operand
from fastsvi.distributions.matrix_transforms import CorrMatrixCholeskyTransform
from fastsvi.distributions.torch_families import LKJCholesky
from fastsvi.distributions.transformed import TransformedDistribution
from fastsvi.distributions.util import Shape, eye_like

__all__ = ["LKJ", "LKJCorrCholesky"]


class LKJ(TransformedDistribution):
    """Correlation matrices ``(..., dim, dim)`` with density ``det(R)**(concentration - 1)``.

    ``concentration = 1`` is uniform; larger values favour weak correlations. See Lewandowski,
    Kurowicka and Joe (2009).

    >>> LKJ(2, 1.0)().shape
    torch.Size([2, 2])
    """

    arg_constraints: ClassVar = {  # type: ignore[misc]
        "concentration": constraints.positive,
    }
    support = constraints.corr_matrix

    def __init__(
        self, dim: int, concentration: Operand = 1.0, validate_args: bool | None = None
    ) -> None:
        base = LKJCholesky(dim, concentration, validate_args)
        self.dim, self.concentration = base.dim, base.concentration
        super().__init__(base, CorrMatrixCholeskyTransform().inv, validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = object.__new__(type(self)) if _instance is None else _instance
        LKJ.__init__(new, self.dim, self.concentration.expand(torch.Size(batch_shape)), False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The identity, at the batch shape."""
        return eye_like(self.concentration, self.dim).expand(self.shape())


class LKJCorrCholesky(LKJCholesky):
    """Deprecated name and argument order of :class:`LKJCholesky`."""

    def __init__(self, d: int, eta: Operand, validate_args: bool | None = None) -> None:
        warnings.warn(
            "LKJCorrCholesky(d, eta) is deprecated; use LKJCholesky(dim, concentration)",
            FutureWarning,
            stacklevel=2,
        )
        super().__init__(d, eta, validate_args)
