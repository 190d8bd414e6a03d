"""The primitives, and what ``import fastsvi`` gives and loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyro as pyro_ppl
import pytest
import torch
from torch.distributions import constraints

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import poutine, settings
from fastsvi.errors import (
    ConstraintError,
    DtypeError,
    FastSVIError,
    MissingParamError,
    ShapeError,
    SiteError,
)
from fastsvi.poutine.runtime import STACK


@pytest.fixture(params=["fastsvi", "pyro"])
def lib(request):
    module = {"fastsvi": pyro, "pyro": pyro_ppl}[request.param]
    return SimpleNamespace(pyro=module, dist=module.distributions, poutine=module.poutine)


# ---- sample ----


def test_sample_without_handlers(lib):
    torch.manual_seed(0)
    x = lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0))
    torch.manual_seed(0)
    assert torch.equal(x, lib.dist.Normal(0.0, 1.0)())
    assert lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0), [2]).shape == (2,)
    assert lib.pyro.sample("x", lambda a, b: a + b, 1, b=2) == 3


def test_observing_outside_of_inference(lib):
    obs = torch.tensor(1.0)
    with pytest.warns(RuntimeWarning, match="trying to observe a value outside of inference at x"):
        assert lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0), obs=obs) is obs


def test_deterministic_outside_of_inference_does_not_warn(lib):
    assert lib.pyro.deterministic("x", torch.tensor(1.0)) == 1.0


def test_infer_is_copied_and_may_say_observed(lib):
    infer = {"is_observed": False, "note": 1}
    value = torch.tensor(1.0)
    with lib.poutine.trace() as tracer:
        lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0), obs=value, infer=infer)
    site = tracer.trace.nodes["x"]
    assert site["value"] is value
    assert not site["is_observed"]
    assert site["infer"] == {"note": 1}
    assert infer == {"is_observed": False, "note": 1}


@pytest.mark.parametrize("name", [3, None, dist.Normal(0.0, 1.0)])
@pytest.mark.parametrize("primitive", ["sample", "param", "module", "plate"])
def test_names_must_be_strings(primitive, name):
    with pytest.raises(DtypeError, match=rf"{primitive}.*string"):
        getattr(pyro, primitive)(name, None)


def test_subclasses_of_str_are_names():
    class Name(str):
        pass

    assert pyro.sample(Name("x"), dist.Delta(torch.tensor(1.0))) == 1.0


@pytest.mark.parametrize("handled", [True, False])
def test_sampling_from_something_else(handled):
    def run():
        pyro.sample("x", torch.distributions.Normal(0.0, 1.0))

    with pytest.raises(DtypeError, match=r"'x'.*fastsvi\.distributions\.Normal"):
        (poutine.block(run) if handled else run)()
    with pytest.raises(DtypeError, match=r"'x'.*float 0.5.*give a distribution"):
        pyro.sample("x", 0.5)


def test_obs_mask_sites_and_density():
    mask = torch.tensor([True, False, True])
    data = torch.tensor([1.0, float("nan"), 3.0])

    def model():
        with pyro.plate("data", 3):
            return pyro.sample(
                "x", dist.Normal(0.0, 1.0), obs=data, obs_mask=mask, infer={"note": 1}
            )

    with pyro.validation_enabled(False):  # NaN lies outside of the support
        trace = poutine.trace(model).get_trace()
        log_prob = trace.log_prob_sum()
    value = trace.nodes["_RETURN"]["value"]
    assert torch.equal(value[mask], data[mask])
    assert torch.isfinite(value).all()
    assert trace.stochastic_nodes == ["data", "x_unobserved"]
    assert trace.nodes["x_unobserved"]["infer"] == {"note": 1}
    torch.testing.assert_close(log_prob, dist.Normal(0.0, 1.0).log_prob(value).sum())


def test_obs_mask_takes_bools_and_numbers():
    for mask, same in ((True, True), (False, False)):
        with poutine.trace():
            assert (pyro.sample("x", dist.Normal(0.0, 1.0), obs=9.5, obs_mask=mask) == 9.5) == same


def test_obs_mask_of_the_wrong_shape(lib):
    mask = torch.ones(4, dtype=torch.bool)
    with lib.poutine.trace(), pytest.raises(ValueError, match="obs_mask"):
        lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0).expand([3]), obs_mask=mask)


def test_deterministic_takes_numbers():
    with poutine.trace() as tracer:
        pyro.deterministic("x", 2.5)
        pyro.deterministic("y", torch.zeros(2, 3), event_dim=1)
    assert tracer.trace.nodes["x"]["value"] == 2.5
    assert tracer.trace.nodes["y"]["fn"].event_shape == (3,)
    assert tracer.trace.log_prob_sum() == 0.0


@pytest.mark.parametrize("value", [-1.5, torch.tensor(-1.5), torch.tensor([-1.0, -0.5])])
def test_factor(value):
    with poutine.trace() as tracer:
        pyro.factor("f", value)
        pyro.factor("g", 0.0, has_rsample=True)
    assert tracer.trace.log_prob_sum() == -1.5
    assert tracer.trace.nodes["g"]["fn"].has_rsample
    assert tracer.trace.nodes["f"]["infer"]["is_auxiliary"]


def test_barrier(lib):
    x = torch.ones(2)
    assert lib.pyro.barrier(x) is x
    with lib.poutine.block():
        assert lib.pyro.barrier(x) is x


# ---- params ----


@pytest.mark.parametrize("handled", [True, False])
def test_param(lib, handled):
    def model():
        return lib.pyro.param("p", torch.tensor(2.0), constraint=constraints.positive)

    value = (lib.poutine.trace(model) if handled else model)()
    torch.testing.assert_close(value.detach(), torch.tensor(2.0))
    leaf = value.unconstrained()
    assert leaf.is_leaf
    torch.testing.assert_close(leaf.detach(), torch.tensor(2.0).log())
    assert lib.pyro.param("p").unconstrained() is leaf
    assert list(lib.pyro.get_param_store()) == ["p"]
    lib.pyro.clear_param_store()
    assert "p" not in lib.pyro.get_param_store()


def test_param_is_made_lazily():
    calls = []

    def init():
        calls.append(1)
        return torch.zeros(2)

    for _ in range(3):
        pyro.param("p", init)
    assert calls == [1]


def test_param_errors_leave_the_store_alone():
    with pytest.raises(MissingParamError, match="nowhere"):
        pyro.param("nowhere")
    with pytest.raises(ConstraintError, match="'p'"):
        pyro.param("p", torch.tensor(-1.0), constraint=constraints.positive)
    with pytest.raises(FastSVIError, match="'p'"):
        pyro.param("p", 3)
    assert not pyro.get_param_store()


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("handled", [True, False])
def test_param_made_inside_of_vmap(lazy, handled):
    def model(x):
        return pyro.param("p", (lambda: x * 2) if lazy else x * 2)

    model = poutine.block(model) if handled else model
    with pytest.raises(FastSVIError, match=r"'p'.*vmap"):
        torch.func.vmap(model)(torch.arange(3.0))
    assert "p" not in pyro.get_param_store()
    assert STACK == []


def test_existing_param_inside_of_vmap():
    pyro.param("p", torch.tensor(2.0))
    result = torch.func.vmap(lambda x: x * pyro.param("p"))(torch.arange(3.0))
    assert result.tolist() == [0.0, 2.0, 4.0]


# ---- modules ----


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(2, 1)


def test_module_registers_its_parameters(lib):
    net = linear()
    assert lib.pyro.module("net", net) is net
    assert sorted(lib.pyro.get_param_store()) == ["net$$$bias", "net$$$weight"]
    assert lib.pyro.param("net$$$weight") is net.weight


@pytest.mark.parametrize("update", [True, False])
def test_second_module_of_a_name(lib, update):
    first, second = linear(), torch.nn.Linear(2, 1)
    lib.pyro.module("net", first)
    own = second.weight
    lib.pyro.module("net", second, update_module_params=update)
    assert second.weight is (first.weight if update else own)


def test_update_reaches_submodules_and_tied_weights():
    def tied():
        a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        b.weight = a.weight
        return torch.nn.Sequential(torch.nn.Sequential(a), b)

    first, second = tied(), tied()
    pyro.module("net", first)
    pyro.module("net", second, update_module_params=True)
    assert second[0][0].weight is first[0][0].weight
    assert second[1].weight is first[0][0].weight
    assert len(pyro.get_param_store()) == 3


def test_frozen_parameters_and_buffers():
    net = torch.nn.BatchNorm1d(2)
    net.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"weight.*requires_grad=False"):
        pyro.module("net", net)
    assert list(pyro.get_param_store()) == ["net$$$bias"]
    net.train(False)
    pyro.module("net", net)  # no warning


def test_module_errors():
    with pytest.raises(SiteError, match="reserved"):
        pyro.module("a$$$b", linear())
    with pytest.raises(DtypeError, match="instance"):
        pyro.module("net", torch.nn.Linear)
    with pytest.raises(DtypeError, match=r"torch.nn.Module"):
        pyro.module("net", 3)


def test_random_module(lib):
    net = linear()
    prior = {"weight": lib.dist.Normal(torch.zeros(1, 2), 1.0).to_event(2)}
    with pytest.warns(FutureWarning, match="random_module"):
        draw = lib.pyro.random_module("net", net, prior)
    with lib.poutine.trace() as tracer:
        sampled = draw()
    assert sampled is not net
    assert sampled.weight is tracer.trace.nodes["net$$$weight"]["value"]
    assert tracer.trace.nodes["net$$$weight"]["type"] == "sample"
    assert tracer.trace.nodes["net$$$bias"]["type"] == "param"
    assert sampled(torch.ones(2)).shape == (1,)


# ---- validation ----


def test_enable_validation():
    assert settings.get("validate") == "first"
    pyro.enable_validation(True)
    try:
        assert poutine.is_validation_enabled()
        assert dist.is_validation_enabled()
        pyro.enable_validation(False)
        assert settings.get("validate") == "never"
        assert not dist.is_validation_enabled()
    finally:
        settings.set(validate="first")
        dist.enable_validation(True)


def test_validation_enabled_restores_both_switches():
    before = settings.get("validate"), dist.is_validation_enabled()
    with pyro.validation_enabled(False):
        assert not poutine.is_validation_enabled()
        assert not dist.is_validation_enabled()
    with pytest.raises(KeyError), pyro.validation_enabled(False):
        raise KeyError
    assert (settings.get("validate"), dist.is_validation_enabled()) == before


# ---- the seed programs: an introduction to Pyro, and its module tutorial ----


def scale(mu):
    weight = pyro.sample("weight", dist.Normal(mu, 1.0))
    return pyro.sample("measurement", dist.Normal(weight, 0.75))


def test_weighing_scale():
    conditioned_scale = pyro.condition(scale, data={"measurement": 9.5})
    assert conditioned_scale(8.5) == 9.5

    from fastsvi.poutine.trace_messenger import TraceMessenger

    with TraceMessenger() as tracer:
        conditioned_scale(8.5)
    logp, printed = 0.0, []
    for name, node in tracer.trace.nodes.items():
        printed.append(" ".join(map(str, (name, node["fn"], node["value"], node["is_observed"]))))
        if node["type"] == "sample":
            logp = logp + node["fn"].log_prob(node["value"]).sum()
    weight = tracer.trace.nodes["weight"]["value"]
    expected = dist.Normal(8.5, 1.0).log_prob(weight) + dist.Normal(weight, 0.75).log_prob(
        torch.tensor(9.5)
    )
    torch.testing.assert_close(logp, expected)
    assert printed[0].startswith("weight Normal(loc: 8.5, scale: 1.0) tensor(")
    assert printed[0].endswith(" False")
    assert printed[1].startswith("measurement Normal(loc: ")
    assert printed[1].endswith(", scale: 0.75) 9.5 True")

    def deferred_conditioned_scale(measurement, mu):
        return pyro.condition(scale, data={"measurement": measurement})(mu)

    assert deferred_conditioned_scale(9.5, 8.5) == 9.5


def test_gradient_descent_by_hand():
    """Params captured by a trace, as in the introduction's last section."""

    def guide(mu):
        a = pyro.param("a", torch.tensor(mu))
        b = pyro.param("b", torch.tensor(1.0))
        return pyro.sample("weight", dist.Normal(a, torch.abs(b)))

    with poutine.trace(param_only=True) as param_capture:
        guide(8.5).backward()
    params = [site["value"].unconstrained() for site in param_capture.trace.nodes.values()]
    assert [p.grad is not None for p in params] == [True, True]
    for x in params:
        x.data = x.data - 0.1 * x.grad
    torch.testing.assert_close(pyro.param("a").detach(), torch.tensor(8.4))


# ---- the package ----


HEAVY = ("triton", "tqdm", "safetensors", "matplotlib", "torch._inductor", "torch._dynamo", "scipy")


def test_import_is_light(fresh_python):
    done = fresh_python(
        "import json, sys, torch; before = set(sys.modules); import fastsvi;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    loaded = json.loads(done.stdout)
    assert "fastsvi.primitives" in loaded
    assert [name for name in loaded if name.startswith(HEAVY)] == []
    assert "fastsvi.infer" not in loaded


@pytest.mark.slow
def test_import_takes_little_longer_than_torch():
    """CPU seconds, less noisy than the clock on a shared machine; the best of three processes."""
    code = (
        "from time import process_time as now; a = now(); import torch; b = now(); import fastsvi;"
        "c = now(); print((c - a) / (b - a))"
    )
    command = [sys.executable, "-c", code]
    ratios = (
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    )
    assert any(ratio <= 1.3 for ratio in ratios)


def test_lazy_submodules(fresh_python):
    code = (
        "import fastsvi as pyro; assert 'errors' in dir(pyro);"
        "print(pyro.errors.SiteError.__name__, pyro.params.ParamStore.__name__,"
        "pyro.distributions.Normal.__name__)"
    )
    assert fresh_python(code).stdout.split() == ["SiteError", "ParamStore", "Normal"]


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pyro.nothing  # noqa: B018


def test_exports_those_of_pyro():
    missing = set(pyro_ppl.__all__) - set(dir(pyro))
    assert missing <= {"render_model"}
    assert set(pyro.__all__) <= set(dir(pyro))


def test_version_is_that_of_the_project():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'\nversion = "{pyro.__version__}"\n' in project


def test_shape_error_is_a_value_error():
    """Pyro programs catch ValueError."""
    fn = dist.Normal(torch.zeros(3), 1.0)
    what = "shape mismatch at site 'x'"
    with pyro.plate("a", 2), pytest.raises(ValueError, match=what) as caught:
        pyro.sample("x", fn)
    assert isinstance(caught.value, ShapeError)
