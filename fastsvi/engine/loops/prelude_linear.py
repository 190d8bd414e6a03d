"""Linear algebra in C++: products, and factorizations of small matrices."""

# Row-major products by Fortran BLAS, whose matrices are column-major: out' = b' a'. Of each factor
# one stride must be 1; an axis of extent 1 may have any. Products with a vector only read the
# matrix, which a loop does at the speed of the memory, and some libraries do not.
PRODUCTS = r"""
template <class T>
using Gemm = void (*)(const char*, const char*, const int*, const int*, const int*, const T*,
                      const T*, const int*, const T*, const int*, const T*, T*, const int*);
INLINE int leading(int64_t stride, int64_t least) { return stride > least ? stride : least; }
// While it lives, BLAS takes no threads of its own for what this one calls: those would go on
// spinning on the cores that the loops need.
struct matrix_alone {
  int (*set)(int);
  int before;
  matrix_alone(void* address) : set((int (*)(int))address), before(set ? set(1) : 0) {}
  ~matrix_alone() { if (set) set(before); }
};
// The rows of the result lie n apart, or as far as is said.
template <class T>
static void matrix_matrix(void* routine, int m, int n, int k, const T* a, int64_t am, int64_t ak,
                          const T* b, int64_t bk, int64_t bn, T* out, int apart = 0) {
  const T one = 1, zero = 0;
  const bool a_rows = ak == 1 || k == 1, b_rows = bn == 1 || n == 1;
  const int lda = a_rows ? leading(am, k) : leading(ak, m);
  const int ldb = b_rows ? leading(bk, n) : leading(bn, k), ldc = leading(apart, n);
  ((Gemm<T>)routine)(b_rows ? "N" : "T", a_rows ? "N" : "T", &n, &m, &k, &one, b, &ldb, a, &lda,
                     &zero, out, &ldc);
}

template <class T> struct matrix_lanes {
  typedef T Pack __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
  typedef uint64_t Bits __attribute__((vector_size(32)));
  static const int count = 32 / sizeof(T);
};
// The sum over the lanes of each of eight registers.
#if defined(__clang__) || __GNUC__ > 11
#define SHUFFLE __builtin_shufflevector
INLINE void matrix_fold(const matrix_lanes<float>::Pack* s, float* out) {
  typedef matrix_lanes<float>::Pack Pack;
  Pack p[4], q[2];
#pragma GCC unroll 8
  for (int r = 0; r < 4; ++r)
    p[r] = SHUFFLE(s[2 * r], s[2 * r + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
           SHUFFLE(s[2 * r], s[2 * r + 1], 1, 9, 3, 11, 5, 13, 7, 15);
#pragma GCC unroll 8
  for (int r = 0; r < 2; ++r)
    q[r] = SHUFFLE(p[2 * r], p[2 * r + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
           SHUFFLE(p[2 * r], p[2 * r + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  *(Pack*)out = SHUFFLE(q[0], q[1], 0, 1, 2, 3, 8, 9, 10, 11) +
                SHUFFLE(q[0], q[1], 4, 5, 6, 7, 12, 13, 14, 15);
}
INLINE void matrix_fold(const matrix_lanes<double>::Pack* s, double* out) {
  typedef matrix_lanes<double>::Pack Pack;
#pragma GCC unroll 8
  for (int r = 0; r < 8; r += 4) {
    const Pack p = SHUFFLE(s[r], s[r + 1], 0, 4, 2, 6) + SHUFFLE(s[r], s[r + 1], 1, 5, 3, 7);
    const Pack q = SHUFFLE(s[r + 2], s[r + 3], 0, 4, 2, 6) +
                   SHUFFLE(s[r + 2], s[r + 3], 1, 5, 3, 7);
    *(Pack*)(out + r) = SHUFFLE(p, q, 0, 1, 4, 5) + SHUFFLE(p, q, 2, 3, 6, 7);
  }
}
#else
template <class Pack, class T> INLINE void matrix_fold(const Pack* s, T* out) {
  for (int r = 0; r < 8; ++r) {
    T sum = 0;
    for (int lane = 0; lane < matrix_lanes<T>::count; ++lane) sum += s[r][lane];
    out[r] = sum;
  }
}
#endif
// Each row with x, eight rows at a time: x is read once for eight. What is left of a row is at the
// end of a register that begins within what has been summed.
template <class T>
static __attribute__((noinline)) void matrix_rows(int64_t m, int64_t k, const T* a, int64_t lda,
                                                  const T* x, T* __restrict__ out) {
  typedef typename matrix_lanes<T>::Pack Pack;
  typedef typename matrix_lanes<T>::Bits Bits;
  const int64_t lanes = matrix_lanes<T>::count, whole = k / lanes * lanes, last = k - lanes;
  Bits fresh = {};
  for (int64_t i = 0; i < 32; ++i)
    ((unsigned char*)&fresh)[i] = last + i / (int64_t)sizeof(T) < whole ? 0 : 255;
  int64_t row = 0;
  for (; last >= 0 && row + 8 <= m; row += 8) {
    const T* p = a + row * lda;
    Pack s[8] = {};
    for (int64_t j = 0; j < whole; j += lanes) {
      const Pack v = *(const Pack*)(x + j);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) s[r] += v * *(const Pack*)(p + r * lda + j);
    }
    if (whole < k) {
      const Pack v = *(const Pack*)(x + last);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r)
        s[r] += v * (Pack)(fresh & (Bits) * (const Pack*)(p + r * lda + last));
    }
    matrix_fold(s, out + row);
  }
  for (; row < m; ++row) {
    T sum = 0;
    for (int64_t j = 0; j < k; ++j) sum += x[j] * a[row * lda + j];
    out[row] = sum;
  }
}
// The rows weighted by x and added up: W registers, the last of which may overlap the one before,
// hold a row. Of narrow rows several are summed on their own, for sums do not wait for each other.
template <class T, int W>
static __attribute__((noinline)) void matrix_narrow(int64_t m, int64_t k, const T* a, int64_t lda,
                                                    const T* x, int64_t step,
                                                    T* __restrict__ out) {
  typedef typename matrix_lanes<T>::Pack Pack;
  const int64_t lanes = matrix_lanes<T>::count;
  const int U = 8 / W;
  Pack total[W] = {};
  for (int64_t row = 0; row < m;) {  // blocks, so that long sums do not drift
    const int64_t end = fn::least(row + 256, m);
    Pack s[U][W] = {};
    for (; row + U <= end; row += U)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        const T* p = a + (row + u) * lda;
        const T y = x[(row + u) * step];
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w)
          s[u][w] += y * *(const Pack*)(p + (w < W - 1 ? w * lanes : k - lanes));
      }
    for (; row < end; ++row)
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w)
        s[0][w] += x[row * step] *
                   *(const Pack*)(a + row * lda + (w < W - 1 ? w * lanes : k - lanes));
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) total[w] += s[u][w];
  }
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w) *(Pack*)(out + (w < W - 1 ? w * lanes : k - lanes)) = total[w];
}
// The same for rows of any width, eight at a time; blocks of columns stay in the cache.
template <class T>
static void matrix_columns(int64_t m, int64_t k, const T* a, int64_t lda, const T* x, int64_t step,
                           T* __restrict__ out) {
  for (int64_t start = 0; start < k; start += 1024) {
    const int64_t width = fn::least(1024, k - start);
    T* __restrict__ to = out + start;
    fn::fill(to, width, T(0));
    int64_t row = 0;
    for (; row + 8 <= m; row += 8) {
      const T *p = a + row * lda + start, *w = x + row * step;
      const T w0 = w[0], w1 = w[step], w2 = w[2 * step], w3 = w[3 * step], w4 = w[4 * step],
              w5 = w[5 * step], w6 = w[6 * step], w7 = w[7 * step];
#pragma omp simd
      for (int64_t j = 0; j < width; ++j)
        to[j] += ((w0 * p[j] + w1 * p[j + lda]) + (w2 * p[j + 2 * lda] + w3 * p[j + 3 * lda])) +
                 ((w4 * p[j + 4 * lda] + w5 * p[j + 5 * lda]) +
                  (w6 * p[j + 6 * lda] + w7 * p[j + 7 * lda]));
    }
    for (; row < m; ++row) {
      const T* p = a + row * lda + start;
      const T w = x[row * step];
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) to[j] += w * p[j];
    }
  }
}
template <class T>
static void matrix_vector(int m, int k, const T* a, int64_t am, int64_t ak, const T* x,
                          int64_t step, T* out) {
  if (ak == 1 || k == 1) {
    matrix_rows(m, k, a, am, x, out);
  } else {
    matrix_columns(k, m, a, ak, x, step, out);
  }
}
"""

# Row-major, one matrix after the other. What cannot be factored gives NaN, and so a loss that is
# not finite.
FACTORIZATIONS = r"""
template <class T>
static void linear_cholesky(T* __restrict__ out, const T* a, int64_t batch, int64_t n, bool upper) {
  for (int64_t b = 0; b < batch; ++b, a += n * n, out += n * n) {
    const int64_t si = upper ? 1 : n, sj = upper ? n : 1;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        T sum = a[i * si + j * sj];
        for (int64_t k = 0; k < j; ++k) sum -= out[i * si + k * sj] * out[j * si + k * sj];
        out[i * si + j * sj] = i == j ? fn::sqrt(sum) : sum / out[j * si + j * sj];
      }
      for (int64_t j = i + 1; j < n; ++j) out[i * si + j * sj] = 0;
    }
  }
}
// a x = b with a triangular; n rows, m columns of b; (sr, sc): strides of a, (tr, tc): of b and x.
template <class T>
static void linear_triangular(T* __restrict__ x, const T* a, const T* b, int64_t batch, int64_t n,
                              int64_t m, bool upper, bool left, bool unit) {
  // From the right, x a = b is a' x' = b'.
  const int64_t sr = left ? n : 1, sc = left ? 1 : n, tr = left ? m : 1, tc = left ? 1 : n;
  const bool backward = upper == left;
  for (int64_t k = 0; k < batch; ++k, a += n * n, b += n * m, x += n * m) {
    for (int64_t row = 0; row < n; ++row) {
      const int64_t i = backward ? n - 1 - row : row;
      for (int64_t c = 0; c < m; ++c) x[i * tr + c * tc] = b[i * tr + c * tc];
      for (int64_t j = backward ? i + 1 : 0; j < (backward ? n : i); ++j) {
        const T factor = a[i * sr + j * sc];
        for (int64_t c = 0; c < m; ++c) x[i * tr + c * tc] -= factor * x[j * tr + c * tc];
      }
      if (!unit) {
        const T pivot = a[i * sr + i * sc];
        for (int64_t c = 0; c < m; ++c) x[i * tr + c * tc] /= pivot;
      }
    }
  }
}
template <class T> INLINE void linear_exchange(T* x, T* y, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const T held = x[c];
    x[c] = y[c], y[c] = held;
  }
}
// Row by row as LAPACK does: the unit lower and the upper triangle, and exchanged rows from 1.
template <class T>
static void linear_lu(T* __restrict__ a, int32_t* __restrict__ pivots, const T* from,
                      int64_t batch, int64_t n) {
  fn::copy(from, batch * n * n, a);
  for (int64_t b = 0; b < batch; ++b, a += n * n, pivots += n)
    for (int64_t i = 0; i < n; ++i) {
      int64_t best = i;
      for (int64_t r = i + 1; r < n; ++r)
        if (fn::abs(a[r * n + i]) > fn::abs(a[best * n + i])) best = r;
      pivots[i] = (int32_t)best + 1;
      if (best != i) linear_exchange(a + i * n, a + best * n, n);
      for (int64_t r = i + 1; r < n; ++r) {
        const T factor = a[r * n + i] /= a[i * n + i];
        for (int64_t c = i + 1; c < n; ++c) a[r * n + c] -= factor * a[i * n + c];
      }
    }
}
template <class T>
static void linear_lu_solve(T* __restrict__ x, const T* a, const int32_t* pivots, const T* b,
                            int64_t batch, int64_t n, int64_t m, bool adjoint) {
  fn::copy(b, batch * n * m, x);
  for (int64_t k = 0; k < batch; ++k, a += n * n, pivots += n, x += n * m) {
    const int64_t sr = adjoint ? 1 : n, sc = adjoint ? n : 1;
    if (!adjoint)
      for (int64_t i = 0; i < n; ++i)
        if (pivots[i] != i + 1) linear_exchange(x + i * m, x + (pivots[i] - 1) * m, m);
    for (int64_t i = 0; i < n; ++i) {  // the lower triangle; that of the transpose has a diagonal
      for (int64_t j = 0; j < i; ++j)
        for (int64_t c = 0; c < m; ++c) x[i * m + c] -= a[i * sr + j * sc] * x[j * m + c];
      for (int64_t c = 0; c < m && adjoint; ++c) x[i * m + c] /= a[i * n + i];
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      for (int64_t j = i + 1; j < n; ++j)
        for (int64_t c = 0; c < m; ++c) x[i * m + c] -= a[i * sr + j * sc] * x[j * m + c];
      for (int64_t c = 0; c < m && !adjoint; ++c) x[i * m + c] /= a[i * n + i];
    }
    if (adjoint)
      for (int64_t i = n - 1; i >= 0; --i)
        if (pivots[i] != i + 1) linear_exchange(x + i * m, x + (pivots[i] - 1) * m, m);
  }
}
"""
