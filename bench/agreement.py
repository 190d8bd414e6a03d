"""Do two fits agree? How far noise alone takes a fit from the optimum, and two fits apart.

    python -m bench.agreement                   # or: --size tiny, --workloads wide

prints, for each workload whose ELBO is known without noise (:mod:`bench.workloads.exact`), the
optimum; ``gap``, by how much the noise of one particle keeps Adam below it on average; and the
standard deviations of the guide's parameters about the optimum, least and largest, in units of the
guide: a ``loc`` over its scale, a scale by its logarithm.

**The Monte Carlo error of Adam.** Near the optimum gradients are mostly noise, of covariance ``C``;
Adam divides each by its own root mean square, ``d = diag(C)**0.5``. With curvature ``H`` and a
small learning rate, an iterate so becomes an Ornstein-Uhlenbeck process whose covariance ``S``
satisfies, with ``D = diag(d)``::

    H S D + D S H = lr C                    (multiply D^-1 H S + S H D^-1 = lr D^-1 C D^-1 by D)

Its trace after a division by ``D`` gives the mean loss of ELBO, ``tr(H S) / 2 = lr / 4 * sum(d)``,
whatever the correlations. Momentum changes neither, to first order in the learning rate (Mandt,
Hoffman and Blei 2017 derive the like for plain gradient descent). ``C`` falls as 1 / P, so ``S``
falls as the square root of the number of particles. A test holds both against fits.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.workloads import WORKLOADS, Array, Case, case
from bench.workloads import log_joints as by_draws
from bench.workloads.exact import MeanField, Optimum, blocks, elbo, has_optimum, optimum

# Two fits that follow the same law are called different once in so many comparisons.
_ONE_IN = 1000
_DRAWS = 1000  # of the gradient
# Numbers of data, and of the guide in a block, for which an optimum is sought in a comparison.
_LARGEST, _WIDEST = 2**23, 1000


@dataclass(frozen=True)
class Law:
    """Where Adam's iterates lie about the optimum.

    Attributes:
        best: the optimum.
        gap: by how much the ELBO of an iterate is below the best, on average.
        error: standard deviations of ``loc / scale`` and then of ``log_scale``, in units of the
            optimum: ``[blocks, 2 numbers]``.
    """

    guide: MeanField
    best: Optimum
    gap: float
    error: Tensor

    def place(self, posterior: Mapping[str, Array]) -> Tensor:
        """A fitted guide in units of the best one, as seen from it: like ``error``."""
        loc = self.guide.join(posterior, "loc") - self.best.loc
        log_scale = self.guide.join(posterior, "scale").log() - self.best.log_scale
        return torch.cat([loc / self.best.log_scale.exp(), log_scale], -1)


def evaluate(one: Case, posterior: Mapping[str, Array]) -> tuple[float, float]:
    """ELBO of a fitted guide on all data, and its standard error: 0 where no draws are needed."""
    if has_optimum(one.name):
        return elbo(one, posterior), 0.0
    return by_draws.elbo(one, posterior)


def can_compare(one: Case) -> bool:
    """Whether posteriors of this case have a law, and one that is found in seconds."""
    if not has_optimum(one.name):
        return False
    data = math.prod(one.shape.get(part, 1) for part in ("fits", "rows", "columns", "elements"))
    numbers = sum(math.prod(latent.shape) for latent in one.latents().values())
    return data <= _LARGEST and numbers // blocks(one) <= _WIDEST


def law(one: Case, seed: int = 0) -> Law:
    """The law of fits of a case by Adam, with the workload's learning rate."""
    rate = one.workload.learning_rate
    guide = MeanField(one)
    best = optimum(one)
    scale = best.log_scale.exp()
    # Adam moves loc and the inverse softplus of the scale: one step of those in units of the guide.
    unit = torch.cat([1 / scale, -torch.expm1(-scale) / scale], -1)
    covariance = gradient_noise(guide, best, seed) / one.particles
    covariance = unit[:, :, None] * covariance * unit[:, None, :]
    size = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    # With x = D^1/2 S D^1/2 it reads M x + x M = lr Q, which is easy where M is diagonal.
    root = size.rsqrt()
    both = root[:, :, None] * root[:, None, :]
    curvature = unit[:, :, None] * best.curvature * unit[:, None, :]
    values, vectors = torch.linalg.eigh(both * curvature)
    turned = vectors.mT @ (both * covariance) @ vectors
    turned = rate * turned / (values[:, :, None] + values[:, None, :])
    spread = (vectors @ turned @ vectors.mT * both).diagonal(dim1=-2, dim2=-1).sqrt()
    return Law(guide, best, rate / 4 * size.sum().item(), spread * unit)


def gradient_noise(guide: MeanField, best: Optimum, seed: int = 0) -> Tensor:
    """Covariance of the ELBO's gradient at the optimum, for one particle, in units of the guide.

    ``[blocks, 2 numbers, 2 numbers]``.
    """
    scale = best.log_scale.exp()
    generator = torch.Generator().manual_seed(seed)
    largest = max(scale.numel(), *map(torch.numel, guide.data))
    at_once = 1 if guide.case.workload.minibatch else max(1, min(_DRAWS, 2**22 // largest))
    # The mean gradient is 0 there.
    total = torch.zeros_like(best.curvature)
    for start in range(0, _DRAWS, at_once):
        shape = (min(at_once, _DRAWS - start), *scale.shape)
        noise = torch.randn(shape, dtype=torch.float64, generator=generator)
        u = (best.loc + scale * noise).requires_grad_()
        (slope,) = torch.autograd.grad(_log_density(guide, u, generator), u)
        gradient = torch.cat([slope * scale, slope * scale * noise + 1], -1)
        total += torch.einsum("sbi,sbj->bij", gradient, gradient)
    return total / _DRAWS


def _log_density(guide: MeanField, u: Tensor, generator: torch.Generator) -> Tensor:
    """The sum over draws ``u [draws, blocks, numbers]`` of log p on all data or on a minibatch."""
    one, data = guide.case, guide.data
    z: dict[str, Tensor] = {}
    extra = torch.zeros((), dtype=torch.float64)
    for name, part in guide.split(u).items():
        latent = guide.latents[name]
        extra = extra + (part.sum() if latent.positive else 0.0)
        z[name] = (part.exp() if latent.positive else part).reshape(len(u), *latent.shape)
    scale: dict[str, float] = {}
    if one.workload.minibatch:
        rows = torch.randint(len(data[0]), (one.shape["batch"],), generator=generator)
        data, scale = [part[rows] for part in data], {"scale": len(data[0]) / len(rows)}
    return by_draws.LOG_JOINTS[one.name](z, *data, **scale).sum() + extra


# ---- two fits


def apart(found: Law, posterior: Mapping[str, Array], other: Mapping[str, Array]) -> dict[str, Any]:
    """How far two fits are apart, at worst over all numbers of the guide.

    Returns:
        ``loc`` and ``log_scale``, the largest differences in units of the guide; ``errors``, the
        largest in standard deviations of a difference of two fits, and the ``site`` where it is;
        ``bound``, what it exceeds once in a thousand comparisons if noise is all there is.
    """
    difference = found.place(posterior) - found.place(other)
    errors = (difference / (2**0.5 * found.error)).abs()
    loc, log_scale = difference.abs().chunk(2, -1)
    names = found.guide.names()
    worst = int(errors.max(0).values.argmax()) % len(names)
    return {
        "loc": round(loc.max().item(), 4),
        "log_scale": round(log_scale.max().item(), 4),
        "errors": round(errors.max().item(), 2),
        "site": names[worst],
        "bound": round(bound(errors.numel()), 2),
    }


def bound(count: int) -> float:
    """What the largest of ``count`` standard normal numbers exceeds once in a thousand times."""
    return -statistics.NormalDist().inv_cdf(1 / _ONE_IN / count / 2)


def main(arguments: list[str] | None = None) -> int:
    """Print optimum, gap and errors of each workload."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [name for name in WORKLOADS if has_optimum(name)]
    parser.add_argument("--size", default="cpu", choices=("cpu", "cuda", "tiny"))
    parser.add_argument("--workloads", nargs="+", default=names, choices=names)
    options = parser.parse_args(arguments)
    for name in options.workloads:
        found = law(case(name, options.size, 1))
        print(
            f"{name:<14} ELBO {found.best.elbo:.4f} (within {found.best.error:.0e}), "
            f"gap {found.gap:.4g}, errors {found.error.min():.3f} to {found.error.max():.3f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
