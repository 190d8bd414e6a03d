"""The table and the pictures: every row is there, losses too, and blanks have their reasons."""

from __future__ import annotations

import copy
import json

import pytest

from bench import pictures, report

MACHINE = {
    "cpu": "Some CPU", "cores": 2, "load": 0.5, "python": "3.11.7", "commit": "abc1234",
    "versions": {"torch": "2.13.0", "numpyro": "0.22.0"},
}  # fmt: skip


def row(workload, particles, library, step, *, fits=1, note=None, gate="passed", warm=True):
    repeat = {
        "first_step_s": 2.0, "fit_cold_s": 4.0 + step / 100, "import_s": 1.0, "steps": 100,
        "steps_taken": 100, "extrapolated": False, "step_us": [0.9 * step, step, 1.2 * step],
        "peak_mb": 250.0, "import_mb": 200.0, "elbo": -31.6, "elbo_error": 0.1, "gate": gate,
    }  # fmt: skip
    if warm:
        repeat["fit_warm_s"] = 2.0
    return {
        "workload": workload, "particles": particles, "fits": fits, "library": library,
        "device": "cpu", "size": "cpu", "note": note, "repeats": [repeat] if step else [],
    }  # fmt: skip


COMPARE = {
    "machine": MACHINE,
    "settings": {"threads": 1, "repeats": 3, "quick": False, "started": "2026-11-21T06:31:35Z"},
    "rows": [
        row("eight_schools", 1, "fastsvi", 3.0),
        row("eight_schools", 1, "numpyro", 12.0),
        row("eight_schools", 1, "pyro", 3000.0, warm=False),
        row("logistic", 16, "fastsvi", 500.0),
        row("logistic", 16, "numpyro", 200.0),
        row("logistic", 16, "pyro", 0.0, note="left out: no | time"),
        row("regressions", 1, "fastsvi", 900.0, fits=1000),
        row("regressions", 1, "numpyro", 800.0, fits=1000, gate="ELBO -9, not -5", note="too low"),
    ],
}


def point(size, step):
    return {
        "size": size, "step_us": step, "lowest_us": 0.9 * step, "highest_us": 1.3 * step,
        "bytes": 48 * size, "floor_us": step / 4, "loss": 1.0,
    }  # fmt: skip


def curve(name, sizes, exponent=1.0):
    return {
        "curve": name, "workload": "wide", "library": "fastsvi", "device": "cpu", "threads": 1,
        "exponent": exponent, "note": None, "points": [point(n, 0.01 * n) for n in sizes],
    }  # fmt: skip


SCALING = {
    "machine": MACHINE,
    "settings": {"device": "cpu", "budget_s": 20.0},
    "copy_gb_per_s": 20.0,
    "curves": [
        curve("elements", [10**3, 10**4, 10**5]),
        curve("particles", [1, 4, 16]),
        curve("threads", [1, 2], None),
        curve("fits", []) | {"note": "not built yet", "points": [{"size": 1, "note": "failed"}]},
    ],
}


def kernel(name, elements, share):
    return {
        "name": name, "elements": elements, "particles": 1, "time_us": 12.0,
        "bytes": 8 * elements, "share_of_copy": share, "share_of_philox": None,
        "eager_ratio": 3.25, "compiled_ratio": None, "error": 1e-8, "ok": True,
    }  # fmt: skip


KERNELS = {
    "device": "NVIDIA H200", "driver": "570.1", "threads": 1, "versions": {"torch": "2.11.0"},
    "commit": "abc1234", "copy_gb_per_s": 4000.0,
    "rows": [kernel("adam.adam_", 10**3, 0.01), kernel("adam.adam_", 10**7, 0.87)],
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """A folder of results, and a README with markers beside it."""
    folder = tmp_path / "results"
    folder.mkdir()
    documents = {"cpu-compare": COMPARE, "cpu-scaling": SCALING, "nvidia-h200-kernels": KERNELS}
    paths = []
    for name, document in documents.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(document))
    (folder / "regression.json").write_text(json.dumps({"ratios": {}}))
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{report.BEGIN}\nstale\n{report.END}\nbelow\n")
    return [*paths, folder / "regression.json"], readme, tmp_path / "pictures"


def lines_of(document):
    results = report.Results(compare=[("cpu.json", document)])
    return [line for line in report.table(results).splitlines() if line.startswith("|")]


def test_every_case_has_a_line_and_losses_stand_out():
    _, _, schools, logistic, regressions = lines_of(COMPARE)
    assert "| eight schools, P = 1 | 3.00 | 12.0 | 3000 | 0.25 |" in schools
    assert "| logistic regression, P = 16 | 500.0 | 200.0 | - <sup>1</sup> | **2.50** |" in logistic
    assert (
        "| 1,000 regressions, P = 1 | 900.0 | - <sup>2</sup> | - <sup>3</sup> | - |" in regressions
    )
    assert "4.0, 4.1 | 2.0, 2.0 | 50, 50" in schools


def test_every_blank_has_its_reason():
    text = report.table(report.Results(compare=[("cpu.json", COMPARE)]))
    assert "<sup>1</sup> left out: no / time<br>" in text  # a bar would end the cell
    assert "<sup>2</sup> too low" in text
    assert "<sup>3</sup> not measured" in text


def test_times_that_do_not_count_are_nowhere():
    document = copy.deepcopy(COMPARE)
    for one in document["rows"]:
        for repeat in one["repeats"]:
            repeat["gate"] = "wrong"
    assert not any("3.00" in line or "12.0" in line for line in lines_of(document))
    assert report.step_us(document["rows"][0]) is None
    assert report.step_us(None) is None


def test_fits_that_were_stopped_say_so():
    document = copy.deepcopy(COMPARE)
    document["rows"][1]["repeats"][0]["extrapolated"] = True
    assert "| 4.0, ~4.1 | 2.0, ~2.0 | 50, 50 |" in lines_of(document)[2]


def test_machine_versions_threads_and_commit_are_told():
    text = report.table(report.Results(compare=[("cpu.json", COMPARE)]))
    for word in ("2 cores of Some CPU", "1 thread,", "3 repeats", "torch 2.13.0", "commit abc1234",
                 "2026-11-21", "python 3.11.7"):  # fmt: skip
        assert word in text


def test_rows_of_steps_alone():
    """As ``bench.step`` writes them: no fits, no memory."""
    document = copy.deepcopy(COMPARE)
    document["settings"] = {"threads": 1, "device": "cuda", "size": "cuda"}
    document["machine"] |= {"gpu": "NVIDIA H200", "driver": "570.1"}
    for one in document["rows"]:
        one["repeats"] = [{"step_us": r["step_us"], "gate": r["gate"]} for r in one["repeats"]]
    assert "cold fit" not in lines_of(document)[0]
    results = report.Results(compare=[("nvidia-h200-steps.json", document)])
    assert pictures.names(results) == ["nvidia-h200-steps.png"]
    assert "NVIDIA H200, driver 570.1" in report.table(results)


def test_kernels_at_their_largest_size():
    text = report.table(report.Results(kernels=[("k.json", KERNELS)]))
    assert "| `adam.adam_` | 10,000,000 | 1 | 12.0 | 87% | no noise | 3.2x | not timed |" in text
    assert "4,000 GB/s" in text
    assert "NVIDIA H200, driver 570.1" in text


def test_all_of_it_is_written_and_then_up_to_date(files, capsys):
    paths, readme, out = files
    arguments = [*map(str, paths), "--readme", str(readme), "--out", str(out)]
    assert report.main([*arguments, "--check"]) == 1
    assert "python -m bench.report" in capsys.readouterr().err
    assert not out.exists()  # a check writes nothing
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith(f"above\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nbelow\n")
    assert "stale" not in text
    names = ["cpu-steps.png", "cpu-fits.png", "cpu-scaling.png", "nvidia-h200-kernels.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in names:
        picture = (out / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000  # something is drawn
        assert f"](bench/results/{name})" in text
    assert report.main([*arguments, "--check"]) == 0
    readme.write_text(text.replace("0.25", "0.24"))
    assert report.main([*arguments, "--check"]) == 1


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_some_results_are_missing(files, kept):
    paths, readme, out = files
    assert report.main([str(paths[kept]), "--readme", str(readme), "--out", str(out)]) == 0
    assert len(list(out.iterdir())) == (2, 1, 1)[kept]


def test_same_results_same_bytes(tmp_path):
    results = report.Results(scaling=[("cpu-scaling.json", SCALING)])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        list(pictures.paint(results, tmp_path / name))
    one, other = (next((tmp_path / name).iterdir()).read_bytes() for name in ("a", "b"))
    assert one == other


def test_bad_files_are_named(files, capsys):
    paths, readme, out = files
    paths[0].write_text("{")
    assert report.main([str(paths[0]), "--readme", str(readme), "--out", str(out)]) == 1
    assert "cpu-compare.json" in capsys.readouterr().err
    assert readme.read_text().startswith("above")


@pytest.mark.parametrize("text", ["nothing", f"{report.END}\n{report.BEGIN}", report.BEGIN * 2])
def test_a_readme_without_markers(files, capsys, text):
    paths, readme, out = files
    readme.write_text(text)
    assert report.main([str(paths[0]), "--readme", str(readme), "--out", str(out)]) == 1
    assert report.BEGIN in capsys.readouterr().err
    assert readme.read_text() == text


def test_the_readme_says_what_the_committed_results_say():
    if report.BEGIN not in report.README.read_text():
        pytest.skip("the README has no generated table yet")
    assert report.main(["--check"]) == 0
