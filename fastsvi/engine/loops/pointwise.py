"""Elementwise operations, as C++ expressions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fastsvi.engine.loops import views
from fastsvi.engine.loops.ir import CTYPES, Body, Expr, Indices, Value
from fastsvi.errors import CaptureError

NOTHING: frozenset[Any] = frozenset()

# Name: (expression of the operands {0}, {1}, ..., rough cost in operations).
UNARY = {
    "neg": ("-{0}", 1),
    "abs": ("fn::abs({0})", 1),
    "sign": ("(({0} > 0) - ({0} < 0))", 1),
    "sgn": ("(({0} > 0) - ({0} < 0))", 1),
    "reciprocal": ("1 / {0}", 3),
    "sqrt": ("fn::sqrt({0})", 4),
    "rsqrt": ("1 / fn::sqrt({0})", 6),
    "exp": ("fn::exp({0})", 10),
    "expm1": ("fn::expm1({0})", 15),
    "log": ("fn::log({0})", 10),
    "log1p": ("fn::log1p({0})", 15),
    "sin": ("fn::sin({0})", 15),
    "cos": ("fn::cos({0})", 15),
    "tan": ("fn::tan({0})", 20),
    "atan": ("fn::atan({0})", 20),
    "tanh": ("fn::tanh({0})", 15),
    "sinh": ("fn::sinh({0})", 15),
    "cosh": ("fn::cosh({0})", 15),
    "asin": ("fn::asin({0})", 20),
    "acos": ("fn::acos({0})", 20),
    "erf": ("fn::erf({0})", 20),
    "erfc": ("fn::erfc({0})", 20),
    "exp2": ("fn::exp2({0})", 10),
    "log2": ("fn::log2({0})", 10),
    "log10": ("fn::log10({0})", 10),
    "frac": ("({0} - fn::trunc({0}))", 2),
    "erfinv": ("fn::erfinv({0})", 60),
    "lgamma": ("fn::lgamma({0})", 40),
    "digamma": ("fn::digamma({0})", 40),
    "floor": ("fn::floor({0})", 1),
    "ceil": ("fn::ceil({0})", 1),
    "round": ("fn::nearbyint({0})", 1),
    "trunc": ("fn::trunc({0})", 1),
}
# Of x ({0}) and exp(-|x|) ({1}); see lower.
LOGISTIC = {
    "exp_neg_abs": ("{1}", 11),
    "sigmoid": ("({0} < 0 ? {1} : 1) / (1 + {1})", 14),
    "sigmoid_neg": ("({0} < 0 ? 1 : {1}) / (1 + {1})", 14),
    "softplus": ("(({0} < 0 ? 0 : {0}) + fn::log1p_unit({1}))", 20),
    "softplus_below": ("fn::log1p_unit({1})", 20),
}
BINARY = {
    "add": ("({0} + {1})", 1),
    "sub": ("({0} - {1})", 1),
    "mul": ("({0} * {1})", 1),
    "div": ("({0} / {1})", 3),
    "maximum": ("fn::larger({0}, {1})", 1),
    "minimum": ("fn::smaller({0}, {1})", 1),
    "atan2": ("fn::atan2({0}, {1})", 20),
    "fmod": ("fn::fmod({0}, {1})", 10),
    "xlogy": ("({0} == 0 && {1} == {1} ? 0 : {0} * fn::log({1}))", 12),
    "special_xlog1py": ("({0} == 0 && {1} == {1} ? 0 : {0} * fn::log1p({1}))", 16),
    "hypot": ("fn::sqrt({0} * {0} + {1} * {1})", 5),
    "remainder": ("fn::remainder({0}, {1})", 10),
    "floor_divide": ("fn::floor({0} / {1})", 4),
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
    "isinf": ("(fn::abs({0}) == INFINITY)", 1),
    "isposinf": ("({0} == INFINITY)", 1),
    "isneginf": ("({0} == -INFINITY)", 1),
    "isfinite": ("(fn::abs({0}) < INFINITY)", 1),
    "logical_not": ("!{0}", 1),
}
LOGICAL = {
    "logical_and": ("({0} && {1})", 1),
    "logical_or": ("({0} || {1})", 1),
    "logical_xor": ("(bool({0}) != bool({1}))", 1),
}
# Where the result is not a real number.
_OF_BOOLS = {"mul": ("({0} & {1})", 1), "add": ("({0} | {1})", 1)}
_OF_INTEGERS = {
    "floor_divide": ("fn::divide_down({0}, {1})", 10),
    "fmod": ("({0} % {1})", 10),
    "div floor": ("fn::divide_down({0}, {1})", 10),
    "div trunc": ("({0} / {1})", 10),
}
BITWISE = {"bitwise_and": ("({0} & {1})", 1), "bitwise_or": ("({0} | {1})", 1)}
COPIES = {"clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "contiguous", "_to_copy"}

OPERATIONS = {
    *UNARY,
    *LOGISTIC,
    *BINARY,
    *COMPARISONS,
    *TESTS,
    *LOGICAL,
    *BITWISE,
    *COPIES,
    *("pow", "where", "clamp", "clamp_min", "clamp_max", "full_like", "zeros_like", "ones_like"),
    *("new_zeros", "new_ones", "new_full", "bitwise_not", "scalar_tensor"),
    *("empty_like", "new_empty", "new_empty_strided", "fill", "polygamma"),
}


def number(value: Any, dtype: torch.dtype) -> str:
    """A C++ literal."""
    if dtype == torch.bool:
        return "true" if value else "false"
    if not dtype.is_floating_point:
        if dtype != torch.int64:
            return str(int(value))
        # The least one is not a literal: C++ reads its digits before the sign.
        return f"INT64_C({int(value)})" if value > -(2**63) else "INT64_MIN"
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


def lower(
    name: str,
    dtype: torch.dtype,
    args: list[Any],
    kwargs: dict[str, Any],
    shape: tuple[int, ...] = (),
) -> Value:
    """The value of an elementwise operation whose result has ``dtype``.

    ``shape`` is needed only of what is made from nothing.
    """
    if name in COPIES:
        return converted(args[0], dtype)
    if name in UNARY:
        return apply(*UNARY[name], args[:1], dtype, dtype)
    if name in LOGISTIC:
        return _logistic(*LOGISTIC[name], converted(args[0], dtype))
    if name in TESTS:
        return apply(*TESTS[name], args[:1], args[0].dtype, torch.bool)
    if name in COMPARISONS or name in LOGICAL:
        template, cost = (COMPARISONS | LOGICAL)[name]
        return apply(template, cost, args, _common(args), torch.bool)
    if name in BITWISE:
        return apply(*BITWISE[name], args, dtype, dtype)
    if name in BINARY:
        return _binary(name, dtype, args, kwargs)
    if name in _FILLED:
        value = args[-1] if name in ("full_like", "new_full") else _FILLED[name]
        return literal(value, shape, dtype)
    own = {key: value for key, value in kwargs.items() if key in ("min", "max")}
    return _SPECIAL[name](dtype, *args, **own)


def _logistic(template: str, cost: int, x: Value) -> Value:
    kind = CTYPES[x.dtype]

    def load(indices: Indices, body: Body) -> Expr:
        expr = x.load(indices, body)
        below = body.local(kind, f"fn::exp_minus(-fn::abs({expr.text}))", expr.axes)
        return body.local(kind, template.format(expr.text, below.text), expr.axes)

    return Value(x.shape, x.dtype, load, cost + x.cost)


def _binary(name: str, dtype: torch.dtype, args: list[Any], kwargs: dict[str, Any]) -> Value:
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    if alpha != 1:
        sign = "+" if name == "add" else "-"
        return apply(f"({{0}} {sign} {{2}} * {{1}})", 2, [*args[:2], alpha], dtype, dtype)
    template, cost = BINARY[name]
    rounding = kwargs.get("rounding_mode")
    if dtype == torch.bool:
        template, cost = _OF_BOOLS.get(name, (template, cost))
    elif not dtype.is_floating_point:
        key = name if rounding is None else f"{name} {rounding}"
        template, cost = _OF_INTEGERS.get(key, (template, cost))
    elif rounding is not None:
        template = f"fn::{rounding}({template})"
    return apply(template, cost, args[:2], dtype, dtype)


def _common(args: list[Any]) -> torch.dtype:
    samples = [
        torch.empty((1,) * len(x.shape), dtype=x.dtype) if isinstance(x, Value) else x for x in args
    ]
    return torch.result_type(*samples)


def _pow(dtype: torch.dtype, base: Any, exponent: Any) -> Value:
    if isinstance(exponent, Value):
        return apply("fn::pow({0}, {1})", 25, [base, exponent], dtype, dtype)
    simple = {
        1: "{0}",
        2: "({0} * {0})",
        3: "({0} * {0} * {0})",
        0.5: "fn::sqrt({0})",
        -1: "1 / {0}",
        -2: "1 / ({0} * {0})",
    }
    if exponent in simple:
        return apply(simple[exponent], 2, [base], dtype, dtype)
    return apply("fn::pow({0}, {1})", 25, [base, exponent], dtype, dtype)


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


def _polygamma(dtype: torch.dtype, order: int, x: Value) -> Value:
    if order > 1:
        raise CaptureError(f"native loops know polygamma up to order 1, found {order}")
    return apply(f"fn::{('digamma', 'trigamma')[order]}({{0}})", 40, [x], dtype, dtype)


_FILLED: dict[str, Any] = {
    "full_like": None,
    "new_full": None,
    "zeros_like": 0,
    "ones_like": 1,
    "new_zeros": 0,
    "new_ones": 1,
    "empty_like": 0,
    "new_empty": 0,
    "new_empty_strided": 0,
}
_SPECIAL: dict[str, Callable[..., Value]] = {
    "pow": _pow,
    "where": _where,
    "clamp": _clamp,
    "clamp_min": lambda dtype, x, bound: _clamp(dtype, x, bound),
    "clamp_max": lambda dtype, x, bound: _clamp(dtype, x, None, bound),
    "fill": lambda dtype, x, value: (
        views.broadcast(converted(value, dtype), x.shape)
        if isinstance(value, Value)
        else literal(value, x.shape, dtype)
    ),
    "scalar_tensor": lambda dtype, value: literal(value, (), dtype),
    "polygamma": _polygamma,
    "bitwise_not": lambda dtype, x: apply(
        "!{0}" if dtype == torch.bool else "~{0}", 1, [x], dtype, dtype
    ),
}
