"""Which measurements tell a malignant tumour from a benign one, and how sure can we be?

Bayesian logistic regression on the Wisconsin table (569 tumours, 30 measurements of their cell
nuclei; it ships with scikit-learn). A fifth of the tumours is held out to score the predictions.

    bias ~ Normal(0, 2.5),  weight[d] ~ Normal(0, 1)
    malignant[n] ~ Bernoulli(logit = bias + x[n] . weight),  x standardised

The default guide takes the weights for independent. Neighbouring measurements (radius, perimeter,
area) are not, so single intervals come out too narrow; k-hat, printed below the table, says so.
``--guide multivariate`` learns the correlations as well.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.errors import FastSVIWarning
from fastsvi.examples.common import arguments, interval, one_thread, print_posterior, require
from fastsvi.infer import SVI, Predictive, Trace_ELBO, psis_diagnostic
from fastsvi.infer.autoguide import AutoMultivariateNormal, AutoNormal
from fastsvi.optim import Adam

NUM_DRAWS = 2000
GUIDES = {"normal": AutoNormal, "multivariate": AutoMultivariateNormal}


@dataclass
class Table:
    """Tumours ``x [N, 30]``, standardised, and ``y [N]``, 1 for malignant, in two parts."""

    names: list[str]
    x: Tensor
    y: Tensor
    x_held: Tensor
    y_held: Tensor


@dataclass
class Result:
    losses: Tensor  # [steps]
    weights: Tensor  # [draws, 30]
    chance: Tensor  # [draws, held out], of malignancy
    log_score: float  # mean log predictive density per held-out tumour
    accuracy: float
    k_hat: float
    steps_per_second: float
    figure: Path | None


def load(seed: int, device: str) -> Table:
    """The table, split four to one, standardised by the part that is learnt from."""
    raw = require("sklearn.datasets", "scikit-learn").load_breast_cancer()
    x = torch.tensor(raw.data, dtype=torch.float64)
    y = torch.tensor(raw.target == 0, dtype=torch.float32)  # scikit-learn codes malignant as 0
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    learn, held = order.split([len(x) - len(x) // 5, len(x) // 5])
    x = ((x - x[learn].mean(0)) / x[learn].std(0)).float()
    parts = (each.to(device) for each in (x[learn], y[learn], x[held], y[held]))
    return Table([str(name) for name in raw.feature_names], *parts)


def model(x, y=None):
    bias = pyro.sample("bias", dist.Normal(x.new_zeros(()), 2.5))
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("tumours", len(x)):
        return pyro.sample("malignant", dist.Bernoulli(logits=bias + x @ weights), obs=y)


def main(argv: Sequence[str] | None = None) -> Result:
    parser = arguments(__doc__, steps=2000, particles=64)
    parser.add_argument("--guide", choices=GUIDES, default="normal", help="family (normal)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure (out)")
    parser.add_argument("--no-figure", action="store_true", help="print only")
    args = parser.parse_args(argv)
    pyro.set_rng_seed(args.seed)
    pyro.clear_param_store()
    table = load(args.seed, args.device)
    print(f"{len(table.x)} tumours to learn from, {len(table.x_held)} held out, 30 measurements")

    guide = GUIDES[args.guide](model)
    elbo = Trace_ELBO(num_particles=args.particles, vectorize_particles=True)
    svi = SVI(model, guide, Adam({"lr": 0.02}), elbo)
    start = time.perf_counter()
    with one_thread():
        run = svi.run(args.steps, table.x, table.y)
        losses = run.losses.cpu()
    seconds = time.perf_counter() - start
    last = max(1, args.steps // 20)
    print(
        f"{args.steps} steps of {args.particles} particles on {args.device} in {seconds:.1f} s, "
        f"{args.steps / seconds:.0f} steps/s; ELBO {-float(losses[-last:].mean()):.2f}\n"
    )

    predictive = Predictive(
        model, guide=guide, num_samples=NUM_DRAWS, return_sites=("bias", "weights"), parallel=True
    )
    draws = predictive(table.x)
    bias = draws["bias"].reshape(NUM_DRAWS, 1)
    weights = draws["weights"].reshape(NUM_DRAWS, -1)
    logits = bias + weights @ table.x_held.T  # [draws, held out]
    log_lik = dist.Bernoulli(logits=logits).log_prob(table.y_held)
    log_score = float((log_lik.logsumexp(0) - math.log(NUM_DRAWS)).mean())
    chance = logits.sigmoid()
    accuracy = float(((chance.mean(0) > 0.5) == (table.y_held > 0.5)).float().mean())

    low, high = interval(weights)
    order = weights.mean(0).argsort(descending=True)
    sure = ["*" if low[d] > 0 or high[d] < 0 else "" for d in order]
    print_posterior(
        [*(table.names[d] for d in order), "bias (the average tumour)"],
        torch.cat([weights[:, order], bias], dim=1),
        title="log-odds of malignancy per sd",
        extra={"not zero": [*sure, ""]},
    )
    rate = table.y.mean()
    base = float(dist.Bernoulli(rate).log_prob(table.y_held).mean())
    print(f"\nheld-out log score {log_score:.3f} per tumour (by the base rate alone {base:.3f})")
    print(f"held-out accuracy  {accuracy:.1%}")
    with warnings.catch_warnings():  # what the warning says stands in the line below it
        warnings.simplefilter("ignore", FastSVIWarning)
        k_hat = psis_diagnostic(model, guide, table.x, table.y, num_particles=NUM_DRAWS)
    verdict = (
        "the guide follows the posterior"
        if k_hat <= 0.7
        else "single intervals are too narrow; the score above stands"
    )
    print(f"k-hat {k_hat:.2f}: {verdict}")

    figure = None
    if not args.no_figure:
        figure = args.out / "breast_cancer.png"
        draw(figure, table, losses, weights.cpu(), chance.cpu())
        print(f"figure: {figure.resolve()}")
    return Result(
        losses=losses,
        weights=weights,
        chance=chance,
        log_score=log_score,
        accuracy=accuracy,
        k_hat=k_hat,
        steps_per_second=args.steps / seconds,
        figure=figure,
    )


MALIGNANT, BENIGN, UNSURE, INK = "#c2452d", "#2a6f97", "#a9a9a9", "#333333"


def draw(path: Path, table: Table, losses: Tensor, weights: Tensor, chance: Tensor) -> None:
    """The fit, the predictions on held-out tumours, and the interval of every weight."""
    matplotlib = require("matplotlib", "matplotlib")
    matplotlib.use("Agg")
    plt = require("matplotlib.pyplot", "matplotlib")
    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "font.size": 11,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(13, 8.4), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, hspace=0.04)
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15), wspace=0.04)
        fit, held = left.subplots(2, 1)
        _draw_fit(fit, losses)
        _draw_held_out(held, chance, table.y_held.cpu())
        _draw_weights(right.subplots(), weights, table.names)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _draw_fit(axes, losses: Tensor) -> None:
    window = max(1, len(losses) // 40)
    smooth = losses.unfold(0, window, 1).mean(-1)
    steps = torch.arange(len(losses))
    axes.plot(steps, -losses, color=BENIGN, alpha=0.25, linewidth=0.8)
    axes.plot(steps[window - 1 :], -smooth, color=BENIGN, linewidth=2)
    axes.set(title="The fit", xlabel="step", ylabel="ELBO (nats)")
    # The first steps are far below; what matters is where it levels off.
    floor, top = -float(losses[len(losses) // 20]), -float(losses.min())
    axes.set_ylim(min(floor, top - 10), top + 0.03 * abs(top - floor) + 1)


def _draw_held_out(axes, chance: Tensor, malignant: Tensor) -> None:
    order = chance.mean(0).argsort()
    low, high = (100 * end for end in interval(chance[:, order]))
    mean, truth = 100 * chance.mean(0)[order], malignant[order] > 0.5
    place = torch.arange(len(order))
    for which, colour, label in ((~truth, BENIGN, "benign"), (truth, MALIGNANT, "malignant")):
        axes.vlines(place[which], low[which], high[which], color=colour, alpha=0.35, linewidth=2)
        axes.scatter(place[which], mean[which], color=colour, s=18, label=f"was {label}", zorder=3)
    axes.axhline(50, color=INK, linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, loc="upper left")
    axes.set(
        title=f"{len(order)} tumours the model has not seen",
        xlabel="tumours, by predicted chance",
        ylabel="predicted chance of malignancy (%)",
        ylim=(-3, 103),
    )


def _draw_weights(axes, weights: Tensor, names: list[str]) -> None:
    order = weights.mean(0).argsort()
    low, high = interval(weights[:, order])
    inner_low, inner_high = interval(weights[:, order], 0.5)
    for row in range(len(order)):
        sure = low[row] > 0 or high[row] < 0
        colour = UNSURE if not sure else MALIGNANT if low[row] > 0 else BENIGN
        axes.hlines(row, low[row], high[row], color=colour, linewidth=1.6)
        axes.hlines(row, inner_low[row], inner_high[row], color=colour, linewidth=5)
    mean = weights.mean(0)[order]
    axes.scatter(mean, range(len(order)), color="white", edgecolor=INK, s=22, zorder=3)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(order)), [names[d] for d in order])
    axes.set_ylim(-0.8, len(order) - 0.2)
    for colour, label in (
        (MALIGNANT, "speaks for malignancy"),
        (BENIGN, "speaks against"),
        (UNSURE, "90% interval contains 0"),
    ):
        axes.plot([], [], color=colour, linewidth=5, label=label)
    axes.legend(frameon=False, loc="lower right")
    axes.set(
        title="What each measurement says",
        xlabel="log-odds per standard deviation: mean, 50% and 90% interval",
    )


if __name__ == "__main__":
    main()
