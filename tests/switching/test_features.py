"""DSPy still has what we reach for: each row of the table, and nothing but its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.older import DSPY
from tests.switching.dspy_features import FEATURES, Feature, table
from tests.switching.test_missing_targets import PLACES, WHAT_EACH_LOSES

DOCS = Path(__file__).parents[2] / "docs" / "versions.md"


@pytest.mark.parametrize("feature", FEATURES, ids=lambda row: f"{row.place} {row.versions}")
def test_dspy_has(feature: Feature) -> None:
    if not feature.here:
        pytest.skip(f"DSPy has it {feature.versions}")
    try:
        found = feature.find()
    except Exception as error:
        pytest.fail(feature.complaint(f"is gone ({type(error).__name__}: {error})"), pytrace=False)
    try:
        holds = feature.holds(found)
    except Exception as error:
        pytest.fail(feature.complaint(f"cannot be checked ({type(error).__name__}: {error})"), pytrace=False)
    if not holds:
        pytest.fail(feature.complaint("is not what it was"), pytrace=False)


def test_what_newer_versions_have_is_not_here() -> None:
    """The first version of each row is true. The newest DSPy has nothing to look at; the matrix has older ones."""
    for feature in FEATURES:
        if feature.since <= DSPY:
            continue
        try:
            here = feature.holds(feature.find())
        except Exception:
            here = False
        assert not here, feature.complaint(f"is here, though the table says {feature.versions}")


def test_all_that_is_replaced_has_a_row() -> None:
    rows = {row.place for row in FEATURES if row.replaces and row.here}
    # An override in a subclass of DSPy's stands on the row of its base.
    assert [(owner, name) for owner, name in PLACES if not rows & set(places_of(owner, name))] == []


def places_of(owner: Any, name: str) -> list[str]:
    """An attribute of a module; of a class, also of each of its bases."""
    if not isinstance(owner, type):
        return [f"{owner.__name__}:{name}"]
    return [f"{kind.__module__}:{kind.__qualname__}.{name}" for kind in owner.__mro__]


def test_the_table_says_what_the_warning_says() -> None:
    for (owner, name), loses in WHAT_EACH_LOSES.items():
        place = places_of(owner, name)[0]
        assert loses in [row.loses for row in FEATURES if row.place == place], place


def test_a_complaint_names_all_that_matters() -> None:
    said = FEATURES[0].complaint("is gone")
    for part in ("DSPy 3.", "dspy.primitives.module:Module.__call__", "operations/module.py", "programs and modules"):
        assert part in said


def test_docs_show_the_table() -> None:
    assert table() in DOCS.read_text(encoding="utf-8"), "python -m tests.switching.dspy_features prints the table"
