"""BootstrapFewShot: a teacher answers training examples, until enough of its answers pass the metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opentelemetry.trace import Link

from .. import semconv as names
from ..operations.evaluation import MAX_LINKS, callable_name, metric_name, split_example
from ..operations.module import put_inputs
from ..operations.program import Programs
from ..patching import Patches, resolve
from ..telemetry.attributes import Attributes
from ..telemetry.core import Telemetry
from ..telemetry.scope import Scope
from ..telemetry.spans import Call, Operation, Start, openinference
from .plan import Phase, Plan
from .run import run_of
from .volume import begin_example, end_example

if TYPE_CHECKING:
    from . import Optimizers


class BootstrapPlan(Plan):
    """No trials: one phase of attempts."""

    role = names.ROLE_TEACHER
    program_role = names.ROLE_TEACHER


class AttemptOperation(Operation):
    """``BootstrapFewShot._bootstrap_one_example``: the teacher's answer to one example, and the metric's verdict.

    Like an evaluated example it is a trace of its own, linked both ways to its phase; but not when a program compiles
    as part of its answer: one call is one trace.
    """

    kind = "example"

    def __init__(self, telemetry: Telemetry, programs: Programs) -> None:
        super().__init__(telemetry)
        self.programs = programs

    def start(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: Scope | None) -> Start | None:
        run = run_of(parent)
        if parent is None or parent.kind != "phase" or run is None:
            return None
        teacher = instance.teacher
        # The scope's owner is the teacher, so that its answer can be told from what the metric calls.
        scope = Scope(self.kind, teacher, parent)
        scope.role = names.ROLE_TEACHER
        name = callable_name(teacher)
        attributes: Attributes = {names.PROGRAM_NAME: name}
        metric = metric_name(instance.metric)
        if metric is not None:
            attributes[names.EVALUATION_METRIC_NAME] = metric
        tried = args[1] if len(args) > 1 else kwargs.get("round_idx", 0)
        if isinstance(tried, int):
            attributes[names.BOOTSTRAP_ROUND] = tried
        openinference(attributes, self.telemetry, names.KIND_CHAIN)
        begin_example(self.telemetry, scope)
        linked = self.telemetry.config.evaluation_traces == "linked" and not run.inference_time
        scope.notes["linked"] = linked
        links = [Link(parent.span.get_span_context())] if linked and parent.span is not None else []
        return Start(f"{names.SPAN_BOOTSTRAP_ATTEMPT} {name}", scope, attributes, root=linked, links=links)

    def detail(self, call: Call) -> Attributes:
        example = call.args[0] if call.args else call.kwargs.get("example")
        attributes: Attributes = {}
        example_id = self.programs.example_id(example)
        if example_id is not None:
            attributes[names.EXAMPLE_ID] = example_id
        if self.telemetry.config.content_on_spans:
            inputs, expected = split_example(example)
            put_inputs(self.telemetry, attributes, inputs)
            self.telemetry.put_content(attributes, names.EXAMPLE_EXPECTED, expected)
        phase = call.scope.parent
        linked = call.scope.notes["linked"] and call.scope.hold is None
        if linked and phase is not None and phase.span is not None:
            links = phase.notes.get("links", 0)
            if links < MAX_LINKS and phase.span.is_recording():
                phase.notes["links"] = links + 1
                phase.span.add_link(call.span.get_span_context())
        return attributes

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        phase = call.scope.parent
        if phase is not None and isinstance(phase.owner, Phase):
            said = phase.owner.attributes
            for name, one in ((names.BOOTSTRAP_ATTEMPTS, True), (names.BOOTSTRAP_ACCEPTED, bool(result))):
                so_far = said.get(name, 0)
                said[name] = (so_far if isinstance(so_far, int) else 0) + one

    def close(self, call: Call, result: Any, error: BaseException | None) -> None:
        super().close(call, result, error)
        end_example(call, failed=error is not None or not result)

    def result(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        return {} if error is not None else {names.BOOTSTRAP_ACCEPTED: bool(result)}


PLANS: Final[dict[str, type[Plan]]] = {"BootstrapFewShot": BootstrapPlan}


def patch(optimizers: Optimizers, patches: Patches) -> None:
    """The phase, and each attempt in it."""
    owner = resolve("dspy.teleprompt.bootstrap", "BootstrapFewShot")
    phase = optimizers.phases.around(lambda run, args, kwargs: Phase(names.PHASE_BOOTSTRAP, names.ROLE_TEACHER))
    patches.wrap(owner, "_bootstrap", phase, loses="BootstrapFewShot's bootstrap phase")
    attempts = AttemptOperation(optimizers.telemetry, optimizers.programs)
    patches.wrap(owner, "_bootstrap_one_example", attempts.wrap, loses="BootstrapFewShot's attempts")
