"""Events of spans as log records, by option: exceptions by OpenTelemetry's variable, the others by ours."""

from __future__ import annotations

import asyncio

import dspy
import pytest
from dspy.utils import DummyLM
from opentelemetry._logs import NoOpLoggerProvider, SeverityNumber

import dspy_otel
from dspy_otel.record.history import results as records_of
from dspy_otel.record.model import Evaluation
from tests.operations.common import dummy
from tests.optimizers import common
from tests.support.openai_server import Reply
from tests.support.registry import registry

SIGNALS = ["default", "logs", "logs/dup"]
CANARY = "kanarienvogel"


class Failing(dspy.Module):
    def forward(self, question):
        raise LookupError(f"{CANARY} {question}")


def on_spans(telemetry) -> list[str]:
    return sorted(event.name for span in telemetry.spans for event in span.events)


def in_log(telemetry) -> list[str]:
    return sorted(record.event_name for record in telemetry.events)


def spans_of(telemetry) -> dict[str, str]:
    """The name of the span that each log record belongs to, by its own."""
    names = {(span.context.trace_id, span.context.span_id): span.name for span in telemetry.spans}
    return {record.event_name: names[record.trace_id, record.span_id] for record in telemetry.events}


@pytest.mark.parametrize("signal", SIGNALS)
def test_exceptions_go_where_the_variable_says(telemetry, server, monkeypatch, signal):
    if signal != "default":
        monkeypatch.setenv("OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN", signal)
    telemetry.instrument()
    server.replies.append(Reply("no", status=400))
    with pytest.raises(Exception, match="no"):
        server.lm(num_retries=0)("Hi")
    with pytest.raises(LookupError):
        Failing()(question="x")
    assert on_spans(telemetry) == ([] if signal == "logs" else ["exception"] * 2)
    if signal == "default":
        assert telemetry.events == []
        return
    assert spans_of(telemetry) == {
        "gen_ai.client.operation.exception": telemetry.only("chat").name,
        "dspy.operation.exception": "invoke_workflow Failing",
    }
    for record in telemetry.events:
        assert record.severity_number == SeverityNumber.WARN
        assert list(record.attributes) == ["exception.type"]
        assert list(registry().problems(registry().events[record.event_name], record.attributes)) == []
    assert CANARY not in telemetry.everything()
    # The status of the span, its type of error and the metrics say it in any case.
    assert {span.status.status_code.name for span in telemetry.spans} == {"ERROR"}
    assert all("error.type" in span.attributes for span in telemetry.spans)


@pytest.mark.parametrize("capture", ["no_content", "span_only", "event_only", "span_and_event"])
def test_content_of_events_is_where_content_may_be(telemetry, server, capture):
    telemetry.instrument(exception_signal_opt_in="logs/dup", event_signal_opt_in="logs/dup", capture_content=capture)
    with pytest.raises(LookupError):
        Failing()(question="x")
    server.replies.append(Reply(f"{CANARY} that no adapter can parse"))
    with dspy.context(lm=server.lm()):
        dspy.Predict("question -> answer")(question="x")
    keys = {"exception.message", "exception.stacktrace", "dspy.adapter.completion"}
    events = [event for span in telemetry.spans for event in span.events]
    records = [record for record in telemetry.events if record.event_name.startswith("dspy.")]
    assert len(events) == len(records) == 3
    for found, place in ((events, "span"), (records, "event")):
        shown = {key for each in found for key, value in each.attributes.items() if CANARY in str(value)}
        assert shown == (keys if place in capture else set())


@pytest.mark.parametrize("signal", SIGNALS)
def test_other_events_go_where_our_variable_says(telemetry, server, monkeypatch, signal):
    if signal != "default":
        monkeypatch.setenv("OTEL_DSPY_EVENT_SIGNAL_OPT_IN", signal)
    telemetry.instrument()
    server.replies.append(Reply("that no adapter can parse"))
    with dspy.context(lm=server.lm()), dspy_otel.budget(lm_calls=4):
        dspy.Predict("question -> answer")(question="x")
    names = ["dspy.adapter.fallback", "dspy.adapter.parse_error", "dspy.budget.alert"]
    assert on_spans(telemetry) == ([] if signal == "logs" else names)
    assert in_log(telemetry) == ([] if signal == "default" else names)
    assert set(spans_of(telemetry).values()) <= {"invoke_workflow Predict"}
    severities = {record.event_name: record.severity_number for record in telemetry.events}
    if severities:
        assert severities["dspy.adapter.fallback"] == SeverityNumber.INFO
        assert severities["dspy.adapter.parse_error"] == severities["dspy.budget.alert"] == SeverityNumber.WARN
    attributes = telemetry.only("invoke_workflow").attributes
    assert attributes.get("dspy.adapter.parse_errors") == (1 if signal == "logs" else None)


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_reader_counts_the_same_wherever_events_are(telemetry, signal):
    telemetry.instrument(event_signal_opt_in=signal)
    rows = [dspy.Example(question=str(number), answer="a").with_inputs("question") for number in range(3)]
    with dspy.context(lm=DummyLM([{"nothing": "here"}] * 20)):
        evaluate = dspy.Evaluate(devset=rows, metric=lambda *_: 1.0, num_threads=1, display_progress=False)
        evaluate(dspy.Predict("question -> answer"))
    _, evaluations = records_of(telemetry.spans)
    (evaluation,) = evaluations
    assert isinstance(evaluation, Evaluation)
    said = max(names.count("dspy.adapter.parse_error") for names in (on_spans(telemetry), in_log(telemetry)))
    assert evaluation.parse_failures == said >= 3


def test_where_nobody_keeps_log_records_events_stay_on_spans(telemetry):
    telemetry.instrument(exception_signal_opt_in="logs", logger_provider=NoOpLoggerProvider())
    with pytest.raises(LookupError):
        Failing()(question="x")
    assert on_spans(telemetry) == ["exception"]


def test_a_call_that_is_cancelled_is_no_warning(telemetry):
    class Waiting(dspy.Module):
        async def aforward(self, question):
            await asyncio.Event().wait()

    async def cancelled():
        task = asyncio.ensure_future(Waiting().acall(question="x"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    telemetry.instrument(exception_signal_opt_in="logs")
    asyncio.run(cancelled())
    (record,) = telemetry.events
    assert (record.severity_number, record.attributes["exception.type"]) == (
        SeverityNumber.DEBUG,
        "asyncio.exceptions.CancelledError",
    )


def test_log_records_of_a_deferred_trace_belong_to_the_spans_that_are_kept(telemetry):
    class Sometimes(dspy.Module):
        def __init__(self):
            super().__init__()
            self.answer = dspy.Predict("question -> answer")

        def forward(self, question):
            if question == "1":
                raise LookupError(question)
            return self.answer(question=question)

    telemetry.instrument(exception_signal_opt_in="logs", optimization_traces="failed_and_best")
    rows = [dspy.Example(question=str(number), answer="a").with_inputs("question") for number in range(3)]
    optimizer = dspy.BootstrapFewShotWithRandomSearch(metric=lambda *_: 1.0, num_candidate_programs=1, max_errors=50)
    with dspy.context(lm=dummy(*[{"answer": "a"}] * 100)):
        common.quietly(lambda _: optimizer.compile(Sometimes(), trainset=rows), None)
    records = [record for record in telemetry.events if record.event_name == "dspy.operation.exception"]
    assert len(records) > 2
    spans = {(span.context.trace_id, span.context.span_id): span for span in telemetry.spans}
    for record in records:
        span = spans[record.trace_id, record.span_id]
        assert span.name == "invoke_workflow Sometimes"
        assert span.start_time <= record.timestamp <= span.end_time
