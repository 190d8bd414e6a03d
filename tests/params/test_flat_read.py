"""Reading a whole buffer equals reading its parameters one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributions import constraints as c

from fastsvi.kernels import transforms as kernels


def tolerances(value):
    # The table computes shift + scale * f(x) fused, torch in two roundings: a few ulp apart.
    eps = torch.finfo(value.dtype).eps
    return {"rtol": 4 * eps, "atol": 4 * eps}


def test_all_values_are_those_read_one_by_one(mixed):
    together = mixed.constrain_all()
    assert list(together) == list(mixed)
    for name, value in mixed.items():
        assert together[name].shape == value.shape
        assert together[name].dtype == value.dtype
        torch.testing.assert_close(together[name], value, **tolerances(value))
        assert together[name].unconstrained() is mixed.leaf(name)


def test_all_gradients_are_those_of_reading_one_by_one(mixed):
    torch.manual_seed(1)
    weights = {name: torch.randn_like(value) for name, value in mixed.items()}

    def gradients(values):
        loss = sum((value * weights[name]).abs().double().sum() for name, value in values.items())
        leaves = [mixed.leaf(name) for name in mixed]
        return torch.autograd.grad(loss, leaves)

    # The graph of the first must not mind that the second has been built and run.
    for name, a, b in zip(
        mixed, gradients(mixed.constrain_all()), gradients(dict(mixed.items())), strict=True
    ):
        assert a.shape == b.shape, name
        torch.testing.assert_close(a, b, rtol=32 * torch.finfo(a.dtype).eps, atol=1e-6)


def test_gradients_reach_the_flat_gradient(mixed):
    for buffer in mixed.buffers.values():
        buffer.bind_grads()
    sum(value.abs().double().sum() for value in mixed.constrain_all().values()).backward()
    for buffer in mixed.buffers.values():
        for name, segment in buffer.layout.items():
            leaf = mixed.leaf(name)
            assert torch.equal(buffer.grad[segment.slice].view(segment.shape), leaf.grad)
        assert bool(buffer.grad.abs().sum() > 0)


def test_a_later_write_does_not_change_the_gradient(store):
    """The values are a snapshot: what was computed from them stays true, and nothing raises."""
    leaf = store.setdefault("x", torch.tensor([0.3, 0.4]), c.unit_interval).unconstrained()
    value = store.constrain_all()["x"]
    expected = torch.autograd.grad(store["x"].sum(), leaf)[0]
    with torch.no_grad():
        leaf.fill_(5.0)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), leaf)[0], expected)


def test_real_values_are_copies(store):
    store["x"] = torch.zeros(2)
    store.constrain_all()["x"].detach().fill_(1.0)
    assert store["x"].tolist() == [0.0, 0.0]


def test_values_are_a_snapshot_under_no_grad_too(store):
    store["x"] = torch.zeros(2)
    with torch.no_grad():
        values = store.constrain_all()
        store["x"].fill_(1.0)
    assert values["x"].tolist() == [0.0, 0.0]


def test_under_no_grad_there_is_no_graph(mixed):
    with torch.no_grad():
        assert not any(value.requires_grad for value in mixed.constrain_all().values())


def test_double_backward(store):
    store.setdefault("x", torch.tensor([0.5, 2.0]), c.positive)
    leaf = store.leaf("x")
    (first,) = torch.autograd.grad(store.constrain_all()["x"].sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    torch.testing.assert_close(second, torch.tensor([0.5, 2.0]))


def test_aliases_and_frozen_params(store):
    shared = torch.tensor([1.0, 2.0])
    store["a"] = shared
    store["b"] = shared
    store.setdefault("frozen", torch.ones(2), c.positive).unconstrained().requires_grad_(False)
    values = store.constrain_all()
    assert list(values) == ["a", "b", "frozen"]
    assert torch.equal(values["a"], values["b"])
    (values["a"] + values["b"] * 2 + values["frozen"]).sum().backward()
    assert shared.grad.tolist() == [3.0, 3.0]
    assert store.leaf("frozen").grad is None


def test_empty_store(store):
    assert store.constrain_all() == {}
    assert store.buffers == {}
    store["x"] = torch.empty(0, 2)
    assert store.constrain_all()["x"].shape == (0, 2)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_pure_function_of_other_contents(mixed, lead):
    buffer = mixed.buffers[torch.device("cpu"), torch.float32]
    torch.manual_seed(2)
    flat = torch.randn(*lead, buffer.layout.size)
    values = mixed.constrain_flat(buffer, flat)
    assert set(values) == set(buffer.layout)
    for at in itertools.product(*map(range, lead)):
        with buffer.write() as own:
            own.copy_(flat[at])
        for name, value in values.items():
            expected = mixed[name].detach()
            assert value.shape == lead + expected.shape
            torch.testing.assert_close(value[at], expected, rtol=1e-5, atol=1e-5)


def test_pure_function_is_differentiable_in_the_flat_tensor(mixed):
    buffer = mixed.buffers[torch.device("cpu"), torch.float32]
    flat = buffer.flat.clone().requires_grad_()
    sum(value.sum() for value in mixed.constrain_flat(buffer, flat).values()).backward()
    sum(mixed[name].sum() for name in buffer.layout).backward()
    for name, segment in buffer.layout.items():
        expected = mixed.leaf(name).grad
        actual = flat.grad[segment.slice].view(segment.shape)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_reading_inside_vmap(store):
    store.setdefault("x", torch.ones(2), c.positive)
    values = torch.func.vmap(lambda a: store.constrain_all()["x"] * a)(torch.arange(3.0))
    values.sum().backward()
    assert store.leaf("x").grad.tolist() == [3.0, 3.0]


def test_pure_function_under_vmap_and_make_fx(mixed):
    from torch.fx.experimental.proxy_tensor import make_fx

    buffer = mixed.buffers[torch.device("cpu"), torch.float32]
    flat = torch.randn(2, buffer.layout.size)

    def read(flat):
        return mixed.constrain_flat(buffer, flat)

    batched, traced = torch.func.vmap(read)(flat), make_fx(read)(flat)(flat)
    for name, value in read(flat).items():
        torch.testing.assert_close(batched[name], value)
        torch.testing.assert_close(traced[name], value)


def test_the_table_has_a_row_for_every_row_of_the_layout(mixed):
    buffer = mixed.buffers[torch.device("cpu"), torch.float32]
    table, layout = mixed.table(buffer), buffer.layout
    assert mixed.table(buffer) is table
    assert len(table) == layout.num_rows
    assert table.offsets.tolist() == list(layout.boundaries)
    named = {segment.row: name for name, segment in layout.items()}
    assert None in [named.get(row) for row in range(layout.num_rows)]  # a gap before "wide"
    kinds = {name: int(table.kinds[row]) for row, name in named.items()}
    assert kinds["scale"] == kinds["event"] == kinds["below"] == kernels.EXP
    assert kinds["p"] == kinds["between"] == kernels.SIGMOID
    for name in ("loc", "simplex", "factor", "corr", "bounds", "wide", "empty"):
        assert kinds[name] == kernels.IDENTITY
    for row in set(range(layout.num_rows)) - set(named):
        assert int(table.kinds[row]) == kernels.IDENTITY
    below = layout["below"].row
    assert (float(table.shift[below]), float(table.scale[below])) == (1.0, -1.0)


def test_the_table_is_made_anew_when_the_layout_changes(store):
    store.setdefault("x", torch.ones(2), c.positive)
    (buffer,) = store.buffers.values()
    before = store.table(buffer)
    store["y"] = torch.zeros(1)
    assert len(store.table(buffer)) == len(before) + 1
    store._constraints["y"] = c.unit_interval
    assert int(store.table(buffer).kinds[1]) == kernels.SIGMOID
    assert store.constrain_all()["y"].item() == 0.5


def test_log_det_of_the_table_is_that_of_the_transforms(mixed):
    """Gaps and structured params add nothing."""
    buffer = mixed.buffers[torch.device("cpu"), torch.float32]
    _, log_det = kernels.constrain_with_log_det(buffer.flat, mixed.table(buffer))
    for name in ("scale", "p", "between", "below"):
        segment = buffer.layout[name]
        leaf = mixed.leaf(name).detach()
        transform = torch.distributions.biject_to(segment.constraint)
        expected = transform.log_abs_det_jacobian(leaf, transform(leaf)).sum()
        torch.testing.assert_close(log_det[segment.row], expected, rtol=1e-5, atol=1e-5)
    named = [
        s.row for n, s in buffer.layout.items() if n in ("scale", "p", "between", "below", "event")
    ]
    rest = [row for row in range(buffer.layout.num_rows) if row not in named]
    assert log_det[rest].count_nonzero() == 0
