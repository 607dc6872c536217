"""Whatever a server, a disk and the end of a process do: once it is over, MLflow has all of it, and once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from dspy_otel.mlflow import journal, processor, retry
from dspy_otel.mlflow import replay as replaying
from dspy_otel.mlflow.account import KINDS
from dspy_otel.mlflow.backends import rest
from dspy_otel.mlflow.journal import complete_messages, journal_directories
from dspy_otel.mlflow.replay import replay
from dspy_otel.record.otlp import decode
from tests.mlflow.fake_server import NAMES, FakeMLflow, Fault, Faults, fake_mlflow
from tests.mlflow.programs import Disk, Event, Optimization, Plan, Process, Trial, run, stories
from tests.mlflow.stored import comparable, contents_of, timeless

pytestmark = [pytest.mark.injects_faults, pytest.mark.filterwarnings("ignore:.*fork")]

ENDLESS = ("drip", "headers")
SHORT = 0.3
"""Seconds for one request where an answer does not end; elsewhere all time there is."""

# --- what can go wrong ----------------------------------------------------------------------------------------------
_before = st.sampled_from(
    [
        *(Fault("status", status) for status in (400, 401, 403, 404, 406, 408, 409, 413, 422, 423, 425, 500, 501)),
        *(Fault("status", status) for status in (502, 503, 504, 507)),
        *(Fault("status", 429, retry_after=text) for text in ("1", "0", "soon", "Fri, 31 Dec 2100 23:59:59 GMT")),
        *(Fault(kind) for kind in ("database", "page", "text", "object", "redirect", "reset", "half")),
    ]
)
_after = st.sampled_from(
    [*(Fault(k, applied=True) for k in ("reset", "half", "page", "object")), Fault("status", 500, True)]
)
faults = st.one_of(_before, _after)
_step = st.integers(0, 100)
_network = st.one_of(
    st.builds(Event, _step, st.just("round")),
    st.builds(Event, _step, st.just("round")),
    st.builds(Event, _step, st.just("record")),
    st.builds(Event, _step, st.just("fault"), st.sampled_from(NAMES), faults),
    st.builds(Event, _step, st.just("outage"), fault=_before),
    st.builds(Event, _step, st.just("mended")),
    st.builds(
        Event,
        _step,
        st.just("poison"),
        st.sampled_from(["example QA", "chat m", "compile Best", "evaluate QA", "trial", "call"]),
        number=st.sampled_from([400, 406, 408, 413, 422, 500]),
    ),
)
_at_end = st.sampled_from([[], [], [Event(100, "mended")]]) | _before.map(
    lambda fault: [Event(85, "outage", fault=fault)]
)
disks = st.builds(Event, _step, st.just("disk"), number=st.sampled_from([0, errno.ENOSPC, errno.EROFS, errno.EIO]))
forks = st.builds(Event, _step, st.just("fork"))


def plans(*more: Any, **fixed: Any) -> st.SearchStrategy[Plan]:
    return st.builds(
        Plan,
        st.lists(stories, min_size=1, max_size=3).map(tuple),
        st.lists(st.integers(0, 5), min_size=1, max_size=8).map(tuple),
        st.tuples(st.lists(st.one_of(_network, *more), min_size=2, max_size=16), _at_end).map(
            lambda both: (*both[0], *both[1])
        ),
        **{
            "cut": st.sampled_from([100, 100, 0, 10, 30, 50, 70, 90]),
            "end": st.sampled_from(["shutdown", "kill"]),
            "spool": st.just(True),
            "threads": st.booleans(),
            **fixed,
        },
    )


# --- the property ---------------------------------------------------------------------------------------------------
@contextmanager
def quick(plan: Plan, spool: Path, disk: Disk, exit_seconds: str) -> Iterator[None]:
    """Pauses are short, and the disk may fail."""
    append = journal._append

    def append_or_fail(path: Path, body: bytes) -> None:
        if disk.errno:
            raise OSError(disk.errno, os.strerror(disk.errno))
        append(path, body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "WRITE_INTERVAL", 0.002)
        patch.setattr(processor, "HANGS_AFTER", 0.2)
        patch.setattr(retry, "FIRST_PAUSE", 0.001)
        patch.setattr(retry, "LONGEST_PAUSE", 0.004)
        patch.setattr(retry, "LONGEST_RETRY_AFTER", 0.004)
        patch.setattr(rest, "FIRST_BATCH_SECONDS", 0.0)
        patch.setattr(journal, "_DISK_RETRY_SECONDS", 0.0)
        patch.setattr(journal, "_append", append_or_fail)
        patch.setenv("OTEL_DSPY_SPOOL", str(spool) if plan.spool else "off")
        patch.setenv("OTEL_DSPY_EXIT_SECONDS", exit_seconds)
        if plan.limit:
            patch.setenv("OTEL_DSPY_SPOOL_LIMIT", str(plan.limit))
        if plan.memory:
            patch.setattr(journal, "MEMORY_BYTES", plan.memory)
        yield


@contextmanager
def scratch() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="dspy-otel-property-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def without_faults(plan: Plan, first: int = 1) -> dict[str, Any]:
    """What MLflow has of a program when nothing goes wrong."""
    plan = replace(plan, threads=False, spool=True, limit=0, memory=0)
    with scratch() as directory, fake_mlflow() as server, quick(plan, directory, Disk(), "180"):
        run(plan, server.url, None, Disk(), first=first)
        if plan.end == "kill":
            assert replay([directory]).left == []
        return server.contents()


def check(plan: Plan) -> None:
    expected = without_faults(plan)
    disk = Disk()
    endless = any(event.fault is not None and event.fault.kind in ENDLESS for event in plan.events)
    with scratch() as directory, fake_mlflow() as server, quick(plan, directory, disk, "0.5"):
        done = run(plan, server.url, server.faults, disk, SHORT if endless else 60.0)
        assert done.exit_codes == [0] * done.forked
        server.faults.mend()
        disk.errno = 0
        lossy = not plan.spool or plan.limit or plan.memory or any(event.kind == "disk" for event in plan.events)
        if done.account is not None:
            check_account(done, expected, server, directory)
            lost = sum(done.account.dropped.values())
            assert lossy or not lost, done.account
        else:
            lost = lossy
        assert replay([directory]).left == []
        assert journal_directories(directory) == []
        if not lost:
            got = server.contents()
            if any(event.kind == "poison" for event in plan.events):
                without_traces_of_models(got, expected)
            compare(got, expected)


def without_traces_of_models(*contents: dict[str, Any]) -> None:
    """A trace that MLflow refused, and takes later, is no model's any more."""
    for one in contents:
        for model in one["models"].values():
            del model["traces"]


def check_account(done: Process, expected: dict[str, Any], server: FakeMLflow, spool: Path) -> None:
    """The account adds up, and says what is so."""
    account = done.account
    assert account is not None
    assert {kind: account.waiting(kind) for kind in KINDS} == dict.fromkeys(KINDS, 0), account

    spans = {span.context.span_id for span in done.produced}
    assert account.produced["spans"] == len(spans)
    assert account.produced["traces"] == sum(span.parent is None for span in done.produced)
    scores = [span for span in done.produced if span.name == "example QA"]
    assert account.produced["scores"] == len(scores)
    fields = [json.loads(span.attributes.get("dspy.example.expected", "{}")) for span in scores]
    assert account.produced["expectations"] == sum(value is not None for one in fields for value in one.values())
    if not sum(account.dropped.values()):
        assert account.produced["runs"] == len(expected["runs"])
        assert account.produced["artifacts"] == sum(len(run["artifacts"]) for run in expected["runs"].values())

    held = {int(span_id, 16) for _, span_id in server.spans} & spans
    disk = {
        span.context.span_id
        for place in journal_directories(spool)
        for path in place.undelivered()
        for span in decode(complete_messages(path.read_bytes()))
    } & spans
    # An answer that got lost is of something that MLflow has, but that is not known to be written.
    kept = account.kept["spans"] + account.refused["spans"]
    assert account.written["spans"] <= len(held)
    assert len(disk - held) <= kept <= len(disk)
    assert len(spans - held - disk) <= account.dropped["spans"]
    stored = [*server.runs.values()]
    assert account.written["runs"] <= sum(run["status"] != "RUNNING" for run in stored)
    assessments = Counter("scores" if "feedback" in one else "expectations" for one in server.scores.values())
    for kind in ("scores", "expectations"):
        assert account.written[kind] <= assessments[kind]
    assert account.written["artifacts"] <= sum(len(run["artifacts"]) for run in stored)
    if not any("applied" in kind for kind in server.faults.happened):
        for kind in ("scores", "expectations"):
            assert account.written[kind] == assessments[kind]
        assert account.written["artifacts"] == sum(len(run["artifacts"]) for run in stored)
        assert len(spans - held - disk) == account.dropped["spans"]


def compare(got: dict[str, Any], expected: dict[str, Any]) -> None:
    if got == expected:
        return
    mine, theirs = flat(got), flat(expected)
    lines = []
    for key in sorted({*mine, *theirs}):
        one, other = mine.get(key, "nothing"), theirs.get(key, "nothing")
        if one != other:
            start = max(0, len(os.path.commonprefix([one, other])) - 60)
            lines.append(f"{key}\n    is        {one[start : start + 300]}\n    should be {other[start : start + 300]}")
    raise AssertionError("MLflow has not what it should have:\n" + "\n".join(lines)[:6000])


def flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}/{key}").items()}
    if isinstance(value, list):
        return {f"{name}/{json.dumps(part)}": "there" for part in value}
    return {name: repr(value)}


# --- a real store ---------------------------------------------------------------------------------------------------
CAUSES = {
    **{"write": "spans", "link": "links", "score": "scores", "run": "create", "values": "log", "datasets": "inputs"},
    **{"model": "models", "prompt": "prompts", "dataset": "datasets"},
}


def faulty_store(faults: Faults) -> Any:
    """An embedded store whose calls fail, before or after they have been made."""
    from dspy_otel.mlflow.backends.embedded import EmbeddedBackend

    class Faulty(EmbeddedBackend):
        def deliver(self, batch: Any) -> bool:
            fault = faults.pop("spans")
            return False if fault is not None and not fault.applied else super().deliver(batch) and fault is None

        def _call(self, cause: str, call: Any) -> Any:
            fault = faults.pop({**CAUSES, "artifact": "artifacts"}.get(cause, cause))

            def attempt() -> Any:
                done = call() if fault is None or fault.applied else None
                if fault is not None:
                    raise OSError("database is locked")
                return done

            return super()._call(cause, attempt)

    return Faulty


@pytest.fixture(scope="module")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without anything in it: MLflow makes one in seconds."""
    tracking = pytest.importorskip("mlflow.tracking")
    directory = tmp_path_factory.mktemp("store")
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{directory / 'mlflow.db'}")
    client.create_experiment("property", artifact_location=str(directory / "artifacts"))
    return directory / "mlflow.db"


def check_store(plan: Plan, new: Path) -> None:
    from mlflow.tracking import MlflowClient

    expected = comparable(without_faults(plan))
    faults = Faults()
    with scratch() as directory, quick(plan, directory / "spool", Disk(), "1"), pytest.MonkeyPatch.context() as patch:
        uri = f"sqlite:///{directory / 'mlflow.db'}"
        shutil.copy(new, directory / "mlflow.db")
        for module in (processor, replaying):
            patch.setattr(module, "open_backend", faulty_store(faults))
        done = run(plan, uri, faults, Disk(), experiment="property")
        faults.mend()
        account = done.account
        assert account is None or not any(account.waiting(kind) for kind in KINDS), account
        assert replay([directory / "spool"]).left == []
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name("property").experiment_id
        got = timeless(contents_of(client, experiment, directory))
        if any(event.kind == "poison" for event in plan.events):
            without_traces_of_models(got, expected)
        compare(got, expected)


def settings_for(examples: int, **more: Any) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), **more)


FEW = settings_for(25, derandomize=True, phases=[Phase.explicit, Phase.generate])
MANY = settings_for(400, phases=[Phase.explicit, Phase.generate])

SERVERS = plans()
DISKS = plans(
    disks,
    spool=st.booleans(),
    limit=st.sampled_from([0, 0, 3_000, 12_000]),
    memory=st.sampled_from([0, 0, 2_000]),
)
FORKS = plans(forks)
SLOW = plans(
    st.builds(Event, _step, st.just("fault"), st.sampled_from(NAMES), st.sampled_from([Fault(k) for k in ENDLESS]))
)


@FEW
@given(SERVERS)
def test_a_server_that_misbehaves(plan: Plan) -> None:
    check(plan)


@pytest.mark.parametrize("end", ["shutdown", "kill"])
@pytest.mark.parametrize("at", [15, 40, 65, 85, 95])
@pytest.mark.parametrize("threads", [False, True])
def test_a_server_that_comes_back_with_an_empty_database(at: int, end: str, threads: bool) -> None:
    trial = Trial((0.0, 0.5, 1.0, 0.0), 75.0, True)
    events = (*(Event(at - 5 * before, "round") for before in (2, 1)), Event(at, "replaced"), Event(at + 3, "round"))
    plan = Plan(
        (Optimization((trial,) * 4, True, False, None),),
        (0,),
        events,
        **{"cut": 100, "end": end, "spool": True, "limit": 0, "memory": 0, "threads": threads},
    )
    expected = without_faults(plan)
    with scratch() as directory, fake_mlflow() as server, quick(plan, directory, Disk(), "0.5"):
        done = run(plan, server.url, server.faults, Disk())
        if done.account is not None:
            assert {kind: done.account.waiting(kind) for kind in KINDS} == dict.fromkeys(KINDS, 0)
            assert not sum(done.account.dropped.values())
            assert done.account.kept["runs"]
        assert replay([directory]).left == []
        assert journal_directories(directory) == []
        compare(server.contents(), expected)


FULL: Final = Plan(
    (Optimization((Trial((0.0, 0.5, 1.0, 0.0), 75.0, True),) * 2, True, False, None),),
    (0,),
    (),
    **{"cut": 90, "end": "shutdown", "spool": True, "limit": 3_000, "memory": 0, "threads": True},
)
"""An evaluation and its examples end in one batch that the limit does not let through."""


@FEW
@example(FULL)
@given(DISKS)
def test_a_disk_that_fails_and_a_limit(plan: Plan) -> None:
    check(plan)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.nightly
@settings_for(40, phases=[Phase.explicit, Phase.generate])
@given(FORKS)
def test_a_process_that_forks(plan: Plan) -> None:
    check(plan)


@pytest.mark.nightly
@settings_for(60, phases=[Phase.explicit, Phase.generate])
@given(SLOW)
def test_an_answer_that_does_not_end(plan: Plan) -> None:
    check(plan)


@pytest.mark.slow
@settings_for(25, phases=[Phase.explicit, Phase.generate])
@given(plan=SERVERS)
def test_a_real_store(plan: Plan, new_store: Path) -> None:
    check_store(plan, new_store)


@pytest.mark.nightly
@MANY
@given(st.one_of(SERVERS, SERVERS, DISKS))
def test_all_of_it_at_length(plan: Plan) -> None:
    check(plan)
