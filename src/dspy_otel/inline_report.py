"""``dspy_otel.report(program)``: the report of an optimization where the program is, in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from opentelemetry import trace

from dspy_otel.optimizers.lineage import optimization
from dspy_otel.record.addresses import address_of

_NO_ORIGIN = (
    "No optimization that was watched in this process has made this program. For one of another process, by its run in "
    "MLflow: dspy-otel report RUN_ID"
)
_NOT_IN_MLFLOW = (
    "The optimization is not in MLflow, where dspy_otel.report() reads it: record it with "
    "dspy_otel.configure(mlflow=...). From a file of OTLP JSON: dspy-otel report --spans FILE"
)


@dataclass(frozen=True, slots=True)
class Report:
    """A report. A notebook shows it.

    Attributes:
        html: the page.
    """

    html: str

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, and return its path."""
        path = Path(path)
        path.write_text(self.html, encoding="utf-8")
        return path

    def __repr__(self) -> str:
        return f"<dspy-otel report of {len(self.html):,} characters; .save('report.html') writes it to a file>"

    def _repr_html_(self) -> str:
        """The page in a frame, so that neither style reaches the other one."""
        return (
            f'<iframe srcdoc="{escape(self.html)}" title="dspy-otel report" sandbox="allow-popups" '
            'style="width:100%;height:640px;border:1px solid #8884;background:white"></iframe>'
        )


def report(program: Any) -> Report:
    """The report of the optimization that made ``program``, read from the MLflow that it was recorded to.

    Args:
        program: a ``dspy.Module`` that a watched optimization of this process has made, or its ``dspy.program.id``.

    Returns:
        The report, which a notebook shows.

    Raises:
        LookupError: no such optimization, or none in MLflow; the message says what to do.
    """
    origin = optimization(program)
    if origin is None:
        raise LookupError(_NO_ORIGIN)
    provider = trace.get_tracer_provider()
    if hasattr(provider, "force_flush"):
        provider.force_flush()
    address = address_of(origin.run_id)
    if address is None:
        raise LookupError(_NOT_IN_MLFLOW)
    from dspy_otel.mlflow.exporter import exporters_of
    from dspy_otel.mlflow.read import read_optimization
    from dspy_otel.mlflow.retry import ExportError
    from dspy_otel.reports.page import render

    exporters = exporters_of(provider)
    uri = exporters[0].target.uri if exporters else None
    try:
        found = read_optimization(address.run_id, tracking_uri=uri)
    except ExportError as error:
        raise LookupError(str(error)) from error
    return Report(render(found.optimization, found.source))
