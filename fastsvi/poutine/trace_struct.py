"""The record of one run of a model: its sites in order, and their log-densities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from fastsvi.distributions.util import scale_and_mask
from fastsvi.errors import MissingSiteError, ShapeError, SiteError
from fastsvi.poutine import shapes
from fastsvi.poutine.errors import HandlerError
from fastsvi.poutine.evaluate import evaluate
from fastsvi.poutine.message import Message
from fastsvi.poutine.packed import pack, symbol
from fastsvi.poutine.validation import is_validation_enabled, warn_unless_finite

SiteFilter = Callable[[str, Message], bool]


def allow_all_sites(name: str, site: Message) -> bool:
    return True


class Trace:
    """The sites that a model visited, by name, in the order of the visit.

    ``nodes`` maps names to :class:`Message`\\ s. ``_INPUT`` and ``_RETURN`` hold the model's
    arguments and return value. Made by ``poutine.trace``.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> def model(data):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)
    >>> trace = pyro.poutine.trace(model).get_trace(torch.tensor(0.5))
    >>> list(trace.nodes), trace.stochastic_nodes, trace.observation_nodes
    (['_INPUT', 'loc', 'obs', '_RETURN'], ['loc'], ['obs'])
    >>> trace.log_prob_sum().shape
    torch.Size([])
    """

    def __init__(self, graph_type: Literal["flat", "dense"] = "flat") -> None:
        if graph_type not in ("flat", "dense"):
            raise HandlerError(f"graph_type must be 'flat' or 'dense', found {graph_type!r}")
        self.graph_type = graph_type
        self.nodes: dict[str, Message] = {}
        # Only nodes with edges have an entry: a flat trace makes no sets.
        self._succ: dict[str, set[str]] = {}
        self._pred: dict[str, set[str]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self.nodes

    def __iter__(self) -> Iterator[str]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    # ---- nodes and edges ----

    def add_site(self, site: Message, name: str | None = None) -> None:
        """Add ``site`` itself, not a copy, as node ``name`` (its own name if left out).

        Raises :class:`SiteError` if a site of this name is there already; params may be repeated.
        """
        key = site.name if name is None else name
        if key in self.nodes:
            _check_may_repeat(key, self.nodes[key], site)
        self.nodes[key] = site

    def add_node(self, site_name: str, **kwargs: Any) -> None:
        """Add a node with the fields ``kwargs``; raises as :meth:`add_site` does."""
        self.add_site(Message.from_mapping(kwargs), site_name)

    def remove_node(self, site_name: str) -> None:
        """Remove a node with its edges."""
        self._require(site_name)
        del self.nodes[site_name]
        for name in self._pred.pop(site_name, ()):
            self._succ[name].discard(site_name)
        for name in self._succ.pop(site_name, ()):
            self._pred[name].discard(site_name)

    def add_edge(self, site1: str, site2: str) -> None:
        """Note that ``site2`` may depend on ``site1``."""
        self._require(site1)
        self._require(site2)
        self._succ.setdefault(site1, set()).add(site2)
        self._pred.setdefault(site2, set()).add(site1)

    @property
    def edges(self) -> Iterator[tuple[str, str]]:
        """Pairs (site, site that may depend on it)."""
        return ((site, after) for site in self.nodes for after in self._succ.get(site, ()))

    def predecessors(self, site_name: str) -> set[str]:
        self._require(site_name)
        return self._pred.get(site_name, set())

    def successors(self, site_name: str) -> set[str]:
        self._require(site_name)
        return self._succ.get(site_name, set())

    def topological_sort(self, reverse: bool = False) -> list[str]:
        """All names, each after those that it depends on (before them if ``reverse``)."""
        order: list[str] = []
        visited: set[str] = set()
        for root in self.nodes:
            pending = [(root, False)]
            while pending:
                site, expanded = pending.pop()
                if expanded:
                    order.append(site)
                elif site not in visited:
                    visited.add(site)
                    pending.append((site, True))
                    pending.extend((after, False) for after in self._succ.get(site, ()))
        return order if reverse else order[::-1]

    def copy(self) -> Trace:
        """A shallow copy: adding and removing nodes leaves the original alone."""
        new = Trace(self.graph_type)
        new.nodes.update(self.nodes)
        new._succ.update({name: set(sites) for name, sites in self._succ.items()})
        new._pred.update({name: set(sites) for name, sites in self._pred.items()})
        return new

    def _require(self, name: str) -> None:
        if name not in self.nodes:
            raise MissingSiteError(
                f"the trace has no site {name!r}; its sites are {list(self.nodes)}"
            )

    # ---- log-densities ----

    def log_prob_sum(self, site_filter: SiteFilter = allow_all_sites) -> torch.Tensor | float:
        """Sum of the scaled, masked log-densities of all sample sites that the filter lets pass.

        A scalar tensor; 0.0 if there are no such sites. Each site's part is computed once and kept
        as its ``log_prob_sum``. Raises :class:`ShapeError` or :class:`ConstraintError` naming the
        site if its value does not fit its distribution.
        """
        total: torch.Tensor | float | None = None
        for name, site in self.nodes.items():
            if site.type == "sample" and site_filter(name, site):
                if site.log_prob_sum is None:
                    log_prob = evaluate(site, "log_prob", name, self.nodes)
                    site.log_prob_sum = scale_and_mask(log_prob, site.scale, site.mask).sum()
                    self._warn_unless_finite(name, site)
                total = site.log_prob_sum if total is None else total + site.log_prob_sum
        return 0.0 if total is None else total

    def compute_log_prob(self, site_filter: SiteFilter = allow_all_sites) -> None:
        """Compute ``unscaled_log_prob``, ``log_prob`` (``[*batch]``) and ``log_prob_sum`` of the
        sample sites that the filter lets pass, once each. Raises as :meth:`log_prob_sum` does.
        """
        for name, site in self.nodes.items():
            if site.type == "sample" and site.log_prob is None and site_filter(name, site):
                log_prob = evaluate(site, "log_prob", name, self.nodes)
                site.unscaled_log_prob = log_prob
                site.log_prob = scale_and_mask(log_prob, site.scale, site.mask)
                site.log_prob_sum = site.log_prob.sum()
                self._warn_unless_finite(name, site)

    def compute_score_parts(self) -> None:
        """Compute ``score_parts`` of all sample sites, and what :meth:`compute_log_prob` computes.

        Log-density and entropy term are scaled and masked, the score function is not.
        """
        for name, site in self.nodes.items():
            if site.type == "sample" and site.score_parts is None:
                parts = evaluate(site, "score_parts", name, self.nodes)
                site.unscaled_log_prob = parts.log_prob
                parts = parts.scale_and_mask(site.scale, site.mask)
                site.score_parts = parts
                site.log_prob = parts.log_prob
                site.log_prob_sum = parts.log_prob.sum()
                self._warn_unless_finite(name, site)

    def _warn_unless_finite(self, name: str, site: Message) -> None:
        if is_validation_enabled():
            warn_unless_finite(site.log_prob_sum, f"log_prob_sum at site {name!r}")

    # ---- kinds of sites ----

    def iter_stochastic_nodes(self) -> Iterator[tuple[str, Message]]:
        """Pairs (name, site) of the latent sample sites."""
        return (
            (name, site)
            for name, site in self.nodes.items()
            if site.type == "sample" and not site.is_observed
        )

    @property
    def stochastic_nodes(self) -> list[str]:
        """Names of the latent sample sites."""
        return [name for name, _ in self.iter_stochastic_nodes()]

    @property
    def observation_nodes(self) -> list[str]:
        """Names of the observed sample sites."""
        return [
            name for name, site in self.nodes.items() if site.type == "sample" and site.is_observed
        ]

    @property
    def param_nodes(self) -> list[str]:
        """Names of the param sites."""
        return [name for name, site in self.nodes.items() if site.type == "param"]

    @property
    def reparameterized_nodes(self) -> list[str]:
        """Names of the latent sites whose draws are differentiable in their parameters."""
        return [
            name
            for name, site in self.iter_stochastic_nodes()
            if getattr(site.fn, "has_rsample", False)
        ]

    @property
    def nonreparam_stochastic_nodes(self) -> list[str]:
        """Names of the latent sites whose draws are not differentiable."""
        return [
            name
            for name, site in self.iter_stochastic_nodes()
            if not getattr(site.fn, "has_rsample", False)
        ]

    # ---- values, packing, display ----

    def detach_(self) -> None:
        """Detach the values of all sample sites, in place."""
        for site in self.nodes.values():
            if site.type == "sample" and isinstance(site.value, torch.Tensor):
                site.value = site.value.detach()

    def symbolize_dims(self, plate_to_symbol: dict[str, str] | None = None) -> None:
        """Give every plate dim an even-numbered and every enumerated dim an odd-numbered symbol."""
        plate_to_symbol = {} if plate_to_symbol is None else plate_to_symbol
        symbol_to_dim: dict[str, int] = {}
        for site in self.nodes.values():
            if site.type != "sample":
                continue
            dim_to_symbol: dict[int, str] = {}
            for frame in site.cond_indep_stack:
                if frame.dim is not None:
                    letter = plate_to_symbol.setdefault(
                        frame.name, symbol(2 * len(plate_to_symbol))
                    )
                    dim_to_symbol[frame.dim] = letter
            for dim, id_ in site.infer.get("_dim_to_id", {}).items():
                dim_to_symbol[dim] = symbol(1 + 2 * id_)
            symbol_to_dim.update((letter, dim) for dim, letter in dim_to_symbol.items())
            enum_dim = site.infer.get("_enumerate_dim")
            if enum_dim is not None:
                site.infer["_enumerate_symbol"] = dim_to_symbol[enum_dim]
            site.infer["_dim_to_symbol"] = dim_to_symbol
        self.plate_to_symbol = plate_to_symbol
        self.symbol_to_dim = symbol_to_dim

    def pack_tensors(self, plate_to_symbol: dict[str, str] | None = None) -> None:
        """Fill each sample site's ``packed`` with its log-densities' packed forms.

        To be called after :meth:`compute_log_prob` or :meth:`compute_score_parts`.
        """
        self.symbolize_dims(plate_to_symbol)
        for name, site in self.nodes.items():
            if site.type != "sample":
                continue
            symbols = site.infer["_dim_to_symbol"]
            packed = site.setdefault("packed", {})
            try:
                packed["mask"] = pack(site.mask, symbols)
                if site.score_parts is not None:
                    parts = [pack(part, symbols) for part in site.score_parts]
                    packed["score_parts"] = type(site.score_parts)(*parts)
                    packed["log_prob"] = packed["score_parts"].log_prob
                    packed["unscaled_log_prob"] = pack(site.unscaled_log_prob, symbols)
                elif site.log_prob is not None:
                    packed["log_prob"] = pack(site.log_prob, symbols)
                    packed["unscaled_log_prob"] = pack(site.unscaled_log_prob, symbols)
            except ShapeError as error:
                table = self.format_shapes(last_site=name)
                raise ShapeError(f"while packing site {name!r}: {error}\n{table}") from error

    def format_shapes(self, title: str = "Trace Shapes:", last_site: str | None = None) -> str:
        """A table of the shapes of all sites, up to ``last_site``: ``batch | event``."""
        return shapes.format_shapes(self.nodes, title, last_site)


def _check_may_repeat(name: str, known: Message, site: Message) -> None:
    if known.type != site.type:
        raise SiteError(
            f"{name!r} is already in the trace as a {known.type} site and cannot also be a "
            f"{site.type} site; rename one of them"
        )
    if site.type != "param":
        raise SiteError(
            f"Multiple {site.type} sites named {name!r}: a model may use a name once in a run; in "
            f'a loop, number them as in f"{name}_{{i}}"'
        )
