"""What only older DSPy versions need: results and streams of LM calls before 3.4, and RLM's threads before 3.3."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from dspy_otel.content import introspection
from dspy_otel.content.introspection import field
from dspy_otel.core.call_context import current_state
from dspy_otel.core.internal_errors import guard
from dspy_otel.operations.lm import LMCallState
from dspy_otel.operations.lm_response import (
    LMResponse,
    choice_reasons,
    id_of_litellm,
    is_litellm,
    model_of_litellm,
    short_text,
    usage_counters,
    was_streamed,
)
from dspy_otel.operations.parallel import bind
from dspy_otel.patching import argument

_STREAM: Final = guard("LM stream")


# --- LM calls ----------------------------------------------------------------------------------------------------


def record_response(lm: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
    """After ``BaseLM._process_lm_response(response, ...)``: the call's own response, and its engine."""
    state = current_state(LMCallState)
    if state is None:
        return
    response = argument(args, kwargs, 0, "response")
    streamed = is_litellm(response) and (state.chunks > 0 or was_streamed(response))
    answer = response_of_openai(response, outputs, field(lm, "model"), streamed)
    state.response = as_counted(answer, state.usage_requested) if streamed else answer
    # DSPy's own LM has one engine. The class of any other LM is enough.
    if any(introspection.module_of(base) == "dspy.clients.lm" for base in introspection.bases_of(type(lm))):
        state.engine = "litellm"


def record_typed_response(lm: Any, args: tuple[Any, ...], kwargs: dict[str, Any], response: Any) -> None:
    """After ``BaseLM._finalize_lm_response(request, response, ...)`` (3.3, typed requests): likewise."""
    state = current_state(LMCallState)
    if state is not None:
        state.response = response_of_typed(response)


def as_counted(answer: LMResponse, requested: bool) -> LMResponse:
    """``answer``, which LiteLLM has put together from chunks, without what it has counted itself.

    Whoever asks for usage in a stream gets the server's; but not for reasoning, which LiteLLM always counts.

    Args:
        answer: of the call.
        requested: whether usage was asked for. For an answer from the cache that is not known.
    """
    if not requested:
        return answer._replace(usage={}, cost=None)
    usage = {name: value for name, value in answer.usage.items() if name != "completion_tokens_details"}
    return answer._replace(usage=usage)


def response_of_openai(response: Any, outputs: Any, requested: Any, streamed: bool) -> LMResponse:
    """From the response in OpenAI's format that LMs return.

    Args:
        response: what the LM returned.
        outputs: what DSPy made of it.
        requested: DSPy's name of the model, with its provider.
        streamed: LiteLLM has put it together from chunks.
    """
    litellm = is_litellm(response)
    model = model_of_litellm(response, requested, streamed) if litellm else field(response, "model")
    return LMResponse(
        outputs=list(introspection.items(outputs)),
        usage=usage_counters(field(response, "usage")),
        cost=introspection.real(field(field(response, "_hidden_params"), "response_cost")),
        cache_hit=field(response, "cache_hit") is True,
        model=short_text(model),
        response_id=short_text(id_of_litellm(response) if litellm else field(response, "id")),
        finish_reasons=choice_reasons(response),
    )


def response_of_typed(response: Any) -> LMResponse:
    """From DSPy 3.3's experimental ``LMResponse``."""
    usage = getattr(response, "usage", None)
    dump = getattr(usage, "model_dump", None)
    return LMResponse(
        outputs=list(response.to_legacy_outputs()),
        usage=dump() if callable(dump) else dict(usage or {}),
        cost=getattr(response, "cost", None),
        cache_hit=bool(getattr(response, "cache_hit", False)),
        model=short_text(getattr(response, "model", None)),
        response_id=short_text(getattr(response, "response_id", None)),
        finish_reasons=[
            str(output.finish_reason)
            for output in getattr(response, "outputs", ())
            if getattr(output, "finish_reason", None)
        ],
    )


def counting_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of ``clients.lm._get_stream_completion_fn``, which takes the stream of chunks from DSPy's settings."""

    def _get_stream_completion_fn(*args: Any, **kwargs: Any) -> Any:
        counted = _counted_stream()
        if counted is None:
            return original(*args, **kwargs)
        with sys.modules["dspy"].settings.context(send_stream=counted):
            function = original(*args, **kwargs)
        with _STREAM:
            options = field(argument(args, kwargs, 0, "request"), "stream_options")
            counted.state.usage_requested = field(options, "include_usage") is True
        return function

    return _get_stream_completion_fn


@_STREAM
def _counted_stream() -> _CountedStream | None:
    """In place of the stream of the LM call that is going on, if there is one."""
    stream, state = sys.modules["dspy"].settings.send_stream, current_state(LMCallState)
    return None if stream is None or state is None else _CountedStream(stream, state)


class _CountedStream:
    """A stream that counts each chunk before it is sent."""

    def __init__(self, stream: Any, state: LMCallState) -> None:
        self._stream = stream
        self.state = state

    async def send(self, chunk: Any) -> None:
        with _STREAM:
            self.state.count_chunk(time.perf_counter())
        await self._stream.send(chunk)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# --- threads -----------------------------------------------------------------------------------------------------


class BoundPool(ThreadPoolExecutor):
    """A pool whose work belongs to the span it was submitted in."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Like ``ThreadPoolExecutor.submit``."""
        return super().submit(bind(fn), *args, **kwargs)


def needs_bound_pool(rlm: Any) -> bool:
    """Whether ``dspy.predict.rlm`` runs ``llm_query_batched`` in a pool that has no context (3.1 and 3.2)."""
    own = vars(rlm) if rlm is not None else {}
    return own.get("ThreadPoolExecutor") is ThreadPoolExecutor and "contextvars" not in own
