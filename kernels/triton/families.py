"""Formulas of the families: the log-density, and its derivatives by the value and the parameters.

``FAMILY`` is a key of ``fastsvi.kernels.log_prob.FAMILIES``, whose entry is the same formula in
torch. Arguments are blocks that broadcast against each other, such as ``[R, 1]`` and ``[1, C]``:
what depends on parameters alone is computed on their small block. Parameters that a family lacks
are given all the same, and not looked at.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsvi.kernels.triton.math import exp
from fastsvi.kernels.triton.special import (
    HALF_LOG_2PI,
    digamma,
    lgamma,
    log1p_unit,
    square_root,
)

LOG_PI = tl.constexpr(1.1447298858494002)
LOG_2 = tl.constexpr(0.6931471805599453)


# ------------------------------------------------------------------------------------------ helpers


@triton.jit
def _xlogy(x, y):
    """x log y, 0 where x is 0."""
    return tl.where(x == 0.0, 0.0, x * tl.log(tl.where(x == 0.0, 1.0, y)))


@triton.jit
def _log1m(x):
    """log(1 - x), with all digits also for tiny x."""
    u = 1.0 - x
    lost = (u - 1.0) + x
    return tl.log(u) - tl.where(u > 0.0, lost / tl.where(u > 0.0, u, 1.0), 0.0)


@triton.jit
def _log1p_square(numerator, denominator):
    """log(1 + t^2) of t = numerator / denominator, where t^2 may overflow."""
    size = tl.abs(numerator)
    # Where t^2 > 1 / eps, this is 2 log|t| to rounding.
    large: tl.constexpr = 2896.0 if numerator.dtype == tl.float32 else 67108864.0
    small = size < large * denominator
    t = tl.where(small, size, 0.0) / tl.where(small, denominator, 1.0)
    log_t = tl.log(tl.where(small, 1.0, size)) - tl.log(tl.where(small, 1.0, denominator))
    s = t * t
    u = 1.0 + s
    return tl.log(u) + (s - (u - 1.0)) / u + 2.0 * log_t


@triton.jit
def _inverse_sum(t):
    """t / (1 + t^2), where t^2 may overflow."""
    return 1.0 / (t + 1.0 / t)


@triton.jit
def _share(t):
    """t^2 / (1 + t^2), where t^2 may overflow."""
    r = 1.0 / t
    return 1.0 / (1.0 + r * r)


@triton.jit
def _lgamma_half_step(a):
    """lgamma(a + 1/2) - lgamma(a), whose terms cancel for large a."""
    large = tl.where(a < 16.0, 16.0, a)
    r = 1.0 / large
    s = r * r
    tail = 1.0 / 640.0 - s * (17.0 / 14336.0 - s * (31.0 / 18432.0))
    series = 0.5 * tl.log(large) - r * (1.0 / 8.0 - s * (1.0 / 192.0 - s * tail))
    return tl.where(a < 16.0, lgamma(a + 0.5) - lgamma(a), series)


@triton.jit
def _digamma_half_step(a):
    """digamma(a + 1/2) - digamma(a) - 1 / (2a), the derivative of the above less its main term."""
    large = tl.where(a < 16.0, 16.0, a)
    r = 1.0 / large
    s = r * r
    tail = 5.0 / 640.0 - s * (119.0 / 14336.0 - s * (279.0 / 18432.0))
    series = s * (1.0 / 8.0 - s * (3.0 / 192.0 - s * tail))
    return tl.where(a < 16.0, digamma(a + 0.5) - digamma(a) - 0.5 / a, series)


# -------------------------------------------------------------------------------------- log-density


@triton.jit
def log_density(FAMILY: tl.constexpr, v, a, b, c):
    if FAMILY == "normal":  # loc, scale
        z = (v - a) / b
        return -0.5 * z * z - (tl.log(b) + HALF_LOG_2PI)
    elif FAMILY == "bernoulli_logits":  # logits
        rest = log1p_unit(exp(-tl.abs(a)))
        yes, no = tl.where(a < 0.0, a, 0.0), tl.where(a > 0.0, -a, 0.0)
        return v * (yes - rest) + (1.0 - v) * (no - rest)
    elif FAMILY == "poisson":  # rate
        return _xlogy(v, a) - a - lgamma(v + 1.0)
    elif FAMILY == "student_t":  # df, loc, scale
        square = _log1p_square(v - b, c * square_root(a))
        normalizer = _lgamma_half_step(0.5 * a) - 0.5 * (tl.log(a) + LOG_PI) - tl.log(c)
        return normalizer - 0.5 * (a + 1.0) * square
    elif FAMILY == "log_normal":  # loc, scale
        z = (tl.log(v) - a) / b
        return -z * (0.5 * z + b) - a - (tl.log(b) + HALF_LOG_2PI)
    elif FAMILY == "half_normal":  # scale
        z = tl.where(v < 0.0, 0.0, v) / a
        inside = -0.5 * z * z - (tl.log(a) + (HALF_LOG_2PI - LOG_2))
        return tl.where(v < 0.0, -float("inf"), inside)
    elif FAMILY == "half_cauchy":  # scale
        inside = -_log1p_square(v, a) - (tl.log(a) + (LOG_PI - LOG_2))
        return tl.where(v < 0.0, -float("inf"), inside)
    elif FAMILY == "gamma":  # concentration, rate
        return _xlogy(a, b) + _xlogy(a - 1.0, v) - b * v - lgamma(a)
    else:  # "beta": concentration1, concentration0
        tl.static_assert(FAMILY == "beta")
        low = _xlogy(a - 1.0, v)
        high = tl.where(b == 1.0, 0.0, (b - 1.0) * _log1m(tl.where(b == 1.0, 0.0, v)))
        return low + high + lgamma(a + b) - (lgamma(a) + lgamma(b))


# -------------------------------------------------------------------------------------- derivatives


@triton.jit
def derivatives(FAMILY: tl.constexpr, v, a, b, c):
    """By the value and by each parameter; what is not used is dropped by the compiler."""
    if FAMILY == "normal":
        z = (v - a) / b
        by_loc = z / b
        return -by_loc, by_loc, (z * z - 1.0) / b, v
    elif FAMILY == "bernoulli_logits":
        e = exp(-tl.abs(a))
        large = 1.0 / (1.0 + e)
        small = e * large
        yes, no = tl.where(a < 0.0, small, large), tl.where(a < 0.0, large, small)
        return a, v * no - (1.0 - v) * yes, v, v
    elif FAMILY == "poisson":
        return tl.log(a) - digamma(v + 1.0), v / a - 1.0, v, v
    elif FAMILY == "student_t":
        denominator = c * square_root(a)
        t = (v - b) / denominator
        by_loc = (a + 1.0) / denominator * _inverse_sum(t)
        share = _share(t)
        by_df = _digamma_half_step(0.5 * a) - _log1p_square(v - b, denominator)
        by_df = 0.5 * (by_df + (a + 1.0) / a * share)
        return -by_loc, by_df, by_loc, ((a + 1.0) * share - 1.0) / c
    elif FAMILY == "log_normal":
        z = (tl.log(v) - a) / b
        by_loc = z / b
        return -(by_loc + 1.0) / v, by_loc, (z * z - 1.0) / b, v
    elif FAMILY == "half_normal":
        z = v / a
        by_value = tl.where(v < 0.0, 0.0, -z / a)
        return by_value, tl.where(v < 0.0, 0.0, (z * z - 1.0) / a), v, v
    elif FAMILY == "half_cauchy":
        t = v / a
        by_value = tl.where(v < 0.0, 0.0, -2.0 / a * _inverse_sum(t))
        return by_value, tl.where(v < 0.0, 0.0, (2.0 * _share(t) - 1.0) / a), v, v
    elif FAMILY == "gamma":
        by_concentration = tl.log(b) + tl.log(v) - digamma(a)
        return (a - 1.0) / v - b, by_concentration, a / b - v, v
    else:
        tl.static_assert(FAMILY == "beta")
        total = digamma(a + b)
        by_value = (a - 1.0) / v - (b - 1.0) / (1.0 - v)
        return by_value, tl.log(v) + total - digamma(a), _log1m(v) + total - digamma(b), v
