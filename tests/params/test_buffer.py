"""The flat side: leaves are views, references survive every move, autograd is not deceived."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.distributions import constraints

from fastsvi.errors import FastSVIWarning, MissingParamError


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


# --- memory that is exchanged from outside --------------------------------------------------


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


# --- autograd is not deceived ---------------------------------------------------------------


def gradient_error():
    return pytest.raises(RuntimeError, match="modified by an inplace operation")


@pytest.mark.parametrize("constraint", [constraints.real, constraints.unit_interval])
def test_a_write_between_forward_and_backward_raises(store, constraint):
    store.setdefault("x", torch.full((3,), 0.5), constraint)
    buffer = buffer_of(store)
    loss = (store.leaf("x") * store["x"]).sum()
    with buffer.write() as flat:
        flat.add_(1.0)
    with gradient_error():
        loss.backward()


def test_touch_tells_of_a_kernel_that_wrote(store):
    leaf = store.setdefault("x", torch.full((3,), 0.5))
    buffer = buffer_of(store)
    loss = leaf.square().sum()
    buffer.flat.data.add_(1.0)  # as a kernel writes: no version count sees it
    buffer.touch()
    with gradient_error():
        loss.backward()


def test_sync_notices_an_untold_write(store):
    leaf = store.setdefault("x", torch.full((3,), 0.5))
    loss = leaf.square().sum()
    buffer_of(store).flat.add_(1.0)
    store.sync()
    with gradient_error():
        loss.backward()


@pytest.mark.parametrize("change", ["append", "grow", "compact"])
def test_a_move_notices_an_untold_write(store, change):
    leaf = store.setdefault("x", torch.full((3,), 0.5))
    store["y"] = torch.zeros(10)
    assert store.buffers
    store["z"] = torch.zeros(1)
    assert store.buffers  # there is spare capacity now
    loss = leaf.square().sum()
    buffer_of(store).flat.add_(1.0)
    if change == "compact":
        del store["y"]
    else:
        store["late"] = torch.zeros(1 if change == "append" else 1000)
    assert store.buffers
    with gradient_error():
        loss.backward()


def test_a_large_group_is_cleared_in_linear_time(store):
    names = [f"x{i}" for i in range(2000)]
    for name in names:
        store[name] = torch.zeros(1)
    buffer = buffer_of(store)
    assert buffer.arrange(names) == slice(0, 2000)
    store.clear()
    assert buffer.layout.size == 0


def test_a_write_that_fails_halfway_counts(store):
    leaf = store.setdefault("x", torch.full((3,), 0.5))
    loss = leaf.square().sum()

    def fail():
        with buffer_of(store).write() as flat:
            flat.add_(1.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with gradient_error():
        loss.backward()


def test_a_write_to_one_leaf_leaves_the_others_alone(store):
    """Two losses and two optimizers, as in adversarial training: Pyro's programs may do that."""
    a, b = store.setdefault("a", torch.ones(2)), store.setdefault("b", torch.ones(2))
    assert buffer_of(store).layout.size == 4
    loss_a, loss_b = a.square().sum(), b.square().sum()
    loss_a.backward()
    torch.optim.SGD([a], lr=0.1).step()
    loss_b.backward()
    assert b.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("change", ["register", "delete", "arrange", "assign", "release", "clear"])
def test_moves_between_forward_and_backward_do_not_touch_gradients(store, settled, change):
    torch.manual_seed(0)
    x = torch.randn(5, 4)

    def loss():
        weight, scale = store.leaf("weight"), store["scale"]
        # Saves the leaf itself, a transposed view of it, and an expanded one.
        return (x @ weight.t()).exp().mul(scale).sum() + (weight * weight.expand(2, 3, 4)).sum()

    store.setdefault("other", torch.randn(7))
    weight = store.setdefault("weight", torch.randn(3, 4))
    store.setdefault("scale", torch.rand(3) + 0.5, constraints.positive)
    scale = store.leaf("scale")
    expected = torch.autograd.grad(loss(), [weight, scale])
    if settled:
        assert store.buffers
    value = loss()
    if change == "register":
        store["late"] = torch.randn(1000)
    elif change == "delete":
        del store["other"]
    elif change == "arrange":
        buffer_of(store).arrange(["scale", "weight"])
    elif change == "assign":
        store["weight"] = torch.zeros(3, 4)
        store["scale"] = torch.full((3,), 100.0)
    elif change == "release":
        for buffer in store.buffers.values():
            buffer.release()
    else:
        store.clear()
        store["weight"] = torch.full((3, 4), 9.0)
    for buffer in store.buffers.values():  # all moves are carried out, and what is left overwritten
        assert buffer.flat.numel()
        with torch.no_grad():
            memory = buffer._values.memory[buffer.layout.size :]
            memory.fill_(float("nan"))
    actual = torch.autograd.grad(value, [weight, scale])
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_hooks_and_attributes_survive(store):
    leaf = store.setdefault("x", torch.ones(2))
    calls = []
    leaf.register_hook(lambda grad: calls.append(grad.clone()))
    leaf.mark = "mine"
    assert buffer_of(store)
    store["y"] = torch.ones(100)
    assert buffer_of(store)
    leaf.square().sum().backward()
    assert [call.tolist() for call in calls] == [[2.0, 2.0]]
    assert store.leaf("x").mark == "mine"


def test_the_buffer_first_asked_for_in_inference_mode_can_be_trained(store):
    with torch.inference_mode():
        store["x"] = torch.ones(2)
        assert buffer_of(store).flat.tolist() == [1.0, 1.0]
        buffer_of(store).grad.zero_()
        moments = buffer_of(store).companion()
    store["x"].square().sum().backward()
    buffer_of(store).bind_grads()
    with buffer_of(store).write() as flat:
        flat -= 0.1 * buffer_of(store).grad
        moments.flat.add_(1.0)
    assert store["x"].tolist() == pytest.approx([0.8, 0.8])


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
