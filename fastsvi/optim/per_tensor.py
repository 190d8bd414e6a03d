"""Torch optimizers over single tensors: whatever the flat kernel does not serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.weak import WeakTensorKeyDictionary

from fastsvi.errors import describe
from fastsvi.optim.leaf_optimizer import LeafOptimizer, Options, State, weakly
from fastsvi.optim.options import OptionError

Constructor = Callable[..., torch.optim.Optimizer]


def construct(
    constructor: Constructor, leaf: Tensor, name: str | None, options: dict[str, Any]
) -> torch.optim.Optimizer:
    """A torch optimizer of one leaf; an option it rejects is an error that names the parameter."""
    try:
        return constructor([leaf], **options)
    except (TypeError, ValueError) as error:
        owner = getattr(constructor, "__name__", repr(constructor))
        what = f"parameter '{name}'" if name is not None else describe(leaf.detach())
        raise OptionError(
            f"{owner} refuses {what} with options {options}: {error}. Change the option, for this "
            "parameter by giving a function of the name instead of a dict, or take another "
            "optimizer"
        ) from error


def clip(leaf: Tensor, options: dict[str, Any]) -> None:
    """Clip the leaf's gradient in place: its norm, then its entries."""
    if leaf.grad is None:
        return
    if options.get("clip_norm") is not None:
        clip_grad_norm_(leaf, options["clip_norm"])
    if options.get("clip_value") is not None:
        clip_grad_value_(leaf, options["clip_value"])


class PerTensor:
    """One optimizer per leaf, for any constructor, as Pyro has them."""

    def __init__(self, constructor: Constructor) -> None:
        self.constructor = constructor
        self._optimizers = WeakTensorKeyDictionary()
        self._clips = WeakTensorKeyDictionary()

    def add(
        self, leaf: Tensor, name: str | None, options: dict[str, Any], clips: dict[str, Any]
    ) -> None:
        """Take charge of a leaf."""
        self._optimizers[leaf] = construct(self.constructor, leaf, name, options)
        self._clips[leaf] = clips

    def step(self, leaves: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        """Update these leaves."""
        for leaf in leaves:
            if self._clips[leaf]:
                clip(leaf, self._clips[leaf])
            self._optimizers[leaf].step(*args, **kwargs)

    def optimizer(self, leaf: Tensor) -> torch.optim.Optimizer:
        """The leaf's optimizer."""
        return self._optimizers[leaf]


@dataclass(slots=True, eq=False)
class _Member:
    options: Options
    given: dict[str, Any]  # what the constructor gets
    clips: dict[str, Any]
    state: State


class Grouped:
    """One optimizer for all leaves with equal options, for the optimizers of ``torch.optim``.

    They update the tensors of a group together (``foreach``), and keep a step count for each, so
    leaving some out of a step is the same as having an optimizer per leaf.
    """

    def __init__(self, constructor: Constructor) -> None:
        self.constructor = constructor
        self._members = WeakTensorKeyDictionary()
        self._hosts: list[torch.optim.Optimizer] | None = None  # None: to be made again
        self._assigned: tuple[int, ...] = ()
        self._clipped: list[tuple[Tensor, dict[str, Any]]] = []

    def add(
        self, leaf: Tensor, name: str | None, options: dict[str, Any], clips: dict[str, Any]
    ) -> None:
        """Take charge of a leaf."""
        own = construct(self.constructor, leaf, name, options)
        complete = {k: v for k, v in own.param_groups[0].items() if k != "params"}
        # The state is Adagrad's, which starts before the first step.
        watched = Options(complete, weakly(self._options_changed))
        self._members[leaf] = _Member(watched, options, clips, own.state[leaf])
        self._hosts = None

    def options(self, leaf: Tensor) -> Options:
        """Live options of a leaf."""
        return self._members[leaf].options

    def state(self, leaf: Tensor) -> State:
        """Live state of a leaf."""
        return self._members[leaf].state

    def load(self, leaf: Tensor, state: State) -> None:
        """Replace the leaf's state."""
        member = self._members[leaf]
        own = construct(self.constructor, leaf, None, member.given)
        # torch casts the entries to the dtype and device that it keeps them in.
        saved = {"state": {0: state}, "param_groups": [{**member.options, "params": [0]}]}
        own.load_state_dict(saved)
        member.state = own.state[leaf]
        self._hosts = None

    def optimizer(self, leaf: Tensor) -> LeafOptimizer:
        """The leaf's share as a torch optimizer."""
        return LeafOptimizer(self, leaf)

    def step(self, leaves: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        """Update these leaves."""
        key = tuple(map(id, leaves))
        if self._hosts is None or key != self._assigned:
            self._assign(leaves)
            self._assigned = key
        for leaf, options in self._clipped:
            clip(leaf, options)
        for host in self._hosts or ():
            host.step(*args, **kwargs)

    def _options_changed(self) -> None:
        self._hosts = None

    def _assign(self, leaves: Sequence[Tensor]) -> None:
        """Put the leaves, and no others, into optimizers with their options."""
        hosts: list[torch.optim.Optimizer] = []
        for leaf in leaves:
            member = self._members[leaf]
            host = next((h for h in hosts if _equal(h.param_groups[0], member.options)), None)
            if host is None:
                host = self.constructor([leaf], **member.given)
                host.param_groups[0].update(member.options, params=[])
                host.state.clear()
                hosts.append(host)
            host.param_groups[0]["params"].append(leaf)
            host.state[leaf] = member.state  # the same dict: torch fills it in place
        self._hosts = hosts
        clips = ((leaf, self._members[leaf].clips) for leaf in leaves)
        self._clipped = [(leaf, options) for leaf, options in clips if options]


def _equal(group: dict[str, Any], options: Options) -> bool:
    """Whether a group of a torch optimizer has these options; tensors must be the same ones."""
    return all(
        group.get(key) is value or (not isinstance(value, Tensor) and group.get(key) == value)
        for key, value in options.items()
        if key != "params"
    )
