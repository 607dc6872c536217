"""The compile span: one optimization, whichever ``Teleprompter`` runs it."""

from __future__ import annotations

import contextlib
import inspect
import re
import secrets as random_source
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, Final

from .. import semconv as names
from ..operations.evaluation import callable_name
from ..operations.program import Programs
from ..telemetry import peek, secrets
from ..telemetry.attributes import Attributes, AttributeValue
from ..telemetry.content import Content
from ..telemetry.scope import Scope
from ..telemetry.spans import Call, Operation, Start, openinference
from ..telemetry.totals import Totals
from .attempts import Attempt
from .memory import remember_winner
from .plan import Plan
from .progress import ProgressDisplay
from .run import Run, run_of
from .spans import dataset_attributes
from .state import put_state, state_of

# Text that names a choice, and not what a user wrote: one short lower-case word, or such words joined by arrows.
_CHOICE: Final = re.compile(r"(?=.{1,48}$)[a-z0-9][a-z0-9_.-]*(?: -> [a-z0-9][a-z0-9_.-]*)*")
_NOT_PARAMETERS: Final = frozenset(
    {"self", "student", "trainset", "valset", "teacher", "programs", "callbacks", "args", "kwargs", "_args", "_kwargs"}
)
# Constructor parameters that optimizers of DSPy keep under another name.
_STORED_AS: Final = {
    "metric": "metric_fn",
    "num_candidate_programs": "num_candidate_sets",
    "max_bootstrapped_demos": "max_num_samples",
    "instruction_proposer": "custom_instruction_proposer",
    "code_proposer": "custom_code_proposer",
}
_CONTENT: Final = Content(limit=4096)
_PLAIN_KINDS: Final = (dict, list, tuple, set, frozenset)
_MOST: Final = 100


class CompileOperation(Operation):
    """``Teleprompter.compile`` of any optimizer.

    Args:
        telemetry: where to record.
        programs: knows the programs' ids.
        plan_for: gives the kind of plan for an optimizer.
    """

    kind = "compile"

    def __init__(self, telemetry: Any, programs: Programs, plan_for: Callable[[Any], type[Plan]]) -> None:
        super().__init__(telemetry)
        self.programs = programs
        self.plan_for = plan_for
        self.display = ProgressDisplay() if telemetry.config.progress else None

    def wrap(self, original: Callable[..., Any], override_of: type | None = None) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(original):
            return self.wrap_async(original, override_of)
        return super().wrap(original, override_of)

    def start(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: Scope | None) -> Start | None:
        if parent is not None and parent.kind == self.kind and parent.owner is instance:
            return None  # compile() calling super().compile() is one optimization
        scope = Scope(self.kind, instance, parent)
        totals = Totals(by_role=True)
        scope.program = None
        scope.totals = (*scope.totals, totals)
        given = bound_arguments(instance, args, kwargs)
        student = given.get("student")
        name = type(instance).__name__
        run = Run(self.telemetry, random_source.token_hex(8), name, scope, totals, run_of(parent))
        attributes: Attributes = {names.OPTIMIZER_NAME: name}
        program = self.programs.find(student) if hasattr(student, "named_predictors") else None
        if program is not None:
            run.student, run.program_name, run.initial_id = student, program.name, program.id
            attributes[names.PROGRAM_NAME] = program.name
            if program.id is not None:
                attributes[names.INITIAL_PROGRAM_ID] = program.id
        run.plan = self.plan_for(instance)(run, instance, given)
        if self.telemetry.safely("optimizer's run file", None, self._resume, run) is not None:
            attributes.update(run.attempt.start_attributes())  # type: ignore[union-attr]
        scope.role = run.plan.role
        stamps = {**scope.stamps, names.OPTIMIZER_RUN_ID: run.id}
        if run.parent is not None:
            stamps[names.OPTIMIZER_ROOT_RUN_ID] = run.root.id
            attributes[names.OPTIMIZER_PARENT_RUN_ID] = run.parent.id
        elif parent is not None and parent.program is not None:
            attributes[names.OPTIMIZER_INFERENCE_TIME] = True
        scope.stamps = stamps
        scope.notes.update(run=run, given=given, at_start=attributes)
        openinference(attributes, self.telemetry, names.KIND_CHAIN)
        links = [] if run.attempt is None else run.attempt.links()
        return Start(f"{names.SPAN_COMPILE} {name}", scope, attributes, links=links)

    def _resume(self, run: Run) -> Attempt | None:
        attempt = Attempt.of(run)
        if attempt is not None:
            attempt.resume(run)
            run.attempt = attempt
            self.telemetry.safely("killed attempt", None, attempt.speak_for_the_killed, self.telemetry)
        return attempt

    def open(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], override_of: type | None = None
    ) -> Call | None:
        call = super().open(instance, args, kwargs, override_of)
        if call is not None:
            Run.enter(1)
            self.telemetry.safely("compile", None, say_now, call)
            run: Run = call.scope.notes["run"]
            if run.attempt is not None:
                self.telemetry.safely("optimizer's run file", None, run.attempt.opened, call)
                run.save()
            self.telemetry.safely("optimizer", None, run.plan.begin)
            if self.display is not None and names.OPTIMIZER_INFERENCE_TIME not in call.scope.notes["at_start"]:
                self.telemetry.safely("progress display", None, self.display.begin, run)
        return call

    def close(self, call: Call, result: Any, error: BaseException | None) -> None:
        self.telemetry.safely("optimizer", None, call.scope.notes["run"].plan.end)
        super().close(call, result, error)
        if self.display is not None:
            self.telemetry.safely("progress display", None, self.display.end, call.scope.notes["run"])
        Run.enter(-1)

    def detail(self, call: Call) -> Attributes:
        given = call.scope.notes["given"]
        attributes = parameter_attributes(call.instance, given, self.telemetry.config.content_on_spans)
        for name, role in (("trainset", "train"), ("valset", "val")):
            attributes.update(dataset_attributes(self.programs, given.get(name), role))
        run: Run = call.scope.notes["run"]
        if run.student is not None and run.initial_id is not None and self.telemetry.config.content_on_spans:
            run.remember_state(run.initial_id, state_of(run.student))
            put_state(self.telemetry, attributes, run.student, names.INITIAL_PROGRAM_STATE)
        if run.parent is None:  # the optimizations inside work on the same rows
            for name, key in (("trainset", names.DATASET_TRAIN_ROWS), ("valset", names.DATASET_VAL_ROWS)):
                if is_dataset(given.get(name)):
                    self.telemetry.put_content(attributes, key, given[name])
        return attributes

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        run: Run = call.scope.notes["run"]
        if run.attempt is not None:
            run.attempt.outcome = outcome_of(error)
        run.report_spending()
        if error is None and hasattr(result, "named_predictors"):
            program = self.programs.find(result)
            if program is not None and program.id is not None:
                call.scope.notes["made"] = program.id
                call.scope.notes["winner"] = remember_winner(run, program.id)
        labels = {**run.labels(), names.OPTIMIZER_OUTCOME: outcome_of(error)}
        self.telemetry.metrics.optimizer_duration.record(seconds, labels, call.context)

    def result(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        notes = call.scope.notes
        run: Run = notes["run"]
        attributes: Attributes = dict(run.totals.attributes())
        attributes[names.OPTIMIZER_OUTCOME] = outcome_of(error)
        given_validation = notes["given"].get("valset") is not None
        attributes.update(
            (key, value) for key, value in run.attributes().items() if not (given_validation and key in run.validation)
        )
        if run.attempt is not None:
            attributes.update(run.attempt.end_attributes(run))
        if "made" in notes:
            attributes[names.PROGRAM_ID] = notes["made"]
            if notes["winner"] is not None:
                attributes[names.OPTIMIZER_WINNER_TRIAL] = notes["winner"].number
            if self.telemetry.config.content_on_spans:
                put_state(self.telemetry, attributes, result)
        return attributes


def say_now(call: Call) -> None:
    """Put on the span what is known so far: it may be looked at long before it ends."""
    if call.details:
        call.span.set_attributes(call.details)
        call.details = {}


def outcome_of(error: BaseException | None) -> str:
    """How a compile ended: ``finished``, ``failed``, or ``interrupted`` (by Ctrl-C or cancellation)."""
    if error is None:
        return "finished"
    return "failed" if isinstance(error, Exception) else "interrupted"


def bound_arguments(instance: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``compile()`` by name, defaults included. What does not fit is left to DSPy to complain of."""
    with contextlib.suppress(TypeError, ValueError):
        signature = inspect.signature(type(instance).compile)
        bound = signature.bind(instance, *args, **kwargs)
        bound.apply_defaults()
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                given.update(value)
            elif signature.parameters[name].kind is not inspect.Parameter.VAR_POSITIONAL:
                given[name] = value
        given.pop(next(iter(signature.parameters)), None)
        return given
    given = dict(kwargs)
    if args:
        given["student"] = args[0]
    return given


def constructor_arguments(instance: Any) -> dict[str, Any]:
    """What an optimizer was built with, defaults included, as far as it keeps that on itself.

    Parameters of every ``__init__`` of its class count: ``**kwargs`` usually go to the one of a base class.
    """
    stored = vars(instance)
    found: dict[str, Any] = {}
    for kind in type(instance).__mro__:
        init = vars(kind).get("__init__")
        if init is None or kind is object:
            continue
        try:
            parameters = inspect.signature(init).parameters
        except (TypeError, ValueError):
            continue
        for name in parameters:
            if name in found or name == "self":
                continue
            for place in (name, _STORED_AS.get(name, name), f"_{name}"):
                if place in stored:
                    found[name] = stored[place]
                    break
    return found


def parameter_attributes(instance: Any, compile_arguments: Mapping[str, Any], content: bool) -> Attributes:
    """All parameters of an optimization as ``dspy.optimizer.params.*``; those given to ``compile()`` win.

    Numbers and booleans as they are; metrics, models, modules and functions by name; strings as they are with content
    on, else only where they name a choice (``light``, ``p -> w``); lists and dictionaries as JSON of such; secrets
    masked; datasets and programs left out, and whatever is ``None``.
    """
    given = {name: value for name, value in compile_arguments.items() if value is not None}
    attributes: Attributes = {}
    for name, value in {**constructor_arguments(instance), **given}.items():
        if name.startswith("_") or name in _NOT_PARAMETERS:
            continue
        shown = secrets.MASK if secrets.hides(name, value) else parameter(value, content)
        if shown is not None:
            attributes[f"{names.OPTIMIZER_PARAMS_PREFIX}{name}"] = shown
    return attributes


def parameter(value: Any, content: bool) -> AttributeValue | None:
    """One parameter as an attribute value, or ``None`` when there is nothing to show."""
    kind = type(value)
    if value is None or value is True or value is False:
        return value
    if issubclass(kind, (int, float)):
        whole = peek.whole(value)
        return whole if whole is not None else peek.real(value)
    if issubclass(kind, str):
        return _CONTENT.text(_choice(value, content))
    if kind in _PLAIN_KINDS:
        if not value or is_dataset(value):
            return None
        return _CONTENT.json(_plain(value, content))
    return named(value)


def _choice(value: str, content: bool) -> str:
    if content:
        return value
    return value if _CHOICE.fullmatch(value, 0, 64) else f"<{str.__len__(value)} characters>"


def _plain(value: Any, content: bool, depth: int = 0) -> Any:
    kind = type(value)
    if kind is dict and depth < 4:
        return {
            _choice(str(key), content) if type(key) in (str, int) else named(key): _plain(item, content, depth + 1)
            for key, item in islice(value.items(), _MOST)
        }
    if kind in _PLAIN_KINDS and kind is not dict and depth < 4:
        if is_dataset(value):
            return f"<{len(value)} examples>"
        return [_plain(item, content, depth + 1) for item in islice(value, _MOST)]
    if value is None or issubclass(kind, (bool, int, float)):
        return value
    return _choice(value, content) if issubclass(kind, str) else named(value)


def named(value: Any) -> str:
    """An object by name: a model's, a function's or class's, else that of its class. Never its contents."""
    model = peek.text(peek.field(value, "model"), 256)
    return model or callable_name(value)  # the former of an LM


def is_dataset(value: Any) -> bool:
    """Whether ``value`` is a list of examples."""
    first, _ = peek.bounded(value, 1)
    return bool(first) and peek.store_of(first[0]) is not None
