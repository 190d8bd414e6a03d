"""What every generated program begins with: the few functions that C++ does not have."""

PRELUDE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#define INLINE static inline __attribute__((always_inline))

template <class T> INLINE T sigmoid(T x) { return T(1) / (T(1) + std::exp(-x)); }
// NaN wins, as in torch.
template <class T> INLINE T larger(T a, T b) { return a > b || a != a ? a : b; }
template <class T> INLINE T smaller(T a, T b) { return a < b || a != a ? a : b; }
INLINE int64_t clamped(int64_t i, int64_t last) { return i < 0 ? 0 : i > last ? last : i; }
template <class T> INLINE T lgamma_of(T x) { int sign; return lgamma_r((double)x, &sign); }

// Recurrence up to 10, then the asymptotic series (Abramowitz and Stegun 6.3.18).
template <class T> INLINE T digamma(T argument) {
  double x = argument, result = 0;
  if (x == 0) return std::copysign((T)INFINITY, -argument);
  if (x < 0) {
    if (x == std::floor(x)) return NAN;
    result = -M_PI / std::tan(M_PI * x);
    x = 1 - x;
  }
  for (; x < 10; x += 1) result -= 1 / x;
  const double y = 1 / (x * x);
  const double tail = 1 / 240. - y * (1 / 132. - y * (691 / 32760. - y * (1 / 12.)));
  const double series = 1 / 12. - y * (1 / 120. - y * (1 / 252. - y * tail));
  return result + std::log(x) - 0.5 / x - y * series;
}

// Row-major products by Fortran BLAS, whose matrices are column-major: out' = b' a'. Of each factor
// one stride must be 1; an axis of extent 1 may have any.
template <class T>
using Gemm = void (*)(const char*, const char*, const int*, const int*, const int*, const T*,
                      const T*, const int*, const T*, const int*, const T*, T*, const int*);
template <class T>
using Gemv = void (*)(const char*, const int*, const int*, const T*, const T*, const int*, const T*,
                      const int*, const T*, T*, const int*);
INLINE int leading(int64_t stride, int64_t least) { return stride > least ? stride : least; }
template <class T>
static void matrix_matrix(Gemm<T> gemm, int m, int n, int k, const T* a, int64_t am, int64_t ak,
                          const T* b, int64_t bk, int64_t bn, T* out) {
  const T one = 1, zero = 0;
  const bool a_rows = ak == 1 || k == 1, b_rows = bn == 1 || n == 1;
  const int lda = a_rows ? leading(am, k) : leading(ak, m);
  const int ldb = b_rows ? leading(bk, n) : leading(bn, k);
  gemm(b_rows ? "N" : "T", a_rows ? "N" : "T", &n, &m, &k, &one, b, &ldb, a, &lda, &zero, out, &n);
}
template <class T>
static void matrix_vector(Gemv<T> gemv, int m, int k, const T* a, int64_t am, int64_t ak,
                          const T* x, int64_t stride, T* out) {
  const T one = 1, zero = 0;
  const int step = 1, x_step = stride ? stride : 1;
  const int lda = ak == 1 ? leading(am, k) : leading(ak, m);
  if (ak == 1)
    gemv("T", &k, &m, &one, a, &lda, x, &x_step, &zero, out, &step);
  else
    gemv("N", &m, &k, &one, a, &lda, x, &x_step, &zero, out, &step);
}

// Philox-4x32-10 and Box-Muller, the same words as fastsvi.kernels.philox. Element e of particle p
// of fit f goes to out[f * P * D + p * particle_stride + e * element_stride].
// Written out round by round, and in 32-bit halves where a word becomes a float: compilers
// vectorise this, and neither an inner loop of rounds nor a conversion of unsigned words.
#define ROUND(k0, k1)                                                             \
  {                                                                               \
    const uint64_t a = (uint64_t)x0 * 0xD2511F53u, b = (uint64_t)x2 * 0xCD9E8D57u; \
    const uint32_t y0 = (uint32_t)(b >> 32) ^ x1 ^ (k0);                          \
    const uint32_t y2 = (uint32_t)(a >> 32) ^ x3 ^ (k1);                          \
    x1 = (uint32_t)b, x3 = (uint32_t)a, x0 = y0, x2 = y2;                         \
  }
#define PHILOX(c0, c1, c2, c3)                                                      \
  uint32_t x0 = c0, x1 = c1, x2 = c2, x3 = c3;                                      \
  ROUND(s[0], s[10]) ROUND(s[1], s[11]) ROUND(s[2], s[12]) ROUND(s[3], s[13])       \
  ROUND(s[4], s[14]) ROUND(s[5], s[15]) ROUND(s[6], s[16]) ROUND(s[7], s[17])       \
  ROUND(s[8], s[18]) ROUND(s[9], s[19])

template <class T> INLINE T real(uint32_t word) {  // rounded once, as a conversion would
  return (T)(int32_t)(word >> 16) * (T)65536 + (T)(int32_t)(word & 0xFFFF);
}
template <class T> INLINE T radius(uint32_t word) {
  const T u = real<T>(word) * (T)0x1p-32 + (T)0x1p-33;
  const T most = sizeof(T) == 4 ? (T)(1 - 0x1p-24) : (T)1;
  return std::sqrt((T)-2 * std::log(u < most ? u : most));
}
template <class T> INLINE T angle(uint32_t word) { return real<T>(word) * (T)(2 * M_PI * 0x1p-32); }

template <class T>
static void philox_normal(T* __restrict__ out, const int64_t* key, const int64_t* origin,
                          int64_t fits, int64_t particles, int64_t elements,
                          int64_t particle_stride, int64_t element_stride) {
  uint32_t s[20];  // keys of the rounds
  for (int round = 0; round < 10; ++round) {
    s[round] = (uint32_t)key[0] + round * 0x9E3779B9u;
    s[10 + round] = (uint32_t)key[1] + round * 0xBB67AE85u;
  }
  const uint32_t first = origin[0], step = origin[1], particle = origin[2];
  for (int64_t f = 0; f < fits; ++f) {
    T* fit = out + f * particles * elements;
    const uint32_t fit_word = origin[3] + f;
    if (particle_stride == 1) {  // few elements: each has a counter of its own, in lane 0
      for (int64_t e = 0; e < elements; ++e) {
        T* __restrict__ column = fit + e * element_stride;
        const uint32_t group = first + e;
#pragma omp simd
        for (int32_t p = 0; p < (int32_t)particles; ++p) {
          PHILOX(group, step, particle + p, fit_word)
          column[p] = radius<T>(x0) * std::cos(angle<T>(x1));
        }
      }
      continue;
    }
    for (int64_t p = 0; p < particles; ++p) {
      const uint32_t particle_word = particle + p;
      for (int64_t tile = 0; tile * 1024 < elements; ++tile) {
        T* __restrict__ row = fit + p * particle_stride + tile * 1024;
        const int64_t rest = elements - tile * 1024;
        const int32_t groups = rest < 256 ? rest : 256;
        const uint32_t group = first + tile * 256;
        if (rest <= 256) {
#pragma omp simd
          for (int32_t g = 0; g < groups; ++g) {
            PHILOX(group + g, step, particle_word, fit_word)
            row[g] = radius<T>(x0) * std::cos(angle<T>(x1));
          }
          continue;
        }
        // Sine and cosine of one argument in one loop become a call that is not vectorised.
        T r0[256], r2[256], a0[256], a2[256], lane0[256], lane1[256], lane2[256], lane3[256];
#pragma omp simd
        for (int32_t g = 0; g < 256; ++g) {
          PHILOX(group + g, step, particle_word, fit_word)
          r0[g] = radius<T>(x0), r2[g] = radius<T>(x2), a0[g] = angle<T>(x1), a2[g] = angle<T>(x3);
        }
#pragma omp simd
        for (int32_t g = 0; g < 256; ++g)
          lane0[g] = r0[g] * std::cos(a0[g]), lane2[g] = r2[g] * std::cos(a2[g]);
#pragma omp simd
        for (int32_t g = 0; g < 256; ++g)
          lane1[g] = r0[g] * std::sin(a0[g]), lane3[g] = r2[g] * std::sin(a2[g]);
        const T* lanes[4] = {lane0, lane1, lane2, lane3};
        for (int64_t lane = 0; lane * 256 < rest && lane < 4; ++lane)
          std::copy_n(lanes[lane], std::min<int64_t>(256, rest - lane * 256), row + lane * 256);
      }
    }
  }
}
"""
