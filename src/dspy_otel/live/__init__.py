"""The report of an optimization in the browser while it runs: it is rendered again when something has changed.

* :mod:`.feeds` - where an optimization is read from: spans of this process, a file of OTLP that grows, MLflow;
* :mod:`.page` - the report with a line on top that says what runs;
* :mod:`.server` - the small server;
* :mod:`.process` - :func:`~dspy_otel.live.process.watch`, which opens it from the program that optimizes.
"""
