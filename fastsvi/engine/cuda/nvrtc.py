"""Compile generated CUDA source by NVRTC, once per source: a cache on disk keeps it.

NVRTC comes with torch's builds for CUDA. It is a library, needs neither a GPU nor header files, and
gives machine code for one architecture.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from fastsvi.engine.loops.build import cache_folder
from fastsvi.errors import CaptureError

# Division to 2 ulp and square roots to 1, in float32, over the full range, without the slow paths
# for the last half ulp. Subnormals and division by 0 are as ever.
_OPTIONS = ["--std=c++17", "--prec-div=false", "--prec-sqrt=false"]

Capability = tuple[int, int]  # of a device: (9, 0)


class _Target(NamedTuple):
    """What to compile for: machine code, or PTX where NVRTC is older than the device."""

    option: str
    is_code: bool


# ------------------------------------------------------------------------------------- the library


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """NVRTC: the one that torch brings, or the system's.

    Raises:
        CaptureError: there is none.
    """
    tried = list(dict.fromkeys(_candidates()))
    for name in tried:
        if os.path.isabs(name):
            _load_builtins(Path(name).parent)
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CaptureError(
        "NVRTC, which compiles steps for CUDA, was not found; torch's builds for CUDA bring it. "
        f"Tried {tried}"
    )


def _load_builtins(folder: Path) -> None:
    """Load what NVRTC opens by name when it compiles: the wheel's is on nobody's search path."""
    for path in sorted(folder.glob("libnvrtc-builtins.so*")):
        if ".alt." not in path.name:
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


def _candidates() -> Iterator[str]:
    major = (torch.version.cuda or "13").partition(".")[0]
    packages = Path(torch.__file__).parent.parent
    own = [packages / "nvidia" / f"cu{major}", packages / "nvidia" / "cuda_nvrtc"]
    for folder in (*(path / "lib" for path in own), packages / "torch" / "lib"):
        pattern = "nvrtc64_*.dll" if sys.platform == "win32" else "libnvrtc*.so*"
        for path in sorted(folder.glob(pattern)):
            if "builtins" not in path.name and ".alt." not in path.name:
                yield str(path)
    yield from (f"libnvrtc.so.{major}", "libnvrtc.so")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    yield str(Path(home) / "lib64" / "libnvrtc.so")
    found = ctypes.util.find_library("nvrtc")
    if found:
        yield found


def _require(code: int, what: str, log: str = "") -> None:
    if code:
        nvrtc = library()
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        name = nvrtc.nvrtcGetErrorString(code).decode()
        raise CaptureError(f"NVRTC could not {what}: {name}" + (f"\n{log[:2000]}" if log else ""))


@lru_cache(maxsize=1)
def version() -> str:
    """Of the library, such as "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _require(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "tell its version")
    return f"{major.value}.{minor.value}"


@lru_cache(maxsize=1)
def _architectures() -> list[int]:
    """What the library writes machine code for: 90 is a device of capability (9, 0)."""
    nvrtc, count = library(), ctypes.c_int()
    _require(nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "tell what it compiles for")
    found = (ctypes.c_int * count.value)()
    _require(nvrtc.nvrtcGetSupportedArchs(found), "tell what it compiles for")
    return sorted(found)


def _target(capability: Capability) -> _Target:
    asked = 10 * capability[0] + capability[1]
    known = [number for number in _architectures() if number <= asked]
    if not known:
        raise CaptureError(
            f"NVRTC {version()} does not compile for devices of capability "
            f"{capability[0]}.{capability[1]}, only for {_architectures()}"
        )
    # Code for an older device runs on one of the same generation; PTX on all later ones.
    is_code = known[-1] // 10 == capability[0]
    return _Target(f"--gpu-architecture={'sm' if is_code else 'compute'}_{known[-1]}", is_code)


# ----------------------------------------------------------------------------------------- compile


def image_path(source: str, capability: Capability) -> Path:
    """Where the compiled form of ``source`` lies, or will lie."""
    return _path(source, _target(capability))


def _path(source: str, target: _Target) -> Path:
    text = "\0".join([source, version(), target.option, *_OPTIONS])
    ending = "cubin" if target.is_code else "ptx"
    return cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.{ending}"


def compile_source(source: str, capability: Capability) -> bytes:
    """What a device of this capability loads; at once if it is cached.

    Args:
        source: CUDA C++; what is called from outside is ``extern "C"``.
        capability: of the device, such as (9, 0).

    Raises:
        CaptureError: there is no NVRTC, or it does not take the source; with its words.
    """
    target = _target(capability)
    path = _path(source, target)
    if path.exists():
        return path.read_bytes()
    image = _compile(source, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        work = Path(folder) / "image"
        work.write_bytes(image)
        os.replace(work, path)
    return image


def _compile(source: str, target: _Target) -> bytes:
    nvrtc, program = library(), ctypes.c_void_p()
    made = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"step.cu", 0, None, None
    )
    _require(made, "take a captured step")
    try:
        options = [option.encode() for option in (target.option, *_OPTIONS)]
        given = (ctypes.c_char_p * len(options))(*options)
        done = nvrtc.nvrtcCompileProgram(program, len(options), given)
        _require(done, "compile a captured step", _log(program) if done else "")
        return _read(program, "CUBIN" if target.is_code else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _log(program: ctypes.c_void_p) -> str:
    return _read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    nvrtc, size = library(), ctypes.c_size_t()
    _require(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"give its {what}")
    text = ctypes.create_string_buffer(size.value)
    _require(getattr(nvrtc, f"nvrtcGet{what}")(program, text), f"give its {what}")
    return text.raw
