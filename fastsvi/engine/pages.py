"""Memory of large tensors that is not needed for a while, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Iterator

from torch import Tensor

_DONTNEED = 4  # MADV_DONTNEED of Linux


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """The C library, if it is that of GNU."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if not hasattr(libc, "malloc_trim"):
        return None
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]  # type: ignore[union-attr]
    return libc


# Of mallopt. Glibc begins by mapping blocks from 128 KiB on apart; once a larger one was freed, up
# to 32 MiB, only those that are larger still. With tensors of that size it soon gets there.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_APART, _USUAL = 1 << 19, 1 << 25
_are_apart = False


@contextlib.contextmanager
def blocks_apart() -> Iterator[None]:
    """Have large blocks mapped apart for the length of a ``with`` block, on Linux with glibc.

    In the heap they leave gaps, into which larger ones do not fit: operations on tensors of some
    megabytes then take two or three times their memory. Mapping costs time, so it is not for long.
    """
    global _are_apart
    libc = _libc()
    if libc is None or "MALLOC_MMAP_THRESHOLD_" in os.environ or "GLIBC_TUNABLES" in os.environ:
        yield
        return
    libc.malloc_trim(0)
    libc.mallopt(_MMAP_THRESHOLD, _APART)
    libc.mallopt(_TRIM_THRESHOLD, _APART)
    _are_apart = True
    try:
        yield
    finally:
        _are_apart = False
        libc.mallopt(_MMAP_THRESHOLD, _USUAL)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)
        libc.malloc_trim(0)


def trim_heap() -> None:
    """Within :func:`blocks_apart`, give back what is free between the small blocks of the heap."""
    libc = _libc()
    if _are_apart and libc is not None:
        libc.malloc_trim(0)


def zero_pages(x: Tensor) -> None:
    """Set ``x`` to zero; on Linux its memory is then the system's until it is next written to.

    Args:
        x: contiguous, in memory of this process's own: neither shared nor of a file.

    >>> import torch
    >>> x = torch.ones(10_000)
    >>> zero_pages(x)
    >>> x.any()
    tensor(False)
    """
    libc = _libc()
    start, size = x.data_ptr(), x.nbytes
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (start + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
    is_ours = x.is_cpu and x.is_contiguous() and not x.is_shared()
    if libc is None or not is_ours or whole <= 0 or libc.madvise(first, whole, _DONTNEED) != 0:
        x.detach().zero_()
        return
    # Pages given back read as zeros; the ends of ``x`` may share theirs with others.
    head = (first - start) // x.element_size()
    flat = x.detach().view(-1)
    flat[: head + 1].zero_()
    flat[head + whole // x.element_size() :].zero_()
