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

from dspy_otel import semconv
from dspy_otel.cli.demo.telemetry import Recorder, attribute, ids_of, is_lm_call
from dspy_otel.cli.demo.trials import trial_tables


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
        words.append(f"best score {max(scores):.1f}")
    return ", ".join(words)


def trace_tree(spans: Sequence[ReadableSpan]) -> Tree | None:
    """The example's trace with the most spans, as a tree; None if there is no trace with an LM call."""
    traces: dict[int, list[ReadableSpan]] = defaultdict(list)
    for span in spans:
        traces[ids_of(span)[0]].append(span)
    shown = max((t for t in traces.values() if any(map(is_lm_call, t))), key=len, default=None)
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
            f"{max(scores):.1f}" if scores else "",
            style="bold" if part is None else None,
            end_section=part == parts[-1],
        )
    return table


def optimizer_tables(recorder: Recorder, part: str) -> list[Table]:
    """The trials of one optimizer, and of others inside it; without trial spans, its evaluations."""
    return trial_tables(recorder.of(part)) or [evaluations_table(recorder, part)]


def evaluations_table(recorder: Recorder, part: str) -> Table:
    """Every evaluation of one optimizer, in order. Only those of full size count for the best score so far."""
    evaluations = recorder.evaluations(part)
    full = max((evaluation.size for evaluation in evaluations), default=0)
    table = Table(title=part, title_justify="left", title_style="bold")
    table.add_column("#", justify="right")
    table.add_column("kind")
    for column in ("examples", "score", "best so far"):
        table.add_column(column, justify="right")
    best: float | None = None
    for number, evaluation in enumerate(evaluations, 1):
        row = [str(number), "full" if evaluation.size == full else "minibatch", str(evaluation.size)]
        better = evaluation.size == full and (best is None or evaluation.score > best)
        best = evaluation.score if better else best
        row += [f"{evaluation.score:.1f}", f"{best:.1f}" if better and best is not None else ""]
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
    full = max((evaluation.size for evaluation in evaluations), default=0)
    return [evaluation.score for evaluation in evaluations if evaluation.size == full]


def _label(span: ReadableSpan) -> str:
    words = [f"{span.name}  [dim]{_milliseconds(span):.1f} ms[/]"]
    tokens = [
        attribute(span, key, None) for key in (semconv.GEN_AI_USAGE_INPUT_TOKENS, semconv.GEN_AI_USAGE_OUTPUT_TOKENS)
    ]
    if None not in tokens:
        words.append(f"[cyan]{tokens[0]} > {tokens[1]} tokens[/]")
    if attribute(span, semconv.LM_CACHE_HIT, False):
        words.append("[yellow]from cache[/]")
    for key in (semconv.EXAMPLE_SCORE, semconv.EVALUATION_SCORE):
        if (score := attribute(span, key, None)) is not None:
            words.append(f"[green]score {score:g}[/]")
    if not span.status.is_ok:
        words.append(f"[red]{attribute(span, semconv.ERROR_TYPE, 'error')}[/]")
    return "  ".join(words)


def _milliseconds(span: ReadableSpan) -> float:
    return ((span.end_time or 0) - (span.start_time or 0)) / 1e6
