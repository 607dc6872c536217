"""DSPy's worker threads: the OpenTelemetry context goes into each of them, and each evaluated example gets its span."""

from __future__ import annotations

import functools
import inspect
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext, attach, current_call_context
from dspy_otel.core.errors import hide_frames
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import Call, Operation, SpanStart, detach, openinference
from dspy_otel.operations.evaluation import EvaluationState, ExampleOperation, ExampleRun

_THREADS: Final = guard("threads")
_EXAMPLES: Final = guard("examples")


class ParallelOperation(Operation):
    """``ParallelExecutor.execute``: what ``dspy.Parallel``, ``Module.batch``, ``Evaluate`` and optimizers run on.

    DSPy copies its own settings into the workers, but not the OpenTelemetry context.
    """

    kind = "parallel"

    def __init__(self, telemetry: Any, examples: ExampleOperation) -> None:
        super().__init__(telemetry)
        self.examples = examples

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        attributes: Attributes = {}
        size = introspection.length(args[1])
        if size is not None:
            attributes[semconv.PARALLEL_SIZE] = size
        threads = introspection.whole(instance.num_threads)
        if threads is not None:
            attributes[semconv.PARALLEL_NUM_THREADS] = threads
        openinference(attributes, self.telemetry, semconv.KIND_CHAIN)
        return SpanStart(semconv.SPAN_PARALLEL, CallContext(self.kind, instance, parent), attributes)

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        return {semconv.PARALLEL_FAILURES: len(call.instance.failed_indices)}

    @classmethod
    def caller(cls, context: CallContext | None) -> CallContext | None:
        """``context``, or the nearest one around it that is more than worker threads."""
        while context is not None and context.kind == cls.kind:
            context = context.parent
        return context

    def wrap_execute(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """In place of ``ParallelExecutor.execute(function, data)``."""

        @functools.wraps(original)
        def execute(executor: Any, function: Any, data: Any) -> Any:
            try:
                return execute_watched(executor, function, data)
            except BaseException as error:
                hide_frames(error)
                raise

        def execute_watched(executor: Any, function: Any, data: Any) -> Any:
            if not self.telemetry.active:
                return original(executor, function, data)
            context, enabled = None, False
            with _THREADS:
                context, enabled = current_call_context(), self.telemetry.enabled()
            if not enabled:
                # `suppress_instrumentation()` is for the workers, too, and only the context carries it there.
                return run(executor, function, data)
            if context is not None and isinstance(context.state, EvaluationState) and not context.state.executing:
                # An evaluation's own loop. A program that runs threads of its own inside an example does not come
                # here: its call context is the example's.
                context.state.executing = True
                with _EXAMPLES:
                    function = self._evaluate_each(function, data, context)
                return original(executor, function, data)
            return traced(executor, function, data)

        def run(executor: Any, function: Any, data: Any) -> Any:
            return original(executor, bind(function), data)

        traced = self.wrap(run)
        return execute

    def _evaluate_each(self, function: Callable[[Any], Any], data: Any, evaluate: CallContext) -> Callable[[Any], Any]:
        """``function`` with one example span around each call."""
        waiting: defaultdict[int, deque[int]] = defaultdict(deque)
        # An iterator is not used up: the places of its rows stay unknown.
        listed = introspection.length(data) is not None
        for index, example in enumerate(introspection.items(data)):
            waiting[id(example)].append(index)
        last: dict[int, int] = {}
        lock = threading.Lock()
        examples = self.examples
        surrounding = otel_context.get_current()

        @_EXAMPLES
        def place(example: Any) -> ExampleRun:
            if not listed:
                return ExampleRun(example, -1, False, evaluate)
            key = id(example)
            with lock:
                resubmitted = not waiting[key]
                # DSPy submits a straggler a second time: same example, same index.
                index = last.get(key, -1) if resubmitted else waiting[key].popleft()
                last[key] = index
            return ExampleRun(example, index, resubmitted, evaluate)

        def call_one(run: ExampleRun, example: Any) -> Any:
            return function(example)

        # Called in a worker: the run is what the example's span is made from.
        spanned = examples.wrap(call_one)

        @functools.wraps(function)
        def in_example(example: Any) -> Any:
            token = attach(surrounding)
            try:
                run = place(example)
                return function(example) if run is None else spanned(run, example)
            except BaseException as error:
                hide_frames(error)
                raise
            finally:
                detach(token)

        return in_example


def bind(function: Callable[..., Any], context: Context | None = None) -> Callable[..., Any]:
    """``function``, always run in one OpenTelemetry context, whichever thread calls it.

    Args:
        function: any callable; a coroutine function stays one.
        context: default, the context in which ``bind`` is called.
    """
    captured = otel_context.get_current() if context is None else context

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def bound_coroutine(*args: Any, **kwargs: Any) -> Any:
            token = otel_context.attach(captured)
            try:
                return await function(*args, **kwargs)
            except BaseException as error:
                hide_frames(error)
                raise
            finally:
                detach(token)

        return bound_coroutine

    # Name and documentation only: the attributes of a callable object are its state.
    @functools.wraps(function, updated=())
    def bound(*args: Any, **kwargs: Any) -> Any:
        token = otel_context.attach(captured)
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            hide_frames(error)
            raise
        finally:
            detach(token)

    return bound
