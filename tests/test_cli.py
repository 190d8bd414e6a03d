"""The ``fastsvi`` command: what it prints, its exit status, and what it leaves alone."""

from __future__ import annotations

import json
import runpy
import sys
import textwrap

import pytest

import fastsvi
from fastsvi import cli
from fastsvi.examples import EXAMPLES
from fastsvi.infer import SVI

PROGRAM = """
    import sys
    import torch
    import fastsvi as pyro
    import fastsvi.distributions as dist
    from fastsvi.infer import SVI, Trace_ELBO
    from fastsvi.infer.autoguide import AutoNormal
    from fastsvi.optim import Adam

    def model(y, scale=1.0):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc, scale).expand(y.shape).to_event(1), obs=y)

    svi = SVI(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
    y = torch.linspace(-1.0, 1.0, 20)
"""


@pytest.fixture
def script(tmp_path):
    """Writes a script of the common beginning and some more lines; returns its path."""

    def write(rest="", begin=PROGRAM):
        path = tmp_path / "train.py"
        path.write_text(textwrap.dedent(begin) + textwrap.dedent(rest))
        return str(path)

    return write


def profile(*arguments):
    return cli.main(["profile", "--seconds", "0.02", *arguments])


@pytest.mark.parametrize(
    ("rest", "advised"),
    [("for _ in range(5): svi.step(y)", True), ("svi.run(5000, y, scale=2.0)", False)],
    ids=["step", "run"],
)
def test_a_script_is_measured_at_its_first_step(script, capsys, rest, advised):
    path = script(f"print('given', sys.argv[1:])\n{rest}\nprint('trained')")
    assert profile(path, "--epochs", "3") == 0
    out = capsys.readouterr().out
    assert "given ['--epochs', '3']" in out
    assert "captured step (svi.run)" in out
    assert ("svi.run(num_steps, ...)" in out) == advised  # a script that runs needs not be told
    assert "trained" not in out


def test_figures_as_json(script, tmp_path, capsys):
    kept = tmp_path / "new" / "profile.json"
    path = script("svi.run(10, batches=[(y,), (y + 1,)])")
    assert profile("--json", str(kept), path) == 0
    found = json.loads(kept.read_text())
    assert found["called"] == "run"
    assert found["batch_us"] > 0
    assert found["eager"]["step_us"] > found["native"]["step_us"] > 0
    assert str(kept) in capsys.readouterr().out


@pytest.mark.parametrize("made", ["svi, (y,), {'scale': 2.0}", "svi, (y,)"])
def test_a_function_that_returns_a_fit(script, capsys, made):
    path = script(f"def make():\n    return {made}\n")
    assert profile(f"{path}:make") == 0
    assert "eager step" in capsys.readouterr().out


def test_a_function_that_fits(script, capsys):
    path = script("def main():\n    svi.run(100, y)\nif __name__ == '__main__':\n    1 / 0\n")
    assert profile(f"{path}:main") == 0
    assert "eager step" in capsys.readouterr().out


def test_nothing_is_left_behind(script, capsys):
    before = SVI.step, SVI.run, list(sys.path), sys.argv
    profile(script("svi.step(y)"))
    assert (SVI.step, SVI.run, sys.path, sys.argv) == before


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("nowhere.py", 2, "no file 'nowhere.py'"),
        ("{path}:nothing", 2, "no function 'nothing'; it has ['model']"),
        ("{path}", 1, "without a call of svi.step or svi.run"),
    ],
)
def test_wrong_calls_say_what_to_do(script, capsys, program, status, said):
    assert profile(program.format(path=script())) == status
    assert said in capsys.readouterr().err


def test_a_function_that_returns_something_else(script, capsys):
    path = script("def make():\n    return y, svi\n")
    assert profile(f"{path}:make") == 2
    assert "found ['Tensor', 'SVI']" in capsys.readouterr().err


def test_an_error_of_fastsvi_in_the_script(script, capsys):
    assert profile(script("svi.step(torch.tensor([float('nan')] * 3))")) == 1
    err = capsys.readouterr().err
    assert "train.py" in err
    assert "failed" in err


def test_other_errors_of_the_script_are_its_own(script):
    with pytest.raises(ZeroDivisionError):
        profile(script("1 / 0"))


@pytest.mark.parametrize("arguments", [[], ["train"], ["profile"], ["profile", "--seconds", "-1"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: fastsvi" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fastsvi {fastsvi.__version__}\n"


def test_examples(capsys):
    assert cli.main(["examples"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(EXAMPLES)
    assert all(name in line for name, line in zip(EXAMPLES, lines, strict=True))


def test_the_cache_is_shown_and_cleared(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTSVI_CACHE", str(folder))
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out == f"{folder}: 0 compiled steps, 0 B\n"
    folder.mkdir()
    for name in ("a.so", "b.so", "notes.txt"):
        (folder / name).write_bytes(bytes(1500))
    assert cli.main(["cache"]) == 0
    assert "2 compiled steps, 3 kB" in capsys.readouterr().out
    assert cli.main(["cache", "--clear"]) == 0
    assert "removed 2" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]  # nothing but our own


def test_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastsvi", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("fastsvi", run_name="__main__")
    assert capsys.readouterr().out == f"fastsvi {fastsvi.__version__}\n"


def test_the_command_is_installed_under_its_name():
    tomllib = pytest.importorskip("tomllib")
    root = cli.Path(__file__).resolve().parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"fastsvi": "fastsvi.cli:main"}
