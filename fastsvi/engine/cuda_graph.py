"""A sequence of launches as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Capturer:
    """Captures what functions launch on the current device; calling a result launches it again.

    The graphs of one capturer share the memory for what is let go within a graph, so they must not
    run at the same time. What a function writes to must stay where it is, and it is run some times
    before: put its state back afterwards.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool: Any = None
        self._failed: list[Any] = []  # the allocator may still look at them

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        """Capture what ``body`` launches.

        Raises:
            RuntimeError: ``body`` does what a graph cannot hold, such as waiting for the device.
        """
        current = torch.cuda.current_stream()
        if self._pool is None:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                body()  # Triton compiles, and cuBLAS takes memory of its own
                with _no_waiting():  # says what is wrong, which a capture that broke off does not
                    body()
            current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        self._failed.append(graph)
        # Other threads and libraries go on: JAX may well take memory meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            body()
        self._failed.remove(graph)
        self._pool = graph.pool()
        return graph.replay


def capture(body: Callable[[], None]) -> Callable[[], None]:
    """What :class:`Capturer` makes of one function."""
    return Capturer()(body)


def reason(error: BaseException) -> BaseException:
    """Of the errors that broke off a capture the first, which tells the cause."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


@contextmanager
def _no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # torch says that not every wait is noticed.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
