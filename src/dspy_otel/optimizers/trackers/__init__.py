"""One small file for each optimizer that needs hooks of its own.

A file registers its tracker by ``@tracks("NameOfTheOptimizer")``. If methods of DSPy have to be wrapped for it, it has
a function ``patch(optimizers, patches)`` that does so, under ``@hooks``.
"""

from __future__ import annotations

import importlib
import pkgutil


def load() -> None:
    """Import every file of this folder, which registers what is in it. Needed by ``instrument()`` only."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")
