"""Takes the steps of a long run of many fits at once."""

from __future__ import annotations

import time
import warnings
from typing import Any

from torch import Tensor

from fastsvi.errors import CaptureError, FastSVIWarning
from fastsvi.infer.arguments import Arguments
from fastsvi.infer.fit_data import FitData
from fastsvi.infer.fits import Fits
from fastsvi.infer.progress import Losses

# A chunk is as long as Ctrl-C and the progress bar may wait.
_CHUNK_SECONDS = 0.2
_FIRST_CHUNK = 4


class FitsRunner:
    """Takes steps of ``fits`` with the arguments in ``data``.

    The interface is that of :class:`~fastsvi.infer.runner.Runner`; losses are ``[steps, F]``.

    Raises:
        CaptureError: the step cannot be captured, which several fits need.
    """

    def __init__(self, fits: Fits, data: FitData, num_steps: int, compile: Any) -> None:
        self.native_steps = 0
        self.most = num_steps
        self.capture_seconds = self.compile_seconds = 0.0
        self.fits = fits
        try:
            fits.prepare(data, native=bool(compile))
        except CaptureError as error:
            raise CaptureError(
                f"num_fits={fits.num_fits} needs a step that can be captured, and {error}"
            ) from error
        self.obstacle = fits.obstacle if compile else "compile=False"
        if compile is True and self.obstacle is not None:
            warnings.warn(
                f"SVI.run: the steps are replayed, because {self.obstacle}",
                FastSVIWarning,
                stacklevel=4,
            )
        self._remaining = num_steps
        self._chunk = _FIRST_CHUNK

    @property
    def is_native(self) -> bool:
        """Whether the steps are taken in native form."""
        return self.fits.is_native

    def skip(self, done: int) -> Arguments | None:
        """Begin after ``done`` steps, taken by another process; there is nothing to rehearse."""
        self._remaining -= done
        return None

    @property
    def hopeless(self) -> Tensor:
        """Fits whose steps fail again and again, bool ``[F]``."""
        return self.fits.hopeless

    def retire(self, fits: Tensor) -> None:
        """Take no more steps with these fits, bool ``[F]``; their further losses are NaN."""
        self.fits.active &= ~fits.to(self.fits.active.device)

    def take_up(self) -> None:
        """Native steps are ready and checked from the beginning."""

    def advance(self, losses: Losses, *, read: bool = True) -> Tensor:
        """Take some steps, append their losses and return the last, ``[F]``."""
        steps = min(self._chunk, self._remaining, self.most)
        start = time.perf_counter()
        found = self.fits.run(steps)
        seconds = time.perf_counter() - start
        if seconds < _CHUNK_SECONDS / 4:
            self._chunk *= 2
        elif seconds > _CHUNK_SECONDS:
            self._chunk = max(1, self._chunk // 2)
        self._remaining -= steps
        if self.fits.is_native:
            self.native_steps += steps
        losses.extend(found)
        return found[-1]
