"""The noise of a fit: random numbers as a function of seed, stream and step.

A fit keeps a seed and a step count, and nothing else: which numbers a step sees does not depend
on what was drawn before, by whom, or on which device, so a fit can be resumed exactly. Streams keep
purposes apart: evaluating a loss leaves the training as it would have been.

:class:`NoiseStream` counts the steps, and gives a guide that draws all its sites at once their
noise. :class:`StepNoise` gives a program what it draws statement by statement, and
:class:`RecordedNoise` both, as operations of a graph.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsvi.engine.noise_blocks import Blocks, Place, in_pieces
from fastsvi.engine.noise_op import normal_noise, random_subset, uniform_noise
from fastsvi.errors import CaptureError
from fastsvi.kernels import philox, subsample
from fastsvi.torch_private import mapped_rows

# Numbers of the streams: a guide's sites, in steps and in evaluations of the loss; what a program
# draws by its statements; the random subsets of plates.
TRAINING, EVALUATION, PROGRAM, SUBSETS = 0, 1, 2, 3


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

    @classmethod
    def as_drawn(cls, value: int) -> Seed:
        """A seed that counts as drawn just now: it is forgotten like the others."""
        seed = cls()
        seed._drawn, seed._drawn_at = value, Seed._forgotten
        return seed

    @property
    def is_given(self) -> bool:
        """Whether the seed was given, so that it is never drawn anew."""
        return self._given is not None

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
    origin: Tensor  # int64 [4]; any where there is noise
    noise: Tensor | None  # [1, P, D]; None where the kernel draws it


# ------------------------------------------------------------------------- guides, all at once


class NoiseStream:
    """The steps of a fit, and the normal noise of one stream at each.

    On the CPU the noise of many steps is drawn at once; on a GPU the sampling kernel draws it from
    key and origin. The numbers are the same.

    Args:
        seed: of the fit.
        stream: number of the stream.
        step: the step to begin with.

    Attributes:
        step: the current step. :meth:`advance` goes on to the next one; whoever takes steps by
            other means than :class:`~fastsvi.infer.ELBO` adds their number here.

    >>> first = NoiseStream(Seed(0)).draw(1, 3, torch.float32, torch.device("cpu"))
    >>> again = NoiseStream(Seed(0)).draw(1, 3, torch.float32, torch.device("cpu"))
    >>> torch.equal(first.noise, again.noise)
    True
    """

    def __init__(self, seed: Seed, stream: int = TRAINING, step: int = 0) -> None:
        self.seed = seed
        self.stream = stream
        self.step = step
        self._generation: int | None = None  # of the seed, when it was last used
        self._places: dict[torch.device, Place] = {}
        self._blocks = Blocks(1 << 20)

    def draw(
        self,
        num_particles: int,
        num_elements: int,
        dtype: torch.dtype,
        device: torch.device,
        first: int = 0,
    ) -> Draw:
        """The noise ``[1, P, D]`` of this step, for the particles from ``first`` on."""
        self.follow_seed()
        place = self._places.get(device)
        if place is None:
            place = self._places[device] = Place(self.seed.value, self.stream, device)
        if device.type != "cpu":
            return Draw(place.key, place.origin(self.step, first), None)

        def several(step: int, count: int) -> Tensor:
            origin = torch.tensor([0, step, first, 0])

            def part(origin: Tensor, particles: int, elements: int) -> Tensor:
                return philox.normal_block(place.key, origin, count, 1, particles, elements, dtype)

            return in_pieces(part, origin, (count, 1, num_particles, num_elements), dtype)

        what = (first, num_particles, num_elements, dtype)
        size = num_particles * num_elements * dtype.itemsize
        return Draw(place.key, place.start, self._blocks.at(what, self.step, size, several))

    def advance(self) -> None:
        """Go on to the next step."""
        self.follow_seed()
        self.step += 1

    def follow_seed(self) -> None:
        """Begin anew if the seed has been forgotten: another one makes another fit."""
        if self._generation == self.seed.generation:
            return
        if self._generation is not None:
            self.step = 0
            self._places.clear()
            self._blocks = Blocks(1 << 20)
        self._generation = self.seed.generation


# -------------------------------------------------------------------- programs, draw after draw


class ProgramNoise(ABC):
    """What a program draws in one step: a :class:`fastsvi.distributions.noise.Source`.

    A draw is known by its place in the order of the program's draws and by its particle. Its
    elements take the next free groups of counters, so a program that draws the same shapes in the
    same order gets the same numbers, however its particles are run. A plate's subset is known by
    the plate's name; all particles share it.

    Before each run of the program :meth:`of_particle` or :meth:`of_particles` rewinds.
    """

    def __init__(self) -> None:
        self._group = 0
        self._first, self._count = 0, 1
        self._index: Tensor | None = None
        self._subsets: dict[Hashable, Tensor] = {}  # of this step

    def of_particle(self, particle: int) -> ProgramNoise:
        """Stand at the first draw of one particle."""
        self._group, self._first, self._count, self._index = 0, particle, 1, None
        return self

    def of_particles(self, index: Tensor, count: int, first: int = 0) -> ProgramNoise:
        """Stand at the first draw of ``count`` particles from ``first`` on, which vmap maps.

        Args:
            index: the particle's number among them, which vmap maps: 0 to ``count - 1``.
        """
        self._group, self._first, self._count, self._index = 0, first, count, index
        return self

    def normal(
        self, shape: Any, dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:  # [*shape]
        """Standard normals."""
        return self._draw(philox.NORMAL, tuple(shape), dtype, device)

    def uniform(
        self, shape: Any, dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:  # [*shape]
        """Numbers strictly between 0 and 1."""
        u = self._draw(philox.UNIFORM, tuple(shape), dtype, device)
        if dtype not in _REAL:  # a number close to 0 or 1 may have been rounded to it
            limits = torch.finfo(dtype)
            u = u.clamp(limits.tiny, 1 - limits.eps / 2)
        return u

    def subset(
        self, name: str, size: int, subsample_size: int, device: Any = None
    ) -> Tensor:  # int64 [subsample_size]
        """The random subset of ``range(size)`` that the plate of this name shows in this step."""
        device = _device(device)
        what = (name, size, subsample_size, device)
        indices = self._subsets.get(what)
        if indices is None:
            # By name, so that it does not matter which plates come first, or in which program.
            number = zlib.crc32(name.encode())
            indices = self._subset(number, size, subsample_size, device)
            self._subsets[what] = indices
        return indices

    def _draw(
        self, kind: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None
    ) -> Tensor:
        elements, group, first, count = math.prod(shape), self._group, self._first, self._count
        self._group += philox.TILE_GROUPS * -(-elements // philox.TILE)
        real = dtype if dtype in _REAL else torch.float32
        noise = self._noise(kind, group, first, count, elements, real, _device(device))
        if self._index is None:
            noise = noise.view(shape)
        else:
            noise = mapped_rows(noise.view(count, *shape), self._index)
        return noise if real is dtype else noise.to(dtype)

    @abstractmethod
    def _noise(
        self,
        kind: int,
        group: int,
        first: int,
        particles: int,
        elements: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:  # [1, P, D]
        pass

    @abstractmethod
    def _subset(self, number: int, size: int, subsample_size: int, device: torch.device) -> Tensor:
        pass


class StepNoise(ProgramNoise):
    """The draws of a program that is run eagerly.

    Args:
        clock: counts the steps, and knows the seed.

    >>> noise = StepNoise(NoiseStream(Seed(0)))
    >>> noise.begin()
    >>> one = [noise.of_particle(p).normal((3,), torch.float32) for p in (0, 1, 0)]
    >>> torch.equal(one[0], one[2]), torch.equal(one[0], one[1])
    (True, False)
    """

    def __init__(self, clock: NoiseStream) -> None:
        super().__init__()
        self._clock = clock
        self._generation: int | None = None
        self._step = 0
        self._places: dict[tuple[int, torch.device], Place] = {}
        self._blocks = Blocks(1 << 16)

    def begin(self) -> None:
        """Go to the clock's step."""
        clock = self._clock
        clock.follow_seed()
        if self._generation != clock.seed.generation:
            self._generation = clock.seed.generation
            self._places.clear()
            self._blocks = Blocks(1 << 16)
        clock.seed.value  # noqa: B018  drawn here, if it must be: under vmap it could not be read
        self._step = clock.step
        self._subsets.clear()

    def _place(self, stream: int, device: torch.device) -> Place:
        place = self._places.get((stream, device))
        if place is None:
            place = Place(self._clock.seed.value, stream, device)
            self._places[stream, device] = place
        return place

    def _noise(
        self,
        kind: int,
        group: int,
        first: int,
        particles: int,
        elements: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        place = self._place(PROGRAM, device)
        shape = (1, particles, elements)
        if device.type != "cpu":
            op = normal_noise if kind == philox.NORMAL else uniform_noise
            return op(place.key, place.origin(self._step, first), group, *shape, dtype)

        def several(step: int, count: int) -> Tensor:
            origin = torch.tensor([group, step, first, 0])

            def part(origin: Tensor, particles: int, elements: int) -> Tensor:
                sizes = (count, 1, particles, elements)
                return philox.draw_reference(place.key, origin, *sizes, kind, dtype)

            return in_pieces(part, origin, (count, *shape), dtype)

        what = (kind, group, first, particles, elements, dtype)
        size = particles * elements * dtype.itemsize
        return self._blocks.at(what, self._step, size, several, copy=True)

    def _subset(self, number: int, size: int, subsample_size: int, device: torch.device) -> Tensor:
        place = self._place(SUBSETS, device)
        if device.type != "cpu":
            origin = place.origin(self._step)
            return random_subset(place.key, origin, number, size, subsample_size)

        def several(step: int, count: int) -> Tensor:
            origin = torch.tensor([0, step, number, 0])
            sizes = (1, 1, size, subsample_size)
            return subsample.indices_block(place.key, origin, count, *sizes)[:, 0, 0]

        # The work is that of the words drawn: all of a small whole's.
        words = size if size <= subsample.SORTED_SIZE else subsample_size
        what = (number, size, subsample_size)
        return self._blocks.at(what, self._step, 8 * words, several, copy=True)


class RecordedNoise(ProgramNoise):
    """All noise of a step as operations on given keys and a given origin, to be recorded.

    Draws what :class:`NoiseStream` and :class:`StepNoise` do for the same seed and step.

    Args:
        keys: by stream, those of ``TRAINING``, ``PROGRAM`` and ``SUBSETS``, int64 ``[2]`` each.
        origin: of the step, int64 ``[4]``. Under a vmap over fits, those of consecutive ones.
        by_kernel: leave what a guide draws all at once to the sampling kernel.
        start: where the particles are counted from, by default ``origin``.

    >>> keys = {stream: philox.derive_key(0, stream) for stream in (TRAINING, PROGRAM, SUBSETS)}
    >>> recorded = RecordedNoise(keys, philox.make_origin(step=5))
    >>> eager = StepNoise(NoiseStream(Seed(0), step=5))
    >>> eager.begin()
    >>> shape = (3,), torch.float32
    >>> torch.equal(recorded.of_particle(7).normal(*shape), eager.of_particle(7).normal(*shape))
    True
    """

    def __init__(
        self,
        keys: Mapping[int, Tensor],
        origin: Tensor,
        *,
        by_kernel: bool = False,
        start: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._keys = keys
        self._origin = origin  # that of subsets, which all particles share
        self._start = origin if start is None else start
        self._by_kernel = by_kernel

    def draw(
        self,
        num_particles: int,
        num_elements: int,
        dtype: torch.dtype,
        device: torch.device,
        first: int = 0,
    ) -> Draw:
        """As :meth:`NoiseStream.draw`."""
        key, origin = self._keys[TRAINING], self._at(first)
        if self._by_kernel:
            return Draw(key, origin, None)
        noise = normal_noise(key, origin, 0, 1, num_particles, num_elements, dtype)
        return Draw(key, origin, noise)

    def _at(self, particle: int) -> Tensor:
        if not particle:
            return self._start
        return self._start + philox.make_origin(particle=particle, device=self._origin.device)

    def _noise(
        self,
        kind: int,
        group: int,
        first: int,
        particles: int,
        elements: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        self._require(device)
        op = normal_noise if kind == philox.NORMAL else uniform_noise
        return op(self._keys[PROGRAM], self._at(first), group, 1, particles, elements, dtype)

    def _subset(self, number: int, size: int, subsample_size: int, device: torch.device) -> Tensor:
        self._require(device)
        return random_subset(self._keys[SUBSETS], self._origin, number, size, subsample_size)

    def _require(self, device: torch.device) -> None:
        own = self._origin.device
        if device != own:
            raise CaptureError(
                f"something is drawn on {device}, while the parameters are on {own}; make the "
                f"arguments of its distribution on {own}, and give plates device={str(own)!r}"
            )


_REAL = (torch.float32, torch.float64)


def _device(device: Any) -> torch.device:
    """The device that torch takes this for, with its number."""
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
