"""What is kept from step to step so that eager steps get their noise cheaply."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from fastsvi.engine.pages import trim_heap
from fastsvi.kernels import philox


class Place:
    """The key of a stream and the origins of its steps, on one device."""

    def __init__(self, seed: int, stream: int, device: torch.device) -> None:
        self.key = philox.derive_key(seed, stream, device)
        self.start = philox.make_origin(device=device)
        self._step, self._origin = 0, self.start
        self._one_step = philox.make_origin(step=1, device=device)
        self._particles: dict[int, Tensor] = {}

    def origin(self, step: int, particle: int = 0) -> Tensor:
        """Fresh for each step: the backward pass of an earlier one may still read the old."""
        if step == self._step + 1:  # no copy from the host, which would wait for the device
            self._origin = self._origin + self._one_step
        elif step != self._step:
            self._origin = philox.make_origin(step=step, device=self._origin.device)
        self._step = step
        if not particle:
            return self._origin
        if particle not in self._particles:
            offset = philox.make_origin(particle=particle, device=self._origin.device)
            self._particles[particle] = offset
        return self._origin + self._particles[particle]


# Elements that are drawn at once: their words, and what is made of them, stay in the cache.
_PIECE = 64 * philox.TILE


def in_pieces(
    draw: Callable[[Tensor, int, int], Tensor],
    origin: Tensor,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> Tensor:
    """``draw(origin, particles, elements)`` on the CPU, of shape ``[K, F, particles, elements]``.

    Many elements are drawn particle by particle and piece by piece, into the one result: Philox
    takes some twenty times the memory of the numbers that it gives. They are the same numbers.
    """
    *_, particles, elements = shape
    if elements <= _PIECE:
        return draw(origin, particles, elements)
    result = torch.empty(shape, dtype=dtype)
    for particle in range(particles):
        for first in range(0, elements, _PIECE):
            there = origin + philox.make_origin(element=first, particle=particle)
            size = min(_PIECE, elements - first)
            result[:, :, particle, first : first + size] = draw(there, 1, size)[:, :, 0]
    trim_heap()  # the pieces have left gaps, too small for what a wide step makes of the noise
    return result


class Blocks:
    """Noise of many steps on the CPU, drawn at once.

    Eager Philox costs some 160 small operations a call, whatever the size, so steps share them.

    Args:
        limit: bytes that may be kept for one draw of a step.
    """

    _MOST_STEPS = 256
    _BUDGET = 1 << 24  # bytes, over all draws of a step

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: dict[Hashable, tuple[int, int, tuple[Tensor, ...]]] = {}
        self._used: set[Hashable] = set()
        self._step = -1
        self._bytes = 0

    def at(
        self,
        what: Hashable,
        step: int,
        size: int,
        draw: Callable[[int, int], Tensor],
        *,
        copy: bool = False,
    ) -> Tensor:
        """``draw(step, 1)[0]``, where ``draw(step, K)`` draws ``size`` bytes for each of K steps.

        Who may change it in place must ask for a ``copy``.
        """
        if step != self._step:
            self._forget_unused()
            self._step = step
        self._used.add(what)
        count = max(1, min(self._MOST_STEPS, self._limit // max(1, size)))
        first = step - step % count
        kept = self._kept.get(what)
        if kept is None or kept[0] != first:
            if count == 1 or (kept is None and self._bytes + count * size > self._BUDGET):
                return draw(step, 1)[0]
            self._bytes += 0 if kept is not None else count * size
            kept = self._kept[what] = first, count * size, draw(first, count).unbind()
        part = kept[2][step - first]
        return part.clone() if copy else part

    def _forget_unused(self) -> None:
        """A program that draws otherwise from now on must not use up the budget twice."""
        for what in self._kept.keys() - self._used:
            self._bytes -= self._kept.pop(what)[1]
        self._used.clear()
