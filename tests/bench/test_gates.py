from __future__ import annotations

import pytest

from bench import gates
from bench.workloads import Size

KNOWN = Size({}, {}, elbo=-100.0, tolerance=1.0)
UNKNOWN = Size({}, {}, tolerance=1.0)


def curve(losses, window=10):
    return {"curve": losses, "window": window, "steps_taken": len(losses) * window}


def test_an_elbo_near_the_expected_one_passes():
    assert gates.final(-100.9, 0.0, KNOWN) is None
    assert gates.final(-99.1, 0.0, KNOWN) is None


@pytest.mark.parametrize("found", [-101.2, -98.8, float("nan"), float("-inf")])
def test_an_elbo_beside_it_does_not(found):
    assert "ELBO" in gates.final(found, 0.01, KNOWN)


def test_the_error_of_the_evaluator_is_allowed_for():
    assert gates.final(-101.2, 0.1, KNOWN) is None


def test_without_an_expected_elbo_the_libraries_must_agree():
    assert gates.final(-50.0, 0.0, UNKNOWN) is None
    assert gates.final(-50.0, 0.0, UNKNOWN, [-50.5, -49.5]) is None
    assert "by the others" in gates.final(-60.0, 0.0, UNKNOWN, [-50.5, -49.5, -50.0])


def test_a_stopped_fit_is_held_against_whole_ones_at_its_steps():
    whole = curve([100.0 - step for step in range(100)], window=1)
    assert gates.partial(curve([100.0 - step for step in range(20)], 1), [whole], UNKNOWN) is None
    # Twice as fast a fall is another program.
    strange = curve([100.0 - 2 * step for step in range(20)], 1)
    assert "whole fits" in gates.partial(strange, [whole], UNKNOWN)


def test_windows_need_not_be_equal():
    whole = curve([100.0 - step for step in range(2, 100, 5)], window=5)
    assert gates.partial(curve([100.0 - step for step in range(40)], 1), [whole], UNKNOWN) is None


def test_a_stopped_fit_alone_must_at_least_descend():
    assert gates.partial(curve([3.0, 2.0, 1.0]), [], UNKNOWN) is None
    assert "fall" in gates.partial(curve([1.0, 2.0, 3.0]), [], UNKNOWN)
    assert "nan" in gates.partial(curve([1.0, 2.0, float("nan")]), [], UNKNOWN)
