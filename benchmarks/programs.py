"""The programs that are measured, on a language model that costs nothing.

The model is an engine of DSPy's own kind that always gives the same response: everything DSPy does around a call is
done (formatting, the request, history, parsing), and no network, cache or pricing table is in the way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import dspy
from dspy.clients import base_lm
from dspy.lm15 import Message, Request, Response, Usage, response_to_events

ANSWER = "blue"
MODEL = "openai/gpt-4o-mini"

PROGRAMS = {"predict": "Predict", "nested": "3 nested modules", "large": "Predict, 20 kB prompt"}
"""Key and title of every program; the wrappers of ``Opener`` are called once for each of their DSPy calls."""

Opener = Callable[..., Any]
"""Stands in for one DSPy call: takes the original ``__call__`` and its arguments, gives its result."""


class NoOpEngine:
    """An LM engine that answers at once, with a response id, a finish reason and token counts."""

    response = Response(
        id="resp-1",
        model="gpt-4o-mini-2024-07-18",
        message=Message.assistant(f"[[ ## answer ## ]]\n{ANSWER}\n\n[[ ## completed ## ]]"),
        finish_reason="stop",
        usage=Usage(input_tokens=120, output_tokens=12),
    )

    def complete(self, request: Request) -> Response:
        """Give the response."""
        return self.response

    def stream(self, request: Request) -> Iterator[Any]:
        """Give the response as events."""
        return response_to_events(self.response)

    def close(self) -> None:
        """Nothing is held."""


class Inner(dspy.Module):
    """The innermost of three nested modules: one Predict."""

    def __init__(self, predict: dspy.Module):
        super().__init__()
        self.predict = predict

    def forward(self, question: str) -> Any:
        """Hand the question on."""
        return self.predict(question=question)


class Middle(Inner):
    """The module in the middle."""


class Outer(Inner):
    """The outermost module."""


def by_hand(cls: type, opener: Opener) -> type:
    """Subclass of ``cls`` whose ``__call__`` goes through ``opener``; its source, which optimizers show, is that of
    ``cls``.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return opener(cls.__call__, self, *args, **kwargs)

    own = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), {**own, "__call__": __call__})


class Workload:
    """One program of ``PROGRAMS`` with its LM and its input.

    ``openers`` has one opener for each DSPy call, from the outermost module to the LM call (ValueError when the number
    is another), or is None for the bare program.
    """

    def __init__(self, key: str, openers: list[Opener] | None = None):
        nesting = [Outer, Middle, Inner] if key == "nested" else []
        classes: list[type] = [*nesting, dspy.Predict, dspy.LM]
        if openers is not None and len(openers) != len(classes):
            raise ValueError(f"{key}: {len(classes)} DSPy calls, but {len(openers)} recorded spans to write by hand")
        if openers is not None:
            classes = [by_hand(cls, opener) for cls, opener in zip(classes, openers, strict=True)]
        *modules, predict, lm = classes
        self.lm = lm(MODEL, engine=NoOpEngine(), cache=False, temperature=0.7, max_tokens=1000)
        self.program = predict("question -> answer")
        for module in reversed(modules):
            self.program = module(self.program)
        self.asked = itertools.count()
        self.question = "What colour is the sky? " * (20_000 // 24 if key == "large" else 1)

    def run(self, calls: int) -> None:
        """Call the program ``calls`` times; RuntimeError when the last answer is wrong: that is not worth timing."""
        prediction = None
        with dspy.context(lm=self.lm):
            for _ in range(calls):
                # Another one each time: what is kept of a text must not make the next call cheaper.
                prediction = self.program(question=f"{self.question}({next(self.asked)})")
        if prediction is None or prediction.answer != ANSWER:
            raise RuntimeError(f"the program gave {prediction!r}")

    def forget(self) -> None:
        """Empty DSPy's histories, so that every measured cell starts from the same heap."""
        base_lm.GLOBAL_HISTORY.clear()
        self.lm.history.clear()
        for module in [self.program, *(m for _, m in self.program.named_sub_modules())]:
            module.history.clear()
