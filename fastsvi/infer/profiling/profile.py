"""Where the time of a step of SVI goes, and what would speed it up: :func:`profile`."""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsvi import settings
from fastsvi.errors import CaptureError, ConstraintError, FastSVIWarning, describe
from fastsvi.infer.arguments import Arguments
from fastsvi.infer.batches import Batches, varying
from fastsvi.infer.fit_data import FitData, FitDims
from fastsvi.infer.profiling import eager, native
from fastsvi.infer.profiling.advice import Advice, advise
from fastsvi.infer.profiling.text import as_text
from fastsvi.infer.profiling.unchanged import unchanged

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI

_BATCHES = 20


@dataclass
class Profile:
    """What :func:`profile` found; ``print`` shows it as a table with advice.

    Attributes:
        eager: an eager step, by phases.
        native: a captured step; None where ``obstacle`` says why there is none.
        obstacle: why :meth:`SVI.run` would stay eager, with the statement at fault.
        called: ``"run"`` or ``"step"`` if a script was watched: which of them it calls.
        particles: of the ELBO; ``is_sequential`` whether they run one by one.
        num_fits: of the fit; times are those of one of them.
        vectorized_us: an eager step with its particles at once, where they are not.
        vmap_obstacle: why they cannot be.
        unchecked_us: an eager step without checks, where every step is checked.
        batch_us: time that a batch takes to come.
        foreign_arguments: arguments that are arrays or lists of numbers, by name.
        dtype: of the parameters; ``device`` where they are.
        params_bytes, data_bytes: of the parameters, and of the tensors among the arguments.
        peak_bytes: most memory that the process has held so far.
        advice: what would speed the step up.
    """

    eager: eager.EagerStep
    native: native.NativeForm | None = None
    obstacle: str | None = None
    called: str | None = None
    particles: int = 1
    is_sequential: bool = False
    num_fits: int = 1
    vectorized_us: float | None = None
    vmap_obstacle: str | None = None
    unchecked_us: float | None = None
    batch_us: float | None = None
    foreign_arguments: list[tuple[str, str]] = field(default_factory=list)
    dtype: str = ""
    device: str = ""
    threads: int = 1
    params_bytes: int = 0
    data_bytes: int = 0
    peak_bytes: int = 0
    advice: list[Advice] = field(default_factory=list)

    @property
    def step_us(self) -> float:
        """Microseconds of a step in its fastest form."""
        return self.eager.step_us if self.native is None else self.native.step_us

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"python_share": self.eager.python_share}

    def __str__(self) -> str:
        return as_text(self)


def profile(
    svi: SVI,
    *args: Any,
    batches: Iterable[Any] | None = None,
    fit_dims: FitDims = None,
    seconds: float = 1.0,
    **kwargs: Any,
) -> Profile:
    """Say where the time of a step goes, and what would speed it up.

    Parameters, optimizer, noise and torch's generator are afterwards as they were before, so a
    training that is profiled goes on as if it had not been. What the step of an eager run takes is
    told by the clock, and what torch operations take in it by a dispatch mode that times each; the
    captured step is recorded, compiled and run as :meth:`SVI.run` would do it.

    Args:
        svi: the fit, which need not have taken a step. Of many fits (``num_fits``) one is measured.
        args, kwargs: arguments of the model.
        batches, fit_dims: as in :meth:`SVI.run`. An iterator would lose some batches; a list or a
            DataLoader is iterated anew.
        seconds: about how long to measure each form of the step.

    Raises:
        ConstraintError: ``seconds`` is not a positive number.
        NonFiniteError: as in :meth:`SVI.step`.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> from fastsvi.infer import SVI, Trace_ELBO, profile
    >>> from fastsvi.infer.autoguide import AutoNormal
    >>> def model(y):
    ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
    >>> svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    >>> found = profile(svi, torch.tensor(2.0), seconds=0.1)
    >>> found.obstacle is None, found.advice[0].about
    (True, 'use-run')
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise ConstraintError(f"seconds must be a positive number, found {describe(seconds)}")
    arguments, lifted = Arguments(args, kwargs), frozenset[int]()
    batch_us = None
    num_fits = 1 if svi._fits is None else svi._fits.num_fits
    if batches is not None:
        source = Batches(batches, args, kwargs)
        arguments, batch_us = source.next(), _batch_us(source)
        lifted = varying(arguments, args, kwargs)
    elif svi._fits is not None:
        data = FitData(args, kwargs, fit_dims, num_fits)
        arguments, lifted = data.of(data.first_finite()), frozenset(data.own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastSVIWarning)  # what they say is in the findings
        with unchanged(svi, arguments.args, arguments.kwargs) as fit:
            found = _measure(fit, arguments, sorted(lifted), seconds)
    found.batch_us, found.num_fits = batch_us, num_fits
    found.foreign_arguments = list(_foreign(arguments))
    found.advice = advise(found)
    return found


def _measure(svi: SVI, arguments: Arguments, lifted: Sequence[int], seconds: float) -> Profile:
    args, kwargs = arguments.args, arguments.kwargs
    found = Profile(eager.measure(svi, args, kwargs, seconds))
    try:
        found.native = native.measure(svi, arguments, lifted, seconds)
    except CaptureError as error:
        found.obstacle = str(error)
    if settings.get("validate") == "always":
        with settings.context(validate="first"):
            found.unchecked_us = eager.step_us(svi, args, kwargs, seconds / 2)
    _try_at_once(svi, args, kwargs, seconds / 2, found)
    leaves = svi._targets.leaves
    found.params_bytes = sum(leaf.nbytes for leaf in leaves)
    found.data_bytes = sum(leaf.nbytes for leaf in arguments.leaves if isinstance(leaf, Tensor))
    if leaves:
        found.dtype = str(leaves[0].dtype).removeprefix("torch.")
        found.device = str(leaves[0].device)
    found.threads = torch.get_num_threads()
    found.peak_bytes = _peak_bytes()
    return found


def _peak_bytes() -> int:
    """The most memory that the process has held; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _try_at_once(svi: SVI, args: Any, kwargs: Any, seconds: float, found: Profile) -> None:
    """Note how particles run, and try what they take at once if they run one by one."""
    program, elbo = svi._program, svi.elbo
    if program is None or elbo is None:
        return
    found.particles = elbo.num_particles
    before = elbo.vectorize_particles, program.is_sequential
    found.is_sequential = program.is_sequential or not elbo.vectorize_particles
    if elbo.num_particles < 2 or not found.is_sequential:
        return
    elbo.vectorize_particles, program.is_sequential = True, False
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", FastSVIWarning)
            step = eager.step_us(svi, args, kwargs, seconds)
        if program.is_sequential:
            said = [str(w.message) for w in heard if "vectorize_particles" in str(w.message)]
            found.vmap_obstacle = said[0] if said else "torch.func.vmap cannot run the program."
        else:
            found.vectorized_us = step
    finally:
        elbo.vectorize_particles, program.is_sequential = before


def _batch_us(source: Batches) -> float:
    """Microseconds until the next batch is there, over some batches, epochs included."""
    start = time.perf_counter()
    for _ in range(_BATCHES):
        source.next()
    return 1e6 * (time.perf_counter() - start) / _BATCHES


def _foreign(arguments: Arguments) -> Iterable[tuple[str, str]]:
    """Arguments that hold numbers in something else than a tensor."""
    named = itertools.chain(
        ((f"argument {k}", value) for k, value in enumerate(arguments.args)),
        ((f"argument {key!r}", value) for key, value in arguments.kwargs.items()),
    )
    for name, value in named:
        kind = type(value)
        if kind.__module__.split(".")[0] in ("numpy", "pandas") and getattr(value, "shape", None):
            yield name, f"a {kind.__name__} of shape {tuple(value.shape)}"
        is_list = isinstance(value, list | tuple) and len(value) > 1
        if is_list and all(isinstance(x, int | float) for x in value):
            yield name, f"a {kind.__name__} of {len(value)} numbers"
