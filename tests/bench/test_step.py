from __future__ import annotations

import json

import pytest

from bench import step
from bench.workloads import case


@pytest.mark.slow
def test_a_short_run_in_one_process(tmp_path, capsys):
    out = tmp_path / "steps.json"
    options = ["--size", "tiny", "--workloads", "eight_schools", "--rounds", "2", "--libraries"]
    assert step.main([*options, "fastsvi", "fastsvi-eager", "torch", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {(row["library"], row["particles"]) for row in rows} == {
        (library, particles)
        for library in ("fastsvi", "fastsvi-eager", "torch")
        for particles in (1, 4)
    }
    assert all(row["repeats"][0]["gate"] == "passed" for row in rows)
    assert "fastsvi-eager" in capsys.readouterr().out


def test_the_two_forms_of_fastsvi_do_not_share_a_turn():
    groups = list(step._groups(["fastsvi", "torch", "fastsvi-eager"]))
    assert groups == [["fastsvi", "torch"], ["fastsvi-eager"]]
    assert list(step._groups(["pyro", "fastsvi-eager"])) == [["pyro", "fastsvi-eager"]]


def test_losses_must_agree_step_for_step():
    def row(curve):
        repeat = {"curve": curve, "window": 1, "steps_taken": len(curve), "step_us": [1.0]}
        return {"note": None, "repeats": [repeat]}

    right = [100.0 - i for i in range(90)]
    rows = [row(right), row(right[:30]), row([2 * loss for loss in right[:30]])]
    step.judge(case("eight_schools", "tiny", 1), rows)
    gates = [found["repeats"][0]["gate"] for found in rows]
    assert gates[:2] == ["passed", "passed"]
    assert "does not count" in rows[2]["note"]


def test_a_library_that_fails_keeps_its_row(monkeypatch):
    def fails(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(step, "Turn", fails)
    (row,) = step.measure(case("wide", "tiny", 1), ["torch"], "cpu")
    assert row["note"] == "failed: RuntimeError: out of luck"
    assert "out of luck" in step.line(row, None)
