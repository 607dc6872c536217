"""Programs that are no modules: GEPA optimizes named texts, and calls whatever uses them by an adapter.

They have the form of DSPy's programs and rows, as far as telemetry reads those, so that a candidate has an id, a state
and differences from its parents, and a row its id, as with DSPy.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

from dspy_otel.content import introspection

_EXPECTED: Final = frozenset({"answer", "outputs", "expectations"})
"""The fields of a row that are no input, in GEPA's own format of rows and in MLflow's."""


class Texts:
    """Named texts. Each is the instructions of a predictor without fields.

    Args:
        name: of the program.
        texts: a dictionary of text by name. It is copied; what is no text is left out.
    """

    def __init__(self, name: str, texts: Any) -> None:
        self.name = name
        entries: dict[Any, Any] = dict(dict.items(texts)) if introspection.is_a(texts, dict) else {}
        self.texts = {key: text for key, text in entries.items() if type(key) is str and type(text) is str}

    def named_predictors(self) -> list[tuple[str, Any]]:
        """Stand-ins for the predictors, by name."""
        return [(name, _Predictor(text)) for name, text in self.texts.items()]

    def saved(self) -> dict[str, Any]:
        """The state, as a program of DSPy's with these predictors would save it."""
        return {
            name: {"traces": [], "train": [], "demos": [], "signature": {"instructions": text, "fields": []}}
            for name, text in self.texts.items()
        }


class _Predictor:
    """A stand-in for a predictor: its signature has the text, and no fields."""

    def __init__(self, text: str) -> None:
        self.signature = SimpleNamespace(instructions=text, fields={})
        self.demos: list[Any] = []


class Row:
    """A row of any type, with its fields where a ``dspy.Example`` has them.

    Args:
        row: a dictionary of fields; anything else is the only field, ``input``.
    """

    def __init__(self, row: Any) -> None:
        plain = type(row) is dict and all(type(name) is str for name in row)
        self.fields: dict[str, Any] = row if plain else {"input": row}
        self._store = self.fields
        self._input_keys = {name for name in self.fields if name not in _EXPECTED}


def plain_rows(rows: Any) -> Any:
    """A list of rows as it is, with the fields in place of each :class:`Row`."""
    if not any(type(row) is Row for row in introspection.items(rows)):
        return rows
    return [row.fields if type(row) is Row else row for row in introspection.items(rows)]
