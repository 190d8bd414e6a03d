"""The one operation of a captured step that is not ATen's: standard normal noise by counter.

As an operation of its own it stays one node of a recorded graph, where native loops have code for
it; inlined it would be some 160 nodes of integer arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsvi.kernels import philox

_library = torch.library.Library("fastsvi", "FRAGMENT")
_library.define(
    "normal_noise(Tensor key, Tensor origin, int fits, int particles, int elements, "
    "ScalarType dtype) -> Tensor"
)


def _normal_noise(
    key: Tensor, origin: Tensor, fits: int, particles: int, elements: int, dtype: torch.dtype
) -> Tensor:
    return philox.normal(key, origin, fits, particles, elements, dtype)


_library.impl("normal_noise", _normal_noise, "CompositeExplicitAutograd")


def normal_noise(
    key: Tensor, origin: Tensor, fits: int, particles: int, elements: int, dtype: torch.dtype
) -> Tensor:
    """:func:`fastsvi.kernels.philox.normal`, as one node of a recorded graph.

    >>> normal_noise(philox.derive_key(0, 0), philox.make_origin(), 1, 2, 3, torch.float32).shape
    torch.Size([1, 2, 3])
    """
    noise: Tensor = torch.ops.fastsvi.normal_noise(key, origin, fits, particles, elements, dtype)
    return noise
