"""The embedded model's brain: it answers any prompt of DSPy's, and only its prompt makes it better."""

from __future__ import annotations

import json

import pytest

from dspy_otel.cli.demo.brain import BASIC_COLOURS, complete, count_tokens
from dspy_otel.cli.demo.prompt import Message, read_examples, read_fields

LABELS = "; ".join(BASIC_COLOURS)
ASK = (
    "Respond with the corresponding output fields, starting with the field `[[ ## family ## ]]` (must be formatted as "
    "a valid Python Literal), and then ending with the marker for `[[ ## completed ## ]]`."
)


def system(instruction: str) -> Message:
    return Message(
        "system",
        "Your input fields are:\n1. `colour_name` (str)\nYour output fields are:\n1. `family` (Literal)\n"
        "[[ ## colour_name ## ]]\n{colour_name}\n\n[[ ## family ## ]]\n{family}        # note: the value you produce "
        f"must exactly match (no extra characters) one of: {LABELS}\n\n[[ ## completed ## ]]\n"
        f"In adhering to this structure, your objective is: \n        {instruction}",
    )


def ask(name: str) -> Message:
    return Message("user", f"[[ ## colour_name ## ]]\n{name}\n\n{ASK}")


def demo(name: str, family: str) -> list[Message]:
    return [
        Message("user", f"[[ ## colour_name ## ]]\n{name}"),
        Message("assistant", f"[[ ## family ## ]]\n{family}\n\n[[ ## completed ## ]]\n"),
    ]


def family(name: str, instruction: str = "Choose.", demos: list[Message] | None = None) -> str:
    return read_fields(complete([system(instruction), *(demos or []), ask(name)]).text)["family"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dark green", "green"), ("green blue", "blue"), ("purplish", "purple"), ("greenblue", "blue"), ("redder", "red")],
)
def test_knows_basic_colour_words(name, expected):
    assert family(name) == expected


def test_learns_from_statements_in_the_instruction():
    assert family("dusty wisteria", "Choose. Known words: mint and sage are green; wisteria is purple.") == "purple"
    assert family("sage", "Choose. Known words: mint, fern and sage are green.") == "green"
    assert family("wisteria", "Choose. When nothing fits, answer pink.") == "pink"


def test_learns_from_demos_also_for_similar_words():
    demos = demo("light lavender", "purple") + demo("rust", "brown")
    assert family("dark lavender", demos=demos) == "purple"
    assert family("lavendar", demos=demos) == "purple"
    assert family("rusty", demos=demos) == "brown"


def test_does_not_know_what_it_was_not_told():
    unknown = ["teal", "mauve", "navy", "sienna", "puce", "ecru", "azure", "salmon", "maroon", "tan"]
    right = ["green", "purple", "blue", "brown", "brown", "white", "blue", "pink", "red", "brown"]
    assert sum(family(name) == label for name, label in zip(unknown, right, strict=True)) <= 4


def test_the_same_prompt_gives_the_same_answer_and_real_counts():
    messages = [system("Choose."), ask("teal")]
    first, second = complete(messages), complete(messages)
    assert first == second
    assert first.input_tokens == sum(count_tokens(m.text) for m in messages)
    assert first.output_tokens == count_tokens(first.text)
    assert count_tokens("It's 7 o'clock, no?") == 10


def test_counts_tokens_of_nothing():
    assert count_tokens("") == 0


def proposal(field: str, **inputs: str) -> str:
    given = "\n\n".join(f"[[ ## {key} ## ]]\n{value}" for key, value in inputs.items())
    wanted = f"Respond with a JSON object in the following order of fields: `{field}`."
    return json.loads(complete([Message("system", "x"), Message("user", f"{given}\n\n{wanted}")]).text)[field]


def test_observes_what_examples_show():
    shown = "[Example({'colour_name': 'dark teal', 'family': 'green'}) (input_keys={'colour_name'}), " + (
        """Example({'colour_name': "robin's egg", 'family': 'blue'}) (input_keys={'colour_name'})]"""
    )
    assert proposal("observations", examples=shown) == "egg and robin's are blue; teal is green."
    assert proposal("observations", examples="[]") == "COMPLETE"


def test_writes_an_instruction_it_can_follow_itself():
    written = proposal(
        "new_instruction",
        current_instruction="Choose. Known words: mint is green. When nothing fits, answer green.",
        examples_with_feedback=json.dumps(
            [{"Inputs": {"colour_name": "pale mauve"}, "Feedback": "Wrong: the family is 'purple', not 'blue'."}]
        ),
    )
    assert written.startswith("Choose. Known words: ")
    assert family("mauve", written) == "purple"
    assert family("mint", written) == "green"


def test_a_concise_tip_makes_a_shorter_instruction():
    words = [f"{a}{b}" for a in ("zab", "kel", "mov", "tir") for b in ("dun", "fik", "pol", "wex", "yat")]
    known = f"{', '.join(words[:-1])} and {words[-1]} are green."
    given = {"dataset_description": known, "basic_instruction": "Choose."}
    short = proposal("proposed_instruction", **given, tip="Keep the instruction clear and concise.")
    full = proposal("proposed_instruction", **given, tip="Make it very informative and descriptive.")
    assert sum(word in short for word in words) == 10
    assert sum(word in full for word in words) == 20


def test_answers_a_plain_reflection_prompt_between_marks():
    prompt = (
        "I provided an assistant with the following instructions to perform a task for me:\n```\nChoose.\n```\n"
        "examples:\n```\n# Example 1\n## Inputs\n### colour_name\nlight mauve\n\n## Generated Outputs\n### family\nred"
        "\n\n## Feedback\nWrong: the family is 'purple', not 'red'.\n\n```\n"
    )
    text = complete([Message("user", prompt)]).text
    assert text == "```\nChoose. Known words: mauve is purple. When nothing fits, answer purple.\n```"


def test_reads_task_demos():
    text = "Colour Name: mint\nDescription: In 'mint', nothing.\nFamily: green\n\nColour Name: rust\nFamily: brown"
    assert read_examples(text, BASIC_COLOURS) == [("mint", "green"), ("rust", "brown")]


@pytest.mark.parametrize(
    "text", ["", "hello", "[[ ## x ## ]]", "Respond with a JSON object", "{", "```", "# Example 1"]
)
def test_never_fails(text):
    assert isinstance(complete([Message("user", text)]).text, str)
    assert isinstance(complete([]).text, str)
