"""The flat side: leaves are views, references survive every move."""

from __future__ import annotations

import gc

import pytest
import torch
from buffers import assert_coherent, buffer_of
from torch import nn
from torch.distributions import constraints

from fastsvi.errors import MissingParamError


def test_leaves_become_views_of_one_tensor(mixed):
    before = {name: (id(leaf), leaf.detach().clone()) for name, leaf in mixed.named_parameters()}
    assert_coherent(mixed)
    assert len(mixed.buffers) == 5
    for name, leaf in mixed.named_parameters():
        assert id(leaf) == before[name][0]
        assert torch.equal(leaf, before[name][1])
    assert sum(len(buffer.layout) for buffer in mixed.buffers.values()) == len(mixed)


def test_large_params_are_aligned_and_small_ones_packed(store):
    for i in range(5):
        store[f"small{i}"] = torch.zeros(3)
    store["large"] = torch.zeros(1000)
    layout = buffer_of(store).layout
    assert [layout[f"small{i}"].offset for i in range(5)] == [0, 3, 6, 9, 12]
    assert layout["large"].offset == 16
    assert store.leaf("large").data_ptr() % 64 == 0


def test_before_anybody_asks_nothing_is_moved(store):
    value = torch.zeros(3)
    pointer = value.data_ptr()
    store["x"] = value
    store["x"].sum().backward()
    store.get_state()
    assert value.data_ptr() == pointer
    assert store.buffers
    assert value.data_ptr() != pointer


def test_writing_to_either_side_is_seen_on_the_other(store):
    leaf = store.setdefault("x", torch.zeros(2, 2))
    with buffer_of(store).write() as flat:
        flat.fill_(3.0)
    assert torch.equal(leaf, torch.full((2, 2), 3.0))
    with torch.no_grad():
        leaf[0, 1] = 5.0
    assert buffer_of(store).flat.tolist() == [3.0, 5.0, 3.0, 3.0]


def test_growth_is_amortised_and_keeps_every_reference(store):
    first = store.setdefault("x0", torch.zeros(4))
    optimizer = torch.optim.SGD([first], lr=1.0)
    buffer = buffer_of(store)
    addresses = {buffer.flat.data_ptr()}
    for i in range(1, 200):
        store[f"x{i}"] = torch.full((4,), float(i))
        addresses.add(buffer.flat.data_ptr())
    assert len(addresses) < 12  # 4 * 2**8 > 4 * 200
    assert store.leaf("x0") is first
    first.grad = torch.ones(4)
    optimizer.step()
    assert buffer.flat[:8].tolist() == [-1.0] * 4 + [1.0] * 4
    assert_coherent(store)


def test_deleting_closes_the_gap(store):
    for name in "abcd":
        store[name] = torch.full((2,), float(ord(name)))
    buffer = buffer_of(store)
    held = store.leaf("b")
    assert buffer.layout.size == 8
    del store["b"]
    store["c"] = torch.full((3,), -1.0)
    assert buffer.layout.size == 7
    assert set(buffer.layout) == {"a", "c", "d"}
    assert_coherent(store)
    # Whoever holds the deleted leaf keeps its value, whatever happens to the buffer.
    with buffer.write() as flat:
        flat.zero_()
    assert held.tolist() == [98.0, 98.0]
    with torch.no_grad():
        held.fill_(7.0)
    assert buffer.flat.count_nonzero() == 0


def test_clear_frees_the_memory_and_the_buffer_lives_on(store):
    store["x"] = torch.zeros(1000)
    buffer = buffer_of(store)
    moments = buffer.companion()
    store.clear()
    assert buffer.flat.numel() == moments.flat.numel() == 0
    assert buffer.flat.untyped_storage().nbytes() == 0
    assert store.buffers == {}
    store["y"] = torch.ones(3)
    assert buffer_of(store) is buffer
    assert moments.flat.tolist() == [0.0] * 3


# --- gradients ------------------------------------------------------------------------------


def test_bound_grads_are_filled_by_backward_and_zeroed_in_one_go(store):
    a = store.setdefault("a", torch.ones(2))
    b = store.setdefault("b", torch.full((3,), 2.0), constraints.positive)
    buffer = buffer_of(store)
    a.grad = torch.full((2,), 5.0)  # kept
    buffer.bind_grads()
    assert buffer.grad.tolist() == [5.0, 5.0, 0.0, 0.0, 0.0]
    (a.sum() + store["b"].sum()).backward()
    torch.testing.assert_close(buffer.grad, torch.tensor([6.0, 6.0, 2.0, 2.0, 2.0]))
    assert a.grad.data_ptr() == buffer.grad.data_ptr()
    buffer.zero_grad()
    assert a.grad.tolist() == [0.0, 0.0]
    assert store.leaf("b").grad.tolist() == [0.0] * 3
    assert b.requires_grad


@pytest.mark.parametrize("undo", ["none", "pyro", "create_graph"])
def test_bind_grads_takes_rebound_gradients_back(store, undo):
    leaf = store.setdefault("x", torch.ones(2))
    buffer = buffer_of(store)
    buffer.bind_grads()
    leaf.square().sum().backward()
    if undo == "none":
        leaf.grad = None
        expected = [0.0, 0.0]
    elif undo == "pyro":
        leaf.grad = torch.zeros_like(leaf.grad)  # as pyro.infer.util.zero_grads does
        expected = [0.0, 0.0]
    else:
        with pytest.warns(UserWarning, match="create_graph"):
            leaf.square().sum().backward(create_graph=True)
        expected = [4.0, 4.0]
    assert leaf.grad is None or leaf.grad.data_ptr() != buffer.grad.data_ptr()
    buffer.bind_grads()
    assert leaf.grad.data_ptr() == buffer.grad.data_ptr()
    assert buffer.grad.tolist() == expected
    assert not leaf.grad.requires_grad


def test_grads_follow_moves(store):
    a = store.setdefault("a", torch.ones(2))
    b = store.setdefault("b", torch.ones(2))
    buffer = buffer_of(store)
    buffer.bind_grads()
    (2 * a + 3 * b).sum().backward()
    store["c"] = torch.zeros(100)
    del store["a"]
    assert buffer.layout.size == 102
    assert b.grad.tolist() == [3.0, 3.0]
    assert b.grad.data_ptr() == buffer.grad.data_ptr() + buffer.layout["b"].offset * 4
    assert a.grad.tolist() == [2.0, 2.0]
    buffer.zero_grad()
    assert a.grad.tolist() == [2.0, 2.0]
    assert b.grad.tolist() == [0.0, 0.0]
    assert store.leaf("c").grad is None
    buffer.bind_grads()
    assert store.leaf("c").grad is not None


def test_params_without_gradient_are_not_bound(store):
    leaf = store.setdefault("x", torch.ones(2))
    leaf.requires_grad_(False)
    buffer_of(store).bind_grads()
    assert leaf.grad is None


def test_sparse_gradients_are_taken_in(store):
    embedding = nn.Embedding(4, 2, sparse=True)
    store["e"] = embedding.weight
    embedding(torch.tensor([1])).sum().backward()
    assert embedding.weight.grad.is_sparse
    buffer_of(store).bind_grads()
    assert buffer_of(store).grad.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


# --- companions -----------------------------------------------------------------------------


def test_companions_follow_every_move(store):
    for name in "abc":
        store[name] = torch.zeros(2)
    buffer = buffer_of(store)
    moments, counts = buffer.companion(), buffer.companion(fill=1.0, dtype=torch.float64)
    moments.flat[:] = torch.arange(6.0)
    assert counts.flat.dtype == torch.float64
    del store["b"]
    store["d"] = torch.zeros(50)
    buffer.arrange(["c", "a"])
    layout = buffer.layout
    assert moments.flat[layout["a"].slice].tolist() == [0.0, 1.0]
    assert moments.flat[layout["c"].slice].tolist() == [4.0, 5.0]
    assert moments.flat[layout["d"].slice].count_nonzero() == 0
    assert bool((counts.flat == 1.0).all())
    assert moments.flat.shape == counts.flat.shape == buffer.flat.shape


def test_a_new_leaf_of_an_old_name_starts_fresh(store):
    store["a"] = torch.zeros(2)
    buffer = buffer_of(store)
    moments = buffer.companion()
    moments.flat.fill_(5.0)
    del store["a"]
    store["a"] = torch.zeros(2)
    assert moments.flat.tolist() == [0.0, 0.0]
    moments.flat.fill_(5.0)
    store["a"] = torch.ones(2)
    assert moments.flat.tolist() == [0.0, 0.0]


def test_a_leaf_that_comes_back_finds_its_entries(store):
    leaf = store.setdefault("a", torch.zeros(2))
    buffer = buffer_of(store)
    moments = buffer.companion()
    moments.flat.fill_(5.0)
    with store.scope():
        store["b"] = torch.zeros(3)
        assert moments.flat.tolist() == [0.0] * 3
    assert store.leaf("a") is leaf
    assert moments.flat.tolist() == [5.0, 5.0]


def test_companions_are_held_weakly(store):
    store["a"] = torch.zeros(2)
    buffer = buffer_of(store)
    moments = buffer.companion()
    assert len(buffer._companions) == 1
    del moments
    gc.collect()
    assert len(buffer._companions) == 0


# --- arrange --------------------------------------------------------------------------------


def test_arrange_makes_slabs_that_last(store):
    for site, size in (("a", 3), ("b", 1), ("c", 2)):
        store[f"loc.{site}"] = torch.full((size,), 1.0)
        store[f"scale.{site}"] = torch.full((size,), 2.0)
    buffer = buffer_of(store)
    flat = buffer.flat
    locs = [f"loc.{site}" for site in "abc"]
    scales = [f"scale.{site}" for site in "cab"]
    held = store.leaf("loc.a")
    where_locs, where_scales = buffer.arrange(locs), buffer.arrange(scales)
    assert flat.tolist() == [1.0] * 3 + [2.0] * 3 + [1.0, 2.0] + [1.0] * 2 + [2.0] * 2
    for _ in range(2):
        for names, where, value in ((locs, where_locs, 1.0), (scales, where_scales, 2.0)):
            assert buffer.flat[where].tolist() == [value] * 6
            assert buffer.flat[where].data_ptr() % 16 == 0
            offsets = [buffer.layout[name].offset for name in names]
            assert offsets == sorted(offsets)
        assert store.leaf("loc.a") is held
        assert_coherent(store)
        # Now grow, shrink, and ask again: still slabs, perhaps elsewhere.
        store["other"] = torch.zeros(100)
        store["gone"] = torch.zeros(5)
        assert buffer.layout.size > 100
        del store["gone"]
        where_locs, where_scales = buffer.arrange(locs), buffer.arrange(scales)


def test_arrange_again_moves_nothing(store):
    for name in "abc":
        store[name] = torch.zeros(2)
    buffer = buffer_of(store)
    assert buffer.arrange(["a", "b"]) == slice(0, 4)
    version, pointer = buffer.version, buffer.flat.data_ptr()
    assert buffer.arrange(["a", "b"]) == slice(0, 4)
    assert (buffer.version, buffer.flat.data_ptr()) == (version, pointer)
    assert buffer.arrange([]) == slice(0, 0)


def test_a_name_can_change_its_group(store):
    for name in "abcd":
        store[name] = torch.full((1,), float(ord(name)))
    buffer = buffer_of(store)
    buffer.arrange(["a", "b", "c"])
    where = buffer.arrange(["d", "b"])
    assert buffer.flat[where].tolist() == [100.0, 98.0]
    del store["b"]
    assert_coherent(store)
    where = buffer.arrange(["c", "a"])
    assert buffer.flat[where].tolist() == [99.0, 97.0]


@pytest.mark.parametrize(("names", "found"), [(["a", "x"], "'x'"), (["a", "a"], "name twice")])
def test_arrange_refuses_strangers_and_twins(store, names, found):
    store["a"] = torch.zeros(1)
    with pytest.raises(MissingParamError, match=f"found .*{found}.*; register"):
        buffer_of(store).arrange(names)


@pytest.mark.slow
def test_fifty_thousand_params_come_and_go(store):
    """In time proportional to their number: were it quadratic, this would take hours."""
    n = 50_000
    for i in range(n):
        store[f"x{i}"] = torch.zeros(2)
    assert buffer_of(store).layout.size == 2 * n
    for i in range(0, n, 2):
        del store[f"x{i}"]
    assert buffer_of(store).layout.size == n
    store.clear()
    assert len(store) == 0
    assert store.buffers == {}


def test_repr(store):
    store["a"] = torch.zeros(2)
    assert repr(buffer_of(store)) == "Buffer(cpu, float32: 1 params)"
    assert repr(buffer_of(store).layout) == "Layout(1 segments, 2 elements)"


def test_moves_copy_exactly(store):
    """Bits, and not values: a NaN keeps its payload."""
    payload = torch.tensor([0x7FC12345, 0x7F800001], dtype=torch.int32).view(torch.float32)
    leaf = store.setdefault("x", payload.clone())
    for i in range(3):
        store[f"y{i}"] = torch.zeros(50)
        assert buffer_of(store).layout.size
    assert torch.equal(leaf.detach().view(torch.int32), payload.view(torch.int32))
