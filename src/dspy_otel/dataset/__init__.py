"""From traces to a dataset: answers of programs as examples to optimize and evaluate on.

* :mod:`.selection` - which answers become examples, with what labels, in which order; and why others do not;
* :mod:`.stored` - answers from MLflow; :mod:`.files` - from files of OTLP, and examples to files and back;
* :mod:`.collect` - all of that in one call.

DSPy is imported where its examples are made, and MLflow and pyarrow are imported when they are needed.
"""

from __future__ import annotations

from dspy_otel.dataset.collect import Examples, examples, load_examples
from dspy_otel.dataset.errors import NoExamplesError

__all__ = ["Examples", "NoExamplesError", "examples", "load_examples"]
