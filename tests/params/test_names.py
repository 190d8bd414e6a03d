"""Names of a module's parameters, against Pyro's functions."""

from __future__ import annotations

import pytest
from pyro.params import param_store as theirs

from fastsvi.params import names as ours


@pytest.mark.parametrize("name", ["x", "m$$$x", "m$$$a.b.x", "$$$x", "m$$$", "a$$$b$$$c", "a$$b"])
def test_names_are_taken_apart_as_in_pyro(name):
    for function in (
        "module_from_param_with_module_name",
        "user_param_name",
        "normalize_param_name",
    ):
        assert getattr(ours, function)(name) == getattr(theirs, function)(name)


def test_names_are_put_together_as_in_pyro():
    assert ours.param_with_module_name("m", "a.b") == theirs.param_with_module_name("m", "a.b")
