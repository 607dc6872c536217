"""What MLflow lacks: the runs that :mod:`.runs` gives, merged, without what has been written.

Only one thread may use it at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel.mlflow.runs import (
    EVALUATION,
    KILLED,
    RUN_ID,
    TAG_NAME,
    TAG_NOTE,
    Dataset,
    Metric,
    Run,
    milliseconds,
    runs_of,
)
from dspy_otel.mlflow.versions import PARTS, Prompt, Version
from dspy_otel.record.history import History
from dspy_otel.record.model import Optimization, Record, Trial
from dspy_otel.record.spans import Kind, kind_of


@dataclass(frozen=True, slots=True)
class UserRun:
    """A run that the user started around an optimization or evaluation, and its experiment."""

    run_id: str
    experiment_id: str | None = None


@dataclass(eq=False)
class Pending:
    """One MLflow run: what is not yet written, and its id in MLflow.

    Attributes:
        key, kind, name, parent, user_run, started: as in :class:`~dspy_otel.mlflow.runs.Run`.
        parent_key: key of its parent, which may be unknown here.
        tags, params, metrics, datasets, artifacts: not yet written.
        references, candidates: likewise; as in :class:`~dspy_otel.mlflow.runs.Run`.
        ended: status and time in milliseconds, once it has ended, until MLflow has them.
        run_id, artifact_uri: from MLflow, once it exists there.
        tried: its creation has been tried, perhaps with success.
        over: it has ended.
        group: the optimization or evaluation whose spans it is made of.
        version: models, prompts and datasets that follow from its result, not yet written.
        prompts: numbers of the versions of those of its prompts that are written.
        experiment: id of the experiment of the user's run that it is a step of, if there is one.
        produced: artifacts that were added since they were last counted.
        seen: values that were added before, written or not.
    """

    key: str
    kind: str
    name: str
    parent: Pending | None
    user_run: str | None
    started: int
    parent_key: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    datasets: list[Dataset] = field(default_factory=list)
    artifacts: dict[str, str] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    candidates: list[Mapping[str, Any]] = field(default_factory=list)
    ended: tuple[str, int] | None = None
    run_id: str | None = None
    artifact_uri: str = ""
    tried: bool = False
    over: bool = False
    group: str = ""
    experiment: str | None = None
    version: Version | None = None
    prompts: dict[Prompt, int] = field(default_factory=dict)
    produced: int = 0
    seen: dict[tuple[str, str], Any] = field(default_factory=dict)

    @property
    def dirty(self) -> bool:
        """Whether MLflow lacks something of it."""
        return self.run_id is None or bool(
            self.tags or self.params or self.metrics or self.datasets or self.artifacts or self.ended or self.version
        )

    def add(self, run: Run) -> None:
        """Add what a run should have and was not added before."""
        self.metrics += run.metrics
        for name, value in run.tags.items():
            if self._is_new("tag", name, value):
                self.tags[name] = value
        for name, value in run.params.items():
            if ("param", name) not in self.seen and self._is_new("param", name, None):
                self.params[name] = value
        for dataset in run.datasets:
            if self._is_new("dataset", dataset.context, dataset.digest):
                self.datasets.append(dataset)
        for path, text in run.artifacts.items():
            if self._is_new("artifact", path, hash(text)):
                self.produced += path not in self.artifacts
                self.artifacts[path] = text
        self.references.update(run.references)
        self.candidates += run.candidates
        self.version = run.version or self.version
        if run.status is not None and run.ended is not None:
            self.over, self.ended = True, (run.status, run.ended)

    @property
    def referenced(self) -> list[str]:
        """Keys of the runs that its tags and tables refer to."""
        return [*self.references.values(), *(str(row[RUN_ID]) for row in self.candidates)]

    def resolve_references(self, ids: Mapping[str, str]) -> None:
        """Replace the keys of its trials by the ids that their runs have in MLflow."""
        run = Run(self.key, self.kind, references=self.references, candidates=tuple(self.candidates))
        self.add(run.resolved(ids))
        self.references, self.candidates = {}, []

    def _is_new(self, kind: str, name: str, value: Any) -> bool:
        if (kind, name) in self.seen and self.seen[kind, name] == value:
            return False
        self.seen[kind, name] = value
        return True


class PendingRuns:
    """All runs that are not yet in MLflow as they should be.

    Args:
        versions: tags that every run carries.
        history: reads the spans.
        parts: what becomes of results beside their runs: models, prompts, datasets.

    Attributes:
        history: reads the spans.
        runs: by key.
    """

    def __init__(
        self, versions: Mapping[str, str], history: History | None = None, parts: Collection[str] = PARTS
    ) -> None:
        self.history = history or History()
        self.runs: dict[str, Pending] = {}
        self._versions = versions
        self._parts = parts
        self._known: dict[str, Pending] = {}
        self._live: dict[int, ReadableSpan] = {}

    @property
    def lacking(self) -> list[Pending]:
        """Runs that MLflow does not have in full."""
        return [run for run in list(self.runs.values()) if run.dirty]

    def start(self, span: ReadableSpan, user_run: UserRun | None, group: str = "") -> None:
        """Add a span that has started, in a run that the user started, if there is one."""
        if kind_of(span) is Kind.COMPILE and span.context is not None and span.end_time is None:
            self._live[span.context.span_id] = span
        self._take(self.history.start(span), user_run, group)

    def refresh(self) -> None:
        """Read the attributes that running compiles have got since they started: most parameters come later."""
        for span in self._live.values():
            self._take(self.history.start(span), None, None)

    def end(self, span: ReadableSpan, group: str = "") -> None:
        """Add a span that has ended."""
        if span.context is not None:
            self._live.pop(span.context.span_id, None)
        self._take(self.history.end(span), None, group)

    def stop(self, when: int) -> None:
        """End as killed what still runs: the program ends."""
        self.refresh()
        self._take(self.history.stop(when), None, None)
        self._live.clear()
        self._known.clear()

    def settle(self, run: Pending) -> None:
        """Forget a run that is over and in MLflow, unless something may still be added to it."""
        if run.over and not run.dirty:
            self.runs.pop(run.key, None)

    def _take(self, changed: Iterable[Record], user_run: UserRun | None, group: str | None) -> None:
        for record in changed:
            for run in runs_of(record, self._versions, None if user_run is None else user_run.run_id, self._parts):
                self._add(run, user_run, group)
            if isinstance(record, Optimization) and record.ended is not None:
                for key in [key for key in self._known if key == record.id or key.startswith(f"{record.id}/")]:
                    self._end_lost(self._known.pop(key), record.ended)
            elif isinstance(record, Trial) and record.ended is not None and record.examples_so_far is None:
                self._known.pop(f"{record.optimization}/{record.number}", None)

    def _end_lost(self, run: Pending, when: int) -> None:
        """End a trial whose optimization has ended: its own end was dropped because there was no room."""
        if not run.over:
            run.over, run.ended = True, (KILLED, milliseconds(when))
            run.tags[TAG_NOTE] = f"**{KILLED}**: The end of its span was lost."
            self.runs[run.key] = run

    def _add(self, run: Run, user_run: UserRun | None, group: str | None) -> None:
        known = self._known.get(run.key)
        if run.name is not None and (known is None or (known.over and run.status is None)):
            parent = self._known.get(run.parent or "")
            if parent is not None:
                user_run = None
            known = Pending(
                *(run.key, run.kind, run.name, parent, None if user_run is None else user_run.run_id, run.started or 0),
                run.parent,
                group=group or "",
                experiment=None if user_run is None else user_run.experiment_id,
            )
            if parent is not None:
                known.experiment = parent.experiment
            self._known[run.key] = known
        if known is None:
            return
        if run.name is not None and run.name != known.name:
            known.name = run.name
            known.tags[TAG_NAME] = run.name
        known.add(run)
        self.runs[run.key] = known
        if run.kind == EVALUATION and known.over:
            del self._known[run.key]
