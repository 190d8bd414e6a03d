"""The arguments of a run: which of them a captured step may take for constant.

A captured step takes arguments for constants as long as they stay the same, because much that is
computed from data alone is then computed once. One that was seen to vary is lifted: it becomes an
input of the step, which then serves all its values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Arguments:
    """Positional and keyword arguments of a program, as a flat list of leaves.

    >>> one = Arguments((torch.ones(3), 0.5), {"size": 3})
    >>> two = Arguments((torch.ones(3), 0.1), {"size": 3})
    >>> [one.name(k) for k in one.differing(two)]
    ['argument 0', 'argument 1']
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs
        self.leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._versions = [_version(leaf) for leaf in self.leaves]

    def has_form_of(self, other: Arguments) -> bool:
        """Whether there are as many, in the same tuples, lists and dicts."""
        return self._spec == other._spec

    def differing(self, other: Arguments) -> list[int]:
        """Positions of the leaves that are not those of ``other``, or were written to since.

        ``other`` has the same form.
        """
        pairs = enumerate(zip(self.leaves, other.leaves, strict=True))
        return [
            k
            for k, (mine, its) in pairs
            if not is_same(mine, its) or self._versions[k] != other._versions[k]
        ]

    def with_leaves(self, replaced: dict[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments in which the leaves of some positions are others."""
        leaves = [replaced.get(k, leaf) for k, leaf in enumerate(self.leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs

    def name(self, position: int) -> str:
        """How the user would call a leaf: ``argument 0``, ``argument 'beta'``."""
        count = 0
        named: Iterable[tuple[str, Any]] = [
            *((f"argument {k}", value) for k, value in enumerate(self.args)),
            *((f"argument {key!r}", self.kwargs[key]) for key in self.kwargs),
        ]
        for name, value in named:
            size = len(pytree.tree_leaves(value))
            if position < count + size:
                return name if size == 1 else f"{name} (its part {position - count})"
            count += size
        raise IndexError(f"there are {count} arguments, and no number {position}")


def is_same(one: Any, other: Any) -> bool:
    """Whether two arguments are the same object, or the same plain value."""
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, _SCALARS) and one == other


def _version(leaf: Any) -> int | None:
    """How often a tensor was written to; None where that is not counted."""
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else None


def can_be_lifted(leaf: Any) -> bool:
    """Whether a captured step can have this argument as an input: a tensor or a float."""
    if isinstance(leaf, Tensor):
        return leaf.layout is torch.strided and not leaf.requires_grad
    return type(leaf) is float


class Inputs:
    """Lifted arguments in memory of their own, where a captured step reads them.

    Args:
        arguments: of the program.
        positions: of the leaves to be lifted.

    Attributes:
        tensors: one per position; a float is a scalar of torch's default dtype.
    """

    def __init__(self, arguments: Arguments, positions: Sequence[int], device: Any = None) -> None:
        self.positions = tuple(positions)
        leaves = [arguments.leaves[k] for k in self.positions]
        self._types = [type(leaf) for leaf in leaves]
        self.tensors = [
            torch.empty_like(leaf, memory_format=torch.contiguous_format, requires_grad=False)
            if isinstance(leaf, Tensor)
            else torch.empty((), device=device)
            for leaf in leaves
        ]
        self._held: list[Any] = [None] * len(leaves)  # what the memory holds
        self.hold(arguments)

    def accept(self, arguments: Arguments) -> bool:
        """Whether the lifted leaves of ``arguments`` have the kinds and shapes of these."""
        for position, kind, tensor in zip(self.positions, self._types, self.tensors, strict=True):
            leaf = arguments.leaves[position]
            if not can_be_lifted(leaf) or isinstance(leaf, Tensor) != issubclass(kind, Tensor):
                return False
            if isinstance(leaf, Tensor) and _form(leaf) != _form(tensor):
                return False
        return True

    def forget(self) -> None:
        """Copy all again, also what was not written to as far as its version tells."""
        self._held = [None] * len(self._held)

    def hold(self, arguments: Arguments) -> None:
        """Copy the lifted leaves of ``arguments`` to where the step reads them."""
        for k, (position, tensor) in enumerate(zip(self.positions, self.tensors, strict=True)):
            leaf = arguments.leaves[position]
            if not isinstance(leaf, Tensor):
                tensor.fill_(leaf)
                continue
            version = _version(leaf)
            held = self._held[k]
            # The same tensor, not written to since, need not be copied again.
            if held is None or held[0]() is not leaf or held[1] != version or version is None:
                tensor.copy_(leaf)
                self._held[k] = weakref.ref(leaf), version

    def stacked(self, several: Sequence[Arguments]) -> list[Tensor]:
        """The lifted leaves of several arguments, ``[len(several), *shape]`` each."""
        stacks = []
        for position, tensor in zip(self.positions, self.tensors, strict=True):
            leaves = [arguments.leaves[position] for arguments in several]
            if isinstance(leaves[0], Tensor):
                stacks.append(torch.stack(leaves))
            else:
                stacks.append(torch.tensor(leaves, dtype=tensor.dtype, device=tensor.device))
        return stacks

    def replaced(self) -> dict[int, Tensor]:
        """The lifted leaves by position, for :meth:`Arguments.with_leaves`."""
        return dict(zip(self.positions, self.tensors, strict=True))


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
