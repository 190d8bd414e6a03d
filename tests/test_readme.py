"""What the README shows is true: its Python runs, its outputs are what is printed, its names exist.

A ``python`` block runs after those above it, in one namespace. If a ``text`` block follows at once,
that is what it prints: word for word, and numbers to two per cent, as floats differ by machine.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import warnings
from pathlib import Path

import pytest

from fastsvi.errors import FastSVIWarning
from fastsvi.examples import EXAMPLES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def python_blocks():
    """Pairs of a Python block and the output shown below it, or None."""
    blocks = list(FENCE.finditer(README))
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block[1] != "python":
            continue
        follows = after is not None and after[1] == "text"
        follows = follows and not README[block.end() : after.start()].strip()
        yield block[2], after[2] if follows else None


def check_output(printed: str, shown: str) -> None:
    printed, shown = printed.split(), shown.split()
    assert len(printed) == len(shown), (printed, shown)
    for found, expected in zip(printed, shown, strict=True):
        assert NUMBER.sub("#", found) == NUMBER.sub("#", expected), (printed, shown)
        numbers = [float(n) for n in NUMBER.findall(found)]
        wanted = [float(n) for n in NUMBER.findall(expected)]
        assert numbers == pytest.approx(wanted, rel=0.02, abs=0.02), (printed, shown)


@pytest.mark.slow
def test_python_blocks():
    blocks = list(python_blocks())
    assert len(blocks) >= 4
    assert sum(shown is not None for _, shown in blocks) >= 3
    names: dict = {"__name__": "readme"}
    for source, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, "README.md", "exec"), names)
        if shown is not None:
            check_output(printed.getvalue(), shown)


@pytest.mark.slow
def test_main_job_prints_what_is_shown(capsys, tmp_path):
    """Row by row; the order of neighbours and the time it took may differ on another machine."""
    main = importlib.import_module("fastsvi.examples.breast_cancer").main
    shown = next(block[2] for block in FENCE.finditer(README) if block[1] == "console")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastSVIWarning)  # of k-hat, which the README explains
        main(["--no-figure"])
    rows = {words(line): line for line in capsys.readouterr().out.splitlines()}
    for line in shown.splitlines():
        if line.startswith(("2000 steps", "  ...", "figure")):
            continue
        assert words(line) in rows, line
        # The rows are means of 2,000 draws: 0.1 is four standard errors of the widest one.
        found, wanted = (NUMBER.findall(text) for text in (rows[words(line)], line))
        assert list(map(float, found)) == pytest.approx(list(map(float, wanted)), rel=0.02, abs=0.1)


def words(line: str) -> str:
    """A line without its numbers, and without the star, which a bound near zero decides."""
    return " ".join(NUMBER.sub("#", line).replace("*", "").split())


def test_commands_name_what_exists():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"pip install -e \"\.\[(\w+)\]\"", README):
        assert extra in extras["optional-dependencies"]
    modules = re.findall(r"python -m fastsvi\.examples\.(\w+)", README)
    assert "breast_cancer" in modules
    assert set(modules) <= set(EXAMPLES)
    (test,) = re.findall(r"&& (python -m pytest[^#\n]*)", README)
    assert test.strip() in (ROOT / ".ci" / "run").read_text()


def test_files_it_links_to_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if "://" not in link]
    assert any(link.endswith(".png") for link in local)
    for link in local:
        assert (ROOT / link).exists(), link


def test_check_output_itself():
    check_output("a 1.001\nb", "a 1.0 b")
    with pytest.raises(AssertionError):
        check_output("a 1.5", "a 1.0")
    with pytest.raises(AssertionError):
        check_output("b 1.0", "a 1.0")
    with pytest.raises(AssertionError):
        check_output("a", "a b")
