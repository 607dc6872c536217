"""The files in `collector/` hold together: streams, the content guard's lists, dashboards, compose. No server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from collector.grafana.make_dashboards import DIRECTORY, dashboards, text

from tests.collector.stack import COLLECTOR, CONFIG, ROOT

FILES = sorted(path for folder in (CONFIG, COLLECTOR / "scale") for path in folder.glob("*.yaml"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def documented_attributes() -> dict[str, bool]:
    """Every attribute in docs/semantic-conventions.md, and whether it is marked as content."""
    found = {}
    for line in lines_of("## Attributes", "## Span events"):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| `"):
            continue
        names = re.findall(r"`([a-z_.]+\.[a-z_.]+)`", cells[0])
        if len(cells) >= 3 and names:
            found |= {name: "*content*" in " ".join(cells[1:3]) for name in names}
    # Of events: all in one cell, *content* in brackets behind the name.
    events = "\n".join(line.rsplit("|", 2)[1] for line in lines_of("## Span events", "## Metrics") if line[:3] == "| `")
    for name, content in re.findall(r"`((?:dspy|gen_ai)\.[a-z_.]+)`( \(\*content\*)?", events):
        found[name] = found.get(name, False) or bool(content)
    return found


def lines_of(heading: str, until: str) -> list[str]:
    lines = (ROOT / "docs/semantic-conventions.md").read_text(encoding="utf-8").splitlines()
    return lines[lines.index(heading) : lines.index(until)]


def guards() -> list[Any]:
    """The two patterns of the content guard for each kind of thing."""
    guard = load(CONFIG / "content.yaml")["processors"]["transform/content"]
    statements = [s for group in guard["trace_statements"] + guard["log_statements"] for s in group["statements"]]
    found = []
    for kind in ("span", "spanevent", "log"):
        patterns = []
        for function in ("keep_matching_keys", "delete_matching_keys"):
            (statement,) = [s for s in statements if s.startswith(f"{function}({kind}.attributes,")]
            patterns.append(re.search(r'"(.*)"\)', statement).group(1).replace("\\\\", "\\"))
        found.append(pytest.param(*patterns, id=kind))
    return found


@pytest.mark.parametrize(("keep", "delete"), guards())
def test_the_content_guard_deletes_all_content_and_nothing_else(keep: str, delete: str) -> None:
    attributes = documented_attributes()
    assert sum(attributes.values()) > 25, "the page is read wrongly"
    assert len(attributes) > 120
    kept = {name for name in attributes if re.search(keep, name) and not re.search(delete, name)}
    # MIME types of what is deleted say nothing any more.
    silent = {"input.mime_type", "output.mime_type"}
    assert kept == {name for name, content in attributes.items() if not content} - silent
    for foreign in ("llm.input_messages.0.message.content", "url.full", "traceloop.entity.input", "mlflow.spanInputs"):
        assert not re.search(keep, foreign)


def test_statements_about_spans_and_about_events_are_in_groups_of_their_own() -> None:
    """Together, they would run for spans that have events only, and let all other spans pass."""
    for group in load(CONFIG / "content.yaml")["processors"]["transform/content"]["trace_statements"]:
        kinds = {re.match(r"\w+\((\w+)\.", statement).group(1) for statement in group["statements"]}
        assert len(kinds) == 1


def test_every_backend_reads_one_stream_and_queues_on_disk_without_end() -> None:
    for name in ("jaeger", "mlflow", "phoenix", "langfuse"):
        config = load(CONFIG / f"{name}.yaml")
        ((pipeline),) = config["service"]["pipelines"].values()
        assert pipeline["receivers"] in (["forward/content"], ["forward/guarded"])
        ((exporter),) = config["exporters"].values()
        assert exporter["sending_queue"]["storage"] == "file_storage"
        assert exporter["retry_on_failure"]["max_elapsed_time"] == 0
    assert load(CONFIG / "jaeger.yaml")["service"]["pipelines"]["traces/jaeger"]["receivers"] == ["forward/guarded"]


def test_only_loopback_is_listened_on_unless_told_otherwise() -> None:
    for path in (*FILES, COLLECTOR / "jaeger/jaeger.yaml"):
        for endpoint in re.findall(r"^ *endpoint: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.match(r"\$\{env:\w+:-(http://)?localhost(:\d+)?\}", endpoint), f"{path.name}: {endpoint}"


def test_compose_mounts_files_that_exist_and_takes_the_version_that_is_tested() -> None:
    compose = load(COLLECTOR / "compose.yaml")
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (COLLECTOR / source).exists(), volume
    collector = compose["services"]["collector"]
    for option in collector["command"]:
        assert (CONFIG / Path(option.replace("${SAMPLING:-keep-all}", "sampling")).name).exists()
    assert image_of(collector).endswith(":" + load(COLLECTOR / "builder-config.yaml")["dist"]["version"])


def image_of(service: dict[str, Any]) -> str:
    return str(service["build"]["args"]["IMAGE"] if "build" in service else service["image"])


def test_no_container_runs_as_root_or_from_an_image_that_changes() -> None:
    services = load(COLLECTOR / "compose.yaml")["services"]
    bases = re.findall(r"^FROM (?!\$)(\S+)", (COLLECTOR / "data.Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    for image in (*bases, *map(image_of, services.values())):
        assert re.search(r":v?\d+\.\d+\.\d+$", image), f"{image}: not a whole version"
    for name, service in services.items():
        assert int(service["user"].split(":")[0]) > 0, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), name
    for name in ("collector", "mlflow", "phoenix"):  # /data has an owner in their images only
        assert services[name]["user"] == "10001:10001"


def test_who_is_not_logged_in_to_grafana_may_only_look() -> None:
    settings = load(COLLECTOR / "compose.yaml")["services"]["grafana"]["environment"]
    assert settings["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_dashboards_are_what_their_table_says() -> None:
    assert {path.name for path in DIRECTORY.glob("*.json")} == dashboards().keys()
    for name, content in dashboards().items():
        assert (DIRECTORY / name).read_text(encoding="utf-8") == text(content), "run make_dashboards.py"


def _lost(given: Any, read: Any, place: str = "") -> set[str]:
    """Where something that was given is not what was read."""
    if isinstance(given, dict) and isinstance(read, dict):
        return {found for key, value in given.items() for found in _lost(value, read.get(key), f"{place}/{key}")}
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        pairs = enumerate(zip(given, read, strict=True))
        return {found for at, pair in pairs for found in _lost(*pair, f"{place}/{at}")}
    return set() if given == read else {place}


def test_dashboards_have_the_shape_that_grafana_reads() -> None:
    sdk = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    from grafana_foundation_sdk.cog import encoder, plugins

    plugins.register_default_plugins()  # the options of panels, and the queries of Prometheus
    for name in dashboards():
        raw = json.loads((DIRECTORY / name).read_text(encoding="utf-8"))
        read = json.loads(encoder.JSONEncoder().encode(sdk.Dashboard.from_json(raw)))
        # Of what it does not know, nothing is left. Grafana itself writes definitions of choices, beside the schema.
        assert {place for place in _lost(raw, read) if not place.endswith("/definition")} == set()
        occupied: set[tuple[int, int]] = set()
        for panel in raw["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & occupied
            assert place["x"] + place["w"] <= 24
            occupied |= cells
