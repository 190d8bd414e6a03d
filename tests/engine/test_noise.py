import torch

from fastsvi.engine.noise import EVALUATION, NoiseStream, Seed, forget_seeds
from fastsvi.kernels import philox

CPU = torch.device("cpu")


def test_a_step_is_a_function_of_seed_stream_and_step():
    stream = NoiseStream(Seed(3), stream=5)
    drawn = [stream.next(2, 7, torch.float32, CPU).noise for _ in range(600)]
    assert stream.step == 600
    key = philox.derive_key(3, 5)
    # More steps than one block holds, so the seam between blocks is crossed.
    for step in (0, 1, 255, 256, 599):
        expected = philox.normal(key, philox.make_origin(step=step), 1, 2, 7)
        assert torch.equal(drawn[step], expected)


def test_resume_in_the_middle_of_a_block():
    whole = NoiseStream(Seed(0))
    drawn = [whole.next(1, 4, torch.float64, CPU).noise for _ in range(10)]
    resumed = NoiseStream(Seed(0), step=7)
    assert torch.equal(resumed.next(1, 4, torch.float64, CPU).noise, drawn[7])


def test_more_particles_keep_the_noise_of_the_first():
    few = NoiseStream(Seed(1)).next(2, 5, torch.float32, CPU).noise
    many = NoiseStream(Seed(1)).next(6, 5, torch.float32, CPU).noise
    assert torch.equal(many[:, :2], few)


def test_changing_the_shape_goes_on_with_the_next_step():
    stream = NoiseStream(Seed(2))
    stream.next(1, 3, torch.float32, CPU)
    wider = stream.next(1, 9, torch.float32, CPU).noise
    expected = philox.normal(philox.derive_key(2, 0), philox.make_origin(step=1), 1, 1, 9)
    assert torch.equal(wider, expected)


def test_streams_of_one_seed_differ():
    seed = Seed(0)
    training = NoiseStream(seed).next(1, 50, torch.float32, CPU).noise
    evaluation = NoiseStream(seed, EVALUATION).next(1, 50, torch.float32, CPU).noise
    assert not torch.isclose(training, evaluation).any()


def test_a_seed_comes_from_torch_when_first_needed():
    torch.manual_seed(7)
    expected = Seed().value
    torch.manual_seed(7)
    seed = Seed()
    assert not seed.is_current
    assert seed.value == expected == seed.value
    assert seed.is_current


def test_forget_seeds_draws_again_but_keeps_given_ones():
    drawn, given = Seed(), Seed(5)
    stream = NoiseStream(drawn)
    torch.manual_seed(0)
    first = stream.next(1, 3, torch.float32, CPU).noise
    torch.manual_seed(0)
    forget_seeds()
    assert torch.equal(stream.next(1, 3, torch.float32, CPU).noise, first)
    assert given.value == 5
    assert given.is_current
