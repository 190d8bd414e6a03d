"""Log-densities of the workloads in plain torch, and the one evaluator that all results pass.

They serve the hand-written peers (:mod:`bench.libraries.with_torch`), which differentiate them, and
:func:`elbo`, which says in float64 how good a fitted guide is, whichever library fitted it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.workloads import Array, Case

_LOG_ROOT_TWO_PI = 0.5 * math.log(2 * math.pi)
# Numbers of an intermediate result of the evaluator, at a time and in all.
_CHUNK, _MOST = 2**22, 2**31


def _normal(x: Any, loc: Any, scale: Any) -> Tensor:
    log_scale = math.log(scale) if isinstance(scale, float) else scale.log()
    return -0.5 * ((x - loc) / scale).square() - log_scale - _LOG_ROOT_TWO_PI


def _half_cauchy(x: Tensor, scale: float) -> Tensor:
    return math.log(2 / (math.pi * scale)) - (x / scale).square().log1p()


def _bernoulli(y: Tensor, logits: Tensor) -> Tensor:
    return y * logits - functional.softplus(logits)


# ---- log p(z, data) [P] for constrained latent values [P, *shape], by site


def eight_schools(z: Mapping[str, Tensor], sigma: Tensor, y: Tensor) -> Tensor:
    mu, tau, effect = z["mu"], z["tau"], z["effect"]
    fitted = mu[:, None] + tau[:, None] * effect
    prior = _normal(mu, 0.0, 5.0) + _half_cauchy(tau, 5.0)
    return prior + (_normal(effect, 0.0, 1.0) + _normal(y, fitted, sigma)).sum(-1)


def logistic(z: Mapping[str, Tensor], x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """``scale`` is that of a subset's likelihood: rows of the whole over rows of the subset."""
    logits = z["weight"] @ x.T + z["bias"][:, None]
    prior = _normal(z["weight"], 0.0, 1.0).sum(-1) + _normal(z["bias"], 0.0, 10.0)
    return prior + scale * _bernoulli(y, logits).sum(-1)


def intercepts(z: Mapping[str, Tensor], group: Tensor, floor: Tensor, y: Tensor) -> Tensor:
    mean, spread, slope, noise, level = (
        z[name] for name in ("mean", "spread", "slope", "noise", "level")
    )
    fitted = level[:, group] + slope[:, None] * floor
    prior = _normal(mean, 0.0, 10.0) + _normal(slope, 0.0, 10.0)
    prior = prior + _half_cauchy(spread, 5.0) + _half_cauchy(noise, 5.0)
    levels = _normal(level, mean[:, None], spread[:, None]).sum(-1)
    return prior + levels + _normal(y, fitted, noise[:, None]).sum(-1)


def wide(z: Mapping[str, Tensor], y: Tensor) -> Tensor:
    return (_normal(z["z"], 0.0, 1.0) + _normal(y, z["z"], 0.5)).sum(-1)


def regressions(z: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The sum over all fits."""
    weight, bias, noise = z["weight"], z["bias"], z["noise"]
    fitted = torch.einsum("frk,pfk->pfr", x, weight) + bias[..., None]
    prior = _normal(weight, 0.0, 1.0).sum(-1) + _normal(bias, 0.0, 1.0) + _half_cauchy(noise, 1.0)
    return (prior + _normal(y, fitted, noise[..., None]).sum(-1)).sum(-1)


LOG_JOINTS: dict[str, Callable[..., Tensor]] = {
    "eight_schools": eight_schools,
    "logistic": logistic,
    "intercepts": intercepts,
    "wide": wide,
    "minibatch": logistic,
    "regressions": regressions,
}


# ---- the auto-encoder


def vae(weights: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    """One draw of the ELBO of each image of ``pixels [B, pixels]``: ``[B]``."""

    def linear(name: str, x: Tensor) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    hidden = functional.softplus(linear("encoder.hidden", pixels))
    loc, log_scale = linear("encoder.loc", hidden), linear("encoder.log_scale", hidden)
    noise = torch.randn_like(loc)
    z = loc + log_scale.exp() * noise
    logits = linear("decoder.logits", functional.softplus(linear("decoder.hidden", z)))
    # log p(z) - log q(z): the constants cancel.
    ratio = (0.5 * (noise.square() - z.square()) + log_scale).sum(-1)
    return ratio + _bernoulli(pixels, logits).sum(-1)


# ---- the evaluator


def elbo(case: Case, posterior: Mapping[str, Array], seed: int = 0) -> tuple[float, float]:
    """ELBO of a fitted guide on all data, and its standard error.

    ``posterior`` holds ``loc.<site>`` and ``scale.<site>`` of the unconstrained normals, or the
    weights of an auto-encoder. The entropy is exact, the rest the mean over ``samples`` draws, in
    float64 and with the same noise for every library.
    """
    data = [_wide(array) for array in case.data()]
    found = {name: _wide(np.asarray(array)) for name, array in posterior.items()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        draws = _vae_draws(case, found, data) if case.name == "vae" else _draws(case, found, data)
    return draws.mean().item(), (draws.std() / len(draws) ** 0.5).item()


def _wide(array: Array) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    return tensor.double() if tensor.is_floating_point() else tensor


def _draws(case: Case, found: Mapping[str, Tensor], data: list[Tensor]) -> Tensor:
    largest = max(array.numel() for array in data)
    samples = min(case.workload.samples, max(10, _MOST // largest))
    chunk = max(1, min(samples, _CHUNK // largest))
    draws = []
    for start in range(0, samples, chunk):
        z, extra = {}, torch.zeros((), dtype=torch.float64)
        count = min(chunk, samples - start)
        for name, latent in case.latents().items():
            loc = found[f"loc.{name}"].reshape(latent.shape)
            scale = found[f"scale.{name}"].reshape(latent.shape)
            u = loc + scale * torch.randn(count, *latent.shape, dtype=torch.float64)
            z[name] = u.exp() if latent.positive else u
            extra = extra + (scale.log() + _LOG_ROOT_TWO_PI + 0.5).sum()  # the entropy
            if latent.positive:
                extra = extra + u.reshape(count, -1).sum(-1)
        draws.append(LOG_JOINTS[case.name](z, *data) + extra)
    return torch.cat([draw.expand(1) if draw.dim() == 0 else draw for draw in draws])


def _vae_draws(case: Case, weights: Mapping[str, Tensor], data: list[Tensor]) -> Tensor:
    (images,) = data
    parts = images.split(1000)
    totals = [
        torch.stack([vae(weights, part).sum() for part in parts]).sum()
        for _ in range(case.workload.samples)
    ]
    return torch.stack(totals)
