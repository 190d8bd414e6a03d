"""Torch optimizers over single tensors: grouped by equal options, or one by one."""

from __future__ import annotations

import pytest
import torch

from fastsvi import optim
from fastsvi.optim.per_tensor import Grouped, PerTensor


def leaves_of(*values):
    leaves = [torch.tensor(value, requires_grad=True) for value in values]
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    return leaves


def test_equal_options_share_one_optimizer(monkeypatch):
    leaves = leaves_of(0.0, [1.0, 2.0], [3.0])
    calls = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a: calls.append(1) or step(self, *a))
    optimizer = optim.SGD({"lr": 0.5, "momentum": 0.9})
    for _ in range(3):
        optimizer(leaves)
    assert len(calls) == 3
    assert isinstance(optimizer._home[leaves[0]], Grouped)
    optimizer.optim_objs[leaves[0]].param_groups[0]["lr"] = 0.1
    optimizer(leaves)
    assert len(calls) == 5


def test_leaves_left_out_keep_value_and_momentum():
    first, second = leaves_of([0.0], [0.0])
    optimizer = optim.SGD({"lr": 1.0, "momentum": 0.5})
    optimizer([first, second])
    optimizer([first])
    optimizer([second, first])
    assert first.item() == -(1 + 1.5 + 1.75)
    assert second.item() == -(1 + 1.5)


@pytest.mark.parametrize("name", ["Adagrad", "RMSprop", "NAdam", "ASGD", "Adamax"])
def test_late_leaves_start_at_the_beginning(name):
    first, second, alone = leaves_of([1.0], [1.0], [1.0])
    optimizer, other = (getattr(optim, name)({"lr": 0.1}) for _ in range(2))
    for _ in range(3):
        optimizer([first])
    for _ in range(2):
        optimizer([first, second])
        other([alone])
    assert torch.equal(second, alone)


def test_custom_constructors_have_an_object_per_tensor():
    class Custom(torch.optim.SGD):
        pass

    leaves = leaves_of([0.0], [1.0])
    optimizer = optim.PyroOptim(Custom, {"lr": 0.5}, {"clip_value": 0.1})
    optimizer(leaves)
    assert isinstance(optimizer._home[leaves[0]], PerTensor)
    assert {type(single) for single in optimizer.optim_objs.values()} == {Custom}
    torch.testing.assert_close(leaves[0].detach(), torch.tensor([-0.05]))


def test_frozen_and_gradientless_leaves_are_skipped():
    leaf, idle = leaves_of([0.0], [1.0])
    idle.grad = None
    optim.SGD({"lr": 0.5}, {"clip_norm": 10.0})([leaf, idle])
    assert idle.item() == 1.0
    assert leaf.item() == -0.5


def test_sparse_gradients_have_their_optimizer():
    table = torch.zeros(4, 2, requires_grad=True)
    torch.nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum().backward()
    optim.SparseAdam({"lr": 0.5})([table])
    torch.testing.assert_close(table[1].detach(), torch.full((2,), -0.5))
    assert (table[[0, 2, 3]] == 0).all()
