"""Arguments of many fits: own slices and shared ones."""

from __future__ import annotations

import pytest
import torch

from fastsvi.errors import ConstraintError, ShapeError
from fastsvi.infer.fit_data import FitData

x = torch.arange(24.0).view(4, 2, 3)


def test_slices_along_any_dimension():
    for dim in (0, 1, 2, -1, -3):
        count = x.shape[dim]
        data = FitData((x, 0.5), {}, (dim, None), count)
        for fit in range(count):
            own, shared = data.of(fit).args
            assert torch.equal(own, x.select(dim, fit))
            assert shared == 0.5
        assert data.slices()[0].is_contiguous()


def test_containers_and_keyword_arguments():
    data = FitData((), {"b": {"p": x, "q": x + 1}, "a": x[0]}, {"b": 0}, 4)
    _, kwargs = data.of(2).args, data.of(2).kwargs
    assert torch.equal(kwargs["b"]["q"], x[2] + 1)
    assert kwargs["a"].shape == (2, 3)
    assert len(data.own) == 2


def test_without_fit_dims_everything_is_shared():
    data = FitData((x,), {"k": x}, None, 7)
    assert data.own == ()
    assert data.of(6).args[0] is x


@pytest.mark.parametrize(
    ("args", "kwargs", "fit_dims", "error", "message"),
    [
        ((x,), {}, (0,), ShapeError, r"argument 0 has shape \(4, 2, 3\).*num_fits=5"),
        ((x,), {}, (3,), ShapeError, "dimension 3 of argument 0 counts the fits"),
        ((0.5,), {}, (0,), ShapeError, "dimension 0 of argument 0.*0.5"),
        ((x, x), {}, (0,), ConstraintError, "1 entries for 2 positional arguments"),
        ((), {"a": x}, {"b": 0}, ConstraintError, r"names \['b'\].*it has \['a'\]"),
    ],
)
def test_bad_fit_dims_are_named(args, kwargs, fit_dims, error, message):
    with pytest.raises(error, match=message):
        FitData(args, kwargs, fit_dims, 5)


def test_one_capture_serves_other_slices_but_not_other_shared_arguments():
    shared = torch.ones(3)
    first = FitData((x, shared), {}, (0, None), 4)
    assert FitData((x + 1, shared), {}, (0, None), 4).has_form_of(first)
    assert not FitData((x, shared + 1), {}, (0, None), 4).has_form_of(first)
    assert not FitData((x[..., :2], shared), {}, (0, None), 4).has_form_of(first)
    assert not FitData((x.double(), shared), {}, (0, None), 4).has_form_of(first)
