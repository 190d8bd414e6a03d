"""The message that a primitive sends up and down the handler stack.

A :class:`Message` is typed: its fields are attributes. It also speaks the mapping protocol
(``msg["value"]``, ``"log_prob" in msg``, ``msg.update(...)``), because Pyro programs and Pyro-style
handlers treat messages and the nodes of a trace as dicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastsvi.poutine.indep_messenger import CondIndepStackFrame

InferDict = dict[str, Any]
"""Per-site settings of inference: ``enumerate``, ``is_auxiliary``, ``num_samples`` and so on."""


def _result(name: str, doc: str) -> Any:
    """A property for a result that a trace adds; kept among the extra items, ``None`` if absent."""

    def read(msg: Message) -> Any:
        return None if msg._extra is None else msg._extra.get(name)

    def write(msg: Message, value: Any) -> None:
        if value is not None:
            msg.extra[name] = value
        else:
            msg.extra.pop(name, None)

    return property(read, write, doc=doc)


@dataclass(slots=True, eq=False, repr=False)
class Message(MutableMapping):
    """One call of a primitive: what was asked, what handlers made of it, and its value.

    Handlers change a message in place. A :class:`~fastsvi.poutine.Trace` adds results to its nodes;
    they are attributes too, ``None`` and absent from the mapping until computed. Results and other
    keys that are not fields are kept in :attr:`extra`.

    >>> msg = Message(type="sample", name="x", value=torch.tensor(1.0))
    >>> msg["name"], msg.name, msg.log_prob, "log_prob" in msg
    ('x', 'x', None, False)
    >>> msg["note"] = "mine"
    >>> msg.extra
    {'note': 'mine'}
    """

    type: str
    name: str = None  # type: ignore[assignment]  # only sites have one
    fn: Any = None  # a distribution, or the callable that computes the value
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    value: Any = None  # constrained
    is_observed: bool = False
    scale: float | torch.Tensor = 1.0  # broadcasts with log_prob
    mask: bool | torch.Tensor | None = None  # broadcasts with log_prob
    cond_indep_stack: tuple[CondIndepStackFrame, ...] = ()  # outermost plate first
    infer: InferDict = field(default_factory=dict)
    done: bool = False
    stop: bool = False
    continuation: Callable[[Message], None] | None = None
    _extra: dict[str, Any] | None = None  # most messages have no extra item: no dict is made

    log_prob = _result("log_prob", "Scaled, masked log-density of the value, ``[*batch]``.")
    log_prob_sum = _result("log_prob_sum", "Sum of ``log_prob``, ``[]``.")
    unscaled_log_prob = _result("unscaled_log_prob", "Log-density of the value, ``[*batch]``.")
    score_parts = _result("score_parts", "Terms of score function gradients.")
    packed = _result("packed", "Packed forms of the tensors above.")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Message:
        """A message with the items of ``values``; ``type`` must be among them."""
        if isinstance(values, Message):
            return values.copy()
        message = cls(values["type"])
        message.update(values)
        return message

    @property
    def extra(self) -> dict[str, Any]:
        """Items that are not fields: results, and private notes of handlers and algorithms."""
        if self._extra is None:
            self._extra = {}
        return self._extra

    def copy(self) -> Message:
        """A shallow copy: changing a field of one leaves the other alone."""
        # Written out, for a trace copies every site: half the time of any loop over the fields.
        new = object.__new__(Message)
        new.type = self.type
        new.name = self.name
        new.fn = self.fn
        new.args = self.args
        new.kwargs = self.kwargs
        new.value = self.value
        new.is_observed = self.is_observed
        new.scale = self.scale
        new.mask = self.mask
        new.cond_indep_stack = self.cond_indep_stack
        new.infer = self.infer
        new.done = self.done
        new.stop = self.stop
        new.continuation = self.continuation
        new._extra = None if self._extra is None else dict(self._extra)
        return new

    __copy__ = copy

    def __getitem__(self, key: str) -> Any:
        if key in _FIELDS:
            return getattr(self, key)
        if self._extra is None:
            raise KeyError(key)
        return self._extra[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key in _FIELDS:
            setattr(self, key, value)
        else:
            self.extra[key] = value

    def __delitem__(self, key: str) -> None:
        if self._extra is None or key in _FIELDS:
            raise KeyError(key)
        del self._extra[key]

    def __contains__(self, key: object) -> bool:
        return key in _FIELDS or (self._extra is not None and key in self._extra)

    def __iter__(self) -> Iterator[str]:
        yield from _FIELDS
        yield from self._extra or ()

    def __len__(self) -> int:
        return len(_FIELDS) + len(self._extra or ())

    # A message is compared by identity: comparing two by their tensors would be ambiguous.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        shown = (f"{key}={self[key]!r}" for key in self if _says_something(self[key]))
        return f"Message({', '.join(shown)})"


def _says_something(value: Any) -> bool:
    is_empty = isinstance(value, (tuple, dict)) and not value
    return not (is_empty or value is None or value is False)


# A dict and not a set: iteration is in the order of declaration.
_FIELDS = dict.fromkeys(f.name for f in fields(Message) if f.name != "_extra")
