"""Exceptions on spans, without letting content out through their messages."""

from __future__ import annotations

import traceback
from typing import Any

from .. import semconv as names
from .attributes import Attributes
from .content import Content


def error_type(error: BaseException) -> str:
    """The class of ``error``, with its module unless it is a built-in one."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def exception_attributes(error: BaseException, content: Content | None) -> Attributes:
    """Attributes of an ``exception`` span event.

    Args:
        error: the exception.
        content: how to render content, or ``None`` when content must not be recorded. A message may quote a prompt
            or a completion, and a stack trace ends with the message: then only the type is given.
    """
    attributes: Attributes = {names.EXCEPTION_TYPE: error_type(error)}
    if content is not None:
        attributes[names.EXCEPTION_MESSAGE] = content.text(message_of(error))
        attributes[names.EXCEPTION_STACKTRACE] = content.text(
            "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=50))
        )
    return attributes


def message_of(error: BaseException) -> Any:
    """The message of ``error``: its only string argument as it is, otherwise ``str(error)``."""
    arguments = error.args
    return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], str) else str(error)
