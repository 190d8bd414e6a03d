"""Which form of an operation is chosen, and what is said when none can be."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastsvi.errors import FastSVIError, KernelError
from fastsvi.kernels import dispatch, philox

CPU = torch.zeros(2)
CUDA_AVAILABLE = torch.cuda.is_available()


class Fake:
    """Has a device, which is all that choose() looks at."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


@pytest.fixture
def triton_missing(monkeypatch):
    monkeypatch.setattr(dispatch, "_have_triton", False)


@pytest.fixture
def triton_present(monkeypatch):
    monkeypatch.setattr(dispatch, "_have_triton", True)


def test_cpu_tensors_take_torch():
    assert dispatch.choose("op", CPU, CPU) == "torch"


def test_cuda_tensors_take_triton(triton_present):
    assert dispatch.choose("op", Fake("cuda:0"), Fake("cuda:0")) == "triton"


def test_cuda_tensors_take_torch_where_triton_is_missing(triton_missing):
    assert dispatch.choose("op", Fake("cuda:0")) == "torch"


def test_other_devices_take_torch():
    assert dispatch.choose("op", torch.zeros(2, device="meta")) == "torch"


def test_use_forces_nests_and_restores():
    assert dispatch.forced() is None
    with dispatch.use("torch"):
        assert dispatch.choose("op", Fake("cuda:0")) == "torch"
        with dispatch.use(None):
            assert dispatch.forced() is None
        assert dispatch.forced() == "torch"
    assert dispatch.forced() is None


def test_use_restores_after_an_error():
    with pytest.raises(ZeroDivisionError), dispatch.use("torch"):
        raise ZeroDivisionError
    assert dispatch.forced() is None


def test_unknown_back_end():
    words = r"unknown back end.*'triton'.*found backend = 'cuda'"
    with pytest.raises(KernelError, match=words), dispatch.use("cuda"):
        pass
    assert dispatch.forced() is None


def test_mixed_devices_name_the_op_and_the_tensors():
    with pytest.raises(KernelError, match=r"normal\.sample: .*device.*shape \(2,\).* on meta"):
        dispatch.choose("normal.sample", CPU, torch.zeros(2, device="meta"))


def test_forced_triton_without_triton(triton_missing):
    with dispatch.use("triton"), pytest.raises(KernelError, match=r"^op: .*not installed"):
        dispatch.choose("op", CPU)


def test_forced_triton_on_a_cpu_tensor(triton_present):
    with dispatch.use("triton"), pytest.raises(KernelError, match=r"^op: .*CUDA.*device = 'cpu'"):
        dispatch.choose("op", CPU)


@pytest.mark.skipif(CUDA_AVAILABLE, reason="there the process holds compiled kernels")
def test_interpreter_is_used_where_asked_for():
    with dispatch.use("interpret"):
        assert dispatch.choose("op", CPU) == "interpret"


def test_error_is_typed_and_never_reads_values():
    error = dispatch.error("op", "is wrong", x=torch.zeros(2, 3, device="meta"), n=3)
    assert isinstance(error, FastSVIError)
    assert isinstance(error, ValueError)
    assert str(error) == "op: is wrong; found x = tensor of shape (2, 3), float32 on meta, n = 3"


def test_a_step_does_not_wait_for_the_device():
    # A meta tensor has no values: reading one raises.
    key = torch.zeros(2, dtype=torch.int64, device="meta")
    origin = torch.zeros(4, dtype=torch.int64, device="meta")
    assert philox.normal(key, origin, 2, 3, 1025).shape == (2, 3, 1025)


def imported_with(monkeypatch, value):
    """A second copy of the module, imported while the environment says so."""
    monkeypatch.setenv(dispatch.ENVIRONMENT, value)
    spec = importlib.util.spec_from_file_location("second_dispatch", dispatch.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def test_environment_overrides(monkeypatch):
    assert imported_with(monkeypatch, "torch").forced() == "torch"
    assert imported_with(monkeypatch, "").forced() is None


def test_unknown_environment_is_reported_by_the_first_call(monkeypatch):
    copy = imported_with(monkeypatch, "cuda")
    with pytest.raises(KernelError, match=r"normal\.sample: unknown back end.*'cuda'"):
        copy.choose("normal.sample", CPU)


@pytest.mark.slow
class TestProcess:
    """What only a fresh process can show."""

    def test_the_interpreter_can_be_asked_for_by_the_environment(self, fresh_python):
        code = (
            "from fastsvi.kernels import philox\n"
            "print(philox.words(philox.derive_key(0, 0), philox.make_origin(), 1, 1, 3).tolist())"
        )
        interpreted = fresh_python(code, FASTSVI_KERNELS="interpret", TRITON_INTERPRET="0")
        words = philox.words(philox.derive_key(0, 0), philox.make_origin(), 1, 1, 3)
        assert interpreted.stdout.strip() == str(words.tolist())

    def test_kernels_do_not_import_triton(self, fresh_python):
        code = (
            "import sys, torch\n"
            "from fastsvi.kernels import dispatch, normal, philox, subsample\n"
            "dispatch.choose('op', torch.zeros(1))\n"
            "print([m for m in sys.modules if m.split('.')[0] == 'triton'])"
        )
        assert fresh_python(code).stdout.strip() == "[]"

    def test_interpreter_after_triton_says_what_to_do(self, fresh_python):
        code = (
            "import torch, triton; from fastsvi.kernels import dispatch\n"
            "with dispatch.use('interpret'): dispatch.choose('op', torch.zeros(1))"
        )
        done = fresh_python(code, TRITON_INTERPRET="0")
        assert "set TRITON_INTERPRET=1" in done.stderr
