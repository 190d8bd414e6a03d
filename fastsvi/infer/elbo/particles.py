"""Running a program for one particle, or for all of them at once under :func:`torch.func.vmap`.

vmap sees the program once, with tensors that stand for all particles. Three things must not happen
there, because they concern the step and not a particle: a plate's random subset is drawn once and
shared; a parameter that does not exist yet is made by an ordinary run; and whatever vmap cannot run
sends the program to the ordinary loop, with a warning that says where and why.
"""

from __future__ import annotations

import linecache
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastsvi import poutine
from fastsvi.distributions.noise import current_source, drawn_from
from fastsvi.engine.noise import ProgramNoise
from fastsvi.errors import FastSVIWarning
from fastsvi.infer.elbo.program import Estimate, Program, leaves_of
from fastsvi.infer.memory import is_out_of_memory
from fastsvi.infer.util import checking
from fastsvi.poutine import Messenger
from fastsvi.poutine.runtime import PARAM_STORE
from fastsvi.poutine.subsample_messenger import MANY, stand_in
from fastsvi.poutine.util import site_is_subsample

if TYPE_CHECKING:
    from fastsvi.infer.elbo.base import ELBO

# What a program may raise under vmap although it runs well without.
_VMAP_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)

_LIBRARIES = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(poutine.__file__)))


class Chunk(NamedTuple):
    """The particles from ``first`` on, ``size`` of them, that are evaluated at once."""

    first: int
    size: int

    def weight(self, elbo: ELBO) -> float:
        """Share of all particles of the estimate."""
        return self.size / elbo.num_particles


def chunks(elbo: ELBO, most: int | None = None) -> Iterator[Chunk]:
    """All particles of an estimate, in pieces of ``elbo.chunk_size``, of ``most`` at most."""
    size = min(elbo.chunk_size or elbo.num_particles, most or elbo.num_particles)
    for first in range(0, elbo.num_particles, size):
        yield Chunk(first, min(size, elbo.num_particles - first))


def drawing(draws: ProgramNoise | None, particle: int) -> AbstractContextManager[None]:
    """Have a particle draw from ``draws``, or from torch's generator."""
    return drawn_from(None if draws is None else draws.of_particle(particle))


class _RunAhead(Exception):
    """Leaves vmap because something must be done once for all particles."""

    def __init__(self, kind: str, name: str, fn: Any = None) -> None:
        super().__init__(f"{kind} {name!r}")
        self.kind = kind
        self.name = name
        self.fn = fn


# By plate: the distribution that a random subset was drawn from, and the subset.
Subsets = dict[str, tuple[Any, Tensor]]


class _SharedByParticles(Messenger):
    """Under vmap: hands out the subsets of this step, and lets no parameter be made."""

    def __init__(self, subsets: Subsets) -> None:
        super().__init__()
        self.subsets = subsets

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) or msg.value is not None:
            return
        if current_source() is not None:
            return  # which gives all particles the same subset
        fn = msg.fn
        if fn.subsample_size >= fn.size:
            return
        known, subset = self.subsets.get(msg.name, (None, None))
        if known is None or known.size != fn.size or known.subsample_size != fn.subsample_size:
            raise _RunAhead("plate", msg.name, fn)
        msg.value = subset

    def _pyro_param(self, msg: Any) -> None:
        if msg.value is None and msg.name not in PARAM_STORE:
            raise _RunAhead("parameter", msg.name)


class _WithoutIndices(Messenger):
    """Keeps large plates that show everything from noting that: it takes more than a parameter."""

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg.value is None and not msg.done:
            plate = msg.fn
            if plate.subsample_size == plate.size >= MANY:
                msg.value = stand_in(plate.size, plate.device)


def rehearse(
    elbo: ELBO, program: Program, args: Any, kwargs: Any, *, check: bool
) -> Sequence[Tensor]:
    """Run guide and model once for their effects: parameters, and errors if ``check``.

    Returns the parameters.

    A rehearsal that only checks leaves torch's generator where it was. One that makes parameters
    must not: the next draws would repeat the numbers that the parameters were made of.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        torch.random.fork_rng(devices, enabled=check and program.rehearsed),
        torch.no_grad(),
        poutine.block(),
        _WithoutIndices(),
        checking(check),
    ):
        model_trace, guide_trace = elbo._get_trace(program.model, program.guide, args, kwargs)
    program.rehearsed = True
    return leaves_of(guide_trace, model_trace)


def estimate_one(
    elbo: ELBO,
    program: Program,
    args: Any,
    kwargs: Any,
    particle: int = 0,
    draws: ProgramNoise | None = None,
) -> Estimate:
    """One particle's share of the loss."""
    with drawing(draws, particle):
        model_trace, guide_trace = elbo._get_trace(program.model, program.guide, args, kwargs)
    loss, surrogate = elbo._differentiable_loss_particle(model_trace, guide_trace)
    values = latent_values(model_trace, guide_trace)
    if elbo.num_particles > 1:
        weight = 1.0 / elbo.num_particles
        loss, surrogate = loss * weight, surrogate * weight
        # Kept until the last particle is done, so they must not hold their particle's graph.
        values = {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}
    return Estimate(loss, surrogate, leaves_of(guide_trace, model_trace), lambda: iter([values]))


def estimate_vectorized(
    elbo: ELBO,
    program: Program,
    args: Any,
    kwargs: Any,
    chunk: Chunk,
    draws: ProgramNoise | None,
    subsets: Subsets,
) -> tuple[Estimate | None, BaseException | None]:
    """A chunk's share of the loss, at once, or the error for which it must be done in a loop."""
    leaves: list[Tensor] = []

    def particle() -> tuple[Tensor, Tensor, dict[str, Any]]:
        nonlocal leaves
        model_trace, guide_trace = elbo._get_trace(program.model, program.guide, args, kwargs)
        loss, surrogate = elbo._differentiable_loss_particle(model_trace, guide_trace)
        leaves = leaves_of(guide_trace, model_trace)
        values = latent_values(model_trace, guide_trace)
        return loss, surrogate, {k: v for k, v in values.items() if isinstance(v, Tensor)}

    outcome, obstacle = over_particles(elbo, program, args, kwargs, chunk, draws, subsets, particle)
    if obstacle is not None:
        return None, obstacle
    loss, surrogate, values = outcome
    loss, surrogate = loss.mean(), surrogate.mean()
    if chunk.size < elbo.num_particles:
        loss, surrogate = loss * chunk.weight(elbo), surrogate * chunk.weight(elbo)
        # Kept until the last chunk is done, so they must not hold their chunk's graph.
        values = {name: value.detach() for name, value in values.items()}
    return Estimate(loss, surrogate, leaves, lambda: by_particle(values)), None


def over_particles(
    elbo: ELBO,
    program: Program,
    args: Any,
    kwargs: Any,
    chunk: Chunk,
    draws: ProgramNoise | None,
    subsets: Subsets,  # of this step as far as drawn; more may be added
    particle: Callable[..., Any],
    *inputs: Any,  # pytrees of tensors [P, ...]
) -> tuple[Any, BaseException | None]:
    """``particle`` mapped over its inputs, or the error for which it must be called in a loop."""

    def one(index: Tensor, *values: Any) -> Any:
        source = None
        if draws is not None:
            source = draws.of_particles(index, chunk.size, chunk.first)
        with drawn_from(source):
            return particle(*values)

    index = torch.arange(chunk.size)  # vmap must be given something to map over
    mapped = torch.func.vmap(one, randomness="different")
    if draws is None:
        for name, fn in program.subsamples.items():
            if name not in subsets:
                subsets[name] = fn, fn.sample()
    asked: set[str] = set()
    while True:
        try:
            with checking(False), _SharedByParticles(subsets):
                return mapped(index, *inputs), None
        except _RunAhead as request:
            if str(request) in asked:
                return None, request
            asked.add(str(request))
            if request.kind == "plate":
                program.subsamples[request.name] = request.fn
                subsets[request.name] = request.fn, request.fn.sample()
            else:
                rehearse(elbo, program, args, kwargs, check=False)
        except _VMAP_ERRORS as error:
            if is_out_of_memory(error):  # a loop over particles would hide it
                raise
            return None, error


def warn_sequential(program: Program, obstacle: BaseException) -> None:
    """Note that ``program`` must run particle by particle, and say why, once."""
    program.is_sequential = True
    reason = str(obstacle).strip().split("\n")[0]
    warnings.warn(
        f"vectorize_particles: the particles run one after the other, because torch.func.vmap "
        f"cannot run {_statement(obstacle)}: {reason} To vectorize, write this without reading a "
        f"tensor's value (torch.where for an if); or leave vectorize_particles off.",
        FastSVIWarning,
        stacklevel=5,
    )


def _statement(error: BaseException) -> str:
    """The innermost statement outside of torch and fastsvi that led to ``error``, and its site."""
    where, site = "the program", None
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if not code.co_filename.startswith(_LIBRARIES):
            source = linecache.getline(code.co_filename, line).strip()
            where, site = f"{code.co_filename}:{line} in {code.co_name}: `{source}`", None
        elif code.co_name == "sample" and isinstance(frame.f_locals.get("name"), str):
            site = frame.f_locals["name"]
    return where if site is None else f"site {site!r} ({where})"


def latent_values(*traces: Any) -> dict[str, Any]:
    """Values of all sites that were not observed, random subsets included."""
    return {
        name: site["value"]
        for trace in traces
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"]
    }


def by_particle(values: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Split values with a leading particle axis ``[P, ...]`` into one dict per particle."""
    for parts in zip(*values.values(), strict=True):
        yield dict(zip(values, parts, strict=True))
