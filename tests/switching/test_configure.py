"""``dspy_otel.configure(...)``: one line for a program with nothing set up. Each in a fresh process: providers are
global, and set once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspy_otel import flush, setup
from dspy_otel.config import Config
from tests.support.nightly import at_night
from tests.support.otlp_receiver import OtlpReceiver
from tests.switching.process import Finished, python

ONE_CALL = ["Predict reply", "chat echo", "invoke_workflow App"]

_PROGRAM = """
import json, sys
import dspy_otel
{before}
dspy_otel.configure(**json.loads(sys.argv[1]))
from tests.switching.app import main
sys.argv = sys.argv[:1]
main()
{after}
"""


def configured(*, before: str = "", after: str = "", arguments: dict[str, Any] | None = None, **rest: Any) -> Finished:
    """The program of app.py after ``configure(**arguments)``."""
    return python(_PROGRAM.format(before=before, after=after), json.dumps(arguments or {}), **rest)


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as running:
        yield running


@pytest.mark.integration
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_otlp_by_argument(receiver: OtlpReceiver, protocol: str):
    endpoint = receiver.grpc if protocol == "grpc" else receiver.http
    # Port 4317 would say gRPC by itself; the receiver's is another.
    settings = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"} if protocol == "grpc" else {}
    done = configured(arguments={"otlp": endpoint, "service_name": "sky"}, **settings)
    assert done.output == "answer: blue\n"
    assert done.warnings == []
    assert receiver.span_names() == ONE_CALL
    assert "gen_ai.client.token.usage" in receiver.metric_names()
    assert {request.transport for request in receiver.received} == {protocol}
    assert {span.resource["service.name"] for span in receiver.spans()} == {"sky"}


@pytest.mark.integration
def test_an_argument_wins_over_the_environment(receiver: OtlpReceiver):
    done = configured(
        arguments={"otlp": receiver.http.removeprefix("http://"), "capture_content": "span_only", "metrics": False},
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
        OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT="no_content",
        OTEL_TRACES_EXPORTER="console",
        OTEL_EXPORTER_OTLP_HEADERS="x-tenant=blue",
    )
    assert done.output == "answer: blue\n"
    assert receiver.span_names() == ONE_CALL
    assert receiver.metric_names() == set()
    (program,) = receiver.spans("invoke_workflow")
    assert "Which colour is the sky?" in program.attributes["input.value"]
    assert receiver.requests("traces")[0].headers["x-tenant"] == "blue"


@pytest.mark.integration
def test_environment_chooses_the_exporters(receiver: OtlpReceiver):
    done = configured(
        OTEL_METRICS_EXPORTER="otlp", OTEL_TRACES_EXPORTER="console", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http
    )
    assert '"name": "invoke_workflow App"' in done.output
    assert "gen_ai.client.token.usage" in receiver.metric_names()
    assert receiver.span_names() == []
    assert receiver.event_names() == []


@pytest.mark.integration
def test_environment_names_only_an_endpoint(receiver: OtlpReceiver):
    configured(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http, OTEL_SERVICE_NAME="sky")
    assert receiver.span_names() == ONE_CALL
    assert receiver.metric_names()
    assert {span.resource["service.name"] for span in receiver.spans()} == {"sky"}


@pytest.mark.integration
@pytest.mark.parametrize("how", [*at_night("argument", "environment"), "environment and endpoint"])
def test_mlflow_store(receiver: OtlpReceiver, tmp_path: Path, how: str):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    if how == "argument":
        done = configured(arguments={"mlflow": store, "experiment": "sky"}, cwd=tmp_path)
    else:
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http} if "endpoint" in how else {}
        done = configured(MLFLOW_TRACKING_URI=store, MLFLOW_EXPERIMENT_NAME="sky", cwd=tmp_path, **endpoint)
    assert done.output == "answer: blue\n"
    assert done.warnings == []
    client = mlflow.MlflowClient(store)
    (trace,) = client.search_traces(locations=[client.get_experiment_by_name("sky").experiment_id])
    assert sorted(span.name for span in trace.data.spans) == ONE_CALL
    assert receiver.span_names() == (ONE_CALL if "endpoint" in how else [])


@pytest.mark.integration
def test_console_alone():
    done = configured(arguments={"console": True})
    assert done.output.count('"name": "chat echo"') == 1
    assert done.warnings == []


@pytest.mark.integration
def test_a_provider_somebody_set_is_left_alone_and_gets_the_spans():
    done = configured(
        before=(
            "from opentelemetry import trace\n"
            "from tests.support.spans import Recorder\n"
            "mine = Recorder()\n"
            "trace.set_tracer_provider(mine.tracer_provider)"
        ),
        arguments={"console": True},
        after="assert trace.get_tracer_provider() is mine.tracer_provider; print([s.name for s in mine.spans])",
    )
    assert done.output == "answer: blue\n['invoke_workflow App', 'Predict reply', 'chat echo']\n"
    (warning,) = done.warnings
    assert "a tracer provider (TracerProvider) is set already" in warning


@pytest.mark.integration
def test_sdk_disabled():
    done = configured(arguments={"console": True}, OTEL_SDK_DISABLED="true")
    assert done.output == "answer: blue\n"
    (warning,) = done.warnings
    assert "OTEL_SDK_DISABLED" in warning


# --- called again -----------------------------------------------------------------------------------------------------
_CELLS = """
import sys
import dspy
import dspy_otel
from tests.switching.app import App, EchoLM

dspy.configure(lm=EchoLM('test/echo'))
def ask(question):
    App()(question=question)
{cells}
"""


def cells(*lines: str, **rest: Any) -> Finished:
    """The lines, as a notebook's cells are run."""
    return python(_CELLS.format(cells="\n".join(lines)), **rest)


@pytest.mark.integration
def test_a_cell_that_is_run_twice_changes_nothing_and_says_nothing(receiver: OtlpReceiver):
    line = f"dspy_otel.configure(otlp={receiver.http!r}, capture_content='span_only', service_name='sky')"
    same = (
        "from opentelemetry import trace",
        "before = trace.get_tracer_provider()._active_span_processor._span_processors[0]._span_processors",
        line,
        "assert before == trace.get_tracer_provider()._active_span_processor._span_processors[0]._span_processors",
    )
    done = cells(line, "call = dspy.Module.__call__", *same, "assert call is dspy.Module.__call__", "ask('again?')")
    assert done.errors == ""
    assert receiver.span_names() == ONE_CALL


@pytest.mark.integration
def test_what_has_changed_is_in_force_from_then_on(receiver: OtlpReceiver):
    with OtlpReceiver() as other:
        done = cells(
            f"dspy_otel.configure(otlp={receiver.http!r})",
            "ask('the first question')",
            f"dspy_otel.configure(otlp={other.http!r}, capture_content='span_only')",
            "ask('the second question')",
            f"dspy_otel.configure(otlp={other.http!r})",
            "ask('the third question')",
        )
        assert done.warnings == []
        assert receiver.span_names() == ONE_CALL
        assert other.span_names() == sorted(ONE_CALL * 2)
        assert "gen_ai.client.token.usage" in receiver.metric_names() & other.metric_names()
        asked = [span.attributes.get("input.value", "") for span in other.spans("invoke_workflow")]
    assert ["the second question" in text for text in asked] == [True, False]
    assert not any("first question" in str(span.attributes) for span in receiver.spans())


@pytest.mark.integration
def test_what_cannot_change_is_one_warning_and_a_failure_leaves_the_former_in_force(receiver: OtlpReceiver):
    done = cells(
        f"dspy_otel.configure(otlp={receiver.http!r}, service_name='sky')",
        f"dspy_otel.configure(otlp={receiver.http!r}, service_name='sea')",
        "import os; os.environ['OTEL_TRACES_EXPORTER'] = 'zipkn'",
        "try: dspy_otel.configure()",
        "except RuntimeError as error: print(error)",
        "ask('still?')",
    )
    (warning,) = done.warnings
    assert "cannot change service_name (sky) any more" in warning
    assert "no traces exporter named 'zipkn' is installed" in done.output
    assert {span.resource["service.name"] for span in receiver.spans()} == {"sky"}


@pytest.mark.integration
def test_settings_of_instrument_are_left_alone():
    done = cells("dspy_otel.instrument()", "dspy_otel.configure(console=True, metrics=False)")
    (warning,) = done.warnings
    assert "instrument() has switched instrumentation on already" in warning


@pytest.mark.integration
@pytest.mark.parametrize(
    "how", ["another experiment", *at_night("set_experiment and the cell again", "set_experiment alone", "and calls")]
)
def test_another_experiment_of_mlflow(tmp_path: Path, how: str):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    flush = "from opentelemetry import trace; trace.get_tracer_provider().force_flush()"
    start = "import mlflow; mlflow.set_tracking_uri(" + repr(store) + ")"
    evaluate = (
        "row = dspy.Example(question='q').with_inputs('question')",
        "dspy.Evaluate(devset=[row], metric=lambda *_: 1.0, num_threads=1, display_progress=False)(App())",
    )
    if how == "another experiment":
        lines = [
            f"dspy_otel.configure(mlflow={store!r}, experiment='one')",
            *("ask('first')", f"dspy_otel.configure(mlflow={store!r}, experiment='two')", "ask('second')"),
        ]
        expected = {"one": 1, "two": 1}
    elif how == "set_experiment and the cell again":
        cell = f"dspy_otel.configure(mlflow={store!r})"
        lines = [start, "mlflow.set_experiment('one')", cell, "ask('first')", flush]
        lines += ["mlflow.set_experiment('two')", cell, "ask('second')"]
        expected = {"one": 1, "two": 1}
    else:
        lines = [start, f"dspy_otel.configure(mlflow={store!r}, experiment='one')", "ask('first')", flush]
        lines += ["mlflow.set_experiment('two')", *(evaluate * 2 if how == "set_experiment alone" else ["ask('next')"])]
        expected = {"one": 3 if how == "set_experiment alone" else 2, "two": 0}
    done = cells(*lines, cwd=tmp_path, MLFLOW_TRACKING_URI=store, LITELLM_LOCAL_MODEL_COST_MAP="True")
    client = mlflow.MlflowClient(store)
    counts = {}
    for name in expected:
        place = client.get_experiment_by_name(name).experiment_id
        found = client.search_traces(locations=[place])
        counts[name] = sum(trace.data.spans[0].name != "evaluate App" for trace in found)
    assert counts == expected
    said = [line for line in done.errors.splitlines() if "mlflow.set_experiment() has chosen" in line]
    assert len(said) == (how in ("set_experiment alone", "and calls"))


def refused(call: str, hidden: str = "", **settings: str) -> str:
    """What ``configure(...)`` says when it refuses, with the module ``hidden`` (and all below) not installed."""
    code = f"""
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if {hidden!r} and (name + ".").startswith({hidden + "."!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
import dspy_otel
try:
    {call}
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}")
print(dspy_otel.DSPyInstrumentor().is_instrumented_by_opentelemetry)
"""
    message, instrumented = python(code, **settings).output.splitlines()
    assert instrumented == "False"
    return message


@pytest.mark.parametrize(
    ("call", "hidden", "settings", "said"),
    [
        ("dspy_otel.configure()", "opentelemetry.sdk", {}, "RuntimeError: .*SDK: pip install 'dspy-otel\\[otlp\\]'"),
        (
            "dspy_otel.configure(mlflow='sqlite:///x.db')",
            "mlflow",
            {},
            "RuntimeError: traces to MLflow need mlflow.*: pip install 'dspy-otel\\[mlflow\\]'",
        ),
        (
            "dspy_otel.configure(otlp='http://127.0.0.1:4317')",
            "opentelemetry.exporter.otlp.proto.grpc",
            {},
            "RuntimeError: the traces exporter 'otlp_proto_grpc' cannot be loaded",
        ),
        (
            "dspy_otel.configure()",
            "",
            {"OTEL_TRACES_EXPORTER": "zipkn"},
            "RuntimeError: no traces exporter named 'zipkn' is installed",
        ),
        ("dspy_otel.configure(consoles=True)", "", {}, "TypeError: unknown option consoles; known: capture_content"),
    ],
)
def test_what_cannot_work_is_said_at_once(call: str, hidden: str, settings: dict[str, str], said: str):
    import re

    assert re.match(said, refused(call, hidden, **settings))


# --- settings -------------------------------------------------------------------------------------------------------
WRONG = {
    "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": ("capture_content", "everything", "no_content"),
    "OTEL_DSPY_CONTENT_LIMIT": ("content_limit", "-1", 65536),
    "OTEL_DSPY_CAPTURE_MEDIA": ("capture_media", "maybe", False),
    "OTEL_DSPY_REDACT": ("redact", "no.such.module:function", None),
    "OTEL_DSPY_ADAPTER_SPANS": ("adapter_spans", "2", False),
    "OTEL_DSPY_EVALUATION_TRACES": ("evaluation_traces", "tree", "linked"),
    "OTEL_DSPY_OPTIMIZATION_TRACES": ("optimization_traces", "some", "all"),
    "OTEL_DSPY_PROGRESS": ("progress", "bar", "auto"),
    "OTEL_DSPY_ID_KEY": ("id_key", "too short", None),
    "OTEL_DSPY_OPENINFERENCE": ("openinference", "y e s", True),
    "OTEL_DSPY_METRICS": ("metrics", "none", True),
    "OTEL_DSPY_LIGHT_METRICS": ("light_metrics", "heavy", True),
    "OTEL_DSPY_LIGHT_SPANS": ("light_spans", "some", True),
    "OTEL_SEMCONV_STABILITY_OPT_IN": ("semconv_opt_in", "gen_ai/dub", "default"),
    "OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN": ("exception_signal_opt_in", "log", "default"),
    "OTEL_DSPY_EVENT_SIGNAL_OPT_IN": ("event_signal_opt_in", "dup", "default"),
    "OTEL_INSTRUMENTATION_GENAI_COMPLETION_HOOK": ("completion_hook", "attic", None),
}
RIGHT = {
    "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": ("capture_content", "SPAN_AND_EVENT", "span_and_event"),
    "OTEL_DSPY_CONTENT_LIMIT": ("content_limit", " 100 ", 100),
    "OTEL_DSPY_CAPTURE_MEDIA": ("capture_media", "1", True),
    "OTEL_DSPY_REDACT": ("redact", "json:dumps", json.dumps),
    "OTEL_DSPY_ADAPTER_SPANS": ("adapter_spans", "on", True),
    "OTEL_DSPY_EVALUATION_TRACES": ("evaluation_traces", "Nested", "nested"),
    "OTEL_DSPY_OPTIMIZATION_TRACES": ("optimization_traces", "None", "none"),
    "OTEL_DSPY_PROGRESS": ("progress", "yes", "on"),
    "OTEL_DSPY_ID_KEY": ("id_key", "a key of the team", "a key of the team"),
    "OTEL_DSPY_OPENINFERENCE": ("openinference", "off", False),
    "OTEL_DSPY_METRICS": ("metrics", "False", False),
    "OTEL_DSPY_LIGHT_METRICS": ("light_metrics", "no", False),
    "OTEL_DSPY_LIGHT_SPANS": ("light_spans", "0", False),
    "OTEL_SEMCONV_STABILITY_OPT_IN": ("semconv_opt_in", "http/dup, gen_ai, gen_ai/dup", "gen_ai/dup"),
    "OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN": ("exception_signal_opt_in", "logs/dup", "logs/dup"),
    "OTEL_DSPY_EVENT_SIGNAL_OPT_IN": ("event_signal_opt_in", "LOGS", "logs"),
    "OTEL_INSTRUMENTATION_GENAI_COMPLETION_HOOK": ("completion_hook", "a-hook", "a-hook"),
}


def test_every_setting_has_its_cases():
    import dataclasses

    named = {field.metadata["env"] for field in dataclasses.fields(Config)}
    assert named == set(WRONG) == set(RIGHT)


@pytest.mark.parametrize("variable", WRONG)
def test_wrong_value_is_one_warning_and_the_default(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str
):
    field, value, default = WRONG[variable]
    monkeypatch.setenv(variable, value)
    assert getattr(Config.load(), field) == default
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"dspy-otel: {variable}: use ")
    assert (repr(default) if field != "redact" else "no content is recorded") in record.getMessage()


def test_nothing_leaves_unredacted_because_of_a_typing_mistake(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_DSPY_REDACT", WRONG["OTEL_DSPY_REDACT"][1])
    assert Config.load(capture_content="span_only").capture_content == "no_content"


@pytest.fixture
def installed_hook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package with a completion hook."""
    package = tmp_path / "hook-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: hook\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[opentelemetry_genai_completion_hook]\na-hook = hook:make\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("variable", RIGHT)
@pytest.mark.usefixtures("installed_hook")
def test_right_value_by_environment_and_by_argument(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str
):
    field, value, expected = RIGHT[variable]
    assert getattr(Config.load(**{field: value}), field) == expected
    monkeypatch.setenv(variable, value)
    assert getattr(Config.load(), field) == expected
    monkeypatch.setenv(variable, WRONG[variable][1])
    assert getattr(Config.load(**{field: value}), field) == expected
    assert caplog.records == []


@pytest.mark.parametrize("field", [field for field, _, _ in WRONG.values()])
@pytest.mark.parametrize("value", [object(), b"\xff", [], float("nan"), -3, "\0"])
def test_any_wrong_argument_is_a_warning(caplog: pytest.LogCaptureFixture, field: str, value: Any):
    config = Config.load(**{field: value})
    assert getattr(config, field) == Config.__dataclass_fields__[field].default
    assert len(caplog.records) == 1


def test_the_documentation_has_every_setting():
    import dataclasses
    import inspect

    import dspy_otel
    from tests.switching.process import ROOT

    text = (ROOT / "docs" / "configuration.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for field in dataclasses.fields(Config):
        (row,) = [row for row in rows if f"| `{field.name}` |" in row]
        assert f"| `{field.metadata['env']}` |" in row
        default = "none" if field.default is None else f"`{str(field.default).lower()}`"
        assert f"| {default} |" in row
    for name, parameter in inspect.signature(dspy_otel.configure).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert any(f"| `configure()` | `{name}` |" in row for row in rows)


class BrokenReader(InMemoryMetricReader):
    """A reader of a user's that fails."""

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        raise OSError("no space left on device")


@pytest.mark.injects_faults
def test_flush_sends_what_waits_and_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    spans, now = InMemorySpanExporter(), {"resource": Resource.get_empty()}
    tracers, loggers = TracerProvider(**now), LoggerProvider(**now)
    tracers.add_span_processor(BatchSpanProcessor(spans, schedule_delay_millis=3_600_000))
    meters = MeterProvider([BrokenReader()], **now)
    providers = {"tracer": tracers, "meter": meters, "logger": loggers}
    for signal, (name, _) in setup._PROVIDERS.items():
        monkeypatch.setitem(setup._PROVIDERS, signal, (name, lambda name=name: providers[name]))
    try:
        for number, sent in ((1, False), (2, True)):
            tracers.get_tracer("test").start_span("span").end()
            assert flush() is sent
            assert len(spans.get_finished_spans()) == number
            providers["meter"] = NoOpMeterProvider()  # has nothing to flush
    finally:
        for provider in (tracers, meters, loggers):
            provider.shutdown()
