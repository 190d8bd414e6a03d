"""Markov dependence: ``markov``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from fastsvi.errors import DtypeError, describe
from fastsvi.poutine.errors import HandlerError
from fastsvi.poutine.message import Message
from fastsvi.poutine.reentrant_messenger import ReentrantMessenger
from fastsvi.poutine.util import site_is_subsample


class MarkovMessenger(ReentrantMessenger):
    """Declares that sites depend on sites of the last ``history`` contexts only.

    A context is a turn of ``for i in markov(range(n))``, a ``with`` block, or a call of a decorated
    function. Parallel enumeration reads it off ``infer["_markov_scope"]`` (how many contexts hold
    each visible earlier site) and ``infer["_markov_depth"]`` to use tensor dims again. With
    ``keep=True`` contexts at the same depth see each other's sites.
    """

    def __init__(
        self,
        history: int = 1,
        keep: bool = False,
        dim: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(history, int):
            raise DtypeError(f"markov: history must be an integer, found {describe(history)}")
        if history < 0:
            raise HandlerError(f"markov: history must not be negative, found {history}")
        if dim is not None or name is not None:
            raise NotImplementedError("markov: vectorized markov (dim, name) is not implemented")
        self.history = history
        self.keep = keep
        self._iterable: Iterable[Any] = ()
        self._pos = -1
        self._stack: list[set[str]] = []  # names of the sites in each context, outermost first

    def generator(self, iterable: Iterable[Any]) -> MarkovMessenger:
        """Make ``for value in self`` run over ``iterable``."""
        self._iterable = iterable
        return self

    def __iter__(self) -> Iterator[Any]:
        with ExitStack() as contexts:
            for value in self._iterable:
                contexts.enter_context(self)
                yield value

    def __enter__(self) -> Any:
        self._pos += 1
        if len(self._stack) <= self._pos:
            self._stack.append(set())
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        if not self.keep:
            self._stack.pop()
        self._pos -= 1
        super().__exit__(*exception)

    def _pyro_sample(self, msg: Message) -> None:
        if msg.done or site_is_subsample(msg):
            return
        # A Counter and not a set: a site goes out of scope when any of its contexts is left.
        scope = msg.infer.setdefault("_markov_scope", Counter())
        for names in self._stack[max(0, self._pos - self.history) : self._pos + 1]:
            scope.update(names)
        msg.infer["_markov_depth"] = 1 + msg.infer.get("_markov_depth", 0)
        self._stack[self._pos].add(msg.name)
