"""Philox and what is drawn from it, in CUDA: the words of fastsvi.kernels.philox."""

from __future__ import annotations

from fastsvi.engine.loops import prelude_noise

# One number, wherever it is wanted: the three other words of its counter cost less than a trip to
# memory. `few` says that the draw has no more than 256 elements, each with a counter of its own.
_AT = r"""
template <bool few, class I>
INLINE uint32_t philox_pair(const int64_t* key, const int64_t* origin, int64_t group_offset, I fit,
                            I particle, I element, uint32_t& b) {
  uint32_t s[20];
  philox_keys(key, s);
  const uint32_t group =
      few ? (uint32_t)element : (uint32_t)(element >> 10) * 256 + (uint32_t)(element & 255);
  PHILOX((uint32_t)(origin[0] + group_offset) + group, (uint32_t)origin[1],
         (uint32_t)origin[2] + (uint32_t)particle, (uint32_t)origin[3] + (uint32_t)fit)
  const bool last = !few && element & 512;
  b = last ? x3 : x1;
  return last ? x2 : x0;
}
template <class Kind, class T, bool few, class I>
INLINE T philox_at(const int64_t* key, const int64_t* origin, int64_t group_offset, I fit,
                   I particle, I element) {
  uint32_t b;
  const uint32_t a = philox_pair<few>(key, origin, group_offset, fit, particle, element, b);
  if (few) return Kind::first(a, b);
  T x, y;
  Kind::both(a, b, x, y);
  return element & 256 ? y : x;
}
namespace fn {
template <class T, bool few, class I>
INLINE T normal_at(const int64_t* key, const int64_t* origin, int64_t group_offset, I fit,
                   I particle, I element) {
  return philox_at<philox_normal<T>, T, few>(key, origin, group_offset, fit, particle, element);
}
template <class T, bool few, class I>
INLINE T uniform_at(const int64_t* key, const int64_t* origin, int64_t group_offset, I fit,
                    I particle, I element) {
  return philox_at<philox_uniform<T>, T, few>(key, origin, group_offset, fit, particle, element);
}
}  // namespace fn
"""

NOISE = prelude_noise.WORDS + _AT

# Sorting by counting: how many of the tagged words are less than one's own.
SUBSETS = (
    prelude_noise.MIXED
    + r"""
COLLECTIVE void subset_sorted(int64_t* out, const int64_t* key, const int64_t* origin,
                              int64_t draw, int64_t fits, int64_t size_, int64_t count) {
  __shared__ uint32_t words[1024];
  const int size = (int)size_;
  uint32_t s[20];
  philox_keys(key, s);
  for (place_t f = BLOCK; f < (place_t)fits; f += BLOCKS) {
#pragma unroll 1
    for (int e = threadIdx.x; e < size; e += THREADS) {
      PHILOX((uint32_t)(size > 256 ? e % 256 : e), (uint32_t)origin[1],
             (uint32_t)(origin[2] + draw), (uint32_t)(origin[3] + f))
      const int lane = size > 256 ? e / 256 : 0;
      words[e] = lane == 0 ? x0 : lane == 1 ? x1 : lane == 2 ? x2 : x3;
    }
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < size; e += THREADS) {
      const uint32_t own = words[e];
      int below = 0;
      for (int k = 0; k < size; ++k) below += words[k] < own || (words[k] == own && k < e);
      if (below < (int)count) out[f * (place_t)count + below] = e;
    }
    __syncthreads();
  }
}
COLLECTIVE void subset_walked(int64_t* out, const int64_t* key, const int64_t* origin,
                              int64_t draw, int64_t fits, int64_t size, int64_t count,
                              int64_t rows, int64_t columns) {
  uint32_t keys[8];
  place_t known = -1;  // the fit of these keys
  EACH(i, fits * count) {
    const place_t f = i / (place_t)count, k = i % (place_t)count;
    if (f != known) subset_keys(keys, key, origin, draw, f);
    known = f;
    out[i] = subset_end(keys, k, size, rows, columns);
  }
}
"""
)
