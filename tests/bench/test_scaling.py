from __future__ import annotations

import json

import numpy as np
import pytest

from bench import scaling


def test_the_exponent_is_that_of_the_upper_half():
    sizes = 10.0 ** np.arange(6)
    assert scaling.exponent(sizes, 3 * sizes**1.5) == pytest.approx(1.5)
    flat_then_linear = np.maximum(sizes, 100.0)
    assert scaling.exponent(sizes, flat_then_linear) == pytest.approx(1.0)
    assert scaling.exponent([1.0], [2.0]) is None
    assert scaling.exponent([], []) is None
    assert scaling.exponent([1.0, 4.0], [1.0, 2.0]) == pytest.approx(0.5)


def test_bytes_count_state_and_data_once():
    one = scaling.CURVES["elements"].case(1000, "cpu")
    assert scaling.step_bytes(one) == 48 * 1000 + 4 * 1000
    assert scaling.CURVES["particles"].case(64, "cpu").particles == 64
    many = scaling.CURVES["fits"].case(10, "cpu")
    assert many.fits == 10
    assert scaling.step_bytes(many) == 48 * 70 + 4 * 10 * 50 * 6


def test_what_does_not_fit_the_memory_is_named(monkeypatch):
    monkeypatch.setattr(scaling, "free_bytes", lambda device: 1e5)
    points, note = scaling.measure(scaling.CURVES["elements"], "fastsvi", "cpu", 1e10, float("inf"))
    assert points == []
    assert "from 1000 on left out: some 0 GB needed" in note


@pytest.mark.slow
def test_a_short_curve(tmp_path, capsys):
    out = tmp_path / "scaling.json"
    options = ["--curves", "elements", "fits", "--largest", "1000", "--budget", "30", "--json"]
    assert scaling.main([*options, str(out)]) == 0
    elements, fits = json.loads(out.read_text())["curves"]
    (point,) = elements["points"]
    assert point["size"] == 1000
    assert point["lowest_us"] <= point["step_us"] <= point["highest_us"]
    assert point["floor_us"] > 0
    assert fits["points"] or fits["note"]
    assert "floor" in capsys.readouterr().out
