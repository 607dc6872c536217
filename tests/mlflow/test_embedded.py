"""An embedded store that fails."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dspy_otel.mlflow.retry import ExportError
from dspy_otel.mlflow.target import Target

tracking = pytest.importorskip("mlflow.tracking")


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
