"""A model with its guide, what has been found out about the two, and estimates of their loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsvi.engine.noise import EVALUATION, TRAINING, NoiseStream, Seed, StepNoise


class Program:
    """A model and a guide, and what running them once has shown.

    Attributes:
        rehearsed: whether the two have run, so that their parameters exist.
        is_sequential: whether its particles must run one after the other.
        subsamples: the random subsets that its plates draw, by plate.
        noise: counts the training steps and gives guides that draw all sites at once their noise;
            ``evaluation_noise`` that of other evaluations.
        draws: what the programs draw statement by statement in the steps of a run. (In single
            steps, and in evaluations, they draw from torch's generator.)
    """

    def __init__(self, model: Any, guide: Any) -> None:
        self.model = model
        self.guide = guide
        self.rehearsed = False
        self.is_sequential = False
        self.subsamples: dict[str, Any] = {}
        self.set_seed(None)

    def set_seed(self, seed: int | Seed | None) -> None:
        """Begin the noise anew, from ``seed`` or from torch's generator."""
        shared = seed if isinstance(seed, Seed) else Seed(seed)
        self.noise = NoiseStream(shared, TRAINING)
        self.evaluation_noise = NoiseStream(shared, EVALUATION)
        self.draws = StepNoise(self.noise)


class Estimate(NamedTuple):
    """An estimate of the loss, or one particle's share of it.

    Attributes:
        loss: scalar, detached.
        surrogate: scalar, whose gradient estimates that of the loss.
        leaves: the parameters that took part, unconstrained.
        values: iterator over the values of the latent sites by name, one dict per particle, for
            finding out what went wrong.
    """

    loss: Tensor
    surrogate: Tensor
    leaves: Sequence[Tensor]
    values: Callable[[], Iterator[dict[str, Any]]]


def total_loss(estimates: Sequence[Estimate]) -> Tensor:
    """The loss that the shares of all particles add up to."""
    if len(estimates) == 1:
        return estimates[0].loss
    return torch.stack([estimate.loss for estimate in estimates]).sum()


def total_surrogate(estimates: Sequence[Estimate]) -> Tensor:
    """The surrogate that the shares of all particles add up to."""
    if len(estimates) == 1:
        return estimates[0].surrogate
    return torch.stack([estimate.surrogate for estimate in estimates]).sum()


def all_leaves(estimates: Sequence[Estimate]) -> Sequence[Tensor]:
    """The parameters that took part in any of the estimates, each once."""
    if len(estimates) == 1:
        return estimates[0].leaves
    return list({id(leaf): leaf for one in estimates for leaf in one.leaves}.values())


def leaves_of(*traces: Any) -> list[Tensor]:
    """The leaves of the param sites of some traces, each once."""
    found: dict[int, Tensor] = {}
    for trace in traces:
        for site in trace.nodes.values():
            if site["type"] == "param" and hasattr(site["value"], "unconstrained"):
                leaf = site["value"].unconstrained()
                found[id(leaf)] = leaf
    return list(found.values())


def values_of(estimates: Sequence[Estimate]) -> Iterator[dict[str, Any]]:
    """The latent values of every particle of some estimates."""
    for estimate in estimates:
        yield from estimate.values()
