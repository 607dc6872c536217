"""The span runner: wraps one entry point of DSPy, opens and closes its span, and never gets in the way.

An operation (a class in ``operations/`` or ``optimizers/``) says what a call is and what it tells; the runner does
the rest: it skips suppressed calls, attaches the context, records errors, measures, and detaches in the same frame.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextvars import Token
from dataclasses import dataclass
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    Span,
    SpanKind,
    Status,
    StatusCode,
    get_current_span,
    set_span_in_context,
)

from .. import semconv as names
from .attributes import Attributes
from .core import Telemetry
from .errors import error_type, exception_attributes
from .guard import failed
from .scope import SCOPE_KEY, Scope, current_scope

_ERROR: Final = Status(StatusCode.ERROR)


@dataclass
class Start:
    """How to open a span.

    Attributes:
        name: span name; low-cardinality.
        scope: what this operation passes on to those inside it.
        attributes: cheap attributes, known before the sampler decides.
        kind: OpenTelemetry span kind.
        root: begin a new trace.
        links: spans this one is linked to.
    """

    name: str
    scope: Scope
    attributes: Attributes
    kind: SpanKind = SpanKind.INTERNAL
    root: bool = False
    links: Sequence[Link] = ()


class Call:
    """One call in flight.

    Attributes:
        instance: the DSPy object that was called.
        args: positional arguments, without the instance.
        kwargs: keyword arguments. Never to be changed.
        span: its span.
        scope: its scope.
        context: OpenTelemetry context with both; for metrics (exemplars) and events.
        recording: whether anything set on the span is kept.
    """

    __slots__ = ("args", "context", "instance", "kwargs", "operation", "recording", "scope", "span", "started", "token")

    operation: Operation
    instance: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    span: Span
    scope: Scope
    context: Context
    recording: bool
    started: float
    token: Token[Context] | None


class Operation:
    """One kind of thing that DSPy does. Subclasses map its objects to names and attributes.

    Each method may fail: its part is then missing and nothing else happens.
    """

    kind: str = ""

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry

    def start(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: Scope | None) -> Start | None:
        """What span to open for this call, or ``None`` for none."""
        raise NotImplementedError

    def detail(self, call: Call) -> Attributes:
        """Attributes at the start that cost something; only asked for when the span is recorded."""
        return {}

    def result(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        """Attributes at the end; only asked for when the span is recorded."""
        return {}

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        """Metrics, totals and log events; asked for whether or not the span is recorded."""

    # --- opening and closing -------------------------------------------------------------------------------------
    def open(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_base: bool = True) -> Call | None:
        """Open the span of a call and make it current, or give ``None`` when there is nothing to record."""
        telemetry = self.telemetry
        try:
            if not telemetry.enabled():
                return None
            surrounding = otel_context.get_current()
            parent = current_scope(surrounding)
            if parent is not None and parent.entering and parent.owner is instance and parent.kind == self.kind:
                # A subclass's override has opened the span and now calls the method it overrides.
                parent.entering = not is_base
                return None
            start = self.start(instance, args, kwargs, parent)
            if start is None:
                return None
            return self._open(start, instance, args, kwargs, surrounding, entering=not is_base)
        except Exception as error:
            failed(f"start of {self.kind}", error)
            return None

    def _open(
        self,
        start: Start,
        instance: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        surrounding: Context,
        entering: bool = False,
    ) -> Call:
        telemetry = self.telemetry
        scope = start.scope
        scope.entering = entering
        outside = surrounding
        if start.root:
            outside = set_span_in_context(INVALID_SPAN, surrounding)
        elif telemetry.default_parent is not None and not get_current_span(surrounding).get_span_context().is_valid:
            outside = set_span_in_context(get_current_span(telemetry.default_parent), surrounding)
        if scope.stamps:
            start.attributes.update(scope.stamps)
        call = Call()
        call.operation = self
        call.instance = instance
        call.args = args
        call.kwargs = kwargs
        call.scope = scope
        call.token = None
        call.span = telemetry.tracer.start_span(
            start.name,
            outside,
            start.kind,
            start.attributes,
            start.links or None,
            record_exception=False,
            set_status_on_exception=False,
        )
        scope.span = call.span
        call.recording = call.span.is_recording()
        call.context = Context({**set_span_in_context(call.span, outside), SCOPE_KEY: scope})
        if call.recording:
            try:
                detail = self.detail(call)
                if detail:
                    call.span.set_attributes(detail)
            except Exception as error:
                failed(f"detail of {self.kind}", error)
        call.token = otel_context.attach(call.context)
        call.started = time.perf_counter()
        return call

    def close(self, call: Call, result: Any, error: BaseException | None) -> None:
        """End the span of a call, and make current again what was current before."""
        seconds = time.perf_counter() - call.started
        detach(call.token)
        try:
            self.measure(call, result, error, seconds)
        except Exception as problem:
            failed(f"metrics of {self.kind}", problem)
        try:
            if call.recording:
                if error is not None:
                    self.record_error(call, error)
                attributes = self.result(call, result, error)
                if attributes:
                    call.span.set_attributes(attributes)
        except Exception as problem:
            failed(f"result of {self.kind}", problem)
        try:
            call.span.end()
        except Exception as problem:
            failed("end of span", problem)
        parent = call.scope.parent
        if error is not None and parent is not None:
            parent.failed = id(error)

    def record_error(self, call: Call, error: BaseException) -> None:
        """Mark the span as failed. The exception itself is an event on the innermost span only."""
        span, content = call.span, self.telemetry.span_content
        span.set_attribute(names.ERROR_TYPE, error_type(error))
        if call.scope.failed == id(error):
            span.set_status(_ERROR)
            return
        attributes = exception_attributes(error, content)
        message = attributes.get(names.EXCEPTION_MESSAGE)
        span.set_status(Status(StatusCode.ERROR, message if isinstance(message, str) else None))
        span.add_event(names.EVENT_EXCEPTION, attributes)

    # --- wrapping ------------------------------------------------------------------------------------------------
    def wrap(self, original: Callable[..., Any], is_base: bool = True) -> Callable[..., Any]:
        """A plain function in place of the method ``original``.

        Args:
            original: the unbound method.
            is_base: whether it is the class's own entry point; ``False`` for an override in a subclass.
        """

        @functools.wraps(original)
        def wrapper(self_: Any, /, *args: Any, **kwargs: Any) -> Any:
            call = self.open(self_, args, kwargs, is_base)
            if call is None:
                return original(self_, *args, **kwargs)
            try:
                result = original(self_, *args, **kwargs)
            except BaseException as error:
                self.close(call, None, error)
                raise
            self.close(call, result, None)
            return result

        return wrapper

    def wrap_async(self, original: Callable[..., Any], is_base: bool = True) -> Callable[..., Any]:
        """Like :meth:`wrap`, for a coroutine method."""

        @functools.wraps(original)
        async def wrapper(self_: Any, /, *args: Any, **kwargs: Any) -> Any:
            call = self.open(self_, args, kwargs, is_base)
            if call is None:
                return await original(self_, *args, **kwargs)
            try:
                result = await original(self_, *args, **kwargs)
            except BaseException as error:
                self.close(call, None, error)
                raise
            self.close(call, result, None)
            return result

        return wrapper


def detach(token: Token[Context] | None) -> None:
    """Undo an ``attach``. A coroutine that is closed from another context has nothing to undo there: that is quiet.

    ``opentelemetry.context.detach`` logs an error in that case, for every abandoned stream.
    """
    if token is None:
        return
    try:
        token.var.reset(token)
    except ValueError:
        pass
    except AttributeError:  # A context runtime other than contextvars.
        otel_context.detach(token)


def openinference(attributes: Attributes, telemetry: Telemetry, kind: str) -> Attributes:
    """Add OpenInference's span kind, unless that is switched off."""
    if telemetry.config.openinference:
        attributes[names.OPENINFERENCE_SPAN_KIND] = kind
    return attributes
