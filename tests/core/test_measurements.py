"""Histograms and counters that bind their series: the points of the public way, whatever readers and views."""

from __future__ import annotations

import inspect
import math
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import metrics as api
from opentelemetry.context import Context
from opentelemetry.sdk.metrics import (
    AlwaysOffExemplarFilter,
    AlwaysOnExemplarFilter,
    Counter,
    Histogram,
    MeterProvider,
    TraceBasedExemplarFilter,
)
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.metrics.view import (
    DropAggregation,
    ExplicitBucketHistogramAggregation,
    ExponentialBucketHistogramAggregation,
    LastValueAggregation,
    SumAggregation,
    View,
)
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from dspy_otel.core import measurements
from dspy_otel.core.attributes import Labels
from dspy_otel.core.metrics import BoundedInstrument, MetricAttributes, WithoutExemplars
from tests.support.spans import Recorder

DELTA, CUMULATIVE = AggregationTemporality.DELTA, AggregationTemporality.CUMULATIVE
LIMITED = "aggregation_cardinality_limit" in inspect.signature(View).parameters  # SDK 1.45
GROWING = hasattr(MeterProvider, "add_metric_reader")


def span(number: int, sampled: bool) -> Context:
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    return set_span_in_context(NonRecordingSpan(SpanContext(number, number, False, flags)), Context())


def series_of(histogram: BoundedInstrument) -> list[Any]:
    return [series for series in histogram._bound.values() if series is not None]


@st.composite
def views(draw: st.DrawFn) -> dict[str, Any]:
    view: dict[str, Any] = {"instrument_name": draw(st.sampled_from(["measured", "other"]))}
    view["name"] = draw(st.sampled_from([None, "renamed", "second"]))
    view["attribute_keys"] = draw(st.sampled_from([None, set(), {"a"}, {"b", "n"}]))
    view["aggregation"] = draw(
        st.sampled_from(
            [
                None,
                ExplicitBucketHistogramAggregation([1.0, 5.0]),
                ExplicitBucketHistogramAggregation([2.0], record_min_max=False),
                SumAggregation(),
                LastValueAggregation(),
                DropAggregation(),
                # An older SDK's own fails when it collects 0 and then 1e300 ("Incorrect merge scale").
                *([ExponentialBucketHistogramAggregation(max_size=4)] if LIMITED else []),
            ]
        )
    )
    if LIMITED:
        view["aggregation_cardinality_limit"] = draw(st.sampled_from([None, 1, 2]))
    return view


ATTRIBUTES = st.one_of(
    st.none(),
    st.dictionaries(
        st.sampled_from(["a", "b", "n"]),
        st.one_of(st.sampled_from(["x", "y", "", "ä\0"]), st.sampled_from([0, 1, 2, True, 1.0, False])),
    ),
)
NOT_FINITE = [math.inf, math.nan] if LIMITED else []  # An older SDK fails with those.
AMOUNTS = st.one_of(st.integers(-1, 20), st.floats(-1.0, 20.0), st.sampled_from([0, 1e300, *NOT_FINITE]))
RECORD = st.tuples(st.just("record"), AMOUNTS, ATTRIBUTES, st.integers(0, 3))
COLLECT = st.tuples(st.just("collect"), st.integers(0, 4))
CHANGE = st.tuples(st.sampled_from(["add", "remove"]), st.sampled_from([DELTA, CUMULATIVE]))
STEPS = st.lists(st.one_of(RECORD, RECORD, RECORD, COLLECT, *([CHANGE] if GROWING else [])), max_size=40)


class Measured:
    """One way of recording: a provider with readers and views, a histogram and a counter."""

    def __init__(self, light: bool, temporalities: list[Any], made: list[dict[str, Any]], exemplars: Any) -> None:
        self.readers = list(map(self.reader, temporalities))
        self.provider = MeterProvider(
            self.readers, exemplar_filter=exemplars, views=[View(**view) for view in made], shutdown_on_exit=False
        )
        meter = self.provider.get_meter("tests")
        made_by = meter.create_histogram("measured", "s", "all of it")
        self.histogram = BoundedInstrument(made_by, MetricAttributes(), light)
        self.counter = WithoutExemplars(meter.create_counter("counted"), MetricAttributes(), light)
        self.kept: dict[str, Labels] = {}
        self.seen: list[Any] = []

    @staticmethod
    def reader(temporality: Any) -> InMemoryMetricReader:
        return InMemoryMetricReader(preferred_temporality={Histogram: temporality, Counter: temporality})

    def step(self, what: str, *how: Any) -> None:
        if what == "record":
            amount, attributes, number = how
            context = None if number == 0 else span(number, sampled=number > 1)
            if attributes is not None:
                # Some are made once, as ours are for the calls that are alike.
                kept = self.kept.setdefault(repr(attributes), Labels(attributes))
                attributes = kept if number % 2 else dict(attributes)
            self.histogram.record(amount, attributes, context)
            self.counter.add(amount, attributes, context)
        elif what == "collect":
            if self.readers:
                self.collect(self.readers[how[0] % len(self.readers)])
        elif what == "add":
            self.readers.append(self.reader(*how))
            self.provider.add_metric_reader(self.readers[-1])  # type: ignore[attr-defined]
        elif self.readers:
            self.provider.remove_metric_reader(self.readers.pop(0))  # type: ignore[attr-defined]

    def collect(self, reader: InMemoryMetricReader) -> None:
        data: Any = reader.get_metrics_data()
        for resource in () if data is None else data.resource_metrics:
            for metric in resource.scope_metrics[0].metrics:
                points = [
                    {
                        name: self.shown(name, getattr(point, name))
                        for name in point.__dataclass_fields__
                        if not name.endswith("time_unix_nano")
                    }
                    for point in metric.data.data_points
                ]
                about = metric.name, metric.unit, metric.description, type(metric.data).__name__
                self.seen.append((*about, repr(points), all(self.ordered(point) for point in metric.data.data_points)))

    @staticmethod
    def shown(name: str, value: Any) -> Any:
        if name != "exemplars":
            return dict(value) if name == "attributes" else value
        return [(each.value, each.span_id, each.trace_id, each.filtered_attributes) for each in value]

    @staticmethod
    def ordered(point: Any) -> bool:
        return (point.start_time_unix_nano or 0) <= point.time_unix_nano


@given(
    st.lists(st.sampled_from([DELTA, CUMULATIVE]), max_size=3),
    st.lists(views(), max_size=3),
    st.sampled_from([TraceBasedExemplarFilter, AlwaysOffExemplarFilter, AlwaysOnExemplarFilter]),
    STEPS,
)
@settings(deadline=None, max_examples=150)
@pytest.mark.filterwarnings("ignore")
def test_the_points_are_those_of_the_public_way(
    temporalities: list[Any], made: list[dict[str, Any]], exemplars: Any, steps: list[Any]
) -> None:
    ways = [Measured(light, temporalities, made, exemplars()) for light in (False, True)]
    for way in ways:
        random.seed(7)  # The SDK draws the exemplars of sums.
        for step in (*steps, *(("collect", number) for number in range(5))):
            way.step(*step)
    public, bound = (way.seen for way in ways)
    assert bound == public


def test_series_that_a_view_counts_as_one_keep_their_order() -> None:
    views = [{"instrument_name": "measured", "attribute_keys": set()}]
    ways = [Measured(light, [DELTA], views, TraceBasedExemplarFilter()) for light in (False, True)]
    for way in ways:
        for amount, attributes in (3, {}), (3, {}), (4, {"a": "x"}), (3, {}), (4, {"a": "x"}), (3, {}):
            way.histogram.record(amount, attributes, span(2, sampled=True))
            if amount == 4:
                way.step("collect", 0)
        way.step("collect", 0)
    public, bound = (way.seen for way in ways)
    assert bound == public


def test_equal_values_of_other_types_are_other_series() -> None:
    ways = [Measured(light, [CUMULATIVE], [], TraceBasedExemplarFilter()) for light in (False, True)]
    for way in ways:
        for value in (1, True, 1.0, 1, True, 1.0):
            way.histogram.record(1.0, {"n": value})
        way.step("collect", 0)
    public, bound = (way.seen for way in ways)
    assert bound == public


@pytest.mark.parametrize("temporality", [DELTA, CUMULATIVE])
def test_a_series_is_bound_at_its_first_measurement(temporality: Any) -> None:
    way = Measured(True, [temporality, CUMULATIVE], [], TraceBasedExemplarFilter())
    record = way.histogram.record
    record(1.0, {"a": "x"})
    (series,) = series_of(way.histogram)
    assert series.record(1.0)
    way.step("collect", 0)
    assert series.record(1.0) is (temporality is CUMULATIVE or not LIMITED)  # a delta reader has let go of it
    record(1.0, {"a": "x"})
    (series,) = series_of(way.histogram)
    assert series.record(1.0)


@pytest.mark.parametrize("measured", [3, 1000])
def test_what_waits_is_counted_before_a_reader_collects(measured: int) -> None:
    way = Measured(True, [CUMULATIVE, DELTA], [], TraceBasedExemplarFilter())
    for number in range(measured):
        way.step("record", 1, {"a": "x"}, 2 if number == measured - 1 else 1)
    assert len(measurements.waiting_of(way.provider._measurement_consumer).measured) < 128
    for reader in (0, 1):
        way.step("collect", reader)
    histogram, counter = way.seen[0][4], way.seen[1][4]
    assert f"'count': {measured}" in histogram
    assert f"'value': {measured}" in counter
    assert [seen[4] for seen in way.seen[2:]] == [histogram, counter]
    assert "'exemplars': [(1, 2, 2, {})]" in histogram


def test_nothing_is_lost_while_a_reader_collects() -> None:
    way = Measured(True, [DELTA], [], TraceBasedExemplarFilter())
    (reader,) = way.readers
    counted, done = [], threading.Event()

    def collect() -> None:
        while True:
            last = done.is_set()
            data: Any = reader.get_metrics_data()
            if data is not None and data.resource_metrics:
                (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
                counted.extend(point.count for point in metric.data.data_points)
            if last:
                return

    def record(number: int) -> None:
        for _ in range(2000):
            way.histogram.record(1.0, {"n": number % 2})

    collector = threading.Thread(target=collect)
    collector.start()
    threads = [threading.Thread(target=record, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    collector.join()
    assert sum(counted) == 3 * 2000


# --- where it is not done -------------------------------------------------------------------------------------------
@pytest.fixture
def checked_anew() -> Iterator[None]:
    measurements.same_points.cache_clear()
    yield
    measurements.same_points.cache_clear()


def test_the_check_finds_the_points_to_be_the_same(checked_anew: None) -> None:
    assert measurements.same_points()


def test_a_difference_is_noticed(checked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self: Any, amount: float, context: Any = None) -> bool:
        return record(self, amount, context) and record(self, amount, context)

    record = measurements.BoundSeries.record
    monkeypatch.setattr(measurements.BoundSeries, "record", twice)
    way = Measured(True, [CUMULATIVE], [], TraceBasedExemplarFilter())
    way.histogram.record(1.0, {"a": "x"})
    assert not series_of(way.histogram)


def test_an_sdk_that_is_built_otherwise(checked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def otherwise(*_: Any) -> Any:
        raise AttributeError("_reader_storages")

    monkeypatch.setattr(measurements, "_find", otherwise)
    way = Measured(True, [CUMULATIVE], [], TraceBasedExemplarFilter())
    way.histogram.record(1.0, {"a": "x"})
    assert not series_of(way.histogram)


@pytest.mark.parametrize("version", ["1.37.0", "1.46.0", "2.40.0", "", "1.x"])
def test_an_sdk_that_is_not_known(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("opentelemetry.sdk.version.__version__", version)
    way = Measured(True, [CUMULATIVE], [], TraceBasedExemplarFilter())
    way.histogram.record(1.0, {"a": "x"})
    assert not series_of(way.histogram)


def test_binding_of_opentelemetrys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Histogram, "bind", lambda *_: None, raising=False)
    way = Measured(True, [CUMULATIVE], [], TraceBasedExemplarFilter())
    way.histogram.record(1.0, {"a": "x"})
    assert not series_of(way.histogram)


def test_another_meter_and_one_that_is_set_later() -> None:
    for meter in (api.NoOpMeter("none"), api.NoOpMeterProvider().get_meter("none")):
        histogram = BoundedInstrument(meter.create_histogram("measured"), MetricAttributes(), light=True)
        histogram.record(1.0, {"a": "x"})
        assert not series_of(histogram)
    proxies = api._internal._ProxyMeter("tests", None, None)  # type: ignore[attr-defined]
    histogram = BoundedInstrument(proxies.create_histogram("measured"), MetricAttributes(), light=True)
    histogram.record(1.0, {"a": "x"})
    way = Measured(True, [CUMULATIVE], [], TraceBasedExemplarFilter())
    proxies.on_set_meter_provider(way.provider)
    for _ in range(3):
        histogram.record(1.0, {"a": "x"})
    assert len(series_of(histogram)) == 1
    way.step("collect", 0)
    assert "'count': 3" in way.seen[0][4]


@pytest.mark.parametrize("light", [True, False])
def test_the_switch(telemetry: Recorder, light: bool) -> None:
    import dspy

    telemetry.instrument(light_metrics=light)
    with dspy.context(lm=dspy.utils.DummyLM([{"answer": "a"}])):
        dspy.Predict("question -> answer")(question="q")
    assert telemetry.metric("dspy.module.duration")[0].count == 1
    operation = dspy_otel_telemetry().metrics.module_duration
    assert len(series_of(operation)) == light


def dspy_otel_telemetry() -> Any:
    from dspy_otel import DSPyInstrumentor

    return DSPyInstrumentor()._telemetry
