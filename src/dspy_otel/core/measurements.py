"""Histograms and counters that find the SDK's aggregation of a series once, and not for each measurement.

The SDK cleans, copies, sorts and hashes the attributes of each measurement to find the aggregation that counts it,
which takes more than half of the time of ``Histogram.record``. A program of DSPy has few series, and each is recorded
again and again. What counts a series is the SDK's own aggregation all the same, in its own fields: where it is the one
for histograms with fixed buckets or for sums, as ours are unless a view says otherwise, measurements wait for each
other, and this module does for many of them at once what its ``aggregate`` and the reservoir of its exemplars do. What
waits is counted before a reader collects, so that nobody sees that it has waited.

This reaches into the SDK. It is done only for the SDK's own instruments, in versions that are known, where a check
finds the points to be those of the public way, and until OpenTelemetry can bind attributes to an instrument itself. In
all other cases, and whenever a series is not found as it was, the measurement goes the public way.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any, Final, NamedTuple, TypeAlias

from opentelemetry.context import Context, get_current
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import SPAN_KEY
from dspy_otel.core.internal_errors import failed

_VERSIONS: Final = range(38, 46)
"""Minor versions of the SDK's 1.x that tests have run with."""
_INTERNAL: Final = "opentelemetry.sdk.metrics._internal"
_KINDS: Final = frozenset({"_Histogram", "_Counter"})
_NEWEST: Final = 64
"""How many of an instrument's series are searched. One that has just been recorded is among the newest."""
_CHECKED: Final[Sequence[tuple[float, Attributes]]] = (
    (0.5, {"a": "x", "n": 1}),
    (7.0, {"a": "y"}),
    (0.0, {"a": "x", "n": 1}),
    (7, {"a": "y"}),
)


_MOST_WAITING: Final = 128
_LONGEST_WAIT: Final = 5.0
"""Seconds. Counting takes a fraction of a millisecond."""
_NOWHERE: Final = Context({"dspy_otel.nowhere": True})  # not empty: the SDK takes an empty context for none
_SAMPLED: Final = int(TraceFlags.SAMPLED)
_NO_LOCK: Final = contextlib.nullcontext()  # An older SDK's reservoirs have none.


class _Counted(NamedTuple):
    """Where one view of one reader counts a series.

    Attributes:
        match: the SDK's storage of the instrument's series, for one view of one reader.
        series: all of them. A reader with delta temporality replaces the dictionary when it collects.
        aggregation: the one of this series.
        lock: held while something is counted, by a reader that replaces the dictionary; else ``None``.
        buckets: the bounds of its buckets, where it is counted here; else ``None``.
        exemplars: where it keeps an exemplar for each bucket.
        guard: held while one is put there.
        sums: whether it is the SDK's sum.
    """

    match: Any
    series: Any
    aggregation: Any
    lock: Any
    buckets: tuple[float, ...] | None
    exemplars: Any
    guard: Any
    sums: bool


class BoundSeries:
    """One series of an instrument: the set of its attributes, and what counts it for each reader and view.

    Args:
        instrument: a histogram or counter of the SDK.
        attributes: as the SDK has cleaned them.
        storages: of the readers that there are.
        counted: where it is counted.
        measurement: the SDK's class of measurements.

    Attributes:
        stale: whether a reader has forgotten it, so that its next measurement goes the public way.
    """

    __slots__ = (
        "_attributes",
        "_consumer",
        "_counted",
        "_exemplars",
        "_filter",
        "_instrument",
        "_measurement",
        "_meter",
        "_storages",
        "_waiting",
        "stale",
    )

    def __init__(
        self,
        instrument: Any,
        attributes: dict[str, Any],
        storages: Any,
        counted: Sequence[_Counted],
        measurement: type[Any],
    ) -> None:
        self._instrument = instrument
        self._consumer = instrument._measurement_consumer
        self._meter = getattr(instrument, "_meter_config", None)  # from 1.41; may be switched off at any time
        self.stale = False
        self._attributes = attributes
        self._storages = storages
        self._counted = counted
        self._measurement = measurement
        self._filter = self._consumer._sdk_config.exemplar_filter
        kind = type(self._filter)
        own = kind.__name__ if kind.__module__.startswith(_INTERNAL) else ""
        # Whether a measurement becomes an exemplar depends on its span alone, or none does.
        self._exemplars = own == "TraceBasedExemplarFilter"
        batched = self._exemplars or own == "AlwaysOffExemplarFilter"
        # A view that leaves attributes out counts several series as one, whose order is seen in its exemplars.
        batched = batched and all(
            each.match._view._attribute_keys is None and (each.buckets is not None or each.sums) for each in counted
        )
        self._waiting = waiting_of(self._consumer) if batched else None
        if self._waiting is not None and any(each.lock is not None for each in counted):
            self._waiting.reset_on_collect.append(self)

    def record(self, amount: float, context: Context | None = None) -> bool:
        """Record ``amount`` in ``context``, as the instrument would, unless the SDK no longer has the series as it was.

        Returns:
            Whether it is recorded. If not, the caller records it with the instrument itself.
        """
        waiting = self._waiting
        if (
            self.stale
            or self._consumer._reader_storages is not self._storages
            or not (self._meter is None or self._meter.is_enabled)
        ):
            if waiting is not None:
                waiting.count()  # as long as it is the readers' that there were
            return False
        if waiting is None:
            return self._record_now(amount, context or get_current())
        within: Any = None
        if self._exemplars:
            span: Any = (context or get_current()).get(SPAN_KEY)
            if span is not None:
                within = span.get_span_context()
                # The flags by their place, without the calls of two properties.
                if type(within) is not SpanContext or not within[3] & _SAMPLED:
                    within = None
        measured = waiting.measured
        measured.append((self, amount, 0 if within is None else time.time_ns(), within))
        if len(measured) >= _MOST_WAITING:
            waiting.count(wait=False)
        return True

    def _record_now(self, amount: float, context: Context) -> bool:
        for counted in self._counted:
            if counted.match._attributes_aggregation is not counted.series:
                return False
        now = time.time_ns()
        made = self._made(amount, now, context)
        sampled = self._filter.should_sample(amount, now, self._attributes, context)
        for counted in self._counted:
            if counted.lock is None:
                counted.aggregation.aggregate(made, sampled)
            else:
                counted.match.consume_measurement(made, sampled)
        return True

    def count(self, waited: Sequence[_Measured]) -> None:
        """Count measurements of this series that have waited, as the SDK's ``aggregate`` does."""
        for counted in self._counted:
            if counted.lock is None:
                self._count(counted, waited)
                continue
            with counted.lock:
                same = counted.match._attributes_aggregation is counted.series
                if same:
                    self._count(counted, waited)
            if not same:  # It has been collected meanwhile.
                self.stale = True
                for _, amount, when, within in waited:
                    made = self._made(amount, when or time.time_ns(), _around(within))
                    counted.match.consume_measurement(made, within is not None)

    def _count(self, counted: _Counted, waited: Sequence[_Measured]) -> None:
        aggregation, buckets = counted.aggregation, counted.buckets
        if buckets is None:
            with aggregation._lock:
                for _, amount, _, _ in waited:
                    value = aggregation._value
                    aggregation._value = amount if value is None else value + amount
            for _, amount, when, within in waited:
                if within is not None:
                    aggregation._sample_exemplar(self._made(amount, when, _around(within)), True)
            return
        exemplars: dict[int, _Measured] = {}
        with aggregation._lock:
            counts = aggregation._value
            if counts is None:
                counts = aggregation._value = [0] * (len(buckets) + 1)
            for each in waited:
                amount = each[1]
                place = bisect_left(buckets, amount)
                counts[place] += 1
                aggregation._sum += amount
                if each[3] is not None:
                    exemplars[place] = each  # The last one of a bucket stays.
            if aggregation._record_min_max:
                amounts = [each[1] for each in waited]
                aggregation._min = min(aggregation._min, *amounts)
                aggregation._max = max(aggregation._max, *amounts)
        with counted.guard:
            for place, (_, amount, when, within) in exemplars.items():
                counted.exemplars[place].offer(amount, when, self._attributes, _around(within))

    def _made(self, amount: float, now: int, context: Context) -> Any:
        """The SDK's measurement. Its constructor cleans the attributes, and sets each field past a frozen class."""
        measurement: Any = object.__new__(self._measurement)
        measurement.__dict__.update(
            value=amount, time_unix_nano=now, instrument=self._instrument, context=context, attributes=self._attributes
        )
        return measurement


_Measured: TypeAlias = tuple[BoundSeries, float, int, SpanContext | None]
"""One that waits: its series, the amount, and where it may be an exemplar, its time and the context of its span."""


def _around(within: SpanContext | None) -> Context:
    """A context with the span that an exemplar was measured in."""
    return _NOWHERE if within is None else Context({SPAN_KEY: NonRecordingSpan(within)})


class Waiting:
    """Measurements of all series of a provider that have not been counted yet.

    The SDK calls it before a reader collects, as one of the instruments that are asked for their measurements then.

    Attributes:
        measured: what has not been counted.
        reset_on_collect: series that a reader forgets when it collects.
    """

    def __init__(self) -> None:
        self.measured: deque[_Measured] = deque()
        self.reset_on_collect: list[BoundSeries] = []
        self._counting = threading.Lock()
        if hasattr(os, "register_at_fork"):
            after_fork = weakref.WeakMethod(self._after_fork)
            os.register_at_fork(after_in_child=lambda: (method := after_fork()) and method())

    def _after_fork(self) -> None:
        self._counting = threading.Lock()  # The thread that may own the old one is not here.

    def count(self, wait: bool = True) -> None:
        """Count what waits.

        Args:
            wait: whether to wait for another thread that is counting.
        """
        if not self._counting.acquire(timeout=_LONGEST_WAIT if wait else 0):
            return
        try:
            found: dict[BoundSeries, list[_Measured]] = {}
            for _ in range(len(self.measured)):
                measured = self.measured.popleft()
                found.setdefault(measured[0], []).append(measured)
            for series, waited in found.items():
                series.count(waited)
        except Exception as error:
            failed("metrics", error)
        finally:
            self._counting.release()

    def callback(self, _: Any) -> tuple[()]:
        """Called by the SDK before a reader collects; gives no measurements of its own."""
        self.count()
        forgotten, self.reset_on_collect = self.reset_on_collect, []
        for series in forgotten:
            series.stale = True
        return ()


def waiting_of(consumer: Any) -> Waiting:
    """What waits for the readers of a provider, by the SDK's object for them."""
    found = next((each for each in consumer._async_instruments if type(each) is Waiting), None)
    if found is None:  # Two would do, if two threads come here at once.
        found = Waiting()
        consumer.register_asynchronous_instrument(found)
    return found


def real_instrument(instrument: Any) -> Any:
    """What stands behind OpenTelemetry's proxy, as soon as there is a provider; ``None`` until then."""
    return getattr(instrument, "_real_instrument", instrument)


def bind(instrument: Any, attributes: Attributes) -> BoundSeries | None:
    """Find what counts a series that has just been recorded.

    Args:
        instrument: any instrument.
        attributes: of the series.

    Returns:
        The series, or ``None`` when it must be recorded the public way.
    """
    if not is_known(instrument) or not same_points():
        return None
    try:
        return _find(instrument, attributes)
    except Exception:  # Another SDK than its version says.
        return None


def is_known(instrument: Any) -> bool:
    """Whether this is a histogram or counter of an SDK that is known, and that cannot bind attributes itself."""
    kind = type(instrument)
    if kind.__module__ != f"{_INTERNAL}.instrument" or kind.__name__ not in _KINDS or hasattr(instrument, "bind"):
        return False
    return sdk_is_known()


def sdk_is_known() -> bool:
    """Whether the SDK, which is there, has a version that tests have run with."""
    from opentelemetry.sdk import version

    major, _, rest = version.__version__.partition(".")
    minor = rest.partition(".")[0]
    return major == "1" and minor.isdecimal() and int(minor) in _VERSIONS


def _find(instrument: Any, attributes: Attributes) -> BoundSeries | None:
    consumer = instrument._measurement_consumer
    storages = consumer._reader_storages
    measurement = sys.modules[f"{_INTERNAL}.measurement"].Measurement
    cleaned = measurement(0, 0, instrument, Context(), attributes).attributes
    found: list[_Counted] = []
    for storage in storages.values():
        for match in storage._instrument_view_instrument_matches[instrument]:
            keys = match._view._attribute_keys
            shown = cleaned if keys is None else {key: value for key, value in cleaned.items() if key in keys}
            series = match._attributes_aggregation
            newest = islice(reversed(list(series.values())), _NEWEST)
            aggregation = next((each for each in newest if _same(each._attributes, shown)), None)
            # Beyond the limit of cardinality, a series has no aggregation of its own.
            if aggregation is None or type(aggregation).__module__ != f"{_INTERNAL}.aggregation":
                return None
            lock = match._lock if getattr(match, "_reset_on_collect", False) else None
            sums = type(aggregation).__name__ == "_SumAggregation"
            found.append(_Counted(match, series, aggregation, lock, *_buckets(aggregation), sums))
    return BoundSeries(instrument, cleaned, storages, found, measurement)


def _buckets(aggregation: Any) -> tuple[Any, Any, Any]:
    """The bounds of an aggregation's buckets, its exemplars by bucket, and their lock; all ``None`` for other kinds."""
    reservoir: Any = getattr(aggregation, "_reservoir", None)
    kind = type(reservoir)
    if (
        type(aggregation).__name__ == "_ExplicitBucketHistogramAggregation"
        and kind.__name__ == "AlignedHistogramBucketExemplarReservoir"
        and kind.__module__.startswith(_INTERNAL)
        and tuple(reservoir._boundaries) == aggregation._boundaries
    ):
        return aggregation._boundaries, reservoir._reservoir_storage, getattr(reservoir, "_lock", _NO_LOCK)
    return None, None, None


def _same(one: Any, other: dict[str, Any]) -> bool:
    """Whether two sets of attributes make one series. ``1``, ``1.0`` and ``True`` are equal, and are not the same."""
    return bool(one == other) and all(type(one[key]) is type(value) for key, value in other.items())


@functools.lru_cache(maxsize=1)
def same_points() -> bool:
    """Whether a bound series gives the very points that the instrument itself gives. Checked once for each process."""
    try:
        return bool(public := _collected(bound=False)) and _collected(bound=True) == public
    except Exception:
        return False


def _collected(bound: bool) -> list[Any]:
    """The points of some measurements, with one reader of each temporality, collected two times."""
    from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
    from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
    from opentelemetry.sdk.resources import Resource

    readers = [
        InMemoryMetricReader(preferred_temporality={Histogram: temporality, Counter: temporality})
        for temporality in (AggregationTemporality.DELTA, AggregationTemporality.CUMULATIVE)
    ]
    provider = MeterProvider(readers, resource=Resource.get_empty(), shutdown_on_exit=False)
    meter = provider.get_meter("dspy_otel.check")
    histogram, counter = meter.create_histogram("measured"), meter.create_counter("counted")
    sampled = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    # Which measurement is a counter's exemplar is random; it has none outside of a span.
    ways: list[tuple[Any, Any, Context]] = [
        (histogram, histogram.record, set_span_in_context(NonRecordingSpan(sampled), Context())),
        (counter, counter.add, Context({"dspy_otel.check": True})),
    ]
    points: list[Any] = []
    for _ in range(2):
        for amount, attributes in _CHECKED:
            for instrument, record, context in ways:
                record(amount, attributes, context if instrument is counter else None)
                series = _find(instrument, attributes) if bound else None
                if series is None:
                    record(2 * amount, attributes, context)
                elif not series.record(2 * amount, context):
                    return []
        for reader in readers:
            data: Any = reader.get_metrics_data()
            for metric in data.resource_metrics[0].scope_metrics[0].metrics:
                points += map(_shown, metric.data.data_points)
    return points


def _shown(point: Any) -> tuple[Any, ...]:
    """What is to be the same of a point of a histogram or a counter."""
    exemplars = [(each.value, each.span_id, each.filtered_attributes) for each in point.exemplars]
    if not hasattr(point, "bucket_counts"):
        return dict(point.attributes), point.value, exemplars
    counts = point.bucket_counts, point.explicit_bounds
    return dict(point.attributes), point.count, point.sum, point.min, point.max, counts, exemplars
