"""Stochastic variational inference at hardware speed, for people who write PyTorch.

Programs written for Pyro run under ``import fastsvi as pyro``.

>>> import torch, fastsvi as pyro, fastsvi.distributions as dist
>>> def model(data):
...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
...     with pyro.plate("data", len(data)):
...         pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)
>>> pyro.poutine.trace(model).get_trace(torch.zeros(3)).log_prob_sum().shape
torch.Size([])
"""

import logging as _logging
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from fastsvi import poutine, settings
from fastsvi.poutine import condition, do, markov
from fastsvi.primitives import (
    barrier,
    clear_param_store,
    deterministic,
    enable_validation,
    factor,
    get_param_store,
    iarange,
    irange,
    module,
    param,
    plate,
    plate_stack,
    random_module,
    sample,
    set_rng_seed,
    subsample,
    validation_enabled,
)

if TYPE_CHECKING:
    from fastsvi import (  # noqa: F401 - the lazy ones, for type checkers
        distributions,
        engine,
        errors,
        infer,
        kernels,
        nn,
        optim,
        params,
    )

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "barrier",
    "clear_param_store",
    "condition",
    "deterministic",
    "do",
    "enable_validation",
    "factor",
    "get_param_store",
    "iarange",
    "irange",
    "log",
    "markov",
    "module",
    "param",
    "plate",
    "plate_stack",
    "poutine",
    "random_module",
    "sample",
    "set_rng_seed",
    "settings",
    "subsample",
    "validation_enabled",
]

log = _logging.getLogger("fastsvi")

# Imported when first asked for, as in `pyro.infer.SVI`: `import fastsvi` stays as light as torch.
_LAZY = {
    "contrib",
    "distributions",
    "engine",
    "errors",
    "infer",
    "interop",
    "kernels",
    "nn",
    "optim",
    "params",
    "util",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        try:
            return _import_module(f"fastsvi.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"fastsvi.{name}":
                raise
    raise AttributeError(f"module 'fastsvi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | _LAZY)
