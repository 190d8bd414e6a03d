from __future__ import annotations

import json

import numpy as np
import pytest

from bench import compare, table
from bench.libraries import LIBRARIES
from bench.workloads import WORKLOADS, case

ONE = case("eight_schools", "tiny", 1)
TINY = "--size tiny --workloads eight_schools --particles 1 --repeats 1".split()  # noqa: SIM905


def row(library="fastsvi", repeats=(), note=None, device="cpu"):
    return {
        "workload": "eight_schools",
        "particles": 1,
        "fits": 1,
        "library": library,
        "device": device,
        "size": "tiny",
        "note": note,
        "repeats": list(repeats),
    }


def repeat(**changes):
    whole = {
        "first_step_s": 1.0,
        "fit_cold_s": 3.0,
        "fit_warm_s": 2.0,
        "steps": 300,
        "steps_taken": 300,
        "extrapolated": False,
        "step_us": [10.0, 12.0],
        "peak_mb": 150.0,
        "import_mb": 100.0,
        "elbo": -33.0,
        "elbo_error": 0.01,
        "window": 100,
        "curve": [50.0, 40.0, 33.0],
    }
    return whole | changes


# ---- whole runs


@pytest.mark.slow
def test_a_tiny_comparison_fills_every_cell(tmp_path, capsys):
    out = tmp_path / "out.json"
    options = [
        "--size",
        "tiny",
        "--workloads",
        "eight_schools",
        "--particles",
        "1",
        "--repeats",
        "1",
        "--json",
    ]
    assert compare.main([*options, str(out), "--libraries", "fastsvi", "torch"]) == 0
    document = json.loads(out.read_text())
    assert document["settings"]["libraries"].keys() == {"fastsvi", "torch"}
    assert {"cpu", "commit", "versions"} <= document["machine"].keys()
    assert [found["library"] for found in document["rows"]] == ["fastsvi", "torch"]
    for found in document["rows"]:
        (figures,) = found["repeats"]
        assert figures["gate"] == "passed"
        assert 0 < figures["import_s"] < figures["first_step_s"] < figures["fit_cold_s"]
        assert figures["peak_mb"] >= figures["import_mb"] > 10
        assert min(figures["step_us"]) > 0
        assert 90 < len(figures["curve"]) <= 100
        assert ("fit_warm_s" in figures) == LIBRARIES[found["library"]].caches
    text = capsys.readouterr().out
    assert " - " not in text


@pytest.mark.slow
def test_what_fails_says_why(monkeypatch, capsys):
    options = "--size tiny --workloads eight_schools --libraries torch --repeats 1 --particles 1"
    monkeypatch.setattr(compare.Comparison, "_job", lambda *args: compare.Job("torch", "no", "", 1))
    assert compare.main(options.split()) == 1
    assert "failed: KeyError: 'no'" in capsys.readouterr().out


def test_time_that_is_spent_is_said_to_be(capsys):
    options = "--quick --size tiny --workloads eight_schools --budget 0.1"
    assert compare.main(options.split()) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "eight_schools" in line]
    assert len(lines) == len(compare.DEFAULT)
    assert all("left out" in line or "not installed" in line for line in lines)


def test_what_is_not_installed_says_so(monkeypatch, capsys):
    monkeypatch.setattr(type(LIBRARIES["pyro"]), "is_installed", lambda self: False)
    assert compare.main(["--workloads", "wide", "--libraries", "pyro", "--particles", "1"]) == 0
    assert "pyro-ppl is not installed" in capsys.readouterr().out


# ---- options


def test_quick_takes_few_cases_and_the_essential_libraries_first():
    settings, path = compare.parse(["--quick"])
    assert path is None
    assert settings.repeats == 1
    assert settings.budget_s == compare.QUICK_BUDGET_S < 600
    rounds = list(settings.rounds())
    names = {(one.name, one.particles) for one, _ in rounds}
    assert {name for name, _ in names} == set(WORKLOADS)
    assert ("eight_schools", 1024) not in names
    assert rounds[0][1] == ["fastsvi", "numpyro"]
    assert set(rounds[-1][1]) == set(compare.DEFAULT) - {"fastsvi", "numpyro"}


def test_full_takes_all_in_turn():
    settings, _ = compare.parse([])
    assert settings.repeats == 3
    assert all(libraries == list(compare.DEFAULT) for _, libraries in settings.rounds())
    assert len(list(settings.cases())) == sum(
        len(workload.sizes["cpu"].steps) for workload in WORKLOADS.values()
    )


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        compare.parse(["--workloads", "eight_school"])
    assert "eight_school" in capsys.readouterr().err


# ---- judging


def test_a_fit_that_missed_shows_no_time():
    good, bad = row("fastsvi", [repeat()]), row("torch", [repeat(elbo=-50.0)])
    third = row("pyro", [repeat(elbo=-33.1)])
    compare.judge(ONE, [good, bad, third])
    assert good["repeats"][0]["gate"] == "passed"
    assert "does not count: final ELBO -50" in bad["note"]
    assert "12" not in table.line(bad, good).split("does not count")[0]


def test_a_stopped_fit_is_marked():
    whole = row("fastsvi", [repeat()])
    short = {"extrapolated": True, "steps_taken": 100, "curve": [50.0], "window": 100}
    stopped = row("pyro", [{k: v for k, v in repeat(**short).items() if "elbo" not in k}])
    compare.judge(ONE, [whole, stopped])
    assert stopped["note"] == "stopped after 100 of 300 steps"
    assert "~3.0" in table.line(stopped, whole)


def test_a_failed_warm_fit_is_explained():
    found = row("numpyro", [repeat(warm_error="no space left")])
    compare.judge(ONE, [found])
    assert found["note"] == "no warm fit: no space left"


def test_a_guide_that_is_not_numpyros_does_not_count(tmp_path):
    """Its ELBO may be as good: here that of two guides, one with a loc moved by half a scale."""
    guide = {}
    for site, latent in ONE.latents().items():
        guide[f"loc.{site}"] = np.full(latent.shape, 0.5)
        guide[f"scale.{site}"] = np.full(latent.shape, 0.8)
    moved = guide | {"loc.tau": guide["loc.tau"] + 0.8}
    posteriors, rows = compare.Posteriors(), []
    for library, found in (("numpyro", guide), ("fastsvi", guide), ("torch", moved)):
        np.savez(tmp_path / f"{library}.npz", **found)
        elbo, error = posteriors.take(ONE, library, tmp_path / f"{library}.npz")
        rows.append(row(library, [repeat(elbo=elbo, elbo_error=error)]))
    posteriors.compare(ONE, rows)
    compare.judge(ONE, rows)
    numpyro, fastsvi, torch = (found["repeats"][0] for found in rows)
    assert "apart" not in numpyro
    assert fastsvi["apart"]["errors"] == 0
    assert fastsvi["gate"] == "passed"
    assert torch["apart"]["site"] == "tau"
    assert "from NumPyro's at 'tau'" in torch["gate"]
    cells = [table.line(found).split("  does not")[0].split()[-1] for found in rows]
    assert cells == ["=", "0.0", f"{torch['apart']['errors']:.1f}"]


def test_without_numpyro_there_is_nothing_to_compare_with(tmp_path):
    rows = [row("fastsvi", [repeat()])]
    compare.Posteriors().compare(ONE, rows)
    assert "apart" not in rows[0]["repeats"][0]
    assert table.line(rows[0]).endswith("?")


# ---- the table


def test_a_line_shows_medians_with_the_range():
    own = row("fastsvi", [repeat(gate="passed"), repeat(gate="passed", step_us=[14.0])])
    other = row("torch", [repeat(gate="passed", step_us=[24.0])])
    text = table.line(own, own)
    assert "12.0 (10.0-14.0)" in text
    assert "3.0 (3.0-3.0)" in text
    assert "-33.00" in text
    words = table.line(other, own).split()
    assert words[words.index("24.0") + 1] == "0.500"
    assert "=" in words  # torch keeps no cache


def test_without_own_times_the_ratio_is_unknown():
    other = row("torch", [repeat(gate="passed")])
    assert " ? " in table.line(other, row("fastsvi", note="not built yet"))


def test_memory_is_beyond_the_imports_on_a_cpu_only():
    one = [repeat(gate="passed")]
    assert table.memory(row(repeats=one), one) == [50.0]
    assert table.memory(row(repeats=one, device="cuda"), one) == [150.0]
