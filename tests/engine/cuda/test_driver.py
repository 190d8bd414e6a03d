"""What the CUDA driver's library is called with: a library of the same functions takes notes."""

from __future__ import annotations

import ctypes
import gc
import subprocess
from types import SimpleNamespace

import pytest
import torch

from fastsvi.engine.cuda import driver, nvrtc
from fastsvi.engine.loops import build
from fastsvi.errors import CaptureError

LIBRARY = r"""
#include <cstdint>
#include <cstring>
struct Notes {
  int64_t loaded, unloaded, context, blocks, threads, shared, stream, allowed, allowances;
  int64_t arguments[4];
  char name[32];
  int fails;  // the next launch does, with this code
} notes;
extern "C" {
Notes* all() { return &notes; }
int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int index) { *device = 10 + index; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)(0x1000000000L + device); return 0;
}
int cuCtxSetCurrent(void* context) { notes.context = (int64_t)context; return 0; }
int cuModuleLoadData(void** module, const char* image) {
  if (strcmp(image, "bad") == 0) return 200;
  ++notes.loaded; *module = (void*)0x2000000007L; return 0;
}
int cuModuleUnload(void* module) { notes.unloaded += module == (void*)0x2000000007L; return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (module != (void*)0x2000000007L) return 1;
  strncpy(notes.name, name, 31); *function = (void*)0x3000000009L;
  return strcmp(name, "missing") == 0 ? 500 : 0;
}
int cuFuncSetAttribute(void*, int attribute, int value) {
  if (attribute == 8) { notes.allowed = value; ++notes.allowances; }
  return 0;
}
int cuGetErrorName(int code, const char** name) {
  *name = code == 500 ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR_OF_SOME_KIND"; return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b,
                   unsigned c, unsigned shared, void* stream, void** parameters, void** extra) {
  if (function != (void*)0x3000000009L || y != 1 || z != 1 || b != 1 || c != 1 || extra) return 1;
  notes.blocks = x; notes.threads = a; notes.shared = shared; notes.stream = (int64_t)stream;
  for (int k = 0; k < 4; ++k) notes.arguments[k] = *(int64_t*)parameters[k];
  return notes.fails;
}
}
"""


class Notes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("loaded", "unloaded", "context", "blocks")),
        *((name, ctypes.c_int64) for name in ("threads", "shared", "stream", "allowed")),
        ("allowances", ctypes.c_int64),
        ("arguments", ctypes.c_int64 * 4),
        ("name", ctypes.c_char * 32),
        ("fails", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.cpp").write_text(LIBRARY)
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    command = [build.compiler(), "-w", "-shared", "-fPIC", "-o", "driver.so", "driver.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "driver.so"))


@pytest.fixture
def notes(library, monkeypatch):
    found = library.all
    found.restype = ctypes.POINTER(Notes)
    notes = found().contents
    ctypes.memset(ctypes.addressof(notes), 0, ctypes.sizeof(notes))
    driver._context.cache_clear()
    driver._loaded.clear()
    driver._over.clear()
    monkeypatch.setattr(driver, "_library", lambda: library)
    monkeypatch.setattr(nvrtc, "compile_source", lambda source, capability: source.encode())
    stream = SimpleNamespace(cuda_stream=0x400000000B)
    for name, value in {
        "current_stream": lambda index: stream,
        "get_device_capability": lambda index: (9, 0),
        "current_device": lambda: 0,
        "synchronize": lambda: None,
        "device": lambda index: torch.no_grad(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield notes
    driver._context.cache_clear()
    driver._loaded.clear()
    driver._over.clear()


GPU = torch.device("cuda", 1)
LARGE = 0x7FFFFFFFFFFFFFFF


def test_a_launch_gives_all_it_was_given(notes):
    kernel = driver.load("source", GPU).kernel("run")
    kernel(1234567, 256, [LARGE, 0, -5, 1 << 40], 1000)
    assert (notes.blocks, notes.threads, notes.shared) == (1234567, 256, 1000)
    assert list(notes.arguments) == [LARGE, 0, -5, 1 << 40]
    assert notes.stream == 0x400000000B
    assert notes.context == 0x1000000000 + 11  # that of device 1
    assert notes.name == b"run"


def test_much_shared_memory_is_asked_for_once(notes):
    kernel = driver.load("source", GPU).kernel("run")
    for size in (100, 48 << 10, 100 << 10, 100 << 10, 60 << 10, 101 << 10):
        kernel(1, 32, [0] * 4, size)
    assert (notes.allowed, notes.allowances) == (101 << 10, 2)


def test_errors_are_named(notes):
    kernels = driver.load("source", GPU)
    with pytest.raises(CaptureError, match="find kernel 'missing': CUDA_ERROR_NOT_FOUND"):
        kernels.kernel("missing")
    notes.fails = 701
    with pytest.raises(CaptureError, match="launch 3 blocks of 64 threads: CUDA_ERROR_OF_SOME"):
        kernels.kernel("run")(3, 64, [0] * 4)
    with pytest.raises(CaptureError, match="load a captured step"):
        driver.load("bad", GPU)


def test_one_source_is_loaded_once_per_device(notes):
    devices = [GPU, GPU, torch.device("cuda")]
    held = [driver.load("one", device) for device in devices]
    assert held[0] is held[1]
    assert notes.loaded == 2


def test_what_nobody_holds_is_unloaded_later_and_what_a_kernel_is_of_is_not(notes):
    kernel = driver.load("one", GPU).kernel("run")
    gc.collect()
    driver.load("two", GPU)
    gc.collect()
    assert notes.unloaded == 0
    kernel(1, 32, [0] * 4)
    driver.load("three", GPU)
    assert notes.unloaded == 1  # the second; the first is held by its kernel
    del kernel
    gc.collect()
    assert notes.unloaded == 1
    driver.load("four", GPU)
    assert notes.unloaded == 3
