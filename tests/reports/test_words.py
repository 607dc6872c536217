"""Differences of texts: nothing is lost, and what reads as one change is one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_otel.reports.words import differences


@given(st.text(max_size=200), st.text(max_size=200))
def test_both_texts_are_in_the_pieces(before: str, after: str) -> None:
    pieces = differences(before, after)
    assert "".join(piece.text for piece in pieces if piece.kind != "added") == before
    assert "".join(piece.text for piece in pieces if piece.kind != "removed") == after


def test_it_is_by_word() -> None:
    assert [tuple(piece) for piece in differences("Say the colour.", "Say the basic colour.")] == [
        ("same", "Say the "),
        ("added", "basic "),
        ("same", "colour."),
    ]


def test_changes_with_only_a_sign_between_them_are_one() -> None:
    assert [tuple(piece) for piece in differences("red, green", "blue, yellow")] == [
        ("removed", "red, green"),
        ("added", "blue, yellow"),
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [("a b " * 50_000, "b a " * 50_000), ("a " * 1900, "a b c d " * 500), ("a\n" * 9000, "b\n" * 9)],
)
def test_a_word_without_end_takes_no_age(before: str, after: str) -> None:
    """The hardest case of the standard library's matcher: 23 s for the second pair, word by word."""
    pieces = differences(before, after)
    assert len(pieces) <= 3
    assert "".join(piece.text for piece in pieces if piece.kind != "added") == before


def test_a_long_text_is_compared_by_word() -> None:
    words = [f"word{number % 700}" for number in range(2500)]
    pieces = differences(" ".join(words), " ".join([*words[:900], "new", *words[900:]]))
    assert [piece.text for piece in pieces if piece.kind != "same"] == ["new "]
