"""Seed 001, the tutorial "Modules in Pyro": every cell, under Pyro and with its imports changed.

``programs/001_modules.txt`` holds the cells as they stand in the tutorial, without the assertion of
Pyro's version and the notebook's ``%%time``; the last cell also calls what it defines.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parent / "programs" / "001_modules.txt"
CELLS = PROGRAM.read_text().split("# ---\n")


def as_fastsvi(source):
    source = re.sub(r"^import pyro$", "import fastsvi as pyro", source, flags=re.MULTILINE)
    return re.sub(r"^(import|from) pyro\.", r"\1 fastsvi.", source, flags=re.MULTILINE)


SOURCES = {"pyro": str, "fastsvi": as_fastsvi}


def index_of(marker):
    return next(number for number, cell in enumerate(CELLS) if marker in cell)


FIT = index_of("SVI(model")

pytestmark = pytest.mark.slow  # 1,000 steps of Pyro and fastsvi together


@pytest.fixture(scope="module")
def notebooks():
    """Per library: what each cell printed, and the loss after the fit."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)  # the tutorial shortens its fit in CI
        for library, change in SOURCES.items():
            names, printed = {}, []
            for number, cell in enumerate(CELLS):
                # A seed for each cell, so that one cannot hide another's draws.
                torch.manual_seed(number)
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(change(cell), f"cell {number}", "exec"), names)
                printed.append(out.getvalue())
                if number == FIT:
                    svi, x, y = names["svi"], names["x"], names["y"]
                    loss = sum(svi.evaluate_loss(x, y) for _ in range(50)) / 50 / y.numel()
            found[library] = printed, loss
            names["pyro"].clear_param_store()
    return found


def test_modules_print_the_same(notebooks):
    """All cells up to the fit: types, names, parameters and samples, digit by digit."""
    theirs, ours = ("".join(notebooks[lib][0][:FIT]) for lib in ("pyro", "fastsvi"))
    assert "param bias tensor" in theirs
    # How a tensor was computed is not part of its value.
    assert re.sub(r"grad_fn=<\w+>", "", ours) == re.sub(r"grad_fn=<\w+>", "", theirs)


def test_what_follows_the_fit_prints_the_same(notebooks):
    """The sites of model and guide with their shapes, a draw, and a served model's output."""
    theirs, ours = (notebooks[lib][0][FIT + 1 :] for lib in ("pyro", "fastsvi"))
    assert "param AutoNormal.scales.linear.bias torch.Size([2])" in "".join(theirs)
    assert ours == theirs


def test_the_fit_is_as_good_as_pyros(notebooks):
    printed = notebooks["fastsvi"][0][FIT]
    losses = [float(loss) for loss in re.findall(r"step \d+ loss = (\S+)", printed)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] / 2
    # Averages of 50 draws of an ELBO whose spread is about 1 % of it.
    assert notebooks["fastsvi"][1] == pytest.approx(notebooks["pyro"][1], rel=0.02)


def test_naming_advice():
    """The fragments of the section on name conflicts, as whole programs."""
    import fastsvi as pyro
    from fastsvi.nn import PyroModule

    class Apart(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.y = PyroModule(), PyroModule()

    class Together(PyroModule):
        def __init__(self):
            super().__init__()
            self.x, self.y = PyroModule(), PyroModule()

    class Chained(PyroModule):
        def __init__(self):
            super().__init__()
            self.x = PyroModule()
            self.x.y = PyroModule()

    assert [Apart().x._pyro_name, Apart().y._pyro_name] == ["", ""]  # a conflict
    assert [Together().x._pyro_name, Together().y._pyro_name] == ["x", "y"]
    assert Chained().x.y._pyro_name == "x.y"
    assert not pyro.get_param_store()
