"""PyroModule beyond what it shares with Pyro: copies and files, the flat store."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.nn import PyroModule, PyroParam, PyroSample, pyro_method

STORE = pyro.get_param_store()


class Model(PyroModule):
    """All kinds of attributes; at module level, so that it can be pickled."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 2)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        self.plain = nn.Linear(2, 2)
        self.scale = PyroParam(torch.tensor([0.5, 2.0]), constraint=constraints.positive)
        self.register_buffer("offset", torch.tensor([1.0, -1.0]))

    @PyroParam(constraint=constraints.positive)
    def lazy(self):
        return torch.tensor(0.25)

    @PyroSample
    def shift(self):
        return dist.Normal(0.0, 1.0)

    def forward(self, x):
        return self.plain(self.linear(x)) * self.scale + self.shift + self.lazy + self.offset


class Tied(PyroModule):
    def __init__(self):
        super().__init__()
        self.a = PyroModule[nn.Linear](2, 2)
        self.b = PyroModule[nn.Linear](2, 2)
        self.b.weight = self.a.weight

    def forward(self):
        return self.a.weight, self.b.weight


class MyLinear(PyroModule[nn.Linear]):
    pass


X = torch.ones(4, 3)


def run(module, *args):
    pyro.set_rng_seed(1)
    return module(*args).detach()


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "torch": through_torch}


@pytest.fixture(params=COPIES.values(), ids=COPIES.keys())
def duplicate(request):
    return request.param


# --- copies and files -----------------------------------------------------------------------


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_copies_compute_the_same(duplicate, called, flat):
    model = Model()
    if called:
        model(X)
    if flat:
        assert STORE.buffers or not called
    twin = duplicate(model)
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in twin.named_parameters()} == names
    expected = run(model, X)
    STORE.clear()
    assert torch.equal(run(twin, X), expected)
    assert type(twin.linear) is type(model.linear)
    assert twin._pyro_context is twin.linear._pyro_context is not model._pyro_context
    assert not any(p is q for p in twin.parameters() for q in model.parameters())


def test_a_copy_leaves_the_original_in_the_flat_buffer(duplicate):
    model = Model()
    model(X)
    (buffer,) = STORE.buffers.values()
    version, flat = buffer.version, buffer.flat
    duplicate(model)
    assert buffer.version == version  # nothing moved: captured steps stay valid
    assert buffer.flat.data_ptr() == flat.data_ptr()


def test_pickles_do_not_hold_the_whole_buffer():
    pyro.param("big", torch.zeros(100_000))
    model = PyroModule()
    for i in range(10):
        setattr(model, f"p{i}", nn.Parameter(torch.full((3,), float(i))))
    model.forward = None  # not used
    with model._pyro_context:
        for i in range(10):
            getattr(model, f"p{i}")
    assert STORE.buffers
    size = len(pickle.dumps(model))
    assert size < 20_000


def test_tied_weights_stay_tied(duplicate):
    tied = Tied()
    tied()
    assert STORE.buffers
    twin = duplicate(tied)
    assert twin.a.weight is twin.b.weight
    assert twin.a.bias is not twin.b.bias
    assert torch.equal(twin.a.weight, tied.a.weight)


def test_a_subclass_of_a_mixin_stays_one(duplicate):
    twin = duplicate(MyLinear(2, 3))
    assert type(twin) is MyLinear
    assert twin.weight.shape == (3, 2)


def test_state_dict_round_trip():
    model, other = Model(), Model()
    model(X)
    assert model.lazy is not None
    assert other.lazy is not None
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.add_(0.1)
    state = model.state_dict()
    assert "offset" in state
    assert "scale_unconstrained" in state
    expected = run(model, X)
    STORE.clear()
    other.load_state_dict(state)
    assert torch.equal(run(other, X), expected)


def test_load_state_dict_reaches_the_store_and_its_buffer():
    model = Model()
    model(X)
    (buffer,) = STORE.buffers.values()
    state = {name: value + 1.0 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    torch.testing.assert_close(STORE.leaf("scale"), state["scale_unconstrained"])
    assert torch.equal(buffer.flat[buffer.layout["scale"].slice], STORE.leaf("scale"))


def test_store_files_restore_a_model(tmp_path):
    model, fresh = Model(), Model()
    model(X)
    STORE.save(tmp_path / "params")
    STORE.clear()
    STORE.load(tmp_path / "params")
    fresh(X)
    for name in ("scale", "lazy"):
        assert torch.equal(getattr(fresh, name), getattr(model, name))
    assert torch.equal(fresh.linear.bias, model.linear.bias)
    assert all(isinstance(leaf, nn.Parameter) for leaf in fresh.parameters())


# --- the flat store -------------------------------------------------------------------------


def test_a_leaf_is_one_object_for_its_whole_life():
    first = PyroParam(torch.ones(2), constraints.positive)
    model = PyroModule()
    model.x = first
    model.forward = lambda: model.x
    leaf = model.x_unconstrained
    model()
    assert STORE.leaf("x") is leaf
    assert STORE.buffers
    model.x = torch.tensor([3.0, 4.0])
    model()
    assert model.x_unconstrained is STORE.leaf("x") is leaf
    assert model().unconstrained() is leaf
    torch.testing.assert_close(STORE["x"].detach(), torch.tensor([3.0, 4.0]))


def test_a_tensor_of_the_store_becomes_a_parameter_without_moving():
    value = pyro.param("x", torch.ones(2), constraint=constraints.positive)
    leaf = value.unconstrained()
    model = PyroModule()
    model.x = PyroParam(torch.zeros(2) + 7, constraints.positive)
    model.forward = lambda: model.x
    assert torch.equal(model(), torch.ones(2))
    assert model.x_unconstrained is leaf is STORE.leaf("x")
    assert isinstance(leaf, nn.Parameter)
    assert [name for name, _ in model.named_parameters()] == ["x_unconstrained"]


def test_parameters_do_not_share_the_memory_of_their_initial_value():
    initial = torch.ones(2)
    model = PyroModule()
    model.x, model.y = PyroParam(initial), PyroParam(initial)
    model.forward = lambda: (model.x, model.y)
    model()
    assert STORE.buffers  # warns of shared memory, if there is any
    assert not initial.requires_grad


# An optimizer of another test may still be in memory, and is told of every leaf that moves.
@pytest.mark.filterwarnings("ignore:.*its optimizer state starts afresh")
@pytest.mark.parametrize("settled", [True, False])
def test_a_module_can_change_its_dtype(settled):
    model = PyroModule[nn.Linear](3, 2)
    model.weight = PyroParam(torch.ones(2, 3), constraints.positive)
    model(X)
    if settled:
        assert STORE.buffers
    before = {name: value.detach().clone() for name, value in STORE.items()}
    model.double()
    STORE.sync()
    assert model(X.double()).dtype == torch.float64
    assert {dtype for _, dtype in STORE.buffers} == {torch.float64}
    for name, value in before.items():
        torch.testing.assert_close(STORE[name].detach(), value.double())


def test_a_new_shape_is_possible_outside_of_the_store():
    model = PyroModule()
    model.x = PyroParam(torch.ones(2), constraints.positive)
    model.x = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(model.x.detach(), torch.tensor([1.0, 2.0, 3.0]))


def test_what_a_handler_makes_of_a_parameter_is_what_the_module_computes_with():
    """Pyro announces an nn.Parameter to handlers, and computes with the original all the same."""
    linear = PyroModule[nn.Linear](2, 1)
    x = torch.ones(1, 2)

    class Zero(pyro.poutine.messenger.Messenger):
        def _pyro_post_param(self, msg):
            msg["value"] = torch.zeros_like(msg["value"])

    with Zero():
        assert linear(x).item() == 0.0
    assert linear(x).item() != 0.0


def test_a_loaded_store_reaches_plain_parameters_too():
    linear = PyroModule[nn.Linear](2, 1)
    value = linear(torch.ones(1, 2)).detach()
    state = {name: leaf.detach().clone() for name, leaf in STORE.named_parameters()}
    STORE.clear()
    for name, leaf in state.items():
        pyro.param(name, leaf)
    other = PyroModule[nn.Linear](2, 1)
    assert torch.equal(other(torch.ones(1, 2)), value)


def test_frozen_parameters_stay_frozen():
    """In Pyro the first read makes them trainable."""
    net = PyroModule[nn.Linear](2, 1)
    net.weight.requires_grad_(False)
    with pyro.poutine.trace() as record:
        net(torch.ones(1, 2))
    assert list(record.trace.nodes) == ["bias"]
    assert not net.weight.requires_grad
    assert list(STORE) == ["bias"]


def test_deleting_a_module_spares_others_whose_name_begins_alike():
    root = PyroModule()
    root.a = PyroModule[nn.Linear](1, 1)
    root.ab = PyroModule[nn.Linear](1, 1)
    root.forward = lambda: (root.a.weight, root.ab.weight)
    root()
    del root.a
    assert list(STORE) == ["ab.weight"]


@pytest.mark.parametrize("value", [3.0, None, "text"])
def test_a_plain_value_replaces_a_declared_attribute(value):
    model = PyroModule()
    model.x = PyroParam(torch.ones(2))
    model.z = PyroSample(dist.Normal(0.0, 1.0))
    model.m = PyroSample(dist.Normal(0.0, 1.0))
    model.x = value
    model.z = value
    model.m = nn.Linear(1, 1)
    assert model.x is value
    assert model.z is value
    assert isinstance(model.m, nn.Linear)
    assert not list(model.named_parameters(recurse=False))
    del model.x, model.z, model.m
    for name in "xzm":
        assert not hasattr(model, name)


def test_distributions_may_be_declared_on_the_class():
    class Model(PyroModule):
        z = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self):
            return self.z

    model = Model()
    with pyro.poutine.trace() as record:
        model()
    assert list(record.trace.nodes) == ["z"]
    model.z = PyroSample(dist.Delta(torch.tensor(3.0)))
    assert model() == 3.0
    assert Model()._pyro_samples == {}
    Model.late = PyroSample(dist.Delta(torch.tensor(4.0)))
    assert model.late == 4.0


def test_methods_are_calls():
    class Coin(PyroModule):
        def __init__(self):
            super().__init__()
            self.p = PyroSample(dist.Beta(1.0, 1.0))

        @pyro_method
        def both(self, factor=1.0):
            """Doc."""
            return self.p * factor, self.p * factor

    first, second = Coin().both(factor=2.0)
    assert torch.equal(first, second)
    assert Coin.both.__doc__ == "Doc."
    with pyro.poutine.trace() as record:
        Coin().both()
    assert list(record.trace.nodes) == ["p"]


def test_samples_are_forgotten_after_an_error():
    class Failing(PyroModule):
        def __init__(self):
            super().__init__()
            self.z = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, fail):
            if fail:
                raise ZeroDivisionError(self.z)
            return self.z

    model = Failing()
    with pytest.raises(ZeroDivisionError) as caught:
        model(True)
    assert model._pyro_context.active == 0
    assert model(False) is not caught.value.args[0]


# --- local parameters -----------------------------------------------------------------------


@pytest.fixture
def local_params():
    with pyro.settings.context(module_local_params=True):
        yield


@pytest.mark.usefixtures("local_params")
def test_local_parameters_leave_the_store_empty():
    first, second = Model(), Model()
    run(first, X)
    run(second, X)
    assert len(STORE) == 0
    assert not torch.equal(first.linear.bias, second.linear.bias)
    with pyro.poutine.trace() as record:
        first(X)
    assert record.trace.nodes["scale"]["value"].unconstrained() is first.scale_unconstrained


@pytest.mark.usefixtures("local_params")
def test_local_parameters_have_no_place_for_global_ones():
    class Model(PyroModule):
        def forward(self):
            return pyro.param("stray", torch.zeros(2))

    with pytest.raises(NotImplementedError, match=r"'stray'.*self.stray = PyroParam"):
        Model()()
    assert len(STORE) == 0


def test_local_parameters_hide_the_store_and_give_it_back():
    pyro.param("outside", torch.zeros(2))
    with pyro.settings.context(module_local_params=True):
        model = PyroModule()
        model.forward = lambda: list(STORE)
        assert model() == []
        assert list(STORE) == ["outside"]


@pytest.mark.usefixtures("local_params")
def test_functional_call_works_with_local_parameters():
    model = PyroModule()
    model.a = PyroParam(torch.tensor(0.5), constraints.positive)
    model.forward = lambda x: model.a * x
    values = {"a_unconstrained": torch.tensor(0.0)}
    grad = torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x,)))
    torch.testing.assert_close(
        grad(values, torch.tensor(3.0))["a_unconstrained"], torch.tensor(3.0)
    )
