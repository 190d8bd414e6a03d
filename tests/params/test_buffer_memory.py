"""Memory that is exchanged or shared from outside: the buffer takes it back, or says so."""

from __future__ import annotations

import pytest
import torch
from buffers import assert_coherent, buffer_of, gradient_error
from torch import nn

from fastsvi.errors import FastSVIWarning


def test_sync_takes_back_a_leaf_whose_data_was_rebound(store):
    a = store.setdefault("a", torch.zeros(2))
    store["b"] = torch.zeros(2)
    buffer = buffer_of(store)
    moments = buffer.companion()
    moments.flat.fill_(1.0)
    a.data = a.data - 3.0
    assert store["a"].tolist() == [-3.0, -3.0]
    assert store.constrain_all()["a"].tolist() == [-3.0, -3.0]
    assert_coherent(store)
    assert buffer.flat.tolist() == [-3.0, -3.0, 0.0, 0.0]
    assert moments.flat.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "rebind",
    [
        lambda leaf: leaf.data.t(),  # same address, other strides
        lambda leaf: leaf.data[:1],  # same address, other shape
        lambda leaf: torch.ones(4, 5),
        lambda leaf: torch.ones(()).expand(2, 3),
        lambda leaf: leaf.data.new_zeros(0, 3),
    ],
)
def test_sync_after_odd_rebinding(store, rebind):
    leaf = store.setdefault("x", torch.arange(6.0).reshape(2, 3))
    store["y"] = torch.full((2,), 7.0)
    buffer = buffer_of(store)
    assert buffer.flat.numel() == 8
    leaf.data = rebind(leaf)
    expected = leaf.detach().clone()
    store.sync()
    assert store.leaf("x") is leaf
    assert torch.equal(leaf, expected)
    assert_coherent(store)
    assert store["y"].tolist() == [7.0, 7.0]


@pytest.mark.parametrize("move", ["arrange", "grow", "compact"])
def test_a_move_does_not_undo_an_exchange_of_memory(store, move):
    a = store.setdefault("a", torch.zeros(2))
    b = store.setdefault("b", torch.zeros(2))
    buffer = buffer_of(store)
    assert buffer.layout.size == 4
    a.data = torch.ones(2)
    b.data = torch.full((5,), 2.0)
    if move == "arrange":
        buffer.arrange(["b", "a"])
    elif move == "grow":
        store["c"] = torch.zeros(100)
    else:
        del store["b"]
        store["b"] = b
    assert store.buffers  # and no sync
    assert a.tolist() == [1.0, 1.0]
    assert b.tolist() == [2.0] * 5
    assert_coherent(store)


def test_entries_of_a_leaf_that_changes_its_size_start_afresh(store):
    leaf = store.setdefault("a", torch.zeros(2))
    buffer = buffer_of(store)
    moments = buffer.companion()
    moments.flat.fill_(5.0)
    leaf.data = torch.zeros(3)
    store.sync()
    assert moments.flat.tolist() == [0.0] * 3


def test_taking_memory_back_is_a_write(store):
    """A graph may have saved a view of the place that the new value comes to."""
    leaf = store.setdefault("x", torch.full((2, 2), 0.5))
    assert store.buffers
    loss = (leaf.t() @ torch.ones(2, 2)).square().sum() + (leaf.t() * leaf.t()).sum()
    leaf.data = leaf.data + 1.0
    store.sync()
    with gradient_error():
        loss.backward()


def test_a_module_that_changes_its_dtype_changes_the_buffer(store):
    net = nn.Linear(2, 2)
    store["weight"], store["bias"] = net.weight, net.bias
    store["other"] = torch.zeros(3)
    single = buffer_of(store)
    assert single.layout.size == 9
    net.double()
    store.sync()
    assert_coherent(store)
    assert set(buffer_of(store, torch.float64).layout) == {"weight", "bias"}
    assert set(single.layout) == {"other"}
    assert store.leaf("weight") is net.weight
    net.float()
    store.sync()
    assert single.layout.size == 9
    assert_coherent(store)


def test_a_dtype_changed_before_the_first_look_is_noticed(store):
    net = nn.Linear(2, 2)
    store["weight"], store["empty"] = net.weight, torch.zeros(0)
    net.double()
    assert {dtype for _, dtype in store.buffers} == {torch.float32, torch.float64}
    assert_coherent(store)


def test_optimizer_state_lost_by_a_change_of_dtype_is_said(store):
    net = nn.Linear(2, 2)
    store["weight"] = net.weight
    moments = buffer_of(store).companion()
    moments.flat.fill_(1.0)
    net.double()
    with pytest.warns(FastSVIWarning, match=r"'weight' changed from torch.float32.*afresh"):
        store.sync()


def test_load_state_dict_keeps_the_views(store):
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    store["weight"], store["bias"] = net.weight, net.bias
    pointer = buffer_of(store).flat.data_ptr()
    net.load_state_dict(other.state_dict())
    assert buffer_of(store).flat.data_ptr() == pointer
    assert torch.equal(buffer_of(store).flat[:4].view(2, 2), other.weight)


def test_release_gives_leaves_their_own_memory(store):
    net = nn.Linear(2, 2)
    store["weight"], store["rest"] = net.weight, torch.zeros(1000)
    buffer = buffer_of(store)
    moments = buffer.companion()
    moments.flat.fill_(2.0)
    assert net.weight.untyped_storage().nbytes() > 4000
    buffer.release()
    assert net.weight.untyped_storage().nbytes() == 16
    with torch.no_grad():
        net.weight.fill_(9.0)
    assert_coherent(store)
    assert buffer.flat[:4].tolist() == [9.0] * 4
    assert bool((moments.flat[buffer.layout["rest"].slice] == 2.0).all())


# --- shared memory is said ------------------------------------------------------------------


def test_params_that_share_memory_are_told_of(store):
    whole = torch.zeros(6)
    store["a"], store["b"], store["c"] = whole[:3], whole[2:5], whole[5:]
    with pytest.warns(FastSVIWarning, match="'a' shares memory with param 'b'"):
        assert store.buffers


def test_a_param_that_shares_memory_with_a_settled_one_is_told_of(store):
    store["a"] = torch.zeros(3)
    assert store.buffers
    store["b"] = store.leaf("a").detach()
    with pytest.warns(FastSVIWarning, match="'b' shares memory with param 'a'"):
        assert store.buffers


def test_rows_of_one_tensor_are_fine(store):
    whole = torch.arange(6.0)
    store["a"], store["b"] = whole[:3], whole[3:]
    assert_coherent(store)
    store["c"] = nn.Parameter(store.leaf("a").detach().clone())
    assert_coherent(store)


def test_memory_shared_between_processes_is_told_of(store):
    net = nn.Linear(1, 1, bias=False)
    net.share_memory()
    store["w"] = net.weight
    with pytest.warns(FastSVIWarning, match="other processes"):
        assert store.buffers
