"""Modules that run a program several times and choose."""

from __future__ import annotations

import dspy

from tests.operations.common import dummy


class Asker(dspy.Module):
    def __init__(self):
        super().__init__()
        self.ask = dspy.Predict("question -> answer")

    def forward(self, question):
        return self.ask(question=question)


def one_word(arguments, prediction):
    return float(len(prediction.answer.split()) == 1)


def test_best_of_n(telemetry, server, snapshot):
    telemetry.instrument()
    server.answers["answer"] = "two words"
    with dspy.context(lm=server.lm()):
        dspy.BestOfN(Asker(), N=3, reward_fn=one_word, threshold=1.0)(question="x")
    snapshot(telemetry.tree())


def test_refine(telemetry, server, snapshot):
    telemetry.instrument()
    server.answers["answer"] = "two words"
    server.answers["advice"] = '{"ask": "use one word"}'
    with dspy.context(lm=server.lm()):
        dspy.Refine(Asker(), N=2, reward_fn=one_word, threshold=1.0)(question="x")
    snapshot(telemetry.tree(attributes=False))


def test_multi_chain_comparison(telemetry, snapshot):
    telemetry.instrument()
    completions = [dspy.Prediction(reasoning=f"r{number}", answer="a") for number in range(3)]
    with dspy.context(lm=dummy({"rationale": "because", "answer": "a"})):
        dspy.MultiChainComparison("question -> answer")(completions, question="x")
    snapshot(telemetry.tree())
