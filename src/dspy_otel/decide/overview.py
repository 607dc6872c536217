"""What was optimized and evaluated, by dataset and metric: only what can be compared stands together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from dspy_otel.decide.errors import CannotCompareError
from dspy_otel.decide.results import UNNAMED, Recorded, Results, title_of
from dspy_otel.record.model import FAILED, FINISHED, Evaluation, Example, Optimization, Usage
from dspy_otel.record.stored import dataset_digest

OPTIMIZATION: Final = "optimization"
EVALUATION: Final = "evaluation"
PASSED: Final = 0.5
"""Score from which an example counts as passed; below, as failed."""
MAX_RUNS: Final = 20
"""Most runs of a group whose examples are read, the newest."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One optimization or evaluation.

    Attributes:
        id: MLflow's run, or the id in a file.
        kind: ``optimization`` or ``evaluation``.
        title: for people.
        outcome: ``finished``, ``failed``, ``interrupted`` or ``running``.
        metric: its name.
        digest, size: of the examples that it was scored on.
        baseline, best: scores; an evaluation has the best alone.
        trials: of an optimization.
        usage: of all LM calls.
        models: that answered, by role.
        program: ``dspy.program.id`` of the winner, or of the program that was evaluated.
        started: nanoseconds since 1970.
    """

    id: str
    kind: str
    title: str
    outcome: str = FINISHED
    metric: str = UNNAMED
    digest: str | None = None
    size: int | None = None
    baseline: float | None = None
    best: float | None = None
    trials: int | None = None
    usage: Usage = Usage()
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    program: str | None = None
    started: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """What was scored with one metric on the same examples, the newest first.

    Attributes:
        metric: its name.
        digest, size: of the examples; without a digest, nothing is known to be the same.
        runs: all of that.
        examples: those that fail in every run or in some, where they were asked for.
    """

    metric: str
    digest: str | None
    size: int | None
    runs: tuple[Summary, ...]
    examples: Examples | None = None


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The scores of one example.

    Attributes:
        key: id of the example, or its place.
        example: one of the answers to it.
        scores: by run, in the order of :attr:`Examples.runs`; None where the run does not have it.
    """

    key: str | int
    example: Example
    scores: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Examples:
    """Which examples fail.

    Attributes:
        runs: that have recorded examples, the oldest first.
        failing: examples below ``PASSED`` in every one of several runs.
        flipping: examples that pass in some and fail in others.
    """

    runs: tuple[Summary, ...]
    failing: tuple[Outcomes, ...]
    flipping: tuple[Outcomes, ...]


def summaries(recorded: Recorded) -> list[Summary]:
    """What spans have: optimizations, and evaluations outside of them."""
    of = [_of_optimization(one) for one in recorded.optimizations if one.parent is None]
    return [*of, *(_of_evaluation(one) for one in recorded.evaluations if one.own and one.optimization is None)]


def _of_optimization(record: Optimization) -> Summary:
    dataset = record.val or record.train
    return Summary(
        record.id,
        OPTIMIZATION,
        title_of(record),
        record.outcome,
        record.metric or UNNAMED,
        None if dataset is None else dataset.digest,
        None if dataset is None else dataset.size,
        record.baseline,
        record.best,
        len(record.trials),
        record.usage,
        record.models,
        record.returned_id,
        record.started or 0,
    )


def _of_evaluation(record: Evaluation) -> Summary:
    return Summary(
        record.id,
        EVALUATION,
        f"evaluation of {record.program_name or 'a program'}",
        FINISHED if record.failure is None else FAILED,
        record.metric or UNNAMED,
        dataset_digest(record.examples),
        record.size,
        best=record.score,
        usage=record.usage,
        models=record.models,
        program=record.program_id,
        started=record.started or 0,
    )


def grouped(found: Iterable[Summary]) -> list[Group]:
    """Groups, that with the newest run first. What has no digest stands alone."""
    groups: dict[tuple[str, str], list[Summary]] = {}
    for one in sorted(found, key=lambda one: one.started, reverse=True):
        groups.setdefault((one.metric, one.digest or f"?{one.id}"), []).append(one)
    return [Group(runs[0].metric, runs[0].digest, runs[0].size, tuple(runs)) for runs in groups.values()]


def with_examples(group: Group, results_of: Callable[[Summary], Results]) -> Group:
    """Add which examples fail.

    Args:
        group: of runs.
        results_of: reads the results of a run, of an optimization's winner; it may raise ``CannotCompareError``.
    """
    runs: list[Summary] = []
    found: list[tuple[dict[str | int, float], dict[str | int, Example]]] = []
    for run in reversed(group.runs[:MAX_RUNS]):
        try:
            results = results_of(run)
        except CannotCompareError:
            continue  # its examples were not recorded
        runs.append(run)
        found.append(_scores(results, group.metric))
    keys = dict.fromkeys(key for scores, _ in found for key in scores)
    outcomes = []
    for key in keys:
        example = next(examples[key] for _, examples in found if key in examples)
        outcomes.append(Outcomes(key, example, tuple(scores.get(key) for scores, _ in found)))
    several = [one for one in outcomes if len(_known(one)) > 1]
    failing = tuple(one for one in several if max(_known(one)) < PASSED)
    flipping = tuple(one for one in several if min(_known(one)) < PASSED <= max(_known(one)))
    return dataclasses.replace(group, examples=Examples(tuple(runs), failing, flipping))


def _known(outcomes: Outcomes) -> Sequence[float]:
    return [score for score in outcomes.scores if score is not None]


def _scores(results: Results, metric: str) -> tuple[dict[str | int, float], dict[str | int, Example]]:
    """Mean scores of the repeats of each example; a failed answer counts as 0."""
    values: dict[str | int, list[float]] = {}
    examples: dict[str | int, Example] = {}
    for row in results.rows:
        score = row.scores.get(metric)
        if score is None and row.example.error is not None:
            score = 0.0
        if score is not None and row.key is not None:
            values.setdefault(row.key, []).append(score)
            examples.setdefault(row.key, row.example)
    return {key: sum(scores) / len(scores) for key, scores in values.items()}, examples
