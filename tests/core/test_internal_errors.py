"""The one warning of an internal error."""

from __future__ import annotations

import logging

import pytest

from dspy_otel.core.internal_errors import guard


@pytest.mark.injects_faults
def test_a_class_of_the_users_is_named_without_control_characters_and_secrets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kind = type("Odd\x1b[2J\npassword=hunter2hunter2" + "x" * 1000, (Exception,), {})
    with caplog.at_level(logging.WARNING, "dspy_otel"), guard("a part"):
        raise kind("what the program works on")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "Odd_" in message
    assert message.isprintable()
    assert len(message) < 400
    assert "hunter2" not in message
    assert "works on" not in message
