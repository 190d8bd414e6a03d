"""Same numbers as pyro.optim, step for step, on a fit whose parameters come and go."""

from __future__ import annotations

import copy

import pytest
import torch


def by_name(name):
    return {"lr": 0.05 if "scale" in name else 0.02, "betas": (0.8, 0.99)}


def by_module(module_name, param_name):
    return {"lr": 0.05 if (module_name, param_name) == ("net", "scale") else 0.02}


def clip_by_module(module_name, param_name):
    return {"clip_norm": 0.5} if module_name == "net" else {"clip_value": 0.3}


ADAMS = {
    "adam": lambda o: o.Adam({"lr": 0.05}),
    "adam_defaults": lambda o: o.Adam({}),
    "adam_betas_eps": lambda o: o.Adam({"lr": 0.05, "betas": (0.7, 0.9), "eps": 1e-3}),
    "adam_no_momentum": lambda o: o.Adam({"lr": 0.05, "betas": (0.0, 0.0), "eps": 1e-2}),
    "adam_weight_decay": lambda o: o.Adam({"lr": 0.05, "weight_decay": 0.1}),
    "adamw": lambda o: o.AdamW({"lr": 0.05, "weight_decay": 0.2}),
    "amsgrad": lambda o: o.Adam({"lr": 0.05, "amsgrad": True}),
    "by_name": lambda o: o.Adam(by_name),
    "by_module": lambda o: o.Adam(by_module),
    "clip_norm": lambda o: o.Adam({"lr": 0.05}, {"clip_norm": 0.5}),
    "clip_value": lambda o: o.Adam({"lr": 0.05}, {"clip_value": 0.3}),
    "clip_both": lambda o: o.Adam({"lr": 0.05}, {"clip_norm": 0.7, "clip_value": 0.3}),
    "clip_by_module": lambda o: o.Adam({"lr": 0.05}, clip_by_module),
    "clipped_adam": lambda o: o.ClippedAdam({"lr": 0.05, "lrd": 0.99, "clip_norm": 0.5}),
    "clipped_adam_eps": lambda o: o.ClippedAdam({"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}),
    "clipped_adam_centered": lambda o: o.ClippedAdam({"lr": 0.05, "centered_variance": True}),
}

OTHERS = {
    "sgd": lambda o: o.SGD({"lr": 0.001, "momentum": 0.9}),
    "sgd_clip": lambda o: o.SGD({"lr": 0.01}, {"clip_norm": 0.5, "clip_value": 0.2}),
    "sgd_by_name": lambda o: o.SGD(lambda name: {"lr": 0.01 if "rare" in name else 0.001}),
    "rmsprop": lambda o: o.RMSprop({"lr": 0.01, "centered": True}),
    "adagrad": lambda o: o.Adagrad({"lr": 0.1, "lr_decay": 0.01}),
    "adadelta": lambda o: o.Adadelta({"lr": 1.0}),
    "adamax": lambda o: o.Adamax({"lr": 0.05}),
    "nadam": lambda o: o.NAdam({"lr": 0.05}),
    "radam": lambda o: o.RAdam({"lr": 0.05}),
    "asgd": lambda o: o.ASGD({"lr": 0.001}),
    "rprop": lambda o: o.Rprop({"lr": 0.01}),
    "adafactor": lambda o: o.Adafactor({"lr": 0.01}),
    "adagrad_rmsprop": lambda o: o.AdagradRMSProp({"eta": 0.5, "t": 0.2}),
    "dct_adam": lambda o: o.DCTAdam({"lr": 0.05, "lrd": 0.99}),
    "partial": lambda o: o.PyroOptim(_make_sgd, {"lr": 0.001}),
}


def _make_sgd(params, lr):
    return torch.optim.SGD(params, lr=lr, nesterov=True, momentum=0.5)


@pytest.mark.parametrize("make", ADAMS.values(), ids=ADAMS.keys())
def test_adam_family(assert_same_fit, make):
    assert_same_fit(make)


@pytest.mark.parametrize("name", ["adam", "clip_norm", "clipped_adam", "by_name"])
def test_gradients_bound_to_the_flat_one(assert_same_fit, name):
    assert_same_fit(ADAMS[name], bound=True)


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_other_optimizers(assert_same_fit, make):
    assert_same_fit(make, num_steps=80)


def options(**scheduler):
    return {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, **scheduler}


SCHEDULERS = {
    "exponential": lambda o: o.ExponentialLR(options(gamma=0.9)),
    "step": lambda o: o.StepLR(options(step_size=3, gamma=0.5)),
    "multi_step": lambda o: o.MultiStepLR(options(milestones=[2, 5], gamma=0.1)),
    "lambda": lambda o: o.LambdaLR(options(lr_lambda=lambda epoch: 0.9**epoch)),
    "one_cycle": lambda o: o.OneCycleLR(options(max_lr=0.2, total_steps=40)),
    "cosine": lambda o: o.CosineAnnealingWarmRestarts(options(T_0=4)),
    "sgd": lambda o: o.ExponentialLR(
        {
            "optimizer": torch.optim.SGD,
            "optim_args": {"lr": 0.001, "momentum": 0.9},
            "gamma": 0.9,
        }
    ),
    "by_name_clipped": lambda o: o.ExponentialLR(
        {"optimizer": torch.optim.AdamW, "optim_args": by_name, "gamma": 0.9}, {"clip_norm": 1.0}
    ),
    "clipped_adam": lambda o: o.ExponentialLR(
        {
            "optimizer": o.clipped_adam.ClippedAdam,
            "optim_args": {"lr": 0.05, "lrd": 0.995},
            "gamma": 0.9,
        }
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers(assert_same_fit, make):
    def after(step, scheduler, loss):
        if step % 5 == 0:
            scheduler.step()

    assert_same_fit(make, num_steps=150, after=after)


def test_reduce_on_plateau(assert_same_fit):
    rates = {}

    def make(optim):
        rates[optim.__name__] = seen = []
        scheduler = optim.ReduceLROnPlateau(options(factor=0.5, patience=1))
        scheduler.seen = seen
        return scheduler

    def after(step, scheduler, loss):
        if step % 5 == 0:
            scheduler.step(loss)
            objects = list(scheduler.optim_objs.values())
            scheduler.seen.append([o.optimizer.param_groups[0]["lr"] for o in objects])

    assert_same_fit(make, num_steps=150, after=after)
    ours, theirs = rates["fastsvi.optim"], rates["pyro.optim"]
    assert [sorted(row) for row in ours] == [sorted(row) for row in theirs]
    assert min(ours[-1]) < 0.05  # it did reduce


def test_resuming_from_pyros_state(fit):
    """A Pyro optimizer's state dicts mean the same here."""
    reference = fit("pyro")
    theirs = reference.optim.Adam({"lr": 0.05})
    reference.run(theirs, 30)
    start, state = reference.values(), copy.deepcopy(theirs.get_state())
    expected = reference.run(theirs, 30)

    ours = fit("fastsvi")
    ours.step_count = 30
    ours.loss()
    for step in (10, 31):  # makes all parameters
        ours.step_count = step
        ours.loss()
    for name, value in start.items():
        ours.store.leaf(name).data.copy_(value)
    ours.step_count = 30
    optimizer = ours.optim.Adam({"lr": 0.7})  # the saved rate wins, as in torch
    optimizer.set_state(state)
    actual = ours.run(optimizer, 30)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-10)
