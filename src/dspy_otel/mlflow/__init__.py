"""Spans to MLflow: ``OTEL_TRACES_EXPORTER=mlflow``.

* :mod:`.exporter` - the OpenTelemetry exporter: where to write, failures, forks;
* :mod:`.translate` - pure: finished spans to spans that MLflow shows well;
* :mod:`.server` - the way to an MLflow server: OTLP and two REST calls, MLflow itself is not needed;
* :mod:`.store` - the way into an embedded SQL store, in process;
* :mod:`.tracker` - optimizations and evaluations as MLflow runs while they happen: a span processor and its worker;
* :mod:`.runs` - pure: records of optimizations and evaluations to the runs that should be in MLflow;
* :mod:`.pending` - what of that is not yet written;
* :mod:`.writer` - brings MLflow up to that;
* :mod:`.delivery`, :mod:`.pace` - the queue of spans, and how it keeps out of a busy program's way;
* :mod:`.spool`, :mod:`.state` - what could not be sent, on disk; :mod:`.replay` delivers it later;
* :mod:`.runs_server`, :mod:`.runs_store` - runs, links and scores on a server and in an embedded store;
* :mod:`.load`, :mod:`.read` - a program, and what a report needs, back from a run.
"""

from __future__ import annotations

from dspy_otel.mlflow.exporter import MLflowSpanExporter
from dspy_otel.mlflow.load import load_best

__all__ = ["MLflowSpanExporter", "load_best"]
