"""Rows, gaps and lookups of a layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import constraints

from fastsvi.params import Layout


@given(st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from([1, 4, 16]))))
def test_rows_partition_the_elements(parameters):
    layout = Layout()
    for index, (shape, align) in enumerate(parameters):
        segment = layout.append(str(index), torch.Size(shape), constraints.real, align)
        assert segment.offset % align == 0
        assert segment.numel == torch.Size(shape).numel()
    assert list(layout.boundaries) == sorted(layout.boundaries)
    assert layout.boundaries[0] == 0
    assert layout.boundaries[-1] == layout.size
    assert len(layout.boundaries) == layout.num_rows + 1
    assert list(layout) == [str(i) for i in range(len(parameters))]
    for segment in layout.values():
        assert layout.boundaries[segment.row] == segment.offset
        assert layout.boundaries[segment.row + 1] == segment.stop
    owned = [name for name, s in layout.items() for _ in range(s.numel)]
    named = [layout.owner(e) for e in range(layout.size)]
    assert [name for name in named if name is not None] == owned


def test_a_forgotten_name_leaves_a_gap():
    layout = Layout()
    layout.append("a", torch.Size([2]), constraints.real)
    layout.append("b", torch.Size([3]), constraints.real)
    assert layout.forget("a").slice == slice(0, 2)
    assert "a" not in layout
    assert layout.owner(1) is None
    assert layout.owner(2) == "b"
    assert layout.owner(-1) is layout.owner(5) is None
    assert layout.size == 5
    with pytest.raises(KeyError):
        layout["a"]
