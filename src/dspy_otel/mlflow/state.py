"""What MLflow lacks of runs, links and scores, as JSON: for the spool, when a program ends before MLflow has it all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple
from typing import Any, Final, NamedTuple

from dspy_otel.mlflow.pending import Pending, PendingRuns
from dspy_otel.mlflow.runs import Dataset, Metric, Score

VERSION: Final = 1
_PLAIN: Final = ("key", "kind", "name", "started", "tags", "params", "artifacts", "ended", "run_id", "artifact_uri")
_LATER: Final = ("references", "candidates")


class Left(NamedTuple):
    """What has to be written yet, beside the runs of a tree.

    Attributes:
        links: ids of traces, by key of their run.
        scores: of traces.
        ids: of runs that exist, by key.
    """

    links: dict[str, list[str]]
    scores: list[Score]
    ids: dict[str, str]


def dump(tree: PendingRuns, left: Left) -> dict[str, Any]:
    """All of it, for :func:`load`."""
    return {
        "version": VERSION,
        "runs": [_dump_run(run) for run in tree.runs.values() if run.dirty],
        "links": left.links,
        "scores": [list(astuple(score)) for score in left.scores],
        "ids": left.ids,
        "metrics": tree.history.metrics,
        "evaluations": sorted(tree.history.own),
    }


def load(state: Mapping[str, Any], tree: PendingRuns) -> Left:
    """Put runs back into a tree that has none, and give the rest.

    Raises:
        ValueError: the state is of a newer release, or broken.
    """
    if state.get("version") != VERSION:
        raise ValueError(f"runs.json is of another version ({state.get('version')}) than this release reads")
    try:
        _load_runs(state["runs"], tree)
        tree.history.metrics.update(state["metrics"])
        tree.history.own.update(dict.fromkeys(state["evaluations"]))
        scores = [Score(*score) for score in state["scores"]]
        return Left({key: list(ids) for key, ids in state["links"].items()}, scores, dict(state["ids"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"runs.json is broken ({type(error).__name__}: {error})") from error


def _dump_run(run: Pending) -> dict[str, Any]:
    parent = run.parent
    return {
        **{name: getattr(run, name) for name in (*_PLAIN, *_LATER)},
        "metrics": [list(astuple(metric)) for metric in run.metrics],
        "datasets": [list(astuple(dataset)) for dataset in run.datasets],
        # A parent that is written may be forgotten: then its id is known, and is enough.
        "outside": run.outside if parent is None else parent.run_id,
        "parent": parent.key if parent is not None and parent.run_id is None else None,
    }


def _load_runs(dumped: Iterable[Mapping[str, Any]], tree: PendingRuns) -> None:
    dumped = list(dumped)
    for one in dumped:
        run = Pending(one["key"], one["kind"], one["name"], None, one["outside"], one["started"])
        for name in (*_PLAIN[4:], *_LATER):
            setattr(run, name, one[name])
        run.ended = None if run.ended is None else (run.ended[0], run.ended[1])
        run.metrics = [Metric(*metric) for metric in one["metrics"]]
        run.datasets = [
            Dataset(name, digest, context, size, tuple((column, kind) for column, kind in columns))
            for name, digest, context, size, columns in one["datasets"]
        ]
        run.tried = run.over = True  # the last attempt to create it may have succeeded
        tree.runs[run.key] = run
    for one in dumped:
        tree.runs[one["key"]].parent = tree.runs.get(one["parent"])
