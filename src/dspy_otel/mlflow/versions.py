"""A program's versions: the model, the prompts and the dataset that an optimization's result is in MLflow. Pure.

* The returned program is a LoggedModel, with the program's state as its artifact.
* The instructions of its predictors, and those of the initial program, are versions of prompts. One text is one
  version: its digest is a tag, by which a second optimization, or a replay, finds it.
* The rows of the validation set are a GenAI dataset, whose name has the digest of the rows.

:func:`version_of` says what there should be. :mod:`.run_writer` writes it, once the optimization has ended.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dspy_otel import semconv
from dspy_otel.mlflow.source import OFF
from dspy_otel.record.model import Candidate, Optimization

MODELS, PROMPTS, DATASETS = "models", "prompts", "datasets"
PARTS: Final = frozenset({MODELS, PROMPTS, DATASETS})
ENV_PARTS: Final = {
    MODELS: "OTEL_DSPY_MLFLOW_MODELS",
    PROMPTS: "OTEL_DSPY_MLFLOW_PROMPTS",
    DATASETS: "OTEL_DSPY_MLFLOW_DATASETS",
}

MODEL_TYPE: Final = "dspy-program"
TAG_OPTIMIZATION: Final = "dspy.run.key"
"""The key of the run that made a model. It finds a model again whose creation got no answer."""
TAG_INSTRUCTIONS: Final = "dspy.instructions.id"
"""The digest of a prompt version's text."""
TAG_MODEL: Final = "dspy.model.id"
"""The LoggedModel of a run, and of a registered version: not every store gives back its own column for that."""
TAG_DATASET: Final = "dspy.dataset.digest"
TAG_ROWS: Final = "dspy.dataset.rows"
LINKED_PROMPTS: Final = "mlflow.linkedPrompts"
"""MLflow's tag of runs and models that names prompt versions."""
TRACE_MODEL: Final = "mlflow.modelId"
"""MLflow's metadata of a trace that names its model."""
MAX_PROMPT: Final = 100_000
"""Longest text of a prompt, in characters, that MLflow takes; a cut text would be another prompt."""
_DIGITS: Final = 16


@dataclass(frozen=True, slots=True)
class Prompt:
    """The instructions of one predictor.

    Attributes:
        name: of the prompt, in MLflow's registry.
        text: the instructions.
        program: id of the program that they are of.
    """

    name: str
    text: str
    program: str

    @property
    def id(self) -> str:
        """A digest of the text."""
        return _digest(self.text)


@dataclass(frozen=True, slots=True)
class PromptVersion:
    """A version of a prompt that MLflow has."""

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class Model:
    """A LoggedModel.

    Attributes:
        name: of it.
        program_name: of the program, under which it is registered when it gets an alias.
        tags: of it.
        artifacts: texts by path.
        trial: key of the run whose traces are its own.
    """

    name: str
    program_name: str
    tags: Mapping[str, str]
    artifacts: Mapping[str, str] = field(default_factory=dict)
    trial: str | None = None


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """A GenAI dataset.

    Attributes:
        name: of it.
        tags: of it.
        rows: what goes in and what is expected, by field.
    """

    name: str
    tags: Mapping[str, str]
    rows: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...]


@dataclass(frozen=True, slots=True)
class Version:
    """What MLflow should have because of an optimization's result.

    Attributes:
        model: the returned program.
        before: instructions of the initial program, which come first in a prompt's history.
        prompts: instructions of the returned program.
        dataset: the validation set.
    """

    model: Model | None = None
    before: tuple[Prompt, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    dataset: EvaluationSet | None = None

    def __bool__(self) -> bool:
        return bool(self.model or self.prompts or self.dataset)


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A LoggedModel as MLflow has it."""

    model_id: str
    artifact_uri: str
    name: str
    tags: Mapping[str, str]


def version_of(record: Optimization, artifacts: Mapping[str, str], parts: Collection[str]) -> Version | None:
    """What there should be because of the result of an optimization.

    Args:
        record: an optimization that is over.
        artifacts: the returned program's state by path, when it is known.
        parts: those of ``PARTS`` that are switched on.

    Returns:
        None when there is nothing: it is a step of another optimization, or it returned no program.
    """
    returned = record.returned
    if record.parent is not None or returned is None:
        return None
    name = record.program_name or "Program"
    best = returned if returned.state is not None else record.candidates.get(returned.id, returned)
    winner = record.winning
    tags = {
        TAG_OPTIMIZATION: record.id,
        semconv.PROGRAM_NAME: record.program_name,
        semconv.PROGRAM_ID: returned.id,
        semconv.OPTIMIZER_NAME: record.optimizer,
        semconv.OPTIMIZER_RUN_ID: record.id,
        semconv.TRIAL_NUMBER: record.winner,
        "dspy.best_score": None if record.best is None else round(record.best, 4),
        "dspy.baseline_score": None if record.baseline is None else round(record.baseline, 4),
    }
    model = Model(
        model_name(name, returned.id),
        name,
        {key: str(value) for key, value in tags.items() if value is not None},
        dict(artifacts),
        None if winner is None else f"{record.id}/{winner.number}",
    )
    initial = record.candidates.get(record.initial_id or "")
    found = Version(
        model if MODELS in parts else None,
        _prompts(name, initial) if PROMPTS in parts and initial is not None else (),
        _prompts(name, best) if PROMPTS in parts else (),
        _dataset(name, record) if DATASETS in parts else None,
    )
    return found or None


def model_name(program: str, program_id: str) -> str:
    """The name of a LoggedModel."""
    return "".join(c if c.isalnum() or c in "_- " else "_" for c in f"{program}-{program_id}")


def registered_name(program: str) -> str:
    """The name of a program in MLflow's registry of models."""
    return "".join("_" if c in "/:" else c for c in program).strip() or "Program"


def prompt_name(program: str, predictor: str) -> str:
    """The name of a predictor's instructions in MLflow's registry of prompts: ASCII letters, digits and ``_.-``."""
    text = f"{program}.{predictor}"
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "_" for c in text)


def linked_prompts(versions: Collection[PromptVersion]) -> str:
    """The value of ``LINKED_PROMPTS``."""
    return json.dumps([{"name": one.name, "version": str(one.version)} for one in versions])


def read_linked_prompts(tags: Mapping[str, str]) -> list[PromptVersion]:
    """The prompt versions that the tags of a run or model name."""
    try:
        found = json.loads(tags.get(LINKED_PROMPTS, "[]"))
        return [PromptVersion(str(one["name"]), int(one["version"])) for one in found]
    except (ValueError, TypeError, KeyError):
        return []


def enabled() -> frozenset[str]:
    """Those of ``PARTS`` that no variable switches off."""
    return frozenset(part for part in PARTS if os.environ.get(ENV_PARTS[part], "").strip().lower() not in OFF)


def saved_parts(saved: Any) -> frozenset[str]:
    """The parts that were switched on in another process, from the list of :func:`enabled`; all when it is none."""
    return PARTS & set(map(str, saved)) if isinstance(saved, list) else PARTS


def _prompts(name: str, program: Candidate) -> tuple[Prompt, ...]:
    """Of a program that is known in full: a masked or cut text is none of its instructions."""
    if not program.complete:
        return ()
    return tuple(
        Prompt(prompt_name(name, predictor), known.instructions, program.id)
        for predictor, known in program.predictors.items()
        if known.instructions is not None and known.instructions.strip() and len(known.instructions) <= MAX_PROMPT
    )


def _dataset(name: str, record: Optimization) -> EvaluationSet | None:
    """The validation set; which of its fields go in is known from the examples that were evaluated."""
    val = record.val
    rows = None if val is None else val.rows
    inputs = next(
        (
            frozenset(example.inputs)
            for examples in record.examples.values()
            for example in examples
            if isinstance(example.inputs, dict)
        ),
        None,
    )
    if val is None or not rows or not inputs:
        return None
    digest = val.digest or _digest(json.dumps(rows, sort_keys=True))
    split = (
        (
            {key: value for key, value in row.items() if key in inputs},
            {key: value for key, value in row.items() if key not in inputs and value is not None},
        )
        for row in rows
    )
    tags = {
        TAG_DATASET: digest,
        semconv.PROGRAM_NAME: name,
        TAG_ROWS: str(val.size) if len(rows) >= val.size else f"{len(rows)} of {val.size} (content limit)",
    }
    return EvaluationSet(f"{name} val {digest}", tags, tuple((given, expected) for given, expected in split if given))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:_DIGITS]
