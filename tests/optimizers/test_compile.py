"""The compile span of any optimizer, DSPy's or a user's own."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import dspy
import pytest
from dspy.teleprompt import Teleprompter

import dspy_otel
from dspy_otel import program_id
from dspy_otel.optimizers import optimization
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

OWN = "dspy.optimizer."


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


@pytest.mark.parametrize("name", ["LabeledFewShot", "Ensemble", "KNNFewShot"])
def test_optimizers_without_trials(telemetry: Any, name: str) -> None:
    scripted_lm()
    telemetry.instrument()
    rows = load_examples("train", 4)
    if name == "LabeledFewShot":
        compiled = dspy.LabeledFewShot(k=2).compile(ColourFamily(), trainset=rows)
    elif name == "Ensemble":
        compiled = dspy.Ensemble(reduce_fn=dspy.majority).compile([ColourFamily(), ColourFamily()])
    else:
        import numpy

        vectorizer = dspy.Embedder(lambda texts: numpy.array([[float(len(text)), 1.0] for text in texts]))
        compiled = dspy.KNNFewShot(k=2, trainset=rows, vectorizer=vectorizer).compile(ColourFamily())
    span = compile_span(telemetry, name)
    assert span.attributes["dspy.optimizer.outcome"] == "finished"
    if name == "Ensemble":
        assert params(span)["reduce_fn"] == "majority"
    if name == "KNNFewShot":
        telemetry.clear()
        quietly(compiled, colour_name="teal")
        at_inference = compile_span(telemetry, "BootstrapFewShot")
        assert at_inference.attributes["dspy.optimizer.inference_time"] is True


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
    assert told.score == other["score"]
    changed = program.deepcopy()
    changed.choose.predict.demos = []
    changed.describe.signature = changed.describe.signature.with_instructions("Something new.")
    assert optimization(changed) is None
    assert optimization("not a program") is None
    assert optimization(object()) is None


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
