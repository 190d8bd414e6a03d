"""One suite for every operation and every form of it.

An operation joins by a class with its cases::

    class TestSquare(Suite):
        cases = [Case("odd", make=lambda rng: (rng.normal(2, 3),), call=square, grad=(0,))]

``make`` draws the inputs of one call; ``call`` takes them and returns tensors, changing none of its
arguments (an in-place operation is wrapped: clone, run, return). What is compared:

====================  ============================================================================
test_forward          each form against the torch reference in float64 on the same (rounded) inputs;
                      of what has derivatives, in the next test
test_backward         the same for the outputs and the gradients of a fixed linear function of them
test_gradcheck        analytic against numerical derivatives, in float64
test_second           derivatives of the gradients: gradgradcheck of the reference, and the others
                      against it
test_vmap             torch.func.vmap against a loop
test_noncontiguous    strided inputs against contiguous ones: the same bits
test_capture          make_fx against eager, backward included; on a CPU it holds plain ATen
test_compile          torch.compile(fullgraph=True) against eager, forward and backward
====================  ============================================================================

Forms: ``torch`` (reference), ``interpret`` (the Triton kernels run by Triton's interpreter on the
CPU), ``triton`` (compiled, on a GPU, where every call is also checked for waits of the host). The
interpreter takes 20 ms and more for each program of a kernel: a case too large for it says
``interpret=False``, and what all cases of an operation share is tried there on one or two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx

from fastsvi.kernels import dispatch

CUDA = torch.cuda.is_available()
FORMS = ("torch", "triton") if CUDA else ("torch", "interpret")
DTYPES = (torch.float32, torch.float64)

# Of torch.testing for float32; in float64 what is left of a reference computed in another order.
TOLERANCE = {torch.float32: (1.3e-6, 1e-5), torch.float64: (1e-10, 1e-12)}


Result = TypeVar("Result")


@contextmanager
def no_waiting() -> Iterator[None]:
    """On a GPU, an error where the host waits for the device; elsewhere nothing."""
    if not CUDA:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # torch says that not every wait is noticed.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def unwaited(call: Callable[..., Result], *args: Any) -> Result:
    """Results of a call that must not wait for a GPU, after one in which it may compile."""
    if CUDA:
        call(*args)
    with no_waiting():
        return call(*args)


class Draw:
    """Random inputs in float64, the same for every form and dtype of a case."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, loc: float = 0.0, scale: float = 1.0) -> Tensor:
        noise = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return loc + scale * noise

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        unit = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return low + (high - low) * unit

    def integers(self, *shape: int, low: int = 0, high: int = 2) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)


@dataclass(frozen=True)
class Case:
    """One call of an operation, and what to check of it."""

    name: str
    make: Callable[[Draw], tuple[Tensor, ...]]
    call: Callable[..., Any]
    grad: tuple[int, ...] = ()  # positions of the inputs to differentiate
    batched: tuple[int, ...] | None = None  # positions that vmap maps over; default: ``grad``
    dtypes: tuple[torch.dtype, ...] = DTYPES
    interpret: bool = True
    gradcheck: bool = False
    gradcheck_interpreted: bool = False  # seconds each, and test_backward has compared it already
    second: bool = False
    strided_interpreted: bool = False
    vmap: bool = False
    capture: bool = True
    compile: bool = False
    # Overrides of TOLERANCE: (rtol, atol) per dtype, with the reason in a comment at the case.
    tolerance: dict[torch.dtype, tuple[float, float]] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, form: str) -> tuple[Tensor, ...]:
        device = "cuda" if form == "triton" else "cpu"
        return tuple(
            x.to(device, dtype) if x.is_floating_point() else x.to(device)
            for x in self.make(Draw())
        )

    def runs_interpreted(self, test: str) -> bool:
        if test == "test_gradcheck":
            return self.gradcheck_interpreted
        if test == "test_noncontiguous":
            return self.strided_interpreted
        return self.interpret

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        outputs = self.call(*inputs)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def run_with_grad(
        self, inputs: tuple[Tensor, ...], arrange: Callable[[Tensor], Tensor] = lambda x: x
    ) -> tuple[Tensor, ...]:
        """Outputs, then gradients of a fixed linear function of them.

        ``arrange`` lays out the gradients that the backward pass is given.
        """
        leaves = [inputs[i].detach().requires_grad_() for i in self.grad]
        full = list(inputs)
        for i, leaf in zip(self.grad, leaves, strict=True):
            full[i] = leaf
        outputs = self.run(tuple(full))
        smooth = [y for y in outputs if y.requires_grad]
        cotangents = [arrange(waves(y)) for y in smooth]
        grads = torch.autograd.grad(smooth, leaves, cotangents, materialize_grads=True)
        return (*(y.detach() for y in outputs), *grads)

    def run_with_second(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Derivatives, by inputs and weights, of a linear function of the gradients."""
        leaves = [inputs[i].detach().requires_grad_() for i in self.grad]
        full = list(inputs)
        for i, leaf in zip(self.grad, leaves, strict=True):
            full[i] = leaf
        smooth = [y for y in self.run(tuple(full)) if y.requires_grad]
        weights = [waves(y).requires_grad_() for y in smooth]
        grads = torch.autograd.grad(
            smooth, leaves, weights, create_graph=True, materialize_grads=True
        )
        curved = [grad for grad in grads if grad.requires_grad]
        again = [waves(grad) for grad in curved]
        return torch.autograd.grad(curved, [*leaves, *weights], again, materialize_grads=True)


def waves(like: Tensor) -> Tensor:
    """Weights without pattern or randomness: a draw inside a capture would be drawn anew."""
    angles = torch.arange(like.numel(), dtype=torch.float64, device=like.device) * 2.4 + 1
    return angles.sin().to(like.dtype).reshape(like.shape)


def widened(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same values in float64 on the CPU, for the reference."""
    return tuple(x.cpu().double() if x.is_floating_point() else x.cpu() for x in inputs)


def assert_near(
    actual: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    dtype: torch.dtype,
    tolerance: dict[torch.dtype, tuple[float, float]],
) -> None:
    rtol, atol = tolerance.get(dtype, TOLERANCE[dtype])
    assert len(actual) == len(expected)
    for found, wanted in zip(actual, expected, strict=True):
        assert found.dtype == (dtype if wanted.is_floating_point() else wanted.dtype)
        torch.testing.assert_close(
            found.cpu(),
            wanted.to(found.dtype),
            rtol=rtol if found.is_floating_point() else 0,
            atol=atol if found.is_floating_point() else 0,
            equal_nan=True,
        )


def strided(x: Tensor) -> Tensor:
    """The same values with gaps between them, last axis included."""
    wide = x.new_empty((*x.shape, 2))
    wide[..., 0] = x
    return wide[..., 0]


def capture(case: Case, inputs: tuple[Tensor, ...]) -> torch.fx.GraphModule:
    return make_fx(lambda *args: case.run_with_grad(args) if case.grad else case.run(args))(*inputs)


class Suite:
    """The tests; a subclass named ``Test...`` supplies ``cases``."""

    cases: ClassVar[Sequence[Case]] = ()

    # Which cases a test wants. Where precision is not the matter, it takes the last dtype alone.
    _wants: ClassVar[dict[str, Callable[[Case], Any]]] = {
        "test_forward": lambda case: not case.grad,
        "test_backward": lambda case: case.grad,
        "test_gradcheck": lambda case: case.gradcheck,
        "test_second": lambda case: case.second,
        "test_vmap": lambda case: case.vmap,
        "test_noncontiguous": lambda case: True,
        "test_capture": lambda case: case.capture,
        "test_compile": lambda case: case.compile,
    }
    _both_dtypes = ("test_forward", "test_backward")

    def __init_subclass__(cls) -> None:
        """Drop the tests that no case of the subclass wants, lest they be reported as skipped."""
        for name, wants in cls._wants.items():
            if not any(map(wants, cls.cases)):
                setattr(cls, name, None)

    def pytest_generate_tests(self, metafunc: Any) -> None:
        name = metafunc.function.__name__
        if name not in self._wants:
            return
        rows = [
            pytest.param(
                case,
                form,
                dtype,
                id=f"{case.name}-{form}-{str(dtype).removeprefix('torch.')}",
                marks=[pytest.mark.cuda] if form == "triton" else [],
            )
            for case in self.cases
            if self._wants[name](case)
            for form in FORMS
            if form != "interpret" or case.runs_interpreted(name)
            for dtype in (case.dtypes if name in self._both_dtypes else case.dtypes[-1:])
        ]
        metafunc.parametrize(("case", "form", "dtype"), rows)

    @pytest.fixture(autouse=True)
    def _keep_validation(self) -> Iterator[None]:
        """The first use of Dynamo turns the checks of distributions off, for the whole process."""
        checks = Distribution._validate_args
        yield
        Distribution.set_default_validate_args(checks)

    @pytest.fixture(autouse=True)
    def _use_form(self, request: pytest.FixtureRequest) -> Iterator[None]:
        if "form" not in request.fixturenames:
            yield
            return
        with dispatch.use(request.getfixturevalue("form")):
            yield

    def test_forward(self, case: Case, form: str, dtype: torch.dtype) -> None:
        inputs = case.inputs(dtype, form)
        with dispatch.use("torch"):
            expected = case.run(widened(inputs))
        assert_near(unwaited(case.run, inputs), expected, dtype, case.tolerance)

    def test_backward(self, case: Case, form: str, dtype: torch.dtype) -> None:
        inputs = case.inputs(dtype, form)
        with dispatch.use("torch"):
            expected = case.run_with_grad(widened(inputs))
        assert_near(unwaited(case.run_with_grad, inputs), expected, dtype, case.tolerance)

    def test_gradcheck(self, case: Case, form: str, dtype: torch.dtype) -> None:
        inputs = tuple(
            x.requires_grad_() if i in case.grad else x
            for i, x in enumerate(case.inputs(dtype, form))
        )
        # The thresholds of torch's own op tests. The interpreter is too slow for a whole Jacobian:
        # there one random direction stands for all.
        fast = form == "interpret"
        assert torch.autograd.gradcheck(
            case.call, inputs, eps=1e-6, atol=1e-5, rtol=1e-3, fast_mode=fast
        )

    def test_second(self, case: Case, form: str, dtype: torch.dtype) -> None:
        inputs = case.inputs(dtype, form)
        if form == "torch":
            leaves = tuple(
                x.requires_grad_() if i in case.grad else x for i, x in enumerate(inputs)
            )
            assert torch.autograd.gradgradcheck(case.call, leaves, eps=1e-6, atol=1e-5, rtol=1e-3)
            return
        found = case.run_with_second(inputs)
        with dispatch.use("torch"):
            expected = case.run_with_second(widened(inputs))
        assert_near(found, expected, dtype, case.tolerance)

    def test_vmap(self, case: Case, form: str, dtype: torch.dtype) -> None:
        once = case.inputs(dtype, form)
        batched = case.grad if case.batched is None else case.batched
        # Two entries that differ: the inputs, and the inputs shifted a little (integers by one).
        stacked = tuple(
            torch.stack([x, x + (0.125 if x.is_floating_point() else 1)]) if i in batched else x
            for i, x in enumerate(once)
        )
        in_dims = tuple(0 if i in batched else None for i in range(len(once)))
        entries = [
            case.run(tuple(x[j] if i in batched else x for i, x in enumerate(stacked)))
            for j in range(2)
        ]
        looped = tuple(torch.stack(outputs) for outputs in zip(*entries, strict=True))
        mapped = unwaited(torch.func.vmap(lambda *args: case.run(args), in_dims), *stacked)
        assert_near(mapped, tuple(y.cpu() for y in looped), dtype, {})
        if case.grad:
            self._check_vmapped_grad(case, stacked, in_dims, dtype)

    def _check_vmapped_grad(
        self, case: Case, stacked: tuple[Tensor, ...], in_dims: tuple[int | None, ...], dtype: Any
    ) -> None:
        leaves = tuple(
            x.clone().requires_grad_() if i in case.grad else x for i, x in enumerate(stacked)
        )
        wanted = [leaves[i] for i in case.grad]

        def gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            loss = sum((y.sin() * 3).sum() for y in outputs if y.requires_grad)
            return torch.autograd.grad(loss, wanted, materialize_grads=True)

        mapped_run = torch.func.vmap(lambda *args: case.run(args), in_dims)
        mapped = unwaited(lambda: gradients(mapped_run(*leaves)))
        entries = [
            case.run(tuple(x if d is None else x[j] for x, d in zip(leaves, in_dims, strict=True)))
            for j in range(2)
        ]
        looped = gradients(tuple(torch.stack(y) for y in zip(*entries, strict=True)))
        assert_near(mapped, tuple(y.cpu() for y in looped), dtype, {})

    def test_noncontiguous(self, case: Case, form: str, dtype: torch.dtype) -> None:
        inputs = case.inputs(dtype, form)
        gapped = tuple(strided(x) for x in inputs)
        if case.grad:
            found = unwaited(case.run_with_grad, gapped, strided)
            expected = case.run_with_grad(inputs)
        else:
            found, expected = unwaited(case.run, gapped), case.run(inputs)
        assert_near(found, tuple(y.cpu() for y in expected), dtype, {})

    def test_capture(self, case: Case, form: str, dtype: torch.dtype) -> None:
        inputs = case.inputs(dtype, form)
        expected = case.run_with_grad(inputs) if case.grad else case.run(inputs)
        graph = capture(case, inputs)
        assert_near(unwaited(graph, *inputs), tuple(y.cpu() for y in expected), dtype, {})
        targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        if form == "torch":
            assert not [t for t in targets if t.startswith("fastsvi")], "hidden from Inductor"

    # Dynamo instantiates every autograd.Function that it traces.
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compile(self, case: Case, form: str, dtype: torch.dtype) -> None:
        inputs = case.inputs(dtype, form)
        torch.compiler.reset()
        compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
        expected = case.run_with_grad(inputs) if case.grad else case.run(inputs)
        via = Case(case.name, case.make, compiled, case.grad)
        found = unwaited(via.run_with_grad if case.grad else via.run, inputs)
        assert_near(found, tuple(y.cpu() for y in expected), dtype, {})
