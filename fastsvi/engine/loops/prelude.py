"""What every generated program begins with: mathematics that C++ lacks or has too slowly.

No header of the C++ library is included: parsing ``<cmath>`` takes longer than compiling a small
step. Longer pieces of code are added only if the program uses them.
"""

from __future__ import annotations

from fastsvi.engine.loops import prelude_linear, prelude_noise, prelude_team

# Texts that engine.cuda.prelude builds on as well are public.
_BEGIN = r"""
#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define FMA __builtin_fmaf
"""

STANDARD = r"""
namespace fn {
#define BOTH(name)                                       \
  INLINE float name(float x) { return ::name##f(x); }    \
  INLINE double name(double x) { return ::name(x); }
#define BOTH2(name)                                                        \
  INLINE float name(float x, float y) { return ::name##f(x, y); }          \
  INLINE double name(double x, double y) { return ::name(x, y); }
BOTH(sqrt) BOTH(expm1) BOTH(sin) BOTH(cos) BOTH(tan) BOTH(atan) BOTH(tanh) BOTH(sinh) BOTH(cosh)
BOTH(exp2) BOTH(log2) BOTH(log10)
BOTH(asin) BOTH(acos) BOTH(erf) BOTH(erfc) BOTH(floor) BOTH(ceil) BOTH(nearbyint) BOTH(trunc)
BOTH2(pow) BOTH2(atan2) BOTH2(fmod) BOTH2(copysign)
INLINE double exp(double x) { return ::exp(x); }
INLINE double log(double x) { return ::log(x); }
INLINE double log1p(double x) { return ::log1p(x); }
INLINE double exp_minus(double x) { return ::exp(x); }
INLINE double log1p_unit(double x) { return ::log1p(x); }
template <class T> INLINE T abs(T x) { return x < 0 ? -x : x; }
INLINE float abs(float x) { return ::fabsf(x); }
INLINE double abs(double x) { return ::fabs(x); }
template <class T> INLINE T floor(T x) { return x; }  // of integers
template <class T> INLINE T trunc(T x) { return x; }
template <class T> INLINE T ceil(T x) { return x; }
}  // namespace fn
"""

_EXPONENTIALS = r"""
namespace fn {
#ifdef __FP_FAST_FMAF
// exp and log in float32, to 2 ulp, written so that a loop over them becomes vector instructions
// without a call. Polynomials: Cephes (S. Moshier). Multiplications and additions that must not be
// reordered are explicit fused ones.
INLINE float bits_float(int32_t x) { return __builtin_bit_cast(float, x); }
INLINE int32_t float_bits(float x) { return __builtin_bit_cast(int32_t, x); }
// exp(r) for r between -log(2) / 2 and log(2) / 2: pairs of terms at a time, for shorter chains of
// dependent operations.
INLINE float exp_near(float r) {
  const float z = r * r;
  const float high = FMA(FMA(1.9875691500e-4f, r, 1.3981999507e-3f), z,
                         FMA(8.3334519073e-3f, r, 4.1665795894e-2f));
  return FMA(FMA(high, z, FMA(1.6666665459e-1f, r, 5.0000001201e-1f)), z, r) + 1.0f;
}
INLINE float exp(float argument) {
  float x = argument > 89.0f ? 89.0f : argument;
  x = x < -104.0f ? -104.0f : x;  // 0 from there on; NaN passes
  const float n = ::nearbyintf(x * 1.44269504f);
  const float p = exp_near(FMA(n, 2.12194440e-4f, FMA(n, -0.693359375f, x)));
  // In two steps, for 2^n need not be a normal number.
  const int32_t whole = (int32_t)n, half = whole >> 1;
  return p * bits_float((half + 127) << 23) * bits_float((whole - half + 127) << 23);
}
// Of x up to 0, in fewer operations. The magic number is so large that adding it rounds to a whole
// number, which then stands in the lowest bits: those of 2^(n + 100), which is a normal number
// where 2^n need not be one.
INLINE float exp_minus(float x) {
  const float magic = 0x1.8p23f + 227.0f;
  const float shifted = FMA(x, 1.44269504f, magic), n = shifted - magic;
  const float p = exp_near(FMA(n, 2.12194440e-4f, FMA(n, -0.693359375f, x)));
  const float y = p * bits_float((int32_t)((uint32_t)float_bits(shifted) << 23)) * 0x1p-100f;
  return x < -104.0f ? 0.0f : y;  // NaN passes
}
"""

# Of these, CUDA has none.
NEAR_ONE = r"""
// log(1 + t) + e log(2) for t between sqrt(1/2) - 1 and sqrt(2) - 1.
INLINE float log_near(float t, float e) {
  const float z = t * t;
  const float p = FMA(3.3333331174e-1f, t, -0.5f), q = FMA(2.0000714765e-1f, t, -2.4999993993e-1f);
  const float r = FMA(1.4249322787e-1f, t, -1.6668057665e-1f);
  const float s = FMA(1.1676998740e-1f, t, -1.2420140846e-1f);
  const float u = FMA(7.0376836292e-2f, t, -1.1514610310e-1f);
  const float w = z * z;
  const float y = FMA(FMA(FMA(u, z, s), z, r), w, FMA(q, z, p));
  return FMA(e, 0.693359375f, FMA(e, -2.12194440e-4f, FMA(y, z, t)));
}
// Of x between 0 and 1: x + x^2 times a polynomial of least weighted error, 5e-9 of the result.
INLINE float log1p_unit(float x) {
  const float z = x * x, w = z * z;
  const float low = FMA(FMA(1.969540010e-1f, x, -2.495858735e-1f), z,
                        FMA(3.333051132e-1f, x, -4.999993276e-1f));
  const float high = FMA(FMA(2.020456800e-2f, x, -5.766441464e-2f), z,
                         FMA(1.068055276e-1f, x, -1.535539484e-1f));
  return FMA(FMA(FMA(-3.318468539e-3f, w, high), w, low), z, x);
}
"""

_LOGARITHMS = r"""
INLINE float log(float x) {
  const bool small = x < 1.17549435e-38f;
  const float scaled = small ? x * 33554432.0f : x;
  const int32_t bits = float_bits(scaled);
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  const float t = bits_float(bits - (int32_t)((uint32_t)e << 23)) - 1.0f;
  float y = log_near(t, (float)e - (small ? 25.0f : 0.0f));
  const float special = x == 0 ? -INFINITY : x < 0 ? NAN : x;
  return x > 0 && x < INFINITY ? y : special;
}
// The exponent is that of 1 + x, but x itself enters the mantissa: nothing is lost for small x.
INLINE float log1p(float x) {
  const bool large = x > 0x1p60f;
  const float one = large ? 0.0f : 1.0f, y = large ? x * 0x1p-64f : x;
  const int32_t e = (float_bits(one + y) - 0x3f3504f3) >> 23;
  const float s = bits_float((127 - e) << 23);
  float z = log_near(FMA(y, s, FMA(one, s, -1.0f)), (float)e + (large ? 64.0f : 0.0f));
  z = x < INFINITY ? z : x;
  z = x == -1 ? -INFINITY : z;
  return x < -1 ? NAN : z;
}
#else
INLINE float exp(float x) { return ::expf(x); }
INLINE float exp_minus(float x) { return ::expf(x); }
INLINE float log(float x) { return ::logf(x); }
INLINE float log1p(float x) { return ::log1pf(x); }
INLINE float log1p_unit(float x) { return ::log1pf(x); }
#endif
}  // namespace fn
"""

COMPARED = r"""
namespace fn {
// NaN wins, as in torch.
template <class T> INLINE T larger(T a, T b) { return a > b || a != a ? a : b; }
template <class T> INLINE T smaller(T a, T b) { return a < b || a != a ? a : b; }
INLINE int64_t clamped(int64_t i, int64_t last) { return i < 0 ? 0 : i > last ? last : i; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
// Remainders have the sign of the divisor.
template <class T> INLINE T remainder(T a, T b) {
  const T rest = a % b;
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}
INLINE double remainder(double a, double b) {
  const double rest = ::fmod(a, b);
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}
INLINE float remainder(float a, float b) { return (float)remainder((double)a, (double)b); }
INLINE int64_t divide_down(int64_t a, int64_t b) {
  return a / b - (a % b != 0 && (a % b < 0) != (b < 0));
}
}  // namespace fn
"""

_MEMORY = r"""
namespace fn {
template <class T> INLINE void fill(T* __restrict__ out, int64_t size, T value) {
  for (int64_t i = 0; i < size; ++i) out[i] = value;
}
template <class T> INLINE void copy(const T* from, int64_t size, T* out) {
  __builtin_memmove(out, from, size * sizeof(T));
}
}  // namespace fn
"""

_BASE = _BEGIN + STANDARD + _EXPONENTIALS + NEAR_ONE + _LOGARITHMS + COMPARED + _MEMORY

_GAMMA = r"""
namespace fn {
template <class T> INLINE T lgamma(T x) { int sign; return ::lgamma_r((double)x, &sign); }
}  // namespace fn
"""

DIGAMMA = r"""
namespace fn {
// Recurrence up to 10, then the asymptotic series (Abramowitz and Stegun 6.3.18).
template <class T> INLINE T digamma(T argument) {
  double x = argument, result = 0;
  if (x == 0) return ::copysign(INFINITY, -x);
  if (x < 0) {
    if (x == ::floor(x)) return NAN;
    result = -M_PI / ::tan(M_PI * x);
    x = 1 - x;
  }
  for (; x < 10; x += 1) result -= 1 / x;
  const double y = 1 / (x * x);
  const double tail = 1 / 240. - y * (1 / 132. - y * (691 / 32760. - y * (1 / 12.)));
  const double series = 1 / 12. - y * (1 / 120. - y * (1 / 252. - y * tail));
  return result + ::log(x) - 0.5 / x - y * series;
}

// The second derivative of lgamma, likewise (6.4.12), by the reflection formula below 0.
template <class T> INLINE T trigamma(T argument) {
  double x = argument, result = 0, sign = 1;
  if (x < 0.5) {
    const double s = ::sin(M_PI * x);
    result = -M_PI * M_PI / (s * s);
    x = 1 - x, sign = -1;
  }
  for (; x < 10; x += 1) result += 1 / (x * x);
  const double y = 1 / (x * x);
  const double tail = 1 / 30. - y * (1 / 42. - y * (1 / 30. - y * (5 / 66.)));
  return sign * (result + 1 / x + y / 2 + y / x * (1 / 6. - y * tail));
}
}  // namespace fn
"""

ORDERED = r"""
template <class T> INLINE bool running_before(T a, T b, bool descending) {  // NaN is the largest
  return descending ? (a > b || (a != a && b == b)) : (a < b || (a == a && b != b));
}
"""

# Along the middle one of three axes; sorting by merging, which keeps the order of equals.
_RUNNING = r"""
template <class T>
static void running_sum(T* out, const T* x, int64_t outer, int64_t n, int64_t inner) {
  for (int64_t o = 0; o < outer; ++o, out += n * inner, x += n * inner)
    for (int64_t k = 0; k < n; ++k)
      for (int64_t i = 0; i < inner; ++i)
        out[k * inner + i] = k ? out[(k - 1) * inner + i] + x[k * inner + i] : x[i];
}
template <class T>
static void running_product(T* out, const T* x, int64_t outer, int64_t n, int64_t inner) {
  for (int64_t o = 0; o < outer; ++o, out += n * inner, x += n * inner)
    for (int64_t k = 0; k < n; ++k)
      for (int64_t i = 0; i < inner; ++i)
        out[k * inner + i] = k ? out[(k - 1) * inner + i] * x[k * inner + i] : x[i];
}
template <class T>
static void running_sort(T* out, int64_t* places, const T* x, int64_t outer, int64_t n,
                         int64_t inner, bool descending) {
  int64_t* spare = (int64_t*)__builtin_malloc(2 * n * sizeof(int64_t));
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t i = 0; i < inner; ++i) {
      const T* line = x + o * n * inner + i;
      int64_t *from = spare, *to = spare + n;
      for (int64_t k = 0; k < n; ++k) from[k] = k;
      for (int64_t width = 1; width < n; width *= 2) {
        for (int64_t start = 0; start < n; start += 2 * width) {
          const int64_t middle = fn::least(start + width, n), end = fn::least(start + 2 * width, n);
          int64_t a = start, b = middle;
          for (int64_t k = start; k < end; ++k)
            to[k] = a < middle && (b >= end || !running_before(line[from[b] * inner],
                                                               line[from[a] * inner], descending))
                        ? from[a++]
                        : from[b++];
        }
        int64_t* held = from;
        from = to, to = held;
      }
      for (int64_t k = 0; k < n; ++k) {
        places[(o * n + k) * inner + i] = from[k];
        out[(o * n + k) * inner + i] = line[from[k] * inner];
      }
    }
  __builtin_free(spare);
}
"""

# Giles' approximation (2010), then two steps of Newton's method.
_ERFINV = r"""
namespace fn {
template <class T> INLINE T erfinv(T argument) {
  const double x = argument;
  if (!(x > -1 && x < 1)) return x == 1 ? INFINITY : x == -1 ? -INFINITY : NAN;
  double w = -::log((1 - x) * (1 + x)), p;
  if (w < 5) {
    w -= 2.5, p = 2.81022636e-08;
    p = 3.43273939e-07 + p * w, p = -3.5233877e-06 + p * w, p = -4.39150654e-06 + p * w;
    p = 0.00021858087 + p * w, p = -0.00125372503 + p * w, p = -0.00417768164 + p * w;
    p = 0.246640727 + p * w, p = 1.50140941 + p * w;
  } else {
    w = ::sqrt(w) - 3, p = -0.000200214257;
    p = 0.000100950558 + p * w, p = 0.00134934322 + p * w, p = -0.00367342844 + p * w;
    p = 0.00573950773 + p * w, p = -0.0076224613 + p * w, p = 0.00943887047 + p * w;
    p = 1.00167406 + p * w, p = 2.83297682 + p * w;
  }
  double y = p * x;
  for (int k = 0; k < 2; ++k) {
    // Of the complement in the tails, where erf is 1 to all digits.
    const double gap = x > 0.5 ? (1 - x) - ::erfc(y) : x < -0.5 ? ::erfc(-y) - (1 + x)
                                                                 : ::erf(y) - x;
    y -= gap / (M_2_SQRTPI * ::exp(-y * y));
  }
  return y;
}
}  // namespace fn
"""

# Pieces of code, and the texts of which one in a program calls for them.
_PIECES = [
    (("gamma(",), _GAMMA + DIGAMMA),
    (("erfinv(",), _ERFINV),
    (("running_",), ORDERED + _RUNNING),
    (("matrix_",), prelude_linear.PRODUCTS),
    (("linear_",), prelude_linear.FACTORIZATIONS),
    (("philox_", "subset_"), prelude_noise.NOISE),
    (("subset_",), prelude_noise.SUBSETS),
    (("team_", "shared_"), prelude_team.TEAM),
    (("shared_philox_",), prelude_team.DRAWS),
    (("shared_matrix_",), prelude_team.PRODUCTS),
]


def prelude_for(program: str) -> str:
    """The code that ``program`` builds on."""
    needed = (piece for marks, piece in _PIECES if any(mark in program for mark in marks))
    return "".join([_BASE, *needed])
