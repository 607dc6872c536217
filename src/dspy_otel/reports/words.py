"""What changed from one text to another, word by word."""

from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher
from typing import Final, Literal, NamedTuple

_WORDS: Final = re.compile(r"\s+|\w+\s*|[^\w\s]\s*")
"""A word or a sign, with the space behind it."""
_MOST_WORK: Final = 50_000
"""Pairs of equal words, one in each text, up to which texts are compared word by word; beyond, line by line, or not at
all. Two unlike texts of a thousand words have a third of it; a model that repeats one word without end has more."""


class Piece(NamedTuple):
    """A part of a text."""

    kind: Literal["same", "added", "removed"]
    text: str


def differences(before: str, after: str) -> list[Piece]:
    """The pieces of both texts in order: what stayed, what was removed, what was added."""
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    head = _alike(old, new)
    tail = _alike(old[: head - 1 if head else None : -1], new[: head - 1 if head else None : -1])
    middle = _middle("".join(old[head : len(old) - tail]), "".join(new[head : len(new) - tail]))
    ends = Piece("same", "".join(old[:head])), Piece("same", "".join(old[len(old) - tail :]))
    return [piece for piece in (ends[0], *middle, ends[1]) if piece.text]


def _alike(old: list[str], new: list[str]) -> int:
    """How many words are the same at the beginning."""
    return next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))


def _middle(before: str, after: str) -> list[Piece]:
    if not before or not after:
        return [Piece("removed", before), Piece("added", after)]
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    if _work(old, new) > _MOST_WORK:
        old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    if _work(old, new) > _MOST_WORK:
        return [Piece("removed", before), Piece("added", after)]
    pieces: list[Piece] = []
    for what, a, b, c, d in _merge(SequenceMatcher(None, old, new, autojunk=False).get_opcodes(), old):
        if what == "equal":
            pieces.append(Piece("same", "".join(old[a:b])))
            continue
        if a < b:
            pieces.append(Piece("removed", "".join(old[a:b])))
        if c < d:
            pieces.append(Piece("added", "".join(new[c:d])))
    return pieces


def _work(old: list[str], new: list[str]) -> int:
    counts = Counter(new)
    return sum(count * counts[word] for word, count in Counter(old).items())


def _merge(
    codes: list[tuple[Literal["replace", "delete", "insert", "equal"], int, int, int, int]], old: list[str]
) -> list[tuple[str, int, int, int, int]]:
    """Changes with nothing but a space or a comma between them are one change: it reads better."""
    merged: list[tuple[str, int, int, int, int]] = []
    for place, (what, a, b, c, d) in enumerate(codes):
        bridge = what == "equal" and 0 < place < len(codes) - 1 and not any(word[0].isalnum() for word in old[a:b])
        kind = "replace" if bridge or what != "equal" else "equal"
        if merged and kind == "replace" and merged[-1][0] == "replace":
            _, first, _, start, _ = merged[-1]
            merged[-1] = ("replace", first, b, start, d)
        else:
            merged.append((kind, a, b, c, d))
    return merged
