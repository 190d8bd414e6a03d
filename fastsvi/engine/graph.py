"""A recorded function: operations on inputs and constants, in order."""

from __future__ import annotations

import linecache
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """A line of the user's program; its text is looked up only where it is printed."""

    path: str
    number: int

    def __str__(self) -> str:
        linecache.checkcache(self.path)
        line = linecache.getline(self.path, self.number).strip()
        path = self.path.replace("\\", "/")
        return f"{path}:{self.number}: `{line}`"


@dataclass(eq=False)
class Node:
    """One operation, input or constant of a recorded run.

    ``value`` is the tensor of an input or a constant; that of an operation was let go.
    """

    op: Any  # an OpOverload, "input", "constant", or ("item", OpOverload, position)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: Tensor | None = None
    users: int = 0
    where: Place | str = ""  # the statement of the user that made it

    @classmethod
    def holding(cls, kind: str, tensor: Tensor) -> Node:
        """An input or a constant."""
        return cls(kind, (), {}, tuple(tensor.shape), tensor.dtype, tensor)

    @property
    def is_constant(self) -> bool:
        return self.op == "constant"

    @property
    def name(self) -> str:
        """Name of the operation without its overload, such as ``add``."""
        if isinstance(self.op, str):
            return self.op
        op = self.op[1] if isinstance(self.op, tuple) else self.op
        return op._schema.name.partition("::")[2]


@dataclass
class Graph:
    """A recorded function: ``outputs`` as operations of ``inputs`` and constants, in order."""

    inputs: list[Node]
    nodes: list[Node]
    outputs: list[Node]
    read: list[tuple[weakref.ref[Tensor], int]]  # tensors taken for constant, and their versions

    def is_current(self) -> bool:
        """Whether nothing that was taken for constant has been written to since."""
        tensors = ((reference(), version) for reference, version in self.read)
        return all(tensor is None or tensor._version == version for tensor, version in tensors)

    def difference(self, other: Graph) -> str | None:
        """The first operation or constant in which two recordings of one function differ.

        Both ran on the same inputs; whatever differs stems from Python state that has changed.
        """
        twin = dict(zip(self.inputs, other.inputs, strict=True))
        for mine, its in zip(self.nodes, other.nodes, strict=False):
            found = _difference((mine.args, mine.kwargs), (its.args, its.kwargs), twin)
            if mine.op != its.op:
                found = f"`{mine.name}` has become `{its.name}`"
            if found is not None:
                return f"{found} at {its.where}"
            twin[mine] = its
        if len(self.nodes) != len(other.nodes):
            return f"{len(self.nodes)} operations have become {len(other.nodes)}"
        return _difference(self.outputs, other.outputs, twin)


def _difference(mine: Any, its: Any, twin: dict[Node, Node]) -> str | None:
    """How two arguments differ, given the nodes found to be the same; None if they do not."""
    if isinstance(mine, Node) and isinstance(its, Node):
        if mine in twin or not (mine.is_constant and its.is_constant):
            return None if twin.get(mine) is its else "the operands have changed"
        twin[mine] = its
        one, other = mine.value, its.value
        if one is None or other is None:
            return "the operands have changed"
        same = one.shape == other.shape and one.dtype == other.dtype
        if same and (one.data_ptr() == other.data_ptr() or _are_equal(one, other)):
            return None
        if one.numel() == other.numel() == 1:
            return f"the number {one.item():g} has become {other.item():g}"
        return f"a constant of shape {tuple(one.shape)} has changed"
    if isinstance(mine, list | tuple) and isinstance(its, list | tuple) and len(mine) == len(its):
        found = (_difference(a, b, twin) for a, b in zip(mine, its, strict=True))
        return next((text for text in found if text is not None), None)
    if isinstance(mine, dict) and isinstance(its, dict) and mine.keys() == its.keys():
        return _difference([mine[key] for key in mine], [its[key] for key in mine], twin)
    same = type(mine) is type(its) and (mine == its or (mine != mine and its != its))
    return None if same else f"the argument {mine!r} has become {its!r}"


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether all entries are equal, with NaN equal to NaN."""
    return bool(((one == other) | ((one != one) & (other != other))).all())


# ------------------------------------------------------------------------ arguments of operations
# They are tuples, lists and dicts, hardly ever nested. torch's pytree takes any tree, and so much
# longer that half of the time of a recording went there.


def members(arguments: Any, kind: type) -> Iterator[Any]:
    """What is of this kind in arguments of an operation.

    >>> list(members(([1, "a"], {"dim": 2}), int))
    [1, 2]
    """
    if isinstance(arguments, kind):
        yield arguments
    elif isinstance(arguments, list | tuple):
        for x in arguments:
            yield from members(x, kind)
    elif isinstance(arguments, dict):
        yield from members(list(arguments.values()), kind)


def replaced(arguments: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """Arguments of an operation with ``by(x)`` in place of every ``x`` of this kind.

    >>> replaced(([1, "a"], {"dim": 2}), int, str)
    (['1', 'a'], {'dim': '2'})
    """
    if isinstance(arguments, kind):
        return by(arguments)
    if isinstance(arguments, tuple):
        return tuple([replaced(x, kind, by) for x in arguments])
    if isinstance(arguments, list):
        return [replaced(x, kind, by) for x in arguments]
    if isinstance(arguments, dict):
        return {key: replaced(x, kind, by) for key, x in arguments.items()}
    return arguments


def operands(node: Node) -> list[Node]:
    """Nodes among the arguments of ``node``."""
    return list(members((node.args, node.kwargs), Node))


def identity(arguments: Any) -> Any:
    """A hashable stand-in for arguments of an operation, equal only for those that mean the same.

    >>> identity((1, [2.0])) == identity((1, [2.0])) != identity((1, [2]))
    True
    """
    if isinstance(arguments, list | tuple):
        return tuple([identity(x) for x in arguments])
    if isinstance(arguments, dict):
        return identity(sorted(arguments.items()))
    return id(arguments) if isinstance(arguments, Node) else (type(arguments), repr(arguments))


# -------------------------------------------------------------------------------- whose line it is


def statement() -> Place | str:
    """The innermost statement outside of torch and fastsvi."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_inside(frame.f_code.co_filename):
        frame = frame.f_back
    return "the step" if frame is None else Place(frame.f_code.co_filename, frame.f_lineno)


@cache
def _is_inside(path: str) -> bool:
    path = path.replace("\\", "/")
    return any(part in path for part in ("/torch/", "/fastsvi/", "/kernels/", "<frozen"))
