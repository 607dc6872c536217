"""An MLflow server over HTTP: OTLP for spans, MLflow's REST API for the rest. MLflow itself is not needed.

Plain ``requests``, not MLflow's client: importing MLflow takes seconds and 100 MB, and a program that only talks to a
server does not need it. Not ``OTLPSpanExporter`` either: it always adds ``OTEL_EXPORTER_OTLP_HEADERS`` and the OTLP
certificates to what it sends, which would hand the credentials of another backend to this server, it logs each retry,
and it does not show the server's explanation of a refusal.
"""

from __future__ import annotations

import base64
import configparser
import datetime
import gzip
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

import requests
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.trace import ReadableSpan
from packaging.version import InvalidVersion, Version

from dspy_otel.mlflow.backends import base
from dspy_otel.mlflow.backends.base import Batch, CreatedRun, FoundExperiment, resolve_experiment
from dspy_otel.mlflow.backends.registry import Registry
from dspy_otel.mlflow.backends.rest_registry import RestRegistry
from dspy_otel.mlflow.backends.session import session
from dspy_otel.mlflow.retry import MAX_ADDRESS, Answer, ExportError, Verdict, clean, explain, judge
from dspy_otel.mlflow.runs import (
    TAG_KEY,
    TAG_NAME,
    Assessment,
    Dataset,
    Expectation,
    Metric,
    Score,
    StoredRun,
    StoredTrace,
    whole_metrics,
    whole_tags,
)
from dspy_otel.mlflow.target import Target, public_uri, run_page
from dspy_otel.mlflow.translate import restore
from dspy_otel.mlflow.versions import StoredModel
from dspy_otel.record.answers import newest_scores
from dspy_otel.record.model import Judgement, load_json
from dspy_otel.record.otlp import read_span

_logger = logging.getLogger(__name__)

OLDEST_MLFLOW: Final = base.OLDEST_MLFLOW
FIRST_BATCH_SECONDS: Final = 300.0
"""For a request with spans until the server has answered one. It imports LiteLLM for the first span that it prices,
which takes 5 to 60 s, more on a loaded machine. An attribute that spares it would show a cost of 0, which is not true.
"""
_CONNECT_SECONDS: Final = 5.0
_SLOWEST: Final = 50_000
"""Bytes a second. A new connection sends its first body within the time for connecting."""
_MAX_ANSWER: Final = 32 * 1024 * 1024
_RUNS: Final = 1000
"""Most runs of one answer."""
_TRACES: Final = 500
"""Most traces that MLflow gives in one answer."""
_MAX_REFUSAL: Final = 64 * 1024
_CHUNK: Final = 64 * 1024
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_TLS_OFF: Final = frozenset({"true", "1"})  # how MLflow reads its boolean variables
_ARTIFACTS: Final = "mlflow-artifacts"
_NOT_FOUND: Final = "RESOURCE_DOES_NOT_EXIST"
_NO_ENDPOINT: Final = frozenset({404, 405, 501})


class RestBackend:
    """One server and one experiment in it. The first call that needs the experiment checks the version and finds it.

    Args:
        target: where.
    """

    parallel = True
    """A server answers several requests at once: a score takes 80 ms over one connection, 20 over eight."""

    def __init__(self, target: Target) -> None:
        uri = target.uri
        self._uri = public_uri(uri)
        self.name = clean(self._uri, MAX_ADDRESS)
        self._target = target
        self._user = _user_of(uri)
        self._experiment_id: str | None = None
        self._compress = urlsplit(uri).hostname not in _LOOPBACK
        self._session = session()
        self._until = float("inf")
        self._batches = 0
        self.answered = 0
        self.registry: Registry = RestRegistry(
            self._rest, self.experiment_id, self._put_model_artifact, self._read_model_artifact
        )

    # --- spans ------------------------------------------------------------------------------------------------------
    def deliver(self, batch: Batch) -> bool:
        """Return False: a server has no call that takes all at once."""
        return False

    def send(self, body: bytes) -> None:
        """Post spans to ``/v1/traces``."""
        headers = {"Content-Type": "application/x-protobuf", "x-mlflow-experiment-id": self.experiment_id()}
        if self._compress:
            body = gzip.compress(body, compresslevel=5)
            headers["Content-Encoding"] = "gzip"
        seconds = self._target.timeout if self._batches else max(self._target.timeout, FIRST_BATCH_SECONDS)
        answer = self._request("POST", "/v1/traces", headers=headers, data=body, seconds=seconds)
        verdict = judge(answer, ours=_is_otlp(answer), spans=True)
        self._batches += 1
        if verdict is Verdict.DELIVERED:
            if rejected := _rejected(answer):
                message = f"MLflow at {self.name} rejected {rejected} spans."
                raise ExportError("rejected", message, Verdict.SPLIT)
            return
        if answer.error_code == _NOT_FOUND:
            self._experiment_id = None  # deleted meanwhile: it is looked up again
            raise ExportError("experiment", f"{self.name}: the experiment does not exist any more.", unavailable=True)
        if answer.status in _NO_ENDPOINT:
            raise ExportError(
                "endpoint",
                f"{self.name} takes no OpenTelemetry traces ({answer.status} {answer.text}). "
                f"It needs MLflow {OLDEST_MLFLOW} or newer with a SQL store.",
                unavailable=True,
            )
        raise explain(answer, verdict, self.name)

    def link(self, run_id: str, trace_ids: Sequence[str]) -> None:
        """Put traces on a run."""
        self._post_to_run("traces/link-to-run", {"trace_ids": list(trace_ids), "run_id": run_id})

    def assess(self, score: Assessment, run_id: str | None) -> None:
        """Put a score or an expectation on a trace."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat().replace("+00:00", "Z")
        assessment: dict[str, Any] = {
            "assessment_id": score.id,
            "trace_id": score.trace_id,
            "assessment_name": score.name,
            "create_time": now,
            "last_update_time": now,
            "metadata": base.score_metadata(score, run_id),
            **(_feedback(score) if isinstance(score, Score) else _expectation(score)),
        }
        if score.span_id is not None:
            assessment["span_id"] = score.span_id
        path = f"traces/{score.trace_id}/assessments"
        try:
            found = self._rest("POST", path, "assessment", version="3.0", json={"assessment": assessment})
        except ExportError as error:
            # An attempt whose answer was lost may have stored it.
            if error.unavailable or self._rest("GET", f"{path}/{score.id}", "assessment", version="3.0") is None:
                raise
            return
        if found is None:
            raise base.refusal("trace", f"MLflow at {self.name} has no trace {score.trace_id} to put a score on.")

    # --- runs -------------------------------------------------------------------------------------------------------
    def create_run(
        self, key: str, tags: Mapping[str, str], started: int, experiment_id: str | None = None, *, known: bool = False
    ) -> CreatedRun:
        """Make a run, or find it."""
        place = experiment_id or self.experiment_id()
        if known and (found := self.find_run(key, place)) is not None:
            return found
        body = {"experiment_id": place, "run_name": tags[TAG_NAME], "start_time": started, "tags": _pairs(tags)}
        return _created(self._post("runs/create", body, "run")["run"])

    def find_run(self, key: str, experiment_id: str | None = None) -> CreatedRun | None:
        """A run by its key."""
        place = experiment_id or self.experiment_id()
        body = {"experiment_ids": [place], "filter": f"tags.`{TAG_KEY}` = '{key}'", "max_results": 1}
        runs = self._post("runs/search", body, "runs", empty=True).get("runs") or []
        return _created(runs[0]) if runs else None

    def url(self, run_id: str, experiment_id: str | None = None) -> str | None:
        """The page of a run."""
        return run_page(self._uri, experiment_id or self.experiment_id(), run_id)

    def log(self, run_id: str, metrics: Sequence[Metric], params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Write metrics, parameters and tags."""
        points = [{"key": m.key, "value": m.value, "timestamp": m.time, "step": m.step} for m in metrics]
        body = {"run_id": run_id, "metrics": points, "params": _pairs(params), "tags": _pairs(tags)}
        self._post_to_run("runs/log-batch", body)

    def add_datasets(self, run_id: str, datasets: Sequence[Dataset]) -> None:
        """Add dataset inputs."""
        inputs = [
            {
                "dataset": base.dataset_fields(dataset),
                "tags": [{"key": base.DATASET_CONTEXT, "value": dataset.context}],
            }
            for dataset in datasets
        ]
        self._post_to_run("runs/log-inputs", {"run_id": run_id, "datasets": inputs})

    def put_artifact(self, run: CreatedRun, path: str, text: str) -> None:
        """Store a text artifact."""
        if not self._put(run.artifact_uri, path, text):
            self._with_client(lambda client: client.log_text(run.run_id, text, path), path)

    def _put_model_artifact(self, model: StoredModel, path: str, text: str) -> None:
        if not self._put(model.artifact_uri, path, text):
            self._with_client(lambda client: base.put_with_client(client, model.model_id, path, text), path)

    def _put(self, address: str, path: str, text: str) -> bool:
        """Store a text artifact; False when the server leaves that to its clients."""
        place = _artifact_path(address, path)
        if place is None:
            return False
        answer = self._request("PUT", place, data=text.encode("utf-8", "replace"))
        verdict = judge(answer, ours=answer.body.strip() in (b"", b"{}"))
        if verdict is not Verdict.DELIVERED:
            raise explain(answer, verdict, self.name, path)
        return True

    def end_run(self, run_id: str, status: str, when: int) -> None:
        """Set a run's status and end."""
        self._post_to_run("runs/update", {"run_id": run_id, "status": status, "end_time": when}, "run_info")

    def find_runs(self, run_id: str | None, condition: str, experiment_id: str | None = None) -> list[StoredRun]:
        """The run with an id, or those that match."""
        if run_id is not None:
            answer = self._rest("GET", "runs/get", "run", params={"run_id": run_id})
            return [] if answer is None else [_stored(answer["run"])]
        place = experiment_id or self.experiment_id()
        body: dict[str, Any] = {"experiment_ids": [place], "filter": condition, "max_results": _RUNS}
        found: list[StoredRun] = []
        while len(found) < base.MAX_RUNS:
            answer = self._post("runs/search", body, "runs", empty=True)
            found += map(_stored, answer.get("runs") or ())
            if not answer.get("next_page_token"):
                break
            body["page_token"] = answer["next_page_token"]
        return found

    def find_traces(self, condition: str, experiment_id: str | None = None) -> list[StoredTrace]:
        """Traces that match."""
        place = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment_id}}
        if experiment_id is None:
            place["mlflow_experiment"] = {"experiment_id": self.experiment_id()}
        body: dict[str, Any] = {"locations": [place], "filter": condition, "max_results": _TRACES}
        found: list[StoredTrace] = []
        while len(found) < base.MAX_TRACES:
            answer = self._rest("POST", "traces/search", "traces", empty=True, version="3.0", json=body) or {}
            found += map(_stored_trace, answer.get("traces") or ())
            if not answer.get("next_page_token"):
                break
            body["page_token"] = answer["next_page_token"]
        return found

    def read_spans(self, trace_ids: Sequence[str]) -> list[ReadableSpan]:
        """Spans of programs."""
        asked: dict[str, Any] = {"params": {"trace_ids": list(trace_ids)}, "limit": base.MAX_ARTIFACT}
        answer = self._rest("GET", "traces/batchGet", "traces", empty=True, version="3.0", **asked) or {}
        found = []
        for span in (span for trace in answer.get("traces") or () for span in trace.get("spans") or ()):
            names = {pair.get("key") for pair in span.get("attributes", ())}
            if base.is_of_program(names, (event.get("name") for event in span.get("events", ()))):
                found.append(restore(read_span(span, base.scope_of(names))))
        return found

    def read_artifact(self, run: CreatedRun, path: str) -> str | None:
        """A text artifact."""
        place = _artifact_path(run.artifact_uri, path)
        if place is None:
            found = self._with_client(lambda client: base.read_with_client(client, run.run_id, path), path)
            return None if found is None else str(found)
        return self._read_at(place, path)

    def _read_model_artifact(self, model: StoredModel, path: str) -> str | None:
        place = _artifact_path(model.artifact_uri, path)
        if place is None:
            found = self._with_client(lambda _: base.read_below(model.artifact_uri, path), path)
            return None if found is None else str(found)
        return self._read_at(place, path)

    def _read_at(self, place: str, path: str) -> str | None:
        answer = self._request("GET", place, limit=base.MAX_ARTIFACT)
        if answer.status == 404:
            return None
        if not answer.ok:
            raise explain(answer, judge(answer, ours=False), self.name, path)
        return answer.body.decode("utf-8")

    # --- the connection ---------------------------------------------------------------------------------------------
    @property
    def experiment_in_use(self) -> str | None:
        """Id of the experiment; None until it has been looked up."""
        return self._experiment_id

    def experiment_id(self) -> str:
        """The id of the experiment, found or made by the first call."""
        if self._experiment_id is None:
            try:
                self._experiment_id = self._find_experiment()
            except ExportError as error:
                error.unavailable = True  # nothing can be written without an experiment
                raise
        return self._experiment_id

    def _find_experiment(self) -> str:
        self._check_version()
        return resolve_experiment(
            self._target.named_experiment,
            self._target.create,
            lambda one: _experiment(self._rest("GET", "experiments/get", "experiment", params={"experiment_id": one})),
            lambda one: _experiment(
                self._rest("GET", "experiments/get-by-name", "experiment", params={"experiment_name": one})
            ),
            lambda one: str(self._post("experiments/create", {"name": one}, "experiment_id")["experiment_id"]),
        )

    def set_deadline(self, until: float) -> None:
        """Let no request take longer than until then."""
        self._until = until

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def after_fork(self) -> None:
        """Drop the connections shared with the parent process."""
        self._session = session()

    def _check_version(self) -> None:
        answer = self._request("GET", "/version")
        try:
            old = answer.ok and Version(answer.body[:100].decode("ascii").strip()) < Version(OLDEST_MLFLOW)
        except (InvalidVersion, UnicodeDecodeError):  # a proxy's page: later answers show the reason
            return
        if old:
            _logger.warning(
                "The MLflow server at %s has version %s, which is older than %s: traces lack their names and tags, "
                "runs and scores may be incomplete. Upgrade the server.",
                self.name,
                answer.text,
                OLDEST_MLFLOW,
            )

    def _post(
        self, path: str, body: dict[str, Any], gives: str | None = None, *, empty: bool = False
    ) -> dict[str, Any]:
        answer = self._rest("POST", path, gives, empty=empty, json=body)
        if answer is None:
            self._experiment_id = None  # it is looked up again
            raise base.refusal("not found", f"MLflow at {self.name} says the experiment does not exist any more.")
        return answer

    def _post_to_run(self, path: str, body: dict[str, Any], gives: str | None = None) -> None:
        if self._rest("POST", path, gives, json=body) is None:
            self._experiment_id = None  # likewise
            raise base.lost(self.name)

    def _rest(
        self, method: str, path: str, gives: str | None, *, empty: bool = False, version: str = "2.0", **kwargs: Any
    ) -> dict[str, Any] | None:
        """Call MLflow's REST API; None when what is asked for does not exist.

        Args:
            method: of HTTP.
            path: below the API's version.
            gives: a key of MLflow's own answer, by which it is known from that of a proxy. None: it has no keys.
            empty: whether it may also have none: nothing was found.
            version: of the API.
            **kwargs: for the request.
        """
        answer = self._request(method, f"/api/{version}/mlflow/{path}", **kwargs)
        if answer.error_code == _NOT_FOUND:
            return None
        loaded = _json(answer)
        ours = loaded is not None and (gives in loaded if loaded else empty or gives is None)
        verdict = judge(answer, ours=ours)
        if verdict is not Verdict.DELIVERED:
            raise explain(answer, verdict, self.name, path.partition("/")[0])
        return loaded

    def _request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        limit: int = _MAX_ANSWER,
        seconds: float | None = None,
        **kwargs: Any,
    ) -> Answer:
        """Send one request with MLflow's credentials and TLS settings; the answer, whatever its status."""
        left = max(0.5, min(seconds or self._target.timeout, self._until - time.monotonic()))
        try:
            response = self._session.request(
                method,
                self._uri + path,
                headers={**_workspace(), **(headers or {})},
                auth=self._authorize,
                timeout=(min(_CONNECT_SECONDS + len(kwargs.get("data") or b"") / _SLOWEST, left), left),
                # A redirected POST would arrive as a GET without its body.
                allow_redirects=False,
                stream=True,
                **_tls(),
                **kwargs,
            )
            answer = _read(response, limit, time.monotonic() + left)
        except requests.ReadTimeout as error:
            if not self.answered:
                raise self._unreachable(error) from error
            raise ExportError(
                "slow", f"MLflow at {self.name} is slow: no answer in {left:.0f} s.", unavailable=True
            ) from error
        except (requests.ConnectionError, requests.Timeout) as error:
            raise self._unreachable(error) from error
        except Exception as error:  # a malformed URI, a missing certificate file, half an answer, ...
            kind = type(error).__name__
            raise ExportError("request", f"MLflow at {self.name}: {kind}.", unavailable=True) from error
        self.answered += 1
        return answer

    def _unreachable(self, error: Exception) -> ExportError:
        return ExportError(
            "unreachable",
            f"MLflow at {self.name} cannot be reached ({type(error).__name__}): is the server running, and is "
            "MLFLOW_TRACKING_URI right?",
            unavailable=True,
        )

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # As an auth callable, so that ~/.netrc cannot replace the header. Read each time: tokens get renewed.
        if header := self._user or _authorization():
            request.headers["Authorization"] = header
        return request

    def _with_client(self, call: Any, path: str) -> Any:
        """Where a server leaves artifacts to its clients."""
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise base.refusal(
                "artifacts",
                "This server leaves artifacts to its clients, and only MLflow's own can write there: "
                "pip install mlflow-skinny.",
            ) from error
        try:
            return call(MlflowClient(tracking_uri=self._target.uri))
        except Exception as error:
            raise ExportError("artifact", f"{path}: {clean(base.first_line(error))}.") from error


def _read(response: requests.Response, limit: int, until: float) -> Answer:
    """Read an answer within limits of size and time. The connection is kept when all of it was read."""
    if response.status_code >= 300:
        limit = min(limit, _MAX_REFUSAL)
    parts: list[bytes] = []
    size = 0
    whole = False
    raw = response.raw
    try:
        while size <= limit and time.monotonic() < until:
            # read1 gives what has arrived; in a chunked answer an empty part is not yet the end.
            part = raw.read1(_CHUNK, decode_content=True) or raw.read(_CHUNK, decode_content=True)
            if not part:
                whole = True
                break
            parts.append(part)
            size += len(part)
    finally:
        if not whole:
            response.close()
    if not whole and response.ok:
        raise requests.ConnectionError("an answer that does not end")
    body = b"".join(parts)
    kind = response.headers.get("Content-Type", "")
    location = response.headers.get("Location")
    return Answer(
        response.status_code,
        kind,
        body,
        None if response.ok else _error_code(body),
        None if location is None else public_uri(location),
        response.headers.get("Retry-After"),
    )


def _feedback(score: Score) -> dict[str, Any]:
    feedback: dict[str, Any] = {"value": score.value}
    if score.error is not None:
        feedback["error"] = {"error_code": score.error, "error_message": score.message or base.FAILED_EXAMPLE}
    found: dict[str, Any] = {"feedback": feedback, "source": {"source_type": "CODE", "source_id": score.name}}
    return found if score.rationale is None else {**found, "rationale": score.rationale}


def _expectation(expectation: Expectation) -> dict[str, Any]:
    value: dict[str, Any] = {"value": expectation.value}
    if isinstance(expectation.value, (list, dict)):
        text = json.dumps(expectation.value, ensure_ascii=False)
        value = {"serialized_value": {"serialization_format": "JSON_FORMAT", "value": text}}
    return {"expectation": value, "source": {"source_type": "CODE", "source_id": base.EXPECTATION_SOURCE}}


def _is_otlp(answer: Answer) -> bool:
    """Whether an answer to spans is that of an OTLP receiver: its message in protobuf or JSON."""
    if "protobuf" not in answer.kind:
        loaded = _json(answer)
        return loaded is not None and loaded.keys() <= {"partialSuccess"}
    try:
        ExportTraceServiceResponse.FromString(answer.body)
    except DecodeError:
        return False
    return True


def _rejected(answer: Answer) -> int:
    """How many spans an OTLP receiver rejected, by its own answer."""
    if "protobuf" in answer.kind:
        return int(ExportTraceServiceResponse.FromString(answer.body).partial_success.rejected_spans)
    part = json.loads(answer.body).get("partialSuccess")
    return int(part.get("rejectedSpans") or 0) if isinstance(part, dict) else 0


def _json(answer: Answer) -> dict[str, Any] | None:
    """The object in an answer's body, if it is one."""
    try:
        loaded = json.loads(answer.body)
    except (ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None


def _error_code(body: bytes) -> str | None:
    try:
        loaded = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return str(loaded["error_code"]) if isinstance(loaded, dict) and "error_code" in loaded else None


def _user_of(uri: str) -> str | None:
    """The header for a user name and password in the address, as MLflow's client sends it (by ``requests``)."""
    parts = urlsplit(uri)
    if parts.username is None:
        return None
    text = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    try:
        return "Basic " + base64.b64encode(text.encode("latin-1")).decode()
    except UnicodeEncodeError:
        return "Basic " + base64.b64encode(text.encode()).decode()


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


def _artifact_path(artifact_uri: str, path: str) -> str | None:
    address = urlsplit(artifact_uri)
    if address.scheme != _ARTIFACTS:
        return None
    return f"/api/2.0/mlflow-artifacts/artifacts/{quote(address.path.strip('/') + '/' + path)}"


def _experiment(answer: dict[str, Any] | None) -> FoundExperiment | None:
    if not answer or "experiment" not in answer:
        return None
    experiment = answer["experiment"]
    return FoundExperiment(str(experiment["experiment_id"]), str(experiment.get("lifecycle_stage", "active")))


def _pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items()]


def _created(answer: Mapping[str, Any]) -> CreatedRun:
    info = answer["info"]
    return CreatedRun(str(info["run_id"]), str(info.get("artifact_uri", "")))


def _stored(answer: Mapping[str, Any]) -> StoredRun:
    info, data = answer["info"], answer.get("data", {})
    tags = whole_tags({tag["key"]: tag.get("value", "") for tag in data.get("tags", ())})
    return StoredRun(
        str(info["run_id"]),
        str(info.get("artifact_uri", "")),
        int(info.get("start_time", 0)),
        tags,
        whole_metrics(tags, {metric["key"]: float(metric["value"]) for metric in data.get("metrics", ())}),
        {param["key"]: param.get("value", "") for param in data.get("params", ())},
        str(info.get("experiment_id", "")),
        str(info.get("status", "")),
        int(info["end_time"]) if info.get("end_time") else None,
        {
            tag["value"]: str(one["dataset"].get("digest"))
            for one in answer.get("inputs", {}).get("dataset_inputs", ())
            for tag in one.get("tags", ())
            if tag.get("key") == base.DATASET_CONTEXT
        },
    )


def _judgement(trace_id: str, assessment: Mapping[str, Any]) -> Judgement:
    expectation = assessment.get("expectation")
    found = assessment.get("feedback") if expectation is None else expectation
    value = found.get("value") if isinstance(found, dict) else None
    if isinstance(found, dict) and isinstance(serialized := found.get("serialized_value"), dict):
        value = load_json(serialized.get("value"))
    span_id = assessment.get("span_id")
    return Judgement(
        base.trace_number(trace_id),
        int(span_id, 16) if span_id else None,
        str(assessment.get("assessment_name")),
        value,
        human=assessment.get("source", {}).get("source_type") == "HUMAN",
        expectation=expectation is not None,
        text=assessment.get("rationale"),
        when=_moment(assessment.get("create_time")),
    )


def _stored_trace(trace: Mapping[str, Any]) -> StoredTrace:
    judgements = [
        _judgement(str(trace["trace_id"]), one) for one in trace.get("assessments", ()) if one.get("valid", True)
    ]
    return StoredTrace(
        str(trace["trace_id"]),
        trace.get("tags", {}),
        int(1000 * _moment(trace.get("request_time"))),
        _seconds(trace.get("execution_duration")),
        trace.get("state") == "ERROR",
        trace.get("request_preview"),
        trace.get("response_preview"),
        newest_scores(judgements),
        judgements,
        base.stored_usage(trace.get("trace_metadata", {})),
    )


def _moment(text: Any) -> float:
    """A time in the JSON of protobuf, which may have nanoseconds, as seconds since 1970; 0 for anything else."""
    whole, _, fraction = str(text).removesuffix("Z").partition(".")
    try:
        when = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.timezone.utc)
        return when.timestamp() + float(f"0.{fraction or 0}")
    except ValueError:
        return 0.0


def _seconds(duration: Any) -> float | None:
    """A duration in the JSON of protobuf: ``1.5s``."""
    return float(duration[:-1]) if isinstance(duration, str) and duration.endswith("s") else None
