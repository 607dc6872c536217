"""The progress display: its words, on a pseudo-terminal, in a notebook's kernel, and without either."""

from __future__ import annotations

import builtins
import dataclasses
import io
import logging
import os
import random
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from dspy_otel.optimizers.progress import display, notebook, terminal
from dspy_otel.optimizers.progress.streams import Redirection, Stream
from dspy_otel.optimizers.progress.view import View, bar_text, clock, closing, line, seconds_left, spend_text
from dspy_otel.record.addresses import Address, add_address
from tests.optimizers import common
from tests.optimizers.common import quietly, scripted_lm
from tests.support.waiting import finish

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import logging, sys
logging.basicConfig()
from tests.optimizers import common
import dspy_otel
dspy_otel.instrument()
lm = common.scripted_lm()
print("to stdout")
before = sys.stdout, sys.stderr, logging.root.handlers[0].stream, input
end = sys.argv[2] if len(sys.argv) > 2 else ""
if end:
    def fails(example, prediction, trace=None):
        if end == "asked":
            import time
            time.sleep(0.6)  # DSPy's bar is in the display by now
            print("you said", input("Your verdict? "))
            time.sleep(0.6)  # the display is drawn again
            raise KeyboardInterrupt
        logging.getLogger("mine").warning("a line of mine")
        raise KeyboardInterrupt if end == "interrupted" else SystemExit(3)
    try:
        common.dspy.BootstrapFewShot(metric=fails).compile(
            common.ColourFamily(), trainset=common.load_examples("train", 4))
    except BaseException as error:
        print(type(error).__name__)
else:
    common.RUNS[sys.argv[1]](lm)
assert before == (sys.stdout, sys.stderr, logging.root.handlers[0].stream, input)
print("done")
"""


def run(name: str, *more: str, terminal: bool, answer: str = "", **environment: str) -> tuple[str, str]:
    """What a program that optimizes writes to stdout, a pipe, and to stderr; with an answer, both to the terminal."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    import fcntl
    import termios

    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:  # without a size, DSPy's bars are empty
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, name, *more],
        cwd=ROOT,
        env={
            **{key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")},
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
            "TERM": "xterm",
            "COLUMNS": "80",
            "PYTHONIOENCODING": "utf-8",
            **environment,
        },
        stdin=theirs if answer else None,
        stdout=theirs if answer else subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # a pseudo-terminal that nobody writes to any more
            break
        if not part:
            break
        written += part
        if answer and written.endswith(b"? "):
            os.write(ours, f"{answer}\n".encode())
    stdout = finish(process).stdout
    assert process.returncode == 0, written.decode()[-2000:]
    os.close(ours)
    return stdout, written.decode()


def plain(text: str) -> list[str]:
    """The lines of a terminal, without colours and movements of the cursor."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


def screen(text: str) -> list[str]:
    """The lines that a terminal of 80 columns shows at the end of a text."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n|\r", text):
        if part == "\n" or (column == 80 and part.isprintable()):
            row, column = row + 1, 0 if column == 80 else column
            lines += [""] * (row + 1 - len(lines))
        if part == "\r":
            column = 0
        elif part.isprintable():
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
            column += 1
        elif part.endswith("A"):
            row = max(0, row - int(part[2:-1] or 1))
        elif part == "\x1b[2K":
            lines[row] = ""
    return [line.rstrip() for line in lines if line.strip()]


# What the search finds depends on how this DSPy shuffles.
FOUND = r"✓ BootstrapFewShotWithRandomSearch: (?:0\.75, \+0\.38|0\.62, \+0\.25) from 0\.38"


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("MIPROv2", r"✓ MIPROv2: 0\.88, \+0\.50 from 0\.38 · 9 trials · \$0\.0\d · 0:\d\d"),
        ("GEPA", r"✓ GEPA: 0\.\d+, \+0\.\d+ from 0\.\d+ · \d+ trials · \$0\.0\d · \d:\d\d"),
        ("RandomSearch", rf"{FOUND} .*\$0\.\d\d.*"),
    ],
)
def test_a_terminal_shows_the_run(name: str, last: str) -> None:
    pytest.importorskip("rich")
    name = {"RandomSearch": "BootstrapFewShotWithRandomSearch"}.get(name, name)
    stdout, stderr = run(name, terminal=True, OTEL_DSPY_PROGRESS="true")
    lines = plain(stderr)
    assert [text for text in lines if re.fullmatch(last, text)], lines[-5:]
    shown = [text for text in lines if text.startswith(name)]
    assert shown
    assert all(len(text) < 80 for text in shown)
    assert stdout.startswith("to stdout\n")  # a pipe gets all of it
    assert stdout.endswith("done\n")


def test_no_colour_where_none_is_asked_for() -> None:
    pytest.importorskip("rich")
    _, stderr = run("COPRO", terminal=True, OTEL_DSPY_PROGRESS="true", NO_COLOR="1")
    assert "✓ COPRO" in "".join(plain(stderr))
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", stderr)


def test_who_is_asked_sees_the_question() -> None:
    pytest.importorskip("rich")
    _, stderr = run("", "asked", terminal=True, answer="fine", OTEL_DSPY_PROGRESS="true")
    before, asked, _ = stderr.partition("Your verdict? ")
    assert screen(before + asked) == ["to stdout", "Your verdict?"]  # neither the display nor DSPy's bar
    question = plain(stderr).index("Your verdict? fine")
    after = plain(stderr)[question + 1 :]
    assert "you said fine" in after
    assert [text for text in after if text.startswith("BootstrapFewShot · bootstrap")]
    assert after[-2] == "done"
    assert sum("%|" in line for line in screen(stderr)) == 1  # as DSPy leaves it
    assert screen(stderr)[:3] == ["to stdout", "Your verdict? fine", "you said fine"]


@pytest.mark.parametrize(("end", "error"), [("interrupted", "KeyboardInterrupt"), ("exit", "SystemExit")])
def test_an_end_before_its_time_gives_the_terminal_back(end: str, error: str) -> None:
    pytest.importorskip("rich")
    stdout, stderr = run("BootstrapFewShot", end, terminal=True, OTEL_DSPY_PROGRESS="true")
    assert stdout == f"to stdout\n{error}\ndone\n"
    lines = plain(stderr)
    assert "WARNING:mine:a line of mine" in lines
    assert [text for text in lines if text.startswith("✗ BootstrapFewShot interrupted after 0 trials")]


@pytest.mark.parametrize(("terminal", "setting"), [(True, "false"), (True, "auto"), (False, "true")])
def test_it_is_quiet_when_off_and_in_a_log(terminal: bool, setting: str) -> None:
    _, stderr = run("COPRO", terminal=terminal, OTEL_DSPY_PROGRESS=setting)
    assert "COPRO" not in stderr


# --- words ------------------------------------------------------------------------------------------------------------
RUNNING = View("id", "MIPROv2", "running", "propose", 5, 9, 40, None, 5 / 9, 0.62, 0.88, 95, 0.0412, 21.0, 17.0, None)


def test_one_line_has_what_matters_at_any_width() -> None:
    assert [line(RUNNING, width) for width in (80, 60, 50, 40, 30, 20, 5)] == [
        "MIPROv2 ▇▇▇▇▁▁▁▁ 5/9 · propose · best 0.88 (from 0.62) · $0.04 · 0:17 left",
        "MIPROv2 5/9 · propose · best 0.88 (from 0.62) · 0:17 left",
        "MIPROv2 5/9 · propose · best 0.88 · 0:17 left",
        "MIPROv2 5/9 · best 0.88 · 0:17 left",
        "MIPROv2 5/9 · best 0.88",
        "MIPROv2 5/9",
        "MIPRO",
    ]
    begun = dataclasses.replace(
        RUNNING, trials=0, planned=None, share=None, best=None, baseline=None, cost=None, calls=1, left=None
    )
    assert line(begun, 80) == "MIPROv2 · propose · 1 call"
    assert line(RUNNING, 80, unicode=False).isascii()
    budget = dataclasses.replace(RUNNING, planned=None, planned_examples=90, best=0.62)
    assert line(budget, 80) == "MIPROv2 ▇▇▇▇▁▁▁▁ 40/90 examples · propose · best 0.62 · $0.04 · 0:17 left"


def test_the_line_that_stays() -> None:
    ended = dataclasses.replace(RUNNING, outcome="finished", trials=9, left=None, elapsed=61)
    assert closing(ended, 80) == "✓ MIPROv2: 0.88, +0.26 from 0.62 · 9 trials · $0.04 · 1:01"
    assert closing(ended, 40) == "✓ MIPROv2: 0.88, +0.26 from 0.62 · $0.04"
    assert "not better" in closing(dataclasses.replace(ended, best=0.62), 80)
    failed = dataclasses.replace(ended, outcome="failed", trials=5)
    assert closing(failed, 80) == "✗ MIPROv2 failed after 5 trials: 0.88, +0.26 from 0.62 · $0.04 · 1:01"
    assert closing(dataclasses.replace(ended, best=None, baseline=None), 80).startswith("✓ MIPROv2: finished · 9")


def test_numbers_for_people() -> None:
    assert seconds_left(10, None) is None
    assert seconds_left(10, 0.0) is None
    assert seconds_left(10, 0.25) == 30
    assert [clock(seconds) for seconds in (0.4, 61, 3723)] == ["0:00", "1:01", "1:02:03"]
    costs = (0.0, 0.0042, 0.009999, 3.14159, None)
    spend = [spend_text(dataclasses.replace(RUNNING, cost=cost)) for cost in costs]
    assert spend == ["$0.00", "$0.0042", "$0.01", "$3.14", "95 calls"]
    assert [bar_text(share) for share in (None, 0.0, 0.5, 1.0)] == ["", "▁▁▁▁▁▁▁▁", "▇▇▇▇▁▁▁▁", "▇▇▇▇▇▇▇▇"]


# --- what the program writes ------------------------------------------------------------------------------------------
class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_and_lines_go_above_whole() -> None:
    real, above = Screen(), []
    stream = Stream(real, above.append)
    stream.write("one\ntwo")
    assert (above, stream.pending) == (["one"], "two")
    stream.write(" and more\r\n")
    stream.write("\r 10%|#")
    stream.write("\r 20%|##")
    assert (above[1:], stream.pending) == (["two and more"], " 20%|##")
    stream.write("a log line\n")  # the bar goes on
    assert (above[2:], stream.pending) == (["a log line"], " 20%|##")
    stream.write("\r100%|##########\n")
    assert above[3:] == ["100%|##########"]
    stream.write("Continue? ")
    stream.end()
    stream.write("yes\n")
    assert real.getvalue() == "Continue? yes\n"
    assert stream.isatty()


def test_a_bar_waits_while_somebody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err, above = Screen(), Screen(), list[str]()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    redirection = Redirection(above.append)
    bar = sys.stderr
    bar.write("\r  0%|")
    sys.stdout.write("Now: ")
    redirection.pause()
    assert (sys.stdout, sys.stderr, out.getvalue(), err.getvalue()) == (out, err, "Now: ", "")
    bar.write("\r 10%|#")
    bar.write("a log line\n")
    assert err.getvalue() == "a log line\n"
    redirection.go_on()
    assert (sys.stderr is bar, redirection.pending, above) == (True, " 10%|#", [])
    bar.write("\r100%|##########\n")
    assert above == ["100%|##########"]
    redirection.end()
    assert (sys.stdout, sys.stderr) == (out, err)


def test_threads_that_print_at_once_lose_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    err = Screen()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(terminal, "_PER_SECOND", 5000)
    views = [[RUNNING], [RUNNING, RUNNING], []]
    shown = terminal.Terminal(lambda: random.choice(views))
    shown.start()

    def write(thread: int) -> None:
        for number in range(100):
            sys.stderr.write(f"thread {thread} line {number}\n")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shown.stop()
    lines = {f"thread {thread} line {number}" for thread in range(3) for number in range(100)}
    assert sorted(screen(err.getvalue().replace("\n", "\r\n"))) == sorted(lines)  # as a terminal does


def test_a_link_that_is_known_late_is_printed_then(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    err = Screen()
    monkeypatch.setattr(sys, "stderr", err)
    shown = terminal.Terminal(list)
    shown.start()
    shown.end(dataclasses.replace(RUNNING, id="late", outcome="finished"))
    shown.stop()
    before = err.getvalue()
    add_address("another", Address("s", "http://h/s"))
    add_address("late", Address("r", None, "dspy-otel ui --tracking-uri sqlite:///m.db"))
    add_address("late", Address("r", "http://h/r"))
    (line_,) = plain(err.getvalue().removeprefix(before).rstrip("\n"))
    assert line_.strip() == "MIPROv2: dspy-otel ui --tracking-uri sqlite:///m.db"


def test_a_stream_fails_as_the_one_it_stands_for(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as real:

        def above(lines: str) -> None:
            raise RuntimeError("broken")

        stream: Any = Stream(real, above)
        stream.write("passed on\n")
        for text in ("\udc80\n", b"bytes"):
            with pytest.raises((UnicodeEncodeError, TypeError)):
                stream.write(text)
        stream.end()
    assert (tmp_path / "out").read_text() == "passed on\n"


def test_handlers_and_streams_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Screen(), Screen()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    early, late = logging.StreamHandler(err), None
    logger = logging.getLogger("tests.progress")
    logger.addHandler(early)
    try:
        above: list[str] = []
        redirection = Redirection(above.append)
        late = logging.StreamHandler()  # as one that is made while the display is on
        logger.addHandler(late)
        assert early.stream is late.stream is sys.stderr is not err
        logger.warning("twice")
        redirection.end()
        assert above == ["twice", "twice"]
        assert early.stream is late.stream is sys.stderr is err
        assert sys.stdout is out
    finally:
        logger.removeHandler(early)
        if late is not None:
            logger.removeHandler(late)


# --- in this process --------------------------------------------------------------------------------------------------
def test_without_rich_there_is_one_warning(telemetry: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setitem(sys.modules, "rich.live", None)
    monkeypatch.setattr(sys, "stderr", Screen())
    lm = scripted_lm()
    telemetry.instrument(progress=True)
    with caplog.at_level(logging.WARNING, "dspy_otel"):
        for _ in range(2):
            program, _ = common.run_better_together(lm)
    assert program.candidate_programs
    assert [record.message for record in caplog.records if "rich" in record.message] == [
        "dspy-otel: the progress display needs rich; install it with: pip install 'dspy-otel[progress]'"
    ]


@pytest.mark.injects_faults
@pytest.mark.parametrize("broken", ["line", "closing", "link"])
def test_a_display_that_fails_costs_itself_only(telemetry: Any, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    pytest.importorskip("rich")

    def fails(*arguments: Any) -> str:
        raise RuntimeError("broken")

    monkeypatch.setattr(terminal, broken, fails)
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    before = sys.stdout
    lm = scripted_lm()
    telemetry.instrument(progress=True)
    program, _ = common.run_better_together(lm)
    assert program.candidate_programs
    assert "Traceback" not in screen.getvalue()
    assert (sys.stderr, sys.stdout) == (screen, before)


def test_a_run_inside_another_one_is_what_that_is_doing(telemetry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    seen: list[View] = []
    original = display.ProgressDisplay.end

    def end(self: Any, run: Any, outcome: str) -> None:
        seen.extend(self._views())
        original(self, run, outcome)

    monkeypatch.setattr(display.ProgressDisplay, "end", end)
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    lm = scripted_lm()
    telemetry.instrument(progress=True)
    common.run_better_together(lm)
    assert sys.stderr is screen
    assert {view.name for view in seen} == {"BetterTogether"}
    assert {"BootstrapFewShotWithRandomSearch", "LabeledFewShot"} <= {view.phase for view in seen}
    assert (seen[-1].trials, seen[-1].planned) == (3, 3)
    assert any(view.left is not None for view in seen)


def test_it_is_off_in_a_terminal_by_default(telemetry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    lm = scripted_lm()
    telemetry.instrument()
    quietly(common.run_random_search, lm)
    assert "RandomSearch" not in screen.getvalue()


# --- a notebook -------------------------------------------------------------------------------------------------------
class Handle:
    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def update(self, data: dict[str, str], raw: bool) -> None:
        self.shown.append(data)


class IPython:
    """What of IPython the display uses."""

    def __init__(self) -> None:
        self.handles: list[Handle] = []
        self.kernel = self

    def get_ipython(self) -> Any:
        return self

    def display(self, data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        handle = Handle()
        handle.shown.append(data)
        self.handles.append(handle)
        return handle


def test_a_notebook_shows_it_unasked_and_keeps_the_result(telemetry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = IPython()
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", shell)
    handler = next(item for item in logging.getLogger("dspy").handlers if item.name == "dspy_handler")
    filters = list(handler.filters)
    lm = scripted_lm()
    telemetry.instrument()
    quietly(common.run_random_search, lm)
    (handle,) = shell.handles
    first, last = handle.shown[0], handle.shown[-1]
    assert "start" in first["text/html"]
    assert re.search(FOUND, last["text/html"])
    assert last["text/plain"].startswith("✓ BootstrapFewShotWithRandomSearch")
    assert handler.filters == filters


def test_a_notebook_shows_a_warning_of_dspys_once() -> None:
    quiet = notebook._Quiet()

    def shown(message: str, *arguments: object, level: int = logging.WARNING, name: str = "dspy.predict") -> bool:
        return quiet.filter(logging.LogRecord(name, level, "", 0, message, arguments, None))

    assert shown("Input contains %s", "a")
    assert shown("Input contains %s", "b")
    assert not shown("Input contains %s", "a")
    assert shown("Input contains %s", "a", level=logging.ERROR)
    assert shown("Input contains %s", "a", level=logging.INFO)
    assert not shown("Step 1", level=logging.INFO, name="dspy.teleprompt.mipro")
    assert shown("no %s place", "two", "arguments")


def test_the_table_of_a_notebook_is_safe_html() -> None:
    there = dataclasses.replace(RUNNING, name="<b>", address=Address("r", 'http://h/?a="b"&c'))
    text = notebook.html(there)
    assert "<b>&lt;b&gt;</b>" in text
    assert 'href="http://h/?a=&quot;b&quot;&amp;c"' in text
    assert "width:56%" in text
    for word in ("propose", "5/9", "0.62", "0.88", "$0.04", "0:17"):
        assert f">{word}<" in text
    store = dataclasses.replace(there, address=Address("r", None, "dspy-otel ui --tracking-uri sqlite:///m.db"))
    assert "<code>dspy-otel ui --tracking-uri sqlite:///m.db</code>" in notebook.html(store)


def test_who_has_replaced_input_meanwhile_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(builtins, "input", lambda *prompt: f"answer to {prompt}")
    shown = terminal.Terminal(list)
    shown.start()
    ours = builtins.input
    monkeypatch.setattr(builtins, "input", lambda *prompt: f"mine: {ours(*prompt)}")
    assert input("a? ") == "mine: answer to ('a? ',)"
    shown.stop()
    assert input("b? ") == "mine: answer to ('b? ',)"
