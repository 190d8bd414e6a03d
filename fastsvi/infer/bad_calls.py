"""What torch and Python say about a bad call of a program, in the words of a fit.

A step that fails has changed nothing. What it raised is left alone unless the arguments of the call
or its size are at fault; then the error says so.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastsvi.errors import DeviceError, FastSVIError, OutOfMemoryError, describe
from fastsvi.infer.arguments import Arguments
from fastsvi.infer.memory import (
    available_bytes,
    floor_bytes,
    in_words,
    is_out_of_memory,
    requested_bytes,
)
from fastsvi.poutine.runtime import PARAM_STORE

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI


class CallError(FastSVIError, TypeError):
    """A fit was called with an argument that its model or guide does not take."""


# Tensors of the size of the one that failed which are alive at the worst moment of a step: value,
# log-density, and the gradients of both.
_ALIVE_AT_ONCE = 4
# The last is said of the device "meta", whose tensors have no memory.
_OTHER_DEVICE = re.compile(
    r"on the same device|not on the expected device|different devices?|meta tensor"
)
_UNKNOWN_KEYWORD = re.compile(r"unexpected keyword argument '(\w+)'")
_OPTIONS = [
    "progress_bar",
    "compile",
    "batches",
    "stop_when_converged",
    "checkpoint",
    "checkpoint_every",
    "fit_dims",
]


class explained:
    """Raise errors of a ``with`` block that calls the program of a fit in better words.

    Args:
        svi: the fit.
        args, kwargs: that model and guide are called with.

    Raises:
        OutOfMemoryError, DeviceError, CallError: in place of what was raised, which is the cause.
    """

    __slots__ = ("_args", "_kwargs", "_svi")  # entered on every step, so a plain class

    def __init__(self, svi: SVI, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._svi = svi
        self._args = args
        self._kwargs = kwargs

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None:
            better = _explain(error, self._svi, self._args, self._kwargs)
            if better is not None:
                raise better from error


def _explain(
    error: BaseException, svi: SVI, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> FastSVIError | None:
    if isinstance(error, FastSVIError) or not isinstance(error, Exception):
        return None
    if is_out_of_memory(error):
        return _out_of_memory(error, svi)
    for cause in _causes(error):
        if isinstance(cause, RuntimeError) and _OTHER_DEVICE.search(str(cause)):
            return _other_device(cause, svi, args, kwargs)
    unknown = _UNKNOWN_KEYWORD.search(str(error)) if isinstance(error, TypeError) else None
    if unknown is not None and unknown.group(1) in kwargs:
        return _unknown_keyword(error, unknown.group(1))
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and what it was raised from: traces add their shapes to an error."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unknown_keyword(error: BaseException, name: str) -> CallError:
    similar = difflib.get_close_matches(name, _OPTIONS, n=1)
    hint = f" Did you mean {similar[0]}?" if similar else ""
    return CallError(
        f"SVI: the keyword argument {name!r} is handed on to model and guide, and one of them does "
        f"not take it: {error}.{hint} Model and guide must take the same arguments."
    )


def _other_device(
    error: BaseException, svi: SVI, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> DeviceError | None:
    leaves = svi._targets.leaves or tuple(leaf for _, leaf in PARAM_STORE.named_parameters())
    homes = {leaf.device for leaf in leaves} or {torch.get_default_device()}
    arguments = Arguments(args, kwargs)
    elsewhere = [
        f"{arguments.name(k)} is on {leaf.device}"
        for k, leaf in enumerate(arguments.leaves)
        if isinstance(leaf, Tensor) and leaf.device not in homes
    ]
    if not elsewhere:
        return None
    home = ", ".join(sorted(map(str, homes)))
    what = "parameters are" if leaves else "default device is"
    return DeviceError(
        f"SVI: {'; '.join(elsewhere)}, and the {what} {'on ' if leaves else ''}{home} "
        f"({_first_line(error)}). Nothing was changed. Move the data to the parameters, "
        f'data.to("{home}"), or make model and guide on the device of the data.'
    )


def _out_of_memory(error: BaseException, svi: SVI) -> OutOfMemoryError:
    elbo = svi.elbo
    particles = 1 if elbo is None else elbo.num_particles
    chunk = 1 if elbo is None else elbo.chunk_size or particles
    if svi._program is not None and not svi._program.rehearsed:
        chunk = 1  # it was one particle that failed, looked at before the others
    requested, free = requested_bytes(error), available_bytes(error)
    sizes = _sizes(svi)
    if requested is not None and sizes.latent:
        # An eager step of a wide guide takes fewer at once.
        chunk = min(chunk, max(1, requested // (sizes.latent * sizes.itemsize)))
    words = f"{particles} particles" if particles > 1 else "1 particle"
    found = [f"SVI: out of memory with {words} (P) and {sizes}"]
    if requested is not None:
        found.append(f"; {in_words(requested)} could not be had")
    if free is not None:
        found.append(f", about {in_words(free)} are free")
    found.append(". Nothing was changed. ")
    fitting = _fitting(chunk, requested, free)
    if fitting is not None:
        found.append(
            f"Evaluate the particles in pieces, {type(elbo).__name__}(num_particles={particles}, "
            f"vectorize_particles=True, chunk_size={fitting}): the result is the same, and "
            f"{fitting} particle{'s' if fitting > 1 else ''} at once should fit"
            f"{sizes.least(fitting)}."
        )
    else:
        found.append(
            "Even one particle at a time may not fit: use minibatches "
            "(plate(..., subsample_size=...)), a smaller dtype, or fewer latent elements."
        )
    found.append(f" ({_first_line(error)})")
    return OutOfMemoryError("".join(found))


def _fitting(chunk: int, requested: int | None, free: int | None) -> int | None:
    """A number of particles below ``chunk`` that should fit, a power of two; None if none may."""
    if chunk == 1:
        return None
    fitting = chunk / 2
    if requested and free is not None:
        fitting = min(fitting, chunk * free / (_ALIVE_AT_ONCE * requested))
    return 1 << int(fitting).bit_length() - 1 if fitting >= 1 else None


class _Sizes(NamedTuple):
    """Numbers of parameters and of latent elements, 0 where a guide does not tell."""

    parameters: int
    latent: int
    itemsize: int

    def __str__(self) -> str:
        if self.latent:
            return f"{self.latent:,} latent elements (D)"
        return f"{self.parameters:,} elements of parameters (D)"

    def least(self, particles: int) -> str:
        """What a run takes with chunks of so many particles, in words."""
        if not self.latent:
            return ""
        sizes = self.parameters, self.latent, particles, self.itemsize
        floor = floor_bytes(*sizes, chunked=True)
        return f", in {in_words(floor)} or more in all"


def _sizes(svi: SVI) -> _Sizes:
    leaves = [leaf for _, leaf in PARAM_STORE.named_parameters()]
    itemsize = max((leaf.element_size() for leaf in leaves), default=4)
    guide = None if svi._program is None else svi._program.guide
    latent = 0
    if getattr(type(guide), "fused", None) is not None and svi._targets.leaves:
        fused = guide.fused()  # type: ignore[union-attr]
        latent = 0 if fused is None else fused.num_elements
    return _Sizes(sum(leaf.numel() for leaf in leaves), latent, itemsize)


def _first_line(error: BaseException) -> str:
    line = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {line}" if line else describe(error)
