"""Metrics: names, units, attributes, buckets, and exemplars that lead back to the span."""

from __future__ import annotations

import random
import secrets

import dspy
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from tests.operations.common import dummy
from tests.operations.test_evaluation import ROWS, Program, evaluate
from tests.support.openai_server import Reply
from tests.support.registry import broken_rules
from tests.support.spans import Recorder

FORBIDDEN = ("id", "index", "trial.number", "candidate")


@pytest.fixture
def measured(telemetry, server):
    telemetry.instrument()
    server.replies.append(Reply("no", status=400))
    lm = server.lm(cache=True, num_retries=0)
    with pytest.raises(Exception, match="no"):
        lm("fails")
    with dspy.context(lm=lm):
        evaluate(Program(), rows=[*ROWS, ROWS[0]])
    dspy.Tool(lambda place: place, name="look")(place="Bern")
    return telemetry


def test_instruments(measured, snapshot):
    lines = []
    for name, metric in sorted(measured.metrics().items()):
        lines.append(f"{name} [{type(metric.data).__name__}] {{{metric.unit}}} {metric.description}")
        for point in metric.data.data_points:
            told = {key: "<port>" if key == "server.port" else value for key, value in sorted(point.attributes.items())}
            count = getattr(point, "count", None)
            lines.append(
                f"  {told} {'count ' + str(count) if count is not None else 'value ' + str(round(point.value, 9))}"
            )
    snapshot("\n".join(lines))


def test_no_high_cardinality(measured):
    for name, metric in measured.metrics().items():
        for point in metric.data.data_points:
            assert not [key for key in point.attributes if key.rpartition(".")[2] in FORBIDDEN], name


def test_buckets(measured):
    bounds = {
        name: points[0].explicit_bounds
        for name in measured.metrics()
        if hasattr((points := measured.metric(name))[0], "explicit_bounds")
    }
    seconds = tuple(pytest.approx(0.01 * 2**k) for k in range(14))
    for name in ("gen_ai.client.operation.duration", "gen_ai.execute_tool.duration", "dspy.module.duration"):
        assert bounds[name] == seconds
    assert bounds["gen_ai.client.token.usage"] == tuple(4.0**k for k in range(14))
    assert bounds["dspy.evaluation.score"] == tuple(n / 10 for n in range(11))


@pytest.mark.parametrize(
    ("metric", "span"),
    [
        ("gen_ai.client.operation.duration", "chat"),
        ("gen_ai.client.token.usage", "chat"),
        ("gen_ai.execute_tool.duration", "execute_tool"),
        ("dspy.module.duration", None),
        ("dspy.evaluation.score", "evaluate"),
    ],
)
def test_exemplars_carry_the_span(measured, metric, span):
    by_id = {found.context.span_id: found for found in measured.spans}
    exemplars = [exemplar for point in measured.metric(metric) for exemplar in point.exemplars]
    assert exemplars
    for exemplar in exemplars:
        found = by_id[exemplar.span_id]
        assert found.context.trace_id == exemplar.trace_id
        assert span is None or found.name.startswith(span)


OLD = {
    "gen_ai.client.operation.duration",
    "gen_ai.client.operation.time_to_first_chunk",
    "gen_ai.client.token.usage",
}
NEW = {
    "gen_ai.client.inference.duration",
    "gen_ai.client.inference.time_to_first_chunk",
    "gen_ai.client.inference.operation.input_tokens",
    "gen_ai.client.inference.operation.output_tokens",
    "gen_ai.client.inference.usage.input_tokens",
    "gen_ai.client.inference.usage.output_tokens",
}


def amount(telemetry, name, **labels):
    """How much was recorded of a series, with every further attribute."""
    return sum(
        point.sum if hasattr(point, "sum") else point.value
        for point in telemetry.metric(name)
        if labels.items() <= {key.rpartition(".")[2]: value for key, value in point.attributes.items()}.items()
    )


@pytest.mark.parametrize("light", [True, False])
@pytest.mark.parametrize(
    ("opt_in", "expected"),
    [
        ("", OLD),
        ("http/dup", OLD),
        ("gen_ai_latest_experimental", OLD),
        ("gen_ai", NEW),
        ("database,gen_ai/dup", OLD | NEW),
    ],
)
async def test_renamed_metrics(telemetry, server, monkeypatch, opt_in, expected, light):
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", opt_in)
    telemetry.instrument(light_metrics=light)
    program = dspy.Predict("question -> answer")
    with dspy.context(lm=server.lm(cache=False), track_usage=True):
        for _ in range(3):
            program(question="x")
        [_ async for _ in dspy.streamify(program)(question="x")]
    found = telemetry.metrics()
    assert {name for name in found if name.startswith("gen_ai.client.")} == expected
    spans = telemetry.named("chat ")
    for direction in ("input", "output"):
        tokens = sum(span.attributes.get(f"gen_ai.usage.{direction}_tokens", 0) for span in spans)
        assert tokens
        if expected >= OLD:
            assert amount(telemetry, "gen_ai.client.token.usage", type=direction) == tokens
        if expected >= NEW:
            for name in ("operation", "usage"):
                assert amount(telemetry, f"gen_ai.client.inference.{name}.{direction}_tokens") == tokens
    assert not broken_rules(telemetry)


WORKFLOW_NAMES = {"gen_ai.workflow.name", "gen_ai.agent.name"}


@pytest.mark.parametrize(
    ("opt_in", "named"),
    [
        ("default", {"gen_ai.workflow.name"}),
        ("gen_ai", {"gen_ai.agent.name"}),
        ("gen_ai/dup", WORKFLOW_NAMES),
    ],
)
def test_a_workflow_is_an_agent_by_option(telemetry, opt_in, named):
    telemetry.instrument(semconv_opt_in=opt_in)
    program = Program()
    with dspy.context(lm=dummy({"answer": "Paris"})):
        program(question="Where?")
        with pytest.raises(TypeError):
            program(place="Bern")
    for span in telemetry.named("invoke_workflow Program"):
        names = {name: value for name, value in span.attributes.items() if name in WORKFLOW_NAMES}
        assert names == dict.fromkeys(named, "Program")
    metric = telemetry.metrics().get("gen_ai.invoke_agent.duration")
    assert (metric is None) == (opt_in == "default")
    if metric is not None:
        good, failed = (dict(point.attributes) for point in metric.data.data_points)
        operation = {"gen_ai.operation.name": "invoke_workflow", "dspy.program.name": "Program"}
        assert good == {**operation, "gen_ai.agent.name": "Program"}
        assert failed == {**good, "error.type": "TypeError"}
    assert not broken_rules(telemetry)


def test_embeddings_keep_the_name_of_their_duration(telemetry):
    telemetry.instrument(semconv_opt_in="gen_ai")
    dspy.Embedder(lambda texts: [[1.0, 2.0] for _ in texts])(["one"])
    assert len(telemetry.metric("gen_ai.client.operation.duration")) == 1


class OwnNumbers(IdGenerator):
    """Ids that are not drawn from the `random` module, as the SDK's are."""

    def generate_span_id(self):
        return secrets.randbits(64) | 1

    def generate_trace_id(self):
        return secrets.randbits(128) | 1


def test_metrics_draw_no_random_numbers(telemetry, server):
    """The SDK chooses a counter's exemplar by chance, with the program's own generator: there are none."""
    provider = TracerProvider(id_generator=OwnNumbers(), shutdown_on_exit=False)
    telemetry.instrument(tracer_provider=provider)
    program = dspy.Predict("question -> answer")
    with dspy.context(lm=server.lm(cache=True)), provider.get_tracer("application").start_as_current_span("outer"):
        program(question="x")
        state = random.getstate()
        for _ in range(6):
            program(question="x")
        drawn = random.getstate() != state
    assert telemetry.metric("dspy.lm.cache.hits")[0].value == 6
    assert not telemetry.metric("dspy.lm.cache.hits")[0].exemplars
    assert not drawn


def test_cached_answers_are_counted_and_not_timed(measured):
    (hits,) = measured.metric("dspy.lm.cache.hits")
    assert hits.value == 1
    calls = sum(point.count for point in measured.metric("gen_ai.client.operation.duration"))
    assert calls == 4  # one failed, three answered; one more came from the cache
    tokens = {
        point.attributes["gen_ai.token.type"]: point.sum for point in measured.metric("gen_ai.client.token.usage")
    }
    assert tokens == {"input": 300, "output": 60}
    assert sum(point.value for point in measured.metric("dspy.lm.cost")) == pytest.approx(3 * 2.4e-05)


def test_switched_off(telemetry, server):
    telemetry.instrument(metrics=False)
    server.lm()("Hi")
    assert telemetry.metrics() == {}
    assert len(telemetry.spans) == 1


def test_sampled_out_calls_are_still_counted(server):
    recorder = Recorder()
    recorder.instrument(tracer_provider=TracerProvider(sampler=ALWAYS_OFF), capture_content="span_and_event")
    try:
        server.lm()("Hi")
        assert recorder.metric("gen_ai.client.operation.duration")[0].count == 1
        assert recorder.metric("gen_ai.client.token.usage")
        assert recorder.events == []
    finally:
        recorder.shutdown()
