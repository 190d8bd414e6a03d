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
_SECONDS_BETWEEN_LINES = 10.0
_SMOOTHED_OVER = 100


class Losses:
    """A growing tensor of losses. Appending reads nothing back to the host."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._latest: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, loss: Any) -> None:
        """Add the loss of a step: a scalar tensor, a number, or a tuple of these."""
        if isinstance(loss, tuple):
            loss = torch.stack([torch.as_tensor(part) for part in loss])
        self._latest.append(torch.as_tensor(loss).detach())
        self._count += 1
        if len(self._latest) == _CHUNK:
            # Many small tensors would take a hundred times the memory of their numbers.
            self._chunks.append(torch.stack(self._latest))
            self._latest = []

    def extend(self, losses: Tensor) -> None:
        """Add the losses ``[steps]`` of several steps."""
        if len(losses) == 1:
            self.append(losses[0])
            return
        self._count += len(losses)
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
        """Mean of the latest losses that are finite (of the first, where each is a tuple).

        Synchronises.
        """
        parts = [chunk[-_SMOOTHED_OVER:] for chunk in self._chunks[-1:]]
        if self._latest:
            parts.append(torch.stack(self._latest[-_SMOOTHED_OVER:]))
        latest = torch.cat(parts)[-_SMOOTHED_OVER:].double()
        return float(latest[torch.isfinite(latest)].mean())


class Progress:
    """Yields until all losses are there; if ``show``, with a bar and the smoothed loss.

    Args:
        num_steps: how many losses there shall be.
        losses: of the run, appended to as it goes.
        show: whether to show a bar.
        is_elbo: whether the loss is minus an ELBO, which is then shown in its place.
    """

    def __init__(self, num_steps: int, losses: Losses, show: bool, *, is_elbo: bool = True) -> None:
        self.num_steps = num_steps
        self.losses = losses
        self.show = show
        self._is_elbo = is_elbo

    def __enter__(self) -> Progress:
        if self.show:
            from tqdm.auto import tqdm  # not at the top: importing it takes longer than a short run

            self._bar = tqdm(total=self.num_steps, initial=len(self.losses), unit="step")
            # A bar cannot be redrawn in a file; each time is a line of its own there.
            is_redrawn = self._bar.fp.isatty() or type(self._bar).__name__ == "tqdm_notebook"
            self._seconds_between = _SECONDS_BETWEEN if is_redrawn else _SECONDS_BETWEEN_LINES
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self.show:
            if kind is None or issubclass(kind, KeyboardInterrupt):
                self._update()
            self._bar.close()

    def __iter__(self) -> Iterator[int]:
        shown_at = time.monotonic()
        while len(self.losses) < self.num_steps:
            yield len(self.losses)
            if self.show and time.monotonic() - shown_at > self._seconds_between:
                self._update()
                shown_at = time.monotonic()

    def _update(self) -> None:
        done = len(self.losses)
        if done:
            loss = self.losses.smoothed()
            shown = f"ELBO {-loss:.4g}" if self._is_elbo else f"loss {loss:.4g}"
            self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(done - self._bar.n)
        self._bar.refresh()
