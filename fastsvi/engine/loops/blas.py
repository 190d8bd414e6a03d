"""The matrix products of torch's own BLAS, by address.

The routines are those that torch itself brings; if its build hides them, loops take over. How many
threads they use is a setting of each thread that calls, where the BLAS is MKL.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    folder = Path(torch.__file__).parent / "lib"
    for path in sorted(folder.glob("libtorch_cpu.*")):
        return ctypes.CDLL(str(path))
    return None


@lru_cache(maxsize=1)
def pointers() -> ctypes.Array[ctypes.c_void_p]:
    """Addresses of sgemm and dgemm, in Fortran's convention, and of what sets the threads of both.

    Zeros stand for what was not found.
    """
    library = _library()
    found = []
    for symbols in (("sgemm_", "SGEMM"), ("dgemm_", "DGEMM"), ("MKL_Set_Num_Threads_Local",)):
        symbol = next((s for s in symbols if library is not None and hasattr(library, s)), None)
        address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value if symbol else None
        found.append(address or 0)
    return (ctypes.c_void_p * len(found))(*found)


def _routines() -> dict[torch.dtype, int]:
    return {torch.float32: 0, torch.float64: 1} if all(pointers()[:2]) else {}


ROUTINES = _routines()  # position among the pointers, by dtype
THREADS = 2  # position of what sets how many threads they use
