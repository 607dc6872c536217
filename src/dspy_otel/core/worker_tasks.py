"""Tasks in worker processes: what their LM calls have used comes back as a record, and is counted once.

The process that sends a task keeps where its usage belongs, under an id that travels with the task. The worker collects
what the task uses, and makes a record of it, which is text: it may travel with a result, with an exception, in a column
or a header. Whoever gets it back adds it by :func:`receive`. A record has an id of its own, so it counts once however
often it arrives, and a task that runs twice hands back two records, which both count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import secrets as random_source
import sys
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dspy_otel import semconv
from dspy_otel.core.call_context import CallContext
from dspy_otel.core.internal_errors import warn_once
from dspy_otel.core.usage import Sums, Totals, UsageOfTask

ROLES: Final = frozenset(
    {semconv.ROLE_TASK, semconv.ROLE_JUDGE, semconv.ROLE_PROPOSER, semconv.ROLE_REFLECTION, semconv.ROLE_TEACHER}
)
MAX_UNANSWERED: Final = 100_000
MAX_ANSWERED: Final = 5_000
"""Most tasks that are kept of those that have not answered, and of those that have: they may send another record. The
oldest is forgotten first."""
MAX_RECORDS: Final = 1000
"""Most records of one task, and most of its runs, that are known to have arrived."""
MAX_WAITING: Final = 100
"""Most records that wait in one process."""
_MOST: Final = 2**53
_LONGEST: Final = 256
"""No count reaches the one, and no id is longer than the other. What is comes from no worker of ours."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a task has used since its last record.

    Attributes:
        task: id of the task.
        id: of the record.
        used: sums by role; ``None`` for LM calls without one.
        tasks: how many tasks it has sent further, and how many of those have answered.
        run: the framework's id of what runs in the worker, where it has one: several may share a carrier.
        attempt: how often the framework had begun that run before, as after the loss of a worker.
        counted: whether instrumentation was on in the worker.
    """

    task: str
    id: str
    used: Mapping[str | None, Sums]
    tasks: tuple[int, int] = (0, 0)
    run: str = ""
    attempt: int = 0
    counted: bool = True

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        used = {role or "": list(sums) for role, sums in self.used.items()}
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**own, "used": used, "tasks": list(self.tasks)}

    @classmethod
    def of(cls, fields: Any) -> Record:
        """The record with such fields.

        Raises:
            ValueError: for anything that :meth:`fields` does not make.
        """
        try:
            task, id_, used, (sent, answered), run, attempt, counted = (
                fields[field.name] for field in dataclasses.fields(cls)
            )
            sums = {role if role in ROLES else None: _sums(*numbers) for role, numbers in used.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("no record") from error
        if not all(map(_is_count, (sent, answered, attempt))) or not all(map(_is_id, (task, id_, run))):
            raise ValueError("no record")
        return cls(task, id_, sums, (sent, answered), run, attempt, counted is not False)


class Task:
    """One task that was sent, or several that share what they were sent with.

    Attributes:
        id: travels with it; begins with that of this process.
        totals: of the calls around the place where it was sent.
        context: the innermost of those calls, as long as that lasts.
    """

    __slots__ = ("_records", "_runs", "context", "id", "totals")

    def __init__(self, context: CallContext) -> None:
        self.id = f"{_process}-{next(_numbers)}"
        self.totals: tuple[Totals, ...] = context.totals
        self.context = weakref.ref(context)
        self._records: dict[str, None] = {}
        self._runs: dict[str, set[int]] = {}  # the attempts that have answered; where none has, it is below the highest

    def add(self, record: Record) -> bool:
        """Count a record. Returns ``False`` if it has arrived before. Called with the lock of all tasks."""
        if record.id in self._records:
            return False
        _keep(self._records, record.id, None)
        sent, answered = record.tasks
        more_sent, more_answered = self._answered(record.run, record.attempt)
        for totals in self.totals:
            totals.count_tasks(sent + more_sent, answered + more_answered)
            for role, sums in record.used.items():
                totals.add_sums(sums, role)
        return True

    def _answered(self, run: str, attempt: int) -> tuple[int, int]:
        """How many more tasks than known were sent, and have answered: each attempt is one, and so is each run."""
        known = self._runs.get(run)
        before = 0 if known is None else max(known) + 1
        more = max(attempt + 1 - before, 0)
        if not self._runs:
            more -= 1  # was counted when it was sent
        if known is None:
            known = set()
            _keep(self._runs, run, known)
        is_new = attempt not in known
        known.add(attempt)
        return more, int(is_new)


class Collector:
    """What a task uses in this process, from its start on.

    Args:
        task: id of the task.

    Attributes:
        totals: that LM calls add to.
        is_home: whether this process itself has sent the task.
        run: as a :class:`Record` has it.
        attempt: likewise.
    """

    __slots__ = ("attempt", "is_home", "run", "task", "totals")

    def __init__(self, task: str) -> None:
        self.task = task
        self.totals = UsageOfTask()
        self.is_home = _sender(task) == _process
        self.run, self.attempt = _run_and_attempt()

    def take(self, counted: bool, again: bool = False) -> str:
        """What was used since the last time, as text for :func:`receive`, with the records that wait in this process.

        Args:
            counted: whether instrumentation is on here.
            again: it may not arrive: the next one from this process has it, too.
        """
        used, tasks = self.totals.take()
        id_ = random_source.token_hex(8)
        record = Record(self.task, id_, used, tasks, self.run, self.attempt, counted)
        records = [record, *_take_waiting(self.task)]
        if again:
            for each in records:
                _wait(each)
        return json.dumps([each.fields() for each in records], separators=(",", ":"))


_lock = threading.Lock()
_process = random_source.token_hex(8)
_numbers = itertools.count(1)
_unanswered: dict[str, Task] = {}
_answered: dict[str, Task] = {}
_waiting: deque[Record] = deque(maxlen=MAX_WAITING)
"""Records that go along with the next one to the same process: they came here first, or may have been lost."""


def send(context: CallContext) -> str:
    """Keep where the usage of a task belongs that is being sent from ``context``, and give the task's id."""
    task = Task(context)
    with _lock:
        _keep(_unanswered, task.id, task, MAX_UNANSWERED)
    for totals in task.totals:
        totals.count_tasks(sent=1)
    return task.id


def receive(text: str) -> list[tuple[Task, Record]]:
    """Count the records in ``text``, and give those that were counted, with their tasks.

    Records of tasks that another process has sent wait here, until one of this process goes there.

    Args:
        text: what :meth:`Collector.take` made.

    Raises:
        ValueError: if it is anything else.
    """
    fields = json.loads(text)
    if not isinstance(fields, list):
        raise ValueError("no records")
    counted = []
    for record in map(Record.of, fields):
        with _lock:
            task = _unanswered.pop(record.task, None) or _answered.pop(record.task, None)
            if task is not None:
                _keep(_answered, record.task, task, MAX_ANSWERED)  # now the last to be forgotten
                if task.add(record):
                    counted.append((task, record))
        if task is None and _sender(record.task) != _process:
            _wait(record)
    for _, record in counted:
        if not record.counted:
            warn_once(
                "uninstrumented worker",
                "a worker process has counted no LM calls, for instrumentation is off there: what they have used is "
                "missing from the totals",
            )
    return counted


def _sender(task: str) -> str:
    """The process that has sent a task."""
    return task.partition("-")[0]


def _wait(record: Record) -> None:
    with _lock:
        if all(record.id != each.id for each in _waiting):  # a framework may try whether an exception can be pickled
            _waiting.append(record)


def _take_waiting(task: str) -> list[Record]:
    """The records that wait for the process that has sent ``task``."""
    with _lock:
        taken = [record for record in _waiting if _sender(record.task) == _sender(task)]
        for record in taken:
            _waiting.remove(record)
    return taken


def _run_and_attempt() -> tuple[str, int]:
    """What Ray or Celery runs here: its id, and how often it was begun before. Both retry without asking the sender.

    Ray's number of the attempt is not public: without it, a worker that Ray has replaced is not counted.
    """
    with contextlib.suppress(Exception):
        ray, celery = sys.modules.get("ray"), sys.modules.get("celery")
        if ray is not None and ray.is_initialized():
            worker = ray.get_runtime_context().worker
            return worker.current_task_id.hex(), worker.core_worker.get_current_task_attempt_number()
        if celery is not None and celery.current_task:
            request = celery.current_task.request
            return str(request.id), request.retries + bool((request.delivery_info or {}).get("redelivered"))
    return "", 0


def _keep(kept: dict[str, Any], key: str, value: Any, most: int = MAX_RECORDS) -> None:
    """Put a value into a dictionary, which forgets its oldest one."""
    kept[key] = value
    if len(kept) > most:
        del kept[next(iter(kept))]


def _sums(*numbers: Any) -> Sums:
    """What these numbers stand for.

    Raises:
        TypeError: if they are not as many as there are.
        ValueError: if they cannot be what LM calls have used.
    """
    sums = Sums(*numbers)
    counts = sums[:5] + tuple(each for each in (sums.input_tokens, sums.output_tokens) if each is not None)
    cost = sums.cost
    if not all(map(_is_count, counts)) or type(cost) not in (int, float) or not 0 <= cost < math.inf:
        raise ValueError("no sums")
    return sums


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_id(value: Any) -> bool:
    return type(value) is str and len(value) <= _LONGEST


def _after_fork() -> None:
    """Nothing of the parent is this process's: its tasks are answered there."""
    global _lock, _process  # noqa: PLW0603
    _lock = threading.Lock()  # The thread that may own the old one is not here.
    _process = random_source.token_hex(8)
    _unanswered.clear()
    _answered.clear()
    _waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
