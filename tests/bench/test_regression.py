"""The check that no change makes fastsvi slower: its arithmetic, and what it must notice."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from bench import regression

EAGER = "eager eight schools / Pyro"
COMPILED = "compiled eight schools / torch"
NOTHING = regression.Block(lambda: None)


def commit(tmp_path, monkeypatch, ratios):
    file = tmp_path / "regression.json"
    rows = {name: {"ratio": ratio} for name, ratio in ratios.items()}
    file.write_text(json.dumps({"ratios": rows}))
    monkeypatch.setattr(regression, "COMMITTED", file)


# ---- arithmetic


def test_the_ratio_is_of_lower_quartiles():
    ours = [1.0, 1.0, 1.0, 50.0, 70.0]
    found = regression.summarise(ours, ours, [2.0, 2.0, 90.0, 2.0, 60.0])
    assert found.ratio == pytest.approx(0.5)
    assert found.noise == 0.0


def test_a_machine_that_slows_down_slows_both():
    slow = np.array([1.0, 3.0, 2.0, 10.0, 1.0] * 8)
    found = regression.summarise(0.3 * slow, 0.3 * slow, slow)
    assert found.ratio == pytest.approx(0.3)
    assert found.error < 1e-6


def test_interruptions_of_half_of_the_blocks_do_not_count():
    generator = np.random.default_rng(0)
    busy = np.where(generator.random((3, 40)) < 0.5, 5.0, 1.0)
    found = regression.summarise(busy[0], busy[1], 2 * busy[2])
    assert found.ratio == pytest.approx(0.5)


def test_noise_widens_the_limit():
    assert regression.limit(2.0, 0.0, 0.25) == pytest.approx(2.5)
    assert regression.limit(2.0, 0.1, 0.25) == pytest.approx(2.5 * math.exp(0.3))


def test_the_error_is_no_less_than_what_a_a_shows():
    found = regression.summarise(np.full(40, 1.1), np.ones(40), np.ones(40))
    assert found.noise == found.error == pytest.approx(np.log(1.1))


def test_the_error_is_that_of_the_rounds_where_a_a_agrees_by_luck():
    reference = np.exp(np.random.default_rng(0).normal(0, 0.5, 40))
    found = regression.summarise(np.ones(40), np.ones(40), reference)
    assert found.noise == 0.0
    # A quartile of n normal values has a standard error of 1.36 / sqrt(n).
    assert found.error == pytest.approx(0.5 * 1.36 / 40**0.5, rel=0.5)


def test_committed_measures_are_those_that_are_made():
    kept = json.loads(regression.COMMITTED.read_text())["ratios"]
    assert kept.keys() == {one.name for one in regression.MEASURES}
    assert all(row["ratio"] > 0 for row in kept.values())


# ---- what it must notice


def run(tmp_path, name, slow="none"):
    kept = tmp_path / "kept.json"
    options = ["--only", name, "--rounds", "12", "--slow", slow, "--json", str(kept)]
    code = regression.main(options)
    return code, json.loads(kept.read_text())["measures"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "slow"), [(EAGER, "sleep"), (COMPILED, "sync")])
def test_a_careless_change_fails(tmp_path, monkeypatch, capsys, name, slow):
    one = next(one for one in regression.MEASURES if one.name == name)
    commit(tmp_path, monkeypatch, {name: regression.measure(one.prepare(), 12).ratio})
    code, rows = run(tmp_path, name, slow)
    assert code == 1
    assert "SLOWER" in capsys.readouterr().out
    assert rows[name]["ratio"] > rows[name]["limit"] > rows[name]["committed"]


@pytest.mark.slow
def test_the_same_code_passes(tmp_path, monkeypatch):
    name = "store: constrain"
    (one,) = (one for one in regression.MEASURES if name in one.name)
    commit(tmp_path, monkeypatch, {one.name: regression.measure(one.prepare(), 40).ratio})
    code, rows = run(tmp_path, name)
    assert code == 0
    assert rows[one.name]["passed"]


def test_a_wrong_result_fails_however_fast(tmp_path, monkeypatch, capsys):
    quick = regression.Measure("quick", lambda: (NOTHING, NOTHING, lambda: False))
    monkeypatch.setattr(regression, "MEASURES", (quick,))
    commit(tmp_path, monkeypatch, {"quick": 1e9})
    code, _ = run(tmp_path, "quick")
    assert code == 1
    assert "WRONG RESULT" in capsys.readouterr().out


def test_what_seems_slower_is_measured_again(tmp_path, monkeypatch):
    found = [regression.Found(2.0, 0.0, 0.0), regression.Found(1.0, 0.0, 0.0)]
    asked = []
    monkeypatch.setattr(
        regression,
        "measure",
        lambda prepared, rounds: asked.append(rounds) or found[len(asked) - 1],
    )
    one = regression.Measure("one", lambda: (NOTHING, NOTHING, lambda: True))
    rows = regression.run([one], {"one": 1.0}, 5)
    assert asked == [5, 10]
    assert rows["one"]["passed"]


def test_without_committed_ratios_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(regression, "COMMITTED", tmp_path / "none.json")
    assert regression.main([]) == 1
    assert "--update" in capsys.readouterr().out
