"""Pytest plugin that watches a run of DSPy's own tests (with ``WATCHED`` set), and the comparison of two runs.

``python scripts/dspy_suite.py bare.xml watched.xml`` says which tests end differently, and fails if any does.
"""

from __future__ import annotations

import os
import sys
from xml.etree import ElementTree

if os.environ.get("WATCHED"):
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from dspy_otel import DSPyInstrumentor

    SPANS = InMemorySpanExporter()
    tracers, loggers = TracerProvider(), LoggerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(SPANS))
    loggers.add_log_record_processor(SimpleLogRecordProcessor(InMemoryLogRecordExporter()))
    DSPyInstrumentor().instrument(
        tracer_provider=tracers,
        meter_provider=MeterProvider(metric_readers=[InMemoryMetricReader()]),
        logger_provider=loggers,
        capture_content="span_and_event",
    )

    def pytest_sessionfinish(session: object) -> None:
        """A watched run that recorded nothing was not watched: say how much it did."""
        with open(os.environ["WATCHED"], "a", encoding="utf-8") as file:
            file.write(f"{len(SPANS.get_finished_spans())}\n")


def outcomes(path: str) -> dict[str, list[str]]:
    """How each test ended, from pytest's JUnit file."""
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        kinds = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        found.setdefault(f"{case.get('classname')}::{case.get('name')}", []).extend(kinds or ["passed"])
    return found


def main(bare_file: str, watched_file: str) -> int:
    """Print each test that ends differently; 1 if there is one."""
    bare, watched = outcomes(bare_file), outcomes(watched_file)
    different = [name for name in sorted({*bare, *watched}) if bare.get(name) != watched.get(name)]
    for name in different:
        print(f"{name}: bare {bare.get(name)}, watched {watched.get(name)}")
    passed = sum(kinds == ["passed"] for kinds in bare.values())
    print(f"{len(bare)} tests of DSPy's own, {passed} of them pass; {len(different)} end differently when watched")
    return 1 if different or not passed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
