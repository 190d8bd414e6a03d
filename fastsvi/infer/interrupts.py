"""Ctrl-C between two steps, and not in the middle of one."""

from __future__ import annotations

import signal
import threading
from typing import Any

from fastsvi.errors import FastSVIError


class Interrupts:
    """In a ``with`` block the first Ctrl-C is noted; a second one is raised, as always.

    A KeyboardInterrupt may come at any instruction: half of the parameters updated, the noise of a
    step drawn and its loss lost. The second one is for steps that hang. Other handlers than
    Python's own are left alone, and threads other than the main one get no signals.

    Attributes:
        noted: whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.noted = False
        self._is_ours = False

    def __enter__(self) -> Interrupts:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._is_ours = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> bool:
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # Ctrl-C reaches the workers of a DataLoader too, whose death is a RuntimeError here.
        return (
            self.noted
            and kind is not None
            and issubclass(kind, RuntimeError)
            and not issubclass(kind, FastSVIError)
        )

    def _note(self, number: int, frame: Any) -> None:
        if self.noted:
            signal.default_int_handler(number, frame)
        self.noted = True
