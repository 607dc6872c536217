"""Which answers to spans are a delivery, and what of an address may be written down."""

from __future__ import annotations

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from dspy_otel.mlflow.backends import rest
from dspy_otel.mlflow.retry import Answer
from dspy_otel.mlflow.target import Target, public_uri, sqlite_path

PROTOBUF = "application/x-protobuf"
PARTLY = ExportTraceServiceResponse(partial_success=ExportTracePartialSuccess(rejected_spans=5)).SerializeToString()


@pytest.mark.parametrize(
    ("kind", "body", "delivered", "rejected"),
    [
        (PROTOBUF, b"", True, 0),
        (PROTOBUF, PARTLY, True, 5),
        ("application/json", b"{}", True, 0),
        ("application/json", b'{"partialSuccess": {"rejectedSpans": "3"}}', True, 3),
        (PROTOBUF, b"<html>", False, 0),
        ("application/json", b'{"error": "login required"}', False, 0),
        ("application/json", b"[]", False, 0),
        ("text/html", b"<html>Sign in</html>", False, 0),
        ("text/plain", b"", False, 0),
        ("", b"OK", False, 0),
    ],
)
def test_a_delivery_is_an_answer_of_an_otlp_receiver(kind: str, body: bytes, delivered: bool, rejected: int) -> None:
    answer = Answer(200, kind, body)
    assert rest._is_otlp(answer) is delivered
    if delivered:
        assert rest._rejected(answer) == rejected


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("http://ada:hunter2@mlflow:5000/x", "http://mlflow:5000/x"),
        ("postgresql://h/db?user=ada&password=hunter2&sslmode=require", "postgresql://h/db?sslmode=require"),
        ("https://mlflow/?access_token=hunter2", "https://mlflow/"),
        ("sqlite:////tmp/mlflow.db?timeout=30", "sqlite:////tmp/mlflow.db?timeout=30"),
    ],
)
def test_credentials_of_an_address_are_not_written_down(uri: str, public: str) -> None:
    assert public_uri(uri) == public


def test_an_address_is_shown_whole() -> None:
    """People copy it into a command."""
    uri = f"http://127.0.0.1:9/{'folder/' * 60}end"
    assert rest.RestBackend(Target(uri)).name == uri


def test_the_file_of_a_store_is_its_path_without_options() -> None:
    assert sqlite_path("sqlite:////tmp/mlflow.db?timeout=30") == "/tmp/mlflow.db"
