"""Eight schools: did coaching raise test scores, and where?

Each school reports an effect and its standard error (Rubin 1981). A hierarchical model pools
them: theta[j] ~ Normal(mu, tau), with tau learnt too. How the model is written matters to a guide
that takes the latents for independent:

- centred: theta itself is latent. Where tau is small theta is tied to mu (a funnel), which a
  mean-field guide cannot follow.
- non-centred: theta = mu + tau * e with e ~ Normal(0, 1). mu, tau and e are almost independent.

The table shows both beside the exact posterior, from posteriordb's long HMC runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.examples.common import arguments, one_thread
from fastsvi.infer import SVI, Predictive, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.optim import Adam

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
# Means and sds of the exact posterior of mu, tau and theta[0..7] (posteriordb, BSD 3-Clause).
NAMES = ("mu", "tau", *(f"theta[{j}]" for j in range(8)))
EXACT_MEAN = torch.tensor([4.41, 3.60, 6.15, 4.94, 3.91, 4.80, 3.61, 4.05, 6.32, 4.88])
EXACT_SD = torch.tensor([3.31, 3.20, 5.62, 4.65, 5.28, 4.77, 4.61, 4.80, 5.00, 5.32])


def centred(effect, error):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, error), obs=effect)


def non_centred(effect, error):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        e = pyro.sample("e", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * e)
        pyro.sample("effect", dist.Normal(theta, error), obs=effect)


def fit(model: Callable, args) -> Tensor:  # [draws, 10], in the order of NAMES
    pyro.set_rng_seed(args.seed)
    pyro.clear_param_store()
    guide = AutoNormal(model)
    elbo = Trace_ELBO(num_particles=args.particles, vectorize_particles=True)
    svi = SVI(model, guide, Adam({"lr": 0.02}), elbo)
    with one_thread():
        run = svi.run(args.steps, EFFECT, ERROR)
    last = max(1, args.steps // 10)
    print(f"{model.__name__:12} ELBO {-float(run.losses[-last:].mean()):.2f}")
    draws = Predictive(model, guide=guide, num_samples=4000, parallel=True)(EFFECT, ERROR)
    return torch.cat([draws[name].reshape(4000, -1) for name in ("mu", "tau", "theta")], dim=1)


def main(argv: Sequence[str] | None = None) -> dict[str, Tensor]:
    args = arguments(__doc__, steps=2000, particles=16).parse_args(argv)
    draws = {model.__name__: fit(model, args) for model in (centred, non_centred)}
    print(f"\n{'mean and sd of':14}{'centred':>15}{'non-centred':>15}{'exact':>15}")
    for i, name in enumerate(NAMES):
        cells = [(float(d[:, i].mean()), float(d[:, i].std())) for d in draws.values()]
        cells.append((float(EXACT_MEAN[i]), float(EXACT_SD[i])))
        print(f"{name:14}" + "".join(f"{mean:8.2f}{sd:7.2f}" for mean, sd in cells))
    return draws


if __name__ == "__main__":
    main()
