"""Stand-ins for tests of code that uses prefopt: offline, free, and as strict as the real thing."""

from prefopt.testing.answers import (
    ANSWERS,
    prefer_by_hash,
    prefer_first,
    prefer_longer,
    prefer_shorter,
    shown_responses,
    verdict_reply,
)
from prefopt.testing.batches import Batch
from prefopt.testing.billing import Bill, read_bills, request_hash
from prefopt.testing.catalogue import CATALOGUE, ModelSpec
from prefopt.testing.fake_anthropic import FakeAnthropic
from prefopt.testing.faults import (
    FAULT_KINDS,
    FaultKind,
    FaultPlan,
    broken_json,
    broken_off,
    cut_off,
    dropped_connection,
    empty_text,
    html_200,
    json_200,
    no_answer,
    processed_then_dropped,
    processed_then_timeout,
    random_faults,
    refusal,
    refused_connection,
    status_fault,
    timeout_fault,
    truncation,
)
from prefopt.testing.serving import socket_client

__all__ = [
    "ANSWERS",
    "CATALOGUE",
    "FAULT_KINDS",
    "Batch",
    "Bill",
    "FakeAnthropic",
    "FaultKind",
    "FaultPlan",
    "ModelSpec",
    "broken_json",
    "broken_off",
    "cut_off",
    "dropped_connection",
    "empty_text",
    "html_200",
    "json_200",
    "no_answer",
    "prefer_by_hash",
    "prefer_first",
    "prefer_longer",
    "prefer_shorter",
    "processed_then_dropped",
    "processed_then_timeout",
    "random_faults",
    "read_bills",
    "refusal",
    "refused_connection",
    "request_hash",
    "shown_responses",
    "socket_client",
    "status_fault",
    "timeout_fault",
    "truncation",
    "verdict_reply",
]
