"""PyroOptim: its surface, its state and files, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from torch.distributions import constraints

import fastsvi.optim as optim
from fastsvi.errors import (
    CheckpointError,
    DtypeError,
    FastSVIWarning,
    MissingParamError,
    ShapeError,
)
from fastsvi.optim import OptionError
from fastsvi.params import checkpoint
from fastsvi.poutine.runtime import PARAM_STORE as STORE


@pytest.fixture(autouse=True)
def empty_store():
    STORE.clear()
    yield
    STORE.clear()


def leaf_of(name="x", value=(1.0, 2.0), constraint=constraints.real):
    STORE.setdefault(name, torch.tensor(value), constraint)
    leaf = STORE.leaf(name)
    leaf.grad = torch.ones_like(leaf)
    return leaf


# --- surface --------------------------------------------------------------------------------


def test_every_torch_optimizer_and_scheduler_has_its_name():
    import pyro.optim

    missing = [
        name
        for name in pyro.optim.pytorch_optims
        if not hasattr(optim, name) and name not in ("LRScheduler", "_LRScheduler")
    ]
    assert not missing  # the two left out are abstract


@pytest.mark.parametrize("name", ["Adam", "AdamW", "ClippedAdam", "DCTAdam", "RMSprop", "SGD"])
def test_a_factory_wraps_its_namesake(name):
    instance = getattr(optim, name)({})
    assert isinstance(instance, optim.PyroOptim)
    assert instance.pt_optim_constructor.__name__ == name
    assert getattr(optim, name).__name__ == name


def test_torch_optimizers_have_modules_as_in_pyro():
    leaf = torch.zeros(1, requires_grad=True)
    for constructor in (
        optim.clipped_adam.ClippedAdam,
        optim.adagrad_rmsprop.AdagradRMSProp,
        optim.dct_adam.DCTAdam,
    ):
        assert isinstance(constructor([leaf]), torch.optim.Optimizer)


@pytest.mark.slow
def test_adam_does_not_import_the_compiler(fresh_python):
    """The first torch.optim.Adam of a process imports torch._dynamo, which takes seconds."""
    program = (
        "import sys, torch\n"
        "from fastsvi import optim\n"
        "from fastsvi.poutine.runtime import PARAM_STORE as store\n"
        "leaf = store.setdefault('x', torch.zeros(3)).unconstrained()\n"
        "leaf.grad = torch.ones(3)\n"
        "adam = optim.Adam({'lr': 0.1}); adam([leaf]); adam.get_state()\n"
        "options = {'optimizer': torch.optim.Adam, 'optim_args': {}, 'gamma': 0.5}\n"
        "optim.ExponentialLR(options)([leaf])\n"
        "assert abs(leaf[0].item() + 0.101) < 1e-6, leaf\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "assert 'triton' not in sys.modules\n"
    )
    done = fresh_python(program)
    assert done.returncode == 0, done.stderr


def test_foreign_tensors_are_served_too():
    foreign = torch.tensor([1.0, 2.0], requires_grad=True)
    foreign.grad = torch.tensor([3.0, -3.0])
    optimizer = optim.Adam({"lr": 0.1}, {"clip_value": 2.0})
    optimizer([foreign])
    torch.testing.assert_close(foreign.detach(), torch.tensor([0.9, 2.1]))
    assert foreign.grad.tolist() == [2.0, -2.0]  # clipped in place, as in Pyro
    assert isinstance(optimizer.optim_objs[foreign], torch.optim.Optimizer)
    with pytest.warns(FastSVIWarning, match="1 tensors is left out"):
        assert optimizer.get_state() == {}


def test_further_arguments_reach_a_torch_optimizer():
    leaf = leaf_of()
    calls = []
    optim.SGD({"lr": 0.1})([leaf], lambda: calls.append(1))
    assert calls == [1]


# --- optim_objs -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam", "SGD", "AdagradRMSProp"])
def test_optim_objs_are_torch_optimizers(name):
    leaf = leaf_of()
    optimizer = getattr(optim, name)({})
    assert leaf not in optimizer.optim_objs
    optimizer([leaf])
    assert list(optimizer.optim_objs) == [leaf]
    assert len(optimizer.optim_objs) == 1
    (single,) = optimizer.optim_objs.values()
    assert isinstance(single, torch.optim.Optimizer)
    assert single.param_groups[0]["params"][0] is leaf
    single.zero_grad(set_to_none=False)
    assert leaf.grad.abs().max() == 0
    single.zero_grad()
    assert leaf.grad is None
    with pytest.raises(MissingParamError, match="unconstrained leaf"):
        optimizer.optim_objs[torch.zeros(2)]


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_writing_a_learning_rate_takes_effect(name):
    leaf = leaf_of(value=[0.0])
    optimizer = getattr(optim, name)({"lr": 0.5})
    optimizer([leaf])
    for single in optimizer.optim_objs.values():
        for group in single.param_groups:
            group["lr"] = 0.25
    optimizer([leaf])
    # A constant gradient of 1 moves SGD and Adam by their learning rate.
    torch.testing.assert_close(leaf.detach(), torch.tensor([-0.75]))


def test_writing_a_bad_learning_rate_names_the_parameter():
    leaf = leaf_of()
    optimizer = optim.Adam({"lr": 0.5})
    optimizer([leaf])
    with pytest.raises(OptionError, match=r"'x'.*'lr' must not be negative.*-1"):
        optimizer.optim_objs[leaf].param_groups[0]["lr"] = -1.0


def test_a_single_leaf_can_be_stepped_alone():
    first, second = leaf_of("x", [0.0]), leaf_of("y", [0.0])
    optimizer = optim.Adam({"lr": 0.5})
    optimizer([first, second])
    optimizer.optim_objs[first].step()
    torch.testing.assert_close(first.item(), -1.0)
    torch.testing.assert_close(second.item(), -0.5)


def test_clipped_adam_shows_the_decayed_learning_rate():
    leaf = leaf_of()
    optimizer = optim.ClippedAdam({"lr": 1.0, "lrd": 0.5})
    for _ in range(3):
        optimizer([leaf])
    group = optimizer.optim_objs[leaf].param_groups[0]
    assert group["lr"] == 0.125
    before = leaf.detach().clone()
    group["lr"] = 0.2  # from here on it decays again
    optimizer([leaf])
    torch.testing.assert_close(before - leaf, torch.full((2,), 0.1))


# --- state and files ------------------------------------------------------------------------

RESUMABLE = {
    "adam": lambda: optim.Adam({"lr": 0.05}),
    "adamw_clip": lambda: optim.AdamW({"lr": 0.05, "weight_decay": 0.1}, {"clip_norm": 0.5}),
    "clipped": lambda: optim.ClippedAdam({"lr": 0.05, "lrd": 0.97}),
    "by_name": lambda: optim.Adam(lambda name: {"lr": 0.01 * len(name)}),
    "amsgrad": lambda: optim.Adam({"lr": 0.05, "amsgrad": True}),
    "sgd": lambda: optim.SGD({"lr": 0.001, "momentum": 0.9}),
    "adagrad": lambda: optim.Adagrad({"lr": 0.05}),
    "dct": lambda: optim.DCTAdam({"lr": 0.05}),
    "exponential": lambda: optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.9}
    ),
    "multi_step": lambda: optim.MultiStepLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "milestones": [10, 50]}
    ),
    "plateau": lambda: optim.ReduceLROnPlateau(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "patience": 1}
    ),
    "one_cycle": lambda: optim.OneCycleLR(
        {
            "optimizer": optim.clipped_adam.ClippedAdam,
            "optim_args": {"lr": 0.05, "lrd": 0.99},
            "max_lr": 0.1,
            "total_steps": 200,
        }
    ),
}


def schedule(step, optimizer, loss):
    if isinstance(optimizer, optim.PyroLRScheduler):
        is_plateau = "Plateau" in optimizer.pt_scheduler_constructor.__name__
        optimizer.step(*([loss] if is_plateau else []))


@pytest.mark.parametrize("make", RESUMABLE.values(), ids=RESUMABLE.keys())
def test_resume_is_exact(fit, make, tmp_path):
    """N steps equal N/2 steps, a file, and N/2 steps, bit for bit."""
    whole = fit("fastsvi")
    expected = whole.run(make(), 100, schedule)

    half = fit("fastsvi")
    optimizer = make()
    half.run(optimizer, 50, schedule)
    half.store.save(tmp_path / "params")
    optimizer.save(tmp_path / "optimizer")
    half.run(optimizer, 7, schedule)  # must not reach what is in the file

    rest = fit("fastsvi")
    rest.store.load(tmp_path / "params")
    rest.step_count = 50
    optimizer = make()
    optimizer.load(tmp_path / "optimizer")
    actual = rest.run(optimizer, 50, schedule)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_state_waits_for_its_parameter():
    leaf = leaf_of()
    optimizer = optim.Adam({"lr": 0.1})
    for _ in range(3):
        optimizer([leaf])
    state = optimizer.get_state()
    fresh = optim.Adam({"lr": 0.1})
    fresh.set_state({**state, "y": state["x"]})
    assert fresh.get_state().keys() == {"x", "y"}  # saving again loses nothing
    fresh([leaf])
    assert fresh.get_state()["x"]["state"][0]["step"] == 4
    assert fresh.get_state()["y"]["state"][0]["step"] == 3


def test_state_is_applied_to_parameters_already_seen():
    leaf = leaf_of()
    optimizer = optim.Adam({"lr": 0.1})
    optimizer([leaf])
    state = optimizer.get_state()
    value = leaf.detach().clone()
    for _ in range(5):
        optimizer([leaf])
    after_six = leaf.detach().clone()
    with torch.no_grad():
        leaf.copy_(value)
    optimizer.set_state(state)
    for _ in range(5):
        optimizer([leaf])
    assert torch.equal(leaf, after_six)


def test_cohorts_are_joined_again_after_loading():
    leaves = [leaf_of(name) for name in "xyz"]
    optimizer = optim.Adam({"lr": 0.1})
    optimizer(leaves)
    state = optimizer.get_state()
    fresh = optim.Adam({"lr": 0.1})
    fresh.set_state(state)
    fresh(leaves)
    assert len(fresh._home[leaves[0]]._runs) == 1


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_get_state_is_a_copy(name):
    leaf = leaf_of()
    optimizer = getattr(optim, name)({"lr": 0.1} if name == "Adam" else {"lr": 0.1, "momentum": 1})
    optimizer([leaf])
    state = optimizer.get_state()
    (key,) = {"exp_avg", "momentum_buffer"} & state["x"]["state"][0].keys()
    saved = state["x"]["state"][0][key].clone()
    optimizer([leaf])
    assert torch.equal(state["x"]["state"][0][key], saved)


def test_a_state_of_another_shape_is_refused():
    leaf = leaf_of()
    optimizer = optim.Adam({"lr": 0.1})
    optimizer([leaf])
    state = optimizer.get_state()
    STORE.clear()
    leaf = leaf_of(value=[1.0, 2.0, 3.0])
    fresh = optim.Adam({"lr": 0.1})
    with pytest.raises(ShapeError, match=r"'x': exp_avg has shape \(2,\).*\(3,\)"):
        fresh.set_state(state)
    fresh([leaf])
    assert fresh.get_state()["x"]["state"][0]["step"] == 1


def test_a_malformed_state_changes_nothing():
    leaf = leaf_of()
    optimizer = optim.Adam({"lr": 0.1})
    optimizer([leaf])
    good = optimizer.get_state()
    optimizer([leaf])
    with pytest.raises(CheckpointError, match="'y' is dict"):
        optimizer.set_state({**good, "y": {"momentum": 3}})
    assert optimizer.get_state()["x"]["state"][0]["step"] == 2


def test_states_with_and_without_a_scheduler_do_not_mix():
    leaf = leaf_of()
    plain = optim.Adam({"lr": 0.1})
    scheduled = optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
    )
    for optimizer, other in ((plain, scheduled), (scheduled, plain)):
        optimizer([leaf])
        with pytest.raises(CheckpointError, match="learning rate scheduler"):
            other.set_state(optimizer.get_state())


def test_files_hold_json_and_tensors(tmp_path):
    leaf = leaf_of()
    optimizer = optim.Adam({"lr": 0.1})
    optimizer([leaf])
    optimizer.save(tmp_path / "state")
    tensors, header = checkpoint.read(tmp_path / "state")
    assert tensors["optimizer/x/state/0/exp_avg"].shape == (2,)
    assert json.loads(json.dumps(header))["optimizer"]["x"]["param_groups"][0]["lr"] == 0.1


def test_map_location_moves_tensors(tmp_path):
    leaf = leaf_of()
    optimizer = optim.Adam({"lr": 0.1})
    optimizer([leaf])
    optimizer.save(tmp_path / "state")
    STORE.clear()  # so that the state waits where it was moved to
    fresh = optim.Adam({"lr": 0.1})
    fresh.load(tmp_path / "state", map_location="meta")
    assert fresh.get_state()["x"]["state"][0]["exp_avg"].device.type == "meta"


def test_other_files_are_refused(tmp_path):
    checkpoint.write(tmp_path / "params", {}, {"params": {}})
    with pytest.raises(CheckpointError, match="no optimizer state"):
        optim.Adam({}).load(tmp_path / "params")
    torch.save({"x": 1}, tmp_path / "pickle")
    with pytest.raises(CheckpointError):
        optim.Adam({}).load(tmp_path / "pickle")
    with pytest.raises(FileNotFoundError):
        optim.Adam({}).load(tmp_path / "nothing")


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"'lr' must not be negative.*-1"),
        ({"lr": "big"}, r"'lr'.*wrong type.*'big'"),
        ({"betas": (0.9, 1.5)}, r"'betas' must be two numbers in \[0, 1\)"),
        ({"betas": 0.9}, r"'betas'.*wrong type"),
        ({"learning_rate": 0.1}, r"Adam has no option 'learning_rate'"),
        ({"beta": (0.9, 0.99)}, r"did you mean 'betas'"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(OptionError, match=message):
        optim.Adam(options)


def test_bad_options_of_one_parameter_name_it():
    leaf, other = leaf_of("x"), leaf_of("net$$$y")
    optimizer = optim.Adam(lambda name: {"lr": -0.1} if name == "net.y" else {"lr": 0.1})
    with pytest.raises(OptionError, match=r"'net\$\$\$y'.*'lr'"):
        optimizer([leaf, other])


@pytest.mark.parametrize("name", ["Adam", "SGD", "DCTAdam"])
def test_options_must_be_a_dict_or_a_function(name):
    for bad in (0.01, [("lr", 0.01)], "lr=0.01"):
        with pytest.raises(DtypeError, match="optim_args must be a dict"):
            getattr(optim, name)(bad)


def test_a_function_must_return_a_dict():
    leaf = leaf_of()
    with pytest.raises(DtypeError, match=r"optim_args for parameter 'x' returned float 0\.1"):
        optim.Adam(lambda name: 0.1)([leaf])


def test_a_function_needs_a_name():
    with pytest.raises(OptionError, match="not in the param store"):
        optim.Adam(lambda name: {})([torch.zeros(1, requires_grad=True)])


@pytest.mark.parametrize("clips", [{"clip": 1.0}, {"clip_norm": -1.0}])
def test_bad_clipping_is_refused(clips):
    with pytest.raises(OptionError, match="clip_args"):
        optim.Adam({}, clips)


def test_what_torch_refuses_names_the_parameter():
    leaf = leaf_of()
    with pytest.raises(OptionError, match=r"SGD refuses parameter 'x'.*Nesterov"):
        optim.SGD({"lr": 0.1, "nesterov": True})([leaf])


def test_params_must_be_leaves():
    value = STORE.setdefault("scale", torch.ones(2), constraints.positive)
    optimizer = optim.Adam({})
    with pytest.raises(DtypeError, match=r"value\.unconstrained\(\)"):
        optimizer([value])
    with pytest.raises(DtypeError, match="iterable of unconstrained leaves"):
        optimizer(value.unconstrained())
    with pytest.raises(DtypeError, match=r"found float 0\.5"):
        optimizer(0.5)
    with pytest.raises(DtypeError, match="found str 'x' among them"):
        optimizer(["x"])
    assert len(optimizer.optim_objs) == 0


def test_schedulers_name_what_is_missing():
    with pytest.raises(OptionError, match="StepLR: option 'optimizer' is missing"):
        optim.StepLR({"step_size": 3})
    with pytest.raises(DtypeError, match="StepLR takes a dict"):
        optim.StepLR(lambda name: {})
    options = {"optimizer": torch.optim.Adam, "optim_args": {}}
    scheduler = optim.StepLR(options)
    with pytest.raises(OptionError, match="StepLR refuses its options"):
        scheduler([leaf_of()])
    assert options.keys() == {"optimizer", "optim_args"}  # Pyro empties the caller's dict
