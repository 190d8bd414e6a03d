"""Options of an optimizer: given as a dict or by parameter name, checked before they are used."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastsvi.errors import DtypeError, FastSVIError, describe
from fastsvi.params.names import (
    module_from_param_with_module_name,
    normalize_param_name,
    user_param_name,
)

Options = dict[str, Any]
OptionsLike = Mapping[str, Any] | Callable[..., Mapping[str, Any]]

CLIP_OPTIONS = ("clip_norm", "clip_value")

# What each option of torch's optimizers may be, where a wrong value is a plain mistake.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda v: v >= 0, "must not be negative; gradients are always descended"),
    "eps": (lambda v: v >= 0, "must not be negative"),
    "weight_decay": (lambda v: v >= 0, "must not be negative"),
    "betas": (
        lambda v: len(v) == 2 and all(0 <= b < 1 for b in v),
        "must be two numbers in [0, 1)",
    ),
    "momentum": (lambda v: v >= 0, "must not be negative"),
    "clip_norm": (lambda v: v >= 0, "must not be negative"),
    "clip_value": (lambda v: v >= 0, "must not be negative"),
    "lrd": (lambda v: v > 0, "must be positive; it multiplies lr at every step"),
}


class OptionError(FastSVIError, ValueError):
    """An optimizer was given an option that it does not have, or a value out of its range."""


class ByName:
    """Options that are the same for all parameters, or a function of the parameter's name.

    A function of one argument gets the full name as ``nn.Module.named_parameters`` writes it
    ("net.bias" for the store's "net$$$bias"); a function of two, as old Pyro programs have, gets
    the module's name and the name within it.
    """

    def __init__(self, what: str, given: OptionsLike | None, check: Callable[[Options, str], None]):
        if given is None:
            given = {}
        if not (callable(given) or isinstance(given, Mapping)):
            raise DtypeError(
                f"{what} must be a dict of options such as {{'lr': 0.01}}, or a function of the "
                f"parameter's name that returns one; found {describe(given)}"
            )
        self.what = what
        self.given = given
        self._check = check
        self._num_names = 0
        if callable(given):
            self._num_names = _count_arguments(given)
        else:
            check(dict(given), what)

    def __bool__(self) -> bool:
        return bool(self._num_names or self.given)

    def of(self, name: str | None) -> Options:
        """A fresh dict of the options of parameter ``name``."""
        if not callable(self.given):
            return dict(self.given)
        if name is None:
            raise OptionError(
                f"{self.what} is a function of the parameter's name, but a tensor that is not in "
                "the param store has none; give a dict of options instead"
            )
        if self._num_names == 2:
            found = self.given(module_from_param_with_module_name(name), user_param_name(name))
        else:
            found = self.given(normalize_param_name(name))
        where = f"{self.what} for parameter '{name}'"
        if not isinstance(found, Mapping):
            raise DtypeError(f"{where} returned {describe(found)}; it must return a dict")
        self._check(dict(found), where)
        return dict(found)


def checker(constructor: Callable[..., Any]) -> Callable[[Options, str], None]:
    """A function that raises for options which ``constructor`` does not take."""
    try:
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
    except (TypeError, ValueError):  # built in C, or otherwise without a signature
        parameters = []
    open_ended = not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = [p.name for p in parameters]
    owner = getattr(constructor, "__name__", repr(constructor))

    def check(options: Options, where: str) -> None:
        if not open_ended:
            require_known(options, known, owner, where)
        require_in_range(options, where)

    return check


def check_clip(options: Options, where: str) -> None:
    """Raise unless ``options`` are those of gradient clipping."""
    require_known(options, list(CLIP_OPTIONS), "gradient clipping", where)
    require_in_range(options, where)


def require_known(options: Options, known: list[str], owner: str, where: str) -> None:
    for key in options:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{close[0]}'? It" if close else "it"
            raise OptionError(
                f"{where}: {owner} has no option '{key}'; {hint} takes {', '.join(sorted(known))}"
            )


def require_in_range(options: Options, where: str) -> None:
    for key, value in options.items():
        if key not in _RANGES or value is None or isinstance(value, torch.Tensor):
            continue  # a learning rate that is a tensor is not read: that would wait for the device
        fits, rule = _RANGES[key]
        try:
            good = fits(value)
        except TypeError:
            good, rule = False, f"has the wrong type; it {rule}"
        if not good:
            raise OptionError(f"{where}: option '{key}' {rule}; found {describe(value)}")


def _count_arguments(function: Callable[..., Any]) -> int:
    try:
        return len(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return 1
