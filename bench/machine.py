"""Where and with what figures were made, and the environment that makes them comparable."""

from __future__ import annotations

import compileall
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "fastsvi", "numpyro", "jax", "pyro-ppl")


def threads_environment(threads: int) -> dict[str, str]:
    """Variables under which every library computes on so many threads."""
    multi = "false" if threads == 1 else "true"
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={multi} intra_op_parallelism_threads={threads}",
        # Without this XLA has a thread for each core, and runs products that do not wait for each
        # other side by side, whatever the flags say.
        "NPROC": str(threads),
    }


def cache_environment(folder: Path) -> dict[str, str]:
    """Variables under which every library keeps compiled code in ``folder``, however small."""
    return {
        "FASTSVI_CACHE": str(folder / "fastsvi"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


def keep_bytecode() -> None:
    """Compile the modules of this working tree, as pip does those of the libraries it installs.

    Python may have been told to keep no bytecode; then every process would compile them anew.
    """
    root = Path(__file__).resolve().parent.parent
    for name in ("fastsvi", "kernels", "bench"):
        compileall.compile_dir(root / name, quiet=2)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, its load at the start, device, versions and commit."""
    about: dict[str, Any] = {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "commit": commit(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }
    if device == "cuda":
        about |= gpu()
    return about


def gpu() -> dict[str, str]:
    """Name and driver of the first CUDA device."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = _output(query).splitlines()[0].split(", ")
    return {"gpu": name, "driver": driver}


def short_name(device: str) -> str:
    """A device's name as a part of a file's.

    >>> short_name("NVIDIA H200")
    'nvidia-h200'
    """
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")


def commit() -> str:
    """The commit, with ``-dirty`` if files differ from it."""
    return _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"])


def describe(about: dict[str, Any]) -> str:
    """One line for the head of a table."""
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    where = about.get("gpu") or f"{about['cores']} cores of {about['cpu']}"
    return f"{where}, load {about['load']}, python {about['python']}, {versions}, {about['commit']}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
