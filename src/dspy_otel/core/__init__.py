"""How anything is emitted: spans, metrics, events and content. Knows OpenTelemetry, and nothing of DSPy."""
