"""What the file of a run holds, and where a run stands between two steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastsvi.errors import CheckpointError
from fastsvi.infer import program_data
from fastsvi.optim import state_file as optimizer_file
from fastsvi.params import checkpoint
from fastsvi.params import state_file as params_file
from fastsvi.params.checkpoint import refuse

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI

SECTION = "run"
_DAMAGED = "it is damaged; use another copy"


class Point(NamedTuple):
    """Where a run stands between two steps, besides parameters and optimizer."""

    steps: int
    noise: tuple[int, int] | None  # steps of the training and evaluation noise
    generator: Tensor  # state of torch's generator on the CPU


def where(svi: SVI, steps: int) -> Point:
    """Where ``svi`` stands after ``steps`` steps of a run."""
    program = svi._program
    noise = None if program is None else (program.noise.step, program.evaluation_noise.step)
    return Point(steps, noise, torch.get_rng_state())


def go_to(svi: SVI, point: Point) -> None:
    """Set noise and torch's generator to where they stood."""
    program = svi._program
    if program is not None and point.noise is not None:
        program.noise.step, program.evaluation_noise.step = point.noise
    torch.set_rng_state(point.generator)


class SavedRun(NamedTuple):
    """What a file holds."""

    path: str
    steps: int
    is_native: bool
    seed: dict[str, Any] | None
    program: dict[str, Any]
    params: dict[str, Tensor]
    constraints: dict[str, Any]
    optimizer: dict[str, Any]
    fits: dict[str, Tensor] | None  # the state of several fits, in place of the former
    losses: Tensor
    point: Point
    generators: list[Tensor]  # of the GPUs

    @classmethod
    def read(cls, path: str) -> SavedRun:
        """Read a file.

        Raises:
            CheckpointError: it is damaged, or not the file of a run.
        """
        tensors, header = checkpoint.read(path)
        if not isinstance(header, dict) or not isinstance(header.get(SECTION), dict):
            raise refuse(
                path,
                "it holds no run",
                "SVI.run takes up files that were written by SVI.run(..., checkpoint=...); load "
                "parameters alone with fastsvi.get_param_store().load",
            )
        run = header[SECTION]
        steps, noise, generator = run.get("steps"), run.get("noise"), f"{SECTION}/generator"
        losses = tensors.get(f"{SECTION}/losses")
        optimizer = header.get("optimizer")
        is_sound = (
            type(steps) is int
            and losses is not None
            and losses.dim() > 0
            and len(losses) == steps
            and isinstance(run.get("native"), bool)
            and isinstance(run.get("program"), dict)
            and isinstance(optimizer, dict)
            and (run.get("seed") is None or program_data.is_seed(run["seed"]))
            and (noise is None or _are_counts(noise))
            and _is_generator(tensors.get(generator))
        )
        if not is_sound or losses is None:
            raise refuse(path, "what it says of the run is malformed", _DAMAGED)
        params, constraints = params_file.decode(
            tensors, header.get(params_file.SECTION), path, map_location="cpu"
        )
        prefix = f"{SECTION}/fits/"
        fits = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
        gpus = sorted(name for name in tensors if name.startswith(f"{generator}/cuda:"))
        return cls(
            path,
            steps,
            run["native"],
            run.get("seed"),
            run["program"],
            params,
            constraints,
            optimizer_file.decode(optimizer, tensors, path),
            fits or None,
            losses,
            Point(steps, None if noise is None else tuple(noise), tensors[generator]),
            [tensors[name] for name in gpus],
        )

    def require_fitting(self, leaves: Any) -> None:
        """Raise unless the store's leaves of the names in the file have the file's shapes."""
        for name, leaf in leaves:
            value = self.params.get(name)
            if value is not None and value.shape != leaf.shape:
                raise CheckpointError(
                    f"checkpoint {self.path!r}: parameter {name!r} has the unconstrained shape "
                    f"{tuple(value.shape)} there and {tuple(leaf.shape)} in the param store; clear "
                    "the store, or give another path"
                )


def _is_generator(state: Tensor | None) -> bool:
    if state is None or state.dtype != torch.uint8:
        return False
    return state.shape == torch.get_rng_state().shape


def _are_counts(noise: Any) -> bool:
    return (
        isinstance(noise, list)
        and len(noise) == 2
        and all(type(step) is int and 0 <= step < 2**63 for step in noise)
    )
