"""Spans of an optimization around those of other operations: a trial around an evaluation, or a phase."""

from __future__ import annotations

import functools
from typing import Any, Final

from dspy_otel.core.call_context import current_call_context
from dspy_otel.core.internal_errors import failed, guard
from dspy_otel.core.operation import Call, Operation, safe_open
from dspy_otel.optimizers.run import Run

_ENCLOSING: Final = guard("span around an optimizer's call")


class EnclosedOperation(Operation, safe=True):
    """Opens another operation's call around its own, and closes it after its own. Put before the operation's class."""

    enclosed_by: tuple[type, ...] = ()
    """Types of the state of the calls directly inside of which :meth:`enclose` may open one."""

    def enclose(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Open the call around this one and make it current, if there is one. Called inside a compile only."""
        raise NotImplementedError

    def close_enclosing(self, enclosing: Call, result: Any, error: BaseException | None) -> None:
        """Close the call that :meth:`enclose` has opened, with the result and the error of the call inside it."""
        enclosing.operation.close(enclosing, result, error)

    def open(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], override_of: type | None = None
    ) -> Call | None:
        around = None
        if Run.live:
            try:
                around = current_call_context()
            except Exception as error:
                failed("span around an optimizer's call", error)
        # Nearly all calls of an optimization are inside of examples.
        if around is None or type(around.state) not in self.enclosed_by:
            return super().open(instance, args, kwargs, override_of)
        return self._open_inside(instance, args, kwargs, override_of)

    @safe_open
    def _open_inside(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], override_of: type | None = None
    ) -> Call | None:
        return self.open_both(instance, args, kwargs, override_of)[1]

    def open_both(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], override_of: type | None = None
    ) -> tuple[Call | None, Call | None]:
        """Like :meth:`open`, but returns the call around this one, if there is one, and this one."""
        enclosing: Call | None = None
        with _ENCLOSING:
            if self.telemetry.enabled():
                enclosing = self.enclose(instance, args, kwargs)
        call = super().open(instance, args, kwargs, override_of)
        if enclosing is None:
            return None, call
        if call is None:
            enclosing.operation.close(enclosing, None, None)
            return None, None
        call.on_closed = functools.partial(self.close_enclosing, enclosing)
        return enclosing, call
