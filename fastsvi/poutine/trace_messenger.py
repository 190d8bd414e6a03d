"""Recording: ``poutine.trace``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fastsvi.poutine.errors import HandlerError
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.trace_struct import Trace
from fastsvi.poutine.util import site_is_subsample


def identify_dense_edges(trace: Trace) -> None:
    """Add an edge between each two sample sites, unless different turns of a loop divide them."""
    sites = [
        (name, site)
        for name, site in trace.nodes.items()
        if site.type == "sample" and not site_is_subsample(site)
    ]
    for i, (name, site) in enumerate(sites):
        for earlier_name, earlier in sites[:i]:
            pairs = zip(site.cond_indep_stack, earlier.cond_indep_stack, strict=False)
            if not any(a.name == b.name and a.counter != b.counter for a, b in pairs):
                trace.add_edge(earlier_name, name)


class TraceMessenger(Messenger):
    """Records the sample and param sites under it in :attr:`trace`.

    ``graph_type="dense"`` adds edges between sites that may depend on each other.
    ``param_only=True`` records params only.

    >>> import torch, fastsvi as pyro, fastsvi.distributions as dist
    >>> with TraceMessenger() as tracer:
    ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
    >>> tracer.trace.nodes["x"]["value"] is x
    True
    """

    def __init__(
        self,
        graph_type: Literal["flat", "dense"] | None = None,
        param_only: bool | None = None,
    ) -> None:
        super().__init__()
        self.graph_type: Literal["flat", "dense"] = graph_type or "flat"
        self.param_only = bool(param_only)
        self.trace = Trace(self.graph_type)

    def __enter__(self) -> TraceMessenger:
        self.trace = Trace(self.graph_type)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self.param_only:
            for name, site in list(self.trace.nodes.items()):
                if site.type != "param":
                    self.trace.remove_node(name)
        if self.graph_type == "dense":
            identify_dense_edges(self.trace)
        super().__exit__(*exception)

    def __call__(self, fn: Callable[..., Any]) -> TraceHandler:
        if not callable(fn):
            super().__call__(fn)  # raises
        return TraceHandler(self, fn)

    def get_trace(self) -> Trace:
        """A shallow copy of what was recorded last."""
        return self.trace.copy()

    def _reset(self) -> None:
        args = self.trace.nodes.get("_INPUT")
        self.trace = Trace(self.graph_type)
        if args is not None:
            self.trace.add_site(args, "_INPUT")
        super()._reset()

    def _pyro_post_sample(self, msg: Message) -> None:
        if self.param_only:
            return
        if msg.infer.get("_do_not_trace"):
            if msg.is_observed or not msg.infer.get("is_auxiliary"):
                raise HandlerError(
                    f"site {msg.name!r} has infer['_do_not_trace'] but is not an auxiliary latent "
                    "site; leaving it out would change the model's density"
                )
            return
        self.trace.add_site(msg.copy())

    def _pyro_post_param(self, msg: Message) -> None:
        self.trace.add_site(msg.copy())


class TraceHandler:
    """A function that is recorded whenever it is called; see :meth:`get_trace`."""

    def __init__(self, msngr: TraceMessenger, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.msngr = msngr

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.msngr:
            trace = self.msngr.trace
            trace.add_site(Message("args", "_INPUT", args=args, kwargs=kwargs))
            try:
                result = self.fn(*args, **kwargs)
            except (ValueError, RuntimeError) as error:
                _add_shapes(error, self.msngr.trace)
                raise
            # Read again: an escape handler may have reset the messenger meanwhile.
            self.msngr.trace.add_site(Message("return", "_RETURN", value=result))
        return result

    @property
    def trace(self) -> Trace:
        """The last recording."""
        return self.msngr.trace

    def get_trace(self, *args: Any, **kwargs: Any) -> Trace:
        """Run the function and return its trace in place of its value."""
        self(*args, **kwargs)
        return self.msngr.get_trace()


def _add_shapes(error: Exception, trace: Trace) -> None:
    """Append the table of shapes to the error's message, once."""
    # In place: a new exception of the same type could need other arguments.
    if len(error.args) == 1 and isinstance(error.args[0], str):
        table = trace.format_shapes()
        if "Trace Shapes:" not in error.args[0]:
            error.args = (f"{error.args[0]}\n{table}",)
