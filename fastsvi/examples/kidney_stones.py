"""Which treatment of kidney stones is better? Conditioning and intervening disagree.

Treatment A is open surgery, B is a puncture. Of the patients who got A, 78% recovered; of those
who got B, 83%. But doctors gave A to the hard cases, the large stones. To ask what would happen if
everybody got A is to cut the arrow from the stone's size to the treatment: ``do``, not
``condition``.

          size ----> treatment
              \\        |
               '--> recovered <'

Data: Charig, Webb, Payne and Wickham, British Medical Journal 292 (1986), 700 patients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.examples.common import arguments
from fastsvi.infer import Predictive, vectorized_importance_weights

# Patients and recoveries by size (0 small, 1 large) and treatment (0 is A, 1 is B).
PATIENTS = torch.tensor([[87.0, 270.0], [263.0, 80.0]])
RECOVERED = torch.tensor([[81.0, 234.0], [192.0, 55.0]])
A, B = torch.tensor(0.0), torch.tensor(1.0)


def model():
    by_size = PATIENTS.sum(1)
    large = pyro.sample("large", dist.Bernoulli(by_size[1] / by_size.sum())).long()
    treatment = pyro.sample("treatment", dist.Bernoulli(PATIENTS[large, 1] / by_size[large])).long()
    chance = RECOVERED[large, treatment] / PATIENTS[large, treatment]
    return pyro.sample("recovered", dist.Bernoulli(chance))


def exact(treatment: int) -> tuple[float, float]:
    """Chance of recovery given the treatment, and under the treatment, from the table."""
    given = RECOVERED[:, treatment].sum() / PATIENTS[:, treatment].sum()
    size = PATIENTS.sum(1) / PATIENTS.sum()
    under = (size * RECOVERED[:, treatment] / PATIENTS[:, treatment]).sum()
    return float(given), float(under)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = arguments(__doc__, particles=20_000).parse_args(argv)
    pyro.set_rng_seed(args.seed)

    print(f"{'chance of recovery':32}{'sampled':>8}{'exact':>8}")
    found = {}
    for name, treatment in (("A", A), ("B", B)):
        seen = pyro.condition(model, data={"treatment": treatment})
        prior = pyro.poutine.block(seen, hide_types=["observe"])
        log_weights, trace, _ = vectorized_importance_weights(
            seen, prior, num_samples=args.particles, max_plate_nesting=0, normalized=True
        )
        found[f"given {name}"] = float(log_weights.exp() @ trace.nodes["recovered"]["value"])

        forced = pyro.do(model, data={"treatment": treatment})
        draws = Predictive(forced, num_samples=args.particles, parallel=True)()
        found[f"do {name}"] = float(draws["recovered"].mean())

        given, under = exact(int(treatment))
        print(f"{f'of those who were given {name}':32}{found[f'given {name}']:8.3f}{given:8.3f}")
        print(f"{f'if everybody were given {name}':32}{found[f'do {name}']:8.3f}{under:8.3f}")

    seen = max("AB", key=lambda name: found[f"given {name}"])
    best = max("AB", key=lambda name: found[f"do {name}"])
    print(f"\nThose given {seen} recovered more often; to recover, take {best}.")
    return found


if __name__ == "__main__":
    main()
