"""Autoregressive dense networks by masked weights (MADE, Germain et al. 2015)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch.nn.functional import linear

from fastsvi.errors import FastSVIWarning, ShapeError


class MaskedLinear(torch.nn.Linear):
    """Linear layer whose weight is multiplied by a fixed 0/1 mask ``[out_features, in_features]``.

    >>> layer = MaskedLinear(2, 1, torch.tensor([[1.0, 0.0]]), bias=False)
    >>> bool(layer(torch.tensor([3.0, 4.0])) == 3.0 * layer.weight[0, 0])
    True
    """

    mask: torch.Tensor

    def __init__(
        self, in_features: int, out_features: int, mask: torch.Tensor, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias)
        if mask.shape != self.weight.shape:
            raise ShapeError(
                f"the mask of a MaskedLinear({in_features}, {out_features}) must have the shape "
                f"of its weight, {tuple(self.weight.shape)}; found {tuple(mask.shape)}"
            )
        self.register_buffer("mask", mask.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight * self.mask, self.bias)


def create_masks(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int],
    permutation: torch.Tensor,
    output_multiplier: int,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Masks of the layers, first to last, and of a connection that skips them.

    Every unit has a degree. A hidden unit sees units of at most its own degree, an output of
    degree d sees hidden units below d, so output d depends on inputs 1 to d - 1 only. Context
    has degree 0: everything may see it (Paige and Wood 2016).
    """
    real = torch.get_default_dtype()
    position = torch.empty(input_dim, dtype=real)
    position[permutation] = torch.arange(input_dim, dtype=real)
    inputs = torch.cat([torch.zeros(context_dim, dtype=real), 1 + position])
    # With a context, degrees 0 to input_dim - 1; shifted after rounding, which is half to even.
    top, shift = (input_dim, 1) if context_dim else (input_dim - 1, 0)
    hidden = [torch.linspace(1, top, units).round() - shift for units in hidden_dims]
    outputs = (1 + position).repeat(output_multiplier)

    degrees = [inputs, *hidden]
    masks = [after[:, None] >= before for before, after in pairwise(degrees)]
    masks.append(outputs[:, None] > hidden[-1])
    skip = outputs[:, None] > inputs
    return [mask.to(real) for mask in masks], skip.to(real)


class ConditionalAutoRegressiveNN(torch.nn.Module):
    """Network whose i-th outputs depend on the context and on the inputs before the i-th only.

    Args:
        input_dim: size of the input ``x [..., input_dim]``.
        context_dim: size of the context ``[..., context_dim]``, broadcast over the batch of x.
        hidden_dims: units of each hidden layer, none fewer than ``input_dim``.
        param_dims: number of values per input that each output has. All ones: outputs of shape
            ``[..., input_dim]``; otherwise ``[..., n_i, input_dim]``. A single output comes as a
            tensor, several as a tuple.
        permutation: order of the inputs, drawn at random if None; the identity gives a triangular
            Jacobian.
        skip_connections: add a masked linear map from inputs to outputs.
        nonlinearity: applied after each layer but the last.

    Raises:
        ShapeError: a hidden layer is smaller than the input, or there is none.

    Sources: MADE, Germain et al. (2015), arXiv:1502.03509; the context as in Paige and Wood
    (2016), arXiv:1602.06701, section 3.3.

    >>> network = ConditionalAutoRegressiveNN(10, 5, [50], param_dims=[1, 1])
    >>> loc, scale = network(torch.randn(100, 10), context=torch.randn(100, 5))
    >>> loc.shape
    torch.Size([100, 10])
    """

    permutation: torch.Tensor

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        hidden_dims: Sequence[int],
        param_dims: Sequence[int] = (1, 1),
        permutation: torch.Tensor | None = None,
        skip_connections: bool = False,
        nonlinearity: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        if input_dim == 1:
            warnings.warn(
                f"{type(self).__name__} with input_dim=1 has nothing to regress on: its outputs do "
                "not depend on the input; an affine transform does the same",
                FastSVIWarning,
                stacklevel=2,
            )
        if not hidden_dims or min(hidden_dims) < input_dim:
            raise ShapeError(
                f"every hidden layer needs at least input_dim={input_dim} units to connect all "
                f"inputs; found hidden_dims={list(hidden_dims)}"
            )
        self.input_dim = input_dim
        self.context_dim = context_dim
        self.hidden_dims = list(hidden_dims)
        self.param_dims = list(param_dims)
        self.count_params = len(param_dims)
        self.output_multiplier = sum(param_dims)
        self.all_ones = all(size == 1 for size in param_dims)
        self.param_slices = [slice(*ends) for ends in pairwise(accumulate(param_dims, initial=0))]
        order = torch.randperm(input_dim) if permutation is None else permutation.to(torch.int64)
        self.register_buffer("permutation", order)
        self.masks, self.mask_skip = create_masks(
            input_dim, context_dim, hidden_dims, order, self.output_multiplier
        )
        outputs = input_dim * self.output_multiplier
        sizes = [input_dim + context_dim, *hidden_dims, outputs]
        self.layers = torch.nn.ModuleList(
            MaskedLinear(*ends, mask)
            for ends, mask in zip(pairwise(sizes), self.masks, strict=True)
        )
        self.skip_layer = (
            MaskedLinear(sizes[0], outputs, self.mask_skip, bias=False)
            if skip_connections
            else None
        )
        self.f = torch.nn.ReLU() if nonlinearity is None else nonlinearity

    def get_permutation(self) -> torch.Tensor:
        """Order of the inputs, int64 ``[input_dim]``."""
        return self.permutation

    def forward(
        self, x: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        context = context.expand(*x.shape[:-1], context.shape[-1])
        return self._forward(torch.cat([context, x], dim=-1))

    def _forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        *hidden, last = self.layers
        h = x
        for layer in hidden:
            h = self.f(layer(h))
        h = last(h)
        if self.skip_layer is not None:
            h = h + self.skip_layer(x)
        if self.output_multiplier == 1:
            return h
        h = h.unflatten(-1, (self.output_multiplier, self.input_dim))
        if self.count_params == 1:
            return h
        if self.all_ones:
            return h.unbind(-2)
        return tuple(h[..., part, :] for part in self.param_slices)


class AutoRegressiveNN(ConditionalAutoRegressiveNN):
    """The same without a context; see :class:`ConditionalAutoRegressiveNN`.

    >>> network = AutoRegressiveNN(3, [8], param_dims=[1], permutation=torch.arange(3))
    >>> jacobian = torch.autograd.functional.jacobian(network, torch.randn(3))
    >>> bool((jacobian.triu() == 0).all())
    True
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        param_dims: Sequence[int] = (1, 1),
        permutation: torch.Tensor | None = None,
        skip_connections: bool = False,
        nonlinearity: torch.nn.Module | None = None,
    ) -> None:
        super().__init__(
            input_dim, 0, hidden_dims, param_dims, permutation, skip_connections, nonlinearity
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:  # type: ignore[override]
        return self._forward(x)
