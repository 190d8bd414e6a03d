"""All unconstrained parameters of one device and dtype in one contiguous tensor.

Every parameter stays a leaf of its own, one Python object for its whole life with its own
``.grad``, hooks and attributes; only its memory is a slice of the buffer. A leaf keeps the memory
it came with until somebody asks for the buffer as one tensor (``flat``, ``grad``, ``layout``, a
companion): then all newcomers are moved at once. So a program that never asks sees leaves exactly
as it made them, and registering a parameter costs no copy.

What moves, and what does not:

- A move rebinds ``leaf.data``. Optimizers, modules and live autograd graphs hold the leaf and
  never notice. The vacated memory is left as it is, so that views which a graph has saved keep
  their values; it is never handed to another parameter.
- Plain aliases of the old memory (``leaf.detach()``, ``leaf.data``, a numpy array, a larger tensor
  that the leaf was cut from) do not follow the leaf. Take them anew after the buffer has changed.
- A leaf counts its own in-place writes for autograd. Writes to ``flat`` do not reach that count by
  themselves: make them inside :meth:`Buffer.write`, or call :meth:`Buffer.touch` afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from operator import attrgetter, is_
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributions.constraints import Constraint

from fastsvi.errors import FastSVIWarning, MissingParamError
from fastsvi.params.companion import Companion
from fastsvi.params.layout import Layout
from fastsvi.params.slab import Move, Slab, moves_between, rows

# A cache line; also what cuBLAS and 128-bit loads like. Small parameters are packed tightly: for
# them the gaps would cost more than the alignment gains.
_ALIGN_BYTES = 64
_ALIGN_FROM_BYTES = 512

_grad_of = attrgetter("grad")
_place_of = attrgetter("shape", "dtype")


class Buffer:
    """The parameters of one device and dtype; made by :class:`~fastsvi.params.ParamStore`.

    >>> from fastsvi.params import ParamStore
    >>> store = ParamStore()
    >>> loc = store.setdefault("loc", torch.zeros(3))
    >>> scale = store.setdefault("scale", torch.ones(2), torch.distributions.constraints.positive)
    >>> buffer, segment = store.locate(loc)
    >>> with buffer.write() as flat:  # unconstrained space
    ...     flat[segment.slice] = 7.0
    >>> loc
    tensor([7., 7., 7.], requires_grad=True)
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        on_stray: Callable[[str, Tensor], None],
    ) -> None:
        self.device = device
        self.dtype = dtype
        #: Changes whenever the layout does, or a leaf is replaced by another.
        self.version = 0
        self._on_stray = on_stray
        self._leaves: dict[str, Tensor] = {}
        self._constraints: dict[str, Constraint] = {}
        self._pending: dict[str, None] = {}  # an ordered set: leaves still in their own memory
        self._has_gaps = False
        self._groups: dict[str, dict[str, None]] = {}  # name -> the members of its group
        self._layout = Layout()
        self._values = Slab(0.0, device, dtype)
        self._seen_version = 0
        self._grads: Slab | None = None
        self._grad_views: list[Tensor] = []
        self._ordered: list[Tensor] = []
        self._pointers: list[int] = []
        self._places: list[tuple[torch.Size, torch.dtype]] = []
        self._companions: WeakSet[Companion] = WeakSet()

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Buffer({self.device}, {dtype}: {len(self._leaves)} params)"

    # --- the buffer as one tensor -----------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """Where each parameter lies; a live object, to be read again when the version changes."""
        self.settle()
        return self._layout

    @property
    def flat(self) -> Tensor:
        """Unconstrained values, ``[N]``. Another tensor after a parameter was added or removed.

        Write to it inside :meth:`write`, or call :meth:`touch` afterwards.
        """
        self.settle()
        return self._values.view(self._layout.size)

    @property
    def grad(self) -> Tensor:
        """Gradients in unconstrained space, ``[N]``; the leaves' own after :meth:`bind_grads`."""
        self.settle()
        if self._grads is None:
            self._grads = Slab(0.0, self.device, self.dtype)
            self._grads.relocate([], self._values.capacity)
        return self._grads.view(self._layout.size)

    @property
    def leaves(self) -> Sequence[Tensor]:
        """The leaves, unconstrained, in the layout's order."""
        self.settle()
        return self._ordered

    def companion(self, fill: float = 0.0, dtype: torch.dtype | None = None) -> Companion:
        """A tensor that always has this buffer's layout, such as an optimizer's moments.

        Its entries follow every move of their leaf; a new parameter starts at ``fill``. They
        belong to the leaf and not to the name: a name that was deleted and registered anew starts
        fresh, a leaf that left (``scope``, ``del``) and came back finds its entries again. The
        buffer holds its companions weakly.
        """
        companion = Companion(self, fill, dtype or self.dtype, self._values.capacity)
        self._companions.add(companion)
        return companion

    @contextmanager
    def write(self) -> Iterator[Tensor]:
        """``flat``, to be written to in the ``with`` block.

        Afterwards autograd knows that every leaf has changed: a backward pass that needs an
        earlier value raises, as it does after an in-place write to the leaf itself.
        """
        try:
            with torch.no_grad():
                yield self.flat
        finally:
            self.touch()

    def touch(self) -> None:
        """Tell autograd that ``flat`` was written to; see :meth:`write`."""
        self.settle()
        memory = self._values.memory
        increment_version([memory, *self._ordered])
        self._seen_version = memory._version

    def bind_grads(self) -> None:
        """Make every leaf's ``.grad`` a view of :attr:`grad`, so that backward fills it.

        A gradient that a leaf already has is copied in. Cheap when all are bound; call it again
        after ``zero_grad(set_to_none=True)`` or an assignment to ``.grad`` undid it.
        """
        flat = self.grad
        if len(self._grad_views) != len(self._ordered):
            self._grad_views = self._views(flat, self._layout)
        if all(map(is_, map(_grad_of, self._ordered), self._grad_views)):
            return
        with torch.no_grad():
            for leaf, view in zip(self._ordered, self._grad_views, strict=True):
                grad = leaf.grad
                if grad is view or not leaf.requires_grad:
                    continue
                if grad is None:
                    view.zero_()
                else:
                    view.copy_(grad.to_dense() if grad.is_sparse else grad)
                leaf.grad = view

    def zero_grad(self) -> None:
        """Set :attr:`grad` to zero in one memset; the leaves' own after :meth:`bind_grads`."""
        self.grad.zero_()

    def arrange(self, names: Sequence[str]) -> slice:
        """Make the named parameters adjacent, in this order; the slice of ``flat`` they fill.

        The first starts at an address divisible by 16 bytes, and there are no gaps in between.
        They stay together through later moves, but the slice may change with the version.

        Raises:
            MissingParamError: a name is not in this buffer, or is given twice.
        """
        group = dict.fromkeys(names)
        if len(group) < len(names) or not group.keys() <= self._leaves.keys():
            wrong = [n for n in names if n not in self._leaves] or [f"{names} with a name twice"]
            raise MissingParamError(
                f"arrange needs distinct params of {self!r}, found {wrong[0]!r}; register every "
                "param first, with one dtype on one device"
            )
        self.settle()
        if not group:
            return slice(0, 0)
        first, last = names[0], names[-1]
        if list(self._groups.get(first, ())) != list(group):
            for name in group:
                self._leave_group(name)
            self._groups.update(dict.fromkeys(group, group))
            if not self._is_arranged(names):
                self._has_gaps = True
                self._changed()
                self.settle()
        return slice(self._layout[first].offset, self._layout[last].stop)

    def sync(self) -> None:
        """Take back leaves whose memory was exchanged (``p.data = ...``, ``module.double()``).

        The leaf's value wins. One that changed its dtype or device goes to the buffer it now
        belongs to, where companions start afresh.
        """
        self.settle()
        self._notice_writes()
        self._take_back()
        self.settle()

    def release(self) -> None:
        """Give every leaf memory of its own again, until the buffer is next asked for.

        Do this before pickling a module: ``torch.save`` writes the whole memory that a tensor is
        a view of, which is here that of all parameters.
        """
        self.settle()
        for leaf in self._ordered:
            leaf.data = leaf.data.clone()
        self._pending = dict.fromkeys(self._leaves)
        self._has_gaps = bool(self._leaves)
        self._changed()

    # --- for the store ----------------------------------------------------------------------

    def add(self, name: str, leaf: Tensor, constraint: Constraint) -> None:
        """Take in a leaf; it is moved when the buffer is next asked for."""
        self._leaves[name] = leaf
        self._constraints[name] = constraint
        self._pending[name] = None
        self._changed()

    def remove(self, name: str) -> None:
        """Let a leaf go, with the memory that it has."""
        leaf = self._leaves.pop(name)
        del self._constraints[name]
        self._pending.pop(name, None)
        self._leave_group(name)
        if name in self._layout:
            segment = self._layout.forget(name)
            for companion in list(self._companions):
                companion.park(leaf, segment.slice)
            self._has_gaps = True
        self._changed()

    def clear(self) -> None:
        """Let all leaves go and free the memory."""
        for name in list(self._leaves):
            self.remove(name)
        self.settle()

    def constrain(self, name: str, constraint: Constraint) -> None:
        """Give a parameter another constraint; its unconstrained value stays."""
        self._constraints[name] = constraint
        if name in self._layout:
            old = self._layout[name]
            self._layout.replace(type(old)(name, old.offset, old.shape, constraint, old.row))
        self._changed()

    def settle(self) -> bool:
        """Move newcomers in and close gaps; False where there was nothing to do."""
        if not (self._pending or self._has_gaps):
            return False
        # Memory made under inference_mode could never be used for training.
        with torch.inference_mode(False), torch.no_grad():
            self._notice_writes()
            self._expel_strays()
            if self._has_gaps or self._must_grow():
                self._take_back()  # a move from the old place would undo an exchange of memory
                self._expel_strays()
            _warn_of_shared_memory(self._pending, self._leaves, self._values, self._layout)
            if self._has_gaps:
                self._lay_out_anew()
            else:
                self._append()
        self._pending = {}
        self._has_gaps = False
        return True

    # --- moves ------------------------------------------------------------------------------

    def _lay_out_anew(self) -> None:
        """Compact into new memory. The old memory is left to whoever still looks at it."""
        old, new = self._layout, Layout()
        done: set[str] = set()
        for name in self._leaves:
            if name not in done:
                group = self._groups.get(name)
                members = list(group or (name,))
                align = self._alignment(members, always=group is not None)
                for index, member in enumerate(members):
                    shape = self._leaves[member].shape
                    new.append(member, shape, self._constraints[member], 1 if index else align)
                done.update(members)
        self._move(moves_between(old, new), new, capacity=new.size)
        self._layout = new
        self._rebind(list(new), first_row=0)

    def _must_grow(self) -> bool:
        size = self._layout.size
        for name in self._pending:
            align = self._alignment((name,))
            size = -(-size // align) * align + self._leaves[name].numel()
        return size > self._values.capacity

    def _append(self) -> None:
        """Newcomers at the end, into spare capacity if there is enough."""
        layout = self._layout
        size, first_row = layout.size, layout.num_rows
        for name in self._pending:
            shape = self._leaves[name].shape
            layout.append(name, shape, self._constraints[name], self._alignment((name,)))
        if layout.size > self._values.capacity:
            # Doubling makes n registrations cost O(n) copies; the first block fits exactly.
            capacity = max(layout.size, 2 * self._values.capacity)
            self._move([(0, 0, size)] if size else [], layout, capacity)
            self._rebind(list(layout), first_row=0)
        else:
            self._rebind(list(self._pending), first_row)

    def _move(self, moves: list[Move], layout: Layout, capacity: int) -> None:
        bound = self._bound_leaves()
        self._grad_views = []
        for slab in (self._values, self._grads, *(c.slab for c in self._companions)):
            if slab is not None:
                slab.relocate(moves, capacity)
        self._seen_version = self._values.memory._version
        if bound and self._grads is not None:
            for name, leaf in bound.items():
                if name in layout:
                    segment = layout[name]
                    leaf.grad = self._grads.memory[segment.slice].view(segment.shape)

    def _bound_leaves(self) -> dict[str, Tensor]:
        views = {id(view) for view in self._grad_views}
        return {n: leaf for n, leaf in self._leaves.items() if views and id(leaf.grad) in views}

    def _rebind(self, names: list[str], first_row: int) -> None:
        """Point the named leaves at their rows, and bring in what newcomers have."""
        pieces = rows(self._values.memory, self._layout, first_row)
        companions = list(self._companions)
        for name in names:
            segment = self._layout[name]
            leaf = self._leaves[name]
            view = pieces[segment.row - first_row].view(segment.shape)
            if name in self._pending:
                view.copy_(leaf.detach())
                for companion in companions:
                    companion.unpark(leaf, segment.slice)
            leaf.data = view
        self._seen_version = self._values.memory._version
        if first_row == 0:
            self._forget_places()
        self._note_places(names)

    def _notice_writes(self) -> None:
        """Somebody wrote to ``flat`` and did not say so; to say it late is better than never."""
        version = self._values.memory._version
        if version != self._seen_version:
            increment_version(self._ordered)
            self._seen_version = version

    def _take_back(self) -> None:
        """Bring leaves whose memory was exchanged back to their places, with their values."""
        if not self._is_in_place():
            for name in list(self._layout):
                self._readopt(name)
            self._forget_places()
            self._note_places(self._layout)

    def _readopt(self, name: str) -> None:
        leaf, segment = self._leaves[name], self._layout[name]
        if (leaf.device, leaf.dtype) != (self.device, self.dtype) or leaf.shape != segment.shape:
            constraint = self._constraints[name]
            self.remove(name)
            self.add(name, leaf, constraint)
            return
        if name in self._pending:
            return
        with torch.inference_mode(False), torch.no_grad():
            view = self._values.memory[segment.slice].view(segment.shape)
            if view.data_ptr() != leaf.data_ptr() or not leaf.is_contiguous():
                view.copy_(leaf.detach())
                leaf.data = view
                increment_version([leaf])  # views that a graph saved have just been overwritten
        self._seen_version = self._values.memory._version

    def _expel_strays(self) -> None:
        for name in list(self._pending):
            leaf = self._leaves[name]
            if leaf.dtype != self.dtype or leaf.device != self.device:
                if any(companion.knows(leaf) for companion in self._companions):
                    warnings.warn(
                        f"param {name!r} changed from {self.dtype} on {self.device} to "
                        f"{leaf.dtype} on {leaf.device}: its optimizer state starts afresh. Move "
                        "modules before the first step to avoid this",
                        FastSVIWarning,
                        stacklevel=2,
                    )
                self.remove(name)
                self._on_stray(name, leaf)

    # --- bookkeeping ------------------------------------------------------------------------

    def _changed(self) -> None:
        self.version += 1

    def _forget_places(self) -> None:
        self._ordered, self._pointers, self._places = [], [], []

    def _note_places(self, names: Iterable[str]) -> None:
        """Where the leaves of the last rows are, for :meth:`sync` to see whether they still are."""
        leaves = [self._leaves[name] for name in names]
        self._ordered += leaves
        self._pointers += map(Tensor.data_ptr, leaves)
        self._places += map(_place_of, leaves)

    def _is_in_place(self) -> bool:
        return (
            list(map(Tensor.data_ptr, self._ordered)) == self._pointers
            and list(map(_place_of, self._ordered)) == self._places
        )

    def _views(self, flat: Tensor, layout: Layout) -> list[Tensor]:
        pieces = rows(flat, layout, 0)
        return [pieces[s.row].view(s.shape) for s in layout.values()]

    def _alignment(self, members: Sequence[str], always: bool = False) -> int:
        """In elements."""
        size = self.dtype.itemsize
        numel = sum(self._leaves[member].numel() for member in members)
        return max(1, _ALIGN_BYTES // size) if always or numel * size >= _ALIGN_FROM_BYTES else 1

    def _is_arranged(self, names: Sequence[str]) -> bool:
        segments = [self._layout[name] for name in names]
        aligned = segments[0].offset % self._alignment(names, always=True) == 0
        return aligned and all(a.stop == b.offset for a, b in pairwise(segments))

    def _leave_group(self, name: str) -> None:
        group = self._groups.pop(name, None)
        if group is not None:
            del group[name]


def _warn_of_shared_memory(
    pending: dict[str, None], leaves: dict[str, Tensor], values: Slab, layout: Layout
) -> None:
    """Newcomers that share memory with each other, a settled leaf or another process."""
    spans = []
    size = values.memory.element_size()
    for name in pending:
        leaf = leaves[name]
        if leaf.is_contiguous():
            start = leaf.data_ptr()
            spans.append((start, start + size * leaf.numel(), name))
            if values.memory.device.type == "cpu" and leaf.is_shared():
                _warn_unshared(name, "other processes (share_memory_)")
    spans.sort()
    for (_, stop, name), (start, _, other) in pairwise(spans):
        if start < stop:
            _warn_unshared(name, f"param {other!r}")
    base = values.memory.data_ptr()
    for start, _, name in spans:
        owner = layout.owner((start - base) // size)
        if owner is not None and owner != name:
            _warn_unshared(name, f"param {owner!r}")


def _warn_unshared(name: str, other: str) -> None:
    warnings.warn(
        f"param {name!r} shares memory with {other}, and no longer does now that its values have "
        "moved into the flat buffer. Register one tensor under both names to tie them, or a clone "
        "to keep them apart",
        FastSVIWarning,
        stacklevel=2,
    )
