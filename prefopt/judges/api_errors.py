"""What the errors of a model API mean for judging: stop, try again, or give up on one comparison.

In: an HTTP status with its headers, a broken connection, a body. Out: `JudgeUnavailable` or
`Unanswered`. It knows no SDK and no service; whoever calls it says what a service's own codes mean.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from prefopt.errors import JudgeUnavailable
from prefopt.judges.api_judge import Unanswered


def status_trouble(
    status: int,
    said: str,
    headers: Mapping[str, str],
    *,
    retry_after_cap_s: float,
    credentials: str,
    address: str,
    out_of_money: bool = False,
    too_long: bool = False,
) -> JudgeUnavailable | Unanswered:
    """What an HTTP error means.

    Args:
        status: the HTTP status.
        said: the status and the service's own words, without secrets.
        headers: of the response; `retry-after-ms` and `retry-after` are read.
        retry_after_cap_s: the longest wait that is obeyed.
        credentials: where the user looks when a key is rejected, such as "OPENAI_API_KEY".
        address: where the user sets the service's address, such as "base_url".
        out_of_money: whether the service's own words say that the account may not spend more.
        too_long: whether they say that the request does not fit the model.
    """
    if status == 402 or out_of_money:
        return JudgeUnavailable(
            f"the API account may not spend more ({said}). Raise its spending limit or top it up."
        )
    if status == 401:
        return JudgeUnavailable(
            f"the API rejected the credentials ({said}). Check {credentials} and {address}."
        )
    if status == 403:
        return JudgeUnavailable(
            f"the API does not allow this request ({said}). Use a key that may use this model."
        )
    if status == 404:
        return JudgeUnavailable(
            f"the API does not know what was asked for ({said}). Check the model's name and "
            f"{address}."
        )
    if status == 413 or too_long:
        return Unanswered(f"Rejected as too long ({said}).", failure="too_long", passing=False)
    if status in (408, 409, 429) or status >= 500:
        wait_s = retry_after_s(headers, time.time())
        if wait_s is not None and wait_s > retry_after_cap_s:
            return JudgeUnavailable(
                f"the API asks to wait {wait_s:,.0f} s ({said}), more than the "
                f"{retry_after_cap_s:,.0f} s of retry_after_cap_s. Run again later."
            )
        return Unanswered(
            f"The API could not answer ({said}).",
            retry_after_s=wait_s,
            congestion=status in (429, 529),
        )
    return Unanswered(f"The API rejected the request ({said}).", passing=False)


def connection_trouble(error: Exception, address: str = "the API") -> Unanswered:
    """What an SDK's error of the connection means, with httpx2's own as its cause.

    It surely cost nothing only where no connection came about. `address` is what did not answer.
    """
    import httpx2

    cause = error.__cause__
    unsent = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
    # Only the type: the text of a transport error may quote request headers.
    return Unanswered(
        f"No answer from {address} ({type(cause or error).__name__}).",
        billed=False if isinstance(cause, unsent) else None,
    )


def readable_json(content: bytes, hide: Callable[[str], str]) -> Any:
    """The JSON value of a body.

    Raises:
        Unanswered: it is none, such as a proxy's page; its beginning is quoted through `hide`.
    """
    try:
        # Not msgspec's own reader: half a character in an escape is no reason to pay twice.
        return json.loads(content)
    except (ValueError, RecursionError):
        # Hidden before it is cut, as half a key would not be found.
        page = hide(content[:4000].decode("utf-8", "replace"))[:120]
        raise Unanswered(
            f"The API's answer was not readable JSON: {page!r}.", billed=None
        ) from None


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Seconds to wait by a `retry-after` header in seconds, milliseconds or as an HTTP date."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(TypeError, ValueError):
            seconds = float(headers.get(name, "")) * unit_s
            if math.isfinite(seconds):
                return max(seconds, 0.0)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(date.timestamp() - now_s, 0.0)
    return None
