"""Worker processes of others, of Celery and of Ray: the context comes by ``inject()`` and ``attach()``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.otlp_receiver import OtlpReceiver
from tests.switching.process import running, script
from tests.switching.test_neighbours import needs

pytestmark = pytest.mark.integration

_HERE = Path(__file__).parent
# Nothing is sent by the clock: what arrives has been flushed.
_NEVER = {"OTEL_BSP_SCHEDULE_DELAY": "3600000"}


def assert_continued(receiver: OtlpReceiver, calls: int, program: str) -> None:
    """Each call in a worker is a child of the caller's span, complete, with what the caller's context says."""
    (request,) = receiver.spans("request")
    inside = [span for span in receiver.spans() if span.trace == request.trace and span.scope == "dspy_otel"]
    by_id = {span.id: span for span in (request, *inside)}
    parents = sorted((span.name, by_id[span.parent].name) for span in inside)
    expected = [("Predict reply", program), ("chat echo", "Predict reply"), (program, "request")]
    assert parents == sorted(expected * calls)
    for span in inside:
        assert span.resource["service.name"] == "worker"
        assert span.attributes["session.id"] == "s1"
        assert span.attributes["dspy.optimizer.run.id"] == "run7"


@needs("celery", "celery")
def test_celery_with_prefork(tmp_path: Path):
    with OtlpReceiver() as receiver:
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http, **_NEVER}
        worker = ("-m", "celery", "-A", "tests.switching.celery_app", "worker", "--pool=prefork", "--concurrency=2")
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")
        with running(*worker, *quiet, cwd=tmp_path, OTEL_SERVICE_NAME="worker", **settings):
            done = script(_HERE / "celery_app.py", cwd=tmp_path, OTEL_SERVICE_NAME="caller", **settings)
        assert done.output == "['blue', 'blue', 'blue', 'blue'] True\n4 72 0\n"
        assert_continued(receiver, 4, "invoke_workflow App")


@pytest.fixture
def ray_settings() -> Iterator[dict[str, str]]:
    # Its sockets have long names under this; and it keeps no token in the home directory.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@needs("ray", "ray")
@pytest.mark.nightly
def test_ray_task_and_actor(ray_settings: dict[str, str]):
    with OtlpReceiver() as receiver:
        done = script(_HERE / "ray_app.py", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http, **ray_settings, **_NEVER)
        assert done.output == "['blue', 'blue'] True\n"
        assert_continued(receiver, 2, "invoke_workflow Greeter")


@needs("ray", "ray")
def test_ray_hands_usage_back(tmp_path: Path, ray_settings: dict[str, str]):
    """Of tasks, of an actor, of a task that fails, of one whose worker is killed, of batches: calls, tokens, lost."""
    done = script(_HERE / "ray_usage_app.py", str(tmp_path), **ray_settings)
    shown = [line for line in done.output.splitlines() if line.split()[0] in _RAY]
    calls = (3, 5, 6, 7, 8, 14)
    assert shown == [f"{n} {c} {c * 18} {int(c > 7)}" for n, c in zip(_RAY, calls, strict=True)]
    (said,) = done.warnings
    assert "1 of 12 tasks that were sent to worker processes have handed no usage back" in said


_RAY = ("tasks", "actor", "failed", "retried", "killed", "data")


@needs("distributed", "distributed")
def test_dask_hands_usage_back(tmp_path: Path):
    done = script(_HERE / "dask_app.py", cwd=tmp_path)
    assert done.output == "submit 2 36 0\nmap 5 90 0\nfailed 6 108 0\n"
    assert done.warnings == []


def test_spawned_processes_hand_usage_back(tmp_path: Path):
    done = script(_HERE / "spawn_app.py")
    assert done.output == "['blue', 'blue', 'blue'] 3 54 0\n"
    assert done.warnings == []
