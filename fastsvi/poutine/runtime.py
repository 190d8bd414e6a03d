"""The handler stack, the default parameter store, and how a message passes through the stack.

``STACK`` and ``PARAM_STORE`` are bound once and never swapped: programs and handlers import them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fastsvi.errors import DtypeError, describe
from fastsvi.params import ParamStore
from fastsvi.poutine.enum_dims import EnumDims
from fastsvi.poutine.message import InferDict, Message

if TYPE_CHECKING:
    from fastsvi.poutine.indep_messenger import CondIndepStackFrame
    from fastsvi.poutine.messenger import Messenger

__all__ = [
    "PARAM_STORE",
    "STACK",
    "InferDict",
    "Message",
    "NonlocalExit",
    "am_i_wrapped",
    "apply_stack",
    "default_process_message",
    "effectful",
    "get_mask",
    "get_plates",
]

_T = TypeVar("_T")

STACK: list[Messenger] = []  # outermost handler first
PARAM_STORE = ParamStore()

# Pyro's names of the same objects; libraries written for Pyro import them.
_PYRO_STACK = STACK
_PYRO_PARAM_STORE = PARAM_STORE
_ENUM_ALLOCATOR = EnumDims()


class NonlocalExit(Exception):
    """Leaves a model at one site, carrying the site's message: see ``poutine.escape``."""

    def __init__(self, site: Message, *args: Any) -> None:
        super().__init__(*args)
        self.site = site

    def reset_stack(self) -> None:
        """Reset the handlers still installed, down from the innermost, as far as sees the site."""
        for frame in reversed(STACK):
            frame._reset()
            hides = getattr(frame, "hide_fn", None)
            if hides is not None and hides(self.site):
                break


def default_process_message(msg: Message) -> None:
    """Compute the message's value, unless a handler or an observation has provided it."""
    if not (msg.done or msg.is_observed or msg.value is not None):
        msg.value = msg.fn(*msg.args, **msg.kwargs)
    msg.done = True


def apply_stack(initial_msg: Message) -> None:
    """Send a message through the handlers, in place.

    Each handler's ``_process_message`` sees it from the innermost handler outwards, until one sets
    ``stop``. Then the value is computed, and those same handlers' ``_postprocess_message`` see it
    from the outermost inwards. At last its ``continuation`` runs, if it has one.

    A plain dict, as Pyro programs build, is accepted too and updated in place.
    """
    if initial_msg.__class__ is not Message:
        _apply_stack_to_dict(initial_msg)
        return
    msg = initial_msg
    reached = 0
    for frame in reversed(STACK):
        reached += 1
        frame._process_message(msg)
        if msg.stop:
            break
    # default_process_message, written out: this is the hot path of every model.
    if not (msg.done or msg.is_observed or msg.value is not None):
        msg.value = msg.fn(*msg.args, **msg.kwargs)
    msg.done = True
    if reached:
        # The slice is a copy: a handler may leave the stack while it handles the message.
        for frame in STACK[-reached:]:
            frame._postprocess_message(msg)
    if msg.continuation is not None:
        msg.continuation(msg)


def _apply_stack_to_dict(fields: MutableMapping[str, Any]) -> None:
    msg = Message.from_mapping(fields)
    apply_stack(msg)
    fields.update(msg)


def am_i_wrapped() -> bool:
    """True while at least one handler is installed."""
    return len(STACK) > 0


def effectful(fn: Callable[..., _T] | None = None, type: str | None = None) -> Callable[..., Any]:
    """Make a function a primitive: its calls become messages of ``type`` that handlers can see.

    The wrapped function also takes the keywords ``name``, ``infer`` and ``obs``. Outside of all
    handlers it is just called.

    >>> from fastsvi.poutine.messenger import Messenger
    >>> @effectful(type="shout")
    ... def shout(word): return word.upper()
    >>> class Whisper(Messenger):
    ...     def _pyro_shout(self, msg): msg.value = msg.args[0].lower()
    >>> shout("Hi"), Whisper()(shout)("Hi")
    ('HI', 'hi')
    """
    if fn is None:
        return functools.partial(effectful, type=type)
    if getattr(fn, "_is_effectful", False):
        return fn
    if type is None:
        raise DtypeError(f"effectful needs the type of message that {fn!r} sends, such as 'sample'")
    return _effectful(fn, type)


def _effectful(fn: Callable[..., _T], type: str) -> Callable[..., Any]:
    @functools.wraps(fn)
    def primitive(
        *args: Any,
        name: str | None = None,
        infer: InferDict | None = None,
        obs: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not STACK:
            return fn(*args, **kwargs)
        msg = Message(type, name, fn, args, kwargs, obs, obs is not None)  # type: ignore[arg-type]
        if infer is not None:
            msg.infer = infer
        apply_stack(msg)
        return msg.value

    primitive._is_effectful = True  # type: ignore[attr-defined]
    return primitive


def check_name(name: object, primitive: str) -> None:
    """Raise unless ``name`` can name a site."""
    if not isinstance(name, str):
        raise DtypeError(
            f"{primitive}: a site's name must be a string, found {describe(name)}; the name comes "
            f'first, as in {primitive}("x", ...)'
        )


def inspect_stack() -> Message:
    """A message with the effects of all enclosing handlers: its mask, scale and plates."""
    msg = Message("inspect", "_pyro_inspect", lambda: True, infer={"_do_not_trace": True})
    apply_stack(msg)
    return msg


_inspect = inspect_stack  # Pyro's name


def get_mask() -> bool | torch.Tensor | None:
    """The mask that enclosing ``poutine.mask`` handlers put on a site here.

    Models use it to skip a costly density that would be masked out anyway::

        if poutine.get_mask() is not False:
            pyro.factor("expensive", log_density())
    """
    return inspect_stack().mask


def get_plates() -> tuple[CondIndepStackFrame, ...]:
    """The enclosing plates, outermost first."""
    return inspect_stack().cond_indep_stack
