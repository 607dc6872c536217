"""BootstrapFewShot: a teacher answers training examples, until enough of its answers pass the metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import Link

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext
from dspy_otel.core.operation import Call, Operation, SpanStart, openinference
from dspy_otel.core.telemetry import Telemetry
from dspy_otel.operations.evaluation import ExampleState, callable_name, metric_name, split_example
from dspy_otel.operations.module import put_inputs
from dspy_otel.operations.program import Programs
from dspy_otel.optimizers.state import PhaseState, run_of
from dspy_otel.optimizers.trace_sampling import begin_example, end_example
from dspy_otel.optimizers.tracker import Phase, Tracker, hooks, tracks
from dspy_otel.patching import Patches, resolve

if TYPE_CHECKING:
    from dspy_otel.optimizers import Optimizers


@tracks("BootstrapFewShot")
class BootstrapTracker(Tracker):
    """No trials: one phase of attempts."""

    role = semconv.ROLE_TEACHER
    program_role = semconv.ROLE_TEACHER


@dataclass(slots=True)
class AttemptState(ExampleState):
    """What is kept of an attempt: it is an example, which may be linked to its phase.

    Attributes:
        linked: the attempt is a trace of its own.
    """

    linked: bool = False


class AttemptOperation(Operation):
    """``BootstrapFewShot._bootstrap_one_example``: the teacher's answer to one example, and the metric's verdict.

    Like an evaluated example it is a trace of its own, linked both ways to its phase; but not when a program compiles
    as part of its answer: one call is one trace.
    """

    kind = "example"

    def __init__(self, telemetry: Telemetry, programs: Programs) -> None:
        super().__init__(telemetry)
        self.programs = programs

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        run = run_of(parent)
        if parent is None or not isinstance(parent.state, PhaseState) or run is None:
            return None
        teacher = introspection.field(instance, "teacher")
        # The context's owner is the teacher: LM calls after its answer belong to the metric.
        context = CallContext(self.kind, teacher, parent)
        context.role, context.role_after = semconv.ROLE_TEACHER, semconv.ROLE_JUDGE
        name = callable_name(teacher)
        attributes: Attributes = {semconv.PROGRAM_NAME: name}
        metric = metric_name(introspection.field(instance, "metric"))
        if metric is not None:
            attributes[semconv.EVALUATION_METRIC_NAME] = metric
        tried = args[1] if len(args) > 1 else kwargs.get("round_idx", 0)
        if type(tried) is int:
            attributes[semconv.BOOTSTRAP_ROUND] = tried
        openinference(attributes, self.telemetry, semconv.KIND_CHAIN)
        begin_example(self.telemetry, context)
        linked = self.telemetry.config.evaluation_traces == "linked" and not run.inference_time
        context.state = AttemptState(linked=linked)
        links = [Link(parent.span.get_span_context())] if linked and parent.span is not None else []
        return SpanStart(f"{semconv.SPAN_BOOTSTRAP_ATTEMPT} {name}", context, attributes, root=linked, links=links)

    def start_attributes(self, call: Call) -> Attributes:
        example = call.args[0] if call.args else call.kwargs.get("example")
        attributes: Attributes = {}
        example_id = self.programs.example_id(example)
        if example_id is not None:
            attributes[semconv.EXAMPLE_ID] = example_id
        if self.telemetry.config.content_on_spans:
            inputs, expected = split_example(example)
            put_inputs(self.telemetry, attributes, inputs)
            self.telemetry.put_content(attributes, semconv.EXAMPLE_EXPECTED, expected)
        phase = call.context.parent
        linked = call.context.state.linked and call.context.deferred is None
        if linked and phase is not None:
            phase.add_link(call.span.get_span_context())
        return attributes

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        phase = call.context.parent
        if phase is not None and isinstance(phase.state, PhaseState):
            counts = phase.state.phase.attributes
            accepted = introspection.truth(result)
            for name, one in ((semconv.BOOTSTRAP_ATTEMPTS, True), (semconv.BOOTSTRAP_ACCEPTED, bool(accepted))):
                so_far = counts.get(name, 0)
                counts[name] = (so_far if isinstance(so_far, int) else 0) + one

    def close(self, call: Call, result: Any, error: BaseException | None) -> None:
        super().close(call, result, error)
        end_example(call, failed=error is not None or introspection.truth(result) is False)

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        accepted = introspection.truth(result)
        return {} if error is not None or accepted is None else {semconv.BOOTSTRAP_ACCEPTED: accepted}


@hooks
def patch(optimizers: Optimizers, patches: Patches) -> None:
    """The phase, and each attempt in it."""
    owner = resolve("dspy.teleprompt.bootstrap", "BootstrapFewShot")
    phase = optimizers.phases.hook(lambda *_: Phase(semconv.PHASE_BOOTSTRAP, semconv.ROLE_TEACHER))
    patches.around(owner, "_bootstrap", phase, loses="BootstrapFewShot's bootstrap phase")
    attempts = AttemptOperation(optimizers.telemetry, optimizers.programs)
    patches.wrap(owner, "_bootstrap_one_example", attempts.wrap, loses="BootstrapFewShot's attempts")
