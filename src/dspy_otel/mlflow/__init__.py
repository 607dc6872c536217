"""Spans to MLflow: ``OTEL_TRACES_EXPORTER=mlflow``. The modules, in the order of a span's way:

* :mod:`.processor` - spans that start and end are written to the journal;
* :mod:`.journal` - segments on disk: the queue, which survives a kill;
* :mod:`.worker` - empties it: sends spans, links traces, writes scores, brings runs up to date; :mod:`.replay` is the
  same for the journal of a process that has ended;
* :mod:`.run_writer`, :mod:`.items`, :mod:`.splitting`, :mod:`.threads` - its parts: runs, single items that are tried
  again, requests in halves, a pool of threads;
* :mod:`.account` - counts of what was written, kept, refused and dropped;
* :mod:`.retry` - what an answer means, and when to try again;
* :mod:`.backends` - a server over HTTP, and a SQL store in this process, behind one contract;
* :mod:`.translate` - pure: finished spans to spans that MLflow shows well;
* :mod:`.runs` - pure: records of optimizations and evaluations to the runs that should be in MLflow; :mod:`.pending` -
  what of that is not yet written;
* :mod:`.versions` - pure: the model, the prompts and the dataset that an optimization's result is;
* :mod:`.exporter`, :mod:`.target` - the OpenTelemetry exporter, and where it writes;
* :mod:`.load`, :mod:`.read` - a program, and what a report needs, back from a run; :mod:`.promote` - an alias for it.
"""

from __future__ import annotations

from dspy_otel.mlflow.exporter import MLflowSpanExporter
from dspy_otel.mlflow.load import load_best

__all__ = ["MLflowSpanExporter", "load_best"]
