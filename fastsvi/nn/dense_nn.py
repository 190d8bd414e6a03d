"""Dense networks that return several parameters at once, for guides and normalizing flows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from fastsvi.errors import ShapeError


class ConditionalDenseNN(torch.nn.Module):
    """Dense network of an input ``x [..., input_dim]`` and a context ``[..., context_dim]``.

    Args:
        input_dim: size of the input.
        context_dim: size of the context, which is broadcast over the batch of the input.
        hidden_dims: units of each hidden layer; at least one layer.
        param_dims: sizes of the outputs. One output of size 1 and shape ``[..., 1]`` or of size n
            and shape ``[..., n]`` is returned as a tensor, several as a tuple of ``[..., n_i]``.
        nonlinearity: applied after each layer but the last.

    Raises:
        ShapeError: no hidden layer.

    >>> network = ConditionalDenseNN(10, 5, [50], param_dims=[1, 10])
    >>> scale, shift = network(torch.rand(100, 10), context=torch.rand(100, 5))
    >>> scale.shape, shift.shape
    (torch.Size([100, 1]), torch.Size([100, 10]))
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        hidden_dims: Sequence[int],
        param_dims: Sequence[int] = (1, 1),
        nonlinearity: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not hidden_dims:
            raise ShapeError(
                f"{type(self).__name__} needs at least one hidden layer, found hidden_dims="
                f"{list(hidden_dims)}; use torch.nn.Linear for a network without"
            )
        self.input_dim = input_dim
        self.context_dim = context_dim
        self.hidden_dims = list(hidden_dims)
        self.param_dims = list(param_dims)
        self.count_params = len(param_dims)
        self.output_multiplier = sum(param_dims)
        self.param_slices = [slice(*ends) for ends in pairwise(accumulate(param_dims, initial=0))]
        sizes = [input_dim + context_dim, *hidden_dims, self.output_multiplier]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*ends) for ends in pairwise(sizes))
        self.f = torch.nn.ReLU() if nonlinearity is None else nonlinearity

    def forward(
        self, x: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        context = context.expand(*x.shape[:-1], context.shape[-1])
        return self._forward(torch.cat([context, x], dim=-1))

    def _forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        *hidden, last = self.layers
        for layer in hidden:
            x = self.f(layer(x))
        x = last(x)  # [..., output_multiplier]
        if self.count_params == 1:
            return x
        return tuple(x[..., part] for part in self.param_slices)


class DenseNN(ConditionalDenseNN):
    """Dense network of an input ``x [..., input_dim]`` alone; see :class:`ConditionalDenseNN`.

    >>> shift = DenseNN(5, [50], param_dims=[10])(torch.rand(100, 5))
    >>> shift.shape
    torch.Size([100, 10])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        param_dims: Sequence[int] = (1, 1),
        nonlinearity: torch.nn.Module | None = None,
    ) -> None:
        super().__init__(input_dim, 0, hidden_dims, param_dims, nonlinearity)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:  # type: ignore[override]
        return self._forward(x)
