"""Optimizers of weights and of decision parameters, with a provider that only pretends to train."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from dspy.clients.provider import Provider, TrainingJob

from tests.optimizers.common import (
    ColourFamily,
    ScriptedLM,
    compile_span,
    lm_calls,
    load_examples,
    quietly,
    same_family,
    scripted_lm,
    trials,
)


class Job:
    """GRPO's training job: asks for one batch a step."""

    def __init__(self, lm: Any, train_kwargs: Any) -> None:
        self.steps = 0

    def initialize(self) -> None: ...

    def get_status(self) -> dict[str, Any]:
        return {"pending_batch_ids": list(range(self.steps + 1))}

    def step(self, train_data: Any, train_data_format: Any) -> None:
        self.steps += 1

    def terminate(self) -> None: ...


class Trainer(Provider):
    """Gives the model another name."""

    def __init__(self) -> None:
        super().__init__()
        self.finetunable = True
        self.reinforceable = True
        self.TrainingJob = TrainingJob
        self.ReinforceJob = Job

    @staticmethod
    def finetune(job: Any, model: str, train_data: Any, train_data_format: Any, train_kwargs: Any = None) -> str:
        assert train_data
        return f"{model}-tuned"

    @staticmethod
    def launch(lm: Any, launch_kwargs: Any = None) -> None: ...

    @staticmethod
    def kill(lm: Any, launch_kwargs: Any = None) -> None: ...


def trainable() -> tuple[Any, Any]:
    scripted_lm()
    lm = ScriptedLM("embedded/scripted", cache=False, provider=Trainer())
    program = ColourFamily()
    program.set_lm(lm)
    return program, lm


def test_bootstrap_finetune(telemetry: Any) -> None:
    program, _ = trainable()
    telemetry.instrument()
    optimizer = dspy.BootstrapFinetune(metric=same_family, num_threads=2)
    compiled = quietly(optimizer.compile, program, trainset=load_examples("train", 6))
    assert compiled.describe.lm.model == "embedded/scripted-tuned"
    span = compile_span(telemetry, "BootstrapFinetune")
    assert [child.name for child in telemetry.children(span)] == ["bootstrap", "finetune"]
    assert span.attributes["dspy.dataset.train.size"] == 6
    phase = telemetry.only("finetune")
    assert phase.attributes["dspy.finetune.jobs"] == 1
    assert phase.attributes["dspy.finetune.models"] == ("embedded/scripted",)
    assert not telemetry.named("trial")
    assert {call.attributes["dspy.lm.role"] for call in lm_calls(telemetry)} == {"teacher"}
    assert {call.attributes["dspy.optimizer.phase"] for call in lm_calls(telemetry)} == {"bootstrap"}
    assert len(lm_calls(telemetry)) == span.attributes["dspy.usage.teacher.lm_calls"] == 12


def test_grpo(telemetry: Any) -> None:
    from dspy.teleprompt.grpo import GRPO

    program, _ = trainable()
    telemetry.instrument()
    optimizer = GRPO(
        metric=same_family,
        num_train_steps=2,
        num_steps_for_val=1,
        num_dspy_examples_per_grpo_step=2,
        num_rollouts_per_grpo_step=2,
        exclude_demos=True,
        num_threads=2,
    )
    quietly(optimizer.compile, program, trainset=load_examples("train", 4), valset=load_examples("val", 3))
    found = trials(telemetry, "GRPO")
    assert [(trial["trial.kind"], trial["trial.params.step"], trial["trial.size"]) for trial in found] == [
        ("baseline", -1, 3),
        ("validation", 0, 3),
        ("validation", 1, 3),
    ]
    span = compile_span(telemetry, "GRPO")
    names = [child.name for child in telemetry.children(span)]
    assert names == ["trial", "sample", "trial", "sample", "trial"]
    assert span.attributes["dspy.optimizer.baseline_score"] == found[0]["trial.score"]
    assert {call.attributes["dspy.lm.role"] for call in lm_calls(telemetry)} == {"task"}


def test_reanchor(telemetry: Any) -> None:
    pytest.importorskip("dspy.teleprompt.reanchor", reason="DSPy 3.3 has no ReAnchor")
    calibrate = pytest.importorskip("dspy.teleprompt.reanchor.calibrate")
    scripted_lm()
    telemetry.instrument()
    rows = load_examples("train", 4)

    class Calibrates(dspy.ReAnchor if hasattr(dspy, "ReAnchor") else dspy.teleprompt.reanchor.ReAnchor):  # type: ignore[misc]
        """ReAnchor's scoring, without the decisions that only some backends give probabilities for."""

        def compile(self, student: Any, *, trainset: Any, valset: Any = None) -> Any:
            program = student.deepcopy()
            self.scores = [
                calibrate.run(program, trainset, self.metric, 2),
                calibrate.run(program, valset, self.metric, 2),
            ]
            program.describe.signature = program.describe.signature.with_instructions("Another setting.")
            self.scores.append(calibrate.run(program, trainset, self.metric, 2))
            return program

    optimizer = Calibrates(same_family)
    quietly(optimizer.compile, ColourFamily(), trainset=rows, valset=load_examples("val", 3))
    found = trials(telemetry, "Calibrates")
    assert [trial["trial.kind"] for trial in found] == ["baseline", "validation", "full"]
    assert [trial["trial.score"] for trial in found] == optimizer.scores
    assert compile_span(telemetry, "Calibrates").attributes["dspy.optimizer.score.scale"] == "mean"
    examples = telemetry.named("example ")
    assert len(examples) == 11
    assert all("dspy.example.score" in example.attributes for example in examples)
    assert not telemetry.named("parallel")
