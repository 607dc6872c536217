"""Writes to MLflow what :class:`~dspy_otel.mlflow.pending.PendingRuns` has."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, Final

from dspy_otel.mlflow.account import ARTIFACTS, RUNS, Account
from dspy_otel.mlflow.backends import Backend
from dspy_otel.mlflow.backends.base import CreatedRun, unexpected
from dspy_otel.mlflow.backends.registry import Registry
from dspy_otel.mlflow.items import ATTEMPTS_BEFORE_SPLIT, Items
from dspy_otel.mlflow.pending import Pending, PendingRuns
from dspy_otel.mlflow.retry import ExportError, Verdict
from dspy_otel.mlflow.runs import COMPILE, TAG_NAME, TAG_PARENT
from dspy_otel.mlflow.target import ui_command
from dspy_otel.mlflow.threads import announce, log_safely
from dspy_otel.mlflow.versions import (
    DATASETS,
    LINKED_PROMPTS,
    MODELS,
    PROMPTS,
    TAG_MODEL,
    Model,
    Prompt,
    PromptVersion,
    linked_prompts,
)
from dspy_otel.record.addresses import Address, add_address, is_shown

_logger = logging.getLogger(__name__)

_MAX_ITEMS: Final = 100
VALUES: Final = "values of runs"
"""Metrics, parameters and tags."""
VERSIONS: Final = "versions"
"""Models, prompts and datasets of one run."""
_MAX_METRICS: Final = 800  # with parameters and tags at most 1,000 items in one call


class RunWriter:
    """Creates runs, and writes their values, datasets, artifacts and ends.

    Args:
        pending: the runs.
        ids: runs that are in MLflow, by key; created ones are added.
        items: writes single items.
        account: where runs are counted.
        report: called with a cause and a message when a run fails.
        count_runs: called when runs got artifacts.
        lost: called with the groups of a run that MLflow had and has no more.
    """

    def __init__(
        self,
        pending: PendingRuns,
        ids: dict[str, CreatedRun],
        items: Items,
        account: Account,
        report: Callable[[str, str], object],
        count_runs: Callable[[], object],
        lost: Callable[[set[str]], object],
    ) -> None:
        self._pending = pending
        self._ids = ids
        self._items = items
        self._account = account
        self._report = report
        self._count_runs = count_runs
        self._lost = lost

    def write(self, backend: Backend) -> None:
        """Write what MLflow lacks of all runs.

        Raises:
            ExportError: MLflow as a whole fails.
        """
        runs = [run for run in self._pending.lacking if self._items.is_due(RUNS, run.key)]
        for run in runs:
            self._each(run, lambda run=run: self._create(backend, run))  # type: ignore[misc]
        there = [run for run in runs if run.run_id is not None]
        for run in there:  # one after the other: two calls at once with the same new dataset fail
            if run.datasets:
                self._each(run, lambda run=run: self._add_datasets(backend, run))  # type: ignore[misc]
        # A compile that has ended comes last: its tables refer to the runs of its trials.
        last = [run for run in there if run.kind == COMPILE and run.over]
        # One after the other: a server has 15 connections to its database, and a call that logs values takes a second
        # one while it has one. With three calls at once of each, five programs held each other up until they failed,
        # 30 s later, again and again. One program takes the same time (measured with MLflow 3.17.2 on two cores).
        for run in there:
            if run not in last:
                self._each(run, lambda run=run: self._write(backend, run))  # type: ignore[misc]
        for run in last:
            if not any(key in self._pending.runs and key not in self._ids for key in run.referenced):
                self._each(run, lambda run=run: self._write(backend, run))  # type: ignore[misc]

    def _each(self, run: Pending, call: Callable[[], object]) -> None:
        """Call a function for one run. Its failure stops the others only if MLflow as a whole fails."""
        try:
            call()
        except ExportError as error:
            if error.unavailable:
                raise
            self._items.failed(RUNS, run.key, error)
            if error.verdict is Verdict.LOST:
                self._lost({run.group})
            again = "" if error.verdict is Verdict.LOST else " It is tried again."
            self._report(error.cause, f"{run.name}: {error}{again}")
        else:
            self._items.succeeded(RUNS, run.key)

    def _create(self, backend: Backend, run: Pending) -> None:
        if run.run_id is not None:
            return
        if run.parent is not None and run.parent.run_id is None:
            self._create(backend, run.parent)
        parent = run.user_run if run.parent is None else run.parent.run_id
        if parent is None and run.parent_key is not None:
            above = self._ids.get(run.parent_key)
            parent = None if above is None else above.run_id
        tags = dict(run.tags)
        if parent is not None:
            tags[TAG_PARENT] = parent
        tags.setdefault(TAG_NAME, run.name)
        some = _some(tags, _MAX_ITEMS)
        known, run.tried = run.tried, True
        try:
            created = backend.create_run(run.key, some, run.started, run.experiment, known=known)
        except ExportError as error:
            if error.unavailable or error.verdict is Verdict.LATER or run.experiment is None:
                raise
            run.experiment = None  # that of the user's run does not exist any more
            created = backend.create_run(run.key, some, run.started, None, known=known)
        run.run_id, run.artifact_uri = created
        self._ids[run.key] = created
        for name in some:
            if run.tags.get(name) == some[name]:
                del run.tags[name]
        self._account.written[RUNS] += 1
        if run.kind == COMPILE:
            url = backend.url(run.run_id, run.experiment)
            command = None if url else ui_command(backend.name)
            add_address(run.key, Address(run.run_id, url, command))
            if run.parent_key is None:
                _say(run, url or _how_to_open(backend, run.run_id))
        if known:  # it may have been created with other values
            run.tags.update(some)

    def _add_datasets(self, backend: Backend, run: Pending) -> None:
        assert run.run_id is not None
        run_id, datasets = run.run_id, list(run.datasets)
        with contextlib.suppress(ExportError):  # another program may have added the same one at the same time
            backend.add_datasets(run_id, datasets)
            del run.datasets[: len(datasets)]
            return
        self._items.write("datasets", run.key, lambda: backend.add_datasets(run_id, datasets))
        del run.datasets[: len(datasets)]

    def _write(self, backend: Backend, run: Pending) -> None:
        assert run.run_id is not None
        run_id, created = run.run_id, CreatedRun(run.run_id, run.artifact_uri)
        if run.over:
            run.resolve_references({key: one.run_id for key, one in self._ids.items()})
            self._count_runs()
        run.metrics.sort(
            key=lambda metric: "score" not in metric.key
        )  # MLflow's table shows columns in order of arrival
        while run.tags or run.params or run.metrics:
            metrics = run.metrics[:_MAX_METRICS]
            params, tags = _some(run.params, _MAX_ITEMS), _some(run.tags, _MAX_ITEMS)
            self._log(backend, run, metrics, params, tags)
            del run.metrics[: len(metrics)]
            for name in params:
                del run.params[name]
            for name, value in tags.items():
                if run.tags.get(name) == value:
                    del run.tags[name]
        failure = None
        for path, text in list(run.artifacts.items()):
            try:
                put = self._items.write(
                    ARTIFACTS,
                    f"{run.key}/{path}",
                    lambda p=path, t=text: backend.put_artifact(created, p, t),  # type: ignore[misc]
                )
            except ExportError as error:
                if error.unavailable:
                    raise
                failure = error
                continue
            if put or path in run.artifacts:
                del run.artifacts[path]
        if failure is not None:
            raise failure
        if run.ended is not None:
            status, when = run.ended
            self._items.write("ends of runs", run.key, lambda: backend.end_run(run_id, status, when))
            run.ended = None
            if run.kind == COMPILE and run.parent_key is None:
                where = backend.url(run_id, run.experiment) or _how_to_open(backend, run_id)
                _say(run, f"{status.lower()}: {where}")

    # --- versions ---------------------------------------------------------------------------------------------------
    def write_versions(self, backend: Backend) -> None:
        """Write models, prompts and datasets. A registry that fails holds nothing else up, and is tried again.

        Call it when the traces of ended optimizations are in MLflow and on their runs.
        """
        for run in [run for run in self._pending.lacking if run.version is not None and run.run_id is not None]:
            if run.ended is None and self._items.is_due(VERSIONS, run.key):
                try:
                    self._write_version(backend, run)
                except Exception as error:
                    failure = error if isinstance(error, ExportError) else unexpected(error)
                    self._items.failed(VERSIONS, run.key, failure)
                    self._report(failure.cause, f"{run.name}, its versions: {failure} They are tried again.")
                else:
                    self._items.succeeded(VERSIONS, run.key)

    def _write_version(self, backend: Backend, run: Pending) -> None:
        """Write one optimization's. A part that MLflow refuses is left out."""
        version, registry = run.version, backend.registry
        assert version is not None
        for prompt in (*version.before, *version.prompts):
            if prompt not in run.prompts:
                self._write_prompt(registry, run, prompt)
        prompts = [PromptVersion(one.name, run.prompts[one]) for one in version.prompts if one in run.prompts]
        if prompts:
            self._log(backend, run, [], {}, {LINKED_PROMPTS: linked_prompts(prompts)})
        dataset, model = version.dataset, version.model
        if dataset is not None:
            self._items.write(DATASETS, run.key, lambda: registry.put_dataset(dataset, run.experiment))
            run.version = version = dataclasses.replace(version, dataset=None)
        if model is not None:
            self._items.write(MODELS, run.key, lambda: self._put_model(backend, run, model, prompts))
        run.version, run.prompts = None, {}

    def _write_prompt(self, registry: Registry, run: Pending, prompt: Prompt) -> None:
        def put() -> None:
            run.prompts[prompt] = registry.put_prompt(prompt, run.experiment).version

        self._items.write(PROMPTS, f"{run.key}/{prompt.name}/{prompt.id}", put)

    def _put_model(self, backend: Backend, run: Pending, model: Model, prompts: list[PromptVersion]) -> None:
        registry = backend.registry
        made = registry.put_model(model, run.key, str(run.run_id), prompts, run.experiment)
        for path, text in model.artifacts.items():
            registry.put_model_artifact(made, path, text)
        registry.finish_model(made.model_id)
        self._log(backend, run, [], {}, {TAG_MODEL: made.model_id})
        trial = None if model.trial is None else self._ids.get(model.trial)
        if trial is not None:
            registry.link_traces(trial.run_id, made.model_id)

    def _log(self, backend: Backend, run: Pending, metrics: Any, params: Any, tags: Any) -> None:
        """Write values; when some of them are refused, they are written one by one."""
        run_id = str(run.run_id)
        try:
            backend.log(run_id, metrics, params, tags)
        except ExportError as error:
            if error.unavailable:
                raise
            backoff = self._items.failed(VALUES, run.key, error)
            if error.verdict is Verdict.LOST or (
                error.verdict is Verdict.LATER and backoff.failures < ATTEMPTS_BEFORE_SPLIT
            ):
                raise
        else:
            self._items.succeeded(VALUES, run.key)
            self._items.successes[VALUES] += 1
            return
        for metric in metrics:
            self._log_one(run, metric.key, lambda m=metric: backend.log(run_id, [m], {}, {}))  # type: ignore[misc]
        for name, value in params.items():
            self._log_one(run, name, lambda n=name, v=value: backend.log(run_id, [], {n: v}, {}))  # type: ignore[misc]
        for name, value in tags.items():
            self._log_one(run, name, lambda n=name, v=value: backend.log(run_id, [], {}, {n: v}))  # type: ignore[misc]
        self._items.succeeded(VALUES, run.key)

    def _log_one(self, run: Pending, name: str, call: Callable[[], object]) -> None:
        self._items.write(VALUES, f"{run.key}/{name}", call)


def _say(run: Pending, what: str) -> None:
    """Log something of a run; a terminal gets it too, unless a display there has the link."""
    if is_shown(run.key):
        log_safely(_logger.info, "%s: %s", run.name, what)
    else:
        announce(_logger, "%s: %s", run.name, what)


def _how_to_open(backend: Backend, run_id: str) -> str:
    """What to do to see a run of a store without a server."""
    return f"run {run_id}; to look at it: {ui_command(backend.name)}"


def _some(values: Mapping[str, str], most: int) -> dict[str, str]:
    return dict(islice(values.items(), most))
