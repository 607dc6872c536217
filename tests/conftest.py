"""Fixtures of every test: a clean DSPy, a clean environment, and an in-memory OpenTelemetry SDK."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Both are read when DSPy and LiteLLM are imported.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
# What tests could not send is nobody's business outside of them.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="dspy-otel-tests-")
os.environ.setdefault("DSPY_CACHEDIR", os.environ["XDG_STATE_HOME"])

from tests.support import dspy35

if dspy35.WANTED:
    dspy35.apply()

from dspy_otel import DSPyInstrumentor
from dspy_otel.content import redaction
from dspy_otel.core import internal_errors
from tests.support.older import skip_what_is_newer
from tests.support.openai_server import OpenAIServer, openai_server
from tests.support.spans import Recorder, forget_harmless_texts

_MADE = os.environ["XDG_STATE_HOME"]
_FOREIGN_SETTINGS = re.compile(
    r"^(OTEL_|MLFLOW_|TRACEPARENT$|TRACESTATE$|BAGGAGE$|DSPY_(?!CACHEDIR$))|_API_KEY$|_API_BASE$|_BASE_URL$"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    # Its own `dest`: a snapshot plugin may be installed beside us.
    parser.addoption(
        "--update-snapshots",
        action="store_true",
        dest="write_snapshots",
        help="write snapshots instead of comparing with them",
    )


def pytest_unconfigure() -> None:
    shutil.rmtree(_MADE, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_what_is_newer(items)


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """No setting, cache entry, history or warning passes from one test to the next.

    An internal error is raised, and fails the test, unless that is marked with ``injects_faults``.
    """
    environment = dict(os.environ)
    monkeypatch.setattr(internal_errors, "raises", request.node.get_closest_marker("injects_faults") is None)
    for name in list(os.environ):
        if _FOREIGN_SETTINGS.search(name):
            monkeypatch.delenv(name)
    internal_errors.reset_warnings()
    redaction._known.clear()
    forget_harmless_texts()
    _reset_dspy()
    yield
    instrumentor = DSPyInstrumentor()
    if instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()
    _reset_dspy()
    # Code under test may set variables for good, as the demo does, and programs that later tests start would see them.
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _reset_dspy() -> None:
    dspy = sys.modules.get("dspy")
    if dspy is None or not hasattr(dspy, "configure_cache"):
        return
    settings = sys.modules["dspy.dsp.utils.settings"]
    settings.main_thread_config.clear()
    settings.main_thread_config.update(
        {**settings.DEFAULT_CONFIG, "trace": [], "callbacks": [], "stream_listeners": []}
    )
    settings.config_owner_thread_id = None
    settings.config_owner_async_task = None
    sys.modules["dspy.clients.base_lm"].GLOBAL_HISTORY.clear()
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)


@pytest.fixture
def telemetry() -> Iterator[Recorder]:
    """An in-memory SDK: `telemetry.instrument(**options)` switches on, the end of the test switches off."""
    recorder = Recorder()
    yield recorder
    recorder.shutdown()


def older_versions(version: str) -> list[str]:
    """Whose snapshots hold for this DSPy, if it is not the newest: its own, else the next newer one's."""
    if dspy35.WANTED:
        return ["35"]
    if version == "3.4.0":
        return ["340"]
    minors = [f"3{minor}" for minor in range(4)]
    minor = "".join(version.split(".")[:2])
    return minors[minors.index(minor) :] if minor in minors else []


@pytest.fixture
def snapshot(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``snapshot(text)`` or ``snapshot(text, name)``: compare with ``snapshots/<name>.txt`` beside the test.

    Default name: the test's. A file ``<name>.dspy33.txt`` holds where DSPy 3.3 and older differ from the newest one,
    unless there is one of an older version, too; ``<name>.dspy35.txt`` where the shim of 3.5 differs.
    """
    update = request.config.getoption("write_snapshots")
    directory = Path(request.path).parent / "snapshots"

    def compare(text: str, name: str | None = None) -> None:
        from importlib.metadata import version

        stem = re.sub(r"[^\w.-]+", "-", name or request.node.name.removeprefix("test_")).strip("-")
        common = directory / f"{stem}.txt"
        own = [directory / f"{stem}.dspy{suffix}.txt" for suffix in older_versions(version("dspy"))]
        text = text.rstrip() + "\n"
        place = next((place for place in own if place.exists()), common)
        if update:
            directory.mkdir(exist_ok=True)
            if own and common.exists():
                own[0].unlink(missing_ok=True)
                place = next((place for place in own if place.exists()), common)
                if place.read_text(encoding="utf-8") != text:
                    own[0].write_text(text, encoding="utf-8")
            else:
                common.write_text(text, encoding="utf-8")
            return
        assert place.exists(), f"no snapshot {place.name}; write it with --update-snapshots and read it"
        expected = place.read_text(encoding="utf-8")
        if text != expected:
            lines = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), place.name, "exported", lineterm="", n=4
            )
            pytest.fail("\n".join(lines), pytrace=False)

    return compare


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    """A localhost OpenAI-compatible server; `server.lm()` is a `dspy.LM` on it."""
    with openai_server() as running:
        yield running
