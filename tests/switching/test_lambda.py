"""AWS Lambda: the process is frozen when the handler has returned, and may never go on."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.lambda_runtime import LambdaRuntime
from tests.support.mlflow_server import mlflow_server
from tests.support.otlp_receiver import OtlpReceiver
from tests.switching.process import ROOT, environment, installed
from tests.switching.test_neighbours import needs

pytestmark = [
    pytest.mark.integration,
    installed,
    needs("awslambdaric", "awslambdaric"),
    needs("opentelemetry.instrumentation.aws_lambda", "opentelemetry-instrumentation-aws-lambda"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at /proc whether a process is frozen"),
]

LM = """
from dspy.utils import DummyLM
dspy.configure(lm=DummyLM([{"answer": "Paris"}] * 100))
"""
COMMAND = str(Path(sys.executable).with_name("opentelemetry-instrument"))


def service(way: str) -> str:
    """The module of docs/deployment.md, with an LM."""
    page = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    (recipe,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "AwsLambda" in block]
    if way == "flush alone":
        recipe = re.sub(r"(?m)^.*AwsLambdaInstrumentor.*\n", "", recipe)
    elif way == "opentelemetry-instrument":
        recipe = re.sub(r"(?m)^(.*AwsLambdaInstrumentor|dspy_otel\.configure).*\n", "", recipe)
    return recipe + LM


def settings(receiver: OtlpReceiver, **others: str) -> dict[str, str]:
    return environment(
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http,
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_LOGS_EXPORTER="otlp",
        OTEL_METRICS_EXPORTER="otlp",
        OTEL_TRACES_EXPORTER="otlp",
        OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT="span_and_event",
        **others,
    )


def calls(receiver: OtlpReceiver) -> int:
    """How many LM calls the newest metrics have."""
    points = [
        point.count
        for request in receiver.requests("metrics")
        for resource in request.message.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "gen_ai.client.operation.duration"
        for point in metric.histogram.data_points
    ]
    return points[-1]


@pytest.mark.parametrize(
    "way",
    [
        "configure",
        pytest.param("flush alone", marks=pytest.mark.nightly),
        pytest.param("opentelemetry-instrument", marks=pytest.mark.nightly),
    ],
)
def test_nothing_is_lost_when_the_sandbox_freezes(tmp_path: Path, way: str) -> None:
    (tmp_path / "service.py").write_text(service(way))
    before = [COMMAND] if way == "opentelemetry-instrument" else []
    expected = ["chat dummy", "invoke_workflow Predict"] if way == "flush alone" else ["answer", "chat dummy"]
    with OtlpReceiver() as receiver, LambdaRuntime() as runtime:
        with runtime.function("service.handler", tmp_path, settings(receiver), before) as function:
            for number in (1, 2):
                assert function.invoke({"question": "where"}) == {"answer": "Paris"}
                # It is frozen: what is not here now would not come.
                for name in expected:
                    assert len(receiver.spans(name)) == number
                assert calls(receiver) == number
                assert receiver.event_names() == ["gen_ai.client.inference.operation.details"] * number
            failed = function.invoke({})
            assert failed["errorType"] == "KeyError"
            if way != "flush alone":
                assert len(receiver.spans("answer")) == 3
        if way != "flush alone":
            programs = {span.parent for span in receiver.spans("invoke_workflow Predict")}
            assert programs < {span.id for span in receiver.spans("answer")}


@pytest.mark.nightly
def test_mlflow_has_a_trace_when_the_sandbox_freezes(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    (tmp_path / "service.py").write_text(service("configure"))
    store = tmp_path / "store"
    store.mkdir()
    with mlflow_server(store) as address, OtlpReceiver() as receiver, LambdaRuntime() as runtime:
        variables = settings(
            receiver,
            MLFLOW_TRACKING_URI=address,
            OTEL_DSPY_SPOOL=str(tmp_path / "spool"),
            # The first trace with tokens makes the server import LiteLLM.
            OTEL_INSTRUMENTATION_AWS_LAMBDA_FLUSH_TIMEOUT="600000",
        )
        variables["OTEL_TRACES_EXPORTER"] = "otlp,mlflow"
        client = mlflow.MlflowClient(address)
        with runtime.function("service.handler", tmp_path, variables) as function:
            for number in (1, 2):
                assert function.invoke({"question": "where"}) == {"answer": "Paris"}
                traces = client.search_traces(locations=["0"])
                assert [len(trace.data.spans) for trace in traces] == [3] * number
                assert calls(receiver) == number
