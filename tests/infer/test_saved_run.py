"""Files of runs: of several fits, of other programs, damaged ones, and none that can be written."""

from __future__ import annotations

import pytest
import torch
from saved_fits import DATA, EAGER, assert_same, contents, fresh, guide, model

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.errors import CheckpointError, ConstraintError, FastSVIWarning
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.params import checkpoint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fit.ckpt"


class TestSeveralFits:
    ROWS = torch.stack([DATA, DATA + 1, DATA - 1])

    def make(self, **options):
        return fresh(**{"num_fits": 3, "seed": 1, **options})

    def go(self, svi, steps, **options):
        rows = self.ROWS[: svi._fits.num_fits]
        return svi.run(steps, rows, fit_dims=(0,), progress_bar=False, **options)

    @pytest.mark.parametrize("compile", [False, True])
    def test_they_go_on(self, path, compile):
        whole = self.go(self.make(), 40, compile=compile)
        first = self.go(self.make(), 13, compile=compile, checkpoint=path)
        torch.manual_seed(5)
        run = self.go(self.make(seed=None), 40, compile=compile, checkpoint=path)
        assert first.losses.shape == (13, 3)
        assert torch.equal(run.losses, whole.losses)
        assert_same(run.params, whole.params)
        assert run.skipped.tolist() == [0, 0, 0]
        again = self.go(self.make(), 40, compile=compile, checkpoint=path)
        assert torch.equal(again.losses, whole.losses)
        assert_same(again.params, whole.params)

    def test_a_fit_that_failed_is_none_of_the_others_business(self, path):
        bad = self.ROWS.clone()
        bad[1] = torch.nan

        def go(steps, **options):
            svi = self.make()
            return svi.run(steps, bad, fit_dims=(0,), progress_bar=False, **options)

        whole = go(150)
        go(60, checkpoint=path)
        run = go(150, checkpoint=path)
        assert torch.equal(run.losses.nan_to_num(-1.0), whole.losses.nan_to_num(-1.0))
        assert torch.equal(run.skipped, whole.skipped)

    def test_another_number_of_fits(self, path):
        self.go(self.make(), 5, checkpoint=path)
        for other in (self.make(num_fits=2), self.make(first_fit=3)):
            with pytest.raises(CheckpointError, match=r"(num_fits|first_fit) is [30] in the file"):
                self.go(other, 9, checkpoint=path)
            assert self.go(other, 3).losses.isfinite().all()
        with pytest.raises(CheckpointError, match="num_fits is 3 in the file and None"):
            fresh().run(9, DATA, progress_bar=False, checkpoint=path)
        assert not pyro.get_param_store().keys()

    def test_a_damaged_state(self, path):
        self.go(self.make(), 5, checkpoint=path)
        tensors, header = checkpoint.read(path)
        del tensors["run/fits/active"]
        checkpoint.write(path, tensors, header)
        with pytest.raises(CheckpointError, match="3 fits"):
            self.go(self.make(), 9, checkpoint=path)


class TestOtherPrograms:
    """Each difference is named, and nothing changes."""

    @pytest.fixture
    def saved(self, path):
        fresh(False).run(5, DATA, progress_bar=False, checkpoint=path)
        return path

    def refused(self, svi, saved, message, *args, steps=9, **options):
        before, file = contents(svi), saved.read_bytes()
        with pytest.raises(CheckpointError, match=message) as caught:
            svi.run(steps, *(args or (DATA,)), progress_bar=False, checkpoint=saved, **options)
        assert saved.name in str(caught.value)
        assert_same(contents(svi), before)
        assert saved.read_bytes() == file
        assert svi.run(2, *(args or (DATA,)), progress_bar=False).losses.isfinite().all()

    def test_names(self, saved):
        message = (
            r"(?s)'loc' is in the file and not in the program.*"
            r"'AutoNormal.locs.x' is in the program and not in the file"
        )
        self.refused(fresh(), saved, message)

    def test_shapes_and_constraints(self, saved):
        def other(data):
            pyro.param("loc", torch.zeros(3))
            pyro.sample("x", dist.Normal(pyro.param("scale", torch.tensor(0.5)), 1.0))
            pyro.sample("s", dist.LogNormal(pyro.param("log_s", torch.tensor(0.0)), 0.2))

        svi = fresh(False)
        svi.guide = other
        svi._follow_changes()
        message = (
            r"(?s)'loc' is shape \(\), float32.* in the file and shape \(3,\).*"
            r"'scale' is .*greater_than.* in the file and .*real"
        )
        self.refused(svi, saved, message)

    def test_optimizer(self, saved):
        other = fresh(False, pyro.optim.ClippedAdam({"lr": 0.05}))
        self.refused(other, saved, "the optimizer is 'Adam' in the file and 'ClippedAdam'")
        other = fresh(False, pyro.optim.Adam({"lr": 0.01}))
        self.refused(other, saved, r"options of the optimizer is {'lr': 0.05} in the file")

    def test_particles(self, saved):
        self.refused(fresh(False, particles=3), saved, "num_particles is 2 in the file and 3")

    def test_a_store_that_holds_something_else_by_that_name(self, path):
        def needs_two(data, size):
            model(data)
            if size:
                pyro.param("other", torch.zeros(size))

        def make():
            optim = pyro.optim.Adam({"lr": 0.05})
            return SVI(needs_two, lambda data, size: guide(data), optim, Trace_ELBO())

        make().run(3, DATA, 2, progress_bar=False, checkpoint=path)
        pyro.clear_param_store()
        self.refused(make(), path, r"'other' is shape \(2,\)", DATA, 3)


class TestBadFiles:
    @pytest.mark.parametrize("cut", [0, 5, 100, -1, -400])
    def test_truncated(self, path, cut):
        fresh().run(5, DATA, progress_bar=False, checkpoint=path)
        path.write_bytes(path.read_bytes()[:cut])
        damaged = path.read_bytes()
        svi = fresh()
        with pytest.raises(CheckpointError, match=r"fit.ckpt.*(truncated|damaged)"):
            svi.run(9, DATA, progress_bar=False, checkpoint=path)
        assert path.read_bytes() == damaged
        assert not pyro.get_param_store().keys()

    def test_no_run(self, path):
        svi = fresh()
        svi.step(DATA)
        pyro.get_param_store().save(path)
        before = contents(svi)
        with pytest.raises(CheckpointError, match="it holds no run"):
            svi.run(9, DATA, progress_bar=False, checkpoint=path)
        assert_same(contents(svi), before)

    @pytest.mark.parametrize(
        "change",
        [
            {"steps": 7},
            {"steps": "5"},
            {"noise": [1]},
            {"noise": [-1, 0]},
            {"seed": {"value": "x"}},
            {"program": []},
            {"native": None},
        ],
    )
    def test_malformed(self, path, change):
        fresh().run(5, DATA, progress_bar=False, checkpoint=path)
        tensors, header = checkpoint.read(path)
        header["run"] |= change
        checkpoint.write(path, tensors, header)
        with pytest.raises(CheckpointError, match="malformed"):
            fresh().run(9, DATA, progress_bar=False, checkpoint=path)

    def test_paths(self, tmp_path):
        svi = fresh()
        for bad in (tmp_path, tmp_path / "none" / "fit.ckpt"):
            with pytest.raises(CheckpointError, match="cannot be written"):
                svi.run(5, DATA, progress_bar=False, checkpoint=bad)
        assert not pyro.get_param_store().keys()

    @pytest.mark.parametrize("every", [-1, "often", None, float("nan"), True])
    def test_seconds(self, path, every):
        with pytest.raises(ConstraintError, match="checkpoint_every"):
            fresh().run(5, DATA, progress_bar=False, checkpoint=path, checkpoint_every=every)

    def test_a_full_disk_ends_no_run(self, path, monkeypatch):
        svi = fresh()
        svi.run(5, DATA, progress_bar=False, checkpoint=path)
        before = path.read_bytes()

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "write", full)
        with pytest.warns(FastSVIWarning, match=r"No space left.*still that of step 5"):
            run = svi.run(9, DATA, progress_bar=False, checkpoint=path)
        assert len(run.losses) == 9
        assert path.read_bytes() == before

    def test_parameters_outside_of_the_store(self, path):
        class Guide(pyro.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.loc = pyro.nn.PyroParam(torch.tensor(0.0))

            def forward(self, data):
                pyro.sample("x", dist.Normal(self.loc, 1.0))
                pyro.sample("s", dist.LogNormal(self.loc, 0.1))

        with pyro.settings.context(module_local_params=True):
            svi = SVI(model, Guide(), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
            with pytest.raises(CheckpointError, match="not in the param store"):
                svi.run(9, DATA, checkpoint=path, **EAGER)
        assert not path.exists()

    def test_losses_with_gradients_of_their_own(self, path):
        def own_gradients(model, guide, data):
            loss = (pyro.param("w", torch.tensor(1.0)) ** 2).sum()
            loss.backward()
            return loss.detach()

        optim = pyro.optim.Adam({"lr": 0.05})
        svi = SVI(model, guide, optim, own_gradients, loss_and_grads=own_gradients)
        whole = svi.run(9, DATA, progress_bar=False).losses
        pyro.clear_param_store()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), own_gradients, own_gradients)
        svi.run(4, DATA, progress_bar=False, checkpoint=path)
        pyro.clear_param_store()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), own_gradients, own_gradients)
        assert torch.equal(svi.run(9, DATA, progress_bar=False, checkpoint=path).losses, whole)
