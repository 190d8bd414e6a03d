"""The operations of a captured step that are not ATen's: random numbers by counter.

As operations of their own each stays one node of a recorded graph, where native loops have code
for it; inlined it would be some 160 nodes of integer arithmetic.

Under :func:`torch.func.vmap` each may be given an ``origin`` per independent fit. Only consecutive
fits are supported, ``origin[f] == origin[0] + (0, 0, 0, f)``: they are then drawn in one call, from
``origin[0]``. That this holds is not checked, for that would mean waiting for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsvi.kernels import dispatch, philox, subsample

_library = torch.library.Library("fastsvi", "FRAGMENT")
_NOISE = (
    "(Tensor key, Tensor origin, int group, int fits, int particles, int elements, "
    "ScalarType dtype) -> Tensor"
)
_library.define("normal_noise" + _NOISE)
_library.define("uniform_noise" + _NOISE)
_library.define(
    "random_subset(Tensor key, Tensor origin, int draw, int size, int subsample_size) -> Tensor"
)
# The rule of vmap for random_subset needs a form that knows of several fits.
_library.define(
    "random_subsets(Tensor key, Tensor origin, int draw, int fits, int size, int subsample_size)"
    " -> Tensor"
)

_GROUP, _PARTICLE = 0, 2  # places in an origin


def _moved(origin: Tensor, place: int, distance: int) -> Tensor:
    """``origin`` with one counter raised; without a copy from the host, for CUDA graphs."""
    if not distance:
        return origin
    moved = origin.clone()
    moved[place] += distance
    return moved


def _normal_noise(
    key: Tensor,
    origin: Tensor,
    group: int,
    fits: int,
    particles: int,
    elements: int,
    dtype: torch.dtype,
) -> Tensor:
    return philox.normal(key, _moved(origin, _GROUP, group), fits, particles, elements, dtype)


def _uniform_noise(
    key: Tensor,
    origin: Tensor,
    group: int,
    fits: int,
    particles: int,
    elements: int,
    dtype: torch.dtype,
) -> Tensor:
    return philox.uniform(key, _moved(origin, _GROUP, group), fits, particles, elements, dtype)


def _random_subsets(
    key: Tensor, origin: Tensor, draw: int, fits: int, size: int, subsample_size: int
) -> Tensor:
    origin = _moved(origin, _PARTICLE, draw)
    return subsample.indices(key, origin, fits, 1, size, subsample_size)[:, 0]


def _random_subset(
    key: Tensor, origin: Tensor, draw: int, size: int, subsample_size: int
) -> Tensor:
    return _random_subsets(key, origin, draw, 1, size, subsample_size)[0]


def _noise_shape(
    key: Tensor,
    origin: Tensor,
    group: int,
    fits: int,
    particles: int,
    elements: int,
    dtype: torch.dtype,
) -> Tensor:
    return key.new_empty((fits, particles, elements), dtype=dtype)


def _subsets_shape(
    key: Tensor, origin: Tensor, draw: int, fits: int, size: int, subsample_size: int
) -> Tensor:
    return key.new_empty((fits, subsample_size))


def _subset_shape(key: Tensor, origin: Tensor, draw: int, size: int, subsample_size: int) -> Tensor:
    return key.new_empty(subsample_size)


for _name, _body, _shape in (
    ("normal_noise", _normal_noise, _noise_shape),
    ("uniform_noise", _uniform_noise, _noise_shape),
    ("random_subset", _random_subset, _subset_shape),
    ("random_subsets", _random_subsets, _subsets_shape),
):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastsvi::{_name}", _shape, lib=_library)


# ------------------------------------------------------------------------------------------- vmap


def _first(op: str, key: Tensor, origin: Tensor, dims: tuple[Any, ...], fits: int) -> Tensor:
    """Origin of the first of the fits that vmap runs over."""
    if dims[0] is not None or dims[1] is None or fits != 1:
        raise dispatch.error(
            op,
            "vmap may map the origin alone, over consecutive fits of which each call has one",
            key=key,
            origin=origin,
            fits=fits,
        )
    return origin.select(dims[1], 0)


def _noise_rule(op: Any) -> Any:
    def rule(
        info: Any,
        dims: tuple[Any, ...],
        key: Tensor,
        origin: Tensor,
        group: int,
        fits: int,
        *rest: Any,
    ) -> tuple[Tensor, int]:
        origin = _first(op.__name__, key, origin, dims, fits)
        noise = op(key, origin, group, info.batch_size, *rest)
        return noise.unsqueeze(1), 0

    return rule


def _subset_rule(
    info: Any, dims: tuple[Any, ...], key: Tensor, origin: Tensor, draw: int, *sizes: int
) -> tuple[Tensor, int]:
    origin = _first("random_subset", key, origin, dims, 1)
    op = torch.ops.fastsvi.random_subsets
    return op(key, origin, draw, info.batch_size, *sizes), 0


for _name in ("normal_noise", "uniform_noise"):
    _rule = _noise_rule(getattr(torch.ops.fastsvi, _name))
    torch.library.register_vmap(f"fastsvi::{_name}", _rule, lib=_library)
torch.library.register_vmap("fastsvi::random_subset", _subset_rule, lib=_library)


# ------------------------------------------------------------------------------- public functions


def normal_noise(
    key: Tensor,
    origin: Tensor,
    group: int,
    fits: int,
    particles: int,
    elements: int,
    dtype: torch.dtype,
) -> Tensor:
    """Standard normals ``[F, P, D]``: :func:`fastsvi.kernels.philox.normal` as one node.

    Args:
        key: int64 ``[2]``.
        origin: int64 ``[4]``; under vmap those of consecutive fits, ``[F, 4]`` with ``fits=1``.
        group: raises the origin's group: a draw of so many tiles of 1,024 elements leaves off
            256 groups later, where the next draw of the step may begin.
        fits, particles, elements: ``F``, ``P`` and ``D``.

    >>> key, origin = philox.derive_key(0, 0), philox.make_origin()
    >>> normal_noise(key, origin, 256, 1, 2, 3, torch.float32).shape
    torch.Size([1, 2, 3])
    """
    op = torch.ops.fastsvi.normal_noise
    noise: Tensor = op(key, origin, group, fits, particles, elements, dtype)
    return noise


def uniform_noise(
    key: Tensor,
    origin: Tensor,
    group: int,
    fits: int,
    particles: int,
    elements: int,
    dtype: torch.dtype,
) -> Tensor:
    """Numbers strictly between 0 and 1, ``[F, P, D]``; arguments as for :func:`normal_noise`."""
    op = torch.ops.fastsvi.uniform_noise
    noise: Tensor = op(key, origin, group, fits, particles, elements, dtype)
    return noise


def random_subset(key: Tensor, origin: Tensor, draw: int, size: int, subsample_size: int) -> Tensor:
    """``subsample_size`` different numbers below ``size`` in random order, int64 ``[b]``.

    :func:`fastsvi.kernels.subsample.indices` as one node; costs O(b).

    Args:
        draw: raises the origin's particle, which all particles of a step share here: the number
            of the subset in its step.

    >>> random_subset(philox.derive_key(0, 0), philox.make_origin(), 0, 10, 10).sort().values
    tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    indices: Tensor = torch.ops.fastsvi.random_subset(key, origin, draw, size, subsample_size)
    return indices
