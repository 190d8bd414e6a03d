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

from fastsvi.engine.graph_loop import to_device
from fastsvi.engine.noise import PROGRAM, SUBSETS, TRAINING, RecordedNoise
from fastsvi.engine.pages import zero_pages
from fastsvi.engine.rounds import round_number, sum_of_rounds
from fastsvi.errors import CaptureError
from fastsvi.infer.arguments import Arguments, Inputs
from fastsvi.infer.elbo.particles import Chunk
from fastsvi.infer.elbo.program import all_leaves, total_loss, total_surrogate
from fastsvi.kernels import dispatch, philox
from fastsvi.optim.optim import OptionError
from fastsvi.optim.pure import PureUpdate
from fastsvi.poutine.runtime import PARAM_STORE

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI

# More particles that run one by one become a loop; where there is no loop, so many take too long.
_UNROLLED, _MAX_UNROLLED = 8, 64

_FAR = 1 << 31

# Parameters of which another copy is a matter of memory.
WIDE = 1 << 20

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
        kind: of the device, "cpu" or "cuda".
        generation: of the seed of the noise.
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
        self.kind = kind_of(self.buffer.device)
        self._is_sequential = program.is_sequential or not elbo.vectorize_particles
        self._size = elbo.chunk_size or elbo.num_particles  # particles at once
        # Of these, how many in a round of a loop.
        self._round = 1 if self._is_sequential and self._size > _UNROLLED else self._size
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
        self._noise.follow_seed()
        self.generation = self._noise.seed.generation
        # Recorded at a step far from the one that it is checked at: what is frozen must show.
        self.origin = philox.make_origin(step=self._noise.step ^ _FAR, device=device)
        self._one_step = philox.make_origin(step=1, device=device)
        seed = self._noise.seed.value
        self._keys = [philox.derive_key(seed, stream, device) for stream in _STREAMS]
        self.state = [self.buffer.flat, *self._update.moments, self._update.skipped, self.origin]
        self.inputs = [*self._keys, *self._update.rates, *self.lifted.tensors]
        self.aliases = self._aliases()

    def __call__(self, flat: Tensor, *rest: Tensor) -> list[Tensor]:
        """New state, loss, and whether the loss or the gradient is not finite.

        The state is then the old one, but for the count of steps left out; and for the counter of
        the noise where nobody looks before the next step.
        """
        *moments, skipped, origin = rest[: len(self.state) - 1]
        keys = rest[len(self.state) - 1 :][: len(self._keys)]
        args, kwargs = self._arguments.with_leaves(self.lifted.replaced())
        loss, grad = self._total(flat, keys, origin, args, kwargs, looped=True)
        if self._update.sees_all and self.kind == "cuda":
            # The update looks at the gradient. That pass is not to wait for the loss as well.
            new = self._update(flat.detach(), grad, moments, skipped)
            fine = torch.isfinite(loss)
            before = [flat.detach(), *moments, skipped + 1]
            new = [torch.where(fine, x, old) for x, old in zip(new, before, strict=True)]
            halt = new[-1] != skipped
        elif self._update.sees_all:
            # A loss that is not finite makes the gradient so, for which the update looks anyway.
            new = self._update(flat.detach(), grad + loss * 0, moments, skipped)
            halt = new[-1] != skipped
        else:
            halt = ~(torch.isfinite(grad).all() & torch.isfinite(loss))
            grad = torch.where(halt, math.nan, grad)  # so that all parts of the update skip this
            new = self._update(flat.detach(), grad, moments, skipped)
        following = origin + self._one_step
        if self.kind == "cpu":  # there a step that halts ends the run
            following = torch.where(halt, origin, following)
        return [*new, following, loss, halt]

    def loss_and_gradient(self, flat: Tensor, *rest: Tensor) -> list[Tensor]:
        """The loss, and the flat gradient in pieces, from the arguments of a call.

        For back ends whose update writes in place, by :meth:`update`.

        Raises:
            CaptureError: too many particles run one after the other.
        """
        self.refuse_rounds()
        origin, *others = rest[len(self.state) - 2 :]
        args, kwargs = self._arguments.with_leaves(self.lifted.replaced())
        keys = others[: len(self._keys)]
        if self._elbo.num_particles > self._size:
            return [*self._total(flat, keys, origin, args, kwargs, looped=False)]
        loss, surrogate, leaves = self._loss(keys, origin, args, kwargs)
        return [loss, *self._gradient_pieces(flat, surrogate, leaves)]

    def refuse_rounds(self) -> None:
        """Raise an error if the step has more rounds than can be done one after the other."""
        if self._is_sequential and self._elbo.num_particles > _MAX_UNROLLED:
            raise CaptureError(
                f"its {self._elbo.num_particles} particles run one after the other; "
                "vectorize_particles=True runs them at once"
            )

    def update(self, loss: Tensor, pieces: list[Tensor]) -> None:
        """Update the live state in place, and count the step.

        Nothing is read back and no memory moves, so that a CUDA graph can hold it. A step that is
        not finite is left out and counted; the noise goes on.
        """
        with torch.no_grad():
            grad = self.buffer.grad
            if len(pieces) > 1:
                torch.cat(pieces, out=grad)
            else:
                grad.copy_(pieces[0])
            grad[:1].add_(loss, alpha=0)  # a loss that is not finite counts as a gradient
            self.plan.launch()
            self.origin.add_(self._one_step)

    def _total(
        self,
        flat: Tensor,
        keys: Sequence[Tensor],
        origin: Tensor,
        args: Any,
        kwargs: Any,
        *,
        looped: bool,
    ) -> tuple[Tensor, Tensor]:
        """Loss and flat gradient: chunk by chunk, so that memory is that of one.

        If ``looped``, chunks of one size are the rounds of a loop, which is recorded once.
        """
        particles, size = self._elbo.num_particles, self._round if looped else self._size
        rounds = particles // size if looped and particles > size else 0
        totals = []
        if rounds:
            number = round_number(origin, rounds)
            step = philox.make_origin(particle=size, device=origin.device)
            losses = self._loss(keys, origin, args, kwargs, Chunk(0, size), origin + number * step)
            loss, surrogate, leaves = losses
            pieces = self._gradient_pieces(flat, surrogate, leaves)
            pieces = [sum_of_rounds(piece, number) for piece in pieces]
            totals.append((sum_of_rounds(loss, number), _joined(pieces)))
        for first in range(rounds * size, particles, size):
            chunk = Chunk(first, min(size, particles - first))
            loss, surrogate, leaves = self._loss(keys, origin, args, kwargs, chunk)
            totals.append((loss, self._gradient(flat, surrogate, leaves)))
        loss, grad = totals[0]
        for more, further in totals[1:]:
            loss, grad = loss + more, grad + further
        return loss, grad

    def _loss(
        self,
        keys: Sequence[Tensor],
        origin: Tensor,
        args: Any,
        kwargs: Any,
        chunk: Chunk | None = None,
        start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Loss, surrogate and the leaves that took part, of a chunk or of all particles.

        ``start`` is the origin of its particles where a chunk does not say it itself.
        """
        # A kernel draws for the fit of its origin, of which vmap over fits hands out copies.
        by_kernel = origin is self.origin and dispatch.choose("noise", origin) != "torch"
        streams = dict(zip(_STREAMS, keys, strict=True))
        noise = RecordedNoise(streams, origin, by_kernel=by_kernel, start=start)
        chunks = None if chunk is None else [chunk]
        estimates = list(
            self._elbo._estimates(
                self._program, args, kwargs, fast=noise, draws=noise, chunks=chunks
            )
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
        """The flat gradient."""
        return _joined(self._gradient_pieces(flat, surrogate, leaves))

    def _gradient_pieces(
        self, flat: Tensor, surrogate: Tensor, leaves: Sequence[Tensor]
    ) -> list[Tensor]:
        """The flat gradient in pieces. A fused guide reads its slabs, others their leaves."""
        slabs = self._slabs()
        leaves = list({id(leaf): leaf for leaf in leaves}.values())
        targets = [*(slab for slab, _ in slabs), *leaves]
        places = [*(where for _, where in slabs), *map(self._place, leaves)]
        if not surrogate.requires_grad:
            return [torch.zeros_like(flat)]
        pairs = [
            pair for pair in zip(places, targets, strict=True) if pair[1].requires_grad
        ]  # others were frozen, and are at rest as in an eager step
        places, targets = [place for place, _ in pairs], [target for _, target in pairs]
        gradients = torch.autograd.grad(surrogate, targets, allow_unused=True)
        found = zip(places, gradients, strict=True)
        return _pieces(flat, [(where, grad) for where, grad in found if grad is not None])

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
            and self._noise.seed.generation == self.generation
        )

    @property
    def is_wide(self) -> bool:
        """Whether it pays to save copies of what it changes."""
        return self.buffer.device.type == "cpu" and len(self.buffer.flat) >= WIDE

    @property
    def moments(self) -> Sequence[Tensor]:
        """The optimizer's part of the state: step counts and moments."""
        return self._update.moments

    def let_go_of_gradient(self) -> None:
        """Give the memory of the flat gradient back, where it is large and zero."""
        if self.is_wide and not bool(self.buffer.grad.any()):
            zero_pages(self.buffer.grad)

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
        origin = philox.make_origin(step=self._noise.step, device="cpu")
        self.origin.copy_(to_device(origin, self.origin.device))
        self.lifted.hold(arguments)

    def advance(self, num_steps: int) -> None:
        """Note that so many steps were taken with this function's state."""
        self._noise.step += num_steps
        self.buffer.touch()


def kind_of(device: torch.device) -> str:
    """What kind of a device the steps are for: "cpu", "cuda", ..."""
    return device.type


def _fused_guide(program: Any) -> Any:
    if getattr(type(program.guide), "fused", None) is None:
        return None
    return program.guide.fused()


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat(tuple(pieces)) if len(pieces) > 1 else pieces[0]


def _pieces(flat: Tensor, parts: Sequence[tuple[slice, Tensor]]) -> list[Tensor]:
    """Adjacent pieces of a tensor like ``flat``: each part in its place, and 0 elsewhere."""
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
    return pieces
