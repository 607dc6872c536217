"""What is compared: the scored examples of a program, and what they cost. From spans, of a file or in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel import semconv
from dspy_otel.decide.errors import CannotCompareError
from dspy_otel.record.answers import judged, judgement_of, newest_scores, read_answer
from dspy_otel.record.history import preview
from dspy_otel.record.history import results as records_of
from dspy_otel.record.losses import loss_of
from dspy_otel.record.model import (
    WHOLE_PROGRAM,
    Answer,
    Candidate,
    Evaluation,
    Example,
    Judgement,
    Optimization,
    Trial,
    Usage,
    load_json,
    number,
)
from dspy_otel.record.spans import Kind, kind_of, parse_failures_of, read_usage, seconds_of

BASELINE: Final = "baseline"
BEST: Final = "best"
UNNAMED: Final = "metric"
"""The name of a metric whose name was not recorded."""
MAX_PROGRAMS: Final = 200
"""Most programs whose instructions are kept from their calls."""
MAX_PREDICTORS: Final = 50
"""Most predictors of one of them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One answer of a program.

    Attributes:
        key: id of the example, or its place in the dataset where it has no id; None where nothing says which it is.
        scores: by metric; None where it has none, because it failed or because the metric gave none.
        example: the answer.
    """

    key: str | int | None
    scores: Mapping[str, float | None]
    example: Example


@dataclass(frozen=True, slots=True)
class Results:
    """The scored examples of a program, and what they cost.

    Attributes:
        name: as the user named it.
        what: what was found under that name.
        rows: the answers; several of the same example are repeats.
        metrics: names of the metrics that it was scored with.
        judged: those of them that people and evaluators gave to single answers, beside the metric of an evaluation.
        size: how many rows there should be.
        program: the program, with its state where that was recorded.
        models: names of the models that answered, by role.
        usage: of all LM calls.
        parse_failures: answers of a model that an adapter could not read.
        unfinished: an evaluation failed, was interrupted or still runs.
        production: these are answers in production, and no evaluation.
        run_id: MLflow's run.
        started: nanoseconds since 1970.
    """

    name: str
    what: str
    rows: tuple[Row, ...] = ()
    metrics: tuple[str, ...] = ()
    judged: tuple[str, ...] = ()
    size: int | None = None
    program: Candidate | None = None
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    usage: Usage = Usage()
    parse_failures: int | None = None
    unfinished: bool = False
    production: bool = False
    run_id: str | None = None
    started: int | None = None

    @property
    def seconds(self) -> list[float]:
        """How long the answers took, as far as that is known, in order."""
        return sorted(row.example.seconds for row in self.rows if row.example.seconds is not None)

    @property
    def lost(self) -> int:
        """How many rows were evaluated and are not recorded."""
        return max(0, (self.size or 0) - len(self.rows))


def rows_of(examples: Iterable[Example], metric: str | None) -> list[Row]:
    """The rows of an evaluation."""
    name = metric or UNNAMED
    found: list[Row] = []
    for example in examples:
        score = None if example.error is not None else number(example.score)
        found.append(Row(example.index if example.id is None else example.id, {name: score}, example))
    return found


# --- spans ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recorded:
    """All that a file of spans has, or a program's memory.

    Attributes:
        optimizations, evaluations: in the order in which they started.
        calls: answers outside of evaluations, with scores as people and evaluators in production give them, by program.
        instructions: of predictors that answered outside of optimizations, by program and path.
    """

    optimizations: Sequence[Optimization]
    evaluations: Sequence[Evaluation]
    calls: Mapping[str, Sequence[tuple[Row, Usage]]]
    instructions: Mapping[str, Mapping[str, str]]

    @property
    def programs(self) -> dict[str, Candidate]:
        """Programs whose states are known, by id; of those that were not optimized here, the instructions alone."""
        found: dict[str, Candidate] = {}
        for optimization in self.optimizations:
            for candidate in (*optimization.candidates.values(), optimization.initial, optimization.returned):
                if candidate is not None and candidate.state is not None:
                    found.setdefault(candidate.id, candidate)
        for id_, texts in self.instructions.items():
            state = {path: {"signature": {"instructions": text}} for path, text in texts.items()}
            found.setdefault(id_, Candidate(id_, json.dumps(state), altered=True))
        return found


def read_file(path: Path) -> Recorded:
    """Read a file of OTLP, as the Collector's file exporter writes it: of spans, in JSON also with logs of scores.

    Raises:
        CannotCompareError: it cannot be read.
    """
    from dspy_otel.record import otlp

    judgements: list[Judgement] = []
    try:
        return read_spans(otlp.read_file(path, judgements), judgements)
    except (OSError, ValueError) as error:
        raise CannotCompareError(f"{path} cannot be read: {error}.") from error


def read_spans(spans: Iterable[ReadableSpan], judgements: Iterable[Judgement] = ()) -> Recorded:
    """Read ended spans.

    Args:
        spans: in any order.
        judgements: beside the ``gen_ai.evaluation.result`` events on the spans; read when the spans have been.
    """
    said: list[Judgement] = []
    calls: list[tuple[Answer, Example, Usage]] = []
    instructions: dict[str, dict[str, str]] = {}
    alike: set[tuple[Any, ...]] = set()

    def needed() -> Iterable[ReadableSpan]:
        for span in spans:
            for event in span.events:
                if event.name == semconv.LOG_EVALUATION_RESULT and (at := span.context) is not None:
                    said.extend(judgement_of(at.trace_id, at.span_id, event.attributes or {}, event.timestamp / 1e9))
            kind = kind_of(span)
            if kind in _LM_CALLS:
                at = span.attributes or {}
                call = tuple(at.get(name) for name in _CALL)
                if at.get(semconv.EVALUATION_ID) is None or call not in alike:
                    alike.add(call)
                    yield _without_messages(span)
            elif kind is not Kind.OTHER or parse_failures_of(span):
                yield span
            if kind is Kind.OTHER:
                _put_instructions(instructions, span.attributes or {})
            if kind is Kind.OTHER and (answer := read_answer(span)) is not None:
                example = _example(answer, seconds_of(span))
                answer = dataclasses.replace(answer, inputs=None, outputs=None)
                calls.append((answer, example, read_usage(span.attributes or {})))

    optimizations, evaluations = records_of(list(needed()))
    said.extend(judgements)
    of_programs: dict[str, list[tuple[Row, Usage]]] = {}
    for answer, (_, example, usage) in zip(judged([one for one, _, _ in calls], said), calls, strict=True):
        row = Row(example.id, newest_scores(answer.judgements), example)
        of_programs.setdefault(str(answer.program), []).append((row, usage))
    return Recorded(optimizations, evaluations, of_programs, instructions)


_LM_CALLS: Final = frozenset({Kind.LM_CALL, Kind.EMBEDDING})
_CALL: Final = (
    *(semconv.EVALUATION_ID, semconv.OPTIMIZER_RUN_ID, semconv.OPTIMIZER_ROOT_RUN_ID),
    *(semconv.LM_ROLE, semconv.GEN_AI_REQUEST_MODEL),
)
"""All that a record of an evaluation has of its LM calls: of those that are alike, one is enough."""
_MESSAGES: Final = (
    *(semconv.GEN_AI_INPUT_MESSAGES, semconv.GEN_AI_OUTPUT_MESSAGES, semconv.GEN_AI_SYSTEM_INSTRUCTIONS),
    *(semconv.GEN_AI_TOOL_DEFINITIONS, semconv.INPUT_VALUE, semconv.OUTPUT_VALUE),
)


def _without_messages(span: ReadableSpan) -> ReadableSpan:
    """A call of an LM without its prompt and answer, which are most of a file."""
    at = {key: value for key, value in (span.attributes or {}).items() if key not in _MESSAGES}
    return ReadableSpan(
        span.name,
        span.context,
        resource=span.resource,
        attributes=at,
        start_time=span.start_time,
        end_time=span.end_time,
    )


def _put_instructions(found: dict[str, dict[str, str]], at: Mapping[str, Any]) -> None:
    """Keep those of a predictor's call; in an optimization, candidates have their whole states."""
    # An agent has a signature, too, and is no predictor: it has no demos.
    needed = (semconv.SIGNATURE_INSTRUCTIONS, semconv.PROGRAM_ID, semconv.DEMOS_COUNT)
    if any(name not in at for name in needed) or semconv.OPTIMIZER_RUN_ID in at:
        return
    text, program = str(at[semconv.SIGNATURE_INSTRUCTIONS]), str(at[semconv.PROGRAM_ID])
    whole = at.get(semconv.GEN_AI_OPERATION_NAME) == semconv.OPERATION_INVOKE_WORKFLOW
    path = WHOLE_PROGRAM if whole else at.get(semconv.MODULE_PATH)
    if path is None:
        return
    if program in found or len(found) < MAX_PROGRAMS:
        of_program = found.setdefault(program, {})
        if path in of_program or len(of_program) < MAX_PREDICTORS:
            of_program.setdefault(str(path), text)


def _example(answer: Answer, seconds: float | None) -> Example:
    """An answer as an example, small enough to keep."""
    inputs = load_json(answer.inputs)
    # What was cut or masked looks the same for other inputs. An SDK's limit leaves no mark, but no JSON either.
    whole = isinstance(inputs, Mapping) and loss_of(inputs) is None
    return preview(
        Example(
            id=_id_of_inputs(inputs) if whole else None,
            inputs=inputs,
            prediction=load_json(answer.outputs),
            error=answer.error,
            trace_id=answer.trace_id,
            seconds=seconds,
        )
    )


def _id_of_inputs(inputs: Any) -> str:
    """What pairs answers in production, where no dataset gives an example its id: the same inputs are the same row."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode("ascii")).hexdigest()[:16]


# --- what is meant --------------------------------------------------------------------------------------------------


def find(recorded: Recorded, name: str, part: str | None = None) -> list[Results]:
    """The results that are meant by the part of a file; of a program, those in production and those of evaluations.

    Args:
        recorded: what the file has.
        name: of the results, as the user gave it.
        part: ``baseline``, ``best`` or a trial's number, of the newest optimization; the id of an optimization, alone
            or with ``/`` and one of those; the id of an evaluation, or of a program. None for the newest: the
            evaluations of one program, or the best trial of an optimization.

    Raises:
        CannotCompareError: there is no such part.
    """
    scored = [one for one in recorded.evaluations if one.examples]
    own = [one for one in scored if one.own and one.optimization is None]
    if part is None:
        last: list[Evaluation | Optimization] = [*own[-1:], *recorded.optimizations[-1:]]
        newest = max(last, key=lambda one: one.started or 0, default=None)
        if isinstance(newest, Evaluation):
            program = newest.program_id
            of_program = [one for one in own if one is newest or (program and one.program_id == program)]
            return [_of_evaluations(recorded, name, of_program)]
        if newest is not None:
            return [_of_trial(recorded, name, newest, BEST)]
        raise CannotCompareError(f"{name} has no evaluation and no optimization with recorded examples.")
    chosen, _, trial = part.rpartition("/")
    if not chosen and (part in (BASELINE, BEST) or (part.isdigit() and len(part) < 8)):
        if not recorded.optimizations:
            raise CannotCompareError(f"{name}: there is no finished optimization.")
        return [_of_trial(recorded, name, recorded.optimizations[-1], part)]
    for optimization in reversed(recorded.optimizations):
        if optimization.id in (chosen, part):
            return [_of_trial(recorded, name, optimization, trial if chosen else BEST)]
    if evaluations := [one for one in scored if one.id == part]:
        return [_of_evaluations(recorded, name, evaluations)]
    answers = of_calls(recorded, name, part, len(recorded.calls.get(part, ())))
    found = [] if answers is None else [answers]
    if evaluations := [one for one in own if one.program_id == part]:
        found.append(_of_evaluations(recorded, name, evaluations))
    if found:
        return found
    if part in recorded.calls:
        raise CannotCompareError(
            f"{name}: none of the {len(recorded.calls[part])} answers of that program has a score."
        )
    known = [*(one.id for one in recorded.optimizations), *(one.id for one in own)][-8:]
    raise CannotCompareError(f"{name}: there is no such part; there are {', '.join(known) or 'none'}.")


def _of_evaluations(recorded: Recorded, name: str, evaluations: Sequence[Evaluation]) -> Results:
    first = evaluations[0]
    title = f"evaluation of {first.program_name or 'a program'}"
    if len(evaluations) > 1:
        title = f"{len(evaluations)} evaluations of {first.program_name or 'a program'}"
    found = merged(name, title, evaluations)
    program = recorded.programs.get(first.program_id or "")
    return found if program is None else dataclasses.replace(found, program=program)


def merged(name: str, what: str, evaluations: Sequence[Evaluation]) -> Results:
    """The results of one program's evaluations: several of one metric are repeats."""
    usage, models, rows = Usage(), dict[str, tuple[str, ...]](), list[Row]()
    for one in evaluations:
        usage = usage.plus(one.usage)
        rows += rows_of(one.examples, one.metric)
        for role, names in one.models.items():
            models[role] = tuple(sorted({*models.get(role, ()), *names}))
    failures = [one.parse_failures for one in evaluations if one.parse_failures is not None]
    program = evaluations[0].program_id
    return Results(
        name,
        what,
        tuple(rows),
        tuple(dict.fromkeys(one.metric or UNNAMED for one in evaluations)),
        size=sum(one.size or len(one.examples) for one in evaluations),
        program=None if program is None else Candidate(program),
        models=models,
        usage=usage,
        parse_failures=sum(failures) if failures else None,
        unfinished=any(one.failure is not None for one in evaluations),
        started=evaluations[-1].started,
    )


def _of_trial(recorded: Recorded, name: str, optimization: Optimization, which: str) -> Results:
    trial = trial_of(optimization, which)
    if trial is None:
        raise CannotCompareError(f"{name}: {title_of(optimization)} has no trial that is {which!r}.")
    evaluation = next((one for one in recorded.evaluations if one.id == trial.evaluation), None)
    what = f"{title_of(optimization)}, {trial_title(optimization, trial)}"
    if evaluation is None or not evaluation.examples:
        raise CannotCompareError(f"{name}: the examples of {what} were not recorded (OTEL_DSPY_OPTIMIZATION_TRACES).")
    found = merged(name, what, [dataclasses.replace(evaluation, metric=optimization.metric or evaluation.metric)])
    program = None if trial.candidate is None else recorded.programs.get(trial.candidate, Candidate(trial.candidate))
    return dataclasses.replace(found, program=program, models=found.models or optimization.models)


def trial_of(optimization: Optimization, which: str) -> Trial | None:
    """A trial by ``baseline``, ``best`` or its number; the best is the winner, or the best so far."""
    trials = optimization.trials
    if which == BASELINE:
        return next((trial for trial in trials if trial.kind == semconv.TRIAL_BASELINE), None)
    if which != BEST:
        return next((trial for trial in trials if str(trial.number) == which), None)
    scored = [trial for trial in trials if trial.score is not None and trial.score == trial.best]
    return optimization.winning or (scored[-1] if scored else None)


def title_of(optimization: Optimization) -> str:
    """An optimization, for people."""
    return " ".join(part for part in (optimization.optimizer, optimization.program_name) if part)


def trial_title(optimization: Optimization, trial: Trial) -> str:
    """A trial, for people."""
    kind = BASELINE if trial.kind == semconv.TRIAL_BASELINE else "winner" if trial is optimization.winning else None
    return f"trial {trial.number}" + ("" if kind is None else f" ({kind})")


def of_calls(recorded: Recorded, name: str, program: str, total: int | None) -> Results | None:
    """The answers of a program outside of evaluations that have a score; None without any.

    Args:
        recorded: where they are.
        name: of the results.
        program: ``dspy.program.id``.
        total: how many answers there are; None where that is not known.
    """
    scored = [(row, usage) for row, usage in recorded.calls.get(program, ()) if row.scores]
    if not scored:
        return None
    usage = Usage()
    for _, used in scored:
        usage = usage.plus(used)
    metrics = tuple(Counter(metric for row, _ in scored for metric in row.scores))
    return Results(
        name,
        f"{len(scored):,} answers with a score" + ("" if total is None else f", of {total:,}"),
        tuple(row for row, _ in scored),
        metrics,
        metrics,
        program=recorded.programs.get(program, Candidate(program)),
        usage=usage,
        production=True,
    )
