"""Spans to MLflow: ``OTEL_TRACES_EXPORTER=mlflow``.

* :mod:`.exporter` - the OpenTelemetry exporter: where to write, failures, forks;
* :mod:`.translate` - pure: finished spans to spans that MLflow shows well;
* :mod:`.server` - the way to an MLflow server: OTLP and two REST calls, MLflow itself is not needed;
* :mod:`.store` - the way into an embedded SQL store, in process.

Run tracking (compile, trial and evaluate spans to MLflow runs) will live beside these, in ``runs.py``.
"""

from __future__ import annotations

from dspy_otel.exporters.mlflow.exporter import MLflowSpanExporter

__all__ = ["MLflowSpanExporter"]
