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
