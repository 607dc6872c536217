"""Settings: one frozen dataclass, filled from arguments, then the environment, then defaults."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, cast

_LOG = logging.getLogger(__name__)

CaptureContent = Literal["no_content", "span_only", "event_only", "span_and_event"]
EvaluationTraces = Literal["linked", "nested"]
OptimizationTraces = Literal["all", "failed_and_best", "none"]
Progress = Literal["auto", "on", "off"]
SemconvOptIn = Literal["default", "gen_ai", "gen_ai/dup"]
EventSignal = Literal["default", "logs", "logs/dup"]
Redact = Callable[[str], str]

ENV_CAPTURE_CONTENT: Final = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
ENV_COMPLETION_HOOK: Final = "OTEL_INSTRUMENTATION_GENAI_COMPLETION_HOOK"
ENV_CONTENT_LIMIT: Final = "OTEL_DSPY_CONTENT_LIMIT"
ENV_CAPTURE_MEDIA: Final = "OTEL_DSPY_CAPTURE_MEDIA"
ENV_ID_KEY: Final = "OTEL_DSPY_ID_KEY"
ENV_REDACT: Final = "OTEL_DSPY_REDACT"
ENV_ADAPTER_SPANS: Final = "OTEL_DSPY_ADAPTER_SPANS"
ENV_EVALUATION_TRACES: Final = "OTEL_DSPY_EVALUATION_TRACES"
ENV_OPTIMIZATION_TRACES: Final = "OTEL_DSPY_OPTIMIZATION_TRACES"
ENV_OPENINFERENCE: Final = "OTEL_DSPY_OPENINFERENCE"
ENV_PROGRESS: Final = "OTEL_DSPY_PROGRESS"
ENV_METRICS: Final = "OTEL_DSPY_METRICS"
ENV_SEMCONV_OPT_IN: Final = "OTEL_SEMCONV_STABILITY_OPT_IN"
ENV_EXCEPTION_SIGNAL: Final = "OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN"
ENV_EVENT_SIGNAL: Final = "OTEL_DSPY_EVENT_SIGNAL_OPT_IN"
ENV_LIGHT_METRICS: Final = "OTEL_DSPY_LIGHT_METRICS"
ENV_LIGHT_SPANS: Final = "OTEL_DSPY_LIGHT_SPANS"

COMPLETION_HOOKS: Final = "opentelemetry_genai_completion_hook"
"""The group of entry points that completion hooks of OpenTelemetry's GenAI package have."""
UPLOAD: Final = "upload"
"""The name of that package's own one."""

_CONTENT_MODES: Final[Mapping[str, CaptureContent]] = {
    "no_content": "no_content",
    "span_only": "span_only",
    "event_only": "event_only",
    "span_and_event": "span_and_event",
    # Spellings of older releases of the same variable.
    "true": "span_only",
    "false": "no_content",
}
_EVALUATION_TRACES: Final[Mapping[str, EvaluationTraces]] = {"linked": "linked", "nested": "nested"}
_OPTIMIZATION_TRACES: Final[Mapping[str, OptimizationTraces]] = {
    "all": "all",
    "failed_and_best": "failed_and_best",
    "none": "none",
}
_EVENT_SIGNALS: Final[Mapping[str, EventSignal]] = {"logs": "logs", "logs/dup": "logs/dup", "default": "default"}
_BOOLEANS: Final = {
    "true": True,
    "1": True,
    "on": True,
    "yes": True,
    "false": False,
    "0": False,
    "off": False,
    "no": False,
}


_PROGRESS: Final[Mapping[str, Progress]] = {
    "auto": "auto",
    **{name: "on" if value else "off" for name, value in _BOOLEANS.items()},
}


class _Unusable(ValueError):
    """A setting's value cannot be used; the message says which values can."""


def _choice(choices: Mapping[str, Any]) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        try:
            return choices[str(value).strip().lower()]
        except KeyError:
            raise _Unusable(f"use one of {', '.join(choices)}") from None

    return parse


def _boolean(value: Any) -> bool:
    return bool(_choice(_BOOLEANS)(value))


def _opt_in(value: Any) -> SemconvOptIn:
    names = value.strip().lower().split(",") if isinstance(value, str) else [""]
    named = {name.strip() for name in names}
    # Other packages' names are none of our business, but a mistake in one of ours is.
    if not all(re.fullmatch(r"(?!gen_ai/(?!dup$))\w+(/\w+)?", name) for name in named):
        raise _Unusable("use gen_ai or gen_ai/dup, with commas between it and names for other packages")
    return "gen_ai/dup" if "gen_ai/dup" in named else "gen_ai" if "gen_ai" in named else "default"


def _positive_integer(value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1 or isinstance(value, bool):
        raise _Unusable("use a whole number above zero")
    return number


def _key(value: Any) -> str:
    if not isinstance(value, str) or len(value) < 16:  # A shorter one can be guessed, as the rows can.
        raise _Unusable("use a text of at least 16 characters")
    return value


def _function(value: Any) -> Redact | None:
    if value is None or callable(value):
        return cast("Redact | None", value)
    try:
        module, _, name = str(value).partition(":")
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise _Unusable(f"use module:function, importable from here ({type(error).__name__})") from None
    if not callable(found):
        raise _Unusable("use module:function, and a function")
    return cast("Redact", found)


def _completion_hook(value: Any) -> Any:
    if callable(getattr(type(value), "on_completion", None)):
        return value
    from importlib.metadata import entry_points  # takes its time

    found = entry_points(group=COMPLETION_HOOKS).names
    if type(value) is str and value in found:
        return value
    names = ", ".join(sorted(found)) or f"{UPLOAD} (pip install 'dspy-otel[upload]')"
    raise _Unusable(f"use one of {names}, or an object with on_completion")


def _setting(default: Any, env: str, parse: Callable[[Any], Any], secret: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"env": env, "parse": parse}, repr=not secret)


@dataclass(frozen=True)
class Config:
    """What is recorded, and how much of it.

    Build it with :meth:`load`, which also reads the environment; the constructor takes every value as it is.
    """

    capture_content: CaptureContent = _setting("no_content", ENV_CAPTURE_CONTENT, _choice(_CONTENT_MODES))
    """Where prompts, completions, inputs, outputs, tool arguments and exception messages go. Default: nowhere."""

    completion_hook: Any = _setting(None, ENV_COMPLETION_HOOK, _completion_hook)
    """What content of programs, agents and LM calls is handed to, to be kept elsewhere: a name, or an object."""

    content_limit: int = _setting(65536, ENV_CONTENT_LIMIT, _positive_integer)
    """Most bytes (UTF-8) of one content attribute. Longer content is cut inside its JSON, which stays valid."""

    capture_media: bool = _setting(False, ENV_CAPTURE_MEDIA, _boolean)
    """With content on: images, audio and files as they are, not only as type and size."""

    redact: Redact | None = _setting(None, ENV_REDACT, _function)
    """Called with each piece of content text, gives what may be recorded. If it raises, that content is dropped."""

    id_key: str | None = _setting(None, ENV_ID_KEY, _key, secret=True)
    """With content off: the key of ids of dataset rows. Default: one of the user's own, in the state directory."""

    adapter_spans: bool = _setting(False, ENV_ADAPTER_SPANS, _boolean)
    """Spans for an adapter's format and parse. Off: parse failures and fallbacks are events on the Predict span."""

    evaluation_traces: EvaluationTraces = _setting("linked", ENV_EVALUATION_TRACES, _choice(_EVALUATION_TRACES))
    """``linked``: each evaluated example is a trace of its own, linked both ways. ``nested``: one tree."""

    optimization_traces: OptimizationTraces = _setting("all", ENV_OPTIMIZATION_TRACES, _choice(_OPTIMIZATION_TRACES))
    """Which examples that an optimization evaluates leave a trace. Trials, totals and metrics are always complete."""

    openinference: bool = _setting(True, ENV_OPENINFERENCE, _boolean)
    """OpenInference's span kind and input/output keys, which Phoenix, MLflow and Langfuse read."""

    metrics: bool = _setting(True, ENV_METRICS, _boolean)
    """Record metrics (they cost nothing without a meter provider)."""

    semconv_opt_in: SemconvOptIn = _setting("default", ENV_SEMCONV_OPT_IN, _opt_in)
    """Names of metrics that OpenTelemetry has renamed: the old ones, with ``gen_ai`` the new ones, or both."""

    exception_signal_opt_in: EventSignal = _setting("default", ENV_EXCEPTION_SIGNAL, _choice(_EVENT_SIGNALS))
    """Exceptions are events of spans by default, with ``logs`` log records, with ``logs/dup`` both."""

    event_signal_opt_in: EventSignal = _setting("default", ENV_EVENT_SIGNAL, _choice(_EVENT_SIGNALS))
    """The same for the other events of spans, for which OpenTelemetry has no variable."""

    light_metrics: bool = _setting(True, ENV_LIGHT_METRICS, _boolean)
    """Find the SDK's aggregation of a series once. Off, or with an SDK that is not known: for each measurement."""

    light_spans: bool = _setting(True, ENV_LIGHT_SPANS, _boolean)
    """Make the SDK's spans at a lower cost, where that is known to give the same spans."""

    progress: Progress = _setting("auto", ENV_PROGRESS, _choice(_PROGRESS))
    """Show running optimizations. ``auto``: in a notebook. ``on``: also in a terminal, on stderr (needs ``rich``)."""

    @cached_property
    def content_on_spans(self) -> bool:
        """Whether content may become span attributes."""
        return self.capture_content in ("span_only", "span_and_event")

    @cached_property
    def content_on_events(self) -> bool:
        """Whether content may become log events."""
        return self.capture_content in ("event_only", "span_and_event")

    @property
    def content(self) -> bool:
        """Whether any content may leave the process at all."""
        return self.capture_content != "no_content" or self.completion_hook is not None

    @classmethod
    def check(cls, arguments: Iterable[str]) -> None:
        """Check that each of ``arguments`` names a setting.

        Raises:
            TypeError: for one that does not (a mistake in code, not in configuration).
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(arguments) - set(fields))
        if unknown:
            raise TypeError(f"unknown option {', '.join(unknown)}; known: {', '.join(fields)}")

    @classmethod
    def load(cls, **arguments: Any) -> Config:
        """Settings from ``arguments``, else the environment, else the defaults.

        Args:
            **arguments: any field of this class. ``None`` means "not given".

        Returns:
            The settings. A value that cannot be used is replaced by the default, with one warning that says what
            would be right: telemetry must not stop a program. Without a usable ``redact`` that was asked for, no
            content is recorded.

        Raises:
            TypeError: for an argument that is no setting (a mistake in code, not in configuration).
        """
        cls.check(arguments)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        redacts = True
        for name, field in fields.items():
            source, value = name, arguments.get(name)
            if value is None:
                source = field.metadata["env"]
                value = os.environ.get(source, "").strip() or None
            if value is None:
                continue
            try:
                values[name] = field.metadata["parse"](value)
            except _Unusable as problem:
                if name == "redact":
                    # Content that was to be redacted must not leave as it is.
                    redacts = False
                    _LOG.warning("dspy-otel: %s: %s; no content is recorded until it can be used", source, problem)
                else:
                    _LOG.warning("dspy-otel: %s: %s; using %r", source, problem, field.default)
        if not redacts:
            values.update(capture_content="no_content", completion_hook=None)
        return cls(**values)


Configuration: Final = dataclasses.make_dataclass(
    "Configuration",
    [(field.name, Any, dataclasses.field(default=None)) for field in dataclasses.fields(Config)],
    frozen=True,
)
"""The settings as a file of OpenTelemetry's declarative configuration gives them: ``None`` for what it leaves out."""
