"""AutoNormal and AutoDelta: structure, against Pyro, and as modules."""

import copy
import io
import pickle
import warnings

import pyro
import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.errors import ConstraintError, ShapeError, SiteError
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal, init_to_value
from fastsvi.optim import Adam


def mixed(library):
    """Supports, event dimensions and nested plates."""
    d = library.distributions

    def model():
        library.sample("real", d.Normal(torch.zeros(2), 1.0).to_event(1))
        rate = library.sample("rate", d.Gamma(2.0, 1.0))
        library.sample("weights", d.Dirichlet(torch.ones(3)))
        library.sample("chol", d.LKJCholesky(3, torch.tensor(1.0)))
        with library.plate("outer", 2, dim=-2):
            library.sample("row", d.Normal(torch.zeros(2, 1), rate))
            with library.plate("inner", 3, dim=-1):
                library.sample("cell", d.Beta(2.0, 2.0))
        library.sample("obs", d.Normal(rate, 1.0), obs=torch.tensor(1.0))

    return model


def subsampled(library):
    d = library.distributions

    def model():
        x = library.sample("x", d.Normal(0.0, 1.0))
        with library.plate("data", 10, subsample_size=4) as index:
            z = library.sample("z", d.Normal(x, 1.0))
            library.sample("obs", d.Normal(z, 1.0), obs=index.float())

    return model


def guide_of(library, model, **options):
    return library.infer.autoguide.AutoNormal(model, **options)


class TestAgainstPyro:
    @pytest.mark.parametrize("make", [mixed, subsampled])
    def test_parameters(self, make):
        for library in (fastsvi, pyro):
            torch.manual_seed(0)
            guide_of(library, make(library))()
        ours, theirs = (dict(lib.get_param_store().items()) for lib in (fastsvi, pyro))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name])
            assert fastsvi.get_param_store().constraint(name) is not None

    @pytest.mark.parametrize("make", [mixed, subsampled])
    def test_sites_and_densities(self, make):
        """One run under the same seed: names, values, densities, scales and plates."""
        traces = []
        for library in (fastsvi, pyro):
            torch.manual_seed(0)
            guide = guide_of(library, make(library))
            guide()
            torch.manual_seed(1)
            trace = library.poutine.trace(guide).get_trace()
            trace.compute_log_prob()
            traces.append(trace)
        ours, theirs = ({n: s for n, s in t.nodes.items() if s["type"] == "sample"} for t in traces)
        assert list(ours) == list(theirs)
        for name, site in ours.items():
            other = theirs[name]
            torch.testing.assert_close(site["value"], other["value"])
            torch.testing.assert_close(site["log_prob"], other["log_prob"], rtol=1e-5, atol=1e-5)
            assert float(site["scale"]) == float(other["scale"])
            assert [f.name for f in site["cond_indep_stack"]] == [
                f.name for f in other["cond_indep_stack"]
            ]

    def test_median_and_quantiles(self):
        results = []
        for library in (fastsvi, pyro):
            guide = guide_of(library, mixed(library))
            guide()
            results.append((guide.median(), guide.quantiles([0.1, 0.5, 0.9])))
        for ours, theirs in zip(*results, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)

    def test_quantiles_take_tensors(self):
        guide = guide_of(fastsvi, mixed(fastsvi))
        guide()
        listed = guide.quantiles([0.2, 0.7])
        for name, value in guide.quantiles(torch.tensor([0.2, 0.7])).items():
            torch.testing.assert_close(value, listed[name])


class TestNames:
    def test_dots_in_names_nest(self):
        def model():
            fastsvi.sample("a.b", dist.Normal(0.0, 1.0))
            fastsvi.sample("a.c.d", dist.Normal(0.0, 1.0))

        guide = AutoNormal(model)
        guide()
        assert "AutoNormal.locs.a.b" in fastsvi.get_param_store()
        assert "locs.a.c.d_unconstrained" in dict(guide.named_parameters())
        assert set(guide.median()) == {"a.b", "a.c.d"}

    @pytest.mark.parametrize("names", [("a", "a.b"), ("a.b", "a")])
    def test_colliding_names_are_refused(self, names):
        def model():
            for name in names:
                fastsvi.sample(name, dist.Normal(0.0, 1.0))

        with pytest.raises(SiteError, match="collide"):
            AutoNormal(model)()

    def test_sites_named_like_methods(self):
        def model():
            for name in ("type", "float", "forward", "parameters"):
                fastsvi.sample(name, dist.Normal(0.0, 1.0))

        guide = AutoNormal(model)
        assert set(guide()) == {"type", "float", "forward", "parameters"}
        assert len(dict(guide.named_parameters())) == 8


class TestSampling:
    def test_posterior_samples_have_the_moments_of_the_guide(self):
        guide = AutoNormal(mixed(fastsvi), init_scale=0.3)
        guide()
        draws = guide.sample_posterior(4000)
        assert draws["cell"].shape == (4000, 2, 3)
        assert draws["chol"].shape == (4000, 3, 3)
        # Standard error of a mean: 0.3 / sqrt(4000) < 0.005.
        assert (draws["real"].mean(0)).abs().max() < 0.025
        torch.testing.assert_close(draws["rate"].log().std(), torch.tensor(0.3), rtol=0.06, atol=0)
        assert guide.sample_posterior()["rate"].shape == ()
        assert guide.sample_posterior((2, 5))["weights"].shape == (2, 5, 3)

    def test_get_posterior_is_what_the_guide_samples(self):
        guide = AutoNormal(mixed(fastsvi))
        trace = poutine.trace(guide).get_trace()
        trace.compute_log_prob()
        for name, fn in guide.get_posterior().items():
            site, unconstrained = trace.nodes[name], trace.nodes[f"{name}_unconstrained"]
            density = site["log_prob_sum"] + unconstrained["log_prob_sum"]
            torch.testing.assert_close(
                fn.log_prob(site["value"]).sum(), density, rtol=1e-4, atol=1e-4
            )

    def test_results_may_be_asked_for_before_the_first_run(self):
        guide = AutoNormal(mixed(fastsvi))
        assert set(guide.median()) == {"real", "rate", "weights", "chol", "row", "cell"}

    def test_call_returns_a_tuple_in_order_of_names(self):
        guide = AutoNormal(mixed(fastsvi))
        assert len(guide.call()) == 6


class TestOptions:
    @pytest.mark.parametrize("bad", [0.0, -0.1, "0.1", None, True])
    def test_init_scale_is_positive(self, bad):
        with pytest.raises(ConstraintError, match="init_scale"):
            AutoNormal(mixed(fastsvi), init_scale=bad)

    def test_init_loc_fn(self):
        guide = AutoNormal(
            mixed(fastsvi), init_loc_fn=init_to_value(values={"rate": torch.tensor(2.0)})
        )
        guide()
        torch.testing.assert_close(guide.median()["rate"], torch.tensor(2.0))

    def test_scale_constraint_of_a_subclass(self):
        class Positive(AutoNormal):
            scale_constraint = dist.constraints.positive

        guide = Positive(mixed(fastsvi))
        guide()
        leaf = fastsvi.get_param_store().leaf("Positive.scales.rate")
        torch.testing.assert_close(leaf.exp(), torch.tensor(0.1))
        assert guide.fused().scale_map == "exp"

    def test_create_plates_chooses_the_minibatch(self):
        data = torch.arange(10.0)

        def model(index):
            with fastsvi.plate("data", 10, subsample=index) as i:
                z = fastsvi.sample("z", dist.Normal(0.0, 1.0))
                fastsvi.sample("obs", dist.Normal(z, 1.0), obs=data[i])

        guide = AutoNormal(
            model, create_plates=lambda index: fastsvi.plate("data", 10, subsample=index)
        )
        svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
        index = torch.tensor([2, 7, 3])
        svi.step(index)
        locs = fastsvi.param("AutoNormal.locs.z")
        assert locs.shape == (10,)
        assert torch.equal(locs.nonzero().squeeze(-1), torch.tensor([2, 3, 7]))

    def test_create_plates_must_return_plates(self):
        guide = AutoNormal(mixed(fastsvi), create_plates=lambda: [3])
        with pytest.raises(SiteError, match="create_plates"):
            guide()

    def test_sequential_plates_are_refused(self):
        def model():
            for i in fastsvi.plate("data", 3):
                fastsvi.sample(f"z_{i}", dist.Normal(0.0, 1.0))

        with pytest.raises(SiteError, match="sequential"):
            AutoNormal(model)()


class TestAsModule:
    def test_parameters_and_state_dict(self):
        guide = AutoNormal(mixed(fastsvi))
        guide()
        names = {name for name, _ in guide.named_parameters()}
        assert "locs.rate_unconstrained" in names
        state = {name: value + 1.0 for name, value in guide.state_dict().items()}
        guide.load_state_dict(state)
        leaf = fastsvi.get_param_store().leaf("AutoNormal.locs.rate")
        torch.testing.assert_close(leaf.detach(), state["locs.rate_unconstrained"])

    def test_deepcopy_is_independent_and_keeps_the_model(self):
        guide = AutoNormal(mixed(fastsvi))
        guide()
        twin = copy.deepcopy(guide)
        assert twin.model is guide.model
        before = guide.median()["real"].clone()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1.0)
        assert torch.equal(guide.median()["real"], before)
        assert not torch.equal(twin.median()["real"], before)

    def test_pickle_and_torch_save(self):
        guide = AutoNormal(mixed(fastsvi))
        guide()
        expected = guide.median()
        file = io.BytesIO()
        torch.save(guide, file)
        file.seek(0)
        for loaded in (pickle.loads(pickle.dumps(guide)), torch.load(file, weights_only=False)):
            for name, value in loaded.median().items():
                torch.testing.assert_close(value, expected[name])
        # Saving takes nothing from the guide that was saved.
        assert guide.model is not None
        guide()

    def test_a_loaded_guide_runs_without_its_model(self):
        guide = AutoNormal(mixed(fastsvi))
        guide()
        loaded = pickle.loads(pickle.dumps(guide))
        fastsvi.clear_param_store()
        assert set(loaded()) == {"real", "rate", "weights", "chol", "row", "cell"}

    def test_prototype_keeps_no_data_alive(self):
        import weakref

        class Data(torch.Tensor):
            pass

        data = torch.zeros(3).as_subclass(Data)
        seen = weakref.ref(data)

        def model(data):
            fastsvi.sample("x", dist.Normal(0.0, 1.0))

        guide = AutoNormal(model)
        guide(data)
        del data
        assert seen() is None


class TestAutoDelta:
    def test_parameters_are_those_of_pyro(self):
        for library in (fastsvi, pyro):
            torch.manual_seed(0)
            library.infer.autoguide.AutoDelta(
                mixed(library), init_loc_fn=library.infer.autoguide.init_to_feasible
            )()
        ours, theirs = (dict(lib.get_param_store().items()) for lib in (fastsvi, pyro))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name])

    def test_finds_the_mode(self):
        def model():
            rate = fastsvi.sample("rate", dist.Gamma(3.0, 2.0))
            fastsvi.sample("count", dist.Poisson(rate), obs=torch.tensor(4.0))

        guide = AutoDelta(model)
        svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
        svi.run(400, progress_bar=False)
        # Posterior Gamma(7, 3): its mode is 2. There is no noise, only Adam's last steps.
        torch.testing.assert_close(guide.median()["rate"], torch.tensor(2.0), rtol=0, atol=0.01)

    def test_subsampled_sites_have_all_parameters(self):
        guide = AutoDelta(subsampled(fastsvi))
        assert guide()["z"].shape == (4,)
        assert fastsvi.param("AutoDelta.z").shape == (10,)


class TestAutoGuideList:
    def make(self):
        model = mixed(fastsvi)
        guide = AutoGuideList(model)
        guide.append(AutoNormal(poutine.block(model, expose=["real", "row", "cell"])))
        guide.append(AutoDelta(poutine.block(model, expose=["rate", "chol"])))

        def weights():
            concentration = fastsvi.param("concentration", torch.ones(3))
            return {"weights": fastsvi.sample("weights", dist.Dirichlet(concentration.exp()))}

        guide.append(weights)
        return model, guide

    def test_parts_make_a_whole(self):
        model, guide = self.make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert set(guide()) == {"real", "rate", "weights", "chol", "row", "cell"}
            svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
            for _ in range(3):
                svi.step()
        names = set(fastsvi.get_param_store().keys())
        assert {"AutoGuideList.0.locs.row", "AutoGuideList.1.rate", "concentration"} <= names
        assert set(guide.median()) == {"real", "row", "cell", "rate", "chol"}
        assert len(guide) == 3

    def test_a_part_belongs_to_one_list(self):
        _, guide = self.make()
        with pytest.raises(SiteError, match="already"):
            AutoGuideList(mixed(fastsvi)).append(guide[0])

    def test_parts_of_another_model_are_refused(self):
        def small():
            fastsvi.sample("real", dist.Normal(torch.zeros(3), 1.0).to_event(1))

        guide = AutoGuideList(mixed(fastsvi))
        guide.append(AutoNormal(small))
        with pytest.raises(ShapeError, match="'real'"):
            guide()

    def test_copies(self):
        _, guide = self.make()
        guide()
        twin = copy.deepcopy(guide)
        assert set(twin()) == set(guide())
