"""The hand-written step with its loss under ``torch.compile``; CUDA graphs where there is CUDA."""

from __future__ import annotations

import torch

from bench.libraries import Fit
from bench.libraries.with_torch import Loss, TorchFit
from bench.workloads import Case


def prepare(case: Case, device: str) -> Fit:
    mode = "reduce-overhead" if device == "cuda" else None

    def compile(loss: Loss) -> Loss:
        compiled: Loss = torch.compile(loss, mode=mode)
        return compiled

    return TorchFit(case, device, compile)
