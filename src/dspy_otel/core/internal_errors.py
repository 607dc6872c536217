"""Nothing of ours raises into a user's program: failures here become one warning for each cause."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Hashable
from typing import Any, Final, ParamSpec, TypeVar

_LOG = logging.getLogger("dspy_otel")
_LIMIT: Final = 256
_seen: dict[Hashable, object] = {}
_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


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
    """Say once that the part named ``where`` failed with this type of error; its detail is lost, nothing else."""
    # The message of an error may hold what the program works on: only its type is said.
    name = type(error).__name__
    warn_once((where, name), "%s failed (%s); that detail is missing from telemetry", where, name)


def reset_warnings() -> None:
    """Forget which warnings were given, so that each may show again (after ``uninstrument()``, and in tests)."""
    _seen.clear()


class guard:
    """Keep an error of ours away from the user's program: it becomes one warning, and the block ends there.

    ``with guard("LM result"):`` around a block, or ``@guard("LM result")`` on a function, which then gives ``None``.

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
            with self:
                return function(*args, **kwargs)
            return None

        return safe


def guarded(where: str) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result | None]]:
    """Make a function total: an error inside it becomes ``None`` and one warning.

    Args:
        where: the name the warning uses.
    """

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result | None]:
        @functools.wraps(function)
        def safe(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result | None:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                failed(where, error)
                return None

        return safe

    return decorate
