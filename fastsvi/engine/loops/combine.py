"""How an accumulation begins, and how it goes on, in C++ and CUDA alike."""

from __future__ import annotations

import torch

from fastsvi.engine.loops.ir import Statement
from fastsvi.engine.loops.pointwise import number

JOIN = {
    "+": "{0} + {1}",
    "*": "{0} * {1}",
    "max": "fn::larger({0}, {1})",
    "min": "fn::smaller({0}, {1})",
    "put": "{1}",
}


def start_of(statement: Statement) -> str:
    """What an accumulation starts from."""
    kind, dtype = statement.array.ctype, statement.array.dtype
    if statement.combine in ("+", "*"):
        return f"({kind}){0 if statement.combine == '+' else 1}"
    least = statement.combine == "max"
    if dtype.is_floating_point:
        return f"({kind}){'-' if least else ''}INFINITY"
    if dtype == torch.bool:
        return number(not least, dtype)
    info = torch.iinfo(dtype)
    return f"({kind}){number(info.min if least else info.max, dtype)}"
