"""Adapters: which one served, what could not be parsed, which one stood in."""

from __future__ import annotations

import dspy
import pytest

from tests.support.openai_server import Reply

CANARY = "the completion nobody could parse"


@pytest.mark.parametrize("content", ["no_content", "span_only"])
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_parse_failure_and_fallback(telemetry, server, snapshot, content, asynchronous):
    telemetry.instrument(capture_content=content)
    server.replies.append(Reply(CANARY))
    predict = dspy.Predict("question -> answer")
    with dspy.context(lm=server.lm()):
        got = await predict.acall(question="x") if asynchronous else predict(question="x")
    assert got.answer == "the answer"
    snapshot(telemetry.tree(), f"adapter_fallback_{content}")
    assert (CANARY in telemetry.everything()) is (content == "span_only")


def test_failure_of_every_adapter(telemetry, server, snapshot):
    telemetry.instrument()
    server.replies += [Reply(CANARY)] * 4
    with dspy.context(lm=server.lm()), pytest.raises(Exception, match="nobody could parse"):
        dspy.Predict("question -> answer")(question="x")
    snapshot(telemetry.tree())
    assert CANARY not in telemetry.everything()


@pytest.mark.parametrize("adapter", ["ChatAdapter", "JSONAdapter", "XMLAdapter"])
def test_adapter_spans(telemetry, server, snapshot, adapter):
    """One span each for format and parse, though JSONAdapter and XMLAdapter inherit from ChatAdapter."""
    telemetry.instrument(adapter_spans=True, capture_content="span_only")
    with dspy.context(lm=server.lm(), adapter=getattr(dspy, adapter)()):
        assert dspy.Predict("question -> answer")(question="x").answer == "the answer"
    names = [span.name for span in telemetry.spans]
    assert names == ["invoke_workflow Predict", f"{adapter}.format", "chat gpt-4o-mini", f"{adapter}.parse"]
    parse = telemetry.only(f"{adapter}.parse")
    assert parse.attributes["output.value"] == '{"answer":"the answer"}'
    assert telemetry.only(f"{adapter}.format").attributes["input.value"] == '{"question":"x"}'
    assert telemetry.spans[0].attributes["dspy.adapter.name"] == adapter


def test_adapter_spans_of_a_failure(telemetry, server, snapshot):
    telemetry.instrument(adapter_spans=True)
    server.replies.append(Reply(CANARY))
    with dspy.context(lm=server.lm()):
        dspy.Predict("question -> answer")(question="x")
    snapshot(telemetry.tree(attributes=False))
    assert CANARY not in telemetry.everything()


def test_two_step_adapter(telemetry, server, snapshot):
    """Its second LM call, made while it parses, belongs to the same predictor."""
    telemetry.instrument()
    with dspy.context(lm=server.lm(), adapter=dspy.TwoStepAdapter(server.lm("openai/gpt-4o"))):
        server.replies.append(Reply("In prose: the answer."))
        assert dspy.Predict("question -> answer")(question="x").answer == "the answer"
    snapshot(telemetry.tree(attributes=False))
    assert telemetry.spans[0].attributes["dspy.adapter.name"] == "TwoStepAdapter"
    assert telemetry.spans[0].attributes["dspy.usage.lm_calls"] == 2


def test_a_fallback_of_the_second_step_is_no_other_adapter(telemetry, server):
    """TwoStepAdapter asks a ChatAdapter to parse. That one may fall back: the predictor's adapter is the same."""
    telemetry.instrument()
    with dspy.context(lm=server.lm(), adapter=dspy.TwoStepAdapter(server.lm("openai/gpt-4o"))):
        server.replies += [Reply("In prose: the answer."), Reply(CANARY)]
        assert dspy.Predict("question -> answer")(question="x").answer == "the answer"
    attributes = telemetry.spans[0].attributes
    assert attributes["dspy.adapter.name"] == "TwoStepAdapter"
    assert "dspy.adapter.fallback.from" not in attributes
    (fallback,) = [event for event in telemetry.spans[0].events if event.name == "dspy.adapter.fallback"]
    assert fallback.attributes["dspy.adapter.name"] == "JSONAdapter"
