"""NumPyro at its best: first values and all steps in one ``jit``, data as arguments."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import numpyro
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_feasible

from bench.libraries import Fit
from bench.workloads import Array, Case
from bench.workloads.numpyro_models import programs


def prepare(case: Case, device: str) -> Fit:
    return NumPyroFit(case, device)


class NumPyroFit:
    note: str | None = None
    in_blocks = False
    fixed_length = True

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.many = case.workload.fits
        model, guide = programs(case.name, case.shape)
        place = jax.devices("gpu" if device == "cuda" else "cpu")[0]
        self.data = [jax.device_put(array, place) for array in case.data()]
        keys = jax.random.PRNGKey(0)
        self.keys = jax.random.split(keys, case.fits) if self.many else keys
        self.svi = SVI(
            model,
            guide or AutoNormal(model, init_loc_fn=init_to_feasible),
            numpyro.optim.Adam(case.workload.learning_rate),
            Trace_ELBO(case.particles),
        )
        self.state: Any = None
        self._compiled: dict[tuple[int, bool], Any] = {}

    def step(self) -> None:
        self.run(1)

    def run(self, steps: int) -> Array:
        begins = self.state is None
        start = self.keys if begins else self.state
        compiled = self._compiled.get((steps, begins)) or self._compile(steps, begins)
        self.state, losses = compiled(start, *self.data)
        total = np.asarray(losses, dtype=np.float64)  # waits
        return total.sum(0) if self.many else total

    def _batch(self, key: Any, data: tuple[Any, ...]) -> tuple[Any, ...]:
        """Random rows of the data where the workload takes minibatches, or else all."""
        if not self.case.workload.minibatch:
            return data
        # With repetition, which is cheaper than without and as good for so few.
        key = jax.random.fold_in(key, 1)  # svi.update splits the key itself
        rows = jax.random.randint(key, (self.case.shape["batch"],), 0, len(data[0]))
        return tuple(array[rows] for array in data)

    def settle(self, steps: int) -> None:
        # The first run began with init; one that goes on from a state is another program.
        lowered = self._compile(steps, begins=False).lower(self.state, *self.data)
        self._compiled[steps, False] = lowered.compile()

    def _compile(self, steps: int, begins: bool) -> Any:
        def fit(start: Any, *data: Any) -> Any:
            def step(state: Any, _: Any) -> Any:
                return self.svi.update(state, *self._batch(state.rng_key, data))

            state = self.svi.init(start, *self._batch(start, data)) if begins else start
            return jax.lax.scan(step, state, length=steps)

        return self._compiled.setdefault(
            (steps, begins), jax.jit(jax.vmap(fit) if self.many else fit)
        )

    def posterior(self) -> dict[str, Array]:
        get = jax.vmap(self.svi.get_params) if self.many else self.svi.get_params
        found = {}
        for name, value in get(self.state).items():
            for kind in ("loc", "scale"):
                if name.endswith(f"_auto_{kind}"):
                    name = f"{kind}.{name.removesuffix(f'_auto_{kind}')}"
            found[name] = np.asarray(value)
        return found
