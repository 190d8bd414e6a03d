"""Our store put into real Pyro in place of its own."""

from __future__ import annotations

import copy
import io
import math

import pyro
import pyro.distributions as dist
import pyro.nn.module
import pyro.poutine.runtime
import pyro.primitives
import pytest
import torch
from pyro import poutine
from pyro.contrib.forecast.util import MarkDCTParamMessenger, PrefixWarmStartMessenger
from pyro.infer import (
    SVGD,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RBFSteinKernel,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.nn.module import clear, to_pyro_module_
from pyro.optim import DCTAdam
from torch import nn
from torch.distributions import constraints

from fastsvi.params import ParamStore


@pytest.fixture(scope="module")
def losses_of_stock_pyro():
    # Of the module's scope, so that it runs before a test's store is put in.
    return losses_of_one_program()


@pytest.fixture(params=["pyro", "fastsvi", "fastsvi, flat"])
def store(request, monkeypatch):
    """Pyro's own store as a control, ours, and ours with the buffers asked for at every step."""
    if request.param == "pyro":
        pyro.clear_param_store()
        yield pyro.get_param_store()
        return
    ours = ParamStore()
    for module in (pyro.poutine.runtime, pyro.primitives, pyro.nn.module):
        monkeypatch.setattr(module, "_PYRO_PARAM_STORE", ours)
    get_param = ours.get_param
    if request.param == "fastsvi, flat":

        def get_param(*args, **kwargs):
            value = ParamStore.get_param(ours, *args, **kwargs)
            for buffer in ours.buffers.values():
                buffer.sync()
                buffer.bind_grads()
            return value

    param = pyro.poutine.runtime.effectful(get_param, type="param")
    monkeypatch.setattr(pyro.primitives, "_param", param)
    yield ours


def close(a, b):
    return torch.allclose(a.detach(), b.detach(), rtol=1e-5, atol=1e-6)


def model(data=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 10):
        return pyro.sample("obs", dist.Normal(loc, scale), obs=data)


@pytest.fixture
def data():
    return torch.randn(10) * 0.5 + 3.0


@pytest.mark.parametrize("Guide", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("Elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_svi_with_autoguides(store, data, Guide, Elbo):
    guide = Guide(model)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05}), Elbo())
    losses = [svi.step(data) for _ in range(60)]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert bool(guide.median()["scale"] > 0)
    samples = Predictive(model, guide=guide, num_samples=3)()["obs"]
    assert samples.shape == (3, 10)


def losses_of_one_program():
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    data = torch.randn(10) * 0.5 + 3.0
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=2))
    return [svi.step(data) for _ in range(5)]


def test_every_store_gives_the_same_numbers(losses_of_stock_pyro, store):
    assert losses_of_one_program() == losses_of_stock_pyro


class Net(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.bias = nn.Parameter(torch.zeros(1))
        self.scale = PyroParam(torch.ones(1), constraint=constraints.positive)
        self.latent = PyroSample(lambda self: dist.Normal(self.bias, self.scale).to_event(1))
        self.child = PyroModule()
        self.child.weight = PyroParam(torch.tensor([0.2, 0.8]), constraint=constraints.simplex)

    def forward(self, x):
        mean = self.linear(x).squeeze(-1) + self.latent.sum() + self.child.weight.sum()
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=x.sum(-1))


NAMES = {"linear$$$weight", "linear$$$bias", "bias", "scale", "child.weight"}


def test_pyro_module(store):
    net, x = Net(), torch.randn(5, 2)
    net(x)
    assert set(store) == NAMES
    assert store["linear$$$weight"] is net.linear.weight
    assert store["scale"].unconstrained() is net.scale_unconstrained
    svi = SVI(net, AutoNormal(net), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    before = {name: value.detach().clone() for name, value in store.items()}
    for _ in range(5):
        svi.step(x)
    assert all(not close(store[name], value) for name, value in before.items())
    assert close(store["linear$$$weight"], net.linear.weight)
    net.scale = torch.full((1,), 7.0)  # writes unconstrained.data
    assert close(store["scale"], torch.full((1,), 7.0))
    clear(net)
    assert not NAMES & set(store)


def test_two_modules_of_one_name_share_their_params(store):
    x = torch.randn(4, 2)
    first, second = Net(), Net()
    first(x)
    second(x)
    assert close(first.scale, second.scale)
    assert first.scale_unconstrained is second.scale_unconstrained
    assert isinstance(store["scale"].unconstrained(), nn.Parameter)


def test_a_pyro_param_meets_a_plain_one_of_its_name(store):
    def program(module):
        with module._pyro_context:
            return module.x

    pyro.param("x", torch.ones(2), constraint=constraints.positive)
    module = PyroModule()
    module.x = PyroParam(torch.full((2,), 5.0), constraint=constraints.positive)
    assert close(program(module), torch.ones(2))
    leaf = store["x"].unconstrained()
    assert isinstance(leaf, nn.Parameter)
    assert module.x_unconstrained is leaf
    assert store.param_name(leaf) == "x"


def test_deleting_an_attribute_deletes_the_param(store):
    net = Net()
    net(torch.randn(3, 2))
    del net.bias
    del net.scale
    del net.child
    assert set(store) == {"linear$$$weight", "linear$$$bias"}


def test_module_local_params_leave_the_store_empty(store, data):
    with pyro.settings.context(module_local_params=True):

        class Local(PyroModule):
            def __init__(self):
                super().__init__()
                self.scale = PyroParam(torch.ones(()), constraint=constraints.positive)

            def forward(self, data):
                with pyro.plate("data", len(data)):
                    pyro.sample("obs", dist.Normal(0.0, self.scale), obs=data)

        local = Local()
        elbo = Trace_ELBO()(local, AutoNormal(local, create_plates=None))
        optimizer = torch.optim.Adam(local.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            elbo(data).backward()
            optimizer.step()
        assert set(store) == set()
        assert float(local.scale.detach()) > 1.1


def test_module_primitive(store):
    linear = nn.Linear(3, 2)
    frozen = nn.Linear(3, 2)
    frozen.weight.requires_grad_(False)
    assert pyro.module("lin", linear) is linear
    assert set(store) == {"lin$$$weight", "lin$$$bias"}
    assert store["lin$$$weight"] is linear.weight
    with pytest.warns(UserWarning, match="requires_grad=False"):
        pyro.module("frozen", frozen)
    assert "frozen$$$weight" not in store
    other = nn.Linear(3, 2)
    pyro.module("lin", other)
    assert not close(other.weight, linear.weight)
    pyro.module("lin", other, update_module_params=True)
    assert other.weight is linear.weight


def test_to_pyro_module(store):
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    to_pyro_module_(net)
    net(torch.randn(4, 2))
    assert set(store) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_random_module(store):
    prior = dist.Normal(torch.zeros(2, 2), torch.ones(2, 2)).to_event(2)
    with pytest.warns(FutureWarning, match="random_module"):
        lifted = pyro.random_module("m", nn.Linear(2, 2, bias=False), {"weight": prior})
    sampled = lifted()
    assert sampled.weight.shape == (2, 2)


def test_optimizer_arguments_by_name_and_their_state(store, data):
    names = []

    def arguments(name):
        names.append(name)
        return {"lr": 0.1 if "locs" in name else 0.0}

    guide = AutoNormal(model)
    optimizer = pyro.optim.Adam(arguments)
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    guide(data)
    before = {name: leaf.detach().clone() for name, leaf in store.named_parameters()}
    for _ in range(3):
        svi.step(data)
    assert set(names) == set(store)
    for name, leaf in store.named_parameters():
        assert close(leaf, before[name]) == ("scales" in name)
    assert set(optimizer.get_state()) == set(store)


def test_subsampled_params(store):
    data = torch.arange(8.0)

    def local_model(data):
        with pyro.plate("data", 8, subsample_size=3, dim=-1) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    def local_guide(data):
        with pyro.plate("data", 8, subsample_size=3, dim=-1):
            loc = pyro.param("loc", torch.zeros(8), event_dim=0)
            scale = pyro.param("scale", torch.ones(8), constraint=constraints.positive, event_dim=0)
            assert loc.shape == (3,)
            pyro.sample("z", dist.Normal(loc, scale))

    svi = SVI(local_model, local_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(4):
        svi.step(data)
    assert store["loc"].shape == (8,)
    assert store.param_name(store["scale"].unconstrained()) == "scale"


def test_params_made_in_later_steps(store):
    def growing(step):
        total = sum(pyro.param(f"x{i}", torch.tensor(float(i))) for i in range(step + 1))
        pyro.sample("obs", dist.Normal(total, 1.0), obs=torch.tensor(0.0))

    svi = SVI(growing, lambda step: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for step in range(6):
        svi.step(step)
    assert len(store) == 6
    # Adam moves by lr in each step until the total is 0: x0 has had five such steps.
    assert float(store["x0"].detach()) < -0.3


def test_4_decaying_baselines_do_not_leak(store):
    def prior(data):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Bernoulli(p), obs=data)

    def guide(data):
        a = pyro.param("a", torch.tensor(2.0), constraint=constraints.positive)
        baseline = {"use_decaying_avg_baseline": True}
        pyro.sample("p", dist.Beta(a, 2.0).has_rsample_(False), infer={"baseline": baseline})

    optimizer = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(prior, guide, optimizer, TraceGraph_ELBO())
    for _ in range(10):
        svi.step(torch.tensor([1.0, 0.0, 1.0]))
    assert len(store) == 2
    leaked = len(store._param_to_name) - 2
    assert leaked == (0 if isinstance(store, ParamStore) else 10)


def test_scopes_keep_models_apart(store, data):
    guides, states = [AutoNormal(model), AutoNormal(model)], [None, None]
    optimizers = [pyro.optim.Adam({"lr": lr}) for lr in (0.0, 0.1)]
    for _ in range(4):
        for i in range(2):
            state = states[i] or {"params": {}, "constraints": {}}
            with store.scope(state) as states[i]:
                SVI(model, guides[i], optimizers[i], Trace_ELBO()).step(data)
    assert not store
    still, moved = (state["params"]["AutoNormal.locs.loc"] for state in states)
    assert not close(still, moved)
    # The moments of Adam belong to the leaf, which outlives the scope: four steps, not four firsts.
    (adam,) = (optimizers[1].optim_objs[moved],)
    assert int(adam.state[moved]["step"]) == 4


def test_save_and_load(store, data, tmp_path):
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(data)
    linear = pyro.module("lin", nn.Linear(3, 2))
    saved = {name: value.detach().clone() for name, value in store.items()}
    store.save(str(tmp_path / "params"))
    store.clear()
    store.load(str(tmp_path / "params"))
    assert set(store) == set(saved)
    assert all(close(store[name], value) for name, value in saved.items())
    other = pyro.module("lin", nn.Linear(3, 2), update_module_params=True)
    assert close(other.weight, linear.weight)
    svi.step(data)


def test_a_module_with_adopted_params_can_be_pickled(store, tmp_path):
    net = Net()
    net(torch.randn(3, 2))
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    assert close(torch.load(file)["linear.weight"], net.linear.weight)
    twin = copy.deepcopy(net.linear)
    assert close(twin.weight, net.linear.weight)


def test_warm_start_splices_params(store):
    """pyro.contrib.forecast reads ``_constraints`` and assigns a longer value."""
    pyro.param("x", torch.tensor([1.0, 2.0]), constraint=constraints.positive)
    with PrefixWarmStartMessenger():
        longer = pyro.param("x", torch.full((4,), 9.0), constraint=constraints.positive)
    assert close(longer, torch.tensor([1.0, 2.0, 9.0, 9.0]))
    assert close(store["x"], longer)
    assert store._constraints["x"] is constraints.positive


def test_dct_gradients_find_their_attribute(store):
    data = torch.randn(6).cumsum(-1)

    def program():
        with pyro.plate("time", 6, dim=-1):
            x = pyro.param("x", torch.zeros(6), event_dim=0)
            pyro.sample("obs", dist.Normal(x, 1.0), obs=data)

    with MarkDCTParamMessenger("time"):
        svi = SVI(program, lambda: None, DCTAdam({"lr": 0.1}), Trace_ELBO())
        before = svi.evaluate_loss()
        for _ in range(20):
            svi.step()
    assert store["x"].unconstrained()._pyro_dct_dim == -1
    assert svi.evaluate_loss() < before


@pytest.mark.parametrize("Elbo", [JitTrace_ELBO, TraceEnum_ELBO, ReweightedWakeSleep, SVGD])
def test_other_inference(store, data, Elbo):
    def guide(data=None):
        loc = pyro.param("loc_loc", torch.tensor(0.0))
        scale = pyro.param("loc_scale", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("loc", dist.Normal(loc, scale))
        scale_loc = pyro.param("scale_loc", torch.tensor(0.0))
        pyro.sample("scale", dist.LogNormal(scale_loc, 0.1))

    optimizer = pyro.optim.Adam({"lr": 0.1})
    if Elbo is SVGD:
        inference = SVGD(model, RBFSteinKernel(), optimizer, num_particles=4, max_plate_nesting=1)
    else:
        settings = {
            JitTrace_ELBO: {"ignore_jit_warnings": True},
            TraceEnum_ELBO: {"strict_enumeration_warning": False},
            ReweightedWakeSleep: {"num_particles": 4},
        }
        inference = SVI(model, guide, optimizer, Elbo(**settings[Elbo]))
    for _ in range(3):
        inference.step(data)
    before = {name: value.detach().clone() for name, value in store.items()}
    for _ in range(3):
        inference.step(data)
    assert before
    assert all(not close(store[name], value) for name, value in before.items())


def test_jit_and_replay_substitute_params(store):
    def program():
        return pyro.param("x", torch.ones(2), constraint=constraints.positive)

    program()
    with poutine.trace(param_only=True) as capture:
        value = program()
    node = capture.trace.nodes["x"]
    assert node["value"] is value
    assert node["value"].unconstrained() is store["x"].unconstrained()
    substitute = torch.zeros(2)
    substitute.unconstrained = store["x"].unconstrained
    assert poutine.replay(program, params={"x": substitute})() is substitute


def test_lift_makes_params_random(store):
    def program():
        return pyro.param("x", torch.ones(2))

    value = poutine.lift(program, prior={"x": dist.Normal(100.0, 1.0).expand([2]).to_event(1)})()
    assert bool((value > 50).all())
    assert "x" not in store
