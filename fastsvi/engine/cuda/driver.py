"""Load compiled kernels onto a CUDA device and launch them, through the driver's own library.

Torch's stream, context and memory are used, so a launch takes its place among torch's: in order of
its stream, and in a CUDA graph while one is captured.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from fastsvi.engine.cuda import nvrtc
from fastsvi.engine.graph_loop import to_device
from fastsvi.errors import CaptureError

_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_FREE_SHARED = 48 << 10  # bytes of shared memory that a kernel need not ask for
_RESERVED_SHARED = 4 << 10  # of a block, for what a kernel declares itself


class Kernel(Protocol):
    """What is launched: all parameters are addresses or 64-bit numbers."""

    def __call__(
        self, blocks: int, threads: int, arguments: Sequence[int], shared_bytes: int = 0
    ) -> None:
        """Launch on the current stream of torch's current device, without waiting."""


class Kernels(Protocol):
    """The kernels of one source, for one device."""

    def kernel(self, name: str) -> Kernel:
        """The kernel of this name."""


# ----------------------------------------------------------------------------------------- library


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise CaptureError(f"the CUDA driver's library {name} cannot be loaded: {error}") from error


def _require(code: int, what: str) -> None:
    if code:
        name = ctypes.c_char_p()
        _library().cuGetErrorName(code, ctypes.byref(name))
        raise CaptureError(
            f"the CUDA driver could not {what}: {(name.value or b'').decode() or f'error {code}'}"
        )


@lru_cache
def _context(index: int) -> ctypes.c_void_p:
    """The context of a device that torch uses; it stays for as long as the process."""
    driver, device, context = _library(), ctypes.c_int(), ctypes.c_void_p()
    _require(driver.cuInit(0), "begin")
    _require(driver.cuDeviceGet(ctypes.byref(device), index), f"find device {index}")
    _require(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "give its context")
    return context


def _enter(index: int) -> None:
    """Make the device's context this thread's; a thread that has not used torch yet has none."""
    _require(_library().cuCtxSetCurrent(_context(index)), f"turn to device {index}")


def most_shared_bytes(device: torch.device) -> int:
    """Dynamic shared memory that a block may ask for."""
    properties = torch.cuda.get_device_properties(device)
    most = getattr(properties, "shared_memory_per_block_optin", _FREE_SHARED)
    return int(most) - _RESERVED_SHARED


# ----------------------------------------------------------------------------------------- modules


class _Module:
    """Machine code on a device. It is unloaded some time after nobody holds it or a kernel of it.

    Not at once: what was launched may still run, and a graph that holds it be still destroyed.
    """

    def __init__(self, image: bytes, index: int) -> None:
        handle = ctypes.c_void_p()
        _enter(index)
        _require(_library().cuModuleLoadData(ctypes.byref(handle), image), "load a captured step")
        self._handle = handle
        self.index = index
        weakref.finalize(self, _over.append, (handle, index)).atexit = False

    def kernel(self, name: str) -> _Kernel:
        function = ctypes.c_void_p()
        found = _library().cuModuleGetFunction(ctypes.byref(function), self._handle, name.encode())
        _require(found, f"find kernel {name!r}")
        return _Kernel(self, function)


class _Kernel:
    def __init__(self, module: _Module, function: ctypes.c_void_p) -> None:
        self._module, self._function = module, function
        self._allowed = _FREE_SHARED

    def __call__(
        self, blocks: int, threads: int, arguments: Sequence[int], shared_bytes: int = 0
    ) -> None:
        index, driver = self._module.index, _library()
        _enter(index)
        if shared_bytes > self._allowed:
            code = driver.cuFuncSetAttribute(
                self._function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes
            )
            _require(code, f"give a block {shared_bytes} bytes of shared memory")
            self._allowed = shared_bytes
        values = (ctypes.c_int64 * len(arguments))(*arguments)
        size, start = ctypes.sizeof(ctypes.c_int64), ctypes.addressof(values)
        places = (ctypes.c_void_p * len(arguments))(
            *(start + k * size for k in range(len(arguments)))
        )
        code = driver.cuLaunchKernel(
            self._function,
            *(blocks, 1, 1),
            *(threads, 1, 1),
            shared_bytes,
            ctypes.c_void_p(torch.cuda.current_stream(index).cuda_stream),
            places,
            None,
        )
        _require(code, f"launch {blocks} blocks of {threads} threads")


_loaded: weakref.WeakValueDictionary[tuple[int, str], _Module] = weakref.WeakValueDictionary()
_over: list[tuple[ctypes.c_void_p, int]] = []  # modules that nobody holds


def load(source: str, device: torch.device) -> Kernels:
    """The kernels of ``source``, compiled and on the device; those of one source are loaded once.

    Raises:
        CaptureError: it cannot be compiled or loaded.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    image = nvrtc.compile_source(source, torch.cuda.get_device_capability(index))
    key = index, hashlib.sha256(image).hexdigest()
    module = _loaded.get(key)
    if module is None:
        with torch.cuda.device(index):
            _unload()
            module = _loaded[key] = _Module(image, index)
    return module


def _unload() -> None:
    """Unload what is over. To load takes its time anyway, so the device may be waited for."""
    while _over:
        handle, index = _over.pop()
        with torch.cuda.device(index):
            torch.cuda.synchronize()
            _enter(index)
            _require(_library().cuModuleUnload(handle), "unload a captured step")


# --------------------------------------------------------------------------------------- transfers


def numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """Addresses or strides on the device, int64 ``[n]``; nothing waits for them."""
    return to_device(torch.tensor(values, dtype=torch.int64, device="cpu"), device)
