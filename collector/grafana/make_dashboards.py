"""Write `dashboards/*.json`, the Grafana dashboards, from the tables below.

    python collector/grafana/make_dashboards.py

One entry is one panel: title, unit, width (of 24), and its queries as (PromQL, legend). A test compares the files
with what this writes, and runs every query against a Prometheus.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
HEIGHT = 8


@dataclass(frozen=True)
class Panel:
    """One panel. `kind` is a panel type of Grafana; a `stat` shows the last value."""

    title: str
    unit: str
    width: int
    queries: tuple[tuple[str, str], ...]
    about: str = ""
    kind: str = "timeseries"


def rate(metric: str, labels: str = "", by: str = "") -> str:
    """The rate of a counter for the chosen services and programs, summed."""
    picked = f'job=~"$job", dspy_program_name=~"$program"{", " + labels if labels else ""}'
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{picked}}}[$__rate_interval]))"


def share(part: str, whole: str) -> str:
    """One as a share of the other."""
    return f"{part} / {whole}"


def legend(*labels: str) -> str:
    """The labels that tell the lines of a panel apart."""
    return " ".join(f"{{{{{label}}}}}" for label in labels)


def quantile(share: float, metric: str, by: str = "", labels: str = "") -> str:
    """A quantile of a histogram for the chosen services and programs."""
    return f"histogram_quantile({share}, {rate(metric + '_bucket', labels, by + ', le' if by else 'le')})"


CALLS, COST = "dspy_program_calls_total", "dspy_lm_cost_total"
SPENT_ON, TAKEN = "dspy_program_cost_total", "dspy_program_duration_seconds"
LM, TOKENS = "gen_ai_client_operation_duration_seconds", "gen_ai_client_token_usage_sum"
MODULE, TOOL = "dspy_module_duration_seconds", "gen_ai_execute_tool_duration_seconds"
FIRST_CHUNK, HITS = "gen_ai_client_operation_time_to_first_chunk_seconds", "dspy_lm_cache_hits_total"
INSIDE, FAILED = 'dspy_module_path!=""', 'error_type!=""'
NAME, PATH, ERROR, MODEL = "dspy_program_name", "dspy_module_path", "error_type", "gen_ai_request_model"
VERSION = f"{NAME}, dspy_program_id"
PARSE_ERRORS = 'sum by (job, dspy_adapter_name) (rate(dspy_adapter_parse_errors_total{job=~"$job"}[$__rate_interval]))'
LAST_SCORE = (
    f"max by ({VERSION}, dspy_evaluation_metric_name)"
    f' (last_over_time(dspy_program_evaluation_score{{{NAME}=~"$program"}}[1d]))'
)
"""Of any job: programs are evaluated in other places than they serve in."""

PRODUCTION = (
    Panel("Calls", "reqps", 4, ((rate(CALLS), ""),), "Without evaluations and optimizations.", "stat"),
    Panel("Failed", "percentunit", 4, ((share(f"({rate(CALLS, FAILED)} or vector(0))", rate(CALLS)), ""),), "", "stat"),
    Panel("95 % answer within", "s", 4, ((quantile(0.95, TAKEN), ""),), "", "stat"),
    Panel("Cost per hour", "currencyUSD", 4, ((f"{rate(COST)} * 3600", ""),), "", "stat"),
    Panel("Tokens per second", "short", 4, ((rate(TOKENS), ""),), "", "stat"),
    Panel(
        "From the cache",
        "percentunit",
        4,
        ((share(rate(HITS), f"({rate(HITS)} + {rate(LM + '_count')})"), ""),),
        kind="stat",
    ),
    Panel("Calls by program", "reqps", 12, ((rate(CALLS, by=NAME), legend(NAME)),)),
    Panel(
        "Failed, by program and exception",
        "percentunit",
        12,
        (
            (
                share(rate(CALLS, FAILED, f"{NAME}, {ERROR}"), f"on ({NAME}) group_left {rate(CALLS, by=NAME)}"),
                legend(NAME, ERROR),
            ),
        ),
    ),
    Panel(
        "Duration by program",
        "s",
        12,
        tuple((quantile(q, TAKEN, NAME), f"{legend(NAME)} {q:.0%}") for q in (0.5, 0.95, 0.99)),
    ),
    Panel(
        "Slowest predictors (95 %)",
        "s",
        12,
        ((f"topk(10, {quantile(0.95, MODULE, f'{NAME}, {PATH}', INSIDE)})", legend(NAME, PATH)),),
    ),
    Panel(
        "Failures by predictor",
        "reqps",
        12,
        ((rate(MODULE + "_count", f"{FAILED}, {INSIDE}", f"{NAME}, {PATH}, {ERROR}"), legend(NAME, PATH, ERROR)),),
    ),
    Panel(
        "Answers that could not be parsed",
        "reqps",
        12,
        ((PARSE_ERRORS, legend("job", "dspy_adapter_name")),),
        "Also those that a fallback then could read, at the price of another call.",
    ),
    Panel(
        "LM calls by model",
        "reqps",
        8,
        ((rate(LM + "_count", by=MODEL), legend(MODEL)),),
        "Answers from the cache are not among them.",
    ),
    Panel(
        "Duration of LM calls",
        "s",
        8,
        tuple((quantile(q, LM, MODEL), f"{legend(MODEL)} {q:.0%}") for q in (0.5, 0.95)),
    ),
    Panel("First chunk of streamed answers (95 %)", "s", 8, ((quantile(0.95, FIRST_CHUNK, MODEL), legend(MODEL)),)),
    Panel(
        "Failed LM calls",
        "reqps",
        12,
        ((rate(LM + "_count", FAILED, f"{MODEL}, {ERROR}"), legend(MODEL, ERROR)),),
    ),
    Panel(
        "Retries of LM calls",
        "reqps",
        12,
        ((rate("dspy_lm_retries_total", by=f"{MODEL}, {ERROR}"), legend(MODEL, ERROR)),),
    ),
    Panel(
        "Tokens by program",
        "short",
        12,
        ((rate(TOKENS, by=f"{NAME}, gen_ai_token_type"), legend(NAME, "gen_ai_token_type")),),
    ),
    Panel(
        "Cost per hour by program and model",
        "currencyUSD",
        12,
        ((f"{rate(COST, by=f'{NAME}, {MODEL}')} * 3600", legend(NAME, MODEL)),),
    ),
    Panel(
        "Calls by program version",
        "reqps",
        8,
        ((rate(CALLS, by=VERSION), legend(NAME, "dspy_program_id")),),
        "What is deployed: a version is a program's instructions and demos.",
    ),
    Panel(
        "Cost of one call by program version",
        "currencyUSD",
        8,
        (
            (
                share(rate(SPENT_ON, by=VERSION), rate(CALLS, by=VERSION)),
                legend(NAME, "dspy_program_id"),
            ),
        ),
    ),
    Panel(
        "Score of the last evaluation, by program version",
        "none",
        8,
        ((LAST_SCORE, legend(NAME, "dspy_program_id", "dspy_evaluation_metric_name")),),
    ),
    Panel("Tools (95 %)", "s", 12, ((quantile(0.95, TOOL, "gen_ai_tool_name"), legend("gen_ai_tool_name")),)),
    Panel(
        "Failed tools",
        "reqps",
        12,
        ((rate(TOOL + "_count", FAILED, f"gen_ai_tool_name, {ERROR}"), legend("gen_ai_tool_name", ERROR)),),
    ),
)

PER_VERSION = legend(NAME, "dspy_program_id")
EXAMPLES = "dspy_program_example_score"
SIDES = (("old", 'dspy_program_id=~"$old"'), ("new", 'dspy_program_id=~"$new"'))
"""The two versions that are chosen at the top of the dashboard."""


def last_score(version: str) -> str:
    """The score of the last evaluation of a chosen version."""
    return f'max (last_over_time(dspy_program_evaluation_score{{{NAME}=~"$program", {version}}}[1d]))'


def mean_score(by: str) -> str:
    """The mean over all examples on which a version was evaluated."""
    picked = f'{NAME}=~"$program"'
    return share(f"sum by ({by}) ({EXAMPLES}_sum{{{picked}}})", f"sum by ({by}) ({EXAMPLES}_count{{{picked}}})")


VERSIONS = (
    Panel("Calls", "reqps", 4, tuple((rate(CALLS, version), side) for side, version in SIDES), kind="stat"),
    Panel(
        "Failed",
        "percentunit",
        5,
        tuple(
            (share(f"({rate(CALLS, f'{FAILED}, {version}')} or vector(0))", rate(CALLS, version)), side)
            for side, version in SIDES
        ),
        kind="stat",
    ),
    Panel(
        "Cost of one call",
        "currencyUSD",
        5,
        tuple((share(rate(SPENT_ON, version), rate(CALLS, version)), side) for side, version in SIDES),
        kind="stat",
    ),
    Panel(
        "95 % answer within",
        "s",
        5,
        tuple((quantile(0.95, TAKEN, labels=version), side) for side, version in SIDES),
        kind="stat",
    ),
    Panel(
        "Score of the last evaluation",
        "none",
        5,
        tuple((last_score(version), side) for side, version in SIDES),
        "The mean of the metric. Choose a program that has one metric.",
        "stat",
    ),
    Panel("Calls by version", "reqps", 12, ((rate(CALLS, by=VERSION), PER_VERSION),), "A deployment, and a rollback."),
    Panel(
        "Failed, by version",
        "percentunit",
        12,
        ((share(rate(CALLS, FAILED, VERSION), rate(CALLS, by=VERSION)), PER_VERSION),),
    ),
    Panel(
        "Cost of one call, by version",
        "currencyUSD",
        12,
        ((share(rate(SPENT_ON, by=VERSION), rate(CALLS, by=VERSION)), PER_VERSION),),
    ),
    Panel(
        "Duration of one call, by version",
        "s",
        12,
        tuple((quantile(q, TAKEN, VERSION), f"{PER_VERSION} {q:.0%}") for q in (0.5, 0.95)),
    ),
    Panel(
        "Score of the last evaluation, by version",
        "none",
        12,
        ((LAST_SCORE, legend(NAME, "dspy_program_id", "dspy_evaluation_metric_name")),),
    ),
    Panel(
        "Mean score of examples, by version",
        "none",
        12,
        (
            (
                mean_score(f"{VERSION}, dspy_evaluation_metric_name"),
                legend(NAME, "dspy_program_id", "dspy_evaluation_metric_name"),
            ),
        ),
        "Over all evaluations of a version that the Collector has seen, without those of optimizers.",
    ),
)

OPTIMIZER, KIND, ROLE = "dspy_optimizer_name", "dspy_trial_kind", "dspy_lm_role"
TRIALS, SPENT, SCORE = "dspy_optimizer_trials_total", "dspy_optimizer_cost_total", "dspy_optimizer_trial_score"
DURATION = "dspy_optimizer_duration_seconds"
RUN = f"instance, {NAME}, {OPTIMIZER}"


def of_runs(metric: str, by: str = "", over: str = "sum") -> str:
    """A metric of the chosen optimizations, as it is."""
    picked = f'job=~"$job", {NAME}=~"$program", {OPTIMIZER}=~"$optimizer"'
    return f"{over}{f' by ({by})' if by else ''} ({metric}{{{picked}}})"


def mean(histogram: str, by: str) -> str:
    """The mean of a histogram of the chosen optimizations."""
    return share(of_runs(histogram + "_sum", by), of_runs(histogram + "_count", by))


OPTIMIZATIONS = (
    Panel(
        "Best score so far",
        "none",
        16,
        ((of_runs("dspy_optimizer_best_score_ratio", RUN, "max"), legend(OPTIMIZER, NAME)),),
        "The mean of the metric.",
    ),
    Panel(
        "Trials: done of planned",
        "percentunit",
        8,
        ((share(of_runs(TRIALS, RUN), of_runs("dspy_optimizer_trials_planned", RUN, "max")), legend(OPTIMIZER, NAME)),),
        "Of optimizers that know the number beforehand.",
        "bargauge",
    ),
    Panel("Trials", "short", 8, ((of_runs(TRIALS, f"{OPTIMIZER}, {KIND}"), legend(OPTIMIZER, KIND)),)),
    Panel("Mean score of trials", "none", 8, ((mean(SCORE, f"{OPTIMIZER}, {KIND}"), legend(OPTIMIZER, KIND)),)),
    Panel(
        "Trials by outcome",
        "short",
        8,
        ((of_runs(TRIALS, f"{OPTIMIZER}, dspy_trial_outcome"), legend(OPTIMIZER, "dspy_trial_outcome")),),
    ),
    Panel("Spent, by role", "currencyUSD", 12, ((of_runs(SPENT, f"{OPTIMIZER}, {ROLE}"), legend(OPTIMIZER, ROLE)),)),
    Panel(
        "LM calls, by role",
        "short",
        12,
        ((of_runs("dspy_optimizer_lm_calls_total", f"{OPTIMIZER}, {ROLE}"), legend(OPTIMIZER, ROLE)),),
    ),
    Panel(
        "Spent for each trial",
        "currencyUSD",
        8,
        ((share(of_runs(SPENT, OPTIMIZER), of_runs(TRIALS, OPTIMIZER)), legend(OPTIMIZER)),),
    ),
    Panel(
        "Examples evaluated", "short", 8, ((of_runs("dspy_optimizer_examples_total", OPTIMIZER), legend(OPTIMIZER)),)
    ),
    Panel(
        "Ended optimizations: mean duration",
        "s",
        8,
        (
            (
                mean(DURATION, f"{OPTIMIZER}, dspy_optimizer_outcome"),
                legend(OPTIMIZER, "dspy_optimizer_outcome"),
            ),
        ),
        kind="bargauge",
    ),
)


def variable(name: str, metric: str, label: str, several: bool = True) -> dict[str, Any]:
    """A choice at the top of a dashboard: values of a label, or one of them."""
    query = f"label_values({metric}, {label})"
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "values"},
        "refresh": 2,
        "includeAll": several,
        "multi": several,
        **({"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}} if several else {"current": {}}),
        "sort": 1,
    }


def panel(number: int, about: Panel, x: int, y: int) -> dict[str, Any]:
    """One panel as Grafana's JSON."""
    instant = about.kind != "timeseries"
    options: dict[str, Any] = {
        "tooltip": {"mode": "multi", "sort": "desc"},
        "legend": {"displayMode": "list", "placement": "bottom"},
    }
    if instant:
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    if about.kind == "bargauge":
        options |= {"orientation": "horizontal", "displayMode": "basic"}
    return {
        "id": number,
        "type": about.kind,
        "title": about.title,
        "description": about.about,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": about.width, "h": HEIGHT // 2 if about.kind == "stat" else HEIGHT},
        # Scores may be below zero.
        "fieldConfig": {
            "defaults": {"unit": about.unit} | ({} if about.unit == "none" else {"min": 0}),
            "overrides": [],
        },
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": DATASOURCE,
                "expr": expression,
                "legendFormat": legend or "__auto",
                "instant": instant,
                "range": not instant,
                "exemplar": not instant and "_bucket" in expression,
            }
            for place, (expression, legend) in enumerate(about.queries)
        ],
    }


def dashboard(
    uid: str, title: str, about: str, panels: tuple[Panel, ...], variables: list[dict[str, Any]]
) -> dict[str, Any]:
    """A dashboard as Grafana's JSON: panels in rows of 24 columns, in their order."""
    placed, x, y, height = [], 0, 0, 0
    for number, each in enumerate(panels, 1):
        if x + each.width > 24:
            x, y = 0, y + height
        made = panel(number, each, x, y)
        placed.append(made)
        x, height = x + each.width, made["gridPos"]["h"]
    source = {"name": "datasource", "label": "datasource", "type": "datasource", "query": "prometheus", "current": {}}
    return {
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["dspy"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [source, *variables]},
        "annotations": {"list": []},
        "panels": placed,
    }


def dashboards() -> dict[str, dict[str, Any]]:
    """File name and content of each dashboard."""
    job, program = "dspy_module_duration_seconds_count", "dspy_program_name"
    runs = "dspy_optimizer_trials_total"
    return {
        "production.json": dashboard(
            "dspy-production",
            "DSPy in production",
            "Calls, durations, failures, tokens and cost by program, predictor, model and program version.",
            PRODUCTION,
            [variable("job", job, "job"), variable("program", job, program)],
        ),
        "versions.json": dashboard(
            "dspy-versions",
            "DSPy program versions",
            "A new version of a program against the old one in production: calls, failures, cost, duration and score.",
            VERSIONS,
            [
                variable("job", CALLS, "job"),
                variable("program", CALLS, program),
                *(variable(side, CALLS, "dspy_program_id", several=False) for side, _ in SIDES),
            ],
        ),
        "optimizations.json": dashboard(
            "dspy-optimizations",
            "DSPy optimizations",
            "What running and recent compiles have reached, and what they cost.",
            OPTIMIZATIONS,
            [variable("job", runs, "job"), variable("program", runs, program), variable("optimizer", runs, OPTIMIZER)],
        ),
    }


def text(content: dict[str, Any]) -> str:
    """A dashboard as it is in its file."""
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    DIRECTORY.mkdir(exist_ok=True)
    for name, content in dashboards().items():
        (DIRECTORY / name).write_text(text(content), encoding="utf-8")
        print(DIRECTORY / name)
