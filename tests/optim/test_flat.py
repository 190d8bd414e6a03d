"""The flat engine: who is updated, what follows whom, and what a step costs in launches."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx

from fastsvi import optim
from fastsvi.errors import DtypeError, FastSVIWarning
from fastsvi.optim import OptionError, fused
from fastsvi.optim.flat import FlatAdam
from fastsvi.optim.pure import PureUpdate
from fastsvi.poutine.runtime import PARAM_STORE as STORE


def add_params(*shapes, dtype=torch.float64):
    """Leaves p0, p1, ... of these shapes, with gradients."""
    names = [f"p{len(STORE) + i}" for i in range(len(shapes))]
    for name, shape in zip(names, shapes, strict=True):
        value = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=dtype).reshape(shape)
        leaf = STORE.setdefault(name, value.clone()).unconstrained()
        leaf.grad = torch.cos(3 * leaf.detach()) + 0.5
    return tuple(STORE.leaf(name) for name in names)


def engine_of(optimizer, leaf):
    engine = optimizer._home[leaf]
    assert isinstance(engine, FlatAdam)
    return engine


def values(leaves):
    return [leaf.detach().clone() for leaf in leaves]


@pytest.fixture(autouse=True)
def empty_store():
    STORE.clear()
    yield
    STORE.clear()


# --- one launch -----------------------------------------------------------------------------


def test_equal_options_are_one_run_over_the_whole_buffer():
    leaves = add_params((3,), (), (2,), (300,), (1,))  # 300 float64 are aligned: there is a gap
    optimizer = optim.Adam({"lr": 0.1})
    optimizer(leaves)
    engine = engine_of(optimizer, leaves[0])
    assert engine.buffer.flat.numel() > sum(leaf.numel() for leaf in leaves)
    assert [(run.start, run.stop) for run in engine._runs] == [(0, engine.buffer.flat.numel())]
    assert len(engine._steps) == 1


def test_two_learning_rates_are_two_runs():
    leaves = add_params((3,), (2,), (4,))
    optimizer = optim.Adam(lambda name: {"lr": 0.1 if name == "p2" else 0.2})
    optimizer(leaves)
    engine = engine_of(optimizer, leaves[0])
    assert [(run.start, run.stop) for run in engine._runs] == [(0, 5), (5, 9)]


def test_the_plan_is_made_once(monkeypatch):
    leaves = add_params((3,), (2,))
    optimizer = optim.Adam({"lr": 0.1})
    optimizer(leaves)
    engine = engine_of(optimizer, leaves[0])
    monkeypatch.setattr(engine, "plan", None)  # a further plan would fail
    monkeypatch.setattr(optimizer, "_form_teams", None)
    for same in (leaves, tuple(leaves), list(leaves), iter(leaves)):
        optimizer(same)
    assert engine.state(leaves[0])["step"] == 5


def test_alternating_sets_of_leaves_settle_down(monkeypatch):
    leaves = add_params((3,), (2,), (4,))
    optimizer = optim.Adam({"lr": 0.1})
    for _ in range(2):
        optimizer(leaves)
        optimizer(leaves[:1])
        optimizer(leaves[1:])
    monkeypatch.setattr(FlatAdam, "plan", None)
    for _ in range(2):
        optimizer(leaves)
        optimizer(leaves[:1])
        optimizer(leaves[1:])
    assert len(engine_of(optimizer, leaves[0])._runs) == 2


# --- who is updated -------------------------------------------------------------------------

STEPS = st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(steps=STEPS, clip=st.booleans(), use_fused=st.booleans())
def test_any_sequence_of_subsets_equals_one_optimizer_per_leaf(steps, clip, use_fused):
    STORE.clear()
    leaves = add_params((3,), (), (0,), (2, 2))
    twins = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    theirs = [torch.optim.Adam([twin], lr=0.1, weight_decay=0.01) for twin in twins]
    options = {"lr": 0.1, "weight_decay": 0.01}
    ours = optim.Adam(options, {"clip_norm": 0.7} if clip else None)
    with pytest.MonkeyPatch.context() as patch:
        if not use_fused:
            patch.setattr(fused, "serves", lambda *args: False)
        for number, subset in enumerate(steps):
            for index in subset:
                grad = torch.sin(torch.arange(leaves[index].numel()) * 1.0 + number).double()
                leaves[index].grad = grad.reshape(leaves[index].shape)
                twins[index].grad = leaves[index].grad.clone()
                if clip:
                    torch.nn.utils.clip_grad_norm_(twins[index], 0.7)
                theirs[index].step()
            ours([leaves[index] for index in subset])
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf, twin, rtol=1e-12, atol=1e-13)


def test_a_leaf_without_gradient_keeps_everything():
    first, second = add_params((3,), (2,))
    optimizer = optim.Adam({"lr": 0.1})
    optimizer((first, second))
    before, state = second.detach().clone(), optimizer.get_state()["p1"]
    second.grad = None
    optimizer((first, second))
    assert torch.equal(second, before)
    after = optimizer.get_state()
    assert after["p1"]["state"][0]["step"] == state["state"][0]["step"] == 1
    assert after["p0"]["state"][0]["step"] == 2
    first.grad = None
    optimizer((first, second))  # nothing to do at all
    assert optimizer.get_state()["p0"]["state"][0]["step"] == 2


def test_params_of_others_in_the_buffer_are_not_touched():
    mine, other, last = add_params((3,), (2,), (4,))
    other.grad.fill_(float("nan"))
    STORE.locate(other)[0].bind_grads()
    before = other.detach().clone()
    optimizer = optim.Adam({"lr": 0.1})
    optimizer((mine, last))
    assert torch.equal(other, before)
    assert torch.isfinite(mine).all()
    assert torch.isfinite(last).all()


@pytest.mark.parametrize("use_fused", [True, False])
def test_two_optimizers_share_a_buffer(monkeypatch, use_fused):
    if not use_fused:
        monkeypatch.setattr(fused, "serves", lambda *args: False)
    first, second = add_params((3,), (2,))
    start = values((first, second))
    fast, slow = optim.Adam({"lr": 0.1}), optim.ClippedAdam({"lr": 0.01})
    fast((first,))
    slow((second,))
    # Adam's first step is the learning rate in the direction of the gradient.
    torch.testing.assert_close(start[0] - first, 0.1 * first.grad.sign(), atol=1e-6, rtol=0)
    torch.testing.assert_close(start[1] - second, 0.01 * second.grad.sign(), atol=1e-6, rtol=0)


def test_gaps_stay_zero_where_eps_is_zero():
    leaves = add_params((3,), (300,))
    optimizer = optim.Adam({"lr": 0.1, "eps": 0.0})
    optimizer(leaves)
    assert torch.isfinite(STORE.locate(leaves[0])[0].flat).all()


# --- what follows whom ----------------------------------------------------------------------


def test_moments_follow_when_the_buffer_grows():
    (first,) = add_params((3,))
    optimizer = optim.Adam({"lr": 0.1})
    optimizer((first,))
    before = optimizer.get_state()["p0"]["state"][0]
    (second,) = add_params((1000,))
    optimizer((second,))
    after = optimizer.get_state()["p0"]["state"][0]
    for key in before:
        assert torch.equal(before[key], after[key]), key
    assert before["exp_avg"].abs().min() > 0


def test_a_rebound_leaf_is_taken_back():
    first, second = add_params((3,), (2,))
    optimizer = optim.Adam({"lr": 0.1})
    optimizer((first, second))
    first.data = torch.full((3,), 7.0, dtype=torch.float64)
    optimizer((first, second))
    buffer, segment = STORE.locate(first)
    assert torch.equal(buffer.flat[segment.slice], first)
    torch.testing.assert_close((first - 7.0).abs().max().item(), 0.1, atol=0.02, rtol=0)
    assert optimizer.get_state()["p0"]["state"][0]["step"] == 2


def test_a_leaf_of_another_dtype_starts_afresh():
    (leaf,) = add_params((3,), dtype=torch.float32)
    optimizer = optim.Adam({"lr": 0.1})
    optimizer((leaf,))
    leaf.grad = None
    leaf.data = leaf.data.double()
    leaf.grad = torch.ones(3, dtype=torch.float64)
    with pytest.warns(FastSVIWarning, match=r"p0.*afresh"):
        STORE.sync()
    optimizer((leaf,))
    state = optimizer.get_state()["p0"]["state"][0]
    assert state["step"] == 1
    assert state["exp_avg"].dtype == torch.float64


def test_state_survives_a_scope():
    """Two models that take turns in the store, as PyroModules with local parameters do."""
    optimizer, twin = optim.Adam({"lr": 0.1}), optim.Adam({"lr": 0.1})
    with STORE.scope() as one:
        (mine,) = add_params((3,))
    with STORE.scope() as two:
        (other,) = add_params((2,))
    copied = mine.detach().clone().requires_grad_()
    for _ in range(3):
        with STORE.scope(one):
            optimizer((mine,))
        with STORE.scope(two):
            optimizer((other,))
        copied.grad = mine.grad.clone()
        twin((copied,))
    torch.testing.assert_close(mine.detach(), copied.detach(), rtol=1e-12, atol=1e-12)


def test_a_new_parameter_of_an_old_name_starts_afresh():
    (leaf,) = add_params((3,))
    optimizer = optim.Adam({"lr": 0.1})
    optimizer((leaf,))
    del STORE["p0"]
    (leaf,) = add_params((3,))
    assert STORE.param_name(leaf) == "p0"
    optimizer((leaf,))
    assert optimizer.get_state()["p0"]["state"][0]["step"] == 1


def test_cleared_parameters_are_not_kept():
    optimizer = optim.Adam({"lr": 0.1})
    refs = []
    for _ in range(3):
        STORE.clear()
        (leaf,) = add_params((3,))
        refs.append(weakref.ref(leaf))
        optimizer((leaf,))
        del leaf
        gc.collect()
    assert [ref() is None for ref in refs] == [True, True, False]
    assert len(optimizer.optim_objs) == 1


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_a_dropped_optimizer_is_freed_at_once(name):
    """Its moments may be most of the memory; a reference cycle would keep them for a while."""
    leaves = add_params((3,), (2,))
    optimizer = getattr(optim, name)({"lr": 0.1})
    optimizer(leaves)
    optimizer.optim_objs[leaves[0]].param_groups[0]["lr"] = 0.2
    optimizer(leaves[:1])
    engine = weakref.ref(optimizer._home[leaves[0]])
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert engine() is None
    finally:
        gc.enable()


def test_autograd_knows_that_leaves_changed():
    (leaf,) = add_params((3,))
    STORE.locate(leaf)
    loss = leaf.exp().mul(leaf).sum()  # saves the leaf
    optimizer = optim.Adam({"lr": 0.1})
    optimizer((leaf,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_sparse_gradient_is_refused():
    STORE.setdefault("table", torch.zeros(4, 2))
    leaf = STORE.leaf("table")
    loss = torch.nn.functional.embedding(torch.tensor([1]), leaf, sparse=True).sum()
    loss.backward()
    with pytest.raises(DtypeError, match=r"'table'.*sparse.*SparseAdam"):
        optim.Adam({"lr": 0.1})([leaf])


# --- capture --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [optim.Adam, optim.ClippedAdam], ids=["adam", "clipped"])
def test_a_captured_launch_is_the_eager_step(make):
    options = {"lr": 0.1}
    leaves = add_params((3,), (2, 2), (300,))
    twins = [leaf.detach().clone() for leaf in leaves]
    grads = [leaf.grad.clone() for leaf in leaves]
    optimizer = make(options)
    optimizer(leaves)  # so that the captured launch starts from some state
    (plan,) = optimizer.capture(leaves)
    assert plan.take_gradients()
    plan.launch()
    STORE.locate(leaves[0])[0].touch()
    captured = values(leaves)

    STORE.clear()
    for index, (twin, grad) in enumerate(zip(twins, grads, strict=True)):
        STORE.setdefault(f"p{index}", twin).grad = grad
    again = tuple(STORE.leaf(name) for name in STORE)
    optimizer = make(options)
    optimizer(again)
    optimizer(again)
    for one, other in zip(captured, again, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)


def test_a_launch_is_a_graph_of_tensors():
    leaves = add_params((3,), (2,))
    optimizer = optim.Adam({"lr": 0.1})
    (plan,) = optimizer.capture(leaves)
    buffer = STORE.locate(leaves[0])[0]
    buffer.bind_grads()
    graph = make_fx(lambda: plan.launch())()  # any host synchronisation would raise
    before = values(leaves)
    graph()
    assert all((new != old).all() for new, old in zip(leaves, before, strict=True))
    assert engine_of(optimizer, leaves[0])._steps.max() >= 1


def test_the_update_as_a_pure_function():
    """Two sets of options, and a parameter that is none of this optimizer's."""
    leaves = add_params((3,), (2,), (4,))
    betas = {"p0": (0.9, 0.999), "p2": (0.5, 0.9)}
    optimizer = optim.Adam(lambda name: {"lr": 0.1, "betas": betas[name]})
    mine = (leaves[0], leaves[2])
    optimizer(mine)
    skipped = torch.zeros((), dtype=torch.int64)
    (plan,) = optimizer.capture(mine, skipped)
    update = PureUpdate(plan)
    plan.take_gradients()
    buffer = STORE.locate(leaves[0])[0]
    before = buffer.flat.clone()
    flat, *_, count = update(buffer.flat, buffer.grad, update.moments, skipped)
    assert torch.equal(buffer.flat, before)
    optimizer(mine)
    torch.testing.assert_close(flat, buffer.flat, rtol=1e-13, atol=1e-13)
    assert count == 0


def test_refresh_follows_the_learning_rate():
    leaves = add_params((3,))
    optimizer = optim.Adam({"lr": 0.1})
    (plan,) = optimizer.capture(leaves)
    rate = plan.state[-1]
    optimizer.optim_objs[leaves[0]].param_groups[0]["lr"] = 0.025
    assert plan.is_current()  # rates are data of the plan
    plan.refresh()
    assert rate.tolist() == [0.025]


def test_learning_rates_that_part_within_a_run_need_another_plan():
    leaves = add_params((3,), (2,))
    optimizer = optim.Adam({"lr": 0.1})
    (plan,) = optimizer.capture(leaves)
    groups = [optimizer.optim_objs[leaf].param_groups[0] for leaf in leaves]
    groups[0]["lr"] = 0.025
    assert not plan.is_current()
    (plan,) = optimizer.capture(leaves)
    assert plan.state[-1].tolist() == [0.025, 0.1]
    groups[1]["lr"] = 0.2
    assert plan.is_current()
    plan.refresh()
    torch.testing.assert_close(plan.state[-1], torch.tensor([0.025, 0.2]).to(plan.state[-1]))
    groups[1]["weight_decay"] = 0.5  # an option that is no data
    assert not plan.is_current()


def test_a_step_with_a_nonfinite_gradient_can_be_skipped():
    leaves = add_params((3,), (2,))
    optimizer = optim.Adam({"lr": 0.1})
    skipped = torch.zeros((), dtype=torch.int64)
    (plan,) = optimizer.capture(leaves, skipped=skipped)
    before = values(leaves)
    leaves[0].grad[1] = float("inf")
    plan.take_gradients()
    plan.launch()
    assert all(torch.equal(new, old) for new, old in zip(leaves, before, strict=True))
    assert skipped.item() == 1
    assert any(tensor is skipped for tensor in plan.state)


def test_only_the_flat_kernel_can_be_captured():
    leaves = add_params((3,))
    with pytest.raises(OptionError, match=r"SGD.*\['p0'\].*Adam"):
        optim.SGD({"lr": 0.1}).capture(leaves)


# --- fused and kernel -----------------------------------------------------------------------

RULES = {
    "adam": (optim.Adam, {"lr": 0.1, "weight_decay": 0.1}, {}),
    "adamw": (optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}, {}),
    "clip_value": (optim.Adam, {"lr": 0.1}, {"clip_value": 0.2}),
    "clipped": (optim.ClippedAdam, {"lr": 0.1, "lrd": 0.9, "clip_norm": 0.3, "eps": 1e-2}, {}),
}


@pytest.mark.parametrize(("make", "options", "clips"), RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fused_operator_equals_the_kernel(monkeypatch, make, options, clips, dtype):
    results = []
    for use_fused in (True, False):
        STORE.clear()
        with monkeypatch.context() as patch:
            if not use_fused:
                patch.setattr(fused, "serves", lambda *args: False)
            leaves = add_params((3,), (40,), dtype=dtype)
            optimizer = make(options, clips)
            for step in range(20):
                optimizer(leaves[: 1 + step % 2] if step > 5 else leaves)
            launches = optimizer._teams[0][0].plan(leaves)._launches
            assert all(isinstance(launch, fused.FusedLaunch) == use_fused for launch in launches)
        results.append(values(leaves))
    # 20 steps, each a handful of roundings of the size of the step
    tolerance = 100 * torch.finfo(dtype).eps
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_the_learning_rate_may_be_a_tensor():
    leaves = add_params((3,), (2,))
    start = values(leaves)
    optimizer = optim.Adam({"lr": torch.tensor(0.1)})
    optimizer(leaves)
    for leaf, old in zip(leaves, start, strict=True):
        torch.testing.assert_close(old - leaf, 0.1 * leaf.grad.sign(), atol=1e-6, rtol=0)


def test_complex_parameters_are_left_to_torch():
    STORE.setdefault("z", torch.tensor([1.0 + 2.0j, -1.0j]))
    leaf = STORE.leaf("z")
    leaf.grad = torch.tensor([1.0 - 1.0j, 2.0j])
    twin = leaf.detach().clone().requires_grad_()
    twin.grad = leaf.grad.clone()
    optim.Adam({"lr": 0.1})([leaf])
    torch.optim.Adam([twin], lr=0.1).step()
    torch.testing.assert_close(leaf, twin)


def test_constrained_parameters_move_in_unconstrained_space():
    STORE.setdefault("scale", torch.ones(2, dtype=torch.float64), constraints.positive)
    leaf = STORE.leaf("scale")
    leaf.grad = torch.tensor([1.0, -1.0], dtype=torch.float64)
    optim.Adam({"lr": 0.5})([leaf])
    expected = torch.tensor([-0.5, 0.5], dtype=torch.float64).exp()
    torch.testing.assert_close(STORE["scale"].detach(), expected, rtol=1e-7, atol=0)
