"""The compile span: one optimization, whichever ``Teleprompter`` runs it."""

from __future__ import annotations

import secrets as random_source
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.trace import Link

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.content.names import class_name
from dspy_otel.core.attributes import Attributes, repair
from dspy_otel.core.call_context import CallContext, current_call_context
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import Call, Operation, SpanStart, openinference
from dspy_otel.core.usage import Totals
from dspy_otel.operations.program import Programs
from dspy_otel.operations.texts import plain_rows
from dspy_otel.optimizers.lineage import remember_winner
from dspy_otel.optimizers.parameters import (
    bound_arguments,
    constructor_arguments,
    dataset_attributes,
    is_dataset,
    parameter_attributes,
)
from dspy_otel.optimizers.program_state import put_state, state_of
from dspy_otel.optimizers.resume import Checkpoint
from dspy_otel.optimizers.run import Run
from dspy_otel.optimizers.state import CompileState, run_of
from dspy_otel.optimizers.tracker import Tracker

if TYPE_CHECKING:
    from dspy_otel.optimizers.progress.display import ProgressDisplay

# Attributes that belong to one run: an optimization inside another one does not inherit them.
_OF_ONE_RUN: Final = (semconv.OPTIMIZER_PHASE, semconv.TRIAL_NUMBER, semconv.CANDIDATE_ID)
# The place of a compile inside another one, by attributes of its own.
_OF_PARENT: Final = (
    (semconv.OPTIMIZER_PHASE, semconv.OPTIMIZER_PARENT_PHASE),
    (semconv.TRIAL_NUMBER, semconv.OPTIMIZER_PARENT_TRIAL),
)


class CompileOperation(Operation):
    """``Teleprompter.compile`` of any optimizer.

    Args:
        telemetry: where to record.
        programs: the programs and their ids.
        tracker_for: returns the class of an optimizer's tracker.
    """

    kind = "compile"
    always = True
    identity = (
        semconv.OPTIMIZER_NAME,
        semconv.OPTIMIZER_RUN_ID,
        semconv.OPTIMIZER_PARENT_RUN_ID,
        semconv.OPTIMIZER_ROOT_RUN_ID,
        semconv.PROGRAM_NAME,
        semconv.INITIAL_PROGRAM_ID,
    )

    def __init__(self, telemetry: Any, programs: Programs, tracker_for: Callable[[Any], type[Tracker]]) -> None:
        super().__init__(telemetry)
        self.programs = programs
        self.tracker_for = tracker_for
        self.display: ProgressDisplay | None = None
        progress = telemetry.config.progress
        if progress == "on" or (progress == "auto" and "IPython" in sys.modules):
            from dspy_otel.optimizers.progress.display import ProgressDisplay

            self.display = ProgressDisplay(progress)

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        context = CallContext(self.kind, instance, parent)
        totals = Totals(by_role=True)
        context.program = None
        context.totals = (*context.totals, totals)
        name = class_name(type(instance))
        kind = self.tracker_for(instance)
        run = Run(self.telemetry, random_source.token_hex(8), name, context, totals, kind.scale, run_of(parent))
        around = run.parent is not None and run.parent.inference_time
        run.inference_time = around or (parent is not None and parent.program is not None)
        given = self._given(instance, bound_arguments(instance, args, kwargs))
        attributes: Attributes = {semconv.OPTIMIZER_NAME: name, **self._initial(run, given)}
        tracker = kind(run, instance, given)
        links: list[Link] = []
        with guard("optimizer's run file"):
            tracker.checkpoint = checkpoint = Checkpoint.of(run, tracker.state_file())
            if checkpoint is not None:
                checkpoint.export_killed_span()
                attributes.update(checkpoint.start_attributes())
                links = checkpoint.links()
        context.role = tracker.role
        inherited = {key: value for key, value in context.inherited.items() if key not in _OF_ONE_RUN}
        inherited[semconv.OPTIMIZER_RUN_ID] = run.id
        if run.parent is not None:
            inherited[semconv.OPTIMIZER_ROOT_RUN_ID] = run.root.id
            attributes[semconv.OPTIMIZER_PARENT_RUN_ID] = run.parent.id
            for inherited_name, key in _OF_PARENT:
                if inherited_name in context.inherited:
                    attributes[key] = context.inherited[inherited_name]
        if run.inference_time:
            attributes[semconv.OPTIMIZER_INFERENCE_TIME] = True
        context.inherited = inherited
        context.state = CompileState(tracker, given)
        openinference(attributes, self.telemetry, semconv.KIND_CHAIN)
        return SpanStart(f"{semconv.SPAN_COMPILE} {name}", context, attributes, links=links, identity=self.identity)

    def _given(self, instance: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of ``compile()``, and datasets that the constructor was given instead (KNNFewShot)."""
        built = constructor_arguments(instance)
        kept = {name: built[name] for name in ("trainset", "valset") if is_dataset(built.get(name))}
        return {**arguments, **{name: rows for name, rows in kept.items() if arguments.get(name) is None}}

    def _initial(self, run: Run, given: Mapping[str, Any]) -> Attributes:
        """Which program is optimized: the argument ``student``, or else the first one that is a program."""
        if run.student is not None:
            return {}
        candidates = (given.get("student"), *given.values())
        programs = (value for value in candidates if introspection.has_method(value, "named_predictors"))
        student = next(programs, None)
        program = None if student is None else self.programs.find(student)
        if program is None:
            return {}
        run.student, run.program_name, run.initial_id = student, program.name, program.id
        attributes: Attributes = {semconv.PROGRAM_NAME: program.name}
        if program.id is not None:
            attributes[semconv.INITIAL_PROGRAM_ID] = program.id
        return attributes

    def _more_arguments(
        self, context: CallContext, args: tuple[Any, ...], kwargs: Mapping[str, Any], override_of: type | None
    ) -> None:
        """A subclass's ``compile()`` calls the one it overrides, and may add arguments."""
        state: CompileState = context.state
        run, given = state.tracker.run, state.arguments
        more = bound_arguments(context.owner, args, kwargs, override_of)
        new = {name: value for name, value in more.items() if value is not None and given.get(name) is None}
        given.update(new)
        attributes = self._initial(run, given)
        with guard("optimizer"):
            state.tracker.arguments_known()
        if context.span is not None and context.span.is_recording():
            attributes.update(self._about(run, context.owner, new, described=not attributes))
            repair(attributes)
            context.span.set_attributes(attributes)

    def open(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], override_of: type | None = None
    ) -> Call | None:
        around = current_call_context()
        if around is not None and isinstance(around.state, CompileState) and around.owner is instance:
            # compile() calling super().compile() is one optimization.
            self._more_arguments(around, args, kwargs, override_of)
            return None
        call = super().open(instance, args, kwargs, override_of)
        if call is not None:
            Run.enter(1)
            with guard("compile"):
                put_attributes(call)
            tracker: Tracker = call.context.state.tracker
            if tracker.checkpoint is not None:
                tracker.checkpoint.span_started(call)
            with guard("optimizer"):
                tracker.begin()
            with guard("optimizer"):
                tracker.arguments_known()
            if self.display is not None and not tracker.run.inference_time:
                with guard("progress display"):
                    self.display.begin(tracker.run)
        return call

    def close(self, call: Call, result: Any, error: BaseException | None) -> None:
        tracker: Tracker = call.context.state.tracker
        with guard("optimizer"):
            tracker.end()
        super().close(call, result, error)
        if self.display is not None:
            with guard("progress display"):
                self.display.end(tracker.run, outcome_of(error))
        Run.enter(-1)

    def start_attributes(self, call: Call) -> Attributes:
        state: CompileState = call.context.state
        return self._about(state.tracker.run, call.instance, state.arguments)

    def _about(self, run: Run, instance: Any, given: Mapping[str, Any], described: bool = False) -> Attributes:
        """Parameters, datasets, and the initial program's state, unless that is described already."""
        attributes = parameter_attributes(instance, given, self.telemetry.config.content_on_spans, run.student)
        for name, role in (("trainset", "train"), ("valset", "val")):
            attributes.update(dataset_attributes(self.programs, given.get(name), role))
        if not described and run.initial_id is not None and self.telemetry.config.content_on_spans:
            run.remember_state(run.initial_id, state_of(run.student))
            put_state(self.telemetry, attributes, run.student, semconv.INITIAL_PROGRAM_STATE)
        if run.parent is None:  # the optimizations inside work on the same rows
            for name, key in (("trainset", semconv.DATASET_TRAIN_ROWS), ("valset", semconv.DATASET_VAL_ROWS)):
                if is_dataset(given.get(name)):
                    self.telemetry.put_content(attributes, key, plain_rows(given[name]))
        return attributes

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        state: CompileState = call.context.state
        run, checkpoint = state.tracker.run, state.tracker.checkpoint
        if checkpoint is not None:
            checkpoint.outcome = outcome_of(error)
        run.report_spending()
        if error is None and introspection.has_method(result, "named_predictors"):
            program = self.programs.find(result)
            if program is not None and program.id is not None:
                state.result_id = program.id
                state.winner = remember_winner(run, program.id)
        labels = {**run.labels(), semconv.OPTIMIZER_OUTCOME: outcome_of(error)}
        self.telemetry.metrics.optimizer_duration.record(seconds, labels, call.otel_context)

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        state: CompileState = call.context.state
        run, checkpoint = state.tracker.run, state.tracker.checkpoint
        attributes: Attributes = dict(run.totals.attributes())
        attributes[semconv.OPTIMIZER_OUTCOME] = outcome_of(error)
        given_validation = state.arguments.get("valset") is not None
        attributes.update(
            (key, value) for key, value in run.attributes().items() if not (given_validation and key in run.validation)
        )
        if checkpoint is not None:
            attributes.update(checkpoint.end_attributes())
        if state.result_id is not None:
            attributes[semconv.PROGRAM_ID] = state.result_id
            if state.winner is not None:
                attributes[semconv.OPTIMIZER_WINNER_TRIAL] = state.winner.number
            if self.telemetry.config.content_on_spans:
                put_state(self.telemetry, attributes, result)
        return attributes


def put_attributes(call: Call) -> None:
    """Set the attributes collected so far: a compile takes long, and processors may show its span before it ends."""
    if call.attributes:
        repair(call.attributes)
        call.span.set_attributes(call.attributes)
        call.attributes = {}


def outcome_of(error: BaseException | None) -> str:
    """How a compile ended: ``finished``, ``failed``, or ``interrupted`` (by Ctrl-C or cancellation)."""
    if error is None:
        return "finished"
    return "failed" if isinstance(error, Exception) else "interrupted"
