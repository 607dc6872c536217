"""Programs and the modules in them."""

from __future__ import annotations

import copy

import cloudpickle
import dspy
import pytest

from tests.operations.common import RESEARCH_ANSWERS, Research, dummy


def test_predict(telemetry, snapshot):
    telemetry.instrument(capture_content="span_only")
    predict = dspy.Predict("question -> answer")
    predict.demos = [dspy.Example(question="1?", answer="one")]
    with dspy.context(lm=dummy({"answer": "two"})):
        assert predict(question="2?").answer == "two"
    snapshot(telemetry.tree())


def test_nested_program(telemetry, snapshot):
    telemetry.instrument()
    with dspy.context(lm=dummy(*RESEARCH_ANSWERS)):
        assert Research()(question="why?").good is True
    snapshot(telemetry.tree())


async def test_nested_program_async(telemetry, snapshot):
    telemetry.instrument()
    with dspy.context(lm=dummy(*RESEARCH_ANSWERS)):
        assert (await Research().acall(question="why?")).good is True
    snapshot(telemetry.tree(), "nested_program")  # The very same spans.


def test_paths_are_those_of_named_predictors(telemetry):
    telemetry.instrument()
    program = Research()
    with dspy.context(lm=dummy(*RESEARCH_ANSWERS)):
        program(question="why?")
    paths = {span.attributes.get("dspy.module.path") for span in telemetry.spans} - {None}
    assert {name for name, _ in program.named_predictors()} - paths == {"writers['long']"}


def test_application_span_is_the_parent(telemetry, snapshot):
    telemetry.instrument()
    with telemetry.tracer.start_as_current_span("GET /ask"), dspy.context(lm=dummy({"answer": "two"})):
        dspy.Predict("question -> answer")(question="2?")
    snapshot(telemetry.tree(attributes=False))


class Broken(dspy.Module):
    def __init__(self):
        super().__init__()
        self.ask = dspy.Predict("question -> answer")

    def forward(self, question):
        self.ask(question=question)
        raise ValueError("the user's own mistake")


class Outer(dspy.Module):
    def __init__(self):
        super().__init__()
        self.inner = Broken()

    def forward(self, question):
        return self.inner(question=question)


def test_error_is_recorded_once_and_raised_as_it_was(telemetry, snapshot):
    telemetry.instrument(capture_content="span_only")
    with dspy.context(lm=dummy({"answer": "two"})), pytest.raises(ValueError, match="the user's own mistake"):
        Outer()(question="2?")
    snapshot(telemetry.tree())


class Overriding(dspy.Predict):
    """Made after `instrument()`, with an entry point of its own that calls DSPy's."""

    def __call__(self, **kwargs):
        return super().__call__(**kwargs)

    async def acall(self, **kwargs):
        return await super().acall(**kwargs)


async def test_subclass_with_an_entry_point_of_its_own_is_one_span(telemetry):
    telemetry.instrument()

    class Later(Overriding):
        def __call__(self, **kwargs):
            return super().__call__(**kwargs)

    with dspy.context(lm=dummy(*[{"answer": "two"}] * 3)):
        Overriding("question -> answer")(question="2?")
        Later("question -> answer")(question="2?")
        await Overriding("question -> answer").acall(question="2?")
    assert [span.name for span in telemetry.spans if span.parent is None] == [
        "invoke_workflow Overriding",
        "invoke_workflow Later",
        "invoke_workflow Overriding",
    ]
    assert len(telemetry.spans) == 6


def test_module_made_inside_forward_names_its_own_modules(telemetry):
    class Maker(dspy.Module):
        def forward(self, question):
            return dspy.ChainOfThought("question -> answer")(question=question)

    telemetry.instrument()
    with dspy.context(lm=dummy({"reasoning": "r", "answer": "two"})):
        Maker()(question="2?")
    assert [span.name for span in telemetry.spans] == [
        "invoke_workflow Maker",
        "ChainOfThought",
        "Predict predict",
        "chat dummy",
    ]


def test_copies_and_pickles_of_programs_work_while_watched(telemetry):
    telemetry.instrument()
    program = Research()
    copies = [copy.deepcopy(program), program.deepcopy(), cloudpickle.loads(cloudpickle.dumps(program))]
    for made in copies:
        telemetry.clear()
        with dspy.context(lm=dummy(*RESEARCH_ANSWERS)):
            made(question="why?")
        assert len(telemetry.spans) == 13
    assert len({span.attributes["dspy.program.id"] for span in telemetry.named("invoke_workflow")}) == 1


def test_call_time_signature_and_demos(telemetry):
    telemetry.instrument()
    predict = dspy.Predict("question -> answer")
    with dspy.context(lm=dummy({"verdict": "yes"})):
        predict(signature=dspy.Signature("claim -> verdict"), demos=[{"claim": "a", "verdict": "no"}], claim="b")
    attributes = telemetry.only("invoke_workflow").attributes
    assert attributes["dspy.signature.fields"] == "claim -> verdict"
    assert attributes["dspy.demos.count"] == 1


def test_keys_of_a_users_own_are_not_in_names_or_labels(telemetry) -> None:
    class Routed(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = {"user1@mail.com": dspy.Predict("question -> answer"), "x" * 100_000: dspy.Predict("q -> a")}
            self.steps = [dspy.Predict("question -> answer")]

        def forward(self, question: str):
            for predictor in (*self.by.values(), *self.steps):
                answer = predictor(**dict.fromkeys(predictor.signature.input_fields, question))
            return answer

    telemetry.instrument()
    with dspy.context(lm=dummy({"answer": "b"}, {"a": "b"}, {"answer": "b"})):
        Routed()(question="q")
    names = {span.name for span in telemetry.spans if span.name.startswith("Predict")}
    assert names == {"Predict by[*]", "Predict steps[0]"}
    labels = {point.attributes.get("dspy.module.path") for point in telemetry.metric("dspy.module.duration")}
    assert labels == {None, "by[*]", "steps[*]"}
