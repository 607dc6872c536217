"""The compile span: one optimization, whichever ``Teleprompter`` runs it."""

from __future__ import annotations

import secrets as random_source
from collections.abc import Mapping
from typing import Any, Final

from .. import semconv as names
from ..operations.program import Programs, digest
from ..telemetry import secrets
from ..telemetry.attributes import Attributes, AttributeValue
from ..telemetry.scope import Scope, open_scope
from ..telemetry.spans import Call, Operation, Start, openinference
from ..telemetry.totals import Totals

_DATASETS: Final = {
    "trainset": (names.DATASET_TRAIN_SIZE, names.DATASET_TRAIN_DIGEST),
    "valset": (names.DATASET_VAL_SIZE, names.DATASET_VAL_DIGEST),
}
_NOT_PARAMETERS: Final = frozenset({"student", "trainset", "valset", "teacher", "programs", "callbacks", "_args"})


class CompileOperation(Operation):
    """``Teleprompter.compile`` of any optimizer."""

    kind = "compile"

    def __init__(self, telemetry: Any, programs: Programs) -> None:
        super().__init__(telemetry)
        self.programs = programs

    def start(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: Scope | None) -> Start | None:
        if parent is not None and parent.kind == self.kind and parent.owner is instance:
            return None  # compile() calling super().compile() is one optimization
        scope = open_scope(self.kind, instance, parent)
        totals = Totals()
        scope.program = None
        scope.totals = (*scope.totals, totals)
        scope.notes["totals"] = totals
        run = random_source.token_hex(8)
        scope.stamps = {**scope.stamps, names.OPTIMIZER_RUN_ID: run}
        name = type(instance).__name__
        attributes: Attributes = {names.OPTIMIZER_NAME: name}
        student = args[0] if args else kwargs.get("student")
        program = self.programs.find(student) if hasattr(student, "named_predictors") else None
        if program is not None:
            attributes[names.PROGRAM_NAME] = program.name
            if program.id is not None:
                attributes[names.INITIAL_PROGRAM_ID] = program.id
        openinference(attributes, self.telemetry, names.KIND_CHAIN)
        return Start(f"{names.SPAN_COMPILE} {name}", scope, attributes)

    def detail(self, call: Call) -> Attributes:
        attributes = parameter_attributes(vars(call.instance), call.kwargs)
        for role, (size, digest_name) in _DATASETS.items():
            rows = call.kwargs.get(role)
            if isinstance(rows, (list, tuple)):
                attributes[size] = len(rows)
                ids = [self.programs.example_id(row) for row in rows]
                attributes[digest_name] = digest(ids)
        return attributes

    def result(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        attributes: Attributes = dict(call.scope.notes["totals"].attributes())
        attributes[names.OPTIMIZER_OUTCOME] = outcome_of(error)
        if error is None and hasattr(result, "named_predictors"):
            program = self.programs.find(result)
            if program is not None and program.id is not None:
                attributes[names.PROGRAM_ID] = program.id
        return attributes


def outcome_of(error: BaseException | None) -> str:
    """How a compile ended: ``finished``, ``failed``, or ``interrupted`` (by Ctrl-C or cancellation)."""
    if error is None:
        return "finished"
    return "failed" if isinstance(error, Exception) else "interrupted"


def parameter_attributes(constructor: Mapping[str, Any], compile_arguments: Mapping[str, Any]) -> Attributes:
    """All parameters of an optimization as ``dspy.optimizer.params.*``; those of ``compile()`` win.

    Numbers, booleans and short strings as they are; metrics, models and functions by name; secrets masked; other
    objects (datasets, programs, state that the optimizer keeps) are left out.
    """
    attributes: Attributes = {}
    for name, value in {**constructor, **compile_arguments}.items():
        if name.startswith("_") or name in _NOT_PARAMETERS:
            continue
        shown = secrets.MASK if secrets.is_secret_name(name) else parameter(value)
        if shown is not None:
            attributes[f"{names.OPTIMIZER_PARAMS_PREFIX}{name}"] = shown
    return attributes


def parameter(value: Any) -> AttributeValue | None:
    """One parameter as an attribute value, or ``None`` when it is not one."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return secrets.mask(value[:1024])
    if hasattr(value, "model") and isinstance(getattr(value, "model", None), str):
        return str(value.model)  # an LM, by its model
    if callable(value) and isinstance(getattr(value, "__name__", None), str):
        return str(value.__name__)
    return None
