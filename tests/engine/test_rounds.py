"""Loops in recorded steps, against the same loops in Python."""

from __future__ import annotations

import pytest
import torch

from fastsvi.engine.native import NativeStep
from fastsvi.engine.record import record
from fastsvi.engine.replay import ReplayStep, replay
from fastsvi.engine.rounds import loop_of, round_number, sum_of_rounds

ROUNDS = 5


def one_round(x, weight, number):
    """Reductions, a value from before the loop with two readers, and a product."""
    y = (x.exp() * number + weight).tanh() @ (x.exp().unsqueeze(1) / len(x)).expand(-1, 3)
    return x * y.sum(), y.mean()


def step(x, count, rounds=ROUNDS):
    weight = count.sum() * 0.25
    number = round_number(count, rounds)
    each, loss = one_round(x, weight, number.to(x.dtype))
    total, loss = sum_of_rounds(each, number), sum_of_rounds(loss, number)
    new = x - 0.01 * total
    return [new, count + 1, loss + weight, new.isnan().any()]


def expected(x, count):
    weight = count.sum() * 0.25
    rounds = [one_round(x, weight, float(k)) for k in range(ROUNDS)]
    total, loss = (torch.stack(parts).sum(0) for parts in zip(*rounds, strict=True))
    return x - 0.01 * total, count + 1, loss + weight


@pytest.fixture
def tensors():
    return [torch.randn(700, dtype=torch.float64), torch.arange(4)]


def test_replay(tensors):
    graph = record(step, tensors)
    for found, right in zip(replay(graph, tensors), expected(*tensors), strict=False):
        torch.testing.assert_close(found, right)


def test_replay_of_many(tensors):
    graph = record(step, tensors)
    many = [torch.stack([x, 2 * x]) for x in tensors]
    right = [expected(x, count) for x, count in zip(*many, strict=True)]
    losses, _ = ReplayStep(graph, 2, [True, True]).step(many, [])
    torch.testing.assert_close(losses, torch.stack([loss for *_, loss in right]))
    torch.testing.assert_close(many[0], torch.stack([new for new, *_ in right]))


def test_native(tensors):
    """Three steps: what a round leaves behind must not be seen by the next step."""
    native = NativeStep(step, [x.clone() for x in tensors])
    losses, state = native.run(3), tensors
    for loss in losses:
        *state, right = expected(*state)
        torch.testing.assert_close(loss, right)
    torch.testing.assert_close(native._tensors[0], state[0])


def test_code_and_memory_do_not_grow_with_the_rounds(tensors):
    few, many = (
        NativeStep(lambda x, count, n=n: step(x, count, n), tensors) for n in (ROUNDS, 50 * ROUNDS)
    )
    assert many.source == few.source.replace(f"round < {ROUNDS};", f"round < {50 * ROUNDS};")
    assert many.arena_bytes == few.arena_bytes


def test_what_does_not_depend_on_the_round_is_done_once(tensors):
    graph = record(step, tensors)
    before, body, after, count = loop_of(graph)
    assert count == ROUNDS
    assert len(before) + len(body) + len(after) == len(graph.nodes)
    assert "exp" in [node.name for node in before]
    assert "tanh" in [node.name for node in body]
    assert [node.name for node in body].count("sum_of_rounds") == 2
    assert "isnan" in [node.name for node in after]


def test_a_term_that_is_the_same_in_all_rounds():
    def same(x):
        total = sum_of_rounds(x, round_number(x, 3))
        return [total, total.sum(), total.isnan().any()]

    x = torch.arange(4.0)
    assert torch.equal(replay(record(same, [x]), [x])[0], 3 * x)
    native = NativeStep(same, [x.clone()])
    assert torch.equal(native.run(2), torch.tensor([18.0, 54.0]))


@pytest.mark.parametrize("dim", [0, 1, None])
def test_sums_that_go_on_from_round_to_round(dim):
    """Over the inner and the outer loop, and over more terms than a float32 sum takes at once."""

    def sums(x):
        number = round_number(x, 4)
        terms = (x * number).cos()
        total = sum_of_rounds(terms.sum() if dim is None else terms.sum(dim), number)
        return [x + total.sum(), total.sum(), total.isnan().any()]

    x = torch.randn(400, 300)
    right = sum((x.double() * k).cos().sum() for k in range(4))
    native = NativeStep(sums, [x.clone()])
    torch.testing.assert_close(native.run(1)[0].double(), right, rtol=1e-5, atol=0)
    assert native.arena_bytes < 20_000  # two sums at most, and no array of terms


def test_no_loop(tensors):
    graph = record(lambda x, y: [x + y.sum()], tensors)
    assert loop_of(graph) == (graph.nodes, [], [], 1)
