"""The special functions of the Triton kernels, against float64 ones of torch."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from fastsvi.kernels.triton import math as elementary
from fastsvi.kernels.triton import special

# numpy, with which the interpreter computes, warns where IEEE arithmetic gives inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def apply_kernel(x_ptr, y_ptr, count, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=1.0)
    if NAME == "exp":
        x = elementary.exp(x)
    elif NAME == "sigmoid":
        x = special.sigmoid(x)
    elif NAME == "log1p_unit":
        x = special.log1p_unit(x)
    elif NAME == "log_sigmoid":
        x = special.log_sigmoid(x)
    elif NAME == "softplus":
        x = special.softplus(x)
    elif NAME == "one_minus_exp":
        x = special.one_minus_exp(x)
    elif NAME == "lgamma":
        x = special.lgamma(x)
    else:
        tl.static_assert(NAME == "digamma")
        x = special.digamma(x)
    tl.store(y_ptr + at, x, mask=at < count)


def apply(name, x):
    x = x.to(DEVICE)
    y = torch.empty_like(x)
    apply_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), NAME=name, BLOCK=1024)
    return y.cpu()


def tails(low, high, extra=()):
    """Evenly spaced numbers, and tiny ones."""
    even = torch.linspace(low, high, 3001)
    return torch.cat([even, 10 ** torch.linspace(-30, 0, 200), torch.tensor(extra)])


TABLE = {
    "exp": (torch.exp, tails(-87.0, 88.7)),
    "sigmoid": (torch.sigmoid, tails(-87.0, 40.0)),
    "log1p_unit": (torch.log1p, tails(0.0, 1.0)),
    "log_sigmoid": (torch.nn.functional.logsigmoid, tails(-87.0, 80.0)),
    "softplus": (lambda x: torch.nn.functional.softplus(x, threshold=40.0), tails(-87.0, 80.0)),
    "one_minus_exp": (lambda x: -torch.expm1(-x), tails(1e-6, 50.0)),
}


@pytest.mark.parametrize("name", TABLE)
def test_float32_is_within_two_ulp(name):
    exact, x = TABLE[name]
    expected = exact(x.double())
    nearest = expected.float()
    spacing = torch.nextafter(nearest.abs(), torch.tensor(math.inf)).double() - nearest.abs()
    assert ((apply(name, x).double() - expected).abs() / spacing).max() <= 2.0


@pytest.mark.parametrize("name", TABLE)
def test_float64(name):
    exact, x = TABLE[name]
    torch.testing.assert_close(apply(name, x.double()), exact(x.double()), rtol=1e-15, atol=1e-300)


@pytest.mark.parametrize(("name", "exact"), [("lgamma", torch.lgamma), ("digamma", torch.digamma)])
def test_gamma_functions(name, exact):
    x = torch.cat([torch.linspace(1e-3, 20.0, 2001), 10 ** torch.linspace(-10, 8, 200)])
    # Absolute near their zeros, where a shift has terms of 2 (8 in float64) cancel.
    torch.testing.assert_close(apply(name, x).double(), exact(x.double()), rtol=2e-6, atol=2e-6)
    wide = x.double()
    torch.testing.assert_close(apply(name, wide), exact(wide), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "at_inf", "at_minus_inf"),
    [
        ("exp", math.inf, 0.0),
        ("sigmoid", 1.0, 0.0),
        ("log_sigmoid", 0.0, -math.inf),
        ("softplus", math.inf, 0.0),
        ("one_minus_exp", 1.0, None),
        ("lgamma", math.inf, None),
        ("digamma", math.inf, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits_and_nan(name, at_inf, at_minus_inf, dtype):
    found = apply(name, torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)).tolist()
    assert math.isnan(found[0])
    assert found[1] == at_inf
    assert at_minus_inf is None or found[2] == at_minus_inf
