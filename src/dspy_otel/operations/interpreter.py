"""Code that a program has executed: DSPy's interpreters."""

from __future__ import annotations

from typing import Any

from .. import semconv as names
from ..telemetry.attributes import Attributes
from ..telemetry.scope import Scope
from ..telemetry.spans import Call, Operation, Start, openinference


class InterpreterOperation(Operation):
    """``execute`` of ``PythonInterpreter`` and ``LocalInterpreter``."""

    kind = "interpreter"

    def start(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: Scope | None) -> Start | None:
        attributes: Attributes = {names.INTERPRETER_NAME: type(instance).__name__}
        openinference(attributes, self.telemetry, names.KIND_TOOL)
        return Start(names.SPAN_EXECUTE_CODE, Scope(self.kind, instance, parent), attributes)

    def detail(self, call: Call) -> Attributes:
        attributes: Attributes = {}
        self.telemetry.put_text(
            attributes, names.INTERPRETER_CODE, call.args[0] if call.args else call.kwargs.get("code", "")
        )
        return attributes

    def result(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        attributes: Attributes = {}
        if error is None and result is not None:
            put = self.telemetry.put_text if isinstance(result, str) else self.telemetry.put_content
            put(attributes, names.INTERPRETER_OUTPUT, result)
        return attributes
