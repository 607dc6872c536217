"""Traces in a real MLflow: one written through a server, one into an embedded sqlite store, read by MLflow's client."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode

from dspy_otel import semconv
from dspy_otel.mlflow import MLflowSpanExporter
from tests.support.waiting import run

pytest.importorskip("mlflow")
pytestmark = pytest.mark.integration

EXPERIMENT = "programs of ours"


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "content": text}]


def record(processor: SpanProcessor) -> None:
    """A program run, one failing evaluated example and one evaluation, as the instrumentation emits them."""
    provider = TracerProvider(resource=Resource({"service.name": "shop"}))
    provider.add_span_processor(processor)
    tracer = provider.get_tracer(semconv.SCOPE_NAME)
    other = provider.get_tracer("opentelemetry.instrumentation.httpx")
    question = json.dumps({"question": "Wie heißt die Hauptstadt?"}, ensure_ascii=False)
    chat = {
        semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_CHAT,
        semconv.GEN_AI_PROVIDER_NAME: "openai",
        semconv.GEN_AI_REQUEST_MODEL: "gpt-4o-mini",
        semconv.GEN_AI_SYSTEM_INSTRUCTIONS: json.dumps(parts("Be brief.")),
        semconv.GEN_AI_INPUT_MESSAGES: json.dumps([{"role": "user", "parts": parts("Hauptstadt?")}]),
        semconv.GEN_AI_OUTPUT_MESSAGES: json.dumps(
            [{"role": "assistant", "parts": parts("Paris"), "finish_reason": "stop"}]
        ),
    }
    root_attributes = {
        semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_INVOKE_WORKFLOW,
        semconv.OPENINFERENCE_SPAN_KIND: semconv.KIND_CHAIN,
        semconv.PROGRAM_NAME: "RAG",
        semconv.PROGRAM_ID: "0badcafe",
        semconv.SESSION_ID: "session-1",
        semconv.USER_ID: "user-1",
        semconv.MODULE_INPUTS: question,
        semconv.INPUT_VALUE: question,
        semconv.USAGE_COST: 0.00042,
    }
    with tracer.start_as_current_span("invoke_workflow RAG", attributes=root_attributes) as root:
        retrieval = {
            semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_RETRIEVAL,
            semconv.GEN_AI_RETRIEVAL_QUERY_TEXT: "Hauptstadt",
            semconv.GEN_AI_RETRIEVAL_DOCUMENTS: json.dumps([{"id": "d1", "score": 0.9, "content": "Paris ist ..."}]),
        }
        with tracer.start_as_current_span("retrieval wiki", attributes=retrieval):
            pass
        priced = {
            **chat,
            semconv.GEN_AI_RESPONSE_MODEL: "gpt-4o-mini-2024-07-18",
            semconv.GEN_AI_USAGE_INPUT_TOKENS: 120,
            semconv.GEN_AI_USAGE_OUTPUT_TOKENS: 30,
            semconv.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: 100,
            semconv.GEN_AI_USAGE_CACHE_WRITE_INPUT_TOKENS: 20,
            semconv.LM_COST: 0.00042,
        }
        with (
            tracer.start_as_current_span(
                "ChainOfThought generate", attributes={semconv.MODULE_CLASS: "ChainOfThought"}
            ),
            tracer.start_as_current_span("chat gpt-4o-mini", kind=SpanKind.CLIENT, attributes=priced),
            other.start_as_current_span("POST", kind=SpanKind.CLIENT, attributes={"http.request.method": "POST"}),
        ):
            pass
        hit = {**chat, semconv.LM_CACHE_HIT: True, semconv.LM_COST: 0.0, semconv.LM_COST_SAVED: 0.00042}
        with tracer.start_as_current_span("chat gpt-4o-mini", attributes=hit):
            pass
        tool = {
            semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_EXECUTE_TOOL,
            semconv.GEN_AI_TOOL_CALL_ARGUMENTS: '{"q": 1}',
            semconv.GEN_AI_TOOL_CALL_RESULT: "found",
        }
        with tracer.start_as_current_span("execute_tool search", attributes=tool):
            pass
        root.set_attribute(semconv.MODULE_OUTPUTS, '{"answer": "Paris"}')

    example = {
        semconv.PROGRAM_NAME: "RAG",
        semconv.EVALUATION_ID: "e1",
        semconv.OPTIMIZER_RUN_ID: "r1",
        "dspy.trial.number": 4,
        "dspy.candidate.id": "c3",
        semconv.EXAMPLE_INDEX: 2,
        semconv.EXAMPLE_SCORE: 0.5,
    }
    with tracer.start_as_current_span("example RAG", attributes=example) as span:
        span.record_exception(ValueError("no answer"))
        span.set_status(Status(StatusCode.ERROR, "ValueError"))
        unpriced = {
            semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_CHAT,
            semconv.GEN_AI_REQUEST_MODEL: "a-model-nobody-prices",
            semconv.GEN_AI_USAGE_INPUT_TOKENS: 7,
            semconv.GEN_AI_USAGE_OUTPUT_TOKENS: 1,
        }
        with tracer.start_as_current_span("chat a-model-nobody-prices", attributes=unpriced):
            pass
    evaluation = {
        semconv.PROGRAM_NAME: "RAG",
        semconv.EVALUATION_ID: "e1",
        semconv.EVALUATION_SIZE: 3,
        semconv.EVALUATION_SCORE: 50.0,
    }
    with tracer.start_as_current_span("evaluate RAG", attributes=evaluation):
        pass
    provider.shutdown()


@dataclass
class Store:
    """A store with the scenario in it, and what MLflow's client reads back."""

    uri: str

    @property
    def client(self) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    def traces(self) -> dict[str, Any]:
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        found = self.client.search_traces(locations=[experiment.experiment_id])
        return {trace.info.tags["mlflow.traceName"]: trace for trace in found}


@pytest.fixture(scope="module", params=["server", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    if request.param == "server":
        uri = str(request.getfixturevalue("server_uri"))
        # One span a request, children first: a trace grows until its root arrives.
        processor: Callable[[Any], SpanProcessor] = SimpleSpanProcessor
    else:
        uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow-sqlite') / 'mlflow.db'}"
        processor = BatchSpanProcessor
    record(processor(MLflowSpanExporter(uri, experiment=EXPERIMENT)))
    return Store(uri)


def test_every_trace_has_its_name_state_and_previews(store: Store) -> None:
    got = {
        name: (trace.info.state.value, trace.info.request_preview, trace.info.response_preview)
        for name, trace in store.traces().items()
    }
    assert got == {
        "invoke_workflow RAG": ("OK", '{"question": "Wie heißt die Hauptstadt?"}', '{"answer": "Paris"}'),
        "example RAG": ("ERROR", None, '{"score": 0.5}'),
        "evaluate RAG": ("OK", None, '{"score": 50.0, "size": 3}'),
    }


def test_spans_have_types_inputs_and_outputs(store: Store) -> None:
    trace = store.client.get_trace(store.traces()["invoke_workflow RAG"].info.trace_id)
    chat_in = {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hauptstadt?"}],
    }
    chat_out = ["Paris"]
    document = {"page_content": "Paris ist ...", "metadata": {"score": 0.9}, "id": "d1"}
    parent = {span.span_id: span.name for span in trace.data.spans}
    got = [
        (span.name, parent.get(span.parent_id), span.span_type, span.inputs, span.outputs)
        for span in sorted(trace.data.spans, key=lambda span: span.start_time_ns)
    ]
    root = "invoke_workflow RAG"
    assert got == [
        (root, None, "CHAIN", {"question": "Wie heißt die Hauptstadt?"}, {"answer": "Paris"}),
        ("retrieval wiki", root, "RETRIEVER", "Hauptstadt", [document]),
        ("ChainOfThought generate", root, "CHAIN", None, None),
        ("chat gpt-4o-mini", "ChainOfThought generate", "CHAT_MODEL", chat_in, chat_out),
        ("POST", "chat gpt-4o-mini", None, None, None),
        ("chat gpt-4o-mini", root, "CHAT_MODEL", chat_in, chat_out),
        ("execute_tool search", root, "TOOL", {"q": 1}, "found"),
    ]
    attributes = {span.name: span.attributes for span in trace.data.spans}
    assert attributes["POST"]["http.request.method"] == "POST"
    assert attributes["chat gpt-4o-mini"]["mlflow.llm.provider"] == "openai"


def test_tokens_and_cost_are_those_of_the_calls(store: Store) -> None:
    traces = store.traces()
    program, example = traces["invoke_workflow RAG"].info, traces["example RAG"].info
    assert program.token_usage == {
        "input_tokens": 120,
        "output_tokens": 30,
        "total_tokens": 150,
        "cache_read_input_tokens": 100,
        "cache_creation_input_tokens": 20,
    }
    assert program.cost == {"input_cost": 0.0, "output_cost": 0.0, "total_cost": 0.00042}
    assert example.token_usage == {"input_tokens": 7, "output_tokens": 1, "total_tokens": 8}
    assert example.cost is None  # unknown, so absent
    assert traces["evaluate RAG"].info.token_usage is None


def test_session_user_and_tags(store: Store) -> None:
    traces = store.traces()
    metadata = traces["invoke_workflow RAG"].info.trace_metadata
    assert (metadata["mlflow.trace.session"], metadata["mlflow.trace.user"]) == ("session-1", "user-1")
    tags = traces["example RAG"].info.tags
    assert {key: value for key, value in tags.items() if not key.startswith("mlflow.")} == {
        "service.name": "shop",
        "dspy.program.name": "RAG",
        "dspy.evaluation.id": "e1",
        "dspy.optimizer.run.id": "r1",
        "dspy.trial.number": "4",
        "dspy.candidate.id": "c3",
        "dspy.example.index": "2",
        "dspy.example.score": "0.5",
    }


def test_traces_are_found_by_tag_session_and_name(store: Store) -> None:
    experiment = store.client.get_experiment_by_name(EXPERIMENT).experiment_id

    def names(condition: str) -> list[str]:
        found = store.client.search_traces(locations=[experiment], filter_string=condition)
        return sorted(trace.info.tags["mlflow.traceName"] for trace in found)

    assert names("tags.`dspy.evaluation.id` = 'e1'") == ["evaluate RAG", "example RAG"]
    assert names("tags.`dspy.program.id` = '0badcafe'") == ["invoke_workflow RAG"]
    assert names("metadata.`mlflow.trace.session` = 'session-1'") == ["invoke_workflow RAG"]
    assert names("trace.name = 'example RAG'") == ["example RAG"]


def test_a_failure_keeps_its_exception(store: Store) -> None:
    trace = store.client.get_trace(store.traces()["example RAG"].info.trace_id)
    root = next(span for span in trace.data.spans if span.parent_id is None)
    assert root.status.status_code.value == "ERROR"
    assert root.events[0].attributes["exception.message"] == "no answer"


def test_an_experiment_is_made_once_and_found_again(server_uri: str) -> None:
    for _ in range(2):
        record(BatchSpanProcessor(MLflowSpanExporter(server_uri, experiment="made once")))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server_uri)
    experiment = client.get_experiment_by_name("made once")
    assert len(client.search_traces(locations=[experiment.experiment_id])) == 6


def test_a_short_script_writes_to_an_embedded_store_at_exit_and_loads_no_pricing(tmp_path: Path) -> None:
    program = f"""
        import atexit, sys
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from dspy_otel.mlflow import MLflowSpanExporter
        atexit.register(lambda: print("litellm" in sys.modules))  # runs after the provider's own
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(MLflowSpanExporter()))
        attributes = {{
            "{semconv.GEN_AI_OPERATION_NAME}": "chat",
            "{semconv.GEN_AI_REQUEST_MODEL}": "m",
            "{semconv.GEN_AI_USAGE_INPUT_TOKENS}": 3,
        }}
        provider.get_tracer("{semconv.SCOPE_NAME}").start_span("chat m", attributes=attributes).end()
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "OTEL_"))}
    result = run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env={**environment, "MLFLOW_EXPERIMENT_NAME": EXPERIMENT},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"
    assert result.stderr.count("MLFLOW_TRACKING_URI is not set") == 1
    assert list(Store(f"sqlite:///{tmp_path / 'mlflow.db'}").traces()) == ["chat m"]
