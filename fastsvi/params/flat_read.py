"""Constrained values of a whole buffer at once.

Elementwise constraints are one kernel call over the flat tensor, whatever the number of
parameters; the structured ones (simplex, Cholesky factors, ...) follow one by one. What remains
per parameter is the making of its view.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsvi.kernels.transforms import Kind, SegmentTable, constrain
from fastsvi.params.buffer import Buffer
from fastsvi.params.transforms import Affine, Reader, coding_of

_REAL = Affine(Kind.IDENTITY, 0.0, 1.0)


class _Read(NamedTuple):
    name: str
    row: int
    shape: torch.Size  # of the unconstrained value
    is_vector: bool  # its row has this shape already
    read: Reader | None  # what is left to do after the table


class Plan(NamedTuple):
    """How to read a buffer; good for one version of it."""

    version: int
    table: SegmentTable
    sizes: list[int]  # elements of each row, [S]
    reads: list[_Read]


def plan_of(buffer: Buffer) -> Plan:
    """Look up every constraint of the buffer once."""
    layout = buffer.layout
    bounds = layout.boundaries
    sizes = [stop - start for start, stop in pairwise(bounds)]
    rows = [_REAL] * layout.num_rows
    reads = []
    for name, segment in layout.items():
        coding = coding_of(segment.constraint, name)
        shape = segment.shape
        if coding.affine is not None:
            rows[segment.row] = coding.affine
        left = coding.read if coding.affine is None else None
        reads.append(_Read(name, segment.row, shape, len(shape) == 1, left))
    table = SegmentTable.build(
        [row.kind for row in rows],
        sizes,
        [row.shift for row in rows],
        [row.scale for row in rows],
        device=buffer.device,
        dtype=buffer.dtype,
    )
    return Plan(buffer.version, table, sizes, reads)


def constrain_flat(flat: Tensor, plan: Plan) -> dict[str, Tensor]:
    """Unconstrained ``[..., N]`` to constrained values ``[..., *shape]`` by name."""
    rows = constrain(flat, plan.table).split(plan.sizes, -1)
    batch = flat.shape[:-1]
    values = {}
    for name, row, shape, is_vector, read in plan.reads:
        value = rows[row]
        if not is_vector:
            value = value.view(batch + shape)
        values[name] = value if read is None else read(value)
    return values


def gather(buffer: Buffer, plan: Plan) -> Tensor:
    """A copy of the buffer's values, ``[N]``, whose gradient goes to the leaves.

    A copy, for a later write to a leaf would not be seen by the version count of ``flat``, and
    backward would silently use the new value.
    """
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in buffer.leaves):
        result: Tensor = _Gather.apply(buffer.flat, plan.sizes, plan.reads, *buffer.leaves)
        return result
    return buffer.flat.clone()


class _Gather(torch.autograd.Function):
    """``flat`` as a function of the leaves: one node, whose backward cuts one flat gradient up.

    Slicing a flat leaf instead would make a gradient of full size for every slice.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(flat: Tensor, sizes: list[int], reads: Sequence[_Read], *leaves: Tensor) -> Tensor:
        return flat.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.sizes, ctx.reads, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = grads[0].split(ctx.sizes)
        return (None, None, None, *(rows[read.row].view(read.shape) for read in ctx.reads))
