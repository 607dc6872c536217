"""A backend in memory, and a program that emits what the instrumentation emits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from dspy_otel import semconv
from dspy_otel.mlflow import MLflowSpanExporter
from dspy_otel.mlflow.backends import Batch
from dspy_otel.mlflow.backends.base import CreatedRun
from dspy_otel.mlflow.exporter import track_runs
from dspy_otel.mlflow.retry import ExportError
from dspy_otel.mlflow.runs import Assessment, Score
from dspy_otel.record.otlp import decode

AWAY = ExportError("unreachable", "MLflow is away.", unavailable=True)


class Memory:
    """A backend in memory; while ``failure`` is set, every call raises it.

    Attributes:
        runs, links, scores, spans: what it has.
        asked: number of calls, failures included.
        down: spans alone cannot be sent.
    """

    parallel = True
    name = "memory"
    experiment_in_use = "0"

    def __init__(self) -> None:
        self.failure: ExportError | None = None
        self.down = False
        self.runs: dict[str, dict[str, Any]] = {}
        self.links: dict[str, list[str]] = {}
        self.scores: list[tuple[str, float | None, str | None]] = []
        self.expectations: list[tuple[str, Any, str | None]] = []
        self.spans: dict[int, ReadableSpan] = {}
        self.answered = self.asked = 0
        self.lose_answers = 0

    @property
    def delivered(self) -> set[str]:
        return {f"tr-{span.context.trace_id:032x}" for span in self.spans.values()}

    def answer(self) -> None:
        self.asked += 1
        if self.failure is not None:
            raise self.failure
        self.answered += 1

    def deliver(self, batch: Batch) -> bool:
        return False

    def send(self, body: bytes) -> None:
        self.answer()
        if self.down:
            raise AWAY
        self.spans.update((span.context.span_id, span) for span in decode(body))

    def create_run(
        self, key: str, tags: Mapping[str, str], started: int, experiment_id: str | None = None, *, known: bool = False
    ) -> CreatedRun:
        self.answer()
        run_id = f"id of {key}"
        if run_id in self.runs:
            assert known
            return CreatedRun(run_id, "")
        self.runs[run_id] = {"tags": dict(tags), "metrics": [], "params": {}, "datasets": [], "artifacts": {}}
        if self.lose_answers:
            self.lose_answers -= 1
            raise ExportError("unreachable", "the answer got lost", unavailable=True)
        return CreatedRun(run_id, "")

    def find_run(self, key: str, experiment_id: str | None = None) -> CreatedRun | None:
        self.answer()
        return CreatedRun(f"id of {key}", "") if f"id of {key}" in self.runs else None

    def log(self, run_id: str, metrics: Sequence[Any], params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self.answer()
        assert len(metrics) + len(params) + len(tags) <= 1000
        stored = self.runs[run_id]
        stored["metrics"] += [metric for metric in metrics if metric not in stored["metrics"]]
        assert all(stored["params"].get(name, value) == value for name, value in params.items())
        stored["params"].update(params)
        stored["tags"].update(tags)

    def add_datasets(self, run_id: str, datasets: Sequence[Any]) -> None:
        self.answer()
        self.runs[run_id]["datasets"] += [one for one in datasets if one not in self.runs[run_id]["datasets"]]

    def url(self, run_id: str, experiment_id: str | None = None) -> str | None:
        return f"memory/{run_id}"

    def put_artifact(self, run: CreatedRun, path: str, text: str) -> None:
        self.answer()
        self.runs[run.run_id]["artifacts"][path] = text

    def end_run(self, run_id: str, status: str, when: int) -> None:
        self.answer()
        self.runs[run_id]["status"] = status

    def link(self, run_id: str, trace_ids: Sequence[str]) -> None:
        self.answer()
        assert len(set(trace_ids)) == len(trace_ids) <= 100  # MLflow refuses all of them otherwise
        there = self.links.setdefault(run_id, [])
        there.extend(trace_id for trace_id in trace_ids if trace_id not in there)

    def assess(self, score: Assessment, run_id: str | None) -> None:
        self.answer()
        assert score.trace_id in self.delivered
        place = self.scores if isinstance(score, Score) else self.expectations
        if (score.trace_id, score.value, run_id) not in place:
            place.append((score.trace_id, score.value, run_id))

    def find_runs(self, run_id: str | None, condition: str, experiment_id: str | None = None) -> list[Any]:
        return []

    def read_artifact(self, run: CreatedRun, path: str) -> str | None:
        return None

    def set_deadline(self, until: float) -> None:
        pass

    def close(self) -> None:
        pass

    def after_fork(self) -> None:
        pass


class Exporter(MLflowSpanExporter):
    """Ours, with a backend in memory at the other end."""

    def __init__(self, store: Memory, runs: bool = True) -> None:
        super().__init__("sqlite:///never-opened.db", runs=runs)
        self.store = store
        self.processor._connect = self.processor.worker._connect = lambda: store  # in a forked child too
        self.processor._recovered = True  # what other tests have left is not for this store


class Program:
    """Emits what the instrumentation emits, span by span."""

    def __init__(self, store: Memory) -> None:
        self.exporter = Exporter(store)
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(self.exporter))
        track_runs(self.provider)
        self.tracer = self.provider.get_tracer(semconv.SCOPE_NAME)

    @property
    def worker(self) -> Any:
        return self.exporter.processor.worker

    @property
    def journal(self) -> Any:
        return self.exporter.processor.journal

    def start(self, name: str, parent: Any = None, **attributes: Any) -> Any:
        context = trace.set_span_in_context(parent) if parent is not None else None
        at = {f"dspy.{key.replace('_', '.')}": value for key, value in attributes.items()}
        return self.tracer.start_span(name, context=context, attributes=at)

    def compile(self, run_id: str = "r1") -> Any:
        return self.start("compile Best", optimizer_run_id=run_id, optimizer_name="Best", program_name="QA")

    def trial(
        self, parent: Any, number: int, score: float, run_id: str = "r1", examples: int = 0, **usage: float
    ) -> None:
        stamps = {"optimizer_run_id": run_id, "trial_number": number}
        span = self.start("trial", parent, trial_kind="full", **stamps)
        if examples:
            evaluation = self.start("evaluate QA", span, evaluation_id=f"{run_id}e{number}", **stamps)
            for index in range(examples):
                example = {"evaluation_id": f"{run_id}e{number}", "example_index": index, "example_score": 1.0}
                self.start("example QA", None, **example, **stamps).end()
            evaluation.end()
        span.set_attribute(semconv.TRIAL_SCORE, score)
        span.set_attributes({semconv.USAGE_PREFIX + name: value for name, value in usage.items()})
        span.end()
