"""Compile generated C++ with the system's compiler, once per source: a cache on disk keeps it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from fastsvi.errors import CaptureError

# -ffast-math lets loops over exp and log use the vector math library, and sums be reordered. It
# is kept from assuming that NaN and infinities do not occur.
_COMPILE = ["-march=native", "-fopenmp-simd", "-ffast-math", "-fno-finite-math-only"]
_COMPILE += ["-D__FAST_MATH__", "-std=c++17", "-fPIC"]
# <math.h> is to be that of C, and to declare no more than is used here: the one of C++ takes longer
# to parse than a small step to compile.
_COMPILE += ["-nostdinc++", "-U_GNU_SOURCE", "-D_DEFAULT_SOURCE"]
# Nothing is thrown; what would be prepared for that needs the library of C++.
_COMPILE += ["-fno-exceptions"]
# The rest of -O2 and -O3 of GCC makes compiling a third longer and steps no faster.
_GCC = ["-O1", "-ftree-vectorize", "-fexpensive-optimizations"]
_CLANG = ["-O3"]
# Without start files, of which one that -ffast-math brings switches off denormal numbers for the
# whole process, and without the library of C++, which takes time to link and is not used.
_LINK = ["-nostdlib", "-lm", "-lc", "-lgcc"] if sys.platform == "linux" else []


@lru_cache(maxsize=1)
def compiler() -> str | None:
    """Path of the C++ compiler: ``$CXX``, ``g++`` or ``clang++``; None if there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return shutil.which(name)
    return None


def cache_folder() -> Path:
    """Where compiled steps are kept: ``$FASTSVI_CACHE``, or below the user's cache folder."""
    own = os.environ.get("FASTSVI_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastsvi"


@lru_cache(maxsize=1)
def _machine() -> str:
    """What -march=native depends on, and which compiler it is."""
    path = compiler()
    version = ""
    if path is not None:  # to ask it for its version takes longer than all else of a cached step
        file = Path(path).resolve()
        version = f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"
    flags = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        with info.open() as lines:
            flags = next((line for line in lines if line.startswith(("flags", "Features"))), flags)
    return version + flags


def _flags() -> list[str]:
    """How to compile and link in one start of the compiler; what is linked stands at the end."""
    name = Path(compiler() or "").resolve().name
    is_clang = "clang" in name or sys.platform == "darwin"
    return ["-shared", *(_CLANG if is_clang else _GCC), *_COMPILE, "step.cpp", *_LINK]


def library_path(source: str) -> Path:
    """Where the compiled form of ``source`` lies, or will lie."""
    text = "\0".join([source, _machine(), *_flags()])
    return cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.so"


def compile_source(source: str) -> Path:
    """Compile ``source`` to a shared library and return its path; at once if it is cached.

    Raises:
        CaptureError: there is no compiler, or it fails.
    """
    target = library_path(source)
    if target.exists():
        return target
    path = compiler()
    if path is None:
        raise CaptureError(
            "no C++ compiler was found ($CXX, g++, clang++), which native loops on a CPU need; "
            "install one, or use compile=False"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        work = Path(folder)
        (work / "step.cpp").write_text(source)
        command = [path, "-o", "step.so", *_flags()]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        if done.returncode:
            raise CaptureError(
                f"the C++ compiler {path} failed on a captured step:\n{done.stderr[:2000]}"
            )
        os.replace(work / "step.so", target)
    return target


def load(path: Path) -> ctypes.CDLL:
    """The compiled library, with its functions declared."""
    library = ctypes.CDLL(str(path))
    library.run.restype = ctypes.c_int64
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.run.argtypes = [
        *(ctypes.POINTER(pointer), ctypes.POINTER(number), ctypes.POINTER(pointer)),
        *(pointer, pointer, number),
        *(ctypes.POINTER(ctypes.c_int), ctypes.POINTER(pointer), number, pointer),
    ]
    library.run_many.restype = None
    library.run_many.argtypes = [
        *(number, pointer, number, ctypes.POINTER(number), ctypes.POINTER(pointer)),
        *(pointer, pointer, number, number),
        *(ctypes.POINTER(ctypes.c_int), ctypes.POINTER(pointer), pointer),
    ]
    return library
