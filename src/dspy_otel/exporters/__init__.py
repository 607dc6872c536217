"""Exporters: what carries finished OpenTelemetry spans into a backend's own form.

Nothing here knows DSPy: an exporter sees OpenTelemetry spans and the names in :mod:`dspy_otel.semconv`, so that the
same spans from a file or from a Collector give the same result.
"""
