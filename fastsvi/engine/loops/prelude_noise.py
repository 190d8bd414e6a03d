"""Philox and what is drawn from it, in C++: the words of fastsvi.kernels.philox."""

# Written out round by round, and in 32-bit halves where a word becomes a float: compilers
# vectorise this, and neither an inner loop of rounds nor a conversion of unsigned words. This and
# MIXED serve engine.cuda.prelude_noise as well.
WORDS = r"""
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
template <class T> INLINE T unit(uint32_t word) {
  const T u = real<T>(word) * (T)0x1p-32 + (T)0x1p-33;
  const T most = sizeof(T) == 4 ? (T)(1 - 0x1p-24) : (T)1;
  return u < most ? u : most;
}
// Radius and angle of Box-Muller. Near 1 the logarithm is that of the distance from 1, which the
// complement of the word holds exactly.
INLINE double radius(uint32_t word, double) { return ::sqrt(-2 * ::log(unit<double>(word))); }
INLINE void turn(uint32_t word, double& cosine, double& sine) {
  const double angle = real<double>(word) * (2 * M_PI * 0x1p-32);
  cosine = ::cos(angle), sine = ::sin(angle);
}
#ifdef __FP_FAST_FMAF
INLINE float radius(uint32_t word, float) {
  const bool upper = (int32_t)word < 0;  // u >= 1/2
  const float u = FMA(real<float>(upper ? ~word : word), 0x1p-32f, 0x1p-33f);  // or 1 - u
  const float below = 1.0f - u;  // read only where it is above 1/2, so about exact
  const int32_t bits = fn::float_bits(upper ? below : u), e = (bits - 0x3f3504f3) >> 23;
  const float m = fn::bits_float(bits - (int32_t)((uint32_t)e << 23)) - 1.0f;
  const bool near = upper && e == 0;
  return ::sqrtf(-2.0f * fn::log_near(near ? -u : m, (float)e));
}
// The nearest quarter of a turn is exact in integers; polynomials (Cephes) do the rest.
INLINE void turn(uint32_t word, float& cosine, float& sine) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const float x = (float)(int32_t)(word - (quarter << 30)) * (float)(2 * M_PI * 0x1p-32);
  const float z = x * x;
  float s = FMA(-1.9515295891e-4f, z, 8.3321608736e-3f);
  s = FMA(s, z, -1.6666654611e-1f), s = FMA(s * z, x, x);
  float c = FMA(2.443315711809948e-5f, z, -1.388731625493765e-3f);
  c = FMA(c, z, 4.166664568298827e-2f), c = FMA(c, z, -0.5f), c = FMA(c, z, 1.0f);
  const bool odd = quarter & 1;
  const float a = odd ? s : c, b = odd ? c : s;
  const int32_t signs = (int32_t)quarter;  // cosine: - + at 1, 2; sine: - at 2, 3
  cosine = fn::bits_float(fn::float_bits(a) ^ (((signs + 1) & 2) << 30));
  sine = fn::bits_float(fn::float_bits(b) ^ ((signs & 2) << 30));
}
#else
INLINE float radius(uint32_t word, float) { return (float)radius(word, 0.0); }
INLINE void turn(uint32_t word, float& cosine, float& sine) {
  const float angle = real<float>(word) * (float)(2 * M_PI * 0x1p-32);
  cosine = ::cosf(angle), sine = ::sinf(angle);
}
#endif

// What is made of the words: normals, or uniform numbers between 0 and 1.
template <class T> struct philox_normal {
  INLINE T first(uint32_t a, uint32_t b) {
    T cosine, sine;
    turn(b, cosine, sine);
    return radius(a, T()) * cosine;
  }
  INLINE void both(uint32_t a, uint32_t b, T& x, T& y) {
    T cosine, sine;
    const T r = radius(a, T());
    turn(b, cosine, sine);
    x = r * cosine, y = r * sine;
  }
};
template <class T> struct philox_uniform {
  INLINE T first(uint32_t a, uint32_t b) { return unit<T>(a); }
  INLINE void both(uint32_t a, uint32_t b, T& x, T& y) { x = unit<T>(a), y = unit<T>(b); }
};

INLINE void philox_keys(const int64_t* key, uint32_t* s) {
  for (int round = 0; round < 10; ++round) {
    s[round] = (uint32_t)key[0] + round * 0x9E3779B9u;
    s[10 + round] = (uint32_t)key[1] + round * 0xBB67AE85u;
  }
}

"""

# Element e of particle p of fit f goes to f * P * D + p * particle_stride + e * element_stride.
_DRAW = r"""
// Of few elements, up to 256, each has a counter of its own and is in lane 0. By columns: particles
// are neighbours in memory.
template <bool few, bool columns, class Kind, class T>
static void philox_draw(T* __restrict__ out, const int64_t* key, const int64_t* origin,
                        int64_t group_offset, int64_t fits, int64_t particles, int64_t elements,
                        int64_t particle_stride, int64_t element_stride) {
  uint32_t s[20];
  philox_keys(key, s);
  const uint32_t first = origin[0] + group_offset, step = origin[1], particle = origin[2];
  for (int64_t f = 0; f < fits; ++f) {
    T* fit = out + f * particles * elements;
    const uint32_t fit_word = origin[3] + f;
    if constexpr (columns) {
      for (int64_t e = 0; e < elements; ++e) {
        T* __restrict__ column = fit + e * element_stride;
        const uint32_t group = first + e;
#pragma omp simd
        for (int32_t p = 0; p < (int32_t)particles; ++p) {
          PHILOX(group, step, particle + p, fit_word)
          column[p] = Kind::first(x0, x1);
        }
      }
    } else if constexpr (few) {
      for (int64_t p = 0; p < particles; ++p) {
        T* __restrict__ row = fit + p * particle_stride;
        const uint32_t particle_word = particle + p;
#pragma omp simd
        for (int32_t g = 0; g < (int32_t)elements; ++g) {
          PHILOX(first + g, step, particle_word, fit_word)
          row[g] = Kind::first(x0, x1);
        }
      }
    } else {
      for (int64_t p = 0; p < particles; ++p) {
        T* __restrict__ row = fit + p * particle_stride;
        const uint32_t particle_word = particle + p;
        for (int64_t tile = 0; tile * 1024 < elements; ++tile, row += 1024) {
          const int64_t rest = elements - tile * 1024;
          const uint32_t group = first + tile * 256;
          T last[1024];
          T* __restrict__ to = rest >= 1024 ? row : last;
#pragma omp simd
          for (int32_t g = 0; g < 256; ++g) {
            PHILOX(group + g, step, particle_word, fit_word)
            Kind::both(x0, x1, to[g], to[g + 256]);
            Kind::both(x2, x3, to[g + 512], to[g + 768]);
          }
          if (rest < 1024) fn::copy(last, rest, row);
        }
      }
    }
  }
}
"""

NOISE = WORDS + _DRAW

# The subsets of fastsvi.kernels.subsample: sorted words, or a Feistel network on a grid of
# rows * columns cells whose few points beyond the size walk on to the end of their cycle.
MIXED = r"""
INLINE uint32_t subset_hash(uint32_t w) {
  w = (w ^ (w >> 16)) * 0x7FEB352Du;
  w = (w ^ (w >> 15)) * 0x846CA68Bu;
  return w ^ (w >> 16);
}
INLINE void subset_keys(uint32_t* keys, const int64_t* key, const int64_t* origin, int64_t draw,
                        int64_t fit) {
  uint32_t s[20];
  philox_keys(key, s);
  for (uint32_t g = 0; g < 2; ++g) {
    PHILOX(g, (uint32_t)origin[1], (uint32_t)(origin[2] + draw), (uint32_t)(origin[3] + fit))
    keys[g] = x0, keys[2 + g] = x1, keys[4 + g] = x2, keys[6 + g] = x3;
  }
}
INLINE int64_t subset_end(const uint32_t* keys, int64_t point, int64_t size, int64_t rows,
                          int64_t columns) {
  do {
    uint64_t row = point / columns, column = point % columns;
    for (int i = 0; i < 8; i += 2) {
      row += ((uint64_t)subset_hash((uint32_t)column + keys[i]) * rows) >> 32;
      row -= row >= (uint64_t)rows ? rows : 0;
      column += ((uint64_t)subset_hash((uint32_t)row + keys[i + 1]) * columns) >> 32;
      column -= column >= (uint64_t)columns ? columns : 0;
    }
    point = row * columns + column;
  } while (point >= size);
  return point;
}
"""

SUBSETS = (
    MIXED
    + r"""
static void subset_sorted(int64_t* out, const int64_t* key, const int64_t* origin, int64_t draw,
                          int64_t fits, int64_t size, int64_t count) {
  uint32_t s[20];
  philox_keys(key, s);
  for (int64_t f = 0; f < fits; ++f) {
    int64_t tagged[1024], spare[1024];
    const bool whole = size > 256;
    for (int64_t g = 0; g < (whole ? 256 : size); ++g) {
      PHILOX((uint32_t)g, (uint32_t)origin[1], (uint32_t)(origin[2] + draw),
             (uint32_t)(origin[3] + f))
      const uint32_t words[4] = {x0, x1, x2, x3};
      for (int lane = 0; lane < (whole ? 4 : 1); ++lane)
        if (g + lane * 256 < size)
          tagged[g + lane * 256] = (int64_t)words[lane] * 1024 + g + lane * 256;
    }
    int64_t *from = tagged, *to = spare;
    for (int64_t width = 1; width < size; width *= 2) {  // merge sort
      for (int64_t start = 0; start < size; start += 2 * width) {
        int64_t i = start, middle = fn::least(start + width, size), j = middle;
        const int64_t end = fn::least(start + 2 * width, size);
        for (int64_t k = start; k < end; ++k)
          to[k] = i < middle && (j >= end || from[i] <= from[j]) ? from[i++] : from[j++];
      }
      int64_t* other = from;
      from = to, to = other;
    }
    for (int64_t k = 0; k < count; ++k) out[f * count + k] = from[k] % 1024;
  }
}
static void subset_walked(int64_t* out, const int64_t* key, const int64_t* origin, int64_t draw,
                          int64_t fits, int64_t size, int64_t count, int64_t rows,
                          int64_t columns) {
  for (int64_t f = 0; f < fits; ++f) {
    uint32_t keys[8];
    subset_keys(keys, key, origin, draw, f);
    for (int64_t k = 0; k < count; ++k)
      out[f * count + k] = subset_end(keys, k, size, rows, columns);
  }
}
"""
)
