"""Everybody in one process: four instrumentations of DSPy, and those of LiteLLM, OpenAI's SDK, HTTPX and threads.

What doubles what here is the table in docs/coexistence.md.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.support.openai_server import openai_server
from tests.switching.process import Finished, script
from tests.switching.test_neighbours import needs

pytestmark = [
    pytest.mark.integration,
    needs("mlflow.dspy", "mlflow"),
    needs("logfire", "logfire"),
    needs("openinference.instrumentation.dspy", "openinference-instrumentation-dspy"),
    needs("openinference.instrumentation.litellm", "openinference-instrumentation-litellm"),
    needs("opentelemetry.instrumentation.genai.dspy", "opentelemetry-instrumentation-genai-dspy"),
    needs("opentelemetry.instrumentation.genai.openai", "opentelemetry-instrumentation-genai-openai"),
    needs("opentelemetry.instrumentation.httpx", "opentelemetry-instrumentation-httpx"),
    needs("opentelemetry.instrumentation.threading", "opentelemetry-instrumentation-threading"),
]

OURS = "dspy_otel"
OPENINFERENCE = "openinference.instrumentation.dspy"
OFFICIAL = "opentelemetry.instrumentation.genai.dspy"
LITELLM = "openinference.instrumentation.litellm"
OPENAI = "opentelemetry.instrumentation.genai.openai"
LOGFIRE = "logfire.openai"
HTTPX = "opentelemetry.instrumentation.httpx"

# Our spans alone, whoever stands between them.
_REPLY = "ChainOfThought reply(Predict reply.predict(chat gpt-{}))"
_CALL = f"invoke_workflow App(execute_tool look_up {_REPLY})"
_LITELLM = _CALL.format("litellm")
TREES = [
    f"example App({_LITELLM})",
    f"example App({_LITELLM})",
    " ".join(
        (
            f"request({_CALL.format('native')} {_LITELLM} {_CALL.format('sdk')}",
            f"invoke_workflow App({_REPLY.format('litellm')})",
            f"parallel({_LITELLM} {_LITELLM})",
            "evaluate App)",
        )
    ),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    with openai_server() as server:
        return script(Path(__file__).with_name("together.py"), server.url, cwd=tmp_path_factory.mktemp("together"))


@pytest.fixture(params=["first", "last"])
def report(done: Finished, request: pytest.FixtureRequest) -> Any:
    """With ours switched on before all others, or after them."""
    return json.loads(done.output)[request.param]


class Spans:
    """Spans of one phase, as a forest."""

    def __init__(self, spans: list[dict[str, Any]]) -> None:
        self.all = spans
        self.by_id = {span["id"]: span for span in spans}
        self.below: defaultdict[int | None, list[dict[str, Any]]] = defaultdict(list)
        for span in spans:
            self.below[span["parent"]].append(span)

    def trees(self) -> list[str]:
        """The application's spans and ours, in the order of their start."""
        return sorted(text for root in self.below[None] for text in self._shown(root))

    def _shown(self, span: dict[str, Any]) -> list[str]:
        inner = " ".join(text for child in self.below[span["id"]] for text in self._shown(child))
        if span["scope"] in (OURS, "application"):
            return [f"{span['name']}({inner})" if inner else span["name"]]
        return [inner] if inner else []

    def ours_above(self, span: dict[str, Any]) -> str:
        """The name of the span of ours that is closest above."""
        parent = self.by_id[span["parent"]]
        return parent["name"] if parent["scope"] == OURS else self.ours_above(parent)


def test_the_program_does_the_same(report: Any):
    answers, callbacks = report["bare"]["came"]
    assert answers == ["the answer"] * 6 + [100.0]
    assert callbacks["on_lm_start"] == callbacks["on_lm_end"] == 8
    assert callbacks["on_module_end"] == 24
    for phase in ("together", "suppressed", "without us"):
        assert report[phase]["came"] == [answers, callbacks], phase


def test_every_span_has_its_parent(report: Any):
    spans = Spans(report["together"]["spans"])
    assert spans.trees() == TREES
    for span in spans.all:
        assert span["parent"] is None or spans.by_id[span["parent"]]["trace"] == span["trace"], span


def test_clients_stand_below_the_call_they_serve(report: Any):
    spans = Spans(report["together"]["spans"])
    above = defaultdict(Counter)
    for span in spans.all:
        if span["scope"] in (LITELLM, OPENAI, LOGFIRE, HTTPX):
            above[span["scope"]][spans.ours_above(span)] += 1
    assert above == {
        # DSPy's own engine uses none of them.
        LITELLM: {"chat gpt-litellm": 6},
        OPENAI: {"chat gpt-sdk": 1},  # LiteLLM goes past what it watches
        LOGFIRE: {"chat gpt-litellm": 6, "chat gpt-sdk": 1},
        HTTPX: {"chat gpt-litellm": 5, "execute_tool look_up": 7},  # asynchronous LiteLLM has aiohttp
    }


def test_what_is_double(report: Any):
    names = defaultdict(Counter)
    for span in report["together"]["spans"]:
        names[span["scope"]][span["name"]] += 1
    assert names[OFFICIAL] == {"chat gpt-native": 1, "chat gpt-litellm": 6, "execute_tool look_up": 7}
    theirs = names[OPENINFERENCE]
    assert theirs["LM.__call__"] + theirs["LM.acall"] == 7  # not the LM that is a class of the user's
    assert theirs["look_up.__call__"] == 7
    assert theirs["Predict.forward"] == theirs["Predict(StringSignature).forward"] - 1 == 7
    assert report["durations"] == [OURS, OFFICIAL, OPENAI]
    assert report["together"]["mlflow"] == 8  # one for each program


def test_suppressed_is_suppressed(report: Any):
    assert [span["name"] for span in report["suppressed"]["spans"]] == ["request"]


def test_the_others_go_on_without_us(report: Any):
    together, alone = (
        Counter(span["scope"] for span in report[phase]["spans"]) for phase in ("together", "without us")
    )
    assert together.pop(OURS) == 43
    assert alone == together
    assert Spans(report["without us"]["spans"]).trees() == ["request"]
    assert report["without us"]["mlflow"] - report["suppressed"]["mlflow"] == report["together"]["mlflow"]


def test_each_is_warned_of_once(done: Finished):
    said = Counter(line.split(" is active too")[0].removeprefix("dspy-otel: ") for line in done.warnings)
    assert said == dict.fromkeys(
        ("openinference-instrumentation-dspy", "opentelemetry-instrumentation-genai-dspy", "mlflow.dspy.autolog"), 2
    )  # in two processes
