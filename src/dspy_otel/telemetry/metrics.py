"""The instruments, each made once. Metric attributes stay low-cardinality: never a trial, example or response id."""

from __future__ import annotations

from opentelemetry.metrics import Counter, Histogram, Meter

from .. import semconv as names

SCORE_BUCKETS = tuple(float(percent) for percent in range(0, 101, 10))


class Metrics:
    """All instruments of the package.

    Bucket boundaries are those the GenAI metric conventions advise.

    Args:
        meter: where the instruments belong.
    """

    def __init__(self, meter: Meter) -> None:
        def seconds(name: str, description: str) -> Histogram:
            return meter.create_histogram(
                name, "s", description, explicit_bucket_boundaries_advisory=list(names.DURATION_BUCKETS)
            )

        def count(name: str, unit: str, description: str) -> Counter:
            return meter.create_counter(name, unit, description)

        self.operation_duration = seconds(names.METRIC_OPERATION_DURATION, "Duration of LM and embedding calls")
        self.token_usage = meter.create_histogram(
            names.METRIC_TOKEN_USAGE,
            "{token}",
            "Input and output tokens of LM calls",
            explicit_bucket_boundaries_advisory=list(names.TOKEN_BUCKETS),
        )
        self.time_to_first_chunk = seconds(names.METRIC_TIME_TO_FIRST_CHUNK, "Time until a streamed answer begins")
        self.tool_duration = seconds(names.METRIC_TOOL_DURATION, "Duration of tool calls")
        self.module_duration = seconds(names.METRIC_MODULE_DURATION, "Duration of DSPy module calls")
        self.lm_cost = count(names.METRIC_LM_COST, "{USD}", "Billed cost of LM calls, as DSPy prices them")
        self.cache_hits = count(names.METRIC_LM_CACHE_HITS, "{call}", "LM calls answered from DSPy's cache")
        self.retries = count(names.METRIC_LM_RETRIES, "{retry}", "Retries of LM requests")
        self.evaluation_examples = count(names.METRIC_EVALUATION_EXAMPLES, "{example}", "Examples evaluated")
        self.evaluation_score = meter.create_histogram(
            names.METRIC_EVALUATION_SCORE,
            "1",
            "Score of an evaluation, as DSPy reports it (percent)",
            explicit_bucket_boundaries_advisory=list(SCORE_BUCKETS),
        )
