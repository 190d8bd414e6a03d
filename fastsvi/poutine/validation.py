"""How much is checked, and the check of values that costs a host synchronisation."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fastsvi import settings
from fastsvi.errors import FastSVIWarning


def is_validation_enabled() -> bool:
    """True if every check was asked for, also those that read tensors back to the host."""
    return settings.get("validate") == "always"


def enable_validation(is_validate: bool = True) -> None:
    """Check always (``True``) or never (``False``)."""
    settings.set(validate="always" if is_validate else "never")


def is_checking() -> bool:
    """True unless all checks were switched off. For checks of names and shapes, which are free."""
    return settings.get("validate") != "never"


def warn_unless_finite(value: Any, what: str) -> None:
    """Warn if ``value`` is NaN or +inf, and later if its gradient is.

    Minus infinity is a legal log-density. Reads the value back to the host.
    """
    if isinstance(value, torch.Tensor) and value.requires_grad:
        value.register_hook(lambda grad: _warn(grad, f"backward {what}"))
    _warn(value, what)


def _warn(value: Any, what: str) -> None:
    value = torch.as_tensor(value)
    for word, test in (("NaN", torch.isnan), ("+inf", torch.isposinf)):
        if bool(test(value).any()):
            warnings.warn(f"Encountered {word}: {what}", FastSVIWarning, stacklevel=5)
