"""Evaluations as experiments of Langfuse, by a real Collector. Langfuse itself is not run: what it is sent is compared
with https://langfuse.com/integrations/native/opentelemetry/experiments and its attribute mapping."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import dspy
import pytest
from dspy.utils import DummyLM
from opentelemetry import baggage, context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from tests.collector.stack import Collector, running, wait_for
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.support.spans import Recorder

pytestmark = pytest.mark.integration

EXPERIMENT = {"id", "name", "dataset.id"}
"""What every span of an item's trace has."""
ITEM = {"item.id", "item.root_observation_id", "item.expected_output"}
"""What its root has besides."""
OPTIONAL = re.compile(r"(experiment\.(item\.)?metadata\.\w+|observation\.prompt\.(name|version)|version|environment)")


def experiment(span: ReceivedSpan) -> dict[str, object]:
    prefix = "langfuse.experiment."
    return {
        name.removeprefix(prefix): value
        for name, value in span.attributes.items()
        if name.startswith(prefix) and ".metadata." not in name
    }


def test_evaluations_are_experiments(telemetry: Recorder, tmp_path: Path) -> None:
    rows = [dspy.Example(question=f"question {n}", answer="Paris").with_inputs("question") for n in range(4)]

    def exact(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
        return bool(example.answer == prediction.answer)

    with OtlpReceiver() as langfuse:
        settings = {"LANGFUSE_ENDPOINT": langfuse.http, "LANGFUSE_AUTH": "cGs6c2s="}
        with running(Collector(tmp_path, ("base", "keep-all", "content", "langfuse"), settings)) as collector:
            telemetry.tracer_provider.add_span_processor(
                BatchSpanProcessor(OTLPSpanExporter(f"{collector.http}/v1/traces"))
            )
            telemetry.instrument(capture_content="span_only")
            dspy.configure(lm=DummyLM([{"answer": "Paris"}, {"answer": "Rome"}] * 100))
            program = dspy.Predict("question -> answer")
            dspy.Evaluate(devset=rows, metric=exact, num_threads=1, display_progress=False)(program)
            dspy.BootstrapFewShotWithRandomSearch(metric=exact, num_candidate_programs=1, num_threads=1).compile(
                program, trainset=rows[:2], valset=rows[2:]
            )
            here = baggage.set_baggage("gen_ai.prompt.version", "7", baggage.set_baggage("gen_ai.prompt.name", "ask"))
            token = context.attach(here)
            program(question="in production")
            context.detach(token)
            telemetry.tracer_provider.force_flush()
            sent = telemetry.spans
            wait_for(lambda: len(langfuse.spans()) >= len(sent), "all spans", lambda: len(langfuse.spans()))

    headers = langfuse.received[0].headers
    assert langfuse.received[0].path == "/api/public/otel/v1/traces"
    assert headers["authorization"] == "Basic cGs6c2s="
    assert headers["x-langfuse-ingestion-version"] == "4"

    traces = defaultdict(list)
    for span in langfuse.spans():
        traces[span.trace].append(span)
    experiments = defaultdict(list)
    for spans in traces.values():
        (root,) = [span for span in spans if not span.parent]
        if not root.name.startswith("example "):
            assert [experiment(span) for span in spans if experiment(span)] == []
            continue
        about = experiment(root)
        assert about.keys() == EXPERIMENT | ITEM
        assert about["item.root_observation_id"] == root.id
        assert about["item.expected_output"] == '{"answer":"Paris"}'
        assert root.attributes["langfuse.observation.input"] == root.attributes["input.value"]
        assert root.attributes["langfuse.observation.output"] in ('{"answer":"Paris"}', '{"answer":"Rome"}')
        assert root.attributes["langfuse.experiment.item.metadata.score"] in (0.0, 1.0)
        for span in spans:
            assert {name: about[name] for name in EXPERIMENT}.items() <= experiment(span).items()
            assert span.attributes["langfuse.environment"] == "experiment"
        experiments[about["id"], about["name"]].append(about["item.id"])
    # One of the user's, and one for each trial.
    trials = [span for span in sent if span.name == "trial"]
    assert len(trials) == 4
    assert len({name for _, name in experiments}) == len({one for one, _ in experiments}) == len(experiments) == 5
    assert sorted(len(set(items)) for items in experiments.values()) == [2, 2, 2, 2, 4]

    (production,) = [span for span in langfuse.spans("chat ") if "gen_ai.prompt.name" in span.attributes]
    assert production.attributes["langfuse.observation.prompt.name"] == "ask"
    assert production.attributes["langfuse.observation.prompt.version"] == 7
    assert "langfuse.environment" not in production.attributes
    assert production.attributes["langfuse.version"] == production.attributes["dspy.program.id"]

    known = {f"langfuse.experiment.{name}" for name in EXPERIMENT | ITEM}
    known |= {"langfuse.observation.input", "langfuse.observation.output"}
    names = {name for span in langfuse.spans() for name in span.attributes if name.startswith("langfuse.")}
    assert {name for name in names - known if not OPTIONAL.fullmatch(name.removeprefix("langfuse."))} == set()
