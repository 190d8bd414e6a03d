"""The hand-written step as one function under ``torch.compile``: loss, gradient and Adam.

Compiled as a whole it takes a tenth of what a compiled loss with ``backward`` and an optimizer of
torch take on a small model. On a GPU it becomes a CUDA graph.
"""

from __future__ import annotations

import torch
import torch._inductor.config
from torch import Tensor

from bench.libraries import Fit
from bench.libraries.with_torch import TorchFit
from bench.workloads import Case

BETAS, EPS = (0.9, 0.999), 1e-8


def prepare(case: Case, device: str) -> Fit:
    return CompiledFit(case, device)


class CompiledFit(TorchFit):
    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        parameters = [x.detach() for x in self.program.parameters]
        zeros = [torch.zeros_like(x) for x in parameters]
        count = len(parameters)
        value_and_grad = torch.func.grad_and_value(self.program.loss, tuple(range(count)))
        rate, (beta1, beta2) = case.workload.learning_rate, BETAS
        data = self.data

        def step(state: list[Tensor], taken: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
            values, means, squares = state[:count], state[count : 2 * count], state[2 * count :]
            grads, loss = value_and_grad(*values, *data)
            taken = taken + 1
            means = [m + (g - m) * (1 - beta1) for m, g in zip(means, grads, strict=True)]
            squares = [s * beta2 + g * g * (1 - beta2) for s, g in zip(squares, grads, strict=True)]
            size, correction = rate / (1 - beta1**taken), (1 - beta2**taken).sqrt()
            values = [
                x - size * m / (s.sqrt() / correction + EPS)
                for x, m, s in zip(values, means, squares, strict=True)
            ]
            return [*values, *means, *squares], taken, loss

        # Inductor's own normals take six times as long on a CPU as torch's.
        torch._inductor.config.fallback_random = device == "cpu"
        mode = "reduce-overhead" if device == "cuda" else None
        self._compiled = torch.compile(step, mode=mode, fullgraph=True)
        self._state = [*parameters, *zeros, *(torch.zeros_like(x) for x in parameters)]
        self._taken = torch.zeros((), device=parameters[0].device)

    def _step(self) -> Tensor:
        with torch.no_grad():
            self._state, self._taken, loss = self._compiled(self._state, self._taken)
            self.program.parameters = self._state[: len(self.program.parameters)]
        return loss
