"""Arguments as a flat list: which differ, what they are called, which can be lifted."""

from __future__ import annotations

import pytest
import torch

from fastsvi.infer.arguments import Arguments, Inputs, can_be_lifted, is_same

x, y = torch.ones(3), torch.zeros(2)


def test_names_count_the_leaves_of_containers():
    arguments = Arguments((x, [y, {"a": 1, "b": 2}]), {"beta": 0.5})
    names = [arguments.name(k) for k in range(len(arguments.leaves))]
    assert names == [
        "argument 0",
        "argument 1 (its part 0)",
        "argument 1 (its part 1)",
        "argument 1 (its part 2)",
        "argument 'beta'",
    ]
    with pytest.raises(IndexError):
        arguments.name(5)


def test_differing_sees_other_objects_and_other_contents():
    data = torch.ones(3)
    before = Arguments((data, 1.0, "a"), {"size": 3})
    assert Arguments((data, 1.0, "a"), {"size": 3}).differing(before) == []
    assert Arguments((data.clone(), 1.0, "b"), {"size": 4}).differing(before) == [0, 2, 3]
    data.add_(1)
    assert Arguments((data, 1.0, "a"), {"size": 3}).differing(before) == [0]
    assert not Arguments((data, 1.0), {"size": 3}).has_form_of(before)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(1, 1, True), (1, 1.0, False), (True, 1, False), (x, x, True), (x, x.clone(), False)],
)
def test_is_same(one, other, same):
    assert is_same(one, other) is same


def test_what_can_be_lifted():
    assert can_be_lifted(x)
    assert can_be_lifted(0.5)
    assert not any(map(can_be_lifted, (1, True, "a", None, x.to_sparse())))
    assert not can_be_lifted(torch.ones(2, requires_grad=True))


def test_inputs_follow_the_arguments():
    first = Arguments((x, 0.5, "a"), {})
    inputs = Inputs(first, [0, 1])
    args, kwargs = first.with_leaves(inputs.replaced())
    assert args[0] is inputs.tensors[0]
    assert args[2] == "a"
    assert kwargs == {}
    second = Arguments((x * 3, 0.25, "a"), {})
    assert inputs.accept(second)
    inputs.hold(second)
    assert inputs.tensors[0].tolist() == [3.0] * 3
    assert inputs.tensors[1].item() == 0.25
    written = second.leaves[0].mul_(2)
    inputs.hold(second)
    assert torch.equal(inputs.tensors[0], written)
    # A transposed tensor is held as it reads, not as it lies in memory.
    square = torch.arange(6.0).view(2, 3).T
    inputs = Inputs(Arguments((square,), {}), [0])
    assert torch.equal(inputs.tensors[0], square)
    assert inputs.tensors[0].is_contiguous()


@pytest.mark.parametrize("other", [torch.ones(4), torch.ones(3).double(), 0.5, torch.ones(3) > 0])
def test_inputs_refuse_another_kind(other):
    inputs = Inputs(Arguments((x,), {}), [0])
    assert not inputs.accept(Arguments((other,), {}))
