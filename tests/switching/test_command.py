"""``opentelemetry-instrument python app.py``: a program without one line about telemetry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.nightly import at_night
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.switching.process import ROOT, installed, instrumented

pytestmark = [installed, pytest.mark.integration]

OFF = {"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
ANSWER = "answer: blue\n"
ONE_CALL = ["Predict reply", "chat echo", "invoke_workflow App"]


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as running:
        yield running


def parents(spans: list[ReceivedSpan]) -> dict[str, str]:
    names = {span.id: span.name for span in spans}
    return {span.name: names.get(span.parent, span.parent) for span in spans}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_all_three_signals_by_otlp_with_headers_and_resource(receiver: OtlpReceiver, protocol: str):
    done = instrumented(
        "evaluate",
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.grpc if protocol == "grpc" else receiver.http,
        OTEL_EXPORTER_OTLP_HEADERS="x-tenant=blue,authorization=Bearer%20abc",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment=staging,team=colours",
        OTEL_SERVICE_NAME="sky",
        OTEL_TRACES_EXPORTER="otlp",
        OTEL_METRICS_EXPORTER="otlp",
        OTEL_LOGS_EXPORTER="otlp",
    )
    assert done.output == ANSWER + "score: 100.0\n"
    assert done.warnings == []
    ours = [span for span in receiver.spans() if span.scope == "dspy_otel"]
    assert sorted(span.name for span in ours) == sorted(ONE_CALL * 3 + ["example App", "example App", "evaluate App"])
    assert {"gen_ai.client.operation.duration", "gen_ai.client.token.usage", "dspy.evaluation.score"} <= (
        receiver.metric_names()
    )
    assert receiver.event_names().count("gen_ai.evaluation.result") == 2
    for span in ours:
        assert span.resource["service.name"] == "sky"
        assert span.resource["deployment.environment"] == "staging"
        assert span.resource["team"] == "colours"
    for signal in ("traces", "metrics", "logs"):
        requests = receiver.requests(signal)
        assert requests
        for request in requests:
            assert request.transport == ("grpc" if protocol == "grpc" else "http")
            assert request.headers["x-tenant"] == "blue"
            assert request.headers["authorization"] == "Bearer abc"


def test_one_tree_for_one_program(receiver: OtlpReceiver):
    instrumented(
        **{**OFF, "OTEL_TRACES_EXPORTER": "otlp"},
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http,
    )
    spans = receiver.spans()
    assert len({span.trace for span in spans}) == 1
    assert parents(spans) == {
        "invoke_workflow App": "",
        "Predict reply": "invoke_workflow App",
        "chat echo": "Predict reply",
    }
    assert receiver.metric_names() == set()
    assert receiver.event_names() == []


def test_console():
    done = instrumented(**{**OFF, "OTEL_TRACES_EXPORTER": "console"})
    assert done.output.startswith(ANSWER)
    decoder, text, names = json.JSONDecoder(), done.output[len(ANSWER) :].strip(), []
    while text:
        span, end = decoder.raw_decode(text)
        names.append(span["name"])
        text = text[end:].strip()
    assert sorted(names) == ONE_CALL


def test_console_metrics():
    done = instrumented(**{**OFF, "OTEL_METRICS_EXPORTER": "console"})
    assert '"name": "gen_ai.client.token.usage"' in done.output


def test_metrics_switched_off_by_environment():
    done = instrumented(**{**OFF, "OTEL_METRICS_EXPORTER": "console"}, OTEL_DSPY_METRICS="false")
    assert "gen_ai.client" not in done.output
    assert "dspy." not in done.output


@pytest.mark.parametrize("exporter", ["mlflow", *at_night("dspy_mlflow")])
def test_mlflow_without_a_server(tmp_path: Path, exporter: str):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    done = instrumented(
        **{**OFF, "OTEL_TRACES_EXPORTER": exporter},
        MLFLOW_TRACKING_URI=store,
        MLFLOW_EXPERIMENT_NAME="sky",
        cwd=tmp_path,
    )
    assert done.output == ANSWER
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("sky")
    (trace,) = client.search_traces(locations=[experiment.experiment_id])
    assert sorted(span.name for span in trace.data.spans) == ONE_CALL


def test_sdk_disabled(receiver: OtlpReceiver):
    done = instrumented(
        OTEL_SDK_DISABLED="true",
        OTEL_TRACES_EXPORTER="otlp",
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http,
    )
    assert done.output == ANSWER
    assert receiver.spans() == []
    assert receiver.metric_names() == set()


@pytest.mark.parametrize("disabled", ["dspy, dspy_otel", *at_night("dspy_otel,dspy")])
def test_instrumentation_disabled(disabled: str):
    # `dspy` is the name of other packages' instrumentors, which may be installed here.
    done = instrumented(**{**OFF, "OTEL_TRACES_EXPORTER": "console"}, OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=disabled)
    assert done.output == ANSWER


def test_always_off_sampler_records_nothing():
    done = instrumented(**{**OFF, "OTEL_TRACES_EXPORTER": "console"}, OTEL_TRACES_SAMPLER="always_off")
    assert done.output == ANSWER


def test_parent_from_environment(receiver: OtlpReceiver):
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    instrumented(
        "evaluate",
        **{**OFF, "OTEL_TRACES_EXPORTER": "otlp"},
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http,
        OTEL_DSPY_EVALUATION_TRACES="nested",
        TRACEPARENT=f"00-{trace}-{parent}-01",
        BAGGAGE="dspy.optimizer.run.id=run7,dspy.lm.role=teacher,unrelated=x",
    )
    spans = receiver.spans()
    assert {span.trace for span in spans} == {trace}
    assert {span.name for span in spans if span.parent == parent} == {"invoke_workflow App", "evaluate App"}
    # What the parent process knows of its optimization is said here too.
    assert {span.attributes.get("dspy.optimizer.run.id") for span in spans} == {"run7"}
    assert "teacher" in {span.attributes.get("dspy.lm.role") for span in spans}
    assert not any("unrelated" in span.attributes for span in spans)


@pytest.mark.parametrize("value", ["", "nonsense", "00-0-0-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_unusable_parent_is_ignored(receiver: OtlpReceiver, value: str):
    done = instrumented(
        **{**OFF, "OTEL_TRACES_EXPORTER": "otlp"},
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http,
        TRACEPARENT=value,
    )
    assert done.output == ANSWER
    assert parents(receiver.spans())["invoke_workflow App"] == ""


def test_backend_that_is_not_there_changes_nothing_but_a_log_line():
    done = instrumented(
        **{**OFF, "OTEL_TRACES_EXPORTER": "otlp"},
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
    )
    assert done.output == ANSWER


def test_wrong_values_give_one_warning_each_and_the_default(receiver: OtlpReceiver):
    done = instrumented(
        **{**OFF, "OTEL_TRACES_EXPORTER": "otlp"},
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http,
        OTEL_DSPY_CONTENT_LIMIT="much",
        OTEL_DSPY_ADAPTER_SPANS="perhaps",
    )
    assert done.output == ANSWER
    assert len(done.warnings) == 2
    assert receiver.span_names() == ONE_CALL


@pytest.mark.parametrize(
    ("backend", "path", "headers"),
    [
        (
            "Databricks",
            "/api/2.0/otel/v1/traces",
            {
                "authorization": "Bearer <token>",
                "x-databricks-uc-table-name": "<catalog>.<schema>.<prefix>_otel_spans",
                "content-type": "application/x-protobuf",
            },
        ),
        pytest.param(
            "Langfuse",
            "/api/public/otel/v1/traces",
            {"authorization": "Basic cGs6c2s=", "x-langfuse-ingestion-version": "4"},
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_the_variables_of_a_backend(receiver: OtlpReceiver, backend: str, path: str, headers: dict[str, str]):
    """As they stand in docs/backends.md, but for host and key: what such a service would get."""
    page = (ROOT / "docs/backends.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {backend} \| (`OTEL_.*) \|$", page, re.MULTILINE)
    variables = dict(re.findall(r"`(\w+)=\"?(.*?)\"?`", row.replace("<base64 of public:secret>", "cGs6c2s=")))
    settings = {name: re.sub(r"https://[^/]+", receiver.http, value) for name, value in variables.items()}
    done = instrumented(**settings, OTEL_TRACES_EXPORTER="otlp")
    assert done.output == ANSWER
    assert done.warnings == []
    assert receiver.span_names() == ONE_CALL
    assert {request.path for request in receiver.received} == {path}
    assert headers.items() <= receiver.received[0].headers.items()


def test_content_by_reference(receiver: OtlpReceiver, tmp_path: Path):
    pytest.importorskip("opentelemetry.util.genai", reason="needs the extra upload")
    store = tmp_path / "prompts"
    store.mkdir()
    done = instrumented(
        **{**OFF, "OTEL_TRACES_EXPORTER": "otlp"},
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http,
        OTEL_INSTRUMENTATION_GENAI_COMPLETION_HOOK="upload",
        OTEL_INSTRUMENTATION_GENAI_UPLOAD_BASE_PATH=f"file://{store}",
    )
    assert (done.output, done.warnings) == (ANSWER, [])
    spans = {span.name: span for span in receiver.spans()}
    assert "Which colour" not in str([span.attributes for span in spans.values()])
    key = "gen_ai.input.messages_ref"
    assert {name for name, span in spans.items() if key in span.attributes} == {"chat echo", "invoke_workflow App"}
    reference = spans["invoke_workflow App"].attributes[key]
    (message,) = json.loads(Path(reference.removeprefix("file://")).read_text("utf-8"))
    assert json.loads(message["parts"][0]["content"]) == {"question": "Which colour is the sky?"}
    assert len(list(store.iterdir())) == 4


def test_a_store_of_content_that_is_not_there_changes_nothing(tmp_path: Path):
    pytest.importorskip("opentelemetry.util.genai", reason="needs the extra upload")
    done = instrumented(
        **{**OFF, "OTEL_TRACES_EXPORTER": "console"},
        OTEL_INSTRUMENTATION_GENAI_COMPLETION_HOOK="upload",
        OTEL_INSTRUMENTATION_GENAI_UPLOAD_BASE_PATH=f"file://{tmp_path / 'gone'}",
    )
    assert done.output.startswith(ANSWER)
    assert "_ref" not in done.output
    (warning,) = done.warnings
    assert "nothing can be written to the store of content (FileNotFoundError" in warning
