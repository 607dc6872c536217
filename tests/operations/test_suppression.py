"""``suppress_instrumentation()``: inside it nothing of ours is recorded, in whichever thread or task work is done."""

from __future__ import annotations

import asyncio

import dspy
from opentelemetry import context
from opentelemetry.instrumentation.utils import suppress_http_instrumentation, suppress_instrumentation
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NoOpTracerProvider

import dspy_otel
from dspy_otel.core.operation import Operation
from tests.operations.common import dummy


class App(dspy.Module):
    def __init__(self):
        super().__init__()
        self.reply = dspy.ChainOfThought("question -> answer")

    def forward(self, question):
        return self.reply(question=question)

    async def aforward(self, question):
        return await self.reply.acall(question=question)


def exact(example, prediction, trace=None):
    return float(example.answer == prediction.answer)


DEVSET = [dspy.Example(question=f"q{number}", answer="the answer").with_inputs("question") for number in range(3)]


def scenario(server):
    """Every way that work takes: calls, tasks, DSPy's threads, an evaluation, an optimization with all of them."""
    app = App()
    with dspy.context(lm=server.lm()):
        server.lm()("Hi")
        app(question="?")
        asyncio.run(app.acall(question="?"))
        asyncio.run(dspy.asyncify(app)(question="?"))
        dspy.Parallel(num_threads=2, disable_progress_bar=True)([(app, {"question": str(number)}) for number in (1, 2)])
        app.batch(DEVSET, num_threads=2, disable_progress_bar=True)
        dspy.Evaluate(devset=DEVSET, metric=exact, num_threads=2, display_progress=False)(app)
        dspy.Tool(lambda text: text, name="echo")(text="a")
        return dspy.BootstrapFewShotWithRandomSearch(
            metric=exact, num_candidate_programs=1, num_threads=2, max_bootstrapped_demos=1
        ).compile(app, trainset=DEVSET)


def recorded(telemetry):
    return len(telemetry.spans), len(telemetry.events), sorted(telemetry.metrics())


def test_no_span_no_event_no_metric(telemetry, server):
    telemetry.instrument(capture_content="span_and_event", adapter_spans=True)
    with suppress_instrumentation():
        scenario(server)
    assert recorded(telemetry) == (0, 0, [])
    assert context.get_current() == {}
    scenario(server)
    spans, events, metrics = recorded(telemetry)
    assert spans > 100
    assert events > 20
    assert "dspy.optimizer.trials" in metrics


def test_a_part_of_a_program(telemetry):
    class Partly(dspy.Module):
        def __init__(self):
            super().__init__()
            self.reply = dspy.Predict("question -> answer")

        def forward(self, question):
            with suppress_instrumentation():
                hidden = dspy.Parallel(num_threads=2, disable_progress_bar=True)
                hidden([(self.reply, {"question": "hidden"})] * 2)
            return self.reply(question=question)

    telemetry.instrument()
    with dspy.context(lm=dummy(*[{"answer": "a"}] * 3)):
        Partly()(question="?")
    assert [span.name for span in telemetry.spans] == ["invoke_workflow Partly", "Predict reply", "chat dummy"]
    assert telemetry.only("invoke_workflow").attributes["dspy.usage.lm_calls"] == 1


def test_suppressed_http_is_not_us(telemetry):
    telemetry.instrument()
    with suppress_http_instrumentation(), dspy.context(lm=dummy(*[{"answer": "a"}] * 3)):
        dspy.Parallel(num_threads=2, disable_progress_bar=True)(
            [(dspy.Predict("question -> answer"), {"question": "?"})]
        )
    assert [span.name for span in telemetry.spans] == ["parallel", "invoke_workflow Predict", "chat dummy"]


def test_with_the_sdk_disabled_only_evaluations_and_optimizations_are_followed(server, monkeypatch):
    """An optimization shows its progress all the same; what follows a call elsewhere would be for nothing."""
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    opened = []
    open_span = Operation._open

    def record(self, *args):
        opened.append(self.kind)
        return open_span(self, *args)

    monkeypatch.setattr(Operation, "_open", record)
    providers = {"tracer_provider": TracerProvider(), "meter_provider": MeterProvider()}
    dspy_otel.instrument(**providers, capture_content="span_only")
    lm = server.lm()
    lm("the first span shows that nothing is kept")
    opened.clear()
    with dspy.context(lm=lm):
        lm("Hi")
        App()(question="?")
        asyncio.run(App().acall(question="?"))
        dspy.Tool(lambda text: text, name="echo")(text="a")
        assert opened == []
        dspy.Evaluate(devset=DEVSET, metric=exact, num_threads=2, display_progress=False)(App())
    assert opened[0] == "evaluate"
    assert opened.count("lm") == len(DEVSET)
    opened.clear()
    scenario(server)
    assert "compile" in opened


def test_metrics_alone_are_recorded(telemetry, server):
    telemetry.instrument(tracer_provider=NoOpTracerProvider())
    for _ in range(2):
        server.lm()("Hi")
    assert telemetry.metric("gen_ai.client.operation.duration")[0].count == 2


def test_events_alone_are_emitted_by_whoever_has_a_logger_only(telemetry, server):
    providers = {"tracer_provider": NoOpTracerProvider(), "meter_provider": NoOpMeterProvider()}
    telemetry.instrument(**providers, capture_content="event_only")
    with dspy.context(lm=server.lm()):
        dspy.Evaluate(devset=DEVSET, metric=exact, num_threads=1, display_progress=False)(App())
    assert len(telemetry.events) >= len(DEVSET)
