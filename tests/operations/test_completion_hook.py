"""Content by reference: a completion hook has what was said, spans say where, and its store is never noticed."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from pathlib import Path

import dspy
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import dspy_otel
from tests.operations.common import dummy
from tests.support.chat import chat

# Of the group `neighbours`: its lower bounds are not those of ours.
genai = pytest.importorskip("opentelemetry.util.genai.types")
fsspec = pytest.importorskip("fsspec")
MemoryFileSystem = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem

pytestmark = pytest.mark.integration

UPLOAD = "OTEL_INSTRUMENTATION_GENAI_UPLOAD_"
PNG = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUg=="
KEY = "sk-proj-abcdefghijklmnopqrstuvwxyz012345"
REFERENCES = ("gen_ai.input.messages_ref", "gen_ai.output.messages_ref")


def weather(place: str) -> str:
    """The weather of a place."""
    return f"rain in {place}"


def references(span) -> dict[str, str]:
    return {key: value for key, value in span.attributes.items() if key.endswith("_ref")}


def writers():
    """What writes the files of the hook `upload`."""
    return dspy_otel.DSPyInstrumentor().telemetry.completions.hook._writers


def flush() -> None:
    """Wait until all files are written, as the end of the program does."""
    writers().close(60)


def stored(reference: str):
    with fsspec.open(reference) as file:
        return json.loads(file.read())


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class Store(MemoryFileSystem):
    """A store in memory that can be full, or hang."""

    protocol = "store"
    store: dict = {}
    pseudo_dirs = [""]
    answers = threading.Event()
    failure: Exception | None = None

    def open(self, path, mode="rb", **options):
        Store.answers.wait()
        if Store.failure is not None and mode == "w":
            raise Store.failure
        return super().open(path, mode, **options)


fsspec.register_implementation("store", Store, clobber=True)


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setenv(f"{UPLOAD}BASE_PATH", "store://prompts")
    Store.store.clear()
    Store.answers.set()
    Store.failure = None
    yield Store
    Store.failure = None
    Store.answers.set()


class Hook:
    """A user's hook."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def on_completion(self, **given) -> None:
        assert given["span"].is_recording()
        given["span"].set_attribute("archive.number", len(self.calls))
        self.calls.append(given)


def test_content_is_in_the_store_and_references_are_on_spans(telemetry, tmp_path, monkeypatch):
    monkeypatch.setenv(f"{UPLOAD}BASE_PATH", f"file://{tmp_path}")
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_COMPLETION_HOOK", "upload")
    telemetry.instrument(redact=lambda text: text.replace("Rome", "R***"))
    answers = [
        {"next_thought": "look", "next_tool_name": "weather", "next_tool_args": '{"place": "Rome"}'},
        {"next_thought": "done", "next_tool_name": "finish", "next_tool_args": "{}"},
        {"reasoning": "it rains", "answer": "rain"},
    ]
    with dspy.context(lm=dummy(*answers)):
        dspy.ReAct("question -> answer", tools=[weather])(question=f"Weather in Rome? {KEY}")
    flush()
    assert "Weather in" not in telemetry.everything()
    assert "rain" not in telemetry.everything()

    with_references = {span.name for span in telemetry.spans if references(span)}
    assert with_references == {"invoke_agent ReAct", "chat dummy"}
    agent = telemetry.only("invoke_agent ReAct")
    assert tuple(sorted(references(agent))) == REFERENCES
    asked, answered = (stored(agent.attributes[key]) for key in REFERENCES)
    assert asked[0]["role"] == "user"
    assert json.loads(asked[0]["parts"][0]["content"]) == {"question": "Weather in R***? [masked]"}
    assert json.loads(answered[0]["parts"][0]["content"])["answer"] == "rain"
    for call in telemetry.named("chat dummy"):
        roles = [message["role"] for message in stored(call.attributes["gen_ai.input.messages_ref"])]
        assert roles == ["system", "user"]
    said = "".join(file.read_text("utf-8") for file in tmp_path.iterdir())
    assert "Rome" not in said
    assert KEY not in said
    assert len(list(tmp_path.iterdir())) == sum(len(references(span)) for span in telemetry.spans)
    assert [point.value for point in telemetry.metric("dspy.content.files")] == [len(list(tmp_path.iterdir()))]


def test_a_hook_of_the_users_is_handed_typed_messages_and_adds_to_the_span(telemetry, server):
    hook = Hook()
    telemetry.instrument(completion_hook=hook, capture_media=True, content_limit=20_000)
    tools = [{"type": "function", "function": {"name": "look", "description": "Looks", "parameters": {}}}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG}}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": '{"at": 1}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "a cat"},
    ]
    chat(server.lm(cache=False), messages, tools=tools)
    (call,) = hook.calls
    assert telemetry.only("chat").attributes["archive.number"] == 0
    assert [message.role for message in call["inputs"]] == ["system", "user", "assistant", "tool"]
    parts = [message.parts[0] for message in call["inputs"]]
    assert [type(part) for part in parts] == [
        genai.TextPart,
        genai.BlobPart,
        genai.ToolCallRequestPart,
        genai.ToolCallResponsePart,
    ]
    assert (parts[1].mime_type, parts[1].content[:4]) == ("image/png", b"\x89PNG")
    assert (parts[2].name, parts[2].arguments, parts[3].response) == ("look", {"at": 1}, "a cat")
    assert [type(message) for message in call["outputs"]] == [genai.OutputMessage]
    assert call["tool_definitions"] == [genai.FunctionToolDefinition("look", "Looks", {})]


def test_content_that_was_cut_is_handed_over_all_the_same(telemetry):
    hook = Hook()
    telemetry.instrument(completion_hook=hook, content_limit=300)
    lm = dummy({"answer": "x" * 5_000})
    with dspy.context(lm=lm):
        dspy.Predict("question -> answer")(question="y" * 5_000)
        chat(lm, [{"role": "user", "content": str(number)} for number in range(200)])
    assert all(call["inputs"] for call in hook.calls)
    assert sum(len(str(call["inputs"])) for call in hook.calls) < 5_000


def test_what_is_not_recorded_is_not_stored(telemetry):
    hook = Hook()
    sampled_out = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    telemetry.instrument(completion_hook=hook, tracer_provider=sampled_out)
    with dspy.context(lm=dummy({"answer": "blue"})):
        dspy.Predict("question -> answer")(question="sky?")
    assert hook.calls == []


def test_of_traces_that_an_optimization_drops_nothing_is_stored(telemetry):
    from tests.optimizers import common

    hook = Hook()
    telemetry.instrument(completion_hook=hook, optimization_traces="failed_and_best")
    common.quietly(common.RUNS["BootstrapFewShotWithRandomSearch"], common.scripted_lm())
    handed = {span.context.span_id for span in telemetry.spans if "archive.number" in span.attributes}
    kept = {
        span.context.span_id
        for span in telemetry.spans
        if "gen_ai.operation.name" in span.attributes and span.attributes["gen_ai.operation.name"] != "execute_tool"
    }
    assert handed == kept
    assert len(hook.calls) == len(kept) > 5
    inside = {"chat", "invoke_workflow"}
    assert {span.name.split()[0] for span in telemetry.spans if span.context.span_id in handed} == inside


def test_it_is_independent_of_content_on_spans(telemetry, store):
    telemetry.instrument(completion_hook="upload", capture_content="span_and_event")
    with dspy.context(lm=dummy({"answer": "blue"})):
        dspy.Predict("question -> answer")(question="sky?")
    flush()
    call = telemetry.only("chat dummy")
    captured = json.loads(call.attributes["gen_ai.output.messages"])
    (kept,) = stored(call.attributes["gen_ai.output.messages_ref"])
    assert kept["parts"] == captured[0]["parts"]


def test_a_directory_that_goes_away_is_said_once_and_changes_nothing(telemetry, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(f"{UPLOAD}BASE_PATH", str(tmp_path / "prompts"))
    (tmp_path / "prompts").mkdir()
    telemetry.instrument(completion_hook="upload")
    (tmp_path / "prompts").rmdir()
    with dspy.context(lm=dummy({"answer": "blue"})):
        assert dspy.Predict("question -> answer")(question="sky?").answer == "blue"
    flush()
    first, last = warnings(caplog)
    assert "(FileNotFoundError: No such file or directory)" in first
    assert last.endswith("0 files written, 4 lost (4 FileNotFoundError)")


@pytest.mark.injects_faults
def test_a_hook_that_raises_changes_nothing(telemetry, caplog):
    class Broken:
        def on_completion(self, **given):
            raise RuntimeError(f"quotes {given['inputs']}")

    telemetry.instrument(completion_hook=Broken())
    with dspy.context(lm=dummy({"answer": "blue"}, {"answer": "blue"})):
        for _ in range(2):
            assert dspy.Predict("question -> answer")(question="sky?").answer == "blue"
    assert len(telemetry.spans) == 4
    (warning,) = warnings(caplog)
    assert "completion hook failed (RuntimeError)" in warning


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EACCES])
def test_a_store_that_takes_nothing_is_said_once_and_counted(telemetry, store, caplog, reason):
    telemetry.instrument(completion_hook="upload")
    store.failure = OSError(reason, "not the secret prompt")
    kind = type(store.failure).__name__
    with dspy.context(lm=dummy(*[{"answer": "blue"}] * 3)):
        for _ in range(3):
            assert dspy.Predict("question -> answer")(question="sky?").answer == "blue"
        flush()
        first, last = warnings(caplog)
        assert f"({kind}: {os.strerror(reason)})" in first
        assert last.endswith(f"0 files written, 12 lost (12 {kind})")
        store.failure = None
        with dspy.context(lm=dummy({"answer": "blue"})):
            dspy.Predict("question -> answer")(question="sky?")
    flush()
    (call,) = telemetry.named("chat dummy")[3:]
    assert stored(call.attributes["gen_ai.input.messages_ref"])[0]["role"] == "system"
    counts = {point.attributes.get("error.type"): point.value for point in telemetry.metric("dspy.content.files")}
    assert counts == {kind: 12, None: 4}
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry.util")]


def test_a_store_that_hangs_holds_nothing_up(telemetry, store, monkeypatch, caplog):
    monkeypatch.setenv(f"{UPLOAD}MAX_QUEUE_SIZE", "3")
    telemetry.instrument(completion_hook="upload")
    store.answers.clear()
    with dspy.context(lm=dummy(*[{"answer": "blue"}] * 4)):
        for _ in range(4):
            assert dspy.Predict("question -> answer")(question="sky?").answer == "blue"
    # What there is no room for has no reference.
    assert sum(len(references(span)) for span in telemetry.spans) == 3
    writers().close(0.01)
    full, lost = warnings(caplog)
    assert f"{UPLOAD}MAX_QUEUE_SIZE (3) may be higher" in full
    assert lost.endswith("0 files written, 16 lost (13 queue_full, 3 not_written)")
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "dspy-otel content")
    store.answers.set()


def test_a_store_that_does_not_answer_at_the_start_is_used_once_it_does(telemetry, store, monkeypatch, caplog):
    from dspy_otel.core import completion_hook

    monkeypatch.setattr(completion_hook, "_SECONDS", 0.01)
    store.answers.clear()
    telemetry.instrument(completion_hook="upload")
    with dspy.context(lm=dummy(*[{"answer": "blue"}] * 2)):
        dspy.Predict("question -> answer")(question="sky?")
        store.answers.set()
        (thread,) = [each for each in threading.enumerate() if each.name == "dspy-otel store of content"]
        thread.join()
        dspy.Predict("question -> answer")(question="sky?")
    assert [len(references(span)) for span in telemetry.named("chat dummy")] == [0, 2]
    (warning,) = warnings(caplog)
    assert "the store of content does not answer" in warning


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"completion_hook": "attic"}, "completion_hook: use one of upload, or an object with on_completion"),
        ({"completion_hook": "upload"}, "(FileNotFoundError: No such file or directory), which is not used then"),
        ({"completion_hook": "upload", "redact": "no:where"}, "no content is recorded until it can be used"),
    ],
)
def test_what_cannot_be_used_is_said_and_nothing_is_handed_over(
    telemetry, tmp_path, monkeypatch, caplog, settings, says
):
    monkeypatch.setenv(f"{UPLOAD}BASE_PATH", str(tmp_path if "redact" in settings else tmp_path / "gone"))
    telemetry.instrument(**settings)
    with dspy.context(lm=dummy({"answer": "blue"})):
        dspy.Predict("question -> answer")(question="sky?")
    (warning,) = warnings(caplog)
    assert says in warning
    assert not [span for span in telemetry.spans if references(span)]
    assert list(tmp_path.iterdir()) == []


def test_the_installed_hook_still_has_what_is_taken_of_it() -> None:
    from opentelemetry.util.genai._upload.completion_hook import UploadCompletionHook

    assert {"_submit_all", "_do_upload"} <= set(vars(UploadCompletionHook))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_writes_its_own(telemetry, tmp_path: Path, monkeypatch):
    monkeypatch.setenv(f"{UPLOAD}BASE_PATH", str(tmp_path))
    telemetry.instrument(completion_hook="upload")
    with dspy.context(lm=dummy({"answer": "blue"}, {"answer": "blue"})):
        dspy.Predict("question -> answer")(question="sky?")
        flush()
        child = os.fork()
        if child == 0:
            try:
                dspy.Predict("question -> answer")(question="sky?")
                flush()
            finally:
                os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 8
