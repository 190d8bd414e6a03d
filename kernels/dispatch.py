"""Choose, per call, which form of an operation runs: plain torch or Triton.

The device of the tensors decides: CUDA tensors go to Triton where Triton is installed, all others
to the torch reference. ``FASTSVI_KERNELS=torch|triton|interpret`` in the environment, or
:func:`use` in a program, overrides that; ``interpret`` runs the Triton kernels on CPU tensors,
program after program, which tests need and nobody else.

Triton itself is imported by the first operation that needs it, never by ``import fastsvi``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastsvi.errors import KernelError

BACKENDS = ("torch", "triton", "interpret")
ENVIRONMENT = "FASTSVI_KERNELS"

# Plain module globals, for Dynamo guards on them and cannot look through a functools.cache.
_have_triton = importlib.util.find_spec("triton") is not None
_interpreting = False
_override: str | None = os.environ.get(ENVIRONMENT) or None


def choose(op: str, first: Tensor, *others: Tensor) -> str:
    """Back end for a call of ``op`` on these tensors: one of :data:`BACKENDS`.

    Looks at devices only and never waits for one, so it also works on fake, batched and traced
    tensors.

    Raises:
        KernelError: the tensors are on different devices, or the override asks for a back end
            that is unknown, not installed, or unable to serve the device.

    >>> choose("philox.normal", torch.zeros(2), torch.zeros(4))
    'torch'
    """
    device = first.device
    for other in others:
        if other.device != device:
            raise error(
                op,
                "its tensors must share a device; move the small ones (key, origin) to the large",
                **{f"argument{i}": t for i, t in enumerate((first, *others))},
            )
    if _override is None:
        return "triton" if _have_triton and device.type == "cuda" else "torch"
    return _forced(op, _override, device)


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Force a back end for the length of a ``with`` block; ``None`` lets the device decide again.

    >>> with use("torch"):
    ...     forced()
    'torch'
    """
    global _override
    _require_known("dispatch.use", backend)
    before, _override = _override, backend
    try:
        yield
    finally:
        _override = before


def forced() -> str | None:
    """The back end that an override asks for, or None if the device decides."""
    return _override


def runs_triton(device: torch.device) -> bool:
    """Whether the body of an operation registered with torch runs Triton on this device.

    :func:`choose` decides before an operation is called; this decides inside of one, where a
    captured graph or ``opcheck`` may have brought CPU tensors.
    """
    return device.type == "cuda" or _override == "interpret"


def error(op: str, problem: str, **values: Any) -> KernelError:
    """A :class:`KernelError` that names the operation, the problem and the values found.

    Reads shapes, dtypes and devices only, so that raising never waits for a device.

    >>> str(error("adam.adam_", "param and grad must have one shape", grad=torch.zeros(3)))
    'adam.adam_: param and grad must have one shape; found grad = tensor of shape (3,), ...
    """
    found = ", ".join(f"{name} = {_describe(value)}" for name, value in values.items())
    return KernelError(f"{op}: {problem}" + (f"; found {found}" if found else ""))


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"tensor of shape {tuple(value.shape)}, {dtype} on {value.device}"
    return repr(value)


def _require_known(op: str, backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise error(
            op,
            f"unknown back end; {ENVIRONMENT} and dispatch.use() take one of {BACKENDS}",
            backend=backend,
        )


def _forced(op: str, backend: str, device: torch.device) -> str:
    _require_known(op, backend)
    if backend == "torch":
        return backend
    if not _have_triton:
        raise error(
            op,
            "this back end needs the package triton, which is not installed; "
            f"install it or set {ENVIRONMENT}=torch",
            backend=backend,
        )
    if backend == "triton" and device.type != "cuda":
        raise error(
            op,
            "compiled Triton kernels run on CUDA tensors only; move the tensors to a GPU or "
            f"unset {ENVIRONMENT}",
            backend=backend,
            device=str(device),
        )
    if backend == "interpret" and not _interpreting:
        _start_interpreter(op)
    return backend


def _start_interpreter(op: str) -> None:
    global _interpreting
    # Triton reads TRITON_INTERPRET when a kernel is *decorated*, its own standard library included,
    # so the variable must stand before the first import of triton in the process.
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    language = importlib.import_module("triton.language")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    if not isinstance(language.sum, interpreter.InterpretedFunction):
        raise error(
            op,
            "triton was imported before the interpreter was asked for; set TRITON_INTERPRET=1 "
            "in the environment before the process starts",
            backend="interpret",
        )
    _interpreting = True
