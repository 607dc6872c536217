"""Code that a program has executed: DSPy's interpreters."""

from __future__ import annotations

from typing import Any

from dspy_otel import semconv
from dspy_otel.content.introspection import is_a
from dspy_otel.content.names import class_name
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext
from dspy_otel.core.operation import Call, Operation, SpanStart, openinference


class InterpreterOperation(Operation):
    """``execute`` of ``PythonInterpreter`` and ``LocalInterpreter``."""

    kind = "interpreter"

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        attributes: Attributes = {semconv.INTERPRETER_NAME: class_name(type(instance))}
        openinference(attributes, self.telemetry, semconv.KIND_TOOL)
        return SpanStart(semconv.SPAN_EXECUTE_CODE, CallContext(self.kind, instance, parent), attributes)

    def start_attributes(self, call: Call) -> Attributes:
        attributes: Attributes = {}
        self.telemetry.put_text(
            attributes, semconv.INTERPRETER_CODE, call.args[0] if call.args else call.kwargs.get("code", "")
        )
        return attributes

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        attributes: Attributes = {}
        if error is None and result is not None:
            put = self.telemetry.put_text if is_a(result, str) else self.telemetry.put_content
            put(attributes, semconv.INTERPRETER_OUTPUT, result)
        return attributes
