"""Sums over plates, and the switch of the checks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsvi import settings
from fastsvi.infer.util import (
    MultiFrameTensor,
    checking,
    is_finite,
    is_validation_enabled,
    torch_item,
    zero_grads,
)
from fastsvi.poutine.indep_messenger import CondIndepStackFrame


def frame(name, dim, size):
    return CondIndepStackFrame(name, dim, size, 0)


A, B, C = frame("a", -1, 2), frame("b", -2, 3), frame("c", -3, 4)


@given(
    st.lists(st.sets(st.sampled_from([A, B, C])), min_size=1, max_size=5),
    st.sets(st.sampled_from([A, B, C])),
)
def test_sums_over_the_plates_that_the_target_is_not_in(stacks, target):
    """Against a dense computation: every term lives in a [4, 3, 2] box, with ones where absent."""
    sums = MultiFrameTensor()
    dense = torch.zeros(4, 3, 2)
    for seed, stack in enumerate(stacks):
        shape = [f.size if f in stack else 1 for f in (C, B, A)]
        value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        sums.add((tuple(stack), value))
        outside = [f.dim for f in stack if f not in target]
        dense = dense + (value.sum(outside, keepdim=True) if outside else value)
    found = sums.sum_to(tuple(target))
    torch.testing.assert_close(torch.as_tensor(found).expand(4, 3, 2), dense)


def test_no_terms():
    assert MultiFrameTensor().sum_to((A,)) == 0.0


def test_sequential_plates_are_ignored():
    sequential = CondIndepStackFrame("s", None, 3, 1)
    sums = MultiFrameTensor(((sequential, A), torch.ones(2)))
    assert sums.sum_to(()) == 2.0


def test_checking_restores_what_was():
    flag = torch.distributions.Distribution._validate_args
    with settings.context(validate="first"):
        with checking(True):
            assert is_validation_enabled()
            assert torch.distributions.Distribution._validate_args
            with checking(False):
                assert not torch.distributions.Distribution._validate_args
        assert settings.get("validate") == "first"
        with pytest.raises(ZeroDivisionError), checking(True):
            raise ZeroDivisionError
        assert settings.get("validate") == "first"
    assert torch.distributions.Distribution._validate_args == flag


def test_numbers_out_of_tensors():
    assert torch_item(torch.tensor([2.0])) == 2.0
    assert torch_item(3) == 3
    assert is_finite(1.0)
    assert not is_finite(torch.tensor(float("inf")))


def test_zero_grads_keeps_the_tensors():
    x = torch.ones(3, requires_grad=True)
    x.sum().backward()
    grad = x.grad
    zero_grads([x, torch.ones(1, requires_grad=True)])
    assert x.grad is grad
    assert not grad.any()
