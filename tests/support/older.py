"""Tests that older DSPy versions cannot run: what those lack or do otherwise, or what telemetry loses there.

Whatever is not in this table is tested on every version. docs/versions.md tells users the same.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

import pytest


def release(package: str) -> tuple[int, ...]:
    """The first three numbers of an installed package's version."""
    try:
        return tuple(int(part) for part in re.findall(r"\d+", version(package))[:3])
    except PackageNotFoundError:
        return ()


DSPY = release("dspy")

_STEPS = "DSPy before 3.2: BetterTogether takes one optimizer of prompts and one of weights"
_NO_CALLBACKS = "GEPA before 0.0.27 (DSPy before 3.2) has no callbacks"
_DUMMY = "DSPy before 3.2: DummyLM's acall calls itself, and so its overrides"
# (part of the test's id, first DSPy version that can run it, why)
TABLE: tuple[tuple[str, tuple[int, ...], str], ...] = (
    (
        "test_reasoning_and_tool_results_are_parts_of_messages",
        (3, 1),
        "DSPy 3.0 drops what an LM says of its reasoning",
    ),
    (
        "test_golden_ids.py::test_ids_of_programs",
        (3, 1),
        "DSPy 3.0 writes other prefixes of fields into a program's state",
    ),
    ("test_one_span_for_each_lm_call[OverridingLM", (3, 2), _DUMMY),
    ("test_one_span_for_each_lm_call[RetryingLM", (3, 2), _DUMMY),
    ("test_compile.py::test_nested_compiles_name_their_run_and_the_outermost", (3, 2), _STEPS),
    ("[BetterTogether", (3, 2), _STEPS),
    ("test_progress.py::test_nested_runs_are_shown_inside_and_everything_is_given_back", (3, 2), _STEPS),
    ("test_compile.py::test_an_interrupted_trial_has_no_score", (3, 2), _STEPS),
    ("test_progress.py::test_without_rich_there_is_one_warning", (3, 2), _STEPS),
    ("test_progress.py::test_a_display_that_fails_costs_itself_only", (3, 2), _STEPS),
    ("test_trials.py::test_better_together_trials_are_its_candidates", (3, 2), _STEPS),
    ("test_compile.py::test_a_candidates_state_only_behind_the_content_switch", (3, 2), _NO_CALLBACKS),
    ("test_inert.py::test_every_hook_is_taken_back", (3, 2), _NO_CALLBACKS),
    ("test_inert.py::test_a_hook_that_raises_costs_its_detail_and_one_warning", (3, 2), _NO_CALLBACKS),
    ("test_roles.py::test_lm_calls_add_up[GEPA", (3, 2), _NO_CALLBACKS),
    ("test_roles.py::test_a_trial_whose_evaluation_raises_ends_once", (3, 2), _NO_CALLBACKS),
    ("test_resume.py", (3, 2), _NO_CALLBACKS),
    ("test_cost.py", (3, 4), "DSPy before 3.4 has other hooks, and so another number of calls"),
    ("test_picture[GEPA", (3, 2), _NO_CALLBACKS),
    ("test_a_terminal_shows_the_run[GEPA", (3, 2), _NO_CALLBACKS),
    ("test_trials.py::test_gepa", (3, 2), _NO_CALLBACKS),
    ("test_roles.py::test_gepa", (3, 2), _NO_CALLBACKS),
    ("test_budgets.py::test_each_optimizer_stops[GEPA", (3, 2), _NO_CALLBACKS),
    ("test_budgets.py::test_gepa_keeps_the_callbacks_that_it_was_given", (3, 2), _NO_CALLBACKS),
    ("test_processes.py::test_a_budget_ends_an_optimization_at_the_same_place", (3, 2), _NO_CALLBACKS),
)


def skip_what_is_newer(items: list[pytest.Item]) -> None:
    """Mark the tests of the table that this DSPy cannot run."""
    for item in items:
        for part, first, why in TABLE:
            if first > DSPY and part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=why))
