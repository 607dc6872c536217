"""LM calls: every ``BaseLM``, on any engine, with the usage, cost and cache state of that very call."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from opentelemetry.trace import SpanKind

from dspy_otel import semconv
from dspy_otel.content import introspection, redaction
from dspy_otel.content.introspection import field, is_a
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext, current_call_context
from dspy_otel.core.errors import error_type, hide_frames
from dspy_otel.core.operation import Call, Operation, Start, openinference
from dspy_otel.core.usage import LMUsage, together
from dspy_otel.operations.messages import described, input_messages, output_messages, tool_definitions

# DSPy's model prefixes (LiteLLM's and lm15's provider ids) as the GenAI conventions name those providers.
PROVIDERS: Final[Mapping[str, str]] = {
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "google": "gcp.gemini",
    "vertex": "gcp.vertex_ai",
    "vertex_ai": "gcp.vertex_ai",
    "vertex-express": "gcp.vertex_ai",
    "mistral": "mistral_ai",
    "text-completion-openai": "openai",
    "xai": "x_ai",
    "watsonx": "ibm.watsonx.ai",
}

# Request parameters by name: their attribute, and whether it is a whole number.
_REQUEST_NUMBERS: Final = {
    "temperature": (semconv.GEN_AI_REQUEST_TEMPERATURE, False),
    "top_p": (semconv.GEN_AI_REQUEST_TOP_P, False),
    "frequency_penalty": (semconv.GEN_AI_REQUEST_FREQUENCY_PENALTY, False),
    "presence_penalty": (semconv.GEN_AI_REQUEST_PRESENCE_PENALTY, False),
    "max_tokens": (semconv.GEN_AI_REQUEST_MAX_TOKENS, True),
    "max_completion_tokens": (semconv.GEN_AI_REQUEST_MAX_TOKENS, True),
    "max_output_tokens": (semconv.GEN_AI_REQUEST_MAX_TOKENS, True),
    "seed": (semconv.GEN_AI_REQUEST_SEED, True),
    "top_k": (semconv.GEN_AI_REQUEST_TOP_K, True),
}
_MOST_STOPS: Final = 16
_MOST_CHOICES: Final = 1000
_LONGEST_ADDRESS: Final = 4096
_ENGINES: Final = {
    "LM15Engine": "lm15",
    "AsyncLM15Engine": "lm15",
    "LiteLLMEngine": "litellm",
    "AsyncLiteLLMEngine": "litellm",
    "LegacyEngine": "legacy",
    "AsyncLegacyEngine": "legacy",
}


@dataclasses.dataclass
class Outcome:
    """What DSPy knows of one finished LM call, whichever engine made it.

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


class LMOperation(Operation):
    """``BaseLM.__call__`` and ``acall``."""

    kind = "lm"

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> Start | None:
        context = CallContext(self.kind, instance, parent)
        settings = request_settings(instance, args, kwargs)
        own = getattr(instance, "kwargs", None)
        if own:
            self.telemetry.safely("LM settings", None, redaction.remember_settings, own)
        if kwargs:
            self.telemetry.safely("LM settings", None, redaction.remember_settings, kwargs)
        attributes = request_attributes(instance, settings)
        # Text that a user wrote: content, like the prompt.
        context.notes["stop"] = attributes.pop(semconv.GEN_AI_REQUEST_STOP_SEQUENCES, None)
        context.notes["request"] = attributes.copy()
        if context.role is not None:
            attributes[semconv.LM_ROLE] = context.role
        if context.program is not None:
            attributes[semconv.PROGRAM_NAME] = context.program.name
            if context.program.id is not None:
                attributes[semconv.PROGRAM_ID] = context.program.id
        openinference(attributes, self.telemetry, semconv.KIND_LLM)
        name = f"{attributes[semconv.GEN_AI_OPERATION_NAME]} {attributes[semconv.GEN_AI_REQUEST_MODEL]}"
        return Start(name, context, attributes, SpanKind.CLIENT)

    def overridden(
        self, context: CallContext, args: tuple[Any, ...], kwargs: dict[str, Any], override_of: type | None
    ) -> None:
        self._put_together(context)
        if "outcome" in context.notes:
            context.notes["earlier"] = context.notes.pop("outcome")

    def _put_together(self, context: CallContext) -> None:
        """One outcome of all the requests that an override made by calling what it overrides."""
        earlier = context.notes.pop("earlier", None)
        if earlier is not None:
            last = context.notes.get("outcome")
            context.notes["outcome"] = earlier if last is None else outcome_of_both(earlier, last)

    def detail(self, call: Call) -> Attributes:
        if not self.telemetry.config.content_on_spans:
            return {}
        nothing: Attributes = {}
        attributes = self.telemetry.safely("LM input content", nothing, self._input_content, call)
        stop = call.context.notes["stop"]
        if stop:
            shown = self.telemetry.safely("content", None, self._texts, stop)
            if shown is not None:
                attributes = {**attributes, semconv.GEN_AI_REQUEST_STOP_SEQUENCES: shown}
        return attributes

    def _texts(self, texts: list[str]) -> list[str]:
        return [self.telemetry.content.text(each) for each in texts]

    def _input_content(self, call: Call) -> Attributes:
        content = self.telemetry.content
        system, messages = input_messages(call.args, call.kwargs)
        described(messages, content.limit if content.media else 0)
        parts = (
            (semconv.GEN_AI_SYSTEM_INSTRUCTIONS, system),
            (semconv.GEN_AI_INPUT_MESSAGES, messages),
            (semconv.GEN_AI_TOOL_DEFINITIONS, tool_definitions(call.args, call.kwargs)),
        )
        return self._rendered((key, value) for key, value in parts if value)

    def _rendered(self, parts: Iterable[tuple[str, Any]]) -> Attributes:
        """Each part as JSON; one that cannot be (the user's ``redact`` raises) is left out."""
        texts = (
            (key, self.telemetry.safely("content", None, self.telemetry.content.json, part)) for key, part in parts
        )
        return {key: text for key, text in texts if text is not None}

    def result(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        notes = call.context.notes
        attributes: Attributes = {}
        if "engine" in notes:
            attributes[semconv.LM_ENGINE] = notes["engine"]
        if "provider" in notes:
            attributes[semconv.GEN_AI_PROVIDER_NAME] = notes["provider"]
        if "retries" in notes:
            attributes[semconv.LM_RETRIES] = notes["retries"]
        if "chunks" in notes:
            attributes[semconv.GEN_AI_REQUEST_STREAM] = True
            attributes[semconv.LM_CHUNKS] = notes["chunks"]
            attributes[semconv.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK] = notes["first_chunk"] - call.started
        if error is not None:
            attributes.update(error_attributes(error))
        outcome = notes.get("outcome")
        if outcome is not None:
            attributes.update(response_attributes(outcome, notes.get("usage") or lm_usage(outcome)))
            if self.telemetry.config.content_on_spans:
                messages = output_messages(outcome.outputs, outcome.finish_reasons)
                self.telemetry.put_content(attributes, semconv.GEN_AI_OUTPUT_MESSAGES, messages)
        return attributes

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        context = call.context
        self._put_together(context)
        outcome: Outcome | None = context.notes.get("outcome")
        usage = lm_usage(outcome)
        context.notes["usage"] = usage
        inside: list[LMUsage] | None = context.notes.get("inside")
        inner = functools.reduce(together, inside) if inside else None
        answered = error is None or outcome is not None  # An override may fail after an answer that was billed.
        if inner is not None and not _exceeds(usage, inner):
            # It only hands on what the LMs inside it did: they have been counted.
            usage = LMUsage(cache_hit=usage.cache_hit)
        elif answered:
            for totals in context.totals:
                totals.add(usage, context.role)
        if inner is not None:
            _tell_outer(context, together(inner, usage))
        elif answered:
            _tell_outer(context, usage)
        if self.telemetry.measuring:
            self._record(call, outcome, usage, error, seconds)
        if self.telemetry.config.content_on_events and call.span.get_span_context().trace_flags.sampled:
            self.telemetry.safely("LM content event", None, self._emit_details, call, outcome)

    def _record(
        self, call: Call, outcome: Outcome | None, usage: LMUsage, error: BaseException | None, seconds: float
    ) -> None:
        metrics, notes = self.telemetry.metrics, call.context.notes
        labels = metric_attributes(call.context, notes)
        if outcome is not None and outcome.model is not None:
            labels[semconv.GEN_AI_RESPONSE_MODEL] = outcome.model
        if usage.cache_hit:
            metrics.cache_hits.add(1, labels, call.otel_context)
        else:
            # An answer from the cache is no operation of the provider: it would hide how slow that is.
            timed = {**labels, semconv.ERROR_TYPE: error_type(error)} if error is not None else labels
            metrics.operation_duration.record(seconds, timed, call.otel_context)
            for kind, tokens in (
                (semconv.TOKEN_TYPE_INPUT, usage.input_tokens),
                (semconv.TOKEN_TYPE_OUTPUT, usage.output_tokens),
            ):
                if tokens is not None:
                    metrics.token_usage.record(tokens, {**labels, semconv.GEN_AI_TOKEN_TYPE: kind}, call.otel_context)
            if usage.cost:
                metrics.lm_cost.add(usage.cost, labels, call.otel_context)
        if "first_chunk" in notes:
            metrics.time_to_first_chunk.record(notes["first_chunk"] - call.started, labels, call.otel_context)

    def _emit_details(self, call: Call, outcome: Outcome | None) -> None:
        """The call's content as an ``inference.operation.details`` event."""
        attributes: Attributes = dict(call.context.notes["request"])
        nothing: Attributes = {}
        attributes.update(self.telemetry.safely("LM input content", nothing, self._input_content, call))
        if outcome is not None:
            attributes.update(response_attributes(outcome, lm_usage(outcome)))
            messages = output_messages(outcome.outputs, outcome.finish_reasons)
            attributes.update(self._rendered([(semconv.GEN_AI_OUTPUT_MESSAGES, messages)]))
        self.telemetry.emit_event(semconv.LOG_INFERENCE_DETAILS, attributes, call.otel_context)

    # --- hooks below the entry point; each finds its call through the scope ------------------------------------------
    def wrap_init(self, original: Any) -> Any:
        """``BaseLM.__init__``: an LM's keys are known before anything quotes them, and not only from its first call."""

        @functools.wraps(original)
        def __init__(lm: Any, *args: Any, **kwargs: Any) -> None:
            try:
                original(lm, *args, **kwargs)
            except BaseException as error:
                hide_frames(error)
                raise
            self.telemetry.safely("LM settings", None, self._remember_keys, lm)

        return __init__

    def _remember_keys(self, lm: Any) -> None:
        if self.telemetry.active and self.telemetry.config.content:
            redaction.remember_settings(lm.kwargs)

    def wrap_finalize(self, original: Any) -> Any:
        """``dspy.clients.execution.finalize`` (3.4): the call's own result, before DSPy shares it with histories."""

        def finalize(lm: Any, call: Any, result: Any) -> Any:
            self.telemetry.safely("LM result", None, self._note_outcome, outcome_of_call_result, result)
            return original(lm, call, result)

        return finalize

    def wrap_process_response(self, original: Any) -> Any:
        """``BaseLM._process_lm_response`` (before 3.4): likewise."""

        def _process_lm_response(lm: Any, response: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = original(lm, response, *args, **kwargs)
            self.telemetry.safely("LM result", None, self._note_outcome, outcome_of_response, response, outputs)
            self.telemetry.safely("LM engine", None, self._note_litellm, lm)
            return outputs

        return _process_lm_response

    def wrap_finalize_typed(self, original: Any) -> Any:
        """``BaseLM._finalize_lm_response`` (3.3, typed requests): likewise."""

        def _finalize_lm_response(lm: Any, request: Any, response: Any, *args: Any, **kwargs: Any) -> Any:
            final = original(lm, request, response, *args, **kwargs)
            self.telemetry.safely("LM result", None, self._note_outcome, outcome_of_typed_response, final)
            return final

        return _finalize_lm_response

    def _note_outcome(self, make: Any, *parts: Any) -> None:
        context = current_call_context()
        if context is not None and context.kind == self.kind:
            context.notes["outcome"] = make(*parts)

    def wrap_engine(self, original: Any) -> Any:
        """``dspy.clients.execution._engine`` (3.4): which engine and provider serve the call."""

        def _engine(lm: Any, call: Any, asynchronous: Any) -> Any:
            chosen = original(lm, call, asynchronous)
            self.telemetry.safely("LM engine", None, self._note_engine, chosen)
            return chosen

        return _engine

    def _note_engine(self, chosen: Any) -> None:
        context = current_call_context()
        if context is None or context.kind != self.kind:
            return
        backend, _, provider = chosen
        name = type(backend).__name__
        context.notes["engine"] = _ENGINES.get(name, name)
        if isinstance(provider, str) and semconv.GEN_AI_PROVIDER_NAME not in context.notes["request"]:
            context.notes["provider"] = PROVIDERS.get(provider, provider)

    def _note_litellm(self, lm: Any) -> None:
        """DSPy before 3.4 has one engine for its own LM; the class of any other LM says enough."""
        context = current_call_context()
        if (
            context is not None
            and context.kind == self.kind
            and any(base.__module__ == "dspy.clients.lm" for base in type(lm).__mro__)
        ):
            context.notes["engine"] = "litellm"

    def wrap_delay(self, original: Any) -> Any:
        """``dspy.clients.execution._delay`` (3.4): asked once before each retry."""

        def _delay(error: Any, attempt: Any) -> Any:
            seconds = original(error, attempt)
            self.telemetry.safely("LM retry", None, self._note_retry, error, attempt, seconds)
            return seconds

        return _delay

    def _note_retry(self, error: BaseException, attempt: int, seconds: float) -> None:
        context = current_call_context()
        if context is None or context.kind != self.kind:
            return
        context.notes["retries"] = context.notes.get("retries", 0) + 1
        attributes: Attributes = {
            semconv.LM_RETRY_ATTEMPT: attempt + 1,
            semconv.LM_RETRY_DELAY: float(seconds),
            semconv.ERROR_TYPE: error_type(error),
            **error_attributes(error),
        }
        self.telemetry.add_event(context.span, semconv.EVENT_LM_RETRY, attributes)
        labels = metric_attributes(context, context.notes)
        self.telemetry.metrics.retries.add(1, {**labels, semconv.ERROR_TYPE: error_type(error)})

    def wrap_stream_emitted(self, original: Any) -> Any:
        """``stream_emitted``: called for each chunk that a streamed answer hands on."""

        def stream_emitted(*args: Any, **kwargs: Any) -> Any:
            self.telemetry.safely("LM stream", None, self._note_chunk, current_call_context())
            return original(*args, **kwargs)

        return stream_emitted

    def wrap_stream_completion(self, original: Any) -> Any:
        """``dspy.clients.lm._get_stream_completion_fn`` (before 3.4): the stream of chunks is in DSPy's settings."""

        def _get_stream_completion_fn(*args: Any, **kwargs: Any) -> Any:
            counted = self.telemetry.safely("LM stream", None, self._counted_stream)
            if counted is None:
                return original(*args, **kwargs)
            with sys.modules["dspy"].settings.context(send_stream=counted):
                return original(*args, **kwargs)

        return _get_stream_completion_fn

    def _counted_stream(self) -> _CountedStream | None:
        """In place of the stream of the LM call that is going on, if there is one."""
        stream, context = sys.modules["dspy"].settings.send_stream, current_call_context()
        if stream is None or context is None or context.kind != self.kind:
            return None
        note = functools.partial(self.telemetry.safely, "LM stream", None, self._note_chunk, context)
        return _CountedStream(stream, note)

    def _note_chunk(self, context: CallContext | None) -> None:
        if context is not None and context.kind == self.kind:
            notes = context.notes
            notes.setdefault("first_chunk", time.perf_counter())
            notes["chunks"] = notes.get("chunks", 0) + 1


class _CountedStream:
    """A stream of chunks that tells of each one before it is sent."""

    def __init__(self, stream: Any, note: Callable[[], None]) -> None:
        self._stream = stream
        self._note = note

    async def send(self, chunk: Any) -> None:
        self._note()
        await self._stream.send(chunk)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# --- pure mapping ------------------------------------------------------------------------------------------------


def split_model(model: str) -> tuple[str | None, str]:
    """DSPy's ``provider/model`` as (GenAI provider name or ``None``, model as the provider calls it)."""
    provider, slash, name = model.partition("/")
    if not slash:
        return None, model
    return PROVIDERS.get(provider, provider), name


def explicit_request(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The typed request object a call was given instead of a prompt or messages, or ``None``."""
    request = kwargs.get("request")
    if request is None and args and not is_a(args[0], str) and field(args[0], "messages") is not None:
        request = args[0]
    return request


def request_settings(lm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The LM's own parameters, overridden by those of the call (a typed request brings its own config)."""
    request = explicit_request(args, kwargs)
    settings: dict[str, Any] = dict(getattr(lm, "kwargs", None) or {})
    if request is not None:
        config = field(request, "config")
        settings = {key: settings[key] for key in ("api_base", "base_url", "api_key") if key in settings}
        for name in ("temperature", "top_p", "max_tokens", "top_k", "seed", "stop", "n"):
            value = field(config, name)
            if value is not None:
                settings[name] = value
    settings.update(kwargs)
    return settings


def request_attributes(lm: Any, settings: Mapping[str, Any]) -> Attributes:
    """What is asked of which model. Never prompts, headers or keys."""
    provider, model = split_model(str(lm.model))
    kind = getattr(lm, "model_type", "chat")
    attributes: Attributes = {
        semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_TEXT_COMPLETION if kind == "text" else semconv.OPERATION_CHAT,
        semconv.GEN_AI_REQUEST_MODEL: model,
    }
    if provider is not None:
        attributes[semconv.GEN_AI_PROVIDER_NAME] = provider
    for name, value in settings.items():
        known = _REQUEST_NUMBERS.get(name)
        if known is None or value is None or value is True or value is False:
            continue
        number = introspection.whole(value) if known[1] else introspection.real(value)
        if number is not None:
            attributes[known[0]] = number
    stop = settings.get("stop")
    if stop is not None:
        texts = [stop] if is_a(stop, str) else introspection.bounded(stop, _MOST_STOPS)[0]
        if texts and all(is_a(text, str) for text in texts):
            attributes[semconv.GEN_AI_REQUEST_STOP_SEQUENCES] = texts
    count = introspection.whole(settings.get("n"))
    if count is not None and count > 1:
        attributes[semconv.GEN_AI_REQUEST_CHOICE_COUNT] = count
    effort = introspection.text(settings.get("reasoning_effort"), 64)
    if effort is not None:
        attributes[semconv.GEN_AI_REQUEST_REASONING_LEVEL] = effort
    if settings.get("response_format") is not None:
        attributes[semconv.GEN_AI_OUTPUT_TYPE] = "json"
    rollout = settings.get("rollout_id")
    if rollout is not None:
        shown = introspection.text(rollout, 256) or introspection.whole(rollout)
        if shown is not None:
            attributes[semconv.LM_ROLLOUT_ID] = str(shown)
    address = settings.get("api_base")
    address = settings.get("base_url") if address is None else address
    if address is not None:
        attributes.update(server_attributes(address))
    return attributes


def server_attributes(url: Any) -> Attributes:
    """Host and port of an endpoint; nothing else of its address, which may hold credentials."""
    address = introspection.text(url, _LONGEST_ADDRESS)
    if not address:
        return {}
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return {}
    if not host:
        return {}
    attributes: Attributes = {semconv.SERVER_ADDRESS: host}
    port = port or {"http": 80, "https": 443}.get(parts.scheme)
    if port:
        attributes[semconv.SERVER_PORT] = port
    return attributes


def _string(value: Any) -> str | None:
    return introspection.text(value, 256) or None


def _counters(usage: Any) -> dict[str, Any]:
    """Usage counters as they were reported: a dictionary, or the fields of a response's usage."""
    return dict(dict.items(usage)) if is_a(usage, dict) else dict(introspection.instance_dict(usage))


def outcome_of_call_result(result: Any) -> Outcome:
    """From DSPy 3.4's ``CallResult``: lm15 responses, or the raw response of LiteLLM or a custom LM."""
    responses = result.responses
    if responses:
        reasons = [str(response.finish_reason) for response in responses if response.finish_reason]
        response_id = _string(getattr(responses[0], "id", None))
    else:
        reasons, response_id = choice_reasons(result.raw), _string(field(result.raw, "id"))
    return Outcome(
        outputs=list(result.outputs),
        usage=_counters(result.usage),
        cost=introspection.real(result.cost),
        cache_hit=bool(result.cache_hit),
        model=_string(result.response_model),
        response_id=response_id,
        finish_reasons=reasons,
    )


def outcome_of_response(response: Any, outputs: Any) -> Outcome:
    """From the OpenAI-shaped response that LMs return before DSPy 3.4."""
    return Outcome(
        outputs=list(introspection.items(outputs)),
        usage=_counters(field(response, "usage")),
        cost=introspection.real(field(field(response, "_hidden_params"), "response_cost")),
        cache_hit=field(response, "cache_hit") is True,
        model=_string(field(response, "model")),
        response_id=_string(field(response, "id")),
        finish_reasons=choice_reasons(response),
    )


def outcome_of_typed_response(response: Any) -> Outcome:
    """From DSPy 3.3's experimental ``LMResponse``."""
    usage = getattr(response, "usage", None)
    dump = getattr(usage, "model_dump", None)
    return Outcome(
        outputs=list(response.to_legacy_outputs()),
        usage=dump() if callable(dump) else dict(usage or {}),
        cost=getattr(response, "cost", None),
        cache_hit=bool(getattr(response, "cache_hit", False)),
        model=_string(getattr(response, "model", None)),
        response_id=_string(getattr(response, "response_id", None)),
        finish_reasons=[
            str(output.finish_reason)
            for output in getattr(response, "outputs", ())
            if getattr(output, "finish_reason", None)
        ],
    )


def outcome_of_both(first: Outcome, last: Outcome) -> Outcome:
    """The answer is the last one; usage and cost are those of both, where they were billed."""
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


def _exceeds(usage: LMUsage, inner: LMUsage) -> bool:
    """Whether an LM call reports more tokens, or a higher cost, than the LM calls inside it."""
    return (
        (usage.input_tokens or 0) > (inner.input_tokens or 0)
        or (usage.output_tokens or 0) > (inner.output_tokens or 0)
        or (usage.cost or 0.0) > (inner.cost or 0.0) * (1 + 1e-9)
    )


def _tell_outer(context: CallContext, usage: LMUsage) -> None:
    """Tell the LM call around this one, if there is one (an LM that asks other LMs), what this one used."""
    outer = context.parent
    while outer is not None and outer.kind != context.kind:
        outer = outer.parent
    if outer is not None:
        outer.notes.setdefault("inside", []).append(usage)


def choice_reasons(response: Any) -> list[str]:
    """Finish reasons of an OpenAI-shaped response, one for each choice (the Responses API gives one status)."""
    choices = field(response, "choices")
    if introspection.length(choices) is None:
        if introspection.text(field(response, "status")) == "completed":
            return ["stop"]
        reason = _string(field(field(response, "incomplete_details"), "reason"))
        return [reason] if reason else []
    first, _ = introspection.bounded(choices, _MOST_CHOICES)
    return [reason for choice in first if (reason := _string(field(choice, "finish_reason")))]


def _count(holder: Any, key: str, counters: Mapping[str, Any], other: str) -> int | None:
    """The counter ``key`` of ``holder``, else ``other`` of ``counters``; ``None`` when neither has one."""
    number = None if holder is None else introspection.whole(field(holder, key))
    return introspection.whole(counters.get(other)) if number is None else number


def lm_usage(outcome: Outcome | None) -> LMUsage:
    """Tokens and billed cost of a call.

    Counters that are all zero, and the price of nothing, were not reported (LiteLLM's streams): absent.
    """
    if outcome is None:
        return LMUsage()
    if outcome.cache_hit:
        return LMUsage(cost=0.0 if outcome.cost is not None else None, cache_hit=True)
    counters = outcome.usage
    inputs = _count(counters, "prompt_tokens", counters, "input_tokens")
    outputs = _count(counters, "completion_tokens", counters, "output_tokens")
    if not inputs and not outputs:
        return LMUsage(cost=outcome.cost or None)
    return LMUsage(inputs, outputs, outcome.cost)


def response_attributes(outcome: Outcome, usage: LMUsage) -> Attributes:
    """What came back, with usage and cost of this very call."""
    attributes: Attributes = {semconv.LM_CACHE_HIT: outcome.cache_hit}
    if outcome.model is not None:
        attributes[semconv.GEN_AI_RESPONSE_MODEL] = outcome.model
    if outcome.response_id is not None:
        attributes[semconv.GEN_AI_RESPONSE_ID] = outcome.response_id
    if outcome.finish_reasons:
        attributes[semconv.GEN_AI_RESPONSE_FINISH_REASONS] = outcome.finish_reasons
    if usage.cost is not None:
        attributes[semconv.LM_COST] = usage.cost
    if outcome.cache_hit:
        if outcome.cost is not None:
            attributes[semconv.LM_COST_SAVED] = outcome.cost
        return attributes
    if usage.input_tokens is None and usage.output_tokens is None:
        return attributes
    counters = outcome.usage
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


def error_attributes(error: BaseException) -> Attributes:
    """HTTP status and request id of a failed request, where DSPy's ``LMError`` knows them."""
    attributes: Attributes = {}
    status = introspection.whole(field(error, "status"))
    if status is not None:
        attributes[semconv.HTTP_STATUS_CODE] = status
    request_id = _string(field(error, "request_id"))
    if request_id is not None:
        attributes[semconv.LM_REQUEST_ID] = request_id
    return attributes


_METRIC_KEYS: Final = (
    semconv.GEN_AI_OPERATION_NAME,
    semconv.GEN_AI_PROVIDER_NAME,
    semconv.GEN_AI_REQUEST_MODEL,
    semconv.SERVER_ADDRESS,
    semconv.SERVER_PORT,
)


def metric_attributes(context: CallContext, notes: Mapping[str, Any]) -> Attributes:
    """Low-cardinality attributes of an LM call's metrics."""
    request = notes["request"]
    labels: Attributes = {key: request[key] for key in _METRIC_KEYS if key in request}
    if "provider" in notes:
        labels[semconv.GEN_AI_PROVIDER_NAME] = notes["provider"]
    if context.program is not None:
        labels[semconv.PROGRAM_NAME] = context.program.name
    if context.role is not None:
        labels[semconv.LM_ROLE] = context.role
    return labels
