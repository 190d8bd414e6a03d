"""What a :class:`~fastsvi.nn.PyroModule` attribute may be declared as: a parameter or a sample."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributions import constraints

from fastsvi.errors import DtypeError, SiteError, describe

if TYPE_CHECKING:
    from fastsvi.nn.pyro_module import PyroModule


class PyroParam(NamedTuple):
    """Declares a learnable attribute of a :class:`~fastsvi.nn.PyroModule`, with a constraint.

    Reading the attribute gives the constrained value and, inside a call of the module, is a
    ``pyro.param`` statement; the module's ``named_parameters()`` holds the unconstrained leaf
    under ``<name>_unconstrained``.

    Args:
        init_value: constrained initial value, or a function without arguments that returns it
            (called once, on assignment). Left out when used as a decorator with options.
        constraint: where values live; unconstrained by default.
        event_dim: number of rightmost dimensions that a plate does not subsample; the dimensions
            to their left follow the subsample of enclosing plates. ``None``: no subsampling.

    As a decorator it declares a parameter on the class, created when first read.

    >>> from torch.distributions import constraints
    >>> from fastsvi.nn import PyroModule
    >>> class Noise(PyroModule):
    ...     @PyroParam(constraint=constraints.positive)
    ...     def scale(self):
    ...         return torch.ones(2)
    >>> noise = Noise()
    >>> noise.loc = PyroParam(torch.zeros(2))
    >>> noise.scale.tolist()
    [1.0, 1.0]
    >>> [name for name, _ in noise.named_parameters()]
    ['loc_unconstrained', 'scale_unconstrained']
    """

    init_value: torch.Tensor | Callable[..., torch.Tensor] | None = None
    constraint: constraints.Constraint = constraints.real
    event_dim: int | None = None

    def __call__(self, init_value: Callable[..., torch.Tensor]) -> PyroParam:
        """Complete ``@PyroParam(constraint=..., event_dim=...)`` with the decorated method."""
        if self.init_value is not None:
            raise SiteError(
                "a PyroParam that has an initial value was called; only a PyroParam of options, "
                "such as @PyroParam(event_dim=0), decorates a method. Read it as an attribute"
            )
        return self._replace(init_value=init_value)

    def __get__(self, module: PyroModule | None, owner: type) -> Any:
        """Read a parameter declared on the class; the first read creates it."""
        if module is None:
            return self
        initial = self.init_value
        if not inspect.isfunction(initial):
            raise SiteError(
                f"class {owner.__name__} holds a PyroParam of {describe(initial)} as a class "
                "attribute, which all its instances would share. Assign it in __init__ "
                "(self.x = PyroParam(...)) or decorate a method with @PyroParam"
            )
        name = initial.__name__
        if name not in module._pyro_params:
            setattr(module, name, self._replace(init_value=functools.partial(initial, module)))
        return module.__getattr__(name)


class PyroSample:
    """Declares a random attribute of a :class:`~fastsvi.nn.PyroModule`.

    Inside a call of the module the first read is a ``pyro.sample`` statement and later reads
    return the same value; outside of calls each read draws anew.

    Args:
        prior: a distribution; or a function of the module that returns a distribution, or a
            tensor (then the read is a ``pyro.deterministic`` statement).

    As a decorator it declares the prior on the class.

    >>> import fastsvi.distributions as dist
    >>> from fastsvi.nn import PyroModule
    >>> class Walk(PyroModule):
    ...     @PyroSample
    ...     def start(self):
    ...         return dist.Normal(0.0, 1.0)
    ...
    ...     def forward(self):
    ...         return self.start is self.start, self.end is self.end
    >>> walk = Walk()
    >>> walk.end = PyroSample(lambda self: dist.Normal(self.start, 1.0))
    >>> walk()
    (True, True)
    """

    __slots__ = ("name", "prior")

    def __init__(self, prior: Any) -> None:
        if not is_distribution(prior):
            _require_function_of_module(prior)
        self.prior = prior
        self.name: str | None = None

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: PyroModule | None, owner: type) -> Any:
        """Read a random attribute declared on the class; an assignment to the instance wins."""
        if module is None:
            return self
        if self.name is None:  # put on the class after its body, where Python tells no name
            self.name = next(key for key in dir(owner) if getattr(owner, key) is self)
        module._pyro_samples.setdefault(self.name, self.prior)
        return module.__getattr__(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PyroSample) and self.prior is other.prior

    def __hash__(self) -> int:
        return id(self.prior)

    def __repr__(self) -> str:
        return f"PyroSample(prior={self.prior!r})"


def is_distribution(prior: Any) -> bool:
    """Whether ``prior`` can be sampled from; a class of distributions cannot."""
    return hasattr(prior, "sample") and not inspect.isclass(prior)


def _require_function_of_module(prior: Any) -> None:
    if callable(prior) and not inspect.isclass(prior):
        parameters = inspect.signature(prior).parameters.values()
        required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
        if len(required) == 1:
            return
        found = f"a function of {len(required)} arguments ({', '.join(required)})"
    else:
        found = describe(prior)
    remedy = "write PyroSample(dist.Normal(0., 1.)) or PyroSample(lambda self: ...)"
    raise DtypeError(
        "PyroSample takes a distribution, or a function of the single argument `self` that "
        f"returns one; found {found}. For example, {remedy}"
    )
