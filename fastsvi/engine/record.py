"""Record a pure function of tensors as a flat list of ATen operations.

The function runs once, on real tensors. A dispatch mode below autograd and ``vmap`` notes every
operation that reaches it, forward, backward and update alike. What depends on constants only has
been computed by that run, so constants are folded and equal operations merged at no cost.

Nothing reads the values of what depends on the inputs. Where that is large, only its outline is
made: to record a step of ten million parameters takes neither memory nor time.

This is what ``make_fx`` does, less the symbolic shapes: importing those takes longer than the whole
fit of a small model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsvi.engine.decompose import decompositions
from fastsvi.engine.graph import Graph, Node, identity, members, operands, replaced, statement
from fastsvi.engine.outline import NeedsValues, is_larger, outline
from fastsvi.engine.reads import Reads
from fastsvi.errors import CaptureError

aten = torch.ops.aten


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


# Tensors of so many elements, and all that is made of them, are recorded without their values.
_LARGE = 1 << 19


class _Recorder(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import Dynamo, a second or more, only to tell it to keep away.
        return False

    def __init__(self, *, decomposed: bool, computes: bool, keeps: bool) -> None:
        super().__init__()
        self._kept: list[Tensor] | None = [] if keeps else None
        self._computes = computes  # everything, be it ever so large
        self._hollow: set[Node] = set()  # whose tensors hold no values
        self.nodes: list[Node] = []
        self._own: set[int] = set()  # memory of the inputs
        self._fresh: set[int] = set()  # memory of constants that were computed by the function
        self.read: list[tuple[weakref.ref[Tensor], int]] = []
        self._node_of: dict[int, Node] = {}
        # Views of what was changed in place since, by id: the base, and how they come of it.
        self._stale: dict[int, tuple[Tensor, list[Node] | None]] = {}
        self._paths: dict[int, list[Node]] = {}  # of views that were changed: how they were made
        # An id names its tensor only while the tensor lives. None is kept alive for its name:
        # what a wide model computes is let go as it is in an eager step.
        self._alive: dict[int, weakref.ref[Tensor]] = {}
        self._seen: dict[Any, Node] = {}
        self._table = decompositions() if decomposed else {}

    def input(self, tensor: Tensor) -> Node:
        self._own.add(tensor.untyped_storage().data_ptr())
        return self._bind(tensor, Node.holding("input", tensor))

    def alias(self, tensor: Tensor, part: Tensor) -> None:
        self._bind(tensor, self.node_of(part))

    def node_of(self, tensor: Tensor) -> Node:
        if id(tensor) in self._stale:
            return self._anew(tensor)
        node = self._node_of.get(id(tensor))
        if node is None and (twin := self._twin(tensor)) is not None:
            return self._bind(tensor, twin)
        if node is None:
            node = self._bind(tensor, Node.holding("constant", tensor.detach()))
            place = tensor.untyped_storage().data_ptr()
            if not tensor.is_inference() and place not in self._own:
                self.read.append((weakref.ref(tensor), tensor._version))
        return node

    def _twin(self, tensor: Tensor) -> Node | None:
        """The node of another object with the same memory, as ``nn.Parameter(x)`` is of ``x``."""
        memory = tensor.untyped_storage().data_ptr()
        for key, reference in self._alive.items():
            known = reference()
            if known is None or key in self._stale or known.untyped_storage().data_ptr() != memory:
                continue
            node = self._node_of[key]
            if memory and not node.is_constant and _place(known) == _place(tensor):
                return node
        return None

    def refuse(self, tensor: Tensor, name: str) -> None:
        """Raise an error if ``tensor``, which Python is about to read, depends on the inputs."""
        node = self._node_of.get(id(tensor)) or self._twin(tensor)
        if node is not None and not node.is_constant:
            raise self._reads(name)

    def _reads(self, how: Any) -> CaptureError:
        return CaptureError(
            f"{statement()} reads a tensor back to Python ({how}), so what follows depends on "
            "data; use torch.where instead of `if`, and keep values as tensors"
        )

    def _bind(self, tensor: Tensor, node: Node) -> Node:
        key = id(tensor)
        if self._kept is not None:
            self._kept.append(tensor)
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
        inputs = [self.node_of(x) for x in members((args, kwargs), Tensor)]
        varies = any(not node.is_constant for node in inputs)
        if varies and func in _READS:
            raise self._reads(func)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CaptureError(
                f"{statement()} draws from torch's generator ({func}), which a captured step "
                "cannot replay"
            )
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs, varies)
        hollow = varies and self._is_hollow(func, args, inputs)
        out = outline(func, args, kwargs) if hollow else func(*args, **kwargs)
        # None comes of a check, as of the success of a factorisation, and True of `x.is_pinned()`.
        if not varies or out is None or isinstance(out, bool):
            given = [node.value for node in inputs if node.value is not None]
            self._fresh |= _memory(out) - _memory(given)
            return out  # becomes a constant if it is used
        if isinstance(out, Tensor):
            made = [self._bind(out, self._make(func, args, kwargs, out))]
        else:
            made = [
                self._bind(item, self._make(("item", func, position), args, kwargs, item))
                for position, item in enumerate(out)
                if isinstance(item, Tensor)
            ]
        if hollow:
            self._hollow.update(made)
        return out

    def _is_hollow(self, func: Any, args: tuple[Any, ...], inputs: list[Node]) -> bool:
        """Whether the result of an operation is not to be computed."""
        if self._computes:
            return False
        return not self._hollow.isdisjoint(inputs) or is_larger(func, args, _LARGE)

    def _in_place(self, func: Any, args: Any, kwargs: Any, varies: bool) -> Any:
        target, name = args[0], func._schema.name.partition("::")[2]
        known = not self.node_of(target).is_constant
        if not varies and not known:
            if target.untyped_storage().data_ptr() not in self._fresh:
                raise self._changes_in_place(func)  # before it does: nobody would take it back
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
        out = target if node in self._hollow else func(*args, **kwargs)
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
        args, kwargs = replaced((args, kwargs), Tensor, self.node_of)
        key = (op, identity(args), identity(kwargs))
        node = self._seen.get(key)
        if node is None:
            node = Node(op, args, kwargs, tuple(value.shape), value.dtype, where=statement())
            self._seen[key] = node
            self.nodes.append(node)
        return node


def _memory(tensors: Any) -> set[int]:
    found = tensors if isinstance(tensors, list | tuple) else [tensors]
    return {x.untyped_storage().data_ptr() for x in found if isinstance(x, Tensor)}


def _place(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()


Aliases = Sequence[tuple[Tensor, Callable[..., Tensor]]]


def record(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    aliases: Aliases = (),
    *,
    decomposed: bool = True,
    computes: bool = False,
    keeps: bool = False,
) -> Graph:
    """Run ``function(*inputs)`` once and return what it did as a :class:`Graph`.

    Args:
        function: pure; what it reads besides its arguments is taken for constant.
        inputs: its arguments.
        aliases: tensors that are parts of the inputs though nothing tells so, such as parameters
            that live in a flat buffer: each with the function of the inputs that it is.
        decomposed: state operations in simpler ones, for native loops. Where each operation will
            be a launch of its own, the fewer the better.
        computes: compute everything, be it ever so large.
        keeps: let go of no tensor, so that those are known that are made of its memory by no
            operation, as ``nn.Parameter(x + 1)`` is.

    Raises:
        CaptureError: the function reads a tensor back to Python, changes a tensor in place that
            it did not make, or draws from torch's generator. The message names the statement.

    >>> graph = record(lambda x, y: [(x * y).sum()], [torch.ones(3), torch.ones(3)])
    >>> [node.name for node in graph.nodes]
    ['mul', 'sum']
    """
    try:
        recorder = _Recorder(decomposed=decomposed, computes=computes, keeps=keeps)
        return _record(recorder, function, inputs, aliases)
    except NeedsValues:
        recorder = _Recorder(decomposed=decomposed, computes=True, keeps=keeps)
        return _record(recorder, function, inputs, aliases)


def _record(
    recorder: _Recorder,
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    aliases: Aliases,
) -> Graph:
    nodes = [recorder.input(tensor) for tensor in inputs]
    with recorder, torch.no_grad():
        for tensor, part in aliases:
            recorder.alias(tensor, part(*inputs))
    with recorder, Reads(recorder.refuse):
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
