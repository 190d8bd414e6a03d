"""exp, cos and sin, accurate and without slow paths, in float32 and float64.

Triton's own ``exp`` is ``ex2.approx(x * log2(e))`` in float32, whose relative error grows with
``|x|``, and its ``cos`` drags in a range reduction for huge arguments that spills registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts; the first has so few bits that its product with a whole number is exact.
LN2_HIGH = tl.constexpr(0.693145751953125)
LN2_LOW = tl.constexpr(1.42860682030941723212e-6)
TURN_32 = tl.constexpr(2.0 * 3.14159265358979323846 / 4294967296.0)
TURN_32_LOW = tl.constexpr(-1.7484555600e-7 / 4294967296.0)  # what float32 loses of it


@triton.jit
def _power_of_two(n):
    """2^n in float32 for a whole number n from -126 to 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    """exp(x) within 2 ulp, subnormal results included."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    # Beyond these bounds the result is 0 or infinite; NaN passes through.
    clipped = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))
    whole = tl.floor(clipped * LOG2_E + 0.5)
    r = (clipped - whole * LN2_HIGH) - whole * LN2_LOW  # |r| <= ln(2) / 2
    p = 1.9875691500e-4  # Cephes, expf
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = p * r * r + r + 1.0
    n = whole.to(tl.int32)
    half = n >> 1  # in two factors, for 2^n itself may be subnormal or overflow
    return p * _power_of_two(half) * _power_of_two(n - half)


@triton.jit
def low_byte(word, OFFSET: tl.constexpr):
    """The last eight bits plus an offset, in float32; a conversion takes the time of eight sums."""
    return ((word & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 - OFFSET)


@triton.jit
def cos_sin_turn(word, dtype: tl.constexpr):
    """cos and sin of the angle 2 pi word / 2^32, for a uint32 word.

    The quadrant is taken off in integers, exactly; the polynomials see at most an eighth of a turn.
    """
    quadrant = (word + 0x20000000) >> 30
    rest = (word - (quadrant << 30)).to(tl.int32, bitcast=True)
    if dtype == tl.float64:
        x = rest.to(dtype) * TURN_32
    else:
        # In two parts of so few bits that both are exact.
        high = ((rest + 128) & -256).to(dtype)
        x = high * TURN_32 + (low_byte(rest + 128, -128.0) * TURN_32 + high * TURN_32_LOW)
    s = x * x
    if dtype == tl.float64:  # fdlibm, k_sin and k_cos
        p = 1.58969099521155010221e-10
        p = p * s - 2.50507602534068634195e-08
        p = p * s + 2.75573137070700676789e-06
        p = p * s - 1.98412698298579493134e-04
        p = p * s + 8.33333333332248946124e-03
        p = p * s - 1.66666666666666324348e-01
        q = -1.13596475577881948265e-11
        q = q * s + 2.08757232129817482790e-09
        q = q * s - 2.75573143513906633035e-07
        q = q * s + 2.48015872894767294178e-05
        q = q * s - 1.38888888888741095749e-03
        q = q * s + 4.16666666666666019037e-02
    else:  # Cephes, sinf and cosf
        p = -1.9515295891e-4
        p = p * s + 8.3321608736e-3
        p = p * s - 1.6666654611e-1
        q = 2.443315711809948e-5
        q = q * s - 1.388731625493765e-3
        q = q * s + 4.166664568298827e-2
    sine = x + x * s * p
    cosine = 1.0 - 0.5 * s + s * s * q
    swapped = (quadrant & 1) != 0
    c = tl.where(swapped, sine, cosine)
    s = tl.where(swapped, cosine, sine)
    # Quadrants 1 and 2 have a negative cosine, 2 and 3 a negative sine.
    return tl.where(((quadrant + 1) & 2) != 0, -c, c), tl.where((quadrant & 2) != 0, -s, s)
