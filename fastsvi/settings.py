"""Settings of the process, read through functions so that nobody holds a stale copy.

There are few on purpose. ``module_local_params`` says whether the parameters of a
:class:`~fastsvi.nn.PyroModule` belong to the module alone (True), or to the default store as well
(False, the default). ``validate`` says how often models, guides and the arguments and values
of distributions are checked. A check reads a tensor back to the host, so on every step it would
cost more than the step:

``"first"`` (default)
    the first step of each :class:`~fastsvi.infer.SVI` is checked in full; later steps are checked
    only through their loss. A loss that is not finite is traced back to the first site at fault.
``"always"``
    every step, as ``pyro.enable_validation(True)`` asks for.
``"never"``
    not at all.

``cuda_steps`` chooses how compiled steps run on a GPU, for tests and comparisons; it begins with
what ``FASTSVI_CUDA_STEPS`` says in the environment:

``"auto"`` (default)
    as generated kernels if they can be generated, else as a graph of torch's own.
``"block"``, ``"kernels"``
    in this form of generated kernels: one for all, with a thread block for each fit, or several
    that are each spread over the device. A step that has no such form is taken eagerly.
``"graph"``
    as a graph of torch's own kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

from fastsvi.errors import FastSVIError

Validate = Literal["first", "always", "never"]
CudaSteps = Literal["auto", "block", "kernels", "graph"]


class SettingError(FastSVIError, ValueError):
    """An unknown setting, or a value that a setting does not take."""


@dataclass
class _Settings:
    module_local_params: bool = False
    validate: Validate = "first"
    cuda_steps: CudaSteps = "auto"


_CHOICES: dict[str, tuple[Any, ...]] = {
    "module_local_params": (False, True),
    "validate": ("first", "always", "never"),
    "cuda_steps": ("auto", "block", "kernels", "graph"),
}
_current = _Settings()


def get(name: str | None = None) -> Any:
    """Value of setting ``name``, or a dict of all settings.

    >>> get("validate")
    'first'
    """
    if name is None:
        return {field.name: getattr(_current, field.name) for field in fields(_current)}
    _require_known(name)
    return getattr(_current, name)


def set(**values: Any) -> None:
    """Set one or more settings; on a bad name or value none is changed."""
    for name, value in values.items():
        _require_known(name)
        if value not in _CHOICES[name]:
            raise SettingError(f"setting {name!r} takes one of {_CHOICES[name]}, found {value!r}")
    for name, value in values.items():
        setattr(_current, name, value)


@contextmanager
def context(**values: Any) -> Iterator[None]:
    """Set settings for the length of a ``with`` block.

    >>> with context(validate="always"):
    ...     get("validate")
    'always'
    """
    before = get()
    set(**values)
    try:
        yield
    finally:
        set(**before)


def _require_known(name: str) -> None:
    if name not in _CHOICES:
        raise SettingError(f"unknown setting {name!r}; the known ones are {sorted(_CHOICES)}")


if "FASTSVI_CUDA_STEPS" in os.environ:
    set(cuda_steps=os.environ["FASTSVI_CUDA_STEPS"])
