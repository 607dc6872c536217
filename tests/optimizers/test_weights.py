"""Optimizers of weights and of decision parameters, with a provider that only pretends to train."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
from dspy.clients.provider import Provider, TrainingJob

import dspy_otel
from dspy_otel import program_id
from dspy_otel.cli.demo.prompt import Message, read_prompt, write_answer
from tests.optimizers import common
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


@pytest.mark.parametrize(("optimizer", "limit", "trial"), [("BootstrapFinetune", 5, None), ("GRPO", 8, 1)])
def test_a_budget_stops_before_anything_more_is_trained(
    telemetry: Any, monkeypatch: pytest.MonkeyPatch, optimizer: str, limit: int, trial: int | None
) -> None:
    trained: list[Any] = []
    monkeypatch.setattr(Trainer, "finetune", staticmethod(lambda **given: trained.append(given)))
    program, _ = trainable()
    telemetry.instrument()
    rows = load_examples("train", 6)
    with dspy_otel.budget(lm_calls=limit) as spending, pytest.raises(dspy_otel.BudgetExceeded) as stopped:
        if optimizer == "GRPO":
            quietly(grpo().compile, program, trainset=rows[:4], valset=load_examples("val", 3))
        quietly(dspy.BootstrapFinetune(metric=same_family, num_threads=2).compile, program, trainset=rows)
    assert limit <= spending.spent.lm_calls <= limit + 1
    assert (stopped.value.trial, trained) == (trial, [])
    assert compile_span(telemetry, optimizer).attributes["dspy.optimizer.outcome"] == "interrupted"


def grpo() -> Any:
    from dspy.teleprompt.grpo import GRPO

    return GRPO(
        metric=same_family,
        num_train_steps=2,
        num_steps_for_val=1,
        num_dspy_examples_per_grpo_step=2,
        num_rollouts_per_grpo_step=2,
        exclude_demos=True,
        num_threads=2,
    )


def test_grpo(telemetry: Any) -> None:
    program, _ = trainable()
    telemetry.instrument()
    quietly(grpo().compile, program, trainset=load_examples("train", 4), valset=load_examples("val", 3))
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


class Spam(dspy.Signature):
    """Is this mail unwanted?"""

    text: str = dspy.InputField()
    spam: bool = dspy.OutputField(desc="unwanted mail")


class Filter(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.judge = dspy.Predict(Spam)

    def forward(self, text: str) -> Any:
        return self.judge(text=text)


def probability(text: str) -> float:
    return common.hash_of(text) % 100 / 100


class ProbableLM(dspy.LM):
    """Answers a decision, or its probability when it is asked for that."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        said = [Message(message["role"], common.text_of(message["content"])) for message in messages]
        read = read_prompt(said)
        likely = probability(read.inputs["text"])
        asked = any("noul" in message.text for message in said)
        text = write_answer(read.style, {"spam": json.dumps({"noul": likely}) if asked else str(likely > 0.5)})
        choice = SimpleNamespace(message=SimpleNamespace(content=text), finish_reason="stop")
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        return SimpleNamespace(id="probable", model=self.model, choices=[choice], usage=usage)


@pytest.mark.parametrize(("border", "kept"), [(0.5, False), (0.8, True)])
def test_reanchor(telemetry: Any, tmp_path: Any, border: float, kept: bool) -> None:
    reanchor = pytest.importorskip("dspy.teleprompt.reanchor", reason="DSPy 3.3 has no ReAnchor")
    lm = ProbableLM("embedded/probable", cache=False)
    dspy.configure(lm=lm)
    telemetry.instrument(capture_content="span_only")
    texts = [f"mail {number}" for number in range(12)]
    rows = [dspy.Example(text=text, spam=probability(text) > border).with_inputs("text") for text in texts]

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return float(example.spam == prediction.spam)

    optimizer = reanchor.ReAnchor(metric, num_threads=2, require_cache=False)
    program = quietly(optimizer.compile, Filter(), trainset=rows[:9], valset=rows[9:])
    report = optimizer.report
    found = trials(telemetry, "ReAnchor")
    (row,) = report["fitted"]
    assert ("skipped" in row) != kept
    assert found[0]["trial.kind"] == "baseline"
    validation = [trial for trial in found if trial["trial.kind"] == "validation"]
    assert [round(trial["trial.score"], 4) for trial in validation] == [report["val_score_before"], report["val_score"]]
    assert round(found[0]["trial.score"], 4) == report["train_score_before"]
    assert round(found[-2]["trial.score"], 4) == report["train_score"]
    # Before, to look at the probabilities, and from there; then one for each setting; then the one that was kept.
    assert len(found) == 5 + row["observed"]["candidates"] + 2
    fitted = f'"threshold":{program.judge.fields["spam"]["threshold"]}' if kept else None
    for trial in found:
        same = trial.get("trial.params.fields") == (f'{{"judge":{{"spam":{{{fitted}}}}}}}' if kept else None)
        assert (trial["candidate.id"] == program_id(program)) == same
        if "trial.params.fields" in trial:
            setting = json.loads(trial["trial.params.fields"])["judge"]
            assert json.loads(trial["candidate.diff"]) == {"judge": {"decisions": {"before": {}, "after": setting}}}
    attributes = compile_span(telemetry, "ReAnchor").attributes
    winner = next(trial for trial in found if trial["trial.number"] == attributes["dspy.optimizer.winner.trial"])
    assert round(winner["trial.score"], 4) == report["train_score"]
    assert attributes["dspy.optimizer.score.scale"] == "mean"
    assert len(telemetry.named("example ")) == sum(trial["trial.size"] for trial in found)
    assert not telemetry.named("parallel")
    program.save(tmp_path / "program.json")
    loaded = Filter()
    loaded.load(tmp_path / "program.json")
    assert program_id(loaded) == program_id(program)
