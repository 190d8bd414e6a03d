"""Learning rate schedulers of torch over parameters that appear while a program runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fastsvi.errors import DtypeError, describe
from fastsvi.optim.leaf_optimizer import Engine
from fastsvi.optim.optim import PyroOptim
from fastsvi.optim.options import OptionError, OptionsLike


class PyroLRScheduler(PyroOptim):
    """An optimizer whose learning rates follow a torch scheduler, one per parameter.

    Args:
        scheduler_constructor: a scheduler class of ``torch.optim.lr_scheduler``.
        optim_args: a dict of ``"optimizer"``, a torch optimizer class, ``"optim_args"``, its
            options as :class:`~fastsvi.optim.PyroOptim` takes them, and the scheduler's options.
        clip_args: as for :class:`~fastsvi.optim.PyroOptim`.

    Raises:
        OptionError: ``"optimizer"`` or ``"optim_args"`` is missing, or the scheduler refuses its
            options.

    Call :meth:`step` once per epoch, after the steps of the inference:

    >>> import torch
    >>> import fastsvi as pyro
    >>> from fastsvi.optim import ExponentialLR
    >>> x = pyro.param("doc_scheduler", torch.tensor([1.0]))
    >>> options = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.4}, "gamma": 0.5}
    >>> scheduler = ExponentialLR(options)
    >>> for epoch in range(2):
    ...     x.sum().backward()
    ...     scheduler([x.unconstrained()])
    ...     scheduler.step()
    ...     x.grad = None
    >>> x  # 1 - 0.4 - 0.2
    tensor([0.4000], requires_grad=True)
    """

    _is_scheduled = True

    def __init__(
        self,
        scheduler_constructor: Callable[..., Any],
        optim_args: Mapping[str, Any],
        clip_args: OptionsLike | None = None,
    ) -> None:
        name = getattr(scheduler_constructor, "__name__", repr(scheduler_constructor))
        if not isinstance(optim_args, Mapping):
            raise DtypeError(f"{name} takes a dict of options, found {describe(optim_args)}")
        for key in ("optimizer", "optim_args"):
            if key not in optim_args:
                raise OptionError(
                    f"{name}: option '{key}' is missing from {dict(optim_args)}; write "
                    f"{name}({{'optimizer': torch.optim.Adam, 'optim_args': {{'lr': 0.01}}, ...}})"
                )
        self.pt_scheduler_constructor = scheduler_constructor
        self.kwargs = {k: v for k, v in optim_args.items() if k not in ("optimizer", "optim_args")}
        super().__init__(optim_args["optimizer"], optim_args["optim_args"], clip_args)

    def _wrap(self, leaf: Tensor, engine: Engine) -> None:
        optimizer = engine.optimizer(leaf)
        try:
            self._wrapped[leaf] = self.pt_scheduler_constructor(optimizer, **self.kwargs)
        except (TypeError, ValueError) as error:
            name = getattr(self.pt_scheduler_constructor, "__name__", "the scheduler")
            raise OptionError(f"{name} refuses its options {self.kwargs}: {error}") from error

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the scheduler of every parameter seen so far, with the scheduler's arguments.

        ``ReduceLROnPlateau`` takes the loss; most others take none.
        """
        for scheduler in list(self._wrapped.values()):
            scheduler.step(*args, **kwargs)
