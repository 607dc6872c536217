"""Retrieval: ``dspy.Retrieve``, ``dspy.Embeddings``, ``dspy.ColBERTv2`` and ``dspy.KNN``."""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

from opentelemetry.trace import SpanKind

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.content.names import class_name
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext
from dspy_otel.core.operation import Call, Operation, SpanStart, openinference
from dspy_otel.operations.embedding import ASKING
from dspy_otel.operations.lm_request import server_attributes

_MOST: Final = 1000


class RetrievalOperation(Operation):
    """The call of a retriever; one instance for each kind.

    Args:
        telemetry: shared state.
        remote: whether it asks a server (span kind CLIENT).
    """

    kind = "retrieval"

    def __init__(self, telemetry: Any, remote: bool = False) -> None:
        super().__init__(telemetry)
        self.span_kind = SpanKind.CLIENT if remote else SpanKind.INTERNAL
        if remote:
            self.exception_event = semconv.LOG_CLIENT_EXCEPTION

    def open(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], override_of: type | None = None
    ) -> Call | None:
        call = super().open(instance, args, kwargs, override_of)
        embedder = introspection.field(instance, "embedder")
        if call is not None and embedder is not None:  # dspy.Embeddings
            query = args[0] if args else kwargs.get("query")
            if type(query) is str:
                ASKING.add(embedder, query, call.otel_context)
        return call

    def close(self, call: Call, result: Any, error: BaseException | None) -> None:
        embedder = introspection.field(call.instance, "embedder")
        if embedder is not None:
            ASKING.remove(embedder, call.otel_context)
        super().close(call, result, error)

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        name = class_name(type(instance))
        attributes: Attributes = {
            semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_RETRIEVAL,
            semconv.GEN_AI_DATA_SOURCE_ID: name,
        }
        top_k = kwargs.get("k", args[1] if len(args) > 1 else introspection.field(instance, "k"))
        most = introspection.whole(top_k)
        if most is not None:
            attributes[semconv.GEN_AI_RETRIEVAL_TOP_K] = most
        attributes.update(server_attributes(introspection.field(instance, "url")))
        openinference(attributes, self.telemetry, semconv.KIND_RETRIEVER)
        context = CallContext(self.kind, instance, parent)
        return SpanStart(f"{semconv.OPERATION_RETRIEVAL} {name}", context, attributes, self.span_kind)

    def start_attributes(self, call: Call) -> Attributes:
        attributes: Attributes = {}
        if self.telemetry.config.content_on_spans:
            query = call.args[0] if call.args else call.kwargs.get("query", call.kwargs)
            if introspection.is_a(query, str):
                self.telemetry.put_text(attributes, semconv.GEN_AI_RETRIEVAL_QUERY_TEXT, query)
            else:
                self.telemetry.put_content(attributes, semconv.GEN_AI_RETRIEVAL_QUERY_TEXT, query)
        return attributes

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        attributes: Attributes = {}
        if error is None and self.telemetry.config.content_on_spans:
            self.telemetry.put_content(attributes, semconv.GEN_AI_RETRIEVAL_DOCUMENTS, documents(result))
        return attributes


def documents(result: Any) -> list[dict[str, Any]]:
    """Retrieved passages as ``{id, content, score}``, as far as the retriever gives them (at most 1,000)."""
    passages = result if introspection.length(result) is not None else introspection.field(result, "passages")
    indices, _ = introspection.bounded(introspection.field(result, "indices"), _MOST)
    found = []
    for position, passage in enumerate(islice(introspection.items(passages), _MOST)):
        document: dict[str, Any] = {"content": passage}
        if introspection.is_a(passage, dict):
            document["content"] = introspection.field(passage, "long_text", introspection.field(passage, "text"))
            for source, key in (("pid", "id"), ("score", "score")):
                value = introspection.field(passage, source)
                if value is not None:
                    document[key] = value
        if position < len(indices):
            document["id"] = indices[position]
        found.append(document)
    return found
