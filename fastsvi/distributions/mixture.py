"""Two distributions interleaved by a mask."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.util import SCALAR, Shape, broadcast_shape
from fastsvi.distributions.values import as_tensor
from fastsvi.errors import DtypeError, ShapeError, describe

__all__ = ["MaskedConstraint", "MaskedMixture"]


class MaskedConstraint(constraints.Constraint):
    """``constraint1`` where ``mask`` is true and ``constraint0`` elsewhere."""

    def __init__(
        self, mask: Tensor, constraint0: constraints.Constraint, constraint1: constraints.Constraint
    ) -> None:
        self.mask, self.constraint0, self.constraint1 = mask, constraint0, constraint1
        super().__init__()

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        """Whether both constraints are discrete."""
        return self.constraint0.is_discrete and self.constraint1.is_discrete

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        """Number of event dimensions that the checks reduce."""
        return max(self.constraint0.event_dim, self.constraint1.event_dim)

    def check(self, value: Tensor) -> Tensor:
        """Whether each event lies in the constraint that the mask chooses for it."""
        return torch.where(self.mask, self.constraint1.check(value), self.constraint0.check(value))


class MaskedMixture(TorchDistribution):
    """``component1`` where ``mask`` is true and ``component0`` where it is false.

    The shapes broadcast. Unlike a mixture over latent categories, the mask is known; it often
    comes from a change point.

    >>> from fastsvi.distributions import Normal
    >>> late = torch.tensor([False, False, True])
    >>> MaskedMixture(late, Normal(0.0, 1.0), Normal(0.0, 2.0)).log_prob(torch.zeros(3))
    tensor([-0.9189, -0.9189, -1.6121])
    """

    arg_constraints: ClassVar = {}

    def __init__(
        self, mask: Tensor, component0: Any, component1: Any, validate_args: bool | None = None
    ) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise _MaskError(
                f"MaskedMixture: mask must be a boolean tensor, found {describe(mask)}. "
                "Compare (x > 0) or convert (x.bool())"
            )
        if component0.event_shape != component1.event_shape:
            raise ShapeError(
                "MaskedMixture: the components must have the same event shape, found "
                f"{tuple(component0.event_shape)} and {tuple(component1.event_shape)}"
            )
        shape = broadcast_shape(mask.shape, component0.batch_shape, component1.batch_shape)
        self._mask = mask.expand(shape)
        self.component0, self.component1 = (_unchecked(c, shape) for c in (component0, component1))
        super().__init__(shape, component0.event_shape, validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether both components are reparameterized."""
        return self.component0.has_rsample and self.component1.has_rsample

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """The components' support, by the mask if they differ."""
        if self.component0.support is self.component1.support:
            return self.component0.support
        return MaskedConstraint(self._mask, self.component0.support, self.component1.support)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = self._get_checked_instance(MaskedMixture, _instance)
        shape = torch.Size(batch_shape)
        parts: tuple[Any, ...] = (self._mask, self.component0, self.component1)
        mask, component0, component1 = (part.expand(shape) for part in parts)
        MaskedMixture.__init__(new, mask, component0, component1, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _choose(self, one: Tensor, zero: Tensor) -> Tensor:
        mask = self._mask.reshape(self._mask.shape + (1,) * self.event_dim)
        return torch.where(mask, one, zero)

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """Draws of both components, chosen by the mask."""
        one, zero = self.component1.sample(sample_shape), self.component0.sample(sample_shape)
        return self._choose(one, zero)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """Reparameterized draws of both components, chosen by the mask."""
        one, zero = self.component1.rsample(sample_shape), self.component0.rsample(sample_shape)
        return self._choose(one, zero)

    def log_prob(self, value: Any) -> Tensor:
        """Log-density under the chosen component; shape ``sample_shape + batch_shape``."""
        value = as_tensor(self, value)
        value = value.expand(torch.broadcast_shapes(value.shape, self.shape()))
        if self._validate_args:
            self._validate_sample(value)
        return torch.where(
            self._mask, self.component1.log_prob(value), self.component0.log_prob(value)
        )

    @property
    def mean(self) -> Tensor:
        """Mean of the chosen component."""
        return self._choose(self.component1.mean, self.component0.mean)

    @property
    def variance(self) -> Tensor:
        """Variance of the chosen component."""
        return self._choose(self.component1.variance, self.component0.variance)


class _MaskError(DtypeError, ValueError):
    """Pyro raises a ``ValueError`` here."""


def _unchecked(component: Any, batch_shape: torch.Size) -> Any:
    # A value need only suit the component that the mask chooses, so the mixture checks instead.
    component = copy.copy(component.expand(batch_shape))
    component._validate_args = False
    return component
