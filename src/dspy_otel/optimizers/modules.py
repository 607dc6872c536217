"""Modules that an optimizer itself calls: the program being optimized, and those that propose."""

from __future__ import annotations

from typing import Any

from dspy_otel.content import introspection
from dspy_otel.core.call_context import CallContext, current_call_context
from dspy_otel.core.operation import Call, SpanStart
from dspy_otel.operations.module import ModuleOperation
from dspy_otel.operations.module_tree import attributes
from dspy_otel.operations.parallel import ParallelOperation
from dspy_otel.optimizers.enclosing import EnclosedOperation
from dspy_otel.optimizers.phases import PhaseOperation
from dspy_otel.optimizers.run import Run
from dspy_otel.optimizers.state import CompileState


class DirectModule(EnclosedOperation, ModuleOperation):
    """A module; one that the optimizer itself calls has a role, and may make up a phase."""

    enclosed_by = (CompileState,)

    def __init__(self, telemetry: Any, programs: Any, phases: PhaseOperation) -> None:
        super().__init__(telemetry, programs)
        self.phases = phases

    def enclose(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        context = current_call_context()
        if context is None or not isinstance(context.state, CompileState):
            return None
        tracker = context.state.tracker
        if is_program_of(tracker.run, instance):
            return None
        phase = tracker.module_phase(instance)
        return None if phase is None else self.phases.open(phase, (), {})

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        start = super().start(instance, args, kwargs, parent)
        caller = parent
        if caller is not None and caller.kind == ParallelOperation.kind:
            caller = ParallelOperation.caller(caller)
        if start is not None and caller is not None and type(caller.state) is CompileState:
            tracker = caller.state.tracker
            if is_program_of(tracker.run, instance):
                start.context.role = tracker.program_role
        return start


def is_program_of(run: Run, module: Any) -> bool:
    """Whether ``module`` is a version of the program that ``run`` optimizes."""
    if run.student is None or type(module) is not type(run.student):
        return False
    # A bare Predict or ChainOfThought: the optimizer may propose with a module of the same class.
    fields: list[Any] = []
    for each in (module, run.student):
        signature: Any = attributes(each).get("signature")
        fields.append(list(signature.fields) if introspection.is_a(signature, type) else [])
    return bool(fields[0] == fields[1])
