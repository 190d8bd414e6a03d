"""The noise of a fit: standard normals as a function of seed, stream and step.

A fit keeps a seed and a step count, and nothing else: which numbers a step sees does not depend
on what was drawn before, by whom, or on which device, so a fit can be resumed exactly. Streams keep
purposes apart: evaluating a loss leaves the training as it would have been.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsvi.kernels import philox

TRAINING, EVALUATION = 0, 1


class Seed:
    """The seed of a fit, 64 bits; if not given, drawn from torch's generator when first needed.

    So ``set_rng_seed`` before a fit makes it repeatable. It may also be called during one:
    :func:`forget_seeds` then has every seed that was drawn drawn again.

    >>> Seed(7).value
    7
    """

    _forgotten = 0

    def __init__(self, value: int | None = None) -> None:
        self._given = value
        self._drawn: int | None = None
        self._drawn_at = -1

    @property
    def value(self) -> int:
        if self._given is not None:
            return self._given
        if self._drawn is None or self._drawn_at != Seed._forgotten:
            self._drawn = int(torch.randint(2**63 - 1, ()))
            self._drawn_at = Seed._forgotten
        return self._drawn

    @property
    def generation(self) -> int:
        """Changes when a seed that was drawn is forgotten."""
        return 0 if self._given is not None else Seed._forgotten

    @property
    def is_current(self) -> bool:
        """Whether :attr:`value` has been drawn and still stands."""
        return self._given is not None or self._drawn_at == Seed._forgotten


def forget_seeds() -> None:
    """Have all fits draw new seeds: torch's generator was seeded."""
    Seed._forgotten += 1


class Draw(NamedTuple):
    """What :func:`fastsvi.kernels.normal.sample` needs to know of the noise of one step."""

    key: Tensor  # int64 [2]
    origin: Tensor  # int64 [4]
    noise: Tensor | None  # [1, P, D]; None where the kernel draws it


class NoiseStream:
    """The noise of one stream, step after step.

    On the CPU the noise of many steps is drawn at once, because eager Philox costs some 160 small
    operations per call, whatever the size; on a GPU the sampling kernel draws it from key and
    origin. The numbers are the same.

    Args:
        seed: of the fit.
        stream: number of the stream.
        step: the step that :meth:`next` returns first.

    >>> first = NoiseStream(Seed(0)).next(1, 3, torch.float32, torch.device("cpu"))
    >>> again = NoiseStream(Seed(0)).next(1, 3, torch.float32, torch.device("cpu"))
    >>> torch.equal(first.noise, again.noise)
    True
    """

    def __init__(self, seed: Seed, stream: int = TRAINING, step: int = 0) -> None:
        self.seed = seed
        self.stream = stream
        self.step = step
        self._shape: tuple[int, int, torch.dtype, torch.device] | None = None
        self._generation: int | None = None  # of the seed, when it was last used
        self._key: Tensor
        self._origin: Tensor
        self._one_step: Tensor  # on a GPU
        self._block: philox.NoiseBlock  # on the CPU

    def next(
        self, num_particles: int, num_elements: int, dtype: torch.dtype, device: torch.device
    ) -> Draw:
        """The noise of this step, ``[1, P, D]``; the stream then stands at the next step."""
        shape = (num_particles, num_elements, dtype, device)
        if self._generation != self.seed.generation:
            if self._generation is not None:
                self.step = 0  # another seed: from its beginning
            self._generation = self.seed.generation
            self._prepare(*shape)
        elif shape != self._shape:
            self._prepare(*shape)
        step = self.step
        self.step = step + 1
        if device.type == "cpu":
            return Draw(self._key, self._origin, self._block.at(step))
        # A fresh tensor: the backward pass of an earlier step may still read the old one.
        origin = self._origin
        self._origin = origin + self._one_step
        return Draw(self._key, origin, None)

    def _prepare(
        self, num_particles: int, num_elements: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._key = philox.derive_key(self.seed.value, self.stream, device)
        if device.type == "cpu":
            self._origin = philox.make_origin(device=device)
            self._block = philox.NoiseBlock(
                self._key, self._origin, 1, num_particles, num_elements, dtype
            )
        else:
            self._origin = philox.make_origin(step=self.step, device=device)
            self._one_step = philox.make_origin(step=1, device=device)
        self._shape = (num_particles, num_elements, dtype, device)
