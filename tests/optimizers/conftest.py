"""Each optimizer starts from the same program: InferRules writes into the signature classes that programs share."""

from __future__ import annotations

from collections.abc import Iterator

import dspy
import pytest


def _signatures() -> list[type[dspy.Signature]]:
    found: list[type[dspy.Signature]] = []
    waiting = list(dspy.Signature.__subclasses__())
    while waiting:
        kind = waiting.pop()
        found.append(kind)
        waiting += kind.__subclasses__()
    return found


@pytest.fixture(autouse=True)
def unchanged_signatures() -> Iterator[None]:
    before = [(kind, kind.__doc__) for kind in _signatures()]
    yield
    for kind, text in before:
        if kind.__doc__ != text:
            kind.__doc__ = text
