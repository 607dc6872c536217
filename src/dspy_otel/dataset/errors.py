"""Why there are no examples."""

from __future__ import annotations


class NoExamplesError(ValueError):
    """There is nothing to make examples of; the text says why, and what to do."""
