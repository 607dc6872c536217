"""The light span: the OpenTelemetry SDK's own span, made at a fifth of the cost.

The SDK cleans the attributes of a span one by one, and makes three containers with locks for attributes, events and
links, most of which stay empty. A light span keeps its attributes in a plain dictionary, if the SDK would keep them as
they are, and makes the SDK's containers when somebody looks for them: a processor, an event, a value to be cleaned or
cut, too many attributes. From then on it is the SDK's code that changes it. What a processor is given at the end is the
SDK's ``ReadableSpan`` with the SDK's attributes in it.

The user's sampler, ids, limits, processors, resource and configurator are asked as the SDK asks them, but for two that
are known: static samplers of the SDK, whose answer is computed here, and processors that do nothing at the start.

This reaches into the SDK, as ``measurements.py`` does, and on the same conditions: the SDK's own tracer, in a version
that is known, where a check finds the spans to be those of the public way, and where nobody has patched what is left
out. In all other cases spans are made the public way. This module imports the SDK; whoever works without it does not
import this module.
"""

from __future__ import annotations

import functools
import operator
import threading
import time
import types
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.context import Context
from opentelemetry.sdk import trace as sdk_trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanLimits, SpanProcessor, SynchronousMultiSpanProcessor, _Span
from opentelemetry.sdk.trace import export as sdk_export
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, StaticSampler
from opentelemetry.sdk.util import BoundedList
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace import Span as AnySpan

from dspy_otel.core.call_context import SPAN_KEY
from dspy_otel.core.measurements import sdk_is_known

_new: Final = object.__new__
_new_tuple: Final[Any] = tuple.__new__
_UNSET: Final = ReadableSpan("", resource=Resource.get_empty()).status
_SCALARS: Final = frozenset({str, bool, int, float})
_TEXT: Final = frozenset({str})
_FLAGS: Final = tuple(map(TraceFlags, range(4)))
_NO_STATE: Final = SpanContext(1, 1, is_remote=False).trace_state
_TRACE_IDS: Final = 2**128
_SPAN_IDS: Final = 2**64
_DROP: Final = Decision.DROP
_RECORD_AND_SAMPLE: Final = Decision.RECORD_AND_SAMPLE
_SAMPLED: Final = 1
_RANDOM: Final = 2

# What differs between versions of the SDK.
_KNOWS_RANDOM_IDS: Final = "is_trace_id_random" in sdk_trace.Tracer.start_span.__code__.co_names  # from 1.42
_CALLS_ON_ENDING: Final = "_on_ending" in Span.end.__code__.co_names  # from 1.40
_FREEZES: Final = "_immutable" in Span.end.__code__.co_names  # from 1.44

# What the SDK's constructor of a container of attributes sets.
_CONTAINER: Final = vars(BoundedAttributes(None, None, immutable=False))
_FIELDS: Final = frozenset({"_dict", "maxlen", "dropped", "max_value_len", "_lock", "_immutable"})
_FURTHER: Final = tuple((name, value) for name, value in _CONTAINER.items() if name not in _FIELDS)  # before 1.45
_LOCK: Final[Any] = threading.Lock if type(_CONTAINER["_lock"]) is type(threading.Lock()) else threading.RLock

# What light spans leave out, as it was when this module was imported.
_methods_of: Final = operator.attrgetter("__init__", "start", "end", "set_attributes", "_readable_span")
_LEFT_OUT: Final[tuple[Any, ...]] = (sdk_trace.Tracer.start_span, *_methods_of(Span))


def _as_kept(attributes: Any, longest: int | None) -> dict[str, Any] | None:
    """A copy of ``attributes`` as the SDK keeps them, or ``None`` if one of them needs the SDK's cleaning."""
    if type(attributes) is not dict or not _TEXT.issuperset(map(type, attributes)) or "" in attributes:
        return None
    kept: dict[str, Any] = attributes.copy()
    if longest is None and _SCALARS.issuperset(map(type, kept.values())):
        return kept
    for key, value in attributes.items():
        kind = type(value)
        if kind is str:
            if longest is not None and len(value) > longest:
                return None
        elif kind is list or kind is tuple:
            if not _uniform(value, longest):
                return None
            kept[key] = tuple(value)
        elif kind not in _SCALARS:
            return None
    return kept


def _uniform(values: Sequence[Any], longest: int | None) -> bool:
    """Whether the elements have one scalar type, and none needs to be cut."""
    kinds = set(map(type, values))
    if len(kinds) > 1 or not kinds <= _SCALARS:
        return False
    return longest is None or str not in kinds or max(map(len, values)) <= longest


class LightSpan(_Span):
    """A span of the SDK whose containers are made when somebody looks for them. :class:`LightTracer` makes it."""

    # Set on the instance as soon as there is another one.
    _bounded: Any = None
    _events_list: Any = None
    _links_list: Any = None
    _status: Any = _UNSET
    _end_time: Any = None
    _trace_config: Any = None
    _record_exception: bool = False
    _set_status_on_exception: bool = False
    _record_end_metrics: Any = None
    _plain: dict[str, Any]
    _maker: LightTracer

    def __repr__(self) -> str:
        return f'{_Span.__name__}(name="{self._name}", context={self._context})'

    @property
    def _attributes(self) -> Any:
        bounded = self._bounded
        if bounded is None:
            bounded = vars(self).setdefault("_bounded", self._bound())  # another thread may have made it
        return bounded

    @_attributes.setter
    def _attributes(self, value: Any) -> None:
        self._bounded = value

    def _bound(self) -> BoundedAttributes:
        """The SDK's container, around the attributes."""
        limits = self._limits
        bounded: Any = _new(BoundedAttributes)
        bounded._dict = self._plain
        bounded.maxlen = limits.max_span_attributes
        bounded.dropped = 0
        bounded.max_value_len = limits.max_span_attribute_length
        bounded._lock = _LOCK()
        bounded._immutable = False
        for name, value in _FURTHER:
            setattr(bounded, name, value)
        made: BoundedAttributes = bounded
        return made

    @property
    def _events(self) -> Any:
        events = self._events_list
        if events is None:
            events = vars(self).setdefault("_events_list", BoundedList(self._limits.max_events))
        return events

    @_events.setter
    def _events(self, value: Any) -> None:
        self._events_list = value

    @property
    def _links(self) -> Any:
        links = self._links_list
        if links is None:
            links = vars(self).setdefault("_links_list", BoundedList(self._limits.max_links))
        return links

    @_links.setter
    def _links(self, value: Any) -> None:
        self._links_list = value

    @property
    def dropped_attributes(self) -> int:
        """How many attributes were dropped. That is none, as long as the SDK has not looked at them."""
        return 0 if self._bounded is None else super().dropped_attributes

    def set_attributes(self, attributes: Any) -> None:
        """Set attributes, as the SDK does."""
        limits = self._limits
        kept = _as_kept(attributes, limits.max_span_attribute_length)
        if kept is not None:
            most = limits.max_span_attributes
            with self._lock:
                plain, bounded = self._plain, self._bounded
                if (
                    self._end_time is None
                    and (bounded is None or (type(bounded) is BoundedAttributes and bounded._dict is plain))
                    and (most is None or len(plain) + len(kept) <= most)
                ):
                    if not plain.keys().isdisjoint(kept):
                        for key in kept:  # What is set a second time becomes the newest.
                            plain.pop(key, None)
                    plain.update(kept)
                    return
        super().set_attributes(attributes)

    def set_light_attributes(self, attributes: dict[str, Any]) -> None:
        """Set attributes that are as the SDK keeps them, but for its limits.

        Args:
            attributes: by non-empty names: texts, numbers, booleans, and tuples of one of these. Never changed.
        """
        limits, plain = self._limits, self._plain
        most = limits.max_span_attributes
        if (
            self._end_time is None
            and self._bounded is None
            and not self._maker.processors.starting  # One of those may have put itself before `set_attributes`.
            and limits.max_span_attribute_length is None
            and (most is None or len(plain) + len(attributes) <= most)
            and plain.keys().isdisjoint(attributes)
        ):
            plain.update(attributes)
        else:
            self.set_attributes(attributes.copy())  # It may be somebody else's, who changes them.

    def end(self, end_time: int | None = None) -> None:
        """End the span, and hand it to the processors, as the SDK does."""
        with self._lock:
            ended = self._end_time is not None
            if not ended:
                self._end_time = time.time_ns() if end_time is None else end_time
        if ended:
            super().end(end_time)  # which logs a warning
            return
        attributes = self._bounded
        if attributes is None:
            self._bounded = attributes = self._bound()
        if _FREEZES:
            attributes._immutable = True
        if self._record_end_metrics is not None:
            self._record_end_metrics()
        processors = self._maker.processors
        if processors.source is not getattr(self._span_processor, "_span_processors", None):
            processors = self._maker.look(self._span_processor)
        for each in processors.ending:
            each._on_ending(self)
        events, links = self._events_list, self._links_list
        readable = ReadableSpan(
            self._name,
            self._context,
            self._parent,
            self._resource,
            self._bounded,
            () if events is None else events,
            () if links is None else links,
            self._kind,
            self._instrumentation_info,
            self._status,
            self._start_time,
            self._end_time,
            self._instrumentation_scope,
        )
        for each in processors.all:
            each.on_end(readable)


class _Processors(NamedTuple):
    """Those of a tracer, by what is to be called.

    Attributes:
        source: the SDK's tuple of them. A provider that gets another processor makes another one. ``None``: not kept.
        starting: whose ``on_start`` does something.
        ending: whose ``_on_ending`` does something.
        all: each of them.
    """

    source: Any
    starting: tuple[Any, ...]
    ending: tuple[Any, ...]
    all: tuple[Any, ...]


_IDLE: Final = frozenset(
    function
    for kind in (SpanProcessor, sdk_export.BatchSpanProcessor, sdk_export.SimpleSpanProcessor)
    for name in ("on_start", "_on_ending")
    # Those of the SDK only say `pass`: a docstring at most, and no names.
    if (function := getattr(kind, name, None)) is not None and not function.__code__.co_names
)


def _acting(processors: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """Those whose method does something, for all that is known."""
    return tuple(each for each in processors if name in vars(each) or getattr(type(each), name, None) not in _IDLE)


class LightTracer(Tracer):
    """Takes the place of a tracer of the SDK: its spans are light ones.

    Sampler, ids, limits, processors, resource and configuration are read from the SDK's tracer for each span.

    Args:
        tracer: the SDK's.
    """

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self._sampler: Any = None
        self._decisions: tuple[Any, ...] = ()
        self.processors = _Processors(None, (), (), ())
        self._is_enabled = getattr(tracer, "_is_enabled", None)  # from 1.40
        metrics = getattr(tracer, "_tracer_metrics", None)  # from 1.40
        self._metrics = None if type(metrics).__name__ == "NoOpTracerMetrics" else metrics

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Any = None,
        links: Sequence[Link] | None = (),
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> AnySpan:
        """A new span, as from the SDK's tracer."""
        return self.begin_span(
            name, context, kind, attributes, links, start_time, record_exception, set_status_on_exception
        )

    def begin_span(
        self,
        name: str,
        context: Context | None,
        kind: SpanKind,
        attributes: Any,
        links: Sequence[Link] | None,
        start_time: int | None = None,
        record_exception: bool = False,
        set_status_on_exception: bool = False,
    ) -> AnySpan:
        """A new span as :meth:`start_span` makes it; by default, a ``with`` block records no exception on it."""
        tracer = self._tracer
        current = None if context is None else context.get(SPAN_KEY)
        if type(current) is LightSpan:
            parent: Any = current._context
        else:
            parent = get_current_span(context).get_span_context()
        # Also where another package has meanwhile replaced what light spans leave out.
        left_out = (sdk_trace.Tracer.start_span, *_methods_of(Span))
        # By identity: a wrapper may say that it equals what it wraps.
        if type(parent) is not SpanContext or not all(map(operator.is_, left_out, _LEFT_OUT)):
            made: AnySpan = tracer.start_span(
                name, context, kind, attributes, links, start_time, record_exception, set_status_on_exception
            )
            return made
        if self._is_enabled is not None and not self._is_enabled():
            return NonRecordingSpan(parent)
        # The fields of a span's context are read by their place: each property is a call.
        state: Any
        trace_id, _, remote, flags, state, valid = parent
        ids = tracer.id_generator
        if valid:
            place = (1 if remote else 3) if flags & _SAMPLED else (2 if remote else 4)
            random = flags & _RANDOM if _KNOWS_RANDOM_IDS else 0
        else:
            parent = state = None
            trace_id = ids.generate_trace_id()
            place = 0
            random = _RANDOM if _KNOWS_RANDOM_IDS and ids.is_trace_id_random() else 0
        sampler = tracer.sampler
        if sampler is not self._sampler:
            self._decisions = _decisions(sampler)
            self._sampler = sampler
        decision = self._decisions[place]
        if decision is None:
            result = sampler.should_sample(context, trace_id, name, kind, attributes, links or ())
            decision, attributes, state = result.decision, result.attributes.copy(), result.trace_state
        span_id = ids.generate_span_id()
        flags = _FLAGS[random | _SAMPLED if decision is _RECORD_AND_SAMPLE else random]
        own: SpanContext
        if 0 < trace_id < _TRACE_IDS and 0 < span_id < _SPAN_IDS:
            # As its constructor does, without that call.
            own = _new_tuple(
                SpanContext, (trace_id, span_id, False, flags, _NO_STATE if state is None else state, True)
            )
        else:
            own = SpanContext(trace_id, span_id, False, flags, state)
        finish = None if self._metrics is None else self._metrics.start_span(parent, decision)
        if decision is _DROP:
            return NonRecordingSpan(own)
        span: Any = _new(LightSpan)
        span._name = name
        span._context = own
        span._kind = kind
        span._instrumentation_info = tracer.instrumentation_info
        span._instrumentation_scope = tracer._instrumentation_scope
        span._parent = parent
        span._resource = tracer.resource
        span._sampler = sampler
        if record_exception or set_status_on_exception:
            span._record_exception = record_exception
            span._set_status_on_exception = set_status_on_exception
        span._span_processor = tracer.span_processor
        span._limits = limits = tracer._span_limits
        span._lock = threading.Lock()
        if finish is not None:
            span._record_end_metrics = finish
        span._maker = self
        longest, most = limits.max_span_attribute_length, limits.max_span_attributes
        kept = _as_kept(attributes, longest) if attributes else {}
        if kept is None or (most is not None and len(kept) > most):
            span._bounded = BoundedAttributes(most, attributes, immutable=False, max_value_len=longest)
            kept = span._bounded._dict
        span._plain = kept
        if links:
            span._links_list = span._new_links(links)
        span._start_time = time.time_ns() if start_time is None else start_time
        processors = self.processors
        if processors.source is not getattr(tracer.span_processor, "_span_processors", None):
            processors = self.look(tracer.span_processor)
        for each in processors.starting:
            each.on_start(span, parent_context=context)
        started: AnySpan = span
        return started

    def look(self, processor: Any) -> _Processors:
        """What to call of the SDK's processor of a tracer, which calls those that the user has added."""
        ours = type(processor) is SynchronousMultiSpanProcessor and not {"on_start", "on_end"} & vars(processor).keys()
        added = processor._span_processors if ours else (processor,)
        ending = _acting(added, "_on_ending") if _CALLS_ON_ENDING else ()
        found = _Processors(added if ours else None, _acting(added, "on_start"), ending, added)
        if ours:
            self.processors = found
        return found

    def start_as_current_span(self, *args: Any, **kwargs: Any) -> Any:
        """As the SDK's tracer does."""
        return self._tracer.start_as_current_span(*args, **kwargs)


def _decisions(sampler: Any) -> tuple[Any, ...]:
    """What the SDK's own samplers decide, whatever the span: without a parent, and by place of the parent's.

    ``None`` stands for a decision to be asked for. Places are: no parent; a remote one, sampled or not; a local one,
    sampled or not.
    """
    if isinstance(sampler, ParentBased) and type(sampler).should_sample is ParentBased.should_sample:
        where = ("root", "remote_parent_sampled", "remote_parent_not_sampled", "local_parent_sampled")
        return tuple(_static(getattr(sampler, f"_{name}")) for name in (*where, "local_parent_not_sampled"))
    return (_static(sampler),) * 5


def _static(sampler: Any) -> Any:
    is_static = isinstance(sampler, StaticSampler) and type(sampler).should_sample is StaticSampler.should_sample
    return sampler._decision if is_static and "should_sample" not in vars(sampler) else None


def lightened(tracer: Tracer) -> Tracer:
    """A :class:`LightTracer` in place of the SDK's own tracer; any other tracer as it is.

    Args:
        tracer: any tracer.

    Returns:
        ``tracer`` itself, too, where the SDK in use makes other spans than the ones light spans are known to equal.
    """
    if type(tracer) is sdk_trace.Tracer and "start_span" not in vars(tracer) and sdk_is_known() and same_spans():
        return LightTracer(tracer)
    return tracer


# --- Whether light spans equal those of the SDK in use ------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def same_spans() -> bool:
    """Whether a light span is, to all who look, the span that the SDK itself makes. Checked once for each process."""
    try:
        return all(map(_is_the_sdks, _LEFT_OUT)) and bool(public := _seen(light=False)) and _seen(light=True) == public
    except Exception:  # an SDK that is not known
        return False


def _is_the_sdks(function: Any) -> bool:
    """Whether this is a function of the SDK, and not another package's wrapper around it."""
    if type(function) is not types.FunctionType:
        return False
    module = function.__globals__
    return (
        module["__name__"] == "opentelemetry.sdk.trace"
        and function.__code__.co_filename == module["__file__"]
        and "__wrapped__" not in vars(function)
    )


class _Ids(IdGenerator):
    """Ids that count."""

    def __init__(self) -> None:
        self._last = 0

    def generate_span_id(self) -> int:
        """The next one."""
        self._last += 1
        return self._last

    generate_trace_id = generate_span_id


class _Witness(SpanProcessor):
    """Keeps what it sees of each span."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Of a span that begins; with an attribute added."""
        span.set_attribute("on_start", True)
        self.seen.append(_view(span))

    def on_end(self, span: ReadableSpan) -> None:
        """Of a span that has ended."""
        self.seen.append((type(span), span.to_json(), _view(span)))


def _seen(light: bool) -> list[Any]:
    """What a processor sees of some spans."""
    limits = SpanLimits(max_span_attributes=16, max_attribute_length=32, max_events=4)
    provider = sdk_trace.TracerProvider(
        ParentBased(StaticSampler(Decision.RECORD_AND_SAMPLE)),
        Resource.get_empty(),
        shutdown_on_exit=False,
        id_generator=_Ids(),
        span_limits=limits,
    )
    witness = _Witness()
    tracer: Any = provider.get_tracer("dspy_otel.check", "1")
    if light:
        tracer = LightTracer(tracer)
    context = Context()
    for processor in (None, witness):
        if processor is not None:
            provider.add_span_processor(processor)
        span = tracer.start_span("first", context, SpanKind.CLIENT, {"text": "text", "number": 1}, (), 1)
        span.set_attributes({"number": 2, "texts": ["a", "b"]})
        inner = set_span_in_context(span, context)
        span.add_event("event", {"key": "value"}, 2)
        span.add_link(span.get_span_context())
        span.set_status(Status(StatusCode.ERROR, "description"))
        span.set_attributes({"flag": True, "none": ()})
        tracer.start_span("inner", inner, SpanKind.INTERNAL, None, None, 3).end(4)
        span.end(5)
        witness.seen.append(_view(span))
    return witness.seen


def _view(span: ReadableSpan) -> tuple[Any, ...]:
    """What is public of a span."""
    dropped = span.dropped_attributes, span.dropped_events, span.dropped_links
    events = [(each.name, each.timestamp, dict(each.attributes or {})) for each in span.events]
    attributes: Any = span.attributes
    shown = [(key, type(value), value) for key, value in attributes.items()]
    scope = span.instrumentation_scope
    links = [each.context for each in span.links]
    times = span.start_time, span.end_time
    return (
        span.name,
        span.context,
        span.parent,
        span.kind,
        times,
        shown,
        repr(attributes),
        events,
        links,
        dropped,
        scope,
    )
