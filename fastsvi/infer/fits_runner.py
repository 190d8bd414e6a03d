"""Takes the steps of a long run of many fits at once."""

from __future__ import annotations

import time
import warnings
from typing import Any

from torch import Tensor

from fastsvi.errors import CaptureError, FastSVIWarning
from fastsvi.infer.arguments import Arguments
from fastsvi.infer.batches import Batches, varying
from fastsvi.infer.fit_data import FitData, FitDims
from fastsvi.infer.fits import Fits
from fastsvi.infer.progress import Losses

# A chunk is as long as Ctrl-C and the progress bar may wait.
_CHUNK_SECONDS = 0.2
_FIRST_CHUNK = 4


class FitsRunner:
    """Takes steps of ``fits``.

    The interface is that of :class:`~fastsvi.infer.runner.Runner`; losses are ``[steps, F]``.

    Args:
        fits: the fits.
        args, kwargs: arguments of every step.
        fit_dims: see :class:`~fastsvi.infer.fit_data.FitData`; also for what is in a batch.
        num_steps: how many steps will be asked for.
        compile: see :meth:`SVI.run`.
        batches: an iterable of what changes from step to step.

    Raises:
        CaptureError: the step cannot be captured, which several fits need.
    """

    def __init__(
        self,
        fits: Fits,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        fit_dims: FitDims,
        num_steps: int,
        compile: Any,
        batches: Any = None,
    ) -> None:
        self.native_steps = 0
        self.most = num_steps
        self.capture_seconds = self.compile_seconds = 0.0
        self.fits = fits
        self._compile = compile
        self._shared = args, kwargs
        self._fit_dims = fit_dims
        self._batches = None if batches is None else Batches(batches, args, kwargs)
        first = Arguments(args, kwargs) if self._batches is None else self._batches.peek()
        data = self._data(first)
        fits.begin()
        self._prepare(data)
        self.obstacle = fits.obstacle if compile else "compile=False"
        if compile is True and self.obstacle is not None:
            warnings.warn(
                f"SVI.run: the steps are replayed, because {self.obstacle}",
                FastSVIWarning,
                stacklevel=4,
            )
        self._remaining = num_steps
        self._chunk = _FIRST_CHUNK

    def _data(self, arguments: Arguments) -> FitData:
        lifted = () if self._batches is None else varying(arguments, *self._shared)
        args, kwargs = arguments.args, arguments.kwargs
        return FitData(args, kwargs, self._fit_dims, self.fits.num_fits, lifted)

    def _prepare(self, data: FitData) -> None:
        try:
            self.fits.prepare(data, native=bool(self._compile))
        except CaptureError as error:
            raise CaptureError(
                f"num_fits={self.fits.num_fits} needs a step that can be captured, and {error}"
            ) from error
        self.capture_seconds = self.fits.capture_seconds
        self.compile_seconds = self.fits.compile_seconds

    @property
    def is_native(self) -> bool:
        """Whether the steps are taken in native form."""
        return self.fits.is_native

    def skip(self, done: int) -> Arguments | None:
        """Begin after ``done`` steps, taken by another process; there is nothing to rehearse."""
        self._remaining -= done
        if self._batches is not None:
            for _ in range(done):
                self._batches.next()
        return None

    @property
    def hopeless(self) -> Tensor:
        """Fits whose steps fail again and again, bool ``[F]``."""
        return self.fits.hopeless

    def retire(self, fits: Tensor) -> None:
        """Take no more steps with these fits, bool ``[F]``; their further losses are NaN."""
        self.fits.active &= ~fits.to(self.fits.active.device)

    def release(self) -> None:
        """The memory of many fits is kept: they are rarely wide."""

    def take_up(self) -> None:
        """Native steps are ready and checked from the beginning."""

    def advance(self, losses: Losses, *, read: bool = True) -> Tensor:
        """Take some steps, append their losses and return the last, ``[F]``."""
        steps = min(self._chunk, self._remaining, self.most)
        taken = self._take(steps)
        steps = len(taken) or steps
        start = time.perf_counter()
        found = self.fits.run(steps, taken)
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

    def _take(self, count: int) -> list[FitData]:
        """The arguments of up to ``count`` steps; none if all have the same."""
        if self._batches is None:
            return []
        taken = [self._data(self._batches.next())]
        self._prepare(taken[0])

        def accept(arguments: Arguments) -> bool:
            data = self._data(arguments)
            is_served = self.fits.serves(data)
            if is_served:
                taken.append(data)
            return is_served

        self._batches.alike(count - 1, accept)
        return taken
