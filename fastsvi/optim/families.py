"""Which optimizers the flat kernel serves, and how their options map to its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from fastsvi.optim.clipped_adam import ClippedAdam


class Rule(NamedTuple):
    """Arguments of the kernel that are the same for all segments of a call."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    clip_norm: float | None
    clip_value: float | None
    eps_hat: bool
    centered: bool


@dataclass(frozen=True)
class Family:
    """A variant of Adam that the flat kernel computes."""

    constructor: Callable[..., torch.optim.Optimizer]
    decoupled: bool = False  # AdamW's weight decay
    clipped: bool = False  # ClippedAdam: entries are clipped, lr decays, eps is added early

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Options that the constructor fills in."""
        parameters = inspect.signature(self.constructor).parameters.values()
        found = {p.name: p.default for p in parameters if p.default is not p.empty}
        if self.decoupled:
            found["decoupled_weight_decay"] = True
        return found

    def serves(self, options: dict[str, Any]) -> bool:
        """Whether the flat kernel computes what these options ask for."""
        return not any(options.get(key) for key in ("amsgrad", "maximize", "differentiable"))

    def rule(self, options: dict[str, Any], clip: dict[str, Any]) -> Rule:
        """The kernel's arguments for complete ``options`` and clipping options."""
        clip_value = clip.get("clip_value")
        if self.clipped:
            # Both limits apply to each entry, so the smaller one decides.
            limits = (options["clip_norm"], clip_value)
            clip_value = min(limit for limit in limits if limit is not None)
        beta1, beta2 = options["betas"]
        return Rule(
            betas=(float(beta1), float(beta2)),
            eps=float(options["eps"]),
            weight_decay=float(options["weight_decay"]),
            decoupled=self.decoupled or bool(options.get("decoupled_weight_decay")),
            clip_norm=clip.get("clip_norm"),
            clip_value=clip_value,
            eps_hat=self.clipped,
            centered=bool(options.get("centered_variance")),
        )


def family_of(constructor: Any) -> Family | None:
    """The family that ``constructor`` makes, if the flat kernel knows it."""
    return next((family for family in _FAMILIES if family.constructor is constructor), None)


_FAMILIES = (
    Family(torch.optim.Adam),
    Family(torch.optim.AdamW, decoupled=True),
    Family(ClippedAdam, clipped=True),
)
