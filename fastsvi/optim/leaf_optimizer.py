"""One parameter's share of an optimizer, in the shape of a torch optimizer.

Pyro keeps one torch optimizer per parameter, and programs and learning rate schedulers use them:
``optim.optim_objs[leaf].param_groups[0]["lr"] = 0.1``. Here many parameters are updated together
by an :class:`Engine`; a :class:`LeafOptimizer` gives the same access to one of them. It is made
when asked for, for a training run rarely needs one.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

State = dict[str, Any]  # of one parameter: "step", "exp_avg", ...


class Engine(Protocol):
    """What updates parameters."""

    def add(
        self,
        leaf: torch.Tensor,
        name: str | None,
        options: dict[str, Any],
        clips: dict[str, Any],
    ) -> None:
        """Take charge of a leaf."""

    def step(self, leaves: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        """Update these leaves and no others; those without a gradient keep everything."""

    def optimizer(self, leaf: torch.Tensor) -> torch.optim.Optimizer:
        """A torch optimizer of this one leaf."""


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A bound method that does not keep its object alive; it does nothing once that is gone.

    An engine owns the options that report to it. Were they to own it too, its moments would stay
    in memory until the garbage collector runs.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        found = reference()
        if found is not None:
            found(*args)

    return call


class Options(dict):
    """The entries of a torch ``param_group``; tells its owner when one changes."""

    def __init__(self, values: dict[str, Any], changed: Callable[[], None]) -> None:
        super().__init__(values)
        self._changed = changed

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._changed()

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._changed()

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        self._changed()

    def setdefault(self, key: str, default: Any = None) -> Any:
        value = super().setdefault(key, default)
        self._changed()
        return value

    def pop(self, key: str, *default: Any) -> Any:
        value = super().pop(key, *default)
        self._changed()
        return value

    def set_quietly(self, key: str, value: Any) -> None:
        """Set an entry that the owner knows already."""
        super().__setitem__(key, value)

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)  # a copy has no owner

    def __deepcopy__(self, memo: dict) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)


class Holder(Engine, Protocol):
    """An engine that keeps options and state of its leaves itself."""

    def options(self, leaf: torch.Tensor) -> Options:
        """Live options of a leaf."""

    def state(self, leaf: torch.Tensor) -> State:
        """State of a leaf; empty before its first update."""

    def load(self, leaf: torch.Tensor, state: State) -> None:
        """Replace the state of a leaf."""


class LeafOptimizer(torch.optim.Optimizer):
    """A leaf of a :class:`Holder` as a torch optimizer with one group of one parameter."""

    def __init__(self, holder: Holder, leaf: torch.Tensor) -> None:
        # Optimizer.__init__ would import torch._dynamo, which takes longer than importing torch.
        self.holder = holder
        self.leaf = leaf
        self.defaults = dict(holder.options(leaf))
        # Schedulers warn when they are stepped before their optimizer; the engine's steps are not
        # seen by this object.
        self._opt_called = True

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        group = self.holder.options(self.leaf)
        group.set_quietly("params", [self.leaf])
        return [group]

    @property
    def state(self) -> dict[torch.Tensor, State]:  # type: ignore[override]
        state = self.holder.state(self.leaf)
        return {self.leaf: state} if state else {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update this leaf alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.holder.step((self.leaf,))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the leaf's gradient, or set it to zero."""
        if self.leaf.grad is None:
            return
        if set_to_none:
            self.leaf.grad = None
        else:
            with torch.no_grad():
                self.leaf.grad.zero_()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """State and options in torch's format."""
        state = self.holder.state(self.leaf)
        group = {**self.holder.options(self.leaf), "params": [0]}
        return {"state": {0: dict(state)} if state else {}, "param_groups": [group]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Take over state and options in torch's format."""
        (saved,) = state_dict["param_groups"]
        state = state_dict["state"]
        self.holder.load(self.leaf, next(iter(state.values())) if state else {})
        options = {k: copy.deepcopy(v) for k, v in saved.items() if k != "params"}
        self.holder.options(self.leaf).update(options)
