"""The two ways into MLflow behind one protocol: a server over HTTP, and a SQL store in this process."""

from __future__ import annotations

import os

from dspy_otel.mlflow.backends.base import Backend, Batch
from dspy_otel.mlflow.retry import ExportError
from dspy_otel.mlflow.target import Target, sqlite_path

__all__ = ["Backend", "Batch", "open_backend"]


def open_backend(target: Target) -> Backend:
    """Open MLflow. A server gets no request yet; a store is opened, and created if ``target.create`` is set.

    Raises:
        ExportError: the URI cannot be used, or MLflow is missing, or the store cannot be opened.
    """
    uri = target.uri
    if target.is_server:
        from dspy_otel.mlflow.backends.rest import RestBackend

        return RestBackend(target)
    path = sqlite_path(uri)
    if not target.create and path is not None and not os.path.exists(path):
        message = f"There is no database {path}: name another store (MLFLOW_TRACKING_URI), or run your program first."
        raise ExportError("store", message, unavailable=True, permanent=True)
    from dspy_otel.mlflow.backends.embedded import EmbeddedBackend

    return EmbeddedBackend(target)
