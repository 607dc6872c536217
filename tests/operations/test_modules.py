"""Programs and the modules in them."""

from __future__ import annotations

import collections
import copy
import re
from typing import Any

import cloudpickle
import dspy
import pytest

from dspy_otel.operations.program import Programs
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
    assert names == {"Predict by[*0]", "Predict by[*1]", "Predict steps[0]"}
    labels = {point.attributes.get("dspy.module.path") for point in telemetry.metric("dspy.module.duration")}
    assert labels == {None, "by[*]", "steps[*]"}


class Tree(dspy.Module):
    """Modules in every place in which DSPy finds them, some in two."""

    def __init__(self) -> None:
        super().__init__()
        shared = dspy.ChainOfThought("question -> shared")
        self.pipeline = collections.OrderedDict({"tier-1": dspy.Predict("question -> a"), 2023: shared})
        self.answer = shared
        self._private = (dspy.Predict("question -> b"), shared.predict)
        self.deep = Research()
        self.deep.inner = Research()
        self.check = self.deep.inner.check
        self.grid = [[dspy.Predict("question -> c")], {"k": [dspy.Predict("question -> d"), self.check]}]
        self.flags = {True: dspy.Predict("question -> e"), None: dspy.Predict("question -> f")}
        self.frozen = Research()
        self.frozen._compiled = True
        self.thawed = self.frozen.check
        self.deep.parents = [self]


def comparable(name: str) -> str:
    return re.sub(r"\['?([^]']*)'?\]", r"[\1]", name.removeprefix("self.").replace("self", ""))


@pytest.mark.injects_faults  # DSPy itself recurses without end in this program, and so it has no id
def test_paths_are_dspys_names_wherever_a_module_is() -> None:
    program = Tree()
    named = Programs().find(program).paths
    program.deep.parents = []  # DSPy itself does not come to an end with it.
    predictors = {id(predictor): name for name, predictor in program.named_predictors()}
    assert {key: named[key] for key in predictors} == predictors
    modules = {id(module): comparable(name) for name, module in program.named_sub_modules()}
    assert named.keys() == modules.keys()
    assert {key: comparable(path) for key, path in named.items() if key not in predictors} == {
        key: name for key, name in modules.items() if key not in predictors
    }
    assert len(set(named.values())) == len(named)


def test_modules_never_share_a_path() -> None:
    program = dspy.Module()
    program.same = {True: dspy.Predict("a -> b"), "True": dspy.Predict("a -> b"), "a question?": dspy.Predict("a -> b")}
    for letter in "ab":
        setattr(program, "x" * 200 + letter, dspy.Predict("a -> b"))
    cut = "x" * 128 + "…"
    named = sorted(Programs().find(program).paths.values())
    assert named == ["", "same['True']", "same['True']~2", "same[*2]", cut, f"{cut}~2"]


@pytest.mark.injects_faults  # DSPy itself recurses without end in this program, and so it has no id
def test_paths_follow_what_a_program_becomes() -> None:
    program, programs = Tree(), Programs()
    before = programs.find(program).paths
    assert before[id(program.answer)] == "answer"
    program.pipeline["tier-0"] = program.pipeline.pop("tier-1")
    after = programs.find(program).paths
    assert (before[id(program.pipeline["tier-0"])], after[id(program.pipeline["tier-0"])]) == (
        "pipeline['tier-1']",
        "pipeline['tier-0']",
    )
    program.frozen._compiled = False
    assert programs.find(program).paths[id(program.thawed)] == "frozen.check"


class Drafts(dspy.Module):
    """Copies of its modules, and modules of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict("question -> answer")
        self.best = [dspy.BestOfN(Research(), N=2, reward_fn=lambda *_: 0.0, threshold=1.0)]
        self.best.append(self.best[0].deepcopy())

    def forward(self, question: str) -> Any:
        self.predict.deepcopy()(question=question)
        dspy.ChainOfThought("question -> answer")(question=question)
        return [best(question=question) for best in self.best]


def test_copies_have_the_paths_of_their_originals(telemetry: Any) -> None:
    telemetry.instrument()
    own = [{"answer": "a"}, {"reasoning": "r", "answer": "a"}]
    with dspy.context(lm=dummy(*own, *RESEARCH_ANSWERS * 4)):
        Drafts()(question="q")
    found = collections.Counter(
        (span.attributes["dspy.module.class"], span.attributes.get("dspy.module.path"))
        for span in telemetry.spans
        if "dspy.module.class" in span.attributes
    )
    assert found[("Predict", "predict")] == 1
    assert found[("ChainOfThought", None)] == found[("Predict", None)] == 1  # `predict` is another module's.
    for number in (0, 1):
        assert found[("Research", f"best[{number}].module")] == 2
        assert found[("ChainOfThought", f"best[{number}].module.hops[1].generate")] == 2
        assert found[("Predict", f"best[{number}].module.writers['short']")] == 2
