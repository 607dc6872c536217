"""Evaluations: what was scored, by what, and what each example did."""

from __future__ import annotations

import math
import threading

import dspy
import numpy as np
import pytest
from dspy.utils import DummyLM

import dspy_otel
from tests.operations.common import dummy
from tests.support.waiting import wait_for

ROWS = [
    dspy.Example(question=f"question {n}", answer="right" if n else "wrong").with_inputs("question") for n in range(3)
]


def exact(example, prediction, trace=None):
    return example.answer == prediction.answer


def evaluate(program, metric=exact, rows=ROWS, **options):
    return dspy.Evaluate(devset=rows, metric=metric, display_progress=False, **{"num_threads": 1, **options})(program)


def plain(text):
    return "\n".join(line for line in text.splitlines() if "num_threads" not in line)


class Program(dspy.Module):
    def __init__(self):
        super().__init__()
        self.ask = dspy.Predict("question -> answer")

    def forward(self, question):
        if question == "question 1 fails":
            raise LookupError("canary")
        return self.ask(question=question)


@pytest.mark.parametrize("mode", ["linked", "nested"])
@pytest.mark.parametrize("threads", [1, 8])
def test_evaluate(telemetry, snapshot, mode, threads):
    telemetry.instrument(evaluation_traces=mode, capture_content="span_only")
    with dspy.context(lm=dummy(*[{"answer": "right"}] * 3)), telemetry.tracer.start_as_current_span("application"):
        assert evaluate(Program(), num_threads=threads).score == pytest.approx(66.67)
    # The same with any number of threads.
    snapshot(plain(telemetry.tree(sort=True)), f"evaluate_{mode}")
    traces = {span.context.trace_id for span in telemetry.spans}
    assert len(traces) == (1 if mode == "nested" else 4)


@pytest.mark.parametrize("threads", [1, 8])
def test_failing_example(telemetry, snapshot, threads):
    """A failure is a failure: it has no score, whatever DSPy counts for it."""
    telemetry.instrument()
    rows = [
        row.copy(question=f"{row.question} fails").with_inputs("question") if n == 1 else row
        for n, row in enumerate(ROWS)
    ]
    with dspy.context(lm=dummy(*[{"answer": "right"}] * 3)):
        evaluate(Program(), rows=rows, num_threads=threads)
    snapshot(plain(telemetry.tree(sort=True)), "failing_example")
    examples = {span.attributes["dspy.example.index"]: span for span in telemetry.named("example")}
    assert examples[1].attributes["error.type"] == "LookupError"
    assert "dspy.example.score" not in examples[1].attributes
    assert examples[0].attributes["dspy.example.score"] == 0.0
    events = {record.attributes["dspy.example.index"]: record.attributes for record in telemetry.events}
    assert "gen_ai.evaluation.score.value" not in events[1]
    assert events[1]["error.type"] == "LookupError"
    outcomes = {
        point.attributes["dspy.example.outcome"]: point.value for point in telemetry.metric("dspy.evaluation.examples")
    }
    assert outcomes == {"scored": 2, "failed": 1}
    assert "canary" not in telemetry.everything()


def test_failing_metric_is_no_failure_of_the_program(telemetry):
    def breaks(example, prediction, trace=None):
        raise ZeroDivisionError

    telemetry.instrument()
    with dspy.context(lm=dummy(*[{"answer": "right"}] * 3)):
        evaluate(Program(), breaks)
    assert telemetry.only("evaluate").attributes["dspy.evaluation.failures"] == 3
    assert {span.status.status_code.name for span in telemetry.named("invoke_workflow")} == {"UNSET"}


@pytest.mark.parametrize("content", ["no_content", "span_and_event"])
def test_metric_with_feedback(telemetry, snapshot, content):
    def judged(example, prediction, trace=None):
        return dspy.Prediction(score=0.5, feedback=f"canary: wanted {example.answer}")

    telemetry.instrument(capture_content=content)
    with dspy.context(lm=dummy(*[{"answer": "right"}] * 3)):
        evaluate(Program(), judged)
    assert [span.attributes["dspy.example.score"] for span in telemetry.named("example")] == [0.5] * 3
    events = [record for record in telemetry.events if record.event_name == "gen_ai.evaluation.result"]
    assert [record.attributes["gen_ai.evaluation.score.value"] for record in events] == [0.5] * 3
    assert ("canary" in telemetry.everything()) is (content != "no_content")
    if content != "no_content":
        assert telemetry.named("example")[1].attributes["dspy.example.feedback"] == "canary: wanted right"
        assert events[1].attributes["gen_ai.evaluation.explanation"] == "canary: wanted right"


def test_result_events_belong_to_their_example(telemetry, snapshot):
    telemetry.instrument()
    with dspy.context(lm=dummy(*[{"answer": "right"}] * 3)):
        evaluate(Program())
    examples = {span.context.span_id: span for span in telemetry.named("example")}
    for record in telemetry.events:
        example = examples.pop(record.span_id)
        assert record.trace_id == example.context.trace_id
        assert record.attributes["dspy.example.index"] == example.attributes["dspy.example.index"]
    assert examples == {}
    snapshot(telemetry.event_lines())


def test_judge_and_task_roles(telemetry, server):
    """What the program asks is the task; what the metric asks is judging, though it runs a program too."""
    telemetry.instrument()
    judge = dspy.ChainOfThought("answer -> good: bool")

    def judged(example, prediction, trace=None):
        return judge(answer=prediction.answer).good

    server.answers["good"] = "True"
    with dspy.context(lm=server.lm()):
        assert evaluate(Program(), judged, num_threads=2).score == 100.0
    by_role = {}
    for span in telemetry.named("chat"):
        by_role.setdefault(span.attributes["dspy.lm.role"], []).append(span.attributes["dspy.program.name"])
    assert by_role == {"task": ["Program"] * 3, "judge": ["ChainOfThought"] * 3}
    roles = {point.attributes["dspy.lm.role"] for point in telemetry.metric("gen_ai.client.operation.duration")}
    assert roles == {"task", "judge"}
    assert telemetry.only("evaluate").attributes["dspy.usage.lm_calls"] == 6


def test_what_a_metric_evaluates_is_judging(telemetry, server):
    telemetry.instrument()
    judge = dspy.Predict("question -> answer")

    def judged(example, prediction, trace=None):
        return evaluate(judge).score

    with dspy.context(lm=server.lm()):
        evaluate(Program(), judged, ROWS[:1])
    calls = [span.attributes for span in telemetry.named("chat")]
    assert [(at["dspy.program.name"], at["dspy.lm.role"]) for at in calls] == [
        ("Program", "task"),
        *[("Predict", "judge")] * 3,
    ]


def test_program_that_is_a_function(telemetry, server):
    telemetry.instrument()
    ask = dspy.Predict("question -> answer")
    with dspy.context(lm=server.lm()):
        evaluate(lambda question: ask(question=question), lambda *_: 1)
    assert telemetry.only("evaluate").attributes["dspy.program.name"] == "<lambda>"
    # Where such a program ends and the metric begins cannot be told.
    assert all("dspy.lm.role" not in span.attributes for span in telemetry.named("chat"))


def test_scores_that_are_numpys(telemetry):
    telemetry.instrument()
    verdicts = iter([np.bool_(True), np.float32(0.5), np.int64(1)])
    with dspy.context(lm=dummy(*[{"answer": "right"}] * 3)):
        evaluate(Program(), lambda *_: next(verdicts), rows=[*ROWS, *ROWS][:3])
    assert [span.attributes["dspy.example.score"] for span in telemetry.named("example")] == [1.0, 0.5, 1.0]
    assert "dspy.evaluation.score" in telemetry.only("evaluate").attributes


def test_examples_of_the_same_row_share_its_id(telemetry):
    telemetry.instrument()
    rows = [ROWS[0], ROWS[1], ROWS[0]]
    with dspy.context(lm=dummy(*[{"answer": "right"}] * 6)):
        evaluate(Program(), rows=rows)
        evaluate(Program(), rows=[row.copy().with_inputs("question") for row in rows])
    spans = telemetry.named("example")
    assert [span.attributes["dspy.example.index"] for span in spans] == [0, 1, 2] * 2
    ids = [span.attributes["dspy.example.id"] for span in spans]
    assert ids[0] == ids[2] == ids[3] == ids[5] != ids[1] == ids[4]
    assert len({span.attributes["dspy.evaluation.id"] for span in spans}) == 2


def test_a_program_that_changes_itself_is_the_one_that_the_evaluation_began_with(telemetry):
    class Learns(Program):
        def forward(self, question):
            self.ask.demos = [*self.ask.demos, dspy.Example(question=question, answer="right")]
            return self.ask(question=question)

    telemetry.instrument()
    program = Learns()
    before = dspy_otel.program_id(program)
    with dspy.context(lm=dummy(*[{"answer": "right"}] * 3)):
        evaluate(program)
        after = dspy_otel.program_id(program)
        program(question="after")
    ids = [
        span.attributes.get("dspy.program.id") for span in telemetry.spans if span.name.startswith("invoke_workflow")
    ]
    assert ids[:3] == [before] * 3
    assert ids[3] == after != before


def test_evaluation_inside_an_example_is_its_own(telemetry):
    """A program that evaluates another one (as an optimizer inside a program does) nests cleanly."""

    class Meta(dspy.Module):
        def forward(self, question):
            return dspy.Prediction(answer=str(evaluate(Program()).score))

    telemetry.instrument(evaluation_traces="nested")
    with dspy.context(lm=dummy(*[{"answer": "right"}] * 3)):
        evaluate(Meta(), lambda *_: 1, rows=ROWS[:1])
    inner = [span for span in telemetry.named("evaluate") if span.name == "evaluate Program"]
    assert len(inner) == 1
    assert [span.name for span in telemetry.children(inner[0])] == ["example Program"] * 3
    outer = telemetry.only("evaluate Meta")
    assert [span.name for span in telemetry.children(outer)] == ["example Meta"]


def test_stragglers_do_not_corrupt(telemetry, monkeypatch):
    """DSPy submits a slow example a second time, and may return before the slow one has ended."""
    from dspy.utils.parallelizer import ParallelExecutor

    release = threading.Event()
    calls = []

    class Slow(dspy.Module):
        def forward(self, question):
            calls.append(question)
            if question == "question 2" and calls.count(question) == 1:
                release.wait()
            return dspy.Prediction(answer="right")

    original = ParallelExecutor.__init__
    # Only the last one left is slow, however long the other two take.
    slow = {"timeout": 0.1, "straggler_limit": 1}
    monkeypatch.setattr(
        ParallelExecutor, "__init__", lambda self, *args, **kwargs: original(self, *args, **{**kwargs, **slow})
    )
    telemetry.instrument()
    with telemetry.tracer.start_as_current_span("application"):
        result = evaluate(Slow(), num_threads=4)
    assert result.score == pytest.approx(66.67)
    release.set()
    wait_for(lambda: len(telemetry.named("example")) == 4, "the span of the slow example")
    spans = telemetry.named("example")
    assert sorted(span.attributes["dspy.example.index"] for span in spans) == [0, 1, 2, 2]
    (again,) = [span for span in spans if span.attributes.get("dspy.example.resubmitted")]
    assert again.attributes["dspy.example.index"] == 2
    # DSPy took the answer that came first; the other one is no result, in no signal.
    scores = [span.attributes.get("dspy.example.score") for span in spans if span.attributes["dspy.example.index"] == 2]
    assert sorted(scores, key=str) == [1.0, None]
    assert again.attributes["dspy.example.score"] == 1.0
    assert [point.value for point in telemetry.metric("dspy.evaluation.examples")] == [3]
    assert len(telemetry.events) == 3
    assert telemetry.only("evaluate").attributes["dspy.evaluation.score"] == pytest.approx(0.6667)
    assert telemetry.only("evaluate").attributes["dspy.evaluation.failures"] == 0


def test_cancelled_evaluation_ends_its_span(telemetry):
    def breaks(example, prediction, trace=None):
        raise ZeroDivisionError

    telemetry.instrument()
    with dspy.context(lm=dummy(*[{"answer": "right"}] * 3)), pytest.raises(Exception, match="cancelled"):
        evaluate(Program(), breaks, max_errors=1)
    span = telemetry.only("evaluate")
    assert span.status.status_code.name == "ERROR"
    assert "dspy.evaluation.score" not in span.attributes


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("shape", [lambda score: score, lambda score: dspy.Prediction(score=score, feedback="f")])
def test_a_score_that_is_not_finite_is_a_failure_with_its_reason(telemetry, bad, shape):
    """A metric divides by the length of an empty answer: DSPy averages that, and names no row."""
    telemetry.instrument()
    rows = [dspy.Example(question=f"q{number}").with_inputs("question") for number in range(3)]

    def metric(example, prediction, trace=None):
        return shape(bad if example.question == "q1" else 1.0)

    with dspy.context(lm=DummyLM([{"answer": "a"}] * 3)):
        evaluate = dspy.Evaluate(devset=rows, metric=metric, num_threads=1, display_progress=False)
        evaluate(dspy.Predict("question -> answer"))
    by_index = {span.attributes["dspy.example.index"]: span for span in telemetry.named("example")}
    failed = by_index[1]
    assert failed.status.status_code.name == "ERROR"
    assert failed.status.description == f"the metric returned {bad}"
    assert failed.attributes["error.type"] == "score_not_finite"
    assert "dspy.example.score" not in failed.attributes
    assert [by_index[index].attributes["dspy.example.score"] for index in (0, 2)] == [1.0, 1.0]
    assert telemetry.only("evaluate").attributes["dspy.evaluation.failures"] == 1
    events = [event.attributes for event in telemetry.events if event.event_name == "gen_ai.evaluation.result"]
    assert [event.get("error.type") for event in events] == [None, "score_not_finite", None]
    points = telemetry.metric("dspy.evaluation.examples")
    assert {point.attributes["dspy.example.outcome"]: point.value for point in points} == {"scored": 2, "failed": 1}
