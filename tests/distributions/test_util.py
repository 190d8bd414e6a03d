"""Shape helpers, masks and the validation switch."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyro.distributions.util as pyro_util
import pytest
import torch
from torch.testing import assert_close

from fastsvi.distributions import util

shapes = st.lists(st.lists(st.sampled_from([1, 2, 3]), max_size=4).map(tuple), max_size=3)


@hypothesis.given(shapes, st.booleans())
def test_broadcast_shape_agrees_with_pyro(listed, strict):
    try:
        expected = pyro_util.broadcast_shape(*listed, strict=strict)
    except ValueError:
        with pytest.raises(ValueError, match="do not broadcast"):
            util.broadcast_shape(*listed, strict=strict)
        return
    assert util.broadcast_shape(*listed, strict=strict) == expected
    if not strict:
        assert tuple(expected) == np.broadcast_shapes(*listed)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, 5, -1, -2, float("inf")])
def test_sums_agree_with_pyro(dim):
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    assert_close(util.sum_rightmost(x, dim), pyro_util.sum_rightmost(x, dim))
    assert_close(util.sum_leftmost(x, dim), pyro_util.sum_leftmost(x, dim))
    assert util.sum_rightmost(2.0, dim) == util.sum_leftmost(2.0, dim) == 2.0
    empty = torch.ones(2, 0)
    assert util.sum_rightmost(empty, 1).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", [1, 1.0, 2.5, torch.tensor(3.0)], ids=str)
@pytest.mark.parametrize("mask", [None, True, False, torch.tensor([True, False, True])], ids=str)
def test_scale_and_mask_agrees_with_pyro(scale, mask):
    x = torch.randn(3)
    assert_close(util.scale_and_mask(x, scale, mask), pyro_util.scale_and_mask(x, scale, mask))
    assert util.scale_and_mask(0, scale, mask) == 0
    if (mask is None or mask is True) and util.is_identically_one(scale):
        assert util.scale_and_mask(x, scale, mask) is x


def test_a_mask_broadcasts_and_keeps_the_dtype():
    x = torch.ones(2, 3, dtype=torch.float64)
    y = util.scale_and_mask(x, 2.0, torch.tensor([[True], [False]]))
    assert y.dtype == torch.float64
    assert y.sum() == 6


def test_identically():
    assert util.is_identically_zero(0)
    assert util.is_identically_zero(0.0)
    assert util.is_identically_one(1)
    for x in (torch.tensor(0), torch.tensor(1), "0", None):
        assert not util.is_identically_zero(x)
        assert not util.is_identically_one(x)


def test_likes():
    prototype = torch.zeros(3, dtype=torch.float64)
    assert util.scalar_like(prototype, 2.5).dtype == torch.float64
    assert_close(util.eye_like(prototype, 2, 3), torch.eye(2, 3, dtype=torch.float64))
    assert util.eye_like(prototype, 2).shape == (2, 2)
