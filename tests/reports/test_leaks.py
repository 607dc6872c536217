"""Rows of datasets in instructions: those that are there word for word, and no short words that are in any text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspy_otel.record.model import Dataset
from dspy_otel.reports import leaks
from dspy_otel.reports.leaks import find_leaks

LONG = "The parcel was left with a neighbour on the second floor, and nobody rang the bell."
ROWS = [
    {"question": LONG, "label": "delivery"},
    {"question": "Where can I change the password of my account?", "label": "account"},
    {"question": "Is it open?", "label": "hours"},
    {"colour": "old rose", "family": "pink"},
    {"colour": "olive", "family": "green"},
    {"colour": "lime green", "family": "green"},
    {"sum": 1234567, "answer": 8},
]


def dataset(rows: list[dict[str, Any]], role: str = "train", size: int | None = None) -> Dataset:
    return Dataset(role, len(rows) if size is None else size, text=json.dumps(rows))


def rows_in(*sentences: str) -> list[int]:
    found, _, _ = find_leaks([("qa", one) for one in sentences], [dataset(ROWS)])
    return [one.row for one in found]


@pytest.mark.parametrize(
    ("sentence", "rows"),
    [
        (f"For example: {LONG}", [0]),
        ("If a parcel WAS left with a neighbour on the second  floor, say so.", [0]),
        ("Classify e.g. 'where can I change the password of my account'.", [1]),
        ("Old rose is pink.", [3]),
        ("Treat olive as green.", [4]),
        # Nothing of these is a row, or more than words that any text has.
        ("Name the family of the colour: pink, green or red.", []),
        ("Old roses are often red.", []),
        ("Is it about delivery, account or hours?", []),
        ("Say lime green.", []),
        ("Answer 8 of 10 questions.", []),
        ("The parcel was left somewhere.", []),
        ("", []),
    ],
)
def test_a_row_is_found_where_it_stands_word_for_word(sentence: str, rows: list[int]) -> None:
    assert rows_in("Answer briefly.", sentence) == rows


def test_two_values_in_two_sentences_are_no_row() -> None:
    assert rows_in("Old rose is a colour.", "Some are pink.") == []


def test_a_run_that_goes_on_in_the_next_sentence_is_found() -> None:
    assert rows_in("The parcel was left with a neighbour", "on the second floor, and nobody rang.") == [0]


def test_what_is_there_is_named() -> None:
    (found,), searched, known = find_leaks(
        [("qa", "Be brief."), ("qa", "The parcel was left with a neighbour on the second floor, maybe.")],
        [dataset(ROWS, "val", size=100)],
    )
    assert (found.role, found.row, found.fields, found.predictor) == ("val", 0, ("question",), "qa")
    assert found.words == "The parcel was left with a neighbour on the second floor"
    assert found.sentence.endswith("maybe.")
    assert (searched, known) == (7, 100)


def test_words_of_a_template_are_no_row() -> None:
    template = "Answer the following question in one word, as the teacher would: {}"
    rows = [{"question": template.format(f"what is {place}?")} for place in range(10)]
    found, _, _ = find_leaks(
        [("qa", "Answer the following question in one word, as the teacher would.")], [dataset(rows)]
    )
    assert found == ()


def test_a_row_of_both_sets_is_named_once() -> None:
    found, _, _ = find_leaks([("qa", f"Like: {LONG}")], [dataset(ROWS, "val"), dataset(ROWS, "train")])
    assert [one.role for one in found] == ["val"]


def test_scripts_without_spaces_and_nested_values_count() -> None:
    rows = [{"messages": [{"text": "荷物は二階の隣の人に預けられていました"}]}]
    found, _, _ = find_leaks([("qa", "例えば、荷物は二階の隣の人に預けられた場合。")], [dataset(rows)])
    assert [one.words for one in found] == ["荷物は二階の隣の人に預けられ"]


def test_work_and_what_is_named_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"word {place} " * 8} for place in range(50)]
    sentences = [("qa", row["question"]) for row in rows]
    found, searched, _ = find_leaks(sentences, [dataset(rows)])
    assert (len(found), searched) == (leaks.MAX_LEAKS, 50)
    monkeypatch.setattr(leaks, "MAX_WORDS", 33)
    _, searched, known = find_leaks(sentences, [dataset(rows)])
    assert (searched, known) == (2, 50)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=3), st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists), max_size=3
        ),
        max_size=4,
    ),
    st.text(),
)
def test_any_rows_and_any_text(rows: list[dict[str, Any]], text: str) -> None:
    found, searched, known = find_leaks([("qa", text)], [dataset(rows)])
    assert (searched, known) == (len(rows), len(rows))
    for one in found:
        assert one.fields[0] in rows[one.row]
