"""Torch optimizers whose learning rate decays at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class DecayingOptimizer(torch.optim.Optimizer):
    """A learning rate ``lr`` that every step first multiplies by ``lrd``.

    A derived class has both among its options, and updates one tensor in :meth:`_update`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all tensors that have a gradient; ``closure`` recomputes loss and gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["lr"] *= group["lrd"]
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, self.state[p], group)
        return loss

    @staticmethod
    def _update(p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError
