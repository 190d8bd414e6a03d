"""The base of all handlers: installing, removing, and dispatch on the type of message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from fastsvi.errors import describe
from fastsvi.poutine.errors import HandlerError
from fastsvi.poutine.message import Message
from fastsvi.poutine.runtime import STACK

_Self = TypeVar("_Self", bound="Messenger")


class _MethodNames(dict[str, str]):
    """Message type -> name of the method that handles it; formatted once per type."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def __missing__(self, type: str) -> str:
        name = self[type] = self.prefix + type
        return name


_PROCESS = _MethodNames("_pyro_")
_POSTPROCESS = _MethodNames("_pyro_post_")


class Messenger:
    """A handler: changes what the primitives called under it do.

    A handler is a context manager, and called with a function it wraps that function. A subclass
    says what it does to messages of a type by methods ``_pyro_<type>(msg)``, before the value is
    known, and ``_pyro_post_<type>(msg)``, after. This base class does nothing to any message.

    >>> import torch, fastsvi as pyro, fastsvi.distributions as dist
    >>> class Double(Messenger):
    ...     def _pyro_post_sample(self, msg):
    ...         msg["value"] = 2 * msg["value"]
    >>> with Double():
    ...     pyro.sample("x", dist.Delta(torch.tensor(3.0)))
    tensor(6.)
    """

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` run under this handler."""
        if not callable(fn):
            raise HandlerError(
                f"{type(self).__name__} wraps a function, found {describe(fn)}; an option of the "
                "handler must be passed by keyword"
            )
        return HandledFunction(self, fn)

    def __enter__(self: _Self) -> _Self:
        if self in STACK:
            raise HandlerError(
                f"this {type(self).__name__} is already installed; a handler cannot be nested in "
                "itself, so make a second one"
            )
        STACK.append(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if STACK and STACK[-1] is self:
            STACK.pop()
        elif exc_type is None:
            raise HandlerError(
                f"this {type(self).__name__} is not the innermost handler; handlers must be left "
                "in the reverse of the order in which they were entered"
            )
        elif self in STACK:
            # A suspended generator (`for i in plate`) that an exception left behind is still on
            # the stack below us: take it along. But when the collector closes such a generator
            # late, whatever stands below by then is none of its business.
            here = STACK.index(self)
            end = here + 1 if exc_type is GeneratorExit else len(STACK)
            del STACK[here:end]

    def _reset(self) -> None:
        """Forget what was seen, to run the model again (``poutine.queue``)."""

    def _stand_in(self) -> MutedMessenger:
        """What takes our place on the stack while we are muted."""
        return MutedMessenger(self)

    def _process_message(self, msg: Message) -> None:
        method = getattr(self, _PROCESS[msg.type], None)
        if method is not None:
            method(msg)

    def _postprocess_message(self, msg: Message) -> None:
        method = getattr(self, _POSTPROCESS[msg.type], None)
        if method is not None:
            method(msg)

    @classmethod
    def register(
        cls,
        fn: Callable[[Message], None] | None = None,
        type: str | None = None,
        post: bool | None = None,
    ) -> Callable[..., Any]:
        """Add ``fn(msg)`` to this class as its method for messages of ``type``."""
        if fn is None:
            return partial(cls.register, type=type, post=post)
        names = _POSTPROCESS if post else _PROCESS
        setattr(cls, names[_require_type(type)], staticmethod(fn))
        return fn

    @classmethod
    def unregister(
        cls, fn: Callable[[Message], None] | None = None, type: str | None = None
    ) -> Callable[[Message], None] | None:
        """Remove this class's methods for messages of ``type``."""
        type = _require_type(type)
        for name in (_PROCESS[type], _POSTPROCESS[type]):
            if name in cls.__dict__:
                delattr(cls, name)
        return fn


def _require_type(type: str | None) -> str:
    if type is None:
        raise HandlerError("a message type must be given, as in register(type='sample')")
    return type


class HandledFunction:
    """A function run under a handler. In a class body it binds like a method."""

    def __init__(self, messenger: Messenger, fn: Callable[..., Any]) -> None:
        self.messenger = messenger
        self.fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.messenger:
            return self.fn(*args, **kwargs)

    def __get__(self, instance: object, owner: type | None = None) -> Callable[..., Any]:
        return self if instance is None else partial(self, instance)

    def __repr__(self) -> str:
        return f"{type(self.messenger).__name__}({self.fn!r})"


def unwrap(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function under all the handlers that wrap it.

    >>> from fastsvi import poutine
    >>> def model(): ...
    >>> unwrap(poutine.scale(poutine.block(model), scale=2.0)) is model
    True
    """
    while True:
        if isinstance(fn, HandledFunction):
            fn = fn.fn
        elif isinstance(fn, partial) and isinstance(fn.func, HandledFunction):
            fn = fn.func
        else:
            return fn


class MutedMessenger(Messenger):
    """Stands in the stack for a handler that :func:`block_messengers` has muted."""

    def __init__(self, muted: Messenger) -> None:
        super().__init__()
        self.muted = muted


@contextmanager
def block_messengers(predicate: Callable[[Messenger], bool]) -> Iterator[list[Messenger]]:
    """Mute the enclosing handlers for which ``predicate`` is true, without leaving them.

    Yields the muted handlers.
    """
    muted: dict[int, Messenger] = {}
    try:
        for i, messenger in enumerate(STACK):
            if predicate(messenger):
                muted[i] = messenger
                STACK[i] = messenger._stand_in()
        yield list(muted.values())
    finally:
        for i, messenger in muted.items():
            STACK[i] = messenger
