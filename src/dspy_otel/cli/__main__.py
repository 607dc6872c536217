"""`python -m dspy_otel.cli`."""

from __future__ import annotations

import sys

from dspy_otel.cli import main

if __name__ == "__main__":
    sys.exit(main())
