"""Ids that people compare over months: of programs, examples and datasets. A change of one breaks every comparison."""

from __future__ import annotations

import datetime
import decimal
import enum
import math
import uuid
from typing import Any

import dspy
import pydantic
import pytest
from dspy.teleprompt.teleprompt import Teleprompter

from dspy_otel import program_id
from tests.operations.common import Research, dummy


class Size(enum.Enum):
    SMALL = "s"
    LARGE = 2


class Sight(pydantic.BaseModel):
    name: str
    age: int | None = None


VALUES: dict[str, dict[str, Any]] = {
    "text": {"question": "Where is the Aare?", "answer": "In Bern."},
    "unicode": {"question": "Wie heißt der Fluß? 🏞", "answer": "日本"},
    "numbers": {"question": "n", "whole": 7, "large": 2**80, "real": 0.1, "nan": math.nan, "yes": True, "none": None},
    "nested": {"question": "n", "list": [1, [2, {"a": (3, "b")}]], "map": {"z": 1, "a": {"b": []}}, "set": {"b", "a"}},
    "standard": {
        "question": "s",
        "day": datetime.date(2026, 11, 28),
        "moment": datetime.datetime(2026, 11, 28, 7, 0, tzinfo=datetime.timezone.utc),
        "id": uuid.UUID(int=7),
        "price": decimal.Decimal("1.50"),
        "size": Size.LARGE,
        "bytes": b"abc",
    },
    "model": {"question": "m", "sight": Sight(name="bears", age=500), "sights": [Sight(name="clock")]},
    "example": {"question": "e", "inner": dspy.Example(a=1, b="two")},
    "long": {"question": "x" * 5000, "answer": "y"},
    "keys": {"question": "k", "map": {1: "a", (1, "x"): "b", "1 ": "c"}},
}

EXAMPLE_IDS = {
    "text": "ad2a2f62abb7df82",
    "unicode": "96e5fe255a1ff040",
    "numbers": "ac3d8fd5d471b45c",
    "nested": "a037a30c1f743118",
    "standard": "657fb92c5ff8f358",
    "model": "3a5f9fbea75923d1",
    "example": "0e243567c26d714b",
    "long": "456b79a8f18e4234",
    "keys": "cfc2e34b20ba28a7",
}
DATASET_DIGESTS = ["4c25e73e91c87b12", "0bfede43dd981727"]
PROGRAM_IDS = {
    "predict": "b0cd52037f1d5a77",
    "instructions": "8cd1fe42dc8649f9",
    "research": "a3d1cc2ef142dde0",
    "research demos": "973c5fa4808bcf86",
    "many": "116e43e2d38906a6",
    "many demos": "b419853757cd97c3",
}


SOURCE_IDS = {
    "attribute": "37cebd5c2d467e59",
    "sentence": "4d6f45a6580efb34",
    "long": "baebc2efe75d51b4",
    "number": "148bc8e96abfc8d3",
    "twice": "1e776f7a701ba269",
    "list and name": "297451d569c772a0",
}


def rows() -> list[Any]:
    return [dspy.Example(**values).with_inputs("question") for values in VALUES.values()]


class Fixed(dspy.Module):
    def forward(self, question: str) -> Any:
        return dspy.Prediction(answer=question)


class Unchanged(Teleprompter):  # type: ignore[misc]
    def compile(self, student: Any, *, trainset: Any, valset: Any = None) -> Any:
        return student


class Many(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.ChainOfThought("question -> answer: float")
        self.steps = [dspy.Predict("a, b -> c"), dspy.Predict("c -> d: list[str]")]
        self.named = {"left": dspy.Predict("x -> y"), "right": Research()}


def program_of(name: str) -> Any:
    if name == "predict":
        return dspy.Predict("question -> answer")
    if name == "instructions":
        return dspy.Predict(dspy.Signature("question -> answer", "Answer in one word: „ja“ or „nein“."))
    program: Any = Many() if name.startswith("many") else Research()
    if name.endswith("demos"):
        for _, predictor in program.named_predictors():
            predictor.demos = [*rows(), {"question": "plain dictionary", "augmented": True}]
    return program


def test_ids_of_examples_and_datasets(telemetry):
    telemetry.instrument(capture_content="span_only")
    dspy.Evaluate(devset=rows(), metric=lambda example, prediction, trace=None: 1.0, num_threads=1)(Fixed())
    examples = [span for span in telemetry.spans if span.name.startswith("example ")]
    found: dict[str, Any] = {}
    for span in examples:
        found[list(VALUES)[span.attributes["dspy.example.index"]]] = span.attributes["dspy.example.id"]
    assert found == EXAMPLE_IDS

    telemetry.clear()
    Unchanged().compile(Fixed(), trainset=rows(), valset=rows()[:3])
    (compile_,) = [span for span in telemetry.spans if span.name.startswith("compile ")]
    digests = [compile_.attributes[f"dspy.dataset.{role}.digest"] for role in ("train", "val")]
    assert digests == DATASET_DIGESTS


def test_ids_of_programs():
    names = ("predict", "instructions", "research", "research demos", "many", "many demos")
    assert {name: program_id(program_of(name)) for name in names} == PROGRAM_IDS


def with_source(name: str) -> Any:
    """A program with a ``dspy.Flex`` in one place or another."""
    program, flex = Fixed(), dspy.Flex("a -> b")
    if name == "attribute":
        program.a = flex
    elif name == "twice":
        program.a = program.b = flex
    elif name == "list and name":
        program.more = [dspy.Predict("c -> d"), flex]
        program.named = {"left": dspy.Flex("x -> y")}
    else:
        key: Any = {"sentence": "not an identifier", "long": "q" * 80, "number": 3}[name]
        program.named = {key: flex, "x": dspy.Predict("c -> d")} if name == "sentence" else {key: flex}
    return program


@pytest.mark.skipif(not hasattr(dspy, "Flex"), reason="DSPy 3.2 has no Flex")
@pytest.mark.parametrize("name", SOURCE_IDS)
def test_ids_of_programs_with_source(name):
    assert program_id(with_source(name)) == SOURCE_IDS[name]


def test_the_id_on_spans_is_that_of_the_program(telemetry):
    telemetry.instrument()
    with dspy.context(lm=dummy({"answer": "a"})):
        program_of("predict")(question="q")
    assert telemetry.spans[-1].attributes["dspy.program.id"] == PROGRAM_IDS["predict"]
