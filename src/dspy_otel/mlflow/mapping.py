"""What spans of optimizations and evaluations say, as names and values of MLflow runs. Pure."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from dspy_otel import semconv
from dspy_otel.mlflow.wanted import COMPILE, EVALUATION, FAILED, FINISHED, KILLED, REPORT, TRIAL, Score, as_text
from dspy_otel.report.collect import load_json, trace_id_of
from dspy_otel.report.model import number as as_number

_STEPS: Final = ("step", "iteration", "depth", "strategy")
"""Choices that say where in an optimization a trial is."""

_INTERRUPTIONS: Final = frozenset({"KeyboardInterrupt", "SystemExit", "CancelledError", "GeneratorExit"})

Attributes = Mapping[str, Any]


def kind_of(name: str, at: Attributes) -> str | None:
    """Which of our spans this is, if it has a run of its own."""
    word = name.split(" ", 1)[0]
    if word == semconv.SPAN_COMPILE and semconv.OPTIMIZER_RUN_ID in at:
        return COMPILE
    if word == semconv.SPAN_TRIAL and semconv.OPTIMIZER_RUN_ID in at and isinstance(at.get(semconv.TRIAL_NUMBER), int):
        return TRIAL
    if word == semconv.SPAN_EVALUATE and semconv.EVALUATION_ID in at:
        return EVALUATION
    return None


def is_example(name: str) -> bool:
    """Whether a span is one example of an evaluation."""
    return name.split(" ", 1)[0] == semconv.SPAN_EXAMPLE


def status_of(span: ReadableSpan, at: Attributes) -> tuple[str, str | None]:
    """Status of the run of a span, and the reason when it did not finish."""
    if span.status.status_code is not StatusCode.ERROR:
        return FINISHED, None
    error = str(at.get(semconv.ERROR_TYPE) or "error")
    reason = f"{error}: {span.status.description}" if span.status.description else error
    return (KILLED if error.rpartition(".")[2] in _INTERRUPTIONS else FAILED), reason


def summary(at: Attributes) -> str | None:
    """One sentence about a compile's result, for the note of its run."""
    best, baseline = at.get(semconv.OPTIMIZER_BEST_SCORE), at.get(semconv.OPTIMIZER_BASELINE_SCORE)
    if best is None:
        return None
    text = f"Best score **{best:g}**"
    if at.get(semconv.OPTIMIZER_WINNER_TRIAL) is not None:
        text += f" (trial {at[semconv.OPTIMIZER_WINNER_TRIAL]})"
    if baseline is not None:
        text += f", baseline {baseline:g}"
    return f"{text}, {at.get(semconv.OPTIMIZER_TRIALS_DONE, 0)} trials. More in {REPORT}, under Artifacts."


def score_of_span(span: ReadableSpan, key: str, name: str) -> Score | None:
    """The verdict on an example, or None when its span carries none (a straggler's second answer)."""
    at = span.attributes or {}
    if not is_example(span.name) or span.context is None:
        return None
    value, error = at.get(semconv.EXAMPLE_SCORE), at.get(semconv.ERROR_TYPE)
    if value is None and error is None:
        return None
    feedback, index = at.get(semconv.EXAMPLE_FEEDBACK), at.get(semconv.EXAMPLE_INDEX)
    found = as_number(float(value) if isinstance(value, bool) else value)
    if found is None and error is None:
        error = f"score is {value}"
    return Score(
        key,
        trace_id_of(span),
        None if span.parent is None else f"{span.context.span_id:016x}",
        name,
        found,
        None if feedback is None else as_text(feedback),
        None if error is None else as_text(error),
        index if isinstance(index, int) else None,
    )


def trial_name(at: Attributes) -> str:
    """A trial's number, kind and verdict first, for tables are narrow; then the step of the optimizer it is part of."""
    name = f"trial {at[semconv.TRIAL_NUMBER]} {at.get(semconv.TRIAL_KIND, '')}".rstrip()
    accepted = at.get(semconv.TRIAL_ACCEPTED)
    if isinstance(accepted, bool):
        name += " accepted" if accepted else " rejected"
    chosen = {part: at.get(semconv.TRIAL_PARAMS_PREFIX + part) for part in _STEPS}
    said = [
        f"{part} {value}" if part != "strategy" else str(value) for part, value in chosen.items() if value is not None
    ]
    return ", ".join([name, *([" ".join(said)] if said else [])])


def trial_params(at: Attributes) -> dict[str, Any]:
    """What the optimizer chose for a candidate."""
    prefix = semconv.TRIAL_PARAMS_PREFIX
    return {
        "candidate": at.get(semconv.CANDIDATE_ID),
        "parents": at.get(semconv.CANDIDATE_PARENT_IDS),
        **{key[len(prefix) :]: value for key, value in at.items() if key.startswith(prefix)},
    }


def program_params(state: str) -> dict[str, Any]:
    """Instructions and demos of each predictor, from a program's state."""
    loaded = load_json(state)
    found: dict[str, Any] = {}
    for name, predictor in loaded.items() if isinstance(loaded, dict) else ():
        if not isinstance(predictor, dict) or "signature" not in predictor:
            continue
        signature = predictor["signature"]
        found[f"{name}.instructions"] = signature.get("instructions") if isinstance(signature, dict) else None
        demos = predictor.get("demos")
        if isinstance(demos, list):
            found[f"{name}.demos"] = len(demos)
            for index, demo in enumerate(demos[:8]):
                found[f"{name}.demos.{index}"] = demo
    return found


def program_of(at: Attributes, key: str) -> tuple[str, bool] | None:
    """A program's state on a span, and whether it is whole (nothing cut, masked or redacted).

    The SDK cuts texts too, by ``OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT``, and then it is no JSON any more.
    """
    state = at.get(key)
    if state is None:
        return None
    return str(state), at.get(f"{key}.complete") is not False and isinstance(load_json(state), dict)


def usage(at: Attributes, roles: bool = True) -> dict[str, Any]:
    """Tokens, cost and calls of a span's totals, named as the curves are.

    With ``roles`` by role too; without, only when there is more than one: MLflow's table has a column for each name.
    """
    prefix = semconv.USAGE_PREFIX
    found = {key[len(prefix) :]: value for key, value in at.items() if key.startswith(prefix)}
    if not roles and len({key.partition(".")[0] for key in found if "." in key}) < 2:
        return {key: value for key, value in found.items() if "." not in key}
    return found


def columns_of(rows: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Field names of dataset rows, with MLflow's types."""
    types = {bool: "boolean", int: "long", float: "double", str: "string"}
    found: dict[str, str] = {}
    for row in rows:
        for name, value in row.items():
            if name not in found:
                found[name] = types.get(type(value), "string")
    return tuple(found.items())


def digest_of(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """A dataset's digest from its rows' ids, as ``dspy.dataset.val.digest`` is made; None when an id is missing."""
    ids = [row["id"] for row in rows]
    if not ids or None in ids:
        return None
    return hashlib.sha256(json.dumps(ids).encode("ascii")).hexdigest()[:16]


def load_table(value: Any) -> list[dict[str, Any]] | None:
    """Dataset rows from a span; a mark that says how many were cut is no row."""
    loaded = load_json(value)
    return [row for row in loaded if isinstance(row, dict)] if isinstance(loaded, list) else None


def milliseconds(nanoseconds: int | None) -> int:
    """OpenTelemetry's time as MLflow's; now, when it is not known."""
    return (time.time_ns() if nanoseconds is None else nanoseconds) // 1_000_000
