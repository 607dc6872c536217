"""The embedded model inside DSPy: all adapters, all field types, sync and async, saved and loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Literal

import dspy
import pydantic
import pytest

from dspy_otel.cli.demo.brain import BASIC_COLOURS
from dspy_otel.cli.demo.lm import embedded_lm
from dspy_otel.cli.demo.task import ChooseFamily, ColourFamily, load_examples


class Swatch(pydantic.BaseModel):
    title: str
    weight: float
    tags: list[str]
    finish: Literal["matt", "gloss"]


class Everything(dspy.Signature):
    colour_name: str = dspy.InputField()
    note: str = dspy.OutputField()
    sure: bool = dspy.OutputField()
    count: int = dspy.OutputField()
    share: float = dspy.OutputField()
    tags: list[str] = dspy.OutputField()
    table: dict[str, int] = dspy.OutputField()
    maybe: int | None = dspy.OutputField()
    swatch: Swatch = dspy.OutputField()
    family: Literal["green", "blue"] = dspy.OutputField()


@pytest.fixture(params=["ChatAdapter", "JSONAdapter", "XMLAdapter"])
def adapter(request):
    return getattr(dspy, request.param)()


def test_answers_every_kind_of_field(adapter):
    with dspy.context(lm=embedded_lm(), adapter=adapter):
        answer = dspy.Predict(Everything)(colour_name="dark blue")
    assert answer.family == "blue"
    assert answer.sure is True
    assert (answer.count, answer.share, answer.tags, answer.table) == (0, 0.0, [], {})
    assert answer.swatch == Swatch(title="", weight=0, tags=[], finish="matt")
    assert "blue" in answer.note


async def test_answers_async(adapter):
    with dspy.context(lm=embedded_lm(), adapter=adapter):
        answer = await dspy.ChainOfThought(ChooseFamily).acall(colour_name="dark blue", description="none")
    assert answer.family == "blue"


def test_uses_demos_in_every_adapter(adapter):
    predict = dspy.Predict("colour_name -> family: Literal['green', 'blue', 'purple']")
    with dspy.context(lm=embedded_lm(), adapter=adapter):
        predict.demos = [dspy.Example(colour_name="mauve", family="purple")]
        assert predict(colour_name="light mauve").family == "purple"
        predict.demos = [dspy.Example(colour_name="mauve", family="green")]
        assert predict(colour_name="light mauve").family == "green"


def test_reports_usage_and_no_cost():
    lm = embedded_lm(cache=False)
    with dspy.context(lm=lm):
        dspy.Predict("colour_name -> family")(colour_name="teal")
    (entry,) = lm.history
    assert entry["usage"]["prompt_tokens"] > 50
    assert 0 < entry["usage"]["completion_tokens"] < 50
    assert entry["cost"] is None


def test_several_answers_and_a_plain_prompt():
    lm = embedded_lm(cache=False)
    assert len(lm("hello", n=3)) == 3


def test_a_program_with_it_can_be_saved(tmp_path):
    program = ColourFamily()
    program.set_lm(embedded_lm())
    program.save(tmp_path / "program.json")
    assert (tmp_path / "program.json").stat().st_size > 100


def test_examples_are_fixed_and_disjoint():
    train, val = load_examples("train", 10_000), load_examples("val", 10_000)
    names = [example.colour_name for example in train + val]
    assert len(names) == len(set(names)) == 920
    assert load_examples("val", 5) == val[:5]
    assert {example.family for example in train} == set(BASIC_COLOURS)


def test_does_not_import_litellm():
    code = (
        "import sys, dspy\nfrom dspy_otel.cli.demo.lm import embedded_lm\n"
        "dspy.configure(lm=embedded_lm(), adapter=dspy.JSONAdapter())\n"
        "dspy.Predict('colour_name -> family')(colour_name='teal')\nprint('litellm' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "False"
