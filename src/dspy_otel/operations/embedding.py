"""Embeddings: ``dspy.Embedder``."""

from __future__ import annotations

import threading
import types
from dataclasses import dataclass
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, get_current_span

from dspy_otel import semconv
from dspy_otel.content import introspection, redaction
from dspy_otel.content.names import without_secrets
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext
from dspy_otel.core.errors import error_type
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import Call, Operation, SpanStart, detach, openinference
from dspy_otel.operations.lm_request import server_attributes, split_model


class Asking:
    """Retrievals that wait for their embedder.

    ``dspy.Embeddings`` hands each query to a worker thread of its own, which knows nothing of the caller's context and
    may answer several callers with one call of the embedder.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, list[tuple[str, int, Context]]] = {}

    def add(self, embedder: Any, query: str, context: Context) -> None:
        """``query`` is about to be handed to the thread that calls ``embedder``."""
        with self._lock:
            self._waiting.setdefault(id(embedder), []).append((query, threading.get_ident(), context))

    def remove(self, embedder: Any, context: Context) -> None:
        """That retrieval has ended."""
        with self._lock:
            rest = [entry for entry in self._waiting.pop(id(embedder), ()) if entry[2] is not context]
            if rest:
                self._waiting[id(embedder)] = rest

    def of(self, embedder: Any, texts: Any) -> list[Context]:
        """Contexts of the retrievals on other threads that wait for ``embedder`` to embed any of ``texts``."""
        if id(embedder) not in self._waiting or type(texts) is not list:
            return []
        here = threading.get_ident()
        with self._lock:
            entries = list(self._waiting.get(id(embedder), ()))
        known = {text for text in texts if type(text) is str}
        return [context for query, thread, context in entries if thread != here and query in known]


_NAMED: Final = frozenset(map(id, (types.FunctionType, types.BuiltinFunctionType, types.MethodType)))


def _qualified_name(function: Any) -> str:
    if introspection.is_a(function, type):
        return str(introspection.name_of(function))
    plain = id(type(function)) in _NAMED
    return str(function.__qualname__ if plain else introspection.name_of(type(function)).rpartition(".")[2])


ASKING = Asking()
_CALLER: Final = guard("embedder's caller")
_SETTINGS: Final = guard("embedder's settings")


@dataclass(frozen=True, slots=True)
class EmbeddingState:
    """What is kept of one call of an embedder.

    Attributes:
        request: attributes of the request, for metrics.
    """

    request: Attributes


class EmbeddingOperation(Operation):
    """``Embedder.__call__`` and ``acall``. DSPy drops the provider's usage, so tokens and cost are not known here."""

    kind = "embedding"
    exception_event = semconv.LOG_CLIENT_EXCEPTION

    def open(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], override_of: type | None = None
    ) -> Call | None:
        asking: list[Context] = []
        with _CALLER:
            asking = ASKING.of(instance, args[0] if args else None)
        if not asking:
            return super().open(instance, args, kwargs, override_of)
        outer = otel_context.attach(asking[0])
        call = super().open(instance, args, kwargs, override_of)
        if call is None:
            detach(outer)
            return None
        call.token = outer  # Undoes both.
        for other in asking[1:]:
            call.span.add_link(get_current_span(other).get_span_context())
        return call

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        embedder = introspection.field(instance, "model")
        hosted = introspection.is_a(embedder, str)
        defaults = introspection.field(instance, "default_kwargs")
        settings = {**(dict(dict.items(defaults)) if introspection.is_a(defaults, dict) else {}), **kwargs}
        with _SETTINGS:
            redaction.remember_settings(settings)
        model = without_secrets((introspection.text(embedder) or "") if hosted else _qualified_name(embedder))
        provider, name = split_model(model) if hosted else (None, model)
        attributes: Attributes = {
            semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_EMBEDDINGS,
            semconv.GEN_AI_REQUEST_MODEL: name,
        }
        if provider is not None:
            attributes[semconv.GEN_AI_PROVIDER_NAME] = provider
        address = settings.get("api_base")
        attributes.update(server_attributes(settings.get("base_url") if address is None else address))
        context = CallContext(self.kind, instance, parent, EmbeddingState(attributes.copy()))
        openinference(attributes, self.telemetry, semconv.KIND_EMBEDDING)
        kind = SpanKind.CLIENT if hosted else SpanKind.INTERNAL
        return SpanStart(f"{semconv.OPERATION_EMBEDDINGS} {name}", context, attributes, kind)

    def start_attributes(self, call: Call) -> Attributes:
        attributes: Attributes = {}
        if self.telemetry.config.openinference:
            texts = call.args[0] if call.args else call.kwargs.get("inputs")
            self.telemetry.put_content(attributes, semconv.INPUT_VALUE, texts)
            if attributes:
                attributes[semconv.INPUT_MIME_TYPE] = semconv.MIME_JSON
        return attributes

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        # An array of NumPy's, as DSPy makes it of the answer.
        shape = result.shape if introspection.library(type(result)) == "numpy" else ()
        return {semconv.GEN_AI_EMBEDDINGS_DIMENSION_COUNT: int(shape[-1])} if shape else {}

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        state: EmbeddingState = call.context.state
        labels = state.request
        if error is not None:
            labels = {**labels, semconv.ERROR_TYPE: error_type(error)}
        self.telemetry.metrics.operation_duration.record(seconds, labels, call.otel_context)
