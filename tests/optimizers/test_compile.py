"""The compile span of any optimizer, DSPy's or a user's own."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import defaultdict
from enum import Enum
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt import Teleprompter
from opentelemetry.sdk.trace import SpanProcessor

import dspy_otel
from dspy_otel import program_id
from dspy_otel.live.feeds import SpanFeed
from dspy_otel.optimizers import optimization
from dspy_otel.optimizers.parameters import parameter_attributes
from tests.optimizers import common
from tests.optimizers.common import (
    ColourFamily,
    compile_span,
    lm_calls,
    load_examples,
    quietly,
    same_family,
    scripted_lm,
    trials,
)
from tests.support.waiting import run

OWN = "dspy.optimizer."


@pytest.mark.parametrize("optimize", [common.run_mipro, common.run_random_search, common.run_copro])
def test_who_follows_a_compile_knows_the_number_of_its_trials(optimize: Any, telemetry: Any) -> None:
    feed, seen = SpanFeed(), list[int | None]()
    telemetry.tracer_provider.add_span_processor(feed)

    class Watcher(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            if span.name == "trial":
                running = [one for one in feed._history.running() if one.parent is None]
                seen.extend(one.planned for one in running)

    telemetry.tracer_provider.add_span_processor(Watcher())
    lm = scripted_lm()
    telemetry.instrument()
    quietly(optimize, lm)
    (top,) = [span for span in telemetry.spans if span.name.startswith("compile ") and span.parent is None]
    assert set(seen) == {top.attributes["dspy.optimizer.trials.planned"]}


def params(span: Any) -> dict[str, Any]:
    prefix = f"{OWN}params."
    return {key.removeprefix(prefix): value for key, value in span.attributes.items() if key.startswith(prefix)}


def test_all_parameters_with_their_defaults(telemetry: Any) -> None:
    lm = scripted_lm()
    telemetry.instrument()
    quietly(common.run_mipro, lm)
    span = compile_span(telemetry, "MIPROv2")
    assert params(span) == {
        "metric": "same_family",
        "prompt_model": "embedded/scripted",
        "task_model": "embedded/scripted",
        "max_bootstrapped_demos": 2,
        "max_labeled_demos": 2,
        "num_candidates": 4,
        "num_threads": 2,
        "seed": 9,
        "init_temperature": 1.0,
        "verbose": False,
        "track_stats": True,
        "num_trials": 5,
        "minibatch": True,
        "minibatch_size": 4,
        "minibatch_full_eval_steps": 2,
        "program_aware_proposer": True,
        "data_aware_proposer": True,
        "view_data_batch_size": 10,
        "tip_aware_proposer": True,
        "fewshot_aware_proposer": True,
    }
    attributes = span.attributes
    assert attributes["dspy.dataset.train.size"] == 16
    assert attributes["dspy.dataset.val.size"] == 8
    assert attributes["dspy.dataset.train.digest"] != attributes["dspy.dataset.val.digest"]
    assert attributes["dspy.optimizer.initial_program.id"] == program_id(ColourFamily())
    assert attributes["dspy.optimizer.outcome"] == "finished"


class Flavour(Enum):
    MILD = "A long sentence."


def test_parameters_of_any_kind() -> None:
    key = "0123456789abcdef0123456789abcdef01234567"
    told = {
        "label": key,
        "id": "3f2c9a10-77aa-4b1c-9e8f-001122334455",
        "model": "gpt-4o-mini-2024-07-18",
        "strategy": "p -> w -> p",
        "mode": "bootstrap_shuffled",
        "text": "What a user wrote.",
        "folder": Path("/home/somebody/runs"),
        "flavour": Flavour.MILD,
        "settings": {"lr": 0.1, "note": key, "api_key": "abc", "flavour": Flavour.MILD, "deep": [[1, (2.5, None)]]},
        "seed": 2**70,
    }
    shown = {
        name.removeprefix(f"{OWN}params."): value for name, value in parameter_attributes(object(), told, False).items()
    }
    assert shown == {
        "label": "<40 characters>",
        "id": "<36 characters>",
        "model": "gpt-4o-mini-2024-07-18",
        "strategy": "p -> w -> p",
        "mode": "bootstrap_shuffled",
        "text": "<18 characters>",
        "folder": "<19 characters>",
        "flavour": "Flavour.MILD",
        "settings": '{"lr":0.1,"note":"<40 characters>","api_key":"[masked]","flavour":"Flavour.MILD",'
        '"deep":[[1,[2.5,null]]]}',
        "seed": float(2**70),
    }
    assert parameter_attributes(object(), {"folder": told["folder"]}, True)[f"{OWN}params.folder"] == str(
        told["folder"]
    )


def test_settings_for_every_lm_are_told() -> None:
    optimizer = dspy.BootstrapFinetune(metric=same_family, train_kwargs={"lr": 0.1, "api_key": "abc"})
    shown = parameter_attributes(optimizer, {"others": defaultdict(list)}, False)
    assert shown[f"{OWN}params.train_kwargs"] == '{"lr":0.1,"api_key":"[masked]"}'


def test_the_validation_set_that_an_optimizer_splits_off(telemetry: Any) -> None:
    lm = scripted_lm()
    telemetry.instrument()
    optimizer = dspy.MIPROv2(
        metric=same_family,
        prompt_model=lm,
        task_model=lm,
        auto=None,
        num_candidates=2,
        max_bootstrapped_demos=1,
        max_labeled_demos=0,
        num_threads=2,
    )
    rows = load_examples("train", 10)
    quietly(optimizer.compile, ColourFamily(), trainset=rows, num_trials=1, minibatch=False)
    attributes = compile_span(telemetry, "MIPROv2").attributes
    assert attributes["dspy.dataset.train.size"] == 10
    assert attributes["dspy.dataset.val.size"] == 8
    telemetry.clear()
    quietly(dspy.Evaluate(devset=rows[2:], metric=same_family, num_threads=2), ColourFamily())
    assert telemetry.only("evaluate ").attributes["dspy.evaluation.size"] == 8


class Secretive(Teleprompter):
    """Defined before `instrument()`."""

    def __init__(self, metric: Any, api_key: str, breadth: int = 3, settings: Any = None) -> None:
        super().__init__()
        self.metric = metric
        self.api_key = api_key
        self.breadth = breadth
        self.settings = settings
        self.state = list(range(10))

    def compile(self, student: Any, *, trainset: Any, tries: int = 2, valset: Any = None, **options: Any) -> Any:
        student(colour_name="teal")
        dspy.Predict("task -> instruction")(task="think of something")
        for number in range(tries):
            candidate = student.deepcopy()
            signature = candidate.choose.predict.signature
            candidate.choose.predict.signature = signature.with_instructions(f"Try {number}.")
            dspy.Evaluate(devset=valset or trainset, metric=self.metric, num_threads=2, display_progress=False)(
                candidate
            )
        return candidate


def test_a_users_own_optimizer_two_levels_deep(telemetry: Any) -> None:
    scripted_lm()
    telemetry.instrument()

    class Deeper(Secretive):
        def compile(self, student: Any, *, trainset: Any, extra: str = "yes", **options: Any) -> Any:
            return super().compile(student, trainset=trainset, **options)

    key = "sk-abcdefghijklmnop1234"
    optimizer = Deeper(same_family, key, settings={"lm": dspy.settings.lm, "api_key": key, "depth": 2})
    compiled = quietly(optimizer.compile, ColourFamily(), trainset=load_examples("train", 4), tries=3, note="more")
    span = compile_span(telemetry, "Deeper")
    shown = params(span)
    assert shown == {
        "metric": "same_family",
        "api_key": "[masked]",
        "breadth": 3,
        "settings": '{"lm":"embedded/scripted","api_key":"[masked]","depth":2}',
        "extra": "yes",
        "tries": 3,
        "note": "more",
    }
    assert key not in telemetry.tree()
    found = trials(telemetry, "Deeper")
    assert [trial["trial.number"] for trial in found] == [1, 2, 3]
    assert {trial["trial.kind"] for trial in found} == {"full"}
    assert span.attributes["dspy.program.id"] == program_id(compiled) == found[-1]["candidate.id"]
    roles = [
        call.attributes["dspy.lm.role"] for call in lm_calls(telemetry) if "dspy.trial.number" not in call.attributes
    ]
    assert roles == ["task", "task", "proposer"]


def test_a_subclass_that_brings_its_own_data(telemetry: Any) -> None:
    scripted_lm()
    telemetry.instrument()
    rows = load_examples("train", 6)

    class Ready(dspy.BootstrapFewShotWithRandomSearch):
        def compile(self, program: Any, flavour: str = "mild") -> Any:
            return super().compile(program, trainset=rows[:4], valset=rows[2:], restrict=[-3, 0])

    optimizer = Ready(
        metric=same_family, max_bootstrapped_demos=1, max_labeled_demos=1, num_candidate_programs=2, num_threads=2
    )
    quietly(optimizer.compile, ColourFamily())
    span = compile_span(telemetry, "Ready")
    assert params(span)["flavour"] == "mild"
    assert params(span)["restrict"] == "[-3,0]"
    assert "program" not in params(span)
    attributes = span.attributes
    assert (attributes["dspy.dataset.train.size"], attributes["dspy.dataset.val.size"]) == (4, 4)
    assert attributes["dspy.optimizer.initial_program.id"] == program_id(ColourFamily())
    assert attributes["dspy.optimizer.trials.planned"] == 2
    found = trials(telemetry, "Ready")
    assert [(trial["trial.kind"], trial["trial.params.strategy"]) for trial in found] == [
        ("baseline", "zero_shot"),
        ("full", "bootstrap_shuffled"),
    ]


def test_programs_that_an_optimizer_runs_side_by_side_are_the_task(telemetry: Any) -> None:
    scripted_lm()
    telemetry.instrument()

    class SideBySide(Teleprompter):
        def compile(self, student: Any, *, trainset: Any) -> Any:
            student.batch(trainset, num_threads=2, disable_progress_bar=True)
            dspy.Predict("task -> instruction")(task="think of something")
            return student

    quietly(SideBySide().compile, ColourFamily(), trainset=load_examples("train", 3))
    usage = compile_span(telemetry, "SideBySide").attributes
    assert (usage["dspy.usage.task.lm_calls"], usage["dspy.usage.proposer.lm_calls"]) == (6, 1)


def test_an_optimizer_inside_a_metric_is_a_run_of_its_own(telemetry: Any) -> None:
    scripted_lm()
    telemetry.instrument()
    few = {"max_bootstrapped_demos": 1, "max_labeled_demos": 1}
    rows = load_examples("train", 4)

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        dspy.BootstrapFewShot(metric=same_family, **few).compile(ColourFamily(), trainset=rows[:1])
        return same_family(example, prediction)

    optimizer = dspy.BootstrapFewShotWithRandomSearch(metric=metric, num_candidate_programs=0, num_threads=2, **few)
    quietly(optimizer.compile, ColourFamily(), trainset=rows[:2], valset=rows[2:])
    outer = compile_span(telemetry, "BootstrapFewShotWithRandomSearch")
    run_id = outer.attributes["dspy.optimizer.run.id"]
    inside = [
        span
        for span in telemetry.named("compile BootstrapFewShot")
        if "dspy.optimizer.parent_trial.number" in span.attributes
    ]
    assert len(inside) == 6
    for span in inside:
        assert span.attributes["dspy.optimizer.parent_run.id"] == run_id
        assert 1 <= span.attributes["dspy.optimizer.parent_trial.number"] <= 3
    # A number, candidate or phase beside a run's id is of that very run.
    told = {"dspy.trial.number", "dspy.candidate.id"}
    below = [span for span in telemetry.spans if span.attributes.get("dspy.optimizer.run.id") not in (None, run_id)]
    assert below
    assert not [span.name for span in below if told & set(span.attributes)]
    assert outer.attributes["dspy.usage.lm_calls"] == len(lm_calls(telemetry))


def test_two_compiles_at_once_stay_apart(telemetry: Any) -> None:
    lm = scripted_lm()
    telemetry.instrument()
    barrier = threading.Barrier(2)

    def work(seed: int) -> None:
        with dspy.context(lm=lm):
            barrier.wait()
            common.run_simba(lm, seed=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    quietly(lambda: [thread.start() for thread in threads] and [thread.join() for thread in threads])
    runs = telemetry.named("compile SIMBA")
    assert len(runs) == 2
    ids = {span.attributes["dspy.optimizer.run.id"]: span for span in runs}
    assert len(ids) == 2
    for run_id, span in ids.items():
        own = [trial for trial in telemetry.named("trial") if trial.attributes["dspy.optimizer.run.id"] == run_id]
        assert {trial.context.trace_id for trial in own} == {span.context.trace_id}
        assert sorted(trial.attributes["dspy.trial.number"] for trial in own) == list(range(1, len(own) + 1))
        calls = [call for call in lm_calls(telemetry) if call.attributes["dspy.optimizer.run.id"] == run_id]
        assert span.attributes["dspy.usage.lm_calls"] == len(calls)


def test_nested_compiles_name_their_run_and_the_outermost(telemetry: Any) -> None:
    lm = scripted_lm()
    telemetry.instrument()
    quietly(common.run_better_together, lm)
    outer = compile_span(telemetry, "BetterTogether")
    search = compile_span(telemetry, "BootstrapFewShotWithRandomSearch")
    root = outer.attributes["dspy.optimizer.run.id"]
    assert search.attributes["dspy.optimizer.parent_run.id"] == root
    assert search.parent.span_id == outer.context.span_id
    inner = telemetry.named("compile BootstrapFewShot")
    for span in inner:
        assert span.attributes["dspy.optimizer.root_run.id"] == root
    calls = lm_calls(telemetry)
    assert all(
        root in (call.attributes["dspy.optimizer.run.id"], call.attributes.get("dspy.optimizer.root_run.id"))
        for call in calls
    )
    assert outer.attributes["dspy.usage.lm_calls"] == len(calls)


def test_an_async_compile_is_one_span_around_all(telemetry: Any) -> None:
    scripted_lm()
    telemetry.instrument()

    class Slow(Teleprompter):
        async def compile(self, student: Any, *, trainset: Any) -> Any:
            await asyncio.sleep(0.01)
            await student.acall(colour_name="teal")
            return student

    class AsyncColours(ColourFamily):
        async def aforward(self, colour_name: str) -> Any:
            return await self.describe.acall(colour_name=colour_name)

    async def both() -> None:
        await asyncio.gather(*(Slow().compile(AsyncColours(), trainset=[]) for _ in range(2)))

    asyncio.run(both())
    spans = telemetry.named("compile Slow")
    assert len(spans) == 2
    for span in spans:
        assert span.end_time - span.start_time >= 9_000_000
        assert span.attributes["dspy.optimizer.outcome"] == "finished"
        (program,) = telemetry.children(span)
        assert program.attributes["dspy.optimizer.run.id"] == span.attributes["dspy.optimizer.run.id"]
        assert span.attributes["dspy.usage.task.lm_calls"] == 1


@pytest.mark.parametrize(("error", "outcome"), [(ValueError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_how_a_compile_ends(telemetry: Any, error: type[BaseException], outcome: str) -> None:
    scripted_lm()
    telemetry.instrument()

    class Ends(Teleprompter):
        def compile(self, student: Any, *, trainset: Any) -> Any:
            dspy.Evaluate(devset=trainset, metric=same_family, num_threads=1, display_progress=False)(student)
            raise error("enough")

    with pytest.raises(error):
        quietly(Ends().compile, ColourFamily(), trainset=load_examples("train", 3))
    attributes = compile_span(telemetry, "Ends").attributes
    assert attributes["dspy.optimizer.outcome"] == outcome
    assert attributes["dspy.optimizer.trials.done"] == 1
    assert "dspy.program.id" not in attributes
    assert dspy_otel.optimizers.run.Run.live == 0


def test_an_interrupted_trial_has_no_score(telemetry: Any) -> None:
    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        raise KeyboardInterrupt

    lm = scripted_lm()
    telemetry.instrument()
    program = ColourFamily()
    program.set_lm(lm)
    optimizer = dspy.BetterTogether(metric=metric, p=dspy.LabeledFewShot(k=2))
    rows = load_examples("train", 4)
    with pytest.raises(KeyboardInterrupt):
        quietly(optimizer.compile, program, trainset=rows, valset=rows[:2], strategy="p", num_threads=1)
    (trial,) = trials(telemetry, "BetterTogether")
    assert "trial.score" not in trial
    attributes = compile_span(telemetry, "BetterTogether").attributes
    assert attributes["dspy.optimizer.outcome"] == "interrupted"
    assert "dspy.optimizer.best_score" not in attributes


@pytest.mark.parametrize("name", ["LabeledFewShot", "Ensemble", "KNNFewShot"])
def test_optimizers_without_trials(telemetry: Any, name: str) -> None:
    scripted_lm()
    telemetry.instrument()
    rows = load_examples("train", 4)
    if name == "LabeledFewShot":
        dspy.LabeledFewShot(k=2).compile(ColourFamily(), trainset=rows)
    elif name == "Ensemble":
        dspy.Ensemble(reduce_fn=dspy.majority).compile([ColourFamily(), ColourFamily()])
    else:
        import numpy

        vectorizer = dspy.Embedder(lambda texts: numpy.array([[float(len(text)), 1.0] for text in texts]))
        knn = dspy.KNNFewShot(k=2, trainset=rows, vectorizer=vectorizer, metric=same_family)
        knn.compile(ColourFamily())
    span = compile_span(telemetry, name)
    assert span.attributes["dspy.optimizer.outcome"] == "finished"
    if name == "Ensemble":
        assert params(span)["reduce_fn"] == "majority"
    if name == "KNNFewShot":
        assert params(span)["k"] == 2
        assert params(span)["vectorizer"] == "Embedder"
        assert span.attributes["dspy.dataset.train.size"] == 4


@pytest.mark.parametrize("mode", ["all", "none"])
def test_a_program_that_compiles_when_it_is_called_is_one_trace(telemetry: Any, mode: str) -> None:
    import numpy

    scripted_lm()
    telemetry.instrument(optimization_traces=mode)
    rows = load_examples("train", 4)
    vectorizer = dspy.Embedder(lambda texts: numpy.array([[float(len(text)), 1.0] for text in texts]))
    knn = dspy.KNNFewShot(k=2, trainset=rows, vectorizer=vectorizer, metric=same_family)
    program = knn.compile(ColourFamily())
    telemetry.clear()
    quietly(program, colour_name="teal")
    at_inference = compile_span(telemetry, "BootstrapFewShot")
    assert at_inference.attributes["dspy.optimizer.inference_time"] is True
    assert telemetry.named("attempt ")
    (call,) = [span for span in telemetry.spans if span.parent is None]
    assert call.name == "invoke_workflow ColourFamily"
    assert call.attributes["dspy.usage.lm_calls"] == len(lm_calls(telemetry))
    inside = compile_span(telemetry, "LabeledFewShot")
    assert inside.attributes["dspy.optimizer.inference_time"] is True
    # Each call would push an optimization that made a program out of memory.
    assert optimization(at_inference.attributes["dspy.program.id"]) is None
    assert optimization(inside.attributes["dspy.program.id"]) is None


def test_bootstrap_attempts_are_traces_of_their_own(telemetry: Any) -> None:
    scripted_lm()
    telemetry.instrument()
    optimizer = dspy.BootstrapFewShot(metric=common.judged, max_bootstrapped_demos=2, max_labeled_demos=2)
    quietly(optimizer.compile, ColourFamily(), trainset=load_examples("train", 8))
    phase = telemetry.only("bootstrap")
    attempts = telemetry.named("attempt ")
    assert phase.attributes["dspy.bootstrap.attempts"] == len(attempts)
    assert phase.attributes["dspy.bootstrap.accepted"] == 2
    assert sum(span.attributes["dspy.bootstrap.accepted"] for span in attempts) == 2
    for attempt in attempts:
        assert attempt.parent is None
        assert [link.context.span_id for link in attempt.links] == [phase.context.span_id]
        calls = [span for span in lm_calls(telemetry) if span.context.trace_id == attempt.context.trace_id]
        assert [call.attributes["dspy.lm.role"] for call in calls] == ["teacher", "teacher", "judge"]
        assert {call.attributes["dspy.optimizer.phase"] for call in calls} == {"bootstrap"}
    assert {link.context.span_id for link in phase.links} == {span.context.span_id for span in attempts}


def test_where_a_program_came_from(telemetry: Any, tmp_path: Any) -> None:
    lm = scripted_lm()
    telemetry.instrument()
    program, _ = quietly(common.run_random_search, lm)
    span = compile_span(telemetry, "BootstrapFewShotWithRandomSearch")
    made = optimization(program)
    assert made is not None
    assert made.run_id == span.attributes["dspy.optimizer.run.id"]
    assert made.optimizer == "BootstrapFewShotWithRandomSearch"
    assert made.trial == span.attributes["dspy.optimizer.winner.trial"]
    assert made.score == span.attributes["dspy.optimizer.best_score"]
    assert made.winner
    program.save(tmp_path / "program.json")
    loaded = ColourFamily()
    loaded.load(tmp_path / "program.json")
    assert optimization(loaded) == made
    assert optimization(program.deepcopy()) == made
    other = min(program.candidate_programs, key=lambda entry: entry["score"])
    told = optimization(other["program"])
    assert told is not None
    assert told.score == pytest.approx(other["score"] / 100)
    changed = program.deepcopy()
    changed.choose.predict.demos = []
    changed.describe.signature = changed.describe.signature.with_instructions("Something new.")
    assert optimization(changed) is None
    assert optimization("not a program") is None
    assert optimization(object()) is None


def test_who_only_starts_from_a_program_has_not_made_it(telemetry: Any) -> None:
    scripted_lm()
    telemetry.instrument()
    rows = load_examples("train", 4)
    winner = dspy.LabeledFewShot(k=2).compile(ColourFamily(), trainset=rows)
    made = optimization(winner)
    assert made is not None

    class Again(Teleprompter):
        def compile(self, student: Any, *, trainset: Any) -> Any:
            dspy.Evaluate(devset=trainset, metric=same_family, num_threads=1, display_progress=False)(student)
            return student

    quietly(Again().compile, winner, trainset=rows)
    assert compile_span(telemetry, "Again").attributes["dspy.optimizer.winner.trial"] == 1
    assert optimization(winner) == made
    # What nobody has made is known from whoever worked with it last.
    first = ColourFamily()
    for _ in range(2):
        telemetry.clear()
        quietly(Again().compile, first, trainset=rows)
        told = optimization(first)
        assert told is not None
        assert told.run_id == compile_span(telemetry, "Again").attributes["dspy.optimizer.run.id"]


@pytest.mark.integration
def test_a_saved_program_in_another_process_has_the_id_of_its_trial(telemetry: Any, tmp_path: Path) -> None:
    lm = scripted_lm()
    telemetry.instrument()
    program, _ = quietly(common.run_random_search, lm)
    made = optimization(program)
    assert made is not None
    program.save(tmp_path / "state.json")
    program.save(tmp_path / "whole", save_program=True)
    script = f"""
import sys, dspy, dspy_otel
from tests.optimizers import common
from tests.support.spans import Recorder
lm = common.scripted_lm()
recorder = Recorder().instrument()
loaded = common.ColourFamily()
loaded.load({str(tmp_path / "state.json")!r})
for program in (loaded, dspy.load({str(tmp_path / "whole")!r}, allow_pickle=True)):
    program.set_lm(lm)
    program(colour_name="teal")
print(*(span.attributes["dspy.program.id"] for span in recorder.named("invoke_workflow")))
"""
    root = Path(__file__).parent.parent.parent
    process = run(
        [sys.executable, "-c", script],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.split() == [made.program_id] * 2
    found = [trial for trial in trials(telemetry, made.optimizer) if trial["candidate.id"] == made.program_id]
    assert [trial["trial.number"] for trial in found] == [made.trial]


def test_a_candidates_state_only_behind_the_content_switch(telemetry: Any) -> None:
    lm = scripted_lm()
    telemetry.instrument()
    quietly(common.run_gepa, lm)
    content = {"dspy.program.state", "dspy.candidate.diff"}
    assert not any(content & set(span.attributes) for span in telemetry.spans)
    telemetry.shutdown()

    from tests.support.spans import Recorder

    recorder = Recorder().instrument(capture_content="span_only")
    program, _ = quietly(common.run_gepa, lm)
    found = trials(recorder, "GEPA")
    accepted = next(trial for trial in found if trial.get("trial.accepted"))
    assert '"describe"' in accepted["program.state"]
    assert '"before":"Say which colour the name makes you think of."' in accepted["candidate.diff"]
    states = [trial["candidate.id"] for trial in found if "program.state" in trial]
    assert len(states) == len(set(states))
    winner = recorder.only("compile GEPA").attributes["dspy.program.state"]
    assert program.choose.predict.signature.instructions[:20] in winner
    recorder.shutdown()
