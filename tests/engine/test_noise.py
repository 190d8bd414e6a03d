import pytest
import torch

from fastsvi.engine.noise import (
    EVALUATION,
    PROGRAM,
    SUBSETS,
    TRAINING,
    NoiseStream,
    RecordedNoise,
    Seed,
    StepNoise,
    forget_seeds,
)
from fastsvi.engine.record import record
from fastsvi.errors import CaptureError
from fastsvi.kernels import philox

CPU = torch.device("cpu")


def draw_steps(stream, steps, *what):
    drawn = []
    for _ in range(steps):
        drawn.append(stream.draw(*what, CPU).noise)
        stream.advance()
    return drawn


def test_a_step_is_a_function_of_seed_stream_and_step():
    stream = NoiseStream(Seed(3), stream=5)
    drawn = draw_steps(stream, 600, 2, 7, torch.float32)
    assert stream.step == 600
    key = philox.derive_key(3, 5)
    # More steps than one block holds, so the seam between blocks is crossed.
    for step in (0, 1, 255, 256, 599):
        expected = philox.normal(key, philox.make_origin(step=step), 1, 2, 7)
        assert torch.equal(drawn[step], expected)


def test_resume_in_the_middle_of_a_block():
    whole = NoiseStream(Seed(0))
    drawn = draw_steps(whole, 10, 1, 4, torch.float64)
    resumed = NoiseStream(Seed(0), step=7)
    assert torch.equal(resumed.draw(1, 4, torch.float64, CPU).noise, drawn[7])


def test_more_particles_keep_the_noise_of_the_first():
    few = NoiseStream(Seed(1)).draw(2, 5, torch.float32, CPU).noise
    many = NoiseStream(Seed(1)).draw(6, 5, torch.float32, CPU).noise
    assert torch.equal(many[:, :2], few)


def test_changing_the_shape_goes_on_with_the_next_step():
    stream = NoiseStream(Seed(2))
    draw_steps(stream, 1, 1, 3, torch.float32)
    wider = stream.draw(1, 9, torch.float32, CPU).noise
    expected = philox.normal(philox.derive_key(2, 0), philox.make_origin(step=1), 1, 1, 9)
    assert torch.equal(wider, expected)


def test_streams_of_one_seed_differ():
    seed = Seed(0)
    training = NoiseStream(seed).draw(1, 50, torch.float32, CPU).noise
    evaluation = NoiseStream(seed, EVALUATION).draw(1, 50, torch.float32, CPU).noise
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
    first = stream.draw(1, 3, torch.float32, CPU).noise
    torch.manual_seed(0)
    forget_seeds()
    assert torch.equal(stream.draw(1, 3, torch.float32, CPU).noise, first)
    assert given.value == 5
    assert given.is_current


def test_steps_may_be_drawn_in_any_order_and_again():
    stream = NoiseStream(Seed(4))
    key = philox.derive_key(4, 0)
    for step in (300, 2, 301, 300, 0):
        stream.step = step
        expected = philox.normal(key, philox.make_origin(step=step, particle=6), 1, 2, 3)
        assert torch.equal(stream.draw(2, 3, torch.float32, CPU, first=6).noise, expected)


def test_another_seed_begins_at_its_first_step():
    stream = NoiseStream(Seed())
    stream.advance()
    stream.advance()
    assert stream.step == 2
    forget_seeds()
    stream.advance()
    assert stream.step == 1


# ------------------------------------------------------------------------------------ programs

SHAPES = [(3,), (), (2, 700), (5,), (0,)]


def program(noise):
    drawn = [noise.normal(shape, torch.float32) for shape in SHAPES]
    drawn += [noise.uniform(shape, torch.float64) for shape in SHAPES]
    return [*drawn, noise.subset("rows", 50, 7), noise.subset("others", 5000, 7)]


def step_noise(seed, step):
    noise = StepNoise(NoiseStream(Seed(seed), step=step))
    noise.begin()
    return noise


def recorded(seed, step, fit=0):
    keys = {stream: philox.derive_key(seed, stream) for stream in (TRAINING, PROGRAM, SUBSETS)}
    return RecordedNoise(keys, philox.make_origin(step=step, fit=fit))


def assert_all_equal(some, others):
    assert len(some) == len(others)
    assert all(map(torch.equal, some, others))


def test_draws_of_a_step_do_not_overlap():
    drawn = [x.flatten() for x in program(step_noise(0, 3))[: len(SHAPES)]]
    values = torch.cat(drawn)
    assert len(values.unique()) == len(values) == 3 + 1 + 1400 + 5


def test_a_program_sees_the_same_numbers_eagerly_and_recorded():
    for step in (0, 1, 255, 256, 1000):
        for particle in (0, 6):
            expected = program(recorded(5, step).of_particle(particle))
            assert_all_equal(program(step_noise(5, step).of_particle(particle)), expected)
    clock = NoiseStream(Seed(5))
    noise = StepNoise(clock)
    # Of the largest draw 11 steps are drawn at once, of the small ones 256.
    near = {*range(25), *range(240, 300)}
    for step in range(300):
        noise.begin()
        drawn = program(noise.of_particle(0))
        if step in near:
            assert_all_equal(drawn, program(recorded(5, step).of_particle(0)))
        clock.advance()


def test_a_guide_sees_the_same_numbers_eagerly_and_recorded():
    stream = NoiseStream(Seed(5), step=9)
    expected = stream.draw(4, 30, torch.float32, CPU, first=2)
    drawn = recorded(5, 9).draw(4, 30, torch.float32, CPU, first=2)
    assert torch.equal(drawn.noise, expected.noise)
    assert drawn.origin.tolist() == [0, 9, 2, 0]
    assert torch.equal(drawn.key, expected.key)


def test_recording_makes_one_node_for_each_draw():
    noise = recorded(5, 9)

    def step(origin):
        again = RecordedNoise(noise._keys, origin)

        def particle(index):
            return tuple(program(again.of_particles(index, 6)))

        return torch.func.vmap(particle)(torch.arange(6))

    graph = record(step, [philox.make_origin(step=9)])
    names = [node.name for node in graph.nodes if node.op.namespace == "fastsvi"]
    assert names.count("normal_noise") == names.count("uniform_noise") == len(SHAPES)
    assert names.count("random_subset") == 2
    assert not {node.name for node in graph.nodes} & {"index", "clone", "copy_"}


def test_fits_and_particles_have_noise_of_their_own():
    keys = recorded(5, 9)._keys
    origins = torch.stack([philox.make_origin(step=9, fit=fit) for fit in range(3)])

    def fit(origin):
        noise = RecordedNoise(keys, origin)
        return torch.func.vmap(lambda i: tuple(program(noise.of_particles(i, 4))))(torch.arange(4))

    drawn = torch.func.vmap(fit)(origins)
    for f in range(3):
        for p in range(4):
            expected = program(recorded(5, 9, fit=f).of_particle(p))
            assert_all_equal([x[f, p] for x in drawn], expected)


def test_noise_may_be_changed_in_place():
    first = step_noise(0, 0)
    expected = first.of_particle(0).normal((4,), torch.float32).clone()
    first.of_particle(0).normal((4,), torch.float32).mul_(100)
    assert torch.equal(first.of_particle(0).normal((4,), torch.float32), expected)


def test_what_is_kept_is_bounded():
    noise = step_noise(0, 0)
    for particle in range(400):  # 64 KiB each, of which 256 fill the budget
        noise.of_particle(particle).normal((500,), torch.float32)
    assert noise._blocks._bytes <= noise._blocks._BUDGET
    clock = noise._clock
    for _ in range(3):
        clock.advance()
        noise.begin()
        noise.of_particle(0).normal((500,), torch.float32)
    assert len(noise._blocks._kept) == 1
    assert noise._blocks._bytes <= 1 << 16


def test_forgotten_seeds_reach_programs_too():
    noise = StepNoise(NoiseStream(Seed()))
    torch.manual_seed(0)
    noise.begin()
    first = noise.of_particle(0).normal((4,), torch.float32)
    forget_seeds()
    torch.manual_seed(1)
    noise.begin()
    assert not torch.isclose(noise.of_particle(0).normal((4,), torch.float32), first).any()
    forget_seeds()
    torch.manual_seed(0)
    noise.begin()
    assert torch.equal(noise.of_particle(0).normal((4,), torch.float32), first)


def test_a_draw_on_another_device_cannot_be_recorded():
    with pytest.raises(CaptureError, match=r"drawn on meta, while the parameters are on cpu"):
        recorded(0, 0).normal((3,), torch.float32, torch.device("meta"))
