"""Which leaf has which names, which constraint, and which buffer it lies in.

:class:`~fastsvi.params.ParamStore` is this plus the interface that programs know.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints as tc
from torch.distributions.constraints import Constraint

from fastsvi.errors import DtypeError, describe
from fastsvi.kernels.transforms import SegmentTable
from fastsvi.params import flat_read
from fastsvi.params.buffer import Buffer
from fastsvi.params.layout import Segment
from fastsvi.params.transforms import Reader, coding_of
from fastsvi.params.views import LeafRef, LiveConstraints, LiveLeaves

BufferKey = tuple[torch.device, torch.dtype]


class Entry(NamedTuple):
    """What reading a parameter takes."""

    leaf: Tensor
    ref: LeafRef
    read: Reader | None  # None where the leaf itself is the constrained value


class Registry:
    """Names, leaves, constraints and buffers, kept in step."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        # Pyro's programs know the next three by these names.
        self._params = LiveLeaves(self)
        self._param_to_name: dict[Tensor, str] = {}
        self._constraints = LiveConstraints(self)
        self._buffers: dict[BufferKey, Buffer] = {}
        self._homes: dict[str, Buffer] = {}
        self._owners: dict[str, str] = {}  # further names of a leaf -> the name its segment has
        self._plans: dict[Buffer, flat_read.Plan] = {}
        self._changes = 0

    @property
    def version(self) -> int:
        """Changes whenever a parameter comes, goes, moves or gets another constraint."""
        return self._changes + sum(buffer.version for buffer in self._buffers.values())

    @property
    def buffers(self) -> dict[BufferKey, Buffer]:
        """The flat buffers by (device, dtype). Asking moves all leaves into them."""
        self._settle()
        return {key: buffer for key, buffer in self._buffers.items() if len(buffer.layout)}

    def locate(self, leaf: Tensor) -> tuple[Buffer, Segment] | None:
        """Buffer and segment of a leaf (told by identity), or None if the store does not have it.

        Of a leaf with several names the segment bears the first.
        """
        name = self._param_to_name.get(leaf)
        if name is None or not self._holds(name, leaf):
            return None
        self._settle()
        name = self._owners.get(name, name)
        buffer = self._homes[name]
        return buffer, buffer.layout[name]

    def table(self, buffer: Buffer) -> SegmentTable:
        """The elementwise constraints of a buffer, one row for each row of its layout.

        Gaps, and parameters whose constraint is not elementwise with scalar bounds, have identity
        rows.
        """
        return self._plan(buffer).table

    def sync(self) -> None:
        """Take back leaves whose memory was exchanged from outside; see :meth:`Buffer.sync`."""
        for buffer in list(self._buffers.values()):
            buffer.sync()
        self._settle()

    def clear(self) -> None:
        """Delete all parameters."""
        self._entries.clear()
        self._params._forget_all()
        self._param_to_name.clear()
        self._constraints._forget_all()
        self._homes.clear()
        self._owners.clear()
        self._plans.clear()
        for buffer in self._buffers.values():
            buffer.clear()
        self._changes += 1

    # --- in and out -------------------------------------------------------------------------

    def _put(self, name: str, leaf: Tensor, constraint: Constraint) -> None:
        """Make ``leaf`` the leaf of ``name``; the only way in."""
        coding = coding_of(constraint, name)
        if self._holds(name, leaf):
            if self._constraints[name] is not constraint:
                self._constrain(name, constraint)
            return
        if name in self._entries:
            self._let_go(name)
        self._entries[name] = Entry(leaf, LeafRef(leaf), coding.read)
        self._params._record(name, leaf)
        self._constraints._record(name, constraint)
        other = self._param_to_name.get(leaf)
        self._param_to_name[leaf] = name
        if other is not None and other != name and self._holds(other, leaf):
            self._owners[name] = self._owners.get(other, other)
        else:
            self._house(name, leaf)
        self._changes += 1

    def _drop(self, name: str) -> None:
        """Forget a name; the only way out."""
        self._let_go(name)
        del self._entries[name]
        self._params._forget(name)
        self._constraints._forget(name)
        self._changes += 1

    def _let_go(self, name: str) -> None:
        """Part a name from its leaf, which stays where it is if it has other names."""
        leaf = self._entries[name].leaf
        owner = self._owners.pop(name, None)
        if owner is None:
            self._homes.pop(name).remove(name)
            heirs = [other for other, owner in self._owners.items() if owner == name]
            if heirs:
                owner = heirs[0]
                del self._owners[owner]
                self._owners.update(dict.fromkeys(heirs[1:], owner))
                self._house(owner, leaf)
        if owner is None:
            self._param_to_name.pop(leaf, None)
        elif self._param_to_name.get(leaf) == name:
            self._param_to_name[leaf] = owner

    def _holds(self, name: str, leaf: Tensor) -> bool:
        """Programs may write to ``_param_to_name``, so it is not taken at its word."""
        entry = self._entries.get(name)
        return entry is not None and entry.leaf is leaf

    def _adopt(self, name: str, leaf: Any) -> None:
        """``store._params[name] = leaf``."""
        if not isinstance(leaf, Tensor):
            raise DtypeError(
                f"param {name!r} needs an unconstrained tensor, found {describe(leaf)}"
            )
        self._put(name, as_leaf(leaf), self._constraints.get(name, tc.real))

    def _constrain(self, name: str, constraint: Constraint) -> None:
        """``store._constraints[name] = constraint``."""
        entry = self._entries.get(name)
        if entry is not None:
            self._entries[name] = entry._replace(read=coding_of(constraint, name).read)
            if name in self._homes:
                self._homes[name].constrain(name, constraint)
            self._changes += 1
        self._constraints._record(name, constraint)

    # --- buffers ----------------------------------------------------------------------------

    def _house(self, name: str, leaf: Tensor) -> None:
        key = (leaf.device, leaf.dtype)
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = Buffer(*key, on_stray=self._take_stray)
        buffer.add(name, leaf, self._constraints[name])
        self._homes[name] = buffer

    def _take_stray(self, name: str, leaf: Tensor) -> None:
        """A leaf has changed its dtype or device and left its buffer."""
        self._house(name, leaf)
        self._changes += 1

    def _settle(self) -> None:
        """Until no buffer has newcomers: settling one may send a stray to another."""
        moved = True
        while moved:
            moved = False
            for buffer in list(self._buffers.values()):
                moved |= buffer.settle()

    def _plan(self, buffer: Buffer) -> flat_read.Plan:
        buffer.settle()
        plan = self._plans.get(buffer)
        if plan is None or plan.version != buffer.version:
            plan = self._plans[buffer] = flat_read.plan_of(buffer)
        return plan


def as_leaf(tensor: Tensor) -> Tensor:
    """The tensor itself if it is a leaf, or else a copy that is one."""
    return tensor if tensor.is_leaf else tensor.detach().clone().requires_grad_()
