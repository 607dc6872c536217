"""Answers of programs, and what people and evaluators said of them, from spans and logs of any source.

An answer is the whole work of a program on one input: in production the outermost call, in an evaluation an example.
Inputs and outputs are kept as they were recorded; what can be made of them is for others to say.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel import semconv
from dspy_otel.record.model import Answer, Judgement, number, score_of
from dspy_otel.record.spans import Kind, is_ours, kind_of

_UNNAMED: Final = "metric"


def is_answer(span: ReadableSpan) -> bool:
    """Whether a span is a program's whole answer, outside of evaluations and optimizations."""
    at = span.attributes or {}
    if semconv.EVALUATION_ID in at or semconv.OPTIMIZER_RUN_ID in at or not is_ours(span):
        return False
    operation = at.get(semconv.GEN_AI_OPERATION_NAME)
    # An agent inside of a program has no totals.
    agent = operation == semconv.OPERATION_INVOKE_AGENT and semconv.USAGE_LM_CALLS in at
    return agent or operation == semconv.OPERATION_INVOKE_WORKFLOW


def read_answer(span: ReadableSpan) -> Answer | None:
    """The answer that a span is; None for any other span."""
    example = kind_of(span) is Kind.EXAMPLE
    context = span.context
    if context is None or not (example or is_answer(span)):
        return None
    at = span.attributes or {}

    def text(key: str) -> str | None:
        return None if at.get(key) is None else str(at[key])

    found = Answer(
        program=text(semconv.PROGRAM_ID),
        program_name=text(semconv.PROGRAM_NAME),
        fields=text(semconv.SIGNATURE_FIELDS),
        inputs=at.get(semconv.MODULE_INPUTS, at.get(semconv.INPUT_VALUE)),
        outputs=at.get(semconv.MODULE_OUTPUTS, at.get(semconv.OUTPUT_VALUE)),
        expected=at.get(semconv.EXAMPLE_EXPECTED),
        error=text(semconv.ERROR_TYPE),
        session=text(semconv.SESSION_ID),
        user=text(semconv.USER_ID),
        example_id=text(semconv.EXAMPLE_ID),
        evaluation=text(semconv.EVALUATION_ID),
        optimization=text(semconv.OPTIMIZER_RUN_ID),
        trace_id=context.trace_id,
        span_id=context.span_id,
        started=span.start_time or 0,
    )
    score = score_of(at.get(semconv.EXAMPLE_SCORE)) if example else None
    if score is None:
        return found
    said = Judgement(
        context.trace_id,
        context.span_id,
        text(semconv.EVALUATION_METRIC_NAME) or _UNNAMED,
        score,
        text=text(semconv.EXAMPLE_FEEDBACK),
    )
    return dataclasses.replace(found, judgements=(said,))


def read_answers(spans: Iterable[ReadableSpan], judgements: Iterable[Judgement] = ()) -> list[Answer]:
    """The answers in spans, with what was said of them.

    Args:
        spans: ended ones in any order. They are read one by one, and none is kept.
        judgements: beside the ``gen_ai.evaluation.result`` events on the spans; read when the spans have been.
    """
    found: list[Answer] = []
    said: list[Judgement] = []
    for span in spans:
        context = span.context
        for event in span.events if context is not None else ():
            if event.name == semconv.LOG_EVALUATION_RESULT and context is not None:
                said += judgement_of(context.trace_id, context.span_id, event.attributes or {}, event.timestamp / 1e9)
        answer = read_answer(span)
        if answer is not None:
            found.append(answer)
    said += judgements
    return judged(found, said)


def judgement_of(trace_id: int, span_id: int | None, at: Mapping[str, Any], when: float = 0) -> list[Judgement]:
    """The score in a ``gen_ai.evaluation.result`` event, if it has one."""
    score = number(at.get(semconv.GEN_AI_EVALUATION_SCORE_VALUE))
    if score is None or semconv.EVALUATION_ID in at:  # an example of an evaluation has its score itself
        return []
    text = at.get(semconv.GEN_AI_EVALUATION_EXPLANATION)
    name = str(at.get(semconv.GEN_AI_EVALUATION_NAME, _UNNAMED))
    return [Judgement(trace_id, span_id, name, score, text=None if text is None else str(text), when=when)]


def newest_scores(judgements: Iterable[Judgement]) -> dict[str, float]:
    """The numbers that were given to an answer, by name: the newest of people, or else of programs."""
    ordered = sorted((one for one in judgements if not one.expectation), key=lambda one: (one.human, one.when))
    return {one.name: score for one in ordered if (score := one.score) is not None}


def judged(answers: Sequence[Answer], judgements: Iterable[Judgement]) -> list[Answer]:
    """Answers with what was said of them or, where each trace has one answer only, of their traces."""
    places = {(answer.trace_id, answer.span_id) for answer in answers}
    counts = Counter(answer.trace_id for answer in answers)
    by_place: dict[tuple[int, int | None], list[Judgement]] = {}
    for one in judgements:
        span_id = one.span_id if (one.trace_id, one.span_id) in places else None
        if one.trace_id in counts:
            by_place.setdefault((one.trace_id, span_id), []).append(one)
    found = []
    for answer in answers:
        own = by_place.get((answer.trace_id, answer.span_id), [])
        of_trace = by_place.get((answer.trace_id, None), [])
        alone = counts[answer.trace_id] == 1
        said = (*answer.judgements, *own, *(of_trace if alone else ()))
        unclear = bool(of_trace) and not alone
        if said != answer.judgements or unclear:
            answer = dataclasses.replace(answer, judgements=said, unclear=unclear)  # noqa: PLW2901
        found.append(answer)
    return found
