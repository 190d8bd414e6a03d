"""What users do to a program between two runs, and within one; see ``test_surprises``."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.distributions import constraints
from fastsvi.errors import DeviceError
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal

STEPS = 12
generator = torch.Generator().manual_seed(0)
X = torch.randn(16, 2, generator=generator)
Y = X @ torch.tensor([1.0, -2.0]) + 0.3 * torch.randn(16, generator=generator)


def model(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, 0.5), obs=y)


def guide(x, y):
    loc = pyro.param("loc", torch.zeros(2))
    scale = pyro.param("scale", torch.full((2,), 0.1), constraint=constraints.positive)
    pyro.sample("weight", dist.Normal(loc, scale).to_event(1))


def fit(model=model, guide=guide, lr=0.05, seed=3):
    return SVI(model, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO(), seed=seed)


def with_net(net):
    def network_model(x, y):
        pyro.module("net", net)
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1) + bias, 1.0), obs=y)

    def network_guide(x, y):
        pyro.sample("bias", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.3))

    return fit(network_model, network_guide)


def layers(*others):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 3), *others, torch.nn.Linear(3, 1))


# Each gets a function that runs an SVI, compiled or not, and edits something between two runs.


def another_model_and_the_first_again(run):
    svi = fit()
    run(svi)
    svi.model = poutine.scale(model, 3.0)
    run(svi)
    svi.model = model
    run(svi)


def another_guide_and_the_first_again(run):
    svi = fit()
    run(svi)
    svi.guide = AutoNormal(model)
    run(svi)
    svi.guide = guide
    run(svi)


def learning_rate(run):
    svi = fit()
    run(svi)
    for optimizer in svi.optim.optim_objs.values():
        optimizer.param_groups[0]["lr"] = 0.001
    run(svi)


def momentum(run):
    svi = fit()
    run(svi)
    for optimizer in svi.optim.optim_objs.values():
        optimizer.param_groups[0]["betas"] = (0.5, 0.6)
    run(svi)


def parameters_replaced(run):
    svi = fit()
    run(svi)
    pyro.get_param_store()["loc"] = torch.tensor([5.0, 5.0])
    run(svi)
    pyro.get_param_store()["scale"] = torch.tensor([0.5, 0.5])
    run(svi)


def parameters_put_back(run):
    svi = fit()
    run(svi)
    store, optim = pyro.get_param_store().get_state(), svi.optim.get_state()
    run(svi)
    pyro.get_param_store().set_state(store)
    svi.optim.set_state(optim)
    run(svi)


def parameters_cleared(run):
    svi = fit()
    run(svi)
    pyro.clear_param_store()
    run(svi)


def memory_of_a_parameter_exchanged(run):
    svi = fit()
    run(svi)
    leaf = pyro.get_param_store().leaf("loc")
    leaf.data = torch.tensor([2.0, 2.0])
    run(svi)
    leaf.data.add_(1.0)
    run(svi)


def gradients_left(run):
    svi = fit()
    run(svi)
    for _, leaf in pyro.get_param_store().named_parameters():
        leaf.grad = torch.ones_like(leaf)
    run(svi)


def a_parameter_frozen(run):
    svi = fit()
    run(svi)
    pyro.get_param_store().leaf("loc").requires_grad_(False)
    run(svi)


def a_parameter_added(run):
    is_longer = []

    def longer_guide(x, y):
        guide(x, y)
        if is_longer:
            pyro.param("more", torch.tensor(1.0))

    svi = fit(guide=longer_guide)
    run(svi)
    is_longer.append(True)
    run(svi)


def a_constraint_changed(run):
    kinds = [constraints.positive]

    def guide(x, y):
        scale = pyro.param("scale", torch.full((2,), 0.3), constraint=kinds[-1])
        loc = pyro.param("loc", torch.zeros(2))
        pyro.sample("weight", dist.Normal(loc, scale).to_event(1))

    svi = fit(guide=guide)
    run(svi)
    kinds.append(constraints.interval(0.1, 2.0))
    run(svi)
    del pyro.get_param_store()["scale"]
    run(svi)


def training_mode(run):
    net = layers(torch.nn.Dropout(0.5)).eval()
    svi = with_net(net)
    run(svi)
    net.train()
    run(svi)
    net.eval()
    run(svi)


def running_means(run):
    net = layers(torch.nn.BatchNorm1d(3))
    svi = with_net(net)
    run(svi)
    net.eval()
    run(svi)
    assert run.is_first or net[1].num_batches_tracked == run.memory["tracked"]
    run.memory["tracked"] = net[1].num_batches_tracked.clone()


def a_layer_frozen(run):
    net = layers(torch.nn.Tanh())
    svi = with_net(net)
    run(svi)
    net[0].eval()
    net[0].weight.requires_grad_(False)
    frozen = net[0].weight.detach().clone()
    run(svi)
    assert torch.equal(net[0].weight, frozen)
    net[0].weight.requires_grad_(True)
    run(svi)


def weights_loaded_and_exchanged(run):
    net = layers(torch.nn.Tanh())
    svi = with_net(net)
    run(svi)
    net.load_state_dict({name: value * 0.5 for name, value in net.state_dict().items()})
    run(svi)
    net[0].weight = torch.nn.Parameter(torch.ones(3, 2))
    run(svi)


def data_in_place(run):
    x = X.clone()
    svi = fit()
    run(svi, x)
    for edit in (lambda: x.mul_(2.0), lambda: x.mul_(0.5), lambda: x.data.mul_(3.0)):
        edit()
        run(svi, x)
    x.numpy()[:] *= 0.5
    run(svi, x)


def data_that_the_model_knows(run):
    known = {"x": X.clone()}

    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(known["x"] @ weight, 0.5), obs=y)

    svi = fit(model)
    run(svi)
    known["x"].mul_(2.0)
    run(svi)
    known["x"] = X * 3
    run(svi)


def data_of_other_shapes(run):
    svi = fit()
    run(svi)
    run(svi, X[:8], Y[:8])
    with pytest.raises(DeviceError):
        run(svi, X.to("meta"))
    with pytest.raises(RuntimeError):
        run(svi, X.double())
    run(svi)


def default_dtype(run):
    svi = fit()
    run(svi)
    torch.set_default_dtype(torch.float64)
    try:
        with suppress(RuntimeError):
            run(svi)
    finally:
        torch.set_default_dtype(torch.float32)
    run(svi)


def flags(run):
    on = []

    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = poutine.scale(scale=3.0 if "scale" in on else 1.0)
        mask = poutine.mask(mask="mask" not in on)
        block = poutine.block(hide_fn=lambda site: "block" in on)
        with scale, mask, block, pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ weight, 0.5), obs=y)

    svi = fit(model)
    run(svi)
    for flag in ("scale", "mask", "block"):
        on[:] = [flag]
        run(svi)
        on.clear()
        run(svi)


def attributes(run):
    class Model:
        width = 1.0

        def __call__(self, x, y):
            weight = pyro.sample("weight", dist.Normal(torch.zeros(2), self.width).to_event(1))
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(x @ weight, 0.5), obs=y)

    svi = fit(Model())
    run(svi)
    svi.model.width = 0.1
    run(svi)


def more_particles(run):
    svi = fit()
    run(svi)
    svi.elbo.num_particles = 3
    run(svi)


def single_steps_between(run):
    svi = fit()
    run(svi)
    svi.step(X, Y)
    run(svi)
    svi.evaluate_loss(X, Y)
    run(svi)


def validation(run):
    svi = fit()
    run(svi)
    with pyro.settings.context(validate="always"):
        run(svi)
    run(svi)


def two_in_turns(run):
    one, two = fit(seed=1), fit(seed=2, lr=0.01)
    for svi in (one, two, one, two):
        run(svi)


def a_fit_within_a_fit(run):
    """The inner one makes a parameter, so that those of the outer one move."""

    def inner_model(x, y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0).expand([16]).to_event(1), obs=y)

    def inner_guide(x, y):
        pyro.sample("z", dist.Normal(pyro.param("inner", torch.tensor(0.0)), 0.1))

    outer, inner = fit(), fit(inner_model, inner_guide)

    def batches():
        for k in range(STEPS):
            if k % 5 == 4:
                run(inner)
            yield X, Y

    run(outer, batches=batches())


def the_same_fit_within_a_fit(run):
    svi = fit()

    def batches():
        for k in range(STEPS):
            if k == 6:
                run(svi)
            yield X, Y

    run(svi, batches=batches())


def a_learning_rate_set_by_the_batches(run):
    svi = fit()

    def batches():
        for k in range(STEPS):
            for optimizer in svi.optim.optim_objs.values():
                optimizer.param_groups[0]["lr"] = 0.05 / (k + 1)
            yield X, Y

    run(svi, batches=batches())


def batches_that_are_refilled(run):
    x = torch.empty_like(X)

    def batches():
        for k in range(STEPS):
            x.numpy()[:] = X.numpy() * (1 + k)
            yield x, Y

    run(fit(), batches=batches())


def a_parameter_set_by_the_batches(run):
    def batches():
        for k in range(STEPS):
            if k == 6:
                pyro.get_param_store()["loc"] = torch.tensor([3.0, 3.0])
            yield X, Y

    run(fit(), batches=batches())


EDITS = [
    another_model_and_the_first_again,
    another_guide_and_the_first_again,
    learning_rate,
    momentum,
    parameters_replaced,
    parameters_put_back,
    parameters_cleared,
    memory_of_a_parameter_exchanged,
    gradients_left,
    a_parameter_frozen,
    a_parameter_added,
    a_constraint_changed,
    training_mode,
    running_means,
    a_layer_frozen,
    weights_loaded_and_exchanged,
    data_in_place,
    data_that_the_model_knows,
    data_of_other_shapes,
    default_dtype,
    flags,
    attributes,
    more_particles,
    single_steps_between,
    validation,
    two_in_turns,
    a_fit_within_a_fit,
    the_same_fit_within_a_fit,
    a_learning_rate_set_by_the_batches,
    batches_that_are_refilled,
    a_parameter_set_by_the_batches,
]


class Runs:
    """Runs SVIs, compiled or not, and keeps what they gave."""

    def __init__(self, compile, memory):
        self.compile = compile
        self.is_first = not compile
        self.memory = memory
        self.results = []

    def __call__(self, svi, x=X, y=Y, batches=None):
        data = (x, y) if batches is None else ()
        result = svi.run(STEPS, *data, batches=batches, compile=self.compile, progress_bar=False)
        self.results.append((result.losses, result.params))
        return result
