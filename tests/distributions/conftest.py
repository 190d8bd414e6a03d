"""One list of distributions that every conformance test runs over, with Pyro as the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro.distributions as pyro_dist
import pytest
import torch

import fastsvi.distributions as dist

torch_t = torch.Tensor


def f64(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.5


def real(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def unit(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1


def simplex(*shape: int) -> torch.Tensor:
    return torch.softmax(real(*shape), -1)


def tril(*batch: int, dim: int) -> torch.Tensor:
    return real(*batch, dim, dim).tril(-1) + positive(*batch, dim).diag_embed()


def cov(*batch: int, dim: int) -> torch.Tensor:
    factor = tril(*batch, dim=dim)
    return factor @ factor.mT


@dataclass
class Case:
    """A family and a way to make its arguments; ``build`` gives ours, ``oracle`` Pyro's."""

    family: str
    make: Callable[[], dict[str, Any]]
    label: str
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        torch.manual_seed(self.seed)
        return self.make()

    def build(self, **more: Any) -> Any:
        return getattr(dist, self.family)(**self.arguments(), **more)

    def oracle(self, **more: Any) -> Any:
        return getattr(pyro_dist, self.family)(**self.arguments(), **more)

    def __str__(self) -> str:
        return f"{self.family}-{self.label}"


# Arguments for batch shapes (), (3,) and (2, 1) x (3,) as far as the family takes them.
_LOC_SCALE = [
    ("numbers", lambda: {"loc": 0.5, "scale": 2.0}),
    ("standard", lambda: {"loc": 0, "scale": 1}),
    ("vectors", lambda: {"loc": real(3), "scale": positive(3)}),
    ("mixed", lambda: {"loc": real(3), "scale": 1.5}),
    ("mixed2", lambda: {"loc": 0.0, "scale": positive(3)}),
    ("broadcast", lambda: {"loc": real(2, 1), "scale": positive(3)}),
]
_SCALE = [
    ("number", lambda: {"scale": 5.0}),
    ("scalar", lambda: {"scale": f64(2.0)[0]}),
    ("matrix", lambda: {"scale": positive(2, 3)}),
]
_SKEWED = [
    ("vectors", lambda: {"loc": real(3), "scale": positive(3), "asymmetry": positive(3)}),
    ("numbers", lambda: {"loc": 0.5, "scale": 2.0, "asymmetry": 0.7}),
]


def _two_positive(a: str, b: str) -> list[Any]:
    return [
        ("numbers", lambda: {a: 2.5, b: 1.5}),
        ("ones", lambda: {a: 1.0, b: 1.0}),
        ("vectors", lambda: {a: positive(3), b: positive(3)}),
        ("mixed", lambda: {a: 2.0, b: positive(3)}),
        ("broadcast", lambda: {a: positive(2, 1), b: positive(3)}),
    ]


def _probs_or_logits(**more: Any) -> list[Any]:
    return [
        ("probs", lambda: {**more, "probs": unit(3)}),
        ("logits", lambda: {**more, "logits": real(2, 3)}),
    ]


FAMILIES: dict[str, list[Any]] = {
    "AffineBeta": [
        (
            "vectors",
            lambda: {
                "concentration1": positive(3),
                "concentration0": positive(3),
                "loc": real(3),
                "scale": positive(3),
            },
        ),
    ],
    "AsymmetricLaplace": _SKEWED,
    "Bernoulli": [*_probs_or_logits(), ("number", lambda: {"probs": 0.25})],
    "Beta": _two_positive("concentration1", "concentration0"),
    "BetaBinomial": [
        (
            "vectors",
            lambda: {
                "concentration1": positive(3),
                "concentration0": positive(3),
                "total_count": f64(4.0)[0],
            },
        ),
        (
            "numbers",
            lambda: {"concentration1": f64(2.0)[0], "concentration0": 3.0, "total_count": 5},
        ),
    ],
    "Binomial": _probs_or_logits(total_count=4),
    "Categorical": [
        ("probs", lambda: {"probs": simplex(2, 4)}),
        ("logits", lambda: {"logits": real(4)}),
        ("unnormalised", lambda: {"probs": positive(3, 4)}),
    ],
    "Cauchy": _LOC_SCALE,
    "Chi2": [("number", lambda: {"df": 3.0}), ("vector", lambda: {"df": positive(3)})],
    "ContinuousBernoulli": _probs_or_logits(),
    "Delta": [
        ("scalar", lambda: {"v": real(2, 3)}),
        ("event", lambda: {"v": real(2, 3), "log_density": real(2), "event_dim": 1}),
    ],
    "Dirichlet": [("batch", lambda: {"concentration": positive(2, 3)})],
    "DirichletMultinomial": [
        ("int", lambda: {"concentration": positive(2, 3), "total_count": 5}),
        ("sparse", lambda: {"concentration": positive(3), "total_count": 5, "is_sparse": True}),
    ],
    "Exponential": [
        ("number", lambda: {"rate": 2.0}),
        ("matrix", lambda: {"rate": positive(2, 3)}),
    ],
    "ExtendedBetaBinomial": [
        (
            "vectors",
            lambda: {
                "concentration1": positive(3),
                "concentration0": positive(3),
                "total_count": f64(4.0)[0],
            },
        ),
    ],
    "ExtendedBinomial": _probs_or_logits(total_count=4),
    "FisherSnedecor": [("vectors", lambda: {"df1": positive(3) + 3, "df2": positive(3) + 5})],
    "Gamma": _two_positive("concentration", "rate"),
    "GammaPoisson": _two_positive("concentration", "rate")[2:],
    "GeneralizedPareto": [
        ("vectors", lambda: {"loc": real(3), "scale": positive(3), "concentration": unit(3) / 4}),
    ],
    "Geometric": _probs_or_logits(),
    "Gumbel": _LOC_SCALE[2:3],
    "HalfCauchy": _SCALE,
    "HalfNormal": _SCALE,
    "InverseGamma": [("vectors", lambda: {"concentration": positive(3) + 3, "rate": positive(3)})],
    "Kumaraswamy": [
        ("vectors", lambda: {"concentration1": positive(3), "concentration0": positive(3)}),
    ],
    "LKJ": [("batch", lambda: {"dim": 3, "concentration": positive(2)})],
    "LKJCholesky": [("batch", lambda: {"dim": 3, "concentration": positive(2)})],
    "Laplace": _LOC_SCALE,
    "LogNormal": _LOC_SCALE,
    "Logistic": _LOC_SCALE,
    "LogisticNormal": [("vectors", lambda: {"loc": real(2, 3), "scale": positive(2, 3)})],
    "LowRankMultivariateNormal": [
        ("batch", lambda: {"loc": real(2, 3), "cov_factor": real(3, 2), "cov_diag": positive(3)}),
    ],
    "Multinomial": [
        ("probs", lambda: {"total_count": 5, "probs": simplex(2, 4)}),
        ("logits", lambda: {"total_count": 5, "logits": real(4)}),
    ],
    "MultivariateNormal": [
        ("scale_tril", lambda: {"loc": real(2, 3), "scale_tril": tril(dim=3)}),
        ("covariance", lambda: {"loc": real(3), "covariance_matrix": cov(2, dim=3)}),
        ("precision", lambda: {"loc": real(3), "precision_matrix": cov(dim=3)}),
    ],
    "MultivariateStudentT": [
        ("batch", lambda: {"df": positive(2) + 2, "loc": real(2, 3), "scale_tril": tril(dim=3)}),
    ],
    "NanMaskedNormal": _LOC_SCALE[2:3],
    "NanMaskedMultivariateNormal": [
        ("covariance", lambda: {"loc": real(3), "covariance_matrix": cov(2, dim=3)}),
    ],
    "NegativeBinomial": _probs_or_logits(total_count=4),
    "Normal": _LOC_SCALE,
    "OneHotCategorical": [
        ("probs", lambda: {"probs": simplex(2, 4)}),
        ("logits", lambda: {"logits": real(4)}),
    ],
    "OneHotCategoricalStraightThrough": [("probs", lambda: {"probs": simplex(2, 4)})],
    "OrderedLogistic": [
        ("batch", lambda: {"predictor": real(2), "cutpoints": real(3).sort().values}),
    ],
    "Pareto": [("vectors", lambda: {"scale": positive(3), "alpha": positive(3) + 2})],
    "Poisson": [
        ("number", lambda: {"rate": 2.0}),
        ("matrix", lambda: {"rate": positive(2, 3)}),
        ("sparse", lambda: {"rate": positive(2, 3), "is_sparse": True}),
    ],
    "ProjectedNormal": [
        ("circle", lambda: {"concentration": real(2, 2)}),
        ("sphere", lambda: {"concentration": real(2, 3)}),
        ("4d", lambda: {"concentration": real(4)}),
    ],
    "RelaxedBernoulli": _probs_or_logits(temperature=f64(0.7)[0]),
    "RelaxedBernoulliStraightThrough": _probs_or_logits(temperature=f64(0.7)[0]),
    "RelaxedOneHotCategorical": [
        ("probs", lambda: {"temperature": f64(0.7)[0], "probs": simplex(2, 4)}),
    ],
    "RelaxedOneHotCategoricalStraightThrough": [
        ("logits", lambda: {"temperature": f64(0.7)[0], "logits": real(2, 4)}),
    ],
    "SkewLogistic": _SKEWED,
    "SoftAsymmetricLaplace": _SKEWED,
    "SoftLaplace": _LOC_SCALE[2:3],
    "StudentT": [
        ("numbers", lambda: {"df": 3.0}),
        ("vectors", lambda: {"df": positive(3) + 2, "loc": real(3), "scale": positive(3)}),
        ("mixed", lambda: {"df": 4.0, "loc": real(3), "scale": 2.0}),
        ("broadcast", lambda: {"df": positive(2, 1) + 2, "loc": 0.0, "scale": positive(3)}),
    ],
    "Uniform": [
        ("numbers", lambda: {"low": -1.0, "high": 2.0}),
        ("vectors", lambda: {"low": real(3), "high": real(3) + 6.0}),
        ("mixed", lambda: {"low": -5.0, "high": real(2, 1)}),
    ],
    "Unit": [("matrix", lambda: {"log_factor": real(2, 3)})],
    "VonMises": [("vectors", lambda: {"loc": real(3), "concentration": positive(3)})],
    "Weibull": [("vectors", lambda: {"scale": positive(3), "concentration": positive(3)})],
    "Wishart": [("batch", lambda: {"df": positive(2) + 5, "covariance_matrix": cov(dim=3)})],
    "ZeroInflatedNegativeBinomial": [
        ("probs", lambda: {"total_count": f64(3.0)[0], "probs": unit(3), "gate": unit(3)}),
        ("logits", lambda: {"total_count": f64(3.0)[0], "logits": real(3), "gate_logits": real(3)}),
    ],
    "ZeroInflatedPoisson": [
        ("gate", lambda: {"rate": positive(3), "gate": unit(3)}),
        ("gate_logits", lambda: {"rate": positive(3), "gate_logits": real(2, 1)}),
    ],
}

CASES = [
    Case(family, make, label, seed)
    for family, makes in FAMILIES.items()
    for seed, (label, make) in enumerate(makes)
    if hasattr(dist, family)
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=str)
    if "one_case" in metafunc.fixturenames:
        firsts = {case.family: case for case in reversed(CASES)}
        metafunc.parametrize("one_case", list(firsts.values()), ids=str)


@pytest.fixture(autouse=True)
def validation_is_restored() -> Iterator[None]:
    """Validation on for the test, and whatever the test does undone after it."""
    before = dist.is_validation_enabled()
    dist.enable_validation(True)
    yield
    dist.enable_validation(before)


@pytest.fixture
def families() -> dict[str, list[Any]]:
    return FAMILIES
