"""What is compared, from MLflow: a server, or a SQL store in this process."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from dspy_otel import semconv
from dspy_otel.decide.errors import CannotCompareError
from dspy_otel.decide.overview import EVALUATION as OF_EVALUATION
from dspy_otel.decide.overview import OPTIMIZATION as OF_OPTIMIZATION
from dspy_otel.decide.overview import Summary
from dspy_otel.decide.results import (
    BASELINE,
    BEST,
    UNNAMED,
    Results,
    Row,
    merged,
    of_calls,
    read_spans,
    title_of,
)
from dspy_otel.mlflow.backends import Backend, open_backend
from dspy_otel.mlflow.backends.base import CreatedRun
from dspy_otel.mlflow.load import rank
from dspy_otel.mlflow.read import read_examples, spans_of
from dspy_otel.mlflow.retry import ExportError
from dspy_otel.mlflow.runs import (
    BEST_PROGRAM,
    COMPILE,
    EVALUATION,
    EVALUATION_TABLE,
    INITIAL_PROGRAM,
    TAG_KIND,
    TAG_PARENT,
    TAG_PARSE_FAILURES,
    TAG_WINNER,
    TRACE_ID,
    TRIAL,
    TRIAL_PROGRAM,
    StoredRun,
    StoredTrace,
)
from dspy_otel.mlflow.target import Target
from dspy_otel.record import model, stored
from dspy_otel.record.model import Candidate, Evaluation, Failure, Usage

_RUN: Final = re.compile(r"[0-9a-f]{32}")
_PROGRAM: Final = re.compile(r"[0-9a-f]{16}")
_OUTCOMES: Final = {"FINISHED": model.FINISHED, "FAILED": model.FAILED, "KILLED": model.INTERRUPTED}
_MODEL: Final = ".model"
_MODELS: Final = tuple(f"{role}{_MODEL}" for role in (semconv.ROLE_TASK, semconv.ROLE_JUDGE))
"""Parameters with the models that answer in an evaluation; other roles are the optimizer's."""


def find_stored(
    name: str, place: str, part: str | None, experiment: str | None, tracking_uri: str | None
) -> list[Results]:
    """Find results in MLflow; of a program, those in production and those of evaluations.

    Args:
        name: as the user named them.
        place: id of a run, name of an experiment, or a ``dspy.program.id``.
        part: ``baseline``, ``best`` or a trial's number, or a ``dspy.program.id`` in an experiment; None for the best.
        experiment: for a program's id alone; None for what the environment names.
        tracking_uri: as for :class:`~dspy_otel.mlflow.MLflowSpanExporter`.

    Raises:
        CannotCompareError: they are not there, or MLflow cannot be reached.
    """
    if _RUN.fullmatch(place):
        with opened(tracking_uri, "0") as store:
            return [_Reader(store, name).of_run(place, part)]
    if part is None and _PROGRAM.fullmatch(place):
        with opened(tracking_uri, experiment) as store:
            return _Reader(store, name).of_program(place)
    with opened(tracking_uri, place) as store:
        reader = _Reader(store, name)
        if part is not None and _PROGRAM.fullmatch(part):
            return reader.of_program(part)
        return [reader.best(part)]


def stored_summaries(experiment: str | None, tracking_uri: str | None, run_id: str | None = None) -> list[Summary]:
    """The optimizations and evaluations of an experiment, or the one of a run.

    Raises:
        CannotCompareError: MLflow cannot be reached or opened, has no such experiment or run, or that is neither.
    """
    with opened(tracking_uri, "0" if run_id is not None else experiment) as store:
        if run_id is not None:
            reader = _Reader(store, run_id)
            run = reader.top(run_id)
            return [_summary(run)]
        compiles = [run for run in store.find_runs(None, kind_is(COMPILE)) if not _is_step(run)]
        return [_summary(run) for run in (*compiles, *_evaluations(store))]


def _evaluations(store: Backend, condition: str = "") -> list[StoredRun]:
    """The runs of evaluations, without those that an optimization makes, as its metric may."""
    found = store.find_runs(None, " AND ".join(filter(None, (kind_is(EVALUATION), condition))))
    return [run for run in found if semconv.OPTIMIZER_RUN_ID not in run.tags]


def _summary(run: StoredRun) -> Summary:
    models = {name.removesuffix(_MODEL): value for name, value in run.params.items() if name.endswith(_MODEL)}
    common: dict[str, Any] = {
        "outcome": _OUTCOMES.get(run.status, model.RUNNING),
        "models": {role: tuple(names.split(", ")) for role, names in models.items()},
        "usage": Usage.of(run.metrics),
        "started": run.started * 1_000_000,
        "program": run.tags.get(semconv.PROGRAM_ID),
    }
    if run.tags.get(TAG_KIND) == EVALUATION:
        size = run.params.get("examples", "")
        return Summary(
            run.run_id,
            OF_EVALUATION,
            f"evaluation of {run.tags.get(semconv.PROGRAM_NAME, 'a program')}",
            metric=run.params.get("metric", UNNAMED),
            digest=run.digests.get("eval"),
            size=int(size) if size.isdigit() else None,
            best=run.metrics.get("score"),
            **common,
        )
    record = stored.read_optimization(run.tags, run.params, run.metrics)
    dataset = record.val or record.train
    return Summary(
        run.run_id,
        OF_OPTIMIZATION,
        title_of(record),
        metric=record.metric or UNNAMED,
        digest=None if dataset is None else run.digests.get(dataset.role),
        size=None if dataset is None else dataset.size,
        baseline=record.baseline,
        best=record.best,
        trials=record.done,
        **common,
    )


@contextmanager
def opened(tracking_uri: str | None, experiment: str | None) -> Iterator[Backend]:
    """MLflow, opened for reading.

    Raises:
        CannotCompareError: it cannot be opened or reached, or has no such experiment.
    """
    store = None
    try:
        store = open_backend(Target(tracking_uri, experiment, create=False))
        yield store
    except ExportError as error:
        raise CannotCompareError(str(error)) from error
    finally:
        if store is not None:
            store.close()


def kind_is(kind: str) -> str:
    """A search condition for runs of a kind."""
    return f"tags.`{TAG_KIND}` = '{kind}'"


class _Reader:
    """Reads results from one store."""

    def __init__(self, store: Backend, name: str) -> None:
        self._store, self._name = store, name

    # --- what is meant ----------------------------------------------------------------------------------------------
    def of_run(self, run_id: str, part: str | None) -> Results:
        run = self._run(run_id)
        kind = run.tags.get(TAG_KIND)
        if kind == TRIAL and part is None:
            return self._of_trial(run, self._parent(run))
        if kind == TRIAL:
            run, kind = self._parent(run) or run, COMPILE
        if kind == COMPILE:
            return self._of_optimization(run, part or BEST)
        if kind == EVALUATION and part is None:
            return self._of_evaluations([run], None)
        if kind == EVALUATION:
            raise CannotCompareError(f"{self._name}: an evaluation has no part {part!r}.")
        raise CannotCompareError(f"Run {run_id} is no optimization, trial or evaluation that dspy-otel recorded.")

    def top(self, run_id: str) -> StoredRun:
        """The run of an optimization or an evaluation, by its id or that of one of its trials."""
        run = self._run(run_id)
        if run.tags.get(TAG_KIND) == TRIAL:
            run = self._parent(run) or run
        if run.tags.get(TAG_KIND) not in (COMPILE, EVALUATION):
            raise CannotCompareError(f"Run {run_id} is no optimization or evaluation that dspy-otel recorded.")
        return run

    def best(self, part: str | None) -> Results:
        finished = f"{kind_is(COMPILE)} AND attributes.status = 'FINISHED'"
        runs = [run for run in self._store.find_runs(None, finished) if not _is_step(run)]
        if runs:
            return self._of_optimization(max(runs, key=rank), part or BEST)
        if part is not None:
            raise CannotCompareError(f"{self._name}: that experiment has no finished optimization.")
        runs = _evaluations(self._store)
        if not runs:
            raise CannotCompareError(f"{self._name}: that experiment has no optimization and no evaluation.")
        best = max(runs, key=lambda run: (run.metrics.get("score", -math.inf), run.started))
        return self._of_evaluations([best], None)

    def of_program(self, program: str) -> list[Results]:
        tagged = self._store.find_traces(f"tags.`{semconv.PROGRAM_ID}` = '{program}'")
        calls = [one for one in tagged if not {semconv.EVALUATION_ID, semconv.OPTIMIZER_RUN_ID} & one.tags.keys()]
        # A trace that begins with a request has no tags of ours. To list all is far cheaper than to search spans.
        others = [one for one in self._store.find_traces("") if semconv.PROGRAM_NAME not in one.tags]
        answers = self._of_calls(program, [*calls, *others], None if others else len(calls))
        found = [] if answers is None else [answers]
        runs = _evaluations(self._store, f"tags.`{semconv.PROGRAM_ID}` = '{program}'")
        try:
            found += [self._of_evaluations(runs, program)] if runs else []
        except CannotCompareError:
            if not found:
                raise
        if found:
            return found
        if calls:
            raise CannotCompareError(f"{self._name}: none of the {len(calls):,} answers of that program has a score.")
        raise CannotCompareError(f"{self._name}: that experiment has no answers and no evaluations of that program.")

    def _run(self, run_id: str) -> StoredRun:
        runs = self._store.find_runs(run_id, "")
        if not runs:
            raise CannotCompareError(f"There is no run {run_id}: is MLFLOW_TRACKING_URI right?")
        return runs[0]

    def _parent(self, run: StoredRun) -> StoredRun | None:
        return self._run(run.tags[TAG_PARENT]) if TAG_PARENT in run.tags else None

    # --- reading ----------------------------------------------------------------------------------------------------
    def _of_optimization(self, run: StoredRun, which: str) -> Results:
        condition = f"tags.`{TAG_PARENT}` = '{run.run_id}' AND {kind_is(TRIAL)}"
        trials = self._store.find_runs(None, condition, run.experiment_id)
        trials.sort(key=lambda one: stored.trial_number(one.tags))
        if which == BASELINE:
            chosen = [one for one in trials if one.tags.get(semconv.TRIAL_KIND) == semconv.TRIAL_BASELINE]
        elif which == BEST:
            chosen = [one for one in trials if one.tags.get(TAG_WINNER) == "true"]
            chosen = chosen or [one for one in trials if one.tags.get(semconv.TRIAL_IS_BEST) == "true"][-1:]
        else:
            chosen = [one for one in trials if str(stored.trial_number(one.tags)) == which]
        if not chosen:
            raise CannotCompareError(f"{self._name}: {_title(run)} has no trial that is {which!r}.")
        return self._of_trial(chosen[0], run)

    def _of_trial(self, run: StoredRun, parent: StoredRun | None) -> Results:
        kind = BASELINE if run.tags.get(semconv.TRIAL_KIND) == semconv.TRIAL_BASELINE else None
        kind = "winner" if run.tags.get(TAG_WINNER) == "true" else kind
        title = f"trial {stored.trial_number(run.tags)}" + (f" ({kind})" if kind else "")
        if parent is not None:
            title = f"{_title(parent)}, {title}"
        evaluation = self._evaluation(run, parent)
        if not evaluation.examples:
            raise CannotCompareError(
                f"{self._name}: the examples of {title} were not recorded (OTEL_DSPY_OPTIMIZATION_TRACES)."
            )
        return self._with_traces(merged(self._name, title, [evaluation]), [run])

    def _of_evaluations(self, runs: Sequence[StoredRun], program: str | None) -> Results:
        found = [self._evaluation(run, None) for run in sorted(runs, key=lambda run: run.started)]
        several = "evaluation" if len(found) == 1 else f"{len(found)} evaluations"
        title = f"{several} of {found[-1].program_name or program or 'a program'}"
        if not any(one.examples for one in found):
            raise CannotCompareError(f"{self._name}: the examples of the {title} were not recorded.")
        return self._with_traces(merged(self._name, title, found), runs)

    def _evaluation(self, run: StoredRun, parent: StoredRun | None) -> Evaluation:
        """The evaluation that a run has."""
        metric = run.tags.get(semconv.EVALUATION_METRIC_NAME) or run.params.get("metric")
        size, failures = run.params.get("examples", ""), run.tags.get(TAG_PARSE_FAILURES, "")
        return Evaluation(
            id=run.tags.get(semconv.EVALUATION_ID, run.run_id),
            program_name=run.tags.get(semconv.PROGRAM_NAME),
            program_id=run.tags.get(semconv.CANDIDATE_ID) or run.tags.get(semconv.PROGRAM_ID),
            metric=metric if parent is None else parent.params.get("metric", metric),
            size=int(size) if size.isdigit() else None,
            parse_failures=int(failures) if failures.isdigit() else None,
            usage=Usage.of(run.metrics),
            models=_models(run.params if parent is None else parent.params),
            examples=read_examples(self._read(run, EVALUATION_TABLE)),
            started=run.started * 1_000_000,
            failure=None if run.status == "FINISHED" else Failure(None),
        )

    def _with_traces(self, results: Results, runs: Sequence[StoredRun]) -> Results:
        """Add what the traces of the examples know: durations, and scores by other metrics and of people."""
        traces: dict[str, StoredTrace] = {}
        for run in runs:
            if semconv.EVALUATION_ID in run.tags:
                condition = f"tags.`{semconv.EVALUATION_ID}` = '{run.tags[semconv.EVALUATION_ID]}'"
                traces.update((one.trace_id, one) for one in self._store.find_traces(condition, run.experiment_id))
        # Several examples in one trace (nested traces) have no duration and no scores of their own.
        counts = Counter(row.example.trace_id for row in results.rows)
        rows = []
        for row in results.rows:
            trace = None
            if row.example.trace_id is not None and counts[row.example.trace_id] == 1:
                trace = traces.get(TRACE_ID.replace("{}", f"{row.example.trace_id:032x}"))
            if trace is not None:
                example = dataclasses.replace(row.example, seconds=trace.seconds)
                row = Row(row.key, {**trace.scores, **row.scores}, example)  # noqa: PLW2901
            rows.append(row)
        program = results.program
        if program is not None:
            program = self._program(program.id, runs)
        judged = dict.fromkeys(metric for row in rows for metric in row.scores if metric not in results.metrics)
        return dataclasses.replace(
            results,
            rows=tuple(rows),
            metrics=(*results.metrics, *judged),
            judged=tuple(judged),
            program=program,
            run_id=runs[0].run_id if len(runs) == 1 else None,
        )

    def _of_calls(self, program: str, traces: Sequence[StoredTrace], total: int | None) -> Results | None:
        """Answers in production that have a score, of so many; None without any."""
        judged = [trace for trace in traces if trace.scores]
        judgements = [one for trace in judged for one in trace.judgements]
        recorded = read_spans((span for _, spans in spans_of(self._store, judged) for span in spans), judgements)
        found = of_calls(recorded, self._name, program, total)
        known = None if found is None else self._program(program, ())
        if found is None or known is None or known.state is None:
            return found
        return dataclasses.replace(found, program=known)

    def _program(self, program: str, runs: Sequence[StoredRun]) -> Candidate:
        """A program, with its state if some run has that."""
        made = f"tags.`{semconv.PROGRAM_ID}` = '{program}'"
        began = f"tags.`{semconv.INITIAL_PROGRAM_ID}` = '{program}'"
        experiment = runs[0].experiment_id if runs else None
        places: Iterator[tuple[StoredRun, str]] = (
            place
            for condition, path in (
                (f"{made} AND {kind_is(TRIAL)}", TRIAL_PROGRAM),
                (f"{made} AND {kind_is(COMPILE)}", BEST_PROGRAM),
                (f"{began} AND {kind_is(COMPILE)}", INITIAL_PROGRAM),
            )
            for place in ((run, path) for run in self._store.find_runs(None, condition, experiment)[:1])
        )
        for run, path in places:
            if (state := self._read(run, path)) is not None:
                return Candidate(program, state)
        return Candidate(program)

    def _read(self, run: StoredRun, path: str) -> str | None:
        return self._store.read_artifact(CreatedRun(run.run_id, run.artifact_uri), path)


def _title(run: StoredRun) -> str:
    return title_of(stored.read_optimization(run.tags, {}, {}))


def _is_step(run: StoredRun) -> bool:
    return semconv.OPTIMIZER_PARENT_RUN_ID in run.tags


def _models(params: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {name.removesuffix(_MODEL): tuple(params[name].split(", ")) for name in _MODELS if name in params}
