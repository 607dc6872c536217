"""A real MLflow server, and a proxy in front of it that can fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.mlflow_server import mlflow_server


@pytest.fixture(scope="module")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow-server")) as url:
        yield url


@pytest.fixture
def proxy(server_uri: str) -> Iterator[FaultProxy]:
    with fault_proxy(server_uri) as proxy:
        yield proxy
