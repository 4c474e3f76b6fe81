"""Rate limits as the API keeps and reports them: token buckets that fill up all the time.

In: how many requests and tokens a minute may hold, and a clock. Out: waits in seconds and the
`anthropic-ratelimit-*` headers. It sends nothing and knows no request.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime

UNLIMITED = {"requests": 1_000, "input-tokens": 2_000_000, "output-tokens": 400_000}
"""What the headers report per minute where no limit is simulated: a new account's limits."""


def rfc3339(time_s: float) -> str:
    """A Unix time as the API writes times, such as "2026-11-24T03:26:50Z", to the microsecond."""
    return datetime.fromtimestamp(time_s, UTC).isoformat().replace("+00:00", "Z")


class TokenBucket:
    """Holds at most `per_minute`, is full at first, and fills at `per_minute` / 60 a second."""

    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        if not 0 < per_minute < math.inf:
            raise ValueError(f"a rate limit must be above 0 a minute, got {per_minute}.")
        self.capacity = float(per_minute)
        self._level = float(per_minute)
        self._clock = clock
        self._filled_s = clock()

    def level(self) -> float:
        """What is in it now; below 0 where more was taken than there was."""
        now = self._clock()
        gained = max(now - self._filled_s, 0.0) * self.capacity / 60
        self._level = min(self._level + gained, self.capacity)
        self._filled_s = now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` could be taken; 0 where it can be now.

        More than the bucket holds can never be taken at once, so a full bucket is enough for it.
        """
        missing = min(amount, self.capacity) - self.level()
        return max(missing, 0.0) * 60 / self.capacity

    def take(self, amount: float) -> None:
        """Take `amount` out, below 0 if need be."""
        self._level = self.level() - amount

    def full_at_s(self) -> float:
        """The time at which it will be full, if nothing more is taken."""
        return self._filled_s + (self.capacity - self.level()) * 60 / self.capacity


class RateLimits:
    """The limits of one family of endpoints; None stands for a limit that is not simulated."""

    def __init__(
        self,
        *,
        requests_per_minute: float | None,
        input_tokens_per_minute: float | None,
        output_tokens_per_minute: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        given = {
            "requests": requests_per_minute,
            "input-tokens": input_tokens_per_minute,
            "output-tokens": output_tokens_per_minute,
        }
        self._buckets = {
            name: TokenBucket(limit, clock) for name, limit in given.items() if limit is not None
        }
        self._unlimited: tuple[int, dict[str, str]] | None = None

    def admit(self, input_tokens: int) -> tuple[str, float] | None:
        """Take a request and its input tokens, or say which limit is reached and the wait for it.

        Output tokens are only known afterwards, so they only need to be above 0 beforehand.
        """
        if not self._buckets:
            return None
        wanted = {"requests": 1, "input-tokens": input_tokens, "output-tokens": 1}
        waits = {name: b.wait_s(wanted[name]) for name, b in self._buckets.items()}
        longest = max(waits, key=lambda name: waits[name])
        if waits[longest] > 0:
            return longest, waits[longest]
        for name, bucket in self._buckets.items():
            if name != "output-tokens":
                bucket.take(wanted[name])
        return None

    def produced(self, output_tokens: int) -> None:
        """Take the output tokens of an answer."""
        if "output-tokens" in self._buckets:
            self._buckets["output-tokens"].take(output_tokens)

    def headers(self) -> dict[str, str]:
        """The headers that every answer of the API carries."""
        if self._buckets:
            return self._header_values()
        # The same for a whole second, and there may be thousands of answers in one.
        second = int(self._clock())
        if self._unlimited is None or self._unlimited[0] != second:
            self._unlimited = second, self._header_values()
        return self._unlimited[1]

    def _header_values(self) -> dict[str, str]:
        now = self._clock()
        values = {}
        for name, usual in UNLIMITED.items():
            bucket = self._buckets.get(name)
            limit = int(bucket.capacity) if bucket else usual
            remaining = max(math.floor(bucket.level()), 0) if bucket else usual
            full_at_s = bucket.full_at_s() if bucket else now
            values[f"anthropic-ratelimit-{name}-limit"] = str(limit)
            values[f"anthropic-ratelimit-{name}-remaining"] = str(remaining)
            values[f"anthropic-ratelimit-{name}-reset"] = rfc3339(math.ceil(full_at_s))
        return values
