"""What the demo prints: progress, one trace as a tree, and tables of what was recorded. All of it read from spans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan
from rich.console import Group
from rich.progress import ProgressColumn, Task
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from dspy_otel.cli.demo.telemetry import Recorder, ids_of
from dspy_otel.cli.demo.trials import trial_tables
from dspy_otel.record.model import Evaluation, Example, LMCall
from dspy_otel.record.spans import Kind, failure_of, kind_of, read


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


def trace_tree(spans: Sequence[ReadableSpan]) -> Tree | None:
    """The example's trace with the most spans, as a tree; None if there is no trace with an LM call."""
    traces: dict[int, list[ReadableSpan]] = defaultdict(list)
    for span in spans:
        traces[ids_of(span)[0]].append(span)
    shown = max((t for t in traces.values() if Kind.LM_CALL in map(kind_of, t)), key=len, default=None)
    if shown is None:
        return None
    children: dict[int | None, list[ReadableSpan]] = defaultdict(list)
    ids = {ids_of(span)[1] for span in shown}
    for span in sorted(shown, key=lambda span: span.start_time or 0):
        children[span.parent.span_id if span.parent and span.parent.span_id in ids else None].append(span)

    def grow(tree: Tree, parent: int | None) -> Tree:
        for span in children[parent]:
            grow(tree.add(_label(span)), ids_of(span)[1])
        return tree

    return grow(Tree(f"[bold]One trace[/] [dim]{ids_of(shown[0])[0]:032x}[/]"), None)


def spans_table(recorder: Recorder) -> Table:
    """Number and mean duration of the recorded spans, by name."""
    durations: dict[str, list[float]] = defaultdict(list)
    for span in recorder.of():
        durations[span.name].append(_milliseconds(span))
    table = Table(title="Spans recorded", title_justify="left", title_style="bold")
    table.add_column("span")
    table.add_column("number", justify="right")
    table.add_column("mean ms", justify="right")
    for name, values in sorted(durations.items(), key=lambda item: -len(item[1])):
        table.add_row(name, f"{len(values):,}", f"{sum(values) / len(values):.2f}")
    return table


def parts_table(recorder: Recorder, parts: Sequence[str]) -> Table:
    """Traces, LM calls, tokens and evaluations of each part of the demo."""
    table = Table(title="What it took", title_justify="left", title_style="bold")
    table.add_column("part")
    for column in ("traces", "calls", "cached", "tokens in", "tokens out", "evals", "best"):
        table.add_column(column, justify="right")
    for name, part in [*((part, part) for part in parts), ("all", None)]:
        totals = recorder.totals(part)
        scores = _full_scores(recorder, part) if part else []
        table.add_row(
            name,
            *(f"{totals[key]:,}" for key in ("traces", "lm_calls", "cache_hits", "input_tokens", "output_tokens")),
            str(len(recorder.evaluations(part))) if part else "",
            f"{max(scores):.2f}" if scores else "",
            style="bold" if part is None else None,
            end_section=part == parts[-1],
        )
    return table


def optimizer_tables(recorder: Recorder, part: str) -> list[Table]:
    """The trials of one optimizer, and of others inside it; without trial spans, its evaluations."""
    return trial_tables(recorder.trials(part)) or [evaluations_table(recorder, part)]


def evaluations_table(recorder: Recorder, part: str) -> Table:
    """Every evaluation of one optimizer, in order. Only those of full size count for the best score so far."""
    evaluations = recorder.evaluations(part)
    full = _full_size(evaluations)
    table = Table(title=part, title_justify="left", title_style="bold")
    table.add_column("#", justify="right")
    table.add_column("kind")
    for column in ("examples", "score", "best so far"):
        table.add_column(column, justify="right")
    best: float | None = None
    for number, evaluation in enumerate(evaluations, 1):
        row = [str(number), "full" if evaluation.size == full else "minibatch", str(evaluation.size or 0)]
        score = evaluation.score or 0.0
        better = evaluation.size == full and (best is None or score > best)
        best = score if better else best
        row += [f"{score:.2f}", f"{best:.2f}" if better and best is not None else ""]
        table.add_row(*row, style="green" if better else None)
    return table


def report(recorder: Recorder, parts: Sequence[str], optimizers: Sequence[str]) -> Group:
    """Everything that is shown at the end. The one trace is taken from the last of `parts`."""
    tree = trace_tree(recorder.of(parts[-1]))
    tables = [table for name in optimizers for table in optimizer_tables(recorder, name)]
    shown = [tree, *tables, spans_table(recorder), parts_table(recorder, [*parts, *optimizers])]
    return Group(*(item for part in shown if part for item in ("", part)))


def _full_scores(recorder: Recorder, part: str) -> list[float]:
    evaluations = recorder.evaluations(part)
    full = _full_size(evaluations)
    return [one.score for one in evaluations if one.size == full and one.score is not None]


def _full_size(evaluations: Sequence[Evaluation]) -> int | None:
    return max((one.size for one in evaluations if one.size is not None), default=None)


def _label(span: ReadableSpan) -> str:
    words = [f"{span.name}  [dim]{_milliseconds(span):.1f} ms[/]"]
    part = read(span, kind_of(span))
    if isinstance(part, LMCall):
        if part.input_tokens is not None and part.output_tokens is not None:
            words.append(f"[cyan]{part.input_tokens} > {part.output_tokens} tokens[/]")
        if part.cache_hit:
            words.append("[yellow]from cache[/]")
    if isinstance(part, (Example, Evaluation)) and part.score is not None:
        words.append(f"[green]score {part.score:g}[/]")
    if (failure := failure_of(span)) is not None:
        words.append(f"[red]{failure.type}[/]")
    return "  ".join(words)


def _milliseconds(span: ReadableSpan) -> float:
    return ((span.end_time or 0) - (span.start_time or 0)) / 1e6
