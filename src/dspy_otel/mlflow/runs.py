"""Records to the runs that should exist in MLflow. Pure: no input or output, no state.

:func:`runs_of` is the contract. It gets one record that has changed, and gives what MLflow should have because of it:

* A :class:`Run` is known by its key. Several of one key add up: a tag or an artifact of the same name is replaced, a
  parameter keeps its first value (MLflow refuses to change one), metric points and datasets are sets. So giving and
  writing a run twice does no harm, and the worker writes only the difference.
* The first of a key has a ``name`` and a ``started``; one that adds to another (a trial's point on the curve of its
  optimization) has None there. If no run of its key is known, it is dropped.
* ``parent`` is the key of another run. If that is not known either, the run is a step of ``user_run``, if there is one.
* A run is over when ``status`` is there. Others of the same key may still come: the winner gets another name when its
  optimization ends.
* ``references`` and ``candidates`` name other runs by key. :meth:`Run.resolved` puts MLflow's ids in their place,
  once those runs exist.

One trial gives its own run, and points for one other: what it costs does not grow with the number of trials. Only the
end of an optimization looks at all of them.

Traces belong to runs too: :func:`key_of` says to which, :func:`assessments_of` their scores and expectations.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel import semconv
from dspy_otel.mlflow.account import EXPECTATIONS, SCORES
from dspy_otel.mlflow.versions import PARTS, Version, version_of
from dspy_otel.record import model, stored
from dspy_otel.record.model import (
    Candidate,
    Evaluation,
    Example,
    Failure,
    Judgement,
    Optimization,
    Record,
    Trace,
    Trial,
    Usage,
    load_json,
    number,
)
from dspy_otel.record.spans import Kind, is_ours, kind_of, read
from dspy_otel.reports import Source, render

_logger = logging.getLogger(__name__)

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"
_STATUSES: Final = {model.FAILED: FAILED, model.INTERRUPTED: KILLED}
COMPILE, TRIAL, EVALUATION = "compile", "trial", "evaluation"

BEST_PROGRAM: Final = "best_model.json"
"""The name DSPy's tutorial on optimizer tracking and MLflow's autologging give the optimized program."""
TRIAL_PROGRAM: Final = "model.json"
INITIAL_PROGRAM: Final = "initial_model.json"
EVALUATION_TABLE: Final = "evaluation_table.json"
CANDIDATE_TABLE: Final = "candidates.json"
PHASE_TABLE: Final = "phases.json"
CHANGES: Final = "changes.json"
REPORT: Final = "report.html"

MAX_PARAM: Final = 6000
MAX_TAG: Final = 8000
MAX_KEY: Final = 250
"""Longest values and names, in characters, that MLflow takes (``mlflow/utils/validation.py``, 3.17.2)."""

EXPECTED: Final = "expected"
_REPLACED: Final = "\ufffd"
"""Stands in a text for each character that no store can keep."""
MAX_EXPECTATIONS: Final = 8
"""Most fields of one example that each are an expectation of their own: a server takes them one by one."""

TAG_KIND: Final = "dspy.run.kind"
TAG_KEY: Final = "dspy.run.key"
"""Our key of a run. It finds a run again whose creation got no answer because the connection broke."""
TAG_CONTENT: Final = "dspy.content"
TAG_FAILURES: Final = "dspy.failures"
"""How many examples of an evaluation raised, where any did. No metric: MLflow would add a column."""
TAG_PARSE_FAILURES: Final = "dspy.parse_failures"
"""How many answers of a model no adapter could read, in an evaluation. No metric, likewise."""
TAG_WINNER: Final = "dspy.winner"
TAG_WINNER_RUN: Final = "dspy.winner.run_id"
TAG_DETAILS: Final = "dspy.details"
"""All tags that nobody searches by, as JSON: MLflow's page of a run shows each tag as a row."""
TAG_NUMBERS: Final = "dspy.numbers"
"""Calls, tokens, cost and counts, as JSON by name. They are no metrics: MLflow's "Evaluation runs" has a column, at
least 100 pixels wide, for each metric of any run in it, and cuts the names of the runs to what is left."""
_OLDER_NUMBERS: Final = "dspy.usage"
"""The same, of trials in stores that were written before."""
_DETAILS: Final = frozenset(
    {
        TAG_NUMBERS,
        *("dspy_otel.version", "opentelemetry-sdk.version"),
        *(semconv.OPTIMIZER_PARENT_RUN_ID, semconv.OPTIMIZER_ROOT_RUN_ID, semconv.OPTIMIZER_INFERENCE_TIME),
        *(semconv.OPTIMIZER_OUTCOME, semconv.OPTIMIZER_SCORE_SCALE, semconv.OPTIMIZER_PHASE),
        *(semconv.INITIAL_PROGRAM_ID, semconv.CANDIDATE_ID, semconv.CANDIDATE_PARENT_IDS, semconv.EVALUATION_ID),
        *(semconv.TRIAL_SCORE_REPORTED, semconv.TRIAL_IS_BEST, semconv.TRIAL_ON_PARETO_FRONT),
    }
)
TAG_NAME: Final = "mlflow.runName"
TAG_PARENT: Final = "mlflow.parentRunId"
TAG_NOTE: Final = "mlflow.note.content"
TAG_TABLES: Final = "mlflow.loggedArtifacts"

HOW_TO_GET_CONTENT: Final = (
    "off: programs, instructions, demos, dataset rows and predictions are recorded with "
    "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=span_only"
)
TRACE_ID: Final = "tr-{}"
"""How MLflow writes the id of a trace."""

_MARKS: Final = {True: "✓", False: "✗"}
_STEPS: Final = ("step", "iteration", "depth", "strategy")
"""Choices that give the step of an optimization that a trial belongs to."""
_METRICS: Final = ("best_score", "gain")
"""Results of an optimization that are metrics beside ``score`` and its ``cost`` or ``tokens``; others are numbers."""
RUN_ID: Final = "run_id"
"""Column of the table of trials."""


# --- contents of runs -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Metric:
    """One point of a metric's curve; ``time`` in milliseconds since 1970."""

    key: str
    value: float
    time: int
    step: int


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset input of a run; ``columns`` are field names with MLflow types, known with content on only."""

    name: str
    digest: str
    context: str
    size: int
    columns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """What one MLflow run should have because of one record. The module's docstring says how several add up.

    Attributes:
        key: our name for it.
        kind: ``compile``, ``trial`` or ``evaluation``.
        name: as the user sees it.
        parent: key of the run that it is a step of.
        user_run: id of the user's run that it is a step of, when it has no parent.
        started: milliseconds since 1970.
        tags, params, metrics, datasets: within MLflow's limits.
        artifacts: texts by path.
        references: tags whose value is the id of another run, given by its key.
        candidates: rows of the table of trials, each with the key of its trial's run in place of the id.
        version: model, prompts and dataset that follow from the result.
        status: once it is over.
        ended: milliseconds since 1970.
    """

    key: str
    kind: str
    name: str | None = None
    parent: str | None = None
    user_run: str | None = None
    started: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()
    datasets: tuple[Dataset, ...] = ()
    artifacts: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)
    candidates: tuple[Mapping[str, Any], ...] = ()
    version: Version | None = None
    status: str | None = None
    ended: int | None = None

    def resolved(self, ids: Mapping[str, str]) -> Run:
        """The run with ids in place of keys; what names a run that does not exist is left out.

        Args:
            ids: of runs, by key.
        """
        tags = {tag: ids[key] for tag, key in self.references.items() if key in ids}
        artifacts = dict(self.artifacts)
        if self.candidates:
            columns = [*stored.TRIAL_COLUMNS, RUN_ID]
            rows = [{**row, RUN_ID: ids.get(row[RUN_ID])} for row in self.candidates]
            artifacts[CANDIDATE_TABLE] = table(columns, ([row[column] for column in columns] for row in rows))
        return dataclasses.replace(self, tags={**self.tags, **tags}, artifacts=artifacts, references={}, candidates=())


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one example, for the trace of that example.

    Attributes:
        key: of the run that it belongs to.
        trace_id: as MLflow writes it.
        span_id: of the example's span, in 16 hexadecimal digits, when that is not the root of its trace.
        name: of the metric.
        value: None when the program or the metric raised; then ``error`` is set.
        rationale: the metric's feedback.
        error: type of what was raised.
        message: of what was raised, with content capture on only.
        row: place of the example in its dataset.
    """

    key: str
    trace_id: str
    span_id: str | None
    name: str
    value: float | None
    rationale: str | None
    error: str | None
    message: str | None
    row: int | None

    @property
    def id(self) -> str:
        """Its id in MLflow. It follows from the score, so that one that is sent twice is not stored twice."""
        return _assessment_id(f"{self.trace_id}/{self.span_id}/{self.name}")


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a field of one example should have been, for the trace of that example; with content capture on only.

    Attributes:
        key, trace_id, span_id, row: as those of its score.
        name: of the field.
        value: of any type that JSON has, but None.
    """

    key: str
    trace_id: str
    span_id: str | None
    name: str
    value: Any
    row: int | None

    @property
    def id(self) -> str:
        """Its id in MLflow, made as that of a score."""
        return _assessment_id(f"expected/{self.trace_id}/{self.span_id}/{self.name}")


Assessment: TypeAlias = Score | Expectation


def kind_of_assessment(assessment: Assessment) -> str:
    """The name of its kind in the account."""
    return SCORES if isinstance(assessment, Score) else EXPECTATIONS


def _assessment_id(text: str) -> str:
    return f"a-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:32]}"


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run as MLflow has it."""

    run_id: str
    artifact_uri: str
    started: int
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    params: Mapping[str, str] = field(default_factory=dict)
    experiment_id: str = ""
    status: str = ""
    ended: int | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of its datasets, by context: ``train``, ``val``, ``eval``."""


@dataclass(frozen=True, slots=True)
class StoredTrace:
    """A trace as MLflow has it, without its spans.

    Attributes:
        trace_id: as MLflow writes it.
        tags: of it.
        started: milliseconds since 1970.
        seconds: how long it took.
        failed: its root has an error.
        inputs, outputs: the beginning of what went in and came out, with content capture on only.
        scores: the newest number that each assessment has; a person's goes before a program's.
        judgements: what people and programs said of it, as far as it is valid.
        usage: tokens and cost.
    """

    trace_id: str
    tags: Mapping[str, str]
    started: int
    seconds: float | None
    failed: bool
    inputs: str | None
    outputs: str | None
    scores: Mapping[str, float]
    judgements: Sequence[Judgement]
    usage: Usage


# --- records to runs ------------------------------------------------------------------------------------------------


def runs_of(
    record: Record, versions: Mapping[str, str], user_run: str | None = None, parts: Collection[str] = PARTS
) -> list[Run]:
    """What MLflow should have because of a record.

    Args:
        record: as it is now.
        versions: tags that every run carries.
        user_run: id of the user's own active MLflow run when this began, if there was one.
        parts: what becomes of results beside their runs: models, prompts, datasets.
    """
    if isinstance(record, Optimization):
        return _of_optimization(record, versions, user_run, parts)
    if isinstance(record, Trial):
        return _of_trial(record, versions, user_run)
    if isinstance(record, Evaluation):
        return _of_evaluation(record, versions, user_run)
    return []  # phases are in the tables of their optimization


def key_of(trace: Trace) -> str | None:
    """The key of the run that a trace belongs to; None for no run."""
    if trace.evaluation is not None:
        return evaluation_key(trace.evaluation)
    if trace.optimization is None:
        return None
    return trace.optimization if trace.trial is None else trial_key(trace.optimization, trace.trial)


def trace_id_of(trace_id: int) -> str:
    """A trace's id as MLflow writes it."""
    return TRACE_ID.replace("{}", f"{trace_id:032x}")


def score_of(trace: Trace) -> Score | None:
    """The verdict on an example, or None when there is none (a straggler's second answer)."""
    key, example = key_of(trace), trace.example
    if key is None or example is None or (example.score is None and example.error is None):
        return None
    value, error = number(example.score), example.error
    if value is None and error is None:
        error = f"score is {example.score}"
    return Score(
        key,
        trace_id_of(trace.trace_id),
        None if trace.span_id is None else f"{trace.span_id:016x}",
        trace.metric or "score",
        value,
        None if example.feedback is None else as_text(example.feedback),
        None if error is None else as_text(error),
        example.message,
        example.index,
    )


def assessments_of(trace: Trace) -> list[Assessment]:
    """The score of an example, and what was expected of it."""
    score, example = score_of(trace), trace.example
    if score is None or example is None:
        return []
    place = (score.key, score.trace_id, score.span_id)
    return [score, *(Expectation(*place, name, value, score.row) for name, value in _expected(example.expected))]


def _expected(expected: Any) -> list[tuple[str, Any]]:
    """The fields of what was expected; all under one name when they are many, or when the text of them was cut.

    A value with characters that could not be kept is left out: nothing that is compared with it would be right.
    """
    if expected is None or expected == {}:
        return []
    fields = expected if isinstance(expected, dict) and len(expected) <= MAX_EXPECTATIONS else {EXPECTED: expected}
    kept = [(cut(as_text(name), MAX_KEY), _plain(value)) for name, value in fields.items() if value is not None]
    return [(name, value) for name, value in kept if _REPLACED not in strict_json(value)]


def _plain(value: Any) -> Any:
    """A value of JSON that MLflow takes; one that is too long is the beginning of its text."""
    text = as_text(value) if isinstance(value, str) else as_text(strict_json(value))
    if len(text) > MAX_TAG:
        return cut(text, MAX_TAG)
    return text if isinstance(value, str) else json.loads(text)


def key_of_start(span: ReadableSpan) -> str | None:
    """The key of the run that a span of an optimization, trial or evaluation makes, if it makes one; else None."""
    part = read(span, kind_of(span))
    if isinstance(part, Optimization):
        return part.id
    if isinstance(part, Trial):
        return trial_key(part.optimization, part.number)
    return evaluation_key(part.id) if isinstance(part, Evaluation) else None


def count_assessments(spans: Iterable[ReadableSpan]) -> Counter[str]:
    """How many scores and expectations follow from ended spans, by kind."""
    counts: Counter[str] = Counter()
    for span in spans:
        example = read(span, Kind.EXAMPLE) if is_ours(span) and kind_of(span) is Kind.EXAMPLE else None
        if isinstance(example, Example) and not (example.score is None and example.error is None):
            counts[SCORES] += 1
            counts[EXPECTATIONS] += len(_expected(example.expected))
    return counts


def trial_key(optimization: str, trial: int) -> str:
    """The key of a trial's run."""
    return f"{optimization}/{trial}"


def evaluation_key(evaluation: str) -> str:
    """The key of the run of an evaluation that stands for itself."""
    return f"evaluation/{evaluation}"


# --- optimizations --------------------------------------------------------------------------------------------------


def _of_optimization(
    record: Optimization, versions: Mapping[str, str], user_run: str | None, parts: Collection[str]
) -> list[Run]:
    artifacts: dict[str, str] = {}
    tags = {**_common(record, COMPILE, record.id, versions), **stored.optimization_tags(record)}
    datasets: list[Dataset] = []
    if record.parent is None:  # an optimization inside another works on the same rows: they are logged once
        for dataset in record.datasets:
            datasets.append(_dataset(record.program_name or record.optimizer, dataset))
            _put_rows(dataset, artifacts, tags)
        if record.initial_id in record.candidates:
            _put_program(INITIAL_PROGRAM, record.candidates[str(record.initial_id)], artifacts, tags)
    run = Run(
        record.id,
        COMPILE,
        name=as_text(" ".join(part for part in (record.optimizer, record.program_name) if part)),
        parent=record.parent,
        user_run=user_run,
        started=milliseconds(record.started),
        tags=_tags(tags),
        params=_params(stored.optimization_params(record)),
        datasets=tuple(datasets),
        artifacts=artifacts,
    )
    return [run] if record.ended is None else _of_result(record, run, tags, artifacts, versions, parts)


def _of_result(
    record: Optimization,
    run: Run,
    tags: dict[str, Any],
    artifacts: dict[str, str],
    versions: Mapping[str, str],
    parts: Collection[str],
) -> list[Run]:
    """The runs of an optimization that is over: its own, and the winner's, which is named as such."""
    when, step = milliseconds(record.ended), max((trial.number for trial in record.trials), default=0)
    results = stored.optimization_metrics(record)
    points = (
        # The best score under its children's name too, after theirs: MLflow's table of runs compares by name.
        *_points({"score": readable(record.best)}, when, step + 1),
        *_points({name: readable(results.pop(name)) for name in _METRICS}, when, step),
        *_points(_spent(record.usage), when, step),
    )
    results["baseline_score"] = readable(record.baseline)
    numbers = _numbers({**results, **record.usage.flat()})
    best = record.returned
    if best is not None and best.state is None:
        best = record.candidates.get(best.id)
    program: dict[str, str] = {}
    if best is not None:
        _put_program(BEST_PROGRAM, best, program, tags)
        artifacts.update(program)
    elif not record.candidates and not _cut_short(record.failure):
        tags[TAG_CONTENT] = HOW_TO_GET_CONTENT
    candidates: list[Mapping[str, Any]] = []
    # Without some of its trials, which were lost, a table of them would not be true.
    if record.resumed or len(record.trials) >= (record.done or 0):
        candidates = [
            {**stored.trial_row(trial), RUN_ID: trial_key(record.id, trial.number)} for trial in record.trials
        ]
        if record.phases:
            rows = (list(stored.phase_row(phase).values()) for phase in record.phases)
            artifacts[PHASE_TABLE] = table(stored.PHASE_COLUMNS, rows)
    _name_tables(artifacts, tags, (CANDIDATE_TABLE,) if candidates else ())
    if record.parent is None or record.trials:  # steps of others that scored nothing need no report
        _put_report(record, run, artifacts, versions)
    winner = record.winning
    status = _STATUSES.get(record.outcome) or _status(record.failure)
    tags[TAG_NOTE] = _note(status, record.failure, _summary(record))
    over = dataclasses.replace(
        run,
        tags={**_tags(tags), **numbers},
        metrics=points,
        artifacts=artifacts,
        references={} if winner is None else {TAG_WINNER_RUN: trial_key(record.id, winner.number)},
        candidates=tuple(candidates),
        version=version_of(record, program, parts),
        status=status,
        ended=when,
    )
    return [over] if winner is None else [over, _of_winner(record.id, winner)]


def _of_winner(optimization: str, trial: Trial) -> Run:
    tags = {TAG_NAME: trial_name(trial, winner=True), TAG_WINNER: True}
    return Run(trial_key(optimization, trial.number), TRIAL, tags=_tags(tags))


def _put_report(record: Optimization, run: Run, artifacts: dict[str, str], versions: Mapping[str, str]) -> None:
    software = {name.removesuffix(".version"): value for name, value in versions.items() if name.endswith(".version")}
    try:
        artifacts[REPORT] = render(record, Source(in_run=True, trace_name=TRACE_ID, versions=software))
    except Exception as error:
        _logger.warning("The report of %s could not be made (%s).", run.name, type(error).__name__)
        _logger.debug("no report", exc_info=True)


def _summary(record: Optimization) -> str | None:
    """One sentence about the result."""
    if record.best is None:
        return None
    text = f"Best score **{rounded(record.best)}**"
    if record.winner is not None:
        text += f" (trial {record.winner})"
    if record.baseline is not None:
        text += f", baseline {rounded(record.baseline)}"
    return f"{text}, {record.done or 0} trials. More in {REPORT}, under Artifacts."


# --- trials ---------------------------------------------------------------------------------------------------------


def _of_trial(record: Trial, versions: Mapping[str, str], user_run: str | None) -> list[Run]:
    key = trial_key(record.optimization, record.number)
    tags = {**_common(record, TRIAL, key, versions), **stored.trial_tags(record)}
    name = as_text(trial_name(record))
    params = stored.trial_params(record)
    run = Run(
        key,
        TRIAL,
        name=name,
        parent=record.optimization,
        user_run=user_run,
        started=milliseconds(record.started),
        tags=_tags(tags),
        params=_params(params),
    )
    if record.ended is None:
        return [run]
    when = milliseconds(record.ended)
    artifacts: dict[str, str] = {}
    if record.program is not None and record.program.state is not None:
        _put_program(TRIAL_PROGRAM, record.program, artifacts, tags)
        params = {**stored.program_params(record.program), **params}
    if record.changes is not None:
        artifacts[CHANGES] = record.changes
    status = _status(record.failure)
    tags.update(_numbers(dataclasses.replace(record.usage, by_role={}).flat()))
    results = {"score": readable(record.score), **_spent(record.usage)}
    over = dataclasses.replace(
        run,
        tags=_tags({**tags, TAG_NAME: name, TAG_NOTE: _note(status, record.failure, _sentence(record))}),
        params=_params(params),
        metrics=_points(results, when, record.number),
        datasets=()
        if record.dataset is None
        else (_dataset(record.program_name or record.optimizer or "", record.dataset),),
        artifacts=artifacts,
        status=status,
        ended=when,
    )
    return [over] if record.examples_so_far is None else [over, _curves(record, when)]


def _curves(record: Trial, when: int) -> Run:
    """A trial's points on the curves of its optimization, and the counts until then.

    Its score is on the curve if it is one on the validation set: others cannot be compared.
    """
    compared = record.kind in model.ON_VALIDATION
    values = {
        "score": readable(record.score) if compared else None,
        "best_score": readable(record.best),
        **_spent(record.spent),
    }
    numbers = {
        "examples_evaluated": record.examples_so_far,
        "accepted": record.accepted_so_far,
        "rejected": record.rejected_so_far,
        **record.spent.flat(),
    }
    return Run(record.optimization, COMPILE, tags=_numbers(numbers), metrics=_points(values, when, record.number))


def trial_name(record: Trial, winner: bool = False) -> str:
    """Number, verdict and score first, for MLflow's tables show ten characters; then kind, and step of the optimizer.

    Scores on parts of the validation set are left out: they cannot be compared with others.
    """
    mark = "★" if winner else None if record.accepted is None else _MARKS[record.accepted]
    compared = record.kind != semconv.TRIAL_MINIBATCH and record.failure is None
    parts = [str(record.number), mark, rounded(record.score) if compared else None, record.kind]
    name = " ".join(part for part in parts if part)
    chosen = [
        str(value) if part == "strategy" else f"{part} {value}"
        for part in _STEPS
        if (value := record.params.get(part)) is not None
    ]
    return ", ".join([name, *([" ".join(chosen)] if chosen else [])])


def _sentence(record: Trial) -> str | None:
    """What a trial was, as its run's description."""
    if record.score is None:
        return None
    parts = [f"{rounded(record.score)}{', best so far' if record.is_best else ''}"]
    changes = load_json(record.changes)
    if isinstance(changes, dict) and changes:
        parts.append("changed " + ", ".join(f"`{name}`" for name in changes))
    if record.made_from:
        several = "s" if len(record.made_from) > 1 else ""
        parts.append(f"made from trial{several} {', '.join(map(str, record.made_from))}")
    return "; ".join(parts)


def rounded(score: float | None) -> str | None:
    """A score for people: two digits after the point up to 1, else one."""
    if score is None:
        return None
    return f"{score:.2f}" if abs(score) <= 1 else f"{score:.1f}"


def readable(score: float | None) -> float | None:
    """A score as a metric for people: four digits after the point, or four that count."""
    if number(score) is None or score is None:
        return None
    return round(score, 4) if abs(score) >= 0.1 else float(f"{score:.4g}")


def _spent(usage: Usage) -> dict[str, float]:
    """The cost, or the tokens when there is no price: MLflow's table has a column for each name.

    What all came from a cache has neither, for a run whose other trials have a cost would have both columns.
    """
    if usage.cost:
        return {"cost": float(f"{usage.cost:.9g}")}  # sums of floating point go up and down in their last digits
    cached = bool(usage.lm_calls) and usage.cache_hits == usage.lm_calls
    return {"tokens": usage.tokens} if usage.tokens and not cached else {}


def _numbers(values: Mapping[str, Any]) -> dict[str, str]:
    """The tag with numbers that are no metrics."""
    known = {name: value for name, value in values.items() if number(value) is not None}
    return {TAG_NUMBERS: as_text(json.dumps(known))} if known else {}


# --- evaluations ----------------------------------------------------------------------------------------------------


def _of_evaluation(record: Evaluation, versions: Mapping[str, str], user_run: str | None) -> list[Run]:
    if not record.own:
        return [] if record.ended is None else [_of_trials_evaluation(record)]
    key, parent = evaluation_key(record.id), record.optimization
    if parent is not None and record.trial is not None:
        parent = trial_key(parent, record.trial)
    tags = {**_common(record, EVALUATION, key, versions), **stored.evaluation_tags(record)}
    run = Run(
        key,
        EVALUATION,
        name=as_text(f"Evaluate {record.program_name or ''}".rstrip()),
        parent=parent,
        user_run=user_run,
        started=milliseconds(record.started),
        tags=_tags(tags),
        params=_params(stored.evaluation_params(record)),
    )
    if record.ended is None:
        return [run]
    when = milliseconds(record.ended)
    artifacts: dict[str, str] = {}
    datasets: tuple[Dataset, ...] = ()
    _put_examples(record, artifacts, tags)
    if not _cut_short(record.failure):
        digest = stored.dataset_digest(record.examples)
        if digest is not None:
            columns = _columns_of_examples(record.examples)
            name = f"{(record.program_name or 'Evaluate').rpartition(' ')[2]} eval"
            datasets = (Dataset(name, digest, "eval", len(record.examples), columns),)
        if record.examples and all(example.inputs is None for example in record.examples):
            tags[TAG_CONTENT] = HOW_TO_GET_CONTENT
    status = _status(record.failure)
    tags[TAG_NOTE] = _note(status, record.failure)
    tags.update(_numbers(record.usage.flat()))
    results = {"score": readable(record.score), **_spent(record.usage)}
    return [
        dataclasses.replace(
            run,
            tags=_tags(tags),
            metrics=_points(results, when),
            datasets=datasets,
            artifacts=artifacts,
            status=status,
            ended=when,
        )
    ]


def _of_trials_evaluation(record: Evaluation) -> Run:
    """What an evaluation adds to the run of the trial that it is the evaluation of."""
    tags: dict[str, Any] = {}
    artifacts: dict[str, str] = {}
    _put_examples(record, artifacts, tags)
    key = trial_key(record.optimization or "", record.trial or 0)
    return Run(key, TRIAL, tags=_tags(tags), artifacts=artifacts)


def _put_examples(record: Evaluation, artifacts: dict[str, str], tags: dict[str, Any]) -> None:
    tags[TAG_FAILURES], tags[TAG_PARSE_FAILURES] = record.failures or None, record.parse_failures
    if not record.examples:
        return
    columns = stored.example_columns(record.examples)
    rows = (
        [
            value if column != "trace_id" or value is None else trace_id_of(value)
            for column in columns
            for value in (getattr(example, column),)
        ]
        for example in record.examples
    )
    artifacts[EVALUATION_TABLE] = table(columns, rows)
    _name_tables(artifacts, tags)
    if record.without_content:
        tags["dspy.evaluation_table"] = f"{record.without_content} rows without content (size)"


# --- parts ----------------------------------------------------------------------------------------------------------


def _common(
    record: Optimization | Trial | Evaluation, kind: str, key: str, versions: Mapping[str, str]
) -> dict[str, Any]:
    return {**versions, TAG_KIND: kind, TAG_KEY: key, "service.name": record.service}


def _cut_short(failure: Failure | None) -> bool:
    """Whether the program ended first, so that the results are not complete."""
    return failure is not None and failure.type is None


def _status(failure: Failure | None) -> str:
    return FINISHED if failure is None else KILLED if failure.interrupted else FAILED


def _note(status: str, failure: Failure | None, summary: str | None = None) -> str | None:
    """The description on top of a run's page: MLflow has no other place for the reason of a failure."""
    reason = None if failure is None else f"**{status}**: {failure}"
    return "\n\n".join(part for part in (reason, summary) if part) or None


def _put_program(path: str, program: Candidate, artifacts: dict[str, str], tags: dict[str, Any]) -> None:
    """Add a program. The name of an incomplete one says so, so that nobody loads it unaware."""
    if program.state is None:
        return
    if not program.complete:
        path = path.replace(".json", ".incomplete.json")
        tags["dspy.program.state"] = f"{path}: cut at a limit, or with parts masked or redacted"
    artifacts[path] = program.state


def _put_rows(dataset: model.Dataset, artifacts: dict[str, str], tags: dict[str, Any]) -> None:
    rows = dataset.rows
    if rows is None:
        return
    names = [name for name, _ in columns_of(rows)]
    artifacts[rows_path(dataset.role)] = table(names, ([row.get(name) for name in names] for row in rows))
    _name_tables(artifacts, tags)
    if len(rows) < dataset.size:
        tags[stored.dataset_tag(dataset.role)] = f"{len(rows)} of {dataset.size} (content limit)"


def rows_path(role: str) -> str:
    """The artifact with the rows of a dataset."""
    return f"{role}set.json"


def _name_tables(artifacts: Mapping[str, str], tags: dict[str, Any], more: Iterable[str] = ()) -> None:
    """Set the tag by which MLflow shows artifacts as tables."""
    tables = (rows_path(role) for role in ("train", "val"))
    paths = [*(path for path in (*tables, EVALUATION_TABLE, PHASE_TABLE) if path in artifacts), *more]
    tags[TAG_TABLES] = json.dumps([{"path": path, "type": "table"} for path in paths]) if paths else None


def _dataset(name: str, dataset: model.Dataset) -> Dataset:
    """A dataset input. DSPy's datasets are lists and have no name: they get the program's."""
    columns = () if dataset.text is None else _columns_of_text(dataset.text)
    return Dataset(
        f"{name.rpartition(' ')[2]} {dataset.role}", str(dataset.digest), dataset.role, dataset.size, columns
    )


@functools.lru_cache(maxsize=4)
def _columns_of_text(text: str) -> tuple[tuple[str, str], ...]:
    """Column types, cached: every trial on the validation set has the same rows."""
    loaded = load_json(text)
    return columns_of(row for row in loaded if isinstance(row, dict)) if isinstance(loaded, list) else ()


def _columns_of_examples(examples: Iterable[Example]) -> tuple[tuple[str, str], ...]:
    parts = (part for example in examples for part in (example.inputs, example.expected))
    return columns_of(part for part in parts if isinstance(part, dict))


def columns_of(rows: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Field names of dataset rows, with MLflow's types."""
    types = {bool: "boolean", int: "long", float: "double", str: "string"}
    found: dict[str, str] = {}
    for row in rows:
        for name, value in row.items():
            if name not in found:
                found[name] = types.get(type(value), "string")
    return tuple(found.items())


# --- MLflow's forms and limits --------------------------------------------------------------------------------------


def _tags(values: Mapping[str, Any]) -> dict[str, str]:
    """Tags that people look at or search by, and one with all others."""
    known = {key: as_text(value) for key, value in values.items() if value is not None}
    details = {key: text for key, text in known.items() if key in _DETAILS}
    found = {key[:MAX_KEY]: cut(text, MAX_TAG) for key, text in known.items() if key not in details}
    while details and len(text := as_text(details)) > MAX_TAG:  # a cut text would be no JSON any more
        del details[max(details, key=lambda key: len(details[key]))]
    return {**found, TAG_DETAILS: text} if details else found


def whole_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags of a run, those in its tag of all others among them."""
    details = load_json(tags.get(TAG_DETAILS))
    return {**(details if isinstance(details, dict) else {}), **tags}


def whole_metrics(tags: Mapping[str, str], metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a run, and the numbers that are none.

    Args:
        tags: as :func:`whole_tags` gives them.
        metrics: as MLflow has them.
    """
    numbers = load_json(tags.get(TAG_NUMBERS, tags.get(_OLDER_NUMBERS)))
    known = numbers.items() if isinstance(numbers, dict) else ()
    return {**{name: value for name, found in known if (value := number(found)) is not None}, **metrics}


def _params(values: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        if value is not None:
            found.setdefault(safe_key(key), cut(as_text(value), MAX_PARAM))
    return found


def _points(values: Mapping[str, Any], when: int, step: int = 0) -> tuple[Metric, ...]:
    """Values that are no number are left out: NaN and infinity cannot be sent as JSON."""
    found = ((key, number(value)) for key, value in values.items())
    return tuple(Metric(safe_key(key), value, when, step) for key, value in found if value is not None)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An artifact that MLflow shows as a table, in the form of its ``log_table``."""
    return strict_json({"columns": list(columns), "data": [list(row) for row in rows]})


def as_text(value: Any) -> str:
    """A value as a parameter or tag."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # MLflow refuses a request with a lone surrogate
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple, dict)):
        return as_text(json.dumps(value, ensure_ascii=False, default=str))
    return str(value)


def strict_json(value: Any) -> str:
    """JSON that browsers take too: without NaN and infinity."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and number(value) is None else value


def cut(text: str, limit: int) -> str:
    """At most ``limit`` characters; an ellipsis marks a cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def safe_key(key: str) -> str:
    """A name MLflow takes: letters, digits and ``_-. /:`` only."""
    return "".join(c if (c.isalnum() and c.isascii()) or c in "_-. /:" else "_" for c in key)[:MAX_KEY]


def milliseconds(nanoseconds: int | None) -> int:
    """OpenTelemetry's time as MLflow's; now, when it is not known."""
    return (time.time_ns() if nanoseconds is None else nanoseconds) // 1_000_000
