"""Independence: the frames that plates leave on each site, and the dims they occupy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastsvi.poutine.errors import EmptyPlateError, PlateError
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger, MutedMessenger
from fastsvi.poutine.runtime import STACK


class CondIndepStackFrame(NamedTuple):
    """One plate around a site. Frames are equal if all but ``full_size`` agree."""

    name: str
    dim: int | None  # negative; None for a sequential plate
    size: int  # of the subsample; -1 if unknown
    counter: int  # number of the iteration of a sequential plate
    full_size: int | None = None

    @property
    def vectorized(self) -> bool:
        return self.dim is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CondIndepStackFrame) and self[:4] == other[:4]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self[:4])

    def __str__(self) -> str:
        return self.name


def allocate_dim(name: str, dim: int | None) -> int:
    """The dim that plate ``name`` gets under the plates now on the stack.

    The stack itself says which dims are taken, so nothing can be left behind when a model raises.
    """
    taken: dict[int, str] = {}
    for frame in STACK:
        plate = frame.muted if isinstance(frame, MutedMessenger) else frame
        if isinstance(plate, IndepMessenger) and plate._vectorized and plate.dim is not None:
            taken[plate.dim] = plate.name
    if name in taken.values():
        raise PlateError(
            f"duplicate plate {name!r}: a plate of this name is already open; give the inner one "
            "another name"
        )
    if dim is None:
        dim = -1
        while dim in taken:
            dim -= 1
    elif dim >= 0:
        raise PlateError(
            f"plate {name!r}: dim counts batch dimensions from the right and must be negative, "
            f"found dim={dim}; the rightmost one is dim=-1"
        )
    elif dim in taken:
        free = dim - 1
        while free in taken:
            free -= 1
        raise PlateError(
            f"plates {name!r} and {taken[dim]!r} collide at dim={dim}; move one of them to the "
            f"left, e.g. plate({name!r}, ..., dim={free}), or leave dim out"
        )
    return dim


class IndepMessenger(Messenger):
    """Declares what is under it independent along one dimension, or over the steps of a loop.

    :class:`~fastsvi.plate` is this with subsampling and broadcasting.
    """

    def __init__(
        self, name: str, size: int, dim: int | None = None, device: Any | None = None
    ) -> None:
        super().__init__()
        if size == 0:
            raise EmptyPlateError(f"plate {name!r} has size zero; skip it if there is no data")
        self.name = name
        self.size = size
        self.dim = dim
        self.device = device
        self.counter = 0
        self._vectorized: bool | None = None if dim is None else True  # None: not used yet
        self._indices: Any = None
        self._frame: CondIndepStackFrame | None = None  # built for the first site, then reused

    def next_context(self) -> None:
        """Declare the following sites independent of the previous ones (sequential plates)."""
        self.counter += 1
        self._frame = None

    def __enter__(self) -> Any:
        if self._vectorized is not False:
            self.dim = allocate_dim(self.name, self.dim)
            self._vectorized = True
        self._frame = None
        return super().__enter__()

    def __iter__(self) -> Iterator[int]:
        if self._vectorized or self.dim is not None:
            raise PlateError(
                f"plate {self.name!r} has a dim and so is vectorized; it cannot be looped over "
                "too: make a second plate for the loop"
            )
        self._vectorized = False
        for index in self._sequence():
            self.next_context()
            with self:
                yield index

    def _sequence(self) -> Iterator[int]:
        """The indices as Python numbers. Reads them back to the host, in one go."""
        indices = self.indices
        return iter(indices.tolist() if isinstance(indices, torch.Tensor) else indices)

    def _reset(self) -> None:
        self._vectorized = None
        self.counter = 0
        self._frame = None

    @property
    def indices(self) -> Any:
        """The indices that the plate stands for, ``[size]``."""
        if self._indices is None:
            self._indices = torch.arange(self.size, device=self.device)
        return self._indices

    def _make_frame(self) -> CondIndepStackFrame:
        return CondIndepStackFrame(self.name, self.dim, self.size, self.counter)

    def _process_message(self, msg: Message) -> None:
        frame = self._frame
        if frame is None:
            frame = self._frame = self._make_frame()
        # Inner frames come first to us, so an outer plate's frame goes in front.
        msg.cond_indep_stack = (frame, *msg.cond_indep_stack)
