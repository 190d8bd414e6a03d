"""What a step is about to change: its parameters, their gradients, and how to take all back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastsvi.errors import NonFiniteError, describe
from fastsvi.infer.nonfinite import explain_non_finite
from fastsvi.infer.util import is_finite, zero_grads
from fastsvi.params.buffer import Buffer
from fastsvi.poutine.runtime import PARAM_STORE

_MAX_NAMED = 3


class Targets:
    """The leaves that take part in the current step, sorted into whole buffers and single ones.

    Where all leaves of a flat buffer take part, one operation serves them all.
    """

    def __init__(self) -> None:
        self.leaves: tuple[Tensor, ...] = ()
        self._buffers: list[Buffer] = []
        self._flat_grads: list[Tensor] = []
        self._single: list[Tensor] = []
        self._versions: Any = None

    def set(self, leaves: Sequence[Tensor]) -> None:
        """Make ``leaves`` the targets, once they have gradients; cheap if they were so before."""
        known = len(leaves) == len(self.leaves) and all(map(is_, leaves, self.leaves))
        if not known or self._versions != self._current_versions():
            self._sort(tuple(leaves))
        for buffer in self._buffers:
            buffer.bind_grads()

    def _current_versions(self) -> Any:
        return PARAM_STORE.version, [buffer.version for buffer in self._buffers]

    def _sort(self, leaves: tuple[Tensor, ...]) -> None:
        inside: dict[int, tuple[Buffer, list[Tensor]]] = {}
        single = []
        for leaf in leaves:
            place = PARAM_STORE.locate(leaf)
            if place is None:
                single.append(leaf)
            else:
                inside.setdefault(id(place[0]), (place[0], []))[1].append(leaf)
        self._buffers = []
        for buffer, members in inside.values():
            if len(members) == len(buffer.leaves):
                self._buffers.append(buffer)
            else:
                single += members
        self.leaves = leaves
        self._single = single
        self._flat_grads = [buffer.grad for buffer in self._buffers]
        self._versions = self._current_versions()

    def are_stored(self) -> bool:
        """Whether there are any, and all still belong to the param store."""
        return bool(self.leaves) and all(map(PARAM_STORE.locate, self.leaves))

    def zero_grad(self) -> None:
        """Set the targets' gradients to zero."""
        for grad in self._flat_grads:
            grad.zero_()
        zero_grads(self._single)

    def has_finite_grads(self) -> bool:
        """Whether all gradients are finite. Synchronises."""
        grads = [leaf.grad for leaf in self._single if leaf.grad is not None]
        # A sum is not finite if an entry is not; but finite entries may overflow too.
        return all(
            math.isfinite(grad.sum().item()) or bool(torch.isfinite(grad).all())
            for grad in (*self._flat_grads, *grads)
        )

    def explain(
        self,
        losses: Sequence[float],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        particles: Iterable[dict[str, Any]],
    ) -> NonFiniteError:
        """The error for a step whose loss or gradient is not finite."""
        bad_params = [
            f"{PARAM_STORE.param_name(leaf) or 'a tensor outside of the param store'!r}: "
            f"{describe(leaf)}"
            for leaf in self.leaves
            if not torch.isfinite(leaf.detach()).all()
        ]
        bad_grads = [
            f"{PARAM_STORE.param_name(leaf) or 'a tensor outside of the param store'!r}: "
            f"{describe(leaf.grad)}"
            for leaf in self.leaves
            if leaf.grad is not None and not torch.isfinite(leaf.grad).all()
        ]
        shown = ", ".join(f"{loss:g}" for loss in losses)
        lines = [f"SVI: the loss is {shown}. Nothing was updated."]
        if all(map(is_finite, losses)):
            lines = [
                f"SVI: the loss is {shown}, but its gradient is not finite. Nothing was updated.",
                *_first_of("gradient of", bad_grads),
                "likely cause: a step of the model whose derivative is infinite or undefined, such "
                "as sqrt or norm at 0, or a torch.where whose unused branch overflows. Keep the "
                "argument away from that point (clamp before sqrt, both branches of where safe).",
            ]
            return NonFiniteError("\n".join(lines))
        where = explain_non_finite(model, guide, args, kwargs, particles)
        lines += _first_of("parameter", bad_params)
        if where is not None:
            lines.append(where)
        elif not bad_params:
            lines.append(
                "Every site's log-density is finite at other draws, so this is rare: use more "
                "particles, a lower learning rate, or bound what the model computes."
            )
        lines.append(
            "To go on as Pyro does, which updates all the same: fastsvi.settings.set("
            'validate="never").'
        )
        return NonFiniteError("\n".join(lines))


class Undo:
    """Takes back what a failed step has begun: parameters that it registered, and gradients.

    Attributes:
        has_removed: whether parameters were removed.
    """

    def __init__(self) -> None:
        self.has_removed = False

    def __enter__(self) -> Undo:
        self._num_params = len(PARAM_STORE)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            return
        self.remove_new()
        zero_grads(leaf for _, leaf in PARAM_STORE.named_parameters())

    def remove_new(self) -> None:
        """Remove the parameters that were registered in this block."""
        # The store keeps names in the order of registration.
        for name in list(PARAM_STORE.keys())[self._num_params :]:
            del PARAM_STORE[name]
            self.has_removed = True


def _first_of(what: str, found: list[str]) -> list[str]:
    lines = [f"{what} {entry}" for entry in found[:_MAX_NAMED]]
    if len(found) > _MAX_NAMED:
        lines.append(f"... and {len(found) - _MAX_NAMED} more")
    return lines
