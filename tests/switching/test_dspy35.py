"""DSPy 3.5 as far as it is known: a part of the suites on the shim of it, in a process of their own.

The nightly job runs all of them: `DSPY_SHIM=3.5 pytest tests/operations tests/optimizers tests/inert`.
"""

from __future__ import annotations

import sys

import pytest

from tests.support import dspy35
from tests.support.older import release
from tests.support.waiting import run
from tests.switching.process import ROOT, environment

TESTS = (
    *("tests/operations/test_generate.py", "tests/operations/test_lm.py", "tests/operations/test_usage.py"),
    *("tests/operations/test_adapters.py", "tests/optimizers/test_roles.py::test_lm_calls_add_up"),
    *("tests/switching/test_features.py", "tests/core/test_cost.py"),
)


@pytest.mark.skipif(dspy35.WANTED, reason="this process runs on the shim itself")
@pytest.mark.skipif(release("dspy") != (3, 4, 1), reason=f"the shim is made for DSPy {dspy35.BASE}")
def test_the_suites_on_the_shim() -> None:
    inherited = environment(DSPY_SHIM="3.5")
    settings = {name: value for name, value in inherited.items() if not name.startswith("PYTEST_XDIST")}
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], env=settings, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:]
