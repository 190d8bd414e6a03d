"""What a PyroModule refuses, and that it is as before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.errors import ConstraintError, DtypeError, FastSVIWarning, ShapeError, SiteError
from fastsvi.nn import PyroModule, PyroModuleList, PyroParam, PyroSample, pyro_method
from fastsvi.nn.module import clear, to_pyro_module_

STORE = pyro.get_param_store()
X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("prior", "found"),
    [
        (0.5, r"float 0\.5"),
        (dist.Normal, "Normal"),
        (lambda: dist.Normal(0.0, 1.0), "a function of 0 arguments"),
        (lambda self, x: dist.Normal(0.0, 1.0), "self, x"),
        (torch.zeros(2), r"tensor of shape \(2,\)"),
    ],
)
def test_a_prior_must_be_a_distribution(prior, found):
    with pytest.raises(DtypeError, match=rf"PyroSample takes a distribution.*{found}"):
        PyroSample(prior)


def test_a_prior_function_must_return_a_distribution():
    model = PyroModule()
    model.z = PyroSample(lambda self: 0.5)
    for read in (lambda: model.z, pyro_method(lambda self: self.z).__get__(model)):
        with pytest.raises(DtypeError, match=r"'z' of PyroModule returned float 0\.5"):
            read()


@pytest.mark.parametrize(
    ("declared", "error", "message"),
    [
        (PyroParam(torch.tensor(-1.0), constraints.positive), ConstraintError, r"'x'.*-1"),
        (PyroParam(torch.tensor(1)), DtypeError, "'x'.*int64"),
        (PyroParam(0.5), DtypeError, r"'x'.*float 0\.5"),
        (PyroParam(lambda: "no"), DtypeError, "'x'.*str 'no'"),
        (PyroParam(None), DtypeError, "'x' has no initial value"),
        (PyroParam(torch.ones(2), "positive"), DtypeError, "'x' has constraint str 'positive'"),
        (PyroParam(torch.ones(2), constraints.greater_than), DtypeError, "'x' has constraint"),
        (PyroParam(torch.ones(2), constraints.boolean), NotImplementedError, "'x'"),
        (PyroParam(torch.ones(2), constraints.corr_cholesky), ShapeError, "'x'"),
    ],
)
@pytest.mark.parametrize("active", [False, True])
def test_a_bad_parameter_changes_nothing(declared, error, message, active):
    model = PyroModule()
    model.x = PyroParam(torch.full((2,), 3.0), constraints.positive)
    model.forward = lambda: setattr(model, "x", declared)
    if active:
        pyro_method(lambda self: self.x)(model)  # the store knows it
    with pytest.raises(error, match=message):
        model() if active else setattr(model, "x", declared)
    torch.testing.assert_close(model.x.detach(), torch.full((2,), 3.0))
    assert list(STORE) == (["x"] if active else [])


def test_a_bad_value_changes_nothing():
    model = PyroModule()
    model.x = PyroParam(torch.ones(2), constraints.positive)
    with pytest.raises(ConstraintError, match="'x'"):
        model.x = torch.tensor([1.0, -1.0])
    assert torch.equal(model.x, torch.ones(2))


@pytest.mark.parametrize("value", [PyroParam(torch.ones(2)), PyroModule(), nn.Parameter(X)])
def test_attributes_need_the_constructor(value):
    class Model(PyroModule):
        def __init__(self):
            self.x = value

    with pytest.raises(AttributeError, match=r"'x' of Model before super\(\)\.__init__\(\)"):
        Model()


def test_modules_are_put_together_before_they_are_called():
    child = PyroModule()
    child.inner = PyroModule[nn.Linear](1, 1)
    child.forward = lambda: child.inner.weight
    child()
    root = PyroModule()
    with pytest.raises(SiteError, match=r"PyroLinear was called before it became 'child\.inner'"):
        root.child = child


def test_two_modules_of_one_name_with_other_shapes():
    first, second = PyroModule(), PyroModule()
    for module, size in ((first, 2), (second, 3)):
        module.x = PyroParam(torch.ones(size), constraints.positive)
        module.forward = pyro_method(lambda self: self.x).__get__(module)
    first()
    with pytest.warns(FastSVIWarning, match=r"'x'.*\(2,\).*\(3,\).*clear_param_store"):
        assert second().shape == (2,)


def test_full_names_need_a_call():
    with pytest.raises(SiteError, match="'x' of PyroModule is not known"):
        PyroModule()._pyro_get_fullname("x")


def test_only_modules_are_converted():
    with pytest.raises(DtypeError, match=r"to_pyro_module_ takes an nn\.Module, found int 3"):
        to_pyro_module_(3)
    with pytest.raises(DtypeError, match="clear takes a PyroModule"):
        clear(nn.Linear(1, 1))
    with pytest.raises(DtypeError, match=r"takes a class of nn\.Module.*to_pyro_module_"):
        PyroModule[nn.Linear(1, 1)]
    with pytest.raises(SiteError, match="has an initial value"):
        PyroParam(torch.ones(2))(lambda self: torch.ones(2))


def test_a_parameter_cannot_be_shared_by_a_class():
    class Shared(PyroModule):
        x = PyroParam(torch.ones(2))

    with pytest.raises(SiteError, match="as a class attribute"):
        Shared().x  # noqa: B018


def test_missing_attributes_are_attribute_errors():
    with pytest.raises(AttributeError, match="nothing"):
        PyroModule().nothing  # noqa: B018
    assert not hasattr(PyroModuleList([]), "nothing")
