from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from conformance import CUDA, FORMS, Case, Suite, no_waiting
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastsvi.errors import KernelError
from fastsvi.kernels import dispatch
from fastsvi.kernels.adam import _adam_op, adam_
from fastsvi.kernels.segments import Segments

SIZES = [3, 1, 0, 7, 2]
SMALL = [2, 0, 3]  # each segment of each fit is a program of the interpreter, some ms
STEPS = 200

# numpy, with which the interpreter computes, warns where IEEE arithmetic gives inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(params=FORMS)
def form(request):
    """Run a test in every form of the operation, on the CPU but for compiled Triton."""
    with dispatch.use(request.param):
        yield "cuda" if request.param == "triton" else "cpu"


class State:
    """Everything that an update reads and writes, for ``lead`` independent fits."""

    def __init__(
        self, sizes=SIZES, dtype=torch.float64, lead=(), amsgrad=False, seed=0, device="cpu"
    ):
        generator = torch.Generator().manual_seed(seed)
        self.segments = Segments(sizes, device)
        shape = (*lead, self.segments.num_elements)
        self.param = torch.randn(shape, dtype=dtype, generator=generator).to(device)
        self.exp_avg, self.exp_avg_sq = torch.zeros(2, *shape, dtype=dtype, device=device)
        self.step = torch.zeros(*lead, len(sizes), dtype=dtype, device=device)
        self.max_exp_avg_sq = torch.zeros_like(self.param) if amsgrad else None

    def update(self, grad, **options):
        state = (self.param, grad, self.exp_avg, self.exp_avg_sq, self.step)
        with no_waiting():
            adam_(*state, self.segments, max_exp_avg_sq=self.max_exp_avg_sq, **options)

    def tensors(self):
        return [self.param, self.exp_avg, self.exp_avg_sq, self.step]


def gradients(like, steps=STEPS, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        sizes = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        yield (scale * noise * 10.0 ** (6 * sizes - 3)).to(like)


def close(found, expected, dtype=torch.float64):
    # float32: some roundings per step; steps have size lr, and 200 of them add up.
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def case(
    name,
    sizes,
    lead=(),
    steps=2,
    tensors=False,
    mask=False,
    amsgrad=False,
    compile=False,
    **options,
):
    """A case of a few updates from zero moments; returns all that they write."""
    cut = {device: Segments(sizes, device) for device in ("cpu", "cuda")[: 1 + CUDA]}
    for segments in cut.values():
        _ = segments.chunks, segments.chunk_offsets  # before anything traces

    def make(draw):
        n = sum(sizes)
        grads = draw.normal(steps, *lead, n) * 10.0 ** draw.uniform(steps, *lead, n, low=-3, high=3)
        rates = draw.uniform(2, *lead, len(sizes), low=0.9)
        return draw.normal(*lead, n), grads, rates, draw.integers(*lead, len(sizes)) > 0

    def call(param, grads, rates, active):
        param = param.clone()
        exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
        count = torch.zeros_like(rates[0])
        skipped = torch.zeros_like(active[..., 0], dtype=torch.int64) if mask else None
        largest = torch.zeros_like(param) if amsgrad else None
        for grad in grads.unbind():
            adam_(
                param, grad, exp_avg, exp_avg_sq, count, cut[param.device.type],
                lr=rates[0] if tensors else 0.1,
                active=active if mask else None,
                skipped=skipped,
                max_exp_avg_sq=largest,
                **({"lrd": rates[1]} if tensors else {}),
                **options,
            )  # fmt: skip
        return param, exp_avg, exp_avg_sq, count

    return Case(
        name,
        make,
        call,
        strided_interpreted=name == "everything",
        capture=name in ("plain", "everything"),
        compile=compile,
    )


class TestConformance(Suite):
    cases: ClassVar[list[Case]] = [
        case("plain", [13], compile=True),
        case("tensors", SMALL, (2,), tensors=True),
        case("mask", SMALL, (2,), mask=True),
        case("clip", SMALL, clip_norm=2.0, clip_value=0.5),
        case("adamw", SMALL, weight_decay=0.1, decoupled=True, betas=(0.0, 0.9)),
        case("amsgrad", SMALL, amsgrad=True, weight_decay=0.1),
        case(
            "clipped-adam", SMALL, lrd=0.9, eps_hat=True, centered=True, eps=1e-3, betas=(0.5, 0.9)
        ),
        case("tiles", [1020, 8, 1100, 5], steps=1),
        case("empty", [0, 0], (2,), steps=1),
        case("everything", SMALL, (2,), 2, True, True, True, weight_decay=0.1, clip_norm=1.0),
    ]


def test_registration():
    form, device = ("triton", "cuda") if CUDA else ("interpret", "cpu")
    state = State(SMALL, lead=(2,), amsgrad=True, device=device)
    skipped = torch.zeros(2, dtype=torch.int64, device=device)
    args = (
        state.param, torch.ones_like(state.param), state.exp_avg, state.exp_avg_sq,
        state.max_exp_avg_sq, state.step, state.step == 0, skipped, None, None,
        state.segments.chunks, state.segments.chunk_offsets,
        0.1, 1.0, 0.9, 0.999, 1e-8, 0.0, False, False, False, 1.0, None,
    )  # fmt: skip
    with dispatch.use(form):
        torch.library.opcheck(_adam_op, args)


TORCH = {
    "adam": (torch.optim.Adam, {}, {}),
    "betas and eps": (torch.optim.Adam, {"betas": (0.5, 0.9), "eps": 1e-3}, {}),
    "beta1 zero": (torch.optim.Adam, {"betas": (0.0, 0.99)}, {}),
    "weight decay": (torch.optim.Adam, {"weight_decay": 0.1}, {}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}, {"decoupled": True}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [SIZES, [13]])
@pytest.mark.parametrize("case", TORCH)
def test_equals_torch(case, sizes, dtype):
    optimizer, options, ours = TORCH[case]
    state = State(sizes, dtype, amsgrad=options.get("amsgrad", False))
    leaf = state.param.clone().requires_grad_()
    reference = optimizer([leaf], lr=0.01, **options)
    options = {key: value for key, value in options.items() if key != "amsgrad"}
    for grad in gradients(leaf):
        leaf.grad = grad.clone()
        reference.step()
        state.update(grad, lr=0.01, **options, **ours)
    close(state.param, leaf.detach(), dtype)
    assert (state.step == STEPS).all()


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"centered_variance": True}])
def test_equals_pyros_clipped_adam(options):
    oracle = pytest.importorskip("pyro.optim.clipped_adam")  # not there on the GPU machine
    state = State()
    leaf = state.param.clone().requires_grad_()
    reference = oracle.ClippedAdam([leaf], lr=0.05, lrd=0.99, clip_norm=2.0, eps=1e-3, **options)
    ours = {"centered" if key == "centered_variance" else key: options[key] for key in options}
    for grad in gradients(leaf):
        leaf.grad = grad.clone()
        reference.step()
        state.update(grad, lr=0.05, lrd=0.99, clip_value=2.0, eps=1e-3, eps_hat=True, **ours)
    close(state.param, leaf.detach())


def test_clips_each_segment_as_pyros_clip_args_do():
    state = State()
    leaves = [part.clone().requires_grad_() for part in state.param.split(SIZES)]
    references = [torch.optim.Adam([leaf], lr=0.01) for leaf in leaves]
    for grad in gradients(state.param):
        for leaf, part, reference in zip(leaves, grad.split(SIZES), references, strict=True):
            leaf.grad = part.clone()
            torch.nn.utils.clip_grad_norm_(leaf, 1.5)
            torch.nn.utils.clip_grad_value_(leaf, 0.7)
            reference.step()
        kept = grad.clone()
        state.update(grad, lr=0.01, clip_norm=1.5, clip_value=0.7)
        assert torch.equal(grad, kept)
    close(state.param, torch.cat(leaves).detach())


def test_norm_of_large_gradients_does_not_overflow(form):
    state = State([2], torch.float32, device=form)
    state.update(torch.tensor([3e30, 4e30], device=form), lr=0.0, clip_norm=1.0)
    torch.testing.assert_close(state.exp_avg.cpu(), torch.tensor([0.06, 0.08]))


@pytest.mark.parametrize("lead", [(), (3,)])
def test_segments_have_their_own_rate_and_step_count(lead):
    state = State(lead=lead)
    rates = torch.rand(*lead, len(SIZES), dtype=torch.float64)
    decays = 1 - 0.01 * torch.rand(*lead, len(SIZES), dtype=torch.float64)
    schedule = torch.rand(STEPS, *lead, len(SIZES)) < 0.6
    twin = state.param.clone().reshape(-1, state.segments.num_elements)
    counts = torch.zeros(STEPS + 1, *lead, len(SIZES), dtype=torch.float64)
    history = list(gradients(state.param))
    for t, grad in enumerate(history):
        state.update(grad, lr=rates, lrd=decays, active=schedule[t])
        counts[t + 1] = counts[t] + schedule[t]
    assert torch.equal(state.step, counts[-1])
    for fit in range(len(twin)):
        for s, (start, size) in enumerate(zip(state.segments.offsets[:-1], SIZES, strict=True)):
            leaf = twin[fit, start : start + size].clone().requires_grad_()
            reference = torch.optim.Adam([leaf], lr=0.0)
            for t, grad in enumerate(history):
                if not schedule[t].reshape(-1, len(SIZES))[fit, s]:
                    continue
                count = counts[t + 1].reshape(-1, len(SIZES))[fit, s].item()
                rate, decay = (x.reshape(-1, len(SIZES))[fit, s].item() for x in (rates, decays))
                reference.param_groups[0]["lr"] = rate * decay**count
                leaf.grad = grad.reshape(len(twin), -1)[fit, start : start + size].clone()
                reference.step()
            found = state.param.reshape(len(twin), -1)[fit, start : start + size]
            close(found, leaf.detach())


def test_inactive_segments_keep_every_bit(form):
    state = State(device=form)
    active = torch.tensor([True, False, True, False, True], device=form)
    for grad in gradients(state.param, 3):
        state.update(grad, lr=0.1)
    before = [tensor.clone() for tensor in state.tensors()]
    grad = torch.full_like(state.param, math.nan)
    grad[:3] = 1.0
    grad[-2:] = 1.0
    state.update(grad, lr=0.1, active=active)
    element = active.repeat_interleave(torch.tensor(SIZES, device=form))
    for found, kept in zip(state.tensors(), before, strict=True):
        mask = active if found.shape == active.shape else element
        assert torch.equal(found[~mask], kept[~mask])
        assert torch.isfinite(found).all()
        assert (found[mask] != kept[mask]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_fit_with_a_bad_gradient_is_skipped_and_the_others_are_not_touched(bad, form):
    state, clean = (State([3, 4], lead=(3,), device=form) for _ in range(2))
    skipped = torch.zeros(3, dtype=torch.int64, device=form)
    for t, grad in enumerate(gradients(state.param, 4)):
        clean.update(grad, lr=0.1)
        if t % 2:
            grad[1, t] = bad
        state.update(grad, lr=0.1, skipped=skipped)
    assert skipped.tolist() == [0, 2, 0]
    others = [0, 2]
    for found, expected in zip(state.tensors(), clean.tensors(), strict=True):
        assert torch.equal(found[others], expected[others])
    assert (state.step[1] == 2).all()
    assert torch.isfinite(state.param).all()


def test_bad_gradients_of_inactive_segments_do_not_skip(form):
    state = State(device=form)
    skipped = torch.zeros((), dtype=torch.int64, device=form)
    active = torch.tensor([True, False, True, True, True], device=form)
    grad = torch.ones_like(state.param)
    grad[3] = math.nan
    state.update(grad, lr=0.1, active=active, skipped=skipped)
    assert skipped.item() == 0
    assert state.step.tolist() == [1.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 10**7])
def test_bias_correction_in_float32_has_its_digits(step, form):
    state = State([1], torch.float32, device=form)
    state.param.zero_()
    state.exp_avg.fill_(0.5)
    state.exp_avg_sq.fill_(0.25)
    state.step.fill_(step - 1)
    state.update(torch.tensor([0.5], device=form), lr=1.0, eps=0.0)
    assert state.step.item() == step
    m = 0.9 * 0.5 + 0.1 * 0.5
    v = 0.999 * 0.25 + 0.001 * 0.25
    exact = -m / -math.expm1(step * math.log(0.9))
    exact /= math.sqrt(v / -math.expm1(step * math.log(0.999)))
    assert state.param.item() == pytest.approx(exact, rel=1e-6)  # some roundings of 6e-8


def test_a_tensor_rate_equals_a_number():
    states = [State() for _ in range(3)]
    rates = [0.1, torch.tensor(0.1, dtype=torch.float64), torch.full((5,), 0.1).double()]
    for grad in gradients(states[0].param, 20):
        for state, rate in zip(states, rates, strict=True):
            state.update(grad, lr=rate, weight_decay=0.1, decoupled=True)
    close(states[1].param, states[0].param)
    close(states[2].param, states[0].param, torch.float32)  # the full() above is float32


@pytest.mark.parametrize("zero", [0.0, torch.zeros(5, dtype=torch.float64)])
def test_rate_zero_moves_nothing(zero):
    state = State()
    before = state.param.clone()
    state.update(torch.ones_like(before), lr=zero)
    assert torch.equal(state.param, before)
    assert (state.step == 1).all()


def test_uniform_update_takes_fourteen_dispatches():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    state, grad = State([13]), torch.ones(13, dtype=torch.float64)
    with Count():
        state.update(grad, lr=0.1)
    assert Count.calls <= 14


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_nothing_to_update(sizes, form):
    state = State(sizes, device=form)
    skipped = torch.zeros((), dtype=torch.int64, device=form)
    state.update(state.param.clone(), lr=0.1, clip_norm=1.0, skipped=skipped)
    assert state.step.tolist() == [1.0] * len(sizes)
    assert skipped.item() == 0


def test_non_contiguous_buffers(form):
    state, twin = (State(SMALL, lead=(3,), device=form) for _ in range(2))
    for name in ("param", "exp_avg", "exp_avg_sq", "step"):
        setattr(twin, name, getattr(state, name).T.contiguous().T)
    for grad in gradients(state.param, 2):
        state.update(grad, lr=0.1)
        twin.update(grad.T.contiguous().T, lr=0.1)
    close(twin.param, state.param)


def test_make_fx_captures_the_update_with_its_options():
    def step(param, grad, exp_avg, exp_avg_sq, count, active, skipped):
        adam_(
            param, grad, exp_avg, exp_avg_sq, count, segments,
            lr=0.1, lrd=0.9, clip_norm=1.0, clip_value=0.5, active=active, skipped=skipped,
        )  # fmt: skip
        return param

    state, twin = State(), State()
    segments = state.segments
    active = torch.tensor([True, False, True, True, True])
    skips = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    grads = list(gradients(state.param, 3))
    example = [torch.zeros_like(t) for t in (state.param, grads[0], *state.tensors()[1:])]
    graph = make_fx(step)(*example, active, skips[0].clone())
    for grad in grads:
        step(state.param, grad, *state.tensors()[1:], active, skips[0])
        graph(twin.param, grad, *twin.tensors()[1:], active, skips[1])
    assert torch.equal(state.param, twin.param)
    assert torch.equal(state.step, twin.step)


def test_rows_of_a_wider_buffer(form):
    """The fits of a slice of the buffer: rows that are contiguous, but apart."""
    state, twin = (State(SMALL, lead=(3,), device=form) for _ in range(2))
    wide = torch.full((3, 12), 7.0, dtype=torch.float64, device=form)
    wide[:, 4:9] = state.param
    twin.param = wide[:, 4:9]
    for grad in gradients(state.param, 2):
        state.update(grad, lr=0.1)
        twin.update(grad, lr=0.1)
    close(twin.param, state.param)
    assert (wide[:, :4] == 7.0).all()
    assert (wide[:, 9:] == 7.0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"param": torch.zeros(4)}, r"13 elements.*shape \(4,\)"),
        ({"grad": torch.zeros(13)}, "shape and dtype of the parameters.*float32"),
        ({"step": torch.zeros(4)}, r"step must have shape \(5,\)"),
        ({"active": torch.ones(5)}, "active must be bool"),
        ({"skipped": torch.zeros(2)}, "one count per fit"),
        ({"betas": (0.9, 1.0)}, r"\[0, 1\)"),
        ({"eps": -1.0}, "eps = -1.0"),
        ({"lr": -0.1}, "lr = -0.1"),
        ({"clip_norm": -1.0}, "clip_norm = -1.0"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(change, message):
    state = State()
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "step")
    tensors = [state.param, torch.ones_like(state.param), *state.tensors()[1:]]
    arguments = dict(zip(names, tensors, strict=True), segments=state.segments, lr=0.1) | change
    before = [tensor.clone() for tensor in state.tensors()]
    with pytest.raises(KernelError, match=message):
        adam_(**arguments)
    for found, kept in zip(state.tensors(), before, strict=True):
        assert torch.equal(found, kept)
