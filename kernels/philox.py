"""Philox-4x32-10: random numbers as a function of (seed, stream, fit, step, particle, element).

Nothing is drawn from a state that advances: a key and four counters give four 32-bit words, and
the counters are the coordinates of the number that is wanted. So a number does not depend on the
device, on how fits, particles or elements were split over calls, or on what was drawn before, and
a backward pass can draw the same noise again instead of storing it.

- *key*: int64 tensor of two 32-bit words, from :func:`derive_key`.
- *counter*: ``(group, step, particle, fit)``, 32 bits each.
- *origin*: int64 tensor ``(group, step, particle, fit)``, the counter of the first number of a
  call, from :func:`make_origin`. It is device data, so a captured graph can advance it.

Element ``e`` lies in tile ``e // 1024``. With ``r = e % 1024`` it is word (lane) ``r // 256`` of
group ``256 * (e // 1024) + r % 256``. A GPU thread that owns four neighbouring groups thus writes
four runs of four neighbours, one 128-bit store each, and a call with few elements touches few
counters.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsvi.kernels import dispatch

# Multipliers and key increments of Philox-4x32.
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

# One group is one counter, four words; one tile is 256 groups.
LANES = 4
TILE_GROUPS = 256
TILE = LANES * TILE_GROUPS

# What a draw makes of its words.
WORDS, UNIFORM, NORMAL = 0, 1, 2

_WORD = 0xFFFFFFFF
_KEY_DOMAIN = 0x66737669  # "fsvi": keeps derived keys apart from every counter of a draw
_BLOCK_BYTES = 1 << 20


# ------------------------------------------------------------------------------- keys and origins


def derive_key(seed: int, stream: int, device: torch.device | str | None = None) -> Tensor:
    """Key of one stream of random numbers: int64 tensor ``[2]`` of 32-bit words.

    Streams of one seed are independent of each other, and so are the streams of two seeds.

    >>> derive_key(0, 1).shape
    torch.Size([2])
    """
    counter = (stream & _WORD, (stream >> 32) & _WORD, _KEY_DOMAIN, 0)
    words = _rounds(counter, _schedule(seed & _WORD, (seed >> 32) & _WORD))
    return torch.tensor(words[:2], dtype=torch.int64, device=device)


def make_origin(
    element: int = 0,
    step: int = 0,
    particle: int = 0,
    fit: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Origin of a call: int64 tensor ``[4]``, the counters (group, step, particle, fit).

    Args:
        element: index of the call's first element, a multiple of 1024 (a whole tile) below 2^34.

    Raises:
        KernelError: a coordinate is out of range, or ``element`` is not a multiple of 1024.

    >>> make_origin(element=2048, step=7)
    tensor([512,   7,   0,   0])
    """
    if element % TILE or not 0 <= element < LANES << 32:
        raise dispatch.error(
            "philox.make_origin",
            f"element must be a multiple of {TILE} below 2^34, so that tiles are never split",
            element=element,
        )
    for name, value in (("step", step), ("particle", particle), ("fit", fit)):
        if not 0 <= value <= _WORD:
            raise dispatch.error("philox.make_origin", f"{name} must fit 32 bits", **{name: value})
    return torch.tensor([element // LANES, step, particle, fit], device=device)


# -------------------------------------------------------------------------------- torch reference


def _schedule(key_0: Any, key_1: Any) -> list[tuple[Any, Any]]:
    """Keys of the ten rounds."""
    return [
        ((key_0 + r * WEYL_0) & _WORD, (key_1 + r * WEYL_1) & _WORD) if r else (key_0, key_1)
        for r in range(ROUNDS)
    ]


def _multiply(word: Any, multiplier: int) -> tuple[Any, Any]:
    """High and low 32 bits of the 64-bit product of two words.

    The product does not fit a signed 64-bit integer, whose overflow is undefined in the C++ that
    Inductor writes. Both multipliers exceed 2^31, so ``multiplier - 2^32`` is a small negative
    number with the same low word, and the high word lacks just ``word``: every step below is exact.
    """
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & _WORD


def _rounds(counter: tuple[Any, Any, Any, Any], keys: list[tuple[Any, Any]]) -> tuple[Any, ...]:
    """The four words of a counter; works on int64 tensors, which broadcast, and on Python ints."""
    c0, c1, c2, c3 = counter
    for k0, k1 in keys:
        high_0, low_0 = _multiply(c0, MULTIPLIER_0)
        high_1, low_1 = _multiply(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
    return c0, c1, c2, c3


def _key_schedule(key: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys of the ten rounds from a key tensor [2], in a handful of operations on its device."""
    key_0, key_1 = key.unbind()
    rounds = torch.arange(ROUNDS, device=key.device)
    keys_0 = ((key_0 + rounds * WEYL_0) & _WORD).unbind()
    keys_1 = ((key_1 + rounds * WEYL_1) & _WORD).unbind()
    return list(zip(keys_0, keys_1, strict=True))


def _axis(start: Tensor, length: int, trailing: int) -> Tensor:
    """Counters start, start + 1, ..., shaped to lie ``trailing`` axes before the last."""
    counters = (start + torch.arange(length, device=start.device)) & _WORD
    return counters.reshape(length, *(1,) * trailing)


def _grid(num_elements: int) -> tuple[int, ...]:
    """Shape of the counters to draw: those of whole tiles, or a few of the first lane alone."""
    if num_elements <= TILE_GROUPS:
        return (num_elements,)
    return -(-num_elements // TILE), TILE_GROUPS


def counter_words(
    key: Tensor,
    origin: Tensor,
    steps: int | None,
    fits: int,
    particles: int,
    grid: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """Four words per counter, each int64 [(K,) F, P, *grid]; the axis K is there if steps is."""
    group, step, particle, fit = origin.unbind()
    depth = len(grid)
    counter = (
        _axis(group, math.prod(grid), 0).reshape(grid),
        step if steps is None else _axis(step, steps, depth + 2),
        _axis(particle, particles, depth),
        _axis(fit, fits, depth + 1),
    )
    return _rounds(counter, _key_schedule(key))


def _arrange(lanes: tuple[Tensor, ...], num_elements: int) -> Tensor:
    """Lanes [..., D] or [..., T, 256] of all counters to elements [..., D].

    The rest of the last tile is drawn and cut off: as a view it costs nothing, while putting tiles
    and rest together would keep Inductor from fusing the draw with what uses it.
    """
    if num_elements <= TILE_GROUPS:
        return lanes[0]
    return torch.stack(lanes, dim=-2).flatten(-3)[..., :num_elements]


def _unit(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Words to the open unit interval: (word + 1/2) 2^-32."""
    unit = words.to(dtype) * 2.0**-32 + 2.0**-33
    # In float32 the largest 192 words would round to 1.
    return unit.clamp(max=1 - 2.0**-24) if dtype == torch.float32 else unit


def _box_muller(
    word_r: Tensor, word_a: Tensor, dtype: torch.dtype, sine: bool
) -> tuple[Tensor, ...]:
    """Two independent normals, or the first alone, from two words: radius and angle."""
    # In float64 for both. Of float32, words near 2^32 would all be 1 and their radius 0, and a turn
    # would be cut into 2^24 parts: an error of 4e-7, whatever is left of the cosine.
    radius = (_unit(word_r, torch.float64).log() * -2.0).to(dtype).sqrt()
    angle = word_a.to(torch.float64) * (2.0 * math.pi * 2.0**-32)
    cosine = radius * angle.cos().to(dtype)
    return (cosine, radius * angle.sin().to(dtype)) if sine else (cosine,)


def draw_reference(
    key: Tensor,
    origin: Tensor,
    steps: int | None,
    fits: int,
    particles: int,
    elements: int,
    kind: int,
    dtype: torch.dtype,
) -> Tensor:
    words = counter_words(key, origin, steps, fits, particles, _grid(elements))
    if kind == WORDS:
        return _arrange(words, elements)
    if kind == UNIFORM:
        return _unit(_arrange(words, elements), dtype)
    lanes = _box_muller(words[0], words[1], dtype, sine=elements > TILE_GROUPS)
    if elements > 2 * TILE_GROUPS:
        lanes += _box_muller(words[2], words[3], dtype, sine=True)
    return _arrange(lanes, elements)


# ----------------------------------------------------------------------------------- registration
#
# The Triton form as an operation of torch. It takes a batch axis B, which only vmap uses.


@torch.library.custom_op("fastsvi::philox_draw", mutates_args=())
def _draw_op(
    key: Tensor,  # int64 [B or 1, 2]
    origin: Tensor,  # int64 [B or 1, 4]
    num_steps: int,
    num_fits: int,
    num_particles: int,
    num_elements: int,
    kind: int,
    dtype: torch.dtype,
) -> Tensor:
    counts = (num_steps, num_fits, num_particles, num_elements)
    batches = max(key.shape[0], origin.shape[0])
    if dispatch.runs_triton(key.device):
        from fastsvi.kernels.triton import philox as kernels

        return kernels.draw(key, origin, (batches, *counts), kind, dtype)
    pairs = zip(key.expand(batches, 2), origin.expand(batches, 4), strict=True)
    return torch.stack([draw_reference(k, o, *counts, kind, dtype) for k, o in pairs])


@_draw_op.register_fake
def _(key: Tensor, origin: Tensor, *args: Any) -> Tensor:
    *counts, _, dtype = args
    return key.new_empty((max(key.shape[0], origin.shape[0]), *counts), dtype=dtype)


def batched_draw(op: Any) -> Any:
    """vmap rule of an operation whose first two arguments are key and origin."""

    def rule(
        info: Any, in_dims: tuple[Any, ...], key: Tensor, origin: Tensor, *args: Any
    ) -> tuple[Tensor, int]:
        inner = batches_of((key, origin), in_dims)
        key, origin = (
            fold_batch(x, dim, info.batch_size, inner)
            for x, dim in zip((key, origin), in_dims, strict=False)
        )
        return op(key, origin, *args).unflatten(0, (info.batch_size, inner)), 0

    return rule


def batches_of(tensors: tuple[Tensor | None, ...], in_dims: tuple[int | None, ...]) -> int:
    """Length of the batch axis, which is first once vmap's own axis is out of the way."""
    return max(
        x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]
        for x, dim in zip(tensors, in_dims, strict=False)
        if x is not None
    )


def fold_batch(x: Tensor, dim: int | None, batch_size: int, inner: int) -> Tensor:
    """Move vmap's axis into the batch axis: [V, B or 1, ...] to [V * B, ...]; [1, ...] stays."""
    if dim is None and x.shape[0] == 1:
        return x
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    return x.expand(batch_size, inner, *x.shape[2:]).flatten(0, 1)


_draw_op.register_vmap(batched_draw(_draw_op))


# -------------------------------------------------------------------------------- public functions


def words(
    key: Tensor, origin: Tensor, num_fits: int, num_particles: int, num_elements: int
) -> Tensor:
    """Random 32-bit words: int64 tensor ``[F, P, D]`` with values from 0 to 2^32 - 1.

    Args:
        key: int64 ``[2]``.
        origin: int64 ``[4]``, counters (group, step, particle, fit) of the first element.

    Raises:
        KernelError: key or origin have another shape or dtype, or a count is negative.

    >>> words(derive_key(0, 0), make_origin(), 1, 1, 3).shape
    torch.Size([1, 1, 3])
    """
    counts = (num_fits, num_particles, num_elements)
    return _draw("philox.words", key, origin, None, *counts, WORDS, torch.int64)


def uniform(
    key: Tensor,
    origin: Tensor,
    num_fits: int,
    num_particles: int,
    num_elements: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers strictly between 0 and 1: tensor ``[F, P, D]``.

    The arguments are those of :func:`words`.
    """
    counts = (num_fits, num_particles, num_elements)
    return _draw("philox.uniform", key, origin, None, *counts, UNIFORM, dtype)


def normal(
    key: Tensor,
    origin: Tensor,
    num_fits: int,
    num_particles: int,
    num_elements: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers: tensor ``[F, P, D]``; arguments as in :func:`words`.

    Box-Muller on all four words of a counter; the largest magnitude is 6.77.

    >>> noise = normal(derive_key(0, 0), make_origin(), 1, 4, 3)
    >>> later = normal(derive_key(0, 0), make_origin(particle=2), 1, 2, 3)
    >>> torch.equal(noise[:, 2:], later)
    True
    """
    counts = (num_fits, num_particles, num_elements)
    return _draw("philox.normal", key, origin, None, *counts, NORMAL, dtype)


def normal_block(
    key: Tensor,
    origin: Tensor,
    num_steps: int,
    num_fits: int,
    num_particles: int,
    num_elements: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The normal numbers of ``num_steps`` consecutive steps: tensor ``[K, F, P, D]``.

    Entry ``k`` equals ``normal`` with the origin's step raised by ``k``, bit for bit. Run eagerly,
    Philox takes some 160 small operations whatever the shape, so steps share them.
    """
    if num_steps < 0:
        raise dispatch.error("philox.normal_block", "a count is negative", num_steps=num_steps)
    counts = (num_steps, num_fits, num_particles, num_elements)
    return _draw("philox.normal_block", key, origin, *counts, NORMAL, dtype)


class NoiseBlock:
    """Normal numbers for eager stepping: drawn for many steps at once, handed out one at a time.

    Args:
        key: int64 ``[2]``.
        origin: int64 ``[4]``; its step is the step 0 of :meth:`at`.
        num_fits, num_particles, num_elements: the shape ``[F, P, D]`` of one step's noise.
        num_steps: steps drawn at once; by default as many as fit 1 MiB, 256 at most.

    >>> noise = NoiseBlock(derive_key(0, 0), make_origin(), 1, 4, 3)
    >>> torch.equal(noise.at(300), normal(derive_key(0, 0), make_origin(step=300), 1, 4, 3))
    True
    """

    def __init__(
        self,
        key: Tensor,
        origin: Tensor,
        num_fits: int,
        num_particles: int,
        num_elements: int,
        dtype: torch.dtype = torch.float32,
        num_steps: int | None = None,
    ) -> None:
        size = max(1, num_fits * num_particles * num_elements * dtype.itemsize)
        self.num_steps = num_steps or max(1, min(256, _BLOCK_BYTES // size))
        self.key = key
        self.origin = origin
        self._shape = (num_fits, num_particles, num_elements, dtype)
        self._one_step = make_origin(step=1, device=origin.device)
        self._first: int | None = None
        self._noise: tuple[Tensor, ...] = ()

    def at(self, step: int) -> Tensor:
        """Noise ``[F, P, D]`` of a step; consecutive steps are cheap, any order is right."""
        first = step - step % self.num_steps
        if first != self._first:
            origin = self.origin + first * self._one_step
            block = normal_block(self.key, origin, self.num_steps, *self._shape)
            self._first, self._noise = first, block.unbind()
        return self._noise[step - first]


def _draw(
    op: str,
    key: Tensor,
    origin: Tensor,
    steps: int | None,
    fits: int,
    particles: int,
    elements: int,
    kind: int,
    dtype: torch.dtype,
) -> Tensor:
    real = torch.float32 if kind == WORDS else dtype
    if check(op, key, origin, fits, particles, elements, real) == "torch":
        return draw_reference(key, origin, steps, fits, particles, elements, kind, dtype)
    counts = (1 if steps is None else steps, fits, particles, elements)
    drawn = _draw_op(key[None], origin[None], *counts, kind, dtype)[0]
    return drawn[0] if steps is None else drawn


def check(
    op: str,
    key: Tensor,
    origin: Tensor,
    num_fits: int = 0,
    num_particles: int = 0,
    num_elements: int = 0,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Check the arguments of a draw and return the back end."""
    if key.shape != (2,) or key.dtype != torch.int64:
        raise dispatch.error(op, "key must be int64 [2], as derive_key() gives it", key=key)
    if origin.shape != (4,) or origin.dtype != torch.int64:
        raise dispatch.error(
            op, "origin must be int64 [4], (group, step, particle, fit)", origin=origin
        )
    if num_fits < 0 or num_particles < 0 or num_elements < 0:
        raise dispatch.error(
            op,
            "a count is negative",
            num_fits=num_fits,
            num_particles=num_particles,
            num_elements=num_elements,
        )
    if dtype != torch.float32 and dtype != torch.float64:
        raise dispatch.error(op, "noise is float32 or float64", dtype=dtype)
    return dispatch.choose(op, key, origin)
