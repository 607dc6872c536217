"""Content goes nowhere unless asked for, and then only where it may; secrets never do."""

from __future__ import annotations

import functools
import json

import dspy
import pytest

from tests.operations.common import NATIVE, VERSION
from tests.operations.test_retrieval import embed
from tests.support.openai_server import Reply

CANARY = "kanarienvogel"
KEY = "sk-proj-abcdefghijklmnopqrstuvwxyz012345"


def look(place):
    if place == "nowhere":
        raise LookupError(f"{CANARY} in an exception")
    return f"{CANARY} result"


@functools.cache
def search():
    """No attribute of the program: its worker thread cannot be copied, as optimizers copy programs."""
    return dspy.Embeddings([f"{CANARY} passage"] * 3, dspy.Embedder(embed, caching=False), k=1)


class Asker(dspy.Module):
    """Content in every place that a program has."""

    def __init__(self):
        super().__init__()
        self.ask = dspy.Predict(dspy.Signature("question -> answer", f"{CANARY} instructions"))
        self.ask.demos = [dspy.Example(question=f"{CANARY} demo", answer=f"{CANARY} demo")]
        self.tool = dspy.Tool(look, name="look", desc=f"{CANARY} description")

    def forward(self, question):
        self.tool(place=f"{CANARY} argument")
        search()(f"{CANARY} query")
        dspy.Retrieve(k=1)(f"{CANARY} query")
        try:
            self.tool(place="nowhere")
        except LookupError as error:
            raised = error
        if question.startswith("raise"):
            raise ValueError(f"{CANARY} of {question}") from raised
        return self.ask(question=question)


def run_everything(server):
    """One of each operation, with the canary in all it is given, gives and raises."""
    rows = [
        dspy.Example(question=f"{word} {CANARY}", answer=f"{CANARY} expected").with_inputs("question")
        for word in ("say", "raise")
    ]
    server.answers["answer"] = f"{CANARY} answer"

    def metric(example, prediction, trace=None):
        return dspy.Prediction(score=1.0, feedback=f"{CANARY} feedback")

    with dspy.context(lm=server.lm(num_retries=0), rm=lambda query, k: [dspy.Example(long_text=f"{CANARY} passage")]):
        program = Asker()
        program(question=CANARY)
        program.batch(rows[:1], disable_progress_bar=True)
        dspy.Evaluate(devset=rows, metric=metric, num_threads=2, display_progress=False)(program)
        server.replies.append(Reply(f"{CANARY} that no adapter can parse"))
        program.ask(question=CANARY)
        # Before DSPy 3.3, its adapters ask again in other formats whatever went wrong.
        server.replies += [Reply(f"{CANARY} of the provider", status=400)] * (1 if VERSION >= (3, 3) else 3)
        with pytest.raises(Exception, match=CANARY):
            program.ask(question=CANARY)
        dspy.LabeledFewShot(k=1).compile(program, trainset=rows)
    if NATIVE:
        from dspy.primitives.local_interpreter import LocalInterpreter

        interpreter = LocalInterpreter()
        interpreter.execute(f"print('{CANARY} code')")
        with pytest.raises(Exception, match=CANARY):
            interpreter.execute(f"raise ValueError('{CANARY} code')")
        interpreter.shutdown()


@pytest.mark.parametrize("adapter_spans", [False, True])
def test_off_means_nowhere(telemetry, server, adapter_spans, caplog):
    telemetry.instrument(adapter_spans=adapter_spans)
    run_everything(server)
    assert len(telemetry.spans) >= 40
    assert CANARY not in telemetry.everything()
    assert CANARY not in "\n".join(record.message for record in caplog.records if record.name.startswith("dspy_otel"))


def test_on_spans(telemetry, server):
    telemetry.instrument(capture_content="span_only", adapter_spans=True)
    run_everything(server)
    keys = {key for span in telemetry.spans for key, value in span.attributes.items() if CANARY in str(value)}
    keys |= {
        key
        for span in telemetry.spans
        for event in span.events
        for key, value in event.attributes.items()
        if CANARY in str(value)
    }
    expected = {
        "gen_ai.input.messages",
        "gen_ai.output.messages",
        "gen_ai.tool.call.arguments",
        "gen_ai.tool.call.result",
        "gen_ai.tool.description",
        "gen_ai.retrieval.query.text",
        "gen_ai.retrieval.documents",
        "dspy.signature.instructions",
        "dspy.example.expected",
        "dspy.example.feedback",
        "dspy.adapter.completion",
        "input.value",
        "output.value",
        "exception.message",
        "exception.stacktrace",
    } | ({"dspy.interpreter.code", "dspy.interpreter.output"} if NATIVE else set())
    assert keys >= expected
    assert CANARY not in "".join(f"{record.body}{dict(record.attributes)}" for record in telemetry.events)


def test_on_events_only(telemetry, server):
    telemetry.instrument(capture_content="event_only", adapter_spans=True)
    run_everything(server)
    assert CANARY not in "".join(span.to_json() for span in telemetry.spans)
    details = [
        record for record in telemetry.events if record.event_name == "gen_ai.client.inference.operation.details"
    ]
    chats = {span.context.span_id: span for span in telemetry.named("chat")}
    assert {record.span_id for record in details} == set(chats)
    assert CANARY in details[0].attributes["gen_ai.input.messages"]
    assert CANARY in details[0].attributes["gen_ai.output.messages"]
    assert details[0].attributes["gen_ai.usage.input_tokens"] == 100
    results = [record for record in telemetry.events if record.event_name == "gen_ai.evaluation.result"]
    assert CANARY in "".join(str(record.attributes.get("gen_ai.evaluation.explanation")) for record in results)


def test_names_hold_no_content(telemetry, server):
    telemetry.instrument(capture_content="span_and_event", adapter_spans=True)
    run_everything(server)
    assert not [span.name for span in telemetry.spans if CANARY in span.name]


def test_limits_keep_json_valid_and_say_what_was_cut(telemetry, server):
    telemetry.instrument(capture_content="span_and_event", content_limit=400)
    server.answers["answer"] = "long answer " * 200
    with dspy.context(lm=server.lm()):
        dspy.Predict("question -> answer")(question="long question ☃ " * 500)
    checked = 0
    everywhere = [*(span.attributes for span in telemetry.spans), *(record.attributes for record in telemetry.events)]
    for attributes in everywhere:
        for key in ("gen_ai.input.messages", "gen_ai.output.messages", "input.value", "output.value"):
            if key in attributes:
                assert len(attributes[key].encode()) <= 400
                json.loads(attributes[key])
                assert "cut" in attributes[key], key
                checked += 1
    assert checked == 6


def test_redaction(telemetry, server):
    telemetry.instrument(capture_content="span_and_event", redact=lambda text: text.replace(CANARY, "[bird]"))
    run_everything(server)
    exported = telemetry.everything()
    assert CANARY not in exported
    assert "[bird] answer" in exported
    assert "[bird] in an exception" in exported


@pytest.mark.injects_faults
def test_redaction_that_fails_drops_the_content(telemetry, server, caplog):
    def redact(text):
        raise RuntimeError(CANARY)

    telemetry.instrument(capture_content="span_and_event", redact=redact)
    run_everything(server)
    assert CANARY not in telemetry.everything()
    assert CANARY not in caplog.text.replace("Error for Example", "").split("dspy-otel:")[-1]
    assert telemetry.named("chat")[0].attributes["gen_ai.usage.input_tokens"] == 100


def test_keys_never_leave(telemetry, server, monkeypatch):
    telemetry.instrument(capture_content="span_and_event")
    # No pattern knows these two: they are known by where they stand.
    constructor, call_time, header = "plainconstructorkey01", "plaincalltimekey02", "plainheadertoken03"
    lm = server.lm(api_key=constructor, extra_headers={"Authorization": f"Bearer {header}"})
    lm(f"my key is {KEY} and also {constructor} and Authorization: Bearer {header}")
    lm(f"mine is {call_time}", api_key=call_time)
    server.replies.append(Reply(f"bad key {constructor} or {KEY}", status=401))
    with pytest.raises(Exception, match=constructor):
        server.lm(api_key=constructor, num_retries=0)("Hi")
    dspy.Tool(lambda api_key, place: place, name="look", args={"api_key": {}, "place": {}})(
        api_key="toolsecret04", place="Bern"
    )
    exported = telemetry.everything()
    for secret in (KEY, constructor, call_time, header, "toolsecret04"):
        assert secret not in exported
    assert "[masked]" in exported


class Quotes(dspy.BaseLM):
    """Fails, and quotes all that it was given."""

    def forward(self, prompt=None, messages=None, **kwargs):
        raise RuntimeError(" | ".join(map(str, (self.kwargs | kwargs).values())))


def test_secret_settings_of_lms_and_embedders_never_leave(telemetry):
    telemetry.instrument(capture_content="span_and_event")
    settings = {"aws_secret_access_key": "wired/secret/one", "extra_headers": {"X-Team-Key": "wired-secret-2-of-6"}}
    call_time = {"azure_ad_token": "wired.secret.three", "client_secret": "wired~secret~four"}
    with pytest.raises(RuntimeError, match="wired~secret~four"):
        Quotes("p/m", **settings)("Hi", **call_time)

    def embed(texts, **given):
        raise RuntimeError(str(given))

    with pytest.raises(RuntimeError, match="five"):
        dspy.Embedder(embed, caching=False, aws_session_token="wired/secret/five")(["x"], app_secret="wired/secret/six")
    exported = telemetry.everything()
    assert exported.count("[masked]") >= 6
    assert "wired" not in exported


@pytest.mark.parametrize("openinference", [True, False])
def test_openinference_switch(telemetry, server, openinference):
    telemetry.instrument(capture_content="span_only", openinference=openinference, adapter_spans=True)
    run_everything(server)
    keys = {key for span in telemetry.spans for key in span.attributes}
    foreign = {key for key in keys if key.startswith(("openinference.", "input.", "output."))}
    assert bool(foreign) is openinference
    assert ("dspy.module.inputs" in keys) is not openinference
