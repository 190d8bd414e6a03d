"""Memory of a flat tensor that grows, and the copies that carry it from one layout to another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastsvi.params.layout import Layout

Move = tuple[int, int, int]  # first element before, first element after, how many


class Slab:
    """Memory of one flat tensor, with room to grow; entries that nobody has are ``fill``."""

    def __init__(self, fill: float, device: torch.device, dtype: torch.dtype) -> None:
        self.fill = fill
        # Memory made under inference_mode could never be used for training.
        with torch.inference_mode(False):
            self.memory = torch.empty(0, device=device, dtype=dtype)

    @property
    def capacity(self) -> int:
        return self.memory.numel()

    def view(self, size: int) -> Tensor:
        return self.memory[:size]

    def relocate(self, moves: Sequence[Move], capacity: int) -> None:
        """Always into new memory: somebody may still look at the old."""
        with torch.inference_mode(False), torch.no_grad():
            memory = self.memory.new_full((capacity,), self.fill)
            for before, after, count in moves:
                memory[after : after + count] = self.memory[before : before + count]
            self.memory = memory


def rows(memory: Tensor, layout: Layout, first_row: int) -> tuple[Tensor, ...]:
    """Pieces of flat memory, one per row from ``first_row`` on."""
    bounds = layout.boundaries[first_row:]
    sizes = [stop - start for start, stop in pairwise(bounds)]
    return memory[bounds[0] : bounds[-1]].split(sizes) if sizes else ()


def moves_between(old: Layout, new: Layout) -> list[Move]:
    """Copies that carry the segments common to both layouts over, adjacent ones joined."""
    moves: list[Move] = []
    for name, segment in new.items():
        if name in old:
            before, after, count = old[name].offset, segment.offset, segment.numel
            if moves:
                b, a, c = moves[-1]
                if (b + c, a + c) == (before, after):
                    moves[-1] = (b, a, c + count)
                    continue
            moves.append((before, after, count))
    return moves
