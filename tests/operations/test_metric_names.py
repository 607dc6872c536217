"""What a metric is called: the name of what runs when DSPy calls it."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from dspy_otel.operations.evaluation import metric_name


def exact(example: Any, prediction: Any, strict: bool = False) -> bool:
    return bool(example == prediction)


class Judge:
    def grade(self, example: Any, prediction: Any) -> bool:
        return True

    def __call__(self, example: Any, prediction: Any) -> bool:
        return True


@functools.wraps(exact)
def wrapped(*args: Any, **kwargs: Any) -> bool:
    return exact(*args, **kwargs)


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (exact, "exact"),
        (wrapped, "exact"),
        (functools.partial(exact, strict=True), "exact"),
        (functools.partial(functools.partial(Judge().grade), 1), "grade"),
        (functools.partial(Judge()), "Judge"),
        (Judge().grade, "grade"),
        (Judge(), "Judge"),
        (Judge, "Judge"),
        (None, None),
    ],
)
def test_a_metric_has_the_name_of_what_it_wraps(metric: Any, name: str | None) -> None:
    assert metric_name(metric) == name
