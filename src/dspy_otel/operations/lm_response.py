"""What an LM answered: from DSPy's result of a call to its tokens, cost and attributes. Pure mapping."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any, Final, NamedTuple

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.content.introspection import field, is_a
from dspy_otel.content.names import LONGEST, plain_name, plain_word
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.usage import LMUsage
from dspy_otel.operations.lm_request import is_loopback

_MOST_CHOICES: Final = 1000
_MADE_BY_LITELLM: Final = re.compile(r"chatcmpl-[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")


class LMResponse(NamedTuple):
    """What came back from one LM call, whichever engine made it.

    Attributes:
        outputs: DSPy's list of texts or dictionaries, one for each candidate.
        usage: usage counters as DSPy reports them; empty on a cache hit.
        cost: US dollars as DSPy prices the answer, also on a cache hit; ``None`` when it cannot.
        cache_hit: answered from DSPy's cache.
        model: the model that answered, as the server names it; ``None`` where only the request says it.
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
    text = introspection.text(value)
    return plain_name(text) if text else None


def finish_reason(value: Any) -> str | None:
    """Why an answer ended, as the server says it, if it is a word; ``None`` for nothing."""
    text = introspection.text(value, LONGEST)
    return plain_word(text) if text else None


def usage_counters(usage: Any) -> dict[str, Any]:
    """Usage counters as they were reported: a dictionary, or the fields of a response's usage."""
    return dict(dict.items(usage)) if is_a(usage, dict) else dict(introspection.instance_dict(usage))


def response_of_call_result(result: Any, requested: Any, stream: Any = None, by_litellm: bool = False) -> LMResponse:
    """From DSPy 3.4's ``CallResult``: lm15 responses, or the raw response of LiteLLM or a custom LM.

    Args:
        result: what ``execution.finalize`` is given.
        requested: DSPy's name of the model, with its provider.
        stream: LiteLLM's stream of chunks, if the answer came in one.
        by_litellm: whether LiteLLM's engine has made the lm15 responses.
    """
    responses, raw = result.responses, result.raw
    usage, cost, cache_hit = usage_counters(result.usage), introspection.real(result.cost), bool(result.cache_hit)
    if responses:
        reasons = [reason for each in responses if (reason := finish_reason(each.finish_reason))]
        model, response_id = _model_of_lm15(responses[0]), _id_of_lm15(responses[0])
        if by_litellm:
            model, response_id = without_provider(model, requested), _not_made_up(response_id)
    else:
        litellm = is_litellm(raw)
        reasons, response_id = choice_reasons(raw), id_of_litellm(raw) if litellm else field(raw, "id")
        streamed = litellm and was_streamed(raw)
        model = model_of_litellm(raw, requested, streamed) if litellm else result.response_model
        if cache_hit and streamed:
            cost = None  # DSPy keeps the price, but not whether anybody counted what it is for.
    if stream is not None:
        model, usage = reported_in_stream(stream)
        model = without_provider(model, requested)
        cost = cost if lm_tokens(usage) != (None, None) else None
    return LMResponse(list(result.outputs), usage, cost, cache_hit, short_text(model), short_text(response_id), reasons)


def _model_of_lm15(response: Any) -> Any:
    """The model as the server names it: lm15 gives the request's name where a server, or its stream, has none."""
    body: Any = getattr(response, "provider_data", None)
    if not is_a(body, dict):
        return response.model  # a custom engine's
    named = introspection.text(field(body, "model")) or introspection.text(field(body, "modelVersion"))
    # Anthropic's streams name model and id in their first event; the body is their last one.
    return named or (response.model if response.id is not None and field(body, "id") is None else None)


def _id_of_lm15(response: Any) -> Any:
    """The id of the answer; lm15 has it of a chat stream only in the body of its last event."""
    found = getattr(response, "id", None)
    return field(getattr(response, "provider_data", None), "id") if found is None else found


def id_of_litellm(response: Any) -> str | None:
    """The server's id of an answer of LiteLLM, which makes one up where the server gives none."""
    return _not_made_up(field(response, "id"))


def _not_made_up(response_id: Any) -> str | None:
    found = introspection.text(response_id, LONGEST)
    return None if found is None or _MADE_BY_LITELLM.fullmatch(found) else found


def is_litellm(response: Any) -> bool:
    """Whether LiteLLM has made it."""
    return introspection.library(type(response)) == "litellm"


def was_streamed(response: Any) -> bool:
    """Whether LiteLLM has put its response together from chunks: those say when they were made."""
    return field(field(response, "_hidden_params"), "created_at") is not None


def model_of_litellm(response: Any, requested: Any, streamed: bool) -> Any:
    """The model as the server names it: in answers put together from chunks, LiteLLM gives the request's name."""
    model = field(response, "model")
    if streamed:
        model = field(field(response, "_hidden_params"), "provider_response_model")
    return without_provider(model, requested)


def without_provider(model: Any, requested: Any) -> Any:
    """``model`` without the provider that LiteLLM puts before the server's name for it, where it does.

    A server's own name may begin like that as well, if the requested one does.
    """
    name = introspection.text(model, LONGEST)
    provider, slash, wire_model = (introspection.text(requested) or "").partition("/")
    prefix = provider + slash
    if not name or not slash or not name.startswith(prefix):
        return name
    return name if wire_model.startswith(prefix) and not name.startswith(2 * prefix) else name[len(prefix) :]


def reported_in_stream(stream: Any) -> tuple[Any, dict[str, Any]]:
    """The server's model and usage counters, from LiteLLM's stream.

    What LiteLLM puts together from the chunks has its own count of tokens where the server reported none.
    """
    model: Any = None
    usage: dict[str, Any] = {}
    for chunk in introspection.items(field(stream, "chunks")):
        named = field(field(chunk, "_hidden_params"), "provider_response_model")
        model = model if named is None else named
        for name, value in usage_counters(field(chunk, "usage")).items():
            # Some servers report zeros until the end, some one counter at the beginning and the other at the end.
            if value is not None and not (name in usage and introspection.whole(value) == 0):
                usage[name] = value
    return model, usage


def combined(first: LMResponse, last: LMResponse) -> LMResponse:
    """One response of two requests: the last answer, with usage and cost of both, where they were billed."""
    if first.cache_hit:
        return last
    if last.cache_hit:
        return last._replace(usage=first.usage, cost=first.cost, cache_hit=False)
    cost = last.cost if first.cost is None else first.cost if last.cost is None else first.cost + last.cost
    return last._replace(usage=_sum(first.usage, last.usage), cost=cost)


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
    first = islice(introspection.items(choices), _MOST_CHOICES)
    return [reason for choice in first if (reason := finish_reason(field(choice, "finish_reason")))]


def _count(holder: Any, key: str, counters: Mapping[str, Any], other: str) -> int | None:
    """The counter ``key`` of ``holder``, or else ``other`` of ``counters``; ``None`` when neither has one."""
    number = None if holder is None else introspection.whole(field(holder, key))
    return introspection.whole(counters.get(other)) if number is None else number


_DETAILS: Final = frozenset({"cache_read_tokens", "cache_write_tokens", "reasoning_tokens"})


def lm_usage(response: LMResponse | None) -> LMUsage:
    """Tokens and billed cost of a call.

    Counters that are all zero, and the price of nothing, were not reported (LiteLLM's streams), and are left out.
    """
    if response is None:
        return LMUsage()
    if response.cache_hit:
        return LMUsage(cost=0.0 if response.cost is not None else None, cache_hit=True)
    inputs, outputs = lm_tokens(response.usage)
    if inputs is None and outputs is None:
        return LMUsage(cost=response.cost or None)
    return LMUsage(inputs, outputs, response.cost)


def lm_tokens(counters: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Input and output tokens; both unknown if both are zero."""
    inputs = introspection.whole(counters.get("prompt_tokens"))
    if inputs is None:
        inputs = introspection.whole(counters.get("input_tokens"))
    outputs = introspection.whole(counters.get("completion_tokens"))
    if outputs is None:
        outputs = introspection.whole(counters.get("output_tokens"))
    return (inputs, outputs) if inputs or outputs else (None, None)


def answer_attributes(response: LMResponse) -> Attributes:
    """What answers of the same kind share: where they come from, and why they ended."""
    attributes: Attributes = {semconv.LM_CACHE_HIT: response.cache_hit}
    if response.model is not None:
        attributes[semconv.GEN_AI_RESPONSE_MODEL] = response.model
    if response.finish_reasons:
        attributes[semconv.GEN_AI_RESPONSE_FINISH_REASONS] = tuple(response.finish_reasons)
    return attributes


def usage_attributes(response: LMResponse, usage: LMUsage, host: Any = None) -> Attributes:
    """The id of this very answer, with its usage and cost.

    Args:
        response: of the call.
        usage: of it.
        host: name or address of the server, if that is known.
    """
    attributes: Attributes = {}
    if response.response_id is not None:
        attributes[semconv.GEN_AI_RESPONSE_ID] = response.response_id
    if usage.cost is not None:
        attributes[semconv.LM_COST] = usage.cost
        if host is not None and is_loopback(host):
            attributes[semconv.LM_COST_LOOPBACK] = True
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
    if usage.input_tokens is not None:
        attributes[semconv.GEN_AI_USAGE_INPUT_TOKENS] = usage.input_tokens
    if usage.output_tokens is not None:
        attributes[semconv.GEN_AI_USAGE_OUTPUT_TOKENS] = usage.output_tokens
    if prompt is None and completion is None and _DETAILS.isdisjoint(counters):
        return attributes
    for key, tokens in (
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
