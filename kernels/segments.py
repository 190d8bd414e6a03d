"""Segments of a flat buffer: which elements belong together, and sums and expansions over them.

A flat buffer of ``N`` elements is cut into ``S`` adjacent segments, one per parameter. Values held
once per segment (a learning rate, a step count) are *expanded* to elements, and values per element
(squared gradients, log-determinants) are *summed* per segment. Both take a few dispatches whatever
``S`` is: nothing here loops over segments once a table is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fastsvi.kernels import dispatch

# Triton kernels work on tiles of the buffer of this many elements: two 128-bit accesses of float32
# for each thread of a program.
TILE = 1024


# Walking over pieces of a buffer beats gathering its elements where the pieces are so long; but
# only over so many, for a captured step holds some nodes for each.
_LONG_PIECE = 2048
_MAX_LONG_PIECES = 64


def worth_walking(num_pieces: int, num_elements: int) -> bool:
    """Whether pieces are few and long enough to be handled one by one."""
    return 0 < num_pieces <= min(_MAX_LONG_PIECES, num_elements // _LONG_PIECE)


class Segments:
    """``S`` adjacent runs of elements that cover a flat buffer of ``N`` elements.

    Args:
        sizes: elements in each segment, in buffer order; zeros are allowed.
        device: where ``offsets`` and the index tensors live.

    Attributes:
        sizes: the sizes, on the host.
        offsets: int64 ``[S + 1]`` on the device; segment ``s`` is ``offsets[s]:offsets[s + 1]``.

    Raises:
        KernelError: a size is negative.

    >>> segments = Segments([2, 0, 3])
    >>> segments.offsets
    tensor([0, 2, 2, 5])
    >>> segments.expand(torch.tensor([10.0, 20.0, 30.0]))
    tensor([10., 10., 30., 30., 30.])
    >>> segments.sum(torch.ones(5))
    tensor([2., 0., 3.])
    """

    def __init__(
        self, sizes: Sequence[int], device: torch.device | str | int | None = None
    ) -> None:
        self.sizes = tuple(int(size) for size in sizes)
        if any(size < 0 for size in self.sizes):
            raise dispatch.error(
                "Segments",
                "sizes must not be negative; give the number of elements of each parameter",
                sizes=self.sizes,
            )
        starts = [0]
        for size in self.sizes:
            starts.append(starts[-1] + size)
        self.num_elements = starts[-1]
        self.offsets = torch.tensor(starts, dtype=torch.int64, device=device)
        self._equal_size = self.sizes[0] if len(set(self.sizes)) == 1 else None
        # Made now and not on first use: a tensor first made while a step is being traced under a
        # fake mode would be a fake tensor, and would be cached for every later step.
        if self.offsets.device.type != "cpu":
            _ = self.chunks, self.chunk_offsets
        elif len(self) > 1:
            _ = self.ids

    def __len__(self) -> int:
        return len(self.sizes)

    def __repr__(self) -> str:
        return f"Segments({len(self)} segments, {self.num_elements} elements)"

    @cached_property
    def ids(self) -> Tensor:
        """Segment of every element, int32 ``[N]``."""
        counts = self.offsets.diff()
        index = torch.arange(len(self), dtype=torch.int32, device=self.offsets.device)
        return torch.repeat_interleave(index, counts, output_size=self.num_elements)

    @cached_property
    def chunks(self) -> Tensor:
        """What the programs of a Triton kernel work on, int64 ``[C, 3]``: segment, start, stop.

        A chunk is what a tile of the buffer and a segment have in common. So each has one segment,
        and those that fill their tile are read and written with full-width aligned accesses.
        """
        offsets = self.offsets.cpu()
        tiles = torch.arange(0, self.num_elements, TILE, device="cpu")
        edges = torch.cat([offsets, tiles]).unique()
        starts, stops = edges[:-1], edges[1:]
        # Of several segments that start there, the last: the others are empty.
        owners = torch.searchsorted(offsets, starts, right=True) - 1
        return torch.stack([owners, starts, stops], 1).to(self.offsets.device)

    @cached_property
    def chunk_offsets(self) -> Tensor:
        """First chunk of each segment, and the end: int64 ``[S + 1]``."""
        owners = self.chunks[:, 0].contiguous()
        bounds = torch.arange(len(self) + 1, device=owners.device)
        return torch.searchsorted(owners, bounds)

    def expand(self, values: Tensor) -> Tensor:
        """``[..., S]`` per segment to ``[..., N]`` per element.

        One segment is left as ``[..., 1]``, which broadcasts against ``[..., N]``.
        """
        if len(self) == 1:
            return values
        return values.index_select(-1, self.ids)

    def sum(self, values: Tensor) -> Tensor:
        """``[..., N]`` per element to ``[..., S]`` per segment.

        torch sums pairwise where there is one sum to take. Many short segments are accumulated
        element by element, so in float64: a running float32 sum stops growing at some 1e7 terms.
        """
        if self._equal_size is not None:
            return values.unflatten(-1, (len(self), self._equal_size)).sum(-1)
        if worth_walking(len(self), self.num_elements):
            return torch.stack([part.sum(-1) for part in values.split(self.sizes, -1)], -1)
        wide = values.double()
        zeros = wide.new_zeros((*values.shape[:-1], len(self)))
        return zeros.index_add(-1, self.ids, wide).to(values.dtype)
