"""The optimization that made a program, for programs of this process."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from typing import Any, Final

from dspy_otel.operations.program import program_digest
from dspy_otel.optimizers.run import Run, Scored
from dspy_otel.record.addresses import address_of
from dspy_otel.record.model import Origin

_MOST: Final = 4096
_lock: Final = threading.Lock()
_made: Final[OrderedDict[str, Origin]] = OrderedDict()
_given: Final[set[str]] = set()
"""Those of them that no run has made: every run that has scored them has started from them."""


def remember(run: Run, trial: Scored) -> None:
    """Keep a scored candidate; a winner and a deciding trial are not replaced by a trial that does not decide."""
    if trial.candidate is None:
        return
    with _lock:
        known = _made.get(trial.candidate)
    if known is not None and (known.winner or not trial.decides) and known.run_id == run.id:
        return
    best = run.trial_of(trial.candidate) or trial
    _keep(run, Origin(run.id, run.name, trial.candidate, best.number, best.score, False))


def remember_winner(run: Run, program_id: str) -> Scored | None:
    """Keep the program that a compile returned, and return the trial that scored it."""
    trial = run.trial_of(program_id)
    number, score = (trial.number, trial.score) if trial is not None else (None, None)
    _keep(run, Origin(run.id, run.name, program_id, number, score, True))
    return trial


def _keep(run: Run, optimization: Origin) -> None:
    """Keep an origin, unless the program compiles at each call, or another run has made the initial program."""
    if run.inference_time:
        return
    program_id = optimization.program_id
    given = program_id == run.initial_id
    with _lock:
        known = _made.get(program_id)
        if given and known is not None and known.run_id != run.id and program_id not in _given:
            return
        (_given.add if given else _given.discard)(program_id)
        _made[program_id] = optimization
        _made.move_to_end(program_id)
        while len(_made) > _MOST:
            _given.discard(_made.popitem(last=False)[0])


def optimization(program: Any) -> Origin | None:
    """The optimization that made ``program``, by the program's state: a copy, or one loaded from a file, counts too.

    Args:
        program: a ``dspy.Module``, or a ``dspy.program.id``.

    Returns:
        Run, trial and score, and the run's page in MLflow; ``None`` for a program that no watched optimization of this
        process has made (the last 4,096 candidates are known).
    """
    try:
        program_id = program if isinstance(program, str) else program_digest(program)
    except Exception:
        return None
    with _lock:
        found = None if program_id is None else _made.get(program_id)
    address = None if found is None else address_of(found.run_id)
    if found is None or address is None:
        return found
    return dataclasses.replace(found, mlflow_run_id=address.run_id, url=address.url)
