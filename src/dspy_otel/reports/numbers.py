"""Numbers as people read them."""

from __future__ import annotations

from dspy_otel.record.model import Usage, number

_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


def score_text(value: float | None) -> str:
    """A score, with four digits.

    >>> score_text(0.76666667)
    '0.7667'
    """
    return "-" if value is None else f"{value:.4g}"


def change_text(value: float) -> str:
    """A difference of scores, with its sign: three digits, and three after the point unless it is smaller than that.

    >>> change_text(0.16666667), change_text(-0.00351), change_text(0.0000123)
    ('+0.167', '-0.004', '+1.23e-05')
    """
    return f"{round(value, 3) or value:+.3g}"


def count_text(value: float) -> str:
    """A count, with three digits from 10,000 on.

    >>> count_text(9_999), count_text(200_000), count_text(1_250_000)
    ('9,999', '200k', '1.25M')
    """
    if value < 9_999.5:
        return f"{value:,.0f}"
    limit, unit = next((one for one in _UNITS if value >= one[0] * 0.9995), _UNITS[-1])
    return f"{value / limit:.3g}{unit}"


def tick_text(value: float) -> str:
    """A number at an axis: ``200k`` for 200,000."""
    limit, unit = next(((limit, unit) for limit, unit in _UNITS if abs(value) >= limit), (1.0, ""))
    return f"{value:.6g}" if abs(value) >= 1e12 else f"{value / limit:.6g}{unit}"


def money_text(value: float) -> str:
    """An amount of USD."""
    return f"${value:,.2f}" if value >= 1 else f"${value:.4f}" if value >= 0.0001 or not value else f"${value:.2g}"


def duration_text(seconds: float) -> str:
    """A duration."""
    seconds = number(seconds) or 0.0
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def all_cached(usage: Usage) -> bool:
    """Whether every LM call was answered from a cache, and so cost nothing."""
    return bool(usage.lm_calls) and usage.cache_hits == usage.lm_calls


def cost_text(usage: Usage) -> str | None:
    """What calls cost: ``cached`` when all came from a cache, None when it is not known."""
    if not usage.cost and all_cached(usage):
        return "cached"
    return None if usage.cost is None else money_text(usage.cost)


def tokens_text(usage: Usage) -> str | None:
    """How many tokens calls took: ``cached`` when all came from a cache, None when it is not known."""
    if not usage.tokens and all_cached(usage):
        return "cached"
    return None if usage.tokens is None else count_text(usage.tokens)
