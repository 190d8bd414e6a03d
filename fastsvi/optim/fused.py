"""The eager update on a CPU, in one pass over memory by torch's own fused operator.

``torch._fused_adam_`` is what ``torch.optim.Adam(fused=True)`` calls; it has no public name. The
kernel in :mod:`fastsvi.kernels.adam` computes the same in some fourteen passes, which fuse when a
step is compiled but not when it is run operation by operation. It remains the fallback for a torch
without this operator, for other devices, and for options that the operator lacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsvi.optim.families import Rule

_OPERATORS = {
    False: getattr(torch, "_fused_adam_", None),
    True: getattr(torch, "_fused_adamw_", None),
}
_DTYPES = (torch.float32, torch.float64)


def serves(rule: Rule, device: torch.device, dtype: torch.dtype, rates: Sequence[Any]) -> bool:
    """Whether the operator computes this update."""
    return (
        _OPERATORS[rule.decoupled] is not None
        and device.type == "cpu"
        and dtype in _DTYPES
        and rule.clip_norm is None
        and not rule.centered
        and not any(isinstance(rate, Tensor) for rate in rates)
    )


@dataclass(slots=True, eq=False)
class Piece:
    """Elements with one learning rate and one step count; views of the flat tensors."""

    param: Tensor  # [n] unconstrained
    grad: Tensor  # [n]
    exp_avg: Tensor  # [n]
    exp_avg_sq: Tensor  # [n]
    step: Tensor  # []
    lr: float
    lrd: float


class FusedLaunch:
    """One update of ``pieces``; ``steps`` holds all their step counts.

    Args:
        pieces: what to update.
        steps: step counts, ``[R]``.
        ticks: what to add to them: 1 for the pieces, 0 for other runs, ``[R]``.
        rule: options common to the pieces.
    """

    def __init__(self, pieces: Sequence[Piece], steps: Tensor, ticks: Tensor, rule: Rule) -> None:
        self._steps = steps
        self._ticks = ticks
        self._rule = rule
        self._operator: Any = _OPERATORS[rule.decoupled]
        self._pieces = list(pieces)
        self._options = {
            "beta1": rule.betas[0],
            "beta2": rule.betas[1],
            "weight_decay": rule.weight_decay,
            "amsgrad": False,
            "maximize": False,
        }
        by_rate: dict[float, list[Piece]] = {}
        for piece in self._pieces:
            by_rate.setdefault(piece.lr, []).append(piece)
        self._groups = [
            (lr, [p.param for p in group], [p.grad for p in group], *_moments(group))
            for lr, group in by_rate.items()
        ]

    def __call__(self) -> None:
        self._steps.add_(self._ticks)
        rule = self._rule
        if rule.eps_hat:
            for piece in self._pieces:
                self._clipped_adam(piece)
            return
        for lr, params, grads, firsts, seconds, steps in self._groups:
            if rule.clip_value is not None:
                grads = [grad.clamp(-rule.clip_value, rule.clip_value) for grad in grads]
            self._operator(
                params, grads, firsts, seconds, [], steps, lr=lr, eps=rule.eps, **self._options
            )

    def _clipped_adam(self, piece: Piece) -> None:
        """ClippedAdam adds eps before it corrects the bias of the second moment.

        ``sqrt(v) + eps`` over ``sqrt(1 - beta2^t)`` is the usual denominator with a larger eps.
        """
        limit = self._rule.clip_value
        grad = piece.grad if limit is None else piece.grad.clamp(-limit, limit)
        tick = piece.step.item()  # in the memory of the host: nothing is waited for
        correction = (
            -math.expm1(tick * math.log(self._rule.betas[1])) if self._rule.betas[1] else 1.0
        )
        self._operator(
            [piece.param],
            [grad],
            [piece.exp_avg],
            [piece.exp_avg_sq],
            [],
            [piece.step],
            lr=piece.lr * piece.lrd**tick,
            eps=self._rule.eps / math.sqrt(correction),
            **self._options,
        )


def _moments(pieces: Sequence[Piece]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    firsts = [piece.exp_avg for piece in pieces]
    return firsts, [piece.exp_avg_sq for piece in pieces], [piece.step for piece in pieces]
