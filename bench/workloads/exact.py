"""The mean-field guides of the workloads, with no noise at all: their ELBO, and the best of them.

With a diagonal normal guide every expectation in these ELBOs is that of a polynomial, of an
exponential, or of a function of one normal number, for which Gauss-Hermite quadrature gives all
digits. So there is one optimum that every library's fit must come to, and no library found it.
The auto-encoder has no such form. ``python -m bench.agreement`` prints the optima.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.workloads import Array, Case

_LOG_ROOT_TWO_PI = 0.5 * math.log(2 * math.pi)
# Nodes of the quadrature. Twice as many change no optimum here by 1e-8: a test looks.
NODES = 24
_CHUNK = 2**22  # numbers of an intermediate result

Marginals = Mapping[str, "Marginal"]


@dataclass(frozen=True)
class Marginal:
    """A normal number ``u`` of the guide, or the positive ``exp(u)``."""

    loc: Tensor
    scale: Tensor

    @property
    def variance(self) -> Tensor:
        return self.scale.square()

    @property
    def square(self) -> Tensor:
        return self.loc.square() + self.variance

    def power(self, k: float) -> Tensor:
        """Of ``exp(u)``: the mean of its ``k``-th power."""
        return (k * self.loc + 0.5 * k * k * self.variance).exp()


def has_optimum(name: str) -> bool:
    """Whether a workload's ELBO is known without noise."""
    return name in _ELBOS


# ---- expectations under the guide


def _normal(square: Tensor, scale: float | Tensor) -> Tensor:
    """Log-density of a normal number whose squared distance from its mean is ``square``."""
    log_scale = math.log(scale) if isinstance(scale, float) else scale.log()
    return -0.5 * square / scale**2 - log_scale - _LOG_ROOT_TWO_PI


def _softplus(loc: Tensor, variance: Tensor) -> Tensor:
    """Mean of ``log(1 + exp(u))``, element by element."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    weight = torch.from_numpy(weights / weights.sum())
    u = loc[..., None] + variance.sqrt()[..., None] * torch.from_numpy(nodes)
    return functional.softplus(u) @ weight


def _half_cauchy(z: Marginal, scale: float) -> Tensor:
    """Log-density of ``exp(u)``, with the ``u`` that the change of variables adds."""
    tail = _softplus(2 * (z.loc - math.log(scale)), 4 * z.variance)
    return math.log(2 / (math.pi * scale)) - tail + z.loc


# ---- E log p(z, data) by block, as log_joints.py has log p: [1], [elements] or [fits]


def eight_schools(q: Marginals, sigma: Tensor, y: Tensor) -> Tensor:
    mu, tau, effect = q["mu"], q["tau"], q["effect"]
    product = tau.power(1) * effect.loc
    spread = mu.variance + tau.power(2) * effect.square - product.square()
    observed = _normal((y - mu.loc - product).square() + spread, sigma)
    prior = _normal(mu.square, 5.0) + _half_cauchy(tau, 5.0)
    return prior + (_normal(effect.square, 1.0) + observed).sum(-1, keepdim=True)


def logistic(q: Marginals, x: Tensor, y: Tensor) -> Tensor:
    weight, bias = q["weight"], q["bias"]
    prior = _normal(weight.square, 1.0).sum(-1, keepdim=True) + _normal(bias.square, 10.0)
    parts = []
    for rows, seen in zip(x.split(_CHUNK // NODES), y.split(_CHUNK // NODES), strict=True):
        logits = rows @ weight.loc.T + bias.loc
        variance = rows.square() @ weight.variance.T + bias.variance
        parts.append((seen * logits[:, 0] - _softplus(logits, variance)[:, 0]).sum())
    return prior[:, 0] + torch.stack(parts).sum()


def intercepts(q: Marginals, group: Tensor, floor: Tensor, y: Tensor) -> Tensor:
    mean, spread, slope, noise, level = (
        q[name] for name in ("mean", "spread", "slope", "noise", "level")
    )
    prior = _normal(mean.square, 10.0) + _normal(slope.square, 10.0)
    prior = prior + _half_cauchy(spread, 5.0) + _half_cauchy(noise, 5.0)
    apart = (level.loc - mean.loc).square() + level.variance + mean.variance
    away = (y - level.loc[:, group] - slope.loc * floor).square()
    away = away + level.variance[:, group] + slope.variance * floor.square()
    return (prior + _positive_scale(apart, spread) + _positive_scale(away, noise))[:, 0]


def _positive_scale(square: Tensor, scale: Marginal) -> Tensor:
    """Log-density of a row of normal numbers with a common, uncertain scale."""
    total, count = square.sum(-1, keepdim=True), square.shape[-1]
    return -0.5 * total * scale.power(-2) - count * (scale.loc + _LOG_ROOT_TWO_PI)


def wide(q: Marginals, y: Tensor) -> Tensor:
    z = q["z"]
    away = (y[:, None] - z.loc).square() + z.variance
    return (_normal(z.square, 1.0) + _normal(away, 0.5))[:, 0]


def regressions(q: Marginals, x: Tensor, y: Tensor) -> Tensor:
    weight, bias, noise = q["weight"], q["bias"], q["noise"]
    fitted = torch.einsum("frk,fk->fr", x, weight.loc) + bias.loc
    variance = torch.einsum("frk,fk->fr", x.square(), weight.variance) + bias.variance
    prior = _normal(weight.square, 1.0).sum(-1, keepdim=True) + _normal(bias.square, 1.0)
    away = (y - fitted).square() + variance
    return (prior + _half_cauchy(noise, 1.0) + _positive_scale(away, noise))[:, 0]


_ELBOS: dict[str, Callable[..., Tensor]] = {
    "eight_schools": eight_schools,
    "logistic": logistic,
    "intercepts": intercepts,
    "wide": wide,
    "minibatch": logistic,
    "regressions": regressions,
}


# ---- the guide as a matrix: a row for each block of numbers that know nothing of the others


def blocks(case: Case) -> int:
    """How many parts of the guide know nothing of each other."""
    return case.shape["elements"] if case.name == "wide" else case.fits


class MeanField:
    """The ELBO of a workload's mean-field guide as a function of ``loc`` and ``log_scale``.

    Both are ``[blocks, numbers]`` in float64, the sites in the order of the table. A block's ELBO
    depends on its row only.
    """

    def __init__(self, case: Case) -> None:
        if not has_optimum(case.name):
            raise ValueError(f"the ELBO of {case.name} is not known without noise")
        self.case = case
        self.latents = case.latents()
        self.data = [_double(array) for array in case.data()]
        self.blocks = blocks(case)

    def elbo(self, loc: Tensor, log_scale: Tensor) -> Tensor:
        """ELBO of each block."""
        locs, scales = self.split(loc), self.split(log_scale.exp())
        q = {name: Marginal(locs[name], scales[name]) for name in self.latents}
        entropy = (log_scale + _LOG_ROOT_TWO_PI + 0.5).sum(-1)
        return _ELBOS[self.case.name](q, *self.data) + entropy

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """The columns of each site."""
        sizes = [math.prod(latent.shape) // self.blocks or 1 for latent in self.latents.values()]
        return dict(zip(self.latents, matrix.split(sizes, -1), strict=True))

    def join(self, values: Mapping[str, Array | Tensor], kind: str) -> Tensor:
        """The matrix of ``loc.<site>`` or ``scale.<site>`` of a fitted guide."""
        parts = [_double(np.asarray(values[f"{kind}.{name}"])) for name in self.latents]
        return torch.cat([part.reshape(self.blocks, -1) for part in parts], -1)

    def names(self) -> list[str]:
        """The site of every column."""
        count = sum(math.prod(latent.shape) for latent in self.latents.values()) // self.blocks
        return [
            name
            for name, part in self.split(torch.zeros(1, count)).items()
            for _ in range(part.shape[-1])
        ]


@dataclass(frozen=True)
class Optimum:
    """The best mean-field guide.

    Attributes:
        elbo: its ELBO.
        error: how much higher the ELBO may be at the true optimum, by Newton's decrement.
        loc, log_scale: ``[blocks, numbers]``, unconstrained.
        curvature: minus the Hessian of each block's ELBO in units of the guide, of ``loc / scale``
            and then of ``log_scale``: ``[blocks, 2 numbers, 2 numbers]``.
    """

    elbo: float
    error: float
    loc: Tensor
    log_scale: Tensor
    curvature: Tensor


def elbo(case: Case, posterior: Mapping[str, Array]) -> float:
    """ELBO of a fitted guide on all data, without noise."""
    guide = MeanField(case)
    loc, scale = guide.join(posterior, "loc"), guide.join(posterior, "scale")
    with torch.no_grad():
        return guide.elbo(loc, scale.log()).sum().item()


def optimum(case: Case) -> Optimum:
    """The best guide, by L-BFGS and then Newton's method, in float64."""
    guide = MeanField(case)
    count = len(guide.names())
    at = torch.zeros(guide.blocks, 2 * count, dtype=torch.float64)
    at[:, count:] = math.log(0.1)
    at.requires_grad_()

    def loss() -> Tensor:
        return -guide.elbo(at[:, :count], at[:, count:]).sum()

    search = torch.optim.LBFGS(
        [at], max_iter=2000, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=1e-6, tolerance_change=1e-12,
    )  # fmt: skip

    def closure() -> Tensor:
        search.zero_grad()
        value = loss()
        value.backward()
        return value

    search.step(closure)
    for _ in range(20):
        gradient, curvature = _derivatives(loss(), at)
        step = torch.linalg.solve(curvature, gradient)
        decrement = (gradient * step).sum().item() / 2
        if decrement < 1e-9:
            break
        with torch.no_grad():
            at -= step
    with torch.no_grad():
        reached = -loss().item()
    loc, log_scale = at.detach().split(count, -1)
    unit = torch.cat([log_scale.exp(), torch.ones_like(log_scale)], -1)
    return Optimum(
        reached, abs(decrement), loc, log_scale, unit[:, :, None] * curvature * unit[:, None, :]
    )


def _derivatives(value: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient ``[B, n]`` and the blocks of the Hessian ``[B, n, n]`` of a sum over blocks."""
    (gradient,) = torch.autograd.grad(value, at, create_graph=True)
    columns = [
        torch.autograd.grad(gradient[:, k].sum(), at, retain_graph=True)[0]
        for k in range(at.shape[-1])
    ]
    return gradient.detach(), torch.stack(columns, -1)


def _double(array: Array) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    return tensor.double() if tensor.is_floating_point() else tensor
