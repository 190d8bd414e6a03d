"""Transforms that act on each number, or reorder numbers along a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions.transforms import Transform
from torch.distributions.utils import lazy_property

from fastsvi.distributions import constraints
from fastsvi.distributions.util import is_validation_enabled
from fastsvi.errors import ConstraintError, describe

__all__ = [
    "ELUTransform",
    "LeakyReLUTransform",
    "Permute",
    "PositivePowerTransform",
    "elu",
    "leaky_relu",
    "permute",
]


class ELUTransform(Transform):
    """``x`` above 0 and ``exp(x) - 1`` below; a bijection onto numbers above -1."""

    domain = constraints.real
    codomain = constraints.greater_than(-1.0)
    bijective = True
    sign = +1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ELUTransform)

    def _call(self, x: Tensor) -> Tensor:
        return F.elu(x)

    def _inverse(self, y: Tensor) -> Tensor:
        # Clamped, so that the branch that is not taken has a finite gradient.
        return torch.where(y > 0, y, y.clamp(max=0.0).log1p())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.clamp(max=0.0)


class LeakyReLUTransform(Transform):
    """``x`` above 0 and ``x / 100`` below."""

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1
    _slope = 0.01

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LeakyReLUTransform)

    def _call(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self._slope)

    def _inverse(self, y: Tensor) -> Tensor:
        return F.leaky_relu(y, 1 / self._slope)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        slope = torch.tensor(self._slope, dtype=x.dtype, device=x.device)
        return torch.where(x >= 0, 0.0, slope.log())


class PositivePowerTransform(Transform):
    """``sign(x) * |x|**exponent`` for ``exponent > 0``; its Jacobian is 0 or infinite at 0."""

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(
        self, exponent: Any, *, cache_size: int = 0, validate_args: bool | None = None
    ) -> None:
        super().__init__(cache_size=cache_size)
        dtype = None if isinstance(exponent, Tensor) else torch.get_default_dtype()
        self.exponent = torch.as_tensor(exponent, dtype=dtype)
        check = is_validation_enabled() if validate_args is None else validate_args
        if check and not bool((self.exponent > 0).all()):
            raise ConstraintError(
                "PositivePowerTransform: the exponent must be positive, found "
                f"{describe(self.exponent)}. PowerTransform takes any, on positive numbers"
            )

    def with_cache(self, cache_size: int = 1) -> PositivePowerTransform:
        if self._cache_size == cache_size:
            return self
        return PositivePowerTransform(self.exponent, cache_size=cache_size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PositivePowerTransform):
            return False
        return torch.equal(self.exponent, other.exponent)

    def _call(self, x: Tensor) -> Tensor:
        return x.abs().pow(self.exponent) * x.sign()

    def _inverse(self, y: Tensor) -> Tensor:
        return y.abs().pow(self.exponent.reciprocal()) * y.sign()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.exponent.log() + (self.exponent - 1) * x.abs().log()

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.broadcast_shapes(shape, self.exponent.shape)

    inverse_shape = forward_shape


class Permute(Transform):
    """Entries along dimension ``dim`` (negative), reordered by a ``permutation`` of indices.

    >>> Permute(torch.tensor([2, 0, 1]))(torch.tensor([10.0, 20.0, 30.0]))
    tensor([30., 10., 20.])
    """

    bijective = True
    volume_preserving = True

    def __init__(self, permutation: Tensor, *, dim: int = -1, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        if dim >= 0:
            raise ValueError(f"Permute: dim must be negative, found {dim}")
        self.permutation, self.dim = permutation, dim

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> Any:
        return constraints.independent(constraints.real, -self.dim)

    codomain = domain

    @lazy_property
    def inv_permutation(self) -> Tensor:
        """The permutation that undoes this one."""
        return torch.argsort(self.permutation)

    def _call(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.permutation)

    def _inverse(self, y: Tensor) -> Tensor:
        return y.index_select(self.dim, self.inv_permutation)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[: x.dim() + self.dim])

    def with_cache(self, cache_size: int = 1) -> Permute:
        if self._cache_size == cache_size:
            return self
        return Permute(self.permutation, dim=self.dim, cache_size=cache_size)


def elu() -> ELUTransform:
    """An :class:`ELUTransform`."""
    return ELUTransform()


def leaky_relu() -> LeakyReLUTransform:
    """A :class:`LeakyReLUTransform`."""
    return LeakyReLUTransform()


def permute(
    input_dim: int | Sequence[int], permutation: Tensor | None = None, dim: int = -1
) -> Permute:
    """A :class:`Permute` of ``input_dim`` entries, random unless ``permutation`` is given.

    For ``dim < -1``, ``input_dim`` is the whole event shape.
    """
    if not isinstance(input_dim, int):
        if len(input_dim) != -dim:
            raise ValueError(
                f"permute: input_dim {tuple(input_dim)} must have {-dim} entries, as dim is {dim}"
            )
        input_dim = input_dim[dim]
    return Permute(torch.randperm(input_dim) if permutation is None else permutation, dim=dim)
