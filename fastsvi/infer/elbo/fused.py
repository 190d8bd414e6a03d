"""The fast path: an automatic guide that draws all sites in one operation.

The guide is not run as a program. It gives the values of all latent sites and log q at once, the
model is run on them with one handler that adds up log p, and the loss is ``log q - log p``: the
same estimator as the ordinary path, which remains its reference and takes over whenever something
is out of the ordinary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsvi.engine.noise import NoiseStream, ProgramNoise, RecordedNoise
from fastsvi.infer.elbo import particles
from fastsvi.infer.elbo.program import Estimate, Program
from fastsvi.infer.util import checking
from fastsvi.poutine.log_density import DensityMessenger
from fastsvi.poutine.runtime import STACK
from fastsvi.poutine.subsample_messenger import is_full
from fastsvi.poutine.util import site_is_subsample

if TYPE_CHECKING:
    from fastsvi.infer.elbo.base import ELBO
    from fastsvi.infer.elbo.particles import Chunk


class _OutOfTheOrdinary(Exception):
    """The model's latent sites are not those that the guide draws."""


class _ModelDensity(DensityMessenger):
    """Adds up log p at given values, and notes which parameters the model uses."""

    def __init__(self, values: dict[str, Tensor], plates: dict[str, Any]) -> None:
        super().__init__(values)
        self.plates = plates
        self.leaves: list[Tensor] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg.is_observed:
            return
        name = msg.name
        if name in self.values:
            # Data of another size: the guide's values would silently broadcast.
            if msg.cond_indep_stack != self.plates[name]:
                raise _OutOfTheOrdinary
            msg.value = self.values[name]
            msg.done = True
        elif not site_is_subsample(msg):
            raise _OutOfTheOrdinary

    def _pyro_post_param(self, msg: Any) -> None:
        self.leaves.append(msg.value.unconstrained())


def applies_to(program: Program) -> bool:
    """Whether the fast path may be tried: the guide offers it, and no handler looks on."""
    return not STACK and getattr(type(program.guide), "fused", None) is not None


def estimate(
    elbo: ELBO,
    program: Program,
    args: Any,
    kwargs: Any,
    stream: NoiseStream | RecordedNoise,
    chunk: Chunk,
    draws: ProgramNoise | None,
    shared: particles.Subsets,
) -> Estimate | None:
    """A chunk's share of the loss, or None where the ordinary path must be taken."""
    guide = program.guide.fused()
    if guide is None:
        return None
    values, log_q = guide.draw(chunk.size, stream, chunk.first)
    leaves: list[Tensor] = []
    subsets: dict[str, Any] = {}

    def log_p(values: dict[str, Tensor]) -> Tensor:
        density = _ModelDensity(values, guide.plates)
        with density:
            program.model(*args, **kwargs)
        leaves[:] = density.leaves
        drawn = [(n, s.value) for n, s in density.sites.items() if site_is_subsample(s)]
        subsets.update((name, value) for name, value in drawn if not is_full(value))
        return density.log_joint

    obstacle = None
    with checking(False):
        try:
            if chunk.size == 1:
                with particles.drawing(draws, chunk.first):
                    loss = log_q - log_p(values)
            else:
                if elbo.vectorize_particles and not program.is_sequential:
                    joint, obstacle = particles.over_particles(
                        elbo, program, args, kwargs, chunk, draws, shared, log_p, values
                    )
                if not elbo.vectorize_particles or program.is_sequential or obstacle is not None:
                    each = []
                    for particle, one in enumerate(particles.by_particle(values), chunk.first):
                        with particles.drawing(draws, particle):
                            each.append(log_p(one))
                    joint = torch.stack(each)
                loss = (log_q - joint).mean()
        except _OutOfTheOrdinary:
            return None
    if obstacle is not None:
        particles.warn_sequential(program, obstacle)

    if chunk.size < elbo.num_particles:
        loss = loss * chunk.weight(elbo)
        values = {name: value.detach() for name, value in values.items()}

    def latent_values() -> Iterator[dict[str, Any]]:
        each = iter([values]) if chunk.size == 1 else particles.by_particle(values)
        return ({**one, **subsets} for one in each)

    return Estimate(loss.detach(), loss, [*guide.leaves, *leaves], latent_values)
