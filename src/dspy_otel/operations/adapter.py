"""Adapters: which one served a predictor, parse failures, fallbacks, and full spans by option."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.content.names import class_name
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext, current_call_context, current_context, suppressed
from dspy_otel.core.errors import error_type, hide_frames
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import Call, Operation, SpanStart, openinference
from dspy_otel.operations.module import ModuleState, put_inputs, put_outputs


class AdapterOperation(Operation):
    """``Adapter.__call__`` and ``acall``: no span of its own, but attributes and events on the predictor's span."""

    kind = "adapter"

    def wrap(self, original: Any, override_of: type | None = None) -> Any:
        """In place of an adapter's ``__call__`` or ``acall``: there is never a span to close."""
        if inspect.iscoroutinefunction(original):

            @functools.wraps(original)
            async def coroutine_wrapper(adapter: Any, /, *args: Any, **kwargs: Any) -> Any:
                takes_over = self.serves(adapter)
                try:
                    result = await original(adapter, *args, **kwargs)
                except BaseException as error:
                    hide_frames(error)
                    raise
                if takes_over:
                    self.answered(adapter)
                return result

            return coroutine_wrapper

        @functools.wraps(original)
        def wrapper(adapter: Any, /, *args: Any, **kwargs: Any) -> Any:
            takes_over = self.serves(adapter)
            try:
                result = original(adapter, *args, **kwargs)
            except BaseException as error:
                hide_frames(error)
                raise
            if takes_over:
                self.answered(adapter)
            return result

        return wrapper

    wrap_async = wrap

    @guard("adapter")
    def serves(self, adapter: Any) -> bool:
        """Record that this adapter serves the predictor, and that it takes over from one that has failed.

        Returns:
            Whether it takes over from the predictor's own adapter, and not from one that helps that one to parse.
        """
        surrounding = current_context()
        context = current_call_context(surrounding)
        if context is None or type(context.state) is not ModuleState:
            return False
        if not self.telemetry.active or suppressed(surrounding):
            return False
        state, name = context.state, class_name(type(adapter))
        if state.adapter is None:
            state.adapter = name
        failed, state.failed_adapter = state.failed_adapter, None
        if failed is None or failed == name:
            return False
        attributes: Attributes = {semconv.ADAPTER_FALLBACK_FROM: failed, semconv.ADAPTER_NAME: name}
        self.telemetry.add_event(context.span, semconv.EVENT_ADAPTER_FALLBACK, attributes)
        return failed == state.adapter

    @guard("adapter")
    def answered(self, adapter: Any) -> None:
        """Record that this adapter has answered in place of the first one."""
        context = current_call_context()
        if context is not None and isinstance(context.state, ModuleState):
            context.state.fallback_adapter = class_name(type(adapter))

    def watch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """In place of ``Adapter._call_postprocess``, the one place in which every adapter's parsing fails.

        Nothing happens before or after the call unless it fails, so this is no hook: a ``try`` costs nothing.
        """

        def _call_postprocess(adapter: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(adapter, *args, **kwargs)
            except Exception as error:
                self._record_failure(adapter, error)
                raise

        return _call_postprocess

    @guard("adapter failure")
    def _record_failure(self, adapter: Any, error: Exception) -> None:
        context = current_call_context()
        if context is None or not isinstance(context.state, ModuleState) or not self.telemetry.enabled():
            return
        name = class_name(type(adapter))
        context.state.failed_adapter = name
        context.state.parse_errors += 1
        attributes: Attributes = {semconv.ADAPTER_NAME: name, semconv.ERROR_TYPE: error_type(error)}
        completion = introspection.field(error, "lm_response")
        content = {} if completion is None else {semconv.ADAPTER_COMPLETION: completion}
        self.telemetry.add_event(context.span, semconv.EVENT_ADAPTER_PARSE_ERROR, attributes, content)


class AdapterSpanOperation(Operation):
    """``format`` or ``parse`` of an adapter, as a span (option ``adapter_spans``).

    Args:
        telemetry: shared state.
        method: ``format`` or ``parse``.
    """

    def __init__(self, telemetry: Any, method: str) -> None:
        self.method = method
        self.kind = f"adapter.{method}"
        super().__init__(telemetry)

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        name = class_name(type(instance))
        attributes: Attributes = {semconv.ADAPTER_NAME: name}
        openinference(attributes, self.telemetry, semconv.KIND_CHAIN)
        context = CallContext(self.kind, instance, parent)
        # LM calls that an adapter makes itself (TwoStepAdapter) belong to its span.
        return SpanStart(f"{name}.{self.method}", context, attributes)

    def start_attributes(self, call: Call) -> Attributes:
        attributes: Attributes = {}
        position = 2 if self.method == "format" else 1
        name = "inputs" if self.method == "format" else "completion"
        value = call.kwargs.get(name, call.args[position] if len(call.args) > position else None)
        put_inputs(self.telemetry, attributes, value)
        return attributes

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        attributes: Attributes = {}
        if error is None:
            put_outputs(self.telemetry, attributes, result)
        return attributes
