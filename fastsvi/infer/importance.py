"""Importance sampling from a guide: evidence, weights, and what they say about the guide.

A draw ``z`` of the guide ``q`` has the weight ``w = p(x, z) / q(z)``. The mean of the weights
estimates the evidence ``p(x)`` without bias; weighted draws are draws of the posterior; the tail of
the weights shows whether the guide may be trusted (k-hat, see :mod:`fastsvi.infer.pareto`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastsvi import poutine
from fastsvi.errors import FastSVIError, FastSVIWarning, NonFiniteError, SiteError, describe
from fastsvi.infer.abstract_infer import TracePosterior
from fastsvi.infer.over_samples import over_samples
from fastsvi.infer.pareto import tail_index, tail_index_limit
from fastsvi.poutine import Trace
from fastsvi.poutine.util import prune_subsample_sites
from fastsvi.primitives import plate

PLATE = "num_particles_vectorized"


class ImportanceError(FastSVIError, ValueError):
    """An argument of importance sampling is missing or does not fit the others."""


class LogWeightsMixin:
    """Summaries of ``self.log_weights``: a list of scalars or a vector ``(num_samples,)``."""

    log_weights: Any  # list of scalars, or [num_samples]

    def get_log_normalizer(self) -> Tensor:
        """Log of the mean weight: the estimate of the log evidence, scalar."""
        log_weights = self._log_weights()
        return log_weights.logsumexp(0) - math.log(len(log_weights))

    def get_normalized_weights(self, log_scale: bool = False) -> Tensor:
        """Weights ``(num_samples,)`` that sum to one, or their logs.

        Raises:
            NonFiniteError: a weight is NaN or infinite, or all are zero.
        """
        log_weights = self._log_weights()
        log_total = log_weights.logsumexp(0)
        if not torch.isfinite(log_total):
            raise NonFiniteError(
                f"the weights cannot be normalised: their logs are {describe(log_weights)}. "
                "All -inf means that no draw of the guide lies in the support of the model; a NaN "
                "comes from a log-density of the model or the guide"
            )
        normalized = log_weights - log_total
        return normalized if log_scale else normalized.exp()

    def get_ESS(self) -> Tensor:
        """Effective sample size ``1 / sum(w ** 2)`` of the normalised weights, scalar."""
        return (-(2 * self.get_normalized_weights(log_scale=True)).logsumexp(0)).exp()

    def _log_weights(self) -> Tensor:
        if len(self.log_weights) == 0:
            raise SiteError(
                f"{type(self).__name__} holds no weights yet: call .run(*args) with the arguments "
                "of the model first"
            )
        if isinstance(self.log_weights, Tensor):
            return self.log_weights
        return torch.stack([torch.as_tensor(each) for each in self.log_weights])


class Importance(TracePosterior, LogWeightsMixin):
    """The posterior by importance sampling with a guide as the proposal.

    Args:
        model: the program, with observations.
        guide: a program with the same arguments that draws the latent sites; by default the prior.
        num_samples: how many draws; 10 with a warning if it is not given, as in Pyro.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> def model():
    ...     weight = pyro.sample("weight", dist.Normal(8.5, 1.0))
    ...     return pyro.sample("measurement", dist.Normal(weight, 0.75), obs=torch.tensor(9.5))
    >>> posterior = Importance(model, num_samples=500).run()
    >>> marginal = posterior.marginal("weight").empirical["weight"]
    >>> bool((marginal.mean - 9.14).abs() < 0.2)
    True
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable | None = None,
        num_samples: int | None = None,
    ) -> None:
        super().__init__()
        if num_samples is None:
            num_samples = 10
            warnings.warn(
                "Importance was not told num_samples and draws 10, which is few",
                FastSVIWarning,
                stacklevel=2,
            )
        if num_samples < 1:
            raise ImportanceError(f"num_samples must be at least 1, found {num_samples}")
        self.num_samples = num_samples
        self.model = model
        self.guide = poutine.block(model, hide_types=["observe"]) if guide is None else guide

    def _traces(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Trace, Tensor]]:
        for _ in range(self.num_samples):
            model_trace, guide_trace = _trace_pair(self.model, self.guide, args, kwargs)
            weight = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
            yield model_trace, torch.as_tensor(weight)


def vectorized_importance_weights(
    model: Callable, guide: Callable, *args: Any, **kwargs: Any
) -> tuple[Tensor, Trace, Trace]:
    """Log weights of many draws at once, and the traces of model and guide that gave them.

    Both run once in an outermost plate of ``num_samples``, so every batch dimension must be
    declared by a plate. Beside those of the model, the keyword arguments are

    - ``num_samples``: draws (1);
    - ``max_plate_nesting``: how deep the model's plates nest; the new plate stands left of them;
    - ``normalized``: return logs of weights that sum to one (False).

    Returns:
        log weights ``(num_samples,)``, the trace of the model, the trace of the guide.

    Raises:
        ImportanceError: ``max_plate_nesting`` is missing.
    """
    num_samples = kwargs.pop("num_samples", 1)
    max_plate_nesting = kwargs.pop("max_plate_nesting", None)
    normalized = kwargs.pop("normalized", False)
    if max_plate_nesting is None:
        raise ImportanceError(
            "vectorized_importance_weights needs max_plate_nesting=..., the number of plates "
            "nested in the model (0 without plates): the plate of the draws stands left of them"
        )
    dim = -max_plate_nesting - 1

    def many(program: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with plate(PLATE, num_samples, dim=dim):
                return program(*args, **kwargs)

        return run

    model_trace, guide_trace = _trace_pair(many(model), many(guide), args, kwargs)
    log_weights = _sum_to(model_trace, dim, num_samples) - _sum_to(guide_trace, dim, num_samples)
    if normalized:
        log_weights = log_weights.log_softmax(0)
    return log_weights, model_trace, guide_trace


@torch.no_grad()
def psis_diagnostic(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
    """k-hat of a guide: the tail index of its importance weights.

    Below 0.5 the guide is close to the posterior; up to 0.7 it is usable; above, it misses mass of
    the posterior, and its means and standard deviations may be far off. A warning is given above
    ``min(0.7, 1 - 1 / log10(num_particles))``. Predictions can be good even so: k-hat judges the
    whole joint distribution.

    Beside those of the model, the keyword arguments are

    - ``num_particles``: draws (1000); a few thousand give a steadier estimate;
    - ``max_simultaneous_particles``: draws at a time (all), a divisor of ``num_particles``;
    - ``max_plate_nesting``: if given, draws are made in a plate, as in Pyro. By default by
      ``torch.func.vmap``, for which the model needs no plates.

    Raises:
        ImportanceError: ``max_simultaneous_particles`` does not divide ``num_particles``.
        NonFiniteError: weights are NaN, or all zero.

    Source: Yao et al., "Yes, but did it work?: Evaluating variational inference", ICML 2018.
    """
    num_particles = kwargs.pop("num_particles", 1000)
    at_a_time = kwargs.pop("max_simultaneous_particles", num_particles)
    max_plate_nesting = kwargs.pop("max_plate_nesting", None)
    if num_particles % at_a_time:
        raise ImportanceError(
            f"max_simultaneous_particles={at_a_time} does not divide num_particles={num_particles}"
        )
    parts = []
    for _ in range(num_particles // at_a_time):
        if max_plate_nesting is None:
            parts.append(_log_weights(model, guide, args, kwargs, at_a_time))
        else:
            parts.append(
                vectorized_importance_weights(
                    model,
                    guide,
                    *args,
                    num_samples=at_a_time,
                    max_plate_nesting=max_plate_nesting,
                    **kwargs,
                )[0]
            )
    k = tail_index(torch.cat(parts))
    limit = tail_index_limit(num_particles)
    if k > limit:
        warnings.warn(
            f"k-hat is {k:.2f}, above {limit:.2f}: the guide misses mass of the posterior, and its "
            "means and standard deviations may be far off. A richer guide or another "
            "parametrisation of the model helps; so does a longer fit if it has not converged",
            FastSVIWarning,
            stacklevel=3,
        )
    return k


def _log_weights(
    model: Callable, guide: Callable, args: tuple, kwargs: dict, num_samples: int
) -> Tensor:  # [num_samples]
    def weigh(_: dict) -> Tensor:
        model_trace, guide_trace = _trace_pair(model, guide, args, kwargs)
        return torch.as_tensor(model_trace.log_prob_sum() - guide_trace.log_prob_sum())

    # One run ahead makes the parameters that a guide creates on its first call: not under vmap.
    with poutine.block():
        guide(*args, **kwargs)
    return over_samples(weigh, {}, num_samples, parallel=True)


def _trace_pair(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
    """Traces of the model, replayed against the guide, and of the guide, with log-densities."""
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    guide_trace = prune_subsample_sites(guide_trace)
    model_trace = prune_subsample_sites(model_trace)
    model_trace.compute_log_prob()
    guide_trace.compute_log_prob()
    return model_trace, guide_trace


def _sum_to(trace: Trace, dim: int, num_samples: int) -> Tensor:  # [num_samples]
    """Log-density per draw of a trace whose batch dimension ``dim``, the leftmost, is the draws."""
    total = torch.zeros(())
    for site in trace.nodes.values():
        if site["type"] == "sample":
            log_prob = torch.as_tensor(site["log_prob"])
            has_draws = log_prob.dim() >= -dim and log_prob.shape[dim] == num_samples
            per_draw = log_prob.flatten(1).sum(1) if has_draws and log_prob.dim() > 1 else log_prob
            total = total + (per_draw if has_draws else log_prob.sum())
    return total.expand(num_samples)
