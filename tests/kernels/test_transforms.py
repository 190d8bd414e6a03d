from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from conformance import CUDA, DTYPES, Case, Suite
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import constraints, transform_to
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastsvi.errors import KernelError
from fastsvi.kernels import dispatch, transforms
from fastsvi.kernels.transforms import (
    EXP,
    IDENTITY,
    SIGMOID,
    SOFTPLUS,
    Kind,
    SegmentTable,
    constrain,
    constrain_with_log_det,
    unconstrain,
)

# constraint of torch -> (kind, shift, scale)
CASES = {
    "real": (constraints.real, (IDENTITY, 0.0, 1.0)),
    "positive": (constraints.positive, (EXP, 0.0, 1.0)),
    "greater_than": (constraints.greater_than(-2.5), (EXP, -2.5, 1.0)),
    "less_than": (constraints.less_than(3.0), (EXP, 3.0, -1.0)),
    "softplus_positive": (None, (SOFTPLUS, 0.0, 1.0)),
    "unit_interval": (constraints.unit_interval, (SIGMOID, 0.0, 1.0)),
    "interval": (constraints.interval(-1.0, 4.0), (SIGMOID, -1.0, 5.0)),
}


def torch_transform(name):
    if name == "softplus_positive":
        return torch.distributions.transforms.SoftplusTransform()
    return transform_to(CASES[name][0])


def table_of(names, sizes, dtype=torch.float64):
    kinds, shifts, scales = zip(*(CASES[name][1] for name in names), strict=True)
    return SegmentTable.build(kinds, sizes, shifts, scales, dtype=dtype)


def mixed_table(dtype=torch.float64, repeat=1):
    """Every constraint, odd and zero sizes; ``repeat`` > 1 makes more runs than are walked over."""
    names = list(CASES) * repeat
    sizes = [(3 * i + 1) % 8 for i in range(len(names))]
    assert 0 in sizes
    return table_of(names, sizes, dtype), names, sizes


# numpy, with which the interpreter computes, warns where IEEE arithmetic gives inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

CALLS = {
    "constrain": constrain,
    "constrain_with_log_det": constrain_with_log_det,
    "unconstrain": unconstrain,
}


def case(name, op, kinds, sizes, lead=(), extreme=False, **options):
    """A case of one operation; shifts and scales vary with the segment."""
    tables = {}
    for dtype in DTYPES:
        for device in ("cpu", "cuda") if CUDA else ("cpu",):
            shifts = [0.5 * (s % 3) for s in range(len(sizes))]
            scales = [(1.0, -2.0, 0.5)[s % 3] for s in range(len(sizes))]
            table = SegmentTable.build(kinds, sizes, shifts, scales, device, dtype)
            _ = table.segments.chunks, table.segments.chunk_offsets  # before anything traces
            tables[dtype, device] = table

    def make(draw):
        x = draw.normal(*lead, sum(sizes), scale=2.0)
        if extreme:
            values = [0.0, -0.0, 1e-8, -1e-8, 20.0, -20.0, 100.0, -100.0, 1e4, -1e4]
            values += [math.inf, -math.inf, math.nan]
            x = torch.tensor(values, dtype=torch.float64).repeat(len(sizes))
        # Inside the range of the constraint, but for the extremes.
        with dispatch.use(None):  # on the CPU, whichever form is tested
            return (x if op != "unconstrain" else constrain(x, tables[torch.float64, "cpu"]),)

    def call(x):
        return CALLS[op](x, tables[x.dtype, x.device.type])

    return Case(name, make, call, grad=(0,), **options)


# float32 unconstrain: shift + scale * f(x) was rounded, and x is found from what is left of it.
ROUNDED = {torch.float32: (2e-5, 2e-5)}
KINDS = [IDENTITY, EXP, SOFTPLUS, SIGMOID]
SHAPES = {
    "mixed": (KINDS, [1, 2, 1, 1], ()),
    "odd": (KINDS * 2, [1, 0, 7, 2, 0, 1, 4, 9], (2,)),
    "tiles": (KINDS, [1020, 8, 1100, 5], ()),
    "one": ([SOFTPLUS], [1], (2, 1)),
    "empty": ([EXP, SIGMOID], [0, 0], (2,)),
    "none": ([], [], ()),
}


class TestConformance(Suite):
    cases: ClassVar[list[Case]] = [
        *(
            case(
                f"{op}-{name}",
                op,
                *shape,
                gradcheck=name == "mixed",
                vmap=name == "mixed",
                capture=name == "mixed",
                compile=name == "mixed",
                second=name == "mixed",
                strided_interpreted=name == "mixed",
                tolerance=ROUNDED if op == "unconstrain" else {},
            )
            for op in CALLS
            for name, shape in SHAPES.items()
            # The shapes that are cut alike for all three are tried on the richest.
            if op == "constrain_with_log_det" or name in ("mixed", "tiles")
        ),
        *(
            case(f"{op}-extreme", op, KINDS, [13] * 4, extreme=True, capture=False)
            for op in ("constrain", "constrain_with_log_det")
        ),
    ]


def test_registration():
    form, device = ("triton", "cuda") if CUDA else ("interpret", "cpu")
    table = SegmentTable.build(KINDS, [1, 2, 0, 3], device=device, dtype=torch.float32)
    x, grad = torch.rand(2, 2, 6, device=device).unbind()
    log_det = torch.ones(2, 4, device=device)
    leaf = x.clone().requires_grad_()
    with dispatch.use(form):
        for op, args in (
            (transforms._constrain_op, (leaf, *table.tensors, table.segments.chunk_offsets, True)),
            (transforms._constrain_backward_op, (grad, log_det, x, *table.tensors)),
            (transforms._constrain_backward_op, (None, log_det, x, *table.tensors)),
            (transforms._unconstrain_op, (leaf, *table.tensors)),
            (transforms._unconstrain_backward_op, (grad, x, *table.tensors)),
        ):
            torch.library.opcheck(op, args)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def ulps(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Error of float32 ``found`` in units of the last place of float64 ``exact``."""
    nearest = exact.float()
    spacing = torch.nextafter(nearest.abs(), torch.tensor(math.inf)).double() - nearest.abs()
    return (found.double() - exact).abs() / spacing


@pytest.mark.parametrize("name", CASES)
def test_values_and_log_det_agree_with_torch(name):
    x = torch.linspace(-12, 12, 101, dtype=torch.float64)
    table = table_of([name], [101])
    reference = torch_transform(name)
    expected = reference(x)
    y, log_det = constrain_with_log_det(x, table)
    # torch's softplus is linear from 20 on only, so no difference is due to it in this range.
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        log_det, torch.as_tensor(reference.log_abs_det_jacobian(x, expected)).sum().reshape(1)
    )
    torch.testing.assert_close(unconstrain(y, table), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("repeat", [1, 4])
def test_mixed_table_equals_its_segments(repeat):
    table, names, sizes = mixed_table(repeat=repeat)
    x = torch.randn(3, table.num_elements, dtype=torch.float64)
    y, log_det = constrain_with_log_det(x, table)
    assert torch.equal(y, constrain(x, table))
    for s, (name, part) in enumerate(zip(names, x.split(sizes, -1), strict=True)):
        alone = table_of([name], [sizes[s]])
        first = int(table.offsets[s])
        # Not bit for bit: torch's vectorised exp and its scalar one, for the ends, differ.
        expected = constrain(part, alone)
        torch.testing.assert_close(y[:, first : first + sizes[s]], expected, rtol=1e-14, atol=0)
        expected = constrain_with_log_det(part, alone)[1]
        torch.testing.assert_close(log_det[:, s : s + 1], expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(unconstrain(y, table), x)


@pytest.mark.parametrize("repeat", [1, 4])
def test_gradients(repeat):
    table, _, _ = mixed_table(repeat=repeat)
    x = torch.randn(2, table.num_elements, dtype=torch.float64, requires_grad=True)
    fast = repeat > 1  # of a large Jacobian one random direction stands for all
    assert torch.autograd.gradcheck(
        lambda x: constrain_with_log_det(x, table), (x,), fast_mode=fast
    )
    y = constrain(x, table).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: unconstrain(y, table), (y,), fast_mode=fast)


def test_second_derivative_and_forward_mode_of_the_sigmoid():
    table = table_of(["interval"], [3])
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: constrain(x, table), (x,))
    assert torch.autograd.gradcheck(lambda x: constrain(x, table), (x,), check_forward_ad=True)


@pytest.mark.parametrize("name", CASES)
def test_derivative_is_exp_of_log_det(name):
    x = torch.linspace(-30, 30, 61, dtype=torch.float64, requires_grad=True)
    table = table_of([name], [61])
    (grad,) = torch.autograd.grad(constrain(x, table).sum(), x)
    single = table_of([name] * 61, [1] * 61)
    log_det = constrain_with_log_det(x.detach(), single)[1]
    # The exponent is up to 60, so its rounding (60 eps) is the error of the exponential.
    torch.testing.assert_close(grad.abs(), log_det.exp(), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("name", ["positive", "softplus_positive", "unit_interval"])
def test_float32_is_within_two_ulp(name):
    # exp(x) has condition number x, so beyond |x| = 1 its error is counted per unit of it.
    x = torch.cat([torch.linspace(-80, 80, 20_001), torch.randn(1000)])
    x = x[x < 15] if name == "unit_interval" else x  # above, the clip near 1 has its say
    table32, table64 = (table_of([name], [len(x)], d) for d in (torch.float32, torch.float64))
    error = ulps(constrain(x, table32), constrain(x.double(), table64))
    assert error.max() <= 2.0
    y = constrain(x.double(), table64).float()
    exact = unconstrain(y.double(), table64)
    error = (unconstrain(y, table32).double() - exact).abs()
    # Near its zero the inverse is a difference of numbers of size one: absolute there.
    assert (error <= 2.0 * 2.0**-23 * exact.abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("name", ["positive", "softplus_positive", "unit_interval"])
def test_float32_derivative_keeps_its_digits_in_both_tails(name):
    x = torch.linspace(-80, 80, 1001)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        table = table_of([name], [len(x)], dtype)
        grads.append(torch.autograd.grad(constrain(leaf, table).sum(), leaf)[0])
    # Three roundings and two exponentials of 2 ulp each.
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=8 * 2.0**-23, atol=0.0)


def test_a_parameter_pinned_at_a_bound_feels_its_gradient():
    table = table_of(["unit_interval"], [2], torch.float32)
    x = torch.tensor([-88.0, 20.0], requires_grad=True)
    y = constrain(x, table)
    assert (y > 0).all()
    assert (y < 1).all()
    (grad,) = torch.autograd.grad(y[1], x)
    assert grad[1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_infinities_and_nan(name, dtype):
    table = table_of([name], [3], dtype)
    y = constrain(torch.tensor([-math.inf, math.inf, math.nan], dtype=dtype), table)
    low, high = {
        "real": (-math.inf, math.inf),
        "positive": (0.0, math.inf),
        "greater_than": (-2.5, math.inf),
        "less_than": (3.0, -math.inf),
        "softplus_positive": (0.0, math.inf),
        "unit_interval": (0.0, 1.0),
        "interval": (-1.0, 4.0),
    }[name]
    # The sigmoid stops one eps short of its bounds; times the width of 5 of the interval.
    tolerance = 6 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        y, torch.tensor([low, high, math.nan], dtype=dtype), rtol=0, atol=tolerance, equal_nan=True
    )


def test_nan_and_infinity_stay_in_their_element_backward_too():
    table = table_of(list(CASES), [2] * len(CASES))
    clean = torch.randn(table.num_elements, dtype=torch.float64)
    for bad in (math.nan, math.inf, -math.inf, 1e4, -1e4):
        for position in range(0, table.num_elements, 2):
            x = clean.clone()
            x[position] = bad
            x.requires_grad_()
            y = constrain(x, table)
            (grad,) = torch.autograd.grad(y.sum(), x)
            others = torch.arange(table.num_elements) != position
            assert torch.equal(y[others], constrain(clean, table)[others])
            assert torch.isfinite(grad[others]).all()


def test_values_on_a_bound():
    y = torch.tensor([0.0, 0.0, 0.0, 1.0])
    table = SegmentTable.build([EXP, SOFTPLUS, SIGMOID], [1, 1, 2], dtype=torch.float32)
    x = unconstrain(y, table)
    assert x[:2].tolist() == [-math.inf, -math.inf]
    assert torch.isfinite(x[2:]).all()
    expected = transform_to(constraints.unit_interval).inv(y[2:])
    torch.testing.assert_close(x[2:], expected)


def test_softplus_inverse_for_tiny_and_huge_values():
    y = torch.tensor([1e-300, 1e-20, 1e-8, 1.0, 40.0, 1e4, 1e300], dtype=torch.float64)
    table = table_of(["softplus_positive"], [7])
    x = unconstrain(y, table)
    expected = torch.tensor(
        [
            *(math.log(1e-300), math.log(1e-20), math.log(math.expm1(1e-8))),
            *(math.log(math.expm1(1.0)), 40.0 + math.log1p(-math.exp(-40.0)), 1e4, 1e300),
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(x, expected, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(constrain(x, table), y, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("repeat", [1, 4])
def test_vmap(repeat):
    table, _, _ = mixed_table(repeat=repeat)
    x = torch.randn(4, 3, table.num_elements, dtype=torch.float64)
    for in_dim in (0, 1):
        y, log_det = torch.func.vmap(lambda x: constrain_with_log_det(x, table), in_dim)(x)
        expected = constrain_with_log_det(x.movedim(in_dim, 0), table)
        torch.testing.assert_close((y, log_det), expected)
        back = torch.func.vmap(lambda y: unconstrain(y, table))(y)
        torch.testing.assert_close(back, x.movedim(in_dim, 0))


@pytest.mark.parametrize("repeat", [1, 4])
def test_make_fx_captures_forward_and_backward(repeat):
    table, _, _ = mixed_table(repeat=repeat)

    def step(x):
        y, log_det = constrain_with_log_det(x, table)
        loss = (y * y).sum() - log_det.sum()
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    x, other = torch.randn(2, table.num_elements, dtype=torch.float64)
    graph = make_fx(step)(x.clone().requires_grad_())
    other.requires_grad_()
    torch.testing.assert_close(graph(other), step(other))


def test_a_table_first_used_under_a_fake_mode_is_not_spoiled():
    table, _, _ = mixed_table(repeat=4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        constrain_with_log_det(torch.randn(table.num_elements, dtype=torch.float64), table)
    y = constrain(torch.zeros(table.num_elements, dtype=torch.float64), table)
    assert type(y) is torch.Tensor


def test_dispatches_do_not_grow_with_the_number_of_segments():
    counts = []
    for num in (8, 800):
        kinds = [Kind(s % 4) for s in range(num)]
        table = SegmentTable.build(kinds, [s % 3 + 1 for s in range(num)])
        with Count() as count:
            constrain(torch.zeros(table.num_elements), table)
        counts.append(len(count.calls))
    assert max(counts) <= 30


def test_identity_buffers_are_returned_as_they_are():
    table = SegmentTable.build([IDENTITY] * 2, [2, 3])
    x = torch.randn(5)
    assert constrain(x, table) is x
    assert unconstrain(x, table) is x
    y, log_det = constrain_with_log_det(x, table)
    assert y is x
    assert log_det.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_nothing_to_transform(sizes):
    table = SegmentTable.build([EXP] * len(sizes), sizes)
    for lead in ((), (3,), (0, 2)):
        x = torch.zeros(*lead, 0)
        y, log_det = constrain_with_log_det(x, table)
        assert y.shape == x.shape
        assert log_det.shape == (*lead, len(sizes))
        assert not log_det.any()
        assert unconstrain(x, table).shape == x.shape


def test_non_contiguous_input():
    table, _, _ = mixed_table()
    x = torch.randn(table.num_elements, 5, dtype=torch.float64).T
    expected = constrain(x.contiguous(), table)
    torch.testing.assert_close(constrain(x, table), expected, rtol=1e-14, atol=0)


def test_scales_enter_the_log_det():
    table = SegmentTable.build(
        [IDENTITY, SIGMOID], [3, 2], [1.0, 0.0], [-2.0, 3.0], dtype=torch.float64
    )
    x = torch.randn(5, dtype=torch.float64)
    _, log_det = constrain_with_log_det(x, table)
    jacobian = torch.autograd.functional.jacobian(lambda x: constrain(x, table), x)
    expected = torch.stack([jacobian[:3, :3].slogdet()[1], jacobian[3:, 3:].slogdet()[1]])
    torch.testing.assert_close(log_det, expected)


@given(
    specs=st.lists(
        st.tuples(
            st.sampled_from(list(Kind)),
            st.integers(0, 5),
            st.floats(-3, 3),
            st.sampled_from([-2.0, -1.0, 0.5, 1.0, 4.0]),
        ),
        max_size=24,
    ),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_round_trip_of_any_table(specs, seed):
    kinds, sizes, shifts, scales = zip(*specs, strict=True) if specs else ((),) * 4
    table = SegmentTable.build(kinds, sizes, shifts, scales, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(table.num_elements, dtype=torch.float64, generator=generator)
    # Undoing a shift of 3 of a value as small as exp(-12) costs six digits.
    torch.testing.assert_close(unconstrain(constrain(x, table), table), x, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([EXP], [1, 2]), "one entry per segment"),
        (([7], [1]), "unknown kind.*SOFTPLUS = 2.*kind = 7"),
        (([EXP], [-1]), "negative"),
        (([EXP], [1], [math.nan]), "segment = 0, shift = nan"),
        (([EXP, EXP], [1, 1], [0.0, 0.0], [1.0, 0.0]), "segment = 1.*scale = 0.0"),
    ],
)
def test_bad_tables_are_refused(arguments, message):
    with pytest.raises(KernelError, match=message):
        SegmentTable.build(*arguments)


def test_a_buffer_of_another_layout_or_dtype_is_refused():
    table = SegmentTable.build([EXP, IDENTITY], [2, 2], dtype=torch.float32)
    with pytest.raises(KernelError, match=r"4 elements.*shape \(5,\)"):
        constrain(torch.zeros(5), table)
    with pytest.raises(KernelError, match="float64"):
        unconstrain(torch.zeros(4, dtype=torch.float64), table)
