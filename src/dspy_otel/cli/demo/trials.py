"""Trial tables: one for each optimization, also for those inside another one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from rich.table import Table

from dspy_otel.record.model import Trial

_LONGEST = 24


def trial_tables(trials: Iterable[Trial]) -> list[Table]:
    """A table for each optimization that `trials` are of, in the order in which they began."""
    optimizations: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        optimizations[trial.optimization].append(trial)
    begun = sorted(optimizations.values(), key=lambda found: min(trial.started or 0 for trial in found))
    return [trial_table(found) for found in begun]


def trial_table(trials: Sequence[Trial]) -> Table:
    """The trials of one optimization by number: kind, score, best so far, verdict, and what the optimizer chose."""
    ordered = sorted(trials, key=lambda trial: trial.number)
    verdicts = any(trial.accepted is not None for trial in trials)
    table = Table(title=ordered[0].optimizer, title_justify="left", title_style="bold")
    table.add_column("#", justify="right")
    table.add_column("kind")
    for column in ("examples", "score", "best so far"):
        table.add_column(column, justify="right")
    if verdicts:
        table.add_column("accepted")
    table.add_column("parameters")
    for trial in ordered:
        size = "" if trial.size is None else str(trial.size)
        row = [str(trial.number), trial.kind, size, _number(trial.score), _number(trial.best)]
        if verdicts:
            row.append({True: "yes", False: "no", None: ""}[trial.accepted])
        table.add_row(*row, parameters(trial), style="green" if trial.is_best else None)
    return table


def parameters(trial: Trial) -> str:
    """What the optimizer chose for a trial, as `name=value`, long values cut."""
    return " ".join(f"{name}={_shown(value)}" for name, value in trial.params.items())


def _shown(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
