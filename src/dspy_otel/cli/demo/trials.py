"""Trial tables, read from trial spans: one for each optimization, also for those inside another one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from opentelemetry.sdk.trace import ReadableSpan
from rich.table import Table

from dspy_otel import semconv
from dspy_otel.cli.demo.telemetry import attribute

_LONGEST = 24


def trial_tables(spans: Iterable[ReadableSpan]) -> list[Table]:
    """A table for each optimization among `spans` that has trials, in the order in which they began."""
    runs: dict[str, list[ReadableSpan]] = defaultdict(list)
    for span in spans:
        if span.name == semconv.SPAN_TRIAL:
            runs[attribute(span, semconv.OPTIMIZER_RUN_ID, "")].append(span)
    begun = sorted(runs.values(), key=lambda trials: min(trial.start_time or 0 for trial in trials))
    return [trial_table(trials) for trials in begun]


def trial_table(trials: Sequence[ReadableSpan]) -> Table:
    """The trials of one optimization by number: kind, score, best so far, verdict, and what the optimizer chose."""
    ordered = sorted(trials, key=lambda trial: attribute(trial, semconv.TRIAL_NUMBER, 0))
    verdicts = any(attribute(trial, semconv.TRIAL_ACCEPTED, None) is not None for trial in trials)
    table = Table(title=attribute(ordered[0], semconv.OPTIMIZER_NAME, ""), title_justify="left", title_style="bold")
    table.add_column("#", justify="right")
    table.add_column("kind")
    for column in ("examples", "score", "best so far"):
        table.add_column(column, justify="right")
    if verdicts:
        table.add_column("accepted")
    table.add_column("parameters")
    for trial in ordered:
        better = attribute(trial, semconv.TRIAL_IS_BEST, False)
        row = [
            str(attribute(trial, semconv.TRIAL_NUMBER, "")),
            attribute(trial, semconv.TRIAL_KIND, ""),
            str(attribute(trial, semconv.TRIAL_SIZE, "")),
            _number(attribute(trial, semconv.TRIAL_SCORE, None)),
            _number(attribute(trial, semconv.TRIAL_BEST_SCORE, None)),
        ]
        if verdicts:
            accepted = attribute(trial, semconv.TRIAL_ACCEPTED, None)
            row.append({True: "yes", False: "no", None: ""}[accepted])
        table.add_row(*row, parameters(trial), style="green" if better else None)
    return table


def parameters(trial: ReadableSpan) -> str:
    """What the optimizer chose for a trial, as `name=value`, long values cut."""
    prefix = semconv.TRIAL_PARAMS_PREFIX
    chosen = {key: value for key, value in (trial.attributes or {}).items() if key.startswith(prefix)}
    return " ".join(f"{key.removeprefix(prefix)}={_shown(value)}" for key, value in chosen.items())


def _shown(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
