"""The losses of a long run, kept on their device, and a bar that shows them now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1024
# Reading a loss waits for the device, so the bar is brought up to date ten times a second at most.
_SECONDS_BETWEEN = 0.1
_SMOOTHED_OVER = 100


class Losses:
    """A growing tensor of losses. Appending reads nothing back to the host."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._latest: list[Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self._chunks)) + len(self._latest)

    def append(self, loss: Any) -> None:
        """Add the loss of a step: a scalar tensor, a number, or a tuple of these."""
        if isinstance(loss, tuple):
            loss = torch.stack([torch.as_tensor(part) for part in loss])
        self._latest.append(torch.as_tensor(loss).detach())
        if len(self._latest) == _CHUNK:
            # Many small tensors would take a hundred times the memory of their numbers.
            self._chunks.append(torch.stack(self._latest))
            self._latest = []

    def extend(self, losses: Tensor) -> None:
        """Add the losses ``[steps]`` of several steps."""
        if self._latest:
            self._chunks.append(torch.stack(self._latest))
            self._latest = []
        self._chunks.append(losses.detach())

    def stack(self) -> Tensor:
        """All losses, ``[steps]`` (``[steps, k]`` if each is a tuple of k)."""
        latest = [torch.stack(self._latest)] if self._latest else []
        parts = [*self._chunks, *latest]
        return torch.cat(parts) if parts else torch.empty(0)

    def smoothed(self) -> float:
        """Mean of the latest losses. Synchronises."""
        latest = self._latest[-_SMOOTHED_OVER:] or self._chunks[-1][-_SMOOTHED_OVER:].unbind()
        return float(torch.stack(list(latest)).double().mean())


class Progress:
    """Yields until all losses are there; if ``show``, with a bar and the smoothed loss."""

    def __init__(self, num_steps: int, losses: Losses, show: bool) -> None:
        self.num_steps = num_steps
        self.losses = losses
        self.show = show

    def __enter__(self) -> Progress:
        if self.show:
            from tqdm.auto import tqdm  # not at the top: importing it takes longer than a short run

            self._bar = tqdm(total=self.num_steps, unit="step")
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.show:
            self._update()
            self._bar.close()

    def __iter__(self) -> Iterator[int]:
        shown_at = time.monotonic()
        while len(self.losses) < self.num_steps:
            yield len(self.losses)
            if self.show and time.monotonic() - shown_at > _SECONDS_BETWEEN:
                self._update()
                shown_at = time.monotonic()

    def _update(self) -> None:
        done = len(self.losses)
        self._bar.update(done - self._bar.n)
        if done:
            self._bar.set_postfix_str(f"ELBO {-self.losses.smoothed():.4g}")
