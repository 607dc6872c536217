"""The command line: what it refuses, and one whole demo."""

from __future__ import annotations

import sqlite3
import subprocess
import sys

import pytest

from dspy_otel import cli
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


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["demo", "--optimizer", "x"]])
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
    for expected in ("One trace", "example ColourFamily", "chat colour-words", "MIPROv2", "GEPA", "best so far"):
        assert expected in done.stdout
    shown_command = "mlflow ui --backend-store-uri sqlite:///demo-mlflow/mlflow.db --workers 1 --port 5000"
    assert done.stdout.rstrip().endswith(shown_command)
    assert "Traceback" not in done.stderr
    with sqlite3.connect(tmp_path / "demo-mlflow/mlflow.db") as store:
        (traces,) = store.execute("select count(*) from trace_info").fetchone()
        (open_traces,) = store.execute("select count(*) from trace_info where status != 'OK'").fetchone()
    shown = next(line for line in done.stdout.splitlines() if line.startswith("│ all"))
    assert traces == int(shown.split("│")[2].replace(",", "")) > 100
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
