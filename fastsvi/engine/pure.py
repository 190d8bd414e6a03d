"""What a pure step is: ``step(*state, *inputs) -> (*new_state, loss, halt)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fastsvi.engine.graph import Graph
from fastsvi.errors import CaptureError

Step = Callable[..., Sequence[Tensor]]


def distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, each given twice as an object of its own: a recording tells them apart by it."""
    known: dict[int, Tensor] = {}
    return [known.setdefault(id(x), x) if id(x) not in known else x.detach() for x in tensors]


def check_states(graph: Graph, state: Sequence[Tensor]) -> None:
    """Raise an error if a recorded step does not return states like those that it is given."""
    if len(graph.outputs) != len(state) + 2:
        raise CaptureError(
            f"a step must return its {len(state)} states, a loss and whether to halt, found "
            f"{len(graph.outputs)} tensors"
        )
    for position, (old, new) in enumerate(zip(state, graph.outputs, strict=False)):
        if new.shape != tuple(old.shape) or new.dtype != old.dtype:
            raise CaptureError(
                f"state {position} was {tuple(old.shape)}, {old.dtype} before the step and "
                f"{new.shape}, {new.dtype} after it"
            )
