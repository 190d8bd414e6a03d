"""Transforms: inverses, and log-determinants against autograd's Jacobian, in float64."""

from __future__ import annotations

import math
import pickle

import pyro.distributions as pyro_dist
import pytest
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist
from fastsvi.distributions import constraints
from fastsvi.distributions import transforms as T
from fastsvi.errors import ConstraintError, ShapeError

f64 = {"dtype": torch.float64}


def t(*values):
    return torch.tensor(values, **f64)


def lower_triangle(matrix, offset=0):
    n = matrix.shape[-1]
    rows, cols = torch.tril_indices(n, n, offset)
    return matrix[..., rows, cols]


def from_lower_triangle(entries, n, offset=0, symmetric=False, diagonal=0.0):
    rows, cols = torch.tril_indices(n, n, offset)
    matrix = torch.zeros(n, n, **f64) + diagonal * torch.eye(n, **f64)
    matrix = matrix.index_put((rows, cols), entries)
    return matrix.tril() + matrix.tril(-1).mT if symmetric else matrix


spd = t([2.0, 0.3, 0.1], [0.3, 1.0, -0.2], [0.1, -0.2, 1.5])
corr = t([1.0, 0.3, 0.1], [0.3, 1.0, -0.2], [0.1, -0.2, 1.0])

VECTORS = {
    "OrderedTransform": (T.OrderedTransform(), t(0.3, -1.0, 0.5, 0.0)),
    "LowerCholeskyAffine": (
        T.LowerCholeskyAffine(t(1.0, 2.0, 3.0), torch.linalg.cholesky(spd)),
        t(0.3, -1.0, 0.5),
    ),
    "Permute": (T.Permute(torch.tensor([2, 0, 1])), t(0.3, -1.0, 0.5)),
    "DiscreteCosineTransform": (T.DiscreteCosineTransform(), t(0.3, -1.0, 0.5, 2.0, 0.1)),
    "DiscreteCosineTransform-smooth": (
        T.DiscreteCosineTransform(smooth=1.5),
        t(0.3, -1.0, 0.5, 2.0),
    ),
    "HaarTransform": (T.HaarTransform(), t(0.3, -1.0, 0.5, 2.0, 0.1, 0.7)),
    "HaarTransform-flip": (T.HaarTransform(flip=True), t(0.3, -1.0, 0.5, 2.0, 0.1)),
}
NUMBERS = {
    "ELUTransform": (T.ELUTransform(), t(-3.0, -0.5, 0.7, 4.0)),
    "LeakyReLUTransform": (T.LeakyReLUTransform(), t(-3.0, -0.5, 0.7, 4.0)),
    "PositivePowerTransform": (T.PositivePowerTransform(2.5), t(-3.0, -0.5, 0.7, 4.0)),
}


@pytest.mark.parametrize("name", [*VECTORS, *NUMBERS])
def test_inverse_and_log_det(name):
    transform, x = {**VECTORS, **NUMBERS}[name]
    y = transform(x)
    assert_close(transform.inv(y), x)
    jacobian = torch.autograd.functional.jacobian(transform, x)
    if name in NUMBERS:
        expected = jacobian.diagonal().abs().log()
        assert transform.sign == 1
    else:
        expected = torch.linalg.slogdet(jacobian).logabsdet
    assert_close(transform.log_abs_det_jacobian(x, y), expected)
    # Batches, and the shapes that TransformedDistribution relies on.
    batch = torch.randn(5, 2, *x.shape, **f64)
    assert_close(transform.inv(transform(batch)), batch)
    shape = (5, 2) if name in VECTORS else batch.shape
    assert transform.log_abs_det_jacobian(batch, transform(batch)).shape == shape
    assert tuple(transform.forward_shape((5, *x.shape))) == (5, *y.shape)
    assert tuple(transform.inverse_shape((5, *y.shape))) == (5, *x.shape)
    assert transform.codomain.check(transform(batch)).all()


@pytest.mark.parametrize("name", [*VECTORS, *NUMBERS])
def test_caching_comparing_and_pickling(name):
    transform, x = {**VECTORS, **NUMBERS}[name]
    uncached, cached = transform.with_cache(0), transform.with_cache(1)
    assert type(cached) is type(transform)
    assert cached.with_cache(1) is cached
    assert_close(uncached(x), cached(x))
    assert cached.inv(cached(x)) is x
    assert transform == transform
    assert transform != T.ExpTransform()
    assert_close(pickle.loads(pickle.dumps(uncached))(x), transform(x))


@pytest.mark.parametrize("name", ["ELUTransform", "LeakyReLUTransform", "OrderedTransform"])
def test_two_of_a_kind_are_equal(name):
    assert getattr(T, name)() == getattr(T, name)()


def test_equality_looks_at_the_parameters():
    assert T.PositivePowerTransform(2.0) == T.PositivePowerTransform(2)
    assert T.PositivePowerTransform(2.0) != T.PositivePowerTransform(3.0)
    assert T.DiscreteCosineTransform(-1, 0.5) == T.DiscreteCosineTransform(-1, 0.5)
    assert T.DiscreteCosineTransform(-1, 0.5) != T.DiscreteCosineTransform(-2, 0.5)
    assert T.DiscreteCosineTransform(-1, 0.5) != T.DiscreteCosineTransform(-1, 0.0)
    assert T.HaarTransform(-1) != T.HaarTransform(-1, flip=True)
    assert len({T.HaarTransform(), T.HaarTransform(), T.DiscreteCosineTransform()}) == 2
    assert T.Normalize() == T.Normalize(2)
    assert T.Normalize(1) != T.Normalize(2)
    assert T.SimplexToOrderedTransform() == T.SimplexToOrderedTransform(0.0)
    assert T.SimplexToOrderedTransform() != T.SimplexToOrderedTransform(1.0)
    assert T.CholeskyTransform() != T.CorrMatrixCholeskyTransform()
    assert T.CholeskyTransform() == T.CholeskyTransform()


def test_cholesky_of_a_positive_definite_matrix():
    transform = T.CholeskyTransform()
    y = transform(spd)
    assert_close(transform.inv(y), spd)

    def entries(x):
        return lower_triangle(transform(from_lower_triangle(x, 3, symmetric=True)))

    jacobian = torch.autograd.functional.jacobian(entries, lower_triangle(spd))
    assert_close(transform.log_abs_det_jacobian(spd, y), torch.linalg.slogdet(jacobian).logabsdet)


def test_cholesky_of_a_correlation_matrix():
    transform = T.CorrMatrixCholeskyTransform()
    y = transform(corr)
    assert_close(transform.inv(y), corr)

    def entries(x):
        matrix = from_lower_triangle(x, 3, -1, symmetric=True, diagonal=1.0)
        return lower_triangle(transform(matrix), -1)

    jacobian = torch.autograd.functional.jacobian(entries, lower_triangle(corr, -1))
    assert_close(transform.log_abs_det_jacobian(corr, y), torch.linalg.slogdet(jacobian).logabsdet)
    assert transform.codomain is constraints.corr_cholesky


@pytest.mark.parametrize("anchor", [None, 0.7, t(0.7)[0]], ids=str)
def test_simplex_to_ordered(anchor):
    """Pyro's log-determinant leaves the anchor out, so autograd is the judge."""
    transform = T.SimplexToOrderedTransform(anchor)
    x = t(0.2, 0.3, 0.1, 0.4)
    y = transform(x)
    assert_close(transform.inv(y), x)
    assert constraints.ordered_vector.check(y)
    assert transform.forward_shape((5, 4)) == (5, 3)
    assert transform.inverse_shape((5, 3)) == (5, 4)

    def from_first(first):
        return transform(torch.cat([first, 1 - first.sum(-1, keepdim=True)]))

    jacobian = torch.autograd.functional.jacobian(from_first, x[:-1])
    assert_close(transform.log_abs_det_jacobian(x, y), torch.linalg.slogdet(jacobian).logabsdet)
    prior = dist.TransformedDistribution(dist.Dirichlet(torch.ones(4, **f64)), [transform])
    assert prior.log_prob(prior.sample((6,))).shape == (6,)


def test_square_matrices_to_lower_triangular_ones():
    x = torch.randn(5, 3, 3, **f64)
    softplus = T.SoftplusLowerCholeskyTransform()
    y = softplus(x)
    assert constraints.lower_cholesky.check(y).all()
    assert_close(softplus.inv(y), x.tril())
    unit = T.UnitLowerCholeskyTransform()
    assert constraints.unit_lower_cholesky.check(unit(x)).all()
    assert_close(unit(unit.inv(unit(x))), unit(x))
    assert softplus == T.SoftplusLowerCholeskyTransform()
    assert unit == T.UnitLowerCholeskyTransform()


@pytest.mark.parametrize("p", [1, 2, 3.0, math.inf])
def test_normalize_agrees_with_pyro_and_has_finite_gradients(p):
    x = torch.randn(4, 3, **f64)
    x[1] = 0
    assert_close(T.Normalize(p)(x), pyro_dist.transforms.Normalize(p)(x))
    leaf = x.requires_grad_()
    (gradient,) = torch.autograd.grad(T.Normalize(p)(leaf).square().sum(), leaf)
    assert gradient.isfinite().all()
    assert_close(T.Normalize().inv(t(0.6, 0.8)), t(0.6, 0.8))
    with pytest.raises(ValueError, match="must not be negative"):
        T.Normalize(-1)


def test_permute_along_another_dimension():
    x = torch.randn(2, 3, 4)
    transform = T.permute((3, 4), dim=-2)
    assert_close(transform.inv(transform(x)), x)
    assert_close(transform(x)[:, 0], x[:, transform.permutation[0]])
    assert transform.log_abs_det_jacobian(x, x).shape == (2,)
    assert transform.with_cache(0).dim == -2
    assert T.permute(4).permutation.sort().values.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="must be negative"):
        T.Permute(torch.arange(3), dim=0)
    with pytest.raises(ValueError, match="must have 2 entries"):
        T.permute((3,), dim=-2)


def test_bad_arguments_are_named():
    with pytest.raises(ConstraintError, match="exponent must be positive"):
        T.PositivePowerTransform(-1.0)
    assert T.PositivePowerTransform(-1.0, validate_args=False).exponent == -1
    with pytest.raises(ShapeError, match=r"\(3,\) and \(2, 2\)"):
        T.LowerCholeskyAffine(torch.zeros(3), torch.eye(2))
    with pytest.warns(FutureWarning, match="CorrCholeskyTransform"):
        T.CorrLCholeskyTransform()
    assert isinstance(T.elu(), T.ELUTransform)
    assert isinstance(T.leaky_relu(), T.LeakyReLUTransform)


def test_elu_gradients_are_finite_on_both_branches():
    y = t(-0.999, 0.0, 5.0).requires_grad_()
    T.ELUTransform().inv(y).sum().backward()
    assert_close(y.grad, t(1000.0, 1.0, 1.0))


def test_learnable_transforms_are_modules():
    class Scale(T.TransformModule):
        domain = codomain = constraints.real
        bijective = True

        def __init__(self):
            super().__init__()
            self.log_scale = torch.nn.Parameter(torch.tensor(0.5))

        def _call(self, x):
            return x * self.log_scale.exp()

        def _inverse(self, y):
            return y * (-self.log_scale).exp()

        def log_abs_det_jacobian(self, x, y):
            return self.log_scale.expand(x.shape)

    chain = T.iterated(3, Scale)
    assert isinstance(chain, dist.ComposeTransformModule)
    assert len(list(chain.parameters())) == 3
    assert hash(chain) == hash(chain)
    assert isinstance(Scale(), dist.TransformModule)
    d = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [chain])
    value = torch.tensor(2.0)
    assert_close(d.log_prob(value), dist.Normal(0.0, math.exp(1.5)).log_prob(value))
    assert chain.with_cache(0) is chain
    mixed = dist.ComposeTransformModule([Scale(), T.ExpTransform()])
    assert len(list(mixed.parameters())) == 1
    with pytest.raises(ValueError, match="positive int"):
        T.iterated(0, Scale)


def test_every_exported_name_exists():
    for name in T.__all__:
        assert hasattr(T, name)
    assert set(torch.distributions.transforms.__all__) <= set(T.__all__)
