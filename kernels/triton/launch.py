"""What launchers share: block sizes, the device to launch on, how a kernel is compiled in CI."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsvi.kernels import philox

# Triton will turn the fusion of a * b + c off by default: say what we want.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever the tensors are on."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def tiling(num_elements: int) -> tuple[int, int, int]:
    """Tiles of D elements, lanes in use, and groups in use (a power of two)."""
    if num_elements > philox.TILE_GROUPS:
        lanes = 2 if num_elements <= 2 * philox.TILE_GROUPS else philox.LANES
        return -(-num_elements // philox.TILE), lanes, philox.TILE_GROUPS
    return 1, 1, max(16, 1 << (num_elements - 1).bit_length())


# Fields of a CompileCase that are limits.
LIMITS = ("wide_loads", "wide_stores", "max_bytes")


@dataclass(frozen=True)
class CompileCase:
    """One way in which a kernel is compiled, and what its code must look like.

    ``signature`` maps each runtime argument to its Triton type, ``"*fp32"`` or ``"i32"``; names in
    ``divisible`` are multiples of 16, as aligned pointers and sizes are at run time. Triton turns a
    number that is 1 at run time into a constant, which has no ``.to()`` and such, so each case is
    also compiled with all its numbers 1, but for those in ``never_one``.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    never_one: tuple[str, ...] = ()
    threads: int = 128
    wide_loads: int = 0  # fewest 128-bit global loads
    wide_stores: int = 0
    max_bytes: int = 49_152  # of machine code
    options: Mapping[str, Any] = field(default_factory=lambda: OPTIONS)


def warps(threads: int, warp_size: int = 64 if torch.version.hip else 32) -> int:
    """Warps for a number of threads (a power of two)."""
    return max(1, threads // warp_size)


def registers(most: int) -> dict[str, int]:
    """Let a thread take so many: left to itself, ptxas stops at 128 and spills what is over."""
    return {} if torch.version.hip else {"maxnreg": most}


def neighbours(dtype: torch.dtype) -> int:
    """Numbers in 128 bits, the widest access."""
    return 16 // dtype.itemsize


def batch_stride(tensor: Tensor) -> int:
    """Step from one batch to the next of a contiguous ``[B or 1, n]``: 0 if all share one row."""
    return 0 if tensor.shape[0] == 1 else tensor.shape[1]
