"""A real MLflow server, and a proxy in front of it that can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dspy_otel import DSPyInstrumentor
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.mlflow_server import mlflow_server
from tests.support.mlflow_store import Store


@pytest.fixture(scope="module")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow-server")) as url:
        yield url


@pytest.fixture
def proxy(server_uri: str) -> Iterator[FaultProxy]:
    with fault_proxy(server_uri) as proxy:
        yield proxy


@pytest.fixture(params=["server", "sqlite"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of an MLflow server, and of a store of its own."""
    if request.param == "server":
        return str(request.getfixturevalue("server_uri"))
    monkeypatch.chdir(tmp_path)  # MLflow puts artifacts beside it
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def store(uri: str, request: pytest.FixtureRequest) -> Iterator[Store]:
    """An experiment there, with a provider that sends to it."""
    store = Store(uri, request.node.name)
    yield store
    if DSPyInstrumentor().is_instrumented_by_opentelemetry:
        DSPyInstrumentor().uninstrument()
    store.provider.shutdown()
