"""The report of an optimization from what MLflow has of it, also while it runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from dspy_otel import semconv
from dspy_otel.mlflow.base import ExportError
from dspy_otel.mlflow.exporter import MLflowSpanExporter
from dspy_otel.mlflow.wanted import (
    BEST_PROGRAM,
    CANDIDATE_TABLE,
    COMPILE,
    EVALUATION_TABLE,
    FINISHED,
    INITIAL_PROGRAM,
    PHASE_TABLE,
    TAG_KIND,
    TAG_NOTE,
    TAG_PARENT,
    TRIAL,
    TRIAL_PROGRAM,
    StoredRun,
)
from dspy_otel.mlflow.writer import RunStore
from dspy_otel.report import Report
from dspy_otel.report.collect import preview
from dspy_otel.report.model import RUNNING, Compared, Phase, Predictor, Trial, compare, number, predictors
from dspy_otel.report.page import MAX_CANDIDATES

_OUTCOMES: Final = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "interrupted"}
_USAGE: Final = ("lm_calls", "cache_hits", "input_tokens", "output_tokens", "cost", "unpriced_calls")


class Found(NamedTuple):
    """A report, and the run it is of."""

    report: Report
    run_id: str


def read_report(
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
    exporter = MLflowSpanExporter(tracking_uri, experiment="0" if run_id is not None else experiment)
    store = exporter.open_runs(threading.Event(), create=False)
    try:
        run = _find(store, run_id)
        condition = f"tags.`{TAG_PARENT}` = '{run.run_id}' AND tags.`{TAG_KIND}` = '{TRIAL}'"
        children = store.find_runs(None, condition, run.experiment_id)
        children.sort(key=lambda child: _whole(child, semconv.TRIAL_NUMBER))
        return Found(_Reader(store, run, children, exporter.server).report(), run.run_id)
    except ExportError:
        raise
    except Exception as error:
        if isinstance(error, LookupError):
            raise
        raise store.explain(error) from error
    finally:
        store.close()


def _find(store: RunStore, run_id: str | None) -> StoredRun:
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
    # Steps of other optimizations are in the reports of those.
    return max(runs, key=lambda run: (semconv.OPTIMIZER_PARENT_RUN_ID not in run.tags, run.started))


class _Reader:
    """Reads what belongs to one run."""

    def __init__(self, store: RunStore, run: StoredRun, children: Sequence[StoredRun], server: str | None) -> None:
        self._store, self._run, self._server = store, run, server
        self._children = {_whole(child, semconv.TRIAL_NUMBER): child for child in children}

    def report(self) -> Report:
        run, tags, metrics = self._run, self._run.tags, self._run.metrics
        trials = self._trials()
        winner = int(tags[semconv.OPTIMIZER_WINNER_TRIAL]) if semconv.OPTIMIZER_WINNER_TRIAL in tags else None
        programs = self._programs(trials)
        params = {name: value for name, value in run.params.items() if not name.startswith(("dataset.", "trials."))}
        note = tags.get(TAG_NOTE, "").partition("\n\n")[0]
        scores = [trial.best for trial in trials if trial.best is not None]
        baseline = next((trial.score for trial in trials if trial.kind == semconv.TRIAL_BASELINE), None)
        found = Report(
            optimizer=tags.get(semconv.OPTIMIZER_NAME, "optimizer"),
            program=tags.get(semconv.PROGRAM_NAME, "program"),
            run_id=tags.get(semconv.OPTIMIZER_RUN_ID),
            outcome=_OUTCOMES.get(run.status, RUNNING),
            reason=note.replace("**", "") if run.status in _OUTCOMES and run.status != FINISHED and note else None,
            started=run.started / 1000,
            ended=None if run.ended is None else run.ended / 1000,
            scale=tags.get(semconv.OPTIMIZER_SCORE_SCALE),
            baseline=number(metrics.get("baseline_score", baseline)),
            best=number(metrics.get("best_score", scores[-1] if scores else None)),
            gain=number(metrics.get("gain")),
            winner=winner,
            seed_id=tags.get(semconv.INITIAL_PROGRAM_ID),
            best_id=tags.get(semconv.PROGRAM_ID),
            params=params,
            datasets=self._datasets(),
            usage={name: value for name, value in metrics.items() if name.rpartition(".")[2] in _USAGE},
            counts=self._counts(),
            trials=trials,
            phases=self._phases(),
            programs=programs,
            compared=self._compared(trials, winner),
            content=bool(programs) or not trials,
            versions={
                name.removesuffix(".version"): value for name, value in tags.items() if name.endswith(".version")
            },
        )
        if self._server is not None:
            place = f"{self._server}/#/experiments/{run.experiment_id}"
            found.source = {trial: f"{place}/runs/{child.run_id}" for trial, child in self._children.items()}
            found.source = {**found.source, None: f"{place}/runs/{run.run_id}"}
            found.trace_url = place + "/traces?selectedEvaluationId={}"
        return found

    def _trials(self) -> list[Trial]:
        """From the table that is written at the end; before that, from the runs of the trials."""
        rows = _rows(self._read(self._run, CANDIDATE_TABLE))
        return [_of_row(row) for row in rows] if rows else [_of_run(child) for child in self._children.values()]

    def _phases(self) -> list[Phase]:
        found = []
        for row in _rows(self._read(self._run, PHASE_TABLE)):
            usage = {name: value for name in _USAGE if (value := number(row.get(name))) is not None}
            seconds = number(row.get("seconds")) or 0.0
            found.append(Phase(str(row.get("phase")), int(row.get("times") or 0), seconds, usage))
        return found

    def _programs(self, trials: Sequence[Trial]) -> dict[str, dict[str, Predictor]]:
        tags = self._run.tags
        wanted = [
            (tags.get(semconv.INITIAL_PROGRAM_ID), self._run, INITIAL_PROGRAM),
            (tags.get(semconv.PROGRAM_ID), self._run, BEST_PROGRAM),
        ]
        ranked = sorted(trials, key=lambda trial: (trial.kind == semconv.TRIAL_MINIBATCH, -(trial.score or 0)))
        for trial in ranked:
            child = self._children.get(trial.number)
            if child is not None:
                wanted.append((trial.candidate, child, TRIAL_PROGRAM))
        found: dict[str, dict[str, Predictor]] = {}
        for candidate, run, path in wanted:
            if candidate is None or candidate in found or len(found) > MAX_CANDIDATES + 1:
                continue
            text = self._read(run, path) or self._read(run, path.replace(".json", ".incomplete.json"))
            if text is not None:
                found[candidate] = predictors(text)
        return found

    def _compared(self, trials: Sequence[Trial], winner: int | None) -> list[Compared]:
        baseline = next((trial.number for trial in trials if trial.kind == semconv.TRIAL_BASELINE), None)
        if winner is None:  # so far
            best = [trial.number for trial in trials if trial.score is not None and trial.score == trial.best]
            winner = best[-1] if best else None
        if baseline is None or winner is None or baseline == winner:
            return []
        rows = [
            [{name: preview(value) for name, value in row.items()} for row in _rows(text)]
            for child in (self._children.get(baseline), self._children.get(winner))
            if child is not None and (text := self._read(child, EVALUATION_TABLE)) is not None
        ]
        return compare(*rows) if len(rows) == 2 else []

    def _datasets(self) -> list[tuple[str, int, str | None]]:
        sizes = (("train", "dataset.train.size"), ("validation", "dataset.val.size"))
        return [(role, int(self._run.params[name]), None) for role, name in sizes if name in self._run.params]

    def _counts(self) -> dict[str, int]:
        metrics, params = self._run.metrics, self._run.params
        found = {name: int(metrics[name]) for name in ("accepted", "rejected") if name in metrics}
        if "examples_evaluated" in metrics:
            found["examples"] = int(metrics["examples_evaluated"])
        if params.get("trials.planned", "").isdigit():
            found["planned"] = int(params["trials.planned"])
        return found

    def _read(self, run: StoredRun, path: str) -> str | None:
        return self._store.read_artifact(run.run_id, run.artifact_uri, path)


def _of_row(row: Mapping[str, Any]) -> Trial:
    chosen = row.get("params")
    return Trial(
        number=int(row["number"]),
        kind=str(row.get("kind") or ""),
        candidate=row.get("candidate"),
        parents=tuple(part for part in str(row.get("parents") or "").split(", ") if part),
        score=number(row.get("score")),
        best=number(row.get("best_score")),
        size=row.get("size"),
        accepted=row.get("accepted"),
        reason=row.get("reason"),
        before=number(row.get("score_before")),
        after=number(row.get("score_after")),
        on_front=row.get("on_pareto_front"),
        phase=row.get("phase"),
        params=json.loads(chosen) if isinstance(chosen, str) else {},
        usage=_known(lm_calls=row.get("lm_calls"), input_tokens=row.get("tokens"), cost=row.get("cost")),
        spent=_known(
            lm_calls=row.get("spent_lm_calls"), input_tokens=row.get("spent_tokens"), cost=row.get("spent_cost")
        ),
        error=row.get("error"),
    )


def _of_run(run: StoredRun) -> Trial:
    """What a trial's own run says: not what had been spent by then, and its choices among other parameters."""
    tags, params = run.tags, run.params
    parents = json.loads(tags.get(semconv.CANDIDATE_PARENT_IDS, "[]"))
    own = ("candidate", "parents", "examples", "num_threads", "score_before", "score_after")
    chosen = {
        name: value
        for name, value in params.items()
        if name not in own and not any(part in name for part in (".instructions", ".demos"))
    }
    return Trial(
        number=_whole(run, semconv.TRIAL_NUMBER),
        kind=tags.get(semconv.TRIAL_KIND, ""),
        candidate=tags.get(semconv.CANDIDATE_ID),
        parents=tuple(map(str, parents)),
        score=number(run.metrics.get("score")),
        best=number(run.metrics.get("best_score")),
        size=int(params["examples"]) if params.get("examples", "").isdigit() else None,
        accepted={"true": True, "false": False}.get(tags.get(semconv.TRIAL_ACCEPTED, "")),
        reason=tags.get(semconv.TRIAL_REASON),
        on_front={"true": True, "false": False}.get(tags.get(semconv.TRIAL_ON_PARETO_FRONT, "")),
        phase=tags.get(semconv.OPTIMIZER_PHASE),
        params=chosen,
        usage={name: run.metrics[name] for name in _USAGE if name in run.metrics},
        error="failed" if run.status == "FAILED" else None,
    )


def _rows(text: str | None) -> list[dict[str, Any]]:
    """Rows of a table as it is stored."""
    if text is None:
        return []
    table = json.loads(text)
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _known(**values: Any) -> dict[str, float]:
    return {name: found for name, value in values.items() if (found := number(value)) is not None}


def _whole(run: StoredRun, tag: str) -> int:
    value = run.tags.get(tag, "")
    return int(value) if value.isdigit() else 0
