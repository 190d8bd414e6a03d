"""Random numbers of native steps are those of the kernels, for every layout and size."""

from __future__ import annotations

import pytest
import torch

from fastsvi.engine.native import NativeStep
from fastsvi.engine.noise_op import normal_noise, random_subset, uniform_noise
from fastsvi.kernels import philox, subsample

# Fits, particles and elements: a few of lane 0, whole and broken tiles, and many particles of few
# elements, which are laid out the other way round.
SHAPES = [(1, 1, 1), (2, 3, 256), (3, 2, 257), (1, 200, 7), (2, 70, 3), (1, 1, 1024), (2, 2, 3001)]
GROUP = 512
ONE_STEP = torch.tensor([0, 1, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["normal", "uniform"])
def test_noise_is_that_of_the_reference(name, dtype):
    """All shapes in one step, the third of a run."""
    draw = {"normal": normal_noise, "uniform": uniform_noise}[name]
    key = philox.derive_key(3, 1)
    origin = philox.make_origin(step=2**31 + 5, particle=7, fit=4)

    def step(*tensors):
        *_, origin, key = tensors
        new = [draw(key, origin, GROUP, *shape, dtype) for shape in SHAPES]
        return (*new, origin + ONE_STEP, new[0].sum(), torch.isnan(new[0]).any())

    noise = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
    NativeStep(step, [*noise, origin.clone()], [key]).run(3)
    last = philox.make_origin(element=4 * GROUP, step=2**31 + 7, particle=7, fit=4)
    for got, shape in zip(noise, SHAPES, strict=True):
        expected = getattr(philox, name)(key, last, *shape, dtype=dtype)
        # Radius and angle are each right to some ulp; near a zero of the cosine the error is
        # absolute. Uniform numbers are rounded once.
        tolerance = (32 if name == "normal" else 1) * torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_a_group_continues_where_the_last_left_off():
    key, origin = philox.derive_key(0, 0), philox.make_origin()
    whole = philox.normal(key, origin, 1, 2, 2048)

    def step(first, second, origin, key):
        new = [normal_noise(key, origin, g, 1, 2, 1024, torch.float32) for g in (0, 256)]
        return (*new, origin, new[0].sum(), torch.isnan(new[0]).any())

    parts = [torch.zeros(1, 2, 1024), torch.zeros(1, 2, 1024)]
    NativeStep(step, [*parts, origin], [key]).run(1)
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=4e-6, atol=4e-6)


# Sorted words up to 1,024; a grid with and without cells to spare beyond.
SIZES = [
    (1, 1),
    (10, 10),
    (256, 100),
    (257, 257),
    (1024, 7),
    (1025, 300),
    (1 << 20, 64),
    (99991, 8),
]


def test_subsets_are_those_of_the_reference():
    key, origin = philox.derive_key(5, 2), philox.make_origin(step=3)

    def step(*tensors):
        *_, origin, key = tensors
        new = [random_subset(key, origin, k, *sizes) for k, sizes in enumerate(SIZES)]
        return (*new, origin + ONE_STEP, new[0].sum(), torch.isnan(new[0]).any())

    subsets = [torch.zeros(count, dtype=torch.int64) for _, count in SIZES]
    NativeStep(step, [*subsets, origin.clone()], [key]).run(4)
    for k, (got, sizes) in enumerate(zip(subsets, SIZES, strict=True)):
        last = philox.make_origin(step=6, particle=k)
        assert torch.equal(got, subsample.indices(key, last, 1, 1, *sizes)[0, 0])


def test_subsets_of_many_fits():
    key, origin = philox.derive_key(5, 2), philox.make_origin(fit=2)

    def step(small, large, origin, key):
        op = torch.ops.fastsvi.random_subsets
        new = [op(key, origin, 1, 3, 40, 5), op(key, origin, 1, 3, 5000, 6)]
        return (*new, origin, new[0].sum(), torch.isnan(new[0]).any())

    subsets = [torch.zeros(3, n, dtype=torch.int64) for n in (5, 6)]
    NativeStep(step, [*subsets, origin], [key]).run(1)
    moved = philox.make_origin(particle=1, fit=2)
    assert torch.equal(subsets[0], subsample.indices(key, moved, 3, 1, 40, 5)[:, 0])
    assert torch.equal(subsets[1], subsample.indices(key, moved, 3, 1, 5000, 6)[:, 0])
