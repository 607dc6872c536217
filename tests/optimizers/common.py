"""Real optimizations on a small deterministic LM, and the trial table that telemetry gives of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import dspy

from dspy_otel.cli.demo.brain import BASIC_COLOURS, complete, count_tokens
from dspy_otel.cli.demo.prompt import Message, read_prompt, write_answer
from dspy_otel.cli.demo.task import ColourFamily, load_examples, same_family, same_family_with_feedback
from tests.support import dspy35

PRICE = 0.000_001
asked: list[int] = []
"""A hash of each prompt and its settings that the LMs here were asked, in order; once, however many answers."""


class ScriptedLM(dspy.LM):
    """The demo's embedded model, but with a price, and answers that differ between rollouts.

    A function of the prompt and the rollout id alone: the same whatever order threads call it in.
    """

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        given = messages or [{"role": "user", "content": prompt or ""}]
        said = [Message(message["role"], text_of(message["content"])) for message in given]
        read = read_prompt(said)
        settings = {**self.kwargs, **kwargs}
        salt = f"{settings.get('rollout_id')}|" + "|".join(message.text for message in said)
        text = complete(said).text
        if "family" in read.asked and hash_of(salt) % 3 == 0:  # each candidate is wrong somewhere else
            other = BASIC_COLOURS[hash_of(salt) % len(BASIC_COLOURS)]
            text = write_answer(read.style, {"reasoning": "A guess.", "family": other})
        if "natural_language_rules" in read.asked:
            rules = f"When nothing fits, answer {BASIC_COLOURS[hash_of(salt) % 11]}."
            text = write_answer(read.style, {"reasoning": "They look alike.", "natural_language_rules": rules})
        if "module_advice" in read.asked:
            advice = {"choose.predict": f"When nothing fits, answer {BASIC_COLOURS[hash_of(salt) % 11]}."}
            text = write_answer(read.style, {"discussion": "It guessed.", "module_advice": json.dumps(advice)})
        if not dspy35.is_further_answer():
            asked.append(hash_of(f"{salt}|{settings.get('temperature')}"))
        count = settings.get("n") or 1
        inputs, outputs = sum(count_tokens(message.text) for message in said), count_tokens(text) * count
        choices = [SimpleNamespace(message=SimpleNamespace(content=text), finish_reason="stop")] * count
        usage = {"prompt_tokens": inputs, "completion_tokens": outputs, "total_tokens": inputs + outputs}
        return SimpleNamespace(
            id=f"scripted-{hash_of(salt)}",
            model=self.model,
            choices=choices,
            usage=usage,
            _hidden_params={"response_cost": (inputs + outputs) * PRICE},
        )

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        return self.forward(prompt, messages, **kwargs)


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def scripted_lm() -> Any:
    """The LM, also as DSPy's default one. DSPy 3.4 says that `forward` is deprecated; that is not our concern."""
    for name in ("dspy", "optuna", "gepa"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    lm = ScriptedLM("embedded/scripted", cache=False)
    dspy.configure(lm=lm)
    return lm


def judged(example: Any, prediction: Any, trace: Any = None) -> Any:
    """A metric that asks an LM, too."""
    dspy.Predict("family -> verdict")(family=str(getattr(prediction, "family", "")))
    return same_family(example, prediction)


def run_mipro(lm: Any, seed: int = 9, minibatch: bool = True, metric: Any = same_family, threads: int = 2) -> Any:
    optimizer = dspy.MIPROv2(
        metric=metric,
        prompt_model=lm,
        task_model=lm,
        auto=None,
        num_candidates=4,
        max_bootstrapped_demos=2,
        max_labeled_demos=2,
        num_threads=threads,
        seed=seed,
    )
    given = {"minibatch_size": 4, "minibatch_full_eval_steps": 2} if minibatch else {}
    train, val = load_examples("train", 16), load_examples("val", 8)
    return optimizer.compile(
        ColourFamily(), trainset=train, valset=val, num_trials=5, minibatch=minibatch, **given
    ), optimizer


def run_random_search(lm: Any, seed: int = 0, **options: Any) -> Any:
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=same_family, max_bootstrapped_demos=2, max_labeled_demos=2, num_candidate_programs=2, num_threads=2
    )
    train, val = load_examples("train", 16)[seed % 3 :], load_examples("val", 8)
    return optimizer.compile(ColourFamily(), trainset=train, valset=val, **options), optimizer


def run_copro(lm: Any, seed: int = 0) -> Any:
    optimizer = dspy.COPRO(metric=same_family, breadth=3, depth=2, prompt_model=lm, track_stats=True)
    evaluation = {"num_threads": 2, "display_progress": False}
    return optimizer.compile(
        ColourFamily(), trainset=load_examples("train", 6 + seed % 3), eval_kwargs=evaluation
    ), optimizer


def run_simba(lm: Any, seed: int = 0, threads: int = 2) -> Any:
    optimizer = dspy.SIMBA(
        metric=same_family, bsize=5, num_candidates=3, max_steps=3, prompt_model=lm, num_threads=threads
    )
    return optimizer.compile(ColourFamily(), trainset=load_examples("train", 10), seed=seed), optimizer


def run_gepa(lm: Any, seed: int = 0, calls: int = 90, threads: int = 2, **options: Any) -> Any:
    optimizer = dspy.GEPA(
        metric=same_family_with_feedback,
        reflection_lm=lm,
        max_metric_calls=calls,
        track_stats=True,
        num_threads=threads,
        seed=seed,
        **options,
    )
    train, val = load_examples("train", 16), load_examples("val", 8)
    return optimizer.compile(ColourFamily(), trainset=train, valset=val), optimizer


def run_better_together(lm: Any, seed: int = 0) -> Any:
    search = dspy.BootstrapFewShotWithRandomSearch(
        metric=same_family, max_bootstrapped_demos=2, max_labeled_demos=2, num_candidate_programs=1, num_threads=2
    )
    optimizer = dspy.BetterTogether(metric=same_family, p=search, w=dspy.LabeledFewShot(k=2))
    program = ColourFamily()
    program.set_lm(lm)
    train, val = load_examples("train", 12), load_examples("val", 8)
    return optimizer.compile(program, trainset=train, valset=val, strategy="p -> w", seed=seed), optimizer


def run_infer_rules(lm: Any, seed: int = 0) -> Any:
    optimizer = dspy.InferRules(
        metric=same_family, num_candidates=2, max_bootstrapped_demos=2, max_labeled_demos=2, num_threads=2
    )
    return optimizer.compile(
        ColourFamily(), trainset=load_examples("train", 12), valset=load_examples("val", 8)
    ), optimizer


def run_optuna(lm: Any, seed: int = 0) -> Any:
    from dspy.teleprompt.teleprompt_optuna import BootstrapFewShotWithOptuna

    optimizer = BootstrapFewShotWithOptuna(
        metric=same_family, max_bootstrapped_demos=2, max_labeled_demos=2, num_candidate_programs=3, num_threads=2
    )
    train, val = load_examples("train", 12), load_examples("val", 8)
    return optimizer.compile(ColourFamily(), max_demos=2, trainset=train, valset=val), optimizer


@dataclass(frozen=True, slots=True)
class Scenario:
    """One optimizer, for the tests of all of them.

    Attributes:
        run: compiles the demo's program with it, and gives the result and the optimizer.
        roles: of its LM calls.
        columns: of its own in the trial table of its snapshot; without any, it has none: Optuna's choices are random.
    """

    run: Callable[..., Any]
    roles: set[str]
    columns: tuple[str, ...] = ()


_MIPRO = tuple(
    f"params.{name}.{part}_index" for name in ("describe", "choose.predict") for part in ("instruction", "demos")
)
_GEPA = (
    *("params.iteration", "params.components", "params.minibatch_ids"),
    *("score_before", "score_after", "accepted", "on_pareto_front"),
)
# The quick ones first: a fault of what they share is tested in the first one that meets it.
SCENARIOS = {
    "BootstrapFewShotWithRandomSearch": Scenario(
        run_random_search, {"task", "teacher"}, ("params.seed", "params.strategy")
    ),
    "COPRO": Scenario(run_copro, {"task", "proposer"}, ("params.depth", "params.predictor", "params.candidate")),
    "InferRules": Scenario(run_infer_rules, {"task", "teacher", "proposer"}, ("params.candidate",)),
    "MIPROv2": Scenario(run_mipro, {"task", "teacher", "proposer"}, _MIPRO),
    "SIMBA": Scenario(
        run_simba, {"task", "proposer"}, ("params.step", "params.strategy", "params.applied", "params.source")
    ),
    "GEPA": Scenario(run_gepa, {"task", "reflection"}, _GEPA),
    "BetterTogether": Scenario(run_better_together, {"task", "teacher"}, ("params.strategy", "params.optimizer")),
    "BootstrapFewShotWithOptuna": Scenario(run_optuna, {"task", "teacher"}),
}
RUNS = {name: scenario.run for name, scenario in SCENARIOS.items()}


def quietly(run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What `run` returns; what it prints is dropped."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run(*arguments, **options)


# --- telemetry ------------------------------------------------------------------------------------------------------


def trials(telemetry: Any, optimizer: str) -> list[dict[str, Any]]:
    """The attributes of an optimizer's trials, in their order, without the prefix `dspy.`."""
    found = [
        {key.removeprefix("dspy."): value for key, value in (span.attributes or {}).items()}
        for span in telemetry.named("trial")
        if span.attributes["dspy.optimizer.name"] == optimizer
    ]
    return sorted(found, key=lambda trial: trial["trial.number"])


def compile_span(telemetry: Any, optimizer: str) -> Any:
    """The compile span of an optimizer that was run once, at the top."""
    return telemetry.only(f"compile {optimizer}")


def lm_calls(telemetry: Any) -> list[Any]:
    return telemetry.named("chat ")


def table(telemetry: Any, optimizer: str, *columns: str) -> str:
    """The trial table as text; candidates are named by letters in the order in which they appear."""
    letters: dict[str, str] = {}

    def shown(key: str, value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return " ".join(shown(key, item) for item in value)
        if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16}", value):
            return letters.setdefault(value, chr(ord("A") + len(letters)))
        if isinstance(value, float):
            return f"{value:.4f}".rstrip("0").rstrip(".")
        return "" if value is None else str(value)

    rows = [list(columns)]
    rows += [[shown(column, trial.get(column)) for column in columns] for trial in trials(telemetry, optimizer)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


# --- a task in which every instruction is good at something: GEPA keeps many candidates, and merges them ------------


class HashLM(dspy.LM):
    """Answers a digit that hangs on the instruction and the question, and proposes an instruction for each prompt."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        given = messages or [{"role": "user", "content": prompt or ""}]
        said = [Message(message["role"], text_of(message["content"])) for message in given]
        read = read_prompt(said)
        everything = "|".join(message.text for message in said)
        if read.style == "plain":
            text = f"```\nVersion {hash_of(everything) % 10_000}\n```"
        else:
            digit = str(hash_of(f"{read.instruction}|{sorted(read.inputs.items())}") % 10)
            new = f"Version {hash_of(everything) % 10_000}"
            text = write_answer(read.style, {name: new if "instruction" in name else digit for name in read.asked})
        choice = SimpleNamespace(message=SimpleNamespace(content=text), finish_reason="stop")
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        return SimpleNamespace(id="hash", model=self.model, choices=[choice], usage=usage)


class Digits(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = dspy.Predict("question -> first")
        self.two = dspy.Predict("question -> second")

    def forward(self, question: str) -> Any:
        first, second = self.one(question=question).first, self.two(question=question).second
        return dspy.Prediction(first=first, second=second)


def sum_of_digits(
    example: Any, prediction: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
) -> Any:
    score = (int(getattr(prediction, "first", 0)) + int(getattr(prediction, "second", 0))) / 18
    return dspy.Prediction(score=score, feedback=f"The digits make {score}.")


def run_gepa_digits(seed: int = 0, calls: int = 150, **options: Any) -> Any:
    lm = HashLM("embedded/hash", cache=False)
    dspy.configure(lm=lm)
    for name in ("dspy", "gepa"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    rows = [dspy.Example(question=f"question {number}").with_inputs("question") for number in range(14)]
    given = {"reflection_lm": lm, "track_stats": True, "num_threads": 2, **options}
    optimizer = dspy.GEPA(metric=sum_of_digits, max_metric_calls=calls, seed=seed, **given)
    return optimizer.compile(Digits(), trainset=rows[:8], valset=rows[8:]), optimizer
