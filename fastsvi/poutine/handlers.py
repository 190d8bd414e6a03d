"""The handlers as functions: ``poutine.trace(model)``, ``poutine.scale(model, scale=0.5)``, ...

Each takes a function and returns it handled. Without a function it returns the messenger, which is
a context manager and a decorator. Handlers compose: the outermost one sees a site last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from fastsvi.errors import describe
from fastsvi.poutine import util
from fastsvi.poutine.block_messenger import BlockMessenger, SitePredicate
from fastsvi.poutine.broadcast_messenger import BroadcastMessenger
from fastsvi.poutine.condition_messenger import ConditionMessenger
from fastsvi.poutine.do_messenger import DoMessenger
from fastsvi.poutine.enum_messenger import EnumMessenger
from fastsvi.poutine.equalize_messenger import EqualizeMessenger
from fastsvi.poutine.errors import HandlerError
from fastsvi.poutine.escape_messenger import EscapeMessenger
from fastsvi.poutine.infer_config_messenger import InferConfigMessenger
from fastsvi.poutine.lift_messenger import LiftMessenger
from fastsvi.poutine.markov_messenger import MarkovMessenger
from fastsvi.poutine.mask_messenger import MaskMessenger
from fastsvi.poutine.message import InferDict, Message
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.reparam_messenger import ReparamMessenger
from fastsvi.poutine.replay_messenger import ReplayMessenger
from fastsvi.poutine.runtime import NonlocalExit
from fastsvi.poutine.scale_messenger import ScaleMessenger
from fastsvi.poutine.seed_messenger import SeedMessenger
from fastsvi.poutine.substitute_messenger import SubstituteMessenger
from fastsvi.poutine.trace_messenger import TraceMessenger
from fastsvi.poutine.trace_struct import Trace
from fastsvi.poutine.uncondition_messenger import UnconditionMessenger

_Fn = Callable[..., Any]


def _handle(messenger: Messenger, fn: _Fn | None) -> Any:
    if fn is None:
        return messenger
    return functools.update_wrapper(messenger(fn), fn, updated=())


def block(
    fn: _Fn | None = None,
    hide_fn: SitePredicate | None = None,
    expose_fn: SitePredicate | None = None,
    hide_all: bool = True,
    expose_all: bool = False,
    hide: Collection[str] | None = None,
    expose: Collection[str] | None = None,
    hide_types: Collection[str] | None = None,
    expose_types: Collection[str] | None = None,
) -> Any:
    """Hide sites from outer handlers: :class:`BlockMessenger`."""
    messenger = BlockMessenger(
        hide_fn, expose_fn, hide_all, expose_all, hide, expose, hide_types, expose_types
    )
    return _handle(messenger, fn)


def broadcast(fn: _Fn | None = None) -> Any:
    """Expand distributions to the sizes of independence contexts: :class:`BroadcastMessenger`."""
    return _handle(BroadcastMessenger(), fn)


def condition(fn: _Fn | None = None, data: Mapping[str, Any] | Trace | None = None) -> Any:
    """Observe sites: :class:`ConditionMessenger`."""
    return _handle(ConditionMessenger(data), fn)  # type: ignore[arg-type]


def do(fn: _Fn | None = None, data: Mapping[str, Any] | None = None) -> Any:
    """Intervene on sites: :class:`DoMessenger`."""
    return _handle(DoMessenger(data), fn)  # type: ignore[arg-type]


def enum(fn: _Fn | None = None, first_available_dim: int | None = None) -> Any:
    """Enumerate discrete sites in parallel: :class:`EnumMessenger`."""
    return _handle(EnumMessenger(first_available_dim), fn)


def equalize(
    fn: _Fn | None = None,
    sites: str | Sequence[str] = (),
    type: str | None = "sample",
    keep_dist: bool | None = False,
) -> Any:
    """Give sites the same value: :class:`EqualizeMessenger`."""
    return _handle(EqualizeMessenger(sites, type, keep_dist), fn)


def escape(fn: _Fn | None = None, escape_fn: Callable[[Message], bool] | None = None) -> Any:
    """Leave the program at a site: :class:`EscapeMessenger`."""
    return _handle(EscapeMessenger(escape_fn), fn)  # type: ignore[arg-type]


def infer_config(
    fn: _Fn | None = None, config_fn: Callable[[Message], InferDict] | None = None
) -> Any:
    """Set inference options of sites: :class:`InferConfigMessenger`."""
    return _handle(InferConfigMessenger(config_fn), fn)  # type: ignore[arg-type]


def lift(fn: _Fn | None = None, prior: Any = None) -> Any:
    """Sample params from a prior: :class:`LiftMessenger`."""
    return _handle(LiftMessenger(prior), fn)


def markov(
    fn: _Fn | Iterable[Any] | None = None,
    history: int = 1,
    keep: bool = False,
    dim: int | None = None,
    name: str | None = None,
) -> Any:
    """Declare Markov dependence, as a context, a decorator or around the iterable of a loop:
    :class:`MarkovMessenger`.

    >>> [i for i in markov(range(3))]
    [0, 1, 2]
    """
    messenger = MarkovMessenger(history, keep, dim, name)
    if fn is None:
        return messenger
    if callable(fn):
        return messenger(fn)
    if not isinstance(fn, Iterable):
        raise HandlerError(f"markov takes a function or an iterable, found {describe(fn)}")
    return messenger.generator(fn)


def mask(fn: _Fn | None = None, mask: bool | torch.Tensor | None = None) -> Any:
    """Mask log-densities: :class:`MaskMessenger`."""
    return _handle(MaskMessenger(mask), fn)  # type: ignore[arg-type]


def reparam(fn: _Fn | None = None, config: Any = None) -> Any:
    """Reparameterize sites: :class:`ReparamMessenger`."""
    return _handle(ReparamMessenger(config), fn)


def replay(
    fn: _Fn | None = None,
    trace: Trace | None = None,
    params: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """Use the values of a trace again: :class:`ReplayMessenger`."""
    return _handle(ReplayMessenger(trace, params), fn)


def scale(fn: _Fn | None = None, scale: float | torch.Tensor | None = None) -> Any:
    """Scale log-densities: :class:`ScaleMessenger`."""
    return _handle(ScaleMessenger(scale), fn)  # type: ignore[arg-type]


def seed(fn: _Fn | None = None, rng_seed: int | None = None) -> Any:
    """Seed all random number generators: :class:`SeedMessenger`."""
    return _handle(SeedMessenger(rng_seed), fn)  # type: ignore[arg-type]


def substitute(fn: _Fn | None = None, data: Mapping[str, Any] | None = None) -> Any:
    """Give params other values: :class:`SubstituteMessenger`."""
    return _handle(SubstituteMessenger(data), fn)  # type: ignore[arg-type]


def trace(
    fn: _Fn | None = None,
    graph_type: Literal["flat", "dense"] | None = None,
    param_only: bool | None = None,
) -> Any:
    """Record sites: :class:`TraceMessenger`; a function becomes a :class:`TraceHandler`."""
    return _handle(TraceMessenger(graph_type, param_only), fn)


def uncondition(fn: _Fn | None = None) -> Any:
    """Sample observed sites: :class:`UnconditionMessenger`."""
    return _handle(UnconditionMessenger(), fn)


def queue(
    fn: _Fn | None = None,
    queue: Any = None,
    max_tries: int = 1_000_000,
    extend_fn: Callable[..., Iterable[Trace]] = util.enum_extend,
    escape_fn: Callable[[Trace, Message], bool] = util.discrete_escape,
    num_samples: int = -1,
) -> Any:
    """Return the value of a complete run, extending partial traces in ``queue`` by one site a time.

    At a site where ``escape_fn(partial_trace, msg)`` is true the run is left, and the extensions
    ``extend_fn(partial_trace, msg, num_samples=...)`` are put into the queue. The queue has
    ``get``, ``put`` and ``empty``. Raises :class:`HandlerError` if it runs empty, or after
    ``max_tries`` runs that were left.
    """
    if fn is None:
        return functools.partial(
            _queued,
            queue=queue,
            max_tries=max_tries,
            extend_fn=extend_fn,
            escape_fn=escape_fn,
            num_samples=num_samples,
        )
    return _queued(fn, queue, max_tries, extend_fn, escape_fn, num_samples)


def _queued(
    fn: _Fn,
    queue: Any,
    max_tries: int,
    extend_fn: Callable[..., Iterable[Trace]],
    escape_fn: Callable[[Trace, Message], bool],
    num_samples: int,
) -> _Fn:
    def run(*args: Any, **kwargs: Any) -> Any:
        for _ in range(max_tries):
            if queue.empty():
                raise HandlerError("the queue of partial traces is empty; put a Trace() into it")
            partial_trace = queue.get()
            rule = functools.partial(escape_fn, partial_trace)
            handled = trace(escape(replay(fn, trace=partial_trace), escape_fn=rule))
            try:
                return handled(*args, **kwargs)
            except NonlocalExit as exit_:
                exit_.reset_stack()
                extensions = extend_fn(handled.trace.copy(), exit_.site, num_samples=num_samples)
                for longer in extensions:
                    queue.put(longer)
        raise HandlerError(f"no complete run in {max_tries} tries; raise max_tries")

    return run
