"""The flat store beside a dict with a tensor for each parameter."""

from __future__ import annotations

import pytest
import torch

from bench.plain_store import OPERATIONS, SIZE, STORES

MANY = 100_000


@pytest.fixture(scope="module", params=[10, 1000, MANY])
def count(request):
    return request.param


@pytest.fixture(scope="module", params=STORES)
def operations(request, count, tmp_path_factory):
    made = STORES[request.param](count, tmp_path_factory.mktemp("store") / "file")
    made["save"]()  # so that there is something to load
    yield made
    STORES["flat"](1, tmp_path_factory.mktemp("store") / "file")  # leaves the default store small


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(benchmark, operations, operation, count):
    operations["fill_grad"]()
    before = operations["lookup"]().clone()
    assert before.shape == (SIZE,)
    # Adam makes its moments at the first update, which is not timed.
    operations["update" if operation == "update" else "lookup"]()
    if count == MANY:
        found = benchmark.pedantic(operations[operation], rounds=2)
    else:
        found = benchmark(operations[operation])
    after = operations["lookup"]()
    assert torch.equal(after, before) == (operation != "update")
    if operation == "constrain_all":
        assert len(found) == count
        assert torch.equal(found[f"parameter.{count - 1}"], after)
