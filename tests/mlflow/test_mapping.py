"""What MLflow gets from our spans: the translation alone, no server, no MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from dspy_otel import semconv
from dspy_otel.mlflow import translate as tr

CHAT = {semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_CHAT}


class Recorder:
    """Makes finished spans with the real SDK."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(resource=Resource({"service.name": "app"}))
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def span(self, name: str, attributes: dict[str, Any], scope: str = semconv.SCOPE_NAME) -> ReadableSpan:
        self.exporter.clear()
        with self.provider.get_tracer(scope).start_as_current_span(name, attributes=attributes):
            pass
        return self.exporter.get_finished_spans()[-1]

    def child(self, name: str, attributes: dict[str, Any], scope: str = semconv.SCOPE_NAME) -> ReadableSpan:
        self.exporter.clear()
        tracer = self.provider.get_tracer(scope)
        with tracer.start_as_current_span("parent"), tracer.start_as_current_span(name, attributes=attributes):
            pass
        return self.exporter.get_finished_spans()[0]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def mapped(recorder: Recorder) -> Callable[..., dict[str, Any]]:
    """Attributes of one of our root spans after translation."""

    def run(attributes: dict[str, Any], name: str = "Predict answer") -> dict[str, Any]:
        return dict(tr.translate_span(recorder.span(name, attributes)).attributes or {})

    return run


def text(content: str) -> dict[str, str]:
    return {"type": "text", "content": content}


def messages(*items: tuple[str, list[dict[str, Any]]]) -> str:
    return json.dumps([{"role": role, "parts": parts} for role, parts in items])


# --- types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attributes", "expected"),
    [
        ("chat m", {semconv.GEN_AI_OPERATION_NAME: "chat", semconv.OPENINFERENCE_SPAN_KIND: "LLM"}, "CHAT_MODEL"),
        ("text_completion m", {semconv.GEN_AI_OPERATION_NAME: "text_completion"}, "LLM"),
        ("embeddings m", {semconv.GEN_AI_OPERATION_NAME: "embeddings"}, "EMBEDDING"),
        ("execute_tool t", {semconv.GEN_AI_OPERATION_NAME: "execute_tool"}, "TOOL"),
        ("invoke_agent a", {semconv.GEN_AI_OPERATION_NAME: "invoke_agent"}, "AGENT"),
        ("retrieval r", {semconv.GEN_AI_OPERATION_NAME: "retrieval"}, "RETRIEVER"),
        ("invoke_workflow p", {semconv.GEN_AI_OPERATION_NAME: "invoke_workflow"}, "CHAIN"),
        ("evaluate p", {semconv.OPENINFERENCE_SPAN_KIND: "EVALUATOR"}, "EVALUATOR"),
        ("evaluate p", {}, "EVALUATOR"),
        ("execute_code", {}, "TOOL"),
        ("ChainOfThought hop1", {}, "CHAIN"),
        ("anything", {tr.SPAN_TYPE: "MEMORY", semconv.GEN_AI_OPERATION_NAME: "chat"}, "MEMORY"),
    ],
)
def test_span_types(mapped: Any, name: str, attributes: dict[str, str], expected: str) -> None:
    assert mapped(attributes, name)[tr.SPAN_TYPE] == expected


# --- roots --------------------------------------------------------------------------------------------------------


def test_a_root_names_its_trace_and_tags_it(mapped: Any) -> None:
    got = mapped(
        {
            semconv.PROGRAM_NAME: "RAG",
            semconv.EXAMPLE_INDEX: 3,
            semconv.EXAMPLE_SCORE: 0.5,
            semconv.EVALUATION_ID: "e1",
        },
        "example RAG",
    )
    assert got[tr.TRACE_NAME] == "example RAG"
    assert {key: value for key, value in got.items() if key.startswith("mlflow.traceTag.dspy.")} == {
        "mlflow.traceTag.dspy.program.name": "RAG",
        "mlflow.traceTag.dspy.example.index": "3",
        "mlflow.traceTag.dspy.example.score": "0.5",
        "mlflow.traceTag.dspy.evaluation.id": "e1",
    }


def test_a_child_names_nothing(recorder: Recorder) -> None:
    span = recorder.child("Predict answer", {semconv.PROGRAM_NAME: "RAG"})
    assert not [key for key in tr.translate_span(span).attributes or {} if key.startswith(tr.TAG_PREFIX)]


def test_a_trace_name_of_the_users_own_stays(mapped: Any) -> None:
    assert mapped({tr.TRACE_NAME: "mine"})[tr.TRACE_NAME] == "mine"


def test_session_and_user_stay_where_mlflow_reads_them(mapped: Any) -> None:
    got = mapped({semconv.SESSION_ID: "s", semconv.USER_ID: "u"})
    assert (got["session.id"], got["user.id"]) == ("s", "u")


# --- copies and foreign spans -------------------------------------------------------------------------------------


def test_the_original_is_not_touched_and_the_copy_keeps_everything_else(recorder: Recorder) -> None:
    elsewhere = SpanContext(trace_id=7, span_id=8, is_remote=True, trace_flags=TraceFlags(1))
    tracer = recorder.provider.get_tracer(semconv.SCOPE_NAME, "1.2")
    with (
        tracer.start_as_current_span("parent"),
        tracer.start_as_current_span(
            "chat m", kind=SpanKind.CLIENT, links=[Link(elsewhere, {"a": 1})], attributes={**CHAT, semconv.LM_COST: 0.1}
        ) as live,
    ):
        live.add_event("dspy.lm.retry", {"n": 1})
        live.set_status(Status(StatusCode.ERROR, "late"))
    original = recorder.exporter.get_finished_spans()[0]
    before = original.to_json()

    copy = tr.translate([original])[0]

    assert original.to_json() == before
    assert tr.LLM_COST in (copy.attributes or {})
    changed = {"attributes"}
    left, right = json.loads(before), json.loads(copy.to_json())
    assert {key: value for key, value in left.items() if key not in changed} == {
        key: value for key, value in right.items() if key not in changed
    }
    assert copy.instrumentation_scope == original.instrumentation_scope
    assert copy.parent == original.parent


def test_a_foreign_child_goes_through_as_the_same_object(recorder: Recorder) -> None:
    span = recorder.child("GET", {"http.request.method": "GET", semconv.INPUT_VALUE: "x"}, "opentelemetry.httpx")
    assert tr.translate([span])[0] is span


def test_a_foreign_genai_span_gains_a_type_and_keeps_its_content(recorder: Recorder) -> None:
    attributes = {
        **CHAT,
        semconv.GEN_AI_INPUT_MESSAGES: messages(("user", [text("hi")])),
        semconv.GEN_AI_USAGE_INPUT_TOKENS: 3,
    }
    span = recorder.child("chat gpt", attributes, "opentelemetry.openai")
    assert dict(tr.translate_span(span).attributes or {}) == {**attributes, tr.SPAN_TYPE: "CHAT_MODEL"}


def test_a_foreign_root_names_the_trace(recorder: Recorder) -> None:
    got = tr.translate_span(recorder.span("POST /ask", {"http.route": "/ask"}, "opentelemetry.fastapi")).attributes
    assert dict(got or {}) == {"http.route": "/ask", tr.TRACE_NAME: "POST /ask"}


def test_a_batch_keeps_its_order_over_several_traces(recorder: Recorder) -> None:
    tracer = recorder.provider.get_tracer(semconv.SCOPE_NAME)
    for program in ("A", "B"):
        with tracer.start_as_current_span(program), tracer.start_as_current_span("child"):
            pass
    spans = recorder.exporter.get_finished_spans()
    got = tr.translate(spans)
    assert [span.name for span in got] == ["child", "A", "child", "B"]
    assert [span.get_span_context() for span in got] == [span.get_span_context() for span in spans]
    names = [(span.attributes or {}).get(tr.TRACE_NAME) for span in got]
    assert names == [None, "A", None, "B"]


# --- content ------------------------------------------------------------------------------------------------------


def test_chat_messages_become_a_chat_with_the_system_message_first(mapped: Any) -> None:
    got = mapped(
        {
            **CHAT,
            semconv.GEN_AI_SYSTEM_INSTRUCTIONS: json.dumps([text("Be brief."), text("Be kind.")]),
            semconv.GEN_AI_INPUT_MESSAGES: messages(("user", [text("Größe?")])),
            semconv.GEN_AI_OUTPUT_MESSAGES: json.dumps(
                [
                    {
                        "role": "assistant",
                        "parts": [{"type": "reasoning", "content": "hm"}, text("klein")],
                        "finish_reason": "stop",
                    },
                    {"role": "assistant", "parts": [text("groß")], "finish_reason": "length"},
                ]
            ),
            semconv.INPUT_VALUE: "the same again",
            semconv.INPUT_MIME_TYPE: semconv.MIME_JSON,
            semconv.OUTPUT_VALUE: "the same again",
        }
    )
    assert json.loads(got[tr.SPAN_INPUTS]) == {
        "messages": [{"role": "system", "content": "Be brief.\nBe kind."}, {"role": "user", "content": "Größe?"}]
    }
    assert "Größe" in got[tr.SPAN_INPUTS]  # readable: MLflow's search looks at this very text
    assert json.loads(got[tr.SPAN_OUTPUTS]) == {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "klein", "reasoning": "hm"},
                "finish_reason": "stop",
            },
            {"index": 1, "message": {"role": "assistant", "content": "groß"}, "finish_reason": "length"},
        ]
    }
    # Sent once, not twice.
    gone = (
        semconv.GEN_AI_SYSTEM_INSTRUCTIONS,
        semconv.GEN_AI_INPUT_MESSAGES,
        semconv.GEN_AI_OUTPUT_MESSAGES,
        semconv.INPUT_VALUE,
    )
    assert not [key for key in (*gone, semconv.INPUT_MIME_TYPE, semconv.OUTPUT_VALUE) if key in got]


ANSWER = {"role": "assistant", "parts": [text("[[ ## a ## ]]\n42")], "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("asked", "answers", "shown"),
    [
        ([("user", [text("[[ ## q ## ]]\nWhy?")])], [ANSWER], True),
        ([("user", [text("q")])], [ANSWER, ANSWER], False),
        ([("user", [{"type": "uri", "modality": "image", "uri": "https://host/a.png"}])], [ANSWER], False),
        ([("user", [text("q")])], [{**ANSWER, "parts": [{"type": "reasoning", "content": "hm"}, text("a")]}], False),
        ([("user", [text("q")])], [{**ANSWER, "parts": [{"type": "tool_call", "name": "f"}]}], False),
        ([], [ANSWER], False),
    ],
)
def test_messages_of_text_have_their_fields_as_headings(mapped: Any, asked: Any, answers: Any, shown: bool) -> None:
    content = {
        semconv.GEN_AI_INPUT_MESSAGES: messages(*asked),
        semconv.GEN_AI_OUTPUT_MESSAGES: json.dumps(answers),
    }
    got = mapped({**CHAT, **content})
    assert got.get("mlflow.message.format") == ("dspy" if shown else None)
    outputs = json.loads(got[tr.SPAN_OUTPUTS])
    assert outputs == ["[[ ## a ## ]]\n42"] if shown else len(outputs["choices"]) == len(answers)
    without = mapped(CHAT)
    assert not [key for key in ("mlflow.message.format", tr.SPAN_INPUTS, tr.SPAN_OUTPUTS) if key in without]


def test_tool_calls_and_their_results(mapped: Any) -> None:
    call = {"type": "tool_call", "id": "c1", "name": "search", "arguments": {"q": "x"}}
    results = [{"type": "tool_call_response", "id": i, "response": r} for i, r in (("c1", {"hits": 2}), ("c2", "none"))]
    got = mapped({**CHAT, semconv.GEN_AI_INPUT_MESSAGES: messages(("assistant", [call]), ("tool", results))})
    function = {"name": "search", "arguments": '{"q": "x"}'}
    assert json.loads(got[tr.SPAN_INPUTS])["messages"] == [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"hits": 2}'},
        {"role": "tool", "tool_call_id": "c2", "content": "none"},
    ]


def test_images_show_when_their_data_is_there_and_are_described_when_not(mapped: Any) -> None:
    blob = {"type": "blob", "modality": "image", "mime_type": "image/png", "content": "aGk="}
    described = {"type": "blob", "modality": "image", "mime_type": "image/png", "size": 9}
    link = {"type": "uri", "modality": "image", "uri": "https://x/y.png"}
    got = mapped({**CHAT, semconv.GEN_AI_INPUT_MESSAGES: messages(("user", [text("see"), blob, link, described]))})
    assert json.loads(got[tr.SPAN_INPUTS])["messages"][0]["content"] == [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
        {"type": "text", "text": json.dumps(described)},
    ]


def test_tool_definitions_take_openais_form(mapped: Any) -> None:
    parameters = {"type": "object", "properties": {}}
    flat = {"type": "function", "name": "search", "description": "find", "parameters": parameters}
    got = mapped({**CHAT, semconv.GEN_AI_TOOL_DEFINITIONS: json.dumps([flat])})
    assert json.loads(got[tr.CHAT_TOOLS]) == [
        {"type": "function", "function": {"name": "search", "description": "find", "parameters": parameters}}
    ]


@pytest.mark.parametrize(
    ("attributes", "inputs", "outputs"),
    [
        (
            {semconv.MODULE_INPUTS: '{"q": 1}', semconv.INPUT_VALUE: '{"q": 1}', semconv.MODULE_OUTPUTS: '{"a": 2}'},
            '{"q": 1}',
            '{"a": 2}',
        ),
        ({semconv.INPUT_VALUE: "hi", semconv.OUTPUT_VALUE: "ho", semconv.OUTPUT_MIME_TYPE: "text/plain"}, "hi", "ho"),
        ({semconv.GEN_AI_TOOL_CALL_ARGUMENTS: "{}", semconv.GEN_AI_TOOL_CALL_RESULT: "ok"}, "{}", "ok"),
        ({semconv.INTERPRETER_CODE: "1+1", semconv.INTERPRETER_OUTPUT: "2"}, "1+1", "2"),
        ({semconv.GEN_AI_RETRIEVAL_QUERY_TEXT: "paris"}, "paris", None),
    ],
)
def test_content_of_other_spans_moves(
    mapped: Any, attributes: dict[str, str], inputs: str | None, outputs: str | None
) -> None:
    got = mapped(attributes)
    assert (got.get(tr.SPAN_INPUTS), got.get(tr.SPAN_OUTPUTS)) == (inputs, outputs)
    assert not set(attributes) & set(got)


def test_documents_become_cards(mapped: Any) -> None:
    documents = [{"id": 1, "score": 0.5, "content": "Paris"}, {"id": "no-text"}]
    got = mapped({semconv.GEN_AI_RETRIEVAL_DOCUMENTS: json.dumps(documents)})
    assert json.loads(got[tr.SPAN_OUTPUTS]) == [
        {"page_content": "Paris", "metadata": {"score": 0.5}, "id": "1"},
        {"id": "no-text"},
    ]


def test_messages_cut_by_an_attribute_limit_stay_for_mlflow_to_show_as_text(mapped: Any) -> None:
    cut = messages(("user", [text("long")]))[:-5]
    got = mapped({**CHAT, semconv.GEN_AI_INPUT_MESSAGES: cut})
    assert got[semconv.GEN_AI_INPUT_MESSAGES] == cut
    assert tr.SPAN_INPUTS not in got


def test_without_content_a_score_is_the_output(mapped: Any) -> None:
    attributes = {semconv.EVALUATION_SCORE: 50.0, semconv.EVALUATION_SIZE: 4, semconv.EVALUATION_FAILURES: 1}
    assert json.loads(mapped(attributes)[tr.SPAN_OUTPUTS]) == {"score": 50.0, "size": 4, "failures": 1}
    assert mapped({**attributes, semconv.OUTPUT_VALUE: "x"})[tr.SPAN_OUTPUTS] == "x"
    assert tr.SPAN_OUTPUTS not in mapped({semconv.EVALUATION_SIZE: 4})


# --- tokens and cost ----------------------------------------------------------------------------------------------


def test_tokens(mapped: Any) -> None:
    got = mapped(
        {
            **CHAT,
            semconv.GEN_AI_USAGE_INPUT_TOKENS: 10,
            semconv.GEN_AI_USAGE_OUTPUT_TOKENS: 4,
            semconv.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: 6,
            semconv.GEN_AI_USAGE_CACHE_WRITE_INPUT_TOKENS: 2,
        }
    )
    assert json.loads(got[tr.CHAT_USAGE]) == {
        "input_tokens": 10,
        "output_tokens": 4,
        "total_tokens": 14,
        "cache_read_input_tokens": 6,
        "cache_creation_input_tokens": 2,
    }
    assert tr.CHAT_USAGE not in mapped(CHAT)


@pytest.mark.parametrize(
    ("attributes", "total"),
    [
        ({**CHAT, semconv.LM_COST: 0.25}, 0.25),
        ({**CHAT, semconv.LM_COST: 0.25, semconv.LM_CACHE_HIT: False}, 0.25),
        ({**CHAT, semconv.LM_CACHE_HIT: True, semconv.LM_COST: 0.0, semconv.LM_COST_SAVED: 0.25}, 0.0),
        ({**CHAT, semconv.LM_CACHE_HIT: True}, None),  # Nobody could price the first call either.
        (CHAT, None),  # unknown is absent, not zero
        ({semconv.LM_COST: 0.25}, None),  # a total on a parent would be counted twice
        ({semconv.USAGE_COST: 0.25}, None),
    ],
)
def test_cost(mapped: Any, attributes: dict[str, Any], total: float | None) -> None:
    cost = mapped(attributes).get(tr.LLM_COST)
    expected = None if total is None else {"input_cost": 0.0, "output_cost": 0.0, "total_cost": total}
    assert (None if cost is None else json.loads(cost)) == expected


# --- anything at all ----------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "parts", "type", "content", "id", "name", "arguments", "response", "uri", "x"])
            | st.text(max_size=3),
            inner
            | st.sampled_from(["text", "tool_call", "tool_call_response", "reasoning", "blob", "uri", "image/png"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    content=st.dictionaries(
        st.sampled_from(
            [
                semconv.GEN_AI_INPUT_MESSAGES,
                semconv.GEN_AI_OUTPUT_MESSAGES,
                semconv.GEN_AI_SYSTEM_INSTRUCTIONS,
                semconv.GEN_AI_TOOL_DEFINITIONS,
                semconv.GEN_AI_RETRIEVAL_DOCUMENTS,
            ]
        ),
        json_values,
    )
)
def test_any_json_translates_to_valid_json_and_encodes(content: dict[str, Any]) -> None:
    span = Recorder().span("chat m", {**CHAT, **{key: json.dumps(value) for key, value in content.items()}})
    got = tr.translate_span(span)  # not translate(): that one would hide an error
    for key in (tr.SPAN_INPUTS, tr.CHAT_TOOLS):
        if key in (got.attributes or {}):
            json.loads(str((got.attributes or {})[key]))
    encoded = encode_spans([got]).resource_spans[0].scope_spans[0].spans[0]
    assert {item.key for item in encoded.attributes} == set(got.attributes or {})


def test_a_lone_surrogate_costs_no_content(mapped: Any, recorder: Recorder) -> None:
    broken = json.dumps([{"role": "user", "parts": [{"type": "text", "content": "a\ud800b"}]}])
    assert json.loads(mapped({**CHAT, semconv.GEN_AI_INPUT_MESSAGES: broken})[tr.SPAN_INPUTS]) == {
        "messages": [{"role": "user", "content": "a?b"}]
    }


def test_content_too_deep_to_parse_is_sent_as_it_is(recorder: Recorder) -> None:
    span = recorder.child("chat m", {**CHAT, semconv.GEN_AI_INPUT_MESSAGES: "[" * 200_000 + "]" * 200_000})
    assert len(tr.translate([span])) == 1


# --- content by reference -------------------------------------------------------------------------------------------

WHERE = {"gen_ai.input.messages_ref": "gs://prompts/in.json", "gen_ai.output.messages_ref": "gs://prompts/out.json"}
ASKED = {"gen_ai.operation.name": "invoke_workflow", "dspy.program.id": "0123456789abcdef"}


@pytest.mark.parametrize("read", [str, json.loads], ids=["as text", "as an embedded store gives it"])
def test_references_stand_where_content_would_and_are_read_as_none(recorder: Recorder, read: Any) -> None:
    span = recorder.span("invoke_workflow App", {**ASKED, **WHERE})
    translated = tr.translate_span(span)
    attributes = dict(translated.attributes or {})
    assert json.loads(attributes[tr.SPAN_INPUTS]) == {"gen_ai.input.messages_ref": "gs://prompts/in.json"}
    assert json.loads(attributes[tr.SPAN_OUTPUTS]) == {"gen_ai.output.messages_ref": "gs://prompts/out.json"}
    stored: Any = {**attributes, **{key: read(attributes[key]) for key in (tr.SPAN_INPUTS, tr.SPAN_OUTPUTS)}}
    restored = tr.restore(tr._copy(span, stored)).attributes or {}
    assert semconv.MODULE_INPUTS not in restored
    assert semconv.MODULE_OUTPUTS not in restored


def test_content_beside_references_stands_where_it_would(recorder: Recorder) -> None:
    content = {semconv.INPUT_VALUE: '{"question": "sky?"}', semconv.OUTPUT_VALUE: '{"answer": "blue"}'}
    span = tr.translate_span(recorder.span("invoke_workflow App", {**ASKED, **WHERE, **content}))
    assert (span.attributes or {})[tr.SPAN_INPUTS] == content[semconv.INPUT_VALUE]
    restored = tr.restore(span).attributes or {}
    assert restored[semconv.MODULE_OUTPUTS] == content[semconv.OUTPUT_VALUE]


def test_the_score_of_a_failed_example_is_not_its_output_in_an_embedded_store(recorder: Recorder) -> None:
    failed = {semconv.EVALUATION_ID: "e1", semconv.INPUT_VALUE: "{}", semconv.EXAMPLE_SCORE: 0.0, "error.type": "E"}
    attributes: Any = dict(tr.translate_span(recorder.span("example App", failed)).attributes or {})
    assert json.loads(attributes[tr.SPAN_OUTPUTS]) == {"score": 0.0}
    attributes[tr.SPAN_OUTPUTS] = {"score": 0.0}
    assert semconv.MODULE_OUTPUTS not in (tr.restore(recorder.span("example App", attributes)).attributes or {})
