"""Compile, trial and evaluate spans as a tree of MLflow runs. No input or output here, and one thread at a time.

A run is a wish: what should be in MLflow. :mod:`.runs` brings MLflow up to it, and tries again when that fails.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from dspy_otel import semconv as sc
from dspy_otel.exporters.mlflow.base import say
from dspy_otel.report import Collector, render
from dspy_otel.report.collect import is_phase, load_json, row_of, trace_id_of
from dspy_otel.report.model import number as as_number
from dspy_otel.report.model import tokens

_logger = logging.getLogger(__name__)

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"

BEST_PROGRAM: Final = "best_model.json"
"""The name DSPy's tutorial on optimizer tracking and MLflow's autologging give the optimized program."""
TRIAL_PROGRAM: Final = "model.json"
INITIAL_PROGRAM: Final = "initial_model.json"
EVALUATION_TABLE: Final = "evaluation_table.json"
CANDIDATE_TABLE: Final = "candidates.json"
PHASE_TABLE: Final = "phases.json"
REPORT: Final = "report.html"

MAX_PARAM: Final = 6000
MAX_TAG: Final = 8000
MAX_KEY: Final = 250
"""Longest values and names, in characters, that MLflow takes (``mlflow/utils/validation.py``, 3.17.2)."""

MAX_TABLE: Final = 16 * 1024 * 1024
"""Most characters of content in one evaluation table; further rows go without theirs."""
MAX_PROGRAMS: Final = 64 * 1024 * 1024
"""Most characters of candidates' states that one compile keeps for trials that score them again."""

TAG_KIND: Final = "dspy.run.kind"
TAG_KEY: Final = "dspy.run.key"
"""Names a run before MLflow has: by it, a run is found again whose creation was answered by a broken connection."""
TAG_CONTENT: Final = "dspy.content"
TAG_NAME: Final = "mlflow.runName"
TAG_PARENT: Final = "mlflow.parentRunId"
TAG_NOTE: Final = "mlflow.note.content"
TAG_TABLES: Final = "mlflow.loggedArtifacts"
HOW_TO_GET_CONTENT: Final = (
    "off: programs, instructions, demos, dataset rows and predictions are recorded with "
    "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=span_only"
)

_ENDED_BEFORE: Final = "The program ended before it did."

COMPILE, TRIAL, EVALUATION = "compile", "trial", "evaluation"

_STEPS: Final = ("step", "iteration", "depth", "strategy")
"""Choices that say where in an optimization a trial is."""

_ON_VALIDATION: Final = frozenset({sc.TRIAL_BASELINE, sc.TRIAL_FULL, sc.TRIAL_VALIDATION})
"""Trials on the whole validation set, when the size is the same too."""

_INTERRUPTIONS: Final = frozenset({"KeyboardInterrupt", "SystemExit", "CancelledError", "GeneratorExit"})
_LM_OPERATIONS: Final = frozenset({sc.OPERATION_CHAT, sc.OPERATION_TEXT_COMPLETION, sc.OPERATION_EMBEDDINGS})
# Of a compile span, as tags; everything else of interest has a place of its own.
_PLACES: Final = (sc.OPTIMIZER_RUN_ID, sc.OPTIMIZER_ROOT_RUN_ID, sc.EVALUATION_ID)
_MOST_MODELS: Final = 10
_COMPILE_TAGS: Final = (
    sc.OPTIMIZER_NAME,
    sc.OPTIMIZER_RUN_ID,
    sc.OPTIMIZER_PARENT_RUN_ID,
    sc.OPTIMIZER_ROOT_RUN_ID,
    sc.OPTIMIZER_INFERENCE_TIME,
    sc.OPTIMIZER_OUTCOME,
    sc.OPTIMIZER_SCORE_SCALE,
    sc.OPTIMIZER_WINNER_TRIAL,
    sc.PROGRAM_NAME,
    sc.PROGRAM_ID,
    sc.INITIAL_PROGRAM_ID,
)
_TRIAL_TAGS: Final = (
    sc.OPTIMIZER_NAME,
    sc.OPTIMIZER_RUN_ID,
    sc.OPTIMIZER_PHASE,
    sc.PROGRAM_NAME,
    sc.PROGRAM_ID,
    sc.TRIAL_NUMBER,
    sc.TRIAL_KIND,
    sc.TRIAL_IS_BEST,
    sc.TRIAL_ACCEPTED,
    sc.TRIAL_REASON,
    sc.TRIAL_ON_PARETO_FRONT,
    sc.CANDIDATE_ID,
    sc.CANDIDATE_PARENT_IDS,
)
_EVALUATION_TAGS: Final = (sc.PROGRAM_NAME, sc.PROGRAM_ID, sc.EVALUATION_ID, sc.EVALUATION_METRIC_NAME)
_COMPILE_METRICS: Final[Mapping[str, str]] = {
    sc.OPTIMIZER_BASELINE_SCORE: "baseline_score",
    sc.OPTIMIZER_BEST_SCORE: "best_score",
    sc.OPTIMIZER_GAIN: "gain",
    sc.OPTIMIZER_TRIALS_DONE: "trials",
    sc.OPTIMIZER_TRIALS_ACCEPTED: "accepted",
    sc.OPTIMIZER_TRIALS_REJECTED: "rejected",
    sc.OPTIMIZER_EXAMPLES_EVALUATED: "examples_evaluated",
}
_CANDIDATE_COLUMNS: Final = (
    *("number", "kind", "candidate", "parents", "score", "best_score", "accepted", "on_pareto_front"),
    *("reason", "phase", "size", "score_before", "score_after", "params", "changes", "error"),
    *("lm_calls", "tokens", "cost", "spent_lm_calls", "spent_tokens", "spent_cost", "run_id"),
)
_PHASE_USAGE: Final = ("lm_calls", "cache_hits", "input_tokens", "output_tokens", "cost")
_DATASETS: Final = (
    ("train", sc.DATASET_TRAIN_SIZE, sc.DATASET_TRAIN_DIGEST, sc.DATASET_TRAIN_ROWS),
    ("val", sc.DATASET_VAL_SIZE, sc.DATASET_VAL_DIGEST, sc.DATASET_VAL_ROWS),
)

Attributes = Mapping[str, Any]


class Metric(NamedTuple):
    """One point of a metric's curve; ``time`` in milliseconds since 1970."""

    key: str
    value: float
    time: int
    step: int


class Dataset(NamedTuple):
    """A dataset input of a run; ``columns`` are field names with MLflow types, known with content on only."""

    name: str
    digest: str
    context: str
    size: int
    columns: tuple[tuple[str, str], ...] = ()


class StoredRun(NamedTuple):
    """A run as MLflow has it."""

    run_id: str
    artifact_uri: str
    started: int
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    params: Mapping[str, str] = {}
    experiment_id: str = ""
    status: str = ""
    ended: int | None = None


class Score(NamedTuple):
    """What the metric said of one example, for the trace of that example.

    ``value`` is None when the program or the metric raised: ``error`` says what then.
    """

    key: str
    trace_id: str
    span_id: str | None
    name: str
    value: float | None
    rationale: str | None
    error: str | None
    row: int | None


@dataclass(eq=False)
class Run:
    """One MLflow run: what is wished and not yet written, and what MLflow has said.

    Attributes:
        key: our name for it.
        kind: ``compile``, ``trial`` or ``evaluation``.
        name: as the user sees it.
        parent: the run it is a step of.
        outside: id of a run of the user's own that it is a step of.
        started: milliseconds since 1970.
        tags, params, metrics, datasets, artifacts: not yet written (artifacts by path).
        ended: status and time in milliseconds, once it has ended and MLflow has not been told.
        run_id, artifact_uri: from MLflow, once it exists there.
        tried: its creation has been tried, perhaps with success.
        over: nothing more comes from its span.
        evaluation: id of a trial's own evaluation.
        said, written_params, seen_datasets, tables: what has been wished before, written or not.
        winner: key of the winning trial's run, until that is known by its id.
        candidates: the trials of a compile, each with the key of its run, until those are known by their ids.
    """

    key: str
    kind: str
    name: str
    parent: Run | None
    outside: str | None
    started: int
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    datasets: list[Dataset] = field(default_factory=list)
    artifacts: dict[str, str] = field(default_factory=dict)
    ended: tuple[str, int] | None = None
    run_id: str | None = None
    artifact_uri: str = ""
    tried: bool = False
    over: bool = False
    evaluation: str | None = None
    said: dict[str, str] = field(default_factory=dict)
    written_params: set[str] = field(default_factory=set)
    seen_datasets: dict[str, Dataset] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    winner: str | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dirty(self) -> bool:
        """Whether MLflow lacks something of it."""
        return self.run_id is None or bool(
            self.tags or self.params or self.metrics or self.datasets or self.artifacts or self.ended
        )

    def name_others(self, ids: Mapping[str, str]) -> None:
        """Say which runs its trials are: they have ids by now, so far as they exist.

        Args:
            ids: of runs, by key.
        """
        if self.winner is not None:
            self.tag({"dspy.winner.run_id": ids.get(self.winner)})
            self.winner = None
        if self.candidates:
            rows = [
                [ids.get(trial["key"]) if column == "run_id" else trial.get(column) for column in _CANDIDATE_COLUMNS]
                for trial in self.candidates
            ]
            self.table(CANDIDATE_TABLE, list(_CANDIDATE_COLUMNS), rows)
            self.candidates = []

    def tag(self, values: Mapping[str, Any]) -> None:
        """Set tags; what is None is left out."""
        for key, value in values.items():
            text = None if value is None else cut(as_text(value), MAX_TAG)
            if text is not None and self.said.get(key) != text:
                self.said[key] = self.tags[key[:MAX_KEY]] = text

    def param(self, values: Mapping[str, Any]) -> None:
        """Set parameters that are not set yet: MLflow refuses to change one."""
        for key, value in values.items():
            name = safe_key(key)
            if value is not None and name not in self.written_params:
                self.written_params.add(name)
                self.params[name] = cut(as_text(value), MAX_PARAM)

    def point(self, values: Mapping[str, Any], when: int, step: int = 0) -> None:
        """Add a point to each metric; what is no number is left out: NaN and infinity cannot be sent as JSON."""
        for key, value in values.items():
            found = as_number(value)
            if found is not None:
                self.metrics.append(Metric(safe_key(key), found, when, step))

    def dataset(self, dataset: Dataset) -> None:
        """Add a dataset input, once."""
        if dataset.context not in self.seen_datasets:
            self.seen_datasets[dataset.context] = dataset
            self.datasets.append(dataset)

    def table(self, path: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Add an artifact that MLflow shows as a table, in the form of its ``log_table``."""
        self.artifacts[path] = strict_json({"columns": columns, "data": rows})
        self.tables.append(path)
        self.tag({TAG_TABLES: json.dumps([{"path": table, "type": "table"} for table in self.tables])})


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
        model = attributes.get(sc.GEN_AI_REQUEST_MODEL)
        if model is None or attributes.get(sc.GEN_AI_OPERATION_NAME) not in _LM_OPERATIONS:
            return
        role = str(attributes.get(sc.LM_ROLE, sc.ROLE_TASK))
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
        key = {COMPILE: sc.OPTIMIZER_RUN_ID, EVALUATION: sc.EVALUATION_ID}.get(str(kind_of(span.name, at)))
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
            compile_ = self._compiles.get(str(at[sc.OPTIMIZER_RUN_ID]))
            if compile_ is not None:
                compile_.history.step(span)
        elif sc.EVALUATION_ID in at:
            self._end_example(span, at)

    def stop(self, when: int) -> None:
        """The program ends: whatever still runs is killed."""
        for key in list(self._evaluations):
            self._tabulate(self._evaluations.pop(key))
        for compile_ in self._compiles.values():
            at = dict(compile_.span.attributes or {})
            self._describe_compile(compile_, at)
            self._list_candidates(compile_)
            at[sc.OPTIMIZER_OUTCOME] = "interrupted"
            self._report(compile_, at, when * 1_000_000, _ENDED_BEFORE)
        for run in self.runs.values():
            if not run.over:
                end_run(run, KILLED, when, _ENDED_BEFORE)
        self._compiles.clear()
        self._trials.clear()

    def settle(self, run: Run) -> None:
        """Forget a run that is over and in MLflow, unless something may still refer to it."""
        if run.over and not run.dirty:
            self.runs.pop(run.key, None)

    # --- compiles -----------------------------------------------------------------------------------------------
    def _start_compile(self, span: ReadableSpan, at: Attributes, outside: str | None) -> None:
        key = str(at[sc.OPTIMIZER_RUN_ID])
        parent = self._compiles.get(str(at.get(sc.OPTIMIZER_PARENT_RUN_ID)))
        name = " ".join(str(at[part]) for part in (sc.OPTIMIZER_NAME, sc.PROGRAM_NAME) if part in at)
        run = self._add(key, COMPILE, name, None if parent is None else parent.run, outside, span)
        self._compiles[key] = _Compile(run, span)

    def _describe_compile(self, compile_: _Compile, at: Attributes) -> None:
        run = compile_.run
        prefix = sc.OPTIMIZER_PARAMS_PREFIX
        run.param({key[len(prefix) :]: value for key, value in at.items() if key.startswith(prefix)})
        for key in (sc.DATASET_TRAIN_SIZE, sc.DATASET_VAL_SIZE, sc.OPTIMIZER_TRIALS_PLANNED):
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
            run.dataset(Dataset(context_name(run, context), str(at.get(digest)), context, int(at[size]), columns))
            if table is not None:
                fields = [name for name, _ in columns]
                data = [[row.get(name) for name in fields] for row in table]
                run.table(f"{context}set.json", fields, data)
                if len(table) < int(at[size]):
                    run.tag({f"dspy.dataset.{context}.rows": f"{len(table)} of {at[size]} (content limit)"})
        initial = program_of(at, sc.INITIAL_PROGRAM_STATE)
        if initial is not None and at.get(sc.INITIAL_PROGRAM_ID) not in (None, *compile_.programs):
            self._remember(compile_, str(at[sc.INITIAL_PROGRAM_ID]), initial)
            if run.parent is None:
                put_program(run, INITIAL_PROGRAM, initial)

    def _remember(self, compile_: _Compile, candidate: str, program: tuple[str, bool]) -> None:
        if candidate in compile_.programs:
            return
        compile_.programs[candidate] = program
        compile_.size += len(program[0])
        while compile_.size > MAX_PROGRAMS and len(compile_.programs) > 1:
            oldest = next(iter(compile_.programs))
            compile_.size -= len(compile_.programs.pop(oldest)[0])

    def _end_compile(self, span: ReadableSpan, at: Attributes, models: Mapping[str, str]) -> None:
        key = str(at[sc.OPTIMIZER_RUN_ID])
        compile_ = self._compiles.pop(key, None)
        if compile_ is None:
            return
        run, when = compile_.run, milliseconds(span.end_time)
        self._describe_compile(compile_, at)
        run.param(models)
        run.tag({name: at.get(name) for name in _COMPILE_TAGS})
        step = max([trial["number"] for trial in compile_.trials], default=0)
        # The best score under its children's name too: MLflow's table of runs compares by name.
        run.point({"score": at.get(sc.OPTIMIZER_BEST_SCORE)}, when, step)
        run.point({label: at.get(name) for name, label in _COMPILE_METRICS.items()}, when, step)
        run.point(usage(at), when, step)
        best = program_of(at, sc.PROGRAM_STATE)
        if best is None and at.get(sc.PROGRAM_ID) is not None:
            best = compile_.programs.get(str(at[sc.PROGRAM_ID]))
        if best is not None:
            put_program(run, BEST_PROGRAM, best)
        elif not compile_.programs:
            run.tag({TAG_CONTENT: HOW_TO_GET_CONTENT})
        winner = compile_.runs.get(int(at.get(sc.OPTIMIZER_WINNER_TRIAL, -1)))
        if winner is not None:
            what, comma, where = winner.name.partition(", ")
            winner.tag({TAG_NAME: f"{what} (winner){comma}{where}", "dspy.winner": "true"})
            self.runs.setdefault(winner.key, winner)
            run.winner = winner.key
        if self.whole or len(compile_.trials) >= int(at.get(sc.OPTIMIZER_TRIALS_DONE, 0)):
            self._list_candidates(compile_)
        outcome = {"failed": FAILED, "interrupted": KILLED}.get(str(at.get(sc.OPTIMIZER_OUTCOME)))
        status, reason = status_of(span, at)
        self._report(compile_, at, span.end_time, reason, models)
        above = self._compiles.get(str(at.get(sc.OPTIMIZER_PARENT_RUN_ID)))
        if above is not None:
            above.history.step(span)
        end_run(run, outcome or status, when, reason, note=summary(at))
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
        optimization, number = str(at[sc.OPTIMIZER_RUN_ID]), int(at[sc.TRIAL_NUMBER])
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
        optimization, number = str(at[sc.OPTIMIZER_RUN_ID]), int(at[sc.TRIAL_NUMBER])
        run = self._trials.get((optimization, number))
        if run is None:
            return
        when = milliseconds(span.end_time)
        kind = str(at.get(sc.TRIAL_KIND, ""))
        score, best = at.get(sc.TRIAL_SCORE), at.get(sc.TRIAL_BEST_SCORE)
        run.tag({key: at.get(key) for key in _TRIAL_TAGS})
        run.param(trial_params(at))
        run.point({"score": score, f"score.{kind}": score, "best_score": best}, when, number)
        run.param({"score_before": at.get(sc.TRIAL_SCORE_BEFORE), "score_after": at.get(sc.TRIAL_SCORE_AFTER)})
        run.point(usage(at, roles=False), when, number)
        if run.name != trial_name(at):
            run.name = trial_name(at)
            run.tag({TAG_NAME: run.name})
        compile_ = self._compiles.get(optimization)
        if compile_ is not None:
            self._end_trial_of(compile_, run, number, span, when)
        status, reason = status_of(span, at)
        end_run(run, status, when, reason)

    def _end_trial_of(self, compile_: _Compile, run: Run, number: int, span: ReadableSpan, when: int) -> None:
        at = span.attributes or {}
        kind = str(at.get(sc.TRIAL_KIND, ""))
        candidate = at.get(sc.CANDIDATE_ID)
        if candidate is not None:
            new = program_of(at, sc.PROGRAM_STATE)
            if new is not None:
                self._remember(compile_, str(candidate), new)
            program = new or compile_.programs.get(str(candidate))
            if program is not None:
                put_program(run, TRIAL_PROGRAM, program)
                run.param(program_params(program[0]))
        if sc.CANDIDATE_DIFF in at:
            run.artifacts["changes.json"] = str(at[sc.CANDIDATE_DIFF])
        validation = compile_.run.seen_datasets.get("val")
        if validation is not None and kind in _ON_VALIDATION and at.get(sc.TRIAL_SIZE) == validation.size:
            run.dataset(validation)
        trial = compile_.history.trial(span)
        compile_.examples += trial.size or 0
        if trial.accepted is not None:
            verdict = "accepted" if trial.accepted else "rejected"
            compile_.verdicts[verdict] = compile_.verdicts.get(verdict, 0) + 1
        compile_.run.point(
            {
                f"score.{kind}": at.get(sc.TRIAL_SCORE),
                "best_score": at.get(sc.TRIAL_BEST_SCORE),
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
                "score": at.get(sc.TRIAL_SCORE),
                "best_score": at.get(sc.TRIAL_BEST_SCORE),
                "accepted": trial.accepted,
                "on_pareto_front": trial.on_front,
                "reason": trial.reason,
                "phase": trial.phase,
                "size": trial.size,
                "score_before": trial.before,
                "score_after": trial.after,
                "params": json.dumps(trial.params, ensure_ascii=False, default=str),
                "changes": at.get(sc.CANDIDATE_DIFF),
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
        key = str(at[sc.EVALUATION_ID])
        optimization, number = at.get(sc.OPTIMIZER_RUN_ID), at.get(sc.TRIAL_NUMBER)
        trial = self._trials.get((str(optimization), number)) if isinstance(number, int) else None
        if trial is not None and trial.evaluation is None:
            trial.evaluation = key
            trial.tag({sc.EVALUATION_ID: key})
            self._evaluations[key] = _Evaluation(trial, own=False)
            trial.param({"num_threads": at.get(sc.EVALUATION_NUM_THREADS), "examples": at.get(sc.EVALUATION_SIZE)})
            return
        compile_ = self._compiles.get(str(optimization))
        parent = trial or (None if compile_ is None else compile_.run)
        name = f"Evaluate {at.get(sc.PROGRAM_NAME, '')}".rstrip()
        run = self._add(f"evaluation/{key}", EVALUATION, name, parent, outside, span)
        run.tag({name: at.get(name) for name in _EVALUATION_TAGS})
        metric, threads = at.get(sc.EVALUATION_METRIC_NAME), at.get(sc.EVALUATION_NUM_THREADS)
        run.param({"metric": metric, "num_threads": threads, "examples": at.get(sc.EVALUATION_SIZE)})
        self._evaluations[key] = _Evaluation(run, own=True)
        self.own_evaluations.add(key)

    def _end_evaluation(self, span: ReadableSpan, at: Attributes, models: Mapping[str, str]) -> None:
        evaluation = self._evaluations.pop(str(at[sc.EVALUATION_ID]), None)
        if evaluation is None:
            return
        run, when = evaluation.run, milliseconds(span.end_time)
        self._tabulate(evaluation)
        compile_, number = self._compiles.get(str(at.get(sc.OPTIMIZER_RUN_ID))), at.get(sc.TRIAL_NUMBER)
        if compile_ is not None and isinstance(number, int) and not evaluation.own:
            compile_.history.rows(number, evaluation.rows)
        run.point({"failures": at.get(sc.EVALUATION_FAILURES) or None}, when)
        if not evaluation.own:
            return
        run.param(models)
        run.point({"score": at.get(sc.EVALUATION_SCORE)}, when)
        run.point(usage(at), when)
        digest = digest_of(evaluation.rows)
        if digest is not None:
            parts = (row[part] for row in evaluation.rows for part in ("inputs", "expected"))
            columns = columns_of(part for part in parts if isinstance(part, dict))
            run.dataset(Dataset(context_name(run, "eval"), digest, "eval", len(evaluation.rows), columns))
        if evaluation.rows and all(row["inputs"] is None for row in evaluation.rows):
            run.tag({TAG_CONTENT: HOW_TO_GET_CONTENT})
        status, reason = status_of(span, at)
        end_run(run, status, when, reason)

    def _end_example(self, span: ReadableSpan, at: Attributes) -> None:
        evaluation = self._evaluations.get(str(at[sc.EVALUATION_ID]))
        if evaluation is None or span.context is None:
            return
        row = row_of(span)
        # With OpenInference's keys on, inputs and outputs are recorded once, under those.
        content = (sc.MODULE_INPUTS, sc.INPUT_VALUE, sc.EXAMPLE_EXPECTED, sc.MODULE_OUTPUTS, sc.OUTPUT_VALUE)
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
        optimization, evaluation = at.get(sc.OPTIMIZER_RUN_ID), at.get(sc.EVALUATION_ID)
        number = at.get(sc.TRIAL_NUMBER)
        if evaluation in self.own_evaluations:
            return f"evaluation/{evaluation}"
        if optimization is None:
            return None
        return f"{optimization}/{number}" if number is not None else str(optimization)

    def metric_of(self, at: Attributes) -> str:
        """The name of the metric that scored an example. Optimizers wrap it; its own name says more."""
        name = self.metric_names.get(str(at.get(sc.OPTIMIZER_RUN_ID)))
        return name or str(at.get(sc.EVALUATION_METRIC_NAME) or "score")

    def _add(self, key: str, kind: str, name: str, parent: Run | None, outside: str | None, span: ReadableSpan) -> Run:
        run = Run(key, kind, as_text(name), parent, outside if parent is None else None, milliseconds(span.start_time))
        run.tag({**self.constant_tags, TAG_KIND: kind, TAG_KEY: key})
        resource = span.resource.attributes if span.resource is not None else {}
        service = str(resource.get("service.name", ""))
        run.tag({"service.name": None if service.startswith("unknown_service") else service or None})
        self.runs[key] = run
        return run


# --- pure helpers -----------------------------------------------------------------------------------------------


def kind_of(name: str, at: Attributes) -> str | None:
    """Which of our spans this is, if it has a run of its own."""
    word = name.split(" ", 1)[0]
    if word == sc.SPAN_COMPILE and sc.OPTIMIZER_RUN_ID in at:
        return COMPILE
    if word == sc.SPAN_TRIAL and sc.OPTIMIZER_RUN_ID in at and isinstance(at.get(sc.TRIAL_NUMBER), int):
        return TRIAL
    if word == sc.SPAN_EVALUATE and sc.EVALUATION_ID in at:
        return EVALUATION
    return None


def is_example(name: str) -> bool:
    """Whether a span is one example of an evaluation."""
    return name.split(" ", 1)[0] == sc.SPAN_EXAMPLE


def end_run(run: Run, status: str, when: int, reason: str | None, note: str | None = None) -> None:
    """A run is over; MLflow has no place for a reason but the note."""
    run.over = True
    run.ended = (status, when)
    text = "\n\n".join(part for part in (None if reason is None else f"**{status}**: {reason}", note) if part)
    if text:
        run.tag({TAG_NOTE: text})


def status_of(span: ReadableSpan, at: Attributes) -> tuple[str, str | None]:
    """Status of the run of a span, and the reason when it did not finish."""
    if span.status.status_code is not StatusCode.ERROR:
        return FINISHED, None
    error = str(at.get(sc.ERROR_TYPE) or "error")
    reason = f"{error}: {span.status.description}" if span.status.description else error
    return (KILLED if error.rpartition(".")[2] in _INTERRUPTIONS else FAILED), reason


def summary(at: Attributes) -> str | None:
    """One sentence about a compile's result, for the note of its run."""
    best, baseline = at.get(sc.OPTIMIZER_BEST_SCORE), at.get(sc.OPTIMIZER_BASELINE_SCORE)
    if best is None:
        return None
    text = f"Best score **{best:g}**"
    if at.get(sc.OPTIMIZER_WINNER_TRIAL) is not None:
        text += f" (trial {at[sc.OPTIMIZER_WINNER_TRIAL]})"
    if baseline is not None:
        text += f", baseline {baseline:g}"
    return f"{text}, {at.get(sc.OPTIMIZER_TRIALS_DONE, 0)} trials. More in {REPORT}, under Artifacts."


def score_of_span(span: ReadableSpan, key: str, name: str) -> Score | None:
    """The verdict on an example, or None when its span carries none (a straggler's second answer)."""
    at = span.attributes or {}
    if not is_example(span.name) or span.context is None:
        return None
    value, error = at.get(sc.EXAMPLE_SCORE), at.get(sc.ERROR_TYPE)
    if value is None and error is None:
        return None
    feedback, index = at.get(sc.EXAMPLE_FEEDBACK), at.get(sc.EXAMPLE_INDEX)
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


def assessment_id(score: Score) -> str:
    """A score's id in MLflow. It follows from the score, so that one that is sent again is not stored twice."""
    text = f"{score.trace_id}/{score.span_id}/{score.name}"
    return f"a-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:32]}"


def trial_name(at: Attributes) -> str:
    """A trial's number, kind and verdict first, for tables are narrow; then the step of the optimizer it is part of."""
    name = f"trial {at[sc.TRIAL_NUMBER]} {at.get(sc.TRIAL_KIND, '')}".rstrip()
    accepted = at.get(sc.TRIAL_ACCEPTED)
    if isinstance(accepted, bool):
        name += " accepted" if accepted else " rejected"
    chosen = {part: at.get(sc.TRIAL_PARAMS_PREFIX + part) for part in _STEPS}
    said = [
        f"{part} {value}" if part != "strategy" else str(value) for part, value in chosen.items() if value is not None
    ]
    return ", ".join([name, *([" ".join(said)] if said else [])])


def trial_params(at: Attributes) -> dict[str, Any]:
    """What the optimizer chose for a candidate."""
    prefix = sc.TRIAL_PARAMS_PREFIX
    return {
        "candidate": at.get(sc.CANDIDATE_ID),
        "parents": at.get(sc.CANDIDATE_PARENT_IDS),
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
    """A program's state on a span, and whether it is whole (nothing cut, masked or redacted)."""
    state = at.get(key)
    return None if state is None else (str(state), at.get(f"{key}.complete") is not False)


def put_program(run: Run, path: str, program: tuple[str, bool]) -> None:
    """Add a program as an artifact. One that lost something is named so that nobody loads it unaware."""
    state, complete = program
    if not complete:
        path = path.replace(".json", ".incomplete.json")
        run.tag({"dspy.program.state": f"{path}: cut at a limit, or with parts masked or redacted"})
    run.artifacts[path] = state


def usage(at: Attributes, roles: bool = True) -> dict[str, Any]:
    """Tokens, cost and calls of a span's totals, named as the curves are.

    With ``roles`` by role too; without, only when there is more than one: MLflow's table has a column for each name.
    """
    prefix = sc.USAGE_PREFIX
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


def context_name(run: Run, context: str) -> str:
    """A dataset's name: DSPy's datasets are lists and have none."""
    return f"{run.name.rpartition(' ')[2]} {context}"


def load_table(value: Any) -> list[dict[str, Any]] | None:
    """Dataset rows from a span; a mark that says how many were cut is no row."""
    loaded = load_json(value)
    return [row for row in loaded if isinstance(row, dict)] if isinstance(loaded, list) else None


def as_text(value: Any) -> str:
    """A value as a parameter or tag."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # MLflow refuses half a character, and all that comes with it
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple, dict)):
        return as_text(json.dumps(value, ensure_ascii=False, default=str))
    return str(value)


def strict_json(value: Any) -> str:
    """JSON that browsers take too: without NaN and infinity."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and as_number(value) is None else value


def cut(text: str, limit: int) -> str:
    """At most ``limit`` characters; says so when that is not all."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def safe_key(key: str) -> str:
    """A name MLflow takes: letters, digits and ``_-. /:`` only."""
    return "".join(c if (c.isalnum() and c.isascii()) or c in "_-. /:" else "_" for c in key)[:MAX_KEY]


def milliseconds(nanoseconds: int | None) -> int:
    """OpenTelemetry's time as MLflow's; now, when it is not known."""
    return (time.time_ns() if nanoseconds is None else nanoseconds) // 1_000_000
