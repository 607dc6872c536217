"""What an operation passes on to everything it encloses.

A scope travels inside the OpenTelemetry context, beside the current span: whatever carries the context (a thread
bound by us, an asyncio task, the user's own propagation) carries both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from opentelemetry.context import Context, get_current
from opentelemetry.trace import Span

from dspy_otel.core.attributes import EMPTY, ReadOnlyAttributes
from dspy_otel.core.context import CALL_CONTEXT_KEY
from dspy_otel.core.usage import Totals

if TYPE_CHECKING:
    from dspy_otel.core.deferred_spans import DeferredTrace, DroppedTrace
    from dspy_otel.core.errors import Recorded

_State = TypeVar("_State")


class Program:
    """The outermost module of a call tree, as far as its inner operations need it.

    Attributes:
        name: its class name.
        id: ``dspy.program.id``, when it has predictors.
        paths: ``id(module)`` to the module's path from this program.
        origins: how copies of its modules are known; see :func:`dspy_otel.operations.module_tree.origins`.
        about: what is said of each of its modules on every call, by ``id(module)``; worked out once.
    """

    __slots__ = ("about", "id", "name", "origins", "paths")

    def __init__(
        self,
        name: str,
        program_id: str | None = None,
        paths: dict[int, str] | None = None,
        origins: dict[tuple[type, str, str], list[str]] | None = None,
    ) -> None:
        self.name = name
        self.id = program_id
        self.paths = paths or {}
        self.origins = origins or {}
        self.about: dict[int, Any] = {}


class CallContext:
    """One enclosing operation.

    Attributes:
        kind: which operation this is (``module``, ``lm``, ``example``, ...).
        owner: the DSPy object it belongs to.
        parent: the scope around it.
        span: its span.
        program: the program it works in; ``None`` outside of one.
        paths: module paths to look inner modules up in.
        stamps: attributes that every span below carries (evaluation, run, trial, candidate ids).
        role: what the LM calls below are for; ``None`` outside of evaluations and optimizations.
        totals: all running totals an LM call below adds to.
        state: what the operation keeps of this call, in a type of its own; see :func:`current_state`.
        notes: the operation's own scratch, written by hooks further down.
        override_of: the subclass whose override of the entry point opened this; ``None`` if that was no override.
        hold: takes the place of the tracer; ``None``: spans are made right away.
        failed: an exception that an inner operation has already recorded; never the exception itself.
    """

    __slots__ = (
        "deferred",
        "failed",
        "inherited",
        "kind",
        "notes",
        "override_of",
        "owner",
        "parent",
        "paths",
        "program",
        "role",
        "span",
        "state",
        "totals",
    )

    program: Program | None
    paths: dict[int, str] | None
    inherited: ReadOnlyAttributes
    role: str | None
    totals: tuple[Totals, ...]
    deferred: DroppedTrace | DeferredTrace | None

    def __init__(self, kind: str, owner: Any, parent: CallContext | None, state: Any = None) -> None:
        self.kind = kind
        self.owner = owner
        self.parent = parent
        self.state = state
        self.span: Span | None = None
        self.notes: dict[str, Any] = {}
        self.override_of: type | None = None
        self.failed: Recorded | None = None
        if parent is None:
            self.program = self.paths = self.role = self.deferred = None
            self.inherited = EMPTY
            self.totals = ()
        else:  # Passed on unchanged.
            self.program = parent.program
            self.paths = parent.paths
            self.inherited = parent.inherited
            self.role = parent.role
            self.totals = parent.totals
            self.deferred = parent.deferred


def current_call_context(context: Context | None = None) -> CallContext | None:
    """The innermost scope of ``context`` (default: the current one)."""
    found = (get_current() if context is None else context).get(CALL_CONTEXT_KEY)
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
