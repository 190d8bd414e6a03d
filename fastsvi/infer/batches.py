"""Arguments that change from step to step: batches out of any iterable, epoch after epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from fastsvi.errors import ConstraintError, describe
from fastsvi.infer.arguments import Arguments, can_be_lifted

# Batches that a captured step takes in one call.
_MOST_AT_ONCE, _MOST_BYTES = 64, 1 << 25


class Batches:
    """The arguments of every step: those of a batch, then those that all steps share.

    Args:
        source: gives batches: a tuple or list of positional arguments, a dict of keyword
            arguments, or a single argument. When it ends it is iterated anew.
        args, kwargs: what follows the batch at every step.

    Raises:
        ConstraintError: ``source`` cannot be iterated.

    >>> batches = Batches([(1, 2), (3, 4)], (0,), {})
    >>> [batches.next().args for _ in range(3)]
    [(1, 2, 0), (3, 4, 0), (1, 2, 0)]
    """

    def __init__(
        self, source: Iterable[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not isinstance(source, Iterable):
            raise ConstraintError(
                f"batches is an iterable of batches, such as a DataLoader; found {describe(source)}"
            )
        self._source = source
        self._args = args
        self._kwargs = kwargs
        self._iterator: Iterator[Any] = iter(source)
        self._taken = 0
        self._may_look_ahead = _is_still(source)
        self._held: deque[Arguments] = deque()  # taken out, not used yet

    def next(self) -> Arguments:
        """The arguments of the next step.

        Raises:
            ConstraintError: the source has ended and gives no more batches.
        """
        if self._held:
            return self._held.popleft()
        try:
            batch = next(self._iterator)
        except StopIteration:
            batch = self._first_of_next_epoch()
        self._taken += 1
        if isinstance(batch, dict):
            return Arguments(self._args, {**batch, **self._kwargs})
        own = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        return Arguments((*own, *self._args), self._kwargs)

    def peek(self) -> Arguments:
        """What :meth:`next` will return."""
        if not self._held:
            self._held.append(self.next())
        return self._held[0]

    def alike(self, count: int, accepts: Callable[[Arguments], bool]) -> list[Arguments]:
        """Up to ``count`` further arguments, as long as they are accepted; few if large.

        None of a source that may do more than give batches: a generator may write to parameters or
        to the batches that it has given, or set a learning rate, and expects that a step is taken
        before it goes on.
        """
        taken: list[Arguments] = []
        if not self._may_look_ahead:
            return taken
        limit = _MOST_BYTES
        while len(taken) < min(count, _MOST_AT_ONCE) and limit > 0:
            try:
                following = self.peek()
            except ConstraintError:
                break  # the source has ended; whoever needs another batch will be told
            if not accepts(following):
                break
            taken.append(self.next())
            limit -= sum(x.nbytes for x in following.leaves if isinstance(x, Tensor))
        return taken

    def give_back(self, arguments: Sequence[Arguments]) -> None:
        """Have :meth:`next` return these first: they were not used."""
        self._held.extendleft(reversed(arguments))

    def _first_of_next_epoch(self) -> Any:
        self._iterator = iter(self._source)
        for batch in self._iterator:
            return batch
        raise ConstraintError(
            f"batches ended after {self._taken} steps and cannot be iterated again; give a list or "
            "a DataLoader in place of an iterator, or ask for fewer steps"
        )


def _is_still(source: Iterable[Any]) -> bool:
    """Whether taking a batch of ``source`` changes nothing but the place in it."""
    if isinstance(source, list | tuple | Tensor):
        return True
    # A loader that puts together its batches itself makes new tensors for each.
    is_loader = type(source) is DataLoader
    return is_loader and getattr(source, "collate_fn", None) is default_collate


def varying(arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int]:
    """Positions of the leaves that stem from a batch, and not from ``args`` and ``kwargs``."""
    shared = {id(leaf) for leaf in Arguments(args, kwargs).leaves}
    return frozenset(
        k
        for k, leaf in enumerate(arguments.leaves)
        if id(leaf) not in shared and can_be_lifted(leaf)
    )
