"""What an answer of MLflow means, and when to try again: the one policy for spans, links, scores, runs and artifacts.

:func:`judge` looks at status, type and body of an HTTP answer; errors of a store in this process come with a verdict of
their own. Callers catch :class:`ExportError` and act on its ``verdict``:

* *delivered*: MLflow's own answer. A page in HTML with status 200 is a proxy's login page, not MLflow's.
* *try later*: with a :class:`Backoff`, without a limit on the number of attempts. It ends with delivery, or with the
  end of the program, and then the journal has it.
* *split*: something in the batch is refused; the parts are sent on their own.
* *lost*: MLflow does not have the run any more that it had, as after a restart with an empty database. All of its
  optimization is kept, for replay to write anew.
* *refused*: this item, for good. It is set aside on disk, counted, and named in one line.

An answer such as 408, 423, 500 or ``BAD_REQUEST`` may concern the item itself: its ``try later`` becomes ``split`` when
other items got through between its failures, because then MLflow works and the item is the cause.

Only spans can be set aside; other refused items are lost. So only MLflow's own refusal counts for those, which has
an error code: a proxy may answer 404 to every request for a while.
"""

from __future__ import annotations

import enum
import random
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from dspy_otel.content import redaction

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
LONGEST_RETRY_AFTER: Final = 300.0
"""Seconds. A server that asks for more is asked again sooner."""
MAX_TEXT: Final = 200
"""Most characters of a server's own words in a log line."""

MAX_ADDRESS: Final = 4_096
"""Most characters of an address: people copy it."""

LOCKED: Final = "locked"
"""The cause of errors of a store that another program holds."""

_random: Final = random.SystemRandom()
"""A generator of our own: a program that seeds Python's shared one gets the same numbers with us."""
_LATER: Final = frozenset({408, 421, 423, 425, 429})
_GATEWAY: Final = frozenset({429, 502, 503, 504})
"""Statuses that do not depend on the request."""
_CREDENTIALS: Final = frozenset({401, 403, 407, 511})
_DATABASE: Final = "BAD_REQUEST"
"""MLflow's error code for errors of its database: a value that does not fit, or no free connection for a while."""
_NO_CONNECTION: Final = b"QueuePool limit"
"""The words of SQLAlchemy for the second of these."""


class Verdict(enum.Enum):
    """What to do after an answer."""

    DELIVERED = "delivered"
    LATER = "try later"
    SPLIT = "split"
    LOST = "lost"
    REFUSED = "refused"


class ExportError(Exception):
    """Something could not be written or read. Public functions raise it only where their docstrings say so.

    Args:
        cause: short stable key; each cause is logged once, so two failures with one cause give one line.
        message: what is wrong and what to do about it, free of credentials.
        verdict: what to do with the item.
        unavailable: MLflow as a whole fails, not this item: nothing else would get through now.
        retry_after: seconds that the server asks for.
        permanent: trying again in this process cannot help (MLflow is missing, the URI is unusable).
    """

    def __init__(
        self,
        cause: str,
        message: str,
        verdict: Verdict = Verdict.LATER,
        *,
        unavailable: bool = False,
        retry_after: float | None = None,
        permanent: bool = False,
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.verdict = verdict
        self.unavailable = unavailable
        self.retry_after = retry_after
        self.permanent = permanent


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, read within limits.

    Attributes:
        status: of HTTP.
        kind: its content type.
        body: all of it, or its beginning.
        error_code: MLflow's own, when the body has one.
        location: where a redirect points.
        retry_after: the header.
    """

    status: int
    kind: str = ""
    body: bytes = b""
    error_code: str | None = None
    location: str | None = None
    retry_after: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the status is one of success."""
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        """The server's own words, fit for a log line: bounded, without control characters, secrets masked."""
        return "" if self.is_page else clean(self.body[: 8 * MAX_TEXT].decode("utf-8", "replace"))

    @property
    def is_page(self) -> bool:
        """Whether it is a page for people: a proxy's, not MLflow's."""
        return "html" in self.kind.lower() or self.body.lstrip()[:1] == b"<"


def judge(answer: Answer, *, ours: bool, spans: bool = False) -> Verdict:
    """What an answer means for what was sent.

    Args:
        answer: of the server.
        ours: whether the body has the form of MLflow's own success.
        spans: whether spans were sent. Any refusal counts for those, because they are set aside.
    """
    if answer.ok:
        return Verdict.DELIVERED if ours and not answer.is_page else Verdict.LATER
    status = answer.status
    if status < 400 or status >= 500 or status in _LATER or status in _CREDENTIALS or answer.error_code == _DATABASE:
        return Verdict.LATER
    return Verdict.SPLIT if spans or answer.error_code is not None else Verdict.LATER


def explain(answer: Answer, verdict: Verdict, name: str, what: str = "") -> ExportError:
    """Make an error of an answer that is no delivery.

    Args:
        answer: of the server.
        verdict: what it means.
        name: of the server, for people.
        what: was sent, for people.
    """
    status = answer.status
    words = f"{status} {answer.text}".strip()
    seconds = retry_after(answer.retry_after)
    if answer.ok:
        page = "a page (a login page of a proxy?)" if answer.is_page else f"{words!r}"
        return ExportError("page", f"{name} answers with {page}, which is not MLflow's answer.", unavailable=True)
    if status in _CREDENTIALS:
        return ExportError(
            "credentials",
            f"MLflow at {name} refused the credentials ({status}): set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
            unavailable=True,
        )
    if 300 <= status < 400:
        target = clean(answer.location or "elsewhere")
        return ExportError("redirect", f"MLflow at {name} redirects to {target}: use that address.", unavailable=True)
    if status in _GATEWAY:
        return ExportError(
            "unreachable",
            f"MLflow at {name} cannot be reached ({words}): is the server running, and is MLFLOW_TRACKING_URI right?",
            unavailable=True,
            retry_after=seconds,
        )
    if answer.error_code == _DATABASE and _NO_CONNECTION in answer.body:
        return ExportError(
            "busy", f"MLflow at {name} is busy: it has no free connection to its database.", unavailable=True
        )
    prefix = f"{what}: " if what else ""
    return ExportError(f"status {status}", f"{prefix}MLflow at {name} refused: {words}.", verdict, retry_after=seconds)


def retry_after(header: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for; None when it has no usable value."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return min(seconds, LONGEST_RETRY_AFTER) if seconds >= 0 else None


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Make a foreign text fit for a log line: masked secrets, no control characters, one bounded line."""
    plain = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    return redaction.mask(" ".join(plain.split()))[:limit]


class Backoff:
    """When to try again: pauses grow to a ceiling, and a longer ``Retry-After`` of the server is respected.

    Args:
        clock: seconds, monotonic.

    Attributes:
        failures: in a row.
        due: when to try again, by the clock; 0 for now.
        error: the last one, until something succeeds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.failures = 0
        self.due = 0.0
        self.error: ExportError | None = None

    @property
    def ready(self) -> bool:
        """Whether it is time to try."""
        return self._clock() >= self.due

    def failed(self, error: ExportError) -> None:
        """Record a failed attempt."""
        self.error = error
        pause = min(FIRST_PAUSE * 2 ** min(self.failures, 16), LONGEST_PAUSE)
        self.failures += 1
        pause *= _random.uniform(0.8, 1.2)  # programs that lost one server do not all retry at once
        self.due = self._clock() + max(pause, error.retry_after or 0.0)

    def succeeded(self) -> bool:
        """Record an attempt that succeeded; True when the one before it failed."""
        recovered = self.failures > 0
        self.failures, self.due, self.error = 0, 0.0, None
        return recovered

    def retry_now(self) -> None:
        """Try at once: a caller waits for the result."""
        self.due = 0.0

    def restart(self) -> None:
        """Try at once, with short pauses again."""
        self.failures, self.due, self.error = 0, 0.0, None
