"""Autograd is not deceived: writes between forward and backward are noticed, moves are not felt."""

from __future__ import annotations

import pytest
import torch
from buffers import buffer_of, gradient_error
from torch.distributions import constraints


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
