"""The models of the benchmarks as fastsvi and Pyro read them; ``pyro`` is either library.

Each function makes ``(model, guide)`` for a size; a guide of None stands for ``AutoNormal``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads import vae_weights

Program = Callable[..., Any]
Shape = Mapping[str, int]


def programs(name: str, pyro: ModuleType, shape: Shape) -> tuple[Program, Program | None]:
    """Model and guide of the workload ``name``."""
    return _PROGRAMS[name](pyro, shape)


def _number(value: float, like: Tensor) -> Any:
    """``value`` where ``like`` lives: latent values are born where their prior's arguments are."""
    return value if like.device.type == "cpu" else torch.full((), value, device=like.device)


def eight_schools(pyro: ModuleType, shape: Shape) -> tuple[Program, None]:
    dist = pyro.distributions

    def model(sigma: Tensor, y: Tensor) -> None:
        zero, five = _number(0.0, y), torch.tensor(5.0, device=y.device)
        mu = pyro.sample("mu", dist.Normal(zero, five))
        tau = pyro.sample("tau", dist.HalfCauchy(five))
        with pyro.plate("schools", len(y)):
            effect = pyro.sample("effect", dist.Normal(zero, _number(1.0, y)))
            pyro.sample("obs", dist.Normal(mu + tau * effect, sigma), obs=y)

    return model, None


def logistic(pyro: ModuleType, shape: Shape) -> tuple[Program, None]:
    dist = pyro.distributions

    def model(x: Tensor, y: Tensor) -> None:
        zero = _number(0.0, x)
        with pyro.plate("columns", x.shape[1]):  # batch dimensions: Pyro's particles need them
            weight = pyro.sample("weight", dist.Normal(zero, _number(1.0, x)))
        bias = pyro.sample("bias", dist.Normal(zero, _number(10.0, x)))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=weight @ x.T + bias), obs=y)

    return model, None


def minibatch(pyro: ModuleType, shape: Shape) -> tuple[Program, None]:
    dist = pyro.distributions

    def model(x: Tensor, y: Tensor) -> None:
        zero = _number(0.0, x)
        with pyro.plate("columns", x.shape[1]):
            weight = pyro.sample("weight", dist.Normal(zero, _number(1.0, x)))
        bias = pyro.sample("bias", dist.Normal(zero, _number(10.0, x)))
        with pyro.plate("rows", len(x), subsample_size=shape["batch"], device=x.device) as rows:
            pyro.sample("y", dist.Bernoulli(logits=x[rows] @ weight + bias), obs=y[rows])

    return model, None


def intercepts(pyro: ModuleType, shape: Shape) -> tuple[Program, None]:
    dist = pyro.distributions

    def model(group: Tensor, floor: Tensor, y: Tensor) -> None:
        zero, ten = _number(0.0, y), _number(10.0, y)
        five = torch.tensor(5.0, device=y.device)
        mean = pyro.sample("mean", dist.Normal(zero, ten))
        spread = pyro.sample("spread", dist.HalfCauchy(five))
        slope = pyro.sample("slope", dist.Normal(zero, ten))
        noise = pyro.sample("noise", dist.HalfCauchy(five))
        with pyro.plate("groups", shape["groups"]):
            level = pyro.sample("level", dist.Normal(mean, spread))
        with pyro.plate("rows", len(y)):
            fitted = level[..., group] + slope * floor
            pyro.sample("y", dist.Normal(fitted, noise), obs=y)

    return model, None


def wide(pyro: ModuleType, shape: Shape) -> tuple[Program, None]:
    dist = pyro.distributions

    def model(y: Tensor) -> None:
        with pyro.plate("elements", len(y)):
            z = pyro.sample("z", dist.Normal(_number(0.0, y), _number(1.0, y)))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    return model, None


def regression(pyro: ModuleType, shape: Shape) -> tuple[Program, None]:
    """One regression of the many: ``x [rows, columns]``, ``y [rows]``."""
    dist = pyro.distributions

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
        bias = pyro.sample("bias", dist.Normal(_number(0.0, x), _number(1.0, x)))
        noise = pyro.sample("noise", dist.HalfCauchy(torch.tensor(1.0, device=x.device)))
        with pyro.plate("rows", y.shape[-1]):
            pyro.sample("y", dist.Normal(x @ weight + bias, noise), obs=y)

    return model, None


def regressions(pyro: ModuleType, shape: Shape) -> tuple[Program, None]:
    """All regressions as one model with a plate over them, for a library that has no fits.

    Adam moves every element on its own, so this is the same as fitting them one by one.
    """
    dist = pyro.distributions

    def model(x: Tensor, y: Tensor) -> None:
        one = torch.tensor(1.0, device=x.device)
        with pyro.plate("fits", len(x), dim=-2):
            prior = dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1)
            weight = pyro.sample("weight", prior)  # [fits, 1, columns]
            bias = pyro.sample("bias", dist.Normal(_number(0.0, x), one))
            noise = pyro.sample("noise", dist.HalfCauchy(one))
            with pyro.plate("rows", y.shape[-1], dim=-1):
                fitted = (x @ weight.squeeze(-2).unsqueeze(-1)).squeeze(-1) + bias
                pyro.sample("y", dist.Normal(fitted, noise), obs=y)

    return model, None


class Network(nn.Module):
    """Layers of the auto-encoder, with the first values that all libraries share."""

    def __init__(self, part: str, shape: Shape) -> None:
        super().__init__()
        weights = vae_weights(**shape)
        for name in {key.split(".")[1] for key in weights if key.startswith(f"{part}.")}:
            weight = torch.from_numpy(weights[f"{part}.{name}.weight"].copy())
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.weight.data = weight
            layer.bias.data = torch.from_numpy(weights[f"{part}.{name}.bias"].copy())
            self.add_module(name, layer)


class Encoder(Network):
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = nn.functional.softplus(self.hidden(pixels))
        return self.loc(hidden), self.log_scale(hidden).exp()


class Decoder(Network):
    def forward(self, z: Tensor) -> Tensor:
        return self.logits(nn.functional.softplus(self.hidden(z)))


def vae(pyro: ModuleType, shape: Shape) -> tuple[Program, Program]:
    dist = pyro.distributions
    encoder, decoder = Encoder("encoder", shape), Decoder("decoder", shape)

    def model(images: Tensor) -> None:
        pyro.module("decoder", decoder.to(images.device))
        size = shape["batch"]
        with pyro.plate("images", len(images), subsample_size=size, device=images.device) as rows:
            prior = dist.Normal(images.new_zeros(size, shape["latent"]), 1.0).to_event(1)
            logits = decoder(pyro.sample("z", prior))
            pyro.sample("pixels", dist.Bernoulli(logits=logits).to_event(1), obs=images[rows])

    def guide(images: Tensor) -> None:
        pyro.module("encoder", encoder.to(images.device))
        size = shape["batch"]
        with pyro.plate("images", len(images), subsample_size=size, device=images.device) as rows:
            loc, scale = encoder(images[rows])
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide


_PROGRAMS: dict[str, Callable[[ModuleType, Shape], tuple[Program, Program | None]]] = {
    "eight_schools": eight_schools,
    "logistic": logistic,
    "intercepts": intercepts,
    "wide": wide,
    "minibatch": minibatch,
    "vae": vae,
    "regression": regression,
    "regressions": regressions,
}
