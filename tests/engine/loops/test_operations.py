"""Operations of models and networks: recorded and compiled, against eager torch, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import distributions as dist
from torch.nn import functional

from fastsvi.engine.native import NativeStep

LABELS = torch.tensor([0, 3, 1])
PLACES = torch.tensor([[0, 2, 1, 3], [1, 0, 2, 3], [3, 0, 1, 2]])
REPEATED = torch.tensor([[0, 0, 1, 1], [1, 1, 3, 3], [3, 0, 0, 0]])
COUNTS = torch.arange(12)


def square(x):
    """A positive definite 4 by 4 matrix."""
    return x.view(3, 4).t() @ x.view(3, 4) + torch.eye(4).to(x)


def general(x):
    """A 4 by 4 matrix whose factorization exchanges rows."""
    return square(x).flip(0) + torch.outer(x[:4], x[4:8])


def log_prob(family, value, *args, **kwargs):
    return family(*args, **kwargs, validate_args=False).log_prob(value).sum()


FUNCTIONS = {
    # ---- small linear algebra
    "cholesky": lambda x: torch.linalg.cholesky(square(x)).sin().sum(),
    "upper cholesky": lambda x: torch.linalg.cholesky(square(x), upper=True).sin().sum(),
    "solve_triangular": lambda x: (
        torch.linalg.solve_triangular(square(x).tril(), x.view(4, 3), upper=False).sin().sum()
    ),
    "solve_triangular from the right": lambda x: (
        torch.linalg.solve_triangular(square(x).triu(), x.view(3, 4), upper=True, left=False)
        .sin()
        .sum()
    ),
    "unit triangle": lambda x: (
        torch.linalg.solve_triangular(
            square(x).tril(), x.view(4, 3), upper=False, unitriangular=True
        )
        .tanh()
        .sum()
    ),
    "solve": lambda x: torch.linalg.solve(general(x), x.view(4, 3)).sin().sum(),
    "solve a vector": lambda x: torch.linalg.solve(general(x).mT, x[:4]).sin().sum(),
    "inverse": lambda x: torch.linalg.inv(general(x)).sin().sum(),
    "log determinant": lambda x: torch.linalg.slogdet(general(x)).logabsdet.square(),
    "determinant": lambda x: torch.linalg.det(general(x)).square() + torch.logdet(square(x)),
    "cholesky_solve": lambda x: (
        torch.cholesky_solve(x[:4, None], torch.linalg.cholesky(square(x))).sin().sum()
        + torch.cholesky_inverse(torch.linalg.cholesky(square(x))).sin().sum()
    ),
    "triangles, trace": lambda x: (
        (x.view(3, 4).tril() * x.view(3, 4).exp()).sum()
        + (x.view(3, 4).triu(1).sin().sum() * square(x).trace())
    ),
    "diagonals": lambda x: (
        (torch.diag_embed(x.view(3, 4)).sum(0) @ x[:4]).sin().sum()
        + torch.diag(x[:4], 1).sin().sum()
        + torch.diag(x[:9].view(3, 3)).exp().sum()
    ),
    # ---- along axes
    "std, var_mean": lambda x: (
        x.view(3, 4).std(1).log().sum()
        + x.std()
        + sum(part.sum() for part in torch.var_mean(x.view(3, 4) ** 2, 1))
    ),
    "sort": lambda x: (
        (x.view(3, 4).sin().sort(1).values * torch.arange(4).to(x)).sum()
        + (x.view(3, 4).cos().sort(0, descending=True).values * torch.arange(4).to(x)).sum()
    ),
    "argsort": lambda x: (x.sin()[x.detach().cos().argsort()] * COUNTS.to(x)).sum(),
    "max and min with places": lambda x: (
        (x.view(3, 4).sin().max(1).values ** 2).sum()
        + (x.view(3, 4).min(0).indices * x.view(3, 4)[0]).sum()
        + (x.view(3, 4).sin().argmax(1) * x[:3]).sum()
        + x.max() * x.min()
    ),
    "long cumsum": lambda x: (x.repeat(20).cumsum(0) * 0.1).sin().sum(),
    "cumprod, prod": lambda x: (
        (x.view(3, 4) + 3).cumprod(1).log().sum() + (x.view(3, 4) + 3).prod(0).log().sum()
    ),
    "flip, roll": lambda x: (
        (x.view(3, 4).flip(0, 1) * x.view(3, 4)).sum()
        + (x.view(3, 4).roll(1, 0) * x.view(3, 4)).sum()
        + (x.roll(-2) * x).sum()
    ),
    "repeat": lambda x: (
        (x.view(3, 4).repeat(2, 3) * COUNTS.to(x)).sin().sum()
        + (x[:4].repeat_interleave(3) * x).sum()
    ),
    "norms": lambda x: x.norm() + torch.linalg.vector_norm(x.view(3, 4), dim=1).log().sum(),
    # ---- by index
    "index_put": lambda x: (
        torch.zeros(5)
        .to(x)
        .index_put((LABELS[:2].repeat(2),), x[:4] ** 2, accumulate=True)
        .sin()
        .sum()
        + x.index_put((LABELS,), x[:3] ** 2).sin().sum()
    ),
    "index_fill, index_add": lambda x: (
        x.index_fill(0, LABELS, 2.0).sin().sum()
        + torch.zeros(3, 4)
        .to(x)
        .index_add(0, torch.tensor([0, 0, 2]), x.view(3, 4), alpha=2.0)
        .sin()
        .sum()
    ),
    "scatter": lambda x: (
        torch.zeros(3, 4).to(x).scatter(1, PLACES, x.view(3, 4)).sin().sum()
        + torch.zeros(3, 4).to(x).scatter_add(1, REPEATED, x.view(3, 4)).sin().sum()
    ),
    "embedding": lambda x: (
        functional.embedding(torch.tensor([[0, 2], [2, 1]]), x.view(3, 4)).sin().sum()
    ),
    "one_hot, take_along_dim": lambda x: (
        (functional.one_hot(torch.tensor([0, 2, 1]), 4) * x.view(3, 4)).sum().sin()
        + torch.take_along_dim(x.view(3, 4), LABELS[:, None], 1).sin().sum()
    ),
    # ---- networks
    "gelu": lambda x: functional.gelu(x).sum() + functional.gelu(x, approximate="tanh").sum(),
    "silu, relu": lambda x: functional.silu(x).sin().sum() + functional.relu(x).sin().sum(),
    "elu and kin": lambda x: (
        functional.elu(x).sin().sum() + functional.selu(x).sum() + functional.celu(x, 2.0).sum()
    ),
    "hardtanh and kin": lambda x: (
        functional.hardtanh(x).sin().sum()
        + functional.relu6(x * 8).sum()
        + functional.leaky_relu(x).sin().sum()
    ),
    "squared error": lambda x: (
        functional.mse_loss(x[:6], x[6:]) + functional.mse_loss(x[:6], x[6:], reduction="sum")
    ),
    "cross entropy": lambda x: (
        functional.cross_entropy(x.view(3, 4), LABELS)
        + functional.nll_loss(functional.log_softmax(x.view(3, 4), -1), LABELS, reduction="sum")
        + functional.binary_cross_entropy_with_logits(x, (x.detach() > 0).to(x))
    ),
    "layer_norm": lambda x: functional.layer_norm(x.view(3, 4), (4,), x[:4], x[4:8]).sin().sum(),
    "extreme logits": lambda x: (
        (x * 30).sigmoid().sum()
        + functional.softplus(x * 30).sum()
        + functional.logsigmoid(x * 30).sum()
    ),
    # ---- numbers
    "logit, erfinv": lambda x: (
        torch.logit(x.sigmoid()).sin().sum() + torch.erfinv(x.tanh()).sin().sum()
    ),
    "powers of 2 and 10": lambda x: (x.exp2().log2() + x.exp().log10()).sin().sum(),
    "remainders": lambda x: (
        (x.remainder(0.7) + x.fmod(0.7) + x.frac() + torch.floor_divide(x.detach(), 0.31))
        .sin()
        .sum()
    ),
    "integers": lambda x: (
        ((x.detach() * 10).long() // 3 + (x.detach() * 10).long() % 3) * x
        + (x.detach() * 10).long().fmod(3) * x
        + torch.div((x.detach() * 10).int(), 2, rounding_mode="trunc") * x
    ).sum(),
    "truth values": lambda x: (
        ((x > 0) * (x < 1) * x).sum()
        + ((x > 0) + (x < -1)).sum() * x[0]
        + ((x > 0) ^ (x > 1)).to(x).sum() * x[1]
    ),
    "gamma functions": lambda x: (
        (torch.lgamma(x.exp()) + torch.mvlgamma(x.exp() + 3, 2)).sum()
        + torch.digamma(x.detach().exp()).sum() * x[0]
    ),
    "logarithmic products": lambda x: (
        torch.xlogy(x.exp(), x.exp()).sum() + torch.special.xlog1py(x, x.exp()).sum()
    ),
    "logaddexp": lambda x: torch.logaddexp(x[:6], x[6:]).sum() + torch.logsumexp(x, 0),
    "bounds that are tensors": lambda x: (
        x.clamp(min=x.detach() - 1, max=x.detach() * 0 + 0.5).sin().sum()
    ),
    "new tensors": lambda x: (
        (x.new_zeros(3) + x.new_ones(3) + x.new_full((3,), 2.0) + torch.full_like(x[:3], 3.0))
        * x[:3]
    ).sum(),
    # ---- shapes
    "einsum": lambda x: (
        torch.einsum("ij,kj->ik", x.view(3, 4), x.view(3, 4).sin()).exp().sum()
        + torch.outer(x[:3], x[3:6]).sin().sum()
    ),
    "movedim, chunk": lambda x: (
        (x.view(2, 3, 2).movedim(0, -1) * x.view(3, 2, 2)).sum() * x.chunk(2)[1].exp().sum()
    ),
    "kernel matrix": lambda x: (-((x[:, None] - x) ** 2)).exp().sum(),
    # ---- densities
    "bernoulli": lambda x: (
        log_prob(dist.Bernoulli, (x.detach() > 0).to(x), logits=x)
        + log_prob(dist.Bernoulli, (x.detach() > 0).to(x), probs=x.sigmoid())
    ),
    "categorical": lambda x: log_prob(dist.Categorical, LABELS, probs=x.view(3, 4).exp()),
    "beta, dirichlet": lambda x: (
        log_prob(dist.Beta, torch.full((6,), 0.3).to(x), x[:6].exp(), x[6:].exp())
        + log_prob(dist.Dirichlet, torch.tensor([0.1, 0.2, 0.3, 0.4]).to(x), x.view(3, 4).exp())
    ),
    "counts": lambda x: (
        log_prob(dist.Poisson, COUNTS.to(x), x.exp())
        + log_prob(dist.NegativeBinomial, COUNTS.to(x), x.exp(), logits=x)
    ),
    "heavy tails": lambda x: (
        log_prob(dist.Laplace, COUNTS[:6].to(x), x[:6], x[6:].exp())
        + log_prob(dist.HalfCauchy, COUNTS.to(x), x.exp())
        + log_prob(dist.Weibull, COUNTS[:6].to(x) + 1, x[:6].exp(), x[6:].exp())
    ),
    "multivariate normal": lambda x: log_prob(
        dist.MultivariateNormal, x[4:8], x[:4], scale_tril=torch.linalg.cholesky(square(x))
    ),
    "many multivariate normals": lambda x: log_prob(
        dist.MultivariateNormal,
        x.view(3, 4)[:, 2:],
        x.view(3, 4)[:, :2],
        scale_tril=torch.eye(2).to(x) + x.view(3, 2, 2).tril(-1),
    ),
    "stick breaking": lambda x: dist.biject_to(dist.constraints.simplex)(x[:5]).log().sum(),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_those_of_eager_torch(dtype):
    """All functions in one step, for one compilation."""

    def one(function, x):
        leaf = x.detach().requires_grad_()
        loss = function(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient, loss.detach().reshape(())

    def step(*states):
        results = [one(*pair) for pair in zip(FUNCTIONS.values(), states, strict=True)]
        losses = torch.stack([loss for _, loss in results])
        return (*(gradient for gradient, _ in results), losses, losses.isnan().all())

    states = [torch.linspace(-1.5, 1.3, 12, dtype=dtype) for _ in FUNCTIONS]
    *gradients, losses, _ = step(*states)
    (got,) = NativeStep(step, states).run(1)
    # Vectorised functions are right to some 4 ulp, and an expression has up to some 30 of them.
    tolerance = 120 * torch.finfo(dtype).eps
    for name, loss, expected, gradient, wanted in zip(
        FUNCTIONS, got, losses, states, gradients, strict=True
    ):
        assert abs(loss - expected) <= tolerance * (abs(expected) + 1), name
        error = (gradient - wanted).abs().max()
        assert error <= tolerance * (wanted.abs().max() + 1), name
