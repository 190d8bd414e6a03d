"""What every generated CUDA program begins with.

NVRTC compiles it without any header, and g++ with the shim of tests/engine/cuda. The emitter
defines, before it:

- ``THREADS``: threads of a block, a literal, whole warps;
- ``RANK``, ``TEAM``: this thread's number in its team and the size of the team, which is a block or
  the whole grid; ``TEAM_IS_BLOCK`` says which.

Routines that stand for a call of the native loops have the names and parameters that they have
there. Every thread of the team calls them with the same arguments, and they divide the work. What
they write may be read after the next barrier of the team. If they need a barrier themselves it is
that of a block, which serves in both forms as long as all threads of a block do the same.
"""

from __future__ import annotations

from fastsvi.engine.cuda import prelude_linear, prelude_noise
from fastsvi.engine.loops import prelude

_BEGIN = r"""
#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#define INT64_C(x) x##LL
#define INT64_MIN (-9223372036854775807LL - 1)
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#define M_PI 3.14159265358979323846
#endif

#define INLINE static __device__ __forceinline__
#define COLLECTIVE static __device__
#define FMA fmaf
// The CPU's polynomials for the radius and the angle of a normal are those to take.
#define __FP_FAST_FMAF 1

// Indices: 64-bit ones cost several instructions, and what one block works on is small.
#if TEAM_IS_BLOCK
typedef int place_t;
#define BLOCK 0
#define BLOCKS 1
#else
typedef int64_t place_t;
#define BLOCK ((place_t)blockIdx.x)
#define BLOCKS ((place_t)gridDim.x)
#endif
#define EACH(i, size) for (place_t i = RANK; i < (place_t)(size); i += TEAM)
#define WARP ((place_t)(RANK) / 32)
#define WARPS ((place_t)(TEAM) / 32)
#define LANE ((int)(threadIdx.x % 32))
"""

# CUDA's own exponentials and logarithms are right to 2 ulp. Those of NEAR_ONE it has not: the
# logarithms that the native loops share with the noise.
_FLOATS = (
    r"""
namespace fn {
INLINE float bits_float(int32_t x) { return __int_as_float(x); }
INLINE int32_t float_bits(float x) { return __float_as_int(x); }
INLINE float exp(float x) { return ::expf(x); }
INLINE float exp_minus(float x) { return ::expf(x); }
INLINE float log(float x) { return ::logf(x); }
INLINE float log1p(float x) { return ::log1pf(x); }
"""
    + prelude.NEAR_ONE
    + "}  // namespace fn\n"
)

# Not unrolled: a thread has one element or two, which the compiler cannot know.
_MEMORY = r"""
namespace fn {
template <class T> INLINE void fill(T* __restrict__ out, int64_t size, T value) {
#pragma unroll 1
  EACH(i, size) out[i] = value;
}
template <class T> INLINE void copy(const T* __restrict__ from, int64_t size,
                                    T* __restrict__ out) {
#pragma unroll 1
  EACH(i, size) out[i] = from[i];
}
}  // namespace fn
"""

# Over neighbouring lanes of a warp, always in the same order: two runs give the same bits.
_LANES = r"""
struct by_sum {
  template <class T> INLINE T start() { return T(0); }
  template <class T> INLINE T join(T a, T b) { return (T)(a + b); }
};
struct by_product {
  template <class T> INLINE T start() { return T(1); }
  template <class T> INLINE T join(T a, T b) { return (T)(a * b); }
};
struct by_larger {
  template <class T> INLINE T join(T a, T b) { return fn::larger(a, b); }
};
struct by_smaller {
  template <class T> INLINE T join(T a, T b) { return fn::smaller(a, b); }
};

// What another lane of the warp holds.
#define SHUFFLES(T, Word)                                                                      \
  INLINE T lane_across(T x, int mask) { return (T)__shfl_xor_sync(0xFFFFFFFFu, (Word)x, mask); } \
  INLINE T lane_before(T x, int by) { return (T)__shfl_up_sync(0xFFFFFFFFu, (Word)x, by); }      \
  INLINE T lane_at(T x, int lane) { return (T)__shfl_sync(0xFFFFFFFFu, (Word)x, lane); }
SHUFFLES(float, float) SHUFFLES(double, double) SHUFFLES(int64_t, int64_t) SHUFFLES(int32_t, int)
SHUFFLES(int16_t, int) SHUFFLES(int8_t, int) SHUFFLES(uint8_t, int) SHUFFLES(bool, int)

// Over W lanes; the same in all of them, for a + b is b + a.
template <class Combine, int W, class T> INLINE T lanes_joined(T x) {
#pragma unroll
  for (int d = W / 2; d > 0; d /= 2) x = Combine::join(x, lane_across(x, d));
  return x;
}
namespace fn {
template <int W, class T> INLINE T lanes_sum(T x) { return lanes_joined<by_sum, W>(x); }
template <int W, class T> INLINE T lanes_product(T x) { return lanes_joined<by_product, W>(x); }
template <int W, class T> INLINE T lanes_larger(T x) { return lanes_joined<by_larger, W>(x); }
template <int W, class T> INLINE T lanes_smaller(T x) { return lanes_joined<by_smaller, W>(x); }
}  // namespace fn
#define LANES
"""

# Along the middle one of three axes. A line is done by one thread, or by the lanes of a warp, 32
# elements at a time; whichever is quicker. Sorting counts for each element those before it: that
# takes no memory and no barrier, but n^2 comparisons, so the emitter refuses long lines.
_RUNNING = r"""
template <class Combine, class T>
COLLECTIVE void running(T* __restrict__ out, const T* __restrict__ x, int64_t outer, int64_t n_,
                        int64_t inner_) {
  const place_t n = n_, inner = inner_, lines = outer * inner;
  if ((lines + TEAM - 1) / TEAM * n <= (lines + WARPS - 1) / WARPS * ((n + 31) / 32) * 8) {
    EACH(line, lines) {
      const place_t start = line / inner * n * inner + line % inner;
      T sum = x[start];
      out[start] = sum;
      for (place_t k = 1; k < n; ++k) {
        sum = Combine::join(sum, x[start + k * inner]);
        out[start + k * inner] = sum;
      }
    }
    return;
  }
  for (place_t line = WARP; line < lines; line += WARPS) {
    const place_t start = line / inner * n * inner + line % inner;
    T before = Combine::template start<T>();
    for (place_t first = 0; first < n; first += 32) {
      const place_t k = first + LANE;
      T sum = k < n ? x[start + k * inner] : Combine::template start<T>();
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const T other = lane_before(sum, d);
        if (LANE >= d) sum = Combine::join(other, sum);
      }
      sum = Combine::join(before, sum);
      if (k < n) out[start + k * inner] = sum;
      before = lane_at(sum, 31);
    }
  }
}
template <class T>
INLINE void running_sum(T* out, const T* x, int64_t outer, int64_t n, int64_t inner) {
  running<by_sum>(out, x, outer, n, inner);
}
template <class T>
INLINE void running_product(T* out, const T* x, int64_t outer, int64_t n, int64_t inner) {
  running<by_product>(out, x, outer, n, inner);
}
template <class T>
COLLECTIVE void running_sort(T* __restrict__ out, int64_t* __restrict__ places,
                             const T* __restrict__ x, int64_t outer, int64_t n_, int64_t inner_,
                             bool descending) {
  const place_t n = n_, inner = inner_;
  EACH(i, outer * n * inner) {
    const place_t start = i / (n * inner) * n * inner + i % inner, own = i / inner % n;
    const T value = x[i];
    place_t rank = 0;
    for (place_t k = 0; k < n; ++k) {
      const T other = x[start + k * inner];
      rank += running_before(other, value, descending) ||
              (k < own && !running_before(value, other, descending));
    }
    out[start + rank * inner] = value, places[start + rank * inner] = own;
  }
}
"""

_OWN = r"""
namespace fn {
INLINE float lgamma(float x) { return ::lgammaf(x); }
INLINE double lgamma(double x) { return ::lgamma(x); }
INLINE float erfinv(float x) { return ::erfinvf(x); }
INLINE double erfinv(double x) { return ::erfinv(x); }
}  // namespace fn
"""

_BASE = "".join(
    [_BEGIN, prelude.STANDARD, _FLOATS, prelude.COMPARED, _OWN, _MEMORY, _LANES],
)

# Pieces of code, and the texts of which one in a program calls for them.
_PIECES = [
    (("gamma(",), prelude.DIGAMMA),
    (("running_",), prelude.ORDERED + _RUNNING),
    (("linear_",), prelude_linear.FACTORIZATIONS),
    (("normal_at<", "uniform_at<", "subset_"), prelude_noise.NOISE),
    (("subset_",), prelude_noise.SUBSETS),
]


def prelude_for(program: str) -> str:
    """The code that ``program``, which is CUDA C++, builds on."""
    needed = (piece for marks, piece in _PIECES if any(mark in program for mark in marks))
    return "".join([_BASE, *needed])
