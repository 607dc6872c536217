"""LM calls: every ``BaseLM``, on any engine, with the usage, cost and cache state of that very call.

``lm_request.py`` maps what is asked, ``lm_response.py`` what comes back; ``older_dspy.py`` has the hooks that only DSPy
before 3.4 needs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from opentelemetry.trace import SpanKind

from dspy_otel import semconv
from dspy_otel.content import introspection, redaction
from dspy_otel.core.attributes import Attributes, Labels, repair, sendable_name
from dspy_otel.core.call_context import (
    BAGGAGE_KEY,
    BudgetAround,
    CallContext,
    current_call_context,
    current_state,
    enclosing_state,
)
from dspy_otel.core.errors import error_type
from dspy_otel.core.internal_errors import failed, guard
from dspy_otel.core.operation import Call, Operation, SpanStart, openinference
from dspy_otel.core.telemetry import Telemetry
from dspy_otel.core.usage import LMUsage, add_usages
from dspy_otel.operations.from_baggage import PROMPT, attributes_from_baggage
from dspy_otel.operations.lm_request import (
    CONNECTION,
    PROVIDERS,
    own_settings,
    request_attributes,
    request_key,
    request_settings,
)
from dspy_otel.operations.lm_response import (
    LMResponse,
    answer_attributes,
    combined,
    error_attributes,
    lm_usage,
    response_of_call_result,
    usage_attributes,
)
from dspy_otel.operations.messages import described, input_messages, output_messages, tool_definitions
from dspy_otel.patching import argument

_ENGINES: Final = {
    "LM15Engine": "lm15",
    "AsyncLM15Engine": "lm15",
    "LiteLLMEngine": "litellm",
    "AsyncLiteLLMEngine": "litellm",
    "LegacyEngine": "legacy",
    "AsyncLegacyEngine": "legacy",
}
_OF_REQUEST: Final = (
    semconv.GEN_AI_OPERATION_NAME,
    semconv.GEN_AI_PROVIDER_NAME,
    semconv.GEN_AI_REQUEST_MODEL,
    semconv.SERVER_ADDRESS,
    semconv.SERVER_PORT,
)
_OF_PROGRAM: Final = (semconv.PROGRAM_NAME, semconv.LM_ROLE)
_MOST_DESCRIPTIONS: Final = 512
_MOST_LABELS: Final = 32
_LONGEST_KEY: Final = 12
_INPUT: Final = guard("LM input content")
_CONTENT: Final = guard("content")
_EVENT: Final = guard("LM content event")


class LMLabels(NamedTuple):
    """Attributes of a call's metrics.

    Attributes:
        call: of the call.
        input: of its input tokens.
        output: of its output tokens.
    """

    call: Labels
    input: Labels
    output: Labels


@dataclass(frozen=True, slots=True)
class LMDescription:
    """What all LM calls share that have the same model and settings, in the same program and for the same role.

    Attributes:
        span: span name.
        model: DSPy's name of the model, with its provider.
        attributes: of the span's start. Never changed, as all here.
        request: those of them that are the request's, for metrics and events.
        stop: stop sequences, which are content.
    """

    span: str
    model: str | None
    attributes: Attributes
    request: Attributes
    stop: Any
    _labels: dict[tuple[str | None, str | None], LMLabels] = field(default_factory=dict)
    _answered: dict[tuple[Any, ...], Attributes] = field(default_factory=dict)

    def labels(self, provider: str | None = None, model: str | None = None) -> LMLabels:
        """Low-cardinality attributes of a call's metrics. Not to be changed: they are made once.

        Args:
            provider: who serves it, if the model's name has no provider.
            model: the model that answered.
        """
        key = provider, model
        kept = self._labels.get(key)
        if kept is not None:
            return kept
        labels: Attributes = {name: self.attributes[name] for name in _OF_REQUEST if name in self.attributes}
        if provider is not None:
            labels[semconv.GEN_AI_PROVIDER_NAME] = provider
        labels.update((name, self.attributes[name]) for name in _OF_PROGRAM if name in self.attributes)
        if model is not None:
            labels[semconv.GEN_AI_RESPONSE_MODEL] = model
        made = LMLabels(
            Labels(labels),
            Labels({**labels, semconv.GEN_AI_TOKEN_TYPE: semconv.TOKEN_TYPE_INPUT}),
            Labels({**labels, semconv.GEN_AI_TOKEN_TYPE: semconv.TOKEN_TYPE_OUTPUT}),
        )
        if len(self._labels) < _MOST_LABELS:
            self._labels[key] = made
        return made

    def answered(self, engine: str | None, provider: str | None, response: LMResponse | None) -> Attributes:
        """Attributes that a span shares with those of other calls with such an answer. Not to be changed.

        Args:
            engine: what DSPy runs the call on.
            provider: who serves it, if the model's name has no provider.
            response: what came back, if anything did.
        """
        key: tuple[Any, ...] = engine, provider
        if response is not None:
            key = engine, provider, response.cache_hit, response.model, *response.finish_reasons
        kept = self._answered.get(key)
        if kept is not None:
            return kept
        attributes = {} if response is None else answer_attributes(response)
        if engine is not None:
            attributes[semconv.LM_ENGINE] = engine
        if provider is not None:
            attributes[semconv.GEN_AI_PROVIDER_NAME] = provider
        repair(attributes)
        if len(self._answered) < _MOST_LABELS and len(key) <= _LONGEST_KEY:  # A server may give a thousand reasons.
            self._answered[key] = attributes
        return attributes


class LMCallState:
    """What is known of an LM call so far. Written in the thread or task of the call, unless a field has another writer.

    Attributes:
        description: what is known of it before it begins.
        asked: its messages, instructions and tools as JSON, for a completion hook; they may change during the call.
        response: of the last request that has come back.
        earlier: of the requests before, when a subclass's override calls the method it overrides several times.
        usage: what the call used, once it has ended.
        inner: what the LM calls inside used, when an LM asks other LMs; appended to by those, from their threads.
        engine: what DSPy runs the call on.
        provider: who serves it, if the model's name has no provider.
        retries: how many requests were retried.
        stream: LiteLLM's stream of chunks, if the answer came in one.
        usage_requested: whether a stream was to end with the server's count of tokens; known before 3.4.
        chunks: how many chunks of a streamed answer have come.
        first_chunk: when the first one came, by ``time.perf_counter()``.
    """

    asked: Attributes | None = None
    response: LMResponse | None = None
    earlier: LMResponse | None = None
    usage: LMUsage | None = None
    engine: str | None = None
    provider: str | None = None
    retries: int = 0
    stream: Any = None
    usage_requested: bool = False
    chunks: int = 0
    first_chunk: float = 0.0

    def __init__(self, description: LMDescription) -> None:
        self.description = description
        self.inner: list[LMUsage] = []

    def combine(self) -> None:
        """Make one response of all the requests that an override made by calling what it overrides."""
        if self.earlier is not None:
            self.response = self.earlier if self.response is None else combined(self.earlier, self.response)
            self.earlier = None

    def count_chunk(self, now: float) -> None:
        """Count one chunk of a streamed answer."""
        if not self.chunks:
            self.first_chunk = now
        self.chunks += 1


class LMOperation(Operation):
    """``BaseLM.__call__`` and ``acall``; another one is for ``generate`` and ``agenerate`` (3.5).

    Args:
        telemetry: shared state.
        kept: which of an LM's own parameters apply beside a typed request.
    """

    kind = "lm"
    exception_event = semconv.LOG_CLIENT_EXCEPTION

    def __init__(self, telemetry: Telemetry, kept: tuple[str, ...] = CONNECTION) -> None:
        super().__init__(telemetry)
        self._kept = kept
        self._descriptions: dict[tuple[Any, ...], LMDescription] = {}

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        context = CallContext(self.kind, instance, parent)
        budget, settle = context.budget, None
        if budget is not None:
            budget.admit(context, self.telemetry)
            settle = functools.partial(self._settle, budget, context)
        stored = introspection.instance_dict(instance)
        own = own_settings(instance, stored)
        try:  # For each call, and without the two calls of a guard.
            if own:
                redaction.remember_settings(own)
            if kwargs:
                redaction.remember_settings(kwargs)
        except Exception as error:
            failed("LM settings", error)
        description = self._description(instance, stored, request_settings(own, args, kwargs, self._kept), context)
        context.state = LMCallState(description)
        return SpanStart(
            description.span, context, description.attributes.copy(), SpanKind.CLIENT, repaired=True, on_closed=settle
        )

    def _settle(self, budget: BudgetAround, context: CallContext, result: Any, error: BaseException | None) -> None:
        budget.settle(context, self.telemetry, error)

    def _description(
        self, lm: Any, stored: dict[str, Any], settings: dict[str, Any], context: CallContext
    ) -> LMDescription:
        """Of this call. It is kept for the next ones like it."""
        key = request_key(stored, settings)
        if key is None:
            return self._describe(lm, settings, context)
        program = context.program
        key = (*key, context.role, *((program.name, program.id) if program is not None else ()))
        description = self._descriptions.get(key)
        if description is None:
            if len(self._descriptions) >= _MOST_DESCRIPTIONS:  # rollout ids, for one
                self._descriptions.clear()
            description = self._descriptions[key] = self._describe(lm, settings, context)
        return description

    def _describe(self, lm: Any, settings: dict[str, Any], context: CallContext) -> LMDescription:
        attributes = request_attributes(lm, settings)
        # Text that a user wrote: content, like the prompt.
        stop = attributes.pop(semconv.GEN_AI_REQUEST_STOP_SEQUENCES, None)
        request = attributes.copy()
        if context.role is not None:
            attributes[semconv.LM_ROLE] = context.role
        if context.program is not None:
            attributes[semconv.PROGRAM_NAME] = context.program.name
            if context.program.id is not None:
                attributes[semconv.PROGRAM_ID] = context.program.id
        openinference(attributes, self.telemetry, semconv.KIND_LLM)
        name = f"{attributes[semconv.GEN_AI_OPERATION_NAME]} {attributes[semconv.GEN_AI_REQUEST_MODEL]}"
        repair(attributes)
        model = introspection.text(introspection.field(lm, "model"))
        return LMDescription(sendable_name(name), model, attributes, request, stop)

    def overridden(
        self, context: CallContext, args: tuple[Any, ...], kwargs: dict[str, Any], override_of: type | None
    ) -> None:
        state: LMCallState = context.state
        state.combine()
        state.earlier, state.response = state.response, None

    def start_attributes(self, call: Call) -> Attributes:
        attributes: Attributes = {}
        if BAGGAGE_KEY in call.otel_context:
            attributes = attributes_from_baggage(PROMPT, call.otel_context)
        on_span, handed_over = self.telemetry.config.content_on_spans, self.telemetry.completions is not None
        if on_span or handed_over:
            with _INPUT:
                asked = self._input_content(call)
                if handed_over:
                    call.context.state.asked = asked
                if on_span:
                    attributes.update(asked)
        if not on_span:
            return attributes
        stop = call.context.state.description.stop
        if stop:
            with _CONTENT:
                attributes[semconv.GEN_AI_REQUEST_STOP_SEQUENCES] = list(map(self.telemetry.content.text, stop))
        return attributes

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
        attributes: Attributes = {}
        for key, part in parts:
            with _CONTENT:
                attributes[key] = self.telemetry.content.json(part)
        return attributes

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        state: LMCallState = call.context.state
        response = state.response
        call.shared = state.description.answered(state.engine, state.provider, response)
        attributes: Attributes = {}
        if state.retries:
            attributes[semconv.LM_RETRIES] = state.retries
        if state.chunks:
            attributes[semconv.GEN_AI_REQUEST_STREAM] = True
            attributes[semconv.LM_CHUNKS] = state.chunks
            attributes[semconv.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK] = state.first_chunk - call.started
        if error is not None:
            attributes.update(error_attributes(error))
        if response is not None:
            host = state.description.request.get(semconv.SERVER_ADDRESS)
            attributes.update(usage_attributes(response, state.usage or lm_usage(response), host))
            if self.telemetry.config.content_on_spans:
                messages = output_messages(response.outputs, response.finish_reasons)
                self.telemetry.put_content(attributes, semconv.GEN_AI_OUTPUT_MESSAGES, messages)
        return attributes

    def content(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        state: LMCallState = call.context.state
        content = dict(state.asked or ())
        response, key = state.response, semconv.GEN_AI_OUTPUT_MESSAGES
        if key in call.attributes:
            content[key] = call.attributes[key]
        elif response is not None:
            content.update(self._rendered([(key, output_messages(response.outputs, response.finish_reasons))]))
        return content

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        context = call.context
        state: LMCallState = context.state
        if state.earlier is not None:
            state.combine()
        response = state.response
        usage = state.usage = lm_usage(response)
        inner = functools.reduce(add_usages, state.inner) if state.inner else None
        answered = error is None or response is not None  # An override may fail after an answer that was billed.
        if inner is not None and not _exceeds(usage, inner):
            # It only returns what the LMs inside it answered, and those have been counted.
            usage = LMUsage(cache_hit=usage.cache_hit)
        elif answered:
            for totals in context.totals:
                totals.add(usage, context.role)
        if inner is not None:
            _report_to_outer(context, add_usages(inner, usage))
        elif answered:
            _report_to_outer(context, usage)
        if self.telemetry.measuring:
            self._record(call, usage, error, seconds)
        if self.telemetry.config.content_on_events and call.span.get_span_context().trace_flags.sampled:
            with _EVENT:
                self._emit_details(call)

    def _record(self, call: Call, usage: LMUsage, error: BaseException | None, seconds: float) -> None:
        metrics = self.telemetry.metrics
        state: LMCallState = call.context.state
        described, model = state.description, None if state.response is None else state.response.model
        labels = described.labels(state.provider, model)
        if usage.cache_hit:
            metrics.cache_hits.add(1, labels.call, call.otel_context)
        else:
            # An answer from the cache is no operation of the provider: it would hide how slow that is.
            timed = labels.call if error is None else {**labels.call, semconv.ERROR_TYPE: error_type(error)}
            metrics.inference_duration.record(seconds, timed, call.otel_context)
            if usage.input_tokens is not None:
                metrics.token_usage.record(usage.input_tokens, labels.input, call.otel_context)
            if usage.output_tokens is not None:
                metrics.token_usage.record(usage.output_tokens, labels.output, call.otel_context)
            if usage.cost:
                metrics.lm_cost.add(usage.cost, labels.call, call.otel_context)
        if state.chunks:
            metrics.time_to_first_chunk.record(state.first_chunk - call.started, labels.call, call.otel_context)

    def _emit_details(self, call: Call) -> None:
        """The call's content as an ``inference.operation.details`` event."""
        state: LMCallState = call.context.state
        attributes: Attributes = dict(state.description.request)
        with _INPUT:
            attributes.update(self._input_content(call))
        response = state.response
        if response is not None:
            host = state.description.request.get(semconv.SERVER_ADDRESS)
            attributes.update(answer_attributes(response))
            attributes.update(usage_attributes(response, lm_usage(response), host))
            messages = output_messages(response.outputs, response.finish_reasons)
            attributes.update(self._rendered([(semconv.GEN_AI_OUTPUT_MESSAGES, messages)]))
        self.telemetry.emit_event(semconv.LOG_INFERENCE_DETAILS, attributes, call.otel_context)

    # --- hooks; those below the entry point find their call through its context ---------------------------------------
    def remember_settings(self, lm: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: None) -> None:
        """After ``BaseLM.__init__``: an LM's keys are known before anything quotes them, and before its first call."""
        if self.telemetry.active and self.telemetry.config.content:
            redaction.remember_settings(own_settings(lm, introspection.instance_dict(lm)))

    def record_result(self, _: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before ``execution.finalize(lm, call, result)`` (3.4): the call's own result, which histories share later."""
        state = current_state(LMCallState)
        if state is not None:
            result = argument(args, kwargs, 2, "result")
            by_litellm = state.engine == "litellm"
            state.response = response_of_call_result(result, state.description.model, state.stream, by_litellm)
            state.stream = None

    def record_engine(self, _: None, args: tuple[Any, ...], kwargs: dict[str, Any], chosen: Any) -> None:
        """After ``execution._engine(lm, call, asynchronous)`` (3.4): which engine and provider serve the call.

        It gives the engine, the request (before 3.5) and the provider.
        """
        state = current_state(LMCallState)
        if state is None:
            return
        backend, *_, provider = chosen
        name = introspection.short_name_of(type(backend))
        state.engine = _ENGINES.get(name, name)
        provider = introspection.text(provider)
        if provider and semconv.GEN_AI_PROVIDER_NAME not in state.description.request:
            state.provider = PROVIDERS.get(provider, provider)

    def record_retry(self, _: None, args: tuple[Any, ...], kwargs: dict[str, Any], seconds: Any) -> None:
        """After ``execution._delay(error, attempt)`` (3.4), which is called once before each retry."""
        context = current_call_context()
        if context is None or not isinstance(context.state, LMCallState):
            return
        error, attempt = argument(args, kwargs, 0, "error"), argument(args, kwargs, 1, "attempt")
        context.state.retries += 1
        attributes: Attributes = {
            semconv.LM_RETRY_ATTEMPT: attempt + 1,
            semconv.LM_RETRY_DELAY: float(seconds),
            semconv.ERROR_TYPE: error_type(error),
            **error_attributes(error),
        }
        self.telemetry.add_event(context.span, semconv.EVENT_LM_RETRY, attributes)
        labels = context.state.description.labels(context.state.provider).call
        self.telemetry.metrics.retries.add(1, {**labels, semconv.ERROR_TYPE: error_type(error)})

    def record_stream(self, _: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before ``closing_stream(source)`` or ``aclosing_stream(source)`` (3.4), for LiteLLM's stream of chunks."""
        state = current_state(LMCallState)
        if state is not None:
            state.stream = argument(args, kwargs, 0, "source")

    def record_chunk(self, _: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before ``stream_emitted()`` (3.4), which is called for each chunk that a streamed answer hands on."""
        state = current_state(LMCallState)
        if state is not None:
            state.count_chunk(time.perf_counter())


def _exceeds(usage: LMUsage, inner: LMUsage) -> bool:
    """Whether an LM call reports more tokens, or a higher cost, than the LM calls inside it."""
    return (
        (usage.input_tokens or 0) > (inner.input_tokens or 0)
        or (usage.output_tokens or 0) > (inner.output_tokens or 0)
        or (usage.cost or 0.0) > (inner.cost or 0.0) * (1 + 1e-9)
    )


def _report_to_outer(context: CallContext, usage: LMUsage) -> None:
    """Add what this call used to the LM call around it, if there is one (an LM that asks other LMs)."""
    outer = enclosing_state(context.parent, LMCallState)
    if outer is not None:
        outer.inner.append(usage)
