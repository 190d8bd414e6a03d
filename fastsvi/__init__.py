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

import gc as _gc
import logging as _logging
from collections.abc import Iterator as _Iterator
from contextlib import contextmanager as _contextmanager
from importlib import import_module as _import_module
from typing import TYPE_CHECKING


@_contextmanager
def _without_collections() -> _Iterator[None]:
    """Let no garbage be collected, and count what is there at the end as old.

    Modules are no garbage. To find that out, the collector would walk all of torch several times,
    which takes a tenth as long as to import it.
    """
    was_enabled = _gc.isenabled()
    _gc.disable()
    try:
        yield
    finally:
        if not _gc.get_freeze_count():  # what the user froze stays frozen
            _gc.freeze()
            _gc.unfreeze()  # into the oldest generation
        if was_enabled:
            _gc.enable()


with _without_collections():
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
