"""The instruments, each made once. Metric attributes stay low-cardinality: never a trial, example or response id."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from opentelemetry.context import Context
from opentelemetry.metrics import Meter

from dspy_otel import semconv
from dspy_otel.config import SemconvOptIn
from dspy_otel.content.names import OTHER
from dspy_otel.core.attributes import Labels, sendable_name
from dspy_otel.core.measurements import BoundSeries, bind, real_instrument

SCORE_BUCKETS = tuple(tenth / 10 for tenth in range(11))


# Not empty: the SDK takes an empty context for none, and uses the current one.
_NOWHERE: Final = Context({"dspy_otel.nowhere": True})


MOST_VALUES: Final = 100
"""Different values of one attribute that others make up; all further ones are ``other``."""
_MOST_SERIES: Final = 1000
_INFINITY: Final = float("inf")

_MADE_UP: Final = frozenset({semconv.GEN_AI_RESPONSE_MODEL, semconv.GEN_AI_TOOL_NAME, semconv.ERROR_TYPE})


class MetricAttributes:
    """Attributes as they may be on metrics: every exporter can send their values, and the number of values is bounded.

    Each set of attributes is a series, kept in memory as long as the process lives: a server that names another model
    in each answer would make one for each call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, dict[str, str]] = {name: {} for name in _MADE_UP}
        self._unchanged: set[Any] = set()

    def of(self, attributes: Any) -> Any:
        """``attributes``, or a copy with other values."""
        if not attributes:
            return attributes
        series = tuple(attributes.items())
        if series in self._unchanged:  # four times for each Predict
            return attributes
        changed: dict[str, Any] = {}
        for name, value in series:
            if name in _MADE_UP:
                shown = self._known[name].get(value) or self._admit(name, value)
                if shown != value:
                    changed[name] = shown
            elif type(value) is str and not value.isprintable():
                changed[name] = sendable_name(value)
        if changed:
            return {**attributes, **changed}
        if len(self._unchanged) < _MOST_SERIES:
            self._unchanged.add(series)
        return attributes

    def _admit(self, name: str, value: Any) -> str:
        known = self._known[name]
        with self._lock:
            if len(known) >= MOST_VALUES and value not in known:
                return OTHER
            return known.setdefault(value, sendable_name(str(value)))


class BoundedInstrument:
    """An instrument with bounded attributes: a histogram, or the base of :class:`WithoutExemplars`.

    Args:
        instrument: an OpenTelemetry ``Histogram``, ``Counter`` or ``Gauge``.
        attributes: those of all instruments together; default, its own.
        light: whether to bind series to what counts them in the SDK.
    """

    def __init__(self, instrument: Any, attributes: MetricAttributes | None = None, light: bool = False) -> None:
        self._instrument = instrument
        self._real: Any = None
        self._attributes = attributes or MetricAttributes()
        self._most_series = _MOST_SERIES if light else 0
        self._bound: dict[Any, BoundSeries | None] = {}

    def record(self, amount: float, attributes: Any = None, context: Context | None = None) -> None:
        """Record ``amount`` in ``context``; nothing before there is a provider, for nobody would keep it."""
        if type(attributes) is Labels:
            bound = attributes.series.get(self)
            if bound is not None and 0 <= amount < _INFINITY and bound.record(amount, context):
                return
        if self._real is None:
            self._real = real_instrument(self._instrument)
            if self._real is None:
                return
        # With types: 1, 1.0 and True are equal, and three series.
        series = (*attributes.items(), *map(type, attributes.values())) if attributes else ()
        bound = self._bound.get(series)
        if bound is not None and 0 <= amount < _INFINITY and bound.record(amount, context):
            if type(attributes) is Labels:
                attributes.series[self] = bound
            return
        shown = self._attributes.of(attributes)
        self._record(self._real, amount, shown, context)
        # One that could not be bound is not tried a second time.
        if bound is not None or (len(self._bound) < self._most_series and series not in self._bound):
            self._bound[series] = bind(self._real, shown or {})

    def _record(self, instrument: Any, amount: float, attributes: Any, context: Context | None) -> None:
        """Record the public way."""
        instrument.record(amount, attributes, context)


class WithoutExemplars(BoundedInstrument):
    """A counter or gauge that is recorded outside of any span.

    Which measurement becomes the exemplar of a counter, the SDK decides by a draw from the ``random`` module: that
    would change the random numbers of the program. Histograms keep exemplars, by bucket and without a draw.
    """

    def add(self, amount: float, attributes: Any = None, context: Context | None = None) -> None:
        """Count ``amount``; the context is not passed on."""
        self.record(amount, attributes, _NOWHERE)

    set = add
    """Set to ``amount``; the context is not passed on."""

    def _record(self, instrument: Any, amount: float, attributes: Any, context: Context | None) -> None:
        record = instrument.set if hasattr(instrument, "set") else instrument.add
        record(amount, attributes, context)


class Recording(Protocol):
    """What LM calls record with, whatever the names of the conventions are."""

    def record(self, amount: float, attributes: Any = None, context: Context | None = None) -> None:
        """Record ``amount`` in ``context``."""


class InBoth:
    """Two instruments that record the same: one by its old name, one by its new one."""

    def __init__(self, old: Recording, new: Recording) -> None:
        self._both = old, new

    def record(self, amount: float, attributes: Any = None, context: Context | None = None) -> None:
        """Record ``amount`` with both."""
        for instrument in self._both:
            instrument.record(amount, attributes, context)


class TokensByDirection:
    """What the conventions have made of one histogram of tokens: a histogram and a counter for each type of token.

    Args:
        instruments: those two, by the type of token.
    """

    def __init__(self, instruments: Mapping[Any, tuple[BoundedInstrument, WithoutExemplars]]) -> None:
        self._instruments = instruments

    def record(self, amount: float, attributes: Any = None, context: Context | None = None) -> None:
        """Record ``amount`` with the two instruments whose names say what the type of token among attributes says."""
        labels = attributes.series.get(self) if type(attributes) is Labels else None
        if labels is None:
            plain = {name: value for name, value in attributes.items() if name != semconv.GEN_AI_TOKEN_TYPE}
            # Providers' counts by modality are not read.
            labels = Labels(plain), Labels({**plain, semconv.GEN_AI_TOKEN_MODALITY: semconv.MODALITY_UNKNOWN})
            if type(attributes) is Labels:
                attributes.series[self] = labels
        histogram, counter = self._instruments[attributes[semconv.GEN_AI_TOKEN_TYPE]]
        histogram.record(amount, labels[0], context)
        counter.add(amount, labels[1], context)


class Metrics:
    """All instruments of the package.

    Bucket boundaries are those the GenAI metric conventions advise.

    Args:
        meter: where the instruments belong.
        light: whether histograms and counters bind their series to what counts them in the SDK.
        opt_in: whether metrics of LM calls have the names that the conventions gave them first, later, or both.
    """

    def __init__(self, meter: Meter, light: bool = False, opt_in: SemconvOptIn = "default") -> None:
        attributes = MetricAttributes()

        def histogram(name: str, unit: str, description: str, buckets: Sequence[float]) -> BoundedInstrument:
            made = meter.create_histogram(name, unit, description, explicit_bucket_boundaries_advisory=list(buckets))
            return BoundedInstrument(made, attributes, light)

        def seconds(name: str, description: str) -> BoundedInstrument:
            return histogram(name, "s", description, semconv.DURATION_BUCKETS)

        def count(name: str, unit: str, description: str) -> WithoutExemplars:
            return WithoutExemplars(meter.create_counter(name, unit, description), attributes, light)

        def gauge(name: str, unit: str, description: str) -> WithoutExemplars:
            return WithoutExemplars(meter.create_gauge(name, unit, description), attributes)

        def renamed(old: Callable[[], Recording], new: Callable[[], Recording]) -> Recording:
            return old() if opt_in == "default" else new() if opt_in == "gen_ai" else InBoth(old(), new())

        def tokens(direction: str, name: str, total: str) -> tuple[BoundedInstrument, WithoutExemplars]:
            return (
                histogram(name, "{token}", f"{direction} tokens of each LM call", semconv.TOKEN_BUCKETS),
                count(total, "{token}", f"{direction} tokens of LM calls"),
            )

        self.operation_duration = seconds(semconv.METRIC_OPERATION_DURATION, "Duration of LM and embedding calls")
        # The names in use, and those of OpenTelemetry's pull requests semantic-conventions-genai#521 and #374.
        self.inference_duration = renamed(
            lambda: self.operation_duration,
            lambda: seconds(semconv.METRIC_INFERENCE_DURATION, "Duration of LM calls"),
        )
        self.time_to_first_chunk = renamed(
            lambda: seconds(semconv.METRIC_TIME_TO_FIRST_CHUNK, "Time until a streamed answer begins"),
            lambda: seconds(semconv.METRIC_INFERENCE_FIRST_CHUNK, "Time until a streamed answer begins"),
        )
        self.token_usage = renamed(
            lambda: histogram(
                semconv.METRIC_TOKEN_USAGE, "{token}", "Input and output tokens of LM calls", semconv.TOKEN_BUCKETS
            ),
            lambda: TokensByDirection(
                {
                    semconv.TOKEN_TYPE_INPUT: tokens(
                        "Input", semconv.METRIC_OPERATION_INPUT_TOKENS, semconv.METRIC_USAGE_INPUT_TOKENS
                    ),
                    semconv.TOKEN_TYPE_OUTPUT: tokens(
                        "Output", semconv.METRIC_OPERATION_OUTPUT_TOKENS, semconv.METRIC_USAGE_OUTPUT_TOKENS
                    ),
                }
            ),
        )
        # A workflow is an agent since version 0.1.0 of the GenAI conventions.
        self.agent_duration: Recording | None = None
        if opt_in != "default":
            self.agent_duration = seconds(
                semconv.METRIC_INVOKE_AGENT_DURATION, "Duration of calls of programs and agents"
            )
        self.tool_duration = seconds(semconv.METRIC_TOOL_DURATION, "Duration of tool calls")
        self.module_duration = seconds(semconv.METRIC_MODULE_DURATION, "Duration of DSPy module calls")
        self.lm_cost = count(semconv.METRIC_LM_COST, "{USD}", "Billed cost of LM calls, as DSPy prices them")
        self.cache_hits = count(semconv.METRIC_LM_CACHE_HITS, "{call}", "LM calls answered from DSPy's cache")
        self.retries = count(semconv.METRIC_LM_RETRIES, "{retry}", "Retries of LM requests")
        self.evaluation_examples = count(semconv.METRIC_EVALUATION_EXAMPLES, "{example}", "Examples evaluated")
        self.evaluation_score = histogram(
            semconv.METRIC_EVALUATION_SCORE,
            "1",
            "Score of an evaluation: the mean of the metric",
            SCORE_BUCKETS,
        )
        self.optimizer_trials = count(semconv.METRIC_OPTIMIZER_TRIALS, "{trial}", "Candidates scored by an optimizer")
        self.optimizer_trials_planned = gauge(
            semconv.METRIC_OPTIMIZER_TRIALS_PLANNED, "{trial}", "Trials the current optimization is going to run"
        )
        self.optimizer_trial_score = histogram(
            semconv.METRIC_OPTIMIZER_TRIAL_SCORE,
            "1",
            "Score of a trial: the mean of the metric",
            SCORE_BUCKETS,
        )
        self.optimizer_best_score = gauge(
            semconv.METRIC_OPTIMIZER_BEST_SCORE, "1", "Best score so far of the current optimization"
        )
        self.optimizer_examples = count(
            semconv.METRIC_OPTIMIZER_EXAMPLES, "{example}", "Examples an optimizer evaluated"
        )
        self.optimizer_lm_calls = count(semconv.METRIC_OPTIMIZER_LM_CALLS, "{call}", "LM calls inside optimizations")
        self.optimizer_cost = count(semconv.METRIC_OPTIMIZER_COST, "{USD}", "Billed cost of LM calls in optimizations")
        self.optimizer_duration = histogram(
            semconv.METRIC_OPTIMIZER_DURATION,
            "s",
            "Duration of optimizations",
            semconv.SECONDS_OF_A_RUN,
        )
        self.budget_alerts = count(semconv.METRIC_BUDGET_ALERTS, "{alert}", "Limits used to 50, 80 or 100 percent")
        self.content_files = count(
            semconv.METRIC_CONTENT_FILES, "{file}", "Files of content that were stored, or lost (with error.type)"
        )
