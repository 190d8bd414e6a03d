"""What eager steps keep of their noise: origins on a device, and blocks of steps on the CPU."""

import pytest
import torch

from fastsvi.engine import noise_blocks
from fastsvi.engine.noise import NoiseStream, Seed, StepNoise
from fastsvi.engine.noise_blocks import Blocks, Place
from fastsvi.kernels import philox

CPU = torch.device("cpu")


def test_origins_are_those_of_their_step_in_any_order():
    place = Place(7, 3, CPU)
    assert torch.equal(place.key, philox.derive_key(7, 3))
    for step, particle in ((0, 0), (1, 0), (1, 5), (2, 5), (3, 0), (9, 0), (8, 1), (0, 0)):
        expected = philox.make_origin(step=step, particle=particle)
        assert torch.equal(place.origin(step, particle), expected)


def test_an_origin_that_was_handed_out_does_not_change():
    place = Place(7, 3, CPU)
    first = place.origin(0)
    for step in range(1, 4):
        place.origin(step)
    assert torch.equal(first, philox.make_origin())


class Counted:
    """Draws the number of the step, and counts the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, step, count):
        self.calls.append((step, count))
        return torch.arange(step, step + count).unsqueeze(-1)


def test_steps_share_a_call():
    draw, blocks = Counted(), Blocks(limit=64)
    drawn = [blocks.at("x", step, 8, draw).item() for step in range(20)]
    assert drawn == list(range(20))
    assert draw.calls == [(0, 8), (8, 8), (16, 8)]
    assert blocks.at("x", 3, 8, draw).item() == 3


def test_large_draws_are_not_kept():
    draw, blocks = Counted(), Blocks(limit=64)
    for step in range(3):
        assert blocks.at("x", step, 1000, draw).item() == step
    assert draw.calls == [(0, 1), (1, 1), (2, 1)]
    assert not blocks._kept


def test_the_budget_holds_and_is_given_back():
    draw, blocks = Counted(), Blocks(limit=Blocks._BUDGET // 2)
    for what in range(4):
        assert blocks.at(what, 0, 1 << 20, draw).item() == 0
    assert len(blocks._kept) == 2
    assert blocks._bytes == Blocks._BUDGET
    for step in (1, 2):
        assert blocks.at("new", step, 1 << 20, draw).item() == step
    assert list(blocks._kept) == ["new"]


def test_a_copy_may_be_written_to():
    blocks = Blocks(limit=64)
    blocks.at("x", 0, 8, Counted(), copy=True).fill_(9)
    assert blocks.at("x", 0, 8, Counted()).item() == 0


def test_other_devices_are_drawn_by_the_operations():
    meta = torch.device("meta")
    noise = StepNoise(NoiseStream(Seed(0), step=4))
    noise.begin()
    for draw in (noise.normal, noise.uniform):
        assert draw((2, 3), torch.float64, meta).shape == (2, 3)
        mapped = torch.func.vmap(
            lambda i, draw=draw: (noise.of_particles(i, 5, 2), draw((3,), torch.float32, meta))[1]
        )(torch.arange(5))
        assert mapped.shape == (5, 3)
        assert mapped.device == meta
        noise.of_particle(0)
    assert noise.subset("rows", 100, 7, meta).shape == (7,)
    drawn = NoiseStream(Seed(0), step=4).draw(5, 3, torch.float32, meta, first=2)
    assert drawn.noise is None
    assert drawn.origin.device == meta


@pytest.mark.parametrize("elements", [noise_blocks._PIECE + 1, 2 * noise_blocks._PIECE + 700])
def test_pieces_are_the_same_numbers(elements):
    """A last piece of one element, and one of several lanes."""
    key, origin, steps = philox.derive_key(3, 1), philox.make_origin(step=4, particle=2), 2

    def draw(origin, particles, size):
        return philox.normal_block(key, origin, steps, 1, particles, size)

    shape = (steps, 1, 2, elements)
    found = noise_blocks.in_pieces(draw, origin, shape, torch.float32)
    assert torch.equal(found, draw(origin, 2, elements))
