"""Types shared by everything that maps DSPy objects to attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

AttributeValue: TypeAlias = (
    "str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]"
)
Attributes: TypeAlias = dict[str, AttributeValue]
ReadOnlyAttributes: TypeAlias = Mapping[str, AttributeValue]

EMPTY: ReadOnlyAttributes = {}
