"""Stochastic variational inference: ``SVI``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastsvi import poutine, settings
from fastsvi.errors import ConstraintError, DtypeError, FastSVIError, describe
from fastsvi.infer.bad_calls import explained
from fastsvi.infer.captures import Captures
from fastsvi.infer.convergence import EarlyStop
from fastsvi.infer.course import Course
from fastsvi.infer.elbo import ELBO
from fastsvi.infer.elbo.particles import rehearse
from fastsvi.infer.elbo.program import Program, all_leaves, leaves_of, total_loss, values_of
from fastsvi.infer.fit_data import FitDims
from fastsvi.infer.fits import Fits
from fastsvi.infer.fits_runner import FitsRunner
from fastsvi.infer.progress import Losses
from fastsvi.infer.run_result import Stopwatch, SVIRunResult
from fastsvi.infer.runner import COMPILE, Compile, Runner
from fastsvi.infer.saving import Saving
from fastsvi.infer.targets import Targets, Undo
from fastsvi.infer.util import is_finite, torch_item
from fastsvi.optim import PyroOptim
from fastsvi.params.checkpoint import PathLike
from fastsvi.poutine.runtime import PARAM_STORE


class OptimizerError(FastSVIError, TypeError, ValueError):
    """What was given as an optimizer is none."""


class SVI:
    """Fits the parameters of a guide, and of a model, by stochastic gradient descent on a loss.

    Args:
        model: a function with sample statements; the posterior of its latent sites is sought.
        guide: a function of the same arguments that samples those sites.
        optim: an optimizer from :mod:`fastsvi.optim`.
        loss: an :class:`~fastsvi.infer.ELBO`, or a function
            ``loss(model, guide, *args, **kwargs)`` that returns a scalar to be differentiated.
        loss_and_grads: with a function as loss: what to call in place of it for a loss whose
            gradient it also adds to the parameters' ``grad``.
        seed: of the noise that the engine draws; by default taken from torch's generator at the
            first step, so that ``set_rng_seed`` makes runs repeatable.
        num_fits: train so many independent fits in every step of :meth:`run`, each with its own
            initial values, noise, optimizer state and, by ``fit_dims``, own data.
        first_fit: number of the first of them. Fit 17 has the same noise whether it is fit 17 of
            100, or the first of 10 with ``first_fit=17``.

    Raises:
        OptimizerError: ``optim`` is not an optimizer of fastsvi.
        DtypeError: ``loss`` cannot be called.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> from fastsvi.infer import SVI, Trace_ELBO
    >>> from fastsvi.infer.autoguide import AutoNormal
    >>> def model(y):
    ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
    >>> guide = AutoNormal(model)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=10))
    >>> run = svi.run(300, torch.tensor(2.0), progress_bar=False)
    >>> bool((guide.median()["x"] - 1.0).abs() < 0.1), run.losses.shape
    (True, torch.Size([300]))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        loss: ELBO | Callable[..., Any],
        loss_and_grads: Callable[..., Any] | None = None,
        num_samples: int = 0,
        num_steps: int = 0,
        *,
        seed: int | None = None,
        num_fits: int | None = None,
        first_fit: int = 0,
    ) -> None:
        for name, value, instead in (
            ("num_steps", num_steps, "SVI.run(num_steps, ...)"),
            ("num_samples", num_samples, "Predictive(model, guide=guide, num_samples=...)"),
        ):
            if value:
                message = f"SVI(..., {name}=...) has no effect; use {instead}"
                warnings.warn(message, FutureWarning, stacklevel=2)
        if not isinstance(optim, PyroOptim):
            raise OptimizerError(
                f"optim must be an optimizer of fastsvi.optim, found {describe(optim)}. Write "
                f'Adam({{"lr": 0.01}}); torch optimizers are given as '
                f'PyroOptim(torch.optim.SGD, {{"lr": 0.01}}).'
            )
        if not callable(loss) and not isinstance(loss, ELBO):
            raise DtypeError(f"loss must be an ELBO or a function, found {describe(loss)}")
        self.model = model
        self.guide = guide
        self.optim = optim
        self.elbo: ELBO | None = None
        self.loss: Callable[..., Any] = loss
        self.loss_and_grads: Callable[..., Any] = loss_and_grads or self._differentiate
        self._program: Program | None = None  # None where the loss takes its own gradients
        if isinstance(loss, ELBO):
            self.elbo = loss
            self.loss = loss.loss
            self.loss_and_grads = loss.loss_and_grads
            if type(loss).loss_and_grads is ELBO.loss_and_grads:
                self._program = loss.program(model, guide)
                if seed is not None:
                    self._program.set_seed(seed)
        self._targets = Targets()
        self._captures = Captures(self)
        self._fits = None if num_fits is None else Fits(self, num_fits, first_fit)

    # ------------------------------------------------------------------------------------ steps

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step: estimate loss and gradient, then update every parameter that took part.

        Returns:
            The loss before the update, a float (a tuple of floats where the loss is a tuple).

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; the message names the site or
                parameter. Nothing was updated.

        Whatever is raised, by the program or here, parameters, gradients and the state of the
        optimizer are as they were before the call.
        """
        return _as_number(self._advance(args, kwargs))

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """An estimate of the loss without a step, as a float.

        Noise that the engine draws comes from a stream of its own, so training goes on as if the
        loss had not been asked for; a hand-written guide draws from torch's generator.
        """
        with torch.no_grad(), explained(self, args, kwargs):
            return _as_number(self.loss(self.model, self.guide, *args, **kwargs))

    def run(
        self,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        compile: Compile = "auto",
        batches: Iterable[Any] | None = None,
        fit_dims: FitDims = None,
        stop_when_converged: bool = False,
        checkpoint: PathLike | None = None,
        checkpoint_every: float = 60.0,
        **kwargs: Any,
    ) -> SVIRunResult:
        """Take ``num_steps`` steps with the same arguments.

        What steps give does not depend on ``compile``, up to rounding. Where the optimizer is a
        flat one (``Adam``, ``AdamW``, ``ClippedAdam``) and nothing in the program depends on the
        values of tensors, they are recorded: on a CPU they become native code, on a GPU
        generated kernels or a CUDA graph. Other programs are run eagerly, and ``obstacle`` of the
        result says why.

        All noise that the program draws, and the subsets of its plates, come from the seed and the
        number of the step, so a run is repeatable and does not depend on what else draws from
        torch's generator. (A few families, such as ``Poisson`` and ``Binomial``, still do.)

        On a CPU the memory of a wide model stays close to that of parameters, gradient, optimizer
        and one draw: :func:`fastsvi.infer.memory.floor_bytes`.

        Args:
            num_steps: number of steps; none is allowed.
            progress_bar: show a bar with the loss, averaged over the latest steps.
            compile: ``"auto"`` takes the first step at once and compiles the others if there are
                enough of them, some 150 of a small program or fewer of a large one; ``True``
                compiles them always, and warns where that cannot be done; ``False`` stays eager.
                Eager and compiled steps round differently; which are which depends on the numbers
                of steps and elements alone, so runs from the same seed are the same to the bit.
            batches: an iterable such as a DataLoader, iterated anew as often as needed: each step
                takes one batch, whose parts (of a tuple, a list or a dict) are arguments that
                ``args`` and ``kwargs`` follow.
            fit_dims: with ``num_fits``, which arguments have a slice for every fit: for each
                positional argument, those of a batch first, the dimension that counts the fits, or
                None where all share it; or a dict of dimensions by names of keyword arguments.
            stop_when_converged: end the run once the losses of its last half are flat, at two
                looks in a row; see :mod:`fastsvi.infer.convergence`.
            checkpoint: path of a file that is written as the run goes on, at its end and on Ctrl-C.
                Where the file exists, the run goes on from it, in this process or in another one,
                with the losses and parameters of a run that was never interrupted; ``num_steps``
                counts the steps in the file, whose losses are returned with the others. Batches
                must then come in the same order. Buffers of modules, such as running means, and
                Python state are not in the file.
            checkpoint_every: seconds between two writes.
            args, kwargs: arguments of model and guide.

        Returns:
            Losses and parameters. Ctrl-C ends the run between two steps and returns what was
            reached.

        Raises:
            NonFiniteError: as in :meth:`step`; the parameters are those of the last good step. On
                an accelerator, where a look at the loss would wait for the device, it is raised
                within about a second, and the parameters are those of the last look.
            CheckpointError: the file is damaged or was written by another program, or cannot be
                written at all; nothing has changed.
            OutOfMemoryError, DeviceError, CallError: the arguments are too large, on the wrong
                device, or not those that model and guide take.
        """
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 0:
            raise ConstraintError(
                f"SVI.run takes the number of steps first, an integer >= 0; found "
                f"{describe(num_steps)}. Arguments of the model follow: run(1000, data)."
            )
        if compile not in COMPILE:
            raise ConstraintError(f"compile is one of {COMPILE}, found {compile!r}")
        losses, watch = Losses(), Stopwatch()

        def make_runner() -> Runner | FitsRunner:
            if self._fits is None:
                if fit_dims is not None:
                    raise ConstraintError("fit_dims is for an SVI with num_fits=...")
                return Runner(self, args, kwargs, num_steps, compile, batches)
            return FitsRunner(self._fits, args, kwargs, fit_dims, num_steps, compile, batches)

        with explained(self, args, kwargs):
            saving = None
            if checkpoint is None:
                runner = make_runner()
            else:
                saving = Saving(self, checkpoint, checkpoint_every, losses)
                runner = saving.resume(make_runner, num_steps)
                watch.skip(len(losses))
            course = Course(
                num_steps,
                losses,
                show=progress_bar,
                is_elbo=self.elbo is not None,
                early=EarlyStop(losses) if stop_when_converged else None,
                saving=saving,
                optim=self.optim if self._fits is None else None,
            )
            ending = course.follow(runner, watch)
            runner.release()
        if self._fits is not None:
            params = self._fits.params()
        else:
            params = {name: value.detach().clone() for name, value in PARAM_STORE.items()}
        return SVIRunResult(
            losses.stack(),
            params,
            ending.interrupted,
            runner.native_steps,
            runner.obstacle,
            ending.stopped,
            ending.timings,
            None if self._fits is None else self._fits.skipped,
            None if self._fits is None else ending.ends,
        )

    def select_fit(self, fit: int) -> None:
        """Put the parameters of one of ``num_fits`` fits into the param store.

        The guide then is that fit's, for :class:`~fastsvi.infer.Predictive` and the like; the fits
        themselves stay as they are.

        Raises:
            ConstraintError: there is no such fit, or there has been no run.
        """
        if self._fits is None:
            raise ConstraintError("select_fit is for an SVI with num_fits=...; this has one fit")
        self._fits.select(fit)

    # --------------------------------------------------------------------------------- internals

    def _advance(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        read: bool = True,
        by_counter: bool = False,
    ) -> Any:
        """One step; returns the loss, as a scalar on its device where the loss is an ELBO.

        With ``read`` the loss is read back, and the step undone if it is not finite. With
        ``by_counter``, as in a run, all noise is that of the fit's seed and step.
        """
        self._follow_changes()
        undo = Undo()
        try:
            with explained(self, args, kwargs), undo:
                loss, particles = self._accumulate(args, kwargs, by_counter)
                if read:
                    self._require_finite(loss, args, kwargs, particles)
                del particles  # the latents' memory, for the update to use
                self.optim(self._targets.leaves)
        finally:
            if undo.has_removed and self._program is not None:
                self._program.rehearsed = False
        self._targets.zero_grad()
        return loss

    def _rehearse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Make the parameters and check the program as the first step of a run does; no step.

        Returns whether there is anything to rehearse.
        """
        self._follow_changes()
        if self.elbo is None or self._program is None:
            return False
        program, undo = self._program, Undo()
        try:
            with explained(self, args, kwargs), undo:
                program.draws.begin()  # a seed is drawn before parameters are
                check = settings.get("validate") != "never" and not program.rehearsed
                self._targets.set(rehearse(self.elbo, program, args, kwargs, check=check))
        finally:
            if undo.has_removed:
                program.rehearsed = False
        return True

    def _follow_changes(self) -> None:
        """Programs may assign ``svi.model`` and ``svi.guide`` between steps."""
        known = self._program
        if known is None or self.elbo is None:
            return
        if known.model is not self.model or known.guide is not self.guide:
            self._program = self.elbo.program(self.model, self.guide)

    def _accumulate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], by_counter: bool = False
    ) -> tuple[Any, Any]:
        """Add the gradient to the targets' ``grad``; returns the loss and the latent values."""
        if self.elbo is None or self._program is None:
            with poutine.trace(param_only=True) as seen:
                loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
            self._targets.set(leaves_of(seen.trace))
            return loss, ({},)
        estimates = self.elbo.accumulate_grads(self._program, args, kwargs, by_counter=by_counter)
        self._targets.set(all_leaves(estimates))
        return total_loss(estimates), values_of(estimates)

    def _require_finite(self, loss: Any, args: Any, kwargs: Any, particles: Any) -> None:
        if settings.get("validate") == "never":
            return
        parts = loss if isinstance(loss, tuple) else (loss,)
        if all(map(is_finite, parts)) and self._targets.has_finite_grads():
            return
        raise self._targets.explain(
            [torch_item(part) for part in parts], self.model, self.guide, args, kwargs, particles
        )

    def _differentiate(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The default ``loss_and_grads`` of a loss that is a function."""
        loss = self.loss(model, guide, *args, **kwargs)
        if getattr(loss, "requires_grad", False):
            loss.backward(retain_graph=True)
        return loss


def _as_number(loss: Any) -> Any:
    if isinstance(loss, tuple):
        return type(loss)(map(torch_item, loss))
    return torch_item(loss)
