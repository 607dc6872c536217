"""Usage and cost, counted once: LMs that price without counting, that ask other LMs, or call themselves twice."""

from __future__ import annotations

from types import SimpleNamespace as Bag
from typing import Any

import dspy
import pytest

from dspy_otel.core.usage import LMUsage
from dspy_otel.operations.lm_response import LMResponse, lm_usage
from tests.support.chat import chat
from tests.support.spans import Recorder


class Priced(dspy.BaseLM):
    def __init__(self, model: str = "p/m", usage: Any = None, cost: float | None = 0.5) -> None:
        super().__init__(model, cache=False)
        self.usage = usage or {}
        self.cost = cost

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        message = Bag(content="[[ ## answer ## ]]\nx\n[[ ## completed ## ]]", tool_calls=None, reasoning_content=None)
        return Bag(
            id="i",
            model="m",
            choices=[Bag(message=message, finish_reason="stop", index=0)],
            usage=dict(self.usage),
            _hidden_params={"response_cost": self.cost},
        )


COUNTED = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


class Asks(Priced):
    """Asks other LMs, and reports some usage."""

    def __init__(self, inner: list[dspy.BaseLM], usage: Any, cost: float | None) -> None:
        super().__init__("p/outer", usage, cost)
        self.inner = inner

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        for lm in self.inner:
            lm(prompt) if messages is None else chat(lm, messages)
        return super().forward(prompt, messages)


class Rejects(Priced):
    """Does not like the answer, which is billed all the same. DSPy 3.5 calls `generate`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        super().__call__(*args, **kwargs)
        raise ValueError("rejected")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        super().generate(*args, **kwargs)
        raise ValueError("rejected")


class Twice(Priced):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        super().__call__(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        super().generate(*args, **kwargs)
        return super().generate(*args, **kwargs)


def usage_of(telemetry: Recorder, lm: dspy.BaseLM) -> dict[str, Any]:
    telemetry.instrument()
    with dspy.context(lm=lm):
        dspy.Predict("question -> answer")(question="x")
    attributes = telemetry.only("invoke").attributes
    return {name[11:]: value for name, value in attributes.items() if name.startswith("dspy.usage.")}


def tokens(telemetry: Recorder) -> float:
    return sum(point.sum for point in telemetry.metric("gen_ai.client.token.usage"))


def test_a_cost_without_counters_is_a_cost(telemetry: Recorder) -> None:
    assert usage_of(telemetry, Priced()) == {"lm_calls": 1, "cache_hits": 0, "cost": 0.5}
    assert telemetry.only("chat").attributes["dspy.lm.cost"] == 0.5


@pytest.mark.parametrize("cost", [0.0, None])
def test_nothing_counted_and_no_price_is_not_known(cost: float | None) -> None:
    zeros = {"prompt_tokens": 0, "completion_tokens": 0}
    assert lm_usage(LMResponse([], zeros, cost, False, None, None, [])) == LMUsage()


@pytest.mark.parametrize(
    ("usage", "cost"), [({}, None), (COUNTED, 0.5), ({"prompt_tokens": 6, "completion_tokens": 8}, 1.0)]
)
def test_an_lm_that_hands_on_to_others_counts_nothing_itself(telemetry: Recorder, usage: Any, cost: Any) -> None:
    got = usage_of(telemetry, Asks([Priced(usage=COUNTED), Priced(usage=COUNTED)], usage, cost))
    assert got == {"lm_calls": 2, "cache_hits": 0, "input_tokens": 6, "output_tokens": 8, "cost": 1.0}
    assert len(telemetry.named("chat")) == 3
    assert tokens(telemetry) == 14


def test_an_lm_around_one_that_hands_on_counts_nothing_either(telemetry: Recorder) -> None:
    inner = Asks([Priced(usage=COUNTED)], COUNTED, 0.5)
    assert usage_of(telemetry, Asks([inner], COUNTED, 0.5))["lm_calls"] == 1


def test_an_override_that_calls_twice_has_the_sum(telemetry: Recorder) -> None:
    got = usage_of(telemetry, Twice(usage={**COUNTED, "completion_tokens_details": {"reasoning_tokens": 2}}))
    assert got == {"lm_calls": 1, "cache_hits": 0, "input_tokens": 6, "output_tokens": 8, "cost": 1.0}
    span = telemetry.only("chat").attributes
    assert span["gen_ai.usage.output_tokens"] == 8
    assert span["gen_ai.usage.reasoning.output_tokens"] == 4
    assert span["dspy.lm.cost"] == 1.0


def test_an_answer_that_an_override_rejects_is_counted(telemetry: Recorder) -> None:
    with pytest.raises(ValueError, match="rejected"):
        usage_of(telemetry, Rejects(usage=COUNTED))
    attributes = telemetry.only("invoke").attributes
    asked = len(telemetry.named("chat"))  # DSPy 3.3 asks again in another format.
    assert asked >= 1
    assert attributes["dspy.usage.lm_calls"] == asked
    assert attributes["dspy.usage.cost"] == 0.5 * asked
