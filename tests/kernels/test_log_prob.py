from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
import torch.distributions as dist
from conformance import Case, Suite, unwaited
from torch.fx.experimental.proxy_tensor import make_fx

from fastsvi.errors import KernelError
from fastsvi.kernels import dispatch
from fastsvi.kernels import log_prob as kernels
from fastsvi.kernels.log_prob import FAMILIES, log_prob

# numpy, with which the interpreter computes, warns where IEEE arithmetic gives inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def positive(shape, dtype):
    return torch.randn(shape, dtype=dtype).exp()


def real(shape, dtype):
    return torch.randn(shape, dtype=dtype)


def unit(shape, dtype):
    return torch.rand(shape, dtype=dtype) * 0.98 + 0.01


def binary(shape, dtype):
    return (torch.rand(shape) < 0.5).to(dtype)


def count(shape, dtype):
    return torch.poisson(torch.full(shape, 3.0)).to(dtype)


# family -> (distribution of torch, how to draw the value, how to draw each parameter)
CASES = {
    "normal": (dist.Normal, real, (real, positive)),
    "bernoulli_logits": (lambda logits, **kw: dist.Bernoulli(logits=logits, **kw), binary, (real,)),
    "poisson": (dist.Poisson, count, (positive,)),
    "student_t": (dist.StudentT, real, (positive, real, positive)),
    "log_normal": (dist.LogNormal, positive, (real, positive)),
    "half_normal": (dist.HalfNormal, positive, (positive,)),
    "half_cauchy": (dist.HalfCauchy, positive, (positive,)),
    "gamma": (dist.Gamma, positive, (positive, positive)),
    "beta": (dist.Beta, unit, (positive, positive)),
}
CONTINUOUS = [family for family in CASES if family not in ("bernoulli_logits", "poisson")]
SHAPES = [(), (5,), (3, 7), (0,), (2, 0, 3), (41, 101)]


def case(name, family, shapes, event_ndims, integers=False, **options):
    """A case of one family; ``shapes`` are those of the value and of each parameter."""
    _, value, params = CASES[family]

    def make(drawer):
        inputs = []
        for shape, kind in zip(shapes, (value, *params), strict=True):
            normal = drawer.normal(*shape)
            inputs.append(
                {
                    real: normal,
                    positive: normal.exp(),
                    unit: normal.sigmoid() * 0.9 + 0.05,
                    binary: (normal > 0).double(),
                    count: (3 * normal.abs()).floor(),
                }[kind]
            )
        return tuple(inputs)

    def call(*args):
        return log_prob(family, *args, event_ndims=event_ndims)

    grad = tuple(range(family not in CONTINUOUS, len(shapes)))
    return Case(name, make, call, grad=grad, **options)


# What a matrix can look like, all with the normal; for the other families one of them.
NORMAL = {
    "elementwise": ((3, 5), (3, 5), (3, 5), 0),
    "elementwise-broadcast": ((3, 5), (5,), (), 0),
    "rows": ((3, 5), (5,), (3, 1), 1),
    "scalar-parameters": ((7,), (), (), 1),
    "total": ((3, 5), (5,), (3, 1), 2),
    "inner-rows": ((2, 3, 5), (5,), (3, 1), 2),
    "alternating": ((2, 3, 5), (2, 1, 5), (3, 1), 2),
    "outer-product": ((3, 1), (1, 5), (), 1),
    "long": ((1500,), (), (1,), 1),
    "tall": ((300, 4), (4,), (300, 1), 1),
    "single": ((), (), (), 0),
    "empty": ((2, 0), (0,), (), 1),
}
# lgamma and the like in float32: some eps of terms of size 20 that cancel, as in the reference.
CANCEL = {torch.float32: (5e-6, 5e-5)}


class TestConformance(Suite):
    cases: ClassVar[list[Case]] = [
        *(
            case(
                f"normal-{name}",
                "normal",
                shapes,
                event_ndims,
                gradcheck=name == "rows",
                vmap=name in ("rows", "alternating"),
                capture=name == "rows",
                compile=name == "rows",
                second=name in ("rows", "elementwise"),
                strided_interpreted=name in ("rows", "total"),
            )
            for name, (*shapes, event_ndims) in NORMAL.items()
        ),
        *(
            case(
                family,
                family,
                ((3, 5), (5,), (3, 1), ())[: 1 + len(params)],
                1,
                capture=False,
                second=True,
                tolerance=CANCEL,
            )
            for family, (_, _, params) in CASES.items()
            if family != "normal"
        ),
    ]


# Values where the formulas change branch or leave the float32 range: (family, value, *params).
# (A NaN value under a student_t or half_cauchy makes the density NaN in all forms, but the
# gradients by df and scale in the Triton form only.)
EXTREMES = [
    ("normal", [0.0, 1e4, -1e4, 1.0, math.inf, math.nan], [0.25], [1e-30]),
    ("normal", [0.0, 1e4, -1e4, 1.0, math.inf, math.nan], [0.25], [1e30]),
    ("bernoulli_logits", [0.0, 1.0, 0.5, 1.0], [1e4, -1e4, 80.0, math.nan]),
    ("poisson", [0.0, 1.0, 1e4, 0.0], [1e-30, 1e4, 1e4, 1e30]),
    ("student_t", [0.0, 0.25, 1e4, -1e4], [3.0], [0.25], [1e-30]),
    ("student_t", [0.0, 0.25, 1e4, -1e4], [1e8], [0.25], [1e30]),
    ("student_t", [1.0, 2.0, 3.0], [1e8, 31.0, 33.0], [0.25], [1.0]),
    ("log_normal", [1e-30, 1e30, 1.0, math.nan], [0.0], [1.0]),
    ("half_normal", [-1.0, 0.0, 1e4, math.nan], [1e-10]),
    ("half_cauchy", [-1.0, 0.0, 1e4, 1e30], [1e-30]),
    ("gamma", [1e-30, 1e4, 1.0], [1e-3, 1e4, 1.0], [2.0]),
    ("beta", [1e-30, 0.5, 1e-8], [1e-3, 1e3, 1.0], [2.0, 1e3, 1.0]),
]


@pytest.mark.parametrize("row", EXTREMES, ids=lambda row: row[0])
def test_forms_agree_at_the_extremes(row):
    family, *lists = row
    form = "triton" if torch.cuda.is_available() else "interpret"

    def evaluate(dtype, form):
        device = "cuda" if form == "triton" else "cpu"
        # Rounded to float32 first, in both.
        args = [torch.tensor(x, dtype=torch.float32, device=device).to(dtype) for x in lists]
        leaves = [arg.requires_grad_() for arg in args]

        def density_and_gradients():
            density = log_prob(family, *args)
            return [density.detach(), *torch.autograd.grad(density.sum(), leaves[1:])]

        with dispatch.use(form):
            return unwaited(density_and_gradients)

    for found, expected in zip(
        evaluate(torch.float32, form), evaluate(torch.float64, "torch"), strict=True
    ):
        # Sums of terms of 1e5 that cancel keep some eps of them.
        scale = expected.abs().nan_to_num(0.0, 0.0).clamp(min=1.0)
        limit = torch.finfo(torch.float32).max
        expected = torch.where(expected.abs() > limit, expected.sign() * math.inf, expected)
        error = (found.cpu().double() - expected).abs() / scale
        same = torch.isnan(found.cpu()) & torch.isnan(expected) | (found.cpu() == expected)
        assert (same | (error < 1e-5) | (error * scale < 0.05)).all(), (found, expected)


def draw(family, shape, dtype=torch.float64, param_shapes=None):
    _, value, params = CASES[family]
    param_shapes = param_shapes or [shape] * len(params)
    drawn = [make(s, dtype) for make, s in zip(params, param_shapes, strict=True)]
    return value(shape, dtype), drawn


def torch_log_prob(family, value, params):
    return CASES[family][0](*params, validate_args=False).log_prob(value)


def test_registration():
    form, device = ("triton", "cuda") if torch.cuda.is_available() else ("interpret", "cpu")
    value, loc, scale, grad = torch.randn(4, 2, 3, device=device).exp().unbind()
    loc, scale = loc[0].requires_grad_(), scale[:, :1].clone().requires_grad_()
    with dispatch.use(form):
        torch.library.opcheck(kernels._log_prob_op, ("normal", value, loc, scale, None, 1))
        args = ("normal", grad[:, 0].contiguous(), value, loc.detach(), scale.detach(), None, 1, 6)
        torch.library.opcheck(kernels._log_prob_backward_op, args)


def test_every_family_has_a_case_and_a_public_function():
    assert set(CASES) == set(FAMILIES)
    for family in FAMILIES:
        value, params = draw(family, (4,))
        found = getattr(kernels, family)(value, *params, event_ndims=1)
        assert torch.equal(found, log_prob(family, value, *params, event_ndims=1))
        by_name = dict(zip(FAMILIES[family].params, params, strict=True))
        assert torch.equal(found, getattr(kernels, family)(value, **by_name, event_ndims=1))


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_agree_with_torch_for_every_number_of_event_dimensions(family, shape):
    value, params = draw(family, shape)
    expected = torch_log_prob(family, value, params)
    for event_ndims in range(len(shape) + 1):
        found = log_prob(family, value, *params, event_ndims=event_ndims)
        batch = shape[: len(shape) - event_ndims]
        dims = tuple(range(len(batch), len(shape)))
        torch.testing.assert_close(found, expected.sum(dims) if dims else expected)
        assert torch.equal(found, log_prob(family, value, *params, batch_shape=batch))


@pytest.mark.parametrize("family", CASES)
def test_broadcasting_forward_and_backward(family):
    num = len(CASES[family][2])
    for param_shapes in ([()] * num, [(5,)] * num, [(4, 1), (1, 5), (3, 1, 1)][:num]):
        value, params = draw(family, (3, 4, 5), param_shapes=param_shapes)
        leaves = [value, *params] if family in CONTINUOUS else params
        for leaf in leaves:
            leaf.requires_grad_()
        weight = torch.randn(3, dtype=torch.float64)
        found = log_prob(family, value, *params, event_ndims=2)
        expected = torch_log_prob(family, value, params).sum((-1, -2))
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad((x * weight).sum(), leaves) for x in (found, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("family", CASES)
def test_gradients(family):
    value, params = draw(family, (3, 2), param_shapes=[(2,)] * len(CASES[family][2]))
    if family == "student_t":
        params[0][1] = 60.0  # on the series of the gamma functions
    # Counts and outcomes too: the formulas hold between them.
    inputs = [x.requires_grad_() for x in (value + 0.125 * (family == "poisson"), *params)]
    call = lambda *args: log_prob(family, *args, event_ndims=1)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, check_backward_ad=False)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("family", CASES)
def test_vmap(family):
    value, params = draw(family, (3, 4))

    def row(value, *params):
        return log_prob(family, value, *params, event_ndims=1)

    expected = log_prob(family, value, *params, event_ndims=1)
    torch.testing.assert_close(torch.func.vmap(row)(value, *params), expected)
    # Values mapped over the last dimension, parameters shared or a single number each.
    shared = [param[0, 0] for param in params]
    in_dims = (1, *[None] * len(params))
    found = torch.func.vmap(row, in_dims)(value, *shared)
    torch.testing.assert_close(found, log_prob(family, value.T, *shared, event_ndims=1))
    # One parameter per row against all values: a batch dimension on the lower-ranked argument.
    in_dims = (None, *[0] * len(params))
    found = torch.func.vmap(row, in_dims)(value, *[param[:, 0] for param in params])
    rows = [param[:, 0].reshape(3, 1, 1) for param in params]
    torch.testing.assert_close(found, log_prob(family, value, *rows, event_ndims=1))


@pytest.mark.parametrize("family", CASES)
def test_backward_through_vmap(family):
    value, params = draw(family, (3, 4))
    leaves = [param[0].clone().requires_grad_() for param in params]
    in_dims = (0, *[None] * len(params))
    mapped = torch.func.vmap(lambda v, *p: log_prob(family, v, *p, event_ndims=1), in_dims)
    weight = torch.randn(3, dtype=torch.float64)
    found = torch.autograd.grad((mapped(value, *leaves) * weight).sum(), leaves)
    plain = torch_log_prob(family, value, leaves).sum(-1)
    torch.testing.assert_close(found, torch.autograd.grad((plain * weight).sum(), leaves))


def test_nested_vmap_with_gradient_inside():
    def grad_of(value, loc, scale):
        return torch.func.grad(lambda s: log_prob("normal", value, loc, s, event_ndims=1))(scale)

    value, loc = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    scale = positive((2,), torch.float64)
    inner = torch.func.vmap(grad_of, (0, 0, None))
    found = torch.func.vmap(inner, (0, None, 0))(value, loc, scale)
    z = (value - loc) / scale.reshape(2, 1, 1)
    torch.testing.assert_close(found, ((z * z - 1) / scale.reshape(2, 1, 1)).sum(-1))


@pytest.mark.parametrize("family", CASES)
def test_make_fx_captures_forward_and_backward(family):
    def step(value, *params):
        loss = log_prob(family, value, *params, event_ndims=1).sum()
        return loss.detach(), torch.autograd.grad(loss, params)

    value, params = draw(family, (3, 4))
    for param in params:
        param.requires_grad_()
    graph = make_fx(step)(value, *params)
    value, params = draw(family, (3, 4))
    for param in params:
        param.requires_grad_()
    torch.testing.assert_close(graph(value, *params), step(value, *params))


@pytest.mark.parametrize("family", CASES)
def test_float32_against_float64(family):
    value, params = draw(family, (2000,), torch.float32)
    wide = [x.double() for x in (value, *params)]
    narrow = [x.requires_grad_() for x in (value, *params)]
    exact = [x.requires_grad_() for x in wide]
    found, expected = log_prob(family, *narrow), log_prob(family, *exact)
    # The largest terms that cancel here are lgamma(50), 150; each is off by an eps or so of it.
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=200 * 2.0**-23)
    for a, b in zip(
        torch.autograd.grad(found.sum(), narrow),
        torch.autograd.grad(expected.sum(), exact),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=5e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("value", [-1e4, -1.0, 0.0, 1e-3, 1e4])
@pytest.mark.parametrize("family", ["normal", "student_t", "half_cauchy", "half_normal"])
def test_extreme_scales_give_the_exact_result_or_its_overflow(family, value, scale, dtype):
    """Against the same formula in float64, where nothing between 1e-200 and 1e200 overflows."""
    loc = {"normal": [0.25], "student_t": [3.0, 0.25]}.get(family, [])

    def evaluate(dtype):
        # The arguments are rounded to the narrow dtype first, in both.
        raw = [torch.tensor(x, dtype=dtype_under_test).to(dtype) for x in (value, *loc, scale)]
        args = [x.requires_grad_() for x in raw]
        density = log_prob(family, *args)
        return [density.detach(), *torch.autograd.grad(density, args)]

    dtype_under_test = dtype
    for found, expected in zip(evaluate(dtype), evaluate(torch.float64), strict=True):
        assert not torch.isnan(found)
        tiny = torch.finfo(dtype).tiny * 1e8  # products that underflow on the way
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-5, atol=tiny)


def test_torch_loses_what_the_kernel_keeps():
    """The reason for our own formulas: torch squares the scale."""
    value, loc, scale = torch.zeros(()), torch.zeros(()), torch.tensor(1e-30)
    exact = -math.log(1e-30) - 0.5 * math.log(2 * math.pi)
    assert log_prob("normal", value, loc, scale).item() == pytest.approx(exact, rel=1e-6)
    assert torch.isnan(torch_log_prob("normal", value, [loc, scale]))


@pytest.mark.parametrize("logit", [20.0, 80.0, 1e4])
def test_bernoulli_is_stable_in_both_tails(logit):
    logits = torch.tensor([logit, -logit], requires_grad=True)
    likely = log_prob("bernoulli_logits", torch.tensor([1.0, 0.0]), logits)
    torch.testing.assert_close(likely, torch.full((2,), -math.exp(-logit)), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(likely.sum(), logits)
    torch.testing.assert_close(
        grad, torch.tensor([1.0, -1.0]) * math.exp(-logit), rtol=1e-6, atol=0
    )
    unlikely = log_prob("bernoulli_logits", torch.tensor([0.0, 1.0]), logits)
    torch.testing.assert_close(unlikely, torch.full((2,), -logit))


def test_student_t_approaches_the_normal():
    value = torch.linspace(-5, 5, 11)
    zero, one = torch.zeros(()), torch.ones(())
    found = log_prob("student_t", value, torch.tensor(1e9), zero, one)
    # torch's float32 lgamma(5e8) has an error of some hundred here.
    torch.testing.assert_close(found, log_prob("normal", value, zero, one), rtol=1e-5, atol=1e-5)


def test_edges_of_supports():
    zero, one = torch.zeros(()), torch.ones(())
    assert log_prob("log_normal", zero, zero, one).item() == -math.inf
    assert log_prob("poisson", zero, zero).item() == 0.0
    assert log_prob("gamma", zero, one, one).item() == 0.0
    assert log_prob("beta", one, one, one).item() == 0.0
    for family in ("half_normal", "half_cauchy"):
        leaf = torch.tensor(-1.0, requires_grad=True)
        density = log_prob(family, leaf, one)
        assert density.item() == -math.inf
        assert torch.autograd.grad(density, leaf)[0].item() == 0.0


@pytest.mark.parametrize("family", CASES)
def test_nan_and_infinity_stay_in_their_row(family):
    for bad in (math.nan, math.inf, -math.inf):
        value, params = draw(family, (3, 4))
        clean = log_prob(family, value, *params, event_ndims=1)
        value[1, 2] = bad
        for param in params:
            param.requires_grad_()
        found = log_prob(family, value, *params, event_ndims=1)
        assert torch.equal(found[[0, 2]], clean[[0, 2]])
        assert not torch.isfinite(found[1])
        for grad in torch.autograd.grad(found.sum(), params):
            assert torch.isfinite(grad[[0, 2]]).all()
        if math.isnan(bad):
            assert torch.isnan(found[1])


@pytest.mark.parametrize("family", CASES)
def test_non_contiguous_input(family):
    value, params = draw(family, (6, 5))
    turned = [x.T.contiguous().T for x in (value, *params)]
    torch.testing.assert_close(
        log_prob(family, *turned, event_ndims=1), log_prob(family, value, *params, event_ndims=1)
    )


@pytest.mark.slow
def test_long_float32_sums_keep_their_digits():
    # Bound of pairwise summation: eps log2(n) / 2 times the sum of magnitudes.
    n = 20_000_000
    value, loc = torch.zeros(n), torch.full((), 0.1, requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    found = log_prob("normal", value, loc, scale, event_ndims=1)
    term = -0.5 * loc.item() ** 2 - 0.5 * math.log(2 * math.pi)
    bound = 2.0**-23 * math.log2(n) / 2
    assert found.item() == pytest.approx(n * term, rel=bound)
    grads = torch.autograd.grad(found, (loc, scale))
    assert grads[0].item() == pytest.approx(-n * loc.item(), rel=bound)
    assert grads[1].item() == pytest.approx(n * (loc.item() ** 2 - 1), rel=bound)


@pytest.mark.parametrize("value", [1, 1.0, True, torch.tensor(1), torch.tensor([True])])
def test_numbers_and_integers_take_the_dtype_of_the_parameters(value):
    logits = torch.zeros(1, dtype=torch.float64)
    found = log_prob("bernoulli_logits", value, logits)
    torch.testing.assert_close(found, torch.full((1,), -math.log(2.0), dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: log_prob("cauchy", x, x, x), "unknown family.*half_cauchy"),
        (lambda x: log_prob("normal", x, x), r"\('loc', 'scale'\)"),
        (lambda x: kernels.normal(x, x, x.double()), "one dtype.*float64"),
        (lambda x: kernels.normal(x, torch.zeros(4), x), r"do not broadcast.*loc = .*\(4,\)"),
        (
            lambda x: kernels.normal(x, x, x, event_ndims=2),
            "between 0 and 1; found event_ndims = 2",
        ),
        (lambda x: kernels.normal(x, x, x, batch_shape=(2,)), r"start the broadcast shape \(3,\)"),
        (lambda x: kernels.normal(1.0, 0.0, 1.0), "floating point"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(KernelError, match=message):
        call(torch.ones(3))
