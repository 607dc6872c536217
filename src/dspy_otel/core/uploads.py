"""OpenTelemetry's completion hook ``upload``, which writes content to a store of ``fsspec``, unnoticed by the program.

The hook decides on the names of files, their form and the references. Its own threads would keep a program from
ending while a store hangs, and it logs each file that it cannot write. Here, daemon threads write; what is lost is
counted, and logged once.

Of ``opentelemetry-util-genai``, this overrides ``UploadCompletionHook._submit_all``, which takes the files of a call,
and calls its ``_do_upload``, which writes one. In a version that has neither, that hook does everything by itself.
"""

from __future__ import annotations

import atexit
import collections
import os
import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.trace import INVALID_SPAN_CONTEXT, NonRecordingSpan, Span
from opentelemetry.util.genai._upload.completion_hook import UploadCompletionHook

from dspy_otel import semconv
from dspy_otel.content import redaction
from dspy_otel.core.internal_errors import guard, warn_once
from dspy_otel.core.metrics import WithoutExemplars

ENV_BASE_PATH: Final = "OTEL_INSTRUMENTATION_GENAI_UPLOAD_BASE_PATH"
ENV_FORMAT: Final = "OTEL_INSTRUMENTATION_GENAI_UPLOAD_FORMAT"
ENV_QUEUE_SIZE: Final = "OTEL_INSTRUMENTATION_GENAI_UPLOAD_MAX_QUEUE_SIZE"
EXIT_SECONDS: Final = 10.0
"""The longest that the end of a program waits for its last files, as the hook's own ``shutdown()``."""
_QUEUE_SIZE: Final = 20
_FORMATS: Final = ("json", "jsonl")
_MOST_WRITERS: Final = 16
_IDLE_SECONDS: Final = 5.0


def make(files: WithoutExemplars) -> Uploads:
    """The hook, with the settings that the environment has for it.

    Args:
        files: counts files, those that are lost with the reason.

    Raises:
        ValueError: the store cannot be written to, or is not named; its ``__context__`` says why.
    """
    base_path = os.environ.get(ENV_BASE_PATH, "").strip()
    if not base_path:
        raise ValueError(f"{ENV_BASE_PATH} is not set")
    size = os.environ.get(ENV_QUEUE_SIZE, "").strip() or str(_QUEUE_SIZE)
    if not size.isdecimal() or int(size) < 1:
        warn_once(ENV_QUEUE_SIZE, "%s: use a whole number above zero; using %d", ENV_QUEUE_SIZE, _QUEUE_SIZE)
        size = str(_QUEUE_SIZE)
    form = os.environ.get(ENV_FORMAT, "").strip().lower() or _FORMATS[0]
    if form not in _FORMATS:
        warn_once(ENV_FORMAT, "%s: use one of %s; using %s", ENV_FORMAT, ", ".join(_FORMATS), _FORMATS[0])
        form = _FORMATS[0]
    return Uploads(files, base_path=base_path, max_queue_size=int(size), upload_format=form)


class Uploads(UploadCompletionHook):  # type: ignore[misc]
    """The hook ``upload``.

    Args:
        files: counts files, those that are lost with the reason.
        **options: of the hook.

    Raises:
        ValueError: the store cannot be written to.
    """

    def __init__(self, files: WithoutExemplars, **options: Any) -> None:
        super().__init__(**options)
        self._writers = Writers(self._do_upload, options["max_queue_size"], files)
        self._here = threading.local()

    def on_completion(self, *, span: Span | None = None, **content: Any) -> None:
        """Write files, and put references on the span to those that there was room for."""
        self._here.refused = refused = set[str]()
        references = _References()
        super().on_completion(span=references, **content)
        if span is not None:
            # A path may quote the user's and the password of a store.
            kept = {key: redaction.mask(path) for key, path in references.found.items() if path not in refused}
            span.set_attributes(kept)

    def _submit_all(self, upload_data: Mapping[tuple[str, bool], Callable[[], Any]]) -> None:
        for (path, names_its_content), content in upload_data.items():
            if names_its_content and path in self.lru_dict:
                continue  # It is there.
            if not self._writers.put((path, names_its_content, content)):
                self._here.refused.add(path)


class _References(NonRecordingSpan):
    """Takes the place of the span until it is known which files there is room for."""

    def __init__(self) -> None:
        super().__init__(INVALID_SPAN_CONTEXT)
        self.found: dict[str, str] = {}

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Keep them."""
        self.found.update(attributes)


class Writers:
    """A bounded queue of files, and daemon threads that write them: a store that hangs holds nothing up.

    Args:
        write: writes one, and raises where it cannot.
        size: the most files that wait or are being written.
        files: counts them, those that are lost with the reason.

    Attributes:
        written: how many were.
        lost: how many were not, by reason.
    """

    def __init__(self, write: Callable[..., None], size: int, files: WithoutExemplars) -> None:
        self._write = write
        self._size = size
        self._files = files
        self._begin()
        closing = weakref.WeakMethod(self.close)
        atexit.register(lambda: (method := closing()) and method())
        if hasattr(os, "register_at_fork"):
            after_fork = weakref.WeakMethod(self._begin)
            os.register_at_fork(after_in_child=lambda: (method := after_fork()) and method())

    def _begin(self) -> None:
        # Also in a forked process: it has none of the threads, and what waits is the parent's.
        self._waiting: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._unfinished = self._threads = self.written = 0
        self.lost: collections.Counter[str] = collections.Counter()

    def put(self, file: tuple[Any, ...]) -> bool:
        """Have one written; gives whether there is room for it."""
        with self._changed:
            has_room = self._unfinished < self._size
            if has_room:
                if self._threads < min(self._unfinished + 1, _MOST_WRITERS):
                    threading.Thread(target=self._run, name="dspy-otel content", daemon=True).start()
                    self._threads += 1
                self._unfinished += 1
                self._waiting.put(file)
        if not has_room:
            self._count("queue_full")
            warn_once(
                "queue of content",
                "content comes faster than its store takes it: some is not kept there. %s (%d) may be higher",
                ENV_QUEUE_SIZE,
                self._size,
            )
        return has_room

    @guard("store of content")
    def _run(self) -> None:
        # What clients of stores are instrumented with is not to trace this.
        with suppress_instrumentation():
            while (file := self._next()) is not None:
                lost = None
                try:
                    self._write(*file)
                except Exception as error:
                    lost = _named(error)
                self._count(lost)
                del file
                with self._changed:
                    self._unfinished -= 1
                    self._changed.notify_all()

    def _next(self) -> tuple[Any, ...] | None:
        """The next file; ``None`` when there has been none for long, and the thread ends."""
        while True:
            try:
                return self._waiting.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                with self._changed:
                    if not self._unfinished:
                        self._threads -= 1
                        return None

    @guard("account of content")
    def _count(self, lost: str | None) -> None:
        with self._changed:
            if lost is None:
                self.written += 1
            else:
                self.lost[lost] += 1
        self._files.add(1, {} if lost is None else {semconv.ERROR_TYPE: lost})

    def close(self, seconds: float = EXIT_SECONDS) -> None:
        """Wait for what has not been written, so many seconds at most, and say what is lost."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unfinished, seconds)
            late, lost = self._unfinished, self.lost.copy()
        if late:
            lost["not_written"] = late
            with guard("account of content"):
                self._files.add(late, {semconv.ERROR_TYPE: "not_written"})
        if lost:
            shown = ", ".join(f"{count} {reason}" for reason, count in lost.items())
            total = sum(lost.values())
            warn_once("lost content", "store of content: %d files written, %d lost (%s)", self.written, total, shown)


def _named(error: Exception) -> str:
    """The type of an error of the store, for the count of what is lost. The first of each type is logged."""
    kind = type(error).__name__
    warn_once(
        ("store of content", kind),
        "content cannot be written to its store (%s): references on spans lead to nothing until it can",
        reason_of(error),
    )
    return kind


def reason_of(error: BaseException) -> str:
    """Why a store cannot be written to, without what an error's own text may quote."""
    kind = type(error).__name__
    return f"{kind}: {os.strerror(error.errno)}" if isinstance(error, OSError) and error.errno else kind
