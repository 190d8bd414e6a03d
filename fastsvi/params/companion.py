"""Tensors that have a buffer's layout and keep it, such as an optimizer's moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastsvi.params.slab import Slab

if TYPE_CHECKING:
    from fastsvi.params.buffer import Buffer


class Companion:
    """A flat tensor with the layout of a buffer; see :meth:`Buffer.companion`."""

    def __init__(self, buffer: Buffer, fill: float, dtype: torch.dtype, capacity: int) -> None:
        self.buffer = buffer
        self.fill = fill
        self.slab = Slab(fill, buffer.device, dtype)
        self.slab.relocate([], capacity)
        self._parked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @property
    def flat(self) -> Tensor:
        """Entries in the buffer's layout, ``[N]``; read it anew after the version has changed."""
        return self.slab.view(self.buffer.layout.size)

    def park(self, leaf: Tensor, where: slice) -> None:
        """Keep the entries of a leaf that leaves, for as long as it lives."""
        self._parked[leaf] = self.slab.memory[where].clone()

    def unpark(self, leaf: Tensor, where: slice) -> None:
        """Give a leaf that came back its entries again."""
        entries = self._parked.pop(leaf, None) if len(self._parked) else None
        if entries is not None and len(entries) == where.stop - where.start:
            self.slab.memory[where] = entries

    def knows(self, leaf: Tensor) -> bool:
        """Does it keep entries of a leaf that has left?"""
        return leaf in self._parked
