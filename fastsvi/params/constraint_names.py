"""Constraints as plain data: a name and arguments, for files that hold no pickle.

Reading gives the singletons of ``torch.distributions.constraints`` back wherever there is one, so
``constraint is constraints.positive`` holds after a round trip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints as tc
from torch.distributions.constraints import Constraint

from fastsvi.distributions import constraints as fc
from fastsvi.errors import FastSVIError


class UnnamedConstraintError(FastSVIError, ValueError):
    """A constraint, or data for one, that has no name in a file."""


class _Kind(NamedTuple):
    """How a class of constraints is written: its name, and its arguments in order."""

    name: str
    arguments: tuple[str, ...]
    make: Any  # called with the arguments; a Constraint where there are none


# Class name, which is the same in torch, Pyro and fastsvi, to its kind.
_KINDS: dict[str, _Kind] = {
    "_Real": _Kind("real", (), tc.real),
    "_GreaterThan": _Kind("greater_than", ("lower_bound",), tc.greater_than),
    "_GreaterThanEq": _Kind("greater_than_eq", ("lower_bound",), tc.greater_than_eq),
    "_LessThan": _Kind("less_than", ("upper_bound",), tc.less_than),
    "_Interval": _Kind("interval", ("lower_bound", "upper_bound"), tc.interval),
    "_HalfOpenInterval": _Kind(
        "half_open_interval", ("lower_bound", "upper_bound"), tc.half_open_interval
    ),
    "_IndependentConstraint": _Kind(
        "independent", ("base_constraint", "reinterpreted_batch_ndims"), tc.independent
    ),
    "_Cat": _Kind("cat", ("cseq", "dim", "lengths"), tc.cat),
    "_Stack": _Kind("stack", ("cseq", "dim"), tc.stack),
    "_Simplex": _Kind("simplex", (), tc.simplex),
    "_LowerTriangular": _Kind("lower_triangular", (), tc.lower_triangular),
    "_LowerCholesky": _Kind("lower_cholesky", (), tc.lower_cholesky),
    "_CorrCholesky": _Kind("corr_cholesky", (), tc.corr_cholesky),
    "_Square": _Kind("square", (), tc.square),
    "_Symmetric": _Kind("symmetric", (), tc.symmetric),
    "_PositiveSemidefinite": _Kind("positive_semidefinite", (), tc.positive_semidefinite),
    "_PositiveDefinite": _Kind("positive_definite", (), tc.positive_definite),
    "_SoftplusPositive": _Kind("softplus_positive", (), fc.softplus_positive),
    "_SoftplusLowerCholesky": _Kind("softplus_lower_cholesky", (), fc.softplus_lower_cholesky),
    "_UnitLowerCholesky": _Kind("unit_lower_cholesky", (), fc.unit_lower_cholesky),
    "_Sphere": _Kind("sphere", (), fc.sphere),
    "_CorrMatrix": _Kind("corr_matrix", (), fc.corr_matrix),
    "_OrderedVector": _Kind("ordered_vector", (), fc.ordered_vector),
    "_PositiveOrderedVector": _Kind("positive_ordered_vector", (), fc.positive_ordered_vector),
}
_BY_NAME = {kind.name: kind for kind in _KINDS.values()}

# What these hold is one point of a parametrised class, and programs test for it with "is".
_SINGLETONS: tuple[Constraint, ...] = (tc.positive, tc.nonnegative, tc.unit_interval)

_MODULES = ("torch.distributions.constraints", "pyro.distributions.constraints")
_MAX_DEPTH = 16


def known_class(module: str, name: str) -> bool:
    """Is this a constraint class that can be named?"""
    return name in _KINDS and (module in _MODULES or module.startswith("fastsvi.distributions."))


def to_data(constraint: Constraint) -> dict[str, Any]:
    """A constraint as JSON data.

    Raises:
        UnnamedConstraintError: its class is none of those listed here.

    >>> to_data(tc.interval(0.0, 2.0))
    {'name': 'interval', 'lower_bound': 0.0, 'upper_bound': 2.0}
    """
    cls = type(constraint)
    if not known_class(cls.__module__, cls.__name__):
        raise UnnamedConstraintError(
            f"the constraint {constraint!r} of class {cls.__module__}.{cls.__qualname__} has no "
            f"name in a file; the known ones are {sorted(_BY_NAME)}"
        )
    kind = _KINDS[cls.__name__]
    data: dict[str, Any] = {"name": kind.name}
    for argument in kind.arguments:
        data[argument] = _argument_to_data(getattr(constraint, argument))
    return data


def from_data(data: Any, depth: int = 0) -> Constraint:
    """The constraint for JSON data; checks everything, for files lie.

    Raises:
        UnnamedConstraintError: the data describe no known constraint.

    >>> from_data({"name": "greater_than", "lower_bound": 0.0}) is tc.positive
    True
    """
    if not isinstance(data, dict) or not isinstance(data.get("name"), str) or depth > _MAX_DEPTH:
        raise UnnamedConstraintError(f"not the description of a constraint: {_short(data)}")
    kind = _BY_NAME.get(data["name"])
    if kind is None or set(data) != {"name", *kind.arguments}:
        raise UnnamedConstraintError(
            f"unknown constraint or arguments: {_short(data)}; the known ones are "
            f"{sorted(_BY_NAME)}"
        )
    return from_arguments(
        kind.name,
        {name: _argument_from_data(name, data[name], depth) for name in kind.arguments},
    )


def from_class(name: str, state: Mapping[str, Any]) -> Constraint:
    """The constraint for a class name and the attributes that a pickle of it holds."""
    kind = _KINDS[name]
    missing = [argument for argument in kind.arguments if argument not in state]
    if missing:
        raise UnnamedConstraintError(f"a constraint {kind.name!r} without its {missing}")
    return from_arguments(kind.name, {argument: state[argument] for argument in kind.arguments})


def from_arguments(name: str, arguments: Mapping[str, Any]) -> Constraint:
    """The constraint with this name and these arguments, each of a type that it can have."""
    kind = _BY_NAME[name]
    for argument, value in arguments.items():
        if not _is_valid(argument, value):
            raise UnnamedConstraintError(
                f"the constraint {name!r} cannot have {argument} = {_short(value)}"
            )
    if not kind.arguments:
        return kind.make  # type: ignore[no-any-return]
    for singleton in _SINGLETONS:
        if _KINDS[type(singleton).__name__] == kind and all(
            _is_number(value) and value == getattr(singleton, argument)
            for argument, value in arguments.items()
        ):
            return singleton
    try:
        return kind.make(*arguments.values())  # type: ignore[no-any-return]
    except AssertionError as error:  # lengths that do not match, negative numbers of dims
        raise UnnamedConstraintError(f"no constraint {name!r}: {error}") from error


def _argument_to_data(value: Any) -> Any:
    if isinstance(value, Constraint):
        return to_data(value)
    if isinstance(value, (list, tuple)):
        return [_argument_to_data(item) for item in value]
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        values = value.detach().cpu().double() if value.is_floating_point() else value.cpu()
        return {"dtype": dtype, "shape": list(value.shape), "values": values.flatten().tolist()}
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise UnnamedConstraintError(f"a constraint's argument {_short(value)} is not a number")
    return value if isinstance(value, int) else float(value)


def _argument_from_data(argument: str, data: Any, depth: int) -> Any:
    if argument == "base_constraint":
        return from_data(data, depth + 1)
    if argument == "cseq" and isinstance(data, list):
        return [from_data(item, depth + 1) for item in data]
    if isinstance(data, dict):
        return _tensor_from_data(data)
    return data


def _tensor_from_data(data: dict[str, Any]) -> Tensor:
    dtypes = {str(t).removeprefix("torch."): t for t in (*_FLOATS, *_INTEGERS)}
    dtype, shape, values = data.get("dtype"), data.get("shape"), data.get("values")
    if (
        set(data) != {"dtype", "shape", "values"}
        or not (isinstance(dtype, str) and dtype in dtypes)
        or not (isinstance(shape, list) and all(_is_count(size) for size in shape))
        or not (isinstance(values, list) and all(_is_number(value) for value in values))
        or torch.Size(shape).numel() != len(values)
    ):
        raise UnnamedConstraintError(f"not the description of a bound: {_short(data)}")
    try:
        return torch.tensor(values, dtype=dtypes[dtype]).reshape(shape)
    except (RuntimeError, OverflowError) as error:
        raise UnnamedConstraintError(f"not the description of a bound: {_short(data)}") from error


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)


def _is_valid(argument: str, value: Any) -> bool:
    if argument == "base_constraint":
        return isinstance(value, Constraint)
    if argument == "cseq":
        return isinstance(value, list) and all(isinstance(item, Constraint) for item in value)
    if argument == "lengths":
        return isinstance(value, list) and all(_is_count(length) for length in value)
    if argument == "reinterpreted_batch_ndims":
        return _is_count(value)
    if argument == "dim":
        return isinstance(value, int) and not isinstance(value, bool)
    return _is_number(value) or (
        isinstance(value, Tensor) and value.dtype in (*_FLOATS, *_INTEGERS)
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
