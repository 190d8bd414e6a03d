"""Point masses: Delta, and Unit, which carries a log factor."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from fastsvi.distributions import validation
from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.util import SCALAR, Shape, broadcast_shape, is_identically_zero
from fastsvi.distributions.values import as_tensor
from fastsvi.errors import ShapeError

__all__ = ["Delta", "Unit"]


class Delta(TorchDistribution):
    """All mass at the point ``v``.

    ``log_density`` (a number, or a tensor that broadcasts to the batch shape) is what
    :meth:`log_prob` gives at ``v``; elsewhere it is ``-inf``. The last ``event_dim`` dimensions of
    ``v`` are the event.

    >>> d = Delta(torch.tensor([1.0, 2.0]), event_dim=1)
    >>> d(), d.log_prob(torch.tensor([1.0, 2.0])), d.log_prob(torch.tensor([1.0, 3.0]))
    (tensor([1., 2.]), tensor(0.), tensor(-inf))
    """

    arg_constraints: ClassVar = {"v": constraints.dependent, "log_density": constraints.real}
    has_rsample = True

    def __init__(
        self,
        v: Tensor | float,
        log_density: Tensor | float = 0.0,
        event_dim: int = 0,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(v, Tensor):
            v = torch.as_tensor(validation.as_operand("Delta", "v", v))
        batch_dim = v.dim() - event_dim
        if batch_dim < 0:
            raise ShapeError(
                f"Delta: event_dim={event_dim}, but v has shape {tuple(v.shape)}. "
                "Lower event_dim or add dimensions to v"
            )
        self.v = v
        self._log_density = validation.as_operand("Delta", "log_density", log_density)
        super().__init__(v.shape[:batch_dim], v.shape[batch_dim:], validate_args)
        if isinstance(log_density, Tensor) and log_density.shape != self._batch_shape:
            self._log_density = self._expand_density(log_density, self._batch_shape)

    @staticmethod
    def _expand_density(log_density: Tensor, batch_shape: torch.Size) -> Tensor:
        try:
            return log_density.expand(batch_shape)
        except RuntimeError:
            raise ShapeError(
                f"Delta: log_density of shape {tuple(log_density.shape)} does not broadcast to the "
                f"batch shape {tuple(batch_shape)}, which is the shape of v without its last "
                "event_dim dimensions"
            ) from None

    @property
    def log_density(self) -> Tensor:
        """Log-density at ``v``, shape ``batch_shape``."""
        if isinstance(self._log_density, Tensor):
            return self._log_density
        return torch.full(
            self._batch_shape, self._log_density, dtype=self._dtype(), device=self.v.device
        )

    def _dtype(self) -> torch.dtype:
        return self.v.dtype if self.v.is_floating_point() else torch.get_default_dtype()

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Real, whatever ``v`` is."""
        return constraints.independent(constraints.real, self.event_dim)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = self._get_checked_instance(Delta, _instance)
        batch_shape = torch.Size(batch_shape)
        v = self.v.expand(batch_shape + self._event_shape)
        density = self._log_density
        if isinstance(density, Tensor):
            density = density.expand(batch_shape)
        Delta.__init__(new, v, density, self.event_dim, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """``v``, expanded to ``sample_shape + batch_shape + event_shape``."""
        return self.v.expand(torch.Size(sample_shape) + self.v.shape)

    def log_prob(self, value: Any) -> Tensor:
        """``log_density`` at ``v`` and ``-inf`` elsewhere; ``sample_shape + batch_shape``."""
        same = as_tensor(self, value) == self.v
        if self.event_dim:
            same = same.flatten(-self.event_dim).all(-1)
        log_prob = same.to(self._dtype()).log_()
        del same
        density = self._log_density
        return log_prob if is_identically_zero(density) else log_prob + density

    @property
    def mean(self) -> Tensor:
        """``v``."""
        return self.v

    @property
    def variance(self) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.v)


class Unit(TorchDistribution):
    """The one value without content, with a log factor attached: what ``factor`` observes.

    Samples have shape ``sample_shape + batch_shape + (0,)``; ``log_prob`` is ``log_factor``. In a
    guide, ``has_rsample`` says whether ``log_factor`` came from reparameterized samples.

    >>> Unit(torch.tensor(-1.5)).log_prob(torch.empty(0))
    tensor(-1.5000)
    """

    arg_constraints: ClassVar = {"log_factor": constraints.real}
    support = constraints.real

    def __init__(
        self,
        log_factor: Tensor | float,
        *,
        has_rsample: bool | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.log_factor = torch.as_tensor(log_factor)
        if has_rsample is not None:
            self.has_rsample = has_rsample
        super().__init__(self.log_factor.shape, (0,), validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = self._get_checked_instance(Unit, _instance)
        Unit.__init__(new, self.log_factor.expand(torch.Size(batch_shape)), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """An empty tensor of shape ``sample_shape + batch_shape + (0,)``."""
        return self.log_factor.new_empty(self.shape(sample_shape))

    rsample = sample

    def log_prob(self, value: Tensor) -> Tensor:
        """The log factor; shape ``sample_shape + batch_shape``."""
        return self.log_factor.expand(broadcast_shape(self._batch_shape, value.shape[:-1]))
