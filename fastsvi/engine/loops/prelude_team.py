"""A team of threads, in C++, and what the threads of a step divide among them.

Why threads of our own: OpenMP waits at the end of a region for every thread of it, also for those
that have yet to wake up or to be given a core when all work is done; beside another busy process a
step then takes many times as long. macOS has no OpenMP. And where products of BLAS and our loops
alternate, two teams would keep spinning on the same cores. Here a thread that comes late finds its
share taken: the one that called waits for what is being worked on, and for nothing else.
"""

# Work is cut into parts whose number depends on the sizes alone, and each part does what it does
# whoever does it: results have the same bits for any number of threads.
TEAM = r"""
typedef void (*Part)(const void* with, int64_t part);
typedef void (*Share)(int64_t threads, int64_t parts, Part part, const void* with);
struct Team {
  int64_t threads;
  Share share;         // team_share of the one library whose threads serve the whole process
  int (*single)(int);  // sets how many threads BLAS uses for calls from this one
};
template <class Body>  // compiled once for both uses
static __attribute__((noinline)) void team_part(const void* body, int64_t part) {
  (*(const Body*)body)(part);
}
// Does body(0), ..., body(parts - 1).
template <class Body> static void team_each(const Team& team, int64_t parts, const Body& body) {
  if (team.threads > 1 && parts > 1)
    return team.share(team.threads, parts, team_part<Body>, &body);
  for (int64_t part = 0; part < parts; ++part) team_part<Body>(&body, part);
}
"""

# The library of the threads: compiled once, and only where there are several.
MEMBERS = r"""
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <time.h>

typedef void (*Part)(const void* with, int64_t part);

namespace members {
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
#if defined(__x86_64__)
static inline void pause() { __builtin_ia32_pause(); }
#elif defined(__aarch64__)
static inline void pause() { __asm__ volatile("yield"); }
#else
static inline void pause() {}
#endif
// One turn of waiting. On a crowded machine the one waited for may need this very core.
static inline void wait(int turn) {
  if (turn % 64 == 63) {
    sched_yield();
  } else {
    pause();
  }
}
const int most = 256;
const int64_t inside = 0xFFFF, open = 0x10000, generation = 0x20000;
const int patience = 2000;  // turns of waiting, some 20 to 80 us, before a thread goes to sleep
// The parts that are left of each thread's share; on cache lines of their own.
struct alignas(64) Left {
  int64_t next, end;
};
static Left left[most];
static Part part;
static const void* with;
static int64_t threads;
// Of the work under way: how many members are at it, whether more may join, and its number.
alignas(64) static int64_t gate = 0;
alignas(64) static int64_t busy = 0;
static int64_t count = 0, asleep = 0;  // members beside the caller, and those that sleep
static int64_t alone_until = 0;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t called = PTHREAD_COND_INITIALIZER;

// First the own share, then what others have not come to. Neighbouring parts stay with a thread:
// what it has written to its cache in one nest, it reads in the next.
static void take(int64_t rank) {
  for (int64_t k = 0; k < threads; ++k) {
    Left& mine = left[(rank + k) % threads];
    while (__atomic_load_n(&mine.next, __ATOMIC_RELAXED) < mine.end) {
      const int64_t next = __atomic_fetch_add(&mine.next, 1, __ATOMIC_RELAXED);
      if (next < mine.end) part(with, next);
    }
  }
}
static inline int64_t now() {  // nanoseconds
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}
static inline bool is_new(int64_t state, int64_t seen) {
  return (state & open) && state / generation != seen;
}
static void* attend(void* rank) {
  int64_t seen = 0;
  for (;;) {
    int64_t state = __atomic_load_n(&gate, __ATOMIC_ACQUIRE);
    for (int turn = 0; !is_new(state, seen) && turn < patience; ++turn) {
      wait(turn);
      state = __atomic_load_n(&gate, __ATOMIC_ACQUIRE);
    }
    if (!is_new(state, seen)) {
      pthread_mutex_lock(&mutex);
      __atomic_fetch_add(&asleep, 1, __ATOMIC_SEQ_CST);
      while (!is_new(__atomic_load_n(&gate, __ATOMIC_SEQ_CST), seen))
        pthread_cond_wait(&called, &mutex);
      __atomic_fetch_sub(&asleep, 1, __ATOMIC_SEQ_CST);
      pthread_mutex_unlock(&mutex);
      continue;
    }
    if (!__atomic_compare_exchange_n(&gate, &state, state + 1, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_RELAXED))
      continue;
    seen = state / generation;
    if ((int64_t)rank < threads) take((int64_t)rank);
    __atomic_fetch_sub(&gate, 1, __ATOMIC_RELEASE);
  }
  return nullptr;
}
static void recruit(int64_t wanted) {
  sigset_t all, before;  // signals are for threads that know of them
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (count < wanted) {
    pthread_t thread;
    if (pthread_create(&thread, nullptr, attend, (void*)(count + 1))) break;
    pthread_detach(thread);
    ++count;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}
}  // namespace members

extern "C" void team_share(int64_t threads, int64_t parts, Part part, const void* with) {
  using namespace members;
  const int64_t began = now();
  if (began < __atomic_load_n(&alone_until, __ATOMIC_RELAXED) ||
      __atomic_exchange_n(&busy, 1, __ATOMIC_ACQUIRE)) {  // with another run
    for (int64_t k = 0; k < parts; ++k) part(with, k);
    return;
  }
  threads = least(threads, least(parts, most));
  if (count < threads - 1) recruit(threads - 1);
  threads = least(threads, count + 1);
  members::part = part, members::with = with, members::threads = threads;
  for (int64_t k = 0; k < threads; ++k) {
    __atomic_store_n(&left[k].next, parts * k / threads, __ATOMIC_RELAXED);
    left[k].end = parts * (k + 1) / threads;
  }
  __atomic_store_n(&gate, (gate / generation + 1) * generation + open, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&asleep, __ATOMIC_SEQ_CST)) {
    pthread_mutex_lock(&mutex);
    pthread_cond_broadcast(&called);
    pthread_mutex_unlock(&mutex);
  }
  take(0);
  __atomic_fetch_and(&gate, ~open, __ATOMIC_ACQ_REL);
  if (__atomic_load_n(&gate, __ATOMIC_ACQUIRE) & inside) {
    const int64_t done = now();
    for (int turn = 0; __atomic_load_n(&gate, __ATOMIC_ACQUIRE) & inside; ++turn)
      wait(turn);
    // A part takes no longer than all that this thread has done: unless others have the cores, and
    // a member waits for its turn. Going alone for a while bounds what that costs.
    const int64_t waited = now() - done;
    if (waited > done - began && waited > 50000)
      __atomic_store_n(&alone_until, done + 20 * waited, __ATOMIC_RELAXED);
  }
  __atomic_store_n(&busy, 0, __ATOMIC_RELEASE);
}
// In the child of a fork, which has none of the threads.
extern "C" void team_forget() {
  using namespace members;
  count = asleep = busy = gate = alone_until = 0;
  mutex = PTHREAD_MUTEX_INITIALIZER, called = PTHREAD_COND_INITIALIZER;
}
"""

# Drawn in blocks of particles and of whole tiles of elements, of some 4,096 numbers: each begins at
# counters of its own, which a shifted origin names.
DRAWS = r"""
template <bool few, bool columns, class Kind, class T>
static void shared_philox_draw(const Team& team, T* out, const int64_t* key, const int64_t* origin,
                               int64_t group_offset, int64_t fits, int64_t particles,
                               int64_t elements, int64_t particle_stride,
                               int64_t element_stride) {
  const int64_t width = few ? elements : fn::least(elements, 4096);
  const int64_t grain = columns ? 16 : 1;  // neighbours in memory fill cache lines
  const int64_t height = fn::least(particles, (4096 / width + grain - 1) / grain * grain);
  const int64_t across = (elements + width - 1) / width;
  const int64_t down = (particles + height - 1) / height;
  team_each(team, fits * down * across, [=](int64_t part) {
    const int64_t e = part % across * width, p = part / across % down * height;
    const int64_t f = part / across / down;
    const int64_t moved[4] = {origin[0], origin[1], origin[2] + p, origin[3] + f};
    philox_draw<few, columns, Kind>(
        out + f * particles * elements + p * particle_stride + e * element_stride, key, moved,
        group_offset + e / 4, 1, fn::least(height, particles - p), fn::least(width, elements - e),
        particle_stride, element_stride);
  });
}
"""

# Blocks of the result, which need nothing of each other; long sums of few rows and columns are
# taken in pieces that are added up in their order. BLAS is called for the blocks, and is to use
# the thread that calls.
PRODUCTS = r"""
// How often an extent is halved into pieces of at least so much, and of at most so many.
INLINE int64_t team_pieces(int64_t extent, int64_t smallest, int64_t most) {
  int64_t pieces = 1;
  while (2 * pieces <= most && extent >= 2 * pieces * smallest) pieces *= 2;
  return pieces;
}
INLINE int64_t team_block(int64_t extent, int64_t pieces, int64_t grain) {
  return ((extent + pieces - 1) / pieces + grain - 1) / grain * grain;
}
// body(k, x) writes term k to x; the sum of all terms goes to out.
template <class T, class Body>
static void team_sum(const Team& team, int64_t terms, int64_t size, T* out, const Body& body) {
  T* held = (T*)__builtin_malloc(terms * size * sizeof(T));
  team_each(team, terms, [&](int64_t k) { body(k, held + k * size); });
  fn::copy(held, size, out);
  for (int64_t k = 1; k < terms; ++k)
    for (int64_t i = 0; i < size; ++i) out[i] += held[k * size + i];
  __builtin_free(held);
}
template <class T>
static void shared_matrix_matrix(const Team& team, void* routine, int m, int n, int k, const T* a,
                                 int64_t am, int64_t ak, const T* b, int64_t bk, int64_t bn,
                                 T* out) {
  // Smaller blocks cost one thread a tenth of its time, these a fiftieth.
  const int64_t work = (int64_t)m * n * k, large = fn::least(work >> 22, 64);
  const int64_t most = large > 4 ? large : fn::least(work >> 17, 4);
  const int64_t down = team_pieces(m, 96, most);
  const int64_t across = team_pieces(n, large ? 192 : 64, most / down);
  if (down * across == 1) {
    const int64_t block = team_block(k, team_pieces(k, 1024, most), 16);
    if (block >= k) return matrix_matrix<T>(routine, m, n, k, a, am, ak, b, bk, bn, out);
    return team_sum(team, (k + block - 1) / block, (int64_t)m * n, out, [=](int64_t part, T* term) {
      const int64_t i = part * block;
      team.single(1);
      matrix_matrix<T>(routine, m, n, fn::least(block, k - i), a + i * ak, am, ak, b + i * bk, bk,
                       bn, term);
    });
  }
  const int64_t height = team_block(m, down, 4), width = team_block(n, across, 16);
  const int64_t columns = (n + width - 1) / width, rows = (m + height - 1) / height;
  team_each(team, rows * columns, [=](int64_t part) {
    const int64_t i = part / columns * height, j = part % columns * width;
    team.single(1);
    matrix_matrix<T>(routine, fn::least(height, m - i), fn::least(width, n - j), k, a + i * am, am,
                     ak, b + j * bn, bk, bn, out + i * n + j, n);
  });
}
// Rows of a matrix that is read once, so many that a part takes some microseconds.
INLINE int64_t team_rows(int64_t rows, int64_t columns) {
  const int64_t enough = 65536 / columns, few = (rows + 63) / 64;
  return ((enough > few ? enough : few) + 255) / 256 * 256;
}
template <class T, int W>
static void shared_matrix_narrow(const Team& team, int64_t m, int64_t k, const T* a, int64_t lda,
                                 const T* x, int64_t step, T* out) {
  const int64_t block = team_rows(m, k);
  team_sum(team, (m + block - 1) / block, k, out, [=](int64_t part, T* term) {
    const int64_t i = part * block;
    matrix_narrow<T, W>(fn::least(block, m - i), k, a + i * lda, lda, x + i * step, step, term);
  });
}
// Written out where it is called: which of both directions it is, is known there.
template <class T>
INLINE void shared_matrix_vector(const Team& team, int m, int k, const T* a, int64_t am,
                                 int64_t ak, const T* x, int64_t step, T* out) {
  const bool by_rows = ak == 1 || k == 1;
  if (!by_rows && m < 4096) {
    const int64_t block = team_rows(k, m);
    return team_sum(team, (k + block - 1) / block, m, out, [=](int64_t part, T* term) {
      const int64_t i = part * block;
      matrix_columns<T>(fn::least(block, k - i), m, a + i * ak, ak, x + i * step, step, term);
    });
  }
  const int64_t block = by_rows ? (65536 / k + 8) / 8 * 8 : 1024, parts = (m + block - 1) / block;
  if (by_rows) {
    team_each(team, parts, [=](int64_t part) {
      const int64_t i = part * block;
      matrix_rows<T>(fn::least(block, m - i), k, a + i * am, am, x, out + i);
    });
  } else {
    team_each(team, parts, [=](int64_t part) {
      const int64_t i = part * block;
      matrix_columns<T>(k, fn::least(block, m - i), a + i, ak, x, step, out + i);
    });
  }
}
"""
