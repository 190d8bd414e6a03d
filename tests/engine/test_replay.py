"""A recording replayed gives what the function gives, for one fit and for several under vmap."""

from __future__ import annotations

import weakref

import pytest
import torch

from fastsvi.engine.noise_op import normal_noise
from fastsvi.engine.record import record
from fastsvi.engine.replay import ReplayStep, replay
from fastsvi.errors import CaptureError
from fastsvi.kernels import philox


def function(x, y):
    best = x.max(0)
    return [(x * y).view(6).exp(), best.values + best.indices, torch.log_softmax(x, 1)]


def test_replay_equals_the_function():
    graph = record(function, [torch.randn(2, 3), torch.randn(2, 3)])
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(replay(graph, [x, y]), function(x, y))


def test_replay_under_vmap_equals_a_loop():
    graph = record(function, [torch.randn(2, 3), torch.randn(2, 3)])
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3)  # mapped over the last axis: no view will do
    mapped = torch.func.vmap(lambda x: tuple(replay(graph, [x, y])), in_dims=2)(x)
    for k in range(4):
        torch.testing.assert_close([out[k] for out in mapped], function(x[..., k], y))


def test_a_step_of_several_fits():
    key = philox.derive_key(0, 0)

    def step(state, origin, key, data):
        noise = normal_noise(key, origin, 0, 1, 1, 3, torch.float32).view(3)
        new = state + noise + data
        return [new, origin, new.sum(), new.sum() > 100]

    state, data = torch.randn(4, 3), torch.tensor([0.0, 1.0, 1000.0, 2.0])
    origin = torch.stack([philox.make_origin(step=5, fit=f) for f in range(4)])
    graph = record(step, [state[0], origin[0], key, data[0]])
    many = ReplayStep(graph, 2, is_own=(True, True, False, True))
    expected = [step(state[f].clone(), origin[f], key, data[f]) for f in range(4)]
    losses, halts = many.step([state, origin], [key, data])
    torch.testing.assert_close(state, torch.stack([e[0] for e in expected]))
    torch.testing.assert_close(losses, torch.stack([e[2] for e in expected]))
    assert halts.tolist() == [False, False, True, False]


def test_recordings_of_one_function_differ_where_python_state_did():
    scale, shift = [2.0], [torch.tensor([1.0, torch.nan])]

    def program(x):
        return [(x * scale[0] + shift[0]).sum()]

    x = torch.randn(2)
    first = record(program, [x])
    assert first.difference(record(program, [x])) is None  # NaN equals NaN
    scale[0] = 3.0
    assert "argument 2.0 has become 3.0" in first.difference(record(program, [x]))
    scale[0], shift[0] = 2.0, torch.tensor([1.0, 4.0])
    assert "constant of shape (2,) has changed" in first.difference(record(program, [x]))
    more = record(lambda x: [(x.exp() + x).sum()], [x])
    assert "`mul` has become `exp`" in first.difference(more)


def changes_views(x):
    k = x * 2
    k.view(-1)[::4] += 1
    first = k[0]
    first.mul_(3)
    square = k.T.square()
    k.add_(1)
    k[1].pow_(2)
    return [square, first + 0, k]


def test_changes_in_place_reach_every_view():
    graph = record(changes_views, [torch.randn(3, 3)])
    x = torch.randn(3, 3)
    torch.testing.assert_close(replay(graph, [x]), changes_views(x))


def fills_a_constant(x):
    filled = torch.zeros(3)
    filled.copy_(x)
    filled += 1
    ones = torch.ones(3)
    ones.mul_(x)
    return [filled * 2, ones + filled]


def test_a_constant_that_is_written_to_keeps_what_it_was():
    graph = record(fills_a_constant, [torch.randn(3)])
    for x in (torch.randn(3), torch.zeros(3)):
        torch.testing.assert_close(replay(graph, [x]), fills_a_constant(x))


def test_what_a_recorded_function_lets_go_is_not_kept():
    alive = []

    def function(x):
        for _ in range(5):
            x = x * 2
            alive.append(weakref.ref(x))
        return [x.sum()]

    record(function, [torch.ones(100)])
    assert [reference() is None for reference in alive] == [True] * 5


def test_a_change_that_cannot_be_traced_back_is_refused():
    def strided(x):
        k = x * 2
        k.as_strided((2,), (4,)).add_(1)
        return [k]

    def part_of_a_constant(x):
        k = torch.zeros(3)
        k[0] = x.sum()
        return [k]

    for function in (strided, part_of_a_constant):
        with pytest.raises(CaptureError, match="changes a tensor in place"):
            record(function, [torch.randn(3, 3)])
