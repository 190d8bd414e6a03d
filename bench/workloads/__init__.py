"""What the benchmarks fit: seven models, their data, and how large they are on which device.

The table :data:`WORKLOADS` is all that a library needs to know of a workload beside its model:

==================  ==========================================================================
``eight_schools``   Rubin (1981), non-centred: ten numbers, all of the time is overhead
``logistic``        logistic regression on all rows: one product of a matrix and a vector
``intercepts``      varying intercepts, as in the radon study: gathers, three scales
``wide``            independent normal means: parameters by the million, bound by memory
``minibatch``       logistic regression on a random subset of the rows in each step
``vae``             a variational auto-encoder: an amortised guide, two networks, minibatches
``regressions``     many independent regressions fitted at once
==================  ==========================================================================

A model's text stands in :mod:`bench.workloads.pyro_models` (fastsvi and Pyro share it) and
:mod:`bench.workloads.numpyro_models`; its log-density in plain torch, for the hand-written peers
and for the one evaluator of all results, in :mod:`bench.workloads.log_joints`. Priors, data, first
values (0 in unconstrained space, scales 0.1), optimizer (Adam), precision (float32) and threads are
the same for all libraries.

This module imports NumPy only: NumPyro's time to fit must not contain the import of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Latent:
    """A latent site: its shape, and whether it is positive (then the guide holds its log)."""

    shape: tuple[int, ...] = ()
    positive: bool = False


@dataclass(frozen=True)
class Size:
    """A workload at one size.

    Attributes:
        shape: what ``data`` and ``latents`` are made from, such as the number of rows.
        steps: steps of a fit, by number of particles.
        quick: numbers of particles that a quick run takes.
        elbo: the best ELBO that there is; of the auto-encoder, what a good fit has after these
            steps. None if only the agreement of the libraries is asked for.
        gap: by how much the noise of one particle keeps Adam below ``elbo``, on average; None
            where that is not known.
        tolerance: by how much a loss, or an ELBO of unknown ``gap``, may miss what is expected;
            None stands for half a percent.
    """

    shape: Mapping[str, int]
    steps: Mapping[int, int]
    quick: tuple[int, ...] = (1,)
    elbo: float | None = None
    tolerance: float | None = None
    gap: float | None = None

    def allowed(self, expected: float) -> float:
        """By how much a loss may miss ``expected``."""
        return 0.005 * abs(expected) if self.tolerance is None else self.tolerance


@dataclass(frozen=True)
class Workload:
    """A model with data, at several sizes.

    Attributes:
        name: its name in all tables, and of the functions that make its models.
        sizes: by name: ``cpu``, ``cuda``, and ``tiny`` for tests.
        data: makes the arguments of the model from ``Size.shape``.
        latents: the sites of a mean-field guide from ``Size.shape``; None if the guide is
            hand-written.
        learning_rate: Adam's.
        minibatch: whether a step takes a random ``Size.shape["batch"]`` of the rows.
        fits: whether ``Size.shape["fits"]`` independent models are fitted, one to each slice of
            the data along its first dimension.
        samples: draws of the evaluator.
    """

    name: str
    sizes: Mapping[str, Size]
    data: Callable[..., tuple[Array, ...]]
    latents: Callable[..., dict[str, Latent]] | None
    learning_rate: float = 0.01
    minibatch: bool = False
    fits: bool = False
    samples: int = 1000


@dataclass(frozen=True)
class Case:
    """A workload at one size with a number of particles: what a row of a table is about."""

    workload: Workload
    size: Size
    particles: int
    name: str = field(default="")

    @property
    def shape(self) -> Mapping[str, int]:
        return self.size.shape

    @property
    def steps(self) -> int:
        return self.size.steps[self.particles]

    @property
    def fits(self) -> int:
        return self.shape["fits"] if self.workload.fits else 1

    def data(self) -> tuple[Array, ...]:
        return self.workload.data(**self.shape)

    def latents(self) -> dict[str, Latent]:
        if self.workload.latents is None:
            raise ValueError(f"{self.name} has a hand-written guide and no table of its sites")
        return self.workload.latents(**self.shape)


def case(name: str, size: str, particles: int) -> Case:
    """The workload of that name, at a size of its table, with ``particles`` particles."""
    workload = WORKLOADS[name]
    return Case(workload, workload.sizes[size], particles, name)


# ---- data: synthetic but for the schools, and the same on every machine


def _generator() -> np.random.Generator:
    return np.random.default_rng(0)


def _float(*arrays: Array) -> tuple[Array, ...]:
    return tuple(np.ascontiguousarray(array, dtype=np.float32) for array in arrays)


def schools_data(schools: int) -> tuple[Array, ...]:
    sigma = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
    y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
    return _float(np.array(sigma), np.array(y))


def schools_latents(schools: int) -> dict[str, Latent]:
    return {"mu": Latent(), "tau": Latent(positive=True), "effect": Latent((schools,))}


def logistic_data(rows: int, columns: int, batch: int = 0) -> tuple[Array, ...]:
    generator = _generator()
    x = generator.standard_normal((rows, columns), dtype=np.float32)
    weight = generator.standard_normal(columns, dtype=np.float32)
    y = generator.random(rows) < 1 / (1 + np.exp(-x @ weight))
    return _float(x, y)


def logistic_latents(rows: int, columns: int, batch: int = 0) -> dict[str, Latent]:
    return {"weight": Latent((columns,)), "bias": Latent()}


def intercepts_data(rows: int, groups: int) -> tuple[Array, ...]:
    generator = _generator()
    group = generator.integers(0, groups, rows)
    floor = generator.integers(0, 2, rows)
    level = 1.3 + 0.3 * generator.standard_normal(groups)
    y = level[group] - 0.7 * floor + 0.75 * generator.standard_normal(rows)
    return group, *_float(floor, y)


def intercepts_latents(rows: int, groups: int) -> dict[str, Latent]:
    return {
        "mean": Latent(),
        "spread": Latent(positive=True),
        "slope": Latent(),
        "noise": Latent(positive=True),
        "level": Latent((groups,)),
    }


def wide_data(elements: int) -> tuple[Array, ...]:
    return (_generator().standard_normal(elements, dtype=np.float32),)


def wide_latents(elements: int) -> dict[str, Latent]:
    return {"z": Latent((elements,))}


def regressions_data(fits: int, rows: int, columns: int) -> tuple[Array, ...]:
    generator = _generator()
    x = generator.standard_normal((fits, rows, columns))
    weight = generator.standard_normal((fits, columns, 1))
    y = (x @ weight)[..., 0] + 0.5 * generator.standard_normal((fits, rows))
    return _float(x, y)


def regressions_latents(fits: int, rows: int, columns: int) -> dict[str, Latent]:
    return {
        "weight": Latent((fits, columns)),
        "bias": Latent((fits,)),
        "noise": Latent((fits,), positive=True),
    }


def vae_data(images: int, side: int, hidden: int, latent: int, batch: int) -> tuple[Array, ...]:
    """Discs of random place and size, two pixels in a hundred flipped."""
    generator = _generator()
    row, column = np.divmod(np.arange(side * side), side)
    centre = generator.uniform(0.25 * side, 0.75 * side, (2, images, 1))
    radius = generator.uniform(0.1 * side, 0.3 * side, (images, 1))
    disc = (row - centre[0]) ** 2 + (column - centre[1]) ** 2 < radius**2
    return _float(disc ^ (generator.random(disc.shape) < 0.02))


def vae_weights(images: int, side: int, hidden: int, latent: int, batch: int) -> dict[str, Array]:
    """First weights ``[outputs, inputs]`` and biases of both networks."""
    generator = _generator()
    layers = {
        "encoder.hidden": (side * side, hidden),
        "encoder.loc": (hidden, latent),
        "encoder.log_scale": (hidden, latent),
        "decoder.hidden": (latent, hidden),
        "decoder.logits": (hidden, side * side),
    }
    weights = {}
    for name, (inputs, outputs) in layers.items():
        bound = inputs**-0.5  # as torch.nn.Linear begins
        weights[f"{name}.weight"] = generator.uniform(-bound, bound, (outputs, inputs))
        weights[f"{name}.bias"] = generator.uniform(-bound, bound, outputs)
    return dict(zip(weights, _float(*weights.values()), strict=True))


# ---- the table. ELBOs and gaps are those that ``python -m bench.agreement`` prints: the optimum,
# which no library has fitted, to all digits that stand here, and the gap that is derived from the
# gradient's noise, to about 5%. The auto-encoder's ELBO is the mean of 34 fits by NumPyro, with a
# standard error of 530; single ones vary by 3,100, of which the tolerance is four.

_SCHOOLS = {"schools": 8}
_VAE = {"side": 28, "hidden": 200, "latent": 20, "batch": 128}
_TINY_VAE = {"side": 6, "hidden": 8, "latent": 2, "batch": 16}

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "eight_schools",
            {
                "cpu": Size(
                    _SCHOOLS,
                    {1: 5000, 64: 5000, 1024: 5000},
                    (1, 64),
                    elbo=-31.5973,
                    tolerance=0.25,
                    gap=0.0524,
                ),
                "cuda": Size(_SCHOOLS, {64: 5000, 4096: 5000}, (64,)),
                "tiny": Size(_SCHOOLS, {1: 300, 4: 300}, (1,), None, 10.0),
            },
            schools_data,
            schools_latents,
            samples=20_000,
        ),
        Workload(
            "logistic",
            {
                "cpu": Size(
                    {"rows": 10_000, "columns": 50},
                    {1: 1000, 16: 1000},
                    elbo=-2156.4884,
                    tolerance=3.0,
                    gap=3.35,
                ),
                "cuda": Size({"rows": 1_000_000, "columns": 100}, {1: 1000, 16: 500}),
                "tiny": Size({"rows": 100, "columns": 3}, {1: 300, 4: 300}, (1,), None, 10.0),
            },
            logistic_data,
            logistic_latents,
        ),
        Workload(
            "intercepts",
            {
                "cpu": Size(
                    {"rows": 919, "groups": 85}, {1: 5000}, elbo=-1120.6249, tolerance=2.0, gap=1.85
                ),
                "cuda": Size({"rows": 1_000_000, "groups": 100_000}, {1: 2000, 16: 1000}),
                "tiny": Size({"rows": 60, "groups": 5}, {1: 300, 4: 300}, (1,), None, 10.0),
            },
            intercepts_data,
            intercepts_latents,
        ),
        Workload(
            "wide",
            {
                "cpu": Size(
                    {"elements": 100_000},
                    {1: 500, 8: 500},
                    elbo=-142_754.202,
                    tolerance=600.0,
                    gap=843.0,
                ),
                "cuda": Size({"elements": 100_000_000}, {1: 200, 8: 100}),
                "tiny": Size({"elements": 50}, {1: 300, 4: 300}, (1,), None, 10.0),
            },
            wide_data,
            wide_latents,
            samples=100,
        ),
        Workload(
            "minibatch",
            {
                "cpu": Size(
                    {"rows": 100_000, "columns": 20, "batch": 256},
                    {1: 3000},
                    elbo=-24_975.720,
                    tolerance=80.0,
                    gap=90.6,
                ),
                "cuda": Size({"rows": 10_000_000, "columns": 20, "batch": 4096}, {1: 3000}),
                "tiny": Size({"rows": 200, "columns": 3, "batch": 20}, {1: 300}, (1,), None, 10.0),
            },
            logistic_data,
            logistic_latents,
            minibatch=True,
            samples=200,
        ),
        Workload(
            "vae",
            {
                "cpu": Size(
                    {"images": 10_000, **_VAE}, {1: 1000}, elbo=-1.2831e6, tolerance=1.25e4
                ),
                "cuda": Size({"images": 60_000, **_VAE, "batch": 1024}, {1: 1000}),
                "tiny": Size({"images": 64, **_TINY_VAE}, {1: 100}, (1,), None, 60.0),
            },
            vae_data,
            None,
            learning_rate=1e-3,
            minibatch=True,
            samples=10,
        ),
        Workload(
            "regressions",
            {
                "cpu": Size(
                    {"fits": 1000, "rows": 50, "columns": 5},
                    {1: 2000},
                    elbo=-53_993.636,
                    tolerance=100.0,
                    gap=280.0,
                ),
                "cuda": Size({"fits": 10_000, "rows": 50, "columns": 5}, {1: 2000}),
                "tiny": Size({"fits": 3, "rows": 20, "columns": 2}, {1: 300}, (1,), None, 10.0),
            },
            regressions_data,
            regressions_latents,
            fits=True,
            samples=100,
        ),
    )
}
