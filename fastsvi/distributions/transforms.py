"""torch's transforms, and the ones of Pyro that have no neural networks inside.

Normalising flows are written with :class:`TransformModule` (a transform that is also a
``torch.nn.Module``) and :class:`ComposeTransformModule`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributions import biject_to, transform_to
from torch.distributions import transforms as _torch
from torch.distributions.transforms import *  # noqa: F403
from torch.distributions.transforms import ComposeTransform, Transform

from fastsvi.distributions import (
    elementwise_transforms,
    matrix_transforms,
    signal_transforms,
    stick_breaking,
)
from fastsvi.distributions.elementwise_transforms import *  # noqa: F403
from fastsvi.distributions.matrix_transforms import *  # noqa: F403
from fastsvi.distributions.signal_transforms import *  # noqa: F403
from fastsvi.distributions.stick_breaking import *  # noqa: F403

__all__ = [
    *(name for name in _torch.__all__ if name not in stick_breaking.__all__),
    *elementwise_transforms.__all__,
    *matrix_transforms.__all__,
    *signal_transforms.__all__,
    *stick_breaking.__all__,
    "ComposeTransformModule",
    "TransformModule",
    "biject_to",
    "iterated",
    "transform_to",
]


class TransformModule(Transform, torch.nn.Module):
    """Base of transforms with learnable parameters: a transform that is a module too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    __hash__ = torch.nn.Module.__hash__


class ComposeTransformModule(ComposeTransform, torch.nn.ModuleList):
    """A chain of transforms; those that are modules become its submodules."""

    def __init__(self, parts: list[Transform], cache_size: int = 0) -> None:
        super().__init__(parts, cache_size=cache_size)
        for part in parts:
            if isinstance(part, torch.nn.Module):
                self.append(part)

    __hash__ = torch.nn.Module.__hash__

    def with_cache(self, cache_size: int = 1) -> ComposeTransformModule:
        """The chain with caches of the given size (0 or 1)."""
        if cache_size == self._cache_size:
            return self
        return ComposeTransformModule(self.parts, cache_size=cache_size)


def iterated(
    repeats: int, base_fn: Callable[..., Transform], *args: Any, **kwargs: Any
) -> ComposeTransformModule:
    """A chain of ``repeats`` transforms, each made by ``base_fn(*args, **kwargs)``."""
    if not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"iterated: repeats must be a positive int, found {repeats!r}")
    return ComposeTransformModule([base_fn(*args, **kwargs) for _ in range(repeats)])
