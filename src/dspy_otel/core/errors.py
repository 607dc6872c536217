"""Exceptions on spans, without letting content out through their messages."""

from __future__ import annotations

import collections
import contextlib
import os
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, NamedTuple

from dspy_otel import semconv
from dspy_otel.content.encoder import Content, type_name
from dspy_otel.content.introspection import arguments_of, bases_of, members_of
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.internal_errors import failed

_OURS: Final = os.path.dirname(os.path.dirname(__file__)) + os.sep
_FRAMES: Final = 50
_CHAIN: Final = 8
_TRAIL: Final = 16
_CAUSE: Final = "\nThe above exception was the direct cause of the following exception:\n\n"
_CONTEXT: Final = "\nDuring handling of the above exception, another exception occurred:\n\n"


def error_type(error: BaseException) -> str:
    """The class of ``error``, with its module unless it is a built-in one."""
    return type_name(type(error))


def exception_attributes(error: BaseException, content: Content | None) -> Attributes:
    """Attributes of an ``exception`` span event.

    Args:
        error: the exception.
        content: how to render content, or ``None`` when content must not be recorded. A message may quote a prompt
            or a completion, and a stack trace ends with the message: then only the type is given. So it is when
            the user's ``redact`` raises.
    """
    attributes: Attributes = {semconv.EXCEPTION_TYPE: error_type(error)}
    if content is not None:
        try:
            message = content.text(message_of(error))
            attributes[semconv.EXCEPTION_STACKTRACE] = stack_trace(error, content, message)
            attributes[semconv.EXCEPTION_MESSAGE] = message
        except Exception as problem:
            failed("content", problem)
    return attributes


class Recorded(NamedTuple):
    """What is kept of an exception that an inner span has recorded, to recognize it when it ends an outer one.

    The exception itself must not be kept alive: its frames hold the program's objects. Python's own exceptions take no
    weak reference, and an attribute set on one would change it for the program. So its ``id`` is kept. When a program
    catches an error and raises one of its own, that often has the ``id`` of the first, which is freed by then: type
    and ``id`` are not enough, and where the exception came from is compared too. Both steps take 5 us each, only for
    calls that raise; the ``exception`` event that they save takes 90.

    Attributes:
        identity: its ``id``.
        type: its class.
        kind: the kind of operation that recorded it.
        depth: how many frames it had come through, without ours.
        trail: code object (by ``id``) and position in it, of the 16 innermost of them.
        message: what the status of its span says; None when content must not be recorded.
    """

    identity: int
    type: type[BaseException]
    kind: str
    depth: int
    trail: tuple[tuple[int, int], ...]
    message: str | None = None

    @classmethod
    def of(cls, error: BaseException, kind: str, message: str | None = None) -> Recorded:
        """For ``error``, which an operation of this ``kind`` has just recorded."""
        depth, trail = _trail(error)
        return cls(id(error), type(error), kind, depth, trail, message)

    def is_(self, error: BaseException, kind: str) -> bool:
        """Whether ``error``, which ends an operation of this ``kind`` further out, is that exception."""
        if self.identity != id(error) or self.type is not type(error):
            return False
        depth, trail = _trail(error)
        # An operation inside one of its own kind (recursion) puts at least one frame around what it calls.
        further = depth > self.depth if kind == self.kind else depth >= self.depth
        return further and trail[len(trail) - len(self.trail) :] == self.trail


def _trail(error: BaseException) -> tuple[int, tuple[tuple[int, int], ...]]:
    depth = 0
    trail: collections.deque[tuple[int, int]] = collections.deque(maxlen=_TRAIL)
    found = error.__traceback__
    while found is not None:
        code = found.tb_frame.f_code
        if not code.co_filename.startswith(_OURS):
            depth += 1
            trail.append((id(code), found.tb_lasti))
        found = found.tb_next
    return depth, tuple(trail)


def message_of(error: BaseException) -> Any:
    """The message of ``error``: its only argument as it is, all of them, or the text that its class makes.

    Python's own classes of exceptions would call ``repr()`` of each argument, however large and whoever's it is: those
    are left to be shown as other content is. Only a class that brings a ``__str__`` of its own is asked for it.
    """
    if _makes_its_text(type(error)):
        try:
            if type(error).__module__ == "pydantic_core._pydantic_core" and hasattr(error, "errors"):
                # Its own text has `repr()` of the values that it rejects.
                return error.errors(include_url=False, include_context=False, include_input=False)
            return str(error)
        except Exception as problem:
            return f"<{error_type(error)}: its message raises {error_type(problem)}>"
    arguments = arguments_of(error)
    return arguments[0] if len(arguments) == 1 else list(arguments) if arguments else ""


def _makes_its_text(kind: type) -> bool:
    """Whether ``str()`` of an exception is worked out by code, or by one of the few built-in classes with a form."""
    for base in bases_of(kind):
        if "__str__" in members_of(base):
            return base not in (BaseException, KeyError)
    return False


def stack_trace(error: BaseException, content: Content, message: str) -> str:
    """``error`` as Python prints it, from its first cause on; ``message`` is its own, as ``content`` shows it.

    Unlike :func:`traceback.format_exception` it is bounded (the 50 innermost frames of the 8 last exceptions), and
    does not ask the user's objects for names that come close to a missing attribute. Each piece is redacted once.

    Raises:
        Exception: only what the user's ``redact`` raises.
    """
    parts: list[str] = []
    seen: set[int] = set()
    joint = ""
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(seen) < _CHAIN:
        seen.add(id(current))
        lines = traceback.format_list(traceback.extract_tb(current.__traceback__, limit=-_FRAMES))
        title = "Traceback (most recent call last):\n" if lines else ""
        frames = content.text("".join(lines)) if lines else ""
        if current is not error:
            message = content.text(message_of(current))
        line = f"{error_type(current)}: {message}\n" if message else f"{error_type(current)}\n"
        parts.append(f"{title}{frames}{line}{joint}")
        if current.__cause__ is not None:
            current, joint = current.__cause__, _CAUSE
        else:
            current, joint = (None if current.__suppress_context__ else current.__context__), _CONTEXT
    return Content(content.limit, content.media).text("".join(reversed(parts)))


def hide_frames(error: BaseException) -> None:
    """Take our frames out of the traceback of ``error``, before it is raised again.

    DSPy's agents show the first frames of a failed tool's traceback to the LM: frames of ours would change the
    prompt. Python 3.10 keeps a traceback apart from its exception while that is handled, and the outermost frame of
    ours, the one that calls this, stays: :func:`formatting_without_our_frames` is for that.
    """
    error.__traceback__ = without_our_frames(error.__traceback__)


def formatting_without_our_frames(original: Callable[..., str]) -> Callable[..., str]:
    """In place of DSPy's ``format_error_for_lm``, on Python 3.10: what it shows the LM has no frames of ours.

    Before DSPy 3.3, this is ReAct's ``_fmt_exc``.
    """

    def format_error_for_lm(error: BaseException, *args: Any, **kwargs: Any) -> str:
        with contextlib.suppress(Exception):
            hide_frames(error)
        return original(error, *args, **kwargs)

    return format_error_for_lm


def without_our_frames(found: TracebackType | None) -> TracebackType | None:
    """A traceback, with the frames of this package unlinked."""
    while found is not None and found.tb_frame.f_code.co_filename.startswith(_OURS):
        found = found.tb_next
    kept = found
    while kept is not None:
        following = kept.tb_next
        while following is not None and following.tb_frame.f_code.co_filename.startswith(_OURS):
            following = following.tb_next
        if following is not kept.tb_next:
            kept.tb_next = following
        kept = following
    return found
