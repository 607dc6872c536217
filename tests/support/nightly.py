"""Which cases of a test run with each change, and which only at night."""

from __future__ import annotations

from typing import Any

import pytest


def at_night(*values: Any) -> list[Any]:
    """Parameters whose tests take long and go through what another parameter of the same test goes through, too."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.nightly) for value in values
    ]
