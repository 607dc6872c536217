"""Read the record of an optimization from MLflow, also while it runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel.mlflow.backends import Backend, open_backend
from dspy_otel.mlflow.backends.base import MAX_READ, CreatedRun, unexpected
from dspy_otel.mlflow.retry import ExportError
from dspy_otel.mlflow.runs import (
    BEST_PROGRAM,
    CANDIDATE_TABLE,
    COMPILE,
    EVALUATION_TABLE,
    FAILED,
    FINISHED,
    INITIAL_PROGRAM,
    KILLED,
    PHASE_TABLE,
    TAG_KIND,
    TAG_NOTE,
    TAG_PARENT,
    TRACE_ID,
    TRIAL,
    TRIAL_PROGRAM,
    StoredRun,
    StoredTrace,
    rows_path,
)
from dspy_otel.mlflow.target import Target, public_uri, run_page
from dspy_otel.record import model, stored
from dspy_otel.record.addresses import Address
from dspy_otel.record.history import preview, scores_of
from dspy_otel.record.model import Candidate, Dataset, Example, Failure, Optimization, Trial
from dspy_otel.reports import Source
from dspy_otel.reports.lineage import ancestors, best_of, nodes
from dspy_otel.reports.programs import MAX_CANDIDATES, samples

MAX_TABLES: Final = 40
"""Most tables of examples that are read, of the best trials: each is a request to a server."""
_OUTCOMES: Final = {FINISHED: model.FINISHED, FAILED: model.FAILED, KILLED: model.INTERRUPTED}


@dataclass(frozen=True, slots=True)
class Found:
    """An optimization, the run it is of, and where that is."""

    optimization: Optimization
    run_id: str
    source: Source


def read_optimization(
    run_id: str | None = None, *, experiment: str | int | None = None, tracking_uri: str | None = None
) -> Found:
    """Read an optimization from MLflow.

    Args:
        run_id: its run, or the run of one of its trials. Without one: the newest optimization of the experiment.
        experiment: name or id; default as for :class:`~dspy_otel.mlflow.MLflowSpanExporter`.
        tracking_uri: likewise.

    Raises:
        LookupError: no such run, or one that is no optimization.
        ExportError: MLflow cannot be reached or opened, or has no such experiment.
    """
    named = None if experiment is None else str(experiment)
    target = Target(tracking_uri, "0" if run_id is not None else named, create=False)
    store = open_backend(target)
    try:
        run = _find(store, run_id)
        condition = f"tags.`{TAG_PARENT}` = '{run.run_id}' AND tags.`{TAG_KIND}` = '{TRIAL}'"
        children = store.find_runs(None, condition, run.experiment_id)
        children.sort(key=lambda child: stored.trial_number(child.tags))
        reader = _Reader(store, run, children)
        return Found(
            reader.optimization(), run.run_id, reader.source(public_uri(target.uri) if target.is_server else None)
        )
    except (ExportError, LookupError):
        raise
    except Exception as error:
        raise unexpected(error) from error
    finally:
        store.close()


def spans_of(store: Backend, traces: Sequence[StoredTrace]) -> Iterator[tuple[list[StoredTrace], list[ReadableSpan]]]:
    """Traces with their spans of programs, some traces at a time: all prompts come along, and can be let go.

    Raises:
        ExportError: MLflow cannot be asked.
    """
    for first in range(0, len(traces), MAX_READ):
        some = list(traces[first : first + MAX_READ])
        yield some, _spans_of(store, [trace.trace_id for trace in some])


def _spans_of(store: Backend, trace_ids: Sequence[str]) -> list[ReadableSpan]:
    """A server fails for all that are asked for when one has an integer of more than 64 bits."""
    try:
        return store.read_spans(trace_ids)
    except ExportError as error:
        if error.unavailable:
            raise
        return [] if len(trace_ids) == 1 else [span for each in trace_ids for span in _spans_of(store, [each])]


def _find(store: Backend, run_id: str | None) -> StoredRun:
    runs = store.find_runs(run_id, f"tags.`{TAG_KIND}` = '{COMPILE}'")
    if run_id is not None and runs and runs[0].tags.get(TAG_KIND) == TRIAL and TAG_PARENT in runs[0].tags:
        runs = store.find_runs(runs[0].tags[TAG_PARENT], "")
    if not runs and run_id is None:
        raise LookupError("There is no optimization in that experiment: is it another one (--experiment)?")
    if not runs:
        raise LookupError(f"There is no run {run_id}.")
    if runs[0].tags.get(TAG_KIND) != COMPILE:
        raise LookupError(f"Run {run_id} is no optimization that dspy-otel recorded.")
    if run_id is not None:
        return runs[0]
    # An optimization that is a step of another one is in the report of that one.
    return max(runs, key=lambda run: (stored.read_optimization(run.tags, {}, {}).parent is None, run.started))


class _Reader:
    """Reads what belongs to one run."""

    def __init__(self, store: Backend, run: StoredRun, children: Sequence[StoredRun]) -> None:
        self._store, self._run = store, run
        self._children = {stored.trial_number(child.tags): child for child in children}

    def optimization(self) -> Optimization:
        run = self._run
        found = stored.read_optimization(run.tags, run.params, run.metrics, self._trials())
        note = run.tags.get(TAG_NOTE, "").partition("\n\n")[0]
        failed = run.status in _OUTCOMES and run.status != FINISHED and note
        return dataclasses.replace(
            found,
            outcome=_OUTCOMES.get(run.status, model.RUNNING),
            failure=Failure(None, note.replace("**", "")) if failed else None,
            started=run.started * 1_000_000,
            ended=None if run.ended is None else run.ended * 1_000_000,
            phases=tuple(stored.read_phase_row(row) for row in _rows(self._read(run, PHASE_TABLE))),
            train=self._dataset(found.train),
            val=self._dataset(found.val),
            candidates=self._candidates(found),
            examples=self._examples(found),
        )

    def source(self, server: str | None) -> Source:
        """Where runs and traces are, for links to them."""
        versions = {
            name.removesuffix(".version"): value for name, value in self._run.tags.items() if name.endswith(".version")
        }
        if server is None:
            return Source(run=Address(self._run.run_id), trace_name=TRACE_ID, versions=versions)
        place = self._run.experiment_id
        return Source(
            run=Address(self._run.run_id, run_page(server, place, self._run.run_id)),
            tracking_uri=server,
            runs={trial: run_page(server, place, child.run_id) for trial, child in self._children.items()},
            trace_url=f"{server}/#/experiments/{place}/traces?selectedEvaluationId={{}}",
            trace_name=TRACE_ID,
            versions=versions,
        )

    def _dataset(self, dataset: Dataset | None) -> Dataset | None:
        """A dataset with its rows, as far as they were recorded."""
        if dataset is None:
            return None
        text = self._read(self._run, rows_path(dataset.role))
        rows = None if text is None else json.dumps(_rows(text), ensure_ascii=False)
        return dataclasses.replace(dataset, digest=self._run.digests.get(dataset.role), text=rows)

    def _trials(self) -> list[Trial]:
        """From the table that is written at the end; before that, from the runs of the trials."""
        rows = _rows(self._read(self._run, CANDIDATE_TABLE))
        if rows:
            return [self._timed(stored.read_trial_row(row)) for row in rows]
        trials, best = [], None
        for child in self._children.values():
            trial = stored.read_trial(child.tags, child.params, child.metrics, child.status == FAILED)
            best = trial.score if trial.is_best else best
            trials.append(self._timed(dataclasses.replace(trial, best=best)))
        return trials

    def _timed(self, trial: Trial) -> Trial:
        """A trial with the times of its run, which neither the table nor the run's values have."""
        child = self._children.get(trial.number)
        if child is None or child.ended is None:
            return trial
        return dataclasses.replace(trial, started=child.started * 1_000_000, ended=child.ended * 1_000_000)

    def _candidates(self, optimization: Optimization) -> dict[str, Candidate]:
        places = [
            (optimization.initial_id, self._run, INITIAL_PROGRAM),
            (optimization.returned_id, self._run, BEST_PROGRAM),
        ]
        lineage = ancestors(nodes(optimization), best_of(optimization))
        ranked = sorted(
            optimization.trials,
            key=lambda trial: (trial.candidate not in lineage, trial.kind == "minibatch", -(trial.score or 0)),
        )
        places += [
            (trial.candidate, self._children[trial.number], TRIAL_PROGRAM)
            for trial in ranked
            if trial.number in self._children
        ]
        found: dict[str, Candidate] = {}
        for candidate, run, path in places:
            if candidate is None or candidate in found or len(found) > MAX_CANDIDATES + 1:
                continue
            text = self._read(run, path)
            altered = text is None
            if text is None:
                text = self._read(run, path.replace(".json", ".incomplete.json"))
            if text is not None:
                found[candidate] = Candidate(candidate, text, altered)
        return found

    def _examples(self, optimization: Optimization) -> dict[int, tuple[Example, ...]]:
        """Of the baseline and of the winner, or of the best trial so far; and the scores of the others."""
        trials, winner = optimization.trials, optimization.winner
        baseline = next((trial.number for trial in trials if trial.kind == "baseline"), None)
        if winner is None:
            best = [trial.number for trial in trials if trial.score is not None and trial.score == trial.best]
            winner = best[-1] if best else None
        found = {}
        best_first = sorted(trials, key=lambda trial: -(trial.score or 0.0))
        others = [trial.number for trial in best_first if trial.kind == optimization.whole_kind][:MAX_TABLES]
        whole = (baseline, winner, *samples(optimization))
        for number in dict.fromkeys((*whole, *others)):
            child = None if number is None else self._children.get(number)
            text = None if child is None else self._read(child, EVALUATION_TABLE)
            if number is not None and text is not None:
                examples = read_examples(text)
                found[number] = examples if number in whole else scores_of(examples)
        return found

    def _read(self, run: StoredRun, path: str) -> str | None:
        return self._store.read_artifact(CreatedRun(run.run_id, run.artifact_uri), path)


def read_examples(text: str | None) -> tuple[Example, ...]:
    """The examples of a table of an evaluation, shortened."""
    return tuple(_example(row) for row in _rows(text))


def _example(row: dict[str, Any]) -> Example:
    trace_id = str(row.get("trace_id") or "").removeprefix(TRACE_ID.replace("{}", ""))
    try:
        row["trace_id"] = int(trace_id, 16)
    except ValueError:
        row["trace_id"] = None
    return preview(stored.read_example_row(row))


def _rows(text: str | None) -> list[dict[str, Any]]:
    """Rows of a table as it is stored."""
    if text is None:
        return []
    table = json.loads(text)
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
