"""A recording run launch by launch: the outputs of the function, and no more memory than it."""

from __future__ import annotations

import weakref

import pytest
import torch

from fastsvi.engine.launches import Launches
from fastsvi.engine.record import record

CPU = torch.device("cpu")


def function(x, y):
    best = x.max(0)
    return [(x * y).view(6).exp(), best.values + best.indices, torch.log_softmax(x, 1), x]


def test_equals_the_function():
    graph = record(function, [torch.randn(2, 3), torch.randn(2, 3)], decomposed=False)
    launches = Launches(graph, CPU)
    for _ in range(2):
        x, y = torch.randn(2, 3), torch.randn(2, 3)
        torch.testing.assert_close(launches([x, y]), function(x, y))


def test_one_operation_gives_all_of_its_results():
    graph = record(lambda x: [x.max(0).values + x.max(0).indices], [torch.randn(2, 3)])
    calls = []
    launches = Launches(graph, CPU)
    for k, (node, op, args, kwargs) in enumerate(launches._calls):

        def counted(*args, op=op, **kwargs):
            calls.append(op)
            return op(*args, **kwargs)

        launches._calls[k] = node, counted, args, kwargs
    launches([torch.randn(2, 3)])
    assert calls.count(torch.ops.aten.max.dim) == 1


def test_results_are_let_go_after_their_last_use(monkeypatch):
    made = []

    def step(x):
        for _ in range(4):
            x = x.exp()
        return [x]

    launches = Launches(record(step, [torch.ones(3)]), CPU)
    for k, (node, op, args, kwargs) in enumerate(launches._calls):

        def watched(*args, op=op, **kwargs):
            alive = [reference for reference in made if reference() is not None]
            assert len(alive) <= 1  # the argument
            result = op(*args, **kwargs)
            made.append(weakref.ref(result))
            return result

        launches._calls[k] = node, watched, args, kwargs
    launches([torch.ones(3)])
    assert len(made) == 4


def test_fills_are_made_once():
    graph = record(lambda x: [x * 2 + torch.zeros_like(x), x.new_full((3,), 7)], [torch.ones(2)])
    launches = Launches(graph, CPU)
    assert not [node for node, *_ in launches._calls if "full" in node.name or "like" in node.name]
    torch.testing.assert_close(
        launches([torch.ones(2)]), [torch.full((2,), 2.0), torch.full((3,), 7.0)]
    )


def test_constants_and_requests_go_to_the_device():
    numbers = torch.tensor([1.0, 2.0])

    def step(x):
        return [x + numbers, x.to(torch.float64).to("cpu") * 2]

    graph = record(step, [torch.ones(2)])
    out = Launches(graph, torch.device("meta"))([torch.ones(2, device="meta")])
    assert [tensor.device.type for tensor in out] == ["meta", "meta"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recording_of_the_host_runs_on_a_gpu():
    numbers, places = torch.tensor([1.0, 2.0]), torch.tensor([1, 0])

    def step(x, beta):
        return [(x + numbers)[places] * beta, torch.where(x > 0, x, numbers.sum())]

    inputs = [torch.tensor([3.0, -4.0]), torch.tensor(0.5)]
    launches = Launches(record(step, inputs), torch.device("cuda"))
    found = launches([tensor.cuda() for tensor in inputs])
    torch.testing.assert_close([tensor.cpu() for tensor in found], step(*inputs))
