"""The whole step of a fit in one piece: draw, model, gradient, update.

On a CPU the pure step is recorded once and compiled, on a GPU it becomes generated kernels, or a
CUDA graph. Before it is used it takes one step on copies, beside an eager step with the same noise;
the two must agree. A recorded step is recorded again now and then: the recordings differ if Python
state outside of the tensors has changed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fastsvi import settings
from fastsvi.engine.graph import Graph
from fastsvi.engine.native import NativeStep
from fastsvi.engine.pages import zero_pages
from fastsvi.engine.record import record
from fastsvi.errors import CaptureError, FastSVIWarning
from fastsvi.infer.arguments import Arguments
from fastsvi.infer.device_steps import GENERATED, device_form, graph_form, record_generated
from fastsvi.infer.graphed import GraphedLoop
from fastsvi.infer.pure_step import PureStep
from fastsvi.infer.util import checking

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI

# Steps of eager and native form differ by rounding only: some hundred operations in a row, and
# reductions in another order.
_TOLERANCE = 1e-3
_BLOCK = 1 << 18  # elements compared at once
# Time in steps between two looks at Python state, over the time that a look takes.
LOOKS_APART = 20
_REMEDY = "Pass what changes as an argument of the run, where a float may vary"


class Disagreement(CaptureError):
    """A captured step does not give what the eager step gave, whose ``loss`` this holds."""

    def __init__(self, loss: Tensor, message: str) -> None:
        super().__init__(message)
        self.loss = loss


class Loop(Protocol):
    """Takes steps in a fast form; see :class:`~fastsvi.engine.native.NativeStep`."""

    def build(self) -> None:
        """Make the fast form ready."""

    def run(
        self,
        num_steps: int,
        *,
        state: Sequence[Tensor] | None = None,
        inputs: Sequence[Tensor] | None = None,
        stepped: Collection[int] = (),
    ) -> Tensor:
        """Take steps; returns their losses."""


class CapturedStep:
    """A step of ``svi`` in the fast form of its device.

    It serves its arguments, and all others that differ from them in ``lifted`` alone.

    Args:
        svi: has taken a step, so that all parameters exist.
        arguments: of the program.
        lifted: positions among their leaves of those that may vary.

    Attributes:
        form: "native", or on a GPU "block", "kernels" or "graph".
        passed_over: why no kernels could be generated for a GPU; None if they could.

    Raises:
        CaptureError: the step cannot be captured; the message says why, and where in the program.
    """

    def __init__(self, svi: SVI, arguments: Arguments, lifted: Sequence[int] = ()) -> None:
        self.arguments = arguments
        self.lifted = frozenset(lifted)
        self.pure = PureStep(svi, arguments, sorted(lifted))
        self.is_checked = False
        self.passed_over: str | None = None
        self._distrusted: str | None = None  # what to say of kernels that did not agree
        self.loop: Loop
        start = time.perf_counter()
        self.form, self.loop, self.graph, self.passed_over = self._in_form(self.pure)
        self._look_seconds = time.perf_counter() - start  # what a look at Python state costs
        self._seconds_since = 0.0  # in steps, since the latest look

    def _in_form(self, pure: PureStep) -> tuple[str, Loop, Graph, str | None]:
        """The steps in the fast form of their device, and their recording."""
        if pure.kind == "cuda":
            return device_form(pure)
        if pure.kind != "cpu":
            raise CaptureError(f"there is no fast form of steps on {pure.buffer.device}")
        with checking(False):
            native = NativeStep(pure, pure.state, pure.inputs, pure.aliases)
        return "native", native, native.graph, None

    def build(self) -> None:
        """Make the fast form ready.

        Raises:
            CaptureError: it cannot be made.
        """
        try:
            self.loop.build()
        except CaptureError as error:
            self._fall_back(error)

    def _fall_back(self, error: CaptureError) -> None:
        """Launch the steps as they were recorded, for generated kernels raised this error."""
        if self.form not in GENERATED or settings.get("cuda_steps") != "auto":
            raise error
        self.form, self.loop, self.graph, self.passed_over = graph_form(self.pure, str(error))
        self.loop.build()

    # ------------------------------------------------------------------------------- is it right

    def is_current(self) -> bool:
        """Whether parameters, optimizer and noise are still those that the step was made for."""
        return settings.get("validate") != "always" and self.pure.is_current()

    def accepts(self, arguments: Arguments) -> bool:
        """Whether the step serves these arguments: only lifted ones differ, and not in shape."""
        return (
            arguments.has_form_of(self.arguments)
            and self.lifted.issuperset(arguments.differing(self.arguments))
            and self.pure.lifted.accept(arguments)
            and self.graph.is_current()
        )

    def check(self, arguments: Arguments, take_step: Callable[[], Tensor]) -> Tensor:
        """Take one step natively, on copies, and one eagerly; returns the loss of the latter.

        Generated kernels that do not agree give way to the steps as they were recorded, which are
        then yet to be checked.

        Raises:
            Disagreement: with the loss of the eager step, which has been taken.
        """
        try:
            loss = compare(self.pure, arguments, self._take_one, take_step)
        except Disagreement as error:
            return self._distrust(error)
        except CaptureError as error:  # nothing was launched, nor an eager step taken
            self._fall_back(error)
            return self.check(arguments, take_step)
        self.pure.let_go_of_gradient()
        self.is_checked = True
        if self._distrusted is not None:  # where the graph agrees, the kernels were at fault
            message, self._distrusted = self._distrusted, None
            warnings.warn(message, FastSVIWarning, stacklevel=7)
        return loss

    def _distrust(self, found: Disagreement) -> Tensor:
        message = f"SVI.run: generated kernels (form {self.form!r}) are not used, because {found}"
        try:
            self._fall_back(found)
        except CaptureError as error:
            raise Disagreement(found.loss, str(error)) from found
        self._distrusted = message
        return found.loss

    def release(self) -> None:
        """Let go of the working memory of steps, where it is large."""
        if self.pure.is_wide and isinstance(self.loop, NativeStep):
            self.loop.release()

    def _take_one(self, state: Sequence[Tensor]) -> Tensor:
        loss = self.loop.run(1, state=state)
        if isinstance(self.loop, NativeStep):
            self.loop.release()  # the eager step that follows may need the memory
        return loss

    def is_due(self) -> bool:
        """Whether to :meth:`check_again`: so seldom that it takes a twentieth of the time."""
        return self._seconds_since > LOOKS_APART * self._look_seconds

    def check_again(self) -> None:
        """Record the step anew and compare the recordings.

        Raises:
            CaptureError: they differ; the message names the statement.
        """
        difference = self.difference()
        if difference is not None:
            raise CaptureError(changed_outside(difference))

    def difference(self) -> str | None:
        """The first statement that would be recorded otherwise now; None if there is none."""
        start, self._seconds_since = time.perf_counter(), 0.0
        try:
            anew = self._record()
        except CaptureError as error:
            return str(error)
        difference = self.graph.difference(anew)
        self._look_seconds = time.perf_counter() - start
        return difference

    def _record(self) -> Graph:
        if isinstance(self.loop, GraphedLoop):
            return self.loop.record()
        if self.form in GENERATED:
            return record_generated(self.pure)
        with checking(False):
            return record(self.pure, [*self.pure.state, *self.pure.inputs], self.pure.aliases)

    # ----------------------------------------------------------------------------------- running

    def run(self, num_steps: int, arguments: Arguments | None = None) -> Tensor:
        """Take steps; returns their losses, fewer than asked for if one was not finite."""
        self.pure.begin(arguments or self.arguments)
        start = time.perf_counter()
        losses = self.loop.run(num_steps)
        self._seconds_since += time.perf_counter() - start
        self.pure.advance(len(losses))
        return losses

    def run_batches(self, batches: Sequence[Arguments]) -> Tensor:
        """Take one step with each of several arguments; returns losses as :meth:`run` does."""
        if len(batches) == 1:
            return self.run(1, batches[0])
        pure = self.pure
        pure.begin(batches[0])
        num_others = len(pure.inputs) - len(pure.lifted.tensors)
        inputs = [*pure.inputs[:num_others], *pure.lifted.stacked(batches)]
        stepped = range(num_others, len(inputs))
        start = time.perf_counter()
        losses = self.loop.run(len(batches), inputs=inputs, stepped=stepped)
        self._seconds_since += time.perf_counter() - start
        pure.advance(len(losses))
        return losses


def compare(
    pure: PureStep,
    arguments: Arguments,
    take_captured: Callable[[list[Tensor]], Tensor],
    take_eager: Callable[[], Tensor],
) -> Tensor:
    """Hold a captured step equal to an eager one with the same noise; returns the latter's loss.

    Args:
        pure: the step, current.
        arguments: of the program.
        take_captured: takes a step that overwrites the state it is given; returns its loss.
        take_eager: takes a step with the live state; returns its loss.

    Raises:
        Disagreement: they differ by more than rounding. The eager step has been taken.
    """
    pure.begin(arguments)
    reached, captured_loss = _reach(pure, take_captured)
    change = _distance(reached, pure.buffer.flat)
    loss = take_eager()
    pairs = [
        ("loss", _distance(captured_loss, loss.detach()), loss.detach().abs().max()),
        ("change of parameters", _distance(reached, pure.buffer.flat), change),
    ]
    for what, error, scale in pairs:
        scale = scale.clamp(min=1e-6)
        if not bool(error <= _TOLERANCE * scale):
            raise Disagreement(
                loss,
                f"the captured step gave another {what} than an eager one with the same noise: "
                f"largest difference {float(error):g}, largest value {float(scale):g}. "
                "Something outside of the tensors changes from step to step, such as a Python "
                f"counter. {_REMEDY}",
            )
    return loss


def _reach(
    pure: PureStep, take_captured: Callable[[list[Tensor]], Tensor]
) -> tuple[Tensor, Tensor]:
    """The parameters that a captured step reaches, and its loss; the live state stays as it is."""
    pure.let_go_of_gradient()
    if not pure.is_wide or not all(not bool(moment.any()) for moment in pure.moments):
        copies = [tensor.clone() for tensor in pure.state]
        return copies[0], take_captured(copies)
    # A fit's first step: what is zero need not be copied.
    try:
        flat, *rest = pure.state
        others = [x if any(x is m for m in pure.moments) else x.clone() for x in rest]
        reached = flat.clone()
        return reached, take_captured([reached, *others])
    finally:
        for moment in pure.moments:
            zero_pages(moment)


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Largest difference of two tensors, found block by block; infinite if one has more entries."""
    if one.numel() != other.numel():
        return torch.tensor(torch.inf)
    blocks = (x.reshape(-1).split(_BLOCK) for x in (one, other))
    return torch.stack([(a - b).abs_().max() for a, b in zip(*blocks, strict=True)]).max()


def changed_outside(difference: str) -> str:
    """What to say of a step that would be recorded otherwise by now."""
    return (
        "something outside of the tensors has changed since the step was captured, such as a "
        f"Python counter: {difference}. {_REMEDY}"
    )
