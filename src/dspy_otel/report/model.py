"""What a report tells. Plain data: built from spans by :mod:`.collect`, or from what a backend has kept of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

RUNNING: Final = "running"
TOKENS: Final = ("input_tokens", "output_tokens")


@dataclass
class Trial:
    """One scored candidate.

    Attributes:
        number: its number, from 1.
        kind: ``baseline``, ``minibatch``, ``full``, ``sample`` or ``validation``.
        candidate: id of the program that was scored.
        parents: ids of the programs it was made from.
        score: on the optimizer's scale.
        best: best score so far, of those that can be compared.
        size: examples it was scored on.
        accepted: the optimizer's verdict, where it gives one.
        reason: of the verdict.
        before, after: what a proposal was compared by.
        on_front: whether it is on the Pareto front.
        phase: part of the optimization.
        params: what the optimizer chose for it.
        usage: of its own LM calls.
        spent: of all LM calls of the optimization when it ended.
        error: why it has no score.
    """

    number: int
    kind: str = ""
    candidate: str | None = None
    parents: tuple[str, ...] = ()
    score: float | None = None
    best: float | None = None
    size: int | None = None
    accepted: bool | None = None
    reason: str | None = None
    before: float | None = None
    after: float | None = None
    on_front: bool | None = None
    phase: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    usage: Mapping[str, float] = field(default_factory=dict)
    spent: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass
class Phase:
    """A part of an optimization: how often it came, how long it took in all, and what it used, its trials included."""

    name: str
    times: int = 0
    seconds: float = 0.0
    usage: dict[str, float] = field(default_factory=dict)


@dataclass
class Predictor:
    """A predictor of a program, as its saved state tells it."""

    instructions: str
    demos: list[Any]


@dataclass
class Compared:
    """One example, with the baseline and with the best program. A score is None when the example raised."""

    index: Any
    inputs: Any
    expected: Any
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def gain(self) -> float:
        """How much better the best program did; no score counts less than any score."""
        before, after = self.before.get("score"), self.after.get("score")
        if before is None or after is None:
            return (after is not None) - (before is not None)
        return float(after) - float(before)


@dataclass
class Report:
    """One optimization.

    Attributes:
        optimizer, program: their names.
        run_id: ``dspy.optimizer.run.id``.
        outcome: ``finished``, ``failed``, ``interrupted`` or ``running``.
        reason: of a failure.
        started, ended: seconds since 1970.
        scale: ``percent`` or ``mean``.
        baseline, best, gain: scores.
        winner: number of the trial that made the program that was returned.
        seed_id, best_id: ids of the initial and of the returned program.
        params, datasets: of the optimizer; datasets as (role, examples, digest).
        usage: totals, also by role, named ``cost`` and ``task.cost``.
        counts: trials accepted and rejected, examples evaluated.
        trials: in their order.
        phases: what went where; together they are the usage.
        programs: states of programs by id: predictors by name. Empty without content.
        compared: the examples that both the baseline and the best program were scored on.
        content: whether content was recorded.
        versions: of the software.
        source: where the runs are, by trial number (None for the whole optimization), when they have addresses.
        trace_url: address of a trace, with ``{}`` for its id, when traces have addresses.
    """

    optimizer: str = "optimizer"
    program: str = "program"
    run_id: str | None = None
    outcome: str = RUNNING
    reason: str | None = None
    started: float | None = None
    ended: float | None = None
    scale: str | None = None
    baseline: float | None = None
    best: float | None = None
    gain: float | None = None
    winner: int | None = None
    seed_id: str | None = None
    best_id: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    datasets: Sequence[tuple[str, int, str | None]] = ()
    usage: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    programs: dict[str, dict[str, Predictor]] = field(default_factory=dict)
    compared: list[Compared] = field(default_factory=list)
    content: bool = True
    versions: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[int | None, str] = field(default_factory=dict)
    trace_url: str | None = None

    @property
    def winning(self) -> Trial | None:
        """The trial that made the returned program."""
        return next((trial for trial in self.trials if trial.number == self.winner), None)


def number(value: Any) -> float | None:
    """A value as a number that can be drawn; None for anything else, NaN and infinity among it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def tokens(usage: Mapping[str, float]) -> float | None:
    """Input and output tokens together; None when neither is known."""
    known = [usage[name] for name in TOKENS if name in usage]
    return sum(known) if known else None


def add(total: dict[str, float], more: Mapping[str, float], sign: int = 1) -> None:
    """Add usage to a sum, name by name."""
    for name, value in more.items():
        total[name] = total.get(name, 0) + sign * value


def predictors(state: Any) -> dict[str, Predictor]:
    """Instructions and demos of each predictor, from a program's saved state: JSON, whole or cut."""
    if isinstance(state, str):
        try:
            state = json.loads(state)
        except ValueError:
            return {}
    found: dict[str, Predictor] = {}
    for name, part in state.items() if isinstance(state, dict) else ():
        if not isinstance(part, dict) or not isinstance(part.get("signature"), dict):
            continue
        demos = part.get("demos")
        instructions = part["signature"].get("instructions")
        found[str(name)] = Predictor(
            "" if instructions is None else str(instructions), demos if isinstance(demos, list) else []
        )
    return found


def compare(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> list[Compared]:
    """The examples that are in two evaluations.

    Args:
        before: rows with ``index``, ``id``, ``inputs``, ``expected``, ``prediction``, ``score``, ``feedback``,
            ``error`` and ``trace_id``, as far as they are known.
        after: the same.
    """
    known = _by_example(before)
    found = []
    for key, row in _by_example(after).items():
        old = known.get(key)
        if old is not None:
            scored = [
                {**{name: value for name, value in one.items() if value is not None}, "score": _plain(one.get("score"))}
                for one in (old, row)
            ]
            found.append(Compared(row.get("index"), row.get("inputs"), row.get("expected"), *scored))
    found.sort(key=lambda one: one.index if isinstance(one.index, int) else -1)
    return found


def _by_example(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, int], Mapping[str, Any]]:
    """Rows by the example's id, or else its place; equal examples are told apart by their order."""
    found: dict[tuple[Any, int], Mapping[str, Any]] = {}
    seen: dict[Any, int] = {}
    for row in rows:
        key = row.get("id") if row.get("id") is not None else row.get("index")
        if key is None:
            continue
        seen[key] = place = seen.get(key, -1) + 1
        found[key, place] = row
    return found


def _plain(score: Any) -> float | None:
    return float(score) if isinstance(score, bool) else number(score)
