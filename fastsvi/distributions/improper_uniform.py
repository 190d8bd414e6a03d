"""A density that is 1 everywhere on a support, and so cannot be normalised or sampled."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.util import SCALAR, Shape, broadcast_shape
from fastsvi.distributions.values import as_tensor

__all__ = ["ImproperUniform"]


class ImproperUniform(TorchDistribution):
    """Zero ``log_prob`` on ``support``; no samples.

    It turns a directed model into a factor graph: a guide supplies the values. For the same with
    samples, mask a proper distribution: ``dist.Normal(0, 1).expand([3]).to_event(1).mask(False)``.

    >>> d = ImproperUniform(constraints.positive, (), (3,))
    >>> d.log_prob(torch.ones(3))
    tensor(0.)
    """

    arg_constraints: ClassVar = {}

    def __init__(
        self,
        support: constraints.Constraint,
        batch_shape: Shape,
        event_shape: Shape,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(support, constraints.Constraint):
            raise TypeError(
                "ImproperUniform: support must be a constraint such as constraints.real, "
                f"found {support!r}"
            )
        self._support = support
        super().__init__(batch_shape, event_shape, validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """The constraint that was given."""
        return self._support

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = self._get_checked_instance(ImproperUniform, _instance)
        ImproperUniform.__init__(new, self._support, batch_shape, self._event_shape)
        return new

    def log_prob(self, value: Any) -> Tensor:
        """Zero; shape ``sample_shape + batch_shape``."""
        value = as_tensor(self, value)
        dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        outer = value.shape[: value.dim() - self.event_dim]
        shape = broadcast_shape(outer, self._batch_shape)
        return torch.zeros((), dtype=dtype, device=value.device).expand(shape)

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """Raises: there is nothing to draw from."""
        raise NotImplementedError(
            "ImproperUniform cannot be sampled. Give its site a value in the guide or by "
            "condition(), or write a proper distribution with .mask(False)"
        )
