"""An embedded MLflow SQL store (``sqlite:///`` and the like), in this process, without a server.

MLflow has no public API that takes finished OpenTelemetry spans. This module does in process what its OTLP endpoint
does: decode each span with ``Span.from_otel_proto`` and hand the list to the store's ``log_spans`` (read in MLflow
3.17.2 and 3.18.0, ``mlflow/server/otel_api.py``). So a trace looks the same as one that went through a server.

A batch's spans, links and scores are written in one transaction: commits cost most in sqlite. That works on
a copy of MLflow's store object whose calls share one session; where a version of MLflow does not allow it, each call
is made on its own.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext
from packaging.version import Version

from dspy_otel.mlflow.backends import base
from dspy_otel.mlflow.backends.base import OLDEST_MLFLOW, Batch, CreatedRun, FoundExperiment, resolve_experiment
from dspy_otel.mlflow.backends.embedded_registry import EmbeddedRegistry
from dspy_otel.mlflow.backends.registry import Registry
from dspy_otel.mlflow.locks import importing, lock_for
from dspy_otel.mlflow.retry import LOCKED, MAX_ADDRESS, ExportError, Verdict, clean
from dspy_otel.mlflow.runs import (
    TAG_KEY,
    TAG_NAME,
    Assessment,
    Dataset,
    Metric,
    Score,
    StoredRun,
    StoredTrace,
    whole_metrics,
    whole_tags,
)
from dspy_otel.mlflow.target import Target, public_uri, sqlite_path
from dspy_otel.mlflow.translate import CHAT_USAGE, LLM_COST, restore
from dspy_otel.record.answers import newest_scores
from dspy_otel.record.model import Judgement

_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_PERMANENT: Final = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
"""Codes of errors that MLflow gives again for the same call."""
_OF_RUNS: Final = frozenset({"link", "values", "datasets", "artifact", "end"})
"""Calls that write to a run, which was there before."""
_OPEN_SECONDS: Final = 300.0
"""Seconds to wait for another process that creates the store: a new one runs some fifty migrations."""
_MAX_IDS: Final = 500
_calls: Final = threading.local()
_MAX_TRACES: Final = 25_000
"""Most traces of one search."""


class _OfOthers(logging.Filter):
    """Drops what MLflow logs of failed calls of ours: for each attempt, a trace with statements and values of spans.

    Our own line names the cause, once.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_calls, "ours", False)


logging.getLogger("mlflow.store.db.utils").addFilter(_OfOthers())


@contextmanager
def _own_call() -> Iterator[None]:
    _calls.ours = True
    try:
        yield
    finally:
        _calls.ours = False


class EmbeddedBackend:
    """One SQL store and one experiment in it, through MLflow's client; a missing database is made, by one process.

    Args:
        target: where.

    Raises:
        ExportError: MLflow is missing, too old, not the full package, or cannot open the store.
    """

    parallel = False
    """Sqlite has one writer."""

    def __init__(self, target: Target) -> None:
        uri = target.uri
        self.name = clean(public_uri(uri), MAX_ADDRESS)
        self.answered = 0
        self._until = float("inf")
        _check_mlflow()
        with _opening_lock(uri):
            try:
                from mlflow.tracing.client import TracingClient
                from mlflow.tracking import MlflowClient

                _create_database(uri, MlflowClient)
                self._client: Any = MlflowClient(tracking_uri=uri, registry_uri=uri)
                self._traces: Any = TracingClient(uri)
                self._experiment_id = resolve_experiment(
                    target.named_experiment, target.create, self._by_id, self._by_name, self._make
                )
                self.registry: Registry = EmbeddedRegistry(
                    self._client, self._traces.store, self._experiment_id, self._call
                )
            except ExportError:
                raise
            except Exception as error:
                message = f"MLflow cannot open {self.name}: {clean(base.first_line(error))}"
                raise ExportError("store", message, unavailable=True) from error
        self.experiment_in_use = self._experiment_id

    # --- spans ------------------------------------------------------------------------------------------------------
    def deliver(self, batch: Batch) -> bool:
        """Write all in one transaction, unless another program holds the store."""
        store = self._traces.store
        if not hasattr(store, "ManagedSessionMaker"):
            return False
        try:
            spans = _to_mlflow(batch.body)
            with _own_call(), store.ManagedSessionMaker(read_only=False) as session:
                shared = copy.copy(store)
                shared.ManagedSessionMaker = _sharing(session)
                with session.no_autoflush, _adding(session, {span.trace_id for span in spans}):
                    shared.log_spans(self._experiment_id, spans)
                for run_id, trace_ids in batch.links.items():
                    for start in range(0, len(trace_ids), base.MAX_LINKS):
                        shared.link_traces_to_run(list(trace_ids[start : start + base.MAX_LINKS]), run_id)
                self._add_scores(session, batch.scores)
        except Exception as error:
            if _is_locked(error):
                raise self._locked() from error
            _logger.debug("not in one transaction: %s", base.first_line(error))
            return False
        self.answered += 1
        return True

    def _add_scores(self, session: Any, scores: Sequence[tuple[Assessment, str | None]]) -> None:
        """Add scores as ``create_assessment`` of MLflow's store does, for all at once."""
        from mlflow.store.tracking.dbmodels.models import SqlAssessments, SqlTraceInfo

        session.flush()
        for start in range(0, len(scores), _MAX_IDS):
            some = {score.id: (score, run_id) for score, run_id in scores[start : start + _MAX_IDS]}
            there = session.query(SqlAssessments.assessment_id).filter(SqlAssessments.assessment_id.in_(list(some)))
            for (known,) in there:
                some.pop(known)
            ids = {score.trace_id for score, _ in some.values()}
            traces = {
                trace.request_id: trace
                for trace in session.query(SqlTraceInfo).filter(SqlTraceInfo.request_id.in_(list(ids)))
            }
            for score, run_id in some.values():
                row = SqlAssessments.from_mlflow_entity(_assessment(score, run_id))
                trace = traces[score.trace_id]
                for column, value in (
                    ("experiment_id", trace.experiment_id),
                    ("trace_timestamp_ms", trace.timestamp_ms),
                ):
                    if hasattr(SqlAssessments, column):
                        setattr(row, column, value)
                session.add(row)

    def send(self, body: bytes) -> None:
        """Write spans in one transaction."""
        self._call("write", lambda: self._traces.log_spans(self._experiment_id, _to_mlflow(body)))

    def link(self, run_id: str, trace_ids: Sequence[str]) -> None:
        """Put traces on a run."""
        self._call("link", lambda: self._client.link_traces_to_run(list(trace_ids), run_id))

    def assess(self, score: Assessment, run_id: str | None) -> None:
        """Put a score or an expectation on a trace."""

        def write() -> None:
            try:
                self._traces.log_assessment(score.trace_id, _assessment(score, run_id))
            except Exception:
                # An attempt that was interrupted may have stored it.
                with contextlib.suppress(Exception):
                    self._traces.get_assessment(score.trace_id, score.id)
                    return
                raise

        self._call("score", write)

    # --- runs -------------------------------------------------------------------------------------------------------
    def create_run(
        self, key: str, tags: Mapping[str, str], started: int, experiment_id: str | None = None, *, known: bool = False
    ) -> CreatedRun:
        """Make a run, or find it."""
        place = experiment_id or self._experiment_id
        if known and (found := self.find_run(key, place)) is not None:
            return found
        made = self._call("run", lambda: self._client.create_run(place, started, dict(tags), tags[TAG_NAME]))
        return CreatedRun(made.info.run_id, made.info.artifact_uri)

    def find_run(self, key: str, experiment_id: str | None = None) -> CreatedRun | None:
        """A run by its key."""
        places = [experiment_id or self._experiment_id]
        search = self._client.search_runs
        runs = self._call("run", lambda: search(places, f"tags.`{TAG_KEY}` = '{key}'", max_results=1))
        return CreatedRun(runs[0].info.run_id, runs[0].info.artifact_uri) if runs else None

    def url(self, run_id: str, experiment_id: str | None = None) -> str | None:
        """Return None: a store has no pages."""
        return None

    def log(self, run_id: str, metrics: Sequence[Metric], params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Write metrics, parameters and tags."""
        from mlflow.entities import Metric as Point
        from mlflow.entities import Param, RunTag

        points = [Point(metric.key, metric.value, metric.time, metric.step) for metric in metrics]
        named = [Param(key, value) for key, value in params.items()]
        tagged = [RunTag(key, value) for key, value in tags.items()]
        self._call("values", lambda: self._client.log_batch(run_id, points, named, tagged))

    def add_datasets(self, run_id: str, datasets: Sequence[Dataset]) -> None:
        """Add dataset inputs."""
        from mlflow.entities import Dataset as Entity
        from mlflow.entities import DatasetInput, InputTag

        inputs = [
            DatasetInput(Entity(**base.dataset_fields(dataset)), [InputTag(base.DATASET_CONTEXT, dataset.context)])
            for dataset in datasets
        ]
        self._call("datasets", lambda: self._client.log_inputs(run_id, inputs))

    def put_artifact(self, run: CreatedRun, path: str, text: str) -> None:
        """Store a text artifact."""
        whole = text.encode("utf-8", "replace").decode()
        self._call("artifact", lambda: self._client.log_text(run.run_id, whole, path))

    def end_run(self, run_id: str, status: str, when: int) -> None:
        """Set a run's status and end."""
        self._call("end", lambda: self._client.set_terminated(run_id, status, when))

    def find_runs(self, run_id: str | None, condition: str, experiment_id: str | None = None) -> list[StoredRun]:
        """The run with an id, or those that match."""
        if run_id is None:
            place, search = experiment_id or self._experiment_id, self._client.search_runs
            found = self._call("runs", lambda: search([place], condition, max_results=base.MAX_RUNS))
        else:
            try:
                found = [self._call("run", lambda: self._client.get_run(run_id))]
            except ExportError as error:
                if error.verdict is Verdict.LATER:
                    raise
                found = []
        return [
            StoredRun(
                run.info.run_id,
                run.info.artifact_uri,
                run.info.start_time,
                (tags := whole_tags(run.data.tags)),
                whole_metrics(tags, run.data.metrics),
                run.data.params,
                run.info.experiment_id,
                run.info.status,
                run.info.end_time,
                {
                    tag.value: one.dataset.digest
                    for one in run.inputs.dataset_inputs
                    for tag in one.tags
                    if tag.key == base.DATASET_CONTEXT
                },
            )
            for run in found
        ]

    def find_traces(self, condition: str, experiment_id: str | None = None) -> list[StoredTrace]:
        """Traces, by the store itself: its client reads five hundred at a time, each time from the beginning."""
        search, token = self._traces.store.search_traces, None
        found: list[StoredTrace] = []
        while len(found) < base.MAX_TRACES:
            asked = {
                "locations": [experiment_id or self._experiment_id],
                "filter_string": condition,
                "max_results": _MAX_TRACES,
                "page_token": token,
            }
            page, token = self._call("traces", lambda asked=asked: search(**asked))  # type: ignore[misc]
            found += map(_stored_trace, page)
            if not token:
                break
        return found

    def read_spans(self, trace_ids: Sequence[str]) -> list[ReadableSpan]:
        """Spans of programs."""
        read = self._traces.store.batch_get_traces
        found = self._call("traces", lambda: read(list(trace_ids)))
        return [
            restore(_span(span))
            for trace in found
            for span in trace.data.spans
            if base.is_of_program(span.attributes.keys(), (event.name for event in span.events))
        ]

    def read_artifact(self, run: CreatedRun, path: str) -> str | None:
        """A text artifact."""
        return self._call("read", lambda: base.read_with_client(self._client, run.run_id, path))

    # --- the store --------------------------------------------------------------------------------------------------
    def set_deadline(self, until: float) -> None:
        """Start no call after that time."""
        self._until = until

    def close(self) -> None:
        """Do nothing: MLflow shares one store per URI in a process, and others may use it."""

    def after_fork(self) -> None:
        """Forget the parent's database connections without closing them under it."""
        registry = getattr(getattr(self._client, "_registry_client_lazy", None), "store", None)
        for store in (self._traces.store, registry):
            engine = getattr(store, "engine", None)
            if engine is not None:
                engine.dispose(close=False)

    def _call(self, cause: str, call: Callable[[], _Result]) -> _Result:
        """Make a call of MLflow's client; an error says whether the same call would fail again."""
        if time.monotonic() > self._until:
            raise ExportError("slow", f"MLflow's store {self.name}: no time is left.", unavailable=True)
        try:
            with _own_call():
                result = call()
        except ExportError:
            raise
        except Exception as error:
            if _is_locked(error):
                raise self._locked() from error
            code = getattr(error, "error_code", None)
            if code == "RESOURCE_DOES_NOT_EXIST" and cause in _OF_RUNS:
                raise base.lost(self.name) from error
            permanent = code in _PERMANENT
            message = f"MLflow cannot write to {self.name}: {clean(base.first_line(error))}"
            raise ExportError(cause, message, Verdict.SPLIT if permanent else Verdict.LATER) from error
        self.answered += 1
        return result

    def _locked(self) -> ExportError:
        return ExportError(LOCKED, f"MLflow's store {self.name} is locked by another program.", unavailable=True)

    def _by_id(self, experiment_id: str) -> FoundExperiment | None:
        from mlflow.exceptions import MlflowException

        try:
            experiment = self._client.get_experiment(experiment_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return FoundExperiment(experiment.experiment_id, experiment.lifecycle_stage)

    def _by_name(self, name: str) -> FoundExperiment | None:
        experiment = self._client.get_experiment_by_name(name)
        return FoundExperiment(experiment.experiment_id, experiment.lifecycle_stage) if experiment else None

    def _make(self, name: str) -> str:
        try:
            return str(self._client.create_experiment(name))
        except Exception as error:
            message = f"MLflow did not create {name!r}: {clean(base.first_line(error))}"
            raise ExportError("experiment", message) from error


def _is_locked(error: Exception) -> bool:
    """Whether another program writes to the sqlite store, for longer than MLflow waits (20 s)."""
    return getattr(error, "error_code", None) == "TEMPORARILY_UNAVAILABLE" and "database is locked" in str(error)


def _sharing(session: Any) -> Callable[..., Any]:
    """A session maker for a copy of a store: all calls get one session, which its owner commits."""

    @contextmanager
    def make(read_only: bool = True) -> Iterator[Any]:
        yield session
        session.flush()

    return make


@contextmanager
def _adding(session: Any, trace_ids: set[str]) -> Iterator[None]:
    """Insert new traces together, and their tags and metadata without a look-up.

    The store would look for each tag first, and flush each new trace on its own: half of the time that a trace costs.
    Rows of existing traces are merged as before. What is to be flushed is flushed before the next statement.
    """
    from mlflow.store.tracking.dbmodels.models import SqlTraceInfo
    from sqlalchemy import inspect

    known = session.query(SqlTraceInfo.request_id).filter(SqlTraceInfo.request_id.in_(sorted(trace_ids)))
    new = trace_ids - {trace_id for (trace_id,) in known}
    added: dict[Any, Any] = {}
    merge = session.merge

    def add(row: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(row, "request_id", None) not in new:
            return merge(row, *args, **kwargs)
        mapper = inspect(type(row))
        key = (mapper, *mapper.primary_key_from_instance(row))
        if key not in added:
            added[key] = row
            session.add(row)
        else:
            for column in mapper.column_attrs:
                setattr(added[key], column.key, getattr(row, column.key))
        return added[key]

    flush, execute = session.flush, session.execute
    deferred = False

    def defer(*_: Any) -> None:
        nonlocal deferred
        deferred = True

    def execute_after_flush(*args: Any, **kwargs: Any) -> Any:
        nonlocal deferred
        if deferred:
            deferred = False
            flush()
        return execute(*args, **kwargs)

    session.merge, session.flush, session.execute = add, defer, execute_after_flush
    try:
        yield
    finally:
        del session.merge, session.flush, session.execute
    if deferred:
        flush()


@contextmanager
def _opening_lock(uri: str) -> Iterator[None]:
    """One process at a time opens a store: MLflow's migrations of a new one fail in two at once."""
    lock = lock_for(uri, _OPEN_SECONDS)
    if lock is None:
        yield
        return
    with lock:
        yield


def _create_database(uri: str, client: Callable[..., Any]) -> None:
    """Create a new sqlite database under another name, and rename it when all of its tables exist.

    MLflow's migrations take seconds. MLflow cannot open a database whose migrations were interrupted, as by a kill.
    """
    path = sqlite_path(uri)
    if path is None or os.path.exists(path) or not os.path.isdir(os.path.dirname(path) or "."):
        return
    directory, name = os.path.split(path)
    beside = os.path.join(directory, f".{name}.dspy-otel-new")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)  # left by a process that was killed; the lock lets only one create it
        made = client(tracking_uri=f"sqlite:///{beside}")
        made.get_experiment("0")
        made._tracking_client.store.engine.dispose()
        os.link(beside, path)  # not over one that MLflow in another program has created meanwhile
    except Exception as error:  # MLflow creates it in place, as without us
        _logger.debug("the database is created in place: %s", base.first_line(error))
    finally:
        with contextlib.suppress(OSError):
            os.unlink(beside)


def _check_mlflow() -> None:
    with importing():
        _import_mlflow()


def _import_mlflow() -> None:
    install = "pip install 'dspy-otel[mlflow]'"
    try:
        import mlflow
    except ImportError as error:
        message = f"An embedded MLflow store needs the mlflow package: {install}."
        raise ExportError("mlflow missing", message, unavailable=True, permanent=True) from error
    if Version(mlflow.__version__) < Version(OLDEST_MLFLOW):
        message = f"MLflow {mlflow.__version__} is too old for an embedded store; {OLDEST_MLFLOW} or newer is needed."
        raise ExportError("mlflow old", message, unavailable=True, permanent=True)
    try:
        import mlflow.store.tracking.sqlalchemy_store  # and with it all that is imported later
    except ImportError as error:
        message = f"mlflow-skinny and mlflow-tracing have no SQL store: {install}."
        raise ExportError("mlflow skinny", message, unavailable=True, permanent=True) from error


def _to_mlflow(body: bytes) -> list[Any]:
    """The spans of an OTLP request as MLflow's entities, as its own OTLP endpoint makes them."""
    from mlflow.entities import Span
    from mlflow.tracing.otel import translation
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    # Texts that are JSON are encoded once more by `from_otel_proto`. Before 3.18, the store mends that itself.
    decoded = getattr(translation, "strip_otlp_double_encoding", None)
    entities = [
        Span.from_otel_proto(span, resource=resource_spans.resource)
        for resource_spans in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope_spans in resource_spans.scope_spans
        for span in scope_spans.spans
    ]
    for entity in entities:
        # As MLflow's endpoint sets service.name.
        attributes = getattr(getattr(entity, "_span", None), "_attributes", None)
        if isinstance(attributes, MutableMapping):
            if decoded is not None:
                entity._span._attributes = attributes = decoded(attributes)
            _leave_unpriced(attributes)
    return entities


def _leave_unpriced(attributes: MutableMapping[str, Any]) -> None:
    """Keep the store from pricing a call of ours that DSPy could not price.

    It would import LiteLLM into the user's program, which takes seconds and asks the network for prices. An empty
    cost is read as given, and shown as none.
    """
    if CHAT_USAGE in attributes:
        attributes.setdefault(LLM_COST, "")


def _assessment(score: Assessment, run_id: str | None) -> Any:
    from mlflow.entities import AssessmentError, AssessmentSource, Expectation, Feedback

    place: dict[str, Any] = {
        "name": score.name,
        "value": score.value,
        "metadata": base.score_metadata(score, run_id),
        "span_id": score.span_id,
        "trace_id": score.trace_id,
    }
    if isinstance(score, Score):
        made = Feedback(
            error=None if score.error is None else AssessmentError(score.error, score.message or base.FAILED_EXAMPLE),
            rationale=score.rationale,
            source=AssessmentSource("CODE", score.name),
            **place,
        )
    else:
        made = Expectation(source=AssessmentSource("CODE", base.EXPECTATION_SOURCE), **place)
    made.assessment_id = score.id
    return made


def _span(span: Any) -> ReadableSpan:
    """A span of MLflow's as the program's own. Through OTLP, an integer of more than 64 bits would be an error."""
    trace_id = base.trace_number(span.trace_id)

    def context(span_id: str) -> SpanContext:
        return SpanContext(trace_id, int(span_id, 16), is_remote=False)

    return ReadableSpan(
        span.name,
        context(span.span_id),
        parent=context(span.parent_id) if span.parent_id else None,
        resource=Resource.get_empty(),
        attributes=dict(span.attributes),
        events=[Event(event.name, event.attributes, event.timestamp) for event in span.events],
        instrumentation_scope=InstrumentationScope(base.scope_of(span.attributes.keys())),
        start_time=span.start_time_ns,
        end_time=span.end_time_ns,
    )


def _judgement(trace_id: str, assessment: Any) -> Judgement:
    expectation = getattr(assessment, "expectation", None)
    feedback = getattr(assessment, "feedback", None)
    return Judgement(
        base.trace_number(trace_id),
        int(assessment.span_id, 16) if assessment.span_id else None,
        assessment.name,
        getattr(feedback, "value", None) if expectation is None else expectation.value,
        human=assessment.source.source_type == "HUMAN",
        expectation=expectation is not None,
        text=assessment.rationale,
        when=(assessment.create_time_ms or 0) / 1000,
    )


def _stored_trace(trace: Any) -> StoredTrace:
    judgements = [_judgement(trace.trace_id, one) for one in trace.assessments or () if one.valid is not False]
    return StoredTrace(
        trace.trace_id,
        trace.tags,
        trace.request_time,
        None if trace.execution_duration is None else trace.execution_duration / 1000,
        getattr(trace.state, "value", None) == "ERROR",
        trace.request_preview,
        trace.response_preview,
        newest_scores(judgements),
        judgements,
        base.stored_usage(trace.trace_metadata),
    )
