"""A sequence of launches as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Triton compiles, cuBLAS picks its algorithms and autograd starts its threads in the first calls.
WARM_UP = 3


def capture(body: Callable[[], None]) -> Callable[[], None]:
    """Capture what ``body`` launches; calling the result launches all of it again.

    ``body`` is run some times before, so whatever it writes to must be put back afterwards. It
    must not wait for the device, and must use memory that stays where it is. What it returns to
    the allocator is kept for the graph alone.

    Raises:
        RuntimeError: ``body`` does what a graph cannot hold, such as waiting for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay
