"""What an LM answered: from DSPy's result of a call to its tokens, cost and attributes. Pure mapping."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.content.introspection import field, is_a
from dspy_otel.content.names import LONGEST, plain_name, plain_word
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.usage import LMUsage

_MOST_CHOICES: Final = 1000


@dataclasses.dataclass(frozen=True)
class LMResponse:
    """What came back from one LM call, whichever engine made it.

    Attributes:
        outputs: DSPy's list of texts or dictionaries, one for each candidate.
        usage: usage counters as DSPy reports them; empty on a cache hit.
        cost: US dollars as DSPy prices the answer, also on a cache hit; ``None`` when it cannot.
        cache_hit: answered from DSPy's cache.
        model: the model that answered.
        response_id: the provider's id of the answer.
        finish_reasons: one for each candidate.
    """

    outputs: list[Any]
    usage: Mapping[str, Any]
    cost: float | None
    cache_hit: bool
    model: str | None
    response_id: str | None
    finish_reasons: list[str]


def short_text(value: Any) -> str | None:
    """``value`` if it is a text, as a plain name; ``None`` for an empty one and for anything else."""
    text = introspection.text(value, LONGEST)
    return plain_name(text) if text else None


def finish_reason(value: Any) -> str | None:
    """Why an answer ended, as the server says it, if it is a word; ``None`` for nothing."""
    text = introspection.text(value, LONGEST)
    return plain_word(text) if text else None


def usage_counters(usage: Any) -> dict[str, Any]:
    """Usage counters as they were reported: a dictionary, or the fields of a response's usage."""
    return dict(dict.items(usage)) if is_a(usage, dict) else dict(introspection.instance_dict(usage))


def response_of_call_result(result: Any) -> LMResponse:
    """From DSPy 3.4's ``CallResult``: lm15 responses, or the raw response of LiteLLM or a custom LM."""
    responses = result.responses
    if responses:
        reasons = [reason for each in responses if (reason := finish_reason(each.finish_reason))]
        response_id = short_text(getattr(responses[0], "id", None))
    else:
        reasons, response_id = choice_reasons(result.raw), short_text(field(result.raw, "id"))
    return LMResponse(
        outputs=list(result.outputs),
        usage=usage_counters(result.usage),
        cost=introspection.real(result.cost),
        cache_hit=bool(result.cache_hit),
        model=short_text(result.response_model),
        response_id=response_id,
        finish_reasons=reasons,
    )


def combined(first: LMResponse, last: LMResponse) -> LMResponse:
    """One response of two requests: the last answer, with usage and cost of both, where they were billed."""
    if first.cache_hit:
        return last
    if last.cache_hit:
        return dataclasses.replace(last, usage=first.usage, cost=first.cost, cache_hit=False)
    cost = last.cost if first.cost is None else first.cost if last.cost is None else first.cost + last.cost
    return dataclasses.replace(last, usage=_sum(first.usage, last.usage), cost=cost)


def _sum(first: Any, last: Any) -> dict[str, Any]:
    """Counters of both, nested ones too."""
    total = dict(first)
    for name, value in dict(last).items():
        before = total.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            total[name] = _sum(before, value)
        elif isinstance(before, (int, float)) and isinstance(value, (int, float)):
            total[name] = before + value
        elif value is not None:
            total[name] = value
    return total


def choice_reasons(response: Any) -> list[str]:
    """Finish reasons of an OpenAI-shaped response, one for each choice (the Responses API gives one status)."""
    choices = field(response, "choices")
    if introspection.length(choices) is None:
        if introspection.text(field(response, "status")) == "completed":
            return ["stop"]
        reason = finish_reason(field(field(response, "incomplete_details"), "reason"))
        return [reason] if reason else []
    first, _ = introspection.bounded(choices, _MOST_CHOICES)
    return [reason for choice in first if (reason := finish_reason(field(choice, "finish_reason")))]


def _count(holder: Any, key: str, counters: Mapping[str, Any], other: str) -> int | None:
    """The counter ``key`` of ``holder``, or else ``other`` of ``counters``; ``None`` when neither has one."""
    number = None if holder is None else introspection.whole(field(holder, key))
    return introspection.whole(counters.get(other)) if number is None else number


def lm_usage(response: LMResponse | None) -> LMUsage:
    """Tokens and billed cost of a call.

    Counters that are all zero, and the price of nothing, were not reported (LiteLLM's streams), and are left out.
    """
    if response is None:
        return LMUsage()
    if response.cache_hit:
        return LMUsage(cost=0.0 if response.cost is not None else None, cache_hit=True)
    counters = response.usage
    inputs = _count(counters, "prompt_tokens", counters, "input_tokens")
    outputs = _count(counters, "completion_tokens", counters, "output_tokens")
    if not inputs and not outputs:
        return LMUsage(cost=response.cost or None)
    return LMUsage(inputs, outputs, response.cost)


def response_attributes(response: LMResponse, usage: LMUsage) -> Attributes:
    """What came back, with usage and cost of this very call."""
    attributes: Attributes = {semconv.LM_CACHE_HIT: response.cache_hit}
    if response.model is not None:
        attributes[semconv.GEN_AI_RESPONSE_MODEL] = response.model
    if response.response_id is not None:
        attributes[semconv.GEN_AI_RESPONSE_ID] = response.response_id
    if response.finish_reasons:
        attributes[semconv.GEN_AI_RESPONSE_FINISH_REASONS] = response.finish_reasons
    if usage.cost is not None:
        attributes[semconv.LM_COST] = usage.cost
    if response.cache_hit:
        if response.cost is not None:
            attributes[semconv.LM_COST_SAVED] = response.cost
        return attributes
    if usage.input_tokens is None and usage.output_tokens is None:
        return attributes
    counters = response.usage
    prompt, completion = counters.get("prompt_tokens_details"), counters.get("completion_tokens_details")
    prompt = counters.get("input_tokens_details") if prompt is None else prompt
    completion = counters.get("output_tokens_details") if completion is None else completion
    for key, tokens in (
        (semconv.GEN_AI_USAGE_INPUT_TOKENS, usage.input_tokens),
        (semconv.GEN_AI_USAGE_OUTPUT_TOKENS, usage.output_tokens),
        # Nested as OpenAI does it, else flat as DSPy 3.3's typed responses have it.
        (semconv.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS, _count(prompt, "cached_tokens", counters, "cache_read_tokens")),
        (
            semconv.GEN_AI_USAGE_CACHE_WRITE_INPUT_TOKENS,
            _count(prompt, "cache_creation_tokens", counters, "cache_write_tokens"),
        ),
        (
            semconv.GEN_AI_USAGE_REASONING_OUTPUT_TOKENS,
            _count(completion, "reasoning_tokens", counters, "reasoning_tokens"),
        ),
    ):
        if tokens is not None:
            attributes[key] = tokens
    return attributes


_ANSWERED: Final = frozenset({"APIStatusError", "HTTPStatusError"})
_UNANSWERED: Final = frozenset({"APIConnectionError", "TransportError", "ConnectionError"})
_MOST_CAUSES: Final = 16


def was_answered(error: BaseException) -> bool:
    """Whether an HTTP answer may be behind an error: LiteLLM says 500 for a connection that was refused, too.

    The classes of OpenAI's client and httpx tell, and Python's own.
    """
    cause: BaseException | None = error
    for _ in range(_MOST_CAUSES):
        if cause is None:
            break
        names = {introspection.name_of(base) for base in introspection.bases_of(type(cause))}
        if introspection.library(type(cause)) in ("openai", "httpx", "builtins"):
            if names & _ANSWERED:
                return True
            if names & _UNANSWERED:
                return False
        cause = introspection.cause_of(cause) or introspection.context_of(cause)
    return True


def error_attributes(error: BaseException) -> Attributes:
    """HTTP status and request id of a failed request, where DSPy's ``LMError`` knows them."""
    attributes: Attributes = {}
    status = introspection.whole(field(error, "status"))
    if status is not None and was_answered(error):
        attributes[semconv.HTTP_STATUS_CODE] = status
    request_id = short_text(field(error, "request_id"))
    if request_id is not None:
        attributes[semconv.LM_REQUEST_ID] = request_id
    return attributes
