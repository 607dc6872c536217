"""Chosen programs and faults of the property in ``tests/mlflow/test_property.py``, against a real MLflow server."""

from __future__ import annotations

import errno
import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dspy_otel.mlflow.account import KINDS
from dspy_otel.mlflow.journal import journal_directories
from dspy_otel.mlflow.replay import replay
from tests.mlflow.fake_server import Fault, Faults, Misbehaving, serving
from tests.mlflow.programs import Call, Disk, Evaluation, Event, Optimization, Plan, Trial, run
from tests.mlflow.stored import comparable, contents_of, timeless
from tests.mlflow.test_property import compare, quick, without_faults

pytest.importorskip("mlflow")
pytestmark = [pytest.mark.integration, pytest.mark.injects_faults, pytest.mark.filterwarnings("ignore:.*fork")]

INNER = Optimization((Trial((0.5,), 50.0),))
STORIES = (
    Optimization((Trial((1.0, 0.5, None), 75.0), Trial((0.0,), 50.0, fails=True)), inside=INNER),
    Evaluation((1.0, None)),
    Call(2, foreign=True),
    Call(1),
)
HTML, LOST, HALF = Fault("page"), Fault("reset", applied=True), Fault("half", applied=True)
PLANS = {
    "an outage to the end": Plan(
        STORIES,
        (0, 3, 1),
        (Event(30, "round"), Event(60, "outage", fault=Fault("status", 503)), Event(80, "round")),
        threads=True,
    ),
    "a login page, and a program that is killed": Plan(
        STORIES,
        (2, 0, 0, 1),
        (Event(20, "round"), Event(50, "outage", fault=HTML), Event(55, "round"), Event(70, "mended")),
        cut=75,
        end="kill",
    ),
    "each endpoint fails, before and after": Plan(
        STORIES,
        (0, 1, 2, 3),
        (
            *(Event(0, "fault", name, LOST) for name in ("spans", "links", "scores", "create", "log", "end")),
            *(Event(0, "fault", name, HALF) for name in ("inputs", "artifacts", "spans", "create")),
            *(Event(0, "fault", name, Fault("status", 500)) for name in ("artifacts", "scores", "log", "end")),
            *(Event(50, "fault", name, Fault("status", 404)) for name in ("links", "log", "artifacts")),
            Event(0, "fault", "scores", Fault("status", 429, retry_after="1")),
            *(Event(at, "round") for at in (25, 50, 75)),
        ),
    ),
    "no disk for a while, and a fork": Plan(
        STORIES,
        (0, 2, 5),
        (
            Event(10, "disk", number=errno.ENOSPC),
            Event(20, "round"),
            Event(30, "fork"),
            Event(40, "outage", fault=Fault("redirect")),
            Event(60, "record"),
            Event(70, "disk"),
        ),
    ),
}


@dataclass
class Proxy:
    """Before a server; does what its faults say."""

    upstream: str
    faults: Faults = field(default_factory=Faults)
    url: str = ""


@contextmanager
def misbehaving(upstream: str) -> Iterator[Proxy]:
    proxy = Proxy(upstream)
    place = urlsplit(upstream)

    class Handler(Misbehaving):
        faults, lock = proxy.faults, threading.Lock()

        def perform(self, body: bytes) -> tuple[int, str, bytes]:
            connection = http.client.HTTPConnection(place.hostname or "", place.port)
            try:
                headers = {key: value for key, value in self.headers.items() if key.lower() != "host"}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                return answer.status, answer.headers.get("Content-Type", ""), answer.read()
            finally:
                connection.close()

    with serving(Handler) as proxy.url:
        yield proxy


@pytest.mark.parametrize("name", PLANS)
def test_a_real_server_has_all_of_it_and_once(server_uri: str, tmp_path: Path, name: str) -> None:
    from mlflow.tracking import MlflowClient

    plan, first = PLANS[name], 10_000_000 * (1 + list(PLANS).index(name))  # ids of traces are those of a server
    expected = comparable(without_faults(plan, first))
    client, disk = MlflowClient(tracking_uri=server_uri), Disk()
    experiment = client.create_experiment(name)
    with misbehaving(server_uri) as proxy, quick(plan, tmp_path / "spool", disk, "5"):
        done = run(plan, proxy.url, proxy.faults, disk, experiment=name, first=first)
        assert done.exit_codes == [0] * done.forked
        if done.account is not None:
            assert not any(done.account.waiting(kind) for kind in KINDS), done.account
            assert not done.account.dropped
        proxy.faults.mend()
        disk.errno = 0
        assert replay([tmp_path / "spool"]).left == []
        assert journal_directories(tmp_path / "spool") == []
        assert proxy.faults.happened
        compare(timeless(contents_of(client, experiment, tmp_path)), expected)
