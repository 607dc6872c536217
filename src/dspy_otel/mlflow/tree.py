"""Compile, trial and evaluation spans as a tree of MLflow runs. No input or output here, and one thread at a time.

A run is a wish: what should be in MLflow. :mod:`.writer` brings MLflow up to it, and tries again when that fails.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel import semconv
from dspy_otel.mlflow.base import say
from dspy_otel.mlflow.mapping import (
    Attributes,
    columns_of,
    digest_of,
    kind_of,
    load_table,
    milliseconds,
    program_of,
    program_params,
    status_of,
    summary,
    trial_name,
    trial_params,
    usage,
)
from dspy_otel.mlflow.wanted import (
    BEST_PROGRAM,
    COMPILE,
    EVALUATION,
    EVALUATION_TABLE,
    FAILED,
    INITIAL_PROGRAM,
    KILLED,
    PHASE_TABLE,
    REPORT,
    TAG_CONTENT,
    TAG_KEY,
    TAG_KIND,
    TAG_NAME,
    TRIAL,
    TRIAL_PROGRAM,
    Dataset,
    Run,
    as_text,
)
from dspy_otel.report import Collector, render
from dspy_otel.report.collect import is_phase, row_of
from dspy_otel.report.model import tokens

_logger = logging.getLogger(__name__)

MAX_TABLE: Final = 16 * 1024 * 1024
"""Most characters of content in one evaluation table; further rows go without theirs."""
MAX_PROGRAMS: Final = 64 * 1024 * 1024
"""Most characters of candidates' states that one compile keeps for trials that score them again."""
HOW_TO_GET_CONTENT: Final = (
    "off: programs, instructions, demos, dataset rows and predictions are recorded with "
    "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=span_only"
)

_ENDED_BEFORE: Final = "The program ended before it did."

_ON_VALIDATION: Final = frozenset({semconv.TRIAL_BASELINE, semconv.TRIAL_FULL, semconv.TRIAL_VALIDATION})
"""Trials on the whole validation set, when the size is the same too."""
_LM_OPERATIONS: Final = frozenset(
    {semconv.OPERATION_CHAT, semconv.OPERATION_TEXT_COMPLETION, semconv.OPERATION_EMBEDDINGS}
)
# Of a compile span, as tags; everything else of interest has a place of its own.
_PLACES: Final = (semconv.OPTIMIZER_RUN_ID, semconv.OPTIMIZER_ROOT_RUN_ID, semconv.EVALUATION_ID)
_MOST_MODELS: Final = 10
_COMPILE_TAGS: Final = (
    semconv.OPTIMIZER_NAME,
    semconv.OPTIMIZER_RUN_ID,
    semconv.OPTIMIZER_PARENT_RUN_ID,
    semconv.OPTIMIZER_ROOT_RUN_ID,
    semconv.OPTIMIZER_INFERENCE_TIME,
    semconv.OPTIMIZER_OUTCOME,
    semconv.OPTIMIZER_SCORE_SCALE,
    semconv.OPTIMIZER_WINNER_TRIAL,
    semconv.PROGRAM_NAME,
    semconv.PROGRAM_ID,
    semconv.INITIAL_PROGRAM_ID,
)
_TRIAL_TAGS: Final = (
    semconv.OPTIMIZER_NAME,
    semconv.OPTIMIZER_RUN_ID,
    semconv.OPTIMIZER_PHASE,
    semconv.PROGRAM_NAME,
    semconv.PROGRAM_ID,
    semconv.TRIAL_NUMBER,
    semconv.TRIAL_KIND,
    semconv.TRIAL_IS_BEST,
    semconv.TRIAL_ACCEPTED,
    semconv.TRIAL_REASON,
    semconv.TRIAL_ON_PARETO_FRONT,
    semconv.CANDIDATE_ID,
    semconv.CANDIDATE_PARENT_IDS,
)
_EVALUATION_TAGS: Final = (
    semconv.PROGRAM_NAME,
    semconv.PROGRAM_ID,
    semconv.EVALUATION_ID,
    semconv.EVALUATION_METRIC_NAME,
)
_COMPILE_METRICS: Final[Mapping[str, str]] = {
    semconv.OPTIMIZER_BASELINE_SCORE: "baseline_score",
    semconv.OPTIMIZER_BEST_SCORE: "best_score",
    semconv.OPTIMIZER_GAIN: "gain",
    semconv.OPTIMIZER_TRIALS_DONE: "trials",
    semconv.OPTIMIZER_TRIALS_ACCEPTED: "accepted",
    semconv.OPTIMIZER_TRIALS_REJECTED: "rejected",
    semconv.OPTIMIZER_EXAMPLES_EVALUATED: "examples_evaluated",
}
_PHASE_USAGE: Final = ("lm_calls", "cache_hits", "input_tokens", "output_tokens", "cost")
_DATASETS: Final = (
    ("train", semconv.DATASET_TRAIN_SIZE, semconv.DATASET_TRAIN_DIGEST, semconv.DATASET_TRAIN_ROWS),
    ("val", semconv.DATASET_VAL_SIZE, semconv.DATASET_VAL_DIGEST, semconv.DATASET_VAL_ROWS),
)


@dataclass
class _Compile:
    """What is remembered of a compile while it runs."""

    run: Run
    span: ReadableSpan
    programs: dict[str, tuple[str, bool]] = field(default_factory=dict)
    size: int = 0
    trials: list[dict[str, Any]] = field(default_factory=list)
    runs: dict[int, Run] = field(default_factory=dict)
    examples: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    history: Collector = field(default_factory=Collector)


@dataclass
class _Evaluation:
    """What is remembered of an evaluation while it runs."""

    run: Run
    own: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0
    without: int = 0


class Models:
    """Which models answered, by optimization or evaluation and role. Filled as spans end; safe to read beside that."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, set[str]]] = {}

    def add(self, attributes: Attributes) -> None:
        """Note the model of one LM span, if it belongs to an optimization or an evaluation."""
        model = attributes.get(semconv.GEN_AI_REQUEST_MODEL)
        if model is None or attributes.get(semconv.GEN_AI_OPERATION_NAME) not in _LM_OPERATIONS:
            return
        role = str(attributes.get(semconv.LM_ROLE, semconv.ROLE_TASK))
        for place in {attributes.get(key) for key in _PLACES} - {None}:
            names = self._names.setdefault(str(place), {}).setdefault(role, set())
            if len(names) < _MOST_MODELS:
                names.add(str(model))

    def of(self, place: Any) -> dict[str, str]:
        """The models so far, named as parameters: ``task.model``."""
        return {f"{role}.model": ", ".join(sorted(names)) for role, names in self._names.get(str(place), {}).items()}

    def take(self, span: ReadableSpan) -> dict[str, str]:
        """The models of the optimization or evaluation that ``span`` ends, to be forgotten; none of another span."""
        at = span.attributes or {}
        key = {COMPILE: semconv.OPTIMIZER_RUN_ID, EVALUATION: semconv.EVALUATION_ID}.get(str(kind_of(span.name, at)))
        place = None if key is None else at.get(key)
        found = self.of(place)
        self._names.pop(str(place), None)
        return found


class Tree:
    """All runs that are not yet in MLflow as they should be.

    Args:
        constant_tags: what every run carries (versions).

    Attributes:
        runs: by key.
        metric_names: of the metric of each optimization, by its run id.
        whole: whether it sees all spans of an optimization: else a table of candidates would lack some.
        own_evaluations: ids of evaluations that have a run of their own.
    """

    def __init__(self, constant_tags: Mapping[str, str]) -> None:
        self.constant_tags = dict(constant_tags)
        self.runs: dict[str, Run] = {}
        self.whole = True
        self._compiles: dict[str, _Compile] = {}
        self._evaluations: dict[str, _Evaluation] = {}
        self._trials: dict[tuple[str, int], Run] = {}
        self.metric_names: dict[str, str] = {}
        self.own_evaluations: set[str] = set()

    # --- what happens -------------------------------------------------------------------------------------------
    def start(self, span: ReadableSpan, outside: str | None) -> None:
        """A span of a compile, a trial or an evaluation has started.

        Args:
            span: it; its attributes may still grow.
            outside: id of the user's own active MLflow run, if there is one.
        """
        at = dict(span.attributes or {})
        kind = kind_of(span.name, at)
        if kind == COMPILE:
            self._start_compile(span, at, outside)
        elif kind == TRIAL:
            self._start_trial(span, at, outside)
        elif kind == EVALUATION:
            self._start_evaluation(span, at, outside)

    def refresh(self) -> None:
        """Take over what running compiles have said since they started: most parameters come after the start."""
        for compile_ in self._compiles.values():
            self._describe_compile(compile_, dict(compile_.span.attributes or {}))

    def end(self, span: ReadableSpan, models: Mapping[str, str]) -> None:
        """A span has ended.

        Args:
            span: of a compile, phase, trial, evaluation or example.
            models: those that it used, when it is a compile or an evaluation.
        """
        at = span.attributes or {}
        kind = kind_of(span.name, at)
        if kind == COMPILE:
            self._end_compile(span, at, models)
        elif kind == TRIAL:
            self._end_trial(span, at)
        elif kind == EVALUATION:
            self._end_evaluation(span, at, models)
        elif is_phase(span.name, at):
            compile_ = self._compiles.get(str(at[semconv.OPTIMIZER_RUN_ID]))
            if compile_ is not None:
                compile_.history.step(span)
        elif semconv.EVALUATION_ID in at:
            self._end_example(span, at)

    def stop(self, when: int) -> None:
        """The program ends: whatever still runs is killed."""
        for key in list(self._evaluations):
            self._tabulate(self._evaluations.pop(key))
        for compile_ in self._compiles.values():
            at = dict(compile_.span.attributes or {})
            self._describe_compile(compile_, at)
            self._list_candidates(compile_)
            at[semconv.OPTIMIZER_OUTCOME] = "interrupted"
            self._report(compile_, at, when * 1_000_000, _ENDED_BEFORE)
        for run in self.runs.values():
            if not run.over:
                run.end(KILLED, when, _ENDED_BEFORE)
        self._compiles.clear()
        self._trials.clear()

    def settle(self, run: Run) -> None:
        """Forget a run that is over and in MLflow, unless something may still refer to it."""
        if run.over and not run.dirty:
            self.runs.pop(run.key, None)

    # --- compiles -----------------------------------------------------------------------------------------------
    def _start_compile(self, span: ReadableSpan, at: Attributes, outside: str | None) -> None:
        key = str(at[semconv.OPTIMIZER_RUN_ID])
        parent = self._compiles.get(str(at.get(semconv.OPTIMIZER_PARENT_RUN_ID)))
        name = " ".join(str(at[part]) for part in (semconv.OPTIMIZER_NAME, semconv.PROGRAM_NAME) if part in at)
        run = self._add(key, COMPILE, name, None if parent is None else parent.run, outside, span)
        self._compiles[key] = _Compile(run, span)

    def _describe_compile(self, compile_: _Compile, at: Attributes) -> None:
        run = compile_.run
        prefix = semconv.OPTIMIZER_PARAMS_PREFIX
        run.param({key[len(prefix) :]: value for key, value in at.items() if key.startswith(prefix)})
        for key in (semconv.DATASET_TRAIN_SIZE, semconv.DATASET_VAL_SIZE, semconv.OPTIMIZER_TRIALS_PLANNED):
            run.param({key.removeprefix("dspy.").removeprefix("optimizer."): at.get(key)})
        run.tag({key: at.get(key) for key in _COMPILE_TAGS})
        if (metric := at.get(prefix + "metric")) is not None:
            self.metric_names[run.key] = str(metric)
        for context, size, digest, rows in _DATASETS:
            # An optimization inside another works on the same rows: they are logged once.
            if size not in at or context in run.seen_datasets or run.parent is not None:
                continue
            table = load_table(at.get(rows))
            columns = () if table is None else columns_of(table)
            run.dataset(Dataset(run.name_of_data(context), str(at.get(digest)), context, int(at[size]), columns))
            if table is not None:
                fields = [name for name, _ in columns]
                data = [[row.get(name) for name in fields] for row in table]
                run.table(f"{context}set.json", fields, data)
                if len(table) < int(at[size]):
                    run.tag({f"dspy.dataset.{context}.rows": f"{len(table)} of {at[size]} (content limit)"})
        initial = program_of(at, semconv.INITIAL_PROGRAM_STATE)
        if initial is not None and at.get(semconv.INITIAL_PROGRAM_ID) not in (None, *compile_.programs):
            self._remember(compile_, str(at[semconv.INITIAL_PROGRAM_ID]), initial)
            if run.parent is None:
                run.put_program(INITIAL_PROGRAM, initial)

    def _remember(self, compile_: _Compile, candidate: str, program: tuple[str, bool]) -> None:
        if candidate in compile_.programs:
            return
        compile_.programs[candidate] = program
        compile_.size += len(program[0])
        while compile_.size > MAX_PROGRAMS and len(compile_.programs) > 1:
            oldest = next(iter(compile_.programs))
            compile_.size -= len(compile_.programs.pop(oldest)[0])

    def _end_compile(self, span: ReadableSpan, at: Attributes, models: Mapping[str, str]) -> None:
        key = str(at[semconv.OPTIMIZER_RUN_ID])
        compile_ = self._compiles.pop(key, None)
        if compile_ is None:
            return
        run, when = compile_.run, milliseconds(span.end_time)
        self._describe_compile(compile_, at)
        run.param(models)
        run.tag({name: at.get(name) for name in _COMPILE_TAGS})
        step = max([trial["number"] for trial in compile_.trials], default=0)
        # The best score under its children's name too: MLflow's table of runs compares by name.
        run.point({"score": at.get(semconv.OPTIMIZER_BEST_SCORE)}, when, step)
        run.point({label: at.get(name) for name, label in _COMPILE_METRICS.items()}, when, step)
        run.point(usage(at), when, step)
        best = program_of(at, semconv.PROGRAM_STATE)
        if best is None and at.get(semconv.PROGRAM_ID) is not None:
            best = compile_.programs.get(str(at[semconv.PROGRAM_ID]))
        if best is not None:
            run.put_program(BEST_PROGRAM, best)
        elif not compile_.programs:
            run.tag({TAG_CONTENT: HOW_TO_GET_CONTENT})
        winner = compile_.runs.get(int(at.get(semconv.OPTIMIZER_WINNER_TRIAL, -1)))
        if winner is not None:
            what, comma, where = winner.name.partition(", ")
            winner.tag({TAG_NAME: f"{what} (winner){comma}{where}", "dspy.winner": "true"})
            self.runs.setdefault(winner.key, winner)
            run.winner = winner.key
        if self.whole or len(compile_.trials) >= int(at.get(semconv.OPTIMIZER_TRIALS_DONE, 0)):
            self._list_candidates(compile_)
        outcome = {"failed": FAILED, "interrupted": KILLED}.get(str(at.get(semconv.OPTIMIZER_OUTCOME)))
        status, reason = status_of(span, at)
        self._report(compile_, at, span.end_time, reason, models)
        above = self._compiles.get(str(at.get(semconv.OPTIMIZER_PARENT_RUN_ID)))
        if above is not None:
            above.history.step(span)
        run.end(outcome or status, when, reason, note=summary(at))
        for number in compile_.runs:
            self._trials.pop((key, number), None)

    def _list_candidates(self, compile_: _Compile) -> None:
        key = compile_.run.key
        compile_.run.candidates = [{**trial, "key": f"{key}/{trial['number']}"} for trial in compile_.trials]
        rows = [
            [phase.name, phase.times, phase.seconds, *(phase.usage.get(name) for name in _PHASE_USAGE)]
            for phase in compile_.history.phases
        ]
        if rows:
            compile_.run.table(PHASE_TABLE, ["phase", "times", "seconds", *_PHASE_USAGE], rows)

    def _report(
        self,
        compile_: _Compile,
        at: Attributes,
        ended: int | None,
        reason: str | None,
        models: Mapping[str, str] | None = None,
    ) -> None:
        """Add the report of an optimization that is over; steps of others that scored nothing need none."""
        run, history = compile_.run, compile_.history
        if run.parent is not None and not history.trials:
            return
        report = history.report(at, compile_.span.start_time, ended, reason)
        report.params = {**report.params, **(models or {})}
        report.versions = {
            name.removesuffix(".version"): value
            for name, value in self.constant_tags.items()
            if name.endswith(".version")
        }
        try:
            run.artifacts[REPORT] = render(report)
        except Exception as error:
            say(_logger.warning, "The report of %s could not be made (%s).", run.name, type(error).__name__)
            _logger.debug("no report", exc_info=True)

    # --- trials -------------------------------------------------------------------------------------------------
    def _start_trial(self, span: ReadableSpan, at: Attributes, outside: str | None) -> None:
        optimization, number = str(at[semconv.OPTIMIZER_RUN_ID]), int(at[semconv.TRIAL_NUMBER])
        compile_ = self._compiles.get(optimization)
        parent = None if compile_ is None else compile_.run
        run = self._add(f"{optimization}/{number}", TRIAL, trial_name(at), parent, outside, span)
        self._trials[optimization, number] = run
        if compile_ is not None:
            compile_.runs[number] = run
            self._describe_compile(compile_, dict(compile_.span.attributes or {}))
        run.tag({key: at.get(key) for key in _TRIAL_TAGS})
        run.param(trial_params(at))

    def _end_trial(self, span: ReadableSpan, at: Attributes) -> None:
        optimization, number = str(at[semconv.OPTIMIZER_RUN_ID]), int(at[semconv.TRIAL_NUMBER])
        run = self._trials.get((optimization, number))
        if run is None:
            return
        when = milliseconds(span.end_time)
        kind = str(at.get(semconv.TRIAL_KIND, ""))
        score, best = at.get(semconv.TRIAL_SCORE), at.get(semconv.TRIAL_BEST_SCORE)
        run.tag({key: at.get(key) for key in _TRIAL_TAGS})
        run.param(trial_params(at))
        run.point({"score": score, f"score.{kind}": score, "best_score": best}, when, number)
        run.param(
            {"score_before": at.get(semconv.TRIAL_SCORE_BEFORE), "score_after": at.get(semconv.TRIAL_SCORE_AFTER)}
        )
        run.point(usage(at, roles=False), when, number)
        if run.name != trial_name(at):
            run.name = trial_name(at)
            run.tag({TAG_NAME: run.name})
        compile_ = self._compiles.get(optimization)
        if compile_ is not None:
            self._end_trial_of(compile_, run, number, span, when)
        status, reason = status_of(span, at)
        run.end(status, when, reason)

    def _end_trial_of(self, compile_: _Compile, run: Run, number: int, span: ReadableSpan, when: int) -> None:
        at = span.attributes or {}
        kind = str(at.get(semconv.TRIAL_KIND, ""))
        candidate = at.get(semconv.CANDIDATE_ID)
        if candidate is not None:
            new = program_of(at, semconv.PROGRAM_STATE)
            if new is not None:
                self._remember(compile_, str(candidate), new)
            program = new or compile_.programs.get(str(candidate))
            if program is not None:
                run.put_program(TRIAL_PROGRAM, program)
                run.param(program_params(program[0]))
        if semconv.CANDIDATE_DIFF in at:
            run.artifacts["changes.json"] = str(at[semconv.CANDIDATE_DIFF])
        validation = compile_.run.seen_datasets.get("val")
        if validation is not None and kind in _ON_VALIDATION and at.get(semconv.TRIAL_SIZE) == validation.size:
            run.dataset(validation)
        trial = compile_.history.trial(span)
        compile_.examples += trial.size or 0
        if trial.accepted is not None:
            verdict = "accepted" if trial.accepted else "rejected"
            compile_.verdicts[verdict] = compile_.verdicts.get(verdict, 0) + 1
        compile_.run.point(
            {
                f"score.{kind}": at.get(semconv.TRIAL_SCORE),
                "best_score": at.get(semconv.TRIAL_BEST_SCORE),
                "examples_evaluated": compile_.examples,
                **trial.spent,
                **compile_.verdicts,
            },
            when,
            number,
        )
        compile_.trials.append(
            {
                "number": number,
                "kind": kind,
                "candidate": candidate,
                "parents": ", ".join(trial.parents),
                "score": at.get(semconv.TRIAL_SCORE),
                "best_score": at.get(semconv.TRIAL_BEST_SCORE),
                "accepted": trial.accepted,
                "on_pareto_front": trial.on_front,
                "reason": trial.reason,
                "phase": trial.phase,
                "size": trial.size,
                "score_before": trial.before,
                "score_after": trial.after,
                "params": json.dumps(trial.params, ensure_ascii=False, default=str),
                "changes": at.get(semconv.CANDIDATE_DIFF),
                "error": trial.error,
                "lm_calls": trial.usage.get("lm_calls"),
                "tokens": tokens(trial.usage),
                "cost": trial.usage.get("cost"),
                "spent_lm_calls": trial.spent.get("lm_calls"),
                "spent_tokens": tokens(trial.spent),
                "spent_cost": trial.spent.get("cost"),
            }
        )

    # --- evaluations and their examples -------------------------------------------------------------------------
    def _start_evaluation(self, span: ReadableSpan, at: Attributes, outside: str | None) -> None:
        key = str(at[semconv.EVALUATION_ID])
        optimization, number = at.get(semconv.OPTIMIZER_RUN_ID), at.get(semconv.TRIAL_NUMBER)
        trial = self._trials.get((str(optimization), number)) if isinstance(number, int) else None
        if trial is not None and trial.evaluation is None:
            trial.evaluation = key
            trial.tag({semconv.EVALUATION_ID: key})
            self._evaluations[key] = _Evaluation(trial, own=False)
            trial.param(
                {"num_threads": at.get(semconv.EVALUATION_NUM_THREADS), "examples": at.get(semconv.EVALUATION_SIZE)}
            )
            return
        compile_ = self._compiles.get(str(optimization))
        parent = trial or (None if compile_ is None else compile_.run)
        name = f"Evaluate {at.get(semconv.PROGRAM_NAME, '')}".rstrip()
        run = self._add(f"evaluation/{key}", EVALUATION, name, parent, outside, span)
        run.tag({name: at.get(name) for name in _EVALUATION_TAGS})
        metric, threads = at.get(semconv.EVALUATION_METRIC_NAME), at.get(semconv.EVALUATION_NUM_THREADS)
        run.param({"metric": metric, "num_threads": threads, "examples": at.get(semconv.EVALUATION_SIZE)})
        self._evaluations[key] = _Evaluation(run, own=True)
        self.own_evaluations.add(key)

    def _end_evaluation(self, span: ReadableSpan, at: Attributes, models: Mapping[str, str]) -> None:
        evaluation = self._evaluations.pop(str(at[semconv.EVALUATION_ID]), None)
        if evaluation is None:
            return
        run, when = evaluation.run, milliseconds(span.end_time)
        self._tabulate(evaluation)
        compile_, number = self._compiles.get(str(at.get(semconv.OPTIMIZER_RUN_ID))), at.get(semconv.TRIAL_NUMBER)
        if compile_ is not None and isinstance(number, int) and not evaluation.own:
            compile_.history.rows(number, evaluation.rows)
        run.point({"failures": at.get(semconv.EVALUATION_FAILURES) or None}, when)
        if not evaluation.own:
            return
        run.param(models)
        run.point({"score": at.get(semconv.EVALUATION_SCORE)}, when)
        run.point(usage(at), when)
        digest = digest_of(evaluation.rows)
        if digest is not None:
            parts = (row[part] for row in evaluation.rows for part in ("inputs", "expected"))
            columns = columns_of(part for part in parts if isinstance(part, dict))
            run.dataset(Dataset(run.name_of_data("eval"), digest, "eval", len(evaluation.rows), columns))
        if evaluation.rows and all(row["inputs"] is None for row in evaluation.rows):
            run.tag({TAG_CONTENT: HOW_TO_GET_CONTENT})
        status, reason = status_of(span, at)
        run.end(status, when, reason)

    def _end_example(self, span: ReadableSpan, at: Attributes) -> None:
        evaluation = self._evaluations.get(str(at[semconv.EVALUATION_ID]))
        if evaluation is None or span.context is None:
            return
        row = row_of(span)
        # With OpenInference's keys on, inputs and outputs are recorded once, under those.
        content = (
            semconv.MODULE_INPUTS,
            semconv.INPUT_VALUE,
            semconv.EXAMPLE_EXPECTED,
            semconv.MODULE_OUTPUTS,
            semconv.OUTPUT_VALUE,
        )
        evaluation.size += sum(len(str(at.get(key, ""))) for key in content)
        if evaluation.size > MAX_TABLE:
            evaluation.without += 1
            row.update(inputs=None, expected=None, prediction=None, feedback=None)
        evaluation.rows.append(row)

    def _tabulate(self, evaluation: _Evaluation) -> None:
        rows = evaluation.rows
        if not rows:
            return
        rows.sort(key=lambda row: row["index"] if row["index"] is not None else -1)
        inputs = [row["inputs"] for row in rows]
        columns = ["index", "id"]
        if any(row is not None for row in inputs):
            columns += ["inputs", "expected", "prediction"]
        columns += [name for name in ("score", "feedback", "error") if any(row[name] is not None for row in rows)]
        columns.append("trace_id")
        evaluation.run.table(EVALUATION_TABLE, columns, [[row[column] for column in columns] for row in rows])
        if evaluation.without:
            evaluation.run.tag({"dspy.evaluation_table": f"{evaluation.without} rows without content (size)"})

    # --- which run a span belongs to ------------------------------------------------------------------------------
    def key_of(self, span: ReadableSpan) -> str | None:
        """The key of the run that a root span's trace belongs on, by the ids it carries; None for no run."""
        at = span.attributes or {}
        optimization, evaluation = at.get(semconv.OPTIMIZER_RUN_ID), at.get(semconv.EVALUATION_ID)
        number = at.get(semconv.TRIAL_NUMBER)
        if evaluation in self.own_evaluations:
            return f"evaluation/{evaluation}"
        if optimization is None:
            return None
        return f"{optimization}/{number}" if number is not None else str(optimization)

    def metric_of(self, at: Attributes) -> str:
        """The name of the metric that scored an example. Optimizers wrap it; its own name says more."""
        name = self.metric_names.get(str(at.get(semconv.OPTIMIZER_RUN_ID)))
        return name or str(at.get(semconv.EVALUATION_METRIC_NAME) or "score")

    def _add(self, key: str, kind: str, name: str, parent: Run | None, outside: str | None, span: ReadableSpan) -> Run:
        run = Run(key, kind, as_text(name), parent, outside if parent is None else None, milliseconds(span.start_time))
        run.tag({**self.constant_tags, TAG_KIND: kind, TAG_KEY: key})
        resource = span.resource.attributes if span.resource is not None else {}
        service = str(resource.get("service.name", ""))
        run.tag({"service.name": None if service.startswith("unknown_service") else service or None})
        self.runs[key] = run
        return run
