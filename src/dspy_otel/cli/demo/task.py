"""The demo's task: which basic colour does a colour name stand for? Data, program and metric."""

# mypy: disable-error-code="misc"
# DSPy is untyped; a comment at the classes would be shown to the LM, which MIPROv2 gives their source to.

from __future__ import annotations

import csv
import hashlib
from importlib.resources import files
from typing import Any, Literal

import dspy

Family = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "grey", "black", "white"]


class DescribeName(dspy.Signature):
    """Say which colour the name makes you think of."""

    colour_name: str = dspy.InputField(desc="a colour name from a survey")
    description: str = dspy.OutputField(desc="one sentence")


class ChooseFamily(dspy.Signature):
    """Choose the basic colour family of the name."""

    colour_name: str = dspy.InputField(desc="a colour name from a survey")
    description: str = dspy.InputField(desc="what the name makes one think of")
    family: Family = dspy.OutputField()


class ColourFamily(dspy.Module):
    """Two steps: describe the name, then choose its family."""

    def __init__(self) -> None:
        super().__init__()
        self.describe = dspy.Predict(DescribeName)
        self.choose = dspy.ChainOfThought(ChooseFamily)

    def forward(self, colour_name: str) -> Any:
        """A prediction with `description`, `reasoning` and `family`."""
        description = self.describe(colour_name=colour_name).description
        chosen = self.choose(colour_name=colour_name, description=description)
        return dspy.Prediction(description=description, reasoning=chosen.reasoning, family=chosen.family)


def load_examples(split: Literal["train", "val"], size: int) -> list[Any]:
    """`size` survey names of one split as DSPy examples, in a fixed shuffled order."""
    lines = files(__package__).joinpath("colours.csv").read_text(encoding="utf-8").splitlines()
    rows = [row for row in csv.DictReader(line for line in lines if line[0] != "#") if row["split"] == split]
    rows.sort(key=lambda row: hashlib.sha1(row["name"].encode()).hexdigest())
    examples = [dspy.Example(colour_name=row["name"], family=row["family"]) for row in rows[:size]]
    return [example.with_inputs("colour_name") for example in examples]


def same_family(example: Any, prediction: Any, trace: Any = None) -> bool:
    """Whether the predicted family is the expected one."""
    return bool(example.family == getattr(prediction, "family", None))


def same_family_with_feedback(
    example: Any, prediction: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
) -> Any:
    """The same as a score of 0 or 1, with the sentence that GEPA reflects on."""
    if same_family(example, prediction):
        return dspy.Prediction(score=1.0, feedback=f"Right: the family is '{example.family}'.")
    answer = getattr(prediction, "family", None)
    return dspy.Prediction(score=0.0, feedback=f"Wrong: the family is '{example.family}', not '{answer}'.")
