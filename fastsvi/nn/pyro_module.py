"""``PyroModule``: an ``nn.Module`` whose parameters and random attributes are Pyro statements.

Reading order: the metaclass that mixes PyroModule into other classes; the module itself, with
its naming, then what reading, assigning and deleting an attribute do, then pickling.
"""

from __future__ import annotations

import copyreg
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch.distributions import constraints

from fastsvi import primitives, settings
from fastsvi.errors import DtypeError, SiteError, describe
from fastsvi.nn import leaves
from fastsvi.nn.attributes import PyroParam, PyroSample, is_distribution
from fastsvi.nn.context import Context, join
from fastsvi.params.names import param_with_module_name
from fastsvi.poutine.runtime import PARAM_STORE, effectful

Method = TypeVar("Method", bound=Callable[..., Any])


class _PyroModuleMeta(type):
    """``PyroModule[nn.Linear]``: nn.Linear with PyroModule mixed in, made once per class."""

    _pyro_mixin_cache: ClassVar[dict[type[torch.nn.Module], type[PyroModule]]] = {}

    def __getitem__(cls, base: type[torch.nn.Module]) -> type[PyroModule]:
        if not (isinstance(base, type) and issubclass(base, torch.nn.Module)):
            remedy = "convert an instance by to_pyro_module_(module)"
            raise DtypeError(
                f"PyroModule[...] takes a class of nn.Module, found {describe(base)}; {remedy}"
            )
        if issubclass(base, PyroModule):
            return base
        if base is torch.nn.Module:
            return PyroModule
        if base not in cls._pyro_mixin_cache:
            # Bases are mixed in too, so that PyroModule[nn.GRU] is a PyroModule[nn.RNNBase].
            parents = [PyroModule[b] for b in base.__bases__ if issubclass(b, torch.nn.Module)]
            mixed: Any = type(cls)(f"Pyro{base.__name__}", (base, *parents), {})
            mixed.__module__ = base.__module__
            mixed.__reduce__ = functools.partialmethod(_reduce_mixin, base)
            cls._pyro_mixin_cache[base] = mixed
        return cls._pyro_mixin_cache[base]


def _reduce_mixin(module: PyroModule, base: type[torch.nn.Module]) -> tuple:
    # A class made by PyroModule[base] has no importable name: it is made again on unpickling.
    state = module.__getstate__()
    if type(module) is PyroModule[base]:
        return _empty_mixin, (base,), state
    return copyreg.__newobj__, (type(module),), state  # type: ignore[attr-defined]


def _empty_mixin(base: type[torch.nn.Module]) -> PyroModule:
    mixed = PyroModule[base]  # type: ignore[type-arg, valid-type]
    return mixed.__new__(mixed)


class PyroModule(torch.nn.Module, metaclass=_PyroModuleMeta):
    """An ``nn.Module`` whose attributes take part in inference, named after their place in it.

    Inside a call (or a :func:`pyro_method`), reading

    - an ``nn.Parameter`` or a :class:`PyroParam` attribute is a ``pyro.param`` statement,
    - a :class:`PyroSample` attribute is a ``pyro.sample`` statement on the first read, and the
      same value on later reads until the outermost call ends,
    - a plain ``nn.Module`` attribute is a ``pyro.module`` statement.

    Sites are named by their dotted path from the root module, so all PyroModules of a model
    should hang below one root. Module and param store agree on one leaf per parameter: if the
    store has the name, the module takes the store's leaf, else the store takes the module's.
    A second module of the same name therefore continues with the first one's values; use
    :func:`~fastsvi.nn.module.clear` or ``fastsvi.clear_param_store()`` to start afresh.

    To make another class a PyroModule, subclass both, write ``PyroModule[nn.Linear](3, 2)``, or
    convert an instance by :func:`~fastsvi.nn.module.to_pyro_module_`.

    Args:
        name: name of a root module, put before the names of all its sites. A module that
            becomes an attribute of another is named by its place there.

    >>> import fastsvi as pyro
    >>> import fastsvi.distributions as dist
    >>> from torch.distributions import constraints
    >>> class Regression(PyroModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = PyroModule[torch.nn.Linear](3, 1)
    ...         self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    ...         self.noise = PyroParam(torch.tensor(1.0), constraint=constraints.positive)
    ...
    ...     def forward(self, x):
    ...         return dist.Normal(self.linear(x), self.noise)
    >>> with pyro.poutine.trace() as record:
    ...     _ = Regression()(torch.zeros(2, 3))
    >>> [(site["type"], name) for name, site in record.trace.nodes.items()]
    [('sample', 'linear.weight'), ('param', 'linear.bias'), ('param', 'noise')]
    """

    _pyro_name: str
    _pyro_context: Context
    _pyro_params: OrderedDict[str, tuple[constraints.Constraint, int | None]]
    _pyro_samples: OrderedDict[str, Any]  # attribute -> prior

    def __init__(self, name: str = "") -> None:
        initialise(self, name)
        super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._pyro_context:
            result = super().__call__(*args, **kwargs)
        if settings.get("module_local_params") and not self._pyro_context.active:
            self._require_local_params()
        return result

    # ---------------------------------------------------------------- names

    def add_module(self, name: str, module: torch.nn.Module | None) -> None:
        """Add a child; a PyroModule is named by its place here and shares this call's samples."""
        if isinstance(module, PyroModule):
            module._pyro_set_supermodule(join(self._pyro_name, name), self._pyro_context)
        super().add_module(name, module)

    def named_pyro_params(
        self, prefix: str = "", recurse: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Like ``named_parameters``, with the names and constrained values of PyroParams."""
        yield from self._named_members(_named_values, prefix=prefix, recurse=recurse)

    def _pyro_set_supermodule(self, name: str, context: Context) -> None:
        if settings.get("module_local_params"):
            self._require_local_params()
        self._pyro_name = name
        self._pyro_context = context
        for key, child in self._modules.items():
            if not isinstance(child, PyroModule):
                continue
            if child._pyro_context.used and child._pyro_context is not context:
                raise SiteError(
                    f"{type(child).__name__} was called before it became '{join(name, key)}', so "
                    f"its sites are already known as '{child._pyro_name or '<root>'}'. Put modules "
                    "together before calling any of them, or make a fresh one"
                )
            child._pyro_set_supermodule(join(name, key), context)

    def _pyro_get_fullname(self, name: str) -> str:
        if not self._pyro_context.used:
            raise SiteError(
                f"the full name of attribute '{name}' of {type(self).__name__} is not known before "
                "a module above it has been called"
            )
        return join(self._pyro_name, name)

    def _require_local_params(self) -> None:
        if settings.get("validate") == "never":
            return
        own = {id(p) for p in self.parameters()}
        for name, leaf in self._pyro_context.param_state["params"].items():
            if id(leaf) not in own:
                raise NotImplementedError(
                    f"with the setting module_local_params, pyro.param('{name}') inside of "
                    f"{type(self).__name__} has no place to live: make it an attribute "
                    f"(self.{name} = PyroParam(...)), or leave the setting off"
                )

    # ---------------------------------------------------------------- reading

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if name in own.get("_pyro_params", ()):
            return self._read_pyro_param(name)
        if name in own.get("_pyro_samples", ()):
            return self._read_sample(name)
        result = super().__getattr__(name)
        if isinstance(result, torch.nn.Module):
            self._announce_module(name, result)
        elif (
            isinstance(result, torch.nn.Parameter)
            and not name.endswith(leaves.SUFFIX)
            and self._pyro_context.active
        ):
            return self._read_parameter(name, result)
        return result

    def _read_pyro_param(self, name: str) -> torch.Tensor:
        constraint, event_dim = self._pyro_params[name]
        leaf: Any = super().__getattr__(name + leaves.SUFFIX)
        if not self._pyro_context.active:  # no root module is known, so no full name either
            return leaves.constrained(leaf, constraint)
        fullname = self._pyro_get_fullname(name)
        if settings.get("module_local_params"):
            value = leaves.constrained(leaf, constraint)
            return _local_statement(fullname, value, constraint=constraint, event_dim=event_dim)
        self._parameters[name + leaves.SUFFIX] = leaves.agree(fullname, leaf, constraint)
        return primitives.param(fullname, event_dim=event_dim)

    def _read_parameter(self, name: str, leaf: torch.nn.Parameter) -> torch.Tensor:
        fullname = self._pyro_get_fullname(name)
        if settings.get("module_local_params"):
            return _local_statement(fullname, leaf, leaf, constraint=constraints.real)
        if not leaf.requires_grad and fullname not in PARAM_STORE:
            return leaf  # frozen: a param statement would make it trainable
        value = primitives.param(fullname, leaf)
        self._parameters[name] = leaves.agree(fullname, leaf, constraints.real)
        return value

    def _read_sample(self, name: str) -> torch.Tensor:
        prior = self._pyro_samples[name]
        context = self._pyro_context
        if not context.active:
            value = self._prior_of(name, prior)
            return value if isinstance(value, torch.Tensor) else value()
        fullname = self._pyro_get_fullname(name)
        if fullname not in context.cache:
            value = self._prior_of(name, prior)
            if isinstance(value, torch.Tensor):
                context.cache[fullname] = primitives.deterministic(fullname, value)
            else:
                context.cache[fullname] = primitives.sample(fullname, value)
        return context.cache[fullname]

    def _prior_of(self, name: str, prior: Any) -> Any:
        if is_distribution(prior):
            return prior
        value = prior(self)
        if is_distribution(value) or isinstance(value, torch.Tensor):
            return value
        raise DtypeError(
            f"the prior of PyroSample attribute '{name}' of {type(self).__name__} returned "
            f"{describe(value)}; it must return a distribution, or a tensor for a site that "
            "is deterministic"
        )

    def _announce_module(self, name: str, child: torch.nn.Module) -> None:
        if isinstance(child, PyroModule):
            if not child._pyro_name:  # converted in place after it had become an attribute
                child._pyro_set_supermodule(join(self._pyro_name, name), self._pyro_context)
        elif self._pyro_context.active:
            fullname = self._pyro_get_fullname(name)
            if not settings.get("module_local_params"):
                primitives.module(fullname, child)
                return
            for key, leaf in child.named_parameters():
                full = param_with_module_name(fullname, key)
                _local_statement(full, leaf, leaf, constraint=constraints.real)

    # ---------------------------------------------------------------- assigning

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, _DECLARATIONS) and "_modules" not in self.__dict__:
            raise AttributeError(
                f"cannot assign {type(value).__name__} attribute '{name}' of {type(self).__name__} "
                "before super().__init__() was called"
            )
        if isinstance(value, PyroModule):
            self._overwrite(name)
            self.add_module(name, value)
        elif isinstance(value, PyroParam):
            self._assign_pyro_param(name, value)
        elif isinstance(value, torch.nn.Parameter):
            self._assign_parameter(name, value)
        elif isinstance(value, PyroSample):
            self._overwrite(name)
            self._pyro_samples[name] = value.prior
        elif isinstance(value, torch.Tensor) and name in self.__dict__.get("_pyro_params", ()):
            self._assign_value(name, value)
        else:
            if name in self.__dict__.get("_pyro_params", ()) or (
                name in self.__dict__.get("_pyro_samples", ())
            ):
                delattr(self, name)  # else reading would still find the parameter or prior
            super().__setattr__(name, value)

    def _holds(self, name: str) -> bool:
        """Whether attribute ``name`` is a parameter, sample or module, without reading it."""
        kinds = (self._pyro_params, self._pyro_samples, self._parameters, self._modules)
        return any(name in kind for kind in kinds)

    def _overwrite(self, name: str) -> None:
        """Remove what attribute ``name`` holds, of whatever kind."""
        if self._holds(name) or name in self.__dict__ or name in self._buffers:
            delattr(self, name)

    def _assign_pyro_param(self, name: str, declared: PyroParam) -> None:
        initial, constraint, event_dim = declared
        if not isinstance(constraint, constraints.Constraint):
            raise DtypeError(
                f"PyroParam attribute '{name}' has constraint {describe(constraint)}; give one of "
                "torch.distributions.constraints, such as constraints.positive"
            )
        if initial is None:
            raise DtypeError(
                f"PyroParam attribute '{name}' has no initial value; give a tensor, or a function "
                "that returns one"
            )
        if isinstance(initial, torch.Tensor):
            initial = initial.detach().clone()  # the leaf must not share memory with another's
        context = self._pyro_context
        stored = context.active and not settings.get("module_local_params")
        leaf: Any = None
        if not stored or self._holds(name):
            # The value will be needed, so a bad one is found before the old attribute goes.
            with torch.no_grad():
                initial = initial() if callable(initial) else initial
            leaf = leaves.new_leaf(name, initial, constraint)
        self._overwrite(name)
        if context.active:
            fullname = self._pyro_get_fullname(name)
            options: dict[str, Any] = {"constraint": constraint, "event_dim": event_dim}
            if stored:
                value = primitives.param(fullname, initial, **options)
            else:
                value = _local_statement(fullname, initial, **options)
            if stored and fullname in PARAM_STORE:
                leaf = leaves.as_parameter(PARAM_STORE.leaf(fullname))
            elif leaf is None or value is not initial:  # a handler gave the value
                leaf = leaves.new_leaf(name, value, constraint)
        self._pyro_params[name] = constraint, event_dim
        super().__setattr__(name + leaves.SUFFIX, leaf)

    def _assign_parameter(self, name: str, leaf: torch.nn.Parameter) -> None:
        self._overwrite(name)
        if self._pyro_context.active:
            fullname = self._pyro_get_fullname(name)
            if settings.get("module_local_params"):
                _local_statement(fullname, leaf, leaf, constraint=constraints.real)
            elif leaf.requires_grad or fullname in PARAM_STORE:
                primitives.param(fullname, leaf)
                leaf = leaves.agree(fullname, leaf, constraints.real)
        super().__setattr__(name, leaf)

    def _assign_value(self, name: str, value: torch.Tensor) -> None:
        """New constrained value for an existing PyroParam, whose leaf stays the same object."""
        constraint, _ = self._pyro_params[name]
        leaf = getattr(self, name + leaves.SUFFIX)
        unconstrained = leaves.new_leaf(name, value, constraint)
        with torch.no_grad():
            if unconstrained.shape == leaf.shape:
                leaf.copy_(unconstrained)
            else:
                leaf.data = unconstrained.data.to(leaf)

    # ---------------------------------------------------------------- deleting

    def __delattr__(self, name: str) -> None:
        if name in self._pyro_samples:
            del self._pyro_samples[name]
        elif name in self._pyro_params:
            del self._pyro_params[name]
            del self._parameters[name + leaves.SUFFIX]
            if self._pyro_context.used:
                leaves.forget(self._pyro_get_fullname(name))
        elif name in self._parameters:
            del self._parameters[name]
            if self._pyro_context.used:
                leaves.forget(self._pyro_get_fullname(name))
        elif name in self._modules:
            del self._modules[name]
            if self._pyro_context.used:
                leaves.forget_module(self._pyro_get_fullname(name))
        else:
            super().__delattr__(name)

    # ---------------------------------------------------------------- pickling

    def __getstate__(self) -> dict[str, Any]:
        state = dict(getattr(super(), "__getstate__", self.__dict__.copy)())
        state["_parameters"] = type(self._parameters)(
            (name, leaf if leaf is None else leaves.portable(leaf))
            for name, leaf in self._parameters.items()
        )
        # Priors declared by a decorator are found again through the class.
        state["_pyro_samples"] = OrderedDict(
            (name, prior)
            for name, prior in self._pyro_samples.items()
            if getattr(getattr(type(self), name, None), "prior", None) is not prior
        )
        return state


def pyro_method(method: Method) -> Method:
    """Decorator: a method other than ``forward`` through which a :class:`PyroModule` is used.

    Reads of its attributes are statements, and samples are drawn once, as in a call.

    >>> import fastsvi.distributions as dist
    >>> class Coin(PyroModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.p = PyroSample(dist.Beta(1.0, 1.0))
    ...
    ...     @pyro_method
    ...     def same(self):
    ...         return self.p is self.p
    >>> Coin().same()
    True
    """

    @functools.wraps(method)
    def inside(self: PyroModule, *args: Any, **kwargs: Any) -> Any:
        with self._pyro_context:
            return method(self, *args, **kwargs)

    return inside  # type: ignore[return-value]


_DECLARATIONS = (PyroModule, PyroParam, PyroSample, torch.nn.Parameter)


def initialise(module: torch.nn.Module, name: str = "") -> None:
    """The state that makes ``module`` a PyroModule."""
    module._pyro_name = name  # type: ignore[assignment]
    module._pyro_context = Context()  # type: ignore[assignment]
    module._pyro_params = OrderedDict()  # type: ignore[assignment]
    module._pyro_samples = OrderedDict()  # type: ignore[assignment]


def _named_values(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    for name, leaf in module._parameters.items():
        plain = name.removesuffix(leaves.SUFFIX)
        if isinstance(module, PyroModule) and plain != name and plain in module._pyro_params:
            yield plain, getattr(module, plain)
        else:
            yield name, leaf


def _local_statement(name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    """A param statement that handlers see, for a value that never enters the param store."""
    statement = effectful(lambda *_, **__: value, type="param")
    return statement(name, *args, name=name, **kwargs)
