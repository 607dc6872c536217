"""Carry the context into threads and processes, and bring back what LM calls there have used."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from secrets import token_hex
from typing import Any, Final, ParamSpec, TypeVar, cast

from opentelemetry import baggage, propagate, trace
from opentelemetry import context as otel_context
from opentelemetry.context import Context

from dspy_otel import semconv
from dspy_otel.content.introspection import bases_of, members_of
from dspy_otel.core import worker_tasks
from dspy_otel.core.attributes import Attributes, AttributeValue, repair
from dspy_otel.core.call_context import (
    CallContext,
    current_call_context,
    enclosing_state,
    suppressed,
    with_call_context,
)
from dspy_otel.core.errors import hide_frames
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import detach
from dspy_otel.operations.lm import LMCallState
from dspy_otel.operations.parallel import bind

_INHERITED_PREFIX: Final = "dspy."
MAX_INHERITED: Final = 16
MAX_VALUE: Final = 256
"""Most characters of an inherited attribute. Those are ids and numbers; a longer text under such a name is cut."""

_CARRIER: Final = ("traceparent", "tracestate", "baggage")
TASK: Final = "dspy-task"
"""The entry of a carrier that asks for the usage of what is done with it: the id of the task."""
_ON_ERROR: Final = "dspy_otel_usage"
_USAGE: Final = guard("usage of a worker process")

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def inject(carrier: MutableMapping[str, str] | None = None, *, usage: bool = False) -> dict[str, str]:
    """The current context as a dictionary of strings, for another process (or any place that takes strings).

    It has what OpenTelemetry's propagators write (``traceparent``, ``baggage``; ``OTEL_PROPAGATORS`` chooses them) and,
    as baggage, what DSPy operations inside must know: evaluation, optimizer run, trial and candidate ids, and the role
    of LM calls. Upper-case its names, and it is the environment that a subprocess takes its parent from.

    Args:
        carrier: filled too, if given: headers of a message, for example.
        usage: ask for what LM calls over there use. ``attach()`` there collects it, its ``usage()`` gives it as text,
            and ``add_usage()`` here adds that to the totals and the budgets around this place.

    Returns:
        A new dictionary, picklable and JSON-serializable; empty if there is nothing to carry.

    Raises:
        BudgetExceeded: with ``usage``, if a budget around this place is used up, as the next LM call would raise.
    """
    written: dict[str, str] = {}
    with guard("inject()"):
        context = otel_context.get_current()
        if usage:
            _admit(context)
        written = _written(context, usage)
        if carrier is not None:
            carrier.update(written)
    return written


class Attached(Context):
    """The context inside an :func:`attach` block."""

    collector: worker_tasks.Collector | None = None

    def usage(self) -> str:
        """What LM calls of the block have used since this was last called.

        Returns:
            Text for ``add_usage()``, where the carrier is from; empty unless that was made with ``usage=True``.
        """
        text = None if self.collector is None else _taken(self.collector)
        return text or ""

    def _is_copy(self, copy: str) -> None:
        """Tell chunks that share a carrier apart, unless a framework's own ids do."""
        if self.collector is not None and not self.collector.run:
            self.collector.run = copy


@contextmanager
def attach(carrier: Mapping[str, str]) -> Iterator[Attached]:
    """Work in the context that :func:`inject` wrote, until the ``with`` block ends.

    If it asks for usage, an exception that leaves the block and is pickled carries it, and it counts as soon as the
    exception is unpickled.

    Args:
        carrier: what ``inject()`` gave. Without a valid ``traceparent`` the block starts traces of its own; other
            entries, of any type, are ignored.

    Returns:
        The context, as the block's variable; its ``usage()`` is what to hand back.
    """
    attached = Attached(otel_context.get_current())
    with guard("attach()"):
        attached = _attached(carrier, attached)
    token = otel_context.attach(attached)
    try:
        yield attached
    except BaseException as error:
        if attached.collector is not None:
            _put_on_error(error, attached.collector)
        raise
    finally:
        detach(token)


def add_usage(usage: str) -> None:
    """Add what LM calls in another process have used to the totals and budgets around the ``inject()`` of its carrier.

    Each text counts once, however often it is added. One that is for another process goes there with the next result.

    Args:
        usage: what :meth:`Attached.usage` gave over there. Anything else is ignored, with a warning.
    """
    if usage:
        _add_usage(usage)


def delegate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``function``, to be sent to a worker process by pickle: its spans and its usage belong to the place of this call.

    What its LM calls use comes back inside the pickled result, or the pickled exception, and counts when that is
    unpickled, which is before anybody sees it. The result has to be sent to this process as it is: in the worker, what
    the function returns stands inside of another object.

    Called in this process, it works as ``bind(function)`` does.

    Args:
        function: anything that can be pickled; a coroutine function stays one.

    Raises:
        BudgetExceeded: if a budget around this place is used up, as the next LM call would raise.

    Example:
        Questions for a pool of processes, each of which has called ``dspy_otel.configure()``::

            with ProcessPoolExecutor(initializer=dspy_otel.configure) as pool:
                answers = list(pool.map(dspy_otel.delegate(answer), questions))
    """
    context = otel_context.get_current()
    with guard("delegate()"):
        _admit(context)
    return cast(Callable[_Arguments, _Result], _Delegated(function, context))


class _Delegated:
    """What :func:`delegate` gives. It is one task, however often it is pickled: chunks of a ``map()`` share it."""

    def __init__(self, function: Callable[..., Any], context: Context) -> None:
        # Name and documentation only: the attributes of a callable object are its state.
        functools.update_wrapper(self, function, updated=())
        self._function = function
        self._context = context
        self._lock = threading.Lock()
        self._carrier: dict[str, str] | None = None
        self._copies = itertools.count(1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return bind(self._function, self._context)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        with self._lock:
            if self._carrier is None:
                self._carrier = guard("delegate()")(_written)(self._context, True) or {}
        return _Sent, (self._function, self._carrier, str(next(self._copies)))

    def __dask_tokenize__(self) -> Any:
        return token_hex(16)  # Another task each time. Dask would pickle the function to see whether it is the same.


class _Sent:
    """A function that has arrived in a worker process, its carrier, and which copy of it this is."""

    def __init__(self, function: Callable[..., Any], carrier: dict[str, str], copy: str) -> None:
        functools.update_wrapper(self, function, updated=())
        self._function = function
        self._carrier = carrier
        self._copy = copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return self._awaited(args, kwargs)
        try:
            with attach(self._carrier) as attached:
                attached._is_copy(self._copy)
                result = self._function(*args, **kwargs)
        except BaseException as error:
            hide_frames(error)
            raise
        return _reply(result, attached)

    async def _awaited(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            with attach(self._carrier) as attached:
                attached._is_copy(self._copy)
                result = await self._function(*args, **kwargs)
        except BaseException as error:
            hide_frames(error)
            raise
        return _reply(result, attached)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Sent, (self._function, self._carrier, self._copy)


class _Reply:
    """A result on its way, with the usage of its task. Unpickled, it is the result."""

    def __init__(self, result: Any, usage: str) -> None:
        self._result = result
        self._usage = usage

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self._result, self._usage)


class _OnError:
    """Usage on its way with an exception."""

    def __init__(self, usage: str) -> None:
        self._usage = usage

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (None, self._usage)


def _arrived(result: Any, usage: str) -> Any:
    """Unpickles a :class:`_Reply`: in whichever thread, so that nothing may be raised."""
    add_usage(usage)
    return result


def _reply(result: Any, attached: Attached) -> Any:
    """What a task returns: the result, inside of what adds its usage where it is unpickled."""
    usage = attached.usage()
    if not usage:
        return result
    if attached.collector is not None and attached.collector.is_home:
        add_usage(usage)  # It has not left the process, and its result may not be pickled either.
        return result
    return _Reply(result, usage)


@_USAGE
def _taken(collector: worker_tasks.Collector, again: bool = False) -> str:
    return collector.take(_is_on(), again)


@_USAGE
def _put_on_error(error: BaseException, collector: worker_tasks.Collector) -> None:
    """Let an exception carry usage. Where it does not arrive, the next record of this process does, and has it, too."""
    usage = _taken(collector, again=not collector.is_home)
    if usage and collector.is_home:
        add_usage(usage)  # Nobody pickles it.
    elif usage and _takes_attributes(type(error)):
        error.__setattr__(_ON_ERROR, _OnError(usage))


def _takes_attributes(kind: type[BaseException]) -> bool:
    """Whether an exception with one attribute more can be pickled and unpickled, for it has Python's own ways to."""
    written = (members_of(base) for base in bases_of(kind) if base not in (BaseException, object))
    return not any(name in members for members in written for name in ("__setattr__", "__setstate__"))


@_USAGE
def _add_usage(usage: str) -> None:
    for task, record in worker_tasks.receive(usage):
        context = task.context()
        if context is None:
            continue
        asks = enclosing_state(context, LMCallState)
        if asks is not None:  # An LM that asks other LMs, in a worker.
            asks.inner.extend(sums.as_one_call() for sums in record.used.values() if sums.calls)
        if context.budget is not None:
            context.budget.settle_task(context)


def _admit(context: Context) -> None:
    """Ask the budgets around, as an LM call does: there is none in a worker."""
    call_context = current_call_context(context)
    if call_context is not None and call_context.budget is not None and not suppressed(context):
        call_context.budget.admit_task(call_context)


def _written(context: Context, usage: bool) -> dict[str, str]:
    """``context`` as strings, and a new task in it if somebody here counts what it uses."""
    written: dict[str, str] = {}
    call_context = current_call_context(context)
    propagate.inject(written, write_call_context(call_context, context))
    if usage and call_context is not None and call_context.totals and not suppressed(context):
        written[TASK] = worker_tasks.send(call_context)
    return written


def _attached(carrier: Any, context: Attached) -> Attached:
    """The context of ``carrier``, with a collector if it asks for usage."""
    read = Attached(read_context(carrier, context))
    task = carrier.get(TASK) if isinstance(carrier, Mapping) else None
    call_context = current_call_context(read)
    if isinstance(task, str) and call_context is not None:
        read.collector = worker_tasks.Collector(task[:MAX_VALUE])
        call_context.totals = (read.collector.totals,)
    return read


def _is_on() -> bool:
    """Whether LM calls are counted here. The instrumentor imports this module: it is asked only where it is loaded."""
    loaded = sys.modules.get("dspy_otel.instrumentor")
    telemetry = None if loaded is None else loaded.DSPyInstrumentor().telemetry
    return telemetry is not None and telemetry.active


def parent_of_process() -> Context | None:
    """The parent that the environment names (``TRACEPARENT``, ``TRACESTATE``, ``BAGGAGE``), if it names one.

    OpenTelemetry's "environment variables as context propagation carriers"; read once, when instrumentation starts.
    """
    carrier = {name: os.environ[name.upper()] for name in _CARRIER if os.environ.get(name.upper())}
    if "traceparent" not in carrier:
        return None
    context = read_context(carrier, Context())
    return context if trace.get_current_span(context).get_span_context().is_valid else None


def write_call_context(call_context: CallContext | None, context: Context) -> Context:
    """``context`` with what a call hands on as baggage: the attributes that all spans inside carry, and the role."""
    if call_context is None:
        return context
    entries = {key: value for key, value in call_context.inherited.items() if key.startswith(_INHERITED_PREFIX)}
    for key, value in list(entries.items())[:MAX_INHERITED]:
        context = baggage.set_baggage(key, str(value)[:MAX_VALUE], context)
    if call_context.role is not None:
        context = baggage.set_baggage(semconv.LM_ROLE, call_context.role, context)
    return context


def read_context(carrier: Any, context: Context) -> Context:
    """``context`` with the parent span, the baggage and a call context that ``carrier`` has.

    Args:
        carrier: a mapping of strings, as OpenTelemetry's propagators write it. Anything else in it is ignored.
        context: what to start from; stays as it is when the carrier has nothing usable.
    """
    if not isinstance(carrier, Mapping):
        return context
    usable = {key: value for key, value in carrier.items() if isinstance(key, str) and isinstance(value, str)}
    found = propagate.extract(usable, context)
    inherited: Attributes = {}
    role = None
    for key, value in baggage.get_all(found).items():
        text = str(value)[:MAX_VALUE]
        if key == semconv.LM_ROLE:
            role = text if text in worker_tasks.ROLES else None
        elif key.startswith(_INHERITED_PREFIX) and len(inherited) < MAX_INHERITED:
            inherited[key] = _typed(key, text)
    repair(inherited)
    call_context = CallContext("remote", None, None)
    call_context.inherited, call_context.role = inherited, role
    return with_call_context(found, call_context)


def _typed(key: str, text: str) -> AttributeValue:
    """A value of baggage, which is text only, as an attribute: counters become numbers."""
    if key.endswith((".number", ".index", ".size")) and text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    return text


__all__ = ["add_usage", "attach", "bind", "delegate", "inject"]
