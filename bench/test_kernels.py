"""Operations of ``fastsvi.kernels``, forward and backward: ``python -m pytest bench``."""

from __future__ import annotations

import pytest

from bench import kernels

CASES = [
    (name, passes)
    for name, make in kernels.OPERATIONS.items()
    for passes in ("", ".backward")
    if not passes or make(30, 1, "cpu").bytes_backward is not None
]


@pytest.mark.parametrize("particles", [1, 8])
@pytest.mark.parametrize(("name", "passes"), CASES)
def test_operation(benchmark, name, passes, particles):
    if particles > 1 and name in kernels.WITHOUT_PARTICLES:
        pytest.skip("the cost of this operation does not depend on particles")
    operation = kernels.OPERATIONS[name](100_000, particles, "cpu")
    assert kernels.error(operation, passes) < kernels.MAX_ERROR
    benchmark.extra_info["bytes"] = operation.bytes_backward if passes else operation.bytes
    benchmark(kernels.prepare(operation.ours, operation.inputs, passes))
