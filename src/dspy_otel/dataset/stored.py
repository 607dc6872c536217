"""Answers from MLflow: a server, or a SQL store in this process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dspy_otel import semconv
from dspy_otel.dataset.errors import NoExamplesError
from dspy_otel.mlflow.backends import Backend, open_backend
from dspy_otel.mlflow.backends.base import MAX_TRACES, trace_number
from dspy_otel.mlflow.read import spans_of
from dspy_otel.mlflow.retry import ExportError
from dspy_otel.mlflow.runs import COMPILE, TAG_KIND, StoredTrace
from dspy_otel.mlflow.target import Target
from dspy_otel.record.answers import read_answers
from dspy_otel.record.model import Answer

_RUN: Final = re.compile(r"[0-9a-f]{32}")
_PROGRAM: Final = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Period:
    """A part of time, in milliseconds since 1970: from the first, up to the second and without it."""

    since: int | None = None
    until: int | None = None

    def condition(self) -> str:
        """As MLflow searches traces by it."""
        parts = [] if self.since is None else [f"attributes.timestamp_ms >= {self.since}"]
        # A request may begin well before its program does; answers are compared with the period themselves.
        parts += [] if self.until is None else [f"attributes.timestamp_ms < {self.until}"]
        return " AND ".join(parts)


def find_answers(
    place: str | None, part: str | None, period: Period, evaluations: bool, experiment: str | None, uri: str | None
) -> list[Answer]:
    """Find answers in MLflow.

    Args:
        place: id of a run of an evaluation or a trial, name of an experiment, or a ``dspy.program.id``; None for the
            experiment.
        part: a ``dspy.program.id`` in an experiment.
        period: traces that began then.
        evaluations: also examples of evaluations outside of optimizations.
        experiment: for a program's id alone, or None; None for what the environment names.
        uri: as for :class:`~dspy_otel.mlflow.MLflowSpanExporter`.

    Raises:
        NoExamplesError: MLflow cannot be reached or opened, or has no such experiment or run.
    """
    named = place is not None and _RUN.fullmatch(place) is None and _PROGRAM.fullmatch(place) is None
    program = part or (place if place is not None and _PROGRAM.fullmatch(place) else None)
    store = None
    try:
        if place is not None and _RUN.fullmatch(place):
            store = open_backend(Target(uri, "0", create=False))
            return _of_run(store, place)
        store = open_backend(Target(uri, place if named else experiment, create=False))
        traces = store.find_traces(period.condition())
        if len(traces) >= MAX_TRACES:
            raise NoExamplesError(f"There are more than {MAX_TRACES:,} traces: choose a time with since and until.")
        found = _read(store, [trace for trace in traces if _is_candidate(trace, program, evaluations)])
        return [one for one in found if program in (None, one.program)]
    except ExportError as error:
        raise NoExamplesError(str(error)) from error
    finally:
        if store is not None:
            store.close()


def _is_candidate(trace: StoredTrace, program: str | None, evaluations: bool) -> bool:
    """Whether a trace may have such answers, by its tags; one that began with a request has none of ours."""
    if semconv.OPTIMIZER_RUN_ID in trace.tags or (semconv.EVALUATION_ID in trace.tags and not evaluations):
        return False
    return program is None or trace.tags.get(semconv.PROGRAM_ID, program) == program


def _of_run(store: Backend, run_id: str) -> list[Answer]:
    runs = store.find_runs(run_id, "")
    if not runs:
        raise NoExamplesError(f"There is no run {run_id}: is MLFLOW_TRACKING_URI right?")
    run = runs[0]
    evaluation = run.tags.get(semconv.EVALUATION_ID)
    if run.tags.get(TAG_KIND) == COMPILE or evaluation is None:
        raise NoExamplesError(f"Run {run_id} is no evaluation and no trial: name one of those, or an experiment.")
    return _read(store, store.find_traces(f"tags.`{semconv.EVALUATION_ID}` = '{evaluation}'", run.experiment_id))


def _read(store: Backend, traces: Sequence[StoredTrace]) -> list[Answer]:
    """The answers in traces."""
    found: list[Answer] = []
    for some, spans in spans_of(store, traces):
        judgements = [one for trace in some for one in trace.judgements]
        answers = read_answers(spans, judgements)
        found += answers
        read = {answer.trace_id for answer in answers}
        found += [_unread(trace) for trace in some if _has_answer(trace) and trace_number(trace.trace_id) not in read]
    return found


def _has_answer(trace: StoredTrace) -> bool:
    """Whether a trace is that of one answer, by its tags."""
    tags = trace.tags
    return semconv.PROGRAM_NAME in tags and (semconv.EVALUATION_ID not in tags or semconv.EXAMPLE_INDEX in tags)


def _unread(trace: StoredTrace) -> Answer:
    """An answer by what its trace alone says, whose spans MLflow did not give: some have not arrived."""
    return Answer(
        program=trace.tags.get(semconv.PROGRAM_ID),
        program_name=trace.tags.get(semconv.PROGRAM_NAME),
        evaluation=trace.tags.get(semconv.EVALUATION_ID),
        trace_id=trace_number(trace.trace_id),
        started=trace.started * 1_000_000,
    )
