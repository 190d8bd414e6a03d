"""Linear algebra in C++: products, and factorizations of small matrices."""

# Row-major products by Fortran BLAS, whose matrices are column-major: out' = b' a'. Of each factor
# one stride must be 1; an axis of extent 1 may have any. Products with a vector only read the
# matrix, which a loop does at the speed of the memory, and some libraries do not.
PRODUCTS = r"""
template <class T>
using Gemm = void (*)(const char*, const char*, const int*, const int*, const int*, const T*,
                      const T*, const int*, const T*, const int*, const T*, T*, const int*);
INLINE int leading(int64_t stride, int64_t least) { return stride > least ? stride : least; }
template <class T>
static void matrix_matrix(void* routine, int m, int n, int k, const T* a, int64_t am, int64_t ak,
                          const T* b, int64_t bk, int64_t bn, T* out) {
  const T one = 1, zero = 0;
  const bool a_rows = ak == 1 || k == 1, b_rows = bn == 1 || n == 1;
  const int lda = a_rows ? leading(am, k) : leading(ak, m);
  const int ldb = b_rows ? leading(bk, n) : leading(bn, k);
  ((Gemm<T>)routine)(b_rows ? "N" : "T", a_rows ? "N" : "T", &n, &m, &k, &one, b, &ldb, a, &lda,
                     &zero, out, &n);
}

// Each row with x: four rows at a time, for x is then read once for four.
template <class T>
static void matrix_rows(int64_t m, int64_t k, const T* a, int64_t lda, const T* x,
                        T* __restrict__ out) {
  typedef T Pack __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
  const int lanes = 32 / sizeof(T);
  for (int64_t row = 0; row < m; row += 4) {
    const int64_t rest = m - row - 1;  // the last rows may be read more than once
    const T *p0 = a + row * lda, *p1 = p0 + fn::least(1, rest) * lda,
            *p2 = p0 + fn::least(2, rest) * lda, *p3 = p0 + fn::least(3, rest) * lda;
    Pack s0 = {}, s1 = {}, s2 = {}, s3 = {};
    int64_t j = 0;
    for (; j + lanes <= k; j += lanes) {
      const Pack v = *(const Pack*)(x + j);
      s0 += v * *(const Pack*)(p0 + j), s1 += v * *(const Pack*)(p1 + j);
      s2 += v * *(const Pack*)(p2 + j), s3 += v * *(const Pack*)(p3 + j);
    }
    T sums[4] = {};
    for (; j < k; ++j)
      sums[0] += x[j] * p0[j], sums[1] += x[j] * p1[j], sums[2] += x[j] * p2[j],
          sums[3] += x[j] * p3[j];
    for (int lane = 0; lane < lanes; ++lane)
      sums[0] += s0[lane], sums[1] += s1[lane], sums[2] += s2[lane], sums[3] += s3[lane];
    for (int64_t r = 0; r < 4 && r <= rest; ++r) out[row + r] = sums[r];
  }
}
// The rows weighted by x and added up, eight at a time; blocks of columns stay in the cache.
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
