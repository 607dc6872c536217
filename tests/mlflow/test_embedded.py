"""An embedded store: what it is given, and how it fails."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from pathlib import Path

import pytest

from dspy_otel.mlflow.backends.base import Batch
from dspy_otel.mlflow.retry import ExportError
from dspy_otel.mlflow.target import Target
from dspy_otel.mlflow.translate import translate
from dspy_otel.record.otlp import encode
from tests.support.spans import Recorder

tracking = pytest.importorskip("mlflow.tracking")


def test_a_text_that_is_json_is_stored_as_it_is(telemetry: Recorder) -> None:
    """MLflow decodes a span of OTLP with one more layer of JSON. From 3.18 on its store leaves that to its endpoint."""
    from mlflow.tracing.otel.translation import translate_span_when_storing

    from dspy_otel.mlflow.backends.embedded import _to_mlflow

    inputs = '{"question":"{\\"q\\": [1]}"}'
    telemetry.tracer.start_span("Predict", attributes={"input.value": inputs, "dspy.module.class": "Predict"}).end()
    (span,) = _to_mlflow(encode(translate(telemetry.spans)))
    stored = translate_span_when_storing(span)["attributes"]
    assert stored["mlflow.spanInputs"] == inputs
    assert stored["dspy.module.class"] == '"Predict"'


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.slow
def test_mlflow_logs_errors_of_the_users_calls_and_not_of_ours(tmp_path: Path) -> None:
    """It would log each attempt, with the values of spans."""
    from dspy_otel.mlflow.backends.embedded import EmbeddedBackend

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    backend = EmbeddedBackend(Target(uri))
    (tmp_path / "mlflow.db").write_bytes(b"")  # what was in it is gone
    kept = Kept()
    logger = logging.getLogger("mlflow.store.db.utils")
    logger.addHandler(kept)
    try:
        with pytest.raises(ExportError, match="no such table"):
            backend.find_runs(None, "")
        assert kept.lines == []
        with pytest.raises(Exception, match="no such table"):
            tracking.MlflowClient(tracking_uri=uri).search_runs(["0"])
        assert len(kept.lines) == 1
    finally:
        logger.removeHandler(kept)


@pytest.mark.nightly
def test_a_store_that_another_program_holds_is_waited_for_once(telemetry: Recorder, tmp_path: Path) -> None:
    """MLflow waits for 20 s itself: a second call, span by span, would wait as long and find the same."""
    from dspy_otel.mlflow.backends.embedded import EmbeddedBackend

    file = tmp_path / "mlflow.db"
    backend = EmbeddedBackend(Target(f"sqlite:///{file}"))
    telemetry.tracer.start_span("Predict").end()
    batch = Batch(encode(translate(telemetry.spans)), {}, [])
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ExportError, match="locked by another program") as caught:
            backend.deliver(batch)
        assert caught.value.unavailable
    assert backend.deliver(batch)
