"""A server on loopback that keeps what MLflow keeps, answers as MLflow 3.17 answers, and misbehaves when it is to.

The answers were read off a real server of 3.17.2: spans get an empty ``application/x-protobuf``, an artifact an empty
200 without a type, a score that is there already a 500, one for a trace that is not there a 404, another value for a
parameter a 400. ``tests/integration/test_mlflow_property.py`` runs the same programs against the real one.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

ENDPOINTS = (
    ("spans", re.compile(r"/v1/traces$")),
    ("links", re.compile(r".*/traces/link-to-run$")),
    ("scores", re.compile(r".*/assessments(/[^/]+)?$")),
    ("create", re.compile(r".*/runs/create$")),
    ("search", re.compile(r".*/runs/(search|get)$")),
    ("log", re.compile(r".*/runs/log-batch$")),
    ("inputs", re.compile(r".*/runs/log-inputs$")),
    ("end", re.compile(r".*/runs/update$")),
    ("artifacts", re.compile(r".*/mlflow-artifacts/artifacts/")),
    ("experiments", re.compile(r".*/experiments/")),
    ("models", re.compile(r".*/logged-models(/.*)?$")),
    ("prompts", re.compile(r".*/(registered-models|model-versions)/")),
    ("datasets", re.compile(r".*/api/3.0/mlflow/datasets/")),
    ("traces", re.compile(r".*/api/3.0/mlflow/traces(/search)?$")),
    ("version", re.compile(r"/version$")),
)
NAMES = tuple(name for name, _ in ENDPOINTS)
PAGE = b"<!doctype html><title>Sign in</title><form>who are you?</form>"


@dataclass(frozen=True)
class Fault:
    """What one answer is instead of what it should be.

    Attributes:
        kind: ``status``, ``database`` (400, no free connection), ``page`` (200, HTML), ``text`` (200, no JSON),
            ``object`` (200, JSON of another server), ``redirect``, ``drip`` (an answer that does not end), ``headers``
            (whose headers do not end), ``reset``, ``half`` (of an answer).
        status: for ``status``.
        applied: the server has done what it was asked.
        retry_after: seconds, for ``status``.
    """

    kind: str
    status: int = 0
    applied: bool = False
    retry_after: str | None = None


def endpoint_of(path: str) -> str:
    return next((name for name, pattern in ENDPOINTS if pattern.match(path)), "other")


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        once: faults of an endpoint's next requests.
        outage: fault of every request.
        poison: spans of these names get this status, with all that comes with them.
        happened: how many of each kind.
        forget: empties the server's database.
    """

    once: dict[str, deque[Fault]] = field(default_factory=dict)
    outage: Fault | None = None
    poison: dict[str, int] = field(default_factory=dict)
    happened: Counter[str] = field(default_factory=Counter)
    forget: Callable[[], None] | None = None

    def add(self, endpoint: str, fault: Fault) -> None:
        self.once.setdefault(endpoint, deque()).append(fault)

    def pop(self, endpoint: str) -> Fault | None:
        waiting = self.once.get(endpoint)
        fault = waiting.popleft() if waiting else self.outage
        if fault is not None:
            self.happened[f"{fault.kind}{' applied' if fault.applied else ''}"] += 1
        return fault

    def mend(self) -> None:
        """All faults have passed."""
        self.once.clear()
        self.poison.clear()
        self.outage = None


class Misbehaving(BaseHTTPRequestHandler):
    """Reads a request, and answers it or does what the fault says."""

    protocol_version = "HTTP/1.1"
    faults: Faults
    lock: threading.Lock

    def log_message(self, *_: Any) -> None:
        pass

    def perform(self, body: bytes) -> tuple[int, str, bytes]:
        """Do what is asked; status, type and body of the answer."""
        raise NotImplementedError

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.lock:
            fault = self.faults.pop(endpoint_of(urlsplit(self.path).path))
        with contextlib.suppress(OSError):
            if fault is not None and not fault.applied:
                self.misbehave(fault, b'{"half": "of an answer"}')
                return
            status, kind, answer = self.perform(body)
            if fault is None:
                self.send(status, kind, answer)
            else:
                self.misbehave(fault, answer or b"  ")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = serve

    def misbehave(self, fault: Fault, answer: bytes) -> None:
        if fault.kind == "status":
            more = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            self.send(fault.status, "text/plain", b"no", more)
        elif fault.kind == "database":  # seen under load
            self.send(400, "application/json", b'{"error_code": "BAD_REQUEST", "message": "QueuePool limit reached"}')
        elif fault.kind == "page":
            self.send(200, "text/html; charset=utf-8", PAGE)
        elif fault.kind == "text":
            self.send(200, "text/plain", b"OK")
        elif fault.kind == "object":
            self.send(200, "application/json", b'{"error": "please log in"}')
        elif fault.kind == "redirect":
            self.send(302, "text/html", PAGE, {"Location": "http://127.0.0.1:9/login"})
        elif fault.kind == "drip":
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{")
            for _ in range(10_000):  # until the client has had enough
                self.wfile.write(b" ")
                time.sleep(0.02)
        elif fault.kind == "headers":
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            for _ in range(10_000):
                self.wfile.write(b"a")
                time.sleep(0.02)
        elif fault.kind == "half":
            self.close_connection = True
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(answer) + 9}\r\n\r\n"
            self.wfile.write(head.encode() + answer[: len(answer) // 2])
        else:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def send(self, status: int, kind: str, body: bytes, more: Mapping[str, str] = {}) -> None:
        lines = [f"HTTP/1.1 {status} x", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in more.items())]
        if kind:
            lines.append(f"Content-Type: {kind}")
        self.wfile.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)  # in one piece: nothing waits for the rest


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:  # broken connections are what this is for
        pass


@contextmanager
def serving(handler: type[Misbehaving]) -> Iterator[str]:
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class FakeMLflow:
    """What an MLflow server keeps, in memory.

    Attributes:
        faults: what goes wrong.
        runs: by id.
        spans: by trace and span.
        links: pairs of run and trace.
        scores: by id.
        models, prompts, datasets: by id, name, and name.
        trace_models: ids of models by id of trace.
        requests: how many, by endpoint.
        url: of the server.
        forgotten: how many runs it had before.
    """

    def __init__(self) -> None:
        self.faults = Faults(forget=self.forget)
        self.lock = threading.Lock()
        self.runs: dict[str, dict[str, Any]] = {}
        self.spans: dict[tuple[str, str], dict[str, Any]] = {}
        self.links: set[tuple[str, str]] = set()
        self.scores: dict[str, dict[str, Any]] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.prompts: dict[str, dict[str, Any]] = {}
        self.datasets: dict[str, dict[str, Any]] = {}
        self.trace_models: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.url = ""
        self.forgotten = 0

    def forget(self) -> None:
        """Start again with an empty database, as a container without a volume does."""
        with self.lock:
            self.forgotten += len(self.runs)
            for kept in (self.runs, self.spans, self.links, self.scores, self.models, self.prompts, self.datasets):
                kept.clear()
            self.trace_models.clear()

    def perform(self, method: str, path: str, query: Mapping[str, list[str]], body: bytes) -> tuple[int, str, bytes]:
        endpoint = endpoint_of(path)
        with self.lock:
            self.requests[endpoint] += 1
            if endpoint == "version":
                return 200, "text/html; charset=utf-8", b"3.17.2"
            if endpoint == "spans":
                return self._spans(body)
            if endpoint == "artifacts":
                place, _, name = unquote(path).partition("/mlflow-artifacts/artifacts/")[2].partition("/artifacts/")
                owner = place.partition("/")[2]
                found = self.runs.get(owner) or self.models.get(owner.removeprefix("models/"))
                if found is not None:  # files need no database
                    found["artifacts"][name] = body.decode()
                return 200, "", b""
            given = json.loads(body) if body else {key: values[0] for key, values in query.items()}
            try:
                return 200, "application/json", json.dumps(self._rest(endpoint, method, path, given)).encode()
            except Refused as error:
                return (
                    error.status,
                    "application/json",
                    json.dumps({"error_code": error.code, "message": "no"}).encode(),
                )

    def _spans(self, body: bytes) -> tuple[int, str, bytes]:
        try:
            request = ExportTraceServiceRequest.FromString(body)
        except DecodeError:
            return 400, "application/json", b'{"detail":"Invalid OpenTelemetry format"}'
        found = [
            (of_resource, of_scope.scope.name, span)
            for of_resource in request.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]
        for _, _, span in found:
            if span.name in self.faults.poison:
                return self.faults.poison[span.name], "application/json", b'{"detail":"Failed to log spans"}'
        for _, scope, span in found:
            place = (f"tr-{span.trace_id.hex()}", span.span_id.hex())
            attributes = {one.key: one.value.SerializeToString() for one in span.attributes}
            self.spans[place] = {
                "name": span.name,
                "scope": scope,
                "parent": span.parent_span_id.hex(),
                "times": (span.start_time_unix_nano, span.end_time_unix_nano),
                "attributes": attributes,
            }
        return 200, "application/x-protobuf", b""

    def _rest(self, endpoint: str, method: str, path: str, given: Mapping[str, Any]) -> dict[str, Any]:
        if endpoint == "experiments":
            if given.get("experiment_id") != "0":
                raise Refused(404, "RESOURCE_DOES_NOT_EXIST")
            return {"experiment": {"experiment_id": "0", "name": "Default", "lifecycle_stage": "active"}}
        if endpoint == "create":
            number = self.forgotten + len(self.runs)  # no run ever gets the id of another
            run_id = f"{zlib.crc32(str(number).encode()):08x}{number:024x}"
            tags = {"mlflow.runName": given["run_name"], **_dict(given["tags"])}
            self.runs[run_id] = {
                "tags": tags,
                "started": given["start_time"],
                "status": "RUNNING",
                "ended": None,
                "params": {},
                "metrics": set(),
                "datasets": set(),
                "artifacts": {},
            }
            return {"run": self._run(run_id)}
        if endpoint == "search":
            if path.endswith("get"):
                return {"run": self._run(self._known(given["run_id"]))}
            found = re.fullmatch(r"tags\.`([^`]+)` = '([^']*)'", given["filter"])
            assert found is not None, given
            runs = [self._run(i) for i, run in self.runs.items() if run["tags"].get(found[1]) == found[2]]
            return {"runs": runs} if runs else {}
        if endpoint == "scores":
            return self._score(method, path, given)
        if endpoint == "models":
            return self._model(method, path, given)
        if endpoint == "prompts":
            return self._prompt(path, given)
        if endpoint == "datasets":
            return self._dataset(path, given)
        if endpoint == "traces":
            return self._trace(path, given)
        run_id = self._known(given["run_id"])
        run = self.runs[run_id]
        if endpoint == "log":
            if len(given["metrics"]) + len(given["params"]) + len(given["tags"]) > 1000 or len(given["params"]) > 100:
                raise Refused(400, "INVALID_PARAMETER_VALUE")
            params = _dict(given["params"])
            if any(run["params"].get(key, value) != value for key, value in params.items()):
                raise Refused(400, "INVALID_PARAMETER_VALUE")
            run["params"].update(params)
            run["tags"].update(_dict(given["tags"]))
            run["metrics"] |= {(m["key"], m["value"], m["timestamp"], m["step"]) for m in given["metrics"]}
        elif endpoint == "inputs":
            run["datasets"] |= {
                (d["dataset"]["name"], d["dataset"]["digest"], d["tags"][0]["value"]) for d in given["datasets"]
            }
        elif endpoint == "end":
            run.update(status=given["status"], ended=given["end_time"])
            return {"run_info": self._run(run_id)["info"]}
        elif endpoint == "links":
            if len(given["trace_ids"]) > 100:
                raise Refused(400, "INVALID_PARAMETER_VALUE")
            self.links |= {(run_id, trace_id) for trace_id in given["trace_ids"]}
        else:
            raise Refused(404, "ENDPOINT_NOT_FOUND")
        return {}

    def _score(self, method: str, path: str, given: Mapping[str, Any]) -> dict[str, Any]:
        if method == "GET":
            score_id = path.rpartition("/")[2]
            if score_id not in self.scores:
                raise Refused(404, "RESOURCE_DOES_NOT_EXIST")
            return {"assessment": self.scores[score_id]}
        score = given["assessment"]
        if score["trace_id"] not in {trace_id for trace_id, _ in self.spans}:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST")
        if score["assessment_id"] in self.scores:
            raise Refused(500, "INTERNAL_ERROR")
        self.scores[score["assessment_id"]] = score
        return {"assessment": score}

    def _model(self, method: str, path: str, given: Mapping[str, Any]) -> dict[str, Any]:
        if path.endswith("/search"):
            found = re.fullmatch(r"tags\.`([^`]+)` = '([^']*)'", given["filter"])
            assert found is not None, given
            models = [self._as_model(i) for i, one in self.models.items() if one["tags"].get(found[1]) == found[2]]
            return {"models": models} if models else {}
        if path.endswith("/logged-models"):
            model_id = f"m-{len(self.models):032x}"
            self.models[model_id] = {
                "name": given["name"],
                "run": self._known(given["source_run_id"]),
                "tags": _dict(given["tags"]),
                "status": "PENDING",
                "artifacts": {},
            }
            return {"model": self._as_model(model_id)}
        model_id = path.removesuffix("/tags").rpartition("/")[2]
        assert method == "PATCH"
        if path.endswith("/tags"):
            self.models[model_id]["tags"].update(_dict(given["tags"]))
            return {}
        assert given["status"] == 2
        self.models[model_id]["status"] = "READY"
        return {"model": self._as_model(model_id)}

    def _as_model(self, model_id: str) -> dict[str, Any]:
        model = self.models[model_id]
        tags = [{"key": key, "value": value} for key, value in model["tags"].items()]
        address = f"mlflow-artifacts:/0/models/{model_id}/artifacts"
        return {"info": {"model_id": model_id, "name": model["name"], "artifact_uri": address, "tags": tags}}

    def _prompt(self, path: str, given: Mapping[str, Any]) -> dict[str, Any]:
        if path.endswith("registered-models/create"):
            if given["name"] in self.prompts:
                raise Refused(400, "RESOURCE_ALREADY_EXISTS")
            self.prompts[given["name"]] = {"tags": _dict(given["tags"]), "versions": []}
        elif path.endswith("search"):
            name = str(given["filter"]).split("'")[1]
            versions = [
                {"version": str(number), "tags": [{"key": k, "value": v} for k, v in tags.items()]}
                for number, tags in enumerate(self.prompts[name]["versions"], 1)
            ]
            return {"model_versions": versions} if versions else {}
        elif given["name"] not in self.prompts:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST")
        elif path.endswith("model-versions/create"):
            self.prompts[given["name"]]["versions"].append(_dict(given["tags"]))
            return {"model_version": {"version": str(len(self.prompts[given["name"]]["versions"]))}}
        elif path.endswith("set-tag"):
            self.prompts[given["name"]]["tags"][given["key"]] = given["value"]
            return {}
        tags = [{"key": key, "value": value} for key, value in self.prompts[given["name"]]["tags"].items()]
        return {"registered_model": {"name": given["name"], "tags": tags}}

    def _dataset(self, path: str, given: Mapping[str, Any]) -> dict[str, Any]:
        if path.endswith("/records"):
            name = unquote(path).split("/")[-2].removeprefix("d-")
            rows = json.loads(given["records"])
            self.datasets[name]["rows"].update((json.dumps(row["inputs"]), row["expectations"]) for row in rows)
            return {"inserted_count": len(rows), "updated_count": 0}
        name = given["name"] if path.endswith("/create") else given["filter_string"].split("'")[1]
        if path.endswith("/create"):
            if name in self.datasets:
                raise Refused(400, "RESOURCE_ALREADY_EXISTS")
            self.datasets[name] = {"tags": json.loads(given["tags"]), "rows": {}}
            return {"dataset": {"dataset_id": f"d-{name}"}}
        return {"datasets": [{"dataset_id": f"d-{name}"}]} if name in self.datasets else {}

    def _trace(self, path: str, given: Mapping[str, Any]) -> dict[str, Any]:
        if not path.endswith("/search"):
            trace = given["trace"]["trace_info"]
            self.trace_models[trace["trace_id"]] = trace["trace_metadata"]["mlflow.modelId"]
            return {"trace": given["trace"]}
        run_id = given["filter"].split("'")[1]
        there = {trace_id for trace_id, _ in self.spans}
        traces = [
            {"trace_id": trace_id, "trace_metadata": {"mlflow.modelId": self.trace_models.get(trace_id)}}
            for of_run, trace_id in sorted(self.links)
            if of_run == run_id and trace_id in there
        ]
        return {"traces": traces} if traces else {}

    def _known(self, run_id: str) -> str:
        if run_id not in self.runs:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST")
        return run_id

    def _run(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        info = {
            "run_id": run_id,
            "experiment_id": "0",
            "status": run["status"],
            "start_time": run["started"],
            "artifact_uri": f"mlflow-artifacts:/0/{run_id}/artifacts",
        }
        tags = [{"key": key, "value": value} for key, value in run["tags"].items()]
        return {"info": info, "data": {"tags": tags}}

    # --- what it has ------------------------------------------------------------------------------------------------
    def contents(self) -> dict[str, Any]:
        """All of it, with keys in place of ids of runs. When a killed run ended is left out: that is when the program
        is known to have ended."""
        keys = {run_id: run["tags"]["dspy.run.key"] for run_id, run in self.runs.items()}
        assert len(set(keys.values())) == len(keys), f"a run is there twice: {sorted(keys.values())}"

        ids = {**keys, **{model_id: f"model of {keys[one['run']]}" for model_id, one in self.models.items()}}

        def named(text: str) -> str:
            return re.sub("|".join(ids) or "$^", lambda found: f"<{ids[found[0]]}>", text)

        runs = {}
        for run_id, run in self.runs.items():
            killed = run["status"] == "KILLED"
            runs[keys[run_id]] = {
                "status": run["status"],
                "times": (run["started"], None if killed else run["ended"]),
                "tags": {key: named(value) for key, value in sorted(run["tags"].items())},
                "params": dict(sorted(run["params"].items())),
                "metrics": sorted((k, v, 0 if killed else when, step) for k, v, when, step in run["metrics"]),
                "datasets": sorted(run["datasets"]),
                "artifacts": {path: _timeless(named(text)) for path, text in sorted(run["artifacts"].items())},
            }
        models = {}
        for model_id, model in self.models.items():
            key = keys[model["run"]]
            assert key not in models, f"a model is there twice: {key}"
            models[key] = {
                "name": model["name"],
                "status": model["status"],
                "tags": {name: named(value) for name, value in sorted(model["tags"].items())},
                "artifacts": model["artifacts"],
                "traces": sorted(trace_id for trace_id, one in self.trace_models.items() if one == model_id),
            }
        own = ("trace_id", "span_id", "assessment_name", "feedback", "expectation", "rationale")
        scores = {
            score_id: {
                **{name: score[name] for name in own if name in score},
                "metadata": {key: named(value) for key, value in score["metadata"].items()},
            }
            for score_id, score in self.scores.items()
        }
        return {
            "runs": runs,
            "spans": dict(sorted(self.spans.items())),
            "links": sorted((keys[run_id], trace_id) for run_id, trace_id in self.links),
            "scores": dict(sorted(scores.items())),
            "models": models,
            "prompts": {name: [one["mlflow.prompt.text"] for one in p["versions"]] for name, p in self.prompts.items()},
            "datasets": {name: (one["tags"], dict(sorted(one["rows"].items()))) for name, one in self.datasets.items()},
        }


class Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


def _timeless(page: str) -> str:
    return re.sub(r"<b>[^<]*</b><span>duration", "<span>duration", page)


def _dict(pairs: list[dict[str, str]]) -> dict[str, str]:
    return {pair["key"]: pair.get("value", "") for pair in pairs}


@contextmanager
def fake_mlflow() -> Iterator[FakeMLflow]:
    """One that answers."""
    fake = FakeMLflow()

    class Handler(Misbehaving):
        faults, lock = fake.faults, fake.lock

        def perform(self, body: bytes) -> tuple[int, str, bytes]:
            parts = urlsplit(self.path)
            return fake.perform(self.command, parts.path, parse_qs(parts.query), body)

    with serving(Handler) as fake.url:
        yield fake
