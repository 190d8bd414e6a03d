"""What the tests of the buffers share."""

from __future__ import annotations

import pytest
import torch


def buffer_of(store, dtype=torch.float32):
    return store.buffers[torch.device("cpu"), dtype]


def assert_coherent(store):
    """Every leaf is a contiguous view at its place, and the rows partition the buffer."""
    for (device, dtype), buffer in store.buffers.items():
        flat, layout = buffer.flat, buffer.layout
        assert flat.shape == (layout.size,)
        assert (flat.device, flat.dtype) == (device, dtype) == (buffer.device, buffer.dtype)
        assert [store.leaf(name) for name in layout] == list(buffer.leaves)
        for name, segment in layout.items():
            leaf = store.leaf(name)
            assert leaf.shape == segment.shape
            assert leaf.is_contiguous()
            assert leaf.is_leaf
            if leaf.numel():
                assert leaf.data_ptr() == flat.data_ptr() + segment.offset * flat.element_size()
            assert store.locate(leaf) == (buffer, segment)
            assert segment.constraint is store.constraint(name)


def gradient_error():
    return pytest.raises(RuntimeError, match="modified by an inplace operation")
