"""What an operation passes on to everything it encloses.

A scope travels inside the OpenTelemetry context, beside the current span: whatever carries the context (a thread
bound by us, an asyncio task, the user's own propagation) carries both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import Span

from .attributes import EMPTY, ReadOnlyAttributes
from .totals import Totals

if TYPE_CHECKING:
    from .errors import Recorded
    from .hold import Dropped, Held

SCOPE_KEY: Final = otel_context.create_key("dspy_otel.scope")


class Program:
    """The outermost module of a call tree, as far as its inner operations need it.

    Attributes:
        name: its class name.
        id: ``dspy.program.id``, when it has predictors.
        paths: ``id(module)`` to the module's path from this program.
    """

    __slots__ = ("id", "name", "paths")

    def __init__(self, name: str, program_id: str | None, paths: dict[int, str]) -> None:
        self.name = name
        self.id = program_id
        self.paths = paths


class Scope:
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
        notes: the operation's own scratch, written by hooks further down.
        override_of: the subclass whose override of the entry point opened this; ``None`` if that was no override.
        hold: takes the place of the tracer; ``None``: spans are made right away.
        failed: an exception that an inner operation has already recorded; never the exception itself.
    """

    __slots__ = (
        "failed",
        "hold",
        "kind",
        "notes",
        "override_of",
        "owner",
        "parent",
        "paths",
        "program",
        "role",
        "span",
        "stamps",
        "totals",
    )

    def __init__(
        self,
        kind: str,
        owner: Any,
        parent: Scope | None,
        *,
        program: Program | None = None,
        paths: dict[int, str] | None = None,
        stamps: ReadOnlyAttributes = EMPTY,
        role: str | None = None,
        totals: tuple[Totals, ...] = (),
    ) -> None:
        self.kind = kind
        self.owner = owner
        self.parent = parent
        self.program = program
        self.paths = paths
        self.stamps = stamps
        self.role = role
        self.totals = totals
        self.span: Span | None = None
        self.notes: dict[str, Any] = {}
        self.override_of: type | None = None
        self.failed: Recorded | None = None
        self.hold: Dropped | Held | None = None

    def child(self, kind: str, owner: Any) -> Scope:
        """A scope inside this one that passes everything on unchanged."""
        scope = Scope(
            kind,
            owner,
            self,
            program=self.program,
            paths=self.paths,
            stamps=self.stamps,
            role=self.role,
            totals=self.totals,
        )
        scope.hold = self.hold
        return scope


def current_scope(context: Context | None = None) -> Scope | None:
    """The innermost scope of ``context`` (default: the current one)."""
    found = otel_context.get_value(SCOPE_KEY, context)
    return found if isinstance(found, Scope) else None


def open_scope(kind: str, owner: Any, parent: Scope | None) -> Scope:
    """A scope below ``parent``, or an outermost one."""
    return Scope(kind, owner, None) if parent is None else parent.child(kind, owner)
