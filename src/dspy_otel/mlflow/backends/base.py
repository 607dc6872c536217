"""The contract of a backend, and what both backends share."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel import semconv
from dspy_otel.mlflow.backends.registry import Registry
from dspy_otel.mlflow.retry import ExportError, Verdict, clean
from dspy_otel.mlflow.runs import TRACE_ID, Assessment, Dataset, Metric, StoredRun, StoredTrace
from dspy_otel.record.model import Usage, load_json, number

_BARS: Final = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
OLDEST_MLFLOW: Final = "3.14"
"""First release whose OTLP endpoint keeps trace tags and resource attributes (compared over the wheels)."""
MAX_LINKS: Final = 100
"""MLflow's ``MAX_TRACE_LINKS_PER_REQUEST``."""
FAILED_EXAMPLE: Final = "The example failed."
"""The message of a score whose example raised, when content is not captured."""
MAX_ARTIFACT: Final = 256 * 1024 * 1024
"""Most bytes of an artifact that is read back."""
DATASET_CONTEXT: Final = "mlflow.data.context"
"""MLflow's tag of a dataset input that says what it was used for."""
MAX_RUNS: Final = 20_000
"""Most runs that one search gives."""
MAX_TRACES: Final = 100_000
"""Most traces that one search gives."""
MAX_READ: Final = 25
"""Most traces whose spans are read at once: they have all prompts and answers."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Spans, and what belongs to their traces.

    Attributes:
        body: an OTLP request in protobuf.
        links: ids of traces by the id of the run that they belong to.
        scores: and expectations, with the id of their run, if that is known.
    """

    body: bytes
    links: Mapping[str, Sequence[str]] = field(default_factory=dict)
    scores: Sequence[tuple[Assessment, str | None]] = ()


class CreatedRun(NamedTuple):
    """A run that exists, and where its artifacts are."""

    run_id: str
    artifact_uri: str


class Backend(Protocol):
    """One experiment of one MLflow.

    Every method that writes is idempotent: spans have ids, runs a tag with their key, metric points a value, time and
    step, scores an id. A caller that does not know whether a call succeeded repeats it.

    Every method raises :class:`~dspy_otel.mlflow.retry.ExportError` and nothing else; its verdict says what to do.

    One thread at a time may use a backend. Exceptions: several threads may call :meth:`assess` of a backend that is
    ``parallel``, and any thread may use :attr:`answered` and :meth:`set_deadline`.

    Attributes:
        parallel: whether several threads write scores faster than one.
        name: its address, without credentials.
        registry: models, prompts and datasets.
        answered: number of answers so far, refusals included; it tells a slow server from one that is down.
    """

    parallel: bool
    answered: int
    name: str
    registry: Registry

    @property
    def experiment_in_use(self) -> str | None:
        """Id of the experiment; None until it has been looked up."""

    def deliver(self, batch: Batch) -> bool:
        """Write spans, links and scores together, all or nothing; False when the backend cannot."""

    def send(self, body: bytes) -> None:
        """Write spans, all or nothing: an OTLP request in protobuf."""

    def link(self, run_id: str, trace_ids: Sequence[str]) -> None:
        """Put at most ``MAX_LINKS`` traces on a run. They need not exist yet."""

    def assess(self, score: Assessment, run_id: str | None) -> None:
        """Put a score or an expectation on a trace that exists."""

    def create_run(
        self, key: str, tags: Mapping[str, str], started: int, experiment_id: str | None = None, *, known: bool = False
    ) -> CreatedRun:
        """Make a run.

        Args:
            key: our name for it.
            tags: at most 100, its name and key among them.
            started: milliseconds since 1970.
            experiment_id: where, if not in the backend's own experiment.
            known: it may exist already: look first.
        """

    def find_run(self, key: str, experiment_id: str | None = None) -> CreatedRun | None:
        """A run by its key."""

    def url(self, run_id: str, experiment_id: str | None = None) -> str | None:
        """The page of a run; None without a server.

        Args:
            run_id: the run.
            experiment_id: where, if not in the backend's own experiment.
        """

    def log(self, run_id: str, metrics: Sequence[Metric], params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Write at most 100 parameters, 100 tags and in all 1,000 items. A parameter never gets another value."""

    def add_datasets(self, run_id: str, datasets: Sequence[Dataset]) -> None:
        """Add dataset inputs. Two calls at once with the same new dataset may fail; a second attempt helps."""

    def put_artifact(self, run: CreatedRun, path: str, text: str) -> None:
        """Store a text artifact, in place of one that may be there."""

    def end_run(self, run_id: str, status: str, when: int) -> None:
        """Set a run's status and end (milliseconds since 1970)."""

    def find_runs(self, run_id: str | None, condition: str, experiment_id: str | None = None) -> list[StoredRun]:
        """The run with an id, or those of an experiment that match a search condition (the newest ``MAX_RUNS``)."""

    def find_traces(self, condition: str, experiment_id: str | None = None) -> list[StoredTrace]:
        """The traces of an experiment that match a search condition (the newest ``MAX_TRACES``)."""

    def read_spans(self, trace_ids: Sequence[str]) -> list[ReadableSpan]:
        """The spans of traces that belong to programs, without calls of LMs; at most ``MAX_READ`` traces at a time."""

    def read_artifact(self, run: CreatedRun, path: str) -> str | None:
        """A text artifact; None when the run has none under that path."""

    def set_deadline(self, until: float) -> None:
        """Let no request take longer than ``until`` (monotonic clock): the program ends."""

    def close(self) -> None:
        """Release connections."""

    def after_fork(self) -> None:
        """In a forked child: give up connections that the parent process still uses."""


# --- experiments ----------------------------------------------------------------------------------------------------


class FoundExperiment(NamedTuple):
    """An experiment as MLflow knows it."""

    experiment_id: str
    lifecycle_stage: str


def resolve_experiment(
    named: tuple[str, bool | None],
    create: bool,
    by_id: Callable[[str], FoundExperiment | None],
    by_name: Callable[[str], FoundExperiment | None],
    make: Callable[[str], str],
) -> str:
    """The id of an experiment, created when it is a name that does not exist.

    Args:
        named: name or id, and whether it is an id.
        create: make one that does not exist.
        by_id: finds one by its id.
        by_name: finds one by its name, deleted ones too.
        make: makes one; it raises when the name is taken.

    Raises:
        ExportError: an id that does not exist, a name that does not when it is not to be created, or an experiment
            that was deleted.
    """
    value, is_id = named
    found = None
    if is_id or (is_id is None and value.isdigit()):
        found = by_id(value)
        if found is None and is_id:
            raise ExportError(
                "experiment", f"MLflow has no experiment with id {value} (MLFLOW_EXPERIMENT_ID).", unavailable=True
            )
    if found is None:
        found = by_name(value)
    if found is None and not create:
        raise ExportError("experiment", f"MLflow has no experiment {value!r}.", unavailable=True, permanent=True)
    if found is None:
        try:
            return make(value)
        except ExportError as error:
            found = None if error.unavailable else by_name(value)  # another process may have created it since
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ExportError(
            "experiment",
            f"MLflow experiment {value!r} is deleted: restore it "
            f"(mlflow experiments restore -x {found.experiment_id}) or choose another.",
            unavailable=True,
        )
    return found.experiment_id


# --- forms ----------------------------------------------------------------------------------------------------------


def dataset_fields(dataset: Dataset) -> dict[str, str]:
    """A dataset as MLflow's entity. DSPy's are lists in memory: there is no place to load them from again."""
    columns = [{"type": kind, "name": name, "required": False} for name, kind in dataset.columns]
    return {
        "name": dataset.name,
        "digest": dataset.digest,
        "source_type": "code",
        "source": json.dumps({"tags": {}}),
        "schema": json.dumps({"mlflow_colspec": columns}) if columns else "",
        "profile": json.dumps({"num_rows": dataset.size}),
    }


EXPECTATION_SOURCE: Final = "dataset"
"""Where an expectation comes from: a row of the evaluated dataset."""


def score_metadata(score: Assessment, run_id: str | None) -> dict[str, str]:
    """Metadata of an assessment. The page of a run shows the scores whose metadata has its id."""
    metadata = {} if run_id is None else {"mlflow.assessment.sourceRunId": run_id}
    if score.row is not None:
        metadata["dspy.example.index"] = str(score.row)
    return metadata


def stored_usage(metadata: Mapping[str, str]) -> Usage:
    """Tokens and cost of a trace, from its metadata."""
    tokens, cost = load_json(metadata.get("mlflow.trace.tokenUsage")), load_json(metadata.get("mlflow.trace.cost"))
    found = tokens if isinstance(tokens, dict) else {}
    return Usage(
        input_tokens=number(found.get("input_tokens")),
        output_tokens=number(found.get("output_tokens")),
        cost=number(cost.get("total_cost")) if isinstance(cost, dict) else None,
    )


def trace_number(trace_id: str) -> int:
    """The number of a trace, by MLflow's name; 0 for a name of another kind."""
    try:
        return int(trace_id.removeprefix(TRACE_ID.replace("{}", "")), 16)
    except ValueError:
        return 0


def is_of_program(names: Collection[str], events: Iterable[str]) -> bool:
    """Whether a span may be an answer of a program or have a score on it, by its attributes' and events' names."""
    program = semconv.PROGRAM_NAME in names and semconv.GEN_AI_REQUEST_MODEL not in names
    return program or semconv.LOG_EVALUATION_RESULT in events


def scope_of(names: Collection[str]) -> str:
    """The instrumentation scope of a span, of which MLflow keeps nothing."""
    return semconv.SCOPE_NAME if semconv.PROGRAM_NAME in names else ""


def read_with_client(client: Any, run_id: str, path: str) -> str | None:
    """A text artifact through MLflow's client, or None when there is none."""
    if path not in {item.path for item in client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory() as directory, _without_progress_bars():
        return Path(client.download_artifacts(run_id, path, directory)).read_text(encoding="utf-8")


def put_with_client(client: Any, model_id: str, path: str, text: str) -> None:
    """Store a text artifact of a model through MLflow's client."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, path)
        file.write_text(text, encoding="utf-8", errors="replace")
        client.log_model_artifact(model_id, str(file))


def read_below(address: str, path: str) -> str | None:
    """A text artifact below an address, by MLflow's package; None when there is none."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository = get_artifact_repository(address)
    if path not in {item.path for item in repository.list_artifacts()}:
        return None
    with tempfile.TemporaryDirectory() as directory, _without_progress_bars():
        return Path(repository.download_artifacts(path, directory)).read_text(encoding="utf-8")


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Without MLflow's bars, one for each artifact. The variable is as before afterwards."""
    before = os.environ.get(_BARS)
    os.environ[_BARS] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_BARS, None)
        else:
            os.environ[_BARS] = before


def first_line(error: BaseException) -> str:
    """Type and first line of an error: SQLAlchemy's go on with statements and parameters, which are content."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def unexpected(error: BaseException) -> ExportError:
    """Make an error of an exception that no backend should raise."""
    return ExportError(type(error).__name__, f"MLflow: {clean(first_line(error))}.", unavailable=True)


def lost(name: str) -> ExportError:
    """A run that MLflow had, and has no more: the journal can bring it back."""
    return ExportError(
        "lost",
        f"MLflow at {name} does not have the run any more (was its database replaced?). What belongs to it is kept, "
        "and written anew by the next program or by `dspy-otel replay`.",
        Verdict.LOST,
    )


def refusal(cause: str, message: str) -> ExportError:
    """An item that MLflow will never take."""
    return ExportError(cause, message, Verdict.REFUSED)
