"""One call: an operation wraps an entry point of DSPy, opens and closes its span, and never gets in the way.

A subclass (in ``operations/`` or ``optimizers/``) maps a call to names and attributes. The base class does the rest:
it skips suppressed calls, attaches the context, records errors, and detaches the context in the same frame.
"""

from __future__ import annotations

import functools
import inspect
import time
import types
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

from dspy_otel import semconv
from dspy_otel.core.attributes import EMPTY, Attributes, repair, restore_dropped, sendable_name, set_repaired
from dspy_otel.core.call_context import (
    CALL_CONTEXT_KEY,
    CallContext,
    SpanFactory,
    attach,
    current_context,
    inside,
    suppressed,
)
from dspy_otel.core.errors import Recorded, error_type, exception_attributes, hide_frames
from dspy_otel.core.internal_errors import failed
from dspy_otel.core.telemetry import Telemetry

_ERROR: Final = Status(StatusCode.ERROR)


@dataclass(slots=True)
class SpanStart:
    """How to open a span.

    Attributes:
        name: span name; low-cardinality.
        context: what this call hands on to those inside it.
        attributes: cheap attributes, known before the sampler decides.
        kind: OpenTelemetry span kind.
        root: begin a new trace.
        links: spans this one is linked to.
        repaired: whether name and attributes can be sent by every exporter as they are, for they are made once for many
            calls.
        identity: names of attributes without which the span cannot be assigned to its evaluation, run or trial. They
            are set once more at the end if the SDK had to drop some: it drops the oldest when there are too many (128,
            unless ``OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT`` says otherwise).
        on_closed: called when the call has been closed, with its result and its error.
    """

    name: str
    context: CallContext
    attributes: Attributes
    kind: SpanKind = SpanKind.INTERNAL
    root: bool = False
    links: Sequence[Link] = ()
    repaired: bool = False
    identity: tuple[str, ...] = ()
    on_closed: Callable[[Any, BaseException | None], None] | None = None


class Call:
    """One call in flight.

    Attributes:
        operation: what opened it, and closes it.
        instance: the DSPy object that was called.
        args: positional arguments, without the instance.
        kwargs: keyword arguments. Never to be changed.
        span: its span.
        context: what it hands on to the calls inside it.
        otel_context: OpenTelemetry context with the span and that; for metrics (exemplars) and events.
        recording: whether anything set on the span is kept.
        attributes: collected since the start and set together at the end, which costs a span least.
        shared: further ones to be set at the end, which several calls share. Never changed; by :func:`repair` sendable.
        started: when, by ``time.perf_counter()``.
        token: undoes the attaching of ``otel_context``; ``None`` when that is not attached.
        outside: OpenTelemetry context around the call.
        started_with: attributes of its start.
        identity: names of those of them that must be on the span at its end.
        on_closed: called when the call has been closed, with its result and its error.
        closed: whether the call has been closed.
    """

    __slots__ = (
        "args",
        "attributes",
        "closed",
        "context",
        "identity",
        "instance",
        "kwargs",
        "on_closed",
        "operation",
        "otel_context",
        "outside",
        "recording",
        "shared",
        "span",
        "started",
        "started_with",
        "token",
    )

    operation: Operation
    instance: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    span: Span
    context: CallContext
    otel_context: Context
    recording: bool
    attributes: Attributes
    shared: Attributes
    identity: tuple[str, ...]
    started_with: Attributes
    started: float
    token: Token[Context] | None
    outside: Context
    on_closed: Callable[[Any, BaseException | None], None] | None
    closed: bool


class Operation:
    """One kind of thing that DSPy does. Subclasses map its objects to names and attributes.

    Each method may fail: its part is then missing and nothing else happens.
    """

    kind: str = ""
    exception_event: str = semconv.LOG_EXCEPTION
    """The name of an exception that ends it, where exceptions are log events."""
    always: bool = False
    """Whether it is followed also where nothing is recorded: an optimization shows its progress."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry

    def __init_subclass__(cls, safe: bool = False) -> None:
        # What a subclass adds around opening and closing may fail like the rest of it, unless it is `safe` by itself.
        if safe:
            return
        if "open" in vars(cls):
            cls.open = safe_open(cls.open)  # type: ignore[method-assign]
        if "close" in vars(cls):
            cls.close = safe_close(cls.close)  # type: ignore[method-assign]

    def __reduce__(self) -> tuple[Any, ...]:
        # A class that is pickled by value (by cloudpickle: DSPy's save_program, classes of `__main__`) takes our
        # wrappers of its methods along. They arrive as wrappers that pass every call on, and need nothing of ours.
        return types.SimpleNamespace, (), dict.fromkeys(("open", "fail", "serves"), _NothingToRecord())

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        """What span to open for this call, or ``None`` for none."""
        raise NotImplementedError

    def overridden(
        self, context: CallContext, args: tuple[Any, ...], kwargs: dict[str, Any], override_of: type | None
    ) -> None:
        """A call goes on: a subclass's override calls the method it overrides, or an entry point another one.

        Args:
            context: of the call that is open.
            args: of the method that is called inside it.
            kwargs: likewise.
            override_of: as for :meth:`open`.
        """

    def start_attributes(self, call: Call) -> Attributes:
        """Attributes at the start that are costly, or need the span; called only when the span is recorded."""
        return {}

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        """Attributes at the end; called only when the span is recorded."""
        return {}

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        """Metrics, totals and log events; called whether or not the span is recorded."""

    def content(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        """What a completion hook is to have of this call: JSON by the names of the attributes that it would be."""
        return {}

    # --- opening and closing: twice for each call, so with `try`, which costs nothing, and not with guards ----------
    def open(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], override_of: type | None = None
    ) -> Call | None:
        """Open the span of a call and make it current, or give ``None`` when there is nothing to record.

        Args:
            instance: the DSPy object that is called.
            args: positional arguments, without the instance.
            kwargs: keyword arguments.
            override_of: the subclass whose override of the entry point is called; ``None`` for the entry point itself.
        """
        telemetry = self.telemetry
        try:
            surrounding = current_context()
            if not telemetry.active or suppressed(surrounding):
                return None
            parent = surrounding.get(CALL_CONTEXT_KEY)
            if parent.__class__ is not CallContext:
                parent = telemetry.default_call_context
                if telemetry.discards and parent is None and not self.always:
                    return None
                telemetry.on_outermost()
            elif parent.owner is instance and parent.kind == self.kind and self._goes_on(parent, override_of):
                self.overridden(parent, args, kwargs, override_of)
                return None
            start = self.start(instance, args, kwargs, parent)
            return None if start is None else self._open(start, instance, args, kwargs, surrounding, override_of)
        except Exception as error:
            failed(f"start of {self.kind}", error)
            return None

    def _goes_on(self, parent: CallContext, override_of: type | None) -> bool:
        """Whether the call around this one, of the same kind on the same owner, goes on by it.

        It does when one entry point calls another, and when an override calls what it overrides. A call that comes back
        to what has opened the span is recursion, and another call.
        """
        if parent.operation is not self:
            return parent.operation is not None
        return parent.override_of is not None and parent.override_of is not override_of

    def _open(
        self,
        start: SpanStart,
        instance: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        surrounding: Context,
        override_of: type | None,
    ) -> Call:
        telemetry = self.telemetry
        context = start.context
        context.operation = self
        context.override_of = override_of
        outside = surrounding
        if start.root:
            outside = set_span_in_context(INVALID_SPAN, surrounding)
        elif telemetry.default_parent is not None and not get_current_span(surrounding).get_span_context().is_valid:
            outside = set_span_in_context(get_current_span(telemetry.default_parent), surrounding)
        attributes, inherited = start.attributes, context.inherited
        # All names and values enter a span here or at the end of the call, wherever they come from.
        if inherited and (context.parent is None or inherited is not context.parent.inherited):
            repair(inherited)  # once, by the call that has made it
        call = Call()
        call.operation = self
        call.instance = instance
        call.args = args
        call.kwargs = kwargs
        call.context = context
        call.outside = surrounding
        call.on_closed = start.on_closed
        call.closed = False
        call.token = None
        deferred = context.deferred
        dropped = None if deferred is None else deferred.dropped
        if dropped is not None:
            call.span = dropped
        else:
            name = start.name
            if not start.repaired:
                name = sendable_name(name)
                repair(attributes)
            if inherited:
                attributes.update(inherited)
            factory: SpanFactory = telemetry.light_tracer or telemetry
            if deferred is not None:
                factory = deferred
            call.span = factory.begin_span(name, outside, start.kind, attributes, start.links)
        context.span = call.span
        call.recording = dropped is None and call.span.is_recording()
        call.otel_context = inside(outside, call.span, context)
        call.attributes = {}
        call.shared = EMPTY
        call.identity = start.identity
        call.started_with = attributes
        if call.recording:
            if not telemetry.keeps_attributes:
                restore_dropped(call.span, attributes)
            try:
                call.attributes = self.start_attributes(call)
            except Exception as error:
                failed(f"attributes of {self.kind}", error)
        call.token = attach(call.otel_context)
        call.started = time.perf_counter()
        return call

    def close(self, call: Call, result: Any, error: BaseException | None) -> None:
        """End the span of a call, and make current again what was current before.

        Args:
            call: what :meth:`open` gave.
            result: what the call returned, or ``None``.
            error: what it raised, or ``None``.
        """
        seconds = time.perf_counter() - call.started
        call.closed = True
        message: str | None = None
        detach(call.token)
        try:
            self.measure(call, result, error, seconds)
        except Exception as problem:
            failed(f"metrics of {self.kind}", problem)
        if call.recording:
            try:
                if error is not None:
                    message = self.record_error(call, error)
            except Exception as problem:
                failed(f"error of {self.kind}", problem)
            try:
                call.attributes.update(self.end_attributes(call, result, error))
            except Exception as problem:
                failed(f"result of {self.kind}", problem)
        try:
            if call.attributes:
                if repair(call.attributes):
                    set_repaired(call.span, call.attributes)
                else:
                    call.span.set_attributes(call.attributes)
            if call.shared:
                set_repaired(call.span, call.shared)
            if call.identity and call.recording and getattr(call.span, "dropped_attributes", None):
                # What is set a second time becomes the newest.
                started = call.started_with
                call.span.set_attributes({key: started[key] for key in call.identity if key in started})
        except Exception as problem:
            failed("attributes of span", problem)
        if call.recording and self.telemetry.completions is not None:
            try:
                self.telemetry.completions.hand_over(call.span, self.content(call, result, error))
            except Exception as problem:
                failed("completion hook", problem)
        try:
            call.span.end()
        except Exception as problem:
            failed("end of span", problem)
        try:
            if error is not None and call.context.parent is not None:
                call.context.parent.failed = Recorded.of(error, self.kind, message)
            if call.on_closed is not None:
                call.on_closed(result, error)
        except Exception as problem:
            failed(f"end of {self.kind}", problem)

    def fail(self, call: Call | None, error: BaseException) -> None:
        """Close a call that raised, if it is recorded, and take our frames out of the traceback."""
        if call is not None:
            self.close(call, None, error)
        hide_frames(error)

    def record_error(self, call: Call, error: BaseException) -> str | None:
        """Mark the span as failed. The exception itself is an event on the innermost span only.

        Its message is in the status of every span that it passes: whoever looks at the outermost one, a trace's or an
        optimization's, wants the reason.

        Returns:
            The message; ``None`` when content must not be recorded.
        """
        span = call.span
        call.attributes[semconv.ERROR_TYPE] = error_type(error)
        span.set_status(_ERROR)  # First of all: the rest depends on content, which may fail.
        recorded = call.context.failed
        known = recorded is not None and recorded.is_(error, self.kind)
        attributes: Attributes = {} if known else exception_attributes(error, self.telemetry.span_content)
        found = recorded.message if recorded is not None and known else attributes.get(semconv.EXCEPTION_MESSAGE)
        message = found if isinstance(found, str) else None
        if message is not None:
            span.set_status(Status(StatusCode.ERROR, message))
        if not known:
            self.telemetry.add_exception(span, error, attributes, self.exception_event)
        return message

    # --- wrapping ------------------------------------------------------------------------------------------------
    def wrap(self, original: Callable[..., Any], override_of: type | None = None) -> Callable[..., Any]:
        """A function in place of the method ``original``: a coroutine function if that is one, else a plain one.

        A plain method may return a coroutine all the same (``async def forward``): the span ends when that does.

        Args:
            original: the unbound method.
            override_of: the subclass whose override of an entry point this is; ``None`` for the entry point itself.
        """
        if inspect.iscoroutinefunction(original):
            return self._wrap_coroutine_function(original, override_of)

        @functools.wraps(original)
        def wrapper(self_: Any, /, *args: Any, **kwargs: Any) -> Any:
            call = self.open(self_, args, kwargs, override_of)
            try:
                result = original(self_, *args, **kwargs)
            except BaseException as error:
                self.fail(call, error)
                raise
            try:
                if call is None:
                    return result
                if type(result) is types.CoroutineType and inspect.getcoroutinestate(result) == inspect.CORO_CREATED:
                    return self._finish_later(call, result)
                self.close(call, result, None)
                return result
            finally:
                del result  # DSPy before 3.4 looks at the stack, which keeps this frame for a while, and all in it.

        return wrapper

    def _finish_later(self, call: Call, coroutine: Any) -> Any:
        """A coroutine in place of ``coroutine``, which does the same and closes ``call`` at its end."""
        try:
            # Nothing of this call is current until the coroutine runs, in whichever task.
            detach(call.token)
            call.token = None
            _return_to(call.outside)
            continued = _continue(_Pending(self, call, coroutine))
            for name in ("__name__", "__qualname__"):
                setattr(continued, name, getattr(coroutine, name))
        except Exception as error:
            failed(f"coroutine of {self.kind}", error)
            return coroutine
        return continued

    def wrap_async(self, original: Callable[..., Any], override_of: type | None = None) -> Callable[..., Any]:
        """Like :meth:`wrap`, for what DSPy declares as a coroutine function; an override may be a plain one."""
        return Operation.wrap(self, original, override_of)

    def _wrap_coroutine_function(self, original: Callable[..., Any], override_of: type | None) -> Callable[..., Any]:
        @functools.wraps(original)
        async def wrapper(self_: Any, /, *args: Any, **kwargs: Any) -> Any:
            call = self.open(self_, args, kwargs, override_of)
            try:
                result = await original(self_, *args, **kwargs)
            except BaseException as error:
                self.fail(call, error)
                raise
            try:
                if call is not None:
                    self.close(call, result, None)
                return result
            finally:
                del result

        return wrapper


def safe_open(method: Callable[..., Call | None]) -> Callable[..., Call | None]:
    """An override of :meth:`Operation.open` that cannot raise, nor leave a context behind when it fails."""

    @functools.wraps(method)
    def open(
        self: Operation, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], override_of: type | None = None
    ) -> Call | None:
        before = otel_context.get_current()
        try:
            call = method(self, instance, args, kwargs, override_of)
        except Exception as error:
            failed(f"start of {self.kind}", error)
            _return_to(before)
            return None
        if call is not None:
            call.outside = before
        return call

    return open


def safe_close(method: Callable[..., None]) -> Callable[..., None]:
    """An override of :meth:`Operation.close` that cannot raise: when it fails, the call is closed all the same."""

    @functools.wraps(method)
    def close(self: Operation, call: Call, result: Any, error: BaseException | None) -> None:
        current = otel_context.get_current()
        try:
            method(self, call, result, error)
        except Exception as problem:
            failed(f"end of {self.kind}", problem)
            if not call.closed:
                Operation.close(self, call, result, error)
            if current is call.otel_context:
                _return_to(call.outside)

    return close


def _return_to(context: Context) -> None:
    if otel_context.get_current() is not context:
        otel_context.attach(context)


class _Pending:
    """A call whose coroutine has yet to be awaited. If that never happens, both are closed."""

    __slots__ = ("call", "coroutine", "operation", "started")

    def __init__(self, operation: Operation, call: Call, coroutine: Any) -> None:
        self.operation = operation
        self.call = call
        self.coroutine = coroutine
        self.started = False

    def __del__(self) -> None:
        if not self.started:
            # Python has warned of the coroutine that was returned in its place.
            self.coroutine.close()
            self.operation.close(self.call, None, None)


async def _continue(pending: _Pending) -> Any:
    pending.started = True
    operation, call = pending.operation, pending.call
    try:
        call.token = otel_context.attach(inside(otel_context.get_current(), call.span, call.context))
    except Exception as error:
        failed(f"coroutine of {operation.kind}", error)
    try:
        result = await pending.coroutine
    except BaseException as error:
        operation.fail(call, error)
        raise
    operation.close(call, result, None)
    return result


class _NothingToRecord:
    """Pickled as a function, by its code: always ``None``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return types.FunctionType, ((lambda *_: None).__code__, {})


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
        attributes[semconv.OPENINFERENCE_SPAN_KIND] = kind
    return attributes
