"""Records as a backend keeps them, and back: tags, parameters, metrics and rows of tables, all by name.

A tag has the name of the attribute that it comes from. The caller leaves out values that are None. Both directions
are here, so that they agree; each backend decides how it writes a value as text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from dspy_otel import semconv
from dspy_otel.record.model import (
    RUNNING,
    Candidate,
    Dataset,
    Evaluation,
    Example,
    Failure,
    Optimization,
    Phase,
    Trial,
    Usage,
    number,
)

Values = dict[str, Any]

TRIAL_COLUMNS: Final = (
    *("number", "kind", "candidate", "parents", "score", "best_score", "accepted", "on_pareto_front"),
    "reported_score",
    *("reason", "phase", "size", "score_before", "score_after", "params", "changes", "error"),
    *("lm_calls", "tokens", "cost", "spent_lm_calls", "spent_tokens", "spent_cost"),
)
PHASE_COLUMNS: Final = ("phase", "times", "seconds", "lm_calls", "cache_hits", "input_tokens", "output_tokens", "cost")
_CONTENT_COLUMNS: Final = ("inputs", "expected", "prediction")
_SHOWN_DEMOS: Final = 8
_OWN_PARAMS: Final = frozenset({"candidate", "parents", "examples", "num_threads", "score_before", "score_after"})
_DATASET_PARAMS: Final = {role: f"dataset.{role}.size" for role in ("train", "val")}
_PLANNED: Final = "trials.planned"


# --- records to names and values ------------------------------------------------------------------------------------


def optimization_tags(record: Optimization) -> Values:
    """What identifies an optimization and its result."""
    return {
        semconv.OPTIMIZER_NAME: record.optimizer,
        semconv.OPTIMIZER_RUN_ID: record.id,
        semconv.OPTIMIZER_PARENT_RUN_ID: record.parent,
        semconv.OPTIMIZER_ROOT_RUN_ID: record.root,
        semconv.OPTIMIZER_INFERENCE_TIME: record.inference_time,
        semconv.OPTIMIZER_OUTCOME: None if record.outcome == RUNNING else record.outcome,
        semconv.OPTIMIZER_SCORE_SCALE: record.scale,
        semconv.OPTIMIZER_WINNER_TRIAL: record.winner,
        semconv.PROGRAM_NAME: record.program_name,
        semconv.PROGRAM_ID: record.returned_id,
        semconv.INITIAL_PROGRAM_ID: record.initial_id,
    }


def optimization_params(record: Optimization) -> Values:
    """Settings of an optimization: its optimizer's, sizes of datasets, and models."""
    return {
        **record.params,
        **{_DATASET_PARAMS[dataset.role]: dataset.size for dataset in record.datasets},
        _PLANNED: record.planned,
        **model_params(record.models),
    }


def optimization_metrics(record: Optimization) -> Values:
    """Results of an optimization, without its usage."""
    return {
        "baseline_score": record.baseline,
        "best_score": record.best,
        "gain": record.gain,
        "trials": record.done,
        "accepted": record.accepted,
        "rejected": record.rejected,
        "examples_evaluated": record.evaluated,
    }


def trial_tags(record: Trial) -> Values:
    """What identifies a trial and its verdict."""
    return {
        semconv.OPTIMIZER_NAME: record.optimizer,
        semconv.OPTIMIZER_RUN_ID: record.optimization,
        semconv.OPTIMIZER_PHASE: record.phase,
        semconv.PROGRAM_NAME: record.program_name,
        semconv.PROGRAM_ID: record.candidate,
        semconv.TRIAL_NUMBER: record.number,
        semconv.TRIAL_KIND: record.kind or None,
        semconv.TRIAL_SCORE_REPORTED: record.reported,
        semconv.TRIAL_IS_BEST: record.is_best,
        semconv.TRIAL_ACCEPTED: record.accepted,
        semconv.TRIAL_REASON: record.reason,
        semconv.TRIAL_ON_PARETO_FRONT: record.on_front,
        semconv.CANDIDATE_ID: record.candidate,
        semconv.CANDIDATE_PARENT_IDS: list(record.parents) or None,
        semconv.EVALUATION_ID: record.evaluation,
    }


def trial_params(record: Trial) -> Values:
    """What an optimizer chose for a candidate, and how that was evaluated."""
    return {
        "candidate": record.candidate,
        "parents": list(record.parents) or None,
        **record.params,
        "num_threads": record.threads,
        "examples": record.evaluated,
        "score_before": record.before,
        "score_after": record.after,
    }


def program_params(program: Candidate) -> Values:
    """Instructions and demos of each predictor."""
    found: Values = {}
    for name, predictor in program.predictors.items():
        found[f"{name}.instructions"] = predictor.instructions
        if predictor.demos is not None:
            found[f"{name}.demos"] = len(predictor.demos)
            found.update((f"{name}.demos.{index}", demo) for index, demo in enumerate(predictor.demos[:_SHOWN_DEMOS]))
    return found


def evaluation_tags(record: Evaluation) -> Values:
    """What identifies an evaluation."""
    return {
        semconv.PROGRAM_NAME: record.program_name,
        semconv.PROGRAM_ID: record.program_id,
        semconv.EVALUATION_ID: record.id,
        semconv.EVALUATION_METRIC_NAME: record.metric,
        semconv.OPTIMIZER_RUN_ID: record.optimization,
    }


def evaluation_params(record: Evaluation) -> Values:
    """Settings of an evaluation, and its models."""
    return {
        "metric": record.metric,
        "num_threads": record.threads,
        "examples": record.size,
        **model_params(record.models),
    }


def model_params(models: Mapping[str, tuple[str, ...]]) -> Values:
    """The models of each role: ``task.model``."""
    return {f"{role}.model": ", ".join(names) for role, names in models.items()}


def dataset_tag(role: str) -> str:
    """The tag that says how many rows of a dataset were recorded."""
    return {"train": semconv.DATASET_TRAIN_ROWS, "val": semconv.DATASET_VAL_ROWS}[role]


def trial_row(record: Trial) -> Values:
    """A row of the table of trials."""
    return {
        "number": record.number,
        "kind": record.kind,
        "candidate": record.candidate,
        "parents": ", ".join(record.parents),
        "score": record.score,
        "best_score": record.best,
        "accepted": record.accepted,
        "on_pareto_front": record.on_front,
        "reported_score": record.reported,
        "reason": record.reason,
        "phase": record.phase,
        "size": record.size,
        "score_before": record.before,
        "score_after": record.after,
        "params": json.dumps(dict(record.params), ensure_ascii=False, default=str),
        "changes": record.changes,
        "error": None if record.failure is None else record.failure.type,
        "lm_calls": record.usage.lm_calls,
        "tokens": record.usage.tokens,
        "cost": record.usage.cost,
        "spent_lm_calls": record.spent.lm_calls,
        "spent_tokens": record.spent.tokens,
        "spent_cost": record.spent.cost,
    }


def phase_row(record: Phase) -> Values:
    """A row of the table of phases."""
    usage = record.usage.flat()
    return {
        "phase": record.name,
        "times": record.times,
        "seconds": record.seconds,
        **{name: usage.get(name) for name in PHASE_COLUMNS[3:]},
    }


def example_columns(examples: Iterable[Example]) -> list[str]:
    """Columns of the table of examples: those that are known of any."""
    rows = list(examples)
    content = _CONTENT_COLUMNS if any(row.inputs is not None for row in rows) else ()
    known = [name for name in ("score", "feedback", "error") if any(getattr(row, name) is not None for row in rows)]
    return ["index", "id", *content, *known, "trace_id"]


def dataset_digest(examples: Sequence[Example]) -> str | None:
    """A dataset's digest from its examples' ids, as that of a validation set is made; None when an id is missing."""
    ids = [example.id for example in examples]
    if not ids or None in ids:
        return None
    return hashlib.sha256(json.dumps(ids).encode("ascii")).hexdigest()[:16]


# --- names and values to records ------------------------------------------------------------------------------------


def read_optimization(
    tags: Mapping[str, str], params: Mapping[str, str], metrics: Mapping[str, float], trials: Iterable[Trial] = ()
) -> Optimization:
    """An optimization, without phases, candidates and examples; the caller knows how it ended.

    Args:
        tags: of the optimization.
        params: of it.
        metrics: of it.
        trials: its trials; while it runs, its scores are known from them alone.
    """
    trials = tuple(trials)
    baseline = next((trial.score for trial in trials if trial.kind == semconv.TRIAL_BASELINE), None)
    best = next((trial.best for trial in reversed(trials) if trial.best is not None), None)
    initial, returned = tags.get(semconv.INITIAL_PROGRAM_ID), tags.get(semconv.PROGRAM_ID)
    return Optimization(
        id=tags.get(semconv.OPTIMIZER_RUN_ID, ""),
        optimizer=tags.get(semconv.OPTIMIZER_NAME, "optimizer"),
        program_name=tags.get(semconv.PROGRAM_NAME),
        parent=tags.get(semconv.OPTIMIZER_PARENT_RUN_ID),
        root=tags.get(semconv.OPTIMIZER_ROOT_RUN_ID),
        scale=tags.get(semconv.OPTIMIZER_SCORE_SCALE),
        baseline=number(metrics.get("baseline_score", baseline)),
        best=number(metrics.get("best_score", best)),
        gain=number(metrics.get("gain")),
        winner=_whole(tags.get(semconv.OPTIMIZER_WINNER_TRIAL)),
        initial=None if initial is None else Candidate(initial),
        returned=None if returned is None else Candidate(returned),
        params={name: value for name, value in params.items() if not name.startswith(("dataset.", "trials."))},
        metric=params.get("metric"),
        train=_dataset("train", params),
        val=_dataset("val", params),
        planned=_whole(params.get(_PLANNED)),
        done=_count(metrics, "trials"),
        accepted=_count(metrics, "accepted"),
        rejected=_count(metrics, "rejected"),
        evaluated=_count(metrics, "examples_evaluated"),
        usage=Usage.of(metrics),
        trials=trials,
    )


def read_trial(
    tags: Mapping[str, str], params: Mapping[str, str], metrics: Mapping[str, float], failed: bool = False
) -> Trial:
    """A trial, from its own names and values: not what had been spent by then, and its choices as texts."""
    chosen = {
        name: value
        for name, value in params.items()
        if name not in _OWN_PARAMS and not name.endswith((".instructions", ".demos")) and ".demos." not in name
    }
    return Trial(
        number=trial_number(tags),
        kind=tags.get(semconv.TRIAL_KIND, ""),
        candidate=tags.get(semconv.CANDIDATE_ID),
        parents=tuple(map(str, json.loads(tags.get(semconv.CANDIDATE_PARENT_IDS, "[]")))),
        score=number(metrics.get("score")),
        is_best=_truth(tags.get(semconv.TRIAL_IS_BEST)),
        size=_whole(params.get("examples")),
        accepted=_truth(tags.get(semconv.TRIAL_ACCEPTED)),
        reason=tags.get(semconv.TRIAL_REASON),
        on_front=_truth(tags.get(semconv.TRIAL_ON_PARETO_FRONT)),
        phase=tags.get(semconv.OPTIMIZER_PHASE),
        params=chosen,
        usage=Usage.of(metrics),
        failure=Failure("failed") if failed else None,
        optimization=tags.get(semconv.OPTIMIZER_RUN_ID, ""),
    )


def trial_number(tags: Mapping[str, str]) -> int:
    """The number of a trial, from its tags; 0 when it is not known."""
    return _whole(tags.get(semconv.TRIAL_NUMBER)) or 0


def read_trial_row(row: Mapping[str, Any]) -> Trial:
    """A trial, from its row of the table of trials. The table has the sum of its tokens only."""
    chosen, error = row.get("params"), row.get("error")
    return Trial(
        number=int(row["number"]),
        kind=str(row.get("kind") or ""),
        candidate=row.get("candidate"),
        parents=tuple(part for part in str(row.get("parents") or "").split(", ") if part),
        score=number(row.get("score")),
        reported=number(row.get("reported_score")),
        best=number(row.get("best_score")),
        size=row.get("size"),
        accepted=row.get("accepted"),
        reason=row.get("reason"),
        before=number(row.get("score_before")),
        after=number(row.get("score_after")),
        on_front=row.get("on_pareto_front"),
        phase=row.get("phase"),
        params=json.loads(chosen) if isinstance(chosen, str) else {},
        usage=_usage(row, ""),
        spent=_usage(row, "spent_"),
        failure=None if error is None else Failure(str(error)),
        changes=row.get("changes"),
    )


def read_phase_row(row: Mapping[str, Any]) -> Phase:
    """A phase, from its row of the table of phases."""
    return Phase(str(row.get("phase")), int(row.get("times") or 0), number(row.get("seconds")) or 0.0, Usage.of(row))


def read_example_row(row: Mapping[str, Any]) -> Example:
    """An example, from its row of the table of examples. Its ``trace_id`` is a number, or not known."""
    score = row.get("score")
    return Example(
        index=row.get("index"),
        id=row.get("id"),
        inputs=row.get("inputs"),
        expected=row.get("expected"),
        prediction=row.get("prediction"),
        score=float(score) if isinstance(score, bool) else number(score),
        feedback=row.get("feedback"),
        error=row.get("error"),
        trace_id=row.get("trace_id"),
    )


def _usage(row: Mapping[str, Any], prefix: str) -> Usage:
    return Usage(
        lm_calls=number(row.get(f"{prefix}lm_calls")),
        input_tokens=number(row.get(f"{prefix}tokens")),
        cost=number(row.get(f"{prefix}cost")),
    )


def _dataset(role: str, params: Mapping[str, str]) -> Dataset | None:
    size = _whole(params.get(_DATASET_PARAMS[role]))
    return None if size is None else Dataset(role, size)


def _count(metrics: Mapping[str, float], name: str) -> int | None:
    return int(metrics[name]) if name in metrics else None


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _truth(text: str | None) -> bool | None:
    return {"true": True, "false": False}.get(text or "")
