"""What the fake API has billed: one line for every answer somebody would have to pay for.

In: accepted requests and their messages. Out: `Bill`s, and an append-only file of them that another
process can read while the server runs or after its client was killed. It knows no prices.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from prefopt.testing.answers import without_fence_code


class Bill(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One billed answer. Times are Unix seconds; tokens are as in the message's usage."""

    time_s: float
    request_hash: str
    model: str
    message_id: str
    stop_reason: str | None
    service_tier: str
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    batch_id: str | None = None
    custom_id: str | None = None


def request_hash(params: Mapping[str, Any]) -> str:
    """SHA-256 over model, system text and user texts: the same question has the same hash.

    Limits and effort are left out, and so is the code of a judge's fences, which differs between
    two judge objects that ask the same.
    """
    texts = [
        without_fence_code(content) if isinstance(content, str) else content
        for content in (m["content"] for m in params["messages"] if m["role"] == "user")
    ]
    material = json.dumps([params["model"], params.get("system"), texts])
    return hashlib.sha256(material.encode()).hexdigest()


class BillLog:
    """An append-only JSONL file; a line is on its way to the disk before the answer is sent."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._encoder = msgspec.json.Encoder()

    def write(self, bill: Bill) -> None:
        """Append one line, in one write, so that several processes can share the file."""
        os.write(self._file, self._encoder.encode(bill) + b"\n")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()


def read_bills(path: str | Path) -> list[Bill]:
    """All bills of a log, in the order of billing; none where there is no file yet.

    Raises:
        msgspec.DecodeError: a line is no bill.
    """
    path = Path(path)
    if not path.exists():
        return []
    return msgspec.json.Decoder(Bill).decode_lines(path.read_bytes())
