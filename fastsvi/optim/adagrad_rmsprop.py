"""AdagradRMSProp, the step size rule of automatic differentiation variational inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastsvi.errors import DtypeError


class AdagradRMSProp(torch.optim.Optimizer):
    """RMSProp's average of squared gradients with Adagrad's decay of the step size.

    With ``s_1 = g_1**2`` and ``s_k = t g_k**2 + (1 - t) s_(k-1)``, the k-th update subtracts
    ``eta * k**(-1/2 + delta) * g_k / (1 + sqrt(s_k))``: equations 10 and 11 of Kucukelbir et al.,
    Automatic Differentiation Variational Inference (2017), arXiv:1603.00788.

    Args:
        params: tensors or groups of tensors.
        eta: scale of the step size.
        delta: how much slower than ``k**(-1/2)`` the step size decays.
        t: weight of the newest squared gradient.

    >>> x = torch.zeros(1, requires_grad=True)
    >>> optimizer = AdagradRMSProp([x])
    >>> x.backward(torch.tensor([3.0]))
    >>> optimizer.step()
    >>> x
    tensor([-0.7500], requires_grad=True)
    """

    def __init__(
        self, params: Any, eta: float = 1.0, delta: float = 1.0e-16, t: float = 0.1
    ) -> None:
        super().__init__(params, {"eta": eta, "delta": delta, "t": t})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": 0, "sum": torch.zeros_like(p, requires_grad=False)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all tensors that have a gradient; ``closure`` recomputes loss and gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise DtypeError(
                        f"AdagradRMSProp cannot use the sparse gradient of a tensor of shape "
                        f"{tuple(p.shape)}; use SparseAdam, or make the layer's gradient dense"
                    )
                state = self.state[p]
                state["step"] += 1
                square = p.grad.square()
                if state["step"] == 1:
                    state["sum"] = square
                else:
                    state["sum"].mul_(1 - group["t"]).add_(square, alpha=group["t"])
                rate = group["eta"] * state["step"] ** (-0.5 + group["delta"])
                p.addcdiv_(p.grad, state["sum"].sqrt().add_(1), value=-rate)
        return loss
