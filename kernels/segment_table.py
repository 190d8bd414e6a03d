"""Which constraint each segment of a flat buffer has.

Every elementwise constraint is ``y = shift + scale * f(x)`` with one of four functions ``f``:

=============  ==================  ========================================  ==================
kind           f(x)                constraints (``shift``, ``scale``)        log\\|f'(x)\\|
=============  ==================  ========================================  ==================
``IDENTITY``   x                   real (0, 1)                               0
``EXP``        exp(x)              positive (0, 1), greater_than(a) (a, 1),  x
                                   less_than(b) (b, -1)
``SOFTPLUS``   log(1 + exp(x))     softplus_positive (0, 1)                  -softplus(-x)
``SIGMOID``    1 / (1 + exp(-x))   unit_interval (0, 1),                     -softplus(x)
                                   interval(a, b) (a, b - a)                 - softplus(-x)
=============  ==================  ========================================  ==================
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from fastsvi.kernels import dispatch
from fastsvi.kernels.segments import Segments, worth_walking

# ---------------------------------------------------------------------------------------- constants


class Kind(IntEnum):
    """The functions ``f`` of ``y = shift + scale * f(x)``; the table above says which is whose."""

    IDENTITY = 0
    EXP = 1
    SOFTPLUS = 2
    SIGMOID = 3


IDENTITY, EXP, SOFTPLUS, SIGMOID = Kind

# A buffer with more runs of like kind than this, unless they are long, is sorted by kind first (two
# gathers), so that the number of dispatches does not grow with the number of segments.
_MAX_RUNS = 8


# ---------------------------------------------------------------------------------------- the table


class Run(NamedTuple):
    """Adjacent elements of one kind; ``affine`` is (shift, scale), each ``[1]`` or ``[size]``."""

    kind: Kind
    size: int
    affine: tuple[Tensor, Tensor] | None


class Plan(NamedTuple):
    """How the torch reference walks over the elements: ``x[order]`` is cut into ``runs``."""

    runs: tuple[Run, ...]
    sizes: list[int]
    order: Tensor | None  # int64 [N], or None where the buffer's own order will do
    inverse: Tensor | None  # int64 [N]


class SegmentTable:
    """The constraint of every segment of a flat buffer, as tensors on its device.

    Make one with :meth:`build`; it is immutable.

    Attributes:
        kinds: int32 ``[S]``, values of :class:`Kind`.
        offsets: int64 ``[S + 1]``, first element of each segment.
        shift, scale: ``[S]``, in the buffer's dtype.
        segments: the same cut as :class:`~fastsvi.kernels.segments.Segments`.
        kinds_in_use: bit ``k`` is set if a segment has kind ``k``.
    """

    def __init__(
        self,
        kinds: Tensor,
        shift: Tensor,
        scale: Tensor,
        segments: Segments,
        host: Sequence[tuple[Kind, float, float]],
    ) -> None:
        self.kinds = kinds
        self.shift = shift
        self.scale = scale
        self.segments = segments
        self.offsets = segments.offsets
        self._host = tuple(host)
        self.kinds_in_use = sum(1 << kind for kind in {spec[0] for spec in self._host})
        self.is_identity = all(spec == (IDENTITY, 0.0, 1.0) for spec in self._host)
        if kinds.device.type == "cpu":
            # Not on first use, for the reason given in Segments.
            _ = self.plan, self.log_scale

    @classmethod
    def build(
        cls,
        kinds: Sequence[int],
        sizes: Sequence[int],
        shifts: Sequence[float] | None = None,
        scales: Sequence[float] | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> SegmentTable:
        """Table of ``S`` segments from host values; the only place that loops over segments.

        Args:
            kinds: :class:`Kind` of each segment.
            sizes: elements in each segment, in buffer order.
            shifts, scales: of each segment; 0 and 1 when not given.
            device, dtype: of the buffer; torch's defaults when not given.

        Raises:
            KernelError: lengths differ, a kind is unknown, a size is negative, or a shift or scale
                is not finite or a scale is 0.

        >>> from fastsvi.kernels.transforms import constrain
        >>> table = SegmentTable.build([IDENTITY, EXP], [2, 1])
        >>> constrain(torch.tensor([1.0, -1.0, 0.0]), table)
        tensor([ 1., -1.,  1.])
        """
        num = len(kinds)
        shifts = [0.0] * num if shifts is None else [float(shift) for shift in shifts]
        scales = [1.0] * num if scales is None else [float(scale) for scale in scales]
        lengths = (num, len(sizes), len(shifts), len(scales))
        if len(set(lengths)) > 1:
            raise dispatch.error(
                "SegmentTable.build",
                "kinds, sizes, shifts and scales must have one entry per segment",
                lengths=lengths,
            )
        for index, kind in enumerate(kinds):
            if kind not in tuple(Kind):
                known = ", ".join(f"{k.name} = {int(k)}" for k in Kind)
                raise dispatch.error(
                    "SegmentTable.build", f"unknown kind; use {known}", segment=index, kind=kind
                )
        for index, (shift, scale) in enumerate(zip(shifts, scales, strict=True)):
            if not (abs(shift) < float("inf") and 0.0 < abs(scale) < float("inf")):
                raise dispatch.error(
                    "SegmentTable.build",
                    "y = shift + scale * f(x) needs a finite shift, and a finite scale other than "
                    "0; check the bounds of the constraint",
                    segment=index,
                    shift=shift,
                    scale=scale,
                )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        host = [(Kind(k), a, b) for k, a, b in zip(kinds, shifts, scales, strict=True)]
        return cls(
            torch.tensor([int(kind) for kind in kinds], dtype=torch.int32, device=device),
            torch.tensor(shifts, dtype=dtype, device=device),
            torch.tensor(scales, dtype=dtype, device=device),
            Segments(sizes, device),
            host,
        )

    def __len__(self) -> int:
        return len(self._host)

    def __repr__(self) -> str:
        names = ", ".join(f"{kind.name} x{size}" for kind, size, _ in self.plan.runs)
        return f"SegmentTable({len(self)} segments, {self.num_elements} elements: {names})"

    @property
    def num_elements(self) -> int:
        """Elements of the buffer, ``N``."""
        return self.segments.num_elements

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Kinds, shift, scale and chunks: what the Triton kernels read."""
        return self.kinds, self.shift, self.scale, self.segments.chunks

    @cached_property
    def plan(self) -> Plan:
        """Runs of like kind, in buffer order or, where there are too many, sorted by kind."""
        filled = [s for s, size in enumerate(self.segments.sizes) if size]
        runs = _runs_of_like_kind(filled, self._host)
        order = inverse = None
        if len(runs) > _MAX_RUNS and not worth_walking(len(runs), self.num_elements):
            filled.sort(key=lambda s: self._host[s][0])
            runs = _runs_of_like_kind(filled, self._host)
            kind_of_element = self.kinds.index_select(0, self.segments.ids)
            order = torch.sort(kind_of_element, stable=True).indices
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(order.numel(), device=order.device)
        plan = [self._run(members) for members in runs]
        return Plan(tuple(plan), [run.size for run in plan], order, inverse)

    def _run(self, members: list[int]) -> Run:
        kind = self._host[members[0]][0]
        sizes = [self.segments.sizes[s] for s in members]
        specs = {self._host[s][1:] for s in members}
        if specs == {(0.0, 1.0)}:
            return Run(kind, sum(sizes), None)
        if len(specs) == 1:
            first = members[0]
            affine = (self.shift[first : first + 1], self.scale[first : first + 1])
            return Run(kind, sum(sizes), affine)
        device = self.shift.device
        index = torch.tensor(members, device=device).repeat_interleave(
            torch.tensor(sizes, device=device)
        )
        return Run(kind, sum(sizes), (self.shift[index], self.scale[index]))

    @cached_property
    def log_scale(self) -> Tensor | None:
        """What the scales alone add to each segment's log-determinant, ``[S]``; None if nothing."""
        if all(abs(scale) == 1.0 for _, _, scale in self._host):
            return None
        sizes = torch.tensor(self.segments.sizes, dtype=torch.float64, device=self.scale.device)
        return (self.scale.double().abs().log() * sizes).to(self.scale.dtype)


def _runs_of_like_kind(
    members: list[int], host: Sequence[tuple[Kind, float, float]]
) -> list[list[int]]:
    return [list(run) for _, run in groupby(members, key=lambda s: host[s][0])]
