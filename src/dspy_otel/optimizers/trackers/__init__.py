"""One small file for each optimizer that needs hooks of its own.

A file registers its tracker by ``@tracks("NameOfTheOptimizer")``. If methods of DSPy have to be wrapped for it,
the file has a function ``patch(optimizers, patches)`` that does so.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def load() -> list[ModuleType]:
    """Import every file of this folder, so that its trackers are registered. Needed by ``instrument()`` only."""
    names = sorted(found.name for found in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]
