"""Draws from the prior, the posterior and the posterior predictive distribution of a program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsvi import poutine
from fastsvi.errors import DtypeError, FastSVIError, FastSVIWarning, ShapeError, describe
from fastsvi.infer.over_samples import over_samples
from fastsvi.poutine import Trace
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.util import site_is_subsample
from fastsvi.primitives import plate

RETURN = "_RETURN"
PLATE = "_num_predictive_samples"


class PredictiveError(FastSVIError, ValueError):
    """The arguments of :class:`Predictive` contradict each other or leave the samples unsaid."""


class Predictive(nn.Module):
    """Run ``model`` on posterior samples and return what its sites drew.

    The samples come from ``posterior_samples`` (of MCMC, say), or from ``guide``; with neither, the
    model runs on its prior. Calling the object with the arguments of the model returns a dict of
    draws in the constrained space, ``(num_samples, *site)`` each. As in Pyro, a site outside some
    of the model's plates has a dimension of size 1 for each of them: with one plate, a global
    scalar is ``(num_samples, 1)``.

    Args:
        model: the program, any callable with sample sites.
        posterior_samples: site name -> draws ``(num_samples, *site)``.
        guide: a program with the same arguments, to draw the samples from. Not both.
        num_samples: how many draws; with ``posterior_samples`` their first dimension says it.
        return_sites: names of the sites to return, ``"_RETURN"`` for the return value of the model.
            ``()``: with a guide all, otherwise those not in ``posterior_samples``; ``None``: all.
        parallel: run all samples at once, by ``torch.func.vmap``; the model needs no plates for
            it. If vmap cannot run the model, a warning says why and the samples run one by one.

    Raises:
        PredictiveError: neither samples nor their number are given, or both samples and a guide.
        ShapeError: the samples differ in their first dimension.
        DtypeError: ``return_sites`` is not a collection of names.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> def model():
    ...     rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
    ...     with pyro.plate("tosses", 10):
    ...         return pyro.sample("toss", dist.Bernoulli(rate))
    >>> draws = Predictive(model, {"rate": torch.tensor([0.1, 0.5, 0.9])})()
    >>> {name: tuple(draw.shape) for name, draw in draws.items()}
    {'toss': (3, 10)}
    """

    def __init__(
        self,
        model: Callable,
        posterior_samples: dict[str, Tensor] | None = None,
        guide: Callable | None = None,
        num_samples: int | None = None,
        return_sites: Collection[str] | None = (),
        parallel: bool = False,
    ) -> None:
        super().__init__()
        if guide is not None and posterior_samples:
            raise PredictiveError(
                "Predictive takes its samples from posterior_samples or from guide, and found both "
                f"(samples of {sorted(posterior_samples)}); leave one out"
            )
        if return_sites is not None and not isinstance(return_sites, list | tuple | set):
            raise DtypeError(
                "return_sites must be a list, tuple or set of site names, or None for all sites, "
                f"found {describe(return_sites)}"
            )
        self.model = model
        self.guide = guide
        self.posterior_samples = dict(posterior_samples or {})
        self.num_samples = _number_of(self.posterior_samples, num_samples)
        self.return_sites = return_sites
        self.parallel = parallel

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Draws per site for these arguments of the model."""
        return_sites = self.return_sites
        if self.guide is not None:
            return_sites = return_sites or None
        return _predict(
            self.model,
            self._samples(args, kwargs),
            self.num_samples,
            return_sites,
            self.parallel,
            args,
            kwargs,
        )

    def call(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The draws of :meth:`forward` as a tuple, in the order of the sites' sorted names."""
        return tuple(draw for _, draw in sorted(self.forward(*args, **kwargs).items()))

    def get_vectorized_trace(self, *args: Any, **kwargs: Any) -> Trace:
        """One trace in which every sample site has the samples as its leftmost batch dimension.

        It is made by an outermost plate of ``num_samples``, so unlike ``parallel=True`` this needs
        every batch dimension of the model declared by a plate.
        """
        samples = self._samples(args, kwargs)
        model = _silent(self.model)
        sketch = _Sketch.of(model, samples, args, kwargs)
        around = plate(PLATE, self.num_samples, dim=-sketch.max_plate_nesting - 1)
        substitute = _Substitute(samples, num_lead=1, batch_ndim=sketch.max_plate_nesting)
        return poutine.trace(substitute(around(model))).get_trace(*args, **kwargs)

    def _samples(self, args: tuple, kwargs: dict) -> dict[str, Tensor]:
        if self.guide is None:
            return self.posterior_samples
        return _predict(self.guide, {}, self.num_samples, None, self.parallel, args, kwargs)


def _number_of(samples: dict[str, Tensor], num_samples: int | None) -> int:
    sizes = {name: sample.shape[0] if sample.dim() else 0 for name, sample in samples.items()}
    if len(set(sizes.values())) > 1:
        raise ShapeError(
            "the posterior samples differ in their first dimension, the number of samples: "
            + ", ".join(f"{name!r} has {size}" for name, size in sizes.items())
        )
    if not sizes:
        if num_samples is None:
            raise PredictiveError(
                "Predictive does not know how many draws to make: give posterior_samples (not "
                "empty) or num_samples"
            )
        found = num_samples
    else:
        found = next(iter(sizes.values()))
        if num_samples is not None and num_samples != found:
            warnings.warn(
                f"num_samples={num_samples} is ignored: the posterior samples are {found}",
                FastSVIWarning,
                stacklevel=3,
            )
    if found < 1:
        raise PredictiveError(f"Predictive needs at least one sample, found {found}")
    return found


def _predict(
    program: Callable,
    samples: dict[str, Tensor],  # [num_samples, *site] each
    num_samples: int,
    return_sites: Collection[str] | None,
    parallel: bool,
    args: tuple,
    kwargs: dict,
) -> dict[str, Any]:
    program = _silent(program)
    sketch = _Sketch.of(program, samples, args, kwargs)
    wanted = sketch.choose(return_sites, samples)
    drawable = [name for name in wanted if name != RETURN or sketch.has_return]

    def run(sample: dict[str, Tensor]) -> dict[str, Any]:
        trace = poutine.trace(_Substitute(sample)(program)).get_trace(*args, **kwargs)
        return {name: _as_tensors(trace.nodes[name]["value"]) for name in drawable}

    draws = over_samples(run, samples, num_samples, parallel=parallel)
    return {name: sketch.shaped(name, draws.get(name), num_samples) for name in wanted}


def _silent(program: Callable) -> Callable:
    """``program`` without gradients and, since nobody reads them, without log-densities."""
    return torch.no_grad()(poutine.mask(program, mask=False))


@dataclass(frozen=True)
class _Sketch:
    """What one run of a program tells: its sites, their shapes and how deep plates nest.

    The run also creates the parameters that the program makes on its first call: under vmap
    they would be born with an axis too many.
    """

    shapes: dict[str, tuple[int, ...]]  # with a 1 for each plate the site is not in
    has_return: bool
    max_plate_nesting: int

    @classmethod
    def of(cls, program: Callable, samples: dict, args: tuple, kwargs: dict) -> _Sketch:
        first = _Substitute({name: value[0] for name, value in samples.items()})
        with poutine.block():
            trace = poutine.trace(first(program)).get_trace(*args, **kwargs)
        sites = [
            site
            for site in trace.nodes.values()
            if site["type"] == "sample" and not site_is_subsample(site)
        ]
        dims = [
            frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.vectorized
        ]
        nesting = -min(dims, default=0)
        shapes = {
            site["name"]: (1,) * (nesting - len(site["fn"].batch_shape))
            + tuple(torch.as_tensor(site["value"]).shape)
            for site in sites
        }
        returned = trace.nodes[RETURN]["value"]
        if isinstance(returned, Tensor):
            shapes[RETURN] = tuple(returned.shape)
        return cls(shapes, returned is not None, nesting)

    def choose(self, return_sites: Collection[str] | None, samples: Collection[str]) -> list[str]:
        sites = [name for name in self.shapes if name != RETURN]
        if return_sites is None:
            return sites
        if not return_sites:
            return [name for name in sites if name not in samples]
        unknown = sorted(set(return_sites) - {*sites, RETURN})
        if unknown:
            warnings.warn(
                f"return_sites names {unknown}, which the model does not have; it has {sites}",
                FastSVIWarning,
                stacklevel=5,
            )
        chosen = [name for name in sites if name in return_sites]
        return [*chosen, RETURN] if RETURN in return_sites else chosen

    def shaped(self, name: str, draw: Any, num_samples: int) -> Any:
        """``draw`` with the 1s that plates add to its shape; a nested return value as it is."""
        if name not in self.shapes:
            return draw
        return draw.reshape(num_samples, *self.shapes[name])


class _Substitute(Messenger):
    """Observe sites at given values, as ``condition`` does, in the shape that the site asks for.

    The draws of a guide carry a 1 for each plate of the guide. Here they lose it, or a global
    scalar would reach the model as a vector of one.
    """

    def __init__(
        self,
        samples: dict[str, Tensor],  # [*lead, *site]
        num_lead: int = 0,
        batch_ndim: int = 0,
    ) -> None:
        super().__init__()
        self.samples = samples
        self.num_lead = num_lead
        self.batch_ndim = batch_ndim

    def _pyro_sample(self, msg: Any) -> None:
        sample = self.samples.get(msg["name"])
        if sample is None:
            return
        lead, rest = tuple(sample.shape[: self.num_lead]), tuple(sample.shape[self.num_lead :])
        fn = msg["fn"]
        asked = (*fn.batch_shape, *fn.event_shape)[self.num_lead :]
        if _without_leading_ones(rest) == _without_leading_ones(asked):
            rest = asked
        elif self.num_lead:
            rest = (1,) * (self.batch_ndim + len(fn.event_shape) - len(rest)) + rest
        msg["value"] = sample.reshape((*lead, *rest))
        msg["is_observed"] = True


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return tuple(shape[first:])


def _as_tensors(value: Any) -> Any:
    """Numbers inside ``value`` as tensors, the rest as it is."""
    if isinstance(value, bool | int | float):
        return torch.as_tensor(value)
    if isinstance(value, dict):
        return {key: _as_tensors(part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_as_tensors(part) for part in value)
    return value
