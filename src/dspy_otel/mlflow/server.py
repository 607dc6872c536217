"""Spans to an MLflow server over HTTP: OTLP for the spans, MLflow's REST API to find the experiment.

Plain ``requests``, not MLflow's client: importing MLflow takes seconds and 100 MB, and a program that only talks to a
server does not need it. Not ``OTLPSpanExporter`` either: it always adds ``OTEL_EXPORTER_OTLP_HEADERS`` and the OTLP
certificates to what it sends, which would hand the credentials of another backend to this server, it logs each retry,
and it does not show the server's explanation of a refusal.
"""

from __future__ import annotations

import base64
import configparser
import gzip
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from packaging.version import InvalidVersion, Version

from dspy_otel.mlflow.base import (
    OLDEST_MLFLOW,
    ExportError,
    FoundExperiment,
    Patience,
    WantedExperiment,
    public_uri,
    resolve_experiment,
    safe_text,
)

_logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT: Final = 5.0
_RETRY_DELAYS: Final = (1.0, 2.0, 4.0, 8.0)  # seconds; the processor's queue holds new spans meanwhile
_RETRYABLE: Final = frozenset({408, 423, 425, 429, 502, 503, 504})
"""The OTLP/HTTP specification's list, and what else means "not now": a timeout, a lock, too early."""
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_TLS_OFF: Final = frozenset({"true", "1"})  # how MLflow reads its boolean variables
_MOST_ANSWER: Final = 256 * 1024 * 1024
"""Bytes of one answer that are read: an artifact may be large, but no server can fill the memory of the program."""
_MOST_REFUSAL: Final = 64 * 1024
"""Likewise, of an answer that is an error."""


class MLflowServer:
    """One MLflow server and one experiment in it. The first ``send`` checks the version and finds the experiment.

    Args:
        uri: tracking URI, a path prefix included.
        experiment: where the traces go.
        patience: how long to wait for an answer to one request.
        stopped: set when the exporter shuts down; ends waiting between retries.

    Attributes:
        uri: the tracking URI.
    """

    def __init__(self, uri: str, experiment: WantedExperiment, patience: Patience, stopped: threading.Event) -> None:
        self.uri = uri.rstrip("/")
        self._name = public_uri(self.uri)
        self._wanted = experiment
        self._patience = patience
        self._stopped = stopped
        self._experiment_id: str | None = None
        self._compress = urlsplit(uri).hostname not in _LOOPBACK
        self._session = requests.Session()

    def send(self, spans: Sequence[ReadableSpan]) -> None:
        """Post a batch to ``/v1/traces``; too large a batch is sent in halves.

        Raises:
            ExportError: the server cannot be reached, refuses, or has no OTLP endpoint.
        """
        body = encode_spans(spans).SerializeToString()
        headers = {"Content-Type": "application/x-protobuf", "x-mlflow-experiment-id": self.experiment_id()}
        if self._compress:
            body = gzip.compress(body, compresslevel=5)
            headers["Content-Encoding"] = "gzip"
        response = self.request("POST", "/v1/traces", headers=headers, data=body)
        if response.ok:
            if not _is_otlp(response):
                raise self._not_mlflow(response)
            return
        if response.status_code == 413 and len(spans) > 1:
            half = len(spans) // 2
            self.send(spans[:half])
            self.send(spans[half:])
            return
        if _error_code(response) == "RESOURCE_DOES_NOT_EXIST":
            self._experiment_id = None  # deleted while we ran: look again with the next batch
        elif response.status_code in (404, 405, 501):
            raise ExportError(
                "endpoint",
                f"{self._name} takes no OpenTelemetry traces ({_explain(response)}). "
                f"It needs MLflow {OLDEST_MLFLOW} or newer with a SQL store.",
            )
        raise self.refusal(response)

    def alive(self) -> bool:
        """Whether the server answers a simple question."""
        try:
            return self.rest("GET", "experiments/get", params={"experiment_id": "0"}) is not None
        except ExportError:
            return False

    def experiment_id(self) -> str:
        """The id of the experiment; the first call checks the server's version and finds or creates it.

        Raises:
            ExportError: the server cannot be reached, or the experiment cannot be had.
        """
        if self._experiment_id is None:
            self._check_version()
            self._experiment_id = resolve_experiment(self._wanted, _RestExperiments(self))
        return self._experiment_id

    def after_fork(self) -> None:
        """Drop the connections shared with the parent process."""
        self._session = requests.Session()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> requests.Response:
        """Send one request with MLflow's credentials and TLS settings, again after transient failures.

        Returns:
            The response, whatever its status, except those of credentials and redirects.

        Raises:
            ExportError: no connection, no answer in time, refused credentials, or a redirect.
        """
        failure = ""
        for delay in (*(_RETRY_DELAYS if self._patience.insists else ()), None):
            seconds = self._patience.seconds
            try:
                response = self._session.request(
                    method,
                    self.uri + path,
                    headers={**_workspace(), **(headers or {})},
                    auth=_authorize,
                    timeout=(min(_CONNECT_TIMEOUT, seconds), seconds),
                    # A redirected POST would arrive as a GET without its body.
                    allow_redirects=False,
                    stream=True,
                    **_tls(),
                    **kwargs,
                )
                _read(response, time.monotonic() + seconds)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                failure = type(error).__name__
            except requests.RequestException as error:  # malformed URI, missing certificate file, ...
                raise ExportError("request", f"MLflow at {self._name}: {type(error).__name__}.") from error
            else:
                if response.status_code in (401, 403):
                    raise ExportError(
                        "credentials",
                        f"MLflow at {self._name} refused the credentials ({response.status_code}): set "
                        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
                    )
                if response.is_redirect:
                    target = safe_text(public_uri(response.headers.get("Location", "elsewhere")), 200)
                    raise ExportError("redirect", f"MLflow at {self._name} redirects to {target}: use that address.")
                if response.status_code not in _RETRYABLE:
                    return response
                failure = _explain(response)
            if delay is None or not self._wait(delay):
                break
        raise ExportError(
            "unreachable",
            f"MLflow at {self._name} cannot be reached ({failure}): is the server running, and is "
            "MLFLOW_TRACKING_URI right?",
        )

    def _wait(self, seconds: float) -> bool:
        """Wait before a retry; False when the exporter or the interpreter is shutting down."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            # At exit the SDK waits for us before it calls shutdown(): the main thread is the only sign of it.
            if not threading.main_thread().is_alive() or self._stopped.wait(min(left, 0.25)):
                return False
        return True

    def _check_version(self) -> None:
        response = self.request("GET", "/version")
        try:
            old = response.ok and Version(response.text.strip()) < Version(OLDEST_MLFLOW)
        except InvalidVersion:  # a proxy's own page: the endpoints themselves will tell
            return
        if old:
            _logger.warning(
                "The MLflow server at %s has version %s, which is older than %s: traces lack their names and tags, "
                "runs and scores may be incomplete. Upgrade the server.",
                self._name,
                response.text.strip(),
                OLDEST_MLFLOW,
            )

    def refusal(self, response: requests.Response) -> ExportError:
        """An answer that is no success, as an error."""
        return ExportError(f"status {response.status_code}", f"MLflow at {self._name} refused: {_explain(response)}.")

    def rest(self, method: str, path: str, *, version: str = "2.0", **kwargs: Any) -> dict[str, Any] | None:
        """Call MLflow's REST API; None when what is asked for does not exist.

        Raises:
            ExportError: as :meth:`request`, or another refusal.
        """
        response = self.request(method, f"/api/{version}/mlflow/{path}", **kwargs)
        if _error_code(response) == "RESOURCE_DOES_NOT_EXIST":
            return None
        return self.object_of(response)

    def object_of(self, response: requests.Response) -> dict[str, Any]:
        """The JSON object of an answer.

        Raises:
            ExportError: a refusal, or an answer that is not MLflow's.
        """
        try:
            answer = response.json()
        except ValueError as error:
            raise (self._not_mlflow(response) if response.ok else self.refusal(response)) from error
        if not response.ok:
            raise self.refusal(response)
        if not isinstance(answer, dict):
            raise self._not_mlflow(response)
        return answer

    def _not_mlflow(self, response: requests.Response) -> ExportError:
        """The error for a success that no MLflow server would answer with: the login page of a proxy, for one."""
        kind = safe_text(response.headers.get("Content-Type", "no content type"), 80)
        return ExportError(
            "answer",
            f"{self._name} does not answer like an MLflow server ({response.status_code}, {kind}): is it the address "
            "of a proxy that wants a login?",
        )


class _RestExperiments:
    def __init__(self, server: MLflowServer) -> None:
        self._server = server

    def by_id(self, experiment_id: str) -> FoundExperiment | None:
        return _found(self._server.rest("GET", "experiments/get", params={"experiment_id": experiment_id}))

    def by_name(self, name: str) -> FoundExperiment | None:
        return _found(self._server.rest("GET", "experiments/get-by-name", params={"experiment_name": name}))

    def create(self, name: str) -> str:
        answer = self._server.rest("POST", "experiments/create", json={"name": name}) or {}
        if "experiment_id" not in answer:
            raise ExportError("experiment", f"MLflow did not create the experiment {name!r}.")
        return str(answer["experiment_id"])


def _found(answer: dict[str, Any] | None) -> FoundExperiment | None:
    if not answer or "experiment" not in answer:
        return None
    experiment = answer["experiment"]
    return FoundExperiment(str(experiment["experiment_id"]), str(experiment.get("lifecycle_stage", "active")))


def _authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
    # As an auth callable, so that ~/.netrc cannot replace the header. Read each time: tokens get renewed.
    # MLflow's client leaves a user and password in the address to requests, which puts them before all others.
    user, password = requests.utils.get_auth_from_url(request.url or "")
    if user or password:
        return requests.auth.HTTPBasicAuth(user, password)(request)
    if header := _authorization():
        request.headers["Authorization"] = header
    return request


def _authorization() -> str | None:
    """The Authorization header as MLflow's client builds it: user and password before token."""
    username, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if not (username and password):
        config = configparser.ConfigParser(interpolation=None)
        try:
            config.read(os.path.expanduser("~/.mlflow/credentials"), encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            _logger.debug("~/.mlflow/credentials cannot be read", exc_info=True)
        username = username or config.get("mlflow", "mlflow_tracking_username", fallback=None)
        password = password or config.get("mlflow", "mlflow_tracking_password", fallback=None)
    if username and password:
        return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return "Bearer " + token
    return None


def _tls() -> dict[str, Any]:
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in _TLS_OFF:
        verify: bool | str = False
    else:
        verify = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    return {"verify": verify, "cert": os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH") or None}


def _workspace() -> dict[str, str]:
    workspace = os.environ.get("MLFLOW_WORKSPACE")
    return {"X-MLFLOW-WORKSPACE": workspace} if workspace else {}


def _error_code(response: requests.Response) -> str | None:
    if response.ok:
        return None
    try:
        answer = response.json()
    except ValueError:
        return None
    return answer.get("error_code") if isinstance(answer, dict) else None


def _explain(response: requests.Response) -> str:
    """Status and the server's own words, short enough for a log line; a web page says nothing."""
    text = "" if "html" in response.headers.get("Content-Type", "") else response.text
    return f"{response.status_code} {safe_text(text or response.reason or '', 200)}"


def _is_otlp(response: requests.Response) -> bool:
    """Whether an answer is that of an OTLP receiver, as the specification of OTLP/HTTP wants it."""
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return kind in ("application/x-protobuf", "application/json") or not (kind or response.content)


def _read(response: requests.Response, until: float) -> None:
    """Read the body of an answer, within limits of size and time: a server may go on for ever.

    Raises:
        requests.Timeout: the whole of it did not come in time.
        requests.RequestException: the connection broke, or the answer is too large.
    """
    most = _MOST_ANSWER if response.ok else _MOST_REFUSAL
    parts: list[bytes] = []
    size = 0
    for part in response.iter_content(65536):
        parts.append(part[: most - size])
        size += len(part)
        if size > most:
            response.close()
            if response.ok:
                raise requests.RequestException("the answer is too large")
            break
        if time.monotonic() > until:
            response.close()
            raise requests.Timeout("the answer takes too long")
    response._content = b"".join(parts)
