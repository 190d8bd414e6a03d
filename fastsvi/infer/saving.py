"""Saving a run to a file as it goes, and taking it up again in another process.

A step depends on parameters, optimizer, seed and number of the step, and on torch's generators
where a program draws from them; with these in the file the steps that follow are, to the bit, those
of a run that was never interrupted. The file is that of :mod:`fastsvi.params.checkpoint`, with
the sections that ``ParamStore.load`` and ``PyroOptim.load`` read, and one about the run.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsvi.errors import CheckpointError, ConstraintError, FastSVIWarning, describe
from fastsvi.infer import program_data
from fastsvi.infer.progress import Losses
from fastsvi.infer.saved_run import SECTION, Point, SavedRun, go_to, where
from fastsvi.infer.targets import Undo
from fastsvi.optim import state_file as optimizer_file
from fastsvi.params import checkpoint
from fastsvi.params import state_file as params_file
from fastsvi.params.checkpoint import PathLike
from fastsvi.poutine.runtime import PARAM_STORE

if TYPE_CHECKING:
    from fastsvi.infer.fits_runner import FitsRunner
    from fastsvi.infer.runner import Runner
    from fastsvi.infer.svi import SVI


class Saving:
    """Keeps the file of a run.

    Args:
        svi: the fit.
        path: of the file.
        every: seconds between saves.
        losses: of the run, appended to as it goes.

    Raises:
        ConstraintError: ``every`` is no number of seconds.
        CheckpointError: there can be no file at ``path``.
    """

    def __init__(self, svi: SVI, path: PathLike, every: float, losses: Losses) -> None:
        self.path = os.fspath(path)
        if isinstance(every, bool) or not isinstance(every, (int, float)) or not every >= 0:
            raise ConstraintError(
                f"checkpoint_every is a number of seconds >= 0, found {describe(every)}"
            )
        folder = os.path.dirname(os.path.realpath(self.path))
        if os.path.isdir(self.path) or not os.path.isdir(folder):
            problem = "it is a folder" if os.path.isdir(self.path) else f"{folder!r} is no folder"
            raise CheckpointError(
                f"checkpoint={self.path!r} cannot be written: {problem}. Give the path of a file "
                "in a folder that exists."
            )
        self._svi = svi
        self._every = every
        self._losses = losses
        self._program: dict[str, Any] | None = None
        self._point: Point | None = None
        self._is_native = False
        self._saved_steps = 0
        self._saved_at = time.monotonic()

    # ---------------------------------------------------------------------------------- saving

    def note(self, runner: Runner | FitsRunner) -> None:
        """Note that a step has been completed: where the run stands if the next one fails.

        Raises:
            CheckpointError: something cannot be saved.
        """
        point = where(self._svi, len(self._losses))
        self._is_native = runner.is_native
        if self._program is None:
            self._program = program_data.of_fit(self._svi)
            self._contents(point)  # what cannot be saved is found now, and not after an hour
        self._point = point

    def is_due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._saved_at >= self._every

    def save(self) -> None:
        """Write the file. A full disk must not end the run: it warns, and the old file stays."""
        if self._point is None or self._point.steps == self._saved_steps:
            return
        try:
            checkpoint.write(self.path, *self._contents(self._point))
        except OSError as error:
            warnings.warn(
                f"SVI.run: checkpoint {self.path!r} could not be written ({error}); the run goes "
                f"on, and the file is still that of step {self._saved_steps}",
                FastSVIWarning,
                stacklevel=3,
            )
        else:
            self._saved_steps = self._point.steps
        self._saved_at = time.monotonic()

    def _contents(self, point: Point) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of the file."""
        svi = self._svi
        params: Any
        optimizer: Any
        if svi._fits is None:
            tensors, params = params_file.encode(PARAM_STORE.get_state(), self.path)
            optimizer, moments = optimizer_file.encode(svi.optim.get_state())
            tensors |= moments
        else:  # the store holds but an example of them
            params, optimizer = [], {}
            state = svi._fits.get_state()
            tensors = {f"{SECTION}/fits/{name}": tensor for name, tensor in state.items()}
        run = {
            "steps": point.steps,
            "native": self._is_native,
            "noise": point.noise,
            "seed": program_data.seed(svi),
            "program": self._program,
        }
        tensors[f"{SECTION}/losses"] = self._losses.stack()[: point.steps]
        tensors[f"{SECTION}/generator"] = point.generator
        if torch.cuda.is_initialized():
            for index, gpu in enumerate(torch.cuda.get_rng_state_all()):
                tensors[f"{SECTION}/generator/cuda:{index}"] = gpu
        return tensors, {params_file.SECTION: params, "optimizer": optimizer, SECTION: run}

    # -------------------------------------------------------------------------------- resuming

    def resume(
        self, make: Callable[[], Runner | FitsRunner], num_steps: int
    ) -> Runner | FitsRunner:
        """What ``make`` returns, to go on with the run that the file holds, if there is one.

        Raises:
            CheckpointError: the file cannot be read, or was saved by another program, or holds
                more than ``num_steps`` steps; nothing has changed.
        """
        if not os.path.exists(self.path):
            return make()
        saved = SavedRun.read(self.path)
        if saved.steps > num_steps:
            raise CheckpointError(
                f"checkpoint {self.path!r} holds {saved.steps} steps, more than the {num_steps} "
                "asked for. Ask for as many or more, or give another path."
            )
        runner = self._rehearse(saved, make)
        self._restore(saved)
        if saved.is_native and saved.steps < num_steps:
            runner.take_up()
            self._restore_noise(saved)
        device = self._svi._targets.leaves[0].device if self._svi._targets.leaves else None
        self._losses.extend(saved.losses.to(device))
        self._saved_steps = saved.steps
        self._program = saved.program
        return runner

    def _rehearse(
        self, saved: SavedRun, make: Callable[[], Runner | FitsRunner]
    ) -> Runner | FitsRunner:
        """Run the program once, without an update, so that its parameters are there; compare."""
        svi = self._svi
        svi._follow_changes()
        before = where(svi, 0)
        owners = [owner for owner in (svi._program, svi._fits) if owner is not None]
        known = [dict(vars(owner)) for owner in owners]

        def put_back() -> None:
            for owner, values in zip(owners, known, strict=True):
                vars(owner).update(values)
            go_to(svi, before)

        with contextlib.ExitStack() as after_failure:
            after_failure.callback(put_back)
            with Undo():
                program_data.adopt_seed(svi, saved.seed, self.path)
                runner = make()
                arguments = runner.skip(saved.steps)
                if arguments is not None:
                    svi._accumulate(arguments.args, arguments.kwargs, by_counter=True)
                program_data.require_same(
                    saved.program, program_data.of_fit(svi), self.path, late=saved.params
                )
                saved.require_fitting(PARAM_STORE.named_parameters())
            after_failure.pop_all()
        svi._targets.zero_grad()
        return runner

    def _restore(self, saved: SavedRun) -> None:
        svi = self._svi
        if svi._fits is not None and saved.fits is not None:
            svi._fits.set_state(saved.fits)
            self._restore_noise(saved)
            return
        leaves: dict[str, Tensor] = dict(PARAM_STORE.named_parameters())
        svi.optim.set_state(saved.optimizer)
        with torch.no_grad():
            for name in leaves.keys() & saved.params.keys():
                leaves[name].copy_(saved.params[name])
        late = [name for name in saved.params if name not in leaves]
        if late:
            PARAM_STORE.set_state(
                {
                    "params": {name: saved.params[name] for name in late},
                    "constraints": {name: saved.constraints[name] for name in late},
                }
            )
        self._restore_noise(saved)

    def _restore_noise(self, saved: SavedRun) -> None:
        go_to(self._svi, saved.point)
        if saved.generators and torch.cuda.is_initialized():
            torch.cuda.set_rng_state_all(saved.generators[: torch.cuda.device_count()])
