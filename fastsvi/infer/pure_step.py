"""A step of a fit as a pure function of its state, to be recorded.

``(state, inputs) -> (new state, loss, halt)``. The state is the flat buffer, the optimizer's
moments and step counts, and the counter of the noise; the inputs are the keys of the noise, the
learning rates, and those arguments of the program that vary. Everything else that the program
reads is taken for constant by whoever records the function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsvi.engine.noise import PROGRAM, SUBSETS, TRAINING, RecordedNoise
from fastsvi.errors import CaptureError
from fastsvi.infer.arguments import Arguments, Inputs
from fastsvi.infer.elbo.program import all_leaves, total_loss, total_surrogate
from fastsvi.kernels import philox
from fastsvi.optim.optim import OptionError
from fastsvi.optim.pure import PureUpdate
from fastsvi.poutine.runtime import PARAM_STORE

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI

# Particles that run one by one are recorded one by one: from here on that takes too long.
_MAX_SEQUENTIAL = 64

_STREAMS = (TRAINING, PROGRAM, SUBSETS)


class PureStep:
    """The step of ``svi`` for some arguments.

    Args:
        svi: has taken a step, so that all parameters exist.
        arguments: of the program.
        lifted: positions among their leaves of those that are inputs of the step.

    Attributes:
        state: the tensors that a step replaces, the live ones: buffer, moments, origin of noise.
        inputs: the other tensors that it is given.
        aliases: parameters and their places in the buffer; see :func:`~fastsvi.engine.record`.

    Raises:
        CaptureError: the program has no such step; the message says why.
    """

    def __init__(self, svi: SVI, arguments: Arguments, lifted: Sequence[int] = ()) -> None:
        self._arguments = arguments
        self.lifted = Inputs(arguments, lifted)
        program, elbo = svi._program, svi.elbo
        if program is None or elbo is None:
            raise CaptureError("its loss is not an ELBO, or takes its own gradients")
        is_sequential = program.is_sequential or not elbo.vectorize_particles
        if is_sequential and elbo.num_particles > _MAX_SEQUENTIAL:
            raise CaptureError(
                f"its {elbo.num_particles} particles run one after the other; "
                "vectorize_particles=True runs them at once"
            )
        self._program = program
        self._elbo = elbo
        self._fused = _fused_guide(program)
        leaves = svi._targets.leaves
        places = [PARAM_STORE.locate(leaf) for leaf in leaves]
        buffers = {id(place[0]): place[0] for place in places if place is not None}
        if None in places or len(buffers) != 1:
            raise CaptureError(
                "its parameters do not lie in one buffer of the param store: they have different "
                "dtypes or devices, or were never registered by param or module"
            )
        (self.buffer,) = buffers.values()
        self.buffer.sync()
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.buffer.device)
        self._svi, self._optim = svi, svi.optim
        try:
            (self.plan,) = svi.optim.capture(leaves, self.skipped)
        except OptionError as error:
            raise CaptureError(str(error)) from error
        self._update = PureUpdate(self.plan)
        self._version = PARAM_STORE.version
        device = self.buffer.device
        self._noise = program.noise
        self._generation = self._noise.seed.generation
        self.origin = philox.make_origin(step=self._noise.step, device=device)
        self._one_step = philox.make_origin(step=1, device=device)
        seed = self._noise.seed.value
        self._keys = [philox.derive_key(seed, stream, device) for stream in _STREAMS]
        self.state = [self.buffer.flat, *self._update.moments, self._update.skipped, self.origin]
        self.inputs = [*self._keys, *self._update.rates, *self.lifted.tensors]
        self.aliases = self._aliases()

    def __call__(self, flat: Tensor, *rest: Tensor) -> list[Tensor]:
        """New state, loss, and whether the loss or the gradient is not finite.

        The state is then the old one, but for the count of steps left out.
        """
        *moments, skipped, origin = rest[: len(self.state) - 1]
        keys = rest[len(self.state) - 1 :][: len(self._keys)]
        args, kwargs = self._arguments.with_leaves(self.lifted.replaced())
        loss, surrogate, leaves = self._loss(keys, origin, args, kwargs)
        grad = self._gradient(flat, surrogate, leaves)
        if self._update.sees_all:
            # A loss that is not finite makes the gradient so, for which the update looks anyway.
            new = self._update(flat.detach(), grad + loss * 0, moments, skipped)
            halt = new[-1] != skipped
        else:
            halt = ~(torch.isfinite(grad).all() & torch.isfinite(loss))
            grad = torch.where(halt, math.nan, grad)  # so that all parts of the update skip this
            new = self._update(flat.detach(), grad, moments, skipped)
        origin = torch.where(halt, origin, origin + self._one_step)
        return [*new, origin, loss, halt]

    def take(self) -> Tensor:
        """Take the step on the live state, in place; returns its loss.

        Nothing is read back and no memory moves, so that a CUDA graph can hold it. A step that is
        not finite is left out and counted; the noise goes on.
        """
        args, kwargs = self._arguments.with_leaves(self.lifted.replaced())
        loss, surrogate, leaves = self._loss(self._keys, self.origin, args, kwargs)
        grad = self._gradient(self.buffer.flat, surrogate, leaves)
        with torch.no_grad():
            self.buffer.grad.copy_(grad)
            self.buffer.grad[:1].add_(loss * 0)  # a loss that is not finite counts as a gradient
            self.plan.launch()
            self.origin.add_(self._one_step)
        return loss

    def _loss(
        self, keys: Sequence[Tensor], origin: Tensor, args: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Loss, surrogate and the leaves that took part."""
        by_kernel = origin.device.type != "cpu" and origin is self.origin
        streams = dict(zip(_STREAMS, keys, strict=True))
        noise = RecordedNoise(streams, origin, by_kernel=by_kernel)
        estimates = list(
            self._elbo._estimates(self._program, args, kwargs, fast=noise, draws=noise)
        )
        loss, surrogate = total_loss(estimates).detach(), total_surrogate(estimates)
        return loss.reshape(()), surrogate.reshape(()), all_leaves(estimates)

    # -------------------------------------------------------------------------------- parameters

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
        """A fused guide's two leaves over all locs and all unconstrained scales; their places."""
        if self._fused is None:
            return []
        slabs = (self._fused._loc, self._fused._raw_scale)
        starts = [slab.storage_offset() - self.buffer.flat.storage_offset() for slab in slabs]
        return [
            (slab, slice(start, start + slab.numel()))
            for slab, start in zip(slabs, starts, strict=True)
        ]

    def _gradient(self, flat: Tensor, surrogate: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """The flat gradient. A fused guide reads its slabs, an ordinary one its leaves."""
        slabs = self._slabs()
        leaves = list({id(leaf): leaf for leaf in leaves}.values())
        targets = [*(slab for slab, _ in slabs), *leaves]
        places = [*(where for _, where in slabs), *map(self._place, leaves)]
        if not surrogate.requires_grad:
            return torch.zeros_like(flat)
        gradients = torch.autograd.grad(surrogate, targets, allow_unused=True)
        pairs = zip(places, gradients, strict=True)
        return _assemble(flat, [(where, grad) for where, grad in pairs if grad is not None])

    def _place(self, leaf: Tensor) -> slice:
        place = PARAM_STORE.locate(leaf)
        if place is None or place[0] is not self.buffer:
            raise CaptureError("a parameter left the param store while the step was recorded")
        return place[1].slice

    # ------------------------------------------------------------------------------------ running

    def is_current(self) -> bool:
        """Whether program, buffer, optimizer and noise are those that the step was made for."""
        self._svi._follow_changes()
        self.buffer.sync()
        return (
            self._version == PARAM_STORE.version
            and self._svi._program is self._program
            and self._svi.optim is self._optim
            and self.plan.is_current()
            and (self._fused is None or self._fused.refresh())
            and self._noise.seed.is_current
            and self._noise.seed.generation == self._generation
        )

    @property
    def noise_step(self) -> int:
        """How many steps the noise of the fit has gone."""
        return self._noise.step

    @noise_step.setter
    def noise_step(self, step: int) -> None:
        self._noise.step = step

    def begin(self, arguments: Arguments) -> None:
        """Bring learning rates, the counter of the noise and lifted arguments up to date."""
        self.plan.refresh()
        self.origin.copy_(philox.make_origin(step=self._noise.step))
        self.lifted.hold(arguments)

    def advance(self, num_steps: int) -> None:
        """Note that so many steps were taken with this function's state."""
        self._noise.step += num_steps
        self.buffer.touch()


def _fused_guide(program: Any) -> Any:
    if getattr(type(program.guide), "fused", None) is None:
        return None
    return program.guide.fused()


def _assemble(flat: Tensor, parts: Sequence[tuple[slice, Tensor]]) -> Tensor:
    """A tensor like ``flat``: each part in its place, and 0 elsewhere."""
    pieces, end = [], 0
    for where, part in sorted(parts, key=lambda pair: pair[0].start):
        if where.start < end:
            raise CaptureError("the model reads parameters of the guide besides the guide itself")
        if where.start > end:
            pieces.append(flat.new_zeros(where.start - end))
        pieces.append(part.reshape(-1))
        end = where.stop
    if end < len(flat):
        pieces.append(flat.new_zeros(len(flat) - end))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
