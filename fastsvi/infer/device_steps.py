"""Which form the steps of a fit take on a GPU.

Kernels that are generated for the step, if that can be done: one for all where its arrays are
small, else several. What cannot be generated is launched as it was recorded, in a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fastsvi import settings
from fastsvi.engine.graph import Graph
from fastsvi.errors import CaptureError
from fastsvi.infer.graphed import GraphedLoop
from fastsvi.infer.pure_step import PureStep
from fastsvi.infer.util import checking

if TYPE_CHECKING:
    from fastsvi.engine.cuda.block_step import BlockStep
    from fastsvi.engine.cuda.kernel_loop import KernelLoop

GENERATED = ("block", "kernels")


class DeviceForm(NamedTuple):
    """The steps of a fit on a GPU.

    Attributes:
        name: "block", "kernels" or "graph".
        loop: takes the steps.
        graph: its recording.
        passed_over: why it is not generated; None if it is, or was not to be.
    """

    name: str
    loop: BlockStep | KernelLoop | GraphedLoop
    graph: Graph
    passed_over: str | None = None


def device_form(pure: PureStep) -> DeviceForm:
    """The form that setting ``cuda_steps`` asks for, by default the best that there is.

    Raises:
        CaptureError: there is none.
    """
    asked = settings.get("cuda_steps")
    if asked == "graph":
        return graph_form(pure)
    try:
        return _generated(pure, GENERATED if asked == "auto" else (asked,))
    except CaptureError as error:
        if asked != "auto":
            raise
        return graph_form(pure, str(error))


def graph_form(pure: PureStep, passed_over: str | None = None) -> DeviceForm:
    """The steps as they were recorded."""
    loop = GraphedLoop(pure)
    return DeviceForm("graph", loop, loop.graph, passed_over)


def _generated(pure: PureStep, names: tuple[str, ...]) -> DeviceForm:
    from fastsvi.engine.cuda.block_step import BlockStep
    from fastsvi.engine.cuda.kernel_loop import KernelLoop

    forms = {"block": BlockStep, "kernels": KernelLoop}
    graph = record_generated(pure)
    reasons = []
    for name in names:
        try:
            with checking(False):
                loop = forms[name](pure, pure.state, pure.inputs, pure.aliases, graph)
            return DeviceForm(name, loop, graph)
        except CaptureError as error:
            reasons.append(f"{name}: {error}")
    raise CaptureError("; ".join(reasons))


def block_step(pure: PureStep) -> BlockStep:
    """The step as one kernel, that takes it for many fits at once.

    Raises:
        CaptureError: it cannot be generated.
    """
    from fastsvi.engine.cuda.block_step import BlockStep

    with checking(False):
        return BlockStep(pure, pure.state, pure.inputs, pure.aliases)


def record_generated(pure: PureStep) -> Graph:
    """Record the step as kernels are generated from it."""
    from fastsvi.engine.cuda.block_step import recorded

    with checking(False):
        return recorded(pure, [*pure.state, *pure.inputs], pure.aliases)
