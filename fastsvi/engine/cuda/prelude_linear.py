"""Linear algebra in CUDA: factorizations of small matrices, and systems of equations."""

from __future__ import annotations

# As those of the native loops: row-major, one matrix after the other; what cannot be factored gives
# NaN. A crew works on a matrix: a block if there is only one, else a warp, or a single thread if
# there are enough matrices for all. Within a crew a step never writes what it reads: diagonals are
# divided by, or rooted, in a last pass, so that one or two barriers a column do.
FACTORIZATIONS = r"""
struct linear_thread {
  INLINE place_t first() { return RANK; }
  INLINE place_t count() { return TEAM; }
  INLINE int rank() { return 0; }
  INLINE int size() { return 1; }
  INLINE void meet() {}
};
struct linear_warp {
  INLINE place_t first() { return WARP; }
  INLINE place_t count() { return WARPS; }
  INLINE int rank() { return LANE; }
  INLINE int size() { return 32; }
  INLINE void meet() { __syncwarp(); }
};
struct linear_block {
  INLINE place_t first() { return BLOCK; }
  INLINE place_t count() { return BLOCKS; }
  INLINE int rank() { return (int)threadIdx.x; }
  INLINE int size() { return THREADS; }
  INLINE void meet() { __syncthreads(); }
};
#define CREW(i, start, end) for (int i = (start) + Crew::rank(); i < (end); i += Crew::size())
// Work of a column counts: small matrices are not worth a crew's barriers.
#define BY_CREW(routine, batch, n, work, ...)                                      \
  if ((n) <= 3 || (batch) >= TEAM)                                                 \
    routine<linear_thread>(__VA_ARGS__);                                           \
  else if ((batch) > 1 || (work) <= 64)                                            \
    routine<linear_warp>(__VA_ARGS__);                                             \
  else                                                                             \
    routine<linear_block>(__VA_ARGS__);

template <class Crew, class T>
COLLECTIVE void linear_cholesky_by(T* __restrict__ out, const T* __restrict__ a, place_t batch,
                                   int n, bool upper) {
  const int si = upper ? 1 : n, sj = upper ? n : 1;
  for (place_t b = Crew::first(); b < batch; b += Crew::count()) {
    const T* from = a + b * n * n;
    T* __restrict__ to = out + b * n * n;
    for (int j = 0; j < n; ++j) {
      CREW(i, j, n) {
        T sum = from[i * si + j * sj];
        for (int k = 0; k < j; ++k) sum -= to[i * si + k * sj] * to[j * si + k * sj];
        to[i * si + j * sj] = sum;
        if (i > j) to[j * si + i * sj] = 0;
      }
      Crew::meet();
      const T root = fn::sqrt(to[j * si + j * sj]);
      CREW(i, j + 1, n) to[i * si + j * sj] /= root;
      Crew::meet();
    }
    CREW(i, 0, n) to[i * n + i] = fn::sqrt(to[i * n + i]);
    Crew::meet();
  }
}
template <class T>
INLINE void linear_cholesky(T* out, const T* a, int64_t batch, int64_t n, bool upper) {
  BY_CREW(linear_cholesky_by, batch, n, n, out, a, (place_t)batch, (int)n, upper)
}
// x becomes the solution of a x = b, which it is at first: a is triangular, n rows, m columns of
// x; (sr, sc): strides of a, (tr, tc): of x.
template <class Crew, class T>
INLINE void linear_substitute(T* __restrict__ x, const T* __restrict__ a, int n, int m, int sr,
                              int sc, int tr, int tc, bool backward, bool unit) {
  for (int step = 0; step < n - 1; ++step) {
    const int i = backward ? n - 1 - step : step, left = n - 1 - step;
    const T scale = unit ? T(1) : 1 / a[i * sr + i * sc];
    CREW(place, 0, left * m) {
      const int r = backward ? place / m : i + 1 + place / m, c = place % m;
      x[r * tr + c * tc] -= a[r * sr + i * sc] * (x[i * tr + c * tc] * scale);
    }
    Crew::meet();
  }
  if (unit) return;
  CREW(place, 0, n * m) {
    const int r = place / m;
    x[r * tr + place % m * tc] /= a[r * sr + r * sc];
  }
  Crew::meet();
}
template <class Crew, class T>
COLLECTIVE void linear_triangular_by(T* __restrict__ x, const T* __restrict__ a,
                                     const T* __restrict__ b, place_t batch, int n, int m,
                                     bool upper, bool left, bool unit) {
  // From the right, x a = b is a' x' = b'.
  const int sr = left ? n : 1, sc = left ? 1 : n, tr = left ? m : 1, tc = left ? 1 : n;
  for (place_t k = Crew::first(); k < batch; k += Crew::count()) {
    CREW(i, 0, n * m) x[k * n * m + i] = b[k * n * m + i];
    Crew::meet();
    linear_substitute<Crew>(x + k * n * m, a + k * n * n, n, m, sr, sc, tr, tc, upper == left,
                            unit);
  }
}
template <class T>
INLINE void linear_triangular(T* x, const T* a, const T* b, int64_t batch, int64_t n, int64_t m,
                              bool upper, bool left, bool unit) {
  BY_CREW(linear_triangular_by, batch, n, n * m, x, a, b, (place_t)batch, (int)n, (int)m, upper,
          left, unit)
}
// Row by row as LAPACK does: the unit lower and the upper triangle, and exchanged rows from 1. The
// lower one is divided by the diagonal in the end.
template <class Crew, class T>
COLLECTIVE void linear_lu_by(T* __restrict__ out, int32_t* __restrict__ pivots,
                             const T* __restrict__ from, place_t batch, int n) {
  for (place_t b = Crew::first(); b < batch; b += Crew::count()) {
    T* __restrict__ a = out + b * n * n;
    CREW(i, 0, n * n) a[i] = from[b * n * n + i];
    Crew::meet();
    for (int i = 0; i < n; ++i) {
      int best = i;  // found by each for itself
      for (int r = i + 1; r < n; ++r)
        if (fn::abs(a[r * n + i]) > fn::abs(a[best * n + i])) best = r;
      if (Crew::rank() == 0) pivots[b * n + i] = best + 1;
      Crew::meet();
      if (best != i) {
        CREW(c, 0, n) {
          const T held = a[i * n + c];
          a[i * n + c] = a[best * n + c], a[best * n + c] = held;
        }
        Crew::meet();
      }
      const int side = n - 1 - i;
      const T scale = 1 / a[i * n + i];
      CREW(place, 0, side * side) {
        const int r = i + 1 + place / side, c = i + 1 + place % side;
        a[r * n + c] -= a[r * n + i] * scale * a[i * n + c];
      }
      Crew::meet();
    }
    CREW(place, 0, n * n) {
      const int r = place / n, c = place % n;
      if (r > c) a[place] /= a[c * n + c];
    }
    Crew::meet();
  }
}
template <class T>
INLINE void linear_lu(T* a, int32_t* pivots, const T* from, int64_t batch, int64_t n) {
  BY_CREW(linear_lu_by, batch, n, n * n, a, pivots, from, (place_t)batch, (int)n)
}
template <class Crew, class T>
COLLECTIVE void linear_lu_solve_by(T* __restrict__ out, const T* __restrict__ factors,
                                   const int32_t* __restrict__ pivots, const T* __restrict__ from,
                                   place_t batch, int n, int m, bool adjoint) {
  for (place_t k = Crew::first(); k < batch; k += Crew::count()) {
    const T* a = factors + k * n * n;
    const int32_t* exchanged = pivots + k * n;
    T* __restrict__ x = out + k * n * m;
    // Rows are exchanged column by column, each by one thread.
    CREW(c, 0, m) {
      for (int i = 0; i < n; ++i) x[i * m + c] = from[k * n * m + i * m + c];
      for (int i = 0; i < n && !adjoint; ++i) {
        const int other = exchanged[i] - 1;
        const T held = x[i * m + c];
        x[i * m + c] = x[other * m + c], x[other * m + c] = held;
      }
    }
    Crew::meet();
    // The lower triangle, then the upper one; of the transpose, the diagonal is the first's.
    const int sr = adjoint ? 1 : n, sc = adjoint ? n : 1;
    linear_substitute<Crew>(x, a, n, m, sr, sc, m, 1, false, !adjoint);
    linear_substitute<Crew>(x, a, n, m, sr, sc, m, 1, true, adjoint);
    if (adjoint) {
      CREW(c, 0, m)
        for (int i = n - 1; i >= 0; --i) {
          const int other = exchanged[i] - 1;
          const T held = x[i * m + c];
          x[i * m + c] = x[other * m + c], x[other * m + c] = held;
        }
      Crew::meet();
    }
  }
}
template <class T>
INLINE void linear_lu_solve(T* x, const T* a, const int32_t* pivots, const T* b, int64_t batch,
                            int64_t n, int64_t m, bool adjoint) {
  BY_CREW(linear_lu_solve_by, batch, n, n * m, x, a, pivots, b, (place_t)batch, (int)n, (int)m,
          adjoint)
}
"""
