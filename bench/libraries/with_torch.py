"""A step written by hand in plain torch, as somebody would who wants it fast.

All parameters of a mean-field guide lie in two tensors, the loss is a handful of operations, Adam
is the fused one, and losses are read once at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.libraries import Fit
from bench.workloads import Array, Case, vae_weights
from bench.workloads.log_joints import LOG_JOINTS, vae

Loss = Callable[..., Tensor]


def prepare(case: Case, device: str) -> Fit:
    return TorchFit(case, device)


class TorchFit:
    note: str | None = None
    in_blocks = True
    fixed_length = False

    def __init__(self, case: Case, device: str, compile: Callable[[Loss], Loss] | None = None):
        torch.manual_seed(0)
        self.data = [torch.from_numpy(array).to(device) for array in case.data()]
        make = AutoEncoder if case.name == "vae" else MeanField
        self.program = make(case, torch.device(device))
        self.loss = compile(self.program.loss) if compile else self.program.loss
        self.optimizer = torch.optim.Adam(
            self.program.parameters, lr=case.workload.learning_rate, fused=True
        )

    def _step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(*self.program.parameters, *self.data)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def step(self) -> None:
        self._step().item()

    def run(self, steps: int) -> Array:
        losses = torch.stack([self._step().clone() for _ in range(steps)])
        return np.asarray(losses.double().cpu())

    def settle(self, steps: int) -> None:
        pass

    def posterior(self) -> dict[str, Array]:
        return {name: value.cpu().numpy() for name, value in self.program.posterior().items()}


class MeanField:
    """A normal with diagonal covariance over all latent numbers, laid end to end."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.log_joint = LOG_JOINTS[case.name]
        self.latents = case.latents()
        self.sizes = [int(np.prod(latent.shape)) for latent in self.latents.values()]
        total = sum(self.sizes)
        first_scale = torch.full((total,), 0.1, device=device)
        self.parameters: list[Tensor] = [
            torch.zeros(total, device=device, requires_grad=True),
            first_scale.expm1().log().requires_grad_(),  # softplus gives the scale
        ]

    def loss(self, loc: Tensor, raw_scale: Tensor, *data: Tensor) -> Tensor:
        scale = functional.softplus(raw_scale)
        noise = torch.randn(self.case.particles, len(loc), device=loc.device)
        u = loc + scale * noise
        # The constants of log q join the prior's in no sum that Adam sees, but the loss shows them.
        log_ratio = (scale.log() + 0.5 * noise.square()).sum(-1) + 0.9189385332 * len(loc)
        z = {}
        for (name, latent), part in zip(self.latents.items(), u.split(self.sizes, -1), strict=True):
            if latent.positive:
                log_ratio = log_ratio + part.sum(-1)
                part = part.exp()
            z[name] = part.reshape(-1, *latent.shape)
        options: dict[str, Any] = {}
        if self.case.workload.minibatch:
            rows, batch = len(data[0]), self.case.shape["batch"]
            chosen = torch.randint(rows, (batch,), device=loc.device)  # cheaper than a permutation
            data = tuple(array[chosen] for array in data)
            options["scale"] = rows / batch
        return -(self.log_joint(z, *data, **options) + log_ratio).mean()

    def posterior(self) -> dict[str, Tensor]:
        loc, raw_scale = (parameter.detach() for parameter in self.parameters)
        parts = zip(
            self.latents, loc.split(self.sizes), functional.softplus(raw_scale).split(self.sizes),
            strict=True,
        )  # fmt: skip
        found = {}
        for name, site_loc, site_scale in parts:
            found[f"loc.{name}"], found[f"scale.{name}"] = site_loc, site_scale
        return found


class AutoEncoder:
    """The weights of both networks, and the loss of a random batch."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        weights = vae_weights(**case.shape)
        self.names = list(weights)
        self.parameters = [
            torch.from_numpy(array).to(device).requires_grad_() for array in weights.values()
        ]

    def loss(self, *tensors: Tensor) -> Tensor:
        *parameters, images = tensors
        batch = self.case.shape["batch"]
        rows = torch.randint(len(images), (batch,), device=images.device)
        weights = dict(zip(self.names, parameters, strict=True))
        return -vae(weights, images[rows]).mean() * len(images)

    def posterior(self) -> dict[str, Tensor]:
        values = [parameter.detach() for parameter in self.parameters]
        return dict(zip(self.names, values, strict=True))
