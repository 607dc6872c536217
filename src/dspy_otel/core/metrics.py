"""The instruments, each made once. Metric attributes stay low-cardinality: never a trial, example or response id."""

from __future__ import annotations

from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.metrics import Histogram, Meter

from dspy_otel import semconv

SCORE_BUCKETS = tuple(float(percent) for percent in range(0, 101, 10))
TRIAL_SCORE_BUCKETS = (*(tenth / 10 for tenth in range(11)), *SCORE_BUCKETS[1:])


# Not empty: the SDK takes an empty context for none, and uses the current one.
_NOWHERE: Final = Context({"dspy_otel.nowhere": True})


class WithoutExemplars:
    """A counter or gauge that is recorded outside of any span.

    Which measurement becomes the exemplar of a counter, the SDK decides by a draw from the ``random`` module: that
    would change the random numbers of the program. Histograms keep exemplars, by bucket and without a draw.

    Args:
        instrument: an OpenTelemetry ``Counter`` or ``Gauge``.
    """

    def __init__(self, instrument: Any) -> None:
        self._record = instrument.set if hasattr(instrument, "set") else instrument.add

    def add(self, amount: float, attributes: Any = None, context: Context | None = None) -> None:
        """Count ``amount``; the context is not passed on."""
        self._record(amount, attributes, _NOWHERE)

    set = add
    """Set to ``amount``; the context is not passed on."""


class Metrics:
    """All instruments of the package.

    Bucket boundaries are those the GenAI metric conventions advise.

    Args:
        meter: where the instruments belong.
    """

    def __init__(self, meter: Meter) -> None:
        def seconds(name: str, description: str) -> Histogram:
            return meter.create_histogram(
                name, "s", description, explicit_bucket_boundaries_advisory=list(semconv.DURATION_BUCKETS)
            )

        def count(name: str, unit: str, description: str) -> WithoutExemplars:
            return WithoutExemplars(meter.create_counter(name, unit, description))

        def gauge(name: str, unit: str, description: str) -> WithoutExemplars:
            return WithoutExemplars(meter.create_gauge(name, unit, description))

        self.operation_duration = seconds(semconv.METRIC_OPERATION_DURATION, "Duration of LM and embedding calls")
        self.token_usage = meter.create_histogram(
            semconv.METRIC_TOKEN_USAGE,
            "{token}",
            "Input and output tokens of LM calls",
            explicit_bucket_boundaries_advisory=list(semconv.TOKEN_BUCKETS),
        )
        self.time_to_first_chunk = seconds(semconv.METRIC_TIME_TO_FIRST_CHUNK, "Time until a streamed answer begins")
        self.tool_duration = seconds(semconv.METRIC_TOOL_DURATION, "Duration of tool calls")
        self.module_duration = seconds(semconv.METRIC_MODULE_DURATION, "Duration of DSPy module calls")
        self.lm_cost = count(semconv.METRIC_LM_COST, "{USD}", "Billed cost of LM calls, as DSPy prices them")
        self.cache_hits = count(semconv.METRIC_LM_CACHE_HITS, "{call}", "LM calls answered from DSPy's cache")
        self.retries = count(semconv.METRIC_LM_RETRIES, "{retry}", "Retries of LM requests")
        self.evaluation_examples = count(semconv.METRIC_EVALUATION_EXAMPLES, "{example}", "Examples evaluated")
        self.evaluation_score = meter.create_histogram(
            semconv.METRIC_EVALUATION_SCORE,
            "1",
            "Score of an evaluation, as DSPy reports it (percent)",
            explicit_bucket_boundaries_advisory=list(SCORE_BUCKETS),
        )
        self.optimizer_trials = count(semconv.METRIC_OPTIMIZER_TRIALS, "{trial}", "Candidates scored by an optimizer")
        self.optimizer_trials_planned = gauge(
            semconv.METRIC_OPTIMIZER_TRIALS_PLANNED, "{trial}", "Trials the current optimization is going to run"
        )
        self.optimizer_trial_score = meter.create_histogram(
            semconv.METRIC_OPTIMIZER_TRIAL_SCORE,
            "1",
            "Score of a trial, as the optimizer reports it (percent, or a mean)",
            explicit_bucket_boundaries_advisory=list(TRIAL_SCORE_BUCKETS),
        )
        self.optimizer_best_score = gauge(
            semconv.METRIC_OPTIMIZER_BEST_SCORE, "1", "Best score so far of the current optimization"
        )
        self.optimizer_examples = count(
            semconv.METRIC_OPTIMIZER_EXAMPLES, "{example}", "Examples an optimizer evaluated"
        )
        self.optimizer_lm_calls = count(semconv.METRIC_OPTIMIZER_LM_CALLS, "{call}", "LM calls inside optimizations")
        self.optimizer_cost = count(semconv.METRIC_OPTIMIZER_COST, "{USD}", "Billed cost of LM calls in optimizations")
        self.optimizer_duration = meter.create_histogram(
            semconv.METRIC_OPTIMIZER_DURATION,
            "s",
            "Duration of optimizations",
            explicit_bucket_boundaries_advisory=list(semconv.SECONDS_OF_A_RUN),
        )
