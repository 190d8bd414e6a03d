"""Batches out of any iterable become the arguments of each step."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastsvi.errors import ConstraintError
from fastsvi.infer.batches import Batches, varying

x = torch.ones(3)


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        ((1, 2), (1, 2, "shared"), {"k": 0}),
        ([1, 2], (1, 2, "shared"), {"k": 0}),
        ({"a": 1}, ("shared",), {"a": 1, "k": 0}),
        (x, (x, "shared"), {"k": 0}),
    ],
)
def test_kinds_of_batches(batch, args, kwargs):
    arguments = Batches([batch], ("shared",), {"k": 0}).next()
    assert arguments.args == args
    assert arguments.kwargs == kwargs


def test_epoch_follows_epoch():
    batches = Batches([1, 2], (), {})
    assert [batches.next().args[0] for _ in range(5)] == [1, 2, 1, 2, 1]


def test_an_iterator_that_ends_is_named():
    batches = Batches(iter([1, 2]), (), {})
    batches.next(), batches.next()
    with pytest.raises(ConstraintError, match="ended after 2 steps and cannot be iterated again"):
        batches.next()


def test_what_is_no_iterable_is_refused():
    with pytest.raises(ConstraintError, match="batches is an iterable"):
        Batches(3, (), {})


def test_varying_are_the_leaves_of_the_batch():
    shared = torch.zeros(2)
    arguments = Batches([(x, 0.5, 3)], (shared,), {"beta": 0.1}).next()
    # The tensor and the float of the batch; an int can only be a constant.
    assert varying(arguments, (shared,), {"beta": 0.1}) == {0, 1}


def test_those_alike_are_taken_at_once_and_given_back():
    batches = Batches([1, 2, 3, 4, 5], (), {})
    first = batches.next()
    taken = batches.alike(10, lambda arguments: arguments.args[0] != 4)
    assert [one.args[0] for one in taken] == [2, 3]
    assert batches.peek().args == (4,)
    batches.give_back(taken[1:])
    assert [batches.next().args[0] for _ in range(4)] == [3, 4, 5, 1]
    assert first.args == (1,)


def test_nothing_is_taken_ahead_of_what_may_change_something():
    def accept(arguments):
        return True

    numbers = TensorDataset(torch.arange(4.0))
    for still in ([1, 2], (1, 2), torch.arange(2), DataLoader(numbers, batch_size=2)):
        assert len(Batches(still, (), {}).alike(2, accept)) == 2
    loader = DataLoader(numbers, batch_size=2, collate_fn=list)  # may give the same memory again
    for source in (iter([1, 2]), (k for k in [1, 2]), {1: 2}, loader):
        assert Batches(source, (), {}).alike(2, accept) == []


def test_what_is_taken_at_once_is_limited():
    large = Batches([torch.empty(1 << 24)], (), {})
    assert len(large.alike(10, lambda arguments: True)) == 1  # 64 MB are enough
