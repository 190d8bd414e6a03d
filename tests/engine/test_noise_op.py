"""Random numbers by counter as operations: those of the kernels, also under vmap over fits."""

import pytest
import torch

from fastsvi.engine.noise_op import normal_noise, random_subset, uniform_noise
from fastsvi.engine.record import record
from fastsvi.errors import FastSVIError
from fastsvi.kernels import philox, subsample

OPS = [(normal_noise, philox.normal), (uniform_noise, philox.uniform)]
KEY = philox.derive_key(3, 2)
ORIGIN = philox.make_origin(element=4096, step=9, particle=5, fit=2)


def later(origin, place, distance):
    origin = origin.clone()
    origin[place] += distance
    return origin


def of_fits(count):
    return torch.stack([later(ORIGIN, 3, fit) for fit in range(count)])


@pytest.mark.parametrize(("op", "kernel"), OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 300), (1, 2, 2500), (1, 4, 0)])
def test_noise_is_that_of_the_kernels(op, kernel, dtype, shape):
    assert torch.equal(op(KEY, ORIGIN, 0, *shape, dtype), kernel(KEY, ORIGIN, *shape, dtype))
    assert ORIGIN.tolist() == [1024, 9, 5, 2]
    moved = later(ORIGIN, 0, 512)
    assert torch.equal(op(KEY, ORIGIN, 512, *shape, dtype), kernel(KEY, moved, *shape, dtype))


def test_draws_that_lie_behind_each_other_are_one_long_draw():
    whole = uniform_noise(KEY, ORIGIN, 0, 1, 2, 2048 + 7, torch.float32)
    second = uniform_noise(KEY, ORIGIN, 512, 1, 2, 7, torch.float32)
    assert torch.equal(whole[..., 2048:], second)


@pytest.mark.parametrize(("size", "count"), [(10, 10), (1000, 3), (5000, 7), (1_000_003, 1)])
def test_subsets_are_those_of_the_kernel(size, count):
    for draw in (0, 3, 2**31):
        origin = later(ORIGIN, 2, draw)
        expected = subsample.indices(KEY, origin, 1, 1, size, count)[0, 0]
        assert torch.equal(random_subset(KEY, ORIGIN, draw, size, count), expected)
    assert len(expected.unique()) == count


def test_consecutive_fits_are_drawn_in_one_call():
    for op, _ in OPS:
        call = (256, 1, 3, 40, torch.float64)
        mapped = torch.func.vmap(lambda origin, op=op, call=call: op(KEY, origin, *call))
        expected = torch.stack([op(KEY, origin, *call) for origin in of_fits(4)])
        assert torch.equal(mapped(of_fits(4)), expected)
        graph = record(lambda origins, mapped=mapped: [mapped(origins)], [of_fits(4)])
        assert sum(node.name == op.__name__ for node in graph.nodes) == 1
    for size in (10, 5000):
        mapped = torch.func.vmap(lambda origin, size=size: random_subset(KEY, origin, 2, size, 7))
        expected = torch.stack([random_subset(KEY, origin, 2, size, 7) for origin in of_fits(4)])
        assert torch.equal(mapped(of_fits(4)), expected)


def test_particles_that_share_an_origin_may_be_mapped_inside():
    def fit(origin):
        def particle(x):
            return normal_noise(KEY, origin, 0, 1, 1, 3, torch.float32) + x

        return torch.func.vmap(particle)(torch.zeros(5))

    expected = torch.stack([fit(origin) for origin in of_fits(4)])
    assert torch.equal(torch.func.vmap(fit)(of_fits(4)), expected)


def test_what_vmap_cannot_do_is_an_error():
    keys = torch.stack([KEY, KEY])
    with pytest.raises(FastSVIError, match="may map the origin alone"):
        torch.func.vmap(lambda key: normal_noise(key, ORIGIN, 0, 1, 1, 3, torch.float32))(keys)
    with pytest.raises(FastSVIError, match="of which each call has one"):
        torch.func.vmap(lambda origin: uniform_noise(KEY, origin, 0, 2, 1, 3, torch.float32))(
            of_fits(2)
        )


def test_shapes_are_known_without_data():
    key, origin = KEY.to("meta"), ORIGIN.to("meta")
    for op, _ in OPS:
        noise = op(key, origin, 0, 2, 3, 5, torch.float64)
        assert noise.shape == (2, 3, 5)
        assert noise.dtype == torch.float64
    assert random_subset(key, origin, 0, 10, 3).shape == (3,)
    assert random_subset(key, origin, 0, 10, 3).dtype == torch.int64


def test_opcheck():
    tests = ("test_schema", "test_faketensor")
    noise = (KEY, ORIGIN, 256, 1, 2, 3, torch.float32)
    torch.library.opcheck(torch.ops.fastsvi.normal_noise, noise, test_utils=tests)
    torch.library.opcheck(torch.ops.fastsvi.uniform_noise, noise, test_utils=tests)
    torch.library.opcheck(
        torch.ops.fastsvi.random_subset, (KEY, ORIGIN, 1, 10, 3), test_utils=tests
    )


def test_bad_arguments_name_the_operation():
    with pytest.raises(FastSVIError, match="key must be int64"):
        normal_noise(KEY.int(), ORIGIN, 0, 1, 1, 1, torch.float32)
    with pytest.raises(FastSVIError, match="float32 or float64"):
        uniform_noise(KEY, ORIGIN, 0, 1, 1, 1, torch.float16)
    with pytest.raises(FastSVIError, match="subsample_size"):
        random_subset(KEY, ORIGIN, 0, 3, 4)
