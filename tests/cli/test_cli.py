"""The command line: what it refuses, and one whole demo."""

from __future__ import annotations

import io
import os
import socket
import sqlite3
import subprocess
import sys

import pytest

from dspy_otel import cli
from dspy_otel.cli import ui
from dspy_otel.cli.working import working
from dspy_otel.record.model import Optimization
from tests.support.waiting import run


def test_missing_packages_are_one_clear_error(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in {"mlflow", "rich"} else object())
    assert cli.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "mlflow, rich" in error
    assert "pip install 'dspy-otel[demo]'" in error


def test_a_missing_parent_package_counts_as_missing(monkeypatch):
    assert cli._installed("no_such_package.child") is False
    assert cli._installed("json.decoder") is True


@pytest.mark.parametrize(("model", "key"), [("openai/gpt-4o-mini", "OPENAI_API_KEY"), ("gemini/x", "GOOGLE_API_KEY")])
def test_a_missing_key_stops_before_any_work(monkeypatch, capsys, tmp_path, model, key):
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "_installed", lambda module: True)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--model", model]) == 2
    assert key in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "reason"),
    [("http://127.0.0.1:9", "cannot be reached"), ("file:///tmp", "cannot take OpenTelemetry traces")],
)
def test_a_place_that_cannot_be_written_to_ends_the_demo_before_any_work(monkeypatch, capsys, tmp_path, uri, reason):
    pytest.importorskip("rich")
    monkeypatch.setattr(cli, "_installed", lambda module: True)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--tracking-uri", uri]) == 2
    assert reason in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_alone_it_helps(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in ("demo", "replay", "report", "compare", "ui", "runs", "show"))


@pytest.mark.parametrize("arguments", [["nonsense"], ["demo", "--optimizer", "x"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: dspy-otel" in capsys.readouterr().err


def test_the_command_line_itself_loads_nothing_heavy():
    code = "import sys, dspy_otel.cli; print([m for m in ('dspy', 'mlflow', 'rich', 'optuna') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_quick_demo_records_into_mlflow(tmp_path):
    pytest.importorskip("mlflow")
    command = [sys.executable, "-m", "dspy_otel.cli", "demo", "--quick"]
    done = run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("0.70 → 0.90", "Trials that matter", "MIPROv2", "GEPA", "- describe: Say which", "+ describe: "):
        assert expected in done.stdout
    assert done.stdout.rstrip().endswith("dspy-otel ui --tracking-uri sqlite:///demo-mlflow/mlflow.db")
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines[:-1])) <= 80  # the last one is a command, as long as the path of this environment
    with sqlite3.connect(tmp_path / "demo-mlflow/mlflow.db") as store:
        (traces,) = store.execute("select count(*) from trace_info").fetchone()
        (open_traces,) = store.execute("select count(*) from trace_info where status != 'OK'").fetchone()
    assert traces > 100
    assert open_traces == 0


@pytest.mark.slow
def test_a_model_that_does_not_answer_is_one_clear_error(tmp_path):
    pytest.importorskip("mlflow")
    command = [sys.executable, "-m", "dspy_otel.cli", "demo", "--model", "no-such-provider/model"]
    done = run(command, cwd=tmp_path)
    assert done.returncode == 1
    assert "The model gave no answer" in done.stdout
    assert "Traceback" not in done.stderr


def test_ui_opens_the_store_of_the_environment(monkeypatch, capsys, tmp_path):
    pytest.importorskip("mlflow")
    started = []
    monkeypatch.setattr(subprocess, "call", lambda command, env: started.append((command, env)) or 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert cli.main(["ui"]) == 1
    assert "run your program first" in capsys.readouterr().err
    (tmp_path / "mlflow.db").touch()
    assert cli.main(["ui", "--port", "5011"]) == 0
    assert "http://127.0.0.1:5011" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hidden@db/mlflow")
    assert cli.main(["ui"]) == 0
    (first, at_first), (second, at_second) = started
    assert at_first["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert at_second["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:hidden@db/mlflow"
    assert first[1:4] == second[1:4] == ["-m", "mlflow", "server"]
    assert "hidden" not in str(second) + capsys.readouterr().out


def test_ui_of_a_server_is_its_address(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hidden@host:5000/")
    assert cli.main(["ui"]) == 0
    assert capsys.readouterr().out == "http://host:5000\n"
    assert cli.main(["ui", "--tracking-uri", "file:///tmp"]) == 1
    assert "cannot take OpenTelemetry traces" in capsys.readouterr().err


def test_ui_says_that_its_port_is_in_use(capsys, tmp_path):
    pytest.importorskip("mlflow")
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["ui", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db", "--port", str(port)]) == 1
    assert f"port {port} is in use here" in capsys.readouterr().err


def test_a_demo_can_open_what_it_made(monkeypatch, capsys):
    pytest.importorskip("requests", reason="needs the extra mlflow")
    opened = []
    monkeypatch.setattr(ui.webbrowser, "open", opened.append)
    assert ui.open_ui("http://me:hidden@host:5000/") == 0
    assert opened == ["http://host:5000"]
    assert "hidden" not in capsys.readouterr().out


# --- every wrong input ------------------------------------------------------------------------------------------------
AWAY = "http://127.0.0.1:9"
FILES = {
    "missing.json": None,
    "empty.json": b"",
    "text.json": b"hello\n",
    "other.json": b'{"a": 1}\n',
    "bytes.json": b"\xff\xfe",
}
COMMANDS = {
    "report": ["report", "--spans", "{}"],
    "runs": ["runs", "{}"],
    "show": ["show", "{}"],
    "compare A": ["compare", "{}", "b"],
    "compare B": ["compare", "a", "{}#best"],
    "replay": ["replay", "{}", "--to", AWAY],
}
SAID = {
    "missing.json": "name a file that exists",
    "empty.json": "is empty: nothing has been written to it yet",
    "text.json": "is no file of OTLP JSON: name one that a Collector has written",
    "other.json": "is no file of OTLP JSON: name one that a Collector has written",
    "bytes.json": "is no file of OTLP JSON: name one that a Collector has written",
    "directory": "is a directory: name a file of OTLP JSON in it",
}


def refused(arguments, capsys) -> str:
    """The one sentence on stderr of a command that cannot be done."""
    try:
        status = cli.main(arguments)
    except SystemExit as stop:  # argparse's
        status = stop.code
    output, error = capsys.readouterr()
    assert status not in (0, None), (arguments, output, error)
    line = error.strip().splitlines()[-1]
    assert line.startswith("dspy-otel"), line
    assert "Traceback" not in error
    assert "Errno" not in error
    return line


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", SAID)
def test_a_file_that_cannot_be_used(monkeypatch, capsys, tmp_path, command, name):
    if (command, name) in {("replay", "directory"), ("replay", "bytes.json")}:
        pytest.skip("replay takes directories, and protobuf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    if FILES.get(name) is not None:
        (tmp_path / name).write_bytes(FILES[name])
    line = refused([part.replace("{}", name) for part in COMMANDS[command]], capsys)
    assert SAID[name] in line
    assert name in line


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", lambda: 0)() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(capsys, tmp_path):
    path = tmp_path / "secret.json"
    path.write_text("{}")
    path.chmod(0)
    assert "you have no permission to" in refused(["runs", str(path)], capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report"], "run your program first"),
        (["report", "nothing"], "run your program first"),
        (["runs"], "run your program first"),
        (["show", "nothing"], "run your program first"),
        (["compare", "a", "b"], "run your program first"),
        (["ui"], "run your program first"),
        (["promote", "nothing", "--alias", "production"], "run your program first"),
        (["promote", "nothing", "--alias", "latest"], "'latest' cannot be an alias"),
        (["promote", "nothing", "--alias", "a b"], "'a b' cannot be an alias"),
        (["watch", "--port", "70000"], "use a number from 1 to 65535"),
        (["promote", "nothing"], "the following arguments are required: --alias"),
        (["promote", "a", "--alias", "b", "--tracking-uri", AWAY], "is the server running"),
        (["watch", "--port", "x"], "use a number from 1 to 65535, not x"),
        (["report", "--tracking-uri", AWAY], "is the server running"),
        (["runs", "--tracking-uri", AWAY], "is the server running"),
        (["show", "a", "--tracking-uri", AWAY], "is the server running"),
        (["compare", "a", "b", "--tracking-uri", AWAY], "is the server running"),
        (["report", "--tracking-uri", "file:///tmp"], "Use a SQL store"),
        (["runs", "--tracking-uri", "file:///tmp"], "Use a SQL store"),
        (["ui", "--tracking-uri", "nonsense://x"], "is not supported: use http(s)://"),
        (["ui", "--port", "0"], "use a number from 1 to 65535"),
        (["compare", "a", "b", "--alpha", "7"], "use a number above 0 and at most 1"),
        (["compare", "a", "b", "--max-drop", "x"], "invalid float value"),
        (["compare", "a"], "the following arguments are required: B"),
        (["show"], "the following arguments are required: RUN"),
        (["runs", "--format", "xml"], "invalid choice: 'xml'"),
        (["replay", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_what_cannot_be_found_or_reached_or_understood(monkeypatch, capsys, tmp_path, arguments, said):
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    assert said in refused(arguments, capsys)


@pytest.mark.slow
def test_an_unknown_run_of_a_store_that_is_there(capsys, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.MlflowClient(store).create_experiment("mine")
    for arguments in (["report", "nothing"], ["show", "nothing"], ["compare", "nothing", "neither"]):
        assert "nothing" in refused([*arguments, "--tracking-uri", store], capsys)
    assert "optimization" in refused(["report", "--experiment", "mine", "--tracking-uri", store], capsys)
    assert "'other'" in refused(["runs", "--experiment", "other", "--tracking-uri", store], capsys)


def test_a_store_without_mlflow_says_what_to_install(monkeypatch, capsys, tmp_path):
    pytest.importorskip("requests", reason="needs the extra mlflow")
    (tmp_path / "mlflow.db").touch()
    monkeypatch.setitem(sys.modules, "mlflow", None)
    place = ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    for arguments in (["report"], ["runs"], ["show", "a"], ["compare", "a", "b"]):
        assert "pip install" in refused([*arguments, *place], capsys)


def test_a_report_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli.report, "_of_spans", lambda options: ("a", Optimization(), None))
    spans = tmp_path / "spans.json"
    spans.write_text('{"resourceSpans": []}\n')
    line = refused(["report", "--spans", str(spans), "-o", str(tmp_path)], capsys)
    assert "cannot be written (Is a directory): name another file with -o" in line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_long_work_is_seen_on_a_terminal_and_nowhere_else(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with working("reading MLflow"):
        pass
    assert "reading MLflow 0 s" in screen.getvalue()
    assert screen.getvalue().endswith("\r\x1b[2K")
    elsewhere = io.StringIO()
    monkeypatch.setattr(sys, "stderr", elsewhere)
    with working("reading MLflow"):
        pass
    assert elsewhere.getvalue() == ""
