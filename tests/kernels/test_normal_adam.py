"""Backward and Adam in one: against the backward pass followed by torch's own Adam."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conformance import Case, Draw, Suite
from torch import Tensor

from fastsvi.errors import KernelError
from fastsvi.kernels import dispatch, normal, normal_adam, philox

KEY = philox.derive_key(5, 1)


def case(
    name: str,
    fits: int,
    particles: int,
    elements: int,
    scale_map: normal.ScaleMap = "exp",
    estimator: normal.Estimator = "pathwise",
    given: bool = False,
    active: Sequence[bool] | None = None,
    **options,
) -> Case:
    """A call of backward_adam_, made free of side effects: it returns what it has written."""

    def make(draw: Draw) -> tuple[Tensor, ...]:
        matrix = (fits, elements)
        return (
            draw.normal(*matrix),
            draw.uniform(*matrix, low=0.5, high=1.5),
            *(draw.normal(*matrix), draw.uniform(*matrix), draw.normal(*matrix)),
            draw.uniform(*matrix),
            draw.normal(fits, particles, elements),  # gradient of z
            draw.normal(fits, particles),  # gradient of log q
            draw.integers(fits, low=0, high=50).double(),  # step
            draw.uniform(fits, low=0.01, high=0.1),  # learning rate
            KEY,
            philox.make_origin(step=9),
            torch.ones(fits, dtype=torch.bool) if active is None else torch.tensor(active),
            *((draw.normal(fits, particles, elements),) if given else ()),
        )

    def call(loc, raw_scale, m0, v0, m1, v1, grad_z, grad_log_q, step, lr, *rest):
        key, origin, mask, *noise = rest
        written = [x.clone(memory_format=torch.contiguous_format) for x in (loc, raw_scale)]
        moments = [x.clone(memory_format=torch.contiguous_format) for x in (m0, v0, m1, v1)]
        step = step.clone()
        normal_adam.backward_adam_(
            *written,
            key,
            origin,
            grad_z,
            grad_log_q,
            moments,
            step,
            lr=lr,
            num_particles=particles,
            scale_map=scale_map,
            estimator=estimator,
            noise=noise[0] if noise else None,
            active=None if active is None else mask,
        )
        return (*written, *moments, step)

    return Case(name, make, call, capture=False, **options)


class TestBackwardAdam(Suite):
    cases = (
        case("exp", 1, 3, 5),
        case("softplus-stl", 2, 3, 5, "softplus", "stl", strided_interpreted=True),
        case("identity-entropy", 1, 3, 5, "identity", "entropy"),
        case("one", 1, 1, 1),
        case("odd-1025", 1, 2, 1025),
        case("active", 3, 2, 7, active=(True, False, True)),
        case("given", 1, 2, 6, given=True),
        case("no-elements", 2, 3, 0),
        case("no-particles", 2, 0, 3),
        case("no-fits", 0, 3, 3),
        case("large", 1, 1, 1_000_003, interpret=False),
    )


def arguments(fits: int = 2, particles: int = 3, elements: int = 5) -> dict:
    draw = Draw()
    return {
        "loc": draw.normal(fits, elements),
        "raw_scale": draw.normal(fits, elements),
        "key": KEY,
        "origin": philox.make_origin(),
        "grad_z": draw.normal(fits, particles, elements),
        "grad_log_q": draw.normal(fits, particles),
        "moments": list(torch.zeros(4, fits, elements, dtype=torch.float64).unbind()),
        "step": torch.zeros(fits, dtype=torch.float64),
        "lr": 0.05,
        "num_particles": particles,
    }


@pytest.mark.parametrize("estimator", normal.ESTIMATORS)
def test_equals_backward_and_torch_adam_over_many_steps(estimator):
    kernel = arguments()
    loc = kernel["loc"].clone().requires_grad_()
    raw_scale = kernel["raw_scale"].clone().requires_grad_()
    optimizer = torch.optim.Adam([loc, raw_scale], lr=0.05)
    for step in range(5):
        origin = philox.make_origin(step=step)
        normal_adam.backward_adam_(**(kernel | {"origin": origin}), estimator=estimator)
        z, log_q = normal.sample(loc, raw_scale, KEY, origin, 3, estimator=estimator)
        optimizer.zero_grad()
        torch.autograd.backward((z, log_q), (kernel["grad_z"], kernel["grad_log_q"]))
        optimizer.step()
    torch.testing.assert_close(kernel["loc"], loc.detach())
    torch.testing.assert_close(kernel["raw_scale"], raw_scale.detach())
    assert kernel["step"].tolist() == [5.0, 5.0]


def test_a_fit_that_is_not_active_keeps_everything():
    kernel = arguments()
    kernel["grad_z"][1] = float("nan")
    before = kernel["loc"].clone()
    normal_adam.backward_adam_(**kernel, active=torch.tensor([True, False]))
    assert torch.equal(kernel["loc"][1], before[1])
    assert not torch.equal(kernel["loc"][0], before[0])
    assert all(not m[1].any() for m in kernel["moments"])
    assert kernel["step"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("missing", ["grad_z", "grad_log_q"])
def test_a_missing_gradient_is_zero(missing):
    one, other = arguments(), arguments()
    one[missing] = None
    other[missing].zero_()
    for kernel in (one, other):
        normal_adam.backward_adam_(**kernel)
    torch.testing.assert_close(one["loc"], other["loc"])
    torch.testing.assert_close(one["raw_scale"], other["raw_scale"])


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"grad_z": torch.zeros(2, 3)}, r"grad_z must be \(2, 3, 5\).*shape \(2, 3\)"),
            ({"grad_log_q": torch.zeros(2, 3)}, "grad_log_q.*float32"),
            ({"moments": [torch.zeros(2, 5).double()] * 3}, "four moments.*moments = 3"),
            ({"step": torch.zeros(3).double()}, r"step must be \(2,\)"),
            ({"lr": torch.zeros(3).double()}, r"lr must be \(2,\)"),
            ({"active": torch.zeros(2)}, "active must be bool"),
            ({"loc": torch.zeros(5, 2).double().T}, "contiguous"),
            ({"key": torch.zeros(2)}, "key"),
            ({"scale_map": "square"}, "'square'"),
        ],
    )
    def test_changes_nothing_and_names_the_value(self, changes, words):
        kernel = arguments()
        untouched = [kernel["raw_scale"].clone(), kernel["step"].clone()]
        with pytest.raises(KernelError, match=f"normal_adam.backward_adam_: .*{words}"):
            normal_adam.backward_adam_(**(kernel | changes))
        assert torch.equal(kernel["raw_scale"], untouched[0])
        assert torch.equal(kernel["step"], untouched[1])


def test_the_operation_passes_opcheck():
    kernel = arguments(1, 2, 3)
    form = "triton" if torch.cuda.is_available() else "interpret"
    device = "cuda" if form == "triton" else "cpu"
    order = ("loc", "raw_scale", "moments", "key", "origin")
    tensors = [kernel[name] for name in order] + [None, kernel["grad_z"], kernel["grad_log_q"]]
    tensors += [kernel["step"] + 1, torch.full((1,), 0.1, dtype=torch.float64), None]
    moved = [
        [m.to(device) for m in x] if isinstance(x, list) else x if x is None else x.to(device)
        for x in tensors
    ]
    with dispatch.use(form):
        torch.library.opcheck(
            torch.ops.fastsvi.normal_backward_adam_.default,
            (*moved, 2, "exp", "pathwise", 0.9, 0.999, 1e-8),
        )
