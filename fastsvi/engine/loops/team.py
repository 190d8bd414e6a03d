"""The threads that all native steps of the process share; see :mod:`.prelude_team`."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache

from fastsvi.engine.loops import build
from fastsvi.engine.loops.prelude_team import MEMBERS
from fastsvi.errors import CaptureError


@lru_cache(maxsize=1)
def share() -> int | None:
    """Address of the function that divides work among threads; None if it cannot be compiled."""
    try:
        library = ctypes.CDLL(str(build.compile_source(MEMBERS)))
    except CaptureError:
        return None
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=library.team_forget)
    return ctypes.cast(library.team_share, ctypes.c_void_p).value
