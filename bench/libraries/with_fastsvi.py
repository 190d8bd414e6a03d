"""fastsvi: the model as for Pyro, ``svi.run``."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import torch

import fastsvi as pyro
from bench.libraries import Fit, NotBuilt
from bench.libraries.store_names import named
from bench.workloads import Array, Case
from bench.workloads.pyro_models import programs
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal, init_to_feasible


def prepare(case: Case, device: str) -> Fit:
    return FastSVIFit(case, device)


class FastSVIFit:
    """A fit by ``svi.run``; ``compile`` is its argument of that name for the next runs."""

    fixed_length = False

    def __init__(self, case: Case, device: str, compile: Any = "auto") -> None:
        self.case = case
        self.compile = compile
        self.in_blocks = compile is False
        many: dict[str, Any] = {}
        self._run: dict[str, Any] = {"progress_bar": False}
        if case.workload.fits:
            if "num_fits" not in inspect.signature(SVI.__init__).parameters:
                raise NotBuilt("not built yet: SVI(num_fits=...)")
            many = {"num_fits": case.fits}
            self._run["fit_dims"] = (0,) * len(case.data())
        name = "regression" if case.workload.fits else case.name
        model, guide = programs(name, pyro, case.shape)
        self.data = [torch.from_numpy(array).to(device) for array in case.data()]
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.svi = SVI(
            model,
            guide or AutoNormal(model, init_loc_fn=init_to_feasible),
            pyro.optim.Adam({"lr": case.workload.learning_rate}),
            Trace_ELBO(case.particles, vectorize_particles=case.particles > 1),
            **many,
        )
        self.result: Any = None

    @property
    def note(self) -> str | None:
        obstacle = getattr(self.result, "obstacle", None)
        if self.compile is False:
            return None
        if obstacle:
            return f"eager: {obstacle}"
        steps = self.svi._fits or self.svi._captures
        if steps.form in (None, "native"):
            return None
        return f"as {steps.form}" + (f": {steps.passed_over}" if steps.passed_over else "")

    def step(self) -> None:
        if self.case.workload.fits:
            self.run(1)
        else:
            self.svi.step(*self.data)

    def run(self, steps: int) -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an obstacle is reported as a note
            self.result = self.svi.run(steps, *self.data, compile=self.compile, **self._run)
        losses = self.result.losses
        if self.case.workload.fits and losses.dim() > 1:
            losses = losses.sum(-1)
        return np.asarray(losses.double().cpu())

    def settle(self, steps: int) -> None:
        if self.compile:
            self.compile = True  # waits for the compiled form
            self.run(20)

    def posterior(self) -> dict[str, Array]:
        params = dict(pyro.get_param_store().items())
        if self.result is not None:
            params.update(self.result.params)
        return named(params)
