"""Record a pure function of tensors as a flat list of ATen operations.

The function runs once, on real tensors. A dispatch mode below autograd and ``vmap`` notes every
operation that reaches it, forward, backward and update alike. What depends on constants only has
been computed by that run, so constants are folded and equal operations merged at no cost.

This is what ``make_fx`` does, less the symbolic shapes: importing those takes longer than the whole
fit of a small model.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from fastsvi.engine.decompose import decompositions
from fastsvi.errors import CaptureError

aten = torch.ops.aten


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
    where: str = ""  # the statement of the user that made it

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


# Reading these from a tensor that depends on the inputs makes Python depend on data.
_READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)


# What a view of ``x`` was made by, to how ``x`` changes with it.
_WRITE_BACK: dict[Any, Callable[..., Tensor]] = {
    aten.view.default: lambda x, changed, size: changed.reshape(x.shape),
    aten._unsafe_view.default: lambda x, changed, size: changed.reshape(x.shape),
    aten.alias.default: lambda x, changed: changed,
    aten.detach.default: lambda x, changed: changed,
    aten.t.default: lambda x, changed: changed.t(),
    aten.transpose.int: lambda x, changed, *dims: changed.transpose(*dims),
    aten.unsqueeze.default: lambda x, changed, dim: changed.squeeze(dim),
    aten.squeeze.dim: lambda x, changed, dim: changed.reshape(x.shape),
    aten.select.int: aten.select_scatter,
    aten.slice.Tensor: aten.slice_scatter,
    aten.diagonal.default: aten.diagonal_scatter,
}


class _Recorder(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import Dynamo, a second or more, only to tell it to keep away.
        return False

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self._own: set[int] = set()  # memory of the inputs
        self.read: list[tuple[weakref.ref[Tensor], int]] = []
        self._node_of: dict[int, Node] = {}
        # Views of what was changed in place since, by id: the base, and how they come of it.
        self._stale: dict[int, tuple[Tensor, list[Node] | None]] = {}
        self._paths: dict[int, list[Node]] = {}  # of views that were changed: how they were made
        # An id names its tensor only while the tensor lives. None is kept alive for its name:
        # what a wide model computes is let go as it is in an eager step.
        self._alive: dict[int, weakref.ref[Tensor]] = {}
        self._seen: dict[Any, Node] = {}
        self._table = decompositions()

    def input(self, tensor: Tensor) -> Node:
        self._own.add(tensor.untyped_storage().data_ptr())
        return self._bind(tensor, Node.holding("input", tensor))

    def alias(self, tensor: Tensor, part: Tensor) -> None:
        self._bind(tensor, self.node_of(part))

    def node_of(self, tensor: Tensor) -> Node:
        if id(tensor) in self._stale:
            return self._anew(tensor)
        node = self._node_of.get(id(tensor))
        if node is None:
            node = self._bind(tensor, Node.holding("constant", tensor.detach()))
            place = tensor.untyped_storage().data_ptr()
            if not tensor.is_inference() and place not in self._own:
                self.read.append((weakref.ref(tensor), tensor._version))
        return node

    def _bind(self, tensor: Tensor, node: Node) -> Node:
        key = id(tensor)
        self._node_of[key] = node
        if key not in self._alive:
            self._alive[key] = weakref.ref(tensor, lambda _: self._forget(key))
        return node

    def _forget(self, key: int) -> None:
        for table in (self._alive, self._node_of, self._stale, self._paths):
            table.pop(key, None)  # type: ignore[attr-defined]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        decomposition = self._table.get(func)
        if decomposition is not None:
            with self:
                result = decomposition(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is aten._linalg_check_errors.default:
            # A failed factorisation shows as numbers that are not finite, without a look at them.
            return None
        if func._can_decompose():  # below autograd, where composite operations arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        inputs = [self.node_of(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        varies = any(not node.is_constant for node in inputs)
        if varies and func in _READS:
            raise CaptureError(
                f"{statement()} reads a tensor back to Python ({func}), so what follows depends on "
                "data; use torch.where instead of `if`, and keep values as tensors"
            )
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CaptureError(
                f"{statement()} draws from torch's generator ({func}), which a captured step "
                "cannot replay"
            )
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs, varies)
        out = func(*args, **kwargs)
        if not varies or out is None:  # None: a check, as of the success of a factorisation
            return out  # becomes a constant if it is used
        if isinstance(out, Tensor):
            self._bind(out, self._make(func, args, kwargs, out))
        else:
            for position, item in enumerate(out):
                if isinstance(item, Tensor):
                    op = ("item", func, position)
                    self._bind(item, self._make(op, args, kwargs, item))
        return out

    def _in_place(self, func: Any, args: Any, kwargs: Any, varies: bool) -> Any:
        target, name = args[0], func._schema.name.partition("::")[2]
        known = not self.node_of(target).is_constant
        if not varies and not known:
            return func(*args, **kwargs)
        # `x.add_(y)` is `x = x.add(y)` as long as nobody else looks at x.
        twin = getattr(aten, name[:-1], None) if name.endswith("_") else None
        twin = None if name == "copy_" else twin
        if twin is None and name != "copy_":
            raise self._changes_in_place(func)
        with self:
            if twin is None:
                result = args[1].expand(target.shape).to(target.dtype)
            else:
                # `pow.Scalar` has a number as its base, unlike `pow_.Scalar`.
                overload = "Tensor_Scalar" if func is aten.pow_.Scalar else func._overloadname
                result = getattr(twin, overload)(*args, **kwargs)
            whole = self._written_back(target, result, func) if target._base is not None else None
        node, base = self.node_of(result), target if whole is None else target._base
        self._let_go_stale(base)
        out = func(*args, **kwargs)
        self._bind(base, node if whole is None else self.node_of(whole))
        self._bind(target, node)
        self._stale.pop(id(target), None)
        return out

    def _let_go_stale(self, base: Tensor) -> None:
        """Views of ``base``, which is about to change, are to be made anew when they are used."""
        memory, end = base.untyped_storage().data_ptr(), self.node_of(base)
        if end.is_constant and end.value is not None:
            end.value = end.value.clone()  # what it was is still an operand
        for tensor in [reference() for reference in self._alive.values()]:
            if tensor is None or tensor is base or id(tensor) in self._stale:
                continue
            if tensor.untyped_storage().data_ptr() == memory:
                chain = self._chain(self._node_of[id(tensor)], end)
                self._stale[id(tensor)] = base, chain or self._paths.get(id(tensor))

    def _chain(self, node: Node, end: Node) -> list[Node] | None:
        """The views that lead from ``end`` to ``node``, the last first; None if others do."""
        chain = []
        while node is not end:
            if node.op not in _WRITE_BACK or not node.args:
                return None
            chain.append(node)
            node = node.args[0]
        return chain

    def _anew(self, tensor: Tensor) -> Node:
        """The node of a view of a tensor that was changed in place through another one."""
        base, chain = self._stale.pop(id(tensor))
        if chain is None:
            raise CaptureError(
                f"{statement()} uses a view of a tensor that was changed in place; write the "
                "change as a new tensor"
            )
        with self:
            for node in reversed(chain):
                base = node.op(base, *node.args[1:])
        return self._bind(tensor, self.node_of(base)) if chain else self.node_of(base)

    def _written_back(self, view: Tensor, changed: Tensor, func: Any) -> Tensor:
        """The tensor that ``view`` is a view of, with ``changed`` in the place of the view."""
        base = view._base
        chain = None
        if base is not None and id(base) in self._node_of:
            chain = self._chain(self.node_of(view), self.node_of(base))
        if chain is None:
            chain = self._paths.get(id(view))
        if chain is None:
            raise self._changes_in_place(func)
        self._paths[id(view)] = chain
        parents = [base]
        for node in reversed(chain[1:]):
            parents.append(node.op(parents[-1], *node.args[1:]))
        for node, parent in zip(chain, reversed(parents), strict=True):
            changed = _WRITE_BACK[node.op](parent, changed, *node.args[1:])
        return changed

    def _changes_in_place(self, func: Any) -> CaptureError:
        return CaptureError(
            f"{statement()} changes a tensor in place ({func}); write it as a new tensor"
        )

    def _make(self, op: Any, args: Any, kwargs: Any, value: Tensor) -> Node:
        args, kwargs = tree_map_only(Tensor, self.node_of, (args, kwargs))
        key = (op, _identity(args), _identity(sorted(kwargs.items())))
        node = self._seen.get(key)
        if node is None:
            node = Node(op, args, kwargs, tuple(value.shape), value.dtype, where=statement())
            self._seen[key] = node
            self.nodes.append(node)
        return node


def _identity(value: Any) -> Any:
    """A hashable stand-in for an argument, equal only for arguments that mean the same."""
    if isinstance(value, list | tuple):
        return tuple(_identity(x) for x in value)
    return id(value) if isinstance(value, Node) else (type(value), repr(value))


def statement() -> str:
    """The innermost statement outside of torch and fastsvi, as ``file:line: source``."""
    for frame in reversed(traceback.extract_stack()):
        path = frame.filename.replace("\\", "/")
        if not any(part in path for part in ("/torch/", "/fastsvi/", "/kernels/", "<frozen")):
            return f"{path}:{frame.lineno}: `{frame.line}`"
    return "the step"


Aliases = Sequence[tuple[Tensor, Callable[..., Tensor]]]


def record(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], aliases: Aliases = ()
) -> Graph:
    """Run ``function(*inputs)`` once and return what it did as a :class:`Graph`.

    Args:
        function: pure; what it reads besides its arguments is taken for constant.
        inputs: its arguments.
        aliases: tensors that are parts of the inputs though nothing tells so, such as parameters
            that live in a flat buffer: each with the function of the inputs that it is.

    Raises:
        CaptureError: the function reads a tensor back to Python, changes a tensor in place that
            it did not make, or draws from torch's generator. The message names the statement.

    >>> graph = record(lambda x, y: [(x * y).sum()], [torch.ones(3), torch.ones(3)])
    >>> [node.name for node in graph.nodes]
    ['mul', 'sum']
    """
    recorder = _Recorder()
    nodes = [recorder.input(tensor) for tensor in inputs]
    with recorder, torch.no_grad():
        for tensor, part in aliases:
            recorder.alias(tensor, part(*inputs))
    with recorder:
        outputs = [recorder.node_of(tensor) for tensor in function(*inputs)]
    return _live(Graph(nodes, recorder.nodes, outputs, recorder.read))


def _live(graph: Graph) -> Graph:
    """Drop the nodes that no output needs, and count the users of the others."""
    live: set[int] = set()
    pending = list(graph.outputs)
    while pending:
        node = pending.pop()
        node.users += 1
        if id(node) not in live:
            live.add(id(node))
            pending += operands(node)
    graph.nodes = [node for node in graph.nodes if id(node) in live]
    return graph


def operands(node: Node) -> list[Node]:
    """Nodes among the arguments of ``node``."""
    return [x for x in tree_flatten((node.args, node.kwargs))[0] if isinstance(x, Node)]
