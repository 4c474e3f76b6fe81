"""How the API fails: one function for each way, and a repeatable random mix of them.

A fault takes the place of one answer. It gets the fake and the request, and returns a response or
raises what the connection would. It knows nothing of how a client should take it.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from prefopt.testing.wire_format import ENDPOINTS, endpoint_of

if TYPE_CHECKING:
    import httpx2

    from prefopt.testing.fake_anthropic import FakeAnthropic

Fault = Callable[
    ["FakeAnthropic", "httpx2.Request"], "httpx2.Response | Awaitable[httpx2.Response]"
]
"""What one request gets in place of an answer."""

# --- Errors the API tells -------------------------------------------------------------------------


def status_fault(
    status: int,
    *,
    retry_after: float | str | None = None,
    code: str | None = None,
    message: str | None = None,
    should_retry: Literal["true", "false"] | None = None,
) -> Fault:
    """An HTTP error: `retry_after` in seconds or as an HTTP date, `code` as in "error_code".

    `should_retry` is the API's word on whether to try again, in the header x-should-retry.
    """
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    if should_retry is not None:
        headers["x-should-retry"] = should_retry
    said = message or f"injected {status}"
    return lambda fake, request: fake.error_response(status, said, code, headers)


# --- Connections that break -----------------------------------------------------------------------


def timeout_fault(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """The request is sent and no answer comes in time."""
    import httpx2

    raise httpx2.ReadTimeout("injected", request=request)


def dropped_connection(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """The request is sent and the connection breaks before anything was done about it."""
    import httpx2

    raise httpx2.RemoteProtocolError("injected", request=request)


def refused_connection(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """No connection comes about, so the request is not sent."""
    import httpx2

    raise httpx2.ConnectError("injected", request=request)


async def no_answer(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """The request hangs until it is cancelled."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable: only cancelling ends the wait")


def processed_then_timeout(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """The request is carried out and billed, and the answer comes too late.

    Of a message batch, whoever sends it again has two.
    """
    fake.handle(request)
    return timeout_fault(fake, request)


def processed_then_dropped(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """The request is carried out and billed, and the connection breaks before the answer."""
    fake.handle(request)
    return dropped_connection(fake, request)


# --- Answers that are none ------------------------------------------------------------------------


def html_200(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """A page of a proxy in place of the API's answer, with status 200."""
    import httpx2

    return httpx2.Response(200, html="<html><body>Please sign in</body></html>")


def broken_json(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """A body that breaks off in the middle, with status 200."""
    return _json_bytes(b'{"id": "msg_fake", "cont')


def json_200(value: Any) -> Fault:
    """Any JSON value as the body, with status 200: a string, or an object that is no message."""
    content = json.dumps(value).encode()
    return lambda fake, request: _json_bytes(content)


def cut_off(share: float = 0.5) -> Fault:
    """The ordinary answer, of which only a share is sent, as if that were all of it.

    What is left ends inside a line. Of batch results, the lines before it are good.
    """

    def fault(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
        import httpx2

        whole = fake.handle(request)
        content = _beginning(whole.content, share)
        headers = {k: v for k, v in whole.headers.items() if k != "content-length"}
        return httpx2.Response(whole.status_code, content=content, headers=headers)

    return fault


def broken_off(share: float = 0.5) -> Fault:
    """The ordinary answer, in the middle of which the connection breaks."""

    def fault(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
        import httpx2

        whole = fake.handle(request)

        async def body() -> AsyncIterator[bytes]:
            yield _beginning(whole.content, share)
            raise httpx2.RemoteProtocolError("injected", request=request)

        return httpx2.Response(whole.status_code, content=body(), headers=whole.headers)

    return fault


def _json_bytes(content: bytes) -> httpx2.Response:
    import httpx2

    return httpx2.Response(200, content=content, headers={"content-type": "application/json"})


def _beginning(content: bytes, share: float) -> bytes:
    end = int(len(content) * share)
    while end > 0 and content[end - 1 : end] in (b"\n", b"}"):
        end -= 1
    return content[:end]


# --- Messages nobody can use ----------------------------------------------------------------------


def refusal(category: str | None = None) -> Fault:
    """A message with stop reason "refusal" and no text; it is billed."""
    details = {"type": "refusal", "category": category, "explanation": None}
    return _message_fault(lambda params: {"content": [], "stop_details": details}, "refusal")


def truncation(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """A message that used up its tokens on thinking before the text ended; it is billed in full."""
    return _message_fault(
        lambda params: {
            "text": '{"rationale": "It breaks o',
            "output_tokens": params["max_tokens"],
        },
        "max_tokens",
    )(fake, request)


def empty_text(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """A message with an empty text that claims to have ended well; it is billed."""
    return _message_fault(lambda params: {"text": ""}, "end_turn")(fake, request)


def _message_fault(changes: Callable[[dict[str, Any]], dict[str, Any]], stop_reason: str) -> Fault:
    def fault(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
        endpoint = endpoint_of(request.method, request.url.path).name
        if endpoint != "messages.create":
            # As an error of the API, since an exception would pass for a broken connection.
            said = f"a fault that is a message was due, and {endpoint or 'this'} answers with none."
            return fake.error_response(400, said)
        params = json.loads(request.content)
        return fake.reply(params, stop_reason=stop_reason, **changes(params))

    return fault


# --- A random mix ---------------------------------------------------------------------------------


class FaultKind(msgspec.Struct, frozen=True, kw_only=True):
    """A fault and what it does to a client.

    Attributes:
        fault: the fault itself.
        effect: "passing" where the same request succeeds later, "item" where a client has to take
            it as the answer, "run" where nothing more can succeed.
        endpoints: the endpoints it can happen at.
        hangs: whether a client on a socket has to wait until its own time limit.
    """

    fault: Fault
    effect: Literal["passing", "item", "run"] = "passing"
    endpoints: tuple[str, ...] = ENDPOINTS
    hangs: bool = False


_MESSAGES = ("messages.create",)
_RESULTS = ("batches.results",)

FAULT_KINDS: dict[str, FaultKind] = {
    "rate_limited": FaultKind(fault=status_fault(429, retry_after=1)),
    "rate_limited_without_wait": FaultKind(fault=status_fault(429)),
    "overloaded": FaultKind(fault=status_fault(529)),
    "server_error": FaultKind(fault=status_fault(500)),
    "bad_gateway": FaultKind(fault=status_fault(502)),
    "unavailable": FaultKind(fault=status_fault(503)),
    "gateway_timeout": FaultKind(fault=status_fault(504)),
    "request_timeout": FaultKind(fault=status_fault(408)),
    "conflict": FaultKind(fault=status_fault(409)),
    "told_to_retry": FaultKind(fault=status_fault(500, should_retry="true")),
    "timeout": FaultKind(fault=timeout_fault, hangs=True),
    "dropped_connection": FaultKind(fault=dropped_connection),
    "refused_connection": FaultKind(fault=refused_connection),
    "processed_then_timeout": FaultKind(fault=processed_then_timeout, hangs=True),
    "processed_then_dropped": FaultKind(fault=processed_then_dropped),
    "html_200": FaultKind(fault=html_200),
    "broken_json": FaultKind(fault=broken_json),
    "not_a_message": FaultKind(fault=json_200({"ok": True}), endpoints=_MESSAGES),
    "json_string": FaultKind(fault=json_200("ok"), endpoints=_MESSAGES),
    "broken_off": FaultKind(fault=broken_off()),
    "cut_results": FaultKind(fault=cut_off(), endpoints=_RESULTS),
    "results_404": FaultKind(fault=status_fault(404), endpoints=_RESULTS),
    "empty_text": FaultKind(fault=empty_text, endpoints=_MESSAGES),
    "truncation": FaultKind(fault=truncation, endpoints=_MESSAGES),
    "refusal": FaultKind(fault=refusal("general_harms"), effect="item", endpoints=_MESSAGES),
    "rejected": FaultKind(fault=status_fault(400), effect="item", endpoints=_MESSAGES),
    "told_not_to_retry": FaultKind(
        fault=status_fault(500, should_retry="false"), effect="item", endpoints=_MESSAGES
    ),
    "no_answer": FaultKind(fault=no_answer, effect="run", hangs=True),
    "unauthorized": FaultKind(fault=status_fault(401), effect="run"),
    "out_of_credit": FaultKind(fault=status_fault(402), effect="run"),
    "forbidden": FaultKind(fault=status_fault(403), effect="run"),
    "spend_limit": FaultKind(
        fault=status_fault(429, code="enforced_spend_limit_reached"), effect="run"
    ),
    "own_spend_limit": FaultKind(
        fault=status_fault(400, message="You have reached your specified API usage limits."),
        effect="run",
    ),
}
"""Every kind of fault by name."""


class FaultPlan:
    """Faults drawn at random: the n-th request of a plan has the same luck every time.

    Args:
        share: how many of the requests fail, 0 to 1.
        seed: decides which, and with what.
        kinds: names in `FAULT_KINDS`; by default all that a run can survive.
        extra: more kinds by name, or others in place of those of `FAULT_KINDS`.

    Attributes:
        drawn: for every request so far the name of its fault, or None.
    """

    def __init__(
        self,
        share: float,
        *,
        seed: int = 0,
        kinds: Iterable[str] | None = None,
        extra: dict[str, FaultKind] | None = None,
    ) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must be 0 to 1, got {share}.")
        known = {**FAULT_KINDS, **(extra or {})}
        names = [n for n, k in known.items() if k.effect != "run"] if kinds is None else list(kinds)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"unknown kinds of faults: {unknown}. There are {', '.join(known)}.")
        self.share = share
        self.drawn: list[str | None] = []
        self._kinds = {
            endpoint: [(name, known[name]) for name in names if endpoint in known[name].endpoints]
            for endpoint in ENDPOINTS
        }
        self._random = random.Random(seed)

    def draw(self, endpoint: str) -> Fault | None:
        """The fault of the next request, which is for `endpoint`."""
        # Both numbers are drawn for every request, so that its luck does not hang on the others'.
        failing, which = self._random.random() < self.share, self._random.random()
        possible = self._kinds.get(endpoint, [])
        if not failing or not possible:
            self.drawn.append(None)
            return None
        name, kind = possible[int(which * len(possible))]
        self.drawn.append(name)
        return kind.fault


def random_faults(
    share: float = 0.3, *, seed: int = 0, kinds: Iterable[str] | None = None
) -> FaultPlan:
    """A plan for `FakeAnthropic.faults` by which this share of all requests fails.

    Raises:
        ValueError: a share outside 0 to 1, or an unknown kind.
    """
    return FaultPlan(share, seed=seed, kinds=kinds)
