"""A process of its own for test_resume.py: GEPA with a `log_dir`, killed after some calls of the metric, if asked.

Arguments: folder, file for spans (one JSON object a line, appended), calls of the metric until SIGKILL or 0, nested or
not.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

import dspy_otel
from tests.optimizers import common


class Lines(SpanExporter):
    """Writes each span at once."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (until SIGKILL)

    def export(self, spans: Any) -> Any:
        for span in spans:
            self.file.write(json.dumps(json.loads(span.to_json()), separators=(",", ":")) + "\n")
        return SpanExportResult.SUCCESS


def main(folder: str, lines: str, kill_after: int, around: bool) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Lines(lines)))
    dspy_otel.instrument(tracer_provider=provider)
    calls = []
    metric = common.sum_of_digits

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return metric(*args, **kwargs)

    common.sum_of_digits = counted
    if around:
        with provider.get_tracer("application").start_as_current_span("work"):
            common.run_gepa_digits(log_dir=folder)
    else:
        common.run_gepa_digits(log_dir=folder)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "around")
