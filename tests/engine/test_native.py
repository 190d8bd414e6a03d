"""Native steps give what the recorded function gives, operation by operation and as a whole."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.func import vmap
from torch.nn import functional

from fastsvi.engine import native
from fastsvi.engine.noise_op import normal_noise
from fastsvi.engine.record import record
from fastsvi.errors import CaptureError
from fastsvi.kernels import philox


class NativeStep(native.NativeStep):
    """Of steps that never halt."""

    def __init__(self, step, state, inputs=()):
        never = torch.zeros((), dtype=torch.bool)
        super().__init__(lambda *tensors: (*step(*tensors), never), state, inputs)


def gradient_of(function):
    """A step whose new state is the gradient of ``function``, and whose loss is its value."""

    def step(x):
        leaf = x.detach().requires_grad_()
        loss = function(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient, loss.detach()

    return step


index = torch.tensor([0, 2, 2, 1, 0, -1])
matrix = torch.linspace(-1, 1, 35).reshape(7, 5)
positive = torch.linspace(0.1, 3, 12)


def large(x, rows, columns):
    """A matrix so large that its products are left to BLAS."""
    return torch.linspace(-1, 1, rows * columns).reshape(rows, columns).to(x)


FUNCTIONS = {
    "exp": lambda x: x.exp().sum(),
    "log, sqrt": lambda x: ((x * x + 1).log() + (x * x + 2).sqrt()).sum(),
    "log1p, expm1": lambda x: ((x * x).log1p() + x.expm1()).sum(),
    "tanh, sigmoid": lambda x: (x.tanh() * x.sigmoid()).sum(),
    "sin, cos": lambda x: (x.sin() * x.cos()).sum(),
    "softplus": lambda x: functional.softplus(x).sum(),
    "logsigmoid": lambda x: functional.logsigmoid(x).sum(),
    "lgamma": lambda x: torch.lgamma(x * x + 0.5).sum(),
    "erf": lambda x: torch.erf(x).sum(),
    "pow": lambda x: ((x * x + 1) ** 1.7 + x**3 + (x * x + 1) ** -1).sum(),
    "where": lambda x: torch.where(x > 0, x * 2, x.exp()).sum(),
    "clamp": lambda x: x.clamp(-0.5, 0.5).square().sum(),
    "abs, maximum": lambda x: torch.maximum(x.abs(), x + 1).sum(),
    "mean": lambda x: (x * x).mean(),
    "mean over an axis": lambda x: x.view(3, 4).mean(0).exp().sum(),
    "sum over each axis": lambda x: (x.view(3, 4).sum(0).sum() * x.view(3, 4).sum(1)).sum(),
    "cumsum": lambda x: (x.view(3, 4).cumsum(1) * x.view(3, 4).cumsum(0)).exp().sum(),
    "any, all": lambda x: (
        torch.where((x.view(3, 4) > 0.5).any(1, keepdim=True), x.view(3, 4), 1.0).square().sum()
        * (x > -2).all()
    ),
    "amax": lambda x: x.view(3, 4).amax(1).exp().sum(),
    "logsumexp": lambda x: x.view(3, 4).logsumexp(-1).sum(),
    "softmax": lambda x: (x.view(3, 4).softmax(-1)[:, 0]).log().sum(),
    "log_softmax": lambda x: x.view(3, 4).log_softmax(-1)[:, 1].sum(),
    "slices": lambda x: (x[2:7].exp() * x[3:8]).sum() + x[::1][-1] ** 2,
    "views": lambda x: (x.view(2, 3, 2).transpose(0, 2).reshape(3, 4) ** 2).sum(0).exp().sum(),
    "cat, stack": lambda x: torch.cat([x[:3] ** 2, torch.stack([x[5], x[6]])]).exp().sum(),
    "unbind": lambda x: sum(a * b for a, b in zip(x[:4].unbind(), x[4:8].unbind(), strict=True)),
    "flip": lambda x: (x.flip(0) * torch.arange(12.0)).exp().sum(),
    "diagonal": lambda x: x[:9].view(3, 3).diagonal().exp().sum(),
    "index": lambda x: (x[:3][index] * torch.arange(6.0)).exp().sum(),
    "two indices": lambda x: (x.view(3, 4)[index[:3] % 3, index[:3] % 4] ** 2).sum(),
    "gather along an axis": lambda x: (x.view(3, 4)[:, index[:2]] ** 2).sum(),
    "mv": lambda x: (matrix.to(x) @ x[:5]).exp().sum(),
    "mm": lambda x: (matrix[:, :3].to(x) @ x.view(3, 4)).tanh().sum(),
    "bmm": lambda x: torch.bmm(x.view(2, 3, 2), x.view(2, 2, 3)).sin().sum(),
    # Squares: a sum of thousands of terms that cancel would show rounding and nothing else.
    "large mv": lambda x: (
        (large(x, 70, 12) @ x).tanh().square().sum() + (x @ large(x, 12, 500)).sin().square().sum()
    ),
    "large mm": lambda x: (
        (large(x, 40, 4) @ x.view(3, 4).t() @ large(x, 3, 50)).tanh().square().sum()
    ),
    "large mm of views": lambda x: (
        (large(x, 4, 40).t() @ x.view(4, 3) @ large(x, 50, 3).t()).tanh().square().sum()
    ),
    "large bmm": lambda x: (
        torch.bmm(
            (x.view(2, 3, 2) * large(x, 40, 1)[:, :, None, None]).reshape(-1, 3, 2),
            large(x, 80, 60).view(80, 2, 30),
        )
        .sin()
        .square()
        .sum()
    ),
    "large bmm of one matrix": lambda x: vmap(
        lambda row: (large(x, 900, 4) @ row.unsqueeze(-1)).squeeze(-1).exp().sum()
    )(x.view(3, 4)).sum(),
    "large mv of many": lambda x: vmap(lambda row: (large(x, 900, 4) @ row).exp().sum())(
        x.view(3, 4)
    ).sum(),
    "linear": lambda x: functional.linear(matrix[:, :4].to(x), x.view(3, 4), x[:3]).tanh().sum(),
    "vmap": lambda x: vmap(lambda row: (row[1:] * row[0].exp()).sum().log1p())(
        x.view(3, 4) ** 2
    ).sum(),
    "gather": lambda x: torch.gather(x.view(3, 4), 1, index.view(3, 2) % 4).exp().sum(),
    "index_select": lambda x: (x.view(3, 4).index_select(0, index % 3) ** 2).sum(),
    "boolean logic": lambda x: torch.where((x > 0) & ~(x > 1) | (x < -1), x * x, x).sum(),
    "comparison with a list": lambda x: torch.where(torch.isnan(x / positive), 0.0, x).sum(),
    "var": lambda x: x.view(3, 4).var(1).log().sum(),
    "normal": lambda x: (
        torch.distributions.Normal(x[0], x[1:] ** 2 + 1, validate_args=False)
        .log_prob(positive[1:])
        .sum()
    ),
    "gamma": lambda x: (
        torch.distributions.Gamma(x**2 + 1, x.exp(), validate_args=False).log_prob(positive).sum()
    ),
    "categorical": lambda x: (
        torch.distributions.Categorical(logits=x.view(3, 4), validate_args=False)
        .log_prob(torch.tensor([0, 3, 2]))
        .sum()
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_those_of_eager_torch(dtype):
    """All functions in one step: one compilation, and a large program besides."""
    steps = {name: gradient_of(function) for name, function in FUNCTIONS.items()}

    def step(*states):
        results = [one(x) for one, x in zip(steps.values(), states, strict=True)]
        return (*(gradient for gradient, _ in results), torch.stack([loss for _, loss in results]))

    states = [torch.linspace(-1.5, 1.3, 12, dtype=dtype) for _ in FUNCTIONS]
    *gradients, losses = step(*states)
    (got,) = NativeStep(step, states).run(1)
    # The vector math library is right to 4 ulp, an expression here has up to some 30 calls of it.
    tolerance = 120 * torch.finfo(dtype).eps
    found = dict(zip(FUNCTIONS, zip(got, states, strict=True), strict=True))
    expected = dict(zip(FUNCTIONS, zip(losses, gradients, strict=True), strict=True))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "shape", [(), (1,), (3, 1, 2), (1, 1), (2, 1025), (1025, 2), (0,), (300, 7)]
)
def test_shapes(shape):
    x = torch.linspace(-1, 1, max(1, torch.Size(shape).numel()), dtype=torch.float64)
    x = x[: torch.Size(shape).numel()].reshape(shape).clone()
    dims = tuple(range(len(shape)))[-1:]

    def step(x):
        total = x.exp().sum(dims, keepdim=True) if dims else x.exp()
        return x * 0.5 + total.log1p(), (x * total).sum()

    new, loss = step(x)
    compiled = NativeStep(step, [x])
    (got,) = compiled.run(1)
    torch.testing.assert_close(x, new, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(got, loss, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("particles", "elements"), [(1, 1), (3, 10), (200, 7), (2, 255), (2, 257), (1, 1024), (2, 3001)]
)
def test_noise_is_that_of_the_reference(particles, elements, dtype):
    key, origin = philox.derive_key(3, 1), philox.make_origin(step=2**31 + 5, particle=7)
    shape = (2, particles, elements)

    def step(noise, origin, key):
        new = normal_noise(key, origin, 0, *shape, dtype)
        return new, origin + torch.tensor([0, 1, 0, 0]), new.sum()

    noise = torch.zeros(shape, dtype=dtype)
    NativeStep(step, [noise, origin], [key]).run(3)
    last = philox.make_origin(step=2**31 + 7, particle=7)
    expected = philox.normal(key, last, *shape, dtype=dtype)
    # Radius and angle are each right to some ulp; near a zero of the cosine the error is absolute.
    tolerance = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(noise, expected, rtol=tolerance, atol=tolerance)


def test_state_is_advanced_in_place_and_a_stop_is_heeded():
    total, count = torch.zeros(3), torch.zeros((), dtype=torch.int64)
    compiled = NativeStep(lambda t, n: (t + n, n + 1, t.sum() + n), [total, count])
    assert compiled.run(5).tolist() == [0, 1, 5, 12, 22]
    assert total.tolist() == [10, 10, 10]
    assert count == 5
    assert len(compiled.run(5, stop=ctypes.c_int(1))) == 0
    other = [torch.ones(3), torch.tensor(2)]
    assert compiled.run(1, state=other).tolist() == [5]
    assert other[1] == 3
    assert count == 5


def test_inputs_are_those_of_the_call():
    total = torch.zeros(2)
    compiled = NativeStep(lambda t, x, y: (t + x * y, t.sum()), [total], [torch.ones(2)] * 2)
    assert compiled.run(2, inputs=[torch.full((2,), 3.0), torch.ones(2)]).tolist() == [0, 6]
    assert total.tolist() == [6, 6]
    batches, factor = torch.arange(8.0).view(4, 2), torch.tensor([1.0, 10.0])
    losses = compiled.run(3, inputs=[batches, factor], stepped=[0])
    assert losses.tolist() == [12, 22, 54]
    assert total.tolist() == [12, 96]
    assert compiled.run(1).tolist() == [108]  # its own again


def test_what_does_not_fit_the_step_is_refused():
    total = torch.zeros(2)
    compiled = NativeStep(lambda t, x: (t + x, t.sum()), [total], [torch.ones(2)])
    with pytest.raises(CaptureError, match=r"argument 1 .* was \(2,\), torch.float32"):
        compiled.run(1, inputs=[torch.ones(3)])
    with pytest.raises(CaptureError, match=r"argument 0 .* found .*torch.float64"):
        compiled.run(1, state=[total.double()])
    with pytest.raises(CaptureError, match="strides"):
        compiled.run(1, inputs=[torch.ones(4)[::2]])
    with pytest.raises(CaptureError, match=r"3 steps need more than shape \(2, 2\)"):
        compiled.run(3, inputs=[torch.ones(2, 2)], stepped=[0])
    with pytest.raises(CaptureError, match="1 states and 1 inputs was given 1 and 2"):
        compiled.run(1, inputs=[torch.ones(2)] * 2)
    assert total.tolist() == [0, 0]


def test_calls_in_several_threads_do_not_meet():
    def step(x):
        mixed = (x.unsqueeze(0) * x.unsqueeze(1)).sin()  # an array that lives in the arena
        return x + 0.01 * mixed.mean(0) * mixed.sum(), mixed.sum()

    starts = [torch.linspace(-1, k, 80, dtype=torch.float64) for k in range(6)]
    compiled = NativeStep(step, [starts[0].clone()])
    alone = [compiled.run(300, state=[start.clone()]) for start in starts]
    with ThreadPoolExecutor(6) as pool:
        runs = pool.map(lambda start: compiled.run(300, state=[start.clone()]), starts)
    for one, other in zip(alone, runs, strict=True):
        assert torch.equal(one, other)


def test_a_step_may_halt_the_run():
    def step(x):
        stuck = x.sum() > 5
        return torch.where(stuck, x, x + 1), x.sum(), stuck

    x = torch.zeros(2)
    halting = native.NativeStep(step, [x])
    assert halting.run(10).tolist() == [0, 2, 4]
    assert x.tolist() == [3, 3]


def test_a_shifted_state_is_not_overwritten_while_it_is_read():
    x = torch.arange(5.0)
    NativeStep(lambda x: (x.flip(0) + x, x.sum()), [x]).run(1)
    assert x.tolist() == [4, 4, 4, 4, 4]


def test_closed_over_data_is_read_where_it_lies():
    data, x = torch.ones(3), torch.zeros(3)
    compiled = NativeStep(lambda x: (x + data, x.sum()), [x])
    compiled.run(1)
    data.fill_(10)
    compiled.run(1)
    assert x.tolist() == [11, 11, 11]


def test_long_float32_sums_do_not_drift():
    x = torch.full((1 << 22,), 0.1)
    (loss,) = NativeStep(lambda x: (x, x.sum()), [x]).run(1)
    # Blocks of 256 terms are summed in float32: 255 roundings of half an ulp at most, and as the
    # entries are equal, all of one sign. The blocks are added up in float64.
    exact = x.double().sum()
    assert abs(loss - exact) <= exact * torch.finfo(torch.float32).eps / 2 * 256


def test_nan_and_infinity_pass_through():
    x = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    y = x.clone()

    def step(x):
        numbers = [x.exp().sum(), x[0].log(), x.amax(), torch.isfinite(x).sum().float()]
        return torch.stack(numbers), torch.where(torch.isnan(x), 0.0, x)[:2].sum()

    expected, loss = step(y)
    (got,) = NativeStep(step, [x]).run(1)
    torch.testing.assert_close(x, expected, equal_nan=True)
    assert got == loss


def test_an_update_in_place_is_an_update():
    def step(param, moment, x):
        param, moment = param.clone(), moment.clone()
        moment.lerp_(x, 0.5).mul_(2)
        param.addcdiv_(moment, moment.sqrt().add_(1.0), value=-0.1)
        x = x.clone()
        x.copy_(param)
        return x, moment, param.sum()

    state = [torch.ones(3), torch.full((3,), 4.0)]
    expected = step(*state, torch.arange(3.0))
    (loss,) = NativeStep(step, state, [torch.arange(3.0)]).run(1)
    torch.testing.assert_close([*state, loss], list(expected))


def test_equal_operations_and_constants_cost_nothing():
    a = torch.ones(3)
    graph = record(lambda x: [(x * 2).exp() + (x * 2).exp() + (a + 1).log()], [torch.zeros(3)])
    assert [node.name for node in graph.nodes] == ["mul", "exp", "add", "add"]


def test_what_cannot_be_recorded_names_the_statement():
    def branch(x):
        if x.sum() > 0:  # the culprit
            return x, x.sum()
        return -x, x.sum()

    with pytest.raises(CaptureError, match=r"test_native.py:\d+: `if x.sum\(\) > 0:"):
        NativeStep(branch, [torch.ones(2)])
    with pytest.raises(CaptureError, match="draws from torch's generator"):
        NativeStep(lambda x: (x + torch.randn(2), x.sum()), [torch.ones(2)])
    with pytest.raises(CaptureError, match=r"`_linalg_eigh`.*test_native.py"):
        NativeStep(lambda x: (torch.linalg.eigvalsh(x) + x, x.sum()), [torch.eye(2)])
    with pytest.raises(CaptureError, match=r"state 0 was \(2,\), torch.float32 before"):
        NativeStep(lambda x: (x.double(), x.sum()), [torch.ones(2)])
    with pytest.raises(CaptureError, match="contiguous CPU tensor"):
        NativeStep(lambda x: (x, x.sum()), [torch.ones(4)[::2]])


def test_a_missing_compiler_is_named(monkeypatch):
    from fastsvi.engine.loops import build

    monkeypatch.setattr(build, "compiler", lambda: None)
    compiled = NativeStep(lambda x: (x + 41.5, x.sum()), [torch.ones(2)])
    with pytest.raises(CaptureError, match=r"no C\+\+ compiler"):
        compiled.run(1)


def test_the_compiled_form_is_found_again(tmp_path, monkeypatch):
    from fastsvi.engine.loops import build

    monkeypatch.setenv("FASTSVI_CACHE", str(tmp_path))
    step = lambda x: (x * 1.2345, x.sum())  # noqa: E731
    first = NativeStep(step, [torch.ones(2)])
    assert not first.is_built
    first.build()
    second = NativeStep(step, [torch.ones(2)])
    assert second.is_built
    assert build.library_path(first.source) == build.library_path(second.source)
