"""What a call hands on to the calls inside it.

A call context travels inside the OpenTelemetry context, beside the current span: whatever carries that (a thread bound
by us, an asyncio task, the user's own propagation) carries both. The keys of OpenTelemetry contexts that are read and
written here are not public: the public helpers show them, and copy a context for each key, on every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from opentelemetry import context as otel_context
from opentelemetry.baggage import set_baggage
from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanContext, SpanKind, set_span_in_context

from dspy_otel.core.attributes import EMPTY, Attributes
from dspy_otel.core.usage import Totals

if TYPE_CHECKING:
    from dspy_otel.core.errors import Recorded

_State = TypeVar("_State")

MAX_LINKS: Final = 128
"""Most links from one span to those inside it (the SDK keeps no more)."""


class Program:
    """The outermost module of a call tree, as far as its inner operations need it.

    Attributes:
        name: its class name.
        id: ``dspy.program.id``, when it has predictors.
        paths: ``id(module)`` to the module's path from this program.
        origins: how copies of its modules are known; see :func:`dspy_otel.operations.module_tree.origins`.
        descriptions: span name and attributes of its modules' calls, by path; made once, also for its copies.
    """

    __slots__ = ("descriptions", "id", "name", "origins", "paths")

    def __init__(
        self,
        name: str,
        program_id: str | None = None,
        paths: dict[int, str] | None = None,
        origins: dict[tuple[int, str, str], list[str]] | None = None,
    ) -> None:
        self.name = name
        self.id = program_id
        self.paths = paths or {}
        self.origins = origins or {}
        self.descriptions: dict[str, Any] = {}

    def copy(self, paths: dict[int, str]) -> Program:
        """The same program for a copy of its modules, which have these paths. They share their descriptions."""
        made = Program(self.name, self.id, paths, self.origins)
        made.descriptions = self.descriptions
        return made


class SpanFactory(Protocol):
    """What makes spans: a light tracer, or the public way."""

    def begin_span(
        self, name: str, context: Context, kind: SpanKind, attributes: Attributes, links: Sequence[Link]
    ) -> Span:
        """Start a span, as ``Tracer.start_span`` does."""


class DeferredFactory(SpanFactory, Protocol):
    """What makes the spans of a call in place of OpenTelemetry's tracer, in a trace that is dropped or deferred."""

    @property
    def dropped(self) -> Span | None:
        """The one span of a trace that is dropped; ``None`` where it may be kept."""


class BudgetAround(Protocol):
    """A limit on what LM calls use, as far as calls inside its block need it: :class:`dspy_otel.budgets.Budget`."""

    def admit(self, call: CallContext, telemetry: Any) -> None:
        """An LM call is about to begin; raises if it must not."""

    def settle(self, call: CallContext, telemetry: Any, error: BaseException | None) -> None:
        """An LM call has ended; raises if the budget cannot be enforced."""

    def admit_task(self, call: CallContext) -> None:
        """A task is about to go to a worker process, where no budget holds; raises if it must not."""

    def settle_task(self, call: CallContext) -> None:
        """A task of a worker process has handed back what it used. Never raises: the next call does."""

    def must_stop(self) -> bool:
        """Whether a limit has been reached, here or of a budget around this one."""


class CallContext:
    """One call, as the calls inside it see it.

    A call context is made by its operation's ``start()``, in the thread of the call, and is complete before any other
    thread can see it. From then on only the fields marked as such change. Calls inside read it in whichever thread
    they run; they copy ``program``, ``paths``, ``inherited``, ``role``, ``totals``, ``deferred`` and ``budget`` when
    they are made, and a later change reaches those that begin after it. Where several threads may write a field, each
    write is one assignment, or the field has a lock of its own.

    Attributes:
        kind: which operation this is (``module``, ``lm``, ``example``, ...). Never changes. Read by the operation
            itself (a call of the same kind on the same owner may be the overridden method) and in warnings.
        owner: the DSPy object that was called; of an example, the program that answers it. Written by ``start()``.
        parent: the call around it. Never changes.
        state: what the operation keeps of this call, in a type of its own. Written by ``start()``; its fields by the
            operation's hooks in DSPy, which find it by :func:`current_state`, and by calls inside it that find it by
            :func:`enclosing_state`. The type says which of them several threads may write.
        span: its span. Written when the span has been started, before the call's context is attached; read by hooks
            that add events, and for links.
        program: the program it works in, or ``None`` outside of one. Written by ``start()`` of the outermost module,
            of an evaluation and of a compile.
        paths: module paths to look inner modules up in. Written as ``program`` is.
        inherited: attributes that every span inside carries (ids of evaluation, run, trial and candidate; session and
            user). Replaced by ``start()``, never changed in place: inner contexts share it. Its values can be sent by
            every exporter once the call is open.
        role: what the LM calls inside are for; ``None`` outside of evaluations and optimizations. Written by
            ``start()``, by :meth:`module_answered` in the thread of the example, and by an optimizer's tracker in the
            thread of the compile.
        evaluated: the program that ``owner`` is, where that has been looked at for all calls inside: of an example,
            when its evaluation began. Written by ``start()``.
        role_after: the role once ``owner`` has answered: of an example, what the metric's own LM calls are for.
            Written by ``start()``.
        totals: all running totals that an LM call inside adds to, from any thread (each has a lock).
        operation: what opened it; ``None`` where nothing did. Written when the call is opened, read by an operation of
            the same kind when one entry point of ``owner`` calls another.
        override_of: the subclass whose override of the entry point opened this; ``None`` if that was no override.
            Written when the call is opened, read by the operation when the override calls what it overrides.
        deferred: what takes the place of the tracer; ``None``: spans are started right away. Written by ``start()``
            of an evaluated example.
        budget: the innermost budget around it; ``None`` outside of one. Written by the budget, which makes a call
            context of its own for those inside.
        failed: an exception that an inner call has recorded already; never the exception itself. Written when an inner
            call ends, in its thread; read when this one ends.
        links: how many links :meth:`add_link` has put on its span, from any thread.
    """

    __slots__ = (
        "__weakref__",
        "budget",
        "deferred",
        "evaluated",
        "failed",
        "inherited",
        "kind",
        "links",
        "operation",
        "override_of",
        "owner",
        "parent",
        "paths",
        "program",
        "role",
        "role_after",
        "span",
        "state",
        "totals",
    )

    program: Program | None
    paths: dict[int, str] | None
    inherited: Attributes
    role: str | None
    totals: tuple[Totals, ...]
    deferred: DeferredFactory | None
    budget: BudgetAround | None

    def __init__(self, kind: str, owner: Any, parent: CallContext | None, state: Any = None) -> None:
        self.kind = kind
        self.owner = owner
        self.parent = parent
        self.state = state
        self.span: Span | None = None
        self.evaluated: Program | None = None
        self.role_after: str | None = None
        self.operation: Any = None
        self.override_of: type | None = None
        self.failed: Recorded | None = None
        self.links = 0
        if parent is None:
            self.program = self.paths = self.role = self.deferred = self.budget = None
            self.inherited = EMPTY
            self.totals = ()
        else:
            self.program = parent.program
            self.paths = parent.paths
            self.inherited = parent.inherited
            self.role = parent.role
            self.totals = parent.totals
            self.deferred = parent.deferred
            self.budget = parent.budget

    def module_answered(self, module: Any) -> None:
        """A module directly inside has answered. If that was ``owner``, its role is over."""
        if self.role_after is not None and self.owner is module:
            self.role = self.role_after

    def add_link(self, linked: SpanContext, attributes: Any = None) -> None:
        """Link the span to another one, unless it has ended or has :data:`MAX_LINKS` already."""
        if self.span is not None and self.links < MAX_LINKS and self.span.is_recording():
            self.links += 1
            self.span.add_link(linked, attributes)


# --- finding it --------------------------------------------------------------------------------------------------


def current_call_context(context: Context | None = None) -> CallContext | None:
    """The innermost call of ``context`` (default: the current one)."""
    found = (current_context() if context is None else context).get(CALL_CONTEXT_KEY)
    return found if found.__class__ is CallContext else None


def current_state(kind: type[_State], context: Context | None = None) -> _State | None:
    """The state of the innermost call of ``context`` (default: the current one), if it is of this type."""
    call_context = current_call_context(context)
    state = None if call_context is None else call_context.state
    return state if isinstance(state, kind) else None


def enclosing_state(
    call_context: CallContext | None, kind: type[_State], until: tuple[type, ...] = ()
) -> _State | None:
    """The state of this type of the nearest call, ``call_context`` itself or one around it.

    Args:
        call_context: where to begin.
        kind: the type of state.
        until: types of states beyond which nothing counts.
    """
    while call_context is not None:
        state = call_context.state
        if isinstance(state, kind):
            return state
        if until and isinstance(state, until):
            return None
        call_context = call_context.parent
    return None


# --- OpenTelemetry contexts --------------------------------------------------------------------------------------


def _suppression_keys() -> frozenset[str]:
    token = otel_context.attach(Context())  # what surrounds the import must not hide a key
    try:
        with suppress_instrumentation():
            return frozenset(otel_context.get_current())
    finally:
        otel_context.detach(token)


def _runtime() -> tuple[Callable[[], Context], Callable[[Context], Token[Context]]]:
    """How to get and attach the current context: by OpenTelemetry's context variable, if that is what it has."""
    context = Context({"dspy_otel": True})
    token = otel_context.attach(context)
    try:
        variable = getattr(token, "var", None)
        if type(variable) is ContextVar and variable.get() is context:
            return variable.get, variable.set
    finally:
        otel_context.detach(token)
    return otel_context.get_current, otel_context.attach


current_context, attach = _runtime()
"""What ``opentelemetry.context.get_current`` and ``attach`` do, without the two calls that each of them makes."""
CALL_CONTEXT_KEY: Final = otel_context.create_key("dspy_otel.call_context")
SPAN_KEY: Final = next(iter(set_span_in_context(INVALID_SPAN, Context())))
BAGGAGE_KEY: Final = next(iter(set_baggage("key", "value", Context())))
_SUPPRESSION_KEYS: Final = _suppression_keys()


def suppressed(context: Context) -> bool:
    """Whether ``context`` was made inside ``suppress_instrumentation()``."""
    # Both: most contexts have no such key, and that is known without a call of Python's.
    return not _SUPPRESSION_KEYS.isdisjoint(context) and any(map(context.get, _SUPPRESSION_KEYS))


def inside(context: Context, span: Span, call_context: CallContext) -> Context:
    """``context`` with this span and this call as the current ones."""
    return Context({**context, SPAN_KEY: span, CALL_CONTEXT_KEY: call_context})


def with_call_context(context: Context, call_context: CallContext) -> Context:
    """``context`` with this call as the innermost one, and the same span."""
    return Context({**context, CALL_CONTEXT_KEY: call_context})


def without_call_context(context: Context) -> Context:
    """``context`` without our call, to be kept for longer than the call: a call context keeps the program alive."""
    return Context({key: value for key, value in context.items() if key != CALL_CONTEXT_KEY})
