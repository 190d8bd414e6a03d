"""Philox: published vectors, the layout of elements, and the distribution of draws."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
import torch
from conformance import Case, Suite
from hypothesis import given, settings
from torch.fx.experimental.proxy_tensor import make_fx

from fastsvi.errors import KernelError
from fastsvi.kernels import dispatch, philox

KEY = philox.derive_key(20, 6)
MASK = 0xFFFFFFFF


def reference_word(key: list[int], origin: list[int], fit: int, particle: int, element: int) -> int:
    """A word by the definition of the layout, in Python integers."""
    tile, within = divmod(element, 1024)
    lane, group = divmod(within, 256)
    counter = [origin[0] + 256 * tile + group, origin[1], origin[2] + particle, origin[3] + fit]
    counter = [c & MASK for c in counter]
    k0, k1 = key
    for _ in range(10):
        product_0, product_1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (product_1 >> 32) ^ counter[1] ^ k0,
            product_1 & MASK,
            (product_0 >> 32) ^ counter[3] ^ k1,
            product_0 & MASK,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return counter[lane]


# Known answers of the Random123 library (kat_vectors, philox4x32 with 10 rounds).
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    # One tile: lanes are 256 elements apart.
    words = philox.words(torch.tensor(key), torch.tensor(counter), 1, 1, 1024)
    assert tuple(words[0, 0, ::256].tolist()) == expected
    assert philox._rounds(counter, philox._schedule(*key)) == expected


@given(
    seed=st.integers(0, 2**64 - 1),
    origin=st.tuples(*[st.integers(0, MASK)] * 4),
    fit=st.integers(0, 2),
    particle=st.integers(0, 2),
    element=st.integers(0, 2499),
)
@settings(max_examples=50, deadline=None)
def test_words_follow_the_layout(seed, origin, fit, particle, element):
    key = philox.derive_key(seed, 1)
    words = philox.words(key, torch.tensor(origin), 3, 3, 2500)
    expected = reference_word(key.tolist(), list(origin), fit, particle, element)
    assert words[fit, particle, element].item() == expected


SIZES = [0, 1, 3, 127, 255, 256, 257, 511, 700, 1023, 1024, 1025, 4097]


def draw_case(name: str, draw, fits: int, particles: int, elements: int, origin=None, **options):
    origin = philox.make_origin(step=3) if origin is None else origin
    return Case(
        name,
        make=lambda _: (KEY, origin, torch.zeros(())),  # the last tells the dtype
        call=lambda key, origin, like: draw(key, origin, fits, particles, elements, like.dtype),
        batched=(0, 1),
        **options,
    )


def words_case(name: str, elements: int, origin: torch.Tensor | None = None, **options) -> Case:
    options = {"capture": False, "dtypes": (torch.float64,)} | options
    return draw_case(f"words-{name}", words, 2, 3, elements, origin, **options)


def words(key, origin, fits, particles, elements, _dtype):
    return philox.words(key, origin, fits, particles, elements)


FAR = torch.tensor([(1 << 32) - 256, MASK, MASK - 1, MASK])  # the last tile; particle, fit wrap


class TestDraws(Suite):
    cases = (
        # The interpreter takes the sizes where the layout changes; torch takes all.
        *[words_case(str(n), n, interpret=n in (0, 3, 257, 1025)) for n in SIZES],
        words_case("captured", 7, capture=True, vmap=True),
        words_case("far", 1027, FAR),
        words_case("million", 1_000_003, interpret=False),
        draw_case(
            *("normal", philox.normal, 1, 2, 700),
            strided_interpreted=True,
            vmap=True,
            compile=True,
        ),
        draw_case("normal-far", philox.normal, 1, 2, 1025, FAR, capture=False),
        draw_case("uniform", philox.uniform, 1, 2, 700, vmap=True, compile=True),
        draw_case("uniform-no-particles", philox.uniform, 2, 0, 3, capture=False),
    )


@pytest.mark.parametrize("draw", [philox.words, philox.uniform, philox.normal])
def test_a_draw_does_not_depend_on_how_it_is_split(draw):
    whole = draw(KEY, philox.make_origin(step=9), 4, 6, 3000)
    for fit, particle, element in [(0, 0, 0), (1, 2, 1024), (3, 5, 2048)]:
        origin = philox.make_origin(element, 9, particle, fit)
        part = draw(KEY, origin, 4 - fit, 6 - particle, 3000 - element)
        assert torch.equal(part, whole[fit:, particle:, element:])


@pytest.mark.parametrize("form", ["torch", "triton" if torch.cuda.is_available() else "interpret"])
def test_the_operation_passes_opcheck(form):
    device = "cuda" if form == "triton" else "cpu"
    at = KEY[None].to(device), philox.make_origin(device=device)[None]
    with dispatch.use(form):
        torch.library.opcheck(
            torch.ops.fastsvi.philox_draw.default,
            (*at, 1, 1, 1, 3, philox.NORMAL, torch.float32),
        )


def test_offsets_above_2_to_the_32_do_not_alias():
    near = philox.words(KEY, philox.make_origin(0), 1, 1, 1024)
    far = philox.words(KEY, philox.make_origin(1 << 32), 1, 1, 1024)
    last = philox.words(KEY, philox.make_origin((1 << 34) - 1024), 1, 1, 1024)
    assert len({*near.flatten().tolist(), *far.flatten().tolist(), *last.flatten().tolist()}) > 3070
    assert far[0, 0, 300].item() == reference_word(KEY.tolist(), [1 << 30, 0, 0, 0], 0, 0, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("elements", [1, 3, 10, 127, 257, 700, 1025])
def test_a_block_of_steps_equals_its_steps_bit_for_bit(elements, dtype):
    block = philox.normal_block(KEY, philox.make_origin(step=5), 7, 2, 3, elements, dtype)
    for k in range(7):
        one = philox.normal(KEY, philox.make_origin(step=5 + k), 2, 3, elements, dtype)
        assert torch.equal(block[k], one)


def test_noise_block_hands_out_steps_in_any_order():
    origin = philox.make_origin(step=100, particle=2)
    noise = philox.NoiseBlock(KEY, origin, 1, 4, 3, num_steps=8)
    for step in [0, 1, 7, 8, 9, 3, 1000]:
        expected = philox.normal(KEY, philox.make_origin(step=100 + step, particle=2), 1, 4, 3)
        assert torch.equal(noise.at(step), expected)


def test_noise_block_keeps_to_its_memory():
    assert philox.NoiseBlock(KEY, philox.make_origin(), 1, 1, 3).num_steps == 256
    assert philox.NoiseBlock(KEY, philox.make_origin(), 1, 64, 10_000).num_steps == 1


def test_few_elements_draw_few_counters():
    assert philox._grid(3) == (3,)
    assert philox._grid(256) == (256,)
    assert philox._grid(257) == (1, 256)
    assert philox._grid(1025) == (2, 256)


def test_origin_is_data_to_a_captured_graph():
    graph = make_fx(lambda key, origin: philox.normal(key, origin, 1, 2, 3))(
        KEY, philox.make_origin()
    )
    moved = philox.make_origin(step=41)
    assert torch.equal(graph(KEY, moved), philox.normal(KEY, moved, 1, 2, 3))


def test_derived_keys_differ():
    seeds = [0, 1, 2**32, 2**32 + 1, 2**64 - 1]
    keys = {tuple(philox.derive_key(s, t).tolist()) for s in seeds for t in [0, 1, 2**32]}
    assert len(keys) == 15
    assert philox.derive_key(-1, 0).tolist() == philox.derive_key(2**64 - 1, 0).tolist()


class TestDistribution:
    """Fixed seeds; a failure at p = 1e-4 means a defect, not bad luck."""

    N = 1_000_000

    @pytest.fixture
    def sample(self):
        return philox.normal(KEY, philox.make_origin(), 1, 4, self.N // 4, torch.float64)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_normal_kolmogorov_smirnov(self, dtype):
        x = philox.normal(KEY, philox.make_origin(step=1), 1, 1, self.N, dtype)
        assert scipy.stats.kstest(x.double().flatten().numpy(), "norm").pvalue > 1e-4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_uniform_kolmogorov_smirnov(self, dtype):
        x = philox.uniform(KEY, philox.make_origin(step=2), 1, 1, self.N, dtype)
        assert scipy.stats.kstest(x.double().flatten().numpy(), "uniform").pvalue > 1e-4
        assert x.min() > 0
        assert x.max() < 1

    def test_moments(self, sample):
        # Standard errors of the first four moments of N(0, 1): sqrt(Var(x^k) / n).
        for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
            error = (sample**power).mean().item() - mean
            assert abs(error) < 4 * math.sqrt(variance / self.N), power

    def test_every_lane_is_normal(self, sample):
        lanes = sample[..., : 244 * 1024].unflatten(-1, (-1, 4, 256))
        for lane in range(4):
            x = lanes[..., lane, :].flatten().numpy()
            assert scipy.stats.kstest(x, "norm").pvalue > 1e-4

    def test_tails(self):
        # 8e6 draws: 4.6 expected beyond 5.
        counts, draws = dict.fromkeys((3.0, 4.0, 5.0), 0), 0
        for step in range(2):
            x = philox.normal(KEY, philox.make_origin(step=step), 1, 1, 4_000_000).abs()
            draws += x.numel()
            for bound in counts:
                counts[bound] += int((x > bound).sum())
        for bound, count in counts.items():
            p = 2 * scipy.stats.norm.sf(bound)
            assert scipy.stats.binomtest(count, draws, p).pvalue > 1e-4, bound

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extreme_words(self, dtype):
        words = torch.tensor([0, 1, MASK - 1, MASK])
        x = torch.stack(philox._box_muller(words, torch.tensor([0]), dtype, sine=True))
        assert x.isfinite().all()
        # sqrt(2 log 2^33) = 6.764: beyond the 5.68 of tl.randn, whose u is clamped.
        assert x.max().item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)
        assert x[0, -1].item() == pytest.approx(2**-16, rel=1e-6)
        unit = philox._unit(words, dtype)
        assert unit.min() > 0
        assert unit.max() < 1

    @pytest.mark.parametrize(
        "axis", ["step", "particle", "fit", "stream", "seed", "neighbour", "lane"]
    )
    def test_draws_that_differ_in_one_coordinate_are_independent(self, axis):
        n = 250_000
        step = philox.make_origin(step=7)

        def draw(key, origin):
            return philox.normal(key, origin, 1, 1, n, torch.float64).flatten()

        first = draw(KEY, step)
        if axis == "neighbour":
            second = first.roll(1)
        elif axis == "lane":
            second = first.roll(256)
        elif axis == "stream":
            second = draw(philox.derive_key(20, 7), step)
        elif axis == "seed":
            second = draw(philox.derive_key(21, 6), step)
        else:
            second = draw(KEY, philox.make_origin(**{"step": 7, axis: 8}))
        # Correlations of x, of |x| and of signs, each with standard error 1 / sqrt(n).
        for f in (lambda x: x, torch.abs, torch.sign):
            r = np.corrcoef(f(first).numpy(), f(second).numpy())[0, 1]
            assert abs(r) < 4 / math.sqrt(n)

    def test_words_of_neighbouring_counters_share_no_bits(self):
        w = philox.words(KEY, philox.make_origin(), 1, 2, 100_000)[0]
        flipped = w[0] ^ w[1]
        for bit in range(32):
            mean = ((flipped >> bit) & 1).double().mean().item()
            assert abs(mean - 0.5) < 4 * 0.5 / math.sqrt(100_000)


class TestBadInput:
    ORIGIN = philox.make_origin()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((torch.zeros(3, dtype=torch.int64), ORIGIN, 1, 1, 1), r"key.*shape \(3,\)"),
            ((torch.zeros(2), ORIGIN, 1, 1, 1), "key.*float32"),
            ((KEY, torch.zeros(3, dtype=torch.int64), 1, 1, 1), r"origin.*shape \(3,\)"),
            ((KEY, torch.zeros(4, dtype=torch.int32), 1, 1, 1), "origin.*int32"),
            ((KEY, ORIGIN, -1, 1, 1), "num_fits = -1"),
            ((KEY, ORIGIN, 1, -2, 1), "num_particles = -2"),
            ((KEY, ORIGIN, 1, 1, -3), "num_elements = -3"),
            ((KEY, ORIGIN, 1, 1, 1, torch.float16), "torch.float16"),
            ((KEY, ORIGIN.to("meta"), 1, 1, 1), "device.*meta"),
        ],
    )
    def test_draw(self, arguments, words):
        with pytest.raises(KernelError, match=f"philox.normal: .*{words}"):
            philox.normal(*arguments)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"element": 512}, "element = 512"),
            ({"element": 1 << 34}, "element"),
            ({"element": -1024}, "element = -1024"),
            ({"step": 1 << 32}, "step = 4294967296"),
            ({"particle": -1}, "particle = -1"),
            ({"fit": -1}, "fit = -1"),
        ],
    )
    def test_origin(self, arguments, words):
        with pytest.raises(KernelError, match=f"philox.make_origin: .*{words}"):
            philox.make_origin(**arguments)

    def test_negative_steps(self):
        with pytest.raises(KernelError, match="num_steps = -1"):
            philox.normal_block(KEY, self.ORIGIN, -1, 1, 1, 1)
