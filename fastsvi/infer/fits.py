"""Many independent fits of one program, with own parameters, noise, optimizer state and data.

The step of one fit is captured once. In native form it is then run for one fit after the other, on
as many threads as torch uses; replayed, it runs for all at once under vmap. Nothing passes from one
fit to another, so a fit gives the same numbers alone and among others, and what goes wrong in one
stays there.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsvi.engine import cuda_graph
from fastsvi.engine.native import NativeStep
from fastsvi.engine.native_fits import NativeFits
from fastsvi.engine.record import Graph, record
from fastsvi.engine.replay import ReplayStep, replay
from fastsvi.errors import CaptureError, CheckpointError, ConstraintError
from fastsvi.infer.captured import compare
from fastsvi.infer.fit_data import FitData
from fastsvi.infer.initial_values import initial_values
from fastsvi.infer.pure_step import PureStep
from fastsvi.infer.util import checking
from fastsvi.kernels import dispatch
from fastsvi.poutine.runtime import PARAM_STORE

if TYPE_CHECKING:
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
        obstacle: why the steps are not native; None if they are.
    """

    def __init__(self, svi: SVI, num_fits: int, first_fit: int = 0) -> None:
        for name, value, least in (("num_fits", num_fits, 1), ("first_fit", first_fit, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConstraintError(f"{name} must be an integer >= {least}, found {value!r}")
        self._svi = svi
        self.num_fits = num_fits
        self.first_fit = first_fit
        self.active = torch.ones(num_fits, dtype=torch.bool)
        self._state: list[Tensor] = []  # [F, ...]: flat buffer, moments, skipped, origin
        self._data: FitData | None = None  # that the step was captured for
        self._pure: PureStep | None = None
        self._native: NativeStep | None = None
        self._replay: ReplayStep | None = None
        self._native_fits: NativeFits | None = None
        self._graphed: Any = None  # on a GPU: the launch of a replayed step, and what it gives
        self._failed_in_a_row = torch.zeros(num_fits, dtype=torch.int64)
        self._step = 0
        self._is_native = False  # whether native steps were asked for
        self.obstacle: str | None = None

    # ----------------------------------------------------------------------------------- set up

    def prepare(self, data: FitData, native: bool) -> None:
        """Make the fits, if there are none yet, and capture their step for ``data``.

        Raises:
            CaptureError: the step cannot be captured.
        """
        serves = self._pure is not None and self._pure.is_current() and self._is_native == native
        if serves and self._data is not None and data.has_form_of(self._data):
            self._take(data)
            return
        example = data.of(data.first_finite())
        initial = None
        if not self._state:
            initial = initial_values(self._svi, data, self.num_fits, self.first_fit)
        self._pure = None  # what fails below must not serve the next run
        pure = self._capture(data, example, native)
        if initial is not None:
            self._start(pure, initial)
        self._check(pure, example)
        self._pure = pure
        self._take(data)

    def _capture(self, data: FitData, arguments: Any, native: bool) -> PureStep:
        """Record the step of one fit, with the arguments that fits have of their own as inputs."""
        svi = self._svi
        noise = svi._program.noise if svi._program is not None else None
        step = 0 if noise is None else noise.step
        svi._accumulate(arguments.args, arguments.kwargs)  # makes the store's parameters, too
        svi._targets.zero_grad()
        if noise is not None:
            noise.step = step  # as if nothing had been drawn
        pure = PureStep(svi, arguments, data.own)
        self._data = data
        self._native, self.obstacle, graph = None, None, None
        self._is_native = native
        with checking(False):
            if native and pure.buffer.device.type == "cpu":
                try:
                    self._native = NativeStep(pure, pure.state, pure.inputs, pure.aliases)
                    self._native.build()
                    graph = self._native.graph
                except CaptureError as error:
                    self.obstacle = str(error)
                    self._native = None
            if graph is None:
                with dispatch.use("torch"):  # the reference is pure, Triton's Adam writes in place
                    graph = record(pure, [*pure.state, *pure.inputs], pure.aliases)
        num_shared = len(pure.inputs) - len(data.own)
        own = [True] * len(pure.state) + [False] * num_shared + [True] * len(data.own)
        self._replay = ReplayStep(graph, len(pure.state), own)
        self._graph: Graph = graph
        return pure

    def _start(self, pure: PureStep, initial: dict[str, Tensor]) -> None:
        """Lay out the state of all fits as the captured step expects it."""
        count, device = self.num_fits, pure.buffer.device
        self._state = [t.detach().unsqueeze(0).repeat(count, *(1,) * t.dim()) for t in pure.state]
        flat, origin = self._state[0], self._state[-1]
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

    def _check(self, pure: PureStep, arguments: Any) -> None:
        """Compare a captured with an eager step of the example, and take both back."""
        live = [*pure.state, *pure.plan.state]
        before = [tensor.clone() for tensor in live]
        noise_step = pure.noise_step

        def captured(state: list[Tensor]) -> Tensor:
            if self._native is not None:
                return self._native.run(1, state=state)
            outputs = replay(self._graph, [*state, *pure.inputs])
            for old, new in zip(state, outputs, strict=False):
                old.copy_(new)
            return outputs[-2]

        try:
            compare(pure, arguments, captured, lambda: self._eager_step(arguments))
        finally:
            with torch.no_grad():
                for tensor, value in zip(live, before, strict=True):
                    tensor.copy_(value)
            pure.buffer.touch()
            pure.noise_step = noise_step

    def _eager_step(self, arguments: Any) -> Tensor:
        loss: Tensor = self._svi._advance(arguments.args, arguments.kwargs, by_counter=True)
        return loss

    def _take(self, data: FitData) -> None:
        """Use the arguments in ``data`` from here on, with all fits."""
        self.active = torch.ones(self.num_fits, dtype=torch.bool)
        self._failed_in_a_row = torch.zeros(self.num_fits, dtype=torch.int64)
        self._slices = data.slices()
        self._graphed = None
        pure = self._pure
        if self._native is not None and pure is not None:
            num_shared = len(pure.inputs) - len(self._slices)
            inputs = [*pure.inputs[:num_shared], *self._slices]
            is_own = [False] * num_shared + [True] * len(self._slices)
            self._native_fits = NativeFits(self._native, self._state, inputs, is_own)

    # ------------------------------------------------------------------------------------ running

    def run(self, num_steps: int) -> Tensor:
        """Take steps with all active fits; returns their losses ``[steps, F]``.

        The loss of a step that was left out, and of a fit that is not active, is NaN.
        """
        pure = self._pure
        if pure is None:
            raise CaptureError("fits were run before they were prepared")
        pure.plan.refresh()
        self._state[-1][:, 1] = self._step
        dtype = self._graph.outputs[-2].dtype
        losses = torch.full((self.num_fits, num_steps), torch.nan, dtype=dtype)
        if self._native is None:
            losses = losses.to(pure.buffer.device)
            self._run_replayed(losses)
        else:
            self._run_native(losses)
        self._step += num_steps
        return losses.T

    def _run_native(self, losses: Tensor) -> None:
        fits = self.active.nonzero().flatten()
        parts = fits.chunk(max(1, min(torch.get_num_threads(), len(fits))))
        if len(parts) == 1:
            self._run_some(parts[0], losses)
            return
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(lambda part: self._run_some(part, losses), parts))

    def _run_some(self, fits: Tensor, losses: Tensor) -> None:
        """The steps of some fits, of which those that are not finite are left out."""
        native, num_steps = self._native_fits, losses.shape[1]
        if native is None or not len(fits):
            return
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
                taken = int(native.run(torch.tensor([fit]), rest))
                rest[0, taken:] = torch.nan
                failed[fit] = 0 if taken else failed[fit]
                done += taken

    def _run_replayed(self, losses: Tensor) -> None:
        stopped = (~self.active).nonzero().flatten().to(losses.device)
        kept = [tensor[stopped].clone() for tensor in self._state] if len(stopped) else []
        take = self._replayed_step()
        for step in range(losses.shape[1]):
            found, halts = take()
            losses[:, step] = torch.where(halts, torch.nan, found)
        for tensor, rows in zip(self._state, kept, strict=False):
            tensor[stopped] = rows
        if len(stopped):
            losses[stopped] = torch.nan
        places = torch.arange(1, losses.shape[1] + 1, device=losses.device)
        latest = (losses.isfinite() * places).amax(1).cpu()  # the one look at the device
        before = torch.where(latest > 0, 0, self._failed_in_a_row)
        self._failed_in_a_row = before + losses.shape[1] - latest

    def _replayed_step(self) -> Callable[[], tuple[Tensor, Tensor]]:
        """A function that takes one step with all fits: losses ``[F]``, and which were left out."""
        replay, pure = self._replay, self._pure
        if replay is None or pure is None:
            raise CaptureError("fits were run before they were prepared")
        num_shared = len(pure.inputs) - len(self._slices)
        inputs = [*pure.inputs[:num_shared], *self._slices]
        outcome: list[Any] = []

        def take() -> None:
            following = self._state[-1][:, 1] + 1  # the noise goes on where a step is left out too
            outcome[:] = replay.step(self._state, inputs)
            self._state[-1][:, 1] = following

        if pure.buffer.device.type == "cuda":
            if self._graphed is None:
                before = [tensor.clone() for tensor in self._state]
                launch = cuda_graph.capture(take)  # what it returns lies in the graph's memory
                for tensor, value in zip(self._state, before, strict=True):
                    tensor.copy_(value)
                self._graphed = launch, outcome
            launch, outcome = self._graphed
        else:
            launch = take

        def step() -> tuple[Tensor, Tensor]:
            launch()
            return outcome[0], outcome[1]

        return step

    # ------------------------------------------------------------------------------------ results

    @property
    def hopeless(self) -> Tensor:
        """Which fits have failed so many steps in a row that they are not run any more."""
        return self._failed_in_a_row >= _HOPELESS

    @property
    def is_native(self) -> bool:
        """Whether steps run as native loops, and are not replayed."""
        return self._native is not None

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
