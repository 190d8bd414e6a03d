"""The stand-in for CUDA finds what it is there to find."""

from __future__ import annotations

import pytest
import torch

SOURCE = r"""
template <class T> static __device__ __forceinline__ T warp_total(T x) {
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, d);
  return x;
}
template <class T> static __device__ T block_total(T x) {
  __shared__ T parts[32];
  x = warp_total(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  T total = 0;
  for (int w = 0; w < blockDim.x / 32; ++w) total += parts[w];
  __syncthreads();
  return total;
}
extern "C" __global__ void __launch_bounds__(256) totals(const float* x, float* out, double* wide,
                                                         int64_t n, int64_t times) {
  for (int64_t t = 0; t < times; ++t) {
    float sum = 0;
    for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x)
      sum += __ldg(x + i);
    const float total = block_total(sum);
    const double other = block_total((double)sum);
    if (threadIdx.x == 0) out[blockIdx.x] = total, wide[blockIdx.x] = other;
  }
}
extern "C" __global__ void turned(float* x) {
  extern __shared__ char arena[];
  float* held = (float*)arena;
  held[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void raced(float* x) {
  extern __shared__ char arena[];
  float* held = (float*)arena;
  held[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void parted(float* x) {
  if (threadIdx.x < 40) __syncthreads();
}
extern "C" __global__ void torn(float* x) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
}
extern "C" __global__ void lonely(float* x) {
  if (threadIdx.x % 32 < 5) x[threadIdx.x] = __shfl_down_sync(0xFFFFFFFF, 1.0f, 1);
}
extern "C" __global__ void lanes(int64_t* x) {
  const int i = threadIdx.x;
  x[i] = __shfl_sync(0xFFFFFFFF, (int64_t)i << 40, 3);
  x[64 + i] = __shfl_down_sync(0xFFFFFFFF, i, 1);
  if (i % 32 < 16) x[128 + i] = __shfl_xor_sync(0xFFFF, i, 1);
  __syncwarp();
  x[192 + i] = __shfl_up_sync(0xFFFFFFFF, i, 2);
}
"""


@pytest.fixture(scope="module")
def kernels(shim):
    return shim(SOURCE)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sums_by_warps_and_blocks(kernels, seed):
    x, out, wide = torch.rand(1000), torch.zeros(3), torch.zeros(3, dtype=torch.float64)
    kernels.launch("totals", 3, 256, x, out, wide, 1000, 1, seed=seed)
    torch.testing.assert_close(out.sum(), x.sum())
    torch.testing.assert_close(wide.sum(), x.double().sum())


def test_many_barriers_take_no_time(kernels):
    """256 threads meet some 4,000 times; a lost wake-up would be an error."""
    x, out, wide = torch.rand(1000), torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    kernels.launch("totals", 1, 256, x, out, wide, 1000, 280)
    torch.testing.assert_close(out[0], x.sum())


def test_a_missing_barrier_shows(kernels):
    x = torch.arange(64.0)
    for seed in range(4):
        given = x.clone()
        kernels.launch("turned", 1, 64, given, shared=256, seed=seed)
        assert torch.equal(given, x.flip(0))
        given = x.clone()
        kernels.launch("raced", 1, 64, given, shared=256, seed=seed)
        assert given.isnan().any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("parted", "40 of 64 threads reach the barrier at line .*, 24 have returned"),
        ("torn", "at that of line"),
        ("lonely", "waits at line .* for lanes ffffffff of its warp, of which not all come"),
    ],
)
def test_a_barrier_that_not_all_reach_is_an_error(kernels, name, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.launch(name, 2, 64, torch.zeros(64))


def test_lanes_exchange(kernels):
    x = torch.zeros(4, 64, dtype=torch.int64)
    kernels.launch("lanes", 1, 64, x)
    i = torch.arange(64)
    assert torch.equal(x[0], (i // 32 * 32 + 3) << 40)
    assert torch.equal(x[1], torch.where(i % 32 == 31, i, i + 1))
    assert torch.equal(x[2], torch.where(i % 32 < 16, i ^ 1, 0))
    assert torch.equal(x[3], torch.where(i % 32 < 2, i, i - 2))
