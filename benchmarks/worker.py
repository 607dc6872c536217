"""One configuration in one process, kept alive: sets itself up, then measures what it is asked for.

Talks JSON lines. From stdin: ``{"program": key, "calls": n}`` for a measurement, ``{"finish": true}`` for the counts.
First line to stdout: what was set up, or ``{"skipped": reason}``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from meter import Meter
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider, sampling
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

WARM_UP = 20


class Skipped(Exception):
    """The configuration cannot run here; the message says why."""


class NullExporter(SpanExporter):
    """Counts spans and drops them."""

    def __init__(self) -> None:
        self.spans = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Count."""
        self.spans += len(spans)
        return SpanExportResult.SUCCESS


class Pipeline:
    """The SDK every configuration gets: a batch processor before a null exporter, and metrics.

    State "out" samples nothing, "traces" has no metrics. With ``OTEL_SDK_DISABLED`` in the environment the SDK
    does nothing by itself.
    """

    def __init__(self, state: str):
        sampler = sampling.ALWAYS_OFF if state.startswith("out") else sampling.ParentBased(sampling.ALWAYS_ON)
        self.exporter = NullExporter()
        self.tracer_provider = TracerProvider(sampler=sampler)
        self.tracer_provider.add_span_processor(BatchSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meter_provider: metrics.MeterProvider = MeterProvider([self.reader])
        if state.endswith("traces"):
            self.meter_provider = metrics.NoOpMeterProvider()
        self.flush: Callable[[], Any] = self.tracer_provider.force_flush

    def measurements(self) -> int:
        """Number of measurements in histograms since the start."""
        data = self.reader.get_metrics_data()
        points = [
            point
            for resource in (data.resource_metrics if data else [])
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        ]
        return sum(getattr(point, "count", 0) for point in points)


def set_up(tool: str, state: str, pipeline: Pipeline, recording: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Switch the tool on; give its version and, for the floor, the hand-written openers of each program.

    Raises Skipped or ImportError when it is not installed or has nothing to do.
    """
    providers: dict[str, Any] = {
        "tracer_provider": pipeline.tracer_provider,
        "meter_provider": pipeline.meter_provider,
    }
    if tool == "bare":
        return "", {}
    if tool == "callback":
        import dspy
        from dspy.utils.callback import BaseCallback

        dspy.configure(callbacks=[BaseCallback()])
        return "", {}
    if tool == "floor":
        from floor import openers

        if not recording:
            raise Skipped("dspy-otel could not be recorded")
        if state != "disabled":  # then nothing can be recorded
            for key, chain in recording.items():
                _check_floor(key, chain)
        tracer = pipeline.tracer_provider.get_tracer("by_hand", "1")
        meter = pipeline.meter_provider.get_meter("by_hand", "1")
        return version("opentelemetry-sdk"), {key: openers(chain, tracer, meter) for key, chain in recording.items()}
    if tool == "dspy-otel":
        import dspy_otel

        content = "span_only" if state == "on" else "no_content"
        options: dict[str, Any] = {} if state == "no-sdk" else providers
        dspy_otel.instrument(capture_content=content, **options)
        return dspy_otel.__version__, {}
    if tool == "openinference":
        from openinference.instrumentation import TraceConfig
        from openinference.instrumentation.dspy import DSPyInstrumentor as OpenInference

        config = TraceConfig() if state != "off" else TraceConfig(hide_inputs=True, hide_outputs=True)
        OpenInference().instrument(tracer_provider=pipeline.tracer_provider, config=config)
        return version("openinference-instrumentation-dspy"), {}
    if tool == "official":
        from opentelemetry.instrumentation.genai.dspy import DSPyInstrumentor as Official

        Official().instrument(**providers)
        return version("opentelemetry-instrumentation-genai-dspy"), {}
    if tool == "mlflow":
        import mlflow

        folder = Path(tempfile.mkdtemp(prefix="overhead-mlflow-"))
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.create_experiment("overhead", artifact_location=folder.as_uri())
        mlflow.set_experiment("overhead")
        mlflow.dspy.autolog()
        if state == "sqlite":
            pipeline.flush = mlflow.flush_trace_async_logging
        else:
            _null_mlflow_exporter(pipeline.exporter)
        if state == "disabled":
            mlflow.tracing.disable()
        return mlflow.__version__, {}
    raise Skipped(f"unknown tool {tool}")


def _check_floor(key: str, chain: list[dict[str, Any]]) -> None:
    """Record the hand-written spans too; ValueError when they are not those of the recording."""
    from floor import Recorder, openers
    from programs import Workload

    recorder = Recorder()
    tracer, meter = recorder.tracer_provider.get_tracer("by_hand"), recorder.meter_provider.get_meter("by_hand")
    Workload(key, openers(chain, tracer, meter)).run(1)

    def comparable(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
        plain = json.loads(json.dumps(spans))
        for span in plain:
            del span["parent"]
            for measurement in span["measurements"]:
                measurement["value"] = None if measurement["unit"] == "s" else measurement["value"]
            span["measurements"].sort(key=str)
        return plain

    if comparable(recorder.chain()) != comparable(chain):
        raise ValueError(f"{key}: the hand-written spans are not those of the recording")


def _null_mlflow_exporter(counter: NullExporter) -> None:
    """Let MLflow's exporter take finished traces from its registry, count the spans and drop them."""
    from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    def export(self: Any, spans: Sequence[ReadableSpan]) -> None:
        counter.export(spans)
        for span in spans:
            if span.parent is None and span.context is not None:
                InMemoryTraceManager.get_instance().pop_trace(span.context.trace_id)

    MlflowV3SpanExporter.export = export  # type: ignore[method-assign]


def measure(workload: Any, calls: int, flush: Callable[[], Any]) -> dict[str, float]:
    """CPU (see ``meter.py``) and wall-clock seconds per call. Export threads count, and all is flushed within."""
    workload.run(WARM_UP // 2)  # another process had the caches since this one's last turn
    flush()
    workload.forget()
    gc.collect()
    with Meter() as meter:
        workload.run(calls)
        flush()
    return {"cpu": meter.cpu / calls, "wall": meter.wall / calls}


def record(state: str) -> dict[str, Any]:
    """Record one run of every program under dspy-otel, for the floor."""
    from floor import Recorder
    from programs import PROGRAMS, Workload

    import dspy_otel

    recorder = Recorder()
    dspy_otel.instrument(
        tracer_provider=recorder.tracer_provider,
        meter_provider=recorder.meter_provider,
        capture_content="span_only" if state == "on" else "no_content",
    )
    recording = {}
    for key in PROGRAMS:
        workload = Workload(key)
        workload.run(3)
        recorder.clear()
        workload.run(1)
        recording[key] = recorder.chain()
    return recording


def main() -> None:
    """Set up what the arguments name, then serve."""
    tool, state = sys.argv[1:3]
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints to stdout must not get between the replies

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")

    try:
        if tool == "record":
            return reply(recording=record(state))
        from programs import PROGRAMS, Workload

        pipeline = Pipeline(state)
        recording = json.loads(sys.stdin.readline())
        name, openers = set_up(tool, state, pipeline, recording)
        workloads = {key: Workload(key, openers.get(key)) for key in PROGRAMS}
        per_call = {}
        for key, workload in workloads.items():
            counted = pipeline.exporter.spans, pipeline.measurements()
            workload.run(WARM_UP)
            pipeline.tracer_provider.force_flush()
            per_call[key] = {
                "spans": (pipeline.exporter.spans - counted[0]) / WARM_UP,
                "measurements": (pipeline.measurements() - counted[1]) / WARM_UP,
            }
        pipeline.flush()
    except Exception as exc:  # the driver shows the reason, for ours as for the others
        return reply(skipped=f"{type(exc).__name__}: {exc}".splitlines()[0])
    reply(version=name, per_call=per_call)
    for line in sys.stdin:
        task = json.loads(line)
        reply(**measure(workloads[task["program"]], task["calls"], pipeline.flush))
    return None


if __name__ == "__main__":
    main()
