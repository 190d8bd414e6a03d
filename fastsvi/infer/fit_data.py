"""The arguments of many fits at once: some shared, some with a slice for every fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastsvi.errors import ConstraintError, ShapeError, describe
from fastsvi.infer.arguments import Arguments

FitDims = Sequence[int | None] | Mapping[str, int | None] | None


class FitData:
    """Arguments of ``num_fits`` fits.

    Args:
        args, kwargs: of all fits together.
        fit_dims: for every positional argument the dimension that counts the fits, or None where
            they share it; or a dict of dimensions by the names of keyword arguments, in which
            those left out are shared. An argument that holds several tensors has one dimension
            for all of them. None: everything is shared.
        num_fits: F.
        varying: positions among the leaves of the arguments of those that are others at each step.

    Attributes:
        own: positions among the leaves of the arguments of those that have a slice per fit.
        lifted: of those that a step has as inputs: ``own`` and ``varying`` ones.
        is_own: for each of these whether it has a slice per fit.

    Raises:
        ShapeError: an argument has no such dimension, or it does not count the fits.
        ConstraintError: ``fit_dims`` does not match the arguments.

    >>> import torch
    >>> data = FitData((torch.arange(6.0).view(3, 2), 0.5), {}, (0, None), 3)
    >>> data.of(1).args
    (tensor([2., 3.]), 0.5)
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        fit_dims: FitDims,
        num_fits: int,
        varying: Iterable[int] = (),
    ) -> None:
        self._whole = Arguments(args, kwargs)
        self._num_fits = num_fits
        self._inputs: list[Tensor] | None = None
        dims = self._dims(args, kwargs, fit_dims)
        self._slices: dict[int, Tensor] = {}  # contiguous, the fits in front
        for position, (leaf, dim) in enumerate(zip(self._whole.leaves, dims, strict=True)):
            if dim is None:
                continue
            name = self._whole.name(position)
            if not isinstance(leaf, Tensor) or not -leaf.dim() <= dim < leaf.dim():
                raise ShapeError(
                    f"fit_dims says that dimension {dim} of {name} counts the fits, but it is "
                    f"{describe(leaf)}; None means that all fits share it"
                )
            if leaf.shape[dim] != num_fits:
                raise ShapeError(
                    f"{name} has shape {tuple(leaf.shape)}: its dimension {dim} must have the size "
                    f"num_fits={num_fits}, one slice for every fit"
                )
            self._slices[position] = leaf.detach().movedim(dim, 0).contiguous()
        self.own = tuple(self._slices)
        self.lifted = tuple(sorted({*self.own, *varying}))
        self.is_own = tuple(position in self._slices for position in self.lifted)

    @staticmethod
    def _dims(args: Any, kwargs: Any, fit_dims: FitDims) -> list[int | None]:
        """The dimension of every leaf."""
        by_position: Sequence[int | None] = (None,) * len(args)
        by_name: Mapping[str, int | None] = {}
        if isinstance(fit_dims, Mapping):
            by_name = fit_dims
            unknown = sorted(set(fit_dims) - set(kwargs))
            if unknown:
                raise ConstraintError(
                    f"fit_dims names {unknown}, which are no keyword arguments of this run; it has "
                    f"{sorted(kwargs)}"
                )
        elif fit_dims is not None:
            if len(fit_dims) != len(args):
                raise ConstraintError(
                    f"fit_dims has {len(fit_dims)} entries for {len(args)} positional arguments: "
                    "give one for each, a dimension or None"
                )
            by_position = fit_dims
        pairs = [*zip(args, by_position, strict=True)]
        # Leaves come in the order of the dict of keyword arguments, as pytree flattens it.
        pairs += [(value, by_name.get(key)) for key, value in kwargs.items()]
        return [dim for value, dim in pairs for _ in pytree.tree_leaves(value)]

    def has_form_of(self, other: FitData) -> bool:
        """Whether one captured step may serve both: the same shared arguments and own slices."""
        if self.own != other.own or self.lifted != other.lifted:
            return False
        if not self._whole.has_form_of(other._whole):
            return False
        if not set(self._whole.differing(other._whole)) <= set(self.lifted):
            return False
        return [*map(_form, self.inputs())] == [*map(_form, other.inputs())]

    def name_of_difference(self, other: FitData) -> str:
        """The argument because of which a step for ``other`` does not serve this."""
        if not self._whole.has_form_of(other._whole):
            return "the number of arguments"
        differing = self._whole.differing(other._whole)
        return self._whole.name(differing[-1]) if differing else "the layout of the parameters"

    def of(self, fit: int) -> Arguments:
        """The arguments of one fit, counted from 0 within this data."""
        replaced = {position: slices[fit] for position, slices in self._slices.items()}
        return Arguments(*self._whole.with_leaves(replaced))

    def inputs(self) -> list[Tensor]:
        """The lifted arguments in order: ``[F, ...]`` where each fit has its own part."""
        if self._inputs is None:
            leaves = self._whole.leaves
            self._inputs = [
                self._slices[k] if k in self._slices else torch.as_tensor(leaves[k]).contiguous()
                for k in self.lifted
            ]
        return self._inputs

    def slices(self) -> list[Tensor]:
        """The arguments of which every fit has its own part, ``[F, ...]``, in order."""
        return list(self._slices.values())

    def first_finite(self) -> int:
        """The first fit whose own data hold neither NaN nor infinities; 0 if there is none."""
        good = torch.ones(self._num_fits, dtype=torch.bool)
        for slices in self._slices.values():
            if slices.is_floating_point():
                good &= slices.isfinite().flatten(1).all(1).cpu()
        return int(good.to(torch.uint8).argmax())


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
