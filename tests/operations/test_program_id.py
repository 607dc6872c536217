"""`dspy.program.id`: the same for the same state, however it came about, and another one for another state."""

from __future__ import annotations

import copy
import datetime
import gc
from pathlib import Path
from typing import Any

import dspy
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_otel import program_id
from dspy_otel.content import redaction
from dspy_otel.operations.program import Programs
from tests.operations.common import Research, dummy


class City(pydantic.BaseModel):
    name: str
    sights: list[str] = []
    walk: datetime.timedelta = datetime.timedelta(hours=25)  # saved as "P1DT1H"


def with_demos():
    program = Research()
    for number, (_, predictor) in enumerate(program.named_predictors()):
        predictor.demos = [
            dspy.Example(question=f"q{number}", query="a", city=City(name="Bern", sights=["bears"]), n=[1, {"a": 2.5}]),
            {"question": "plain dictionary", "query": "b", "augmented": True},
        ]
    return program


def test_equal_after_save_and_load_of_the_state(tmp_path):
    program = with_demos()
    program.save(tmp_path / "state.json")
    loaded = Research()
    assert program_id(loaded) != program_id(program)
    loaded.load(tmp_path / "state.json")
    assert program_id(loaded) == program_id(program)


@pytest.mark.filterwarnings("ignore")
def test_equal_after_save_and_load_of_the_whole_program(tmp_path):
    program = with_demos()
    program.save(tmp_path / "program", save_program=True)
    options = {"allow_pickle": True} if "allow_pickle" in dspy.load.__code__.co_varnames else {}
    assert program_id(dspy.load(str(tmp_path / "program"), **options)) == program_id(program)


def test_equal_for_copies():
    program = with_demos()
    assert program_id(program.deepcopy()) == program_id(copy.deepcopy(program)) == program_id(program)
    assert program_id(Research()) == program_id(Research()) == program_id(program.reset_copy())


def change_instructions(program):
    predictor = program.check
    predictor.signature = predictor.signature.with_instructions("Be strict.")


def change_instructions_in_place(program):
    program.check.signature.instructions = "Be strict."


def add_demo(program):
    program.check.demos.append(dspy.Example(answer="a", good=True))


def remove_demo(program):
    program.check.demos.pop()


def change_demo(program):
    program.check.demos[0]["question"] = "another"


def change_dictionary_demo(program):
    program.check.demos[1]["question"] = "another"


def change_model_in_demo(program):
    program.check.demos[0]["city"].name = "Basel"


def change_list_in_model_in_demo(program):
    program.check.demos[0]["city"].sights.append("clock")


def change_number_in_nested_demo(program):
    program.check.demos[0]["n"][1]["a"] = 3


def rename_key_in_nested_demo(program):
    nested = program.check.demos[0]["n"][1]
    nested["b"] = nested.pop("a")


def change_field_description(program):
    program.check.signature = program.check.signature.with_updated_fields("good", desc="whether it is good")


@pytest.mark.parametrize(
    "change",
    [
        change_instructions,
        change_instructions_in_place,
        add_demo,
        remove_demo,
        change_demo,
        change_dictionary_demo,
        change_model_in_demo,
        change_list_in_model_in_demo,
        change_number_in_nested_demo,
        rename_key_in_nested_demo,
        change_field_description,
    ],
    ids=lambda change: change.__name__,
)
def test_every_change_is_seen_through_the_cache(change):
    program, programs = with_demos(), Programs()
    before = programs.find(program).id
    assert before == program_id(program)
    assert programs.find(program).id == before
    change(program)
    after = programs.find(program).id
    assert after == program_id(program)
    assert after != before


class Many(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("question -> query")
        self.rest = [dspy.Predict("query -> answer"), dspy.ChainOfThought("query -> answer")]
        self.named = {"a": dspy.Predict("query -> title"), ("b", 1): dspy.Predict("query -> title")}
        self.empty: list[Any] = []
        self.first.demos = [dspy.Example(question="q", query="a"), {"question": "p", "query": "b"}]


class Other(Many):
    pass


def mutate(program: Any, how: str, which: int) -> None:
    predictors = [each for _, each in program.named_predictors()]
    if not predictors:  # All are in something frozen.
        return
    predictor = predictors[which % len(predictors)]
    if how == "demo":
        predictor.demos = [*predictor.demos, dspy.Example(question=f"{which}")]
    elif how == "demo in place" and predictor.demos:
        predictor.demos[0]["question"] = f"{which}"
    elif how == "demo with a list":
        predictor.demos = [dspy.Example(question=["q"])]
    elif how == "demo with a tuple":  # A deep copy has the very same one.
        predictor.demos = [dspy.Example(question=("q", "r"))]
    elif how == "instructions":
        predictor.signature = predictor.signature.with_instructions(f"{which}")
    elif how == "another predictor":
        program.first = dspy.Predict("question -> query")
    elif how == "shared":
        program.rest = [program.first, *program.rest]
    elif how == "more":
        program.rest = [*program.rest, dspy.Predict("query -> answer")]
    elif how == "attribute":
        program.again = predictor
    elif how == "frozen":
        program.named["frozen"] = dspy.ChainOfThought("query -> answer")
        program.named["frozen"]._compiled = True
    elif how == "key":
        program.named = {"c": program.named.pop("a", program.first), **program.named}
    elif how == "dictionary" and type(program.rest) is list:
        program.rest = dict(enumerate(program.rest))
    elif how == "moved" and type(program.rest) is type(program.empty) is list and program.rest:
        program.empty.append(program.rest.pop())
    elif how == "swapped":
        program.first, program.empty = program.empty, program.first
    elif how == "frozen by a number":
        predictor._compiled = program.__dict__["_compiled"] = 1
    elif how == "many":
        program.rest = [dspy.Predict("query -> answer") for _ in range(300)]
    elif how == "class":
        program.__class__ = Other


HOW = (
    *("nothing", "demo", "demo in place", "demo with a list", "demo with a tuple", "instructions", "another predictor"),
    *("shared", "more", "attribute", "frozen", "key", "dictionary", "moved", "swapped", "frozen by a number", "many"),
    "class",
)
mutations = st.tuples(st.sampled_from(HOW), st.integers(0, 5))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["original", "copy", "copy of copy", "find"]), mutations), max_size=8),
    st.sampled_from([lambda program: program.deepcopy(), copy.deepcopy, lambda program: program.reset_copy()]),
)
def test_what_is_known_of_a_copy_is_what_would_be_found(steps: list[Any], copied: Any) -> None:
    programs, original = Programs(), Many()
    existing = [original]
    for what, mutation in steps:
        if what == "find":
            programs.find(existing[mutation[1] % len(existing)])
            continue
        program = original if what == "original" else copied(existing[0 if what == "copy" else -1])
        existing.append(program)
        if program is not original or mutation[0] != "class":  # No program changes the class of what it has called.
            mutate(program, *mutation)
    for program in existing:
        found, anew = programs.find(program), Programs().find(program)
        assert found is not None
        assert anew is not None
        assert (found.name, found.id, found.paths) == (anew.name, anew.id, anew.paths)
        assert found.origins == anew.origins


def test_a_copy_is_known_by_its_original(monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[Any] = []
    describe = Programs._describe
    monkeypatch.setattr(
        Programs, "_describe", lambda self, root, *more: described.append(root) or describe(self, root, *more)
    )
    programs, original = Programs(), Many()
    copies = [original.deepcopy() for _ in range(3)]
    found = [programs.find(each) for each in (original, *copies, *copies)]
    assert described == [original]
    assert len({each.id for each in found}) == 1
    assert found[1].descriptions is found[0].descriptions
    del original, described[:], found, copies[1:]
    programs.find(copies[0].deepcopy())
    assert len(described) == 1  # Nothing was kept alive.


def test_modules_of_classes_that_come_and_go_have_their_own_names(telemetry: Any) -> None:
    telemetry.instrument()

    def module(name: str) -> Any:
        return type(name, (dspy.Module,), {"forward": lambda self, **_: None})()

    class Host(dspy.Module):
        def forward(self) -> Any:
            return self.sub() if self.sub is not None else None

    names = [f"Number{number}" for number in range(20)]
    programs = [Host() for _ in names]
    for program, name in zip(programs, names, strict=True):
        program.sub = module(name)
        program()
        program.sub = None  # Python gives the place of its class in memory to one of the next.
        gc.collect()
    assert [span.name for span in telemetry.spans if span.name.endswith(" sub")] == [f"{name} sub" for name in names]


def test_settings_that_are_no_state_do_not_count(telemetry):
    program = with_demos()
    before = program_id(program)
    program.set_lm(dummy({"answer": "a"}))
    program.check.traces.append("x")
    program.history.append("x")
    assert program_id(program) == before


def test_program_without_predictors_has_none(telemetry):
    class Bare(dspy.Module):
        def forward(self):
            return 1

    telemetry.instrument()
    Bare()()
    assert "dspy.program.id" not in telemetry.spans[0].attributes
    assert program_id(Bare()) is None


@pytest.mark.skipif(not hasattr(dspy, "Flex"), reason="DSPy 3.2 has no Flex")
def test_flex_is_known_by_its_source():
    one, same, other = (dspy.Flex("question -> answer") for _ in range(3))
    programs = Programs()
    before = programs.find(other).id
    assert program_id(one) == program_id(same) == before
    other._module_src = other.module_src + "\n# rewritten"
    assert programs.find(other).id == program_id(other) != before


ROWS = [
    dspy.Example(question=f"q{n}", city=City(name=f"city {n}", sights=["a", "b"])).with_inputs("question")
    for n in range(4)
]


class Guide(dspy.Module):
    def __init__(self):
        super().__init__()
        self.ask = dspy.Predict(
            dspy.Signature({"question": (str, dspy.InputField()), "city": (City, dspy.OutputField())})
        )

    def forward(self, question):
        return self.ask(question=question)


@pytest.mark.parametrize("optimizer", ["LabeledFewShot", "BootstrapFewShot"])
def test_candidate_winner_and_production_share_the_id(telemetry, tmp_path, optimizer):
    """What was evaluated, what is saved, and what runs after loading is one program."""
    telemetry.instrument()
    answers = [{"city": row.city.model_dump_json()} for row in ROWS] * 3
    with dspy.context(lm=dummy(*answers)):
        if optimizer == "LabeledFewShot":
            compiled = dspy.LabeledFewShot(k=2).compile(Guide(), trainset=ROWS)
        else:
            compiled = dspy.BootstrapFewShot(metric=lambda *_: True, max_bootstrapped_demos=2).compile(
                Guide(), trainset=ROWS
            )
        assert compiled.ask.demos
        telemetry.clear()
        dspy.Evaluate(devset=ROWS[:1], metric=lambda *_: 1, num_threads=1, display_progress=False)(compiled)
        compiled.save(tmp_path / "guide.json")
        loaded = Guide()
        loaded.load(tmp_path / "guide.json")
        loaded(question="q0")
    evaluated, *programs = (
        span.attributes["dspy.program.id"]
        for span in telemetry.spans
        if "evaluate" in span.name or "workflow" in span.name
    )
    assert programs == [evaluated, evaluated]
    assert evaluated != program_id(Guide())


def test_modules_under_any_name_are_part_of_the_program() -> None:
    class Named(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = dspy.Predict("question -> answer")
            self.history = dspy.Predict("answer -> summary")

        def forward(self, question: str) -> Any:
            return self.stage(question=question)

    program = Named()
    programs = Programs()
    before = programs.find(program)
    assert before is not None
    assert {"stage", "history"} <= set(before.paths.values())
    program.history.signature = program.history.signature.with_instructions("Sum up.")
    assert programs.find(program).id != before.id


def test_demo_keys_and_field_texts_changed_in_place_show() -> None:
    programs = Programs()
    program = dspy.Predict("question -> answer")
    program.demos = [{"question": "a", "answer": "b"}]
    first = programs.find(program).id
    program.demos[0]["context"] = program.demos[0].pop("answer")
    second = programs.find(program).id
    program.signature.fields["answer"].json_schema_extra["desc"] = "one word"
    third = programs.find(program).id
    assert len({first, second, third}) == 3


def test_the_last_of_many_parts_of_demos_shows() -> None:
    program, programs = Research(), Programs()
    program.check.demos = [dspy.Example(answer={str(n): n for n in range(250)}, good=True) for _ in range(16)]
    before = programs.find(program).id
    program.check.demos[-1]["answer"]["249"] = -1
    assert programs.find(program).id == program_id(program) != before


@pytest.mark.skipif(not hasattr(dspy.Predict("a -> b"), "fields"), reason="DSPy 3.3 has no decision settings")
def test_decision_settings_changed_in_place_show(telemetry: Any) -> None:
    programs = Programs()
    predictor = dspy.Predict("text -> spam: bool")
    seen = [programs.find(predictor).id]
    predictor.fields["spam"] = {"threshold": 0.5}
    seen.append(programs.find(predictor).id)
    predictor.fields["spam"]["threshold"] = 0.7
    seen.append(programs.find(predictor).id)
    assert len(set(seen)) == 3
    del predictor.fields["spam"]
    assert programs.find(predictor).id == seen[0]


def test_identity_depends_on_the_state_alone() -> None:
    """Not on which secrets this process knows, and not on how long the state is."""

    def with_demos(*texts: str) -> Any:
        program = dspy.Predict("question -> answer")
        program.demos = [{"question": text, "answer": "b"} for text in texts]
        return program

    plain = program_id(with_demos("the word is mellifluous-123"))
    redaction.remember("mellifluous-123")
    assert program_id(with_demos("the word is mellifluous-123")) == plain
    assert program_id(with_demos("sk-" + "a" * 30)) != program_id(with_demos("sk-" + "b" * 30))
    long = ["row"] * 1500
    assert program_id(with_demos(*long, "x")) != program_id(with_demos(*long, "y"))


def test_same_after_a_json_file_even_with_dates_and_nan(tmp_path: Path) -> None:
    program = dspy.Predict("question -> answer")
    program.demos = [{"question": datetime.datetime(2020, 1, 1), "answer": float("nan")}]
    program.save(tmp_path / "program.json")
    loaded = dspy.Predict("question -> answer")
    loaded.load(tmp_path / "program.json")
    assert program_id(loaded) == program_id(program)
