"""Runs as they should stand in MLflow: wishes, and the names, forms and limits that MLflow has for them.

No input or output here. :mod:`.tree` makes the wishes from spans, :mod:`.writer` brings MLflow up to them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from dspy_otel.report.model import number as as_number

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

TAG_KIND: Final = "dspy.run.kind"
TAG_KEY: Final = "dspy.run.key"
"""Names a run before MLflow has: by it, a run is found again whose creation was answered by a broken connection."""
TAG_CONTENT: Final = "dspy.content"
TAG_NAME: Final = "mlflow.runName"
TAG_PARENT: Final = "mlflow.parentRunId"
TAG_NOTE: Final = "mlflow.note.content"
TAG_TABLES: Final = "mlflow.loggedArtifacts"

COMPILE, TRIAL, EVALUATION = "compile", "trial", "evaluation"
_CANDIDATE_COLUMNS: Final = (
    *("number", "kind", "candidate", "parents", "score", "best_score", "accepted", "on_pareto_front"),
    *("reason", "phase", "size", "score_before", "score_after", "params", "changes", "error"),
    *("lm_calls", "tokens", "cost", "spent_lm_calls", "spent_tokens", "spent_cost", "run_id"),
)


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

    def put_program(self, path: str, program: tuple[str, bool]) -> None:
        """Add a program as an artifact. One that lost something is named so that nobody loads it unaware.

        Args:
            path: of the artifact.
            program: its state as JSON, and whether that is whole.
        """
        state, complete = program
        if not complete:
            path = path.replace(".json", ".incomplete.json")
            self.tag({"dspy.program.state": f"{path}: cut at a limit, or with parts masked or redacted"})
        self.artifacts[path] = state

    def name_of_data(self, context: str) -> str:
        """A name for a dataset of this run: DSPy's datasets are lists and have none."""
        return f"{self.name.rpartition(' ')[2]} {context}"

    def end(self, status: str, when: int, reason: str | None, note: str | None = None) -> None:
        """The run is over; MLflow has no place for a reason but the note."""
        self.over = True
        self.ended = (status, when)
        text = "\n\n".join(part for part in (None if reason is None else f"**{status}**: {reason}", note) if part)
        if text:
            self.tag({TAG_NOTE: text})


def assessment_id(score: Score) -> str:
    """A score's id in MLflow. It follows from the score, so that one that is sent again is not stored twice."""
    text = f"{score.trace_id}/{score.span_id}/{score.name}"
    return f"a-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:32]}"


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
