"""Rows of training and validation sets that stand word for word in instructions. Pure; its work is bounded.

Two things count, since short words are in any text:

* at least :data:`RUN` words of a value in a row, or a whole value of at least :data:`WHOLE` words and
  :data:`WHOLE_CHARACTERS` characters: unless many rows have the same words, as templates do;
* two different values of one row, such as a question and its answer, in one sentence: one of them of at least
  :data:`PAIR_CHARACTERS` characters, and rare in the dataset.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dspy_otel.record.model import Dataset, number

RUN: Final = 8
"""Words in a row that are no chance."""
WHOLE: Final = 5
"""Words of a value that counts when all of it is there."""
WHOLE_CHARACTERS: Final = 20
"""Characters of such a value."""
PAIR_CHARACTERS: Final = 5
"""Characters of the longer one of two short values of one row."""
COMMON: Final = 0.05
"""Share of rows with the same words from which these are a template's, or a label; of few rows, three of them."""
MAX_WORDS: Final = 500_000
"""Most words of rows that are looked at."""
MAX_LEAKS: Final = 20
"""Most rows that are named."""

_WORDS: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
"""Words; of scripts that write without spaces, each sign is one."""


@dataclass(frozen=True, slots=True)
class Leak:
    """A row of a dataset that stands in instructions.

    Attributes:
        predictor: whose instructions.
        sentence: of them; where several have it, the first.
        role: ``train`` or ``val``.
        row: place of the row in its dataset.
        fields: of the row that are there.
        words: what is there, as the row has it.
    """

    predictor: str
    sentence: str
    role: str
    row: int
    fields: tuple[str, ...]
    words: str


@dataclass(frozen=True, slots=True)
class _Value:
    """A value of a row, with where its words are."""

    field: str
    text: str
    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]


def find_leaks(sentences: Sequence[tuple[str, str]], datasets: Iterable[Dataset]) -> tuple[tuple[Leak, ...], int, int]:
    """Find rows in instructions.

    Args:
        sentences: of instructions, in their order, with the name of the predictor.
        datasets: whose rows are looked for; of equal rows, the first is named.

    Returns:
        The leaks, the number of rows that were looked for, and how many there are.
    """
    datasets = list(datasets)
    there = _runs(sentences)
    known = sum(one.size for one in datasets)
    found: list[Leak] = []
    searched, budget, seen = 0, MAX_WORDS, set[tuple[str, str]]()
    for dataset in datasets:
        rows = [_values(row) for row in dataset.rows or ()]
        kept = []
        for row in rows:
            budget -= sum(len(one.words) for one in row)
            if budget < 0:
                break
            kept.append(row)
        searched += len(kept)
        if not there:
            continue
        common = max(2, int(COMMON * len(kept)))
        counts = Counter(run for row in kept for run in {run for one in row for run in _long(one) if run in there})
        values = Counter(words for row in kept for words in {one.words for one in row})
        for place, row in enumerate(kept):
            leak = _long_leak(row, there, counts, common) or _pair(row, there, values, common)
            if leak is None:
                continue
            sentence, fields, words = leak
            predictor, text = sentences[sentence]
            if (key := (text, words)) not in seen and len(found) < MAX_LEAKS:
                seen.add(key)
                found.append(Leak(predictor, text, dataset.role, place, fields, words))
    return tuple(found), searched, known


def _words(text: str) -> list[str]:
    return [match[0].casefold() for match in _WORDS.finditer(text)]


def _runs(sentences: Sequence[tuple[str, str]]) -> dict[tuple[str, ...], set[int]]:
    """Every run of words of the instructions, up to the longest that is looked for, with the sentences it begins in."""
    found: dict[tuple[str, ...], set[int]] = {}
    texts: dict[str, list[tuple[str, int]]] = {}
    for place, (predictor, text) in enumerate(sentences):
        texts.setdefault(predictor, []).extend((word, place) for word in _words(text))
    for words in texts.values():
        for start in range(len(words)):
            for length in range(1, min(RUN, len(words) - start) + 1):
                if length < WHOLE and words[start + length - 1][1] != words[start][1]:
                    break  # short values count inside of one sentence only
                run = tuple(word for word, _ in words[start : start + length])
                found.setdefault(run, set()).add(words[start][1])
    return found


def _values(row: Mapping[str, Any]) -> list[_Value]:
    found = []
    for name, value in row.items():
        for text in _texts(value):
            matches = list(_WORDS.finditer(text))
            if matches:
                words = tuple(one[0].casefold() for one in matches)
                found.append(_Value(str(name), text, words, tuple(one.span() for one in matches)))
    return found


def _texts(value: Any, depth: int = 3) -> Iterable[str]:
    """The texts of a value, and its numbers as texts."""
    if isinstance(value, str):
        yield value
    elif number(value) is not None:
        yield f"{value}"
    elif depth and isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part, depth - 1)


def _long(value: _Value) -> Iterable[tuple[str, ...]]:
    """The runs of a value that are long enough to count alone."""
    words = value.words
    if len(words) >= RUN:
        for start in range(len(words) - RUN + 1):
            yield words[start : start + RUN]
    elif len(words) >= WHOLE and value.spans[-1][1] - value.spans[0][0] >= WHOLE_CHARACTERS:
        yield words


_Found = tuple[int, tuple[str, ...], str]
"""The sentence, the fields of the row, and the words."""


def _long_leak(
    row: Sequence[_Value], there: Mapping[tuple[str, ...], set[int]], counts: Counter[tuple[str, ...]], common: int
) -> _Found | None:
    for value in row:
        hits = [place for place, run in enumerate(_long(value)) if run in there and counts[run] <= common]
        if not hits:
            continue
        first = last = hits[0]
        for place in hits[1:]:
            if place != last + 1:
                break
            last = place
        length = min(RUN, len(value.words))
        words = value.text[value.spans[first][0] : value.spans[last + length - 1][1]]
        return min(there[value.words[first : first + length]]), (value.field,), words
    return None


def _pair(
    row: Sequence[_Value], there: Mapping[tuple[str, ...], set[int]], values: Counter[tuple[str, ...]], common: int
) -> _Found | None:
    """Two short values of a row in one sentence; one inside of the other is one value."""
    short = [one for one in row if len(one.words) < WHOLE and one.words in there]
    for one in short:
        letters = sum(part.isalpha() for part in one.text)
        if letters < PAIR_CHARACTERS or values[one.words] > common:
            continue
        for other in short:
            inside = set(other.words) <= set(one.words) or set(one.words) <= set(other.words)
            if other.field == one.field or inside or len(other.text.strip()) < 2:
                continue
            both = there[one.words] & there[other.words]
            if both:
                return min(both), (one.field, other.field), f"{one.text.strip()} … {other.text.strip()}"
    return None
