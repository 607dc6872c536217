"""Programs and helpers that several scenarios share."""

from __future__ import annotations

import dspy
import pytest
from dspy.utils import DummyLM

from tests.support.older import DSPY as VERSION

NATIVE = VERSION >= (3, 4)
"""DSPy 3.4 and later: its own engine, explicit requests, retries of its own."""

only_native = pytest.mark.skipif(not NATIVE, reason="before 3.4, LiteLLM serves every dspy.LM")


class Hop(dspy.Module):
    """One step of a chain, with a module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.generate = dspy.ChainOfThought("question -> query")

    def forward(self, question: str) -> dspy.Prediction:
        return self.generate(question=question)

    async def aforward(self, question: str) -> dspy.Prediction:
        return await self.generate.acall(question=question)


class Research(dspy.Module):
    """A program with modules in a list, a dictionary, and a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.hops = [Hop(), Hop()]
        self.writers = {"short": dspy.Predict("query -> answer"), "long": dspy.Predict("query -> answer")}
        self.check = dspy.Predict("answer -> good: bool")

    def forward(self, question: str) -> dspy.Prediction:
        for hop in self.hops:
            question = hop(question=question).query
        answer = self.writers["short"](query=question).answer
        return dspy.Prediction(answer=answer, good=self.check(answer=answer).good)

    async def aforward(self, question: str) -> dspy.Prediction:
        for hop in self.hops:
            question = (await hop.acall(question=question)).query
        answer = (await self.writers["short"].acall(query=question)).answer
        return dspy.Prediction(answer=answer, good=(await self.check.acall(answer=answer)).good)


RESEARCH_ANSWERS = [
    {"reasoning": "because one", "query": "first query"},
    {"reasoning": "because two", "query": "second query"},
    {"answer": "the answer"},
    {"good": "True"},
]


def dummy(*answers: dict[str, str]) -> DummyLM:
    """A DSPy DummyLM that gives these answers, in order."""
    return DummyLM(list(answers))
