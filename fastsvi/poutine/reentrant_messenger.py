"""Handlers that may be entered while they are installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

from fastsvi.poutine.messenger import Messenger


class ReentrantMessenger(Messenger):
    """Stands on the stack once, from its first entry to its last exit."""

    def __init__(self) -> None:
        super().__init__()
        self._ref_count = 0

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return functools.update_wrapper(super().__call__(fn), fn, updated=())

    def __enter__(self) -> Any:
        self._ref_count += 1
        if self._ref_count == 1:
            super().__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ref_count -= 1
        if self._ref_count == 0:
            super().__exit__(exc_type, exc_value, traceback)
