"""Nothing of ours raises into a user's program: an internal error becomes one warning for each cause.

Our own tests set ``raises``, so that no fault of ours hides behind its warning; those that inject faults do not.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Hashable
from typing import Any, Final, ParamSpec, TypeVar

from dspy_otel.content.names import plain_name

_LOG = logging.getLogger("dspy_otel")
_LIMIT: Final = 256
_seen: dict[Hashable, object] = {}
_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")

raises = False
"""Whether an internal error is raised after all."""


def warn_once(cause: Hashable, message: str, *arguments: Any) -> None:
    """Log ``message % arguments`` as a warning, the first time this ``cause`` shows (at most 256 causes).

    Args:
        cause: what makes two warnings the same.
        message: a %-format; ``dspy-otel: `` is put before it.
        arguments: for the format. Never content of the user's program.
    """
    # No lock: a fork, a signal or a finalizer in the middle must find none. `setdefault` lets one thread through.
    ticket = object()
    if len(_seen) >= _LIMIT or _seen.setdefault(cause, ticket) is not ticket:
        return
    with contextlib.suppress(Exception):  # A handler or a filter of the user's may fail.
        _LOG.warning("dspy-otel: " + message, *arguments)


def failed(where: str, error: BaseException) -> None:
    """Warn once that the part named ``where`` failed with this type of error. Its detail is lost, nothing else."""
    if raises:
        raise error
    # The message of an error may quote what the program works on: the warning has only its type, maybe a user's own.
    try:
        name = plain_name(type(error).__name__)
    except Exception:  # what makes names plain has failed itself
        name = "Exception"
    warn_once((where, name), "%s failed (%s); that detail is missing from telemetry", where, name)


def reset_warnings() -> None:
    """Forget which warnings were given, so that each may show once more (after ``uninstrument()``, and in tests)."""
    _seen.clear()


class guard:
    """Keeps an error of ours away from the user's program: it becomes one warning, and the block ends there.

    ``with guard("LM result"):`` around a block, or ``@guard("LM result")`` on a function, which then gives ``None``.
    A guard has no state: one object may be used any number of times, in any thread.

    Args:
        where: the part that failed, for the warning.
    """

    __slots__ = ("where",)

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, frames: object) -> bool:
        if not isinstance(error, Exception):
            return False
        failed(self.where, error)
        return True

    def __call__(self, function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result | None]:
        """Guard the whole of ``function``."""

        @functools.wraps(function)
        def safe(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result | None:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                failed(self.where, error)
                return None

        return safe
