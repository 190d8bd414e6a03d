"""Every twin of the draws gives the same numbers, at words of our choice too.

The twins: the torch reference, the Triton kernel, and the C++ of native steps. Philox maps counters
to words one to one, so the counter that gives the words wanted can be computed: here the extremes,
which a million draws would not meet.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance import FORMS

from fastsvi.engine.native import NativeStep
from fastsvi.engine.noise_op import normal_noise, uniform_noise
from fastsvi.kernels import dispatch, philox

KEY = philox.derive_key(7, 5)
MASK = 0xFFFFFFFF
QUARTER = 1 << 30
DTYPES = [torch.float32, torch.float64]

# Of the radius: where u is nearly 0 and nearly 1, and where twins change branch.
RADII = [0, 1, 0xFF, QUARTER, 2 * QUARTER - 1, 2 * QUARTER, 0xB504F333, MASK - 0x10000]
RADII += [MASK - 0x100, MASK - 0xFF, MASK - 1, MASK]
# Of the angle: whole and half quarters of a turn, and their neighbours.
ANGLES = [(q * QUARTER // 2 + d) & MASK for q in range(8) for d in (-1, 0, 1)]


def counter_of(words: tuple[int, ...], key: list[int]) -> list[int]:
    """The counter whose words these are: the rounds backwards."""
    inverse_0 = pow(philox.MULTIPLIER_0, -1, 1 << 32)
    inverse_1 = pow(philox.MULTIPLIER_1, -1, 1 << 32)
    for k0, k1 in reversed(philox._schedule(*key)):
        x0, low_1, x2, low_0 = words
        c0, c2 = low_0 * inverse_0 & MASK, low_1 * inverse_1 & MASK
        high_0, high_1 = c0 * philox.MULTIPLIER_0 >> 32, c2 * philox.MULTIPLIER_1 >> 32
        words = (c0, x0 ^ high_1 ^ k0, c2, x2 ^ high_0 ^ k1)
    return list(words)


def origins() -> torch.Tensor:
    """Origins [n, 4] whose first counter has words to be tried: two radii, two angles."""
    pairs = [(r, a) for r in RADII for a in ANGLES]
    chosen = [(*pairs[i], *pairs[i + 1]) for i in range(0, len(pairs), 2)]
    return torch.tensor([counter_of(words, KEY.tolist()) for words in chosen])


def exact_normals(words: torch.Tensor) -> torch.Tensor:
    """Normals [..., 4, n] in float64 from the words [..., 4, n] of n counters."""
    w = words.numpy()
    unit = (w + 0.5) * 2.0**-32
    log = np.where(w < 1 << 31, np.log(unit), np.log1p(-(MASK - w + 0.5) * 2.0**-32))
    radius = np.sqrt(-2.0 * log)
    quarter = (w + QUARTER // 2) // QUARTER % 4
    x = (w - (w + QUARTER // 2) // QUARTER * QUARTER) * (2.0 * math.pi * 2.0**-32)
    c, s = np.cos(x), np.sin(x)
    cosine = np.choose(quarter, [c, -s, -c, s])
    sine = np.choose(quarter, [s, c, -s, -c])
    parts = [radius[..., i, :] * f[..., i + 1, :] for i in (0, 2) for f in (cosine, sine)]
    return torch.from_numpy(np.stack(parts, -2))


def assert_within_ulps(found: torch.Tensor, exact: torch.Tensor, most: float) -> None:
    """``found`` in float32 against float64, relative to the last place of the nearest float32."""
    nearest = exact.float().abs()
    spacing = torch.nextafter(nearest, torch.tensor(math.inf)).double() - nearest
    error = (found.double() - exact).abs()
    # The exact zeros of the cosine: half a turn in float64 is off by 1e-16.
    error = torch.where(error < 1e-14, 0.0, error)
    assert (error / spacing).max().item() <= most


def assert_near(found: torch.Tensor, exact: torch.Tensor, ulps: float = 4) -> None:
    if found.dtype == torch.float32:
        assert_within_ulps(found, exact, ulps)
    else:
        # The angle, of up to 2 pi, is rounded twice, and so is the number: in all 11 eps / 2 of
        # the radius, which is at most 6.8.
        torch.testing.assert_close(found, exact, rtol=4 * 2.0**-52, atol=6.8 * 11 * 2.0**-53)


def words_at(origin: torch.Tensor) -> torch.Tensor:
    """Words [n, 4, 256] of the first tile at each of the origins [n, 4]."""
    draw = torch.func.vmap(lambda at: philox.words(KEY, at, 1, 1, 1024))
    return draw(origin).reshape(-1, 4, 256)


def test_words_can_be_chosen():
    chosen = words_at(origins())[:, :, 0]
    assert set(chosen[:, [0, 2]].flatten().tolist()) == set(RADII)
    assert set(chosen[:, [1, 3]].flatten().tolist()) == set(ANGLES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_normals_at_extreme_words(form, dtype):
    device = "cuda" if form == "triton" else "cpu"
    at = origins() if form != "interpret" else origins()[::5]  # some 40 ms each
    draw = torch.func.vmap(lambda origin: philox.normal(key, origin, 1, 1, 1024, dtype))
    key = KEY.to(device)
    with dispatch.use(form):
        found = draw(at.to(device)).cpu().reshape(-1, 4, 256)
    assert found.dtype == dtype
    assert_near(found, exact_normals(words_at(at)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_normals_of_a_million_words(dtype):
    words = philox.words(KEY, philox.make_origin(step=2), 1, 1, 1 << 20)
    found = philox.normal(KEY, philox.make_origin(step=2), 1, 1, 1 << 20, dtype)
    assert_near(found.view(-1, 4, 256), exact_normals(words.view(-1, 4, 256)))


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """Compiled draws by (dtype, elements): origin -> (normals, uniforms), each ``[elements]``."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTSVI_CACHE", str(tmp_path_factory.mktemp("cache")))
    compiled = {}

    def draw(origin, dtype, elements):
        def step(normals, uniforms, at, key):
            drawn = [op(key, at, 0, 1, 1, elements, dtype) for op in (normal_noise, uniform_noise)]
            return *drawn, at.clone(), drawn[0].sum(), torch.zeros((), dtype=torch.bool)

        if (dtype, elements) not in compiled:
            state = [torch.zeros(2, 1, 1, elements, dtype=dtype)[i].clone() for i in range(2)]
            compiled[dtype, elements] = NativeStep(step, [*state, origin.clone()], [KEY])
        state = [torch.zeros(1, 1, elements, dtype=dtype) for _ in range(2)] + [origin.clone()]
        compiled[dtype, elements].run(1, state=state)
        return state[0].flatten(), state[1].flatten()

    yield draw
    patch.undo()


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_normals_of_a_million_words(native, dtype):
    origin = philox.make_origin(step=3)
    normals, uniforms = native(origin, dtype, 1_000_003)
    exact = exact_normals(philox.words(KEY, origin, 1, 1, 977 * 1024).view(-1, 4, 256))
    # One ulp more than the others: the sine and cosine there take the angle in one float.
    assert_near(normals, exact.flatten()[:1_000_003], ulps=5)
    expected = philox.uniform(KEY, origin, 1, 1, 1_000_003, dtype).flatten()
    torch.testing.assert_close(uniforms, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_normals_at_extreme_words(native, dtype):
    at = origins()
    drawn = [native(origin, dtype, 1024) for origin in at]
    found = torch.stack([normals for normals, _ in drawn]).view(-1, 4, 256)
    assert_near(found, exact_normals(words_at(at)), ulps=5)
    uniforms = torch.stack([uniforms for _, uniforms in drawn])
    assert uniforms.min() > 0
    assert uniforms.max() < 1


def test_native_normals_of_few_elements_at_extreme_words(native):
    """One element is a counter's first word, by a loop of its own."""
    at = origins()
    found = torch.stack([native(origin, torch.float32, 1)[0] for origin in at])
    assert_near(found, exact_normals(words_at(at))[:, :1, 0], ulps=5)
