"""Many independent fits of one program, with own parameters, noise, optimizer state and data.

The step of one fit is captured once. In native form it is then run for one fit after the other, on
as many threads as torch uses; replayed, it runs for all at once under vmap. Nothing passes from one
fit to another, so a fit gives the same numbers alone and among others, and what goes wrong in one
stays there.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsvi.engine.graph_loop import to_device
from fastsvi.engine.native_fits import NativeFits
from fastsvi.errors import CaptureError, CheckpointError, ConstraintError, FastSVIWarning
from fastsvi.infer.captured import changed_outside
from fastsvi.infer.captures import MAX_CAPTURES, TooManyCaptures
from fastsvi.infer.fit_data import FitData
from fastsvi.infer.fits_step import FitsStep
from fastsvi.infer.initial_values import initial_values
from fastsvi.infer.pure_step import PureStep
from fastsvi.poutine.runtime import PARAM_STORE

if TYPE_CHECKING:
    from fastsvi.engine.cuda.block_fits import BlockFits
    from fastsvi.infer.svi import SVI

# A fit whose steps fail so many times in a row is not run any more.
_HOPELESS = 100


class Fits:
    """The state of ``num_fits`` fits of ``svi``, and their steps.

    The param store holds one more fit, an example: the one whose arguments the step is recorded
    with, and where :meth:`select` puts another.

    Args:
        svi: what is fitted.
        num_fits: F.
        first_fit: number of the first; it chooses the noise. Fits 0 to 99 and 100 to 199 may run
            in two places as 0 to 199 would run in one.

    Attributes:
        skipped: int64 ``[F]``, steps of each fit that were left out as not finite.
        active: bool ``[F]``, on the host: which fits are still run.
        num_captures: how many times a step was captured.
        capture_seconds, compile_seconds: what that took in this run.
    """

    def __init__(self, svi: SVI, num_fits: int, first_fit: int = 0) -> None:
        for name, value, least in (("num_fits", num_fits, 1), ("first_fit", first_fit, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConstraintError(f"{name} must be an integer >= {least}, found {value!r}")
        self._svi = svi
        self.num_fits = num_fits
        self.first_fit = first_fit
        self.active = torch.ones(num_fits, dtype=torch.bool, device="cpu")
        self._state: list[Tensor] = []  # [F, ...]: flat buffer, moments, skipped, origin
        self._steps: list[FitsStep] = []  # one for each form of the arguments
        self._current: FitsStep | None = None  # serves the latest arguments
        self._data: FitData | None = None  # the latest arguments
        self._seen: dict[FitsStep, bool] = {}  # whether steps of earlier runs still serve
        self._pure: PureStep | None = None  # of the step that was captured last
        self._optim: Any = None  # that the moments are of
        self._generation: int | None = None  # of the seed
        self.num_captures = 0
        self.capture_seconds = self.compile_seconds = 0.0
        self._failed_in_a_row = torch.zeros(num_fits, dtype=torch.int64, device="cpu")
        self._step = 0

    # ----------------------------------------------------------------------------------- set up

    def begin(self) -> None:
        """Begin a run: all fits take part again, and whatever was captured is looked at again."""
        self.active = torch.ones(self.num_fits, dtype=torch.bool, device="cpu")
        self._failed_in_a_row = torch.zeros(self.num_fits, dtype=torch.int64, device="cpu")
        self._seen = {}
        self.capture_seconds = self.compile_seconds = 0.0

    def prepare(self, data: FitData, native: bool) -> None:
        """Make the fits, if there are none yet, and capture their step for ``data`` if need be.

        Raises:
            CaptureError: the step cannot be captured, or has been too often.
        """
        step = self._serving(data, native)
        if step is None:
            step = self._capture(data, native)
            self._seen[step] = True
        self._current, self._data = step, data

    def serves(self, data: FitData) -> bool:
        """Whether the step that is in use may be taken with these arguments."""
        return self._current is not None and self._current.serves(data)

    def _serving(self, data: FitData, native: bool) -> FitsStep | None:
        """A captured step for these arguments which is still what the program does."""
        for step in reversed(self._steps):
            if step.asked_native == native and step.serves(data):
                if step not in self._seen:
                    self._seen[step] = step.difference() is None
                if self._seen[step]:
                    return step
        return None

    def _capture(self, data: FitData, native: bool) -> FitsStep:
        self._steps = [step for step in self._steps if step.pure.is_current()]
        if self.num_captures >= MAX_CAPTURES:
            changed = "something outside of the tensors"
            if self._data is not None and not data.has_form_of(self._data):
                changed = data.name_of_difference(self._data)
            raise TooManyCaptures(
                f"the step has been captured {self.num_captures} times already, because {changed} "
                "changes. Tensors of one shape and floats of a batch may vary; for what varies "
                "otherwise, use SVIs of their own"
            )
        initial = None
        if not self._state or self._are_forgotten():
            initial = initial_values(self._svi, data, self.num_fits, self.first_fit)
        self._current = None  # what fails below must not serve the next run
        self.num_captures += 1
        step = FitsStep(self._svi, data, native)
        self.capture_seconds += step.capture_seconds
        self.compile_seconds += step.compile_seconds
        if initial is not None:
            self._start(step.pure, initial)
        elif self._optim is not self._svi.optim:
            self._restart_optimizer(step.pure)
        if [x.shape for x in step.pure.state] != [x.shape[1:] for x in self._state]:
            raise ConstraintError(
                f"the program has other parameters than when its {self.num_fits} fits began: now "
                f"{list(step.pure.buffer.layout)}. Fit it with another SVI"
            )
        step.check()
        generation = step.pure.generation
        if self._generation not in (None, generation):
            self._step = 0  # another seed makes other fits, which begin with its first noise
        self._generation = generation
        self._optim = self._svi.optim
        self._pure = step.pure
        self._steps.append(step)
        return step

    def _are_forgotten(self) -> bool:
        """Whether the parameters are gone from the store: the fits begin anew, as one fit does."""
        pure = self._pure
        return pure is not None and not any(map(PARAM_STORE.locate, pure.plan.leaves))

    def _start(self, pure: PureStep, initial: dict[str, Tensor]) -> None:
        """Lay out the state of all fits as the captured step expects it."""
        count, device = self.num_fits, pure.buffer.device
        state = [self._for_all(tensor) for tensor in pure.state]
        flat, origin = state[0], state[-1]
        for name, segment in pure.buffer.layout.items():
            rows = initial.get(name)
            if rows is not None and rows.shape[1:] != segment.shape:
                raise ConstraintError(
                    f"parameter {name!r} has shape {tuple(segment.shape)} in one fit and "
                    f"{tuple(rows.shape[1:])} in another; all fits need the same shapes"
                )
            if rows is not None:
                flat[:, segment.slice] = rows.reshape(count, -1).to(flat)
        origin[:, 3] = torch.arange(self.first_fit, self.first_fit + count, device=device)
        self._state = state

    def _restart_optimizer(self, pure: PureStep) -> None:
        """Give all fits the state that another optimizer begins with."""
        flat, *_, skipped, origin = self._state
        self._state = [flat, *map(self._for_all, pure.state[1:-2]), skipped, origin]

    def _for_all(self, tensor: Tensor) -> Tensor:
        return tensor.detach().unsqueeze(0).repeat(self.num_fits, *(1,) * tensor.dim())

    # ------------------------------------------------------------------------------------ running

    def run(self, num_steps: int, batches: Sequence[FitData] = ()) -> Tensor:
        """Take steps with all active fits; returns their losses ``[steps, F]``.

        The loss of a step that was left out, and of a fit that is not active, is NaN.

        Args:
            num_steps: how many.
            batches: arguments of each, which the step in use serves; by default the latest ones.
        """
        step, data = self._current, self._data
        if step is None or data is None:
            raise CaptureError("fits were run before they were prepared")
        if step.is_due():
            step = self._look(step, data)
        step.pure.plan.refresh()
        self._state[-1][:, 1] = self._step
        device = self._state[0].device
        losses = torch.full(
            (self.num_fits, num_steps), torch.nan, dtype=step.loss_dtype, device=device
        )
        start = time.perf_counter()
        given = list(batches) or [data]
        compiled = step.compiled_fits(self._state, given) if step.is_native else None
        if compiled is None:
            self._run_replayed(step, given, losses)
        elif isinstance(compiled, NativeFits):
            self._run_native(compiled, losses)
        else:
            self._run_blocks(compiled, losses)
        step.has_run(time.perf_counter() - start)
        self._step += num_steps
        return losses.T

    def _look(self, step: FitsStep, data: FitData) -> FitsStep:
        """Capture the step anew if Python state has changed; else it stays."""
        difference = step.difference()
        if difference is None:
            return step
        self._seen[step] = False
        try:
            self.prepare(data, step.asked_native)
        except TooManyCaptures as error:
            raise CaptureError(f"{changed_outside(difference)}, or {error}") from error
        warnings.warn(
            f"SVI.run: the step of the fits was captured anew, because "
            f"{changed_outside(difference)}",
            FastSVIWarning,
            stacklevel=6,
        )
        return self._current or step

    def _run_native(self, native: NativeFits, losses: Tensor) -> None:
        fits = self.active.nonzero().flatten()
        parts = fits.chunk(max(1, min(torch.get_num_threads(), len(fits))))
        if len(parts) == 1:
            self._run_some(native, parts[0], losses)
            return
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(lambda part: self._run_some(native, part, losses), parts))

    def _run_some(self, native: NativeFits, fits: Tensor, losses: Tensor) -> None:
        """The steps of some fits, of which those that are not finite are left out."""
        if not len(fits):
            return
        num_steps = losses.shape[1]
        found = torch.empty(len(fits), num_steps, dtype=losses.dtype)
        done = native.run(fits, found)
        halted = done < num_steps
        self._failed_in_a_row[fits[~halted]] = 0
        losses[fits[~halted]] = found[~halted]
        for fit, row, count in zip(
            fits[halted].tolist(), found[halted], done[halted].tolist(), strict=True
        ):
            losses[fit, :count] = row[:count]
            self._go_on(native, fit, losses[fit], count)

    def _go_on(self, native: NativeFits, fit: int, losses: Tensor, done: int) -> None:
        """The further steps of a fit after ``done`` of them: the next one is not finite."""
        origin, failed = self._state[-1][fit], self._failed_in_a_row
        failed[fit] = 0 if done else failed[fit]
        while done < len(losses):
            done += 1  # this one is left out
            origin[1] = self._step + done
            failed[fit] += 1
            if failed[fit] >= _HOPELESS:
                self.active[fit] = False
                return
            if done < len(losses):
                rest = losses[done:].unsqueeze(0)
                taken = int(native.run(torch.tensor([fit]), rest, first=done))
                rest[0, taken:] = torch.nan
                failed[fit] = 0 if taken else failed[fit]
                done += taken

    def _run_blocks(self, blocks: BlockFits, losses: Tensor) -> None:
        """The steps of all fits at once, of which those that are not finite are left out."""
        fits = None if bool(self.active.all()) else self.active.nonzero().flatten()
        found, left_out = blocks.run(losses.shape[1], fits)
        found = torch.where(left_out, torch.nan, found)
        if fits is None:
            losses.copy_(found)
        else:
            losses[to_device(fits, losses.device)] = found
        self._count_failures(losses)
        over = (self._failed_in_a_row - _HOPELESS).clamp(min=0)
        if bool(over.any()):  # steps that were taken because many are taken at once
            self._failed_in_a_row -= over
            self._state[-2] -= to_device(over, losses.device)
        self.active &= ~self.hopeless

    def _run_replayed(self, step: FitsStep, given: Sequence[FitData], losses: Tensor) -> None:
        stopped = (~self.active).nonzero().flatten().to(losses.device)
        kept = [tensor[stopped].clone() for tensor in self._state] if len(stopped) else []
        take = step.replayed(self._state, given)
        for number in range(losses.shape[1]):
            found, halts = take(number)
            losses[:, number] = torch.where(halts, torch.nan, found)
        for tensor, rows in zip(self._state, kept, strict=False):
            tensor[stopped] = rows
        if len(stopped):
            losses[stopped] = torch.nan
        self._count_failures(losses)

    def _count_failures(self, losses: Tensor) -> None:
        """Note how many steps of each fit failed in a row up to now: the one look at a device."""
        places = torch.arange(1, losses.shape[1] + 1, device=losses.device)
        latest = (losses.isfinite() * places).amax(1).cpu()
        before = torch.where(latest > 0, 0, self._failed_in_a_row)
        after = before + losses.shape[1] - latest
        self._failed_in_a_row = torch.where(self.active, after, self._failed_in_a_row)

    # ------------------------------------------------------------------------------------ results

    @property
    def hopeless(self) -> Tensor:
        """Which fits have failed so many steps in a row that they are not run any more."""
        return self._failed_in_a_row >= _HOPELESS

    @property
    def is_native(self) -> bool:
        """Whether steps run in compiled form, and are not replayed."""
        return self._current is not None and self._current.is_native

    @property
    def form(self) -> str | None:
        """Of the latest steps: "native", "block" or "replay"; None before there are any."""
        return None if self._current is None else self._current.form

    @property
    def passed_over(self) -> str | None:
        """Why the latest steps are not a generated kernel, on a GPU."""
        return None if self._current is None else self._current.passed_over

    @property
    def obstacle(self) -> str | None:
        """Why the steps are not native; None if they are."""
        return None if self._current is None else self._current.obstacle

    @property
    def skipped(self) -> Tensor:
        """Steps of each fit that were left out because they were not finite, int64 ``[F]``."""
        return self._state[-2].clone()

    def params(self) -> dict[str, Tensor]:
        """Constrained values ``[F, *shape]`` of all parameters, by name."""
        if self._pure is None:
            return {}
        buffer, flat = self._pure.buffer, self._state[0]
        found = PARAM_STORE.constrain_flat(buffer, flat)
        return {name: value.detach().clone() for name, value in found.items()}

    def get_state(self) -> dict[str, Tensor]:
        """Everything that the steps to come depend on, by name; live tensors."""
        named = {f"state/{k}": tensor for k, tensor in enumerate(self._state)}
        count = torch.tensor(self._step)
        return {**named, "active": self.active, "failed": self._failed_in_a_row, "step": count}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Take over the state of as many fits of the same program, which :meth:`prepare` saw."""
        live = self.get_state()
        if {k: v.shape for k, v in live.items()} != {k: v.shape for k, v in state.items()}:
            raise CheckpointError(
                f"the state of {self.num_fits} fits does not fit: found tensors of shapes "
                f"{[tuple(t.shape) for t in state.values()]}, expected "
                f"{[tuple(t.shape) for t in live.values()]}"
            )
        for name, tensor in live.items():
            tensor.copy_(state[name])
        self._step = int(state["step"])

    def select(self, fit: int) -> None:
        """Put the parameters of one fit into the param store."""
        if self._pure is None or not self._state:
            raise ConstraintError("there are no fits yet: call run first")
        if not 0 <= fit < self.num_fits:
            raise ConstraintError(f"fit must be from 0 to {self.num_fits - 1}, found {fit}")
        with self._pure.buffer.write() as flat:
            flat.copy_(self._state[0][fit])
