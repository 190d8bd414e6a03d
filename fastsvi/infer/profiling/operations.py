"""The torch operations of a step: how many, how long, and what data they convert."""

from __future__ import annotations

import linecache
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsvi import kernels

aten = torch.ops.aten

# torch.tensor and torch.as_tensor of numbers; to, float, double, cuda and their like.
_CONVERSIONS = (aten.lift_fresh.default, aten._to_copy.default)
_SMALL = 1 << 14  # bytes that are not worth a word
_TORCH = str(Path(torch.__file__).parent)
_OURS = (str(Path(__file__).parents[2]), str(Path(kernels.__file__ or "").parent))


class Operations(TorchDispatchMode):
    """Sees every operation below autograd, of the backward pass too.

    The time of an operation holds its call from Python, half a microsecond or so. That of a step
    under this mode says nothing: there are some microseconds of Python for each operation.

    Attributes:
        seconds: inside of each operation.
        conversions: bytes that were converted or copied, by statement of the program.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import Dynamo

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.conversions: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        start = time.perf_counter()
        out = func(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)
        if func in _CONVERSIONS and isinstance(out, Tensor) and out.nbytes >= _SMALL:
            where = _statement()
            if where is not None:
                self.conversions[where] = self.conversions.get(where, 0) + out.nbytes
        return out


def least_seconds(seen: Sequence[Operations]) -> float:
    """Time inside the operations of one of several equal steps, least of each: load goes out."""
    if len({len(mode.seconds) for mode in seen}) > 1:
        return min(sum(mode.seconds) for mode in seen)
    return sum(min(times) for times in zip(*(mode.seconds for mode in seen), strict=True))


def _statement() -> str | None:
    """The statement outside of torch that converts; None if it is one of fastsvi's own."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(_OURS):
        return None
    path, line = frame.f_code.co_filename, frame.f_lineno
    return f"{path}:{line}: `{linecache.getline(path, line).strip()}`"
