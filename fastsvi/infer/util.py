"""Small things that the estimators share: validation, numbers out of tensors, sums over plates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributions import Distribution

from fastsvi import settings
from fastsvi.poutine.util import enable_validation, is_validation_enabled, site_is_subsample

__all__ = [
    "MultiFrameTensor",
    "checking",
    "enable_validation",
    "get_plate_stacks",
    "is_finite",
    "is_validation_enabled",
    "torch_item",
    "zero_grads",
]


class checking:
    """Check everything, or only what is free, for the length of a ``with`` block.

    With ``True`` the setting ``validate`` is ``"always"`` inside, so that plates, traces and
    distributions all check; with ``False`` distributions do not look at their arguments and values.
    Entered on every step, hence a plain class: ``contextlib`` costs more than the assignments.
    """

    __slots__ = ("_before", "_on", "_settings")

    def __init__(self, on: bool) -> None:
        self._on = on

    def __enter__(self) -> None:
        self._before = Distribution._validate_args
        if self._before is not self._on:  # assigning makes Python forget all cached lookups
            Distribution._validate_args = self._on
        if self._on:
            self._settings = settings.get("validate")
            settings.set(validate="always")

    def __exit__(self, *exc_info: object) -> None:
        if self._before is not self._on:
            Distribution._validate_args = self._before
        if self._on:
            settings.set(validate=self._settings)


def torch_item(x: Any) -> float:
    """A Python number out of a one-element tensor, or the number itself.

    >>> torch_item(torch.tensor(2.5)), torch_item(3)
    (2.5, 3)
    """
    return x.item() if isinstance(x, torch.Tensor) else x


def is_finite(x: Any) -> bool:
    """Whether a loss, as a number or a one-element tensor, is finite. Synchronises."""
    return math.isfinite(torch_item(x))


def zero_grads(tensors: Iterable[torch.Tensor]) -> None:
    """Set the gradients of ``tensors`` to zero, in place: they may be views of a flat buffer."""
    for tensor in tensors:
        if tensor.grad is not None:
            if tensor.grad.grad_fn is not None:
                tensor.grad.detach_()
            tensor.grad.zero_()


def get_plate_stacks(trace: Any) -> dict[str, list[Any]]:
    """The vectorised plates around every sample site of ``trace``, by site name."""
    return {
        name: [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


class MultiFrameTensor(dict):
    """Sums of tensors that live in different nests of plates, keyed by the set of plates.

    Two terms in the same plates are added elementwise, so there is one tensor per nest;
    :meth:`sum_to` then gives what a site in given plates may depend on: terms are summed over
    every plate that the site is not in.
    """

    def __init__(self, *items: tuple[Iterable[Any], torch.Tensor]) -> None:
        super().__init__()
        self.add(*items)

    def add(self, *items: tuple[Iterable[Any], torch.Tensor]) -> None:
        """Add pairs of a ``cond_indep_stack`` and a tensor whose batch dims those plates are."""
        for stack, value in items:
            frames = frozenset(frame for frame in stack if frame.vectorized)
            self[frames] = self[frames] + value if frames in self else value

    def sum_to(self, target_frames: Iterable[Any]) -> torch.Tensor | float:
        """Sum of all terms over the plates that are not among ``target_frames``."""
        target = set(target_frames)
        total: torch.Tensor | float = 0.0
        for frames, value in self.items():
            for frame in frames - target:
                if value.dim() >= -frame.dim and value.shape[frame.dim] != 1:
                    value = value.sum(frame.dim, keepdim=True)
            # Leading dims of size one are only padding; left in place they would make the total
            # wider than the site's own log-density, and its sum too large after broadcasting.
            while value.dim() and value.shape[0] == 1:
                value = value.squeeze(0)
            total = total + value
        return total
