"""What the two ways into MLflow share: the error, the wished experiment and how it is found."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

import platformdirs
from filelock import FileLock, Timeout
from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel.content import redaction

OLDEST_MLFLOW = "3.14"
"""First release whose OTLP endpoint keeps trace tags and resource attributes (compared over the wheels)."""


class ExportError(Exception):
    """A batch cannot be delivered. It never leaves the exporter.

    Args:
        cause: short stable key; each cause is logged once, so two failures with one cause give one line.
        message: what is wrong and what to do about it, free of credentials.
        permanent: True when trying again in this process cannot help (MLflow missing, unusable URI).
    """

    def __init__(self, cause: str, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.cause = cause
        self.permanent = permanent


class Destination(Protocol):
    """Where translated spans go. ``send`` raises :class:`ExportError` when a batch cannot be delivered."""

    def send(self, spans: Sequence[ReadableSpan]) -> None:
        """Deliver a batch."""

    def alive(self) -> bool:
        """Whether it answers at all."""

    def after_fork(self) -> None:
        """In a forked child: give up connections that the parent process still uses."""

    def close(self) -> None:
        """Release connections."""


class Patience:
    """How long a request may take; less when the program ends.

    Args:
        seconds: for one request.

    Attributes:
        insists: whether a request is sent again at once when it fails. Who has a queue need not hold it up.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = float("inf")
        self.insists = True

    @property
    def seconds(self) -> float:
        """For the next request."""
        return max(0.5, min(self._seconds, self._until - time.monotonic()))

    def hurry(self, seconds: float, until: float) -> None:
        """The program ends: at most so many seconds for one request, and none after ``until`` (monotonic clock)."""
        self._seconds = min(self._seconds, seconds)
        self._until = until


@dataclass(frozen=True)
class WantedExperiment:
    """An experiment as the user named it; ``is_id`` is None when it may be a name or an id.

    ``create`` is False for those who only read: a wrong name is an error then.
    """

    value: str
    is_id: bool | None
    create: bool = True


class FoundExperiment(NamedTuple):
    """An experiment as the store knows it."""

    experiment_id: str
    lifecycle_stage: str


class Experiments(Protocol):
    """The three look-ups of a store that finding an experiment needs."""

    def by_id(self, experiment_id: str) -> FoundExperiment | None:
        """Return the experiment with this id, or None."""

    def by_name(self, name: str) -> FoundExperiment | None:
        """Return the experiment with this name, a deleted one included, or None."""

    def create(self, name: str) -> str:
        """Create an experiment and return its id; raises :class:`ExportError` when the name is taken."""


def resolve_experiment(wanted: WantedExperiment, experiments: Experiments) -> str:
    """Return the id of the wanted experiment, created when it is a name that does not exist.

    Raises:
        ExportError: an id that does not exist, a name that does not when it is not to be created, or an experiment
            that was deleted.
    """
    found = None
    if wanted.is_id or (wanted.is_id is None and wanted.value.isdigit()):
        found = experiments.by_id(wanted.value)
        if found is None and wanted.is_id:
            raise ExportError("experiment", f"MLflow has no experiment with id {wanted.value} (MLFLOW_EXPERIMENT_ID).")
    if found is None:
        found = experiments.by_name(wanted.value)
    if found is None and not wanted.create:
        raise ExportError("experiment", f"MLflow has no experiment {wanted.value!r}.", permanent=True)
    if found is None:
        try:
            return experiments.create(wanted.value)
        except ExportError:
            # Another process may have created it since we looked.
            found = experiments.by_name(wanted.value)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ExportError(
            "experiment",
            f"MLflow experiment {wanted.value!r} is deleted: restore it "
            f"(mlflow experiments restore -x {found.experiment_id}) or choose another.",
        )
    return found.experiment_id


def public_uri(uri: str) -> str:
    """Return ``uri`` without a user name or password, fit for a log line."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


def first_line(error: Exception) -> str:
    """Type and first line of an error: SQLAlchemy's go on with statements and parameters, which are content."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {safe_text(lines[0], 300) if lines else ''}"


def safe_text(text: str, most: int) -> str:
    """Text of a server or a library, fit for a log line: short, on one line, without secrets and terminal codes.

    Args:
        text: anything.
        most: characters to keep.
    """
    shown = redaction.mask(" ".join(text[: 4 * most].split()))
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in shown)[:most]


def say(log: Callable[..., object], message: str, *arguments: object) -> None:
    """Log ``message % arguments``; a handler of the user's that raises must not stop the thread that says it.

    Args:
        log: a method of a logger.
        message: a %-format.
        arguments: for the format.
    """
    with contextlib.suppress(Exception):
        log(message, *arguments)


@contextlib.contextmanager
def only_process(name: str, seconds: float) -> Iterator[None]:
    """Work while no other process of this user does the same.

    Where no lock can be made, or another process has it for longer than ``seconds``, the work goes on without.

    Args:
        name: what is worked on.
        seconds: to wait for others, at most.
    """
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:16]
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, Timeout):
            directory = platformdirs.user_state_path("dspy-otel") / "locks"
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(FileLock(directory / f"{digest}.lock", timeout=seconds, mode=0o600))
        yield
