"""However a program ends, MLflow gets what it recorded: at once, by ``replay``, or by the next program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from dspy_otel.mlflow.replay import replay
from tests.support.fault_proxy import FaultProxy
from tests.support.mlflow_store import Store
from tests.support.nightly import at_night
from tests.support.waiting import wait_for, wait_for_exit

MlflowException = pytest.importorskip("mlflow").MlflowException
pytestmark = pytest.mark.integration

CALLS = """
    import sys, time
    import dspy, dspy_otel
    from tests.optimizers.common import scripted_lm, ColourFamily, load_examples
    dspy_otel.configure(capture_content="span_only")
    from opentelemetry import trace
    from dspy_otel.mlflow.exporter import exporters_of
    def wait_for_journal():
        (exporter,) = exporters_of(trace.get_tracer_provider())
        while exporter.processor._queue:
            time.sleep(0.05)
        with exporter.processor._recording:
            pass
    scripted_lm()
    program = ColourFamily()
    for example in load_examples("train", 20):
        program(**example.inputs())
    print("called", flush=True)
    {then}
"""
COMPILE = """
    import io, sys, time
    import dspy, dspy_otel
    from tests.optimizers.common import scripted_lm, ColourFamily, load_examples, same_family
    dspy_otel.configure(capture_content="span_only")
    from opentelemetry import trace
    from dspy_otel.mlflow.exporter import exporters_of
    def wait_for_journal():
        (exporter,) = exporters_of(trace.get_tracer_provider())
        while exporter.processor._queue:
            time.sleep(0.05)
        with exporter.processor._recording:
            pass
    scripted_lm()
    seen = 0
    stdout, sys.stdout = sys.stdout, io.StringIO()  # the optimizer prints
    def metric(example, prediction, trace=None):
        global seen
        seen += trace is None  # else an example is tried for a demonstration, and has no score
        if seen == 20:
            wait_for_journal()  # what is not in it is lost
            print("there", file=stdout, flush=True)
            time.sleep(600)
        return same_family(example, prediction)
    optimizer = dspy.BootstrapFewShotWithRandomSearch(metric=metric, num_candidate_programs=2, num_threads=1)
    optimizer.compile(ColourFamily(), trainset=load_examples("train", 6), valset=load_examples("val", 6))
"""


def start(directory: Path, text: str, uri: str, experiment: str, **more: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "OTEL_"))}
    environment = {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")]),
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_EXPERIMENT_NAME": experiment,
        "OTEL_TRACES_EXPORTER": "mlflow",
        "OTEL_DSPY_SPOOL": str(directory / "spool"),
        **more,
    }
    script = directory / f"program{len(list(directory.glob('program*')))}.py"
    script.write_text(textwrap.dedent(text))
    return subprocess.Popen(
        [sys.executable, str(script)],
        cwd=directory,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=script.with_suffix(".err").open("w"),
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def found(uri: str, experiment: str) -> tuple[int, int, list[str]]:
    """Traces, scored traces, and the states of the runs."""
    store = Store(uri, experiment)
    store.provider.shutdown()
    if store.client.get_experiment_by_name(experiment) is None:
        return 0, 0, []
    traces: list[Any] = []
    token = None
    while True:
        page = store.client.search_traces(
            locations=[store.experiment_id], max_results=200, page_token=token, include_spans=False
        )
        traces += page
        if not (token := page.token):
            break
    runs = store.client.search_runs([store.experiment_id])
    return len(traces), sum(bool(one.info.assessments) for one in traces), sorted(run.info.status for run in runs)


def test_sigterm_right_after_calls_with_the_server_there(server_uri: str, tmp_path: Path) -> None:
    process = start(tmp_path, CALLS.format(then="time.sleep(600)"), server_uri, "terminated")
    assert line(process) == "called"
    process.terminate()
    assert wait_for_exit(process, "the program") == -signal.SIGTERM
    replay([tmp_path / "spool"])  # a slow machine may need more than the few seconds
    assert found(server_uri, "terminated")[0] == 20


def test_sigterm_while_mlflow_is_away(server_uri: str, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.down()
    process = start(tmp_path, CALLS.format(then="time.sleep(600)"), proxy.url, "terminated while away")
    assert line(process) == "called"
    process.terminate()
    assert wait_for_exit(process, "the program") == -signal.SIGTERM
    assert (tmp_path / "program0.err").read_text().count("dspy-otel replay") == 1
    proxy.up()
    assert replay([tmp_path / "spool"]).left == []
    assert found(server_uri, "terminated while away")[0] == 20


def test_sigterm_while_the_program_waits_for_its_end(server_uri: str, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.delay = 3600
    process = start(tmp_path, CALLS.format(then=""), proxy.url, "terminated at its end")
    assert line(process) == "called"
    wait_for(lambda: list(tmp_path.glob("spool/*/*.pb")), "the journal", lambda: process.poll())
    process.terminate()
    assert wait_for_exit(process, "the program") == -signal.SIGTERM
    assert "dspy-otel replay" in (tmp_path / "program0.err").read_text()
    proxy.delay = 0
    assert replay([tmp_path / "spool"]).left == []
    assert found(server_uri, "terminated at its end")[0] == 20


def test_a_handler_of_the_programs_own_stays(server_uri: str, tmp_path: Path) -> None:
    setup = "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
    process = start(tmp_path, setup + textwrap.dedent(CALLS.format(then="time.sleep(600)")), server_uri, "handled")
    assert line(process) == "called"
    process.terminate()
    assert wait_for_exit(process, "the program") == 3
    assert found(server_uri, "handled")[0] == 20


@pytest.mark.parametrize(
    ("away", "by"),
    [(False, "replay"), (True, "the next program"), *at_night((True, "replay"), (False, "the next program"))],
)
def test_kill_in_a_compile(server_uri: str, proxy: FaultProxy, tmp_path: Path, away: bool, by: str) -> None:
    experiment = f"killed {away} {by}"
    if away:
        proxy.down()
    process = start(tmp_path, COMPILE, proxy.url, experiment)
    assert line(process) == "there"
    process.kill()
    wait_for_exit(process, "the program")
    if away:
        proxy.up()
    if by == "replay":
        assert replay([tmp_path / "spool"]).left == []
    else:
        following = start(tmp_path, CALLS.format(then="time.sleep(600)"), proxy.url, experiment)
        assert line(following) == "called"

        latest: list[Any] = []

        def over() -> bool:
            latest[:] = traces, _, states = found(server_uri, experiment)
            return traces >= 19 + 20 and bool(states) and "RUNNING" not in states

        # A busy server answers with errors, because it has no connection to its database left.
        wait_for(over, "recovery", lambda: list(latest), ignored=(MlflowException,), pause=1.0)
        following.kill()
        wait_for_exit(following, "the next program")
    traces, scored, states = found(server_uri, experiment)
    assert scored == 19  # the twentieth has no verdict yet
    assert traces >= 19
    assert "KILLED" in states
    assert "RUNNING" not in states
    assert replay([tmp_path / "spool"]).left == []
    assert found(server_uri, experiment)[1:] == (scored, states)


def test_ctrl_c_twice_ends_the_program_at_once_and_the_journal_has_the_rest(
    server_uri: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.delay = 3600
    process = start(tmp_path, CALLS.format(then="time.sleep(600)"), proxy.url, "twice")
    assert line(process) == "called"
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "KeyboardInterrupt" in (tmp_path / "program0.err").read_text(), "first Ctrl-C")
    process.send_signal(signal.SIGINT)
    assert wait_for_exit(process, "the program") != 0
    proxy.delay = 0
    assert replay([tmp_path / "spool"]).left == []
    assert found(server_uri, "twice")[0] == 20


@pytest.mark.parametrize(
    "end", ["raise ValueError('mine')", "sys.exit(4)", "import os; wait_for_journal(); os._exit(5)"]
)
def test_other_ends(server_uri: str, tmp_path: Path, end: str) -> None:
    process = start(tmp_path, CALLS.format(then=end), server_uri, f"end {end[:5]}")
    assert line(process) == "called"
    assert wait_for_exit(process, "the program") in (1, 4, 5)
    replay([tmp_path / "spool"])
    assert found(server_uri, f"end {end[:5]}")[0] == 20


def test_forked_children_write_their_own(server_uri: str, tmp_path: Path) -> None:
    fork = """
        import os
        children = []
        for number in range(3):
            child = os.fork()
            if not child:
                for example in load_examples("val", 5):
                    program(**example.inputs())
                from opentelemetry import trace
                trace.get_tracer_provider().shutdown()
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
    """
    process = start(tmp_path, textwrap.dedent(CALLS).format(then=textwrap.dedent(fork)), server_uri, "forked")
    assert line(process) == "called"
    assert wait_for_exit(process, "the program") == 0
    assert found(server_uri, "forked")[0] == 20 + 3 * 5


def test_kill_while_a_new_store_is_made_leaves_one_that_can_be_made(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    process = start(tmp_path, CALLS.format(then="time.sleep(600)"), uri, "made twice")
    assert line(process) == "called"
    wait_for(lambda: list(tmp_path.glob("mlflow.db*")), "the store", lambda: process.poll())
    process.kill()
    wait_for_exit(process, "the program")
    assert replay([tmp_path / "spool"]).left == []
    assert found(uri, "made twice")[0] == 20
    assert [path.name for path in tmp_path.glob("mlflow.db*")] == ["mlflow.db"]
