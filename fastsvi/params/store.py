"""The parameter store: every learnable tensor of a program, by name.

A parameter has two values. The **constrained** one is what a program works with: a scale, a
probability, a covariance factor. The **unconstrained** one is what an optimizer works with: a leaf
tensor without bounds, from which the constrained value is computed at every read.

============================================  =======================================
constrained                                   unconstrained
============================================  =======================================
``store[name]``, ``items()``, ``values()``    ``store.leaf(name)``
``setdefault``, ``get_param``, ``match``      ``named_parameters()``
``store[name] = value``, ``constrain_all()``  ``store[name].unconstrained()``
``fastsvi.param``                             ``get_state()["params"]``, files, buffers
============================================  =======================================
"""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions import constraints as tc
from torch.distributions.constraints import Constraint

from fastsvi.errors import (
    FastSVIError,
    FastSVIWarning,
    MissingParamError,
    describe,
)
from fastsvi.params import flat_read
from fastsvi.params.bound import BoundDistribution, bind
from fastsvi.params.buffer import Buffer
from fastsvi.params.checkpoint import PathLike
from fastsvi.params.registry import Registry, as_leaf
from fastsvi.params.relocation import MapLocation
from fastsvi.params.state_file import StateDict, load_state, save_state
from fastsvi.params.transforms import coding_of, make_leaf

Init = Tensor | Callable[[], Tensor]


class StoreStateError(FastSVIError, ValueError, AssertionError):
    """A state that :meth:`ParamStore.set_state` cannot take."""


class ParamStore(Registry):
    """Parameters by name, with the interface of Pyro's ``ParamStoreDict``.

    Like a dict of **constrained** values; but :meth:`named_parameters` gives the **unconstrained**
    leaves, for optimizers. All leaves of one device and dtype lie in one flat
    :class:`~fastsvi.params.buffer.Buffer`.

    >>> import torch
    >>> from torch.distributions import constraints
    >>> store = ParamStore()
    >>> scale = store.setdefault("scale", torch.tensor([1.0, 2.0]), constraints.positive)
    >>> store["scale"]  # constrained
    tensor([1., 2.], grad_fn=<ExpBackward0>)
    >>> store.leaf("scale")  # unconstrained: the logarithm
    tensor([0.0000, 0.6931], requires_grad=True)
    >>> store["scale"] = torch.tensor([3.0, 3.0])  # keeps the constraint
    >>> store["scale"].tolist()
    [3.0, 3.0]
    """

    def __init__(self) -> None:
        super().__init__()
        self._warned: set[str] = set()

    # --- a dict of constrained values -------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __repr__(self) -> str:
        shapes = [f"{name}: {tuple(leaf.shape)}" for name, leaf in self._params.items()]
        more = f", and {len(shapes) - 8} more" if len(shapes) > 8 else ""
        return f"ParamStore({', '.join(shapes[:8])}{more})"

    def keys(self) -> KeysView[str]:
        """Names of the parameters."""
        return self._params.keys()

    def values(self) -> Iterator[Tensor]:
        """Constrained values."""
        return (self[name] for name in self._params)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of name and constrained value."""
        return ((name, self[name]) for name in self._params)

    def __getitem__(self, name: str) -> Tensor:
        """Constrained value, computed anew; its attribute ``unconstrained()`` gives the leaf.

        Raises:
            MissingParamError: there is no such parameter (a ``KeyError``).
        """
        entry = self._entries.get(name)
        if entry is None:
            raise self._missing(name)
        leaf, ref, read = entry
        value = leaf if read is None else read(leaf)
        value.unconstrained = ref  # type: ignore[attr-defined]
        return value

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Set a constrained value; the parameter gets a new leaf and keeps its constraint.

        A new name gets the constraint ``real``; use :meth:`setdefault` for another one.

        Raises:
            ConstraintError, DtypeError, ShapeError: the value cannot be stored; nothing changes.
        """
        constraint = self._constraints.get(name, tc.real)
        self._put(name, make_leaf(name, value, constraint), constraint)

    def __delitem__(self, name: str) -> None:
        if name not in self._entries:
            raise self._missing(name)
        self._drop(name)

    def clear(self) -> None:
        """Delete all parameters."""
        super().clear()
        self._warned.clear()

    def setdefault(self, name: str, init: Init, constraint: Constraint = tc.real) -> Tensor:
        """Constrained value of ``name``, which is first made from ``init`` if it is not there.

        Args:
            name: of the parameter.
            init: constrained value, or a function that returns one and is called only when needed.
                Where the constraint is ``real`` and the tensor contiguous, it becomes the leaf
                itself: it is not copied, and requires gradients from now on.
            constraint: of the parameter. Constraint and ``init`` are ignored if the name is there.

        Raises:
            ConstraintError: ``init`` is outside the constraint.
            DtypeError: it is no tensor, or of a dtype without gradients.
            ShapeError: the constraint does not take its shape. After an error nothing has changed.
        """
        entry = self._entries.get(name)
        if entry is None:
            value = init() if callable(init) else init
            self._put(name, make_leaf(name, value, constraint), constraint)
            return self[name]
        leaf, ref, read = entry
        value = leaf if read is None else read(leaf)
        value.unconstrained = ref  # type: ignore[attr-defined]
        if isinstance(init, Tensor) and init.shape != value.shape:
            self._warn_ignored(name, init, value)
        return value

    # --- further access to constrained values -----------------------------------------------

    def get_param(
        self,
        name: str,
        init_tensor: Init | None = None,
        constraint: Constraint = tc.real,
        event_dim: int | None = None,
    ) -> Tensor:
        """What ``fastsvi.param`` calls: ``store[name]``, or :meth:`setdefault` if given a value.

        ``event_dim`` is for plates, which subsample the value; the store ignores it.
        """
        if init_tensor is None:
            return self[name]
        return self.setdefault(name, init_tensor, constraint)

    def match(self, name: str) -> dict[str, Tensor]:
        """Constrained values of all names that start with a match of the regular expression."""
        pattern = re.compile(name)
        return {name: self[name] for name in self._params if pattern.match(name)}

    def constrain_all(self) -> dict[str, Tensor]:
        """All constrained values, computed together.

        The same values as ``dict(store.items())``, and gradients reach the leaves alike; but all
        elementwise constraints of a buffer are one kernel call, and real values are copies. (Where
        a value has run into the bound of an interval, torch's gradient is 0 and the kernel's is
        the true one.)
        """
        values: dict[str, Tensor] = {}
        self.sync()
        for buffer in self._buffers.values():
            if len(buffer.layout):
                plan = self._plan(buffer)
                values.update(flat_read.constrain_flat(flat_read.gather(buffer, plan), plan))
        for name in self._owners:
            values[name] = self[name]
        for name, entry in self._entries.items():
            values[name].unconstrained = entry.ref  # type: ignore[attr-defined]
        return {name: values[name] for name in self._params}

    def constrain_flat(self, buffer: Buffer, flat: Tensor) -> dict[str, Tensor]:
        """Constrained values for other contents of a buffer, as a pure function.

        Args:
            buffer: whose layout ``flat`` has.
            flat: unconstrained values, ``[..., N]``.

        Returns:
            Constrained values, ``[..., *shape]``, of the parameters of this buffer.
        """
        return flat_read.constrain_flat(flat, self._plan(buffer))

    def distribution(
        self,
        family: Callable[..., Distribution],
        prefix: str,
        /,
        *,
        fixed: Mapping[str, Any] | None = None,
        constraints: Mapping[str, Constraint] | None = None,
        **arguments: Any,
    ) -> BoundDistribution:
        """A distribution over parameters of this store, defined once and used for ever.

        Each use (``rsample``, ``log_prob``, ``mean``, ...) sees the current values, with a graph
        of its own; so thousands of backward passes go through it without ``retain_graph``.

        Args:
            family: a distribution class.
            prefix: the argument ``rate`` becomes the parameter ``"<prefix>.rate"``.
            fixed: arguments that are not learned, as they are.
            constraints: for arguments whose constraint depends on others, or to override one.
            arguments: initial constrained values, tensors or numbers. Their constraints are the
                family's ``arg_constraints``. Parameters that exist are taken as they are.

        Raises:
            ConstraintError, DtypeError, ShapeError: an argument cannot be a parameter; the
                message names it, and the store is as it was.

        >>> import torch
        >>> store = ParamStore()
        >>> q = store.distribution(torch.distributions.Gamma, "q", concentration=2.0, rate=1.0)
        >>> q.log_prob(torch.tensor(1.0)).backward()
        >>> q.log_prob(torch.tensor(1.0)).backward()  # no retain_graph needed
        >>> [tuple(leaf.shape) for leaf in q.parameters()]  # unconstrained, for an optimizer
        [(), ()]
        >>> sorted(store)
        ['q.concentration', 'q.rate']
        """
        return bind(self, family, prefix, fixed or {}, constraints or {}, arguments)

    # --- unconstrained leaves ---------------------------------------------------------------

    def leaf(self, name: str) -> Tensor:
        """The UNCONSTRAINED leaf: one object from registration to deletion.

        Raises:
            MissingParamError: there is no such parameter.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise self._missing(name)
        return entry.leaf

    def named_parameters(self) -> ItemsView[str, Tensor]:
        """Pairs of name and UNCONSTRAINED leaf, for optimizers.

        A parameter with the constraint ``positive`` shows up here as its logarithm. For the values
        that a model sees use :meth:`items`.

        >>> import torch
        >>> from torch.distributions import constraints
        >>> store = ParamStore()
        >>> scale = store.setdefault("scale", torch.tensor(1.0), constraints.positive)
        >>> [(name, leaf.item()) for name, leaf in store.named_parameters()]
        [('scale', 0.0)]
        >>> [(name, value.item()) for name, value in store.items()]
        [('scale', 1.0)]
        """
        return self._params.items()

    def param_name(self, p: Tensor) -> str | None:
        """Name of a leaf, or None if the store does not have it."""
        return self._param_to_name.get(p)

    def constraint(self, name: str) -> Constraint:
        """Constraint of a parameter.

        Raises:
            MissingParamError: there is no such parameter.
        """
        if name not in self._entries:
            raise self._missing(name)
        return self._constraints[name]

    # --- state and files --------------------------------------------------------------------

    def get_state(self) -> StateDict:
        """Leaves (UNCONSTRAINED, the live tensors and not copies) and constraints, by name.

        To write them to a file use :meth:`save`: ``torch.save`` writes the memory of the whole
        buffer that a leaf may be a view of.
        """
        for leaf in self._params.values():
            leaf.__dict__.pop("unconstrained", None)  # weak references keep pickle from working
        constraints = {name: self._constraints[name] for name in self._params}
        return {"params": dict(self._params), "constraints": constraints}

    def set_state(self, state: StateDict) -> None:
        """Put the parameters of a state in, beside those that are there and have other names.

        Raises:
            StoreStateError: the state is malformed; nothing changes. (An ``AssertionError`` too,
                as in Pyro.)
        """
        if not (isinstance(state, dict) and set(state) == {"params", "constraints"}):
            raise StoreStateError(
                "a state is a dict with the keys 'params' and 'constraints', found "
                f"{sorted(map(str, state)) if isinstance(state, dict) else describe(state)}"
            )
        params, constraints = state["params"], state["constraints"]
        for name, leaf in params.items():
            if not isinstance(leaf, Tensor) or not isinstance(constraints.get(name), Constraint):
                raise StoreStateError(
                    f"the state of param {name!r} must be an unconstrained tensor and a "
                    f"constraint, found {describe(leaf)} and {constraints.get(name)!r}"
                )
            coding_of(constraints[name], name)
        for name, leaf in params.items():
            constraint = constraints[name]
            # An unpickled "real" is another object than the one that programs compare with.
            is_real = isinstance(constraint, type(tc.real))
            self._put(name, as_leaf(leaf), tc.real if is_real else constraint)

    @contextmanager
    def scope(self, state: StateDict | None = None) -> Iterator[StateDict]:
        """Work with other parameters for the length of a ``with`` block.

        The block starts with those in ``state`` (none by default), which is also what it yields
        and what holds its parameters afterwards. Then the store is as it was before; after an
        exception ``state`` is not updated.

        >>> import torch
        >>> store = ParamStore()
        >>> outer = store.setdefault("x", torch.zeros(1))
        >>> with store.scope() as other:
        ...     inner = store.setdefault("x", torch.ones(1))
        >>> store["x"] is outer, other["params"]["x"] is inner
        (True, True)
        """
        if state is None:
            state = {"params": {}, "constraints": {}}
        before = self.get_state()
        try:
            self.clear()
            self.set_state(state)
            yield state
            state.update(self.get_state())
        finally:
            self.clear()
            self.set_state(before)

    def save(self, filename: PathLike, format: Literal["fastsvi", "pyro"] = "fastsvi") -> None:
        """Write all parameters to a file, atomically: a crash leaves the previous file.

        ``format="fastsvi"`` is safetensors with a JSON header and no pickle; ``"pyro"`` is a
        pickle that Pyro's own store can load.

        Raises:
            CheckpointError: a constraint has no name in a file.
        """
        save_state(filename, self.get_state(), format)

    def load(self, filename: PathLike, map_location: MapLocation = None) -> None:
        """Put the parameters of a file in, as :meth:`set_state` does.

        Reads both formats of :meth:`save`, and files that Pyro's store wrote; none is unpickled.

        Args:
            filename: of the file.
            map_location: where tensors should go, as for ``torch.load``: a device, a dict from
                saved to new device, or a function of (storage, saved location).

        Raises:
            CheckpointError: the file is truncated, damaged, unsafe or of another format; the
                store is as it was.
        """
        self.set_state(load_state(filename, map_location))

    def __getstate__(self) -> StateDict:
        state = self.get_state()
        copies: dict[int, Tensor] = {}
        for leaf in state["params"].values():
            value = leaf.detach().clone()  # a view would take the whole buffer along
            copies[id(leaf)] = (
                nn.Parameter(value, requires_grad=leaf.requires_grad)
                if isinstance(leaf, nn.Parameter)
                else value.requires_grad_(leaf.requires_grad)
            )
        state["params"] = {name: copies[id(leaf)] for name, leaf in state["params"].items()}
        return state

    def __setstate__(self, state: StateDict) -> None:
        self.__init__()  # type: ignore[misc]
        self.set_state(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParamStore:
        twin = type(self)()
        memo[id(self)] = twin
        twin.set_state(copy.deepcopy(self.get_state(), memo))
        return twin

    # --- deprecated -------------------------------------------------------------------------

    def get_all_param_names(self) -> KeysView[str]:
        """Deprecated: use :meth:`keys`."""
        warnings.warn(
            "ParamStore.get_all_param_names() is deprecated; use keys()",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.keys()

    def replace_param(self, param_name: str, new_param: Tensor, old_param: Tensor) -> None:
        """Deprecated: use ``store[param_name] = new_param``."""
        warnings.warn(
            "ParamStore.replace_param() is deprecated; use store[name] = value",
            DeprecationWarning,
            stacklevel=2,
        )
        if self.leaf(param_name) is not old_param.unconstrained():  # type: ignore[attr-defined]
            raise StoreStateError(
                f"param {param_name!r} was replaced since old_param was read; read it again"
            )
        self[param_name] = new_param

    # --- messages ---------------------------------------------------------------------------

    def _missing(self, name: object) -> MissingParamError:
        close = difflib.get_close_matches(str(name), map(str, islice(self._params, 256)), n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "register it first"
        return MissingParamError(f"there is no param {name!r} among {len(self)}; {hint}")

    def _warn_ignored(self, name: str, init: Tensor, value: Tensor) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"param {name!r} has the shape {tuple(value.shape)}; an initial value of shape "
                f"{tuple(init.shape)} is ignored. Clear the store before another run, or use "
                "another name",
                FastSVIWarning,
                stacklevel=3,
            )
