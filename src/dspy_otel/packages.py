"""Which packages are installed, without importing them."""

from __future__ import annotations

import importlib.util


def has_gepa_alone() -> bool:
    """Whether GEPA is installed, and DSPy is not."""
    return _installed("gepa") and not _installed("dspy")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # A stand-in without a specification is in its place.
        return False
