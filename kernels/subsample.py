"""Random subsets without replacement, without work in proportion to the whole.

``torch.randperm(N)[:b]`` costs O(N) time and memory for b indices. Here a keyed permutation of
``0..N-1`` is evaluated at ``0..b-1`` alone:

- ``N <= 1024``: sort one tile of Philox words. Exactly uniform up to the 2^-32 grain of a word.
- otherwise: a Feistel network on a grid of ``rows * columns >= N`` cells, whose round keys are
  Philox words. Points that land on the few cells beyond N walk on along their cycle until they
  come back below N ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains",
  CT-RSA 2002). The number of steps of a walk is random, yet nothing loops until done: the grid is
  chosen so tight that all cells beyond N form a short table, in which the end of every walk is
  found by pointer doubling, exactly and in a fixed number of operations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsvi.kernels import dispatch, philox

SORTED_SIZE = philox.TILE
ROUNDS = 8  # = two Philox counters of round keys
MAX_SIZE = 1 << 40

_WORD = 0xFFFFFFFF
_GRIDS_TRIED = 256

# Multipliers of the 32-bit hash "lowbias32" (C. Wellons, 2018), the second less 2^32: the product
# with a word must not overflow 63 bits (see philox._multiply).
_HASH_0, _HASH_1 = 0x7FEB352D, 0x846CA68B - (1 << 32)


# A plain dict, for Dynamo traces through it and warns about functools.cache.
_grids: dict[int, tuple[int, int]] = {}


def grid_of(size: int) -> tuple[int, int]:
    """Rows and columns of the tightest near-square grid with at least ``size`` cells.

    >>> grid_of(1_000_003)
    (815, 1227)
    """
    if size not in _grids:
        root = math.isqrt(size - 1) + 1
        rows = min(range(root, max(root - _GRIDS_TRIED, root // 2), -1), key=lambda r: -size % r)
        _grids[size] = rows, -(-size // rows)
    return _grids[size]


# -------------------------------------------------------------------------------- torch reference


def _hash(word: Tensor) -> Tensor:
    word = ((word ^ (word >> 16)) * _HASH_0) & _WORD
    word = ((word ^ (word >> 15)) * _HASH_1) & _WORD
    return word ^ (word >> 16)


def _permute(points: Tensor, round_keys: Any, rows: int, columns: int) -> Tensor:
    """Feistel network on the cells of the grid; ``points`` [n], round keys [..., 1] each."""
    row = points // columns
    column = points - row * columns
    for i in range(0, ROUNDS, 2):
        shift = (_hash((column + round_keys[i]) & _WORD) * rows) >> 32
        row = (row + shift) % rows
        shift = (_hash((row + round_keys[i + 1]) & _WORD) * columns) >> 32
        column = (column + shift) % columns
    return row * columns + column


def _sorted_reference(words: Tensor, size: int, subsample_size: int) -> Tensor:
    """Ranks of ``size`` random words [..., size]; the index makes equal words distinct."""
    tagged = words * SORTED_SIZE + torch.arange(size, device=words.device)
    return tagged.sort(-1).values[..., :subsample_size] % SORTED_SIZE


def _walked_reference(words: Tensor, size: int, subsample_size: int) -> Tensor:
    """Images of 0..b-1 under the permutation with round keys ``words`` [..., 8]."""
    rows, columns = grid_of(size)
    beyond = rows * columns - size
    keys = words.unsqueeze(-1).unbind(-2)
    points = torch.arange(subsample_size + beyond, device=words.device)
    if beyond:
        points = torch.where(points < subsample_size, points, points + (size - subsample_size))
    images = _permute(points, keys, rows, columns)  # [..., b + beyond]
    if not beyond:
        return images
    images, table = images[..., :subsample_size], images[..., subsample_size:]
    for _ in range(beyond.bit_length()):
        table = _walk_on(table, table, size)
    return _walk_on(images, table, size)


def _walk_on(points: Tensor, table: Tensor, size: int) -> Tensor:
    """Replace points beyond ``size`` by their entry in ``table``."""
    following = table.gather(-1, (points - size).clamp(min=0))
    return torch.where(points < size, points, following)


def _reference(
    key: Tensor,
    origin: Tensor,
    steps: int | None,
    fits: int,
    particles: int,
    size: int,
    subsample_size: int,
) -> Tensor:
    origin = origin * torch.arange(4, device=origin.device).clamp(max=1)  # group 0
    if size <= SORTED_SIZE:
        counts = (steps, fits, particles, size)
        words = philox.draw_reference(key, origin, *counts, philox.WORDS, torch.int64)
        return _sorted_reference(words, size, subsample_size)
    # All lanes of two counters: eight round keys [..., F, P, 8] per subset.
    words = torch.cat(philox.counter_words(key, origin, steps, fits, particles, (ROUNDS // 4,)), -1)
    return _walked_reference(words, size, subsample_size)


# ----------------------------------------------------------------------------------- registration


@torch.library.custom_op("fastsvi::subsample_indices", mutates_args=())
def _indices_op(
    key: Tensor,  # int64 [B or 1, 2]
    origin: Tensor,  # int64 [B or 1, 4]
    num_steps: int,
    num_fits: int,
    num_particles: int,
    size: int,
    subsample_size: int,
) -> Tensor:
    batches = max(key.shape[0], origin.shape[0])
    counts = (num_steps, num_fits, num_particles)
    if dispatch.runs_triton(key.device):
        from fastsvi.kernels.triton import subsample as kernels

        return kernels.indices(key, origin, (batches, *counts), size, subsample_size)
    pairs = zip(key.expand(batches, 2), origin.expand(batches, 4), strict=True)
    return torch.stack([_reference(k, o, *counts, size, subsample_size) for k, o in pairs])


@_indices_op.register_fake
def _(key: Tensor, origin: Tensor, *args: int) -> Tensor:
    *counts, _, subsample_size = args
    return key.new_empty((max(key.shape[0], origin.shape[0]), *counts, subsample_size))


_indices_op.register_vmap(philox.batched_draw(_indices_op))


# ------------------------------------------------------------------------------ public functions


def indices(
    key: Tensor,
    origin: Tensor,
    num_fits: int,
    num_particles: int,
    size: int,
    subsample_size: int,
) -> Tensor:
    """Random subsets of ``0..size-1`` without replacement, in random order.

    Every subset is as likely as any other. Costs O(subsample_size), not O(size), for sizes above
    1024, and never waits for the device.

    Args:
        key: int64 ``[2]``, see :mod:`philox`.
        origin: int64 ``[4]``; step, particle and fit tell the subsets apart, the group is not used.
        num_fits, num_particles: ``F`` and ``P``.
        size: ``N``, at most 2^40.
        subsample_size: ``b``, from 0 to ``N``.

    Returns:
        int64 ``[F, P, b]``.

    Raises:
        KernelError: a size is out of range, or key or origin have another shape or dtype.

    >>> subset = indices(philox.derive_key(0, 0), philox.make_origin(), 1, 1, 10, 10)
    >>> subset.sort().values
    tensor([[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]])
    """
    op = "subsample.indices"
    counts = (num_fits, num_particles, size, subsample_size)
    if _check(op, key, origin, *counts) == "torch":
        return _reference(key, origin, None, *counts)
    return _indices_op(key[None], origin[None], 1, *counts)[0, 0]


def indices_block(
    key: Tensor,
    origin: Tensor,
    num_steps: int,
    num_fits: int,
    num_particles: int,
    size: int,
    subsample_size: int,
) -> Tensor:
    """The subsets of ``num_steps`` consecutive steps, drawn at once: int64 ``[K, F, P, b]``.

    Entry ``k`` equals ``indices`` with the origin's step raised by ``k``. For eager stepping, where
    the number of operations is what costs.
    """
    op = "subsample.indices_block"
    if num_steps < 0:
        raise dispatch.error(op, "a count is negative", num_steps=num_steps)
    counts = (num_fits, num_particles, size, subsample_size)
    if _check(op, key, origin, *counts) == "torch":
        return _reference(key, origin, num_steps, *counts)
    return _indices_op(key[None], origin[None], num_steps, *counts)[0]


def _check(
    op: str,
    key: Tensor,
    origin: Tensor,
    num_fits: int,
    num_particles: int,
    size: int,
    subsample_size: int,
) -> str:
    if not 0 <= subsample_size <= size or size > MAX_SIZE:
        raise dispatch.error(
            op,
            f"needs 0 <= subsample_size <= size <= 2^{MAX_SIZE.bit_length() - 1}",
            subsample_size=subsample_size,
            size=size,
        )
    return philox.check(op, key, origin, num_fits, num_particles)
