"""Spans, as they start and end, to records: an incremental reader that keeps what runs, and gives what has changed.

Used while a program runs (MLflow's worker), and for spans that were written down (a report from a file, ``replay``).
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel import semconv
from dspy_otel.record.model import (
    INTERRUPTED,
    ON_VALIDATION,
    Candidate,
    Evaluation,
    Example,
    Failure,
    LMCall,
    Optimization,
    Phase,
    Record,
    Trace,
    Trial,
    Usage,
)
from dspy_otel.record.spans import RUN_KINDS, Kind, belongs, kind_of, parse_failures_of, read

MAX_PROGRAMS: Final = 64 * 1024 * 1024
"""Most characters of candidates' states that are kept for one optimization; the initial program's always is."""
MAX_CONTENT: Final = 16 * 1024 * 1024
"""Most characters of content that are kept for one evaluation; further examples go without theirs."""
MAX_PREVIEW: Final = 600
"""Most characters of each value of an example that is kept after its evaluation."""
MAX_EXAMPLES: Final = 5000
"""Most examples of one evaluation that are kept after it."""
MAX_SCORES: Final = 100_000
"""Most scores of examples that are kept for one optimization, over all of its trials."""
MAX_SAMPLED: Final = 2000
"""Most examples of rollouts to learn from that are kept for one optimization."""
MAX_MODELS: Final = 10
"""Most models that are kept for one role."""
MAX_KNOWN: Final = 100_000
"""Most evaluations and optimizations whose ids are kept, so that traces which arrive late find their place."""

_ENDED_BEFORE: Final = "The program ended before it did."
_ORDER: Final = {Kind.COMPILE: 0, Kind.TRIAL: 1, Kind.EVALUATION: 2}
TRIALS: Final = "trials"
"""The phase of trials that are in none."""


class History:
    """Records of all optimizations and evaluations whose spans it is given.

    One thread at a time; only LM calls may be given by several, beside that. A span that ends must have been given
    when it started, unless it is a phase, an example or an LM call: parts of an unknown optimization are left out.

    Args:
        forget: whether an optimization is forgotten when it has ended. Without, one that is resumed later goes on
            with the trials it had: for spans that were written down, which are all there is.

    Attributes:
        own: ids of evaluations that are not a trial's.
        metrics: names of the optimizations' metrics, by id.
    """

    def __init__(self, forget: bool = True) -> None:
        self._forget = forget
        self._optimizations: dict[str, _Running] = {}
        self._evaluations: dict[str, _RunningEvaluation] = {}
        self._orphans: dict[tuple[str, int], Trial] = {}
        """Trials whose optimization is not known."""
        self.own: dict[str, None] = {}
        self.metrics: dict[str, str] = {}
        self._models = _Models()

    # --- events -----------------------------------------------------------------------------------------------------
    def start(self, span: ReadableSpan) -> list[Record]:
        """A span has started, or has got more attributes since: an optimization's parameters come after its start.

        Returns:
            What has changed.
        """
        kind = kind_of(span)
        part = read(span, kind) if kind in RUN_KINDS else None
        if isinstance(part, Optimization):
            return self._start_optimization(dataclasses.replace(part, ended=None))
        if isinstance(part, Trial):
            return self._start_trial(dataclasses.replace(part, ended=None))
        if isinstance(part, Evaluation):
            return self._start_evaluation(dataclasses.replace(part, ended=None))
        return []

    def end(self, span: ReadableSpan) -> list[Record]:
        """A span has ended.

        Returns:
            What has changed; first the record that the span is of.
        """
        kind = kind_of(span)
        part = read(span, kind)
        if isinstance(part, LMCall):
            self._models.add(part)
        elif isinstance(part, Example):
            self._add_example(span, part)
        elif isinstance(part, Phase):
            running = self._optimizations.get(part.optimization)
            return [] if running is None else [running.end_phase(part, span)]
        elif isinstance(part, Trial):
            return self._end_trial(part, span)
        elif isinstance(part, Evaluation):
            return self._end_evaluation(part)
        elif isinstance(part, Optimization):
            return self._end_optimization(part, span)
        elif (failures := parse_failures_of(span)) and (evaluation := self._evaluation_of(span)) is not None:
            evaluation.parse_failures += failures
        return []

    def stop(self, when: int) -> list[Record]:
        """The program ends: what still runs is interrupted.

        Args:
            when: nanoseconds since 1970.

        Returns:
            All of that, as it is now.
        """
        failure = Failure(None, _ENDED_BEFORE)
        found: list[Record] = [
            evaluation.finished(dataclasses.replace(evaluation.record, failure=failure, ended=when))
            for evaluation in self._evaluations.values()
        ]
        trials = [*self._orphans.values(), *(t for o in self._optimizations.values() for t in o.started.values())]
        found += [dataclasses.replace(trial, failure=failure, ended=when) for trial in trials]
        for running in reversed(self._optimizations.values()):
            if not running.over:
                record = running.snapshot()
                found.append(dataclasses.replace(record, outcome=INTERRUPTED, failure=failure, ended=when))
        self._evaluations.clear()
        self._orphans.clear()
        self._optimizations.clear()
        return found

    def adopt(self, trial: Trial) -> None:
        """Take an optimization for one that runs, whose own span has not come, from one of its trials."""
        if trial.optimization in self._optimizations:
            return
        baseline = trial.program if trial.kind == semconv.TRIAL_BASELINE else None
        self._start_optimization(
            Optimization(
                id=trial.optimization,
                optimizer=trial.optimizer or "optimizer",
                program_name=trial.program_name,
                initial=baseline,
                service=trial.service,
                started=trial.started,
            )
        )

    def running(self) -> list[Optimization]:
        """The optimizations that have not ended, as they are now, in the order in which they started."""
        return [_so_far(one.snapshot()) for one in self._optimizations.values() if not one.over]

    # --- traces -----------------------------------------------------------------------------------------------------
    def trace(self, span: ReadableSpan) -> Trace | None:
        """What the trace of an ended root span, or of an example, belongs to; None for any other span."""
        example = kind_of(span) is Kind.EXAMPLE
        if span.context is None or not (span.parent is None or example) or not belongs(span):
            return None
        at = span.attributes or {}
        optimization, evaluation = at.get(semconv.OPTIMIZER_RUN_ID), at.get(semconv.EVALUATION_ID)
        trial = at.get(semconv.TRIAL_NUMBER)
        own = evaluation is not None and (optimization is None or evaluation in self.own)
        # Optimizers wrap the metric; the name of the user's own is more useful.
        metric = self.metrics.get(str(optimization)) or at.get(semconv.EVALUATION_METRIC_NAME)
        part = read(span, Kind.EXAMPLE) if example else None
        return Trace(
            span.context.trace_id,
            span.context.span_id if example and span.parent is not None else None,
            span.parent is None,
            None if optimization is None else str(optimization),
            trial if isinstance(trial, int) else None,
            str(evaluation) if own else None,
            None if metric is None else str(metric),
            part if isinstance(part, Example) else None,
        )

    # --- optimizations ----------------------------------------------------------------------------------------------
    def _start_optimization(self, record: Optimization) -> list[Record]:
        running = self._optimizations.get(record.id)
        if running is None:
            running = self._optimizations[record.id] = _Running(record)
        elif running.record == record and not running.over:
            return []
        running.over = False
        running.describe(record)
        if record.metric is not None:
            self.metrics[record.id] = record.metric
            _bound(self.metrics)
        return [running.snapshot()]

    def _end_optimization(self, record: Optimization, span: ReadableSpan) -> list[Record]:
        running = self._optimizations.get(record.id)
        models = self._models.take(record.id)
        if running is None:
            return []
        running.over = True
        if record.failure is not None and running.failed is not None and running.failed.type == record.failure.type:
            record = dataclasses.replace(
                record, failure=dataclasses.replace(record.failure, example=running.failed.example)
            )
        running.describe(record)
        parent = self._optimizations.get(record.parent or "")
        changed: list[Record] = [dataclasses.replace(running.snapshot(), models=models)]
        if parent is not None:
            changed.append(parent.end_step(record, span))
        if self._forget:
            del self._optimizations[record.id]
        return changed

    # --- trials -----------------------------------------------------------------------------------------------------
    def _start_trial(self, trial: Trial) -> list[Record]:
        running = self._optimizations.get(trial.optimization)
        if running is None:
            self._orphans[trial.optimization, trial.number] = trial
        else:
            running.started[trial.number] = trial
        return [trial]

    def _trial(self, optimization: str | None, number: int | None) -> Trial | None:
        """A trial that has started, until its optimization has ended."""
        if optimization is None or number is None:
            return None
        running = self._optimizations.get(optimization)
        if running is None:
            return self._orphans.get((optimization, number))
        return running.started.get(number) or running.trials.get(number)

    def _end_trial(self, trial: Trial, span: ReadableSpan) -> list[Record]:
        started = self._trial(trial.optimization, trial.number)
        if started is None:
            return []
        trial = dataclasses.replace(
            trial, evaluation=started.evaluation, threads=started.threads, evaluated=started.evaluated
        )
        running = self._optimizations.get(trial.optimization)
        if running is not None:
            return [running.end_trial(trial, span)]
        del self._orphans[trial.optimization, trial.number]
        return [trial]

    # --- evaluations ------------------------------------------------------------------------------------------------
    def _start_evaluation(self, record: Evaluation) -> list[Record]:
        trial = self._trial(record.optimization, record.trial)
        own = trial is None or trial.evaluation is not None
        record = dataclasses.replace(record, own=own)
        self._evaluations[record.id] = _RunningEvaluation(record)
        if trial is None or own:
            self.own[record.id] = None
            _bound(self.own)
            return [record]
        trial = dataclasses.replace(trial, evaluation=record.id, threads=record.threads, evaluated=record.size)
        running = self._optimizations.get(trial.optimization)
        if running is None:
            self._orphans[trial.optimization, trial.number] = trial
        else:
            (running.started if trial.number in running.started else running.trials)[trial.number] = trial
        return [trial, record]

    def _add_example(self, span: ReadableSpan, example: Example) -> None:
        evaluation = self._evaluation_of(span)
        if evaluation is not None and span.context is not None:
            evaluation.add(example)

    def _evaluation_of(self, span: ReadableSpan) -> _RunningEvaluation | None:
        return self._evaluations.get(str((span.attributes or {}).get(semconv.EVALUATION_ID)))

    def _end_evaluation(self, record: Evaluation) -> list[Record]:
        running = self._evaluations.pop(record.id, None)
        models = self._models.take(record.id)
        if running is None:
            return []
        done = running.finished(dataclasses.replace(record, own=running.record.own, models=models))
        optimization = self._optimizations.get(record.optimization or "")
        if optimization is not None and done.failure is not None:
            optimization.failed = done.failure
        if optimization is not None and done.trial is not None and not done.own:
            optimization.keep_examples(done.trial, done.examples)
        return [done]


def optimizations(spans: Iterable[ReadableSpan]) -> list[Optimization]:
    """The optimizations whose spans these are, finished ones, in the order in which they started.

    Those that were steps of another one and scored nothing are left out. One that was resumed comes once for each
    attempt, the last with the trials of all.

    Args:
        spans: all that there are, ended, in any order.
    """
    return results(spans)[0]


def running(spans: Iterable[ReadableSpan]) -> list[Optimization]:
    """The optimizations that still run, in the order in which they started, from what has ended of them.

    Args:
        spans: all that there are, ended, in any order. A compile's own span comes when that is over; until then it is
            known from its trials.
    """
    history = History(forget=False)
    ended = sorted(spans, key=lambda span: span.end_time or 0)
    kinds = [(span, kind_of(span)) for span in sorted(ended, key=lambda span: span.start_time or 0)]
    over = {str((span.attributes or {}).get(semconv.OPTIMIZER_RUN_ID)) for span, kind in kinds if kind is Kind.COMPILE}
    for span, kind in kinds:
        trial = read(span, kind) if kind is Kind.TRIAL else None
        if isinstance(trial, Trial) and trial.optimization not in over:
            history.adopt(trial)
    for span in starts(ended):
        history.start(span)
    for span in ended:
        history.end(span)
    return history.running()


def results(spans: Iterable[ReadableSpan]) -> tuple[list[Optimization], list[Evaluation]]:
    """The :func:`optimizations` and all evaluations, those of trials too, in the order in which they started."""
    history = History(forget=False)
    ended = sorted(spans, key=lambda span: span.end_time or 0)
    for span in starts(ended):
        history.start(span)
    changed = [record for span in ended for record in history.end(span)[:1]]
    found = [
        record for record in changed if isinstance(record, Optimization) and (record.trials or record.parent is None)
    ]
    evaluations = [record for record in changed if isinstance(record, Evaluation)]
    return sorted(found, key=_started), sorted(evaluations, key=_started)


def _so_far(record: Optimization) -> Optimization:
    """An optimization that runs with the scores that it has so far, from its trials."""
    baseline = next((trial.score for trial in record.trials if trial.kind == semconv.TRIAL_BASELINE), None)
    best = next((trial.best for trial in reversed(record.trials) if trial.best is not None), None)
    gain = None if baseline is None or best is None else best - baseline
    return dataclasses.replace(record, baseline=baseline, best=best, gain=gain)


def _started(record: Optimization | Evaluation) -> int:
    return record.started or 0


def starts(spans: Iterable[ReadableSpan]) -> list[ReadableSpan]:
    """Those of ended spans that a :class:`History` has to be given as started before anything else, in their order."""
    found = [(span.start_time or 0, _ORDER[kind], span) for span in spans if (kind := kind_of(span)) in RUN_KINDS]
    return [span for _, _, span in sorted(found, key=lambda one: one[:2])]


class _Running:
    """An optimization while it runs.

    Usage is that of the spans' own totals, which are complete even when traces of examples are not recorded. A phase
    that scores candidates has their usage in its own; so that of each span's children is taken off when it ends.
    """

    def __init__(self, record: Optimization) -> None:
        self.record = record
        self.over = False
        self.failed: Failure | None = None
        """Of the last evaluation that failed."""
        self.started: dict[int, Trial] = {}
        self.trials: dict[int, Trial] = {}
        self._phases: dict[str, Phase] = {}
        self._spent = Usage()
        self._inside: dict[int, Usage] = {}
        self._candidates: dict[str, Candidate] = {}
        self._first: dict[str, int] = {}
        """Numbers of the trials that scored each candidate first."""
        self._size = 0
        self._examples: dict[int, tuple[Example, ...]] = {}
        self._baseline: int | None = None
        self._best: int | None = None
        self._kept = 0
        self._sampled = 0
        self._evaluated = 0
        self._verdicts: dict[bool, int] = {}

    def describe(self, record: Optimization) -> None:
        """Take over the record of its span."""
        self.record = record
        for program in (record.initial, record.returned):
            if program is not None:
                self._remember(program)

    def snapshot(self) -> Optimization:
        """The optimization as it is now."""
        return dataclasses.replace(
            self.record,
            spent=self._spent,
            trials=tuple(self.trials[number] for number in sorted(self.trials)),
            phases=tuple(self._phases.values()),
            candidates=dict(self._candidates),
            examples={number: kept for number, kept in self._examples.items() if number in self.trials},
        )

    def end_phase(self, phase: Phase, span: ReadableSpan) -> Phase:
        """A phase has ended, maybe not for the first time."""
        return self._add(phase.name, self._own(phase.usage, span), 1, phase.seconds)

    def end_step(self, step: Optimization, span: ReadableSpan) -> Phase:
        """An optimization inside this one has ended. It counts to the phase it is in, if any, or else is one itself."""
        own = self._own(step.usage, span)
        if step.parent_phase is not None:
            return self._add(step.parent_phase, own)
        return self._add(step.optimizer, own, 1, ((step.ended or 0) - (step.started or 0)) / 1e9)

    def end_trial(self, trial: Trial, span: ReadableSpan) -> Trial:
        """A trial has ended."""
        self.started.pop(trial.number, None)
        self._add(trial.phase or TRIALS, self._own(trial.usage, span))
        self._evaluated += trial.size or 0
        if trial.accepted is not None:
            self._verdicts[trial.accepted] = self._verdicts.get(trial.accepted, 0) + 1
        program = trial.program
        if program is not None:
            self._remember(program)
            program = self._candidates.get(program.id, program) if program.state is None else program
        validation = self.record.val if self.record.parent is None else None
        whole = trial.kind in ON_VALIDATION and validation is not None and trial.size == validation.size
        trial = dataclasses.replace(
            trial,
            spent=self._spent,
            program=program,
            made_from=tuple(self._first[one] for one in trial.parents if one in self._first),
            dataset=validation if whole else None,
            examples_so_far=self._evaluated,
            accepted_so_far=self._verdicts.get(True),
            rejected_so_far=self._verdicts.get(False),
        )
        if trial.candidate is not None:
            self._first.setdefault(trial.candidate, trial.number)
        self.trials[trial.number] = dataclasses.replace(trial, program=None)
        self._choose_examples(trial)
        return trial

    def keep_examples(self, trial: int, examples: Sequence[Example]) -> None:
        """Keep the examples of a trial's evaluation until the trial ends and is known to need them, or not."""
        self._examples[trial] = tuple(preview(example) for example in examples[:MAX_EXAMPLES])

    def _choose_examples(self, trial: Trial) -> None:
        """Keep the scores of all trials on the whole dataset, and what they are of for those that are shown."""
        number = trial.number
        examples = self._examples.pop(number, ())
        if trial.kind == semconv.TRIAL_SAMPLE and self._sampled + len(examples) <= MAX_SAMPLED:
            self._sampled += len(examples)
            self._examples[number] = examples
        if trial.kind not in ON_VALIDATION or not examples:
            return
        if trial.kind == semconv.TRIAL_BASELINE and self._baseline is None:
            self._baseline = number
        if trial.is_best:
            best, self._best = self._best, number
            if best is not None and best != self._baseline:
                self._examples[best] = scores_of(self._examples[best])
        if number in (self._baseline, self._best):
            self._examples[number] = examples
        elif self._kept + len(examples) <= MAX_SCORES:
            self._examples[number] = scores_of(examples)
        self._kept += len(examples)

    def _remember(self, program: Candidate) -> None:
        if program.state is None or program.id in self._candidates:
            return
        self._candidates[program.id] = program
        self._size += len(program.state)
        while self._size > MAX_PROGRAMS and len(self._candidates) > 2:
            oldest = next(one for one in self._candidates if one != self.record.initial_id)
            self._size -= len(self._candidates.pop(oldest).state or "")

    def _add(self, name: str, usage: Usage, times: int = 0, seconds: float = 0.0) -> Phase:
        known = self._phases.get(name) or Phase(name, optimization=self.record.id)
        phase = self._phases[name] = dataclasses.replace(
            known, times=known.times + times, seconds=known.seconds + seconds, usage=known.usage.plus(usage)
        )
        return phase

    def _own(self, usage: Usage, span: ReadableSpan) -> Usage:
        """What a span has used itself; added to what has been spent."""
        inside = None if span.context is None else self._inside.pop(span.context.span_id, None)
        own = usage.minus(inside or Usage())
        self._spent = self._spent.plus(own)
        if span.parent is not None:
            above = self._inside.get(span.parent.span_id)
            self._inside[span.parent.span_id] = usage if above is None else above.plus(usage)
        return own


class _RunningEvaluation:
    """An evaluation while it runs."""

    def __init__(self, record: Evaluation) -> None:
        self.record = record
        self.parse_failures = 0
        self._examples: list[Example] = []
        self._size = 0
        self._without = 0
        self._failed: Example | None = None

    def add(self, example: Example) -> None:
        self._size += example.size
        if self._failed is None and example.error is not None:
            self._failed = Example(index=example.index, error=example.error, message=example.message)
        if self._size > MAX_CONTENT:
            self._without += 1
            example = dataclasses.replace(example, inputs=None, expected=None, prediction=None, feedback=None)
        self._examples.append(example)

    def finished(self, record: Evaluation) -> Evaluation:
        """The evaluation with its examples."""
        self._examples.sort(key=lambda example: -1 if example.index is None else example.index)
        if record.failure is not None:
            record = dataclasses.replace(record, failure=dataclasses.replace(record.failure, example=self._failed))
        return dataclasses.replace(
            record,
            examples=tuple(self._examples),
            without_content=self._without,
            # Without the traces of examples, none of the failures could be seen.
            parse_failures=self.parse_failures if self._examples else None,
        )


class _Models:
    """Which models answered, by optimization or evaluation and role. Calls end in many threads."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, set[str]]] = {}
        self._lock = threading.Lock()

    def add(self, call: LMCall) -> None:
        if call.model is None:
            return
        with self._lock:
            for place in {call.optimization, call.root, call.evaluation} - {None}:
                names = self._names.setdefault(str(place), {}).setdefault(call.role, set())
                if len(names) < MAX_MODELS:
                    names.add(call.model)

    def take(self, place: str) -> dict[str, tuple[str, ...]]:
        """The models of an optimization or evaluation that ends, to be forgotten."""
        with self._lock:
            return {role: tuple(sorted(names)) for role, names in self._names.pop(place, {}).items()}


def scores_of(examples: Iterable[Example]) -> tuple[Example, ...]:
    """Examples with their scores, and without what they are of."""
    return tuple(
        Example(one.index, one.id, score=one.score, error=one.error, trace_id=one.trace_id) for one in examples
    )


def preview(example: Example) -> Example:
    """An example, small enough to keep."""
    return dataclasses.replace(
        example,
        inputs=_short(example.inputs),
        expected=_short(example.expected),
        prediction=_short(example.prediction),
        feedback=_cut(example.feedback),
        size=0,
    )


def _short(value: Any) -> Any:
    if isinstance(value, dict) and len(value) <= 20:
        return {str(name)[:80]: _cut(part) for name, part in value.items()}
    return _cut(value)


def _cut(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_PREVIEW else text[: MAX_PREVIEW - 1] + "…"


def _bound(known: dict[str, Any]) -> None:
    while len(known) > MAX_KNOWN:
        del known[next(iter(known))]
