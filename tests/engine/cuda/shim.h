// Enough of CUDA to run a kernel on a CPU, where what goes wrong can be seen.
//
// Every CUDA thread is a fiber with a stack of its own. Blocks run one after the other; the fibers
// of a block run one at a time, each until it waits for others, in an order that is shuffled anew
// whenever there is a choice. So a barrier that is missing shows as a result that depends on the
// seed, or as garbage: shared memory begins as NaN. A barrier that not all threads reach is an
// error and not a hang.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define __global__ __attribute__((visibility("default"), noinline))
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
// All in one section, which is filled with garbage before a block begins. (Only variables with
// internal linkage may share a section: device functions are static. `extern __shared__` is
// replaced by the Python side, as `static` and `extern` do not go together.)
#define __shared__ static __attribute__((section("shim_shared")))

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
extern "C" {
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
}

namespace shim {
const int most_threads = 1024, most_warps = 32;
const size_t stack_bytes = 128 << 10, most_shared = 232448;
const uint32_t garbage = 0x7FF7A5A5;  // NaN as float and as double, and far off as an index

enum State { ready, at_block, at_warp, finished };

struct Fiber {
  State state;
  int line;        // of the barrier at which it waits
  unsigned lanes;  // that it waits for, in a warp
  // What it gives to an exchange, from which lane it takes, and what it has got.
  uint64_t given, taken;
  int source;
  uint3 index;
  ucontext_t first;
  jmp_buf rest;
  bool started;
};

static Fiber fibers[most_threads];
static unsigned waiting_lanes[most_warps];
static int runnable[most_threads], num_runnable, num_threads, num_finished, num_at_block;
static int current;
static char* stacks;
static jmp_buf home;
static ucontext_t unused;
static char message[256];
static uint64_t random_state;
static void (*entry)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                     uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                     uint64_t);
static uint64_t arguments[16];
static char dynamic_shared[most_shared] __attribute__((aligned(1024)));
static size_t dynamic_bytes;
// So that there is such a section, of which the linker knows the ends.
static uint32_t first_shared __attribute__((section("shim_shared"), used));
extern "C" char __start_shim_shared[] __attribute__((visibility("hidden")));
extern "C" char __stop_shim_shared[] __attribute__((visibility("hidden")));

static uint32_t random_below(uint32_t n) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(((random_state >> 32) * n) >> 32);
}

template <class... Args> [[noreturn]] static void fail(const char* format, Args... args) {
  snprintf(message, sizeof message, format, args...);
  _longjmp(home, 1);
}

static void make_ready(int fiber) {
  fibers[fiber].state = ready;
  runnable[num_runnable++] = fiber;
}

// Nobody can go on: who waits, and where?
[[noreturn]] static void stuck() {
  int waiting[2] = {-1, -1};  // one at a barrier of the block, one in a warp
  for (int i = 0; i < num_threads; ++i)
    for (int kind = 0; kind < 2; ++kind)
      if (fibers[i].state == (kind ? at_warp : at_block) && waiting[kind] < 0) waiting[kind] = i;
  if (waiting[1] >= 0)
    fail("block %u: thread %d waits at line %d for lanes %08x of its warp, of which not all come",
         blockIdx.x, waiting[1], fibers[waiting[1]].line, fibers[waiting[1]].lanes);
  fail("block %u: %d of %d threads reach the barrier at line %d, %d have returned", blockIdx.x,
       num_at_block, num_threads, fibers[waiting[0]].line, num_finished);
}

static __attribute__((noinline)) void leave();

static void begin() {
  const uint64_t* a = arguments;
  entry(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13],
        a[14], a[15]);
  fibers[current].state = finished;
  ++num_finished;
  leave();
}

// On to any fiber that can run. Signal masks are not switched: that would be a call of the system.
static __attribute__((noinline)) void leave() {
  if (num_runnable == 0) {
    if (num_finished == num_threads) _longjmp(home, 2);
    stuck();
  }
  const int pick = random_below(num_runnable);
  current = runnable[pick];
  runnable[pick] = runnable[--num_runnable];
  Fiber& next = fibers[current];
  if (next.started) _longjmp(next.rest, 1);
  next.started = true;
  threadIdx = next.index;
  setcontext(&next.first);
}

static __attribute__((noinline)) void wait(int fiber) {
  if (!_setjmp(fibers[fiber].rest)) leave();
  threadIdx = fibers[current].index;
}

static __attribute__((noinline)) void block_barrier(int line) {
  const int self = current;
  fibers[self].state = at_block, fibers[self].line = line;
  if (++num_at_block < num_threads) return wait(self);
  num_at_block = 0;
  for (int i = 0; i < num_threads; ++i) {
    if (fibers[i].line != line)
      fail("block %u: thread %d is at the barrier of line %d and thread %d at that of line %d",
           blockIdx.x, self, line, i, fibers[i].line);
    make_ready(i);
  }
  wait(self);
}

// Who comes last makes the exchange for all.
static __attribute__((noinline)) void warp_barrier(unsigned lanes, int line) {
  const int self = current, lane = self % 32, base = self - lane;
  if (num_threads - base < 32) lanes &= (1u << (num_threads - base)) - 1;
  if (!(lanes >> lane & 1))
    fail("line %d: lane %d is not among the lanes %08x that it names", line, lane, lanes);
  Fiber& fiber = fibers[self];
  fiber.state = at_warp, fiber.line = line, fiber.lanes = lanes;
  unsigned& waiting = waiting_lanes[self / 32];
  waiting |= 1u << lane;
  if ((waiting & lanes) != lanes) return wait(self);
  waiting &= ~lanes;
  for (int i = 0; i < 32; ++i)
    if (lanes >> i & 1) {
      const Fiber& other = fibers[base + i];
      if (other.lanes != lanes || other.line != line)
        fail("line %d: thread %d names lanes %08x, thread %d lanes %08x at line %d", line, self,
             lanes, base + i, other.lanes, other.line);
      make_ready(base + i);
    }
  for (int i = 0; i < 32; ++i)
    if (lanes >> i & 1) {
      Fiber& to = fibers[base + i];
      const int source = to.source;
      to.taken = source < 0 || source > 31 ? to.given
                 : lanes >> source & 1     ? fibers[base + source].given
                                           : garbage * 0x100000001ull;
    }
  wait(self);
}
static inline int lane() { return current % 32; }
static inline unsigned all_or(unsigned lanes = 0xFFFFFFFFu) { return lanes; }

// What the lane `source` gives: garbage if it is not among those named, one's own if there is none.
template <class T> static T exchange(unsigned lanes, T value, int source, int line) {
  static_assert(sizeof(T) <= 8, "lanes exchange up to 8 bytes");
  Fiber& fiber = fibers[current];
  memcpy(&fiber.given, &value, sizeof(T));
  fiber.source = source;
  warp_barrier(lanes, line);
  memcpy(&value, &fiber.taken, sizeof(T));
  return value;
}

static void run_block(size_t static_bytes) {
  for (char* p = __start_shim_shared; p + 4 <= __start_shim_shared + static_bytes; p += 4)
    memcpy(p, &garbage, 4);
  for (size_t i = 0; i + 4 <= dynamic_bytes; i += 4) memcpy(dynamic_shared + i, &garbage, 4);
  num_runnable = num_finished = num_at_block = 0;
  for (int i = 0; i < num_threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.started = false, fiber.line = 0;
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = stacks + i * stack_bytes;
    fiber.first.uc_stack.ss_size = stack_bytes;
    fiber.first.uc_link = &unused;
    makecontext(&fiber.first, begin, 0);
    make_ready(i);
  }
  memset(waiting_lanes, 0, sizeof waiting_lanes);
  leave();
}
}  // namespace shim

// Run a kernel of up to 16 pointers and integers; returns NULL, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* shim_launch(
    void* kernel, int64_t blocks, const unsigned* threads, int64_t dynamic_bytes, uint64_t seed,
    const uint64_t* arguments, int64_t count) {
  using namespace shim;
  num_threads = threads[0] * threads[1] * threads[2];
  blockDim = {threads[0], threads[1], threads[2]}, gridDim = {(unsigned)blocks, 1, 1};
  const size_t static_bytes = __stop_shim_shared - __start_shim_shared;
  if (num_threads < 1 || num_threads > most_threads) return "a block has 1 to 1024 threads";
  if (static_bytes - sizeof(first_shared) + dynamic_bytes > most_shared)
    return "a block has at most 227 KB of shared memory";
  if (count > 16) return "a kernel takes at most 16 arguments here";
  if (!stacks) {
    void* found = mmap(nullptr, stack_bytes * most_threads, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return "no memory for the stacks";
    stacks = (char*)found;
  }
  entry = (decltype(entry))kernel;
  memcpy(shim::arguments, arguments, count * sizeof(uint64_t));
  shim::dynamic_bytes = dynamic_bytes;
  random_state = seed * 0x9E3779B97F4A7C15u + 1;
  random_below(1);
  // Blocks come in no particular order either.
  const int64_t start = random_below(blocks);
  for (volatile int64_t b = 0; b < blocks; ++b) {
    blockIdx = {(unsigned)((start + b) % blocks), 0, 0};
    switch (_setjmp(home)) {
      case 0: run_block(static_bytes); break;
      case 1: return message;
    }
  }
  return nullptr;
}

#define __syncthreads() shim::block_barrier(__LINE__)
#define __syncwarp(...) shim::warp_barrier(shim::all_or(__VA_ARGS__), __LINE__)
#define __shfl_sync(lanes, value, source, ...) \
  shim::exchange(lanes, value, (source) & 31, __LINE__)
#define __shfl_xor_sync(lanes, value, mask, ...) \
  shim::exchange(lanes, value, shim::lane() ^ (int)(mask), __LINE__)
#define __shfl_down_sync(lanes, value, delta, ...) \
  shim::exchange(lanes, value, shim::lane() + (int)(delta), __LINE__)
#define __shfl_up_sync(lanes, value, delta, ...) \
  shim::exchange(lanes, value, shim::lane() - (int)(delta), __LINE__)

// ---- arithmetic

template <class T> static inline T __ldg(const T* p) { return *p; }
template <class To, class From> static inline To shim_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
static inline float __int_as_float(int x) { return shim_bits<float>(x); }
static inline int __float_as_int(float x) { return shim_bits<int>(x); }
// What CUDA has and the C library lacks.
static inline double erfinv(double x) {  // bisection: slow and sure
  if (!(x > -1 && x < 1)) return x == 1 ? INFINITY : x == -1 ? -INFINITY : NAN;
  const double a = fabs(x);
  double low = 0.886 * a, high = a < 0.5 ? a : 6.5;
  for (int i = 0; i < 80; ++i) {
    const double middle = (low + high) / 2;
    (a > 0.5 ? erfc(middle) > 1 - a : erf(middle) < a) ? low = middle : high = middle;
  }
  return copysign((low + high) / 2, x);
}
static inline float erfinvf(float x) { return (float)erfinv((double)x); }
