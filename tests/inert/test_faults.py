"""Whatever fails in telemetry, the program does not notice: same result, same exceptions, same context, one warning."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import importlib
import inspect
import logging
import pickle
import pkgutil
import random
import re
import socket
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dspy
import pytest
from opentelemetry import baggage
from opentelemetry import context as otel_context
from opentelemetry.metrics import NoOpMeter
from opentelemetry.sdk._logs import LoggerProvider, LogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Sampler

import dspy_otel
from dspy_otel.core import internal_errors, operation, worker_tasks
from dspy_otel.core.metrics import WithoutExemplars
from tests.inert import hostile
from tests.inert.programs import Oracle, build, exception, freeze, metric, until
from tests.operations.test_lm import ENGINES, on
from tests.optimizers import common, test_inert
from tests.support.chat import chat
from tests.support.native import PLACE, native_tracing
from tests.support.older import DSPY
from tests.support.openai_server import Reply, openai_server
from tests.support.spans import Recorder, forget_harmless_texts

pytestmark = pytest.mark.injects_faults


class Boom(Exception):
    pass


def boom(*_: Any, **__: Any) -> Any:
    raise Boom("a fault of telemetry, which quotes sk-000000000000000000")


# --- a program that uses a bit of everything -------------------------------------------------------------------------


class Retriever(dspy.Retrieve):
    def dump_state(self, json_mode: bool = True) -> Any:  # DSPy's own takes no argument, and cannot be saved.
        return {}

    def forward(self, query: str, k: int | None = None, **kwargs: Any) -> Any:
        return dspy.Prediction(passages=["one", "two"])


class Everything(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tree = build(
            (
                "tree",
                [("predict", "question -> answer"), ("react", "question -> answer"), ("failing", "cause")],
                True,
                "prediction",
            )
        )
        self.retrieve = Retriever(k=2)
        self.embed = dspy.Embedder(lambda texts: [[1.0, 2.0] for _ in texts])
        self.failing = build(("failing", "context"))

    def forward(self, question: str) -> Any:
        passages = self.retrieve(question).passages
        numbers = self.embed(passages).tolist()
        return dspy.Prediction(found=self.tree(question=question), passages=passages, numbers=numbers)


PICTURE = "a picture: data:image/png;base64,dGlueQ=="


def observe() -> list[Any]:
    """Run it, and give all that a user sees of it."""
    random.seed(3)
    program = Everything()
    oracle = Oracle(garbled_every=3)
    seen: list[Any] = []
    surrounding = otel_context.get_current()
    threads = threading.active_count()

    def step(function: Callable[[], Any]) -> None:
        try:
            seen.append(freeze(function()))
        except BaseException as error:
            seen.append(exception(error))
        assert otel_context.get_current() is surrounding

    rows = [dspy.Example(question=f"q{number}", answer="a").with_inputs("question") for number in range(3)]
    with dspy.context(lm=oracle, disable_history=True, trace=None):
        step(lambda: program(question="what?"))
        step(lambda: program.failing(question="what?"))
        step(lambda: program.batch(rows, num_threads=1, disable_progress_bar=True))
        evaluate = dspy.Evaluate(devset=rows, metric=metric, num_threads=1, max_errors=100, display_progress=False)
        step(lambda: [evaluate(program).score])
        step(lambda: [type(dspy.LabeledFewShot(k=1).compile(program, trainset=rows)).__name__])
        step(lambda: oracle("a prompt"))
        step(lambda: chat(oracle, [{"role": "user", "content": [{"type": "text", "text": PICTURE}]}], n=2))
    seen += [oracle.seen, random.getstate()]
    # Before DSPy 3.2, one thread is a pool that ends in its own time.
    assert until(lambda: threading.active_count() <= threads + 2), threading.enumerate()
    return seen


_BARE: list[Any] = []


def bare() -> list[Any]:
    if not _BARE:
        _BARE.extend(observe())
    return _BARE


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Messages of our logger; DSPy's own are silenced."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("dspy_otel"), Keep()
    logger.addHandler(handler)
    quiet = [logging.getLogger(name) for name in ("dspy", "opentelemetry")]
    levels = [each.level for each in quiet]
    for each in quiet:
        each.setLevel(logging.CRITICAL + 1)
    yield found
    logger.removeHandler(handler)
    for each, level in zip(quiet, levels, strict=True):
        each.setLevel(level)


def assert_unharmed(warnings: list[str], expected: list[Any]) -> None:
    assert observe() == expected
    assert len(warnings) == len(set(warnings)), "a warning was repeated"
    assert not [message for message in warnings if "sk-0" in message], "a warning told content"


def test_the_program_is_the_same_twice(warnings: list[str]) -> None:
    assert observe() == bare()


def test_without_faults_nothing_is_warned_of(telemetry: Any, warnings: list[str]) -> None:
    expected = bare()
    telemetry.instrument(capture_content="span_and_event", adapter_spans=True)
    assert observe() == expected
    assert warnings == []
    assert len(telemetry.spans) > 30


# --- faults of the SDK ---------------------------------------------------------------------------------------------


class Exporter(SpanExporter):
    def __init__(self, export: Callable[..., Any]) -> None:
        self._export = export

    def export(self, spans: Any) -> Any:
        return self._export(spans)

    shutdown = force_flush = boom


class Starts(SpanProcessor):
    on_start = boom


class Ends(SpanProcessor):
    on_end = boom


class Both(SpanProcessor):
    on_start = on_end = boom


class Picks(Sampler):
    should_sample = boom

    def get_description(self) -> str:
        return "boom"


class PicksNonsense(Picks):
    def should_sample(self, *_: Any, **__: Any) -> Any:
        return None


class Numbers(IdGenerator):
    generate_span_id = generate_trace_id = boom


_NEVER = threading.Event()


def hang(_: Any) -> SpanExportResult:
    _NEVER.wait()
    return SpanExportResult.SUCCESS


def provider(*processors: SpanProcessor, **options: Any) -> TracerProvider:
    made = TracerProvider(shutdown_on_exit=False, **options)
    for processor in processors:
        made.add_span_processor(processor)
    return made


def batch(exporter: SpanExporter, **options: Any) -> BatchSpanProcessor:
    processor = BatchSpanProcessor(exporter, max_queue_size=16, max_export_batch_size=4, schedule_delay_millis=10)
    worker = getattr(getattr(processor, "_batch_processor", None), "_worker_thread", None)
    assert worker is None or worker.daemon
    return processor


def shut_down() -> TracerProvider:
    made = provider(SimpleSpanProcessor(Exporter(lambda _: SpanExportResult.SUCCESS)))
    made._active_span_processor.shutdown = lambda: None  # type: ignore[method-assign]
    made.shutdown()
    return made


def otlp(endpoint: str) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return provider(batch(OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=1)))


def otlp_by_grpc(endpoint: str) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return provider(batch(OTLPSpanExporter(endpoint, insecure=True, timeout=1)))


def mlflow_away() -> TracerProvider:
    from dspy_otel.mlflow import MLflowSpanExporter

    return provider(batch(MLflowSpanExporter("http://127.0.0.1:1")))


def dies_while_it_answers() -> TracerProvider:
    """To a server that takes a request, begins to answer it, and is gone: on that connection, then altogether."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listening:
            for _ in range(2):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n\x0a")

    threading.Thread(target=serve, daemon=True).start()
    return otlp(f"http://127.0.0.1:{listening.getsockname()[1]}")


TRACER_FAULTS: dict[str, Callable[[], TracerProvider]] = {
    "processor raises on start": lambda: provider(Starts()),
    "processor raises on end": lambda: provider(Ends()),
    "processor raises on both": lambda: provider(Both()),
    "sampler raises": lambda: provider(sampler=Picks()),
    "sampler gives nonsense": lambda: provider(sampler=PicksNonsense()),
    "id generator raises": lambda: provider(id_generator=Numbers()),
    "exporter raises": lambda: provider(SimpleSpanProcessor(Exporter(boom))),
    "exporter fails": lambda: provider(SimpleSpanProcessor(Exporter(lambda _: SpanExportResult.FAILURE))),
    "exporter gives nonsense": lambda: provider(SimpleSpanProcessor(Exporter(lambda _: "nonsense"))),
    "exporter raises in the background": lambda: provider(batch(Exporter(boom))),
    "exporter hangs in the background": lambda: provider(batch(Exporter(hang))),
    "provider is shut down": shut_down,
    "connection is refused": lambda: otlp("http://127.0.0.1:1"),
    "connection is refused by gRPC": lambda: otlp_by_grpc("http://127.0.0.1:1"),
    "MLflow is away": mlflow_away,
    "server dies while it answers": dies_while_it_answers,
}


@pytest.mark.parametrize("fault", sorted(TRACER_FAULTS))
def test_faulty_tracing(fault: str, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bare()
    faulty = TRACER_FAULTS[fault]()
    dspy_otel.instrument(tracer_provider=faulty, capture_content="span_and_event")
    assert_unharmed(warnings, expected)  # an exporter that hangs does so for ever: whoever waits for it never gets here
    if fault == "MLflow is away":  # its threads would go on in other tests
        monkeypatch.setenv("OTEL_DSPY_EXIT_SECONDS", "0")
        faulty.shutdown()


def _faulty_reader() -> Any:
    reader = InMemoryMetricReader()
    reader._receive_metrics = boom  # type: ignore[method-assign]
    return MeterProvider([reader], shutdown_on_exit=False)


def _faulty_log_processor() -> Any:
    made = LoggerProvider(shutdown_on_exit=False)
    processor = LogRecordProcessor.__new__(type("Faulty", (LogRecordProcessor,), dict.fromkeys(_PROCESSOR, boom)))
    made.add_log_record_processor(processor)
    return made


def _shut(made: Any) -> Any:
    made.shutdown()
    return made


_PROCESSOR = ("on_emit", "emit", "shutdown", "force_flush")
OTHER_FAULTS: dict[str, Callable[[], dict[str, Any]]] = {
    "no metric reader": lambda: {"meter_provider": MeterProvider([], shutdown_on_exit=False)},
    "metric reader raises": lambda: {"meter_provider": _faulty_reader()},
    "meter provider is shut down": lambda: {"meter_provider": _shut(MeterProvider([InMemoryMetricReader()]))},
    "log processor raises": lambda: {"logger_provider": _faulty_log_processor()},
    "logger provider is shut down": lambda: {"logger_provider": _shut(LoggerProvider(shutdown_on_exit=False))},
}


@pytest.mark.parametrize("fault", sorted(OTHER_FAULTS))
def test_faulty_metrics_and_events(fault: str, telemetry: Any, warnings: list[str]) -> None:
    expected = bare()
    telemetry.instrument(capture_content="span_and_event", **OTHER_FAULTS[fault]())
    assert_unharmed(warnings, expected)
    assert len(telemetry.spans) > 30, "spans do not depend on metrics and events"


def test_provider_that_is_shut_down_in_the_middle(telemetry: Any, warnings: list[str]) -> None:
    expected = bare()
    telemetry.instrument(capture_content="span_and_event")
    timer = threading.Timer(0.05, telemetry.tracer_provider.shutdown)
    timer.start()
    for _ in range(3):
        assert observe() == expected
    timer.join()


class Broken:
    """Has every method, and each one raises."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return boom


class Half:
    """Makes things that are broken."""

    def __init__(self, *made: str) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: Half("x") if name.startswith("get_") else Broken()


@pytest.mark.parametrize("which", ["tracer_provider", "meter_provider", "logger_provider"])
@pytest.mark.parametrize("broken", [Broken, Half])
def test_faulty_providers(which: str, broken: Any, telemetry: Any, warnings: list[str]) -> None:
    expected = bare()
    try:
        telemetry.instrument(**{which: broken()}, capture_content="span_and_event")
    except Boom:
        pytest.fail("instrument() raised")
    assert_unharmed(warnings, expected)


def test_faulty_redaction_drops_content_only(telemetry: Any, warnings: list[str]) -> None:
    expected = bare()
    telemetry.instrument(capture_content="span_and_event", redact=boom)
    assert_unharmed(warnings, expected)
    assert telemetry.spans
    assert all("input.value" not in span.attributes for span in telemetry.spans)


def test_a_faulty_logging_handler_of_the_user(telemetry: Any) -> None:
    expected = bare()

    class Bad(logging.Handler):
        emit = boom
        handle = boom

    logger, handler = logging.getLogger("dspy_otel"), Bad()
    logger.addHandler(handler)
    logging.disable(logging.NOTSET)
    try:
        telemetry.instrument(capture_content="span_only", redact=boom)
        assert observe() == expected
    finally:
        logger.removeHandler(handler)


# --- faults of our own ---------------------------------------------------------------------------------------------

MACHINERY = {
    # What makes everything else safe; a fault in them is tested by what they make safe.
    *("operations.parallel.bind", "optimizers.state.current_tracker", "propagation.inject", "propagation.attach"),
    *("propagation.add_usage", "propagation.delegate", "propagation._arrived", "propagation._reply"),
    *(f"propagation._Delegated.{method}" for method in ("__init__", "__call__", "__reduce__", "__dask_tokenize__")),
    *(f"propagation._Sent.{method}" for method in ("__init__", "__call__", "__reduce__", "_awaited")),
    *(f"propagation.{kind}.{method}" for kind in ("_Reply", "_OnError") for method in ("__init__", "__reduce__")),
    *("propagation.Attached.usage", "propagation.Attached._is_copy"),
    *("core.errors.hide_frames", "core.errors.without_our_frames"),
    *("core.internal_errors.failed", "core.internal_errors.warn_once", "core.internal_errors.reset_warnings"),
    *(f"core.internal_errors.guard.{method}" for method in ("__init__", "__enter__", "__exit__", "__call__")),
    *("core.operation.detach", "core.operation._return_to"),
    *("optimizers.enclosing.EnclosedOperation.open", "optimizers.enclosing.EnclosedOperation._open_inside"),
    *("core.operation.Operation.open", "core.operation.Operation.close", "core.operation.Operation.fail"),
    *("core.operation.safe_open", "core.operation.safe_close", "core.operation._continue"),
    *("core.operation.Operation.__reduce__", "core.operation._NothingToRecord.__reduce__"),
    # Called by the SDK. It calls what cannot raise, and nothing else.
    "core.measurements.Waiting.callback",
    # Python reports what these raise itself, and nothing more happens.
    *("core.operation._Pending.__del__", "core.operation._Pending.__init__"),
    # What stands in for a function of DSPy's, and what gives it back.
    *(
        "optimizers.trackers.simba._Observed.__call__",
        "optimizers.trackers.simba._Strategies.restore",
        "optimizers.trackers.simba.SIMBATracker.end",
    ),
    *("optimizers.trackers.gepa.Observer.__getattr__", "operations.older_dspy._CountedStream.send"),
    *("optimizers.doors.Doors.optimize", "optimizers.doors.Doors._run"),
    # What registers the trackers, before anything of DSPy's is wrapped.
    *("optimizers.tracker.tracks", "optimizers.tracker.registered"),
    "optimizers.trackers.load",
}
AT_TIMES = re.compile(
    r"\.redaction\.(\w*environment\w*|_Pattern\.__(getattr|init)__|_in_any_case|_kind|_names|remember|_remember_setting|_rules)$"
    r"|\.module_tree\._kind$|\.digest\.(_has_functions|_is_known)$|\.measurements\.(_collected|_shown|BoundSeries\._(made|record_now))$"
    r"|\.spans\.(_(Witness|Ids)\.\w+|_seen|_view|_is_the_sdks|LightTracer\.(look|start_span)|_uniform|_acting|_decisions|_static)$"
    r"|LightSpan\.(_attributes|_events|_links|dropped_attributes)$"
    r"|is_secret_name$|give_exporters_a_generator$|given_ids|\.uploads\.Writers\._(run|next|count)$"
)
"""Called when something has changed since the last time, or once in a process: which may not be so at the next."""

LATE = re.compile(r"\.completion_hook\.|\.native_tracing\.")
"""In one of the last scenarios only."""

AT_INSTRUMENT = ("wrap", "watch", "patch", "guarded", "__init_subclass__", "with_system_ids", "hook")
"""What makes the wrappers; what is made there is tested."""


GENAI = find_spec("opentelemetry.util.genai") is not None
"""Whether there is what the extra `upload` brings."""


def functions() -> dict[str, tuple[Any, str]]:
    """Every function, method and property of ours between DSPy and the SDK, with where it lives."""
    places: dict[str, tuple[Any, str]] = {}
    for package in ("core", "content", "operations", "optimizers", "propagation"):
        root = importlib.import_module(f"dspy_otel.{package}")
        names = [found.name for found in pkgutil.walk_packages(getattr(root, "__path__", ()), f"{root.__name__}.")]
        if not GENAI and "dspy_otel.core.uploads" in names:
            names.remove("dspy_otel.core.uploads")
        for module in (root, *map(importlib.import_module, names)):
            short = module.__name__.removeprefix("dspy_otel.")
            for name, value in vars(module).items():
                if getattr(value, "__module__", None) != module.__name__:
                    continue
                if inspect.isfunction(value):
                    places[f"{short}.{name}"] = (module, name)
                elif inspect.isclass(value) and not getattr(value, "_is_protocol", False):
                    for method, function in vars(value).items():
                        if isinstance(function, (types.FunctionType, property, classmethod, staticmethod)):
                            places[f"{short}.{name}.{method}"] = (value, method)
    places.pop("core.metrics.WithoutExemplars.set")  # another name of `add`
    return {
        place: where
        for place, where in places.items()
        if place not in MACHINERY and not where[1].startswith(AT_INSTRUMENT) and is_written(vars(where[0])[where[1]])
    }


def code_of(function: Any) -> Any:
    function = getattr(function, "fget", None) or getattr(function, "__func__", function)
    return inspect.unwrap(function).__code__


def is_written(function: Any) -> bool:
    """Whether we wrote it ourselves; dataclasses and named tuples have methods that nobody did."""
    return "dspy_otel" in code_of(function).co_filename


PLACES = functions()
GUARDED = internal_errors.guard("")(functions).__code__
"""The code of whatever a guard is around."""


class Fault:
    """Breaks a function or property of ours everywhere, also where it was imported by name.

    Attributes:
        hits: how often the broken one was called.
    """

    def __init__(self, place: str) -> None:
        self.owner, self.name = PLACES[place]
        self.hits = 0

    def raise_it(self, *_: Any, **__: Any) -> Any:
        self.hits += 1
        boom()

    def cause(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = vars(self.owner)[self.name]
        in_class = inspect.isclass(self.owner)

        def broken(*_: Any, **__: Any) -> Any:
            self.raise_it()

        replacement: Any = broken
        if in_class and issubclass(self.owner, operation.Operation) and self.name in ("open", "close"):
            replacement = {"open": operation.safe_open, "close": operation.safe_close}[self.name](broken)
        elif getattr(original, "__code__", None) is GUARDED:
            replacement = internal_errors.guard("a part")(broken)  # broken inside its guard
        elif isinstance(original, property):
            replacement = property(broken)
        elif isinstance(original, (staticmethod, classmethod)):
            replacement = type(original)(broken)
        monkeypatch.setattr(self.owner, self.name, replacement)
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("dspy_otel.") and getattr(module, self.name, None) is original:
                monkeypatch.setattr(module, self.name, replacement)


def calls_of(run: Callable[[], Any]) -> set[str]:
    """The functions of ours that something calls."""
    places = {code_of(vars(owner)[name]): place for place, (owner, name) in reversed(PLACES.items())}
    seen: set[Any] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            seen.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return {places[code] for code in tuple(seen) if code in places}


GEPA_ALONE = find_spec("gepa") is not None and find_spec("gepa.strategies.proposal_sampling") is not None
"""Whether this GEPA has callbacks for all of its doors, and proposes several candidates at once."""
GEPA_ENGINES = GEPA_ALONE and find_spec("gepa.gepa_launcher") is not None
"""Whether its ``optimize_anything`` runs any engine: after 0.1.4."""


# --- what exercises them -------------------------------------------------------------------------------------------

SCENARIOS: dict[str, Callable[[], Any]] = {
    "program": lambda: observe(),
    "pictures": lambda: pictures(),
    "values": lambda: values(),
    "restricted": lambda: restricted(),
    "sent elsewhere": lambda: sent_elsewhere(),
    "served": lambda: served(),
    **({"source": lambda: source()} if hasattr(dspy, "Flex") else {}),  # DSPy 3.2 has none
}
for _name in common.RUNS:
    SCENARIOS[_name] = lambda _name=_name: optimized(_name)
SCENARIOS["BootstrapFewShotWithOptuna"] = lambda: sorted(optimized("BootstrapFewShotWithOptuna"))  # it takes chances
SCENARIOS["limited InferRules"] = lambda: limited()
SCENARIOS["resumed GEPA"] = lambda: resumed()
if GEPA_ALONE:
    SCENARIOS["GEPA alone"] = lambda: alone()
    SCENARIOS["GEPA alone, several candidates at once"] = lambda: alone(at_once=True)
if GEPA_ENGINES:
    SCENARIOS["GEPA's engines"] = lambda: engines()
SCENARIOS["DSPy's own tracing"] = lambda: natively()
SCENARIOS["kept traces"] = lambda: optimized("BootstrapFewShotWithRandomSearch")
SCENARIOS["dropped traces"] = lambda: optimized("BootstrapFewShotWithRandomSearch")
if GENAI:
    SCENARIOS["handed over"] = lambda: pictures()
OPTIONS: dict[str, dict[str, Any]] = {
    "kept traces": {"optimization_traces": "failed_and_best"},
    "dropped traces": {"optimization_traces": "none"},
    "values": {"content_limit": 300, "capture_media": True},
    "served": {"semconv_opt_in": "gen_ai/dup"},
}
"""How each is instrumented, beside what all are."""
if GENAI:
    from dspy_otel.core.uploads import Uploads

    _uploads = Uploads(
        WithoutExemplars(NoOpMeter("none").create_counter("files")), base_path="memory://faults", max_queue_size=20
    )
    OPTIONS["handed over"] = {"completion_hook": _uploads, "capture_media": True}


@contextlib.contextmanager
def unchanged_signatures() -> Iterator[None]:
    """InferRules writes into the signature classes that programs share."""
    kinds, waiting = [], list(dspy.Signature.__subclasses__())
    while waiting:
        kind = waiting.pop()
        kinds.append((kind, kind.__doc__))
        waiting += kind.__subclasses__()
    try:
        yield
    finally:
        for kind, text in kinds:
            if kind.__doc__ != text:
                kind.__doc__ = text


def optimized(name: str) -> Any:
    with unchanged_signatures():
        outcome = test_inert.outcome(name, 1)
    outcome.pop("kept on program")
    return outcome


def limited() -> Any:
    """An optimization within a budget, where instrumentation is on."""
    on = dspy_otel.DSPyInstrumentor().is_instrumented_by_opentelemetry
    with dspy_otel.budget(lm_calls=1_000_000) if on else contextlib.nullcontext():
        return optimized("InferRules")


def sent_elsewhere() -> Any:
    """Tasks for other processes: one comes back twice, one fails and comes with the next, one is lost."""
    on = dspy_otel.DSPyInstrumentor().is_instrumented_by_opentelemetry
    there = worker_tasks._process

    def as_another(work: Callable[[], Any]) -> bytes:
        """What ``work`` gives, pickled in what counts as another process."""
        worker_tasks._process = "another"
        try:
            return pickle.dumps(work())
        finally:
            worker_tasks._process = there

    def failing() -> Any:
        try:
            return pickle.loads(sent[1])("fail")
        except ValueError as error:
            return error

    class Sends(dspy.Module):  # type: ignore[misc]
        def forward(self) -> Any:
            sent.extend(pickle.dumps(dspy_otel.delegate(asked_elsewhere)) for _ in range(3))
            said.append(repr(pickle.loads(as_another(failing))))
            result = as_another(lambda: pickle.loads(sent[0])("q"))
            said.extend(pickle.loads(result) for _ in range(2))
            carrier = dspy_otel.inject(usage=True)

            def by_hand() -> Any:
                with dspy_otel.attach(carrier) as attached:
                    return asked_elsewhere("by hand"), attached.usage()

            answer, usage = pickle.loads(as_another(by_hand))
            dspy_otel.add_usage(usage)
            said.append(answer)
            said.append(pickle.loads(sent[0])("here"))
            return dspy.Prediction(answer=answer)

    random.seed(3)
    sent: list[bytes] = []
    said: list[Any] = []
    with dspy_otel.budget(lm_calls=1_000_000) if on else contextlib.nullcontext():
        said.append(Sends()().answer)
    return said


def asked_elsewhere(question: str) -> str:
    with dspy.context(lm=Oracle(), disable_history=True, trace=None):
        answer = str(dspy.Predict("question -> answer")(question=question).answer)
    if question == "fail":
        raise ValueError(answer)
    return answer


def source() -> Any:
    """A program that holds a ``dspy.Flex``."""

    class Holder(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.named = {"a key": [dspy.Flex("question -> answer")]}

        def forward(self, question: str) -> Any:
            return dspy.Prediction(answer=question)

    return freeze(Holder()(question="q"))


def restricted() -> Any:
    """A random search of the seeds that are named."""
    optimizer = dspy.BootstrapFewShotWithRandomSearch(metric=lambda *_: 1.0, num_candidate_programs=1, num_threads=1)
    rows = common.load_examples("train", 2)
    with dspy.context(lm=common.scripted_lm()):
        best = common.quietly(optimizer.compile, common.ColourFamily(), trainset=rows, restrict=[-3])
    return dspy_otel.program_id(best)


def pictures() -> Any:
    """LM calls with everything that messages can hold."""
    random.seed(3)
    oracle = Oracle()
    parts = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}},
        {"type": "text", "text": f"scanned: {'QUJDREVG' * 60} end"},
    ]
    if DSPY < (3, 5):  # From then on, a tool's result is a message of its own, as it is below.
        parts.append({"type": "tool_result", "id": "1", "content": [{"type": "text", "text": "t"}]})
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "t"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    with dspy.context(lm=oracle, disable_history=True, trace=None):
        said = [chat(oracle, messages, tools=tools, stop=["a"], api_key="none-at-all-1"), oracle("a", n=2)]
        with dspy_otel.attach(dspy_otel.inject()):
            asyncio.run(dspy.Predict("question -> answer").acall(question="q"))
    return [said, oracle.seen]


class TwiceLM(Oracle):
    """Asks two times for each answer, and another LM between."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        super().__call__(*args, **kwargs)
        Oracle()(*args)
        return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        super().generate(*args, **kwargs)
        Oracle()("another one")
        return super().generate(*args, **kwargs)


class Fails(Oracle):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise OwnError("no answer")


class OwnError(Exception):
    status, request_id = 429, "r-1"

    def __str__(self) -> str:
        return "own"


def served() -> Any:
    """Calls to a server on each engine: one in a stream, and one whose first adapter cannot read the answer."""
    predict = dspy.Predict("question -> answer")

    async def streamed() -> str:
        async for each in dspy.streamify(predict)(question="x"):
            answer = each
        return str(answer.answer)

    said = []
    token = otel_context.attach(baggage.set_baggage("session.id", "s1"))
    try:
        with openai_server() as server:
            for engine in ENGINES:
                with dspy.context(lm=on(server, engine)):
                    server.replies.append(Reply("nothing that an adapter can read"))
                    said += [predict(question="x").answer, asyncio.run(streamed())]
    finally:
        otel_context.detach(token)
    return said


@functools.cache
def _passages() -> Any:
    return dspy.Embeddings(["one", "two"], dspy.Embedder(lambda texts: [[1.0, 2.0] for _ in texts]), k=1)


def values() -> Any:
    """Content of every kind that is shown in a way of its own."""
    import numpy

    random.seed(3)
    cycle: list[Any] = [1, 0.5, object()]
    cycle.append(cycle)
    shown = [
        cycle,
        b"bytes",
        numpy.zeros(3),
        ValueError("v", 1),
        datetime.datetime(2020, 1, 1),
        hostile.Data(),
        "é漢 " * 300,
        hostile.LazyFields(),
        {1: 2**200, "1": {"b", "a"}},
        dict.fromkeys(range(1001)),
    ]
    program = dspy.Predict("question -> answer")
    program.demos = [dspy.Example(question=[hostile.Plain(name="m")], answer="a", raw=b"b", more=cycle)]
    program.places = {"of": [program]}  # A module in two places.
    said: list[Any] = []
    with dspy.context(lm=TwiceLM(), disable_history=True, trace=None):
        said.append(_passages()("q").passages)
        said.append(program(question='é漢"' * 400).answer)
        best = dspy.BestOfN(dspy.Predict("question -> answer"), N=2, reward_fn=lambda *_: 0.0, threshold=1.0)
        with dspy.context(trace=[]):
            said.append(best(question="q").answer)
        said.append(program(question="q", extra={str(number): shown for number in range(30)}).answer)
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
        said.append(chat(dspy.settings.lm, [{"role": "user", "content": [image]}]))
        try:
            Fails()("p")
        except OwnError as error:
            said.append(exception(error))
        made = program.acall(question="q")  # never awaited
        made.close()
        said.append(asyncio.run(dspy.asyncify(program)(question="q")).answer)
    return said


@pytest.fixture(autouse=True, scope="module")
def own_tracing() -> Iterator[None]:
    """In this file, DSPy has tracing of its own; it is on in one scenario."""
    with native_tracing():
        yield


def natively() -> Any:
    """A program with DSPy's own tracing on."""
    random.seed(3)
    with dspy.context(lm=Oracle(), callbacks=[sys.modules[PLACE].OtelCallback()], disable_history=True, trace=None):
        return freeze(build(("react", "question -> answer"))(question="q"))


def resumed() -> Any:
    """GEPA, in a folder in which another process was killed."""
    with tempfile.TemporaryDirectory() as folder:
        lm = common.scripted_lm()
        for _ in range(2):
            program, _ = common.quietly(common.run_gepa, lm, calls=30, log_dir=folder)
            place = Path(folder) / "dspy_otel_run.json"
            if place.exists():
                place.write_text(place.read_text().replace('"finished"', '"running"'))
        return dspy_otel.program_id(program)


def alone(at_once: bool = False) -> Any:
    """GEPA by its own doors; with several candidates, the adapter evaluates them in threads."""
    from tests.optimizers import gepa_runs

    adapter: Any = gepa_runs.Adapter(threads=True)
    options: dict[str, Any] = {"calls": 25}
    if at_once:
        from gepa.strategies.proposal_sampling import IndependentSampling

        adapter, options = gepa_runs.Batched(), {"calls": 25, "sampling_strategy": IndependentSampling(3)}
    return [gepa_runs.outcome(gepa_runs.optimize(adapter, **options)), anything(**options)]


def anything(**options: Any) -> Any:
    from tests.optimizers import gepa_runs

    return gepa_runs.outcome(gepa_runs.optimize_anything(**options))


def engines() -> Any:
    """``optimize_anything`` with GEPA's own engine, row by row and grouped, and with one that asks over HTTP."""
    from tests.optimizers import engine_runs

    with tempfile.TemporaryDirectory() as folder:
        config = engine_runs.by_gepa(25)
        config.output_dir = folder
        own = engine_runs.outcome(engine_runs.run(config=config, test_set=engine_runs.ROWS[5:6]))
        asks = engine_runs.Asks(*engine_runs.ALL_REQUESTS)
        engine_runs.run(config=engine_runs.oa.OptimizeAnythingConfig(engine=asks, output_dir=folder))
        few = engine_runs.by_gepa(10)
        few.output_dir = folder
        together = engine_runs.outcome(engine_runs.run(None, few, batch_evaluator=engine_runs.together))
    return own, asks.scores, together


NEVER_CALLED = re.compile(
    r"LightSpan\.__repr__|LightTracer\.start_as_current_span|"
    r"optimizers\.(trackers\.)?(finetune|reanchor|progress)\.|interpreter|typed|_CountedStream|_counted_stream"
    r"|record_(chunk|retry)|count_chunk|_suppression_keys|call_context\._runtime$|simba\._in_compile|older_dspy\.|on_merge_rejected"
    r"|formatting_without|propagation\._typed|\.DeferredSpan\.|Asking\.of|\.__init__$|\.Telemetry\.(_make|_after_fork|__)|Waiting\._after_fork"
    r"|worker_tasks\._after_fork$|UsageOfTask\.add_sums$|Sums\.as_one_call$"
    r"|NativeTracing\.(starting|ending)$"
    r"|telemetry\._stands_alone$|DroppedTrace\.begin_span$"
    r"|(GEPA|Engine)Tracker\.copied$|is_trace_id_random|parent_of_process|gepa\.(GEPAWithoutEvents|OldGEPA)Tracker|gepa\._takes"
    r"|\.((Enclosed)?Operation|Tracker|Blob|SpanFactory)\.\w+$|_Pending|_moment|moment$"
    r"|secret_rules\._with_digit|redaction\._inner|lineage\.optimization$"
    r"|\.id_key\.|_row_id$|introspection\._looks_up_itself$"
    r"|\.Walker\.(text|integer|real|other|entry|cut|stop)$|_Canonical\.cut|_Harmless\._(unseen|knows)$"
    + ("" if GEPA_ALONE else r"|\.doors\.|\.texts\.")
    + ("" if GEPA_ENGINES else r"|\.engines\.")
    + (
        r"|completion_hook\._?load(_uploads)?$|uploads\.(make|reason_of|_named|Writers\.(close|_begin))$"
        if GENAI
        else r"|completion_hook\.|\.as_message$|\.(LM|Module)Operation\.content$|_is_completion$"
    )
    + (
        r"|introspection\.fields$"
        if DSPY < (3, 5)
        else r"|\.(choice_reasons|(id|model)_of_litellm|is_litellm|was_streamed|_tool_call)$"
    )
    + ("" if hasattr(dspy, "Flex") else r"|places_in_digest|module_tree\._below")
    + (
        ""
        if len(ENGINES) > 1  # from DSPy 3.4 on
        else r"|_of_lm15|record_(engine|result|stream)|reported_in_stream|response_of_call_result"
    )
)
"""Not in a scenario here: other versions of DSPy, GEPA or the SDK, a terminal, a stream, fine-tuning, content
off, classes with properties, what runs at instrument() or is overridden everywhere. They have tests of their own."""


@functools.cache
def places_of(scenario: str) -> set[str]:
    """Where a scenario comes by, whatever has run in this process before it."""
    forget_harmless_texts()
    recorder = Recorder()
    recorder.instrument(capture_content="span_and_event", adapter_spans=True, **OPTIONS.get(scenario, {}))
    try:
        return calls_of(SCENARIOS[scenario])
    finally:
        recorder.shutdown()


def scenario_of(place: str) -> str | None:
    """The first scenario that comes by there."""
    for scenario in SCENARIOS:
        try:
            if place in places_of(scenario):
                return scenario
        except Exception:
            # Optuna takes chances, and may draw what no answer fits. It is tried for places that others come by.
            if AT_TIMES.search(place) is None:
                raise
    return None


@functools.cache
def unwatched(scenario: str) -> Any:
    return SCENARIOS[scenario]()


def some(places: set[str]) -> list[Any]:
    """All of them, of which every twelfth runs in the fast suite, for those of optimizers take longer; see below.

    Where no scenario comes by, or only a late one, all scenarios run before that is known: that takes a minute.
    """

    def mark(index: int, place: str) -> Any:
        if any(those.search(place) for those in (NEVER_CALLED, AT_TIMES, LATE)):
            return pytest.mark.nightly
        return (
            [] if index % 12 == 0 and not place.startswith(("optimizers.", "core.deferred_spans.")) else seldom(index)
        )

    return [pytest.param(place, marks=mark(index, place)) for index, place in enumerate(sorted(places))]


def seldom(index: int) -> pytest.MarkDecorator:
    """Every third is among the slow tests, all others run at night: they take ten minutes of processor time."""
    return pytest.mark.nightly if index % 3 else pytest.mark.slow


@pytest.mark.parametrize("place", some(set(PLACES)))
def test_each_function_of_ours_fails_in_turn(
    place: str, telemetry: Any, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = scenario_of(place)
    if scenario is None:
        assert NEVER_CALLED.search(place) or AT_TIMES.search(place), "no scenario comes by here"
        pytest.skip("no scenario comes by here; it has tests of its own")
    expected = unwatched(scenario)
    fault = Fault(place)
    surrounding = otel_context.get_current()
    for at_once in (False, True):
        forget_harmless_texts()
        warnings.clear()  # Each may show once more after `uninstrument()`.
        telemetry.instrument(capture_content="span_and_event", adapter_spans=True, **OPTIONS.get(scenario, {}))
        if not at_once:
            fault.cause(monkeypatch)
        assert SCENARIOS[scenario]() == expected
        assert otel_context.get_current() is surrounding
        assert len(warnings) == len(set(warnings)), "a warning was repeated"
        assert not [message for message in warnings if "sk-0" in message], "a warning told content"
        if fault.hits:
            break
        dspy_otel.uninstrument()  # a wrapper holds the whole one: once more, with one that holds the broken one
    assert fault.hits or AT_TIMES.search(place), "the fault was never met"


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=seldom(index + 1)) for index, place in enumerate(sorted(set(PLACES)))]
)
def test_each_function_of_ours_fails_from_the_start(
    place: str, telemetry: Any, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bare()
    Fault(place).cause(monkeypatch)
    telemetry.instrument(capture_content="span_and_event", adapter_spans=True)
    assert_unharmed(warnings, expected)
