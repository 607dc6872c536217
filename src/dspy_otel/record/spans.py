"""One span to one record: the only place where attributes of our spans are read back.

:func:`kind_of` gives the kind of a span, and :func:`read` its record. Nothing here looks at more than one span;
:mod:`.history` combines them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from dspy_otel import semconv
from dspy_otel.record.model import (
    RUNNING,
    Candidate,
    Dataset,
    Evaluation,
    Example,
    Failure,
    LMCall,
    Optimization,
    Phase,
    Trial,
    Usage,
    load_json,
    number,
)


class Kind(enum.Enum):
    """The kind of a span, for readers of spans."""

    COMPILE = "compile"
    PHASE = "phase"
    TRIAL = "trial"
    EVALUATION = "evaluation"
    EXAMPLE = "example"
    LM_CALL = "lm call"
    EMBEDDING = "embedding"
    OTHER = "other"


RUN_KINDS: Final = frozenset({Kind.COMPILE, Kind.TRIAL, Kind.EVALUATION})
"""Kinds of spans whose start counts, too: what they stand for is shown while it runs."""

Part: TypeAlias = Optimization | Phase | Trial | Evaluation | Example | LMCall
"""The record of one span alone."""

_NAMES: Final = {
    semconv.SPAN_COMPILE: (Kind.COMPILE, semconv.OPTIMIZER_RUN_ID),
    semconv.SPAN_TRIAL: (Kind.TRIAL, semconv.OPTIMIZER_RUN_ID),
    semconv.SPAN_EVALUATE: (Kind.EVALUATION, semconv.EVALUATION_ID),
    semconv.SPAN_EXAMPLE: (Kind.EXAMPLE, semconv.EVALUATION_ID),
    **{
        value: (Kind.PHASE, semconv.OPTIMIZER_RUN_ID)
        for name, value in vars(semconv).items()
        if name.startswith("PHASE_")
    },
}
"""First words of names, and the attribute without which a span is no span of that kind of ours."""
_OPERATIONS: Final = {
    semconv.OPERATION_CHAT: Kind.LM_CALL,
    semconv.OPERATION_TEXT_COMPLETION: Kind.LM_CALL,
    semconv.OPERATION_EMBEDDINGS: Kind.EMBEDDING,
}
_CONTENT: Final = (
    # With OpenInference's keys on, inputs and outputs are recorded once, under those.
    *(semconv.MODULE_INPUTS, semconv.INPUT_VALUE, semconv.EXAMPLE_EXPECTED),
    *(semconv.MODULE_OUTPUTS, semconv.OUTPUT_VALUE),
)

Attributes: TypeAlias = Mapping[str, Any]


def is_ours(span: ReadableSpan) -> bool:
    """Whether a span was made by this package."""
    scope = span.instrumentation_scope
    return scope is not None and scope.name == semconv.SCOPE_NAME


def kind_of(span: ReadableSpan) -> Kind:
    """The kind of a span. It is cheap enough to be called for every span."""
    at = span.attributes or {}
    operation = at.get(semconv.GEN_AI_OPERATION_NAME)
    if operation is not None:
        return _OPERATIONS.get(str(operation), Kind.OTHER)
    kind, needed = _NAMES.get(span.name.split(" ", 1)[0], (Kind.OTHER, ""))
    if kind is Kind.OTHER or needed not in at:
        return Kind.OTHER
    if kind is Kind.TRIAL and not isinstance(at.get(semconv.TRIAL_NUMBER), int):
        return Kind.OTHER
    if kind is Kind.PHASE and at.get(semconv.OPTIMIZER_PHASE) != span.name:
        return Kind.OTHER
    return kind


def belongs(span: ReadableSpan) -> bool:
    """Whether a span is part of an optimization or of an evaluation."""
    at = span.attributes or {}
    return semconv.OPTIMIZER_RUN_ID in at or semconv.EVALUATION_ID in at


def read(span: ReadableSpan, kind: Kind) -> Part | None:
    """The record of one span alone.

    Args:
        span: that has started, or has ended.
        kind: what it is.

    Returns:
        A record with what this span alone knows: an :class:`Optimization` has no trials yet.
    """
    reader = _READERS.get(kind)
    if reader is None:
        return None
    at = span.attributes or {}
    # Another thread may set attributes of an open span meanwhile: they are copied.
    return reader(span, dict(at) if span.end_time is None else at)  # type: ignore[no-any-return]


def read_compile(span: ReadableSpan, at: Attributes) -> Optimization:
    """An optimization, without its trials and phases."""
    params = _under(semconv.OPTIMIZER_PARAMS_PREFIX, at)
    return Optimization(
        id=str(at[semconv.OPTIMIZER_RUN_ID]),
        optimizer=str(at.get(semconv.OPTIMIZER_NAME, "optimizer")),
        program_name=_text(at.get(semconv.PROGRAM_NAME)),
        parent=_text(at.get(semconv.OPTIMIZER_PARENT_RUN_ID)),
        root=_text(at.get(semconv.OPTIMIZER_ROOT_RUN_ID)),
        parent_phase=_text(at.get(semconv.OPTIMIZER_PARENT_PHASE, at.get(semconv.OPTIMIZER_PHASE))),
        inference_time=_truth(at.get(semconv.OPTIMIZER_INFERENCE_TIME)),
        attempt=_whole(at.get(semconv.OPTIMIZER_ATTEMPT)),
        resumed=at.get(semconv.OPTIMIZER_RESUMED) is True,
        outcome=str(at.get(semconv.OPTIMIZER_OUTCOME, RUNNING)),
        failure=failure_of(span),
        scale=_text(at.get(semconv.OPTIMIZER_SCORE_SCALE)),
        baseline=number(at.get(semconv.OPTIMIZER_BASELINE_SCORE)),
        best=number(at.get(semconv.OPTIMIZER_BEST_SCORE)),
        gain=number(at.get(semconv.OPTIMIZER_GAIN)),
        winner=_whole(at.get(semconv.OPTIMIZER_WINNER_TRIAL)),
        initial=_candidate(at, semconv.INITIAL_PROGRAM_ID, semconv.INITIAL_PROGRAM_STATE),
        returned=_candidate(at, semconv.PROGRAM_ID, semconv.PROGRAM_STATE),
        params=params,
        metric=_text(params.get("metric")),
        train=_dataset(
            "train", at, semconv.DATASET_TRAIN_SIZE, semconv.DATASET_TRAIN_DIGEST, semconv.DATASET_TRAIN_ROWS
        ),
        val=_dataset("val", at, semconv.DATASET_VAL_SIZE, semconv.DATASET_VAL_DIGEST, semconv.DATASET_VAL_ROWS),
        planned=_whole(at.get(semconv.OPTIMIZER_TRIALS_PLANNED)),
        done=_whole(at.get(semconv.OPTIMIZER_TRIALS_DONE)),
        accepted=_whole(at.get(semconv.OPTIMIZER_TRIALS_ACCEPTED)),
        rejected=_whole(at.get(semconv.OPTIMIZER_TRIALS_REJECTED)),
        evaluated=_whole(at.get(semconv.OPTIMIZER_EXAMPLES_EVALUATED)),
        usage=read_usage(at),
        service=_service(span),
        started=span.start_time,
        ended=span.end_time,
    )


def read_phase(span: ReadableSpan, at: Attributes) -> Phase:
    """One time of a phase."""
    return Phase(span.name, 1, seconds_of(span), read_usage(at), str(at[semconv.OPTIMIZER_RUN_ID]))


def read_trial(span: ReadableSpan, at: Attributes) -> Trial:
    """A trial, without what had been spent by then."""
    return Trial(
        number=int(at[semconv.TRIAL_NUMBER]),
        kind=str(at.get(semconv.TRIAL_KIND, "")),
        candidate=_text(at.get(semconv.CANDIDATE_ID)),
        parents=tuple(map(str, at.get(semconv.CANDIDATE_PARENT_IDS, ()))),
        score=number(at.get(semconv.TRIAL_SCORE)),
        reported=number(at.get(semconv.TRIAL_SCORE_REPORTED)),
        best=number(at.get(semconv.TRIAL_BEST_SCORE)),
        is_best=_truth(at.get(semconv.TRIAL_IS_BEST)),
        size=_whole(at.get(semconv.TRIAL_SIZE)),
        accepted=_truth(at.get(semconv.TRIAL_ACCEPTED)),
        reason=_text(at.get(semconv.TRIAL_REASON)),
        before=number(at.get(semconv.TRIAL_SCORE_BEFORE)),
        after=number(at.get(semconv.TRIAL_SCORE_AFTER)),
        on_front=_truth(at.get(semconv.TRIAL_ON_PARETO_FRONT)),
        phase=_text(at.get(semconv.OPTIMIZER_PHASE)),
        params=_under(semconv.TRIAL_PARAMS_PREFIX, at),
        usage=read_usage(at),
        failure=failure_of(span),
        optimization=str(at[semconv.OPTIMIZER_RUN_ID]),
        optimizer=_text(at.get(semconv.OPTIMIZER_NAME)),
        program_name=_text(at.get(semconv.PROGRAM_NAME)),
        changes=_text(at.get(semconv.CANDIDATE_DIFF)),
        program=_candidate(at, semconv.CANDIDATE_ID, semconv.PROGRAM_STATE),
        service=_service(span),
        started=span.start_time,
        ended=span.end_time,
    )


def read_evaluation(span: ReadableSpan, at: Attributes) -> Evaluation:
    """An evaluation, without its examples."""
    return Evaluation(
        id=str(at[semconv.EVALUATION_ID]),
        optimization=_text(at.get(semconv.OPTIMIZER_RUN_ID)),
        trial=_whole(at.get(semconv.TRIAL_NUMBER)),
        program_name=_text(at.get(semconv.PROGRAM_NAME)),
        program_id=_text(at.get(semconv.PROGRAM_ID)),
        metric=_text(at.get(semconv.EVALUATION_METRIC_NAME)),
        size=_whole(at.get(semconv.EVALUATION_SIZE)),
        threads=_whole(at.get(semconv.EVALUATION_NUM_THREADS)),
        score=number(at.get(semconv.EVALUATION_SCORE)),
        failures=_whole(at.get(semconv.EVALUATION_FAILURES)),
        usage=read_usage(at),
        failure=failure_of(span),
        service=_service(span),
        started=span.start_time,
        ended=span.end_time,
    )


def read_example(span: ReadableSpan, at: Attributes) -> Example:
    """An evaluated example."""
    score = at.get(semconv.EXAMPLE_SCORE)
    return Example(
        index=_whole(at.get(semconv.EXAMPLE_INDEX)),
        id=_text(at.get(semconv.EXAMPLE_ID)),
        inputs=load_json(at.get(semconv.MODULE_INPUTS, at.get(semconv.INPUT_VALUE))),
        expected=load_json(at.get(semconv.EXAMPLE_EXPECTED)),
        prediction=load_json(at.get(semconv.MODULE_OUTPUTS, at.get(semconv.OUTPUT_VALUE))),
        score=float(score) if isinstance(score, (bool, int, float)) else None,
        feedback=_text(at.get(semconv.EXAMPLE_FEEDBACK)),
        error=_text(at.get(semconv.ERROR_TYPE)),
        message=span.status.description or None,
        trace_id=None if span.context is None else span.context.trace_id,
        seconds=None if span.end_time is None else seconds_of(span),
        size=sum(len(str(at.get(key, ""))) for key in _CONTENT),
    )


def read_call(span: ReadableSpan, at: Attributes) -> LMCall:
    """A call of a language model or an embedder."""
    return LMCall(
        model=_text(at.get(semconv.GEN_AI_REQUEST_MODEL)),
        role=str(at.get(semconv.LM_ROLE, semconv.ROLE_TASK)),
        cache_hit=at.get(semconv.LM_CACHE_HIT) is True,
        input_tokens=_whole(at.get(semconv.GEN_AI_USAGE_INPUT_TOKENS)),
        output_tokens=_whole(at.get(semconv.GEN_AI_USAGE_OUTPUT_TOKENS)),
        optimization=_text(at.get(semconv.OPTIMIZER_RUN_ID)),
        root=_text(at.get(semconv.OPTIMIZER_ROOT_RUN_ID)),
        evaluation=_text(at.get(semconv.EVALUATION_ID)),
    )


def read_usage(at: Attributes) -> Usage:
    """The totals on a span, overall and by role."""
    return Usage.of(_under(semconv.USAGE_PREFIX, at))


def parse_failures_of(span: ReadableSpan) -> int:
    """How many answers of a model an adapter could not read, in the call of a predictor.

    They are events of the span; where those are in a log alone, the span has their number.
    """
    logged = (span.attributes or {}).get(semconv.ADAPTER_PARSE_ERRORS)
    events = sum(event.name == semconv.EVENT_ADAPTER_PARSE_ERROR for event in span.events)
    return max(events, logged if type(logged) is int else 0)


def failure_of(span: ReadableSpan) -> Failure | None:
    """Why the operation of a span did not finish; None when it did, or still runs."""
    if span.status.status_code is not StatusCode.ERROR:
        return None
    return Failure(str((span.attributes or {}).get(semconv.ERROR_TYPE) or "error"), span.status.description or None)


def seconds_of(span: ReadableSpan) -> float:
    """How long a span took; 0 while it has not ended."""
    return 0.0 if span.start_time is None or span.end_time is None else (span.end_time - span.start_time) / 1e9


_READERS: Final[Mapping[Kind, Any]] = {
    Kind.COMPILE: read_compile,
    Kind.PHASE: read_phase,
    Kind.TRIAL: read_trial,
    Kind.EVALUATION: read_evaluation,
    Kind.EXAMPLE: read_example,
    Kind.LM_CALL: read_call,
    Kind.EMBEDDING: read_call,
}


# --- values ---------------------------------------------------------------------------------------------------------


def _candidate(at: Attributes, id_key: str, state_key: str) -> Candidate | None:
    if id_key not in at:
        return None
    altered = at.get(state_key + semconv.STATE_COMPLETE) is False
    return Candidate(str(at[id_key]), _text(at.get(state_key)), altered)


def _dataset(role: str, at: Attributes, size: str, digest: str, rows: str) -> Dataset | None:
    count = _whole(at.get(size))
    return None if count is None else Dataset(role, count, _text(at.get(digest)), _text(at.get(rows)))


def _service(span: ReadableSpan) -> str | None:
    resource = span.resource.attributes if span.resource is not None else {}
    name = str(resource.get("service.name", ""))
    return None if not name or name.startswith("unknown_service") else name


def _under(prefix: str, at: Attributes) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in at.items() if key.startswith(prefix)}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _truth(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None
