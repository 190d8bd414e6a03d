"""Functions that transforms and densities need beyond :mod:`math`, for the GPU and the interpreter.

libdevice has most of them, but the interpreter has no libdevice. NaN stays NaN, infinities map to
the limits. float32 results are within 2 ulp, those of the gamma functions within some eps of their
largest term.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsvi.kernels.triton.math import LN2_HIGH, LN2_LOW, LOG2_E, _power_of_two, exp

HALF_LOG_2PI = tl.constexpr(0.91893853320467274178)


@triton.jit
def divide(a, b):
    """Correctly rounded quotient; plain ``/`` of float32 may be off by 2 ulp."""
    if b.dtype == tl.float32:
        return tl.math.div_rn(a, b)
    return a / b


@triton.jit
def square_root(x):
    """Correctly rounded square root, subnormal arguments included."""
    if x.dtype == tl.float32:
        return tl.math.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    e = exp(-tl.abs(x))
    return divide(tl.where(x < 0.0, e, 1.0), 1.0 + e)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1."""
    if x.dtype == tl.float64:
        u = 1.0 + x
        return tl.log(u) + (x - (u - 1.0)) / u
    # 1 + x = 2 (1 + y) takes the upper part to -0.3 < y <= 0; y itself is the leading term.
    upper = x > 0.41421356
    y = tl.where(upper, 0.5 * (x - 1.0), x)
    p = 7.0376836292e-2  # Cephes, logf
    p = p * y - 1.1514610310e-1
    p = p * y + 1.1676998740e-1
    p = p * y - 1.2420140846e-1
    p = p * y + 1.4249322787e-1
    p = p * y - 1.6668057665e-1
    p = p * y + 2.0000714765e-1
    p = p * y - 2.4999993993e-1
    p = p * y + 3.3333331174e-1
    s = y * y
    log = y + (s * y * p - 0.5 * s)
    return tl.where(upper, LN2_HIGH + (log + LN2_LOW), log)


@triton.jit
def log_sigmoid(x):
    """log(1 / (1 + exp(-x)))."""
    return tl.where(x < 0.0, x, 0.0) - log1p_unit(exp(-tl.abs(x)))


@triton.jit
def softplus(x):
    """log(1 + exp(x))."""
    return -log_sigmoid(-x)


@triton.jit
def one_minus_exp(x):
    """1 - exp(-x) for x >= 0, with all digits also for tiny x."""
    if x.dtype == tl.float64:
        w = tl.exp(-x)
        # Kahan: (1 - w) x / -log(w), in which the rounding of w cancels.
        safe = tl.where((w == 1.0) | (w == 0.0), 0.5, w)
        near = (1.0 - safe) * x / -tl.log(safe)
        return tl.where(w == 1.0, x, tl.where(x > 1.0, 1.0 - w, near))
    # As in exp: -x = n ln 2 + r and exp(r) = 1 + q, so that 1 and 2^n are subtracted exactly.
    clipped = tl.where(x > 80.0, -80.0, -x)
    whole = tl.floor(clipped * LOG2_E + 0.5)
    r = (clipped - whole * LN2_HIGH) - whole * LN2_LOW
    p = 1.9875691500e-4
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    power = _power_of_two(whole.to(tl.int32))
    return (1.0 - power) - power * (p * r * r + r)


@triton.jit
def _reciprocal(x):
    # Of infinity by hand: divisions differ there.
    huge = x > 3.0e38
    return tl.where(huge, 0.0, divide(tl.full(x.shape, 1.0, x.dtype), tl.where(huge, 1.0, x)))


@triton.jit
def lgamma(x):
    """log(gamma(x)) for x > 0: Stirling's series, after a shift where x is small."""
    # float32 needs fewer terms, so a smaller shift, whose terms then cancel less.
    shift: tl.constexpr = 4.0 if x.dtype == tl.float32 else 8.0
    small = x < shift
    low = tl.where(small, x, 1.0)
    product = low * (low + 1.0) * (low + 2.0) * (low + 3.0)
    if shift == 8.0:
        product = product * ((low + 4.0) * (low + 5.0) * (low + 6.0) * (low + 7.0))
    z = tl.where(small, x + shift, x)
    r = _reciprocal(z)
    s = r * r
    tail = 1.0 / 1188.0 - s * (691.0 / 360360.0 - s * (1.0 / 156.0 - s * (3617.0 / 122400.0)))
    tail = 1.0 / 360.0 - s * (1.0 / 1260.0 - s * (1.0 / 1680.0 - s * tail))
    tail = r * (1.0 / 12.0 - s * tail)
    stirling = (z - 0.5) * (tl.log(z) - 1.0) + (HALF_LOG_2PI - 0.5 + tail)
    return stirling - tl.where(small, tl.log(product), 0.0)


@triton.jit
def digamma(x):
    """Derivative of :func:`lgamma`, for x > 0."""
    shift: tl.constexpr = 4.0 if x.dtype == tl.float32 else 8.0
    small = x < shift
    low = tl.where(small, x, 1.0)
    # In pairs, 1/a + 1/(a + 1) = (2a + 1) / (a (a + 1)): half the divisions.
    total = divide(2.0 * low + 1.0, low * (low + 1.0))
    total += divide(2.0 * low + 5.0, (low + 2.0) * (low + 3.0))
    if shift == 8.0:
        total += divide(2.0 * low + 9.0, (low + 4.0) * (low + 5.0))
        total += divide(2.0 * low + 13.0, (low + 6.0) * (low + 7.0))
    z = tl.where(small, x + shift, x)
    r = _reciprocal(z)
    s = r * r
    tail = 1.0 / 240.0 - s * (1.0 / 132.0 - s * (691.0 / 32760.0 - s * (1.0 / 12.0)))
    tail = s * (1.0 / 12.0 - s * (1.0 / 120.0 - s * (1.0 / 252.0 - s * tail)))
    return (tl.log(z) - 0.5 * r - tail) - tl.where(small, total, 0.0)
