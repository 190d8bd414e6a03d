"""Stock Pyro: ``svi.step`` in a loop, validation off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_feasible

from bench.libraries import Fit
from bench.libraries.store_names import named
from bench.workloads import Array, Case
from bench.workloads.pyro_models import programs


def prepare(case: Case, device: str) -> Fit:
    return PyroFit(case, device)


class PyroFit:
    in_blocks = True
    fixed_length = False

    def __init__(self, case: Case, device: str, jit: bool = False) -> None:
        self.note = "one model with a plate over the fits" if case.workload.fits else None
        self.data = [torch.from_numpy(array).to(device) for array in case.data()]
        pyro.enable_validation(False)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide = programs(case.name, pyro, case.shape)
        # Pyro vectorises particles by a plate and must be told how deep the model's plates go.
        options: dict[str, Any] = {
            "num_particles": case.particles,
            "vectorize_particles": case.particles > 1,
            "max_plate_nesting": 2 if case.workload.fits else 1,
        }
        elbo = JitTrace_ELBO(ignore_jit_warnings=True, **options) if jit else Trace_ELBO(**options)
        self.svi = SVI(
            model,
            guide or AutoNormal(model, init_loc_fn=init_to_feasible),
            pyro.optim.Adam({"lr": case.workload.learning_rate}),
            elbo,
        )

    def step(self) -> None:
        self.svi.step(*self.data)

    def run(self, steps: int) -> Array:
        return np.array([self.svi.step(*self.data) for _ in range(steps)])

    def settle(self, steps: int) -> None:
        pass

    def posterior(self) -> dict[str, Array]:
        return named(dict(pyro.get_param_store().items()))
