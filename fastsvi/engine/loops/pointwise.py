"""Elementwise operations, as C++ expressions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fastsvi.engine.loops import views
from fastsvi.engine.loops.ir import CTYPES, Body, Expr, Indices, Value

NOTHING: frozenset[Any] = frozenset()

# Name: (expression of the operands {0}, {1}, ..., rough cost in operations).
UNARY = {
    "neg": ("-{0}", 1),
    "abs": ("std::abs({0})", 1),
    "sign": ("(({0} > 0) - ({0} < 0))", 1),
    "sgn": ("(({0} > 0) - ({0} < 0))", 1),
    "reciprocal": ("1 / {0}", 3),
    "sqrt": ("std::sqrt({0})", 4),
    "rsqrt": ("1 / std::sqrt({0})", 6),
    "exp": ("std::exp({0})", 10),
    "expm1": ("std::expm1({0})", 15),
    "log": ("std::log({0})", 10),
    "log1p": ("std::log1p({0})", 15),
    "sin": ("std::sin({0})", 15),
    "cos": ("std::cos({0})", 15),
    "tan": ("std::tan({0})", 20),
    "atan": ("std::atan({0})", 20),
    "tanh": ("std::tanh({0})", 15),
    "sinh": ("std::sinh({0})", 15),
    "cosh": ("std::cosh({0})", 15),
    "asin": ("std::asin({0})", 20),
    "acos": ("std::acos({0})", 20),
    "erf": ("std::erf({0})", 20),
    "erfc": ("std::erfc({0})", 20),
    "sigmoid": ("sigmoid({0})", 12),
    "lgamma": ("lgamma_of({0})", 40),
    "digamma": ("digamma({0})", 40),
    "floor": ("std::floor({0})", 1),
    "ceil": ("std::ceil({0})", 1),
    "round": ("std::nearbyint({0})", 1),
    "trunc": ("std::trunc({0})", 1),
}
BINARY = {
    "add": ("({0} + {1})", 1),
    "sub": ("({0} - {1})", 1),
    "mul": ("({0} * {1})", 1),
    "div": ("({0} / {1})", 3),
    "maximum": ("larger({0}, {1})", 1),
    "minimum": ("smaller({0}, {1})", 1),
    "atan2": ("std::atan2({0}, {1})", 20),
    "fmod": ("std::fmod({0}, {1})", 10),
    "xlogy": ("({0} == 0 && {1} == {1} ? 0 : {0} * std::log({1}))", 12),
    "special_xlog1py": ("({0} == 0 && {1} == {1} ? 0 : {0} * std::log1p({1}))", 16),
    "bitwise_xor": ("({0} ^ {1})", 1),
}
COMPARISONS = {
    "eq": ("({0} == {1})", 1),
    "ne": ("({0} != {1})", 1),
    "lt": ("({0} < {1})", 1),
    "le": ("({0} <= {1})", 1),
    "gt": ("({0} > {1})", 1),
    "ge": ("({0} >= {1})", 1),
}
TESTS = {
    "isnan": ("({0} != {0})", 1),
    "isinf": ("(std::abs({0}) == INFINITY)", 1),
    "isfinite": ("(std::abs({0}) < INFINITY)", 1),
    "logical_not": ("!{0}", 1),
}
LOGICAL = {
    "logical_and": ("({0} && {1})", 1),
    "logical_or": ("({0} || {1})", 1),
    "logical_xor": ("(bool({0}) != bool({1}))", 1),
}
BITWISE = {"bitwise_and": ("({0} & {1})", 1), "bitwise_or": ("({0} | {1})", 1)}
COPIES = {"clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "contiguous", "_to_copy"}

OPERATIONS = {
    *UNARY,
    *BINARY,
    *COMPARISONS,
    *TESTS,
    *LOGICAL,
    *BITWISE,
    *COPIES,
    *("pow", "where", "clamp", "clamp_min", "clamp_max", "full_like", "zeros_like", "ones_like"),
    *("new_zeros", "new_ones", "new_full", "bitwise_not", "scalar_tensor"),
    "masked_fill",
}


def number(value: Any, dtype: torch.dtype) -> str:
    """A C++ literal."""
    if dtype == torch.bool:
        return "true" if value else "false"
    if not dtype.is_floating_point:
        return str(int(value))
    value = float(value)
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    return f"{value!r}f" if dtype == torch.float32 else repr(value)


def literal(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Value:
    """A tensor filled with one number."""
    expr = Expr(f"({number(value, dtype)})", NOTHING)
    return Value(tuple(shape), dtype, lambda indices, body: expr)


def cast(expr: Expr, old: torch.dtype, new: torch.dtype, body: Body) -> Expr:
    if old == new:
        return expr
    return body.local(CTYPES[new], f"({CTYPES[new]})({expr.text})", expr.axes)


def converted(x: Value, dtype: torch.dtype) -> Value:
    """``x`` in another dtype."""
    if x.dtype == dtype:
        return x
    load = lambda indices, body: cast(x.load(indices, body), x.dtype, dtype, body)  # noqa: E731
    return Value(x.shape, dtype, load, x.cost)


def apply(
    template: str, cost: int, operands: list[Any], compute: torch.dtype, result: torch.dtype
) -> Value:
    """``template`` of operands that broadcast against each other and are cast to ``compute``.

    Operands are values or Python numbers.
    """
    values = [x for x in operands if isinstance(x, Value)]
    shape = views.common_shape(*(x.shape for x in values))
    spread = [views.broadcast(x, shape) if isinstance(x, Value) else x for x in operands]

    def load(indices: Indices, body: Body) -> Expr:
        texts, axes = [], NOTHING
        for x in spread:
            if isinstance(x, Value):
                expr = cast(x.load(indices, body), x.dtype, compute, body)
                texts.append(expr.text)
                axes |= expr.axes
            else:
                texts.append(f"({number(x, compute)})")
        return body.local(CTYPES[result], template.format(*texts), axes)

    return Value(shape, result, load, cost + sum(x.cost for x in values))


def lower(name: str, dtype: torch.dtype, args: list[Any], kwargs: dict[str, Any]) -> Value:
    """The value of an elementwise operation whose result has ``dtype``."""
    if name in COPIES:
        return converted(args[0], dtype)
    if name in UNARY:
        return apply(*UNARY[name], args[:1], dtype, dtype)
    if name in TESTS:
        return apply(*TESTS[name], args[:1], args[0].dtype, torch.bool)
    if name in COMPARISONS or name in LOGICAL:
        template, cost = (COMPARISONS | LOGICAL)[name]
        return apply(template, cost, args, _common(args), torch.bool)
    if name in BITWISE:
        return apply(*BITWISE[name], args, dtype, dtype)
    if name in BINARY:
        template, cost = BINARY[name]
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        if alpha != 1:
            sign = "+" if name == "add" else "-"
            return apply(f"({{0}} {sign} {{2}} * {{1}})", 2, [*args[:2], alpha], dtype, dtype)
        if name == "div" and "rounding_mode" in kwargs and kwargs["rounding_mode"] is not None:
            rounding = {"floor": "std::floor", "trunc": "std::trunc"}[kwargs["rounding_mode"]]
            template = f"{rounding}({template})"
        return apply(template, cost, args[:2], dtype, dtype)
    own = {key: value for key, value in kwargs.items() if key in ("min", "max")}
    return _SPECIAL[name](dtype, *args, **own)


def _common(args: list[Any]) -> torch.dtype:
    samples = [
        torch.empty((1,) * len(x.shape), dtype=x.dtype) if isinstance(x, Value) else x for x in args
    ]
    return torch.result_type(*samples)


def _pow(dtype: torch.dtype, base: Any, exponent: Any) -> Value:
    if isinstance(exponent, Value):
        return apply("std::pow({0}, {1})", 25, [base, exponent], dtype, dtype)
    simple = {
        1: "{0}",
        2: "({0} * {0})",
        3: "({0} * {0} * {0})",
        0.5: "std::sqrt({0})",
        -1: "1 / {0}",
        -2: "1 / ({0} * {0})",
    }
    if exponent in simple:
        return apply(simple[exponent], 2, [base], dtype, dtype)
    return apply("std::pow({0}, {1})", 25, [base, exponent], dtype, dtype)


def _where(dtype: torch.dtype, condition: Value, a: Any, b: Any) -> Value:
    values = [x for x in (condition, a, b) if isinstance(x, Value)]
    shape = views.common_shape(*(x.shape for x in values))
    test, *sides = (
        views.broadcast(x, shape) if isinstance(x, Value) else x for x in (condition, a, b)
    )

    def load(indices: Indices, body: Body) -> Expr:
        exprs = [test.load(indices, body)]
        for side in sides:
            if isinstance(side, Value):
                exprs.append(cast(side.load(indices, body), side.dtype, dtype, body))
            else:
                exprs.append(Expr(f"({number(side, dtype)})", NOTHING))
        axes = exprs[0].axes | exprs[1].axes | exprs[2].axes
        text = f"{exprs[0].text} ? {exprs[1].text} : {exprs[2].text}"
        return body.local(CTYPES[dtype], text, axes)

    return Value(shape, dtype, load, 1 + sum(x.cost for x in values))


def _clamp(dtype: torch.dtype, x: Value, min: Any = None, max: Any = None) -> Value:
    # Comparisons with NaN are false, so NaN passes through, as in torch.
    if min is not None:
        x = apply("({0} < {1} ? {1} : {0})", 1, [x, min], dtype, dtype)
    if max is not None:
        x = apply("({0} > {1} ? {1} : {0})", 1, [x, max], dtype, dtype)
    return x


_SPECIAL: dict[str, Callable[..., Value]] = {
    "pow": _pow,
    "where": _where,
    "clamp": _clamp,
    "masked_fill": lambda dtype, x, mask, value: _where(dtype, mask, value, x),
    "clamp_min": lambda dtype, x, bound: _clamp(dtype, x, bound),
    "clamp_max": lambda dtype, x, bound: _clamp(dtype, x, None, bound),
    "full_like": lambda dtype, x, value: literal(value, x.shape, dtype),
    "zeros_like": lambda dtype, x: literal(0, x.shape, dtype),
    "ones_like": lambda dtype, x: literal(1, x.shape, dtype),
    "new_zeros": lambda dtype, x, shape: literal(0, tuple(shape), dtype),
    "new_ones": lambda dtype, x, shape: literal(1, tuple(shape), dtype),
    "new_full": lambda dtype, x, shape, value: literal(value, tuple(shape), dtype),
    "scalar_tensor": lambda dtype, value: literal(value, (), dtype),
    "bitwise_not": lambda dtype, x: apply(
        "!{0}" if dtype == torch.bool else "~{0}", 1, [x], dtype, dtype
    ),
}
