"""The dictionaries that programs reach for behind the store's back: ``_params``, ``_constraints``.

Pyro's own modules read, copy, compare and write them, so they are real dictionaries, kept in step
with the store: reading costs nothing extra, writing goes through the store.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from torch import Tensor
from torch.distributions.constraints import Constraint

if TYPE_CHECKING:
    from fastsvi.params.registry import Registry

T = TypeVar("T")


class LeafRef(weakref.ref):  # type: ignore[type-arg]
    """What ``value.unconstrained`` holds: call it to get the leaf, or None once that is gone.

    A weak reference, so that a constrained value at hand does not keep a deleted parameter alive;
    but one that can be pickled with a tensor that carries it. The copy refers to nothing.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _lost, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> LeafRef:
        return self


def _nothing() -> None:
    return None


def _lost() -> Callable[[], None]:
    return _nothing


class _LiveDict(dict[str, T], Generic[T]):
    """A dictionary whose writes are carried out by the store, which then writes here."""

    __slots__ = ("_store",)

    def __init__(self, store: Registry) -> None:
        super().__init__()
        self._store = store

    def copy(self) -> dict[str, T]:
        return dict(self)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, T]:
        return copy.deepcopy(dict(self), memo)

    def __reduce__(self) -> tuple[type, tuple[dict[str, T]]]:  # type: ignore[override]
        return dict, (dict(self),)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self.update(other)
        return self

    def setdefault(self, name: str, default: T) -> T:  # type: ignore[override]
        if name not in self:
            self[name] = default
        return self[name]

    def _record(self, name: str, value: T) -> None:
        """For the store: write here."""
        dict.__setitem__(self, name, value)

    def _forget(self, name: str) -> None:
        dict.pop(self, name, None)

    def _forget_all(self) -> None:
        dict.clear(self)

    def _read_only(self, *args: Any) -> NoReturn:
        raise TypeError("delete params from the store: del store[name], store.clear()")

    __delitem__ = pop = popitem = clear = _read_only  # type: ignore[assignment]


class LiveLeaves(_LiveDict[Tensor]):
    """Name to unconstrained leaf. Writing puts this very tensor in as the leaf."""

    __slots__ = ()

    def __setitem__(self, name: str, leaf: Tensor) -> None:
        self._store._adopt(name, leaf)


class LiveConstraints(_LiveDict[Constraint]):
    """Name to constraint. Writing changes how the unconstrained value is read from now on.

    A name without a parameter may be written too: its parameter, once there, has that constraint.
    """

    __slots__ = ()

    def __setitem__(self, name: str, constraint: Constraint) -> None:
        self._store._constrain(name, constraint)
