"""With content off, ids of rows and digests of datasets do not tell the rows to whoever guesses them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import stat
import sys
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM

from dspy_otel.content import id_key
from dspy_otel.content.digest import digest
from dspy_otel.content.id_key import IdKey
from tests.support.spans import Recorder

NAMES = ["Ada", "Ben", "Cleo"]
ROWS = [dspy.Example(name=name, ill=True).with_inputs("name") for name in NAMES]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "dspy-otel" / "id-key"


def ids(telemetry: Recorder, **options: Any) -> list[str]:
    """Of the rows, the training set and the validation set."""
    telemetry.clear()
    telemetry.instrument(**options)
    with dspy.context(lm=DummyLM([{"ill": "True"}] * 50)):
        program = dspy.Predict("name -> ill")
        dspy.Evaluate(devset=ROWS, metric=lambda *_: 1.0, num_threads=1, display_progress=False)(program)
        dspy.LabeledFewShot(k=1).compile(program, trainset=ROWS)
    examples = sorted(telemetry.named("example"), key=lambda span: span.attributes["dspy.example.index"])
    (compiled,) = telemetry.named("compile")
    telemetry.shutdown()
    found = [str(span.attributes["dspy.example.id"]) for span in examples]
    return [*found, str(compiled.attributes["dspy.dataset.train.digest"])]


def guesses() -> set[str]:
    plain = {name: digest({"name": name, "ill": ill}) for name in [*NAMES, "Dan"] for ill in (True, False)}
    rows = [digest({"name": name, "ill": True}) for name in NAMES]
    return {*plain.values(), *rows, digest(rows)}


@pytest.mark.parametrize("mode", ["no_content", "event_only"])
def test_nobody_reads_rows_back(mode: str, telemetry: Recorder) -> None:
    found = ids(telemetry, capture_content=mode)
    assert len(set(found)) == 4
    assert all(len(each) == 16 for each in found)
    assert not set(found) & guesses()


def test_with_content_on_spans_ids_are_plain(telemetry: Recorder, state: Path) -> None:
    assert set(ids(telemetry, capture_content="span_only")) <= guesses()
    assert not state.exists()


def test_a_row_keeps_its_id_over_runs(telemetry: Recorder, state: Path) -> None:
    first = IdKey().of(digest("row"))
    assert IdKey().of(digest("row")) == first != IdKey().of(digest("other"))
    if os.name == "posix":
        assert stat.S_IMODE(state.stat().st_mode) == 0o600
        assert stat.S_IMODE(state.parent.stat().st_mode) == 0o700
    assert os.listdir(state.parent) == ["id-key"]


def test_a_team_shares_a_key(telemetry: Recorder, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = IdKey("a key of the team"), IdKey("a key of others")
    assert one.of(digest("row")) == IdKey("a key of the team").of(digest("row")) != other.of(digest("row"))
    monkeypatch.setenv("OTEL_DSPY_ID_KEY", "a key of the team")
    assert ids(telemetry)[0] == one.of(digest({"name": "Ada", "ill": True}))
    assert not state.exists()


def id_of_a_row(_: int) -> str:
    return IdKey().of(digest("row"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_processes_that_start_together_have_one_key() -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert len(set(pool.map(id_of_a_row, range(16), chunksize=1))) == 1


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize("harm", ["others read it", "a link", "cut", "no directory"])
def test_a_key_that_is_not_ours_alone_is_not_used(harm: str, state: Path, caplog: pytest.LogCaptureFixture) -> None:
    if harm == "no directory":
        state.parent.parent.write_text("a file")
    else:
        before = IdKey().of(digest("row"))
        if harm == "others read it":
            state.chmod(0o644)
        elif harm == "a link":
            state.rename(state.with_name("elsewhere"))
            state.symlink_to(state.with_name("elsewhere"))
        else:
            state.write_bytes(b"half")
        assert IdKey().of(digest("row")) != before
        caplog.clear()
    key = IdKey()
    with caplog.at_level(logging.WARNING, id_key.__name__):
        assert key.of(digest("row")) == key.of(digest("row"))
    assert [record.getMessage().count("OTEL_DSPY_ID_KEY") for record in caplog.records] == [1]
