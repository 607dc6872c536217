"""Programs, modules and agents: every ``dspy.Module`` call."""

from __future__ import annotations

import re
import weakref
from typing import Any, Final, NamedTuple

from dspy_otel import semconv
from dspy_otel.config import SemconvOptIn
from dspy_otel.content import introspection
from dspy_otel.content.names import class_name
from dspy_otel.core.attributes import Attributes, Labels, repair, sendable_name
from dspy_otel.core.call_context import BAGGAGE_KEY, CallContext, Program, current_context
from dspy_otel.core.errors import error_type
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import Call, Operation, SpanStart, openinference
from dspy_otel.core.telemetry import Telemetry
from dspy_otel.core.usage import Totals
from dspy_otel.operations import module_tree
from dspy_otel.operations.from_baggage import CALLER, attributes_from_baggage
from dspy_otel.operations.messages import as_message
from dspy_otel.operations.program import Programs

_CONTENT: Final = guard("content")
_SUBSCRIPT: Final = re.compile(r"\[[^\]]*\]")
AGENT_CLASSES: Final = frozenset({"ReAct", "ReActV2", "CodeAct", "RLM"})
"""DSPy modules in which an LM chooses what to do next."""


class ModuleState:
    """What is known of a module's call so far. Written in the thread or task of the call.

    Attributes:
        description: span name and attributes that all calls of this module share.
        totals: of the LM calls inside, if this is the outermost module, and its trace is not dropped.
        adapter: class of the adapter that served it first.
        fallback_adapter: class of the adapter that answered after the first one had failed.
        failed_adapter: class of the adapter whose parsing has failed last, until another one takes over.
        parse_errors: how often parsing has failed.
        asked: inputs of a program or agent as JSON, for a completion hook; they may change during the call.
    """

    adapter: str | None = None
    fallback_adapter: str | None = None
    failed_adapter: str | None = None
    parse_errors: int = 0
    asked: str | None = None

    def __init__(self, description: ModuleDescription, totals: Totals | None) -> None:
        self.description = description
        self.totals = totals


class ModuleOperation(Operation):
    """``Module.__call__`` and ``acall``: the outermost program, an agent, or a module inside."""

    kind = "module"

    def __init__(self, telemetry: Telemetry, programs: Programs) -> None:
        super().__init__(telemetry)
        self.programs = programs

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        context = CallContext(self.kind, instance, parent)
        path: str | None = None
        totals: Totals | None = None
        program = context.program
        outermost = program is None
        if program is None:
            known = None if parent is None or parent.owner is not instance else parent.evaluated
            program = known or self.programs.find(instance) or Program(class_name(type(instance)))
            context.program, context.paths = program, program.paths
            # Each program keeps its own totals, beside those of an evaluation or compile around it, for its span.
            if context.deferred is None or context.deferred.dropped is None:
                totals = Totals()
                context.totals = (*context.totals, totals)
            here = current_context()
            if BAGGAGE_KEY in here:
                context.inherited = {**context.inherited, **attributes_from_baggage(CALLER, here)}
        else:
            inner = context.paths or program.paths
            path = program.paths.get(id(instance)) or inner.get(id(instance))
            if path is None:  # Made during the call.
                owner = id(parent.owner) if parent is not None else 0
                place = self.programs.place(instance, program, program.paths.get(owner) or inner.get(owner))
                if place is not None:
                    path, context.paths = place
        description = self._description(instance, program, path, outermost)
        context.state = ModuleState(description, totals)
        return SpanStart(description.span, context, description.attributes.copy(), repaired=True)

    def _description(self, instance: Any, program: Program, path: str | None, outermost: bool) -> ModuleDescription:
        """Of this module. It is kept with the program, if the module is one of its own."""
        placed = "" if outermost else program.paths.get(id(instance))
        description: ModuleDescription | None = None if placed is None else program.descriptions.get(placed)
        if description is None or description.outermost is not outermost:
            description = describe(instance, program, path, outermost, self.telemetry.config.semconv_opt_in)
            openinference(
                description.attributes, self.telemetry, semconv.KIND_AGENT if is_agent(instance) else semconv.KIND_CHAIN
            )
            repair(description.attributes)
            if placed is not None:
                program.descriptions[placed] = description
        return description

    def start_attributes(self, call: Call) -> Attributes:
        stored = module_tree.attributes(call.instance)
        signature = call_signature(stored, call.kwargs)
        attributes = self._signature_attributes(call.context.state.description, signature)
        demos = introspection.length(call.kwargs.get("demos", stored.get("demos")))
        if demos is not None:
            attributes[semconv.DEMOS_COUNT] = demos
        telemetry = self.telemetry
        if telemetry.config.content_on_spans:
            if signature is not None:
                telemetry.put_text(attributes, semconv.SIGNATURE_INSTRUCTIONS, signature.instructions)
            put_inputs(telemetry, attributes, _inputs(call))
        if telemetry.completions is not None and _is_completion(call):
            with _CONTENT:
                call.context.state.asked = telemetry.content.json(_inputs(call))
        return attributes

    def _signature_attributes(self, description: ModuleDescription, signature: Any) -> Attributes:
        """Those of the signature: made anew when it is another than at the last call."""
        if signature is None:
            return {}
        known = description.signatures
        kept = known[-1] if known else None
        if kept is None or kept[0]() is not signature:
            known[:] = [kept := (weakref.ref(signature), signature_attributes(signature, self.programs))]
        return kept[1].copy()

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        attributes: Attributes = {}
        state: ModuleState = call.context.state
        if state.adapter is not None:
            attributes[semconv.ADAPTER_NAME] = state.fallback_adapter or state.adapter
            if state.fallback_adapter is not None:
                attributes[semconv.ADAPTER_FALLBACK_FROM] = state.adapter
        if state.parse_errors and self.telemetry.config.event_signal_opt_in == "logs":
            attributes[semconv.ADAPTER_PARSE_ERRORS] = state.parse_errors
        if state.totals is not None:
            # Always, for it tells a program's call from those inside: an agent that no LM has answered is one, too.
            attributes[semconv.USAGE_LM_CALLS] = 0
            attributes.update(state.totals.attributes())
        if error is None and self.telemetry.config.content_on_spans:
            put_outputs(self.telemetry, attributes, _output(result))
        return attributes

    def content(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        content: Attributes = {}
        asked = call.context.state.asked
        if asked is not None:
            content[semconv.GEN_AI_INPUT_MESSAGES] = as_message("user", asked)
        if error is None and _is_completion(call):
            with _CONTENT:
                answered = self.telemetry.content.json(_output(result))
                content[semconv.GEN_AI_OUTPUT_MESSAGES] = as_message("assistant", answered)
        return content

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        telemetry = self.telemetry
        if telemetry.measuring:
            state: ModuleState = call.context.state
            labels: Attributes = state.description.labels
            if error is not None:
                labels = {**labels, semconv.ERROR_TYPE: error_type(error)}
            telemetry.metrics.module_duration.record(seconds, labels, call.otel_context)
            agent: Attributes | None = state.description.agent
            if agent is not None and (duration := telemetry.metrics.agent_duration) is not None:
                if error is not None:
                    agent = {**agent, semconv.ERROR_TYPE: error_type(error)}
                duration.record(seconds, agent, call.otel_context)
        parent = call.context.parent
        if parent is not None and parent.role_after is not None:
            parent.module_answered(call.instance)


def _is_completion(call: Call) -> bool:
    """Whether a completion hook is called for it: it is a program or an agent, which the GenAI conventions know."""
    return semconv.GEN_AI_OPERATION_NAME in call.context.state.description.attributes


def _inputs(call: Call) -> Any:
    return call.kwargs if not call.args else {"args": call.args, **call.kwargs}


def _output(result: Any) -> Any:
    """What a module gave. Optimizers let a program return (prediction, trace); the trace is not its output."""
    traced = type(result) is tuple and len(result) == 2 and type(result[1]) is list
    return result[0] if traced else result


def is_agent(instance: Any) -> bool:
    """Whether ``instance`` is one of DSPy's agent modules, or a subclass of one."""
    return _agents.of(type(instance))


_agents: Final = introspection.ByClass(
    lambda kind: any(
        introspection.short_name_of(base) in AGENT_CLASSES and introspection.library(base) == "dspy"
        for base in introspection.bases_of(kind)
    )
)


class ModuleDescription(NamedTuple):
    """What all calls of a module share.

    Attributes:
        span: span name.
        attributes: identifying attributes of the span.
        labels: attributes of its metrics.
        agent: those of the conventions' own metric, where that is asked for and the module is a workflow or an agent.
        outermost: whether the module was the program itself.
        signatures: the signature of its last call, and its attributes.
    """

    span: str
    attributes: Attributes
    labels: Labels
    agent: Labels | None
    outermost: bool
    signatures: list[tuple[weakref.ref[type], Attributes]]


def describe(
    instance: Any, program: Program, path: str | None, outermost: bool, opt_in: SemconvOptIn = "default"
) -> ModuleDescription:
    """Span name and identifying attributes of a module's calls.

    Args:
        instance: the module.
        program: the program it is called in.
        path: where the module sits in the program, if it does.
        outermost: whether the module is the program itself.
        opt_in: whether a workflow's name is that of a workflow, as it was first, that of an agent, or both.
    """
    shown = class_name(type(instance))
    labels: Attributes = {semconv.MODULE_CLASS: shown, semconv.PROGRAM_NAME: program.name}
    attributes = labels.copy()
    if program.id is not None:
        attributes[semconv.PROGRAM_ID] = program.id
    if path:
        attributes[semconv.MODULE_PATH] = path
        labels[semconv.MODULE_PATH] = _SUBSCRIPT.sub("[*]", path)  # steps[0] and steps[1] are one series
    if is_agent(instance):
        agent = path or shown
        attributes[semconv.GEN_AI_OPERATION_NAME] = semconv.OPERATION_INVOKE_AGENT
        attributes[semconv.GEN_AI_AGENT_NAME] = agent
        span = f"{semconv.OPERATION_INVOKE_AGENT} {agent}"
    elif outermost:
        attributes[semconv.GEN_AI_OPERATION_NAME] = semconv.OPERATION_INVOKE_WORKFLOW
        if opt_in != "gen_ai":
            attributes[semconv.GEN_AI_WORKFLOW_NAME] = shown
        if opt_in != "default":
            attributes[semconv.GEN_AI_AGENT_NAME] = shown
        span = f"{semconv.OPERATION_INVOKE_WORKFLOW} {shown}"
    else:
        span = f"{shown} {path}" if path else shown
    invoked: Labels | None = None
    if opt_in != "default" and semconv.GEN_AI_OPERATION_NAME in attributes:
        named = (semconv.GEN_AI_OPERATION_NAME, semconv.GEN_AI_AGENT_NAME, semconv.PROGRAM_NAME)
        invoked = Labels({name: attributes[name] for name in named})
    return ModuleDescription(sendable_name(span), attributes, Labels(labels), invoked, outermost, [])


def call_signature(stored: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """The signature a module call works with: the call's own, else the module's, else ``None``.

    Args:
        stored: attributes of the module.
        kwargs: keyword arguments of the call.
    """
    signature = kwargs.get("signature")
    if not issubclass(type(signature), type):
        signature = stored.get("signature")
    return signature if issubclass(type(signature), type) else None


def signature_attributes(signature: Any, programs: Programs) -> Attributes:
    """Name and field names of a signature; nothing for ``None``."""
    attributes: Attributes = {}
    if signature is not None:
        attributes[semconv.SIGNATURE_NAME] = class_name(signature)
        fields = programs.signature_fields(signature)
        if fields is not None:
            attributes[semconv.SIGNATURE_FIELDS] = fields
    return attributes


def put_inputs(telemetry: Telemetry, attributes: Attributes, value: Any) -> None:
    """Add an operation's inputs, under OpenInference's key or, with that switched off, under DSPy's."""
    _put(telemetry, attributes, value, semconv.MODULE_INPUTS, semconv.INPUT_VALUE, semconv.INPUT_MIME_TYPE)


def put_outputs(telemetry: Telemetry, attributes: Attributes, value: Any) -> None:
    """Add an operation's outputs, like :func:`put_inputs`."""
    _put(telemetry, attributes, value, semconv.MODULE_OUTPUTS, semconv.OUTPUT_VALUE, semconv.OUTPUT_MIME_TYPE)


def _put(telemetry: Telemetry, attributes: Attributes, value: Any, own: str, shared: str, mime: str) -> None:
    if not telemetry.config.openinference:
        telemetry.put_content(attributes, own, value)
        return
    telemetry.put_content(attributes, shared, value)
    if shared in attributes:
        attributes[mime] = semconv.MIME_JSON
