"""The functions that native loops bring themselves, over the whole range of their arguments."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastsvi.engine.native import NativeStep

FUNCTIONS = {
    "exp": lambda x: x.exp(),
    "log": lambda x: x.abs().log(),
    "log of a negative number": lambda x: x.log(),
    "log1p": lambda x: x.log1p(),
    "log1p of a positive number": lambda x: x.abs().log1p(),
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid of the opposite": lambda x: (-x).sigmoid(),
    "softplus": lambda x: functional.softplus(x),
    "log sigmoid": lambda x: functional.logsigmoid(x),
    "inverse error function": lambda x: torch.erfinv(x.tanh()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_are_right_to_some_ulp_everywhere(dtype):
    tiny = torch.finfo(dtype).tiny
    ends = [0.0, -0.0, 1.0, -1.0, tiny, tiny / 64, 1e30, -1e30, float("inf"), -float("inf")]
    x = torch.cat(
        [
            torch.tensor([*ends, float("nan")], dtype=dtype),
            torch.linspace(-110, 110, 3001, dtype=dtype),
            torch.linspace(-3, 3, 3001, dtype=dtype),
            torch.logspace(-37, 37, 1001, dtype=dtype),
            -torch.logspace(-37, 37, 1001, dtype=dtype),
        ]
    )

    def step(rows, x):
        new = torch.stack([function(x) for function in FUNCTIONS.values()])
        return new, new[:, 0].sum(), torch.isnan(x).all()

    rows = torch.zeros(len(FUNCTIONS), len(x), dtype=dtype)
    NativeStep(step, [rows], [x]).run(1)
    for name, got, function in zip(FUNCTIONS, rows, FUNCTIONS.values(), strict=True):
        wide = function(x.double())
        wide = torch.where(wide.abs() > torch.finfo(dtype).max, wide.sign() * torch.inf, wide)
        # 4 ulp of the vector math library at most, and as much for a division or a tail of erf;
        # below the normal numbers, in steps of the least number. tanh is 1 where erfinv is not.
        slack = 200 if name == "inverse error function" else 8
        exact = x.abs() < 2 if slack == 200 else torch.ones_like(x, dtype=torch.bool)
        torch.testing.assert_close(
            got[exact].double(),
            wide[exact],
            rtol=slack * torch.finfo(dtype).eps,
            atol=4 * tiny * torch.finfo(dtype).eps,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


BELOW = {  # of -|x|, which native loops write without overflow; with the error that they state
    "exponential": (lambda x: (-x.abs()).exp(), 1.1),
    # Half an ulp for each of an addition and a division, and the exponential's.
    "sigmoid": (torch.sigmoid, 2.5),
    # The polynomial's 1.6, and the exponential's, which is no larger in the result.
    "softplus": (lambda x: (-x.abs()).exp().log1p(), 2.7),
}


def test_logistic_functions_are_right_to_their_stated_ulp():
    x = torch.cat([torch.linspace(-105, 105, 100_001), torch.linspace(-2, 2, 100_001)])

    def step(rows, x):
        new = torch.stack([function(x) for function, _ in BELOW.values()])
        return new, new[0].sum(), torch.isnan(x).all()

    rows = torch.zeros(len(BELOW), len(x))
    native = NativeStep(step, [rows], [x])
    native.run(1)
    for (name, (function, slack)), got in zip(BELOW.items(), rows.double(), strict=True):
        exact = function(x.double())
        least = torch.tensor(2.0**-126, dtype=torch.float64)
        ulp = torch.exp2(torch.maximum(exact, least).log2().floor() - 23)
        worst = ((got - exact) / ulp).abs().max()
        assert worst < slack, f"{name}: {worst}"
    # A NaN is one whatever its lower bits hold, which the exponential's arithmetic on bits meets.
    x.view(torch.int32)[:4] = torch.tensor([0x7FC00001, 0x7FC000FF, -0x3FFFFF, 0x7FFFFFFF])
    native.run(1)
    assert rows[:, :4].isnan().all()
    assert not rows[:, 4:].isnan().any()
