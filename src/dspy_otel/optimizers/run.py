"""One optimization in flight: its trials, their scores, and what it has spent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from dspy_otel import semconv
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext
from dspy_otel.core.telemetry import Telemetry
from dspy_otel.core.usage import Totals
from dspy_otel.operations.evaluation import from_percent

PERCENT: Final = "percent"
MEAN: Final = "mean"
"""Scales in which optimizers report scores: ``Evaluate``'s percent, or the plain mean of the metric."""

_MOST_STATES: Final = 512


@dataclass(frozen=True, slots=True)
class Scored:
    """One finished trial.

    Attributes:
        number: from 1, in the order in which the run's trials began.
        kind: ``baseline``, ``minibatch``, ``full``, ``sample`` or ``validation``.
        candidate: ``dspy.program.id`` of the scored program.
        score: mean of the metric, or ``None`` if there is none.
        decides: whether its score counts for the best one.
    """

    number: int
    kind: str
    candidate: str | None
    score: float | None
    decides: bool


@dataclass(frozen=True, slots=True)
class BestProgram:
    """The best program of an optimization inside a budget, which may stop it.

    Attributes:
        program: a copy of the scored program: optimizers go on to change theirs.
        trial: the trial that scored it.
        optimizer: class name of the optimizer that made the trial; that of a step where optimizations are nested.
    """

    program: Any
    trial: Scored
    optimizer: str

    def is_worse_than(self, trial: Scored) -> bool:
        """Whether ``trial`` is better: one that decides is better than any that does not."""
        own = self.trial
        return (trial.decides, trial.score or 0.0) > (own.decides, own.score or 0.0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What another process needs in order to continue a run.

    Attributes:
        trials: the finished ones, in the order in which they finished.
        started_trials: how many trials have begun.
        accepted: accepted candidates; ``None`` if the optimizer does not judge.
        rejected: rejected candidates, likewise.
        examples: evaluated examples.
    """

    trials: tuple[Scored, ...]
    started_trials: int
    accepted: int | None
    rejected: int | None
    examples: int


@dataclass(eq=False)
class Run:
    """One optimization.

    Attributes:
        telemetry: where metrics go.
        id: ``dspy.optimizer.run.id``.
        name: the optimizer's class name.
        context: call context of the compile.
        totals: of all LM calls inside, by role.
        scale: in which the optimizer reports scores.
        parent: the optimization that this one is a step of.
        program_name: class of the program being optimized.
        initial_id: its ``dspy.program.id`` before the optimization.
        student: the program being optimized.
        inference_time: a program compiles as part of its own answer (KNNFewShot).
        checkpoint: called whenever the run has made progress; must not raise.
    """

    telemetry: Telemetry
    id: str
    name: str
    context: CallContext
    totals: Totals
    scale: str = PERCENT
    parent: Run | None = None
    program_name: str | None = None
    initial_id: str | None = None
    student: Any = None
    inference_time: bool = False
    checkpoint: Callable[[], object] | None = None

    live: ClassVar[int] = 0
    """How many optimizations are running in this process. While none is, its hooks cost nothing."""
    _live_lock: ClassVar[threading.Lock] = threading.Lock()

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._started_trials = 0
        self._spent: dict[str, tuple[int, float]] = {}
        self.finished: list[Scored] = []
        self._of_candidate: dict[str, list[Scored]] = {}
        self.best: Scored | None = None
        self.kept: BestProgram | None = None
        self.baseline: float | None = None
        self.accepted: int | None = None
        self.rejected: int | None = None
        self.planned: int | None = None
        self.planned_examples: int | None = None
        self.restored_trials = 0
        self.restored_examples = 0
        self.examples = 0
        self.validation: Attributes = {}
        self.states: dict[str, Any] = {}
        self.phases: list[str] = []

    @property
    def root(self) -> Run:
        """The outermost optimization around this one, or itself."""
        return self if self.parent is None else self.parent.root

    @classmethod
    def enter(cls, change: int) -> None:
        """Count a run that begins (1) or has ended (-1)."""
        with cls._live_lock:
            cls.live += change

    # --- events -----------------------------------------------------------------------------------------------------
    def next_number(self) -> int:
        """The number of the trial that begins now."""
        self._show_planned()
        with self._lock:
            self._started_trials += 1
            number = self._started_trials
        self._save()
        return number

    def plan_trials(self, count: int) -> None:
        """Set the number of trials that the optimizer is going to make."""
        self.planned = count
        self.telemetry.metrics.optimizer_trials_planned.set(count, self.labels())
        self._show_planned()

    def _show_planned(self) -> None:
        """Set the number of trials on the span of the compile already now: who follows it can tell the time left."""
        span = self.context.span
        if self.planned is not None and span is not None and span.is_recording():
            span.set_attribute(semconv.OPTIMIZER_TRIALS_PLANNED, self.planned)

    def begin_phase(self, name: str) -> None:
        """A phase begins."""
        self.phases.append(name)

    def end_phase(self, name: str) -> None:
        """A phase has ended."""
        with self._lock:
            if name in self.phases:
                self.phases.remove(name)

    def verdict(self, accepted: bool) -> None:
        """Count a candidate that the optimizer has accepted or rejected."""
        with self._lock:
            self.accepted = (self.accepted or 0) + accepted
            self.rejected = (self.rejected or 0) + (not accepted)

    def add_examples(self, count: int) -> None:
        """Count evaluated examples, here and in the optimizations around this one."""
        with self._lock:
            self.examples += count
        if self.parent is not None:
            self.parent.add_examples(count)
        else:
            self.telemetry.metrics.optimizer_examples.add(count, self.labels())

    def finish_trial(self, trial: Scored, failed: bool) -> tuple[bool, float | None]:
        """Add a scored trial.

        Args:
            trial: the trial.
            failed: its evaluation raised.

        Returns:
            Whether it is the best so far, and the best score so far.
        """
        with self._lock:
            is_best = self._add(trial)
            best = None if self.best is None else self.best.score
        metrics, labels = self.telemetry.metrics, self.labels()
        outcome = semconv.OUTCOME_FAILED if failed else semconv.OUTCOME_SCORED
        counted = {**labels, semconv.TRIAL_KIND: trial.kind, semconv.TRIAL_OUTCOME: outcome}
        metrics.optimizer_trials.add(1, counted)
        if trial.score is not None:
            metrics.optimizer_trial_score.record(trial.score, {**labels, semconv.TRIAL_KIND: trial.kind})
        if is_best and best is not None:
            metrics.optimizer_best_score.set(best, labels)
        self.report_spending()
        return is_best, best

    def _add(self, trial: Scored) -> bool:
        self.finished.append(trial)
        if trial.candidate is not None:
            self._of_candidate.setdefault(trial.candidate, []).append(trial)
        if trial.kind == semconv.TRIAL_BASELINE and self.baseline is None:
            self.baseline = trial.score
        is_best = trial.decides and (self.best is None or (trial.score or 0.0) > (self.best.score or 0.0))
        if is_best:
            self.best = trial
        return is_best

    def keep_best(self, program: Any, trial: Scored, copied: Callable[[Any], Any]) -> None:
        """Keep a copy of a scored program if it is the best so far, here or of an optimization that this is a step of.

        Args:
            program: the scored program.
            trial: the trial that scored it.
            copied: makes a copy of a program; ``None`` where it fails, and the program itself is kept.
        """
        kept: BestProgram | None = None
        run: Run | None = self
        while run is not None and run.program_name == self.program_name:
            if run.kept is None or run.kept.is_worse_than(trial):
                kept = kept or BestProgram(copied(program) or program, trial, self.name)
                run.kept = kept
            run = None if run.inference_time else run.parent

    # --- across processes -------------------------------------------------------------------------------------------
    def snapshot(self) -> Snapshot:
        """How far the run has come."""
        with self._lock:
            return Snapshot(tuple(self.finished), self._started_trials, self.accepted, self.rejected, self.examples)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue where an earlier process stopped."""
        with self._lock:
            for trial in snapshot.trials:
                self._add(trial)
            self._started_trials = max(self._started_trials, snapshot.started_trials)
            self.accepted, self.rejected = snapshot.accepted, snapshot.rejected
            self.examples = snapshot.examples
            self.restored_trials, self.restored_examples = len(snapshot.trials), self.examples

    def _save(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint()

    def report_spending(self) -> None:
        """Bring the metrics of LM calls and cost up to date. Those of a nested run count for its root."""
        self._save()
        run = self.root
        for role, totals in run.totals.by_role().items():
            with run._lock:
                calls, cost = run._spent.get(role, (0, 0.0))
                new_calls, new_cost = totals.calls - calls, totals.cost - cost
                run._spent[role] = (calls + new_calls, cost + new_cost)
            labels = {**run.labels(), semconv.LM_ROLE: role}
            if new_calls:
                run.telemetry.metrics.optimizer_lm_calls.add(new_calls, labels)
            if new_cost > 0:
                run.telemetry.metrics.optimizer_cost.add(new_cost, labels)

    def mean(self, reported: float | None) -> float | None:
        """A score that the optimizer reports as the mean of the metric: the one scale of all optimizers."""
        return from_percent(reported) if reported is not None and self.scale == PERCENT else reported

    # --- results ----------------------------------------------------------------------------------------------------
    def labels(self) -> Attributes:
        """Low-cardinality attributes of the run's metrics."""
        labels: Attributes = {semconv.OPTIMIZER_NAME: self.name}
        if self.program_name is not None:
            labels[semconv.PROGRAM_NAME] = self.program_name
        return labels

    def trial_of(self, candidate: str | None) -> Scored | None:
        """The trial that represents a candidate: the best-scored of those that decide, else the last one."""
        own = self._of_candidate.get(candidate, []) if candidate is not None else []
        deciding = [trial for trial in own if trial.decides]
        if deciding:
            return max(deciding, key=lambda trial: (trial.score or 0.0, -trial.number))
        return own[-1] if own else None

    def remember_state(self, candidate: str, state: Any) -> bool:
        """Keep a candidate's state, to compare its children with. Returns ``False`` if it was kept already."""
        with self._lock:
            if candidate in self.states:
                return False
            if len(self.states) >= _MOST_STATES:
                self.states.pop(next(iter(self.states)))
            self.states[candidate] = state
            return True

    def attributes(self) -> Attributes:
        """Attributes of the compile span at its end."""
        known: dict[str, Any] = {
            semconv.OPTIMIZER_TRIALS_DONE: len(self.finished) or None,
            semconv.OPTIMIZER_TRIALS_PLANNED: self.planned,
            semconv.OPTIMIZER_TRIALS_ACCEPTED: self.accepted,
            semconv.OPTIMIZER_TRIALS_REJECTED: self.rejected,
            semconv.OPTIMIZER_EXAMPLES_EVALUATED: self.examples or None,
            semconv.OPTIMIZER_BASELINE_SCORE: self.baseline,
            semconv.OPTIMIZER_BEST_SCORE: None if self.best is None else self.best.score,
            semconv.OPTIMIZER_SCORE_SCALE: self.scale if self.finished else None,
        }
        if self.baseline is not None and self.best is not None and self.best.score is not None:
            known[semconv.OPTIMIZER_GAIN] = round(self.best.score - self.baseline, 9)
        return {**self.validation, **{key: value for key, value in known.items() if value is not None}}
