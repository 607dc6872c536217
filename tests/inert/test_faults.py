"""Whatever fails in telemetry, the program does not notice: same result, same exceptions, same context, one warning."""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import dspy
import pytest
from opentelemetry import context as otel_context
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
import dspy_otel.operations
from dspy_otel.telemetry import content, errors, metrics, secrets, spans, totals

from .programs import Oracle, build, exception, freeze, metric


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
        step(lambda: oracle(messages=[{"role": "user", "content": [{"type": "text", "text": "t"}]}], n=2))
    seen += [oracle.seen, random.getstate()]
    assert threading.active_count() <= threads + 2
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


def hang(_: Any) -> SpanExportResult:
    time.sleep(30)
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
}


@pytest.mark.parametrize("fault", sorted(TRACER_FAULTS))
def test_faulty_tracing(fault: str, warnings: list[str]) -> None:
    expected = bare()
    dspy_otel.instrument(tracer_provider=TRACER_FAULTS[fault](), capture_content="span_and_event")
    started = time.monotonic()
    assert_unharmed(warnings, expected)
    assert time.monotonic() - started < 20


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
    ("dspy_otel.operations.parallel", "bind"),
    ("dspy_otel.telemetry.errors", "hide_frames"),
    ("dspy_otel.telemetry.errors", "without_our_frames"),
    ("dspy_otel.optimizers.spans", "current_run"),
}


def functions() -> dict[str, tuple[Any, str]]:
    """Every function and method of the pure rooms, with where it lives."""
    modules = [content, secrets, errors, totals, metrics]
    for package in (dspy_otel.operations, importlib.import_module("dspy_otel.optimizers")):
        for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            modules.append(importlib.import_module(found.name))
    places: dict[str, tuple[Any, str]] = {}
    for module in modules:
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__ or (module.__name__, name) in MACHINERY:
                continue
            if inspect.isfunction(value):
                places[f"{module.__name__[10:]}.{name}"] = (module, name)
            elif inspect.isclass(value):
                for method, function in vars(value).items():
                    # What runs at instrument() makes the wrappers; what is made there is tested.
                    if inspect.isfunction(function) and method != "__init__" and not method.startswith("wrap"):
                        places[f"{module.__name__[10:]}.{name}.{method}"] = (value, method)
    return places


PLACES = functions()
INSTALLERS = {name for name in PLACES if name.startswith("optimizers.")}


def break_everywhere(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Make it raise, also where it was imported by name."""
    original = vars(owner)[name]
    guard = {"open": spans.safe_open, "close": spans.safe_close}.get(name) if inspect.isclass(owner) else None
    monkeypatch.setattr(owner, name, guard(boom) if guard is not None else boom)
    for module_name, module in list(__import__("sys").modules.items()):
        if module_name.startswith("dspy_otel.") and getattr(module, name, None) is original:
            monkeypatch.setattr(module, name, boom)


def some(places: set[str]) -> list[Any]:
    """All of them, of which every twelfth runs in the fast suite."""
    marked = enumerate(sorted(places))
    return [pytest.param(place, marks=[] if index % 12 == 0 else pytest.mark.slow) for index, place in marked]


@pytest.mark.parametrize("place", some(set(PLACES) - INSTALLERS))
def test_each_function_of_ours_fails_in_turn(
    place: str, telemetry: Any, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bare()
    telemetry.instrument(capture_content="span_and_event", adapter_spans=True)
    break_everywhere(monkeypatch, *PLACES[place])
    assert_unharmed(warnings, expected)


@pytest.mark.slow
@pytest.mark.parametrize("place", sorted(set(PLACES) - INSTALLERS))
def test_each_function_of_ours_fails_from_the_start(
    place: str, telemetry: Any, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bare()
    break_everywhere(monkeypatch, *PLACES[place])
    telemetry.instrument(capture_content="span_and_event", adapter_spans=True)
    assert_unharmed(warnings, expected)


@pytest.mark.parametrize("place", some(INSTALLERS))
def test_each_function_of_an_optimizer_fails_in_turn(
    place: str, telemetry: Any, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compiled()
    telemetry.instrument(capture_content="span_and_event")
    break_everywhere(monkeypatch, *PLACES[place])
    assert compiled() == expected
    assert len(warnings) == len(set(warnings))


def compiled() -> list[Any]:
    """What a small optimization gives."""
    random.seed(3)
    rows = [dspy.Example(question=f"q{number}", answer="a").with_inputs("question") for number in range(3)]
    oracle, program = Oracle(), dspy.Predict("question -> answer")
    surrounding = otel_context.get_current()
    with dspy.context(lm=oracle, disable_history=True, trace=None):
        optimizer = dspy.BootstrapFewShotWithRandomSearch(
            metric=lambda example, prediction, trace=None: "7" in prediction.answer,
            max_bootstrapped_demos=1,
            max_labeled_demos=1,
            num_candidate_programs=1,
            num_threads=1,
        )
        made = optimizer.compile(program, trainset=rows)
    assert otel_context.get_current() is surrounding
    return [freeze(made.dump_state()), oracle.seen, random.getstate()]
