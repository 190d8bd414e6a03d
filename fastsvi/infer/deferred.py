"""Checking the losses of a run on an accelerator now and then, and going back if one was bad.

Reading a loss waits for the device, so a run on a GPU does not look at each. Now and then it looks
at all since the last time; if one is not finite, parameters and optimizer go back to where they
were at the last good look.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from fastsvi.infer.progress import Losses
from fastsvi.poutine.runtime import PARAM_STORE

_SECONDS_BETWEEN = 1.0


class DeferredChecks:
    """Watches the losses of a run.

    Args:
        losses: of the run, appended to as it goes.
        optim: the optimizer.
    """

    def __init__(self, losses: Losses, optim: Any) -> None:
        self.losses = losses
        self.optim = optim
        self._note()

    def _note(self) -> None:
        """Remember the present as good."""
        self._num_good = len(self.losses)
        self._params = {n: p.detach().clone() for n, p in PARAM_STORE.named_parameters()}
        self._optim_state = self.optim.get_state()
        self._noted_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() - self._noted_at > _SECONDS_BETWEEN

    def look(self) -> int | None:
        """Number of the first bad step since the last look, after going back; None if all is well.

        Synchronises.
        """
        recent = self.losses.stack()[self._num_good :]
        bad = torch.isfinite(recent).logical_not().nonzero()
        params = (leaf for _, leaf in PARAM_STORE.named_parameters())
        if not len(bad) and all(bool(torch.isfinite(leaf).all()) for leaf in params):
            self._note()
            return None
        step = self._num_good + (int(bad[0, 0]) if len(bad) else len(recent))
        self._go_back()
        return step

    def _go_back(self) -> None:
        leaves: dict[str, Tensor] = dict(PARAM_STORE.named_parameters())
        with torch.no_grad():
            for name, value in self._params.items():
                if name in leaves:
                    leaves[name].copy_(value)
        self.optim.set_state(self._optim_state)
