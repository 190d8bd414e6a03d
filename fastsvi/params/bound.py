"""Distributions over parameters of a store that are defined once and never go stale.

A plain ``Gamma(store["c"], store["r"])`` is bound to one graph: after one backward pass it is used
up, and it never sees an updated value. A bound distribution holds names instead of values. Every
attribute and method is that of a fresh instance of its family, so nothing here knows any family;
``to_event``, ``expand`` and the like give bound distributions again.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import constraints as tc
from torch.distributions.constraints import Constraint

from fastsvi.errors import ConstraintError, DtypeError, FastSVIError, ShapeError, describe

if TYPE_CHECKING:
    from fastsvi.params.store import ParamStore


class BoundArgumentError(FastSVIError, TypeError):
    """An argument that a distribution over parameters cannot have."""


class BoundDistribution(Distribution):
    """A distribution whose arguments are parameters; made by :meth:`ParamStore.distribution`.

    It is an instance of its family, so ``kl_divergence`` and ``isinstance`` treat it as one.
    Everything not listed here is what a plain distribution at the current values has.
    """

    # Only these are looked up on the object itself.
    _OWN = frozenset({"current", "parameters", "has_rsample_", "_make", "_leaves", "_settings"})

    def current(self) -> Any:
        """A plain distribution at the current values, with a graph of its own.

        Take it to use one graph several times in one step.
        """
        plain = object.__getattribute__(self, "_make")()
        for name, value in object.__getattribute__(self, "_settings").items():
            setattr(plain, name, value)
        return plain

    def parameters(self) -> list[Tensor]:
        """The UNCONSTRAINED leaves, for a torch optimizer."""
        return list(object.__getattribute__(self, "_leaves")())

    def has_rsample_(self, value: bool) -> BoundDistribution:
        """Choose between pathwise and score function gradients, in place; as Pyro's method."""
        self.has_rsample = value
        return self

    def __getattribute__(self, name: str) -> Any:
        if name in BoundDistribution._OWN or (name.startswith("__") and name.endswith("__")):
            return object.__getattribute__(self, name)
        if not isinstance(getattr(type(self), name, None), types.FunctionType):
            return getattr(self.current(), name)

        def method(*args: Any, **kwargs: Any) -> Any:
            result = getattr(self.current(), name)(*args, **kwargs)
            if isinstance(result, Distribution):
                return _bound(
                    type(result),
                    lambda: getattr(self.current(), name)(*args, **kwargs),
                    self.parameters,
                )
            return result

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        if name in getattr(self.current(), "arg_constraints", ()):
            raise AttributeError(
                f"{name!r} is a parameter of the store; set its value there, by name"
            )
        self._settings[name] = value

    def __repr__(self) -> str:
        return f"Bound{self.current()!r}"


def _bound(
    family: type, make: Callable[[], Any], leaves: Callable[[], Iterable[Tensor]]
) -> BoundDistribution:
    bound: BoundDistribution = object.__new__(_class_for(family))
    vars(bound).update(_make=make, _leaves=leaves, _settings={})
    return bound


_classes: WeakKeyDictionary[type, type] = WeakKeyDictionary()


def _class_for(family: type) -> type:
    if family not in _classes:
        # new_class and not type(): Pyro's distributions have a metaclass.
        bases = (BoundDistribution, family)
        _classes[family] = types.new_class(f"Bound{family.__name__}", bases)
    return _classes[family]


def bind(
    store: ParamStore,
    family: Any,
    prefix: str,
    fixed: Mapping[str, Any],
    constraints: Mapping[str, Constraint],
    arguments: Mapping[str, Any],
) -> BoundDistribution:
    """See :meth:`ParamStore.distribution`."""
    names = {argument: f"{prefix}.{argument}" for argument in arguments}
    values = _as_tensors(arguments)
    wanted = {
        argument: constraints[argument]
        if argument in constraints
        else _constraint_of(family, argument)
        for argument in arguments
    }
    with ExitStack() as undo:
        undo.callback(_delete, store, [name for name in names.values() if name not in store])
        for argument, name in names.items():
            store.setdefault(name, values[argument], wanted[argument])
        with torch.no_grad():
            plain = _first_instance(family, {a: store[n] for a, n in names.items()}, fixed)
        undo.pop_all()
    quiet = _takes_validate_args(family)

    def make() -> Any:
        current = {argument: store[name] for argument, name in names.items()}
        if not quiet:
            return family(**current, **fixed)
        # The values satisfy their constraints by construction; to check them would read them back
        # to the host. What is drawn or scored is checked as ever.
        fresh = family(**current, **fixed, validate_args=False)
        vars(fresh).pop("_validate_args", None)
        return fresh

    return _bound(type(plain), make, lambda: [store.leaf(name) for name in names.values()])


def _delete(store: ParamStore, names: Iterable[str]) -> None:
    for name in names:
        if name in store:
            del store[name]


def _as_tensors(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers become tensors of the dtype and device of the other arguments."""
    like = torch.empty(0)
    for value in arguments.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            like = value
            break
    values: dict[str, Any] = {}
    for argument, value in arguments.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = torch.tensor(float(value), dtype=like.dtype, device=like.device)
        elif not isinstance(value, Tensor) and not callable(value):
            raise DtypeError(
                f"argument {argument!r} must be a number or a tensor to be a param, found "
                f"{describe(value)}; pass what is not learned in fixed={{{argument!r}: ...}}"
            )
        values[argument] = value
    return values


def _constraint_of(family: Any, argument: str) -> Constraint:
    known = getattr(family, "arg_constraints", None)
    # torch's Uniform computes its constraints from its arguments, and has none as a class.
    known = known if isinstance(known, Mapping) else {argument: tc.dependent}
    constraint = known.get(argument)
    family_name = getattr(family, "__name__", repr(family))
    remedy = f"pass fixed={{{argument!r}: ...}} or name one: constraints={{{argument!r}: ...}}"
    if constraint is None:
        raise BoundArgumentError(
            f"{family_name} declares no constraint for the argument {argument!r}, only for "
            f"{sorted(known)}; {remedy}"
        )
    if tc.is_dependent(constraint):
        raise BoundArgumentError(
            f"the constraint of the argument {argument!r} of {family_name} depends on its other "
            f"arguments; {remedy}"
        )
    if constraint.is_discrete:
        raise BoundArgumentError(
            f"the argument {argument!r} of {family_name} is discrete and has no gradient; pass it "
            f"as fixed={{{argument!r}: ...}}"
        )
    result: Constraint = constraint
    return result


def _takes_validate_args(family: Any) -> bool:
    parameters = inspect.signature(family).parameters.values()
    return any(p.name == "validate_args" or p.kind is p.VAR_KEYWORD for p in parameters)


def _first_instance(family: Any, values: Mapping[str, Tensor], fixed: Mapping[str, Any]) -> Any:
    """Made with all checks on, for the shapes of several arguments must fit together."""
    try:
        plain = family(**values, **fixed)
    except (ValueError, RuntimeError, IndexError) as error:
        found = ", ".join(f"{name} = {describe(value)}" for name, value in values.items())
        kind = ConstraintError if "constraint" in str(error).lower() else ShapeError
        raise kind(
            f"{getattr(family, '__name__', family)} cannot be made from {found}: {error}"
        ) from error
    if not isinstance(plain, Distribution):
        raise BoundArgumentError(f"{family!r} makes {describe(plain)}, not a distribution")
    return plain
