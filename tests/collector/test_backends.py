"""What a real DSPy service, evaluation and two optimizations look like in real backends, behind a real Collector."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from collector.grafana.make_dashboards import dashboards

from tests.collector.conftest import Span, Stack
from tests.collector.stack import COLLECTOR, get, program, wait_for
from tests.collector.workload import CANARIES, SECRET, SESSIONS

pytestmark = pytest.mark.integration


# --- Jaeger ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def jaeger(stack: Stack) -> dict[str, dict[str, Any]]:
    """Jaeger's traces by id, once it has as many spans as were sent."""
    url = stack.url("jaeger")

    def all_there() -> Any:
        traces = get(f"{url}/api/traces", service="colours", limit=20000)["data"]
        return sum(len(trace["spans"]) for trace in traces) >= len(stack.spans) and traces

    return {trace["traceID"]: trace for trace in wait_for(all_there, "all spans in Jaeger")}


def tags(span: dict[str, Any]) -> dict[str, Any]:
    return {tag["key"]: tag["value"] for tag in span["tags"]}


def references(span: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    return [(each["traceID"], each["spanID"]) for each in span["references"] if each["refType"] == kind]


def test_jaeger_has_every_span_once_under_its_parent(stack: Stack, jaeger: dict[str, Any]) -> None:
    got = {
        (trace_id, span["spanID"]): (span["operationName"], [parent for _, parent in references(span, "CHILD_OF")])
        for trace_id, trace in jaeger.items()
        for span in trace["spans"]
    }
    assert got == {(span.trace, span.id): (span.name, [span.parent] if span.parent else []) for span in stack.spans}
    assert sum(len(trace["spans"]) for trace in jaeger.values()) == len(stack.spans)


def test_jaeger_links_examples_and_their_evaluation(jaeger: dict[str, Any]) -> None:
    spans = {(trace_id, span["spanID"]): span for trace_id, trace in jaeger.items() for span in trace["spans"]}
    examples = [key for key, span in spans.items() if span["operationName"].startswith("example ")]
    assert len(examples) > 16  # of two evaluations and all trials
    for key in examples:
        ((evaluation),) = references(spans[key], "FOLLOWS_FROM")
        assert spans[evaluation]["operationName"] == "evaluate ColourFamily"
        assert key in references(spans[evaluation], "FOLLOWS_FROM")
        assert tags(spans[key])["dspy.evaluation.id"] == tags(spans[evaluation])["dspy.evaluation.id"]


def test_jaeger_shows_lm_calls_and_the_optimization_that_made_a_program(jaeger: dict[str, Any]) -> None:
    spans = [span for trace in jaeger.values() for span in trace["spans"]]
    chat = next(found for found in map(tags, spans) if "gen_ai.usage.input_tokens" in found)
    expected = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.usage.input_tokens": 100}
    assert chat.items() >= {**expected, "gen_ai.request.model": "gpt-4o-mini", "span.kind": "client"}.items()

    for optimizer in ("MIPROv2", "GEPA"):
        compile_ = next(span for span in spans if span["operationName"] == f"compile {optimizer}")
        about = tags(compile_)
        trials = [tags(span) for span in jaeger[compile_["traceID"]]["spans"] if span["operationName"] == "trial"]
        assert len(trials) == about["dspy.optimizer.trials.done"] > 2
        winner = next(t for t in trials if t["dspy.trial.number"] == about["dspy.optimizer.winner.trial"])
        assert winner["dspy.candidate.id"] == about["dspy.program.id"]
    failed = [span for span in spans if tags(span).get("error") is True]
    assert [(span["operationName"], tags(span)) for span in failed if "error.type" not in tags(span)] == []
    assert {tags(span)["error.type"] for span in failed} >= {"LookupError", "dspy.utils.exceptions.AdapterParseError"}


def test_jaeger_monitor_shows_calls_errors_and_latency(stack: Stack, jaeger: dict[str, Any]) -> None:
    url, end = stack.url("jaeger"), int(stack.ended * 1000)
    period = {"endTs": end, "lookback": int((stack.ended - stack.started) * 1000), "step": 5000, "ratePer": 60000}
    about = {"service": "colours", "groupByOperation": "true", "spanKind": ["internal", "client"], **period}

    def operations(metric: str, **more: Any) -> dict[str, float]:
        found = {}
        for series in get(f"{url}/api/metrics/{metric}", **about, **more)["metrics"]:
            label = next(label["value"] for label in series["labels"] if label["name"] == "operation")
            values = [point["gaugeValue"]["doubleValue"] for point in series["metricPoints"]]
            found[label] = max((value for value in values if value != "NaN"), default=0.0)
        return found

    assert operations("calls").keys() >= {"invoke_workflow ColourFamily", "chat gpt-4o-mini", "execute_tool look_up"}
    assert 0 < operations("errors")["execute_tool look_up"] < 1
    latency = operations("latencies", quantile=0.95)
    assert 0 < latency["chat gpt-4o-mini"] < 60


# --- Prometheus ------------------------------------------------------------------------------------------------------
def chats(stack: Stack) -> list[Span]:
    return [span for span in stack.spans if span.attributes.get("gen_ai.operation.name") == "chat"]


def outermost(stack: Stack) -> list[Span]:
    """Calls of programs in production: spans of modules below no other module's."""
    spans = {(span.trace, span.id): span for span in stack.spans}

    def inside(span: Span) -> bool:
        above = spans.get((span.trace, span.parent))
        return above is not None and ("dspy.module.class" in above.attributes or inside(above))

    elsewhere = {"dspy.evaluation.id", "dspy.optimizer.run.id"}
    return [
        span
        for span in stack.spans
        if "dspy.module.class" in span.attributes and not elsewhere & span.attributes.keys() and not inside(span)
    ]


def test_prometheus_knows_tokens_cost_and_calls_to_the_last_one(stack: Stack) -> None:
    tokens: Counter[tuple[str]] = Counter()
    cost: Counter[tuple[str]] = Counter()
    for span in chats(stack):
        for kind in ("input", "output"):
            tokens[kind,] += span.attributes.get(f"gen_ai.usage.{kind}_tokens", 0)
        if span.attributes.get("dspy.program.name"):
            cost[span.attributes["dspy.program.name"],] += span.attributes.get("dspy.lm.cost", 0)
    assert stack.last("sum by (gen_ai_token_type) (gen_ai_client_token_usage_sum)", "gen_ai_token_type") == tokens
    spent = stack.last("sum by (dspy_program_name) (dspy_lm_cost_total)", "dspy_program_name")
    assert spent == pytest.approx({key: value for key, value in cost.items() if value})

    labels = ("dspy_program_name", "dspy_program_id", "error_type")
    production = Counter(
        tuple(span.attributes.get(name) for name in ("dspy.program.name", "dspy.program.id", "error.type"))
        for span in outermost(stack)
    )
    assert {(name, id_ is not None, error is not None) for name, id_, error in production} >= {
        ("ReAct", True, False),
        ("ReAct", True, True),
        ("Greeter", False, False),
    }
    assert (
        stack.last("sum by (dspy_program_name, dspy_program_id, error_type) (dspy_program_calls_total)", *labels)
        == production
    )
    events = Counter(
        (event["dspy.adapter.name"],)
        for span in stack.spans
        for event in span.events
        if event["name"] == "dspy.adapter.parse_error"
    )
    assert stack.last("sum by (dspy_adapter_name) (dspy_adapter_parse_errors_total)", "dspy_adapter_name") == events
    assert stack.last("sum(dspy_collector_spans_total)") == {(): len(stack.spans)}


def test_prometheus_knows_how_long_calls_in_production_took_and_what_they_cost(stack: Stack) -> None:
    calls = Counter((span.attributes["dspy.program.name"],) for span in outermost(stack))
    took = "sum by (dspy_program_name) (dspy_program_duration_seconds_count)"
    assert stack.last(took, "dspy_program_name") == calls
    cost: Counter[tuple[str]] = Counter()
    for span in outermost(stack):
        cost[span.attributes["dspy.program.name"],] += span.attributes.get("dspy.usage.cost", 0)
    spent = stack.last("sum by (dspy_program_name) (dspy_program_cost_total)", "dspy_program_name")
    assert spent == pytest.approx({name: value for name, value in cost.items() if value})


def test_prometheus_knows_latency_percentiles(stack: Stack) -> None:
    took = "sum by (le) (gen_ai_client_operation_duration_seconds_bucket)"
    median, most = (stack.last(f"histogram_quantile({q}, {took})")[()] for q in (0.5, 0.95))
    assert 0 < median <= most < 60


def test_prometheus_shows_the_best_score_of_a_running_optimization(stack: Stack) -> None:
    for optimizer in ("MIPROv2", "GEPA"):
        (compile_,) = [span for span in stack.spans if span.name == f"compile {optimizer}"]
        picked = f'{{dspy_optimizer_name="{optimizer}"}}'
        (best,) = stack.promql(f"max(dspy_optimizer_best_score_ratio{picked})")
        (ended,) = stack.promql(f"sum(dspy_optimizer_duration_seconds_count{picked})")
        assert best["values"][0][0] < ended["values"][0][0], "seen only when it had ended"
        assert best["values"][-1][1] == compile_.attributes["dspy.optimizer.best_score"]


def test_prometheus_knows_the_score_of_a_program_version(stack: Stack) -> None:
    last = [s for s in stack.spans if s.name.startswith("evaluate ") and "dspy.optimizer.run.id" not in s.attributes][
        -1
    ]
    query = "max by (dspy_program_id) (dspy_program_evaluation_score)"
    assert stack.last(query, "dspy_program_id") == {
        (last.attributes["dspy.program.id"],): last.attributes["dspy.evaluation.score"]
    }


def panels() -> list[Any]:
    return [
        pytest.param(target["expr"], id=f"{name.split('.')[0]}: {panel['title']} {target['refId']}")
        for name, dashboard in dashboards().items()
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]


@pytest.mark.parametrize("query", panels())
def test_every_panel_of_the_dashboards_has_data(stack: Stack, query: str) -> None:
    for variable in ("$job", "$program", "$optimizer", "$old", "$new"):
        query = query.replace(variable, ".*")
    series = stack.promql(query.replace("$__rate_interval", "20s"))
    assert series
    assert any(value for each in series for _, value in each["values"]) or " or vector(0)" in query, "nothing but zeros"


def test_the_choices_of_the_dashboards_have_values(stack: Stack) -> None:
    for dashboard in dashboards().values():
        for variable in dashboard["templating"]["list"][1:]:
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()
            values = get(f"{stack.url('prometheus')}/api/v1/label/{label}/values", **{"match[]": metric})["data"]
            assert values, variable["definition"]


def test_alert_rules_evaluate_and_their_metrics_exist(stack: Stack) -> None:
    groups = get(f"{stack.url('prometheus')}/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 15
    assert {(rule["name"], rule["health"], rule.get("lastError")) for rule in rules} == {
        (rule["name"], "ok", None) for rule in rules
    }
    # The Collector makes these two with the first span that it loses.
    unborn = {"otelcol_exporter_send_failed_spans", "otelcol_exporter_enqueue_failed_spans"}
    names = {name for rule in rules for name in re.findall(r"\b(?:dspy|gen_ai|otelcol)_\w+(?=[\[{ ])", rule["query"])}
    metrics = {name for name in names if re.search(r"_(total|count|bucket|score|size|capacity|spans)$", name)}
    assert len(metrics) > 8
    known = set(get(f"{stack.url('prometheus')}/api/v1/label/__name__/values")["data"])
    assert metrics - known <= unborn


def test_alert_rules_fire_when_they_should() -> None:
    done = subprocess.run(
        [program("promtool"), "test", "rules", COLLECTOR / "prometheus/rules_test.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- Phoenix ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def phoenix(stack: Stack) -> dict[str, dict[str, Any]]:
    """Phoenix's spans by id, once all are there."""
    url = stack.url("phoenix")

    count = 0

    def all_there() -> Any:
        nonlocal count
        found, cursor = {}, None
        while True:
            page = get(f"{url}/v1/projects/dspy/spans", limit=1000, **({"cursor": cursor} if cursor else {}))
            found |= {span["context"]["span_id"]: span for span in page["data"]}
            cursor = page["next_cursor"]
            if not cursor:
                count = len(found)
                return count >= len(stack.spans) and found

    return wait_for(all_there, "all spans in Phoenix", lambda: count)  # type: ignore[no-any-return]


def test_phoenix_has_every_span_with_its_kind_and_parent(stack: Stack, phoenix: dict[str, Any]) -> None:
    got = {id: (span["name"], span["parent_id"] or "", span["span_kind"]) for id, span in phoenix.items()}
    kinds = {span.id: span.attributes.get("openinference.span.kind", "UNKNOWN") for span in stack.spans}
    assert got == {span.id: (span.name, span.parent, kinds[span.id]) for span in stack.spans}
    assert Counter(kinds.values()).keys() >= {"LLM", "CHAIN", "TOOL", "EVALUATOR"}


def test_phoenix_shows_inputs_outputs_tokens_and_sessions(stack: Stack, phoenix: dict[str, Any]) -> None:
    root = next(span for span in phoenix.values() if span["name"] == "invoke_workflow ColourFamily")
    assert json.loads(root["attributes"]["input.value"]).keys() == {"colour_name"}
    assert json.loads(root["attributes"]["output.value"]).keys() == {"description", "reasoning", "family"}
    chat = next(span for span in phoenix.values() if "llm.token_count.prompt" in span["attributes"])
    assert (chat["name"], chat["attributes"]["llm.token_count.prompt"]) == ("chat gpt-4o-mini", 100)
    assert chat["attributes"]["llm.input_messages.1.message.role"] == "user"
    sessions = get(f"{stack.url('phoenix')}/v1/projects/dspy/sessions", limit=100)["data"]
    assert {session["session_id"] for session in sessions} == set(SESSIONS)


# --- MLflow ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def mlflow(stack: Stack) -> dict[str, Any]:
    """MLflow's traces by OpenTelemetry id, once the Collector has sent all."""
    url = stack.url("mlflow")
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=url)
    # A reader would be in the way of sqlite's one writer.
    wait_for(lambda: stack.sent("otlp_http/mlflow") >= len(stack.spans), "all spans sent to MLflow")
    found, token = {}, None
    while True:
        page = client.search_traces(locations=["0"], max_results=500, page_token=token, include_spans=True)
        found |= {trace.info.trace_id.removeprefix("tr-"): trace for trace in page}
        token = page.token
        if not token:
            return found


def test_mlflow_has_every_span_of_every_trace(stack: Stack, mlflow: dict[str, Any]) -> None:
    got = Counter((trace_id, span.name) for trace_id, trace in mlflow.items() for span in trace.data.spans)
    assert got == Counter((span.trace, span.name) for span in stack.spans)


def test_mlflow_shows_previews_tokens_and_sessions(stack: Stack, mlflow: dict[str, Any]) -> None:
    roots = {span.trace: span for span in stack.spans if not span.parent}
    calls = [mlflow[id] for id, span in roots.items() if span.name == "invoke_workflow ColourFamily"]
    assert all("colour_name" in trace.info.request_preview for trace in calls)
    assert all("family" in trace.info.response_preview for trace in calls)
    assert {trace.info.trace_metadata.get("mlflow.trace.session") for trace in calls} >= set(SESSIONS)
    for trace in calls:
        own = [span for span in chats(stack) if span.trace == trace.info.trace_id.removeprefix("tr-")]
        if spent := sum(span.attributes.get("gen_ai.usage.input_tokens", 0) for span in own):
            assert trace.info.token_usage["input_tokens"] == spent


# --- who may see what ------------------------------------------------------------------------------------------------
def test_content_reaches_only_who_may_see_it_and_secrets_reach_nobody(
    stack: Stack, jaeger: dict[str, Any], phoenix: dict[str, Any], mlflow: dict[str, Any]
) -> None:
    places = {
        "jaeger": json.dumps(jaeger).encode(),
        "prometheus": json.dumps(
            get(f"{stack.url('prometheus')}/api/v1/series", **{"match[]": '{__name__=~".+"}'})
        ).encode(),
        "mlflow": b"".join(path.read_bytes() for path in (stack.directory / "mlflow").glob("mlflow.db*")),
        "phoenix": b"".join(path.read_bytes() for path in (stack.directory / "phoenix").glob("phoenix.db*")),
        "traces": (stack.directory / "files/traces.jsonl").read_bytes(),
    }
    seen = {place: {name for name, text in CANARIES.items() if text.encode() in data} for place, data in places.items()}
    everything = set(CANARIES)
    assert seen == {
        "jaeger": set(),
        "prometheus": set(),
        "mlflow": everything,
        "phoenix": everything,
        "traces": everything,
    }
    places["logs"] = (stack.directory / "files/logs.jsonl").read_bytes()
    assert [place for place, data in places.items() if SECRET.encode() in data] == []
    # The guard keeps what says nothing: the same person is still the same value.
    users = {tags(span)["user.id"] for t in jaeger.values() for span in t["spans"] if "user.id" in tags(span)}
    assert len(users) == 1
    assert re.fullmatch(r"[0-9a-f]{64}", users.pop())


VERSION_SERIES = """
dspy_program_calls_total{job="shop", dspy_program_name="RAG", dspy_program_id="aaaa"} 0+60x20
dspy_program_calls_total{job="shop", dspy_program_name="RAG", dspy_program_id="bbbb"} 0+30x20
dspy_program_calls_total{job="shop", dspy_program_name="RAG", dspy_program_id="bbbb", error_type="E"} 0+30x20
dspy_program_calls_total{job="shop", dspy_program_name="Other", dspy_program_id="cccc"} 0+600x20
dspy_program_cost_total{job="shop", dspy_program_name="RAG", dspy_program_id="aaaa"} 0+6x20
dspy_program_cost_total{job="shop", dspy_program_name="RAG", dspy_program_id="bbbb"} 0+12x20
dspy_program_duration_seconds_bucket{job="shop", dspy_program_name="RAG", dspy_program_id="aaaa", le="1"} 0+60x20
dspy_program_duration_seconds_bucket{job="shop", dspy_program_name="RAG", dspy_program_id="aaaa", le="+Inf"} 0+60x20
dspy_program_duration_seconds_bucket{job="shop", dspy_program_name="RAG", dspy_program_id="bbbb", le="1"} 0+0x20
dspy_program_duration_seconds_bucket{job="shop", dspy_program_name="RAG", dspy_program_id="bbbb", le="2"} 0+60x20
dspy_program_duration_seconds_bucket{job="shop", dspy_program_name="RAG", dspy_program_id="bbbb", le="+Inf"} 0+60x20
dspy_program_evaluation_score{job="ci", dspy_program_name="RAG", dspy_program_id="aaaa"} 0.5x20
dspy_program_evaluation_score{job="ci", dspy_program_name="RAG", dspy_program_id="bbbb"} -0.25x20
"""


def test_the_dashboard_of_versions_sets_the_new_one_beside_the_old_one(tmp_path: Path) -> None:
    """With a job, a program and both versions chosen, each number at the top is that of its version."""
    expected = {
        "Calls": (1, 1),
        "Failed": (0, 0.5),
        "Cost of one call": (0.1, 0.2),
        "95 % answer within": (0.95, 1.95),
        "Score of the last evaluation": (0.5, -0.25),
    }
    chosen = {"$job": "shop", "$program": "RAG", "$old": "aaaa", "$new": "bbbb", "$__rate_interval": "5m"}
    cases = []
    for panel in dashboards()["versions.json"]["panels"]:
        for target, value in zip(panel["targets"], expected.get(panel["title"], ()), strict=panel["type"] == "stat"):
            query = target["expr"]
            for name, choice in chosen.items():
                query = query.replace(name, choice)
            cases.append({"expr": query, "eval_time": "15m", "exp_samples": [{"labels": "{}", "value": value}]})
    series = [line.rpartition("} ") for line in VERSION_SERIES.strip().splitlines()]
    given = [{"series": name + "}", "values": values} for name, _, values in series]
    test = {"interval": "1m", "input_series": given, "promql_expr_test": cases}
    path = tmp_path / "versions.json"  # JSON is YAML
    path.write_text(json.dumps({"rule_files": [], "tests": [test]}))
    done = subprocess.run([program("promtool"), "test", "rules", path], capture_output=True, text=True)
    assert (len(cases), done.returncode) == (10, 0), done.stdout + done.stderr
