"""Trials agree with what each optimizer itself reports, score for score."""

from __future__ import annotations

import sys
import types
from collections import defaultdict
from typing import Any

import dspy
import pytest

from dspy_otel import program_id
from dspy_otel.optimizers.compile import CompileOperation
from dspy_otel.optimizers.tracker import Trial
from tests.optimizers import common
from tests.optimizers.common import compile_span, quietly, scripted_lm, trials


def run(telemetry: Any, name: str, **options: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    lm = scripted_lm()
    telemetry.instrument()
    program, optimizer = quietly(common.RUNS[name], lm, **options)
    return program, optimizer, trials(telemetry, name)


@pytest.mark.parametrize("minibatch", [True, False])
def test_mipro_trials_are_its_trial_logs(telemetry: Any, minibatch: bool) -> None:
    program, _, found = run(telemetry, "MIPROv2", minibatch=minibatch)
    logs = program.trial_logs
    assert [trial["trial.number"] for trial in found] == sorted(logs)
    for trial in found:
        log = logs[trial["trial.number"]]
        kind = trial["trial.kind"]
        assert trial["trial.score.reported"] == log["mb_score" if kind == "minibatch" else "full_eval_score"]
        assert trial["trial.score"] == pytest.approx(trial["trial.score.reported"] / 100, abs=1e-9)
        scored = log["mb_program" if kind == "minibatch" else "full_eval_program"]
        assert trial["candidate.id"] == program_id(scored)
        chosen = {key: value for key, value in log.items() if "_predictor_" in key}
        for key, value in chosen.items():
            number, _, part = key.partition("_predictor_")
            name = list(dict(program.named_predictors()))[int(number)]
            assert trial[f"trial.params.{name}.{part}_index"] == value
        assert kind == "baseline" or any(key.startswith("trial.params.") for key in trial)
    kinds = [trial["trial.kind"] for trial in found]
    assert kinds[0] == "baseline"
    assert ("minibatch" in kinds) == minibatch
    assert found[-1]["trial.best_score"] == pytest.approx(program.score / 100)
    attributes = compile_span(telemetry, "MIPROv2").attributes
    assert attributes["dspy.optimizer.best_score"] == pytest.approx(program.score / 100)
    assert attributes["dspy.optimizer.trials.planned"] == attributes["dspy.optimizer.trials.done"] == len(logs)


def test_a_mipro_trial_that_fails_counts_as_dspy_counts_it(telemetry: Any) -> None:
    calls = []

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        calls.append(1)
        if len(calls) > 20:
            raise ValueError("the judge is gone")
        return True

    lm = scripted_lm()
    telemetry.instrument()
    dspy.settings.configure(max_errors=1)
    program, _ = quietly(common.run_mipro, lm, metric=metric)
    scores = {n: log.get("mb_score", log.get("full_eval_score")) for n, log in program.trial_logs.items()}
    found = trials(telemetry, "MIPROv2")
    assert {trial["trial.number"]: trial["trial.score.reported"] for trial in found} == scores
    assert 0.0 in scores.values()
    assert any(span.status.status_code.name == "ERROR" for span in telemetry.named("trial"))
    assert compile_span(telemetry, "MIPROv2").status.status_code.name == "UNSET"


@pytest.mark.parametrize("restrict", [None, [-3, -1, 1]])
def test_random_search_trials_are_its_candidates(telemetry: Any, restrict: Any) -> None:
    program, _, found = run(telemetry, "BootstrapFewShotWithRandomSearch", restrict=restrict)
    reported = {entry["seed"]: entry for entry in program.candidate_programs}
    assert {trial["trial.params.seed"]: trial["trial.score.reported"] for trial in found} == {
        seed: entry["score"] for seed, entry in reported.items()
    }
    for trial in found:
        assert trial["candidate.id"] == program_id(reported[trial["trial.params.seed"]]["program"])
    strategies = {-3: "zero_shot", -2: "labeled", -1: "bootstrap_unshuffled", 0: "bootstrap_shuffled"}
    for trial in found:
        assert trial["trial.params.strategy"] == strategies[min(trial["trial.params.seed"], 0)]


def test_copro_trials_are_its_candidates(telemetry: Any) -> None:
    program, _, found = run(telemetry, "COPRO")
    planned = compile_span(telemetry, "COPRO").attributes["dspy.optimizer.trials.planned"]
    assert len(found) == program.total_calls == planned
    best: dict[str, float] = defaultdict(float)
    for trial in found:
        best[trial["candidate.id"]] = max(best[trial["candidate.id"]], trial["trial.score.reported"])
    for entry in program.candidate_programs:
        same = [
            trial
            for trial in found
            if trial["candidate.id"] == program_id(entry["program"]) and trial["trial.score.reported"] == entry["score"]
        ]
        assert entry["depth"] in {trial["trial.params.depth"] for trial in same}
        assert best[program_id(entry["program"])] >= entry["score"]
    assert {trial["trial.params.predictor"] for trial in found} == {"describe", "choose.predict"}
    latest = program.results_latest.values()
    assert sorted({depth for stats in latest for depth in stats["depth"]}) == sorted(
        {trial["trial.params.depth"] for trial in found}
    )
    assert max(trial["trial.score.reported"] for trial in found) == program.candidate_programs[0]["score"]


def test_simba_trials_are_its_own_scores(telemetry: Any) -> None:
    import logging

    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    lm = scripted_lm()
    telemetry.instrument()
    logger = logging.getLogger("dspy.teleprompt.simba")
    handler = Keep()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    planned: list[int | None] = []
    remember = CompileOperation.measure
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                CompileOperation,
                "measure",
                lambda self, call, *rest: planned.append(call.context.state.tracker.run.planned_examples)
                or remember(self, call, *rest),
            )
            program, _ = quietly(common.run_simba, lm)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    found = trials(telemetry, "SIMBA")
    by_step: defaultdict[int, list[float]] = defaultdict(list)
    for trial in found:
        if trial["trial.kind"] == "minibatch":
            by_step[trial["trial.params.step"]].append(trial["trial.score"])
    for step, scores in by_step.items():
        assert any(line.startswith(f"Scores after {step + 1} batches: {scores}") for line in said)
    samples = [trial for trial in found if trial["trial.kind"] == "sample"]
    assert len(samples) == len(by_step) == 3
    for trial in samples:
        number = trial["trial.params.step"] + 1
        assert any(
            line.startswith(f"Batch {number}: Baseline mini-batch score: {trial['trial.score']}") for line in said
        )
    final = [trial for trial in found if trial["trial.kind"] in ("baseline", "validation")]
    assert any(line.startswith(f"Final trainset scores: {[trial['trial.score'] for trial in final]}") for line in said)
    reported = [(program_id(entry["program"]), entry["score"]) for entry in program.candidate_programs]
    assert sorted(reported) == sorted((trial["candidate.id"], trial["trial.score"]) for trial in final)
    winner = compile_span(telemetry, "SIMBA").attributes
    assert planned == [3 * 5 * (3 + 4) + 4 * 10]
    assert winner["dspy.optimizer.examples.evaluated"] == planned[0]
    assert winner["dspy.program.id"] == reported[0][0]
    assert winner["dspy.optimizer.best_score"] == reported[0][1]
    strategies = {
        (trial["trial.params.strategy"], trial["trial.params.applied"])
        for trial in found
        if trial["trial.kind"] == "minibatch"
    }
    assert ("append_a_rule", True) in strategies
    assert ("append_a_demo", True) in strategies


def test_simba_has_one_baseline_though_it_ends_with_copies_of_the_initial_program(telemetry: Any) -> None:
    class Gone(common.ScriptedLM):  # and so no rule is ever added
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("no answer")

    scripted_lm()
    telemetry.instrument()
    gone = Gone("embedded/gone", cache=False)
    optimizer = dspy.SIMBA(
        metric=common.same_family, bsize=4, num_candidates=2, max_steps=2, prompt_model=gone, num_threads=2
    )
    quietly(optimizer.compile, common.ColourFamily(), trainset=common.load_examples("train", 8))
    final = [trial for trial in trials(telemetry, "SIMBA") if trial["optimizer.phase"] == "final_evaluation"]
    initial = compile_span(telemetry, "SIMBA").attributes["dspy.optimizer.initial_program.id"]
    assert [trial["candidate.id"] for trial in final].count(initial) > 1
    assert [trial["trial.kind"] for trial in final] == ["baseline"] + ["validation"] * (len(final) - 1)


def test_simba_without_any_candidate_still_ends_with_its_final_evaluation(telemetry: Any) -> None:
    scripted_lm()
    telemetry.instrument()
    optimizer = dspy.SIMBA(metric=common.same_family, bsize=4, num_candidates=2, max_steps=1, num_threads=2)
    optimizer.strategies = [lambda *args, **kwargs: 1 / 0]
    quietly(optimizer.compile, common.ColourFamily(), trainset=common.load_examples("train", 4))
    found = [(trial["optimizer.phase"], trial["trial.kind"]) for trial in trials(telemetry, "SIMBA")]
    assert found == [("sample", "sample"), ("final_evaluation", "baseline")]


@pytest.mark.parametrize("seed", [0, 3])
def test_gepa_trials_are_its_detailed_results(telemetry: Any, seed: int) -> None:
    program, _, found = run(telemetry, "GEPA", seed=seed)
    results = program.detailed_results
    full = [trial for trial in found if trial["trial.kind"] in ("baseline", "full")]
    assert [trial["trial.score"] for trial in full] == results.val_aggregate_scores
    ids = [program_id(candidate) for candidate in results.candidates]
    assert [trial["candidate.id"] for trial in full] == ids
    for index, trial in enumerate(full[1:], 1):
        assert trial["trial.params.candidate_index"] == index
        parents = [ids[parent] for parent in results.parents[index] if parent is not None]
        assert parents == list(trial["candidate.parent_ids"])
    proposed = [trial for trial in found if trial["trial.kind"] == "minibatch"]
    accepted = [trial for trial in proposed if trial["trial.accepted"]]
    assert len(accepted) == len(full) - 1
    for trial in proposed:
        if trial["optimizer.phase"] == "merge":
            continue
        better = trial["trial.score_after"] > trial["trial.score_before"]
        assert trial["trial.accepted"] == better
        assert ("trial.reason" in trial) != better
        assert trial["trial.params.components"] in (("describe",), ("choose.predict",))
        assert len(trial["trial.params.minibatch_ids"]) == trial["trial.size"] == 3
    attributes = compile_span(telemetry, "GEPA").attributes
    assert attributes["dspy.optimizer.trials.accepted"] == len(accepted)
    assert attributes.get("dspy.optimizer.trials.rejected", 0) == len(proposed) - len(accepted)
    assert attributes["dspy.optimizer.examples.evaluated"] == results.total_metric_calls
    assert attributes["dspy.program.id"] == ids[results.best_idx]


def test_gepa_displaced_candidates_are_told(telemetry: Any) -> None:
    run(telemetry, "GEPA")
    span = compile_span(telemetry, "GEPA")
    fronts = [event for event in span.events if event.name == "dspy.optimizer.pareto_front"]
    full = [trial for trial in trials(telemetry, "GEPA") if trial["trial.kind"] == "full"]
    assert len(fronts) == len(full)
    for trial, event in zip(full, fronts, strict=True):
        on_front = event.attributes["dspy.optimizer.pareto_front.candidates"]
        assert (trial["candidate.id"] in on_front) == trial["trial.on_pareto_front"]
        assert len(on_front) == len(set(on_front))
        assert not set(on_front) & set(event.attributes["dspy.optimizer.pareto_front.displaced"])


def test_gepa_names_whom_a_candidate_displaced(telemetry: Any) -> None:
    telemetry.instrument()
    quietly(common.run_gepa_digits, calls=60)
    fronts = [event.attributes for event in compile_span(telemetry, "GEPA").events]
    displaced = {one for front in fronts for one in front["dspy.optimizer.pareto_front.displaced"]}
    known = {trial["candidate.id"] for trial in trials(telemetry, "GEPA") if trial["trial.kind"] != "minibatch"}
    assert displaced
    assert displaced <= known


def test_gepa_whose_reflection_fails_says_that_there_was_no_proposal(telemetry: Any) -> None:
    class Gone(common.HashLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("no answer")

    telemetry.instrument()
    quietly(common.run_gepa_digits, calls=15, reflection_lm=Gone("embedded/gone", cache=False))
    reflections = telemetry.named("reflect")
    assert reflections
    assert {span.attributes["dspy.trial.reason"] for span in reflections} == {"no_proposal"}
    assert {trial["trial.kind"] for trial in trials(telemetry, "GEPA")} == {"baseline", "sample"}


def without_callbacks(monkeypatch: pytest.MonkeyPatch) -> str:
    """As before GEPA 0.0.27: an argument that it does not take would end the compile."""
    monkeypatch.setattr("dspy_otel.optimizers.trackers.gepa._takes", lambda function, name: False)
    return "this GEPA knows no callbacks"


def not_to_be_replaced(monkeypatch: pytest.MonkeyPatch) -> str:
    class Gepa(types.ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "optimize":
                raise AttributeError(name)
            super().__setattr__(name, value)

    monkeypatch.setattr(sys.modules["gepa"], "__class__", Gepa)
    return "cannot replace gepa.optimize"


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("silence", [without_callbacks, not_to_be_replaced])
def test_a_gepa_that_tells_nothing_runs_and_its_candidates_are_told(
    telemetry: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, silence: Any, seed: int
) -> None:
    import gepa  # noqa: F401

    said = silence(monkeypatch)
    program, _, found = run(telemetry, "GEPA", seed=seed)
    assert [record.getMessage() for record in caplog.records if record.name == "dspy_otel"] == [
        f"dspy-otel: {said}; telemetry lacks GEPA's verdicts, parents and reflections"
    ]
    results = program.detailed_results
    whole = [trial for trial in found if trial["trial.kind"] in ("baseline", "full")]
    assert [trial["trial.score"] for trial in whole] == results.val_aggregate_scores
    assert [trial["candidate.id"] for trial in whole] == [program_id(candidate) for candidate in results.candidates]
    assert {trial["trial.kind"] for trial in found} == {"baseline", "full", "minibatch"}
    about = compile_span(telemetry, "GEPA").attributes
    assert about["dspy.optimizer.best_score"] == max(results.val_aggregate_scores)


def test_two_trials_of_the_same_fields_are_two() -> None:
    """Those that wait for a verdict are looked up in a list."""
    one, other = Trial("minibatch"), Trial("minibatch")
    waiting = [one, other]
    waiting.remove(other)
    assert waiting[0] is one


def test_whether_gepa_takes_callbacks_is_read_from_its_signature() -> None:
    from dspy_otel.optimizers.trackers.gepa import _takes

    assert _takes(lambda callbacks=None: None, "callbacks")
    assert _takes(lambda **anything: None, "callbacks")
    assert not _takes(lambda seed_candidate, trainset: None, "callbacks")


@pytest.mark.parametrize("side_by_side", [False, True])
def test_gepa_merges_and_side_by_side_proposals(telemetry: Any, side_by_side: bool) -> None:
    pytest.importorskip("gepa.strategies.proposal_sampling", reason="GEPA before 0.1 has no such strategy")
    from gepa.strategies.proposal_sampling import IndependentSampling

    options = {"gepa_kwargs": {"sampling_strategy": IndependentSampling(2)}} if side_by_side else {}
    telemetry.instrument()
    program, optimizer = quietly(common.run_gepa_digits, **options)
    found = trials(telemetry, "GEPA")
    results = program.detailed_results
    ids = [program_id(candidate) for candidate in results.candidates]
    full = [trial for trial in found if trial["trial.kind"] in ("baseline", "full")]
    # Side by side, evaluations begin in any order; candidates are numbered in GEPA's.
    full.sort(key=lambda trial: trial["trial.params.candidate_index"])
    assert [trial["trial.score"] for trial in full] == results.val_aggregate_scores
    assert [trial["candidate.id"] for trial in full] == ids
    for trial, parents in zip(full, results.parents, strict=True):
        assert list(trial.get("candidate.parent_ids", ())) == [ids[one] for one in parents if one is not None]
    merges = [trial for trial in found if trial["optimizer.phase"] == "merge"]
    assert any(len(trial["candidate.parent_ids"]) == 2 for trial in merges)
    proposed = [trial for trial in found if trial["trial.kind"] == "minibatch"]
    assert all("trial.accepted" in trial for trial in proposed)
    assert sum(trial["trial.accepted"] for trial in proposed) == len(results.candidates) - 1
    for trial in proposed:
        if trial["optimizer.phase"] != "merge":
            better = trial["trial.score_after"] > trial["trial.score_before"]
            assert trial["trial.accepted"] == better or "Duplicate" in trial["trial.reason"]
    assert compile_span(telemetry, "GEPA").attributes["dspy.optimizer.examples.evaluated"] == results.total_metric_calls
    assert optimizer.gepa_kwargs == options.get("gepa_kwargs", {})


def test_better_together_trials_are_its_candidates(telemetry: Any) -> None:
    program, _, found = run(telemetry, "BetterTogether")
    assert sorted((trial["trial.params.strategy"], trial["trial.score.reported"]) for trial in found) == sorted(
        (entry["strategy"], entry["score"]) for entry in program.candidate_programs
    )
    assert [trial.get("trial.params.optimizer") for trial in found] == [
        None,
        "BootstrapFewShotWithRandomSearch",
        "LabeledFewShot",
    ]
    assert list(found[2]["candidate.parent_ids"]) == [found[1]["candidate.id"]]


def test_infer_rules_and_optuna_trials(telemetry: Any) -> None:
    lm = scripted_lm()
    telemetry.instrument()
    studies = []
    import optuna

    created = optuna.create_study

    def keep(*args: Any, **kwargs: Any) -> Any:
        studies.append(created(*args, **kwargs))
        return studies[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna, "create_study", keep)
        quietly(common.run_optuna, lm)
    found = trials(telemetry, "BootstrapFewShotWithOptuna")
    assert [trial["trial.score.reported"] for trial in found] == [trial.value for trial in studies[0].trials]
    for trial, own in zip(found, studies[0].trials, strict=True):
        assert {key: trial[f"trial.params.{key}"] for key in own.params} == own.params

    quietly(common.run_infer_rules, lm)
    found = trials(telemetry, "InferRules")
    assert [trial["trial.params.candidate"] for trial in found] == [0, 1]
    span = compile_span(telemetry, "InferRules")
    assert span.attributes["dspy.optimizer.best_score"] == max(trial["trial.score"] for trial in found)
    names = [child.name for child in telemetry.children(span)]
    assert names.count("bootstrap") == 1
    assert names.count("propose") == 4  # two predictors, two candidates
    assert names.count("trial") == 2


@pytest.mark.parametrize("name", sorted(common.RUNS))
def test_the_winner_is_known(telemetry: Any, name: str) -> None:
    program, _, found = run(telemetry, name)
    attributes = compile_span(telemetry, name).attributes
    assert attributes["dspy.program.id"] == program_id(program)
    winner = next(trial for trial in found if trial["trial.number"] == attributes["dspy.optimizer.winner.trial"])
    assert winner["candidate.id"] == program_id(program)
    if name == "InferRules":
        # Its candidates share their signatures: the program it returns has the rules of the last one.
        assert winner == found[-1]
    else:
        assert winner["trial.score"] == attributes["dspy.optimizer.best_score"]
    assert [trial["trial.number"] for trial in found] == list(range(1, len(found) + 1))
    if "dspy.optimizer.baseline_score" in attributes:
        gain = attributes["dspy.optimizer.best_score"] - attributes["dspy.optimizer.baseline_score"]
        assert attributes["dspy.optimizer.gain"] == pytest.approx(gain)
    best = [trial for trial in found if trial["trial.is_best"]]
    assert best[-1]["trial.score"] == attributes["dspy.optimizer.best_score"]
