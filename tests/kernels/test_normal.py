"""The mean-field normal: conformance of its forms, and its formulas against torch.distributions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import pytest
import torch
from conformance import Case, Draw, Suite
from torch import Tensor
from torch.distributions import Independent, Normal

from fastsvi.errors import KernelError
from fastsvi.kernels import dispatch, normal, philox, transforms
from fastsvi.kernels.segment_table import EXP, IDENTITY, SIGMOID, SOFTPLUS, SegmentTable

KEY = philox.derive_key(11, 3)
FAR = 3 * (1 << 32)  # an element offset above 2^32


def case(
    name: str,
    fits: int,
    particles: int,
    elements: int,
    scale_map: normal.ScaleMap = "exp",
    estimator: normal.Estimator = "pathwise",
    origin: Tensor | None = None,
    given: bool = False,
    shift: float = 0.0,
    capture: bool = False,  # a second each
    **options,
) -> Case:
    """A case of normal.sample; ``given`` passes the noise in, ``shift`` moves raw_scale."""
    origin = philox.make_origin(step=5) if origin is None else origin

    def make(draw: Draw) -> tuple[Tensor, ...]:
        loc = draw.normal(fits, elements)
        # The identity map needs positive scales.
        low = 0.5 if scale_map == "identity" else -1.0
        raw_scale = draw.uniform(fits, elements, low=low, high=1.5) + shift
        noise = (draw.normal(fits, particles, elements),) if given else ()
        return (loc, raw_scale, KEY, origin, *noise)

    def call(loc, raw_scale, key, origin, noise=None):
        return normal.sample(
            loc, raw_scale, key, origin, particles, scale_map, estimator, noise=noise
        )

    return Case(name, make, call, grad=(0, 1), capture=capture, **options)


MIXED = [
    # The stl gradient is meant to differ from the derivative: see test_stl_equals_autograd below.
    case(
        f"{scale_map}-{estimator}",
        *(1, 3, 5),
        scale_map,
        estimator,
        gradcheck=estimator != "stl",
        gradcheck_interpreted=(scale_map, estimator) == ("softplus", "pathwise"),
        second=estimator != "entropy",
        strided_interpreted=(scale_map, estimator) == ("softplus", "stl"),
        capture=(scale_map, estimator) == ("softplus", "stl"),
    )
    for scale_map in normal.SCALE_MAPS
    for estimator in normal.ESTIMATORS
]


class TestSample(Suite):
    cases = (
        *MIXED,
        case(
            *("given", 1, 3, 5),
            given=True,
            gradcheck=True,
            strided_interpreted=True,
            vmap=True,
            compile=True,
            capture=True,
        ),
        case("vmap-origin", 1, 3, 5, vmap=True, batched=(3,)),
        case("vmap-loc-and-key", 2, 3, 5, "softplus", "stl", vmap=True, batched=(0, 2)),
        case("one", 1, 1, 1, compile=True, capture=True),
        case("tile-less-one", 1, 1, 1023, interpret=False),
        case("odd-127", 2, 1, 127),
        case("odd-1025", 1, 2, 1025, "softplus"),
        case("two-tiles", 2, 1, 2048, interpret=False),
        case("many-particles", 1, 65, 3),
        case("many-fits", 5, 2, 3, estimator="stl"),
        case("no-elements", 2, 3, 0),
        case("no-particles", 2, 0, 3),
        case("no-fits", 0, 3, 3),
        case("far", 1, 2, 300, origin=philox.make_origin(FAR, 2**32 - 1, 2**32 - 2, 2**31)),
        case("low-softplus", 1, 3, 5, "softplus", shift=-40.0),
        case("high-softplus", 1, 3, 5, "softplus", shift=40.0),
        case("low-exp", 1, 3, 5, "exp", shift=-40.0),
        # A float32 sum of a million terms, reference in float64: see TestAccumulation.
        case("large", 1, 1, 1_000_003, interpret=False),
    )


SPECS = {
    "all-kinds": ([IDENTITY, EXP, SOFTPLUS, SIGMOID], [2, 1, 3, 2], [0, 3, 0, -1], [1, -1, 2, 4]),
    "two-kinds": ([EXP, IDENTITY, EXP], [5, 0, 1], [0, 0, 1], [1, 1, 1]),
    "identity": ([IDENTITY], [4], [0], [1]),
    "affine": ([IDENTITY, IDENTITY], [2, 2], [1, 0], [1, -3]),
    "long": ([SIGMOID, EXP, SOFTPLUS], [500, 1, 800], [0, 0, 2], [1, 1, 1]),
}


@functools.cache
def table_of(
    kinds: tuple, sizes: tuple, shifts: tuple, scales: tuple, device: str, dtype: torch.dtype
) -> SegmentTable:
    """A table, built once: to build one on a GPU is to wait for it."""
    return SegmentTable.build(kinds, sizes, shifts, scales, device, dtype)


def table_for(spec: Sequence[Sequence], like: Tensor) -> SegmentTable:
    return table_of(*map(tuple, spec), like.device.type, like.dtype)


def constrained_case(
    spec: str, fits: int = 1, particles: int = 3, shift: float = 0.0, **options
) -> Case:
    given = options.pop("given", False)
    estimator = options.pop("estimator", "pathwise")
    elements = sum(SPECS[spec][1])

    def make(draw: Draw) -> tuple[Tensor, ...]:
        loc = draw.normal(fits, elements, loc=shift)
        raw_scale = draw.uniform(fits, elements, low=-1)
        noise = (draw.normal(fits, particles, elements),) if given else ()
        return (loc, raw_scale, KEY, philox.make_origin(step=5), *noise)

    def call(loc, raw_scale, key, origin, noise=None):
        at = (key, origin, particles, table_for(SPECS[spec], loc))
        return normal.sample_constrained(loc, raw_scale, *at, "exp", estimator, noise)

    options = {"capture": False} | options
    name = f"{spec}-{estimator}{'-given' if given else ''}{shift:+.0f}-{particles}"
    return Case(name, make, call, grad=(0, 1), **options)


def extreme_case(name: str, call, raw: float) -> Case:
    """Infinities, NaN and huge values in loc, each of which must stay with its own element."""

    def make(draw: Draw) -> tuple[Tensor, ...]:
        loc = torch.tensor([[0.0, math.inf, -math.inf, math.nan, 1e30, -1e30, 1e-30]]).double()
        raw_scale = torch.full_like(loc, raw)
        return loc, raw_scale, KEY, philox.make_origin(), draw.normal(1, 2, 7)

    # exp(80) times a noise that is off by 1e-7 of itself.
    return Case(f"{name}{raw:+.0f}", make, call, grad=(0, 1), capture=False)


def plain(loc, raw_scale, key, origin, noise):
    return normal.sample(loc, raw_scale, key, origin, 2, "exp", "pathwise", noise)


def every_kind(loc, raw_scale, key, origin, noise):
    """Each constraint at each extreme: four calls, log_det left out, for it mixes the elements."""
    values = []
    for kind in (IDENTITY, EXP, SOFTPLUS, SIGMOID):
        at = (key, origin, 2, table_for(([kind], [7], [0], [2]), loc))
        values.append(normal.sample_constrained(loc, raw_scale, *at, noise=noise)[0])
    return tuple(values)


# Of numpy, with which the interpreter computes, where infinities and NaN are the point.
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
class TestExtremes(Suite):
    cases = (
        *[extreme_case("sample", plain, raw) for raw in (-100.0, 0.0, 80.0)],
        *[extreme_case("constrained", every_kind, raw) for raw in (-100.0, 0.0)],
    )


class TestSampleConstrained(Suite):
    cases = (
        constrained_case("all-kinds", 2, gradcheck=True, strided_interpreted=True, vmap=True),
        constrained_case("all-kinds", estimator="stl", second=True),
        constrained_case("all-kinds", given=True),
        # A z near 16 is off by 2e-6, its noise by 1e-6 times a scale of 2.7: that is the relative
        # error of exp(z); the sum over three particles of both signs loses another factor of 5.
        constrained_case("all-kinds", shift=12.0, tolerance={torch.float32: (3e-5, 1e-5)}),
        constrained_case("all-kinds", shift=-30.0),
        constrained_case("two-kinds", gradcheck=True, gradcheck_interpreted=True),
        constrained_case("identity"),
        constrained_case("affine"),
        constrained_case("long", particles=1, dtypes=(torch.float32,)),
        constrained_case("all-kinds", particles=0),
    )


def test_constrained_equals_sample_then_constrain():
    table = SegmentTable.build(*SPECS["all-kinds"], dtype=torch.float64)
    loc, raw_scale = torch.randn(2, 8).double(), torch.randn(2, 8).double()
    at = KEY, philox.make_origin(), 3
    y, log_q, log_det = normal.sample_constrained(loc, raw_scale, *at, table)
    z, expected = normal.sample(loc, raw_scale, *at)
    torch.testing.assert_close(log_q, expected)
    constrained, log_dets = transforms.constrain_with_log_det(z, table)
    torch.testing.assert_close(y, constrained)
    torch.testing.assert_close(log_det, log_dets.sum(-1))


def test_the_table_must_fit():
    table = SegmentTable.build([EXP], [4])
    with pytest.raises(KernelError, match=r"sample_constrained: the table.*4 elements.*float64"):
        normal.sample_constrained(
            *torch.zeros(2, 1, 4).double(), KEY, philox.make_origin(), 1, table
        )


OPCHECK_FORM = "triton" if torch.cuda.is_available() else "interpret"


@pytest.mark.parametrize("form", ["torch", OPCHECK_FORM])
def test_the_operations_pass_opcheck(form):
    device = "cuda" if form == "triton" else "cpu"
    loc = torch.randn(1, 1, 3, device=device, requires_grad=True)
    raw_scale = torch.randn(1, 1, 3, device=device, requires_grad=True)
    at = KEY[None].to(device), philox.make_origin(device=device)[None]
    options = (2, "exp", "stl")
    with dispatch.use(form):
        torch.library.opcheck(
            torch.ops.fastsvi.normal_forward.default,
            (loc, raw_scale, *at, None, [], 0, *options),
        )
        grads = (torch.randn(1, 1, 2, 3, device=device), torch.randn(1, 1, 2, device=device), None)
        torch.library.opcheck(
            torch.ops.fastsvi.normal_backward.default,
            (loc.detach(), raw_scale.detach(), *at, None, *grads, [], 0, *options),
        )
        table = SegmentTable.build([EXP, SIGMOID], [1, 2], device=device)
        tensors = [table.segments.ids, table.kinds, table.shift, table.scale]
        torch.library.opcheck(
            torch.ops.fastsvi.normal_forward.default,
            (loc, raw_scale, *at, None, tensors, table.kinds_in_use, *options),
        )


@pytest.mark.parametrize("estimator", ["pathwise", "stl"])
def test_the_cpu_rule_gives_what_the_public_function_does(estimator):
    table = SegmentTable.build(*SPECS["all-kinds"], dtype=torch.float64)
    tensors = [table.segments.ids, table.kinds, table.shift, table.scale]
    loc, raw_scale = torch.randn(2, 2, 8, dtype=torch.float64).unbind()
    at, options = (KEY, philox.make_origin()), (3, "softplus", estimator)

    def run(leaves, form):
        if form == "rule":
            arguments = *(x[None] for x in (*leaves, *at)), None, tensors, 0b1111, *options
            outputs = [y[0] for y in torch.ops.fastsvi.normal_forward(*arguments)]
        else:
            outputs = normal.sample_constrained(*leaves, *at, 3, table, *options[1:])
        grads = torch.autograd.grad(sum(y.sin().sum() for y in outputs), leaves)
        return *outputs, *grads

    results = [run([x.clone().requires_grad_() for x in (loc, raw_scale)], f) for f in ("rule", "")]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("form", ["torch", OPCHECK_FORM])
def test_vmap_in_vmap(form):
    device = "cuda" if form == "triton" else "cpu"
    locs = torch.randn(3, 2, 1, 5, device=device)
    keys = torch.stack([philox.derive_key(seed, 0) for seed in range(2)]).to(device)
    at = philox.make_origin(device=device)

    def draw(loc, key):
        return normal.sample(loc, torch.zeros_like(loc), key, at, 4)

    with dispatch.use(form):
        z, log_q = torch.func.vmap(torch.func.vmap(draw), (0, None))(locs, keys)
        for i in range(3):
            for j in range(2):
                expected = draw(locs[i, j], keys[j])
                torch.testing.assert_close((z[i, j], log_q[i, j]), expected)


@pytest.mark.parametrize("scale_map", normal.SCALE_MAPS)
def test_log_q_is_the_density_of_z(scale_map):
    loc = torch.randn(2, 7, dtype=torch.float64)
    raw_scale = torch.rand(2, 7, dtype=torch.float64) + 0.5
    z, log_q = normal.sample(loc, raw_scale, KEY, philox.make_origin(), 5, scale_map)
    scale = normal.scale_of(raw_scale, scale_map)
    q = Independent(Normal(loc[:, None], scale[:, None]), 1)
    torch.testing.assert_close(log_q, q.log_prob(z))


def test_entropy_is_the_entropy():
    loc, raw_scale = torch.randn(2, 7), torch.randn(2, 7)
    _, log_q = normal.sample(loc, raw_scale, KEY, philox.make_origin(), 3, estimator="entropy")
    entropy = Independent(Normal(loc, raw_scale.exp()), 1).entropy()
    torch.testing.assert_close(log_q, -entropy[:, None].expand(2, 3))


def test_stl_equals_autograd_of_the_detached_density():
    loc = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    raw_scale = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    origin = philox.make_origin()
    z, log_q = normal.sample(loc, raw_scale, KEY, origin, 5, "softplus", "stl")
    loss = (z.sin().sum(-1) * 2 - log_q * 3).sum()
    found = torch.autograd.grad(loss, (loc, raw_scale))

    noise = philox.normal(KEY, origin, 2, 5, 7, torch.float64)
    scale = torch.nn.functional.softplus(raw_scale)[:, None]
    z = loc[:, None] + scale * noise
    log_q = Normal(loc[:, None].detach(), scale.detach()).log_prob(z).sum(-1)
    loss = (z.sin().sum(-1) * 2 - log_q * 3).sum()
    torch.testing.assert_close(found, torch.autograd.grad(loss, (loc, raw_scale)))


def test_stl_has_no_variance_where_the_guide_is_exact():
    loc = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)
    raw_scale = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)
    z, log_q = normal.sample(loc, raw_scale, KEY, philox.make_origin(), 1, estimator="stl")
    log_p = Normal(loc.detach(), raw_scale.detach().exp()).log_prob(z).sum()
    grads = torch.autograd.grad(log_p - log_q.sum(), (loc, raw_scale))
    # Two equal terms cancel; each is of order exp(2) at most.
    for grad in grads:
        assert grad.abs().max() < 1e-13


def test_noise_is_used_as_given_and_gets_no_gradient():
    loc, raw_scale = torch.zeros(1, 3), torch.zeros(1, 3, requires_grad=True)
    noise = torch.tensor([[[1.0, 2.0, -3.0]]], requires_grad=True)
    z, _ = normal.sample(loc, raw_scale, KEY, philox.make_origin(), 1, noise=noise)
    assert torch.equal(z, noise)
    z.sum().backward()
    assert noise.grad is None
    torch.testing.assert_close(raw_scale.grad, noise.detach()[:, 0])


def test_second_derivatives_of_the_reference():
    inputs = (
        torch.randn(1, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(1, 3, dtype=torch.float64, requires_grad=True),
    )
    with dispatch.use("torch"):
        assert torch.autograd.gradgradcheck(
            lambda loc, raw: normal.sample(loc, raw, KEY, philox.make_origin(), 2, "softplus"),
            inputs,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("raw", [-200.0, -100.0, -40.0, -37.0, -20.0, 0.0, 20.0, 100.0])
def test_log_scale_of_softplus_in_both_tails(raw, dtype):
    x = torch.tensor([[raw]], dtype=dtype, requires_grad=True)
    _, log_q = normal.sample(
        x.detach(), x, KEY, philox.make_origin(), 1, "softplus", noise=torch.zeros(1, 1, 1).to(x)
    )
    log_scale = -log_q - 0.5 * math.log(2 * math.pi)
    # log(log1p(exp(x))), with the first two terms of its series where exp(x) is tiny.
    exact = raw - math.exp(raw) / 2 if raw < -30 else math.log(math.log1p(math.exp(raw)))
    torch.testing.assert_close(
        log_scale.item(),
        exact,
        rtol=2 * torch.finfo(dtype).eps * 4,
        atol=1e-6 if dtype == torch.float32 else 1e-15,
    )
    (slope,) = torch.autograd.grad(-log_q, x)
    sigmoid = 1 / (1 + math.exp(-raw))
    exact = 1.0 if raw < -37 else sigmoid / math.log1p(math.exp(raw))
    torch.testing.assert_close(slope.item(), exact, rtol=8 * torch.finfo(dtype).eps, atol=0)


class TestAccumulation:
    def test_log_q_of_many_elements(self):
        # Alternating log scales of +-1 sum to 0: what is left is the error of the sum.
        elements = 3_000_000
        raw_scale = torch.ones(1, elements)
        raw_scale[0, ::2] = -1.0
        noise = torch.full((1, 1, elements), 0.1)
        _, log_q = normal.sample(
            raw_scale, raw_scale, KEY, philox.make_origin(), 1, "exp", noise=noise
        )
        square = torch.tensor(0.1).double().square().item()
        exact = -elements * (0.5 * square + 0.5 * math.log(2 * math.pi))
        # Half an ulp of the float32 result, and the rounding of 0.1^2 that all terms share.
        assert abs(log_q.item() - exact) <= abs(exact) * 2**-24 + elements * square * 2**-25


class TestBadInput:
    def sample(self, **changes):
        arguments = {
            "loc": torch.zeros(2, 3),
            "raw_scale": torch.zeros(2, 3),
            "key": KEY,
            "origin": philox.make_origin(),
            "num_particles": 4,
        }
        return normal.sample(**(arguments | changes))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"loc": torch.zeros(3)}, r"\[F, D\].*shape \(3,\)"),
            ({"raw_scale": torch.zeros(2, 4)}, r"\[F, D\].*shape \(2, 4\)"),
            ({"raw_scale": torch.zeros(2, 3).double()}, "float64"),
            ({"loc": torch.zeros(2, 3).int(), "raw_scale": torch.zeros(2, 3).int()}, "int32"),
            ({"num_particles": -1}, "num_particles = -1"),
            ({"scale_map": "square"}, "'square'"),
            ({"estimator": "reinforce"}, "'reinforce'"),
            ({"noise": torch.zeros(2, 3)}, r"\(2, 4, 3\).*shape \(2, 3\)"),
            ({"noise": torch.zeros(2, 4, 3).double()}, "float64"),
            ({"key": torch.zeros(3, dtype=torch.int64)}, r"key.*shape \(3,\)"),
            ({"origin": torch.zeros(4)}, "origin.*float32"),
            ({"loc": torch.zeros(2, 3, device="meta")}, "device.*meta"),
        ],
    )
    def test_names_the_op_and_the_value(self, changes, words):
        with pytest.raises(KernelError, match=f"normal.sample.*{words}"):
            self.sample(**changes)
