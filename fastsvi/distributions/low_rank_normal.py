"""Normal vectors with a covariance of low rank plus a diagonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsvi.distributions.noise import normal
from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.util import SCALAR, Shape
from fastsvi.distributions.values import Lenient
from fastsvi.errors import ShapeError

__all__ = ["LowRankMultivariateNormal"]


class LowRankMultivariateNormal(
    Lenient, torch.distributions.LowRankMultivariateNormal, TorchDistribution
):
    """Normal vectors with covariance ``cov_factor @ cov_factor.T + diag(cov_diag)``.

    Costs ``O(D R**2)`` for vectors ``(..., D)`` and a factor ``(..., D, R)``.

    >>> d = LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.ones(3))
    >>> d.covariance_matrix[0]
    tensor([2., 1., 1.])
    """

    def __init__(
        self,
        loc: Tensor,
        cov_factor: Tensor,
        cov_diag: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        # As torch's, which writes into a view of what it computes; no capture allows that.
        try:
            batch = torch.broadcast_shapes(
                loc.shape[:-1], cov_factor.shape[:-2], cov_diag.shape[:-1]
            )
            if not loc.shape[-1:] == cov_diag.shape[-1:] == cov_factor.shape[-2:-1] != SCALAR:
                raise RuntimeError
        except RuntimeError:
            raise ShapeError(
                "LowRankMultivariateNormal takes loc (..., D), cov_factor (..., D, R) and cov_diag "
                f"(..., D), found shapes {tuple(loc.shape)}, {tuple(cov_factor.shape)} and "
                f"{tuple(cov_diag.shape)}"
            ) from None
        event = loc.shape[-1:]
        self.loc, self.cov_diag = loc.expand(batch + event), cov_diag.expand(batch + event)
        self.cov_factor = cov_factor.expand(batch + cov_factor.shape[-2:])
        self._unbroadcasted_cov_factor = cov_factor
        self._unbroadcasted_cov_diag = cov_diag
        rank = cov_factor.shape[-1]
        one = torch.eye(rank, dtype=cov_factor.dtype, device=cov_factor.device)
        weighted = cov_factor.mT / cov_diag.unsqueeze(-2)
        self._capacitance_tril = torch.linalg.cholesky(weighted @ cov_factor + one)
        TorchDistribution.__init__(self, batch, event, validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        if _instance is None and type(self).__init__ is LowRankMultivariateNormal.__init__:
            _instance = object.__new__(type(self))
        return super().expand(batch_shape, _instance)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to all parameters, ``sample_shape + batch_shape + (D,)``."""
        shape = self.shape(sample_shape)
        options = {"dtype": self.loc.dtype, "device": self.loc.device}
        of_factor = normal((*shape[:-1], self.cov_factor.shape[-1]), **options)
        of_diag = normal(shape, **options)
        low_rank = (self._unbroadcasted_cov_factor @ of_factor.unsqueeze(-1)).squeeze(-1)
        return self.loc + low_rank + self._unbroadcasted_cov_diag.sqrt() * of_diag

    @classmethod
    def infer_shapes(cls, loc: Any, cov_factor: Any, cov_diag: Any) -> Any:  # type: ignore[override]
        """See :meth:`TorchDistributionMixin.infer_shapes`."""
        shape = torch.Size(loc)
        batches = (tuple(cov_factor)[:-2], tuple(cov_diag)[:-1])
        return torch.broadcast_shapes(shape[:-1], *batches), shape[-1:]
