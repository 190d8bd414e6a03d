from __future__ import annotations

import pytest

from bench import gates
from bench.workloads import WORKLOADS, Case, Size

KNOWN = Size({}, {}, elbo=-100.0, tolerance=1.0)
UNKNOWN = Size({}, {}, tolerance=1.0)
BEST = Size({}, {}, elbo=-100.0, tolerance=50.0, gap=0.5)


def of(size, particles=1):
    return Case(WORKLOADS["wide"], size, particles, "wide")


def curve(losses, window=10):
    return {"curve": losses, "window": window, "steps_taken": len(losses) * window}


def test_an_elbo_near_the_expected_one_passes():
    assert gates.final(-100.9, 0.0, of(KNOWN)) is None
    assert gates.final(-99.1, 0.0, of(KNOWN)) is None


@pytest.mark.parametrize("found", [-101.2, -98.8, float("nan"), float("-inf")])
def test_an_elbo_beside_it_does_not(found):
    assert "ELBO" in gates.final(found, 0.01, of(KNOWN))


def test_the_error_of_the_evaluator_is_allowed_for():
    assert gates.final(-101.2, 0.1, of(KNOWN)) is None


def test_without_an_expected_elbo_the_libraries_must_agree():
    assert gates.final(-50.0, 0.0, of(UNKNOWN)) is None
    assert gates.final(-50.0, 0.0, of(UNKNOWN), [-50.5, -49.5]) is None
    assert "by the others" in gates.final(-60.0, 0.0, of(UNKNOWN), [-50.5, -49.5, -50.0])


def test_noise_leaves_a_fit_below_the_best():
    assert gates.final(-100.4, 0.0, of(BEST)) is None
    assert gates.final(-101.4, 0.0, of(BEST)) is None
    assert "1.6 below" in gates.final(-101.6, 0.0, of(BEST))
    # With 16 particles noise is a quarter.
    assert gates.final(-100.3, 0.0, of(BEST, 16)) is None
    assert "0.4 below" in gates.final(-100.4, 0.0, of(BEST, 16))


def test_no_fit_is_better_than_the_best():
    assert gates.final(-100.0 + 1e-5, 0.0, of(BEST)) is None  # the table is rounded
    assert "best there is" in gates.final(-99.9, 0.0, of(BEST))
    assert gates.final(-99.9, 0.1, of(BEST)) is None


def test_guides_may_differ_by_noise():
    apart = {"site": "tau", "bound": 4.0}
    assert gates.posterior(apart | {"errors": 4.9}) is None
    for errors in (5.1, float("nan")):
        assert "NumPyro's at 'tau'" in gates.posterior(apart | {"errors": errors})


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
