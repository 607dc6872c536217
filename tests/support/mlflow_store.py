"""One experiment of a real MLflow, written by our exporter and read back by MLflow's own client."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspy_otel import DSPyInstrumentor, semconv
from dspy_otel.mlflow import MLflowSpanExporter
from dspy_otel.record.model import ON_VALIDATION


@dataclass
class Store:
    """One experiment, being written and read back.

    Attributes:
        uri: where it is read from.
        experiment: its name.
        through: where it is written to, if that is another address of the same MLflow.
        spans: all that was recorded.
    """

    uri: str
    experiment: str
    through: str | None = None
    spans: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)

    def __post_init__(self) -> None:
        self.exporter = MLflowSpanExporter(self.through or self.uri, experiment=self.experiment)
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self.provider.add_span_processor(BatchSpanProcessor(self.exporter))

    def instrument(self, **options: Any) -> None:
        DSPyInstrumentor().instrument(tracer_provider=self.provider, **{"capture_content": "span_only", **options})

    def flush(self) -> None:
        assert self.provider.force_flush(120_000)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans.get_finished_spans() if span.name.split(" ")[0] == name]

    @property
    def client(self) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    @property
    def experiment_id(self) -> str:
        return str(self.client.get_experiment_by_name(self.experiment).experiment_id)

    def runs(self) -> dict[str, Any]:
        """Runs by the key that their spans' ids make up."""
        found = self.client.search_runs([self.experiment_id], max_results=1000)
        return {run.data.tags["dspy.run.key"]: run for run in found}

    def traces(self, run: Any) -> list[Any]:
        """Of a run, without their spans."""
        place = [self.experiment_id]
        return list(
            self.client.search_traces(locations=place, run_id=run.info.run_id, max_results=500, include_spans=False)
        )

    def artifact(self, run: Any, path: str, directory: Path) -> Any:
        place = directory / f"{run.info.run_id}"
        place.mkdir(exist_ok=True)
        return json.loads(Path(self.client.download_artifacts(run.info.run_id, path, str(place))).read_text())

    def artifacts(self, run: Any) -> set[str]:
        return {item.path for item in self.client.list_artifacts(run.info.run_id)}

    def check(self) -> None:
        """All that was recorded is in MLflow, and nothing of it twice."""
        found = self.client.search_runs([self.experiment_id], max_results=1000)
        runs = self.runs()
        assert len(found) == len(runs), "a run is there twice"
        compiles = {span.attributes[semconv.OPTIMIZER_RUN_ID]: span for span in self.named("compile")}
        trials = {
            f"{span.attributes[semconv.OPTIMIZER_RUN_ID]}/{span.attributes[semconv.TRIAL_NUMBER]}": span
            for span in self.named("trial")
        }
        assert set(runs) == set(compiles) | set(trials)
        assert {run.info.status for run in found} == {"FINISHED"}
        ids = {key: run.info.run_id for key, run in runs.items()}
        for key, run in runs.items():
            above = (
                key.split("/")[0] if key in trials else compiles[key].attributes.get(semconv.OPTIMIZER_PARENT_RUN_ID)
            )
            assert run.data.tags.get("mlflow.parentRunId") == (None if above is None else ids[above]), key

        # Curves: each point once, and the totals of the end.
        for key, span in compiles.items():
            mine = [trial for name, trial in trials.items() if name.startswith(f"{key}/")]
            curve = self.client.get_metric_history(ids[key], "score")
            scored = [
                (trial.attributes[semconv.TRIAL_NUMBER], trial.attributes[semconv.TRIAL_SCORE])
                for trial in mine
                if trial.attributes[semconv.TRIAL_KIND] in ON_VALIDATION
            ]
            best = span.attributes.get(semconv.OPTIMIZER_BEST_SCORE)
            last = max((trial.attributes[semconv.TRIAL_NUMBER] for trial in mine), default=0)
            result = [] if best is None else [(last + 1, best)]
            assert sorted((point.step, point.value) for point in curve) == sorted([*scored, *result]), key
            numbers = json.loads(runs[key].data.tags.get("dspy.numbers", "{}"))
            assert numbers.get("lm_calls") == span.attributes.get(semconv.USAGE_LM_CALLS), key
            names = [item.dataset.name for item in runs[key].inputs.dataset_inputs]
            assert len(names) == len(set(names))
            if semconv.OPTIMIZER_PARENT_RUN_ID not in span.attributes:
                assert {"best_model.json", "candidates.json", "trainset.json"} <= self.artifacts(runs[key])

        # Traces: each with all of its spans, on its run, with one score.
        spans_of: Counter[str] = Counter(trace_id(span) for span in self.spans.get_finished_spans())
        stored, token = [], None
        while True:
            page = self.client.search_traces(locations=[self.experiment_id], max_results=200, page_token=token)
            stored += page
            if not (token := page.token):
                break
        assert Counter({trace.info.trace_id: len(trace.data.spans) for trace in stored}) == spans_of
        for key in trials:
            expected = {
                trace_id(span): [span.attributes[semconv.EXAMPLE_SCORE]]
                for span in self.named("example")
                if f"{span.attributes[semconv.OPTIMIZER_RUN_ID]}/{span.attributes[semconv.TRIAL_NUMBER]}" == key
            }
            got = {trace.info.trace_id: [a.value for a in scores(trace)] for trace in self.traces(runs[key])}
            assert got == expected, key


def scores(trace: Any) -> list[Any]:
    """The scores of a trace, without what was expected."""
    return [one for one in trace.info.assessments if one.feedback is not None]


def trace_id(span: ReadableSpan) -> str:
    """As MLflow writes it."""
    return f"tr-{span.context.trace_id:032x}"
