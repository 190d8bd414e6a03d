"""What automatic guides share, and how several of them make one guide."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fastsvi.primitives as pyro
from fastsvi.errors import ShapeError, SiteError
from fastsvi.infer.autoguide.prototype import hide_all_but_latent_sites, run_prototype
from fastsvi.nn import PyroModule


class AutoGuide(PyroModule):
    """Base class of guides that are made from a model.

    The first call runs the model once (without gradients, hidden from all handlers) to find its
    latent sites, and makes the parameters. A derived class implements :meth:`forward`, with the
    arguments of the model, which samples those sites and returns them in a dict by name.

    Args:
        model: a model.
        create_plates: a function of the model's arguments that returns the plate or plates which
            the guide should enter in place of its own; needed if these subsample by index.
    """

    def __init__(self, model: Callable[..., Any], *, create_plates: Any = None) -> None:
        super().__init__(name=type(self).__name__)
        self.master: weakref.ref[AutoGuide] | None = None  # the AutoGuideList that this is part of
        self._model: tuple[Any, ...] = (model,)  # in a tuple, lest it become a submodule
        self.create_plates = create_plates
        self.plates: dict[str, Any] = {}
        self.prototype_trace: Any = None
        self._prototype_frames: dict[str, Any] = {}

    @property
    def model(self) -> Any:
        """The model, wrapped in the strategy that initializes it."""
        return self._model[0]

    # ------------------------------------------------------------------------------- structure

    _prototype_hide_fn = staticmethod(hide_all_but_latent_sites)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        trace = run_prototype(self.model, self._prototype_hide_fn, args, kwargs)
        frames = {}
        for name, site in trace.iter_stochastic_nodes():
            for frame in site["cond_indep_stack"]:
                if not frame.vectorized:
                    raise SiteError(
                        f"latent site {name!r} lies in the sequential plate {frame.name!r}, whose "
                        f"length may change from run to run; {type(self).__name__} has no "
                        f"parameters for it. Write it as a vectorized plate (with plate(...):)."
                    )
                frames[frame.name] = frame
        if self.master is not None:
            self._master()._check_prototype(trace)
        self.prototype_trace = trace
        self._prototype_frames = frames

    def _latent_sites(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
        """The latent sites of the model; its first use sets up the guide."""
        if self.prototype_trace is None:
            complete = False
            try:
                self._setup_prototype(*args, **kwargs)
                complete = True
            finally:
                # Half a guide would never be completed: begin anew on the next call.
                if not complete:
                    self.prototype_trace = None
        prototype: Any = self.prototype_trace
        return (site for _, site in prototype.iter_stochastic_nodes())

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.master is not None:
            if self.create_plates is not None:
                raise SiteError(
                    f"{type(self).__name__} is part of an AutoGuideList; pass create_plates to "
                    f"the list, whose plates all parts share."
                )
            self.plates = self._master().plates
            return self.plates
        plates = self.create_plates(*args, **kwargs) if self.create_plates is not None else ()
        plates = [plates] if isinstance(plates, pyro.plate) else list(plates)
        for plate in plates:
            if not isinstance(plate, pyro.plate):
                raise SiteError(
                    f"create_plates returned {plate!r} among its plates; it must return a plate "
                    f"or an iterable of plates."
                )
        self.plates = {plate.name: plate for plate in plates}
        for name, frame in sorted(self._prototype_frames.items()):
            if name not in self.plates:
                self.plates[name] = pyro.plate(
                    name, frame.full_size or frame.size, dim=frame.dim, subsample_size=frame.size
                )
        return self.plates

    @contextmanager
    def _plates_of(self, site: Any) -> Iterator[None]:
        """Inside the plates of a site of the prototype."""
        with ExitStack() as stack:
            for frame in site["cond_indep_stack"]:
                stack.enter_context(self.plates[frame.name])
            yield

    # --------------------------------------------------------------------------------- results

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; returns constrained values by site name."""
        raise NotImplementedError

    def call(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Like calling the guide, but the values come as a tuple in the order of site names."""
        result = self(*args, **kwargs)
        return tuple(value for _, value in sorted(result.items()))

    def sample_latent(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the guide's own encoding of the latent sites, where it has one."""

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior median of each latent site, in constrained space."""
        raise NotImplementedError

    # ------------------------------------------------------------------------ parts and copies

    def _master(self) -> AutoGuide:
        master = self.master() if self.master is not None else None
        if master is None:
            raise SiteError(
                f"the AutoGuideList that this {type(self).__name__} is part of no longer exists; "
                f"keep a reference to it."
            )
        return master

    def _update_master(self, master: weakref.ref[AutoGuide] | None) -> None:
        self.master = master
        for module in self.modules():
            if module is not self and isinstance(module, AutoGuide):
                module.master = master

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, AutoGuide):
            value._update_master(weakref.ref(self) if self.master is None else self.master)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # Neither the model, which may be a local function, nor weak references can be pickled.
        # A guide that has been set up needs its model no more.
        state = dict(super().__getstate__())
        return {**state, "_model": (None,), "master": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._update_master(None)
        for module in self.modules():
            if module is not self and isinstance(module, AutoGuide):
                module.master = weakref.ref(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoGuide:
        # A copy belongs to the same model, which may be anything and is not copied.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        for ours, theirs in zip(self.modules(), new.modules(), strict=True):
            if isinstance(ours, AutoGuide) and isinstance(theirs, AutoGuide):
                theirs._model = ours._model
        return new


class AutoGuideList(AutoGuide, nn.ModuleList):
    """Several guides, each for some of the model's sites, as one.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> from fastsvi import poutine
    >>> from fastsvi.infer.autoguide import AutoDelta, AutoNormal
    >>> def model():
    ...     pyro.sample("x", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Gamma(2.0, 1.0))
    >>> guide = AutoGuideList(model)
    >>> guide.append(AutoNormal(poutine.block(model, expose=["x"])))
    >>> guide.append(AutoDelta(poutine.block(model, expose=["y"])))
    >>> sorted(guide())
    ['x', 'y']
    """

    def _parts(self) -> list[Any]:
        return list(self)

    def append(self, part: Any) -> None:  # type: ignore[override]
        """Add a guide (or any callable) for sites that no other part samples.

        Raises:
            SiteError: the part already belongs to a list.
        """
        if not isinstance(part, AutoGuide):
            part = AutoCallable(self.model, part)
        if part.master is not None:
            raise SiteError(f"{type(part).__name__} is already part of an AutoGuideList.")
        setattr(self, str(len(self)), part)

    def add(self, part: Any) -> None:
        """Deprecated name of :meth:`append`."""
        warnings.warn("AutoGuideList.add is now append", DeprecationWarning, stacklevel=2)
        self.append(part)

    def _check_prototype(self, part_trace: Any) -> None:
        """A part must see the sites as the whole model has them."""
        for name, site in part_trace.iter_stochastic_nodes():
            whole = self.prototype_trace.nodes[name]
            if site["value"].shape != whole["value"].shape:
                raise ShapeError(
                    f"site {name!r} has shape {tuple(site['value'].shape)} in a part of the "
                    f"AutoGuideList and {tuple(whole['value'].shape)} in its model. Make every "
                    f"part from the list's own model, as in AutoNormal(poutine.block(model, ...))."
                )

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run the parts in order; returns constrained values by site name."""
        self._latent_sites(args, kwargs)
        self._create_plates(*args, **kwargs)
        result: dict[str, Tensor] = {}
        for part in self._parts():
            result.update(part(*args, **kwargs))
        return result

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior medians of all parts."""
        result: dict[str, Tensor] = {}
        for part in self._parts():
            result.update(part.median(*args, **kwargs))
        return result

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior quantiles of all parts."""
        result: dict[str, Tensor] = {}
        for part in self._parts():
            result.update(part.quantiles(quantiles, *args, **kwargs))
        return result


class AutoCallable(AutoGuide):
    """A plain guide function as part of an :class:`AutoGuideList`.

    Args:
        model: the model.
        guide: a guide for some of its sites.
        median: a function of the same arguments that returns medians by site name.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        median: Callable[..., dict[str, Tensor]] = lambda *args, **kwargs: {},
    ) -> None:
        super().__init__(model)
        self._guide = guide
        self.median = median  # type: ignore[method-assign]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run the guide; a guide that returns nothing gives no values."""
        result = self._guide(*args, **kwargs)
        return {} if result is None else result


def repeat_to_full_size(value: Tensor, site: Any, event_dim: int) -> Tensor:
    """Tile an initial value of a subsampled site up to the full size of its plates."""
    for frame in site["cond_indep_stack"]:
        full_size = frame.full_size or frame.size
        if full_size != frame.size:
            dim = frame.dim - event_dim
            index = torch.arange(full_size, device=value.device) % value.shape[dim]
            value = value.index_select(dim, index)
    return value.contiguous()
