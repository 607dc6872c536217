"""Tests that older DSPy versions cannot run, or DSPy 3.5 cannot: what those lack or do otherwise, or telemetry loses.

Whatever is not in these tables is tested on every version. docs/versions.md tells users the same.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

import pytest

from tests.support import dspy35


def release(package: str) -> tuple[int, ...]:
    """The first three numbers of an installed package's version."""
    try:
        return tuple(int(part) for part in re.findall(r"\d+", version(package))[:3])
    except PackageNotFoundError:
        return ()


DSPY = dspy35.RELEASE if dspy35.WANTED else release("dspy")

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

_NO_PRICE = "DSPy 3.5 has no price for what LiteLLM's engine answers"
_GRPO = "it is not known what GRPO of DSPy 3.5 trains with; the shim has it as it was"
_REFUSED = "DSPy 3.5 refuses what no request can carry, before any call"
# (part of the test's id, first DSPy version that cannot run it, why)
UNTIL: tuple[tuple[str, tuple[int, ...], str], ...] = (
    ("test_code_act", (3, 5), "DSPy 3.5 has no CodeAct"),
    ("test_text_completion", (3, 5), "it is not known how DSPy 3.5 completes texts; the shim cannot"),
    ("test_a_priced_model_on_loopback_says_so[litellm]", (3, 5), _NO_PRICE),
    ("test_cache_hit_bills_nothing[litellm]", (3, 5), _NO_PRICE),
    ("test_totals_of_a_program_leave_cached_calls_out[litellm]", (3, 5), _NO_PRICE),
    ("test_what_a_server_counts_in_a_stream_is_its_usage[litellm]", (3, 5), _NO_PRICE),
    (
        "test_what_litellm_counts_itself_is_no_usage_and_has_no_price[False]",
        (3, 5),
        "DSPy 3.5 asks for the usage of every stream",
    ),
    ("test_usage_that_the_lm_itself_asks_for_is_usage", (3, 5), "DSPy 3.5 asks for the usage of every stream"),
    ("test_grpo", (3, 5), _GRPO),
    ("more_is_trained[GRPO", (3, 5), _GRPO),
    ("test_the_optimizer_itself[GRPO]", (3, 5), _GRPO),
    ("test_efforts_and_rollouts_are_no_way_out_either", (3, 5), _REFUSED),
)


def skip_what_is_newer(items: list[pytest.Item]) -> None:
    """Mark the tests of the tables that this DSPy cannot run."""
    for item in items:
        for part, first, why in TABLE:
            if first > DSPY and part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=why))
        for part, until, why in UNTIL:
            if until <= DSPY and part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=why))
