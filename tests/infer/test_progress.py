"""The losses of a run as they come in, and the bar that shows them."""

from __future__ import annotations

import io
import math
from contextlib import redirect_stderr

import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer import progress as module
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.infer.progress import Losses, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(params=[io.StringIO, Terminal])
def shown(request):
    """A terminal or a file, to which standard error is redirected by the test."""
    return request.param()


class TestLosses:
    def test_they_come_singly_and_in_chunks(self):
        losses = Losses()
        expected = torch.arange(5000.0)
        losses.extend(expected[:10])
        for loss in expected[10:2000]:
            losses.append(loss)
        losses.extend(expected[2000:2001])
        losses.extend(expected[2001:4999])
        losses.append(4999.0)
        assert len(losses) == 5000
        assert torch.equal(losses.stack(), expected)

    def test_none(self):
        assert Losses().stack().shape == (0,)

    def test_they_hold_no_graph(self):
        losses = Losses()
        losses.append(torch.ones((), requires_grad=True) * 2)
        assert not losses.stack().requires_grad

    def test_fits(self):
        losses = Losses()
        losses.extend(torch.ones(3, 2))
        losses.append(torch.zeros(2))
        assert losses.stack().shape == (4, 2)
        assert losses.smoothed() == 0.75

    def test_smoothing_spans_chunks(self):
        losses = Losses()
        losses.extend(torch.full((500,), 3.0))
        assert losses.smoothed() == 3.0
        losses.append(torch.tensor(103.0))
        assert losses.smoothed() == pytest.approx(4.0)
        losses.append(math.nan)
        assert losses.smoothed() == pytest.approx((98 * 3 + 103) / 99)


class TestBar:
    def run(self, steps, shown, **options):
        losses = Losses()
        with redirect_stderr(shown), Progress(steps, losses, True, **options) as bar:
            for _ in bar:
                losses.append(torch.tensor(2.5))

    def test_it_shows_the_elbo_and_ends_with_a_line(self, shown):
        self.run(30, shown)
        last = shown.getvalue().rsplit("\r", 1)[-1]
        assert "30/30" in last
        assert "ELBO -2.5" in last
        assert last.endswith("\n")

    def test_a_loss_that_is_no_elbo(self, shown):
        self.run(3, shown, is_elbo=False)
        assert "loss 2.5" in shown.getvalue()
        assert "ELBO" not in shown.getvalue()

    def test_a_file_gets_few_lines(self, monkeypatch):
        stream = io.StringIO()
        monkeypatch.setattr(module, "_SECONDS_BETWEEN", 0.0)
        self.run(200, stream)
        assert stream.getvalue().count("\r") <= 5

    def test_a_terminal_is_brought_up_to_date(self, monkeypatch):
        stream = Terminal()
        monkeypatch.setattr(module, "_SECONDS_BETWEEN", 0.0)
        self.run(20, stream)
        assert "7/20" in stream.getvalue()

    def test_it_goes_on_from_where_a_run_was_left(self, shown):
        losses = Losses()
        losses.extend(torch.ones(40))
        with redirect_stderr(shown), Progress(50, losses, True) as bar:
            for done in bar:
                losses.append(torch.tensor(float(done)))
        assert "50/50" in shown.getvalue()

    @pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
    def test_it_ends_when_a_step_fails(self, shown, failure):
        def fail_at_seven():
            losses = Losses()
            with redirect_stderr(shown), Progress(50, losses, True) as bar:
                for done in bar:
                    if done == 7:
                        raise failure
                    losses.append(torch.tensor(1.0))

        with pytest.raises(failure):
            fail_at_seven()
        assert shown.getvalue().endswith("\n")
        assert ("7/50" in shown.getvalue()) is (failure is KeyboardInterrupt)

    def test_no_bar_prints_nothing(self, capsys):
        losses = Losses()
        with Progress(5, losses, False) as bar:
            for _ in bar:
                losses.append(1.0)
        assert capsys.readouterr() == ("", "")


def model():
    fastsvi.sample("x", dist.Normal(0.0, 1.0))


def test_a_run_shows_it(shown):
    svi = SVI(model, AutoNormal(model), fastsvi.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with redirect_stderr(shown):
        run = svi.run(20, compile=False)
    assert "20/20" in shown.getvalue()
    assert f"ELBO {-run.losses.double().mean():.4g}" in shown.getvalue()


def test_a_quiet_run_imports_no_tqdm(fresh_python):
    script = """
import sys, fastsvi, fastsvi.distributions as dist
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal
def model():
    fastsvi.sample("x", dist.Normal(0.0, 1.0))
svi = SVI(model, AutoNormal(model), fastsvi.optim.Adam({"lr": 0.1}), Trace_ELBO())
svi.run(20, compile=False, progress_bar=False)
sys.exit("tqdm.auto" in sys.modules)  # torch itself imports a part of tqdm
"""
    done = fresh_python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
