"""The data set is what its script makes of the survey, and the optimizers really move the score."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import dspy
import pytest

from dspy_otel.cli.demo import run, task
from dspy_otel.cli.demo.lm import embedded_lm

ROOT = Path(__file__).parents[2]


def test_labels_follow_from_the_rgb_values():
    spec = importlib.util.spec_from_file_location("make_colours", ROOT / "examples/make_colours.py")
    make_colours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_colours)
    lines = make_colours.TARGET.read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(line for line in lines if line[0] != "#"))
    assert len(rows) == 920
    assert "CC0" in lines[0]
    for row in rows:
        assert row["family"] == make_colours.family(row["rgb"]), row
        assert not make_colours.COARSE.search(row["name"])


def test_feedback_names_the_right_family():
    example = dspy.Example(colour_name="teal", family="green")
    wrong = task.same_family_with_feedback(example, dspy.Prediction(family="blue"))
    assert (wrong.score, wrong.feedback) == (0.0, "Wrong: the family is 'green', not 'blue'.")
    assert task.same_family_with_feedback(example, dspy.Prediction(family="green")).score == 1.0
    assert task.same_family_with_feedback(example, dspy.Prediction()).score == 0.0


@pytest.fixture
def fresh():
    cache = dspy.cache
    dspy.configure_cache(enable_disk_cache=False)
    with dspy.context(lm=embedded_lm()):
        yield dspy.settings.lm
    dspy.cache = cache


def score(program):
    return dspy.Evaluate(devset=task.load_examples("val", 50), metric=task.same_family, num_threads=2)(program).score


@pytest.mark.parametrize("optimize", [run._mipro, run._gepa])
def test_optimizers_move_the_score_the_same_way_every_time(fresh, optimize):
    if optimize is run._mipro:
        pytest.importorskip("optuna")
    train, val = task.load_examples("train", 100), task.load_examples("val", 50)
    baseline = score(task.ColourFamily())
    assert 50 < baseline < 70
    programs = [optimize(task, fresh, train, val, quick=False) for _ in range(2)]
    scores = [score(program) for program in programs]
    assert scores[0] == scores[1] >= baseline + 10
    assert programs[0].dump_state() == programs[1].dump_state()
