"""From records to a decision: is program B better than program A, and how sure is that?

* :mod:`.results` - what is compared: scored examples of a program, from spans; :mod:`.stored` - the same from MLflow;
* :mod:`.comparison` - results to a verdict with its :mod:`.evidence`; :mod:`.show` and :mod:`.page` - that as text and
  HTML;
* :mod:`.explanation` - why the winner of an optimization is better, as text, JSON and HTML;
* :mod:`.overview` - what was optimized and evaluated, by dataset and metric; :mod:`.listing` - that as text.

Nothing here imports DSPy, and MLflow and SciPy are imported when they are needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from dspy_otel.decide.errors import CannotCompareError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from dspy_otel.decide.comparison import Comparison
    from dspy_otel.decide.explanation import Why
    from dspy_otel.decide.overview import Group, Summary
    from dspy_otel.decide.results import Results
    from dspy_otel.record.model import Origin

_PART: Final = "#"
"""Between a place and the part of it that is meant: ``spans.jsonl#best``."""
Reference: TypeAlias = "str | os.PathLike[str] | Iterable[ReadableSpan]"
"""What can be compared; :func:`compare` says how it is named."""

__all__ = ["CannotCompareError", "Reference", "compare", "find_all", "find_results", "find_run", "list_runs", "why"]


def compare(
    a: Reference,
    b: Reference,
    *,
    metric: str | Sequence[str] | None = None,
    alpha: float = 0.05,
    max_drop: float = 0.0,
    failed_score: float | None = 0.0,
    experiment: str | int | None = None,
    tracking_uri: str | None = None,
) -> Comparison:
    """Compare two programs by the examples that both were scored on: is B better than A, or worse?

    Args:
        a: one of

            * the id of an MLflow run: of an optimization (its best trial), a trial or an evaluation; with ``#baseline``
              or ``#4`` behind it, another trial of the optimization;
            * the name of an MLflow experiment: its best optimization, or evaluation;
            * a ``dspy.program.id``, in MLflow: answers in production that have scores, or evaluations, whichever
              both have of the same examples, production first;
            * the path of a file of OTLP, JSON or protobuf (``.pb``): the newest evaluation or optimization in it; with
              ``#`` and ``baseline``, ``best``, the number of a trial, or the id of an optimization, an evaluation or a
              program behind it, that part;
            * ended spans, as an ``InMemorySpanExporter`` has them.
        b: likewise.
        metric: name of a metric, or several. None for all that both have.
        alpha: how often a difference may be shown where there is none, over all metrics.
        max_drop: drop of a score that is no :attr:`~Comparison.regression`.
        failed_score: score of examples that raised; None leaves them out.
        experiment: MLflow's experiment, name or id; default as for :class:`~dspy_otel.mlflow.MLflowSpanExporter`.
        tracking_uri: likewise.

    Returns:
        The comparison; ``print`` shows it, and so does a notebook.

    Raises:
        CannotCompareError: something is not there, or the two cannot be compared; its text says why.
    """
    place = None if experiment is None else str(experiment)
    with _needs("decide"):
        from dspy_otel.decide.comparison import compare_results, matching
    names = [metric] if isinstance(metric, str) else metric
    of_a = find_all(a, "A", experiment=place, tracking_uri=tracking_uri)
    of_b = find_all(b, "B", experiment=place, tracking_uri=tracking_uri)
    return compare_results(
        *matching(of_a, of_b, names),
        metrics=names,
        alpha=alpha,
        max_drop=max_drop,
        failed_score=failed_score,
    )


def find_results(
    reference: Reference, name: str = "spans", *, experiment: str | None = None, tracking_uri: str | None = None
) -> Results:
    """Find what :func:`compare` would compare first; the arguments are those of :func:`find_all`."""
    return find_all(reference, name, experiment=experiment, tracking_uri=tracking_uri)[0]


def find_all(
    reference: Reference, name: str = "spans", *, experiment: str | None = None, tracking_uri: str | None = None
) -> list[Results]:
    """Find all that :func:`compare` could compare: of a program, answers in production, and evaluations.

    Args:
        reference: as for :func:`compare`.
        name: of the results, where the reference is no text.
        experiment: as for :func:`compare`.
        tracking_uri: likewise.

    Raises:
        CannotCompareError: it is not there.
    """
    with _needs("decide"):
        from dspy_otel.decide.results import find, read_file, read_spans
    if not isinstance(reference, (str, os.PathLike)):
        return find(read_spans(reference), name)
    text = os.fspath(reference)
    if Path(text).is_file():
        return find(read_file(Path(text)), text)
    place, _, part = text.rpartition(_PART)
    if place and Path(place).is_file():
        return find(read_file(Path(place)), text, part)
    if Path(text).suffix in (".json", ".jsonl", ".pb") or os.sep in text:
        raise CannotCompareError(f"There is no file {place or text}.")
    with _needs("mlflow"):
        from dspy_otel.decide.stored import find_stored
    return find_stored(text, place or text, part if place else None, experiment, tracking_uri)


def list_runs(
    file: str | os.PathLike[str] | None = None,
    *,
    examples: bool = False,
    experiment: str | None = None,
    tracking_uri: str | None = None,
) -> list[Group]:
    """What was optimized and evaluated, by dataset and metric.

    Args:
        file: of OTLP; None for MLflow.
        examples: also read which examples fail in every run, or in some.
        experiment: as for :func:`compare`.
        tracking_uri: likewise.

    Raises:
        CannotCompareError: it cannot be read, or has nothing.
    """
    with _needs("decide"):
        from dspy_otel.decide.overview import grouped, summaries, with_examples
        from dspy_otel.decide.results import find, read_file
    if file is not None:
        recorded = read_file(Path(file))
        found = summaries(recorded)
    else:
        with _needs("mlflow"):
            from dspy_otel.decide.stored import stored_summaries
        found = stored_summaries(experiment, tracking_uri)
    if not found:
        nothing = "has no finished optimization and no evaluation"
        if file is not None:
            raise CannotCompareError(f"{file} {nothing}.")
        named = experiment or os.environ.get("MLFLOW_EXPERIMENT_ID") or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        raise CannotCompareError(f"The experiment {named or 'Default'} {nothing}: is it another one (--experiment)?")

    def results_of(run: Summary) -> Results:
        if file is not None:
            return find(recorded, str(file), run.id)[0]
        return find_results(run.id, experiment=experiment, tracking_uri=tracking_uri)

    groups = grouped(found)
    return [with_examples(group, results_of) for group in groups] if examples else groups


def find_run(reference: str, *, experiment: str | None = None, tracking_uri: str | None = None) -> tuple[Summary, str]:
    """One optimization or evaluation, and the beginning of the names of its parts, for :func:`compare`.

    Args:
        reference: MLflow's run, of a trial too; or a file of OTLP, with ``#`` and an id or without, for the
            newest in it.
        experiment: as for :func:`compare`.
        tracking_uri: likewise.

    Raises:
        CannotCompareError: it is not there.
    """
    with _needs("decide"):
        from dspy_otel.decide.overview import summaries
        from dspy_otel.decide.results import read_file
    place, _, part = reference.rpartition(_PART)
    file = reference if Path(reference).is_file() else place
    if file and Path(file).is_file():
        found = sorted(summaries(read_file(Path(file))), key=lambda one: one.started)
        chosen = [one for one in found if file == reference or one.id == part]
        if not chosen:
            raise CannotCompareError(f"{reference}: there is no such part; there are {_listed(found)}.")
        return chosen[-1], f"{file}{_PART}{chosen[-1].id}/"
    with _needs("mlflow"):
        from dspy_otel.decide.stored import stored_summaries
    (run,) = stored_summaries(experiment, tracking_uri, reference)
    return run, f"{run.id}{_PART}"


def why(run: Reference | Origin, *, experiment: str | int | None = None, tracking_uri: str | None = None) -> Why:
    """Why the winner of an optimization is better: which step brought each sentence and demo, and what it gained.

    Args:
        run: one of

            * the id of an MLflow run, of an optimization or of one of its trials;
            * what :func:`dspy_otel.optimization` gives, of an optimization that is in MLflow;
            * the path of a file of OTLP: the newest optimization in it, or with ``#`` and an id behind it, that;
            * ended spans, as an ``InMemorySpanExporter`` has them.
        experiment: MLflow's experiment, name or id; default as for :class:`~dspy_otel.mlflow.MLflowSpanExporter`.
        tracking_uri: likewise.

    Returns:
        The explanation; ``print`` shows it, and so does a notebook.

    Raises:
        CannotCompareError: there is no such optimization; its text says why.
    """
    with _needs("mlflow"):
        from dspy_otel.decide.explanation import find_optimization, why_of

        place = None if experiment is None else str(experiment)
        return why_of(find_optimization(run, place, tracking_uri))


def _listed(found: Sequence[Summary]) -> str:
    return ", ".join(one.id for one in found[-8:]) or "none"


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Imports that need an extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CannotCompareError(f"Comparing needs {error.name}: pip install 'dspy-otel[{extra}]'.") from error
