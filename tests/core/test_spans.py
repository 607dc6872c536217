"""Light spans: whoever looks sees, and whoever exports sends, exactly what the SDK's own span gives."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import wrapt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk import trace as sdk_trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import (
    ConcurrentMultiSpanProcessor,
    ReadableSpan,
    Span,
    SpanLimits,
    SpanProcessor,
    SynchronousMultiSpanProcessor,
    TracerProvider,
)
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, ParentBased, Sampler, SamplingResult
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    NoOpTracer,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    get_current_span,
    set_span_in_context,
)

from dspy_otel.core import spans
from dspy_otel.core.attributes import set_repaired
from dspy_otel.core.spans import LightSpan, LightTracer, lightened


class Text(str):
    """Not quite a text."""


class Named:
    """No value of an attribute."""

    def __str__(self) -> str:
        return "named"


SCALARS = st.one_of(
    st.text(max_size=9),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.binary(max_size=4),
)
VALUES: st.SearchStrategy[Any] = st.one_of(
    SCALARS,
    st.none(),
    st.builds(Text, st.text(max_size=9)),
    st.builds(Named),
    st.lists(st.text(max_size=9), max_size=3),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.lists(st.one_of(SCALARS, st.none()), max_size=3),
    st.dictionaries(st.text(max_size=2), SCALARS, max_size=2),
)
KEYS = st.one_of(st.sampled_from("abcdefgh"), st.text(max_size=3), st.builds(Text, st.sampled_from("ab")))
ANY_KEYS = st.one_of(KEYS, KEYS, KEYS, st.integers(0, 3), st.none())
ATTRIBUTES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.dictionaries(st.sampled_from("abcdefghij"), st.one_of(st.text(max_size=9), st.integers(0, 9)), max_size=10),
    st.dictionaries(KEYS, VALUES, max_size=8),
    st.dictionaries(ANY_KEYS, VALUES, max_size=4),
    st.dictionaries(KEYS, VALUES, max_size=4).map(MappingProxyType),
)
CONTEXTS = st.sampled_from(
    [
        SpanContext(1, 2, False),
        SpanContext(1, 3, True, TraceFlags(TraceFlags.SAMPLED), TraceState([("a", "b")])),
        SpanContext(4, 5, True, TraceFlags(TraceFlags.SAMPLED | 2)),
        SpanContext(0, 0, False),
        SpanContext(0, 0, False, None, TraceState([("a", "b")])),
    ]
)
TIMES = st.integers(1, 2**60)
STATUSES = st.one_of(
    st.tuples(st.builds(Status, st.just(StatusCode.ERROR), st.text(max_size=3)), st.none()),
    st.tuples(
        st.sampled_from([Status(StatusCode.OK), Status(StatusCode.UNSET)]), st.one_of(st.none(), st.text(max_size=3))
    ),
    st.tuples(st.sampled_from(StatusCode), st.one_of(st.none(), st.text(max_size=3))),
)


def failure(message: str) -> BaseException:
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


CHANGES: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    st.tuples(st.just("set_attributes"), ATTRIBUTES.map(lambda attributes: attributes or {})),
    st.tuples(st.just("set_attributes"), ATTRIBUTES.map(lambda attributes: attributes or {})),
    st.tuples(st.just("set_attribute"), ANY_KEYS, VALUES),
    st.tuples(st.just("add_event"), st.text(max_size=3), ATTRIBUTES, TIMES),
    st.tuples(st.just("add_link"), CONTEXTS, ATTRIBUTES),
    STATUSES.map(lambda status: ("set_status", *status)),
    st.tuples(st.just("update_name"), st.text(max_size=5)),
    st.tuples(st.just("record_exception"), st.builds(failure, st.text(max_size=3)), ATTRIBUTES, TIMES),
    st.tuples(st.just("end"), TIMES),
)
LIMIT = st.one_of(st.none(), st.integers(0, 12))
COUNTS = ("attributes", "events", "links", "span_attributes", "event_attributes", "link_attributes")
LIMITS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries({f"max_{name}": LIMIT for name in (*COUNTS, "attribute_length", "span_attribute_length")}),
)

RESOURCE = Resource({"service.name": "test"})


class Ids(IdGenerator):
    def __init__(self) -> None:
        self.last = 100

    def generate_span_id(self) -> int:
        self.last += 1
        return self.last

    generate_trace_id = generate_span_id


class OwnSampler(Sampler):
    def __init__(self, decision: Decision, attributes: Any) -> None:
        self.decision, self.attributes = decision, attributes

    def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:
        return SamplingResult(self.decision, self.attributes, TraceState([("sampler", "s")]))

    def get_description(self) -> str:
        return "own"


class Witness(SpanProcessor):
    """Records all that can be seen of a span, and changes it."""

    def __init__(self, on_start: Sequence[Any] = (), on_ending: Sequence[Any] = ()) -> None:
        self.changes = {"start": on_start, "ending": on_ending}
        self.seen: list[Any] = []
        self.ended: list[ReadableSpan] = []

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self.seen.append(("start", view(span), get_current_span(parent_context).get_span_context()))
        self.seen.append(applied(span, self.changes["start"]))

    def _on_ending(self, span: Span) -> None:
        self.seen.append(("ending", view(span)))
        self.seen.append(applied(span, self.changes["ending"]))

    def on_end(self, span: ReadableSpan) -> None:
        self.seen.append(("end", view(span)))
        self.ended.append(span)


def view(span: Any) -> Any:
    """All that is public of a span, and its attributes inside."""
    public = {
        name: getattr(span, name)
        for name in ("name", "context", "kind", "parent", "start_time", "end_time", "resource", "instrumentation_scope",
                     "dropped_attributes", "dropped_events", "dropped_links")
    }  # fmt: skip
    public["attributes"] = repr(span.attributes), list(span.attributes.items())
    public["events"] = [
        (each.name, each.timestamp, repr(each.attributes), each.dropped_attributes) for each in span.events
    ]
    public["links"] = [(each.context, repr(each.attributes), each.dropped_attributes) for each in span.links]
    public["status"] = span.status.status_code, span.status.description
    if isinstance(span, Span):
        public["span"] = repr(span), span.is_recording(), span.get_span_context()
        public["inside"] = span._record_exception, span._set_status_on_exception, span._trace_config
    # Not public, and read and written by processors all the same.
    kept = span._attributes
    inside = {name: value for name, value in vars(kept).items() if name not in ("_dict", "_lock")}
    public["kept"] = type(kept), dict(kept._dict), inside, type(kept._lock)
    return public


def applied(span: Any, changes: Sequence[Any]) -> list[Any]:
    """Make the changes; what was raised."""
    raised = []
    for method, *arguments in changes:
        try:
            getattr(span, method)(*arguments)
        except Exception as error:
            raised.append(repr(error))
    return raised


class Logged(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def outcome(light: bool, case: Mapping[str, Any]) -> Any:
    """All that happens to one span, which is made either way."""
    witness = Witness(case["on_start"], case["on_ending"])
    provider = TracerProvider(
        sampler=ParentBased(ALWAYS_ON) if case["sampler"] is None else OwnSampler(*case["sampler"]),
        resource=RESOURCE,
        id_generator=Ids(),
        span_limits=SpanLimits(**case["limits"]),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(witness)
    tracer: Tracer = provider.get_tracer("scope", "1", "https://example.com/schema", {"key": "value"})
    if light:
        tracer = lightened(tracer)
        assert type(tracer) is LightTracer
    logged = Logged()
    logging.getLogger("opentelemetry").addHandler(logged)
    try:
        context = Context()
        if case["parent"] is not None:
            context = set_span_in_context(NonRecordingSpan(case["parent"]), context)
        links = None if case["links"] is None else [Link(*link) for link in case["links"]]
        try:
            span = tracer.start_span(case["name"], context, case["kind"], case["attributes"], links, case["start"])
        except (TypeError, ValueError) as error:  # an attribute that the SDK refuses
            return repr(error), logged.lines
        if span.is_recording():
            assert type(span) is (LightSpan if light else sdk_trace._Span)
        raised = applied(span, [*case["changes"], ("end", case["end"])])
        exported = [sent(ended) for ended in witness.ended]
        return witness.seen, raised, span.get_span_context(), span.is_recording(), exported, logged.lines
    finally:
        logging.getLogger("opentelemetry").removeHandler(logged)


def sent(span: ReadableSpan) -> list[Any]:
    """What the console and OTLP get; for what they cannot send, the type of the error."""
    texts: list[Any] = []
    for encode in (ReadableSpan.to_json, lambda span: encode_spans([span]).SerializeToString(deterministic=True)):
        try:
            texts.append(encode(span))
        except Exception as error:
            texts.append(type(error))
    return texts


@given(
    st.fixed_dictionaries(
        {
            "name": st.text(max_size=5),
            "kind": st.sampled_from(SpanKind),
            "attributes": ATTRIBUTES,
            "links": st.one_of(st.none(), st.lists(st.tuples(CONTEXTS, ATTRIBUTES), max_size=3)),
            "parent": st.one_of(st.none(), CONTEXTS),
            "start": TIMES,
            "end": TIMES,
            "sampler": st.one_of(st.none(), st.tuples(st.sampled_from(Decision), ATTRIBUTES)),
            "limits": LIMITS,
            "on_start": st.lists(CHANGES, max_size=2),
            "on_ending": st.lists(CHANGES.filter(lambda change: change[0] != "end"), max_size=2),
            "changes": st.lists(CHANGES, max_size=5),
        }
    )
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_a_light_span_is_the_sdks_span_to_all_who_look(case: dict[str, Any]) -> None:
    assert outcome(True, case) == outcome(False, case)


CASE: dict[str, Any] = {
    "name": "name",
    "kind": SpanKind.CLIENT,
    "attributes": None,
    "links": None,
    "parent": None,
    "start": 1,
    "end": 2,
    "sampler": None,
    "limits": {},
    "on_start": [],
    "on_ending": [],
    "changes": [],
}


@pytest.mark.parametrize("most", [0, 1, 3, 4, 5, 6, 7])
def test_as_many_attributes_are_dropped_and_the_same_ones(most: int) -> None:
    later = [{"c": 4, "d": 5, "e": 6}, {"a": 7, "f": 8}]
    case = {
        **CASE,
        "attributes": {"a": 1, "b": 2, "c": 3},
        "limits": {"max_span_attributes": most},
        "changes": [("set_attributes", attributes) for attributes in later],
    }
    assert outcome(True, case) == outcome(False, case)


def light_tracer(*processors: SpanProcessor, **options: Any) -> Tracer:
    provider = TracerProvider(shutdown_on_exit=False, **options)
    for processor in processors:
        provider.add_span_processor(processor)
    tracer = lightened(provider.get_tracer("test"))
    assert type(tracer) is LightTracer
    return tracer


@pytest.mark.parametrize("place", ["on_start", "on_end", "_on_ending"])
def test_what_a_processor_raises_comes_out_where_the_sdk_lets_it_out(place: str) -> None:
    class Broken(SpanProcessor):
        def fail(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError(place)

    broken = Broken()
    setattr(broken, place, broken.fail)

    def run(tracer: Tracer) -> list[str]:
        came = []
        try:
            span = tracer.start_span("span")
            came.append("started")
            span.end()
            came.append("ended")
        except RuntimeError as error:
            came.append(str(error))
        return came

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(broken)
    assert run(light_tracer(broken)) == run(provider.get_tracer("test"))


def test_samplers_and_id_generators_that_raise_raise() -> None:
    class Broken(Ids, OwnSampler):
        def __init__(self) -> None:
            pass

        def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:
            raise RuntimeError("sampler")

        def generate_trace_id(self) -> int:
            raise RuntimeError("ids")

    with pytest.raises(RuntimeError, match="sampler"):
        light_tracer(sampler=Broken()).start_span("span")
    with pytest.raises(RuntimeError, match="ids"):
        light_tracer(id_generator=Broken()).start_span("span")


def test_attributes_of_the_caller_may_change_afterwards() -> None:
    given: dict[str, Any] = {"key": 1, "texts": ["a"]}
    span: Any = light_tracer().start_span("span", attributes=given)
    later = {"later": [1]}
    span.set_attributes(later)
    given["key"] = 2
    given["texts"].append("b")
    later["later"].append(2)
    assert dict(span.attributes) == {"key": 1, "texts": ("a",), "later": (1,)}


def test_a_tracer_that_is_not_the_sdks_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnTracer(sdk_trace.Tracer):
        pass

    tracer: Any = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    none = NoOpTracer()
    assert lightened(none) is none
    own = object.__new__(OwnTracer)
    assert lightened(own) is own
    monkeypatch.setattr(tracer, "start_span", lambda *args, **kwargs: None, raising=False)
    assert lightened(tracer) is tracer


def test_an_sdk_whose_spans_differ_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(self: Any) -> ReadableSpan:
        readable = original(self)
        readable._end_time = round(readable._end_time or 0, -3)
        return readable

    original = sdk_trace.Span._readable_span
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    monkeypatch.setattr(spans, "_is_the_sdks", lambda function: True)
    monkeypatch.setattr(sdk_trace.Span, "_readable_span", rounded)
    monkeypatch.setattr(spans, "_LEFT_OUT", (*spans._LEFT_OUT[:-1], rounded))
    spans.same_spans.cache_clear()
    try:
        assert lightened(tracer) is tracer
    finally:
        spans.same_spans.cache_clear()


def test_an_sdk_that_another_package_has_patched_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    monkeypatch.setattr(spans, "_LEFT_OUT", (*spans._LEFT_OUT[:-1], lambda self: None))
    spans.same_spans.cache_clear()
    try:
        assert lightened(tracer) is tracer
    finally:
        spans.same_spans.cache_clear()


def counted(calls: list[str]) -> Callable[..., Any]:
    """A wrapper of wrapt's, as most instrumentations make them: it says that it equals what it wraps."""

    def wrapper(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        calls.append(wrapped.__name__)
        return wrapped(*args, **kwargs)

    return wrapper


def test_what_wrapt_has_patched_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    patched = (sdk_trace.Tracer, "start_span"), (sdk_trace.Span, "set_attributes"), (sdk_trace.Span, "end")
    for late in (True, False):
        tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
        light = lightened(tracer)
        for owner, name in patched:
            monkeypatch.setattr(owner, name, wrapt.FunctionWrapper(vars(owner)[name], counted(calls)))
        if not late:
            monkeypatch.setattr(spans, "_LEFT_OUT", (sdk_trace.Tracer.start_span, *spans._LEFT_OUT[1:]))
            spans.same_spans.cache_clear()
            light = lightened(tracer)
            assert light is tracer
        calls.clear()
        span = light.start_span("span")
        span.set_attributes({"key": "value"})
        span.end()
        assert [*dict.fromkeys(calls)] == ["start_span", "set_attributes", "end"]
        monkeypatch.undo()
        spans.same_spans.cache_clear()


def test_a_processor_may_put_itself_before_what_sets_attributes() -> None:
    seen: list[Any] = []

    class Watching(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            original = span.set_attributes

            def hide(attributes: dict[str, Any]) -> None:
                seen.append(dict(attributes))
                attributes["key"] = "hidden"
                original(attributes)

            span.set_attributes = hide

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Watching())
    shared = {"key": "value"}  # of several calls
    for tracer in (provider.get_tracer("test"), lightened(provider.get_tracer("test"))):
        span: Any = tracer.start_span("span")
        set_repaired(span, shared)
        assert seen.pop() == shared == {"key": "value"}
        assert span.attributes == {"key": "hidden"}


def test_an_sdk_of_an_unknown_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    monkeypatch.setattr("opentelemetry.sdk.version.__version__", "1.99.0")
    assert lightened(tracer) is tracer


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (sdk_trace.Tracer, "start_span"),
        (sdk_trace.Span, "__init__"),
        (sdk_trace.Span, "start"),
        (sdk_trace.Span, "end"),
        (sdk_trace.Span, "set_attribute"),
        (sdk_trace.Span, "set_attributes"),
        (sdk_trace.Span, "_readable_span"),
    ],
)
def test_what_others_patch_in_the_sdk_meanwhile_is_called(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    tracer = light_tracer()
    monkeypatch.setattr(owner, name, patched)
    span = tracer.start_span("span")
    span.set_attribute("key", "value")
    span.set_attributes({"key": "value"})
    span.end()
    assert calls


def test_processors_that_come_later_are_called() -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    tracer = lightened(provider.get_tracer("test"))
    before = tracer.start_span("before")
    witness = Witness()
    provider.add_span_processor(witness)
    tracer.start_span("after").end()
    before.end()
    assert [each.name for each in witness.ended] == ["after", "before"]


def test_several_processors_are_called_in_turn_with_threads_of_their_own_or_without() -> None:
    for together in (SynchronousMultiSpanProcessor(), ConcurrentMultiSpanProcessor(2)):
        witnesses = [Witness([("set_attribute", "first", 1)]), Witness([("set_attribute", "second", 2)])]
        tracer = light_tracer(*witnesses, active_span_processor=together)
        tracer.start_span("span").end()
        for witness in witnesses:
            assert sorted(witness.ended[0].attributes or {}) == ["first", "second"]
        together.shutdown()


def test_a_processor_that_looks_once_ends_nothing_early() -> None:
    class Looks(SpanProcessor):
        def on_start(self, span: Span, parent_context: Context | None = None) -> None:
            assert len(span.attributes or ()) == 1

    ended = Witness()
    span: Any = light_tracer(Looks(), ended).start_span("span", attributes={"a": 1})
    span.set_attributes({"b": 2})
    span.set_attributes({"a": 3})
    span.end()
    assert list((ended.ended[0].attributes or {}).items()) == [("b", 2), ("a", 3)]


def test_threads_lose_nothing() -> None:
    witness = Witness()
    span = light_tracer(witness, span_limits=SpanLimits(max_span_attributes=10_000)).start_span("span")
    all_there = threading.Barrier(4)

    def work(name: int) -> None:
        all_there.wait()
        for number in range(200):
            span.set_attributes({f"{name}.{number}": number, "shared": name})

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    span.end()
    assert len(witness.ended[0].attributes or {}) == 801
