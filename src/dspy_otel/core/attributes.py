"""Types shared by everything that maps DSPy objects to attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from dspy_otel.content.truncation import repaired

AttributeValue: TypeAlias = (
    "str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]"
)
Attributes: TypeAlias = dict[str, AttributeValue]
ReadOnlyAttributes: TypeAlias = Mapping[str, AttributeValue]

EMPTY: ReadOnlyAttributes = {}


def repair(attributes: Attributes) -> None:
    """Make each text among ``attributes``, in place, one that every exporter can send and every store keep.

    Half a character in one value would cost its whole batch in OTLP, and NUL in a SQL store.
    """
    for key, value in attributes.items():
        kind = type(value)
        if kind is str:
            if not value.isascii() or "\0" in value:  # type: ignore[union-attr, operator]
                attributes[key] = sendable(value)  # type: ignore[arg-type]
        elif kind is list or kind is tuple:
            attributes[key] = [sendable(each) if type(each) is str else each for each in value]  # type: ignore[union-attr, assignment]


def sendable(text: str) -> str:
    """``text`` without half characters and NUL; each is replaced by U+FFFD."""
    return repaired(text).replace("\0", "\N{REPLACEMENT CHARACTER}")
