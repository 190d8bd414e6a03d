"""The whole step of a fit as one native loop: draw, model, gradient, update.

A step of :class:`~fastsvi.infer.SVI` is a function of its state: the flat buffer, the optimizer's
moments and step counts, and the counter of the noise. That function is recorded once and compiled.
Before it is used it takes one step on copies, beside an eager step with the same noise; the two
must agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsvi import settings
from fastsvi.engine.native import NativeStep
from fastsvi.engine.noise import Draw
from fastsvi.engine.noise_op import normal_noise
from fastsvi.errors import CaptureError
from fastsvi.infer.elbo import fused
from fastsvi.infer.util import checking
from fastsvi.kernels import philox
from fastsvi.optim.optim import OptionError
from fastsvi.optim.pure import PureUpdate
from fastsvi.poutine.runtime import PARAM_STORE

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI

# Steps of eager and native form differ by rounding only: some hundred operations in a row, and
# reductions in another order.
_TOLERANCE = 1e-3


class Disagreement(CaptureError):
    """A captured step does not give what the eager step gave, whose ``loss`` this holds."""

    def __init__(self, loss: Tensor, message: str) -> None:
        super().__init__(message)
        self.loss = loss


class _RecordedNoise:
    """Stands in for the noise stream while a step is recorded: key and origin are its inputs."""

    def __init__(self, key: Tensor, origin: Tensor) -> None:
        self.key = key
        self.origin = origin

    def next(
        self, num_particles: int, num_elements: int, dtype: torch.dtype, device: torch.device
    ) -> Draw:
        noise = normal_noise(self.key, self.origin, 1, num_particles, num_elements, dtype)
        return Draw(self.key, self.origin, noise)


class CapturedStep:
    """A step of ``svi`` for fixed arguments, in native form.

    Raises:
        CaptureError: the step cannot be captured; the message says why, and where in the program.
    """

    def __init__(self, svi: SVI, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments = (*args, *kwargs.values())
        self._names = tuple(kwargs)
        program, elbo = svi._program, svi.elbo
        if program is None or elbo is None or not elbo._takes_densities:
            raise CaptureError("this loss is not captured yet; Trace_ELBO is")
        if not fused.applies_to(program) or program.guide.fused() is None:
            raise CaptureError("only automatic guides of the kind of AutoNormal are captured yet")
        self.program = program
        self.guide = program.guide.fused()
        self._plan(svi)
        self._noise_key = philox.derive_key(program.noise.seed.value, program.noise.stream)
        self._origin = philox.make_origin(step=program.noise.step)
        self._one_step = philox.make_origin(step=1)
        self._update = PureUpdate(self.plan)
        self._state = [
            self.buffer.flat,
            *self._update.moments,
            self._update.skipped,
            self._origin,
        ]
        step = self._pure_step(elbo, args, kwargs)
        with checking(False):
            self.native = NativeStep(
                step, self._state, [self._noise_key, *self._update.rates], self._aliases()
            )

    def _plan(self, svi: SVI) -> None:
        leaves = svi._targets.leaves
        places = [PARAM_STORE.locate(leaf) for leaf in leaves]
        buffers = {id(place[0]): place[0] for place in places if place is not None}
        if None in places or len(buffers) != 1:
            raise CaptureError("all parameters must lie in one buffer of the param store")
        (self.buffer,) = buffers.values()
        if self.buffer.device.type != "cpu":
            raise CaptureError("native steps run on the CPU")
        skipped = torch.zeros((), dtype=torch.int64)
        try:
            plans = svi.optim.capture(leaves, skipped)
        except OptionError as error:
            raise CaptureError(str(error)) from error
        (self.plan,) = plans

    def _aliases(self) -> list[tuple[Tensor, Callable[..., Tensor]]]:
        """Parameters, whose memory is a part of the flat buffer: the step's first input."""

        def part(where: slice, shape: torch.Size) -> Callable[..., Tensor]:
            return lambda flat, *rest: flat[where].view(shape)

        aliases = [(slab, part(where, slab.shape)) for slab, where in self._slabs()]
        layout = self.buffer.layout
        for segment, leaf in zip(layout.values(), self.buffer.leaves, strict=True):
            aliases.append((leaf, part(segment.slice, segment.shape)))
        return aliases

    def _slabs(self) -> list[tuple[Tensor, slice]]:
        """The guide's two leaves over all locs and all unconstrained scales, and their places."""
        slabs = (self.guide._loc, self.guide._raw_scale)
        starts = [slab.storage_offset() - self.buffer.flat.storage_offset() for slab in slabs]
        return [
            (slab, slice(start, start + slab.numel()))
            for slab, start in zip(slabs, starts, strict=True)
        ]

    def _pure_step(self, elbo: Any, args: Any, kwargs: Any) -> Callable[..., list[Tensor]]:
        inside = {id(leaf) for leaf in self.guide.leaves}

        def step(flat: Tensor, *rest: Tensor) -> list[Tensor]:
            *moments, skipped, origin, key = rest[: len(self._state)]
            noise: Any = _RecordedNoise(key, origin)
            estimate = fused.estimate(elbo, self.program, args, kwargs, noise)
            if estimate is None:
                raise CaptureError("the model's latent sites are not those that the guide draws")
            others = [leaf for leaf in estimate.leaves if id(leaf) not in inside]
            others = list({id(leaf): leaf for leaf in others}.values())
            slabs = self._slabs()
            targets = [*(slab for slab, _ in slabs), *others]
            gradients = torch.autograd.grad(estimate.surrogate, targets, allow_unused=True)
            places = [*(where for _, where in slabs), *map(self._place, others)]
            grad = _assemble(flat, places, gradients)
            finite = torch.isfinite(grad).all() & torch.isfinite(estimate.loss)
            grad = torch.where(finite, grad, math.nan)  # so that the update skips this step
            new = self._update(flat.detach(), grad, moments, skipped)
            origin = torch.where(finite, origin + self._one_step, origin)
            return [*new, origin, estimate.loss, ~finite]

        return step

    def _place(self, leaf: Tensor) -> slice:
        place = PARAM_STORE.locate(leaf)
        if place is None:
            raise CaptureError("a parameter left the param store while the step was recorded")
        return place[1].slice

    # ------------------------------------------------------------------------------------ running

    def is_current(self) -> bool:
        """Whether buffer, optimizer and noise are still those that the step was made for."""
        noise = self.program.noise
        return (
            self.plan.is_current()
            and self.guide.refresh()
            and noise.seed.is_current
            and settings.get("validate") != "always"
        )

    def serves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the step was captured for these very arguments and is still current."""
        arguments = (*args, *kwargs.values())
        return (
            self._names == tuple(kwargs)
            and len(arguments) == len(self._arguments)
            and all(a is b for a, b in zip(arguments, self._arguments, strict=True))
            and self.native.graph.is_current()
            and self.is_current()
        )

    def run(self, num_steps: int) -> Tensor:
        """Take steps; returns their losses, fewer than asked for if one was not finite."""
        self.plan.refresh()
        self._origin.copy_(philox.make_origin(step=self.program.noise.step))
        losses = self.native.run(num_steps)
        self.program.noise.step += len(losses)
        self.buffer.touch()
        return losses

    def check(self, take_step: Callable[[], Tensor]) -> Tensor:
        """Take one step natively, on copies, and one eagerly; returns the loss of the latter.

        Raises:
            Disagreement: with the loss of the eager step, which has been taken.
        """
        self.plan.refresh()
        self._origin.copy_(philox.make_origin(step=self.program.noise.step))
        copies = [tensor.clone() for tensor in self._state]
        native_loss = self.native.run(1, state=copies)
        before = self.buffer.flat.clone()
        loss = take_step()
        pairs = [("loss", native_loss.reshape(-1), loss.reshape(-1).detach())]
        pairs.append(("change of parameters", copies[0] - before, self.buffer.flat - before))
        for what, native, eager in pairs:
            error = (native - eager).abs().max() if len(native) == len(eager) else torch.inf
            scale = eager.abs().max().clamp(min=1e-6)
            if not bool(error <= _TOLERANCE * scale):
                raise Disagreement(
                    loss,
                    f"the captured step gave another {what} than an eager one with the same noise: "
                    f"largest difference {float(error):g}, largest value {float(scale):g}. "
                    "Something outside of the tensors changes from step to step, such as a Python "
                    "counter; the run goes on eagerly",
                )
        return loss


def _assemble(flat: Tensor, places: list[slice], gradients: Any) -> Tensor:
    """The flat gradient: each gradient in its place, and 0 elsewhere."""
    pieces, end = [], 0
    found = sorted(zip(places, gradients, strict=True), key=lambda pair: pair[0].start)
    for where, gradient in found:
        if where.start > end:
            pieces.append(flat.new_zeros(where.start - end))
        size = where.stop - where.start
        pieces.append(flat.new_zeros(size) if gradient is None else gradient.reshape(-1))
        end = where.stop
    if end < len(flat):
        pieces.append(flat.new_zeros(len(flat) - end))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
