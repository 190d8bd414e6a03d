"""Where each of many fits starts.

What a fit draws for its initial values depends on the seed and its number alone. Making the
parameters of one fit is recorded and replayed for all at once under vmap; a program that cannot be
recorded, one that looks at values say, is run fit by fit with the same noise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsvi import settings
from fastsvi.distributions.noise import drawn_from
from fastsvi.engine.noise import PROGRAM, SUBSETS, TRAINING, RecordedNoise
from fastsvi.engine.record import record
from fastsvi.engine.replay import replay
from fastsvi.errors import CaptureError
from fastsvi.infer.elbo import particles
from fastsvi.infer.fit_data import FitData
from fastsvi.kernels import philox
from fastsvi.poutine.runtime import PARAM_STORE

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI

# Streams of the noise that are not those of the steps.
_INITIAL = {TRAINING: 0x1700, PROGRAM: 0x1701, SUBSETS: 0x1702}


def initial_values(svi: SVI, data: FitData, num_fits: int, first_fit: int) -> dict[str, Tensor]:
    """Unconstrained initial values ``[F, *shape]`` of every parameter, by name.

    Parameters that are in the param store already are the start of all fits.
    """
    with _as_pristine(svi) as make:
        seed = svi._program.noise.seed.value  # type: ignore[union-attr]
        example = data.of(data.first_finite())
        device = _device_of(example)
        keys = {
            stream: philox.derive_key(seed, number, device) for stream, number in _INITIAL.items()
        }

        def start(origin: Tensor, arguments: Any) -> dict[str, Tensor]:
            with drawn_from(RecordedNoise(keys, origin).of_particle(0)):
                return make(arguments)

        each_fit = [philox.make_origin(fit=first_fit + fit) for fit in range(num_fits)]
        origins = torch.stack(each_fit).to(device)
        names: list[str] = []

        def recorded(origin: Tensor, *slices: Tensor) -> list[Tensor]:
            values = start(origin, example)
            names[:] = values
            return list(values.values())

        slices = [example.leaves[position] for position in data.own]
        try:
            graph = record(recorded, [origins[0], *slices], keeps=True)
        except CaptureError:
            graph = None
        if graph is not None:
            rows = torch.func.vmap(lambda *inputs: tuple(replay(graph, inputs)))(
                origins, *data.slices()
            )
            found = dict(zip(names, rows, strict=True))
            last = start(origins[-1], data.of(num_fits - 1))
            if _agree({name: row[-1] for name, row in found.items()}, last):
                return found
        each = [start(origin, data.of(fit)) for fit, origin in enumerate(origins)]
        return {name: torch.stack([values[name] for values in each]) for name in each[0]}


def _agree(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether a replay gives what the program gave: it took nothing wrongly for constant."""
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape
        and torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5, equal_nan=True)
        for name in one
    )


def _device_of(arguments: Any) -> torch.device:
    """Where parameters are made, as far as arguments tell: with the first on an accelerator."""
    devices = [leaf.device for leaf in arguments.leaves if isinstance(leaf, Tensor)]
    elsewhere = (device for device in devices if device.type != "cpu")
    return next(elsewhere, torch.get_default_device())


@contextmanager
def _as_pristine(svi: SVI) -> Iterator[Any]:
    """Gives a function of arguments that makes the parameters of a fit and returns them.

    The guide is copied each time, for one that was called has its parameters; the store is another
    one meanwhile.
    """
    program, elbo = svi._program, svi.elbo
    if program is None or elbo is None:
        raise CaptureError("its loss is not an ELBO, or takes its own gradients")
    guide = program.guide
    present = {name: leaf.detach().clone() for name, leaf in PARAM_STORE.named_parameters()}
    rehearsed = program.rehearsed

    def make(arguments: Any) -> dict[str, Tensor]:
        PARAM_STORE.clear()
        program.guide = copy.deepcopy(guide) if isinstance(guide, torch.nn.Module) else guide
        particles.rehearse(elbo, program, arguments.args, arguments.kwargs, check=False)
        leaves = dict(PARAM_STORE.named_parameters())
        return {name: present.get(name, leaf.detach()) for name, leaf in leaves.items()}

    with PARAM_STORE.scope(), settings.context(validate="never"):
        try:
            yield make
        finally:
            program.guide, program.rehearsed = guide, rehearsed
