"""The unconstrained leaves of a module, and how module and param store agree on one of them."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch.distributions import constraints, transform_to
from torch.utils.weak import WeakTensorKeyDictionary

from fastsvi.errors import FastSVIWarning
from fastsvi.params.transforms import make_leaf
from fastsvi.params.views import LeafRef
from fastsvi.poutine.runtime import PARAM_STORE

SUFFIX = "_unconstrained"


def new_leaf(
    name: str, value: torch.Tensor, constraint: constraints.Constraint
) -> torch.nn.Parameter:
    """A leaf whose constrained value is ``value``.

    Raises the errors of :func:`~fastsvi.params.transforms.make_leaf`, which name the parameter.
    """
    # Detached, or a real value would itself be made to require gradients.
    plain = value.detach() if isinstance(value, torch.Tensor) else value
    return torch.nn.Parameter(make_leaf(name, plain, constraint).detach())


def constrained(leaf: torch.Tensor, constraint: constraints.Constraint) -> torch.Tensor:
    """Constrained value of ``leaf``, which knows its leaf as store values do."""
    value: Any = transform_to(constraint)(leaf)
    value.unconstrained = LeafRef(leaf)
    return value


def as_parameter(leaf: torch.Tensor) -> torch.nn.Parameter:
    """``leaf`` itself as an ``nn.Parameter``, which is all that an ``nn.Module`` registers.

    The class changes in place: a new object would cut the leaf from store and optimizers.
    """
    if type(leaf) is torch.Tensor:
        leaf.__class__ = torch.nn.Parameter
    return leaf  # type: ignore[return-value]


def agree(
    fullname: str, leaf: torch.Tensor, constraint: constraints.Constraint
) -> torch.nn.Parameter:
    """The one leaf of module and store: the store's if it has one, else ``leaf``, now stored."""
    if fullname not in PARAM_STORE:
        PARAM_STORE._constraints[fullname] = constraint
        PARAM_STORE._params[fullname] = leaf
        return leaf  # type: ignore[return-value]
    stored = PARAM_STORE.leaf(fullname)
    if stored is leaf:
        return leaf  # type: ignore[return-value]
    if stored.shape != leaf.shape:
        warnings.warn(
            f"the param store holds '{fullname}' with unconstrained shape {tuple(stored.shape)}, "
            f"the module's attribute has {tuple(leaf.shape)} and takes the store's value: a module "
            "of the same name was here before, or is in use. Call fastsvi.clear_param_store() to "
            "start afresh, or put both modules below one root, which gives them different names",
            FastSVIWarning,
            stacklevel=5,
        )
    return as_parameter(stored)


def forget(fullname: str) -> None:
    """Remove parameter ``fullname`` from the store, if it is there."""
    if fullname in PARAM_STORE:
        del PARAM_STORE[fullname]


def forget_module(fullname: str) -> None:
    """Remove the parameters of module ``fullname`` from the store; "ab.x" is not one of "a"."""
    inside = (f"{fullname}.", f"{fullname}$$$")
    for name in [name for name in PARAM_STORE if name.startswith(inside)]:
        del PARAM_STORE[name]


_copies = WeakTensorKeyDictionary()  # leaf -> (its version, weak reference to its copy)


def portable(leaf: torch.nn.Parameter) -> torch.nn.Parameter:
    """``leaf``, or a copy of it if its memory is part of a buffer, for pickling.

    A pickle of the leaf itself would hold the whole buffer. While a copy is in use (a pickler keeps
    what it has seen), asking again gives the same one, so that tied weights stay tied.
    """
    leaf.__dict__.pop("unconstrained", None)
    if PARAM_STORE.param_name(leaf) is None or leaf.untyped_storage().nbytes() == leaf.nbytes:
        return leaf
    version, reference = _copies.get(leaf, (None, None))
    known = reference() if reference is not None and version == leaf._version else None
    if known is None:
        known = torch.nn.Parameter(leaf.detach().clone(), requires_grad=leaf.requires_grad)
        known.__dict__.update(leaf.__dict__)
        _copies[leaf] = (leaf._version, weakref.ref(known))
    return known
