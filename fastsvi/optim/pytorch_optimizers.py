"""Every optimizer and scheduler of torch under its name, wrapped for parameters by name.

The list follows the installed torch: ``fastsvi.optim.NAdam({"lr": 0.01})`` is a
:class:`~fastsvi.optim.PyroOptim` of ``torch.optim.NAdam``, ``fastsvi.optim.StepLR({...})`` a
:class:`~fastsvi.optim.PyroLRScheduler` of ``torch.optim.lr_scheduler.StepLR``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastsvi.optim.lr_scheduler import PyroLRScheduler
from fastsvi.optim.optim import PyroOptim
from fastsvi.optim.options import OptionsLike


def Adam(optim_args: OptionsLike, clip_args: OptionsLike | None = None) -> PyroOptim:
    """Adam (Kingma and Ba 2015), fused over all parameters of the param store's buffers.

    Args:
        optim_args: options of ``torch.optim.Adam`` (``lr``, ``betas``, ``eps``,
            ``weight_decay``, ...), or a function of the parameter's name that returns them.
        clip_args: ``clip_norm`` and ``clip_value``, see :class:`~fastsvi.optim.PyroOptim`.

    >>> Adam({"lr": 0.01}, {"clip_norm": 10.0})
    PyroOptim(Adam, {'lr': 0.01})
    >>> by_name = Adam(lambda name: {"lr": 0.1 if name.endswith("scale") else 0.01})
    """
    return PyroOptim(torch.optim.Adam, optim_args, clip_args)


def AdamW(optim_args: OptionsLike, clip_args: OptionsLike | None = None) -> PyroOptim:
    """AdamW (Loshchilov and Hutter 2019), fused like :func:`Adam`, with its arguments."""
    return PyroOptim(torch.optim.AdamW, optim_args, clip_args)


def _optimizer(constructor: Callable[..., Any]) -> Callable[..., PyroOptim]:
    def wrapped(optim_args: OptionsLike, clip_args: OptionsLike | None = None) -> PyroOptim:
        return PyroOptim(constructor, optim_args, clip_args)

    return _named(wrapped, constructor, "torch.optim", "PyroOptim")


def _scheduler(constructor: Callable[..., Any]) -> Callable[..., PyroLRScheduler]:
    def wrapped(
        optim_args: Mapping[str, Any], clip_args: OptionsLike | None = None
    ) -> PyroLRScheduler:
        return PyroLRScheduler(constructor, optim_args, clip_args)

    return _named(wrapped, constructor, "torch.optim.lr_scheduler", "PyroLRScheduler")


def _named(wrapped: Any, constructor: Callable[..., Any], module: str, wrapper: str) -> Any:
    name = constructor.__name__
    wrapped.__name__ = wrapped.__qualname__ = name
    wrapped.__doc__ = f":class:`{module}.{name}`, wrapped by :class:`~fastsvi.optim.{wrapper}`."
    return wrapped


def _subclasses(module: Any, base: type) -> dict[str, type]:
    return {
        name: found
        for name, found in vars(module).items()
        if isinstance(found, type) and issubclass(found, base) and not name.startswith("_")
    }


# LBFGS evaluates its closure many times per step, which a stochastic loss does not allow.
_NOT_WRAPPED = {"Optimizer", "LBFGS", "LRScheduler"}
_OPTIMIZERS = _subclasses(torch.optim, torch.optim.Optimizer)
_SCHEDULERS = _subclasses(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)

for _wrap, _classes in ((_optimizer, _OPTIMIZERS), (_scheduler, _SCHEDULERS)):
    for _name, _class in _classes.items():
        if _name not in _NOT_WRAPPED:
            globals().setdefault(_name, _wrap(_class))

__all__ = sorted((_OPTIMIZERS.keys() | _SCHEDULERS.keys()) - _NOT_WRAPPED)
