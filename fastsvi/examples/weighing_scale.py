"""A scale that errs: how heavy is the thing that was weighed?

    weight ~ Normal(8.5, 1),  measurement | weight ~ Normal(weight, 0.75),  measured 9.5

The program is that of Pyro's introduction, with its guide written by hand and its loop of
``svi.step``. The posterior is known, Normal(9.14, 0.6), so the fit can be checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.distributions import constraints
from fastsvi.examples.common import arguments
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.optim import SGD

GUESS, MEASURED = 8.5, 9.5
PRIOR_SD, SCALE_SD = 1.0, 0.75


def scale(guess):
    weight = pyro.sample("weight", dist.Normal(guess, PRIOR_SD))
    return pyro.sample("measurement", dist.Normal(weight, SCALE_SD))


conditioned_scale = pyro.condition(scale, data={"measurement": torch.tensor(MEASURED)})


def guide(guess):
    a = pyro.param("a", torch.tensor(guess))
    b = pyro.param("b", torch.tensor(1.0), constraint=constraints.positive)
    return pyro.sample("weight", dist.Normal(a, b))


def exact() -> tuple[float, float, float]:
    """Mean and sd of the posterior, and the log evidence, in closed form."""
    precision = PRIOR_SD**-2 + SCALE_SD**-2
    mean = (GUESS * PRIOR_SD**-2 + MEASURED * SCALE_SD**-2) / precision
    evidence = dist.Normal(GUESS, math.hypot(PRIOR_SD, SCALE_SD)).log_prob(torch.tensor(MEASURED))
    return mean, precision**-0.5, float(evidence)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = arguments(__doc__, steps=2500, particles=1).parse_args(argv)
    pyro.set_rng_seed(args.seed)
    pyro.clear_param_store()
    svi = SVI(
        conditioned_scale,
        guide,
        SGD({"lr": 0.001, "momentum": 0.1}),
        Trace_ELBO(num_particles=args.particles),
    )
    losses, a, b = [], [], []
    for step in range(args.steps):
        losses.append(svi.step(GUESS))
        a.append(pyro.param("a").item())
        b.append(pyro.param("b").item())
        if step % 500 == 0:
            print(f"step {step:5d}  loss {losses[-1]:6.3f}  a {a[-1]:.3f}  b {b[-1]:.3f}")

    mean, sd, evidence = exact()
    last = max(1, args.steps // 5)  # the mean of the last fifth: SGD keeps wandering a little
    fit = {
        "a": math.fsum(a[-last:]) / last,
        "b": math.fsum(b[-last:]) / last,
        "elbo": -math.fsum(losses[-last:]) / last,
    }
    print(f"\n{'':24}{'fit':>8}{'exact':>8}")
    print(f"{'weight, mean':24}{fit['a']:8.3f}{mean:8.3f}")
    print(f"{'weight, sd':24}{fit['b']:8.3f}{sd:8.3f}")
    print(f"{'ELBO and log evidence':24}{fit['elbo']:8.3f}{evidence:8.3f}")
    return fit


if __name__ == "__main__":
    main()
