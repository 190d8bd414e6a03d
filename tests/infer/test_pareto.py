"""The Pareto fit against its own quantiles and Pyro's fit, and what k-hat says at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.ops.stats import fit_generalized_pareto as oracle_fit

from fastsvi.errors import FastSVIWarning, NonFiniteError, ShapeError
from fastsvi.infer.pareto import fit_generalized_pareto, tail_index, tail_index_limit


@given(
    k=st.floats(-0.6, 1.2).filter(lambda k: abs(k) > 0.02),
    sigma=st.floats(1e-3, 1e3),
    num=st.integers(10, 400),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_same_fit_as_pyro(k, sigma, num, seed):
    u = torch.rand(num, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = sigma * (u**-k - 1) / k
    ours, theirs = fit_generalized_pareto(x), oracle_fit(x.clone())
    # The same float64 formula, summed in another order.
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("k", [-0.3, 0.2, 0.5, 0.7, 1.0])
def test_recovers_the_shape_of_its_own_quantiles(k):
    num = 4000
    u = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    fitted, sigma = fit_generalized_pareto(2.0 * (u**-k - 1) / k)
    # The asymptotic standard error of k is (1 + k) / sqrt(N); quantiles are more even than draws.
    assert fitted == pytest.approx(k, abs=(1 + k) / num**0.5)
    assert sigma == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("k", [0.3, 0.9])
def test_tail_index_of_pareto_weights(k):
    """Weights u ** -k have a tail of index k; the scale of the weights is of no matter."""
    u = torch.rand(10_000, dtype=torch.float64)
    log_weights = -k * u.log()
    num_tail = math.ceil(3 * 10_000**0.5)
    found = tail_index(log_weights)
    assert found == pytest.approx(k, abs=3 * (1 + k) / num_tail**0.5)
    assert tail_index(log_weights - 1000) == pytest.approx(found, rel=1e-6)
    # float32 keeps seven digits of weights that span ten nats.
    assert tail_index(log_weights.float()) == pytest.approx(found, abs=1e-3)


def test_equal_weights_have_no_tail():
    assert tail_index(torch.zeros(100)) == 0.0
    assert tail_index(-7.0 + 1e-4 * torch.randn(1000)) == 0.0


def test_bounded_weights_have_a_negative_index():
    u = torch.rand(5000, dtype=torch.float64)
    assert tail_index(torch.log(0.5 + u)) < -0.5  # uniform weights: the exact index is -1


def test_too_few_in_the_tail():
    log_weights = torch.full((1000,), -100.0)
    log_weights[:3] = 0.0
    with pytest.warns(FastSVIWarning, match=r"3 weights lie in the tail, 10 are needed, of 1000"):
        assert tail_index(log_weights) == math.inf
    with pytest.warns(FastSVIWarning, match="4 weights lie"):
        assert tail_index(torch.randn(20)) == math.inf


@pytest.mark.parametrize(
    ("log_weights", "error"),
    [
        (torch.tensor([0.0, math.nan, 1.0]), NonFiniteError),
        (torch.tensor([0.0, math.inf]), NonFiniteError),
        (torch.full((20,), -math.inf), NonFiniteError),
        (torch.zeros(3, 2), ShapeError),
        (torch.zeros(0), ShapeError),
    ],
)
def test_unusable_weights(log_weights, error):
    with pytest.raises(error, match="log"):
        tail_index(log_weights)


def test_unusable_exceedances():
    for bad in (torch.zeros(()), torch.zeros(1), torch.zeros(3, 3)):
        with pytest.raises(ShapeError, match="vector of exceedances"):
            fit_generalized_pareto(bad)


def test_draws_outside_the_support_do_not_hide_the_tail():
    log_weights = -0.5 * torch.rand(4000, dtype=torch.float64).log()
    log_weights[::10] = -math.inf
    assert tail_index(log_weights) == pytest.approx(0.5, abs=0.35)


def test_limit():
    assert tail_index_limit(100) == pytest.approx(0.5)
    assert tail_index_limit(2200) == pytest.approx(0.7, abs=1e-3)
    assert tail_index_limit(10**6) == 0.7
    assert 0 < tail_index_limit(5) < 0.1
