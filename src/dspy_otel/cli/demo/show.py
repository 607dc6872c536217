"""What the demo prints: progress, and on one screen what came of it. All of it read from spans."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.progress import ProgressColumn, Task
from rich.table import Table
from rich.text import Text

from dspy_otel.cli.demo.telemetry import Recorder
from dspy_otel.cli.demo.trials import parameters
from dspy_otel.record.history import optimizations
from dspy_otel.record.model import Evaluation, Optimization, Trial, load_json

_TRIALS = 5
_LINES = 4
"""Most lines of an instruction."""
_WIDTH = 76


class NoteColumn(ProgressColumn):
    """What is behind a task's spinner: its field `note`, or while that is None the progress of its field `part`."""

    max_refresh = 0.5

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def render(self, task: Task) -> Text:
        """One line."""
        note = task.fields["note"]
        return Text(progress_line(self._recorder, task.fields["part"]) if note is None else note, style="dim")


def progress_line(recorder: Recorder, part: str) -> str:
    """How far one part of the demo has come, for the line behind its spinner."""
    totals = recorder.totals(part)
    words = [f"{totals['lm_calls']} LM calls"]
    if scores := _full_scores(recorder, part):
        count = len(recorder.evaluations(part))
        words.append(f"{count} evaluation{'s' if count > 1 else ''}")
        words.append(f"best score {max(scores):.2f}")
    return ", ".join(words)


def report(recorder: Recorder, optimizers: Sequence[str], answers: Sequence[tuple[str, str]], asked: str) -> Group:
    """What came of the optimizations, on one screen.

    Args:
        recorder: has their spans.
        optimizers: their names.
        answers: of the program to one question: when, and what.
        asked: that question.
    """
    found = [one for one in optimizations(recorder.of()) if one.optimizer in optimizers and one.parent is None]
    if not found:
        return Group()
    best = max(found, key=lambda one: (one.best or 0.0, -len(one.trials)))
    shown: list[Text | Table] = [Text(), *map(result_line, found)]
    shown.append(Text(f"{asked}: " + ", ".join(f"{answer} ({when})" for when, answer in answers)))
    return Group(*shown, Text(), trials_table(found), Text(), *changes(best))


def result_line(optimization: Optimization) -> Text:
    """Baseline to best, and what it took."""
    line = Text(f"{optimization.optimizer:<8} ", style="bold")
    baseline, best = optimization.baseline, optimization.best
    if baseline is not None and best is not None:
        line.append(f"{baseline:.2f} → {best:.2f}", style="bold green" if best > baseline else "bold")
    usage = optimization.usage
    line.append(f"   {optimization.done or len(optimization.trials)} trials", style="not bold")
    if usage.lm_calls:
        line.append(f", {usage.lm_calls:,.0f} LM calls", style="not bold")
    if usage.cost:
        line.append(f", ${usage.cost:.2f}", style="not bold")
    return line


def trials_table(found: Sequence[Optimization]) -> Table:
    """The five trials that matter: the start, each step up, and what did not help."""
    table = Table(box=None, padding=(0, 2, 0, 0), title="Trials that matter", title_justify="left", title_style="bold")
    for column, width in (("", 8), ("#", 3), ("kind", 9), ("score", 5), ("", 10), ("changed", 28)):
        side = "right" if column in ("#", "score") else "left"
        table.add_column(column, justify=side, no_wrap=True, width=width)  # type: ignore[arg-type]
    for trial in trials_that_matter([trial for one in found for trial in one.trials]):
        score = "" if trial.score is None else f"{trial.score:.2f}"
        mark = "★" if trial.is_best else "✗ rejected" if trial.accepted is False else ""
        style = "green" if trial.is_best else None
        table.add_row(trial.optimizer, str(trial.number), trial.kind, score, mark, changed(trial), style=style)
    return table


def changed(trial: Trial) -> str:
    """The predictors that set a trial's candidate apart from its parent; without content, what the optimizer chose."""
    if trial.kind == "baseline":
        return "the program as it is"
    changes = load_json(trial.changes)
    return ", ".join(changes) if isinstance(changes, dict) and changes else parameters(trial)


def trials_that_matter(trials: Sequence[Trial], count: int = _TRIALS) -> list[Trial]:
    """The baseline, the best ones, then rejected and bad ones, in the order in which they were made."""

    def rank(trial: Trial) -> tuple[int, float]:
        if trial.is_best and trial.kind != "baseline":
            return 1, -(trial.score or 0.0)
        return (2 if trial.accepted is False else 3), trial.score or 0.0

    baselines = [trial for trial in trials if trial.kind == "baseline"][:1]
    scored = [trial for trial in trials if trial.score is not None and trial.kind not in ("baseline", "sample")]
    chosen = [*baselines, *sorted(scored, key=rank)][:count]
    return [trial for trial in trials if any(trial is one for one in chosen)]


def changes(optimization: Optimization) -> list[Text]:
    """What changed in the winner: its longest new instruction against the one before, and demos."""
    before = {} if optimization.initial is None else optimization.initial.predictors
    after = {} if optimization.returned is None else optimization.returned.predictors
    lines = [Text(f"What {optimization.optimizer} changed", style="bold")]
    if not after:
        return [*lines, Text("Instructions were not recorded: that is what --no-content is for.")]
    new = {
        name: predictor.instructions or ""
        for name, predictor in after.items()
        if name not in before or predictor.instructions != before[name].instructions
    }
    if new:
        name = max(new, key=lambda name: len(new[name]))
        if name in before:
            lines.append(Text(f"- {name}: {_short(before[name].instructions or '', 1)}", style="red"))
        lines.append(Text(f"+ {name}: {_short(new[name], _LINES)}", style="green"))
    demos = [f"{name}: {len(predictor.demos)} demos" for name, predictor in after.items() if predictor.demos]
    if demos:
        lines.append(Text("+ " + ", ".join(demos), style="green"))
    return lines if len(lines) > 1 else [*lines, Text("Nothing: the program was best as it was.")]


def _short(text: str, lines: int) -> str:
    words = " ".join(text.split())
    return words if len(words) <= lines * _WIDTH else words[: lines * _WIDTH - 1] + "…"


def _full_scores(recorder: Recorder, part: str) -> list[float]:
    evaluations = recorder.evaluations(part)
    full = _full_size(evaluations)
    return [one.score for one in evaluations if one.size == full and one.score is not None]


def _full_size(evaluations: Sequence[Evaluation]) -> int | None:
    return max((one.size for one in evaluations if one.size is not None), default=None)
