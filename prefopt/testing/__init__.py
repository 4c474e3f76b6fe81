"""Stand-ins for tests of code that uses prefopt: offline, free, and as strict as the real thing."""

from prefopt.testing.fake_anthropic import (
    FakeAnthropic,
    broken_json,
    dropped_connection,
    html_200,
    no_answer,
    refusal,
    refused_connection,
    shown_responses,
    status_fault,
    timeout_fault,
    truncation,
    verdict_reply,
)

__all__ = [
    "FakeAnthropic",
    "broken_json",
    "dropped_connection",
    "html_200",
    "no_answer",
    "refusal",
    "refused_connection",
    "shown_responses",
    "status_fault",
    "timeout_fault",
    "truncation",
    "verdict_reply",
]
