"""An optimization's spans, as they end, to what its report tells. One thread at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from dspy_otel import semconv
from dspy_otel.report.model import RUNNING, Compared, Phase, Predictor, Report, Trial, add, compare, number, predictors

PHASES: Final = frozenset(value for name, value in vars(semconv).items() if name.startswith("PHASE_"))
"""Names of the spans of phases."""

MAX_PROGRAMS: Final = 4 * 1024 * 1024
"""Most characters of candidates' states that are kept for one report."""
MAX_PREVIEW: Final = 600
"""Most characters kept of each input, answer and feedback of an example."""
MAX_ROWS: Final = 5000
"""Most examples of one evaluation that are kept."""

Attributes = Mapping[str, Any]


def is_phase(name: str, at: Attributes) -> bool:
    """Whether a span is a phase of an optimization."""
    return name in PHASES and at.get(semconv.OPTIMIZER_PHASE) == name and semconv.OPTIMIZER_RUN_ID in at


def reports(spans: Iterable[ReadableSpan]) -> list[Report]:
    """The reports of all optimizations whose spans these are, finished ones, in any order.

    Those that were steps of another one and scored nothing are left out.
    """
    collectors: dict[str, Collector] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    found: list[tuple[int, Report]] = []
    for span in sorted(spans, key=lambda span: span.end_time or 0):
        at = span.attributes or {}
        run, word = str(at.get(semconv.OPTIMIZER_RUN_ID)), span.name.split(" ", 1)[0]
        if semconv.OPTIMIZER_RUN_ID not in at:
            continue
        collector = collectors.setdefault(run, Collector())
        if word == semconv.SPAN_EXAMPLE and semconv.EVALUATION_ID in at:
            rows.setdefault(str(at[semconv.EVALUATION_ID]), []).append(row_of(span))
        elif word == semconv.SPAN_EVALUATE and isinstance(trial := at.get(semconv.TRIAL_NUMBER), int):
            collector.rows(trial, rows.pop(str(at.get(semconv.EVALUATION_ID)), []))
        elif word == semconv.SPAN_TRIAL and isinstance(at.get(semconv.TRIAL_NUMBER), int):
            collector.trial(span)
        elif is_phase(span.name, at):
            collector.step(span)
        elif word == semconv.SPAN_COMPILE:
            inside = semconv.OPTIMIZER_PARENT_RUN_ID in at
            if inside:
                collectors.setdefault(str(at[semconv.OPTIMIZER_PARENT_RUN_ID]), Collector()).step(span)
            if collector.trials or not inside:
                failed = span.status.status_code is StatusCode.ERROR
                reason = (span.status.description or str(at.get(semconv.ERROR_TYPE) or "error")) if failed else None
                report = collector.report(at, span.start_time, span.end_time, reason)
                found.append((span.start_time or 0, report))
    return [report for _, report in sorted(found, key=lambda one: one[0])]


class Collector:
    """What one optimization has told so far.

    Usage is that of the spans' own totals, which are complete even when example traces are not recorded. A phase
    that scores candidates has their usage in its own; so each span's children are taken off when it ends.
    """

    def __init__(self) -> None:
        self._trials: dict[int, Trial] = {}
        self._phases: dict[str, Phase] = {}
        self._spent: dict[str, float] = {}
        self._inside: dict[int, dict[str, float]] = {}
        self._programs: dict[str, dict[str, Predictor]] = {}
        self._size = 0
        self._rows: dict[int, list[dict[str, Any]]] = {}
        self._baseline: tuple[int, list[dict[str, Any]]] | None = None
        self._bests: dict[int, list[dict[str, Any]]] = {}

    @property
    def phases(self) -> list[Phase]:
        """What went where so far."""
        return list(self._phases.values())

    @property
    def trials(self) -> list[Trial]:
        """The trials that have ended, in their order."""
        return [self._trials[number] for number in sorted(self._trials)]

    def program(self, candidate: str, state: str) -> None:
        """Keep a program's state."""
        if candidate not in self._programs and self._size + len(state) <= MAX_PROGRAMS:
            self._size += len(state)
            self._programs[candidate] = predictors(state)

    def rows(self, trial: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the examples of a trial's evaluation until the trial ends and says what they are good for."""
        self._rows[trial] = [{name: preview(value) for name, value in row.items()} for row in rows[:MAX_ROWS]]

    def step(self, span: ReadableSpan) -> None:
        """A phase, or an optimizer inside this one, has ended. The latter counts to the phase it is in, if any."""
        at = span.attributes or {}
        phase = at.get(semconv.OPTIMIZER_PARENT_PHASE, at.get(semconv.OPTIMIZER_PHASE))
        inside = phase is not None and span.name not in PHASES
        found = self._phase(phase or at.get(semconv.OPTIMIZER_NAME, span.name))
        add(found.usage, self._own(span))
        if not inside:
            found.times += 1
            found.seconds += seconds_of(span)

    def trial(self, span: ReadableSpan) -> Trial:
        """A trial has ended."""
        at = span.attributes or {}
        found = trial_of(at)
        add(self._phase(found.phase or "trials").usage, self._own(span))
        found.usage, found.spent = usage_of(at), dict(self._spent)
        if span.status.status_code is StatusCode.ERROR:
            found.error = str(at.get(semconv.ERROR_TYPE) or "error")
        self._trials[found.number] = found
        if found.candidate is not None and semconv.PROGRAM_STATE in at:
            self.program(found.candidate, str(at[semconv.PROGRAM_STATE]))
        self._keep(found, self._rows.pop(found.number, None), at.get(semconv.TRIAL_IS_BEST) is True)
        return found

    def report(self, at: Attributes, started: int | None, ended: int | None, failure: str | None = None) -> Report:
        """The report, at the end or so far.

        Args:
            at: attributes of the compile span.
            started: when it began, in nanoseconds since 1970.
            ended: when it ended, likewise.
            failure: what ended it, when it did not finish.
        """
        prefix = semconv.OPTIMIZER_PARAMS_PREFIX
        seed, best = at.get(semconv.INITIAL_PROGRAM_ID), at.get(semconv.PROGRAM_ID)
        for candidate, state in ((seed, at.get(semconv.INITIAL_PROGRAM_STATE)), (best, at.get(semconv.PROGRAM_STATE))):
            if candidate is not None and state is not None:
                self.program(str(candidate), str(state))
        datasets = (
            ("train", at.get(semconv.DATASET_TRAIN_SIZE), at.get(semconv.DATASET_TRAIN_DIGEST)),
            ("validation", at.get(semconv.DATASET_VAL_SIZE), at.get(semconv.DATASET_VAL_DIGEST)),
        )
        counts = {
            name: int(at[key])
            for name, key in (
                ("accepted", semconv.OPTIMIZER_TRIALS_ACCEPTED),
                ("rejected", semconv.OPTIMIZER_TRIALS_REJECTED),
                ("planned", semconv.OPTIMIZER_TRIALS_PLANNED),
                ("examples", semconv.OPTIMIZER_EXAMPLES_EVALUATED),
            )
            if key in at
        }
        winner = at.get(semconv.OPTIMIZER_WINNER_TRIAL)
        trials = self.trials
        return Report(
            optimizer=str(at.get(semconv.OPTIMIZER_NAME, "optimizer")),
            program=str(at.get(semconv.PROGRAM_NAME, "program")),
            run_id=_text(at.get(semconv.OPTIMIZER_RUN_ID)),
            outcome=str(at.get(semconv.OPTIMIZER_OUTCOME, RUNNING)),
            reason=failure,
            started=None if started is None else started / 1e9,
            ended=None if ended is None else ended / 1e9,
            scale=_text(at.get(semconv.OPTIMIZER_SCORE_SCALE)),
            baseline=number(at.get(semconv.OPTIMIZER_BASELINE_SCORE)),
            best=number(at.get(semconv.OPTIMIZER_BEST_SCORE)),
            gain=number(at.get(semconv.OPTIMIZER_GAIN)),
            winner=winner if isinstance(winner, int) else None,
            seed_id=_text(seed),
            best_id=_text(best),
            params={key[len(prefix) :]: value for key, value in at.items() if key.startswith(prefix)},
            datasets=[(role, int(size), _text(digest)) for role, size, digest in datasets if size is not None],
            usage=usage_of(at) or dict(self._spent),
            counts=counts,
            trials=trials,
            phases=self.phases,
            programs=dict(self._programs),
            compared=self._compared(winner),
            content=bool(self._programs) or not trials,
        )

    def _phase(self, name: Any) -> Phase:
        return self._phases.setdefault(str(name), Phase(str(name)))

    def _keep(self, trial: Trial, rows: list[dict[str, Any]] | None, is_best: bool) -> None:
        """Keep rows of the baseline, and of those trials that may be the winner: a new best one replaces the last."""
        if rows is None:
            return
        if trial.kind == semconv.TRIAL_BASELINE and self._baseline is None:
            self._baseline = (trial.number, rows)
        if is_best:
            self._bests = {trial.number: rows}

    def _compared(self, winner: Any) -> list[Compared]:
        place = winner if winner is not None else next(iter(self._bests), None)
        rows = self._bests.get(place) if isinstance(place, int) else None
        if rows is None or self._baseline is None or self._baseline[0] == place:
            return []
        return compare(self._baseline[1], rows)

    def _own(self, span: ReadableSpan) -> dict[str, float]:
        """What a span has used itself; added to what has been spent."""
        usage = usage_of(span.attributes or {})
        own = dict(usage)
        add(own, self._inside.pop(span.context.span_id, {}) if span.context is not None else {}, -1)
        own = {name: round(max(value, 0), 12) for name, value in own.items()}  # differences of sums are not quite 0
        add(self._spent, own)
        if span.parent is not None:
            add(self._inside.setdefault(span.parent.span_id, {}), usage)
        return own


def trial_of(at: Attributes) -> Trial:
    """What a trial's span says, without usage."""
    prefix = semconv.TRIAL_PARAMS_PREFIX
    size, accepted, front = (
        at.get(semconv.TRIAL_SIZE),
        at.get(semconv.TRIAL_ACCEPTED),
        at.get(semconv.TRIAL_ON_PARETO_FRONT),
    )
    return Trial(
        number=int(at[semconv.TRIAL_NUMBER]),
        kind=str(at.get(semconv.TRIAL_KIND, "")),
        candidate=_text(at.get(semconv.CANDIDATE_ID)),
        parents=tuple(map(str, at.get(semconv.CANDIDATE_PARENT_IDS, ()))),
        score=number(at.get(semconv.TRIAL_SCORE)),
        best=number(at.get(semconv.TRIAL_BEST_SCORE)),
        size=size if isinstance(size, int) else None,
        accepted=accepted if isinstance(accepted, bool) else None,
        reason=_text(at.get(semconv.TRIAL_REASON)),
        before=number(at.get(semconv.TRIAL_SCORE_BEFORE)),
        after=number(at.get(semconv.TRIAL_SCORE_AFTER)),
        on_front=front if isinstance(front, bool) else None,
        phase=_text(at.get(semconv.OPTIMIZER_PHASE)),
        params={key[len(prefix) :]: value for key, value in at.items() if key.startswith(prefix)},
    )


def usage_of(at: Attributes) -> dict[str, float]:
    """A span's totals, overall and by role."""
    prefix = semconv.USAGE_PREFIX
    found = {key[len(prefix) :]: number(value) for key, value in at.items() if key.startswith(prefix)}
    return {name: value for name, value in found.items() if value is not None}


def row_of(span: ReadableSpan) -> dict[str, Any]:
    """An evaluated example as a row of its evaluation's table."""
    at = span.attributes or {}
    return {
        "index": at.get(semconv.EXAMPLE_INDEX),
        "id": at.get(semconv.EXAMPLE_ID),
        "inputs": load_json(at.get(semconv.MODULE_INPUTS, at.get(semconv.INPUT_VALUE))),
        "expected": load_json(at.get(semconv.EXAMPLE_EXPECTED)),
        "prediction": load_json(at.get(semconv.MODULE_OUTPUTS, at.get(semconv.OUTPUT_VALUE))),
        "score": at.get(semconv.EXAMPLE_SCORE),
        "feedback": at.get(semconv.EXAMPLE_FEEDBACK),
        "error": at.get(semconv.ERROR_TYPE),
        "trace_id": trace_id_of(span),
    }


def trace_id_of(span: ReadableSpan) -> str:
    """A span's trace id as MLflow writes it."""
    return f"tr-{span.context.trace_id:032x}"


def load_json(value: Any) -> Any:
    """JSON text as what it says; text that is none as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def seconds_of(span: ReadableSpan) -> float:
    """How long a span took."""
    return 0.0 if span.start_time is None or span.end_time is None else (span.end_time - span.start_time) / 1e9


def preview(value: Any) -> Any:
    """A value of an example, small enough to keep."""
    if isinstance(value, dict) and len(value) <= 20:
        return {str(name)[:80]: _short(part) for name, part in value.items()}
    return _short(value)


def _short(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_PREVIEW else text[: MAX_PREVIEW - 1] + "…"


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
