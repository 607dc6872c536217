"""Embeddings: ``dspy.Embedder``."""

from __future__ import annotations

from typing import Any

from opentelemetry.trace import SpanKind

from .. import semconv as names
from ..telemetry import secrets
from ..telemetry.attributes import Attributes
from ..telemetry.errors import error_type
from ..telemetry.scope import Scope, open_scope
from ..telemetry.spans import Call, Operation, Start, openinference
from .lm import server_attributes, split_model


class EmbeddingOperation(Operation):
    """``Embedder.__call__`` and ``acall``. DSPy drops the provider's usage, so tokens and cost are not known here."""

    kind = "embedding"

    def start(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: Scope | None) -> Start | None:
        hosted = isinstance(instance.model, str)
        settings = {**(getattr(instance, "default_kwargs", None) or {}), **kwargs}
        secrets.remember(settings.get("api_key"))
        model = instance.model if hosted else getattr(instance.model, "__qualname__", type(instance.model).__name__)
        provider, name = split_model(model) if hosted else (None, model)
        attributes: Attributes = {
            names.GEN_AI_OPERATION_NAME: names.OPERATION_EMBEDDINGS,
            names.GEN_AI_REQUEST_MODEL: name,
        }
        if provider is not None:
            attributes[names.GEN_AI_PROVIDER_NAME] = provider
        attributes.update(server_attributes(settings.get("api_base") or settings.get("base_url")))
        openinference(attributes, self.telemetry, names.KIND_EMBEDDING)
        scope = open_scope(self.kind, instance, parent)
        scope.notes["request"] = dict(attributes)
        kind = SpanKind.CLIENT if hosted else SpanKind.INTERNAL
        return Start(f"{names.OPERATION_EMBEDDINGS} {name}", scope, attributes, kind)

    def detail(self, call: Call) -> Attributes:
        attributes: Attributes = {}
        if self.telemetry.config.openinference:
            texts = call.args[0] if call.args else call.kwargs.get("inputs")
            self.telemetry.put_content(attributes, names.INPUT_VALUE, texts)
        return attributes

    def result(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        shape = getattr(result, "shape", None)
        return {names.GEN_AI_EMBEDDINGS_DIMENSION_COUNT: int(shape[-1])} if shape else {}

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        labels: Attributes = {
            key: value for key, value in call.scope.notes["request"].items() if key != names.OPENINFERENCE_SPAN_KIND
        }
        if error is not None:
            labels[names.ERROR_TYPE] = error_type(error)
        self.telemetry.metrics.operation_duration.record(seconds, labels, call.context)
