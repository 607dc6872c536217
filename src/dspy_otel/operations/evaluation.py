"""Evaluations: one span for ``Evaluate``, one for each example, with its score or its failure."""

from __future__ import annotations

import functools
import math
import secrets as random_source
import types
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from opentelemetry.trace import Link, Status, StatusCode

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.content.names import without_secrets
from dspy_otel.core.attributes import Attributes, Labels, repair, sendable_name
from dspy_otel.core.call_context import CallContext, Program
from dspy_otel.core.errors import error_type
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import Call, Operation, SpanStart, openinference
from dspy_otel.core.usage import Totals
from dspy_otel.operations.module import put_inputs, put_outputs
from dspy_otel.operations.program import Programs

_MOST_PARTIALS: Final = 16
_FUNCTIONS: Final = frozenset(map(id, (types.FunctionType, types.BuiltinFunctionType, types.MethodType)))
_CONTENT: Final = guard("content")


@dataclass(slots=True)
class EvaluationState:
    """What is known of one evaluation. Its examples read it in worker threads; only the sets change.

    Attributes:
        program: what is evaluated, if that is a module.
        known: what is known of it. It is looked at once, so its examples have the same id: a program that changes
            itself between examples is evaluated as the one that it was at the beginning.
        program_name: its name.
        program_id: its ``dspy.program.id``.
        metric: the name of the metric.
        totals: of the LM calls inside.
        scored: indices of examples that have a score; each addition is one step.
        failed: indices of examples that have failed; likewise.
        executing: DSPy runs the examples; written in the thread of the evaluation.
        examples: what they share; written by the first one.
    """

    program: Any
    known: Program | None
    program_name: str
    program_id: str | None
    metric: str | None
    totals: Totals = field(default_factory=Totals)
    scored: set[Any] = field(default_factory=set)
    failed: set[Any] = field(default_factory=set)
    executing: bool = False
    examples: ExampleDescription | None = None


class Verdict(NamedTuple):
    """What a metric returned.

    Attributes:
        number: the score, maybe not finite; ``None`` where there is none.
        feedback: the text of a metric that returned ``Prediction(score, feedback)``.
    """

    number: float | None = None
    feedback: str | None = None

    @property
    def score(self) -> float | None:
        """The score, if it is finite."""
        return self.number if self.number is not None and math.isfinite(self.number) else None

    @property
    def unusable(self) -> str | None:
        """Why the score counts as a failure (it is NaN or infinite); ``None`` for any other."""
        number = self.number
        return None if number is None or math.isfinite(number) else f"the metric returned {number}"


class ExampleDescription(NamedTuple):
    """What all examples of an evaluation share.

    Attributes:
        span: span name.
        program: attributes of their spans: of the program.
        metric: likewise, of the metric.
        scored: labels of those that have a score.
        failed: labels of those that have failed.
    """

    span: str
    program: Attributes
    metric: Attributes
    scored: Labels
    failed: Labels


@dataclass(slots=True)
class ExampleState:
    """What is known of one evaluated example. Written in its worker thread.

    Attributes:
        superseded: DSPy had submitted it twice and has taken the other answer.
        verdict: what the metric returned.
    """

    superseded: bool = False
    verdict: Verdict = Verdict()


class EvaluateOperation(Operation):
    """``Evaluate.__call__``."""

    kind = "evaluate"
    always = True
    identity = (
        semconv.EVALUATION_ID,
        semconv.PROGRAM_NAME,
        semconv.PROGRAM_ID,
        semconv.OPTIMIZER_RUN_ID,
        semconv.OPTIMIZER_ROOT_RUN_ID,
        semconv.TRIAL_NUMBER,
    )

    def __init__(self, telemetry: Any, programs: Programs) -> None:
        super().__init__(telemetry)
        self.programs = programs

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        given = arguments(instance, args, kwargs)
        program = (
            self.programs.find(given["program"])
            if introspection.has_method(given["program"], "named_predictors")
            else None
        )
        state = EvaluationState(
            program=given["program"] if program is not None else None,
            known=program,
            program_name=program.name if program else callable_name(given["program"]),
            program_id=program.id if program else None,
            metric=metric_name(given["metric"]),
        )
        context = CallContext(self.kind, instance, parent, state)
        context.program = None
        # Where a program that is no module ends and the metric begins is unknown.
        context.role = None if program is None else semconv.ROLE_TASK
        if in_metric(parent):
            context.role = semconv.ROLE_JUDGE
        context.totals = (*context.totals, state.totals)
        context.inherited = {**context.inherited, semconv.EVALUATION_ID: random_source.token_hex(8)}
        attributes: Attributes = {semconv.PROGRAM_NAME: state.program_name}
        if state.program_id is not None:
            attributes[semconv.PROGRAM_ID] = state.program_id
        if state.metric is not None:
            attributes[semconv.EVALUATION_METRIC_NAME] = state.metric
        attributes.update(size_attributes(given))
        openinference(attributes, self.telemetry, semconv.KIND_EVALUATOR)
        return SpanStart(f"{semconv.SPAN_EVALUATE} {state.program_name}", context, attributes, identity=self.identity)

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        state: EvaluationState = call.context.state
        # An example that DSPy submits twice may fail once and be scored once: then it was scored.
        failures = len(state.failed - state.scored)
        attributes: Attributes = {semconv.EVALUATION_FAILURES: failures, **state.totals.attributes()}
        score = mean_score(result)
        if score is not None:
            attributes[semconv.EVALUATION_SCORE] = score
        return attributes

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        score = mean_score(result)
        if score is not None:
            self.telemetry.metrics.evaluation_score.record(
                score, evaluation_labels(call.context.state), call.otel_context
            )


@dataclass
class ExampleRun:
    """One example, about to be run.

    Attributes:
        example: the dataset row.
        index: its place in the evaluated dataset, or -1 when that is not known.
        resubmitted: DSPy has submitted it before (a straggler).
        evaluate: context of the evaluation.
        program: the module that answers, where that is not the evaluation's own program.
    """

    example: Any
    index: int
    resubmitted: bool
    evaluate: CallContext
    program: Any = None


class ExampleOperation(Operation):
    """One example of an evaluation: the program's answer and the metric's verdict on it."""

    kind = "example"
    identity = (*EvaluateOperation.identity, semconv.EXAMPLE_INDEX, semconv.CANDIDATE_ID)

    def __init__(self, telemetry: Any, programs: Programs) -> None:
        super().__init__(telemetry)
        self.programs = programs

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        run: ExampleRun = instance
        evaluate = run.evaluate
        evaluation: EvaluationState = evaluate.state
        # The context's owner is the evaluated program: what is called after its answer belongs to the metric.
        context = CallContext(self.kind, evaluation.program, evaluate, ExampleState())
        context.role_after = semconv.ROLE_JUDGE
        context.evaluated = evaluation.known
        if run.program is not None:
            context.owner, context.role = run.program, semconv.ROLE_TASK
            context.evaluated = None
        description = evaluation.examples
        if description is None:
            description = evaluation.examples = self._described(evaluation)
        attributes = description.program.copy()
        if run.index >= 0:
            attributes[semconv.EXAMPLE_INDEX] = run.index
        if run.resubmitted:
            attributes[semconv.EXAMPLE_RESUBMITTED] = True
        attributes.update(description.metric)
        linked = self.telemetry.config.evaluation_traces == "linked"
        links = [Link(evaluate.span.get_span_context())] if linked and evaluate.span is not None else []
        return SpanStart(
            description.span, context, attributes, root=linked, links=links, repaired=True, identity=self.identity
        )

    def _described(self, evaluation: EvaluationState) -> ExampleDescription:
        """What all examples of an evaluation share. Made once, for there are many."""
        program: Attributes = {semconv.PROGRAM_NAME: evaluation.program_name}
        if evaluation.program_id is not None:
            program[semconv.PROGRAM_ID] = evaluation.program_id
        metric: Attributes = {}
        if evaluation.metric is not None:
            metric[semconv.EVALUATION_METRIC_NAME] = evaluation.metric
        openinference(metric, self.telemetry, semconv.KIND_CHAIN)
        repair(program)
        repair(metric)
        labels = evaluation_labels(evaluation)
        return ExampleDescription(
            sendable_name(f"{semconv.SPAN_EXAMPLE} {evaluation.program_name}"),
            program,
            metric,
            Labels({**labels, semconv.EXAMPLE_OUTCOME: semconv.OUTCOME_SCORED}),
            Labels({**labels, semconv.EXAMPLE_OUTCOME: semconv.OUTCOME_FAILED}),
        )

    def start_attributes(self, call: Call) -> Attributes:
        run: ExampleRun = call.instance
        attributes: Attributes = {}
        example_id = self.programs.example_id(run.example)
        if example_id is not None:
            attributes[semconv.EXAMPLE_ID] = example_id
        if self.telemetry.config.content_on_spans:
            inputs, expected = split_example(run.example)
            put_inputs(self.telemetry, attributes, inputs)
            self.telemetry.put_content(attributes, semconv.EXAMPLE_EXPECTED, expected)
        if self.telemetry.config.evaluation_traces == "linked" and call.context.deferred is None:
            run.evaluate.add_link(call.span.get_span_context(), {semconv.EXAMPLE_INDEX: run.index})
        return attributes

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        attributes: Attributes = {}
        if error is not None or type(result) is not tuple or len(result) != 2:
            return attributes
        if self.telemetry.config.content_on_spans:
            prediction = result[0]
            shown = prediction[0] if type(prediction) is tuple and prediction else prediction
            put_outputs(self.telemetry, attributes, shown)
        state: ExampleState = call.context.state
        verdict = state.verdict
        score = verdict.score
        if score is not None and not state.superseded:
            attributes[semconv.EXAMPLE_SCORE] = score
        unusable = verdict.unusable
        if unusable is not None:
            attributes[semconv.ERROR_TYPE] = semconv.ERROR_SCORE_NOT_FINITE
            call.span.set_status(Status(StatusCode.ERROR, unusable))
        if verdict.feedback is not None:
            self.telemetry.put_text(attributes, semconv.EXAMPLE_FEEDBACK, verdict.feedback)
        return attributes

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        run: ExampleRun = call.instance
        evaluation: EvaluationState = run.evaluate.state
        state: ExampleState = call.context.state
        if type(result) is tuple and len(result) == 2:
            state.verdict = verdict_of(result[1])
        key = run.index if run.index >= 0 else object()
        if key in evaluation.scored:
            state.superseded = True
            return
        failed = error is not None or state.verdict.unusable is not None
        (evaluation.failed if failed else evaluation.scored).add(key)
        description = evaluation.examples
        if description is not None:
            labels = description.failed if failed else description.scored
            self.telemetry.metrics.evaluation_examples.add(1, labels, call.otel_context)
        if self.telemetry.keeps_events:
            self._emit_result(call, state.verdict, error)

    def _emit_result(self, call: Call, verdict: Verdict, error: BaseException | None) -> None:
        """The ``gen_ai.evaluation.result`` event of this example, unless its trace was not sampled."""
        span = call.span.get_span_context()
        if span.is_valid and not span.trace_flags.sampled:
            return
        run: ExampleRun = call.instance
        evaluation: EvaluationState = run.evaluate.state
        attributes: Attributes = {semconv.GEN_AI_EVALUATION_NAME: evaluation.metric or "metric"}
        attributes.update(call.context.inherited)
        if run.index >= 0:
            attributes[semconv.EXAMPLE_INDEX] = run.index
        score, feedback = verdict.score, verdict.feedback
        if score is not None:
            attributes[semconv.GEN_AI_EVALUATION_SCORE_VALUE] = score
        if error is not None:
            attributes[semconv.ERROR_TYPE] = error_type(error)
        elif verdict.unusable is not None:
            attributes[semconv.ERROR_TYPE] = semconv.ERROR_SCORE_NOT_FINITE
        if feedback is not None and self.telemetry.config.content_on_events:
            with _CONTENT:
                attributes[semconv.GEN_AI_EVALUATION_EXPLANATION] = self.telemetry.content.text(feedback)
        self.telemetry.emit_event(semconv.LOG_EVALUATION_RESULT, attributes, call.otel_context)


def in_metric(context: CallContext | None) -> bool:
    """Whether a metric makes the call: the program of the example around it has answered."""
    while context is not None and context.role_after is None:
        context = context.parent
    return context is not None and context.role == context.role_after


# --- pure mapping ------------------------------------------------------------------------------------------------


def arguments(evaluate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation works with: the call's arguments, else the instance's own settings."""
    order = ("program", "metric", "devset", "num_threads")
    given = dict(zip(order, args, strict=False))
    given.update({name: kwargs[name] for name in order if name in kwargs})
    return {
        name: given.get(name) if given.get(name) is not None else introspection.field(evaluate, name) for name in order
    }


def size_attributes(given: dict[str, Any]) -> Attributes:
    """Number of examples and of threads."""
    attributes: Attributes = {}
    size, threads = introspection.length(given["devset"]), introspection.whole(given["num_threads"])
    if size is not None:
        attributes[semconv.EVALUATION_SIZE] = size
    if threads is not None:
        attributes[semconv.EVALUATION_NUM_THREADS] = threads
    return attributes


def callable_name(function: Any) -> str:
    """The name of a function (of a ``functools.partial``: of what it calls), or the class of any other callable."""
    for _ in range(_MOST_PARTIALS):
        if type(function) is not functools.partial:
            break
        function = function.func
    if introspection.is_a(function, type):
        return without_secrets(introspection.short_name_of(function)[:256])
    plain = id(type(function)) in _FUNCTIONS
    name = introspection.text(function.__name__ if plain else introspection.field(function, "__name__"), 256)
    return without_secrets(name or introspection.name_of(type(function)).rpartition(".")[2])


def metric_name(metric: Any) -> str | None:
    """The name DSPy gives a metric in its tables, or ``None`` without one."""
    return None if metric is None else callable_name(metric)


def verdict_of(returned: Any) -> Verdict:
    """What a metric returned: a number, a boolean, or something with a ``score`` and maybe ``feedback``."""
    if returned is None:
        return Verdict()
    number = introspection.real(returned)
    if number is not None:
        return Verdict(number)
    feedback = introspection.field(returned, "feedback")
    return Verdict(
        introspection.real(introspection.field(returned, "score")),
        feedback if introspection.is_a(feedback, str) else None,
    )


def score_of(returned: Any) -> float | None:
    """The finite score in what a metric returned, or ``None``."""
    return verdict_of(returned).score


def mean_score(result: Any) -> float | None:
    """The mean of the metric over an evaluation, from the percent in the result of ``Evaluate``."""
    percent = score_of(introspection.field(result, "score"))
    return None if percent is None else from_percent(percent)


def from_percent(percent: float) -> float:
    """A percent as ``Evaluate`` reports it, which is 100 times the mean of the metric, as that mean."""
    return round(percent / 100, 9)  # without the noise of the division: 57.99 is 0.5799


def split_example(example: Any) -> tuple[Any, Any]:
    """Inputs and expected fields of a dataset row. A row without input keys is all input."""
    values = introspection.store_of(example)
    keys = introspection.instance_dict(example).get("_input_keys")
    if values is None:
        return example, {}
    if keys is None:
        return values, {}
    inputs = {key: value for key, value in dict.items(values) if key in keys}
    expected = {key: value for key, value in dict.items(values) if key not in keys}
    return inputs, expected


def evaluation_labels(evaluation: EvaluationState) -> Attributes:
    """Low-cardinality attributes of an evaluation's metrics."""
    labels: Attributes = {semconv.PROGRAM_NAME: evaluation.program_name}
    if evaluation.metric is not None:
        labels[semconv.EVALUATION_METRIC_NAME] = evaluation.metric
    return labels
