"""ClippedAdam as a torch optimizer, for tensors that are in no flat buffer."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastsvi.optim.decaying import DecayingOptimizer


class ClippedAdam(DecayingOptimizer):
    """Adam whose gradient entries are clipped and whose learning rate decays at every step.

    The t-th update uses ``lr * lrd**t`` and gradients clamped to ``[-clip_norm, clip_norm]``, and
    adds ``eps`` before the bias of the second moment is corrected (Kingma and Ba 2015, end of
    section 2).

    Args:
        params: tensors or groups of tensors.
        lr: learning rate before the first decay.
        betas: decay rates of the moments.
        eps: added to the square root of the second moment.
        weight_decay: L2 penalty.
        clip_norm: largest magnitude of each entry of a gradient.
        lrd: factor of the learning rate per step.
        centered_variance: the second moment is that of the gradient minus its running mean
            (Rengaraj et al. 2023, doi:10.3390/computation11050095).

    >>> x = torch.zeros(2, requires_grad=True)
    >>> optimizer = ClippedAdam([x], lr=0.1)
    >>> (x - 3).square().sum().backward()
    >>> optimizer.step()
    >>> x
    tensor([0.1000, 0.1000], requires_grad=True)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float = 10.0,
        lrd: float = 1.0,
        centered_variance: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_norm": clip_norm,
            "lrd": lrd,
            "centered_variance": centered_variance,
        }
        super().__init__(params, defaults)

    @staticmethod
    def _update(p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]

        grad = p.grad.clamp_(-group["clip_norm"], group["clip_norm"])  # type: ignore[union-attr]
        if group["weight_decay"]:
            grad = grad.add(p, alpha=group["weight_decay"])
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        spread = grad - mean if group["centered_variance"] else grad
        square.mul_(beta2).addcmul_(spread, spread, value=1 - beta2)

        correction1 = 1 - beta1 ** state["step"]
        correction2 = 1 - beta2 ** state["step"]
        rate = group["lr"] * math.sqrt(correction2) / correction1
        p.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-rate)
