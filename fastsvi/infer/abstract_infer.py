"""Posteriors held as weighted traces, and the marginals of their sites.

:class:`TracePosterior` is what an algorithm such as :class:`~fastsvi.infer.importance.Importance`
derives from: it yields traces of the model with log weights, the rest is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastsvi.distributions as dist
from fastsvi.errors import DtypeError, MissingSiteError, SiteError
from fastsvi.poutine import Trace


class TracePosterior(ABC):
    """Base of the algorithms whose posterior is a bag of weighted traces.

    A derived class writes ``_traces(*args, **kwargs)``, which yields ``(trace, log_weight)`` or
    ``(trace, log_weight, chain_id)``. After :meth:`run`, ``exec_traces``, ``log_weights`` (detached
    scalars) and ``chain_ids`` are lists of equal length.
    """

    def __init__(self, num_chains: int = 1) -> None:
        self.num_chains = num_chains
        self._reset()

    def _reset(self) -> None:
        self.exec_traces: list[Trace] = []
        self.log_weights: list[Tensor] = []
        self.chain_ids: list[int] = []

    @abstractmethod
    def _traces(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Any, ...]]: ...

    def run(self, *args: Any, **kwargs: Any) -> TracePosterior:
        """Draw traces for these arguments of the model, in place of those held; returns self."""
        self._reset()
        with torch.no_grad():
            for trace, log_weight, *chain in self._traces(*args, **kwargs):
                self.exec_traces.append(trace)
                self.log_weights.append(torch.as_tensor(log_weight).detach())
                self.chain_ids.append(chain[0] if chain else 0)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Trace:
        """Draw one of the traces, by weight, without its observed sites: what a replay needs."""
        self._require_run()
        index = torch.distributions.Categorical(logits=torch.stack(self.log_weights)).sample()
        trace = self.exec_traces[int(index)].copy()
        for name in trace.observation_nodes:
            trace.remove_node(name)
        return trace

    def marginal(self, sites: str | list[str] | None = None) -> Marginals:
        """Marginals of ``sites``, by default of the model's return value."""
        return Marginals(self, sites)

    def _require_run(self) -> None:
        if not self.exec_traces:
            raise SiteError(
                f"{type(self).__name__} holds no traces yet: call .run(*args) with the arguments "
                "of the model first"
            )


class EmpiricalMarginal(dist.Empirical):
    """Weighted draws of one site, or of several of equal shape stacked, as a distribution.

    Args:
        trace_posterior: a :class:`TracePosterior` that has been run.
        sites: name of a site, or names of sites of equal shape (their values are stacked in a new
            leading dimension); by default the return value of the model.

    The values are those that the sites took in the model: constrained.

    Raises:
        DtypeError: ``trace_posterior`` is something else.
        MissingSiteError: a trace has no such site.
    """

    def __init__(
        self,
        trace_posterior: TracePosterior,
        sites: str | list[str] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(trace_posterior, TracePosterior):
            raise DtypeError(
                f"a marginal is made from a TracePosterior, found {type(trace_posterior).__name__}"
            )
        trace_posterior._require_run()
        read = _reader("_RETURN" if sites is None else sites)
        samples, log_weights = [], []
        for chain in sorted(set(trace_posterior.chain_ids)):
            of_chain = [i for i, c in enumerate(trace_posterior.chain_ids) if c == chain]
            samples.append(torch.stack([read(trace_posterior.exec_traces[i]) for i in of_chain]))
            log_weights.append(torch.stack([trace_posterior.log_weights[i] for i in of_chain]))
        if len(samples) == 1:
            super().__init__(samples[0], log_weights[0], validate_args=validate_args)
        else:  # the chain is the batch dimension
            super().__init__(
                torch.stack(samples), torch.stack(log_weights), validate_args=validate_args
            )


def _reader(sites: str | list[str]) -> Callable[[Trace], Tensor]:
    def value(trace: Trace, name: str) -> Tensor:
        if name not in trace.nodes:
            raise MissingSiteError(
                f"the traces have no site {name!r}; they have {sorted(trace.nodes)}"
            )
        found = trace.nodes[name]["value"]
        if not isinstance(found, (torch.Tensor, float, int)):
            raise DtypeError(
                f"the marginal of {name!r} needs tensors, found {type(found).__name__}; "
                "name a site, or return a tensor from the model"
            )
        return torch.as_tensor(found)

    if isinstance(sites, str):
        return lambda trace: value(trace, sites)
    return lambda trace: torch.stack([value(trace, name) for name in sites])


class Marginals:
    """The marginals of several sites, which may differ in shape.

    Args:
        trace_posterior: a :class:`TracePosterior` that has been run.
        sites: one name or a list of names; by default the return value of the model.
    """

    def __init__(
        self,
        trace_posterior: TracePosterior,
        sites: str | list[str] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        names = [sites] if isinstance(sites, str) else sites or ["_RETURN"]
        self.sites = names
        self._num_chains = trace_posterior.num_chains
        self.empirical = {
            name: EmpiricalMarginal(trace_posterior, name, validate_args) for name in names
        }

    def support(self, flatten: bool = False) -> dict[str, Tensor]:
        """All draws per site, ``(draws, *site)``; with chains ``(chains, draws, *site)``.

        ``flatten=True`` joins the chains into one dimension.
        """
        support = {name: each.enumerate_support() for name, each in self.empirical.items()}
        if flatten and self._num_chains > 1:
            support = {name: draws.flatten(0, 1) for name, draws in support.items()}
        return support
