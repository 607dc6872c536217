"""Why something cannot be compared."""

from __future__ import annotations


class CannotCompareError(ValueError):
    """There is nothing to compare; the text says why, and what to do."""
