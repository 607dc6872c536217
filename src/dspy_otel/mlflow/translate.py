"""Finished OpenTelemetry spans to spans that MLflow shows well. Pure: no I/O, no MLflow, no DSPy.

MLflow's store reads ``gen_ai.*`` and OpenInference attributes by itself. This module adds on copies, as ``mlflow.*``
attributes, what the store does not get from them:

* a trace name and trace tags: only from ``mlflow.traceTag.*`` on the span without a parent;
* types of spans: it knows no ``retrieval`` and no ``invoke_workflow``;
* the chat view: it renders OpenAI-shaped messages in full, messages in parts form only if every part is text or a
  tool call, and it never shows ``gen_ai.system_instructions`` as a message. Marked as DSPy's, with outputs as a list
  of texts, messages have ``[[ ## field ## ]]`` as headings, but lose all that is no text;
* cost: it prices each call anew by model name unless ``mlflow.llm.cost`` is there.

Read in MLflow 3.17.2: ``mlflow/tracing/otel/translation``, ``mlflow/store/tracking/sqlalchemy_store.py`` and the
message normalizers of its user interface.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from dspy_otel import semconv
from dspy_otel.content.truncation import repaired
from dspy_otel.mlflow.pending import UserRun
from dspy_otel.record.answers import is_answer
from dspy_otel.record.spans import Kind, kind_of

_logger = logging.getLogger(__name__)

SPAN_TYPE: Final = "mlflow.spanType"
SPAN_INPUTS: Final = "mlflow.spanInputs"
SPAN_OUTPUTS: Final = "mlflow.spanOutputs"
MESSAGE_FORMAT: Final = "mlflow.message.format"
CHAT_TOOLS: Final = "mlflow.chat.tools"
CHAT_USAGE: Final = "mlflow.chat.tokenUsage"
LLM_COST: Final = "mlflow.llm.cost"
TAG_PREFIX: Final = "mlflow.traceTag."
USER_RUN: Final = "mlflow.run.id"
USER_EXPERIMENT: Final = "mlflow.experiment.id"
"""The user's run around a span that has started; in the journal only."""
FINISHED: Final = "dspy_otel.finished"
TRACE_NAME: Final = TAG_PREFIX + "mlflow.traceName"
_HALF_ESCAPE: Final = re.compile(
    r"(?<!\\)(?:\\\\)*(?:\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|"
    r"(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")

TYPE_OF_OPERATION: Final[Mapping[str, str]] = {
    semconv.OPERATION_CHAT: "CHAT_MODEL",
    semconv.OPERATION_TEXT_COMPLETION: "LLM",
    semconv.OPERATION_EMBEDDINGS: "EMBEDDING",
    semconv.OPERATION_EXECUTE_TOOL: "TOOL",
    semconv.OPERATION_INVOKE_AGENT: "AGENT",
    semconv.OPERATION_RETRIEVAL: "RETRIEVER",
    semconv.OPERATION_INVOKE_WORKFLOW: "CHAIN",
}
TYPE_OF_KIND: Final = frozenset({"CHAIN", "LLM", "TOOL", "AGENT", "RETRIEVER", "EMBEDDING", "EVALUATOR"})
"""OpenInference kinds; MLflow's types carry the same names."""

TYPE_OF_NAME: Final[Mapping[str, str]] = {semconv.SPAN_EVALUATE: "EVALUATOR", semconv.SPAN_EXECUTE_CODE: "TOOL"}
"""Types by the first word of a span's name, for our spans when OpenInference attributes are switched off."""

ROOT_TAGS: Final = (
    semconv.PROGRAM_NAME,
    semconv.PROGRAM_ID,
    semconv.OPTIMIZER_NAME,
    semconv.OPTIMIZER_RUN_ID,
    semconv.TRIAL_NUMBER,
    semconv.CANDIDATE_ID,
    semconv.EVALUATION_ID,
    semconv.EVALUATION_SCORE,
    semconv.EVALUATION_METRIC_NAME,
    semconv.EXAMPLE_INDEX,
    semconv.EXAMPLE_ID,
    semconv.EXAMPLE_SCORE,
)
"""Root attributes that become tags of the trace under their own names, so that traces can be searched by them."""
ROW_TAG: Final = "mlflow.eval.requestId"
"""The tag by which MLflow pairs the traces of two runs, row by row; its value is that of ``dspy.example.id``."""

_LM_OPERATIONS: Final = frozenset(
    {semconv.OPERATION_CHAT, semconv.OPERATION_TEXT_COMPLETION, semconv.OPERATION_EMBEDDINGS}
)
# First one present wins. The OpenInference key stands last: it repeats one of the others.
_INPUT_KEYS: Final = (
    semconv.GEN_AI_TOOL_CALL_ARGUMENTS,
    semconv.GEN_AI_RETRIEVAL_QUERY_TEXT,
    semconv.INTERPRETER_CODE,
    semconv.MODULE_INPUTS,
    semconv.INPUT_VALUE,
)
_OUTPUT_KEYS: Final = (
    semconv.GEN_AI_TOOL_CALL_RESULT,
    semconv.GEN_AI_RETRIEVAL_DOCUMENTS,
    semconv.INTERPRETER_OUTPUT,
    semconv.MODULE_OUTPUTS,
    semconv.OUTPUT_VALUE,
)
_INPUT_REFS: Final = (
    semconv.GEN_AI_SYSTEM_INSTRUCTIONS_REF,
    semconv.GEN_AI_INPUT_MESSAGES_REF,
    semconv.GEN_AI_TOOL_DEFINITIONS_REF,
)
_OUTPUT_REFS: Final = (semconv.GEN_AI_OUTPUT_MESSAGES_REF,)
_SCORE_KEYS: Final[Mapping[str, str]] = {
    semconv.EVALUATION_SCORE: "score",
    semconv.EXAMPLE_SCORE: "score",
    semconv.EVALUATION_SIZE: "size",
    semconv.EVALUATION_FAILURES: "failures",
}


def translate(spans: Sequence[ReadableSpan]) -> list[ReadableSpan]:
    """Give each span of a batch what MLflow needs to show it; order and number are kept.

    Args:
        spans: finished spans, of one or many traces, children before or after their roots, of any instrumentation.

    Returns:
        The same spans. One that gains something is a copy: other exporters never see the additions. Content of our
        own spans moves to MLflow's keys instead of being sent twice; spans of other instrumentations only ever gain
        a type, and a trace name when they are a root.
    """
    return [repair(_translate_or_keep(span)) for span in spans]


def _translate_or_keep(span: ReadableSpan) -> ReadableSpan:
    try:
        return translate_span(span)
    except Exception:  # such as content nested too deep for json: a plain span is better than none
        _logger.debug("span %r is sent as it is", span.name, exc_info=True)
        return span


def restore(span: ReadableSpan) -> ReadableSpan:
    """A translated span with the attributes that reading it back needs: inputs and outputs of an answer.

    Args:
        span: as the journal has it, or MLflow.
    """
    if kind_of(span) is not Kind.EXAMPLE and not is_answer(span):
        return span
    at = dict(span.attributes or {})
    # A reference to content is no content.
    inputs, outputs = (
        None if _is_same(at.get(key), reference) else at.get(key)
        for key, reference in zip((SPAN_INPUTS, SPAN_OUTPUTS), _references(at), strict=True)
    )
    if inputs is not None:
        at.setdefault(semconv.MODULE_INPUTS, inputs)
    # A score alone stands for the outputs of an example whose outputs are not there.
    if outputs is not None and not ((inputs is None or semconv.ERROR_TYPE in at) and _is_same(outputs, _scores(at))):
        at.setdefault(semconv.MODULE_OUTPUTS, outputs)
    return _copy(span, at)


def started_copy(span: ReadableSpan, user_run: UserRun | None) -> ReadableSpan:
    """A span that has only started, for the journal."""
    at = dict(span.attributes or {})
    if user_run is not None:
        at[USER_RUN] = user_run.run_id
        if user_run.experiment_id is not None:
            at[USER_EXPERIMENT] = user_run.experiment_id
    return repair(_copy(span, at))


def user_run_of(span: ReadableSpan) -> UserRun | None:
    """The user's run around a span, from the journal."""
    at = span.attributes or {}
    experiment = at.get(USER_EXPERIMENT)
    return UserRun(str(at[USER_RUN]), None if experiment is None else str(experiment)) if USER_RUN in at else None


def finished(group: str) -> ReadableSpan:
    """A span that marks in the journal that MLflow has an optimization or evaluation in full."""
    context = SpanContext(1, 1, is_remote=False)
    # With a resource: the SDK would look for one in threads, which cannot be started when the program ends.
    return ReadableSpan(
        FINISHED, context, resource=Resource.get_empty(), attributes={FINISHED: group}, start_time=0, end_time=0
    )


def finished_group(span: ReadableSpan) -> str | None:
    """The optimization or evaluation that a span of :func:`finished` marks; None for any other span."""
    group = (span.attributes or {}).get(FINISHED)
    return None if group is None else str(group)


# --- text that cannot be sent ---------------------------------------------------------------------------------------


def repair(span: ReadableSpan) -> ReadableSpan:
    """A span whose names and texts can all be sent: a lone surrogate or NUL makes MLflow refuse the batch."""
    at = span.attributes or {}
    resource: Resource = _once(span.resource, _repaired_resource)
    scope: InstrumentationScope | None = _once(span.instrumentation_scope, _repaired_scope)
    whole = resource is span.resource and scope is span.instrumentation_scope
    whole = whole and _is_sendable(span.name) and _all_sendable(at) and _is_sendable(span.status.description or "")
    whole = whole and all(_is_sendable(event.name) and _all_sendable(event.attributes or {}) for event in span.events)
    if whole and all(_all_sendable(link.attributes or {}) for link in span.links):
        return span
    status = span.status
    return ReadableSpan(
        name=_sendable(span.name),
        context=span.context,
        parent=span.parent,
        resource=resource,
        attributes=_repaired_attributes(at),
        events=[Event(_sendable(e.name), _repaired_attributes(e.attributes or {}), e.timestamp) for e in span.events],
        links=[Link(link.context, _repaired_attributes(link.attributes or {})) for link in span.links],
        kind=span.kind,
        instrumentation_scope=scope,
        status=Status(StatusCode.ERROR, _sendable(status.description)) if status.description else status,
        start_time=span.start_time,
        end_time=span.end_time,
    )


_MOST_REPAIRED: Final = 64
_repaired_once: Final[dict[int, tuple[Any, Any]]] = {}


def _once(shared: Any, repaired_copy: Callable[[Any], Any]) -> Any:
    """``repaired_copy(shared)``, made once for an object that all spans of a tracer share."""
    kept = _repaired_once.get(id(shared))
    if kept is None or kept[0] is not shared:
        if len(_repaired_once) >= _MOST_REPAIRED:
            _repaired_once.clear()
        kept = _repaired_once[id(shared)] = shared, repaired_copy(shared)
    return kept[1]


def _repaired_resource(resource: Resource) -> Resource:
    if _all_sendable(resource.attributes) and _is_sendable(resource.schema_url):
        return resource
    return Resource(_repaired_attributes(resource.attributes), _sendable(resource.schema_url))


def _repaired_scope(scope: InstrumentationScope | None) -> InstrumentationScope | None:
    if scope is None:
        return None
    name, version, schema = scope.name, scope.version or "", scope.schema_url or ""
    at = scope.attributes or {}
    if all(map(_is_sendable, (name, version, schema))) and _all_sendable(at):
        return scope
    return InstrumentationScope(_sendable(name), _sendable(version), _sendable(schema), _repaired_attributes(at))


def _is_sendable(text: str) -> bool:
    if text.isascii():
        return "\0" not in text and "\\ud" not in text and "\\uD" not in text
    return _sendable(text) == text


def _sendable(text: str) -> str:
    """The text without NUL and lone surrogates, also those that are escaped in JSON."""
    text = repaired(text).replace("\0", "\N{REPLACEMENT CHARACTER}")
    return _HALF_ESCAPE.sub(r"\\ufffd", text) if "\\ud" in text or "\\uD" in text else text


def _all_sendable(attributes: Mapping[str, Any]) -> bool:
    texts = list(attributes)  # names, and then values
    for value in attributes.values():
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, (list, tuple)):
            texts += [part for part in value if isinstance(part, str)]
    return _is_sendable("".join(texts))  # one search for all


def _repaired_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {_sendable(key): _repaired(value) for key, value in attributes.items()}


def _repaired(value: Any) -> Any:
    if isinstance(value, str):
        return _sendable(value)
    return [_repaired(part) for part in value] if isinstance(value, (list, tuple)) else value


# --- what MLflow shows ----------------------------------------------------------------------------------------------


def translate_span(span: ReadableSpan) -> ReadableSpan:
    """Translate one span; see :func:`translate`."""
    old: Mapping[str, AttributeValue] = span.attributes or {}
    ours = span.instrumentation_scope is not None and span.instrumentation_scope.name == semconv.SCOPE_NAME
    new = dict(old)
    if SPAN_TYPE not in old and (span_type := _span_type(span.name, old, ours)):
        new[SPAN_TYPE] = span_type
    if span.parent is None:
        _add_trace_tags(span.name, new)
    if ours:
        _move_content(new)
        _add_usage_and_cost(new)
    return span if len(new) == len(old) and new == old else _copy(span, new)


def _span_type(name: str, attributes: Mapping[str, AttributeValue], ours: bool) -> str | None:
    # The operation first: for a chat call it says more (CHAT_MODEL) than the kind (LLM).
    if span_type := TYPE_OF_OPERATION.get(str(attributes.get(semconv.GEN_AI_OPERATION_NAME))):
        return span_type
    kind = str(attributes.get(semconv.OPENINFERENCE_SPAN_KIND))
    if kind in TYPE_OF_KIND:
        return kind
    return TYPE_OF_NAME.get(name.split(" ", 1)[0], "CHAIN") if ours else None


def _add_trace_tags(name: str, attributes: dict[str, AttributeValue]) -> None:
    attributes.setdefault(TRACE_NAME, name)
    for key in ROOT_TAGS:
        if (value := attributes.get(key)) is not None:
            attributes.setdefault(TAG_PREFIX + key, str(value))
    if (example := attributes.get(semconv.EXAMPLE_ID)) is not None:
        attributes.setdefault(TAG_PREFIX + ROW_TAG, str(example))


def _move_content(attributes: dict[str, AttributeValue]) -> None:
    messages = _messages(attributes)
    if messages is not None:
        attributes[SPAN_INPUTS] = _dump({"messages": messages})
        for key in (
            semconv.GEN_AI_INPUT_MESSAGES,
            semconv.GEN_AI_SYSTEM_INSTRUCTIONS,
            semconv.INPUT_VALUE,
            semconv.INPUT_MIME_TYPE,
        ):
            attributes.pop(key, None)
    else:
        _move_first(attributes, _INPUT_KEYS, SPAN_INPUTS, semconv.INPUT_VALUE, semconv.INPUT_MIME_TYPE)

    outputs = _load_list(attributes.get(semconv.GEN_AI_OUTPUT_MESSAGES))
    if outputs is not None:
        choices = [_choice(i, message) for i, message in enumerate(outputs)]
        attributes[SPAN_OUTPUTS] = _dump({"choices": choices})
        if messages and len(choices) == 1 and all(map(_is_plain, [*messages, choices[0]["message"]])):
            attributes[SPAN_OUTPUTS] = _dump([choices[0]["message"]["content"]])
            attributes.setdefault(MESSAGE_FORMAT, "dspy")
        for key in (semconv.GEN_AI_OUTPUT_MESSAGES, semconv.OUTPUT_VALUE, semconv.OUTPUT_MIME_TYPE):
            attributes.pop(key, None)
    else:
        if (documents := _load_list(attributes.get(semconv.GEN_AI_RETRIEVAL_DOCUMENTS))) is not None:
            attributes[semconv.GEN_AI_RETRIEVAL_DOCUMENTS] = _dump([_document(item) for item in documents])
        _move_first(attributes, _OUTPUT_KEYS, SPAN_OUTPUTS, semconv.OUTPUT_VALUE, semconv.OUTPUT_MIME_TYPE)

    for target, references in zip((SPAN_INPUTS, SPAN_OUTPUTS), _references(attributes), strict=True):
        if references is not None:
            attributes.setdefault(target, references)

    if SPAN_OUTPUTS not in attributes:
        # Without content an evaluation still has a result; a score is no content.
        scores = _scores(attributes)
        if scores is not None:
            attributes[SPAN_OUTPUTS] = scores

    tools = _load_list(attributes.get(semconv.GEN_AI_TOOL_DEFINITIONS))
    if tools is not None:
        attributes[CHAT_TOOLS] = _dump([_tool(item) for item in tools])
        del attributes[semconv.GEN_AI_TOOL_DEFINITIONS]


def _is_same(stored: Any, text: str | None) -> bool:
    """Whether a value of MLflow's, as text or as an embedded store gives it, is what a text of ours says."""
    return text is not None and (stored == text or stored == json.loads(text))


def _references(attributes: Mapping[str, AttributeValue]) -> tuple[str | None, str | None]:
    """What stands for inputs and outputs whose content a completion hook has stored: where it is."""
    found = ({key: attributes[key] for key in keys if key in attributes} for keys in (_INPUT_REFS, _OUTPUT_REFS))
    inputs, outputs = (_dump(references) if references else None for references in found)
    return inputs, outputs


def _scores(attributes: Mapping[str, AttributeValue]) -> str | None:
    scores = {label: attributes[key] for key, label in _SCORE_KEYS.items() if key in attributes}
    return _dump(scores) if "score" in scores else None


def _move_first(
    attributes: dict[str, AttributeValue], keys: Sequence[str], target: str, duplicate: str, mime: str
) -> None:
    """Move the first present of ``keys`` to ``target`` and drop its OpenInference duplicate."""
    if target in attributes:
        return
    for key in keys:
        if key in attributes:
            attributes[target] = attributes.pop(key)
            attributes.pop(duplicate, None)
            attributes.pop(mime, None)
            return


def _add_usage_and_cost(attributes: dict[str, AttributeValue]) -> None:
    usage = {
        label: value
        for key, label in (
            (semconv.GEN_AI_USAGE_INPUT_TOKENS, "input_tokens"),
            (semconv.GEN_AI_USAGE_OUTPUT_TOKENS, "output_tokens"),
            (semconv.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS, "cache_read_input_tokens"),
            (semconv.GEN_AI_USAGE_CACHE_WRITE_INPUT_TOKENS, "cache_creation_input_tokens"),
        )
        if isinstance(value := attributes.get(key), int)
    }
    if "input_tokens" in usage or "output_tokens" in usage:
        usage["total_tokens"] = usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
        attributes.setdefault(CHAT_USAGE, _dump(usage))

    if attributes.get(semconv.GEN_AI_OPERATION_NAME) not in _LM_OPERATIONS:
        return
    cost = attributes.get(semconv.LM_COST)
    if isinstance(cost, (int, float)):
        # All three keys, or MLflow's page shows no cost. DSPy prices a call as a whole, its halves are not known;
        # a guessed split would look like a fact.
        attributes.setdefault(LLM_COST, _dump({"input_cost": 0.0, "output_cost": 0.0, "total_cost": float(cost)}))


def _messages(attributes: Mapping[str, AttributeValue]) -> list[dict[str, Any]] | None:
    """Input messages of an LM call, system instructions first, in OpenAI's form; None when there are none."""
    messages = _load_list(attributes.get(semconv.GEN_AI_INPUT_MESSAGES))
    system = _load_list(attributes.get(semconv.GEN_AI_SYSTEM_INSTRUCTIONS))
    if messages is None and system is None:
        return None
    first = [{"role": "system", "parts": system}] if system else []
    return [openai for message in [*first, *(messages or [])] for openai in _openai_messages(message)]


def _is_plain(message: Mapping[str, Any]) -> bool:
    """Whether MLflow's view of DSPy messages, which makes headings of fields, shows all of it: role and text."""
    return message.keys() == {"role", "content"} and isinstance(message["content"], str)


def _choice(index: int, message: Any) -> dict[str, Any]:
    converted = _openai_messages(message)
    choice: dict[str, Any] = {"index": index, "message": converted[0] if converted else {"role": "assistant"}}
    if isinstance(message, dict) and message.get("finish_reason"):
        choice["finish_reason"] = message["finish_reason"]
    return choice


def _openai_messages(message: Any) -> list[dict[str, Any]]:
    """One GenAI message (role and parts) as OpenAI messages: each tool result becomes a message of its own."""
    if not isinstance(message, dict) or not isinstance(message.get("parts"), list):
        return [message] if isinstance(message, dict) else []
    content: list[dict[str, Any]] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for part in message["parts"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "reasoning":
            reasoning.append(_text(part.get("content")))
        elif kind == "tool_call":
            function = {"name": _text(part.get("name")), "arguments": _text(part.get("arguments"))}
            calls.append({"id": _text(part.get("id") or ""), "type": "function", "function": function})
        elif kind == "tool_call_response":
            response = part.get("response", part.get("result"))
            results.append({"role": "tool", "tool_call_id": _text(part.get("id") or ""), "content": _text(response)})
        else:
            content.append(_content(part))
    if not (content or reasoning or calls):
        return results
    only_text = all(item["type"] == "text" for item in content)
    converted: dict[str, Any] = {
        "role": message.get("role") or "user",
        "content": "\n".join(item["text"] for item in content) if only_text else content,
    }
    if reasoning:
        converted["reasoning"] = "\n".join(reasoning)
    if calls:
        converted["tool_calls"] = calls
    if name := message.get("name"):
        converted["name"] = name
    return [converted, *results]


def _content(part: Any) -> dict[str, Any]:
    """A text or media part as OpenAI content; media without data becomes its description."""
    if not isinstance(part, dict):
        return {"type": "text", "text": _text(part)}
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": _text(part.get("content"))}
    mime = part.get("mime_type") or "application/octet-stream"
    if str(mime).startswith("image/") or part.get("modality") == "image":
        if kind == "uri" and part.get("uri"):
            return {"type": "image_url", "image_url": {"url": part["uri"]}}
        data = part.get("content")
        if kind == "blob" and isinstance(data, str) and data:
            if data.startswith("data:"):  # other instrumentations: the conventions ask for bare base64
                return {"type": "image_url", "image_url": {"url": data}}
            if _BASE64.fullmatch(data):
                return {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{data}"}}
            # too large to keep: the content is its description
            return {"type": "text", "text": f"<{mime}> {data}"}
    return {"type": "text", "text": _dump(part)}


def _tool(definition: Any) -> Any:
    """A flat GenAI tool definition as OpenAI's nested one; anything else as it is."""
    if not isinstance(definition, dict) or "function" in definition or "name" not in definition:
        return definition
    fields = {key: definition[key] for key in ("name", "description", "parameters") if definition.get(key) is not None}
    return {"type": "function", "function": fields}


def _document(document: Any) -> Any:
    """A retrieved document in the shape MLflow shows as a card (``page_content``); without text as it is."""
    if not isinstance(document, dict) or "page_content" in document:
        return document
    text_key = next((key for key in ("content", "text", "long_text") if key in document), None)
    if text_key is None:
        return document
    metadata = {key: value for key, value in document.items() if key not in (text_key, "id")}
    card: dict[str, Any] = {"page_content": _text(document[text_key]), "metadata": metadata}
    if "id" in document:
        card["id"] = _text(document["id"])
    return card


def _load_list(value: AttributeValue | None) -> list[Any] | None:
    if not isinstance(value, str):
        return None
    try:
        loaded = json.loads(value)
    except ValueError:  # cut by an attribute length limit: better shown as text than lost
        return None
    return loaded if isinstance(loaded, list) else None


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else _dump(value)


def _dump(value: Any) -> str:
    # Readable text, so that MLflow's search finds it; a lone surrogate would make OTLP drop the whole attribute.
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")


def _copy(span: ReadableSpan, attributes: Mapping[str, AttributeValue]) -> ReadableSpan:
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=attributes,
        events=span.events,
        links=span.links,
        kind=span.kind,
        instrumentation_scope=span.instrumentation_scope,
        status=span.status,
        start_time=span.start_time,
        end_time=span.end_time,
    )
