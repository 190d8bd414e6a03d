"""The store on a GPU; what is particular to a device is here, the rest in the other files."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributions import constraints as c

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def on_gpu(store):
    store["loc"] = torch.randn(3, device="cuda")
    store.setdefault("scale", torch.rand(1000, device="cuda") + 0.5, c.positive)
    store.setdefault("p", torch.rand((), device="cuda"), c.unit_interval)
    store.setdefault("simplex", torch.rand(2, 4, device="cuda"), c.simplex)
    store["host"] = torch.randn(2)
    return store


def test_one_buffer_for_each_device(on_gpu):
    assert {device.type for device, _ in on_gpu.buffers} == {"cuda", "cpu"}
    for name, leaf in on_gpu.named_parameters():
        buffer, segment = on_gpu.locate(leaf)
        assert buffer.flat.device == leaf.device
        assert torch.equal(buffer.flat[segment.slice].view(segment.shape), leaf), name


def test_values_read_together_and_one_by_one(on_gpu):
    together = on_gpu.constrain_all()
    for name, value in on_gpu.items():
        torch.testing.assert_close(together[name], value)
    sum(value.sum().cpu() for value in together.values()).backward()
    assert all(leaf.grad is not None for _, leaf in on_gpu.named_parameters())


def test_a_module_moves_to_the_device_and_back(store):
    net = nn.Linear(3, 2)
    store["weight"], store["bias"] = net.weight, net.bias
    assert store.buffers
    values = [p.detach().clone() for p in net.parameters()]
    for device in ("cuda", "cpu"):
        net.to(device)
        store.sync()
        ((place, _),) = store.buffers
        assert place.type == device
        assert store.leaf("weight") is net.weight
        for value, leaf in zip(values, net.parameters(), strict=True):
            assert torch.equal(value, leaf.detach().cpu())


def test_nothing_in_a_step_waits_for_the_device(on_gpu):
    buffers = [b for (device, _), b in on_gpu.buffers.items() if device.type == "cuda"]
    on_gpu.constrain_all()
    with warnings.catch_warnings():
        # torch says that not every wait is noticed.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            for buffer in buffers:
                buffer.sync()
                buffer.bind_grads()
                buffer.zero_grad()
            values = on_gpu.constrain_all()
            on_gpu.get_param("scale", lambda: None)
            sum(values[name].sum() for name in ("loc", "scale", "p", "simplex")).backward()
            for buffer in buffers:
                with buffer.write() as flat:
                    flat.add_(buffer.grad, alpha=-0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("format", ["fastsvi", "pyro"])
def test_files_bring_params_back_to_their_device_or_elsewhere(on_gpu, tmp_path, format):
    values = {name: value.detach().cpu() for name, value in on_gpu.items()}
    on_gpu.save(tmp_path / "params", format=format)
    for map_location, where in ((None, "cuda"), ("cpu", "cpu"), ({"cuda:0": "cpu"}, "cpu")):
        on_gpu.clear()
        on_gpu.load(tmp_path / "params", map_location)
        assert on_gpu["scale"].device.type == where
        assert on_gpu["host"].device.type == "cpu"
        for name, value in on_gpu.items():
            torch.testing.assert_close(value.detach().cpu(), values[name])


def test_slabs_are_aligned_on_the_device(on_gpu):
    buffer, _ = on_gpu.locate(on_gpu.leaf("loc"))
    where = buffer.arrange(["p", "scale"])
    assert buffer.flat[where].data_ptr() % 16 == 0
