"""Tool calls."""

from __future__ import annotations

from typing import Any, Final

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.content.names import class_name, without_secrets
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext
from dspy_otel.core.errors import error_type
from dspy_otel.core.operation import Call, Operation, SpanStart, openinference

# How DSPy's agents say "I am done" in the form of a tool; nothing is executed.
_END_MARKERS: Final = {"ReAct": "finish", "ReActV2": "submit"}


def name_of(tool: Any) -> str:
    """The name of a tool, which may come from a server (MCP) or an LM."""
    return without_secrets(introspection.text(introspection.field(tool, "name")) or "")


class ToolOperation(Operation):
    """``Tool.__call__`` and ``acall``."""

    kind = "tool"

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        name = name_of(instance)
        if parent is not None and _END_MARKERS.get(class_name(type(parent.owner))) == name:
            return None
        attributes: Attributes = {
            semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_EXECUTE_TOOL,
            semconv.GEN_AI_TOOL_NAME: name,
            semconv.GEN_AI_TOOL_TYPE: "function",
        }
        openinference(attributes, self.telemetry, semconv.KIND_TOOL)
        return SpanStart(
            f"{semconv.OPERATION_EXECUTE_TOOL} {name}", CallContext(self.kind, instance, parent), attributes
        )

    def start_attributes(self, call: Call) -> Attributes:
        attributes: Attributes = {}
        described = introspection.field(call.instance, "desc")
        if introspection.is_a(described, str) and str.__len__(described):
            self.telemetry.put_text(attributes, semconv.GEN_AI_TOOL_DESCRIPTION, described)
        self.telemetry.put_content(attributes, semconv.GEN_AI_TOOL_CALL_ARGUMENTS, call.kwargs)
        return attributes

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        attributes: Attributes = {}
        if error is None:
            self.telemetry.put_content(attributes, semconv.GEN_AI_TOOL_CALL_RESULT, result)
        return attributes

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        labels: Attributes = {semconv.GEN_AI_TOOL_NAME: name_of(call.instance)}
        if call.context.program is not None:
            labels[semconv.PROGRAM_NAME] = call.context.program.name
        if error is not None:
            labels[semconv.ERROR_TYPE] = error_type(error)
        self.telemetry.metrics.tool_duration.record(seconds, labels, call.otel_context)
