"""Values that Python reads from tensors by no operation are found while a function is recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsvi.engine.record import record
from fastsvi.engine.replay import replay
from fastsvi.errors import CaptureError

x = torch.arange(3.0)

READS = {
    "numpy": lambda y: torch.as_tensor(y.numpy()),
    "numpy of a part": lambda y: torch.as_tensor(y[1:].detach().numpy()),
    "array": lambda y: torch.as_tensor(np.sin(np.asarray(y))),
    "list": lambda y: torch.tensor(y.tolist()),
    "dlpack": torch.from_dlpack,
}


@pytest.mark.parametrize("read", READS)
def test_reading_what_depends_on_the_inputs_is_refused_with_the_statement(read):
    with pytest.raises(CaptureError, match=r"test_reads.py:\d+: .* reads a tensor back to Python"):
        record(lambda y: [READS[read](y * 2)], [x])


@pytest.mark.parametrize("read", READS)
def test_constants_may_be_read(read):
    constant = torch.ones(3)
    graph = record(lambda y: [y * READS[read](constant * 2).sum()], [x])
    assert [node.name for node in graph.nodes] == ["mul"]


def test_another_object_of_the_same_memory_is_the_same():
    graph = record(lambda y: [torch.nn.Parameter(y, requires_grad=False) * 2], [x])
    torch.testing.assert_close(replay(graph, [x + 1])[0], 2 * (x + 1))


def test_memory_of_what_is_gone_is_known_where_all_is_kept():
    def function(y):
        return [torch.nn.Parameter(y + 1, requires_grad=False) * 2]

    kept = record(function, [x], keeps=True)
    torch.testing.assert_close(replay(kept, [x + 1])[0], 2 * (x + 2))


def test_a_tensor_from_outside_is_not_written_to():
    count = torch.zeros(2)

    def counting(y):
        count[0].add_(1)
        return [y + count[0]]

    with pytest.raises(CaptureError, match=r"test_reads.py.*count\[0\].add_.* changes a tensor"):
        record(counting, [x])
    assert count.sum() == 0


def test_a_tensor_of_its_own_may_be_written_to():
    def summing(y):
        total = torch.zeros(3)
        total[1:].add_(2.0)
        return [y + total]

    graph = record(summing, [x])
    torch.testing.assert_close(replay(graph, [x])[0], x + torch.tensor([0.0, 2.0, 2.0]))
