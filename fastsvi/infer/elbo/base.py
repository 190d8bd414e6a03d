"""What every estimator of the evidence lower bound (ELBO) has: particles, checks and gradients."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastsvi import settings
from fastsvi.engine.noise import NoiseStream, ProgramNoise, RecordedNoise
from fastsvi.errors import ConstraintError, FastSVIWarning
from fastsvi.infer.elbo import fused, particles
from fastsvi.infer.elbo.program import (
    Estimate,
    Program,
    total_loss,
    total_surrogate,
    values_of,
)
from fastsvi.infer.nonfinite import explain_non_finite
from fastsvi.infer.util import checking, is_finite

# An ELBO may be shared between fits; it remembers what it found out about so many of them.
_MAX_PROGRAMS = 8
# Draws of so many elements fill the time of their operations: more at once only take memory.
_MANY_ELEMENTS = 1 << 19


class ELBOModule(torch.nn.Module):
    """A loss with its model and guide, as a module: what ``ELBO()(model, guide)`` returns.

    Its parameters are those of a model and a guide that are modules; calling it with the model's
    arguments gives the differentiable loss, for use with optimizers of torch.
    """

    def __init__(self, model: Any, guide: Any, elbo: ELBO) -> None:
        super().__init__()
        self.model = model
        self.guide = guide
        self.elbo = elbo

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The differentiable loss, a scalar."""
        return self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)


class ELBO(ABC):
    """Base class of the losses that SVI minimises: estimates of minus the ELBO.

    An estimator implements ``_get_trace``, which runs guide and model once, and
    ``_differentiable_loss_particle``, which makes a loss of the two traces. This class averages
    over particles, checks a program on its first run, and takes gradients.

    Args:
        num_particles: samples in each estimate of the loss and its gradient.
        vectorize_particles: run all particles at once by :func:`torch.func.vmap`. Model and guide
            need no particle plate and see one particle. A program that vmap cannot run is run
            particle by particle, with a warning that names the statement.
        chunk_size: evaluate so many particles at a time, gradient included, and add up: memory is
            then that of one chunk, whatever ``num_particles``. By default all at a time where they
            are vectorised. In :meth:`SVI.run` the result is the same up to rounding.
        max_plate_nesting: not needed; if given, programs with more nested plates are an error.
        retain_graph: keep the autograd graph after the gradient was taken.
        strict_enumeration_warning, ignore_jit_warnings, jit_options, tail_adaptive_beta,
        max_iarange_nesting: accepted for Pyro programs; they change nothing.

    Raises:
        ConstraintError: ``num_particles`` or ``chunk_size`` is not a positive integer.
    """

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = float("inf"),
        max_iarange_nesting: float | None = None,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: dict[str, Any] | None = None,
        retain_graph: bool | None = None,
        tail_adaptive_beta: float = -1.0,
        *,
        chunk_size: int | None = None,
    ) -> None:
        _require_count("num_particles", num_particles)
        if chunk_size is not None:
            _require_count("chunk_size", chunk_size)
        self.num_particles = num_particles
        self.chunk_size = chunk_size
        self.vectorize_particles = vectorize_particles
        self.max_plate_nesting = (
            max_plate_nesting if max_iarange_nesting is None else max_iarange_nesting
        )
        self.strict_enumeration_warning = strict_enumeration_warning
        self.ignore_jit_warnings = ignore_jit_warnings
        self.jit_options = jit_options
        self.retain_graph = retain_graph
        self.tail_adaptive_beta = tail_adaptive_beta
        self._programs: OrderedDict[tuple[int, int], Program] = OrderedDict()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        changed = {"_get_trace", "_differentiable_loss_particle"} & cls.__dict__.keys()
        if changed and "_takes_densities" not in cls.__dict__:
            cls._takes_densities = False

    def __call__(self, model: Any, guide: Any) -> ELBOModule:
        """The loss of ``model`` and ``guide`` as a module of their arguments."""
        return ELBOModule(model, guide, self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": OrderedDict()}

    # ---------------------------------------------------------------------------- to implement

    # Whether the loss is log q - log p where all sites are reparameterised, so that the fast path
    # gives the same. A class that changes the methods below must say so anew.
    _takes_densities = False

    @abstractmethod
    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        """Run the guide, then the model on its values; traces of both, with log-densities."""

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> Any:
        """The loss of one particle and the surrogate whose gradient is wanted, both scalars."""
        raise NotImplementedError(
            f"{type(self).__name__} implements neither _differentiable_loss_particle nor its own "
            f"loss, differentiable_loss and loss_and_grads"
        )

    # --------------------------------------------------------------------------------- results

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """An estimate of minus the ELBO, as a number."""
        program = self.program(model, guide)
        with torch.no_grad():
            estimates = list(self._estimates(program, args, kwargs, fast=program.evaluation_noise))
        program.evaluation_noise.advance()
        loss = total_loss(estimates).item()
        self._warn_if_not_finite(loss, program, args, kwargs, estimates)
        return loss

    def loss_and_surrogate_loss(
        self, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """An estimate of the loss, and a scalar whose gradient estimates that of the loss."""
        program = self.program(model, guide)
        # Not by the fast path: the caller may differentiate with respect to any leaf.
        estimates = list(self._estimates(program, args, kwargs))
        return total_loss(estimates), total_surrogate(estimates)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a scalar that can be differentiated; its gradient is unbiased too."""
        loss, surrogate = self.loss_and_surrogate_loss(model, guide, *args, **kwargs)
        return loss + (surrogate - surrogate.detach())

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss, as a number; adds its gradient to the parameters' ``grad``."""
        program = self.program(model, guide)
        estimates = self.accumulate_grads(program, args, kwargs)
        loss = total_loss(estimates).item()
        self._warn_if_not_finite(loss, program, args, kwargs, estimates)
        return loss

    def accumulate_grads(
        self, program: Program, args: Any, kwargs: Any, *, by_counter: bool = False
    ) -> list[Estimate]:
        """Estimate the loss of a program and add its gradient to the parameters' ``grad``.

        What :class:`~fastsvi.infer.SVI` calls: nothing is read back from an accelerator. This is
        where the steps of the noise are counted; a step that raises does not count.

        Args:
            by_counter: whether what the program draws by its statements comes from the fit's seed
                and step, as in a run, and not from torch's generator.
        """
        draws = most = None
        if by_counter:
            draws = program.draws
            draws.begin()
            most = self._most_at_once(program)
        estimates: list[Estimate] = []
        chunks = particles.chunks(self, most)
        for estimate in self._estimates(program, args, kwargs, program.noise, draws, chunks):
            # Piece by piece, so that only one graph is alive at a time.
            if estimate.leaves and estimate.surrogate.requires_grad:
                estimate.surrogate.backward(retain_graph=self.retain_graph)
            if self.chunk_size is not None or most is not None:
                _forget_values(estimates)
            estimates.append(estimate._replace(surrogate=estimate.loss))
        program.noise.advance()
        return estimates

    def _most_at_once(self, program: Program) -> int | None:
        """How many particles of a wide guide an eager step of a run takes at once."""
        if not (self.vectorize_particles and self._takes_densities and fused.applies_to(program)):
            return None
        guide = program.guide.fused()
        if guide is None or guide.num_elements * self.num_particles <= _MANY_ELEMENTS:
            return None
        return max(1, _MANY_ELEMENTS // guide.num_elements)

    # ------------------------------------------------------------------------------- particles

    def program(self, model: Any, guide: Any) -> Program:
        """What is known of this model and guide."""
        key = id(model), id(guide)  # alive as long as the program is, which refers to them
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = Program(model, guide)
            if len(self._programs) > _MAX_PROGRAMS:
                self._programs.popitem(last=False)
        return program

    def _estimates(
        self,
        program: Program,
        args: Any,
        kwargs: Any,
        fast: NoiseStream | RecordedNoise | None = None,
        draws: ProgramNoise | None = None,
        chunks: Iterable[particles.Chunk] | None = None,
    ) -> Iterator[Estimate]:
        """Estimates whose sum is the estimate of the loss: one for each chunk, or each particle.

        Those of some ``chunks`` only, if these are given. With a stream of noise as ``fast``, by
        the fast path if it applies; the gradient then goes straight to the flat gradient. What the
        program draws comes from ``draws`` if given.
        """
        validate = settings.get("validate")
        must_check = validate == "always" or (validate == "first" and not program.rehearsed)
        at_once = self.vectorize_particles and self.num_particles > 1
        if not (self._takes_densities and fused.applies_to(program)):
            fast = None
        if fast is not None or draws is not None or (at_once and not program.is_sequential):
            if must_check or not program.rehearsed:
                particles.rehearse(self, program, args, kwargs, check=must_check)
            must_check = False
        subsets: particles.Subsets = {}
        for chunk in particles.chunks(self) if chunks is None else chunks:
            shared = (chunk, draws, subsets)
            if fast is not None:
                estimate = fused.estimate(self, program, args, kwargs, fast, *shared)
                if estimate is not None:
                    yield estimate
                    continue
                fast = None
            obstacle: BaseException | None = None
            if at_once and not program.is_sequential:
                estimate, obstacle = particles.estimate_vectorized(
                    self, program, args, kwargs, *shared
                )
                if estimate is not None:
                    yield estimate
                    continue
            for index in range(chunk.first, chunk.first + chunk.size):
                with checking(must_check and (index == 0 or validate == "always")):
                    estimate = particles.estimate_one(self, program, args, kwargs, index, draws)
                program.rehearsed = True
                if obstacle is not None:
                    # Only now is it clear that the program is right and that vmap was the problem.
                    particles.warn_sequential(program, obstacle)
                    obstacle = None
                yield estimate

    def _warn_if_not_finite(
        self, loss: float, program: Program, args: Any, kwargs: Any, estimates: list[Estimate]
    ) -> None:
        if settings.get("validate") == "never" or is_finite(loss):
            return
        where = explain_non_finite(program.model, program.guide, args, kwargs, values_of(estimates))
        warnings.warn(
            f"the loss is {loss}: {where or 'no site is at fault with other draws'}",
            FastSVIWarning,
            stacklevel=3,
        )


def _require_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConstraintError(f"{name} must be an integer >= 1, found {value!r}")


def _forget_values(estimates: list[Estimate]) -> None:
    """Drop the latent values of the latest estimate, before the next one is added.

    They serve to find a site at fault; those of all chunks would take the memory that chunks save.
    """
    if estimates:
        before = estimates[-1]
        if before.loss.device.type != "cpu" or is_finite(before.loss):
            estimates[-1] = before._replace(values=lambda: iter(()))
