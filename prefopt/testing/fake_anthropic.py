"""An offline stand-in for the Anthropic Messages API, for tests of code that uses a paid judge.

In: a function that answers requests. Out: a real `anthropic.AsyncAnthropic` whose requests never
leave the process. As strict as the real API about what it accepts, it can also fail in the ways the
real one does. It knows nothing of batches, streams, tools or of whether a judge is any good.

    fake = FakeAnthropic(lambda params: verdict_reply("first"))
    judge = AnthropicJudge("claude-sonnet-5-5", max_usd=1.0, client=fake.client())
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx2
    from anthropic import AsyncAnthropic

Answer = Callable[[dict[str, Any]], "str | Mapping[str, Any]"]
"""From the request's body to the text of the reply, or to fields of the message that replace the
default ones; "text" among them stands for the text block."""

Fault = Callable[
    ["FakeAnthropic", "httpx2.Request"], "httpx2.Response | Awaitable[httpx2.Response]"
]
"""What one request gets in place of an answer."""

_THINKING_TOKENS = 40
_MIN_CACHEABLE_TOKENS = 512
_FIELDS = {
    *("max_tokens", "messages", "model", "cache_control", "container", "diagnostics"),
    *("inference_geo", "metadata", "output_config", "service_tier", "speed", "stop_sequences"),
    *("stream", "system", "thinking", "tool_choice", "tools"),
}
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def verdict_reply(verdict: str, rationale: str = "It follows the rubric better.") -> str:
    """The text of a well-formed judge's reply: "first_much", "first", "tie", "second", ..."""
    return json.dumps({"rationale": rationale, "verdict": verdict})


def shown_responses(params: Mapping[str, Any]) -> tuple[str, str]:
    """The texts of response_1 and response_2 in a request made by `AnthropicJudge`.

    Raises:
        ValueError: the request shows no such responses, or shows them ambiguously.
    """
    content = params["messages"][-1]["content"]
    code = re.match(r"The code of this message is (\w+)\.", content)
    found = []
    for name in ("response_1", "response_2"):
        tag = f"{name}-{code[1]}" if code else name
        texts = re.findall(rf"^<{tag}>\n(.*?)\n</{tag}>$", content, re.DOTALL | re.MULTILINE)
        if len(texts) != 1:
            raise ValueError(f"expected one <{tag}> in the request, found {len(texts)}.")
        found.append(texts[0])
    return found[0], found[1]


class FakeAnthropic:
    """Answers `POST /v1/messages` with what `answer(params)` returns, after a thinking block.

    Any key is accepted but "bad". A model whose name does not begin with "claude-" is not found.
    Tokens are counted as a quarter of the characters; a marked system text long enough to be
    cached is written to a cache once and read from it afterwards.

    Attributes:
        requests: the body of every request that came, in order, those that failed included.
        messages: every message that was sent back and would be billed, in order.
        faults: consumed one per request: a `Fault`, or None for an ordinary answer.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.messages: list[dict[str, Any]] = []
        self.faults: list[Fault | None] = []
        self._cached: set[tuple[str, str]] = set()
        self._ids = itertools.count(1)

    def client(self, **options: Any) -> AsyncAnthropic:
        """A client of the Anthropic SDK that talks to this fake; `options` are the client's own."""
        import httpx2
        from anthropic import AsyncAnthropic

        transport = httpx2.MockTransport(self._respond)
        options = {"api_key": "fake-key", **options}
        return AsyncAnthropic(http_client=httpx2.AsyncClient(transport=transport), **options)

    async def _respond(self, request: httpx2.Request) -> httpx2.Response:
        params = json.loads(request.content) if request.content else {}
        self.requests.append(params)
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            response = fault(self, request)
            return await response if isinstance(response, Awaitable) else response
        key = request.headers.get("x-api-key") or request.headers.get("authorization", "")
        if not key or key.removeprefix("Bearer ") == "bad":
            return _error(401, "invalid x-api-key" if key else "x-api-key header is required")
        if request.method != "POST" or not request.url.path.endswith("/v1/messages"):
            return _error(404, f"Not found: {request.method} {request.url.path}")
        if problem := _rejection(params):
            return _error(400, problem)
        if not params["model"].startswith("claude-"):
            return _error(404, f"model: {params['model']}")
        return self.reply(params)

    def reply(self, params: dict[str, Any], **changes: Any) -> httpx2.Response:
        """The response to an accepted request; `changes` replace fields of the message."""
        import httpx2

        try:
            answer = self.answer(params)
        except Exception as error:
            # The SDK would take an exception for a broken connection and hide it behind retries.
            return _error(400, f"the fake's answer function raised {type(error).__name__}: {error}")
        fields = {"text": answer} if isinstance(answer, str) else dict(answer)
        fields |= changes
        text = fields.pop("text", "")
        usage = self._usage(params, text)
        if usage["output_tokens"] > params["max_tokens"]:
            usage["output_tokens"] = params["max_tokens"]
            text = text[: 4 * max(params["max_tokens"] - _THINKING_TOKENS, 0)]
            fields.setdefault("stop_reason", "max_tokens")
        message = {
            "id": f"msg_fake{next(self._ids)}",
            "type": "message",
            "role": "assistant",
            "model": params["model"],
            "content": [
                {"type": "thinking", "thinking": "", "signature": "fake"},
                {"type": "text", "text": text},
            ],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "stop_details": None,
            "usage": usage,
            **fields,
        }
        self.messages.append(message)
        headers = {"content-type": "application/json", "request-id": "req_fake"}
        # Escaped to ASCII, as half a character in a text could not be sent otherwise.
        return httpx2.Response(200, content=json.dumps(message).encode(), headers=headers)

    def _usage(self, params: dict[str, Any], text: str) -> dict[str, Any]:
        system = params.get("system") or ""
        n_system = len(system if isinstance(system, str) else json.dumps(system)) // 4
        usage = {
            "input_tokens": len(json.dumps(params["messages"])) // 4,
            "output_tokens": _THINKING_TOKENS + len(text) // 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        }
        marked = isinstance(system, list) and any("cache_control" in block for block in system)
        if marked and n_system >= _MIN_CACHEABLE_TOKENS:
            key = (params["model"], json.dumps(system))
            kind = "read" if key in self._cached else "creation"
            usage[f"cache_{kind}_input_tokens"] = n_system
            self._cached.add(key)
        else:
            usage["input_tokens"] += n_system
        return usage


def _rejection(params: dict[str, Any]) -> str | None:
    """Why the real API would answer 400 to this request; None when it would not."""
    if unknown := sorted(set(params) - _FIELDS):
        return f"{unknown[0]}: Extra inputs are not permitted"
    for name in ("model", "max_tokens", "messages"):
        if not params.get(name):
            return f"{name}: Field required"
    if not isinstance(params["max_tokens"], int):
        return "max_tokens: Input should be a valid integer"
    for index, message in enumerate(params["messages"]):
        if message.get("role") not in ("user", "assistant"):
            return f"messages.{index}.role: Input should be 'user' or 'assistant'"
        if not message.get("content"):
            return f"messages.{index}: user messages must have non-empty content"
    if params["messages"][-1]["role"] == "assistant":
        return "This model does not support assistant message prefill."
    return _thinking_rejection(params) or _output_rejection(params.get("output_config") or {})


def _thinking_rejection(params: dict[str, Any]) -> str | None:
    model = params["model"]
    thinking = (params.get("thinking") or {}).get("type")
    always_thinks = re.search(r"(opus-5-5|sonnet-5-5|fable-5|mythos)", model)
    if thinking == "enabled" and re.search(r"-5(-\d)?$", model) and "-4-" not in model:
        return '"thinking.type.enabled" is not supported for this model.'
    if thinking == "disabled" and always_thinks:
        return '"thinking.type.disabled" is not supported for this model.'
    if (params.get("tool_choice") or {}).get("type") in ("any", "tool") and always_thinks:
        return 'tool_choice: type "tool" and "any" are not supported for this model.'
    return None


def _output_rejection(config: dict[str, Any]) -> str | None:
    if unknown := sorted(set(config) - {"effort", "format"}):
        return f"output_config.{unknown[0]}: Extra inputs are not permitted"
    if config.get("effort") not in (None, *_EFFORTS):
        return f"output_config.effort: Input should be one of {', '.join(_EFFORTS)}"
    if "format" in config:
        schema = config["format"].get("schema")
        if config["format"].get("type") != "json_schema" or not isinstance(schema, dict):
            return "output_config.format: a json_schema needs a schema"
        if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
            return "output_config.format.schema: additionalProperties must be false"
    return None


def _error(
    status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> httpx2.Response:
    import httpx2

    error: dict[str, Any] = {"type": _ERROR_TYPES.get(status, "api_error"), "message": message}
    if code:
        error["details"] = {"error_code": code}
    body = {"type": "error", "error": error, "request_id": "req_fake"}
    return httpx2.Response(status, json=body, headers={"request-id": "req_fake", **(headers or {})})


def status_fault(
    status: int,
    *,
    retry_after: float | str | None = None,
    code: str | None = None,
    message: str | None = None,
) -> Fault:
    """An HTTP error: `retry_after` in seconds or as an HTTP date, `code` as in "error_code"."""
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    return lambda fake, request: _error(status, message or f"injected {status}", code, headers)


def timeout_fault(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """The request is sent and no answer comes in time."""
    import httpx2

    raise httpx2.ReadTimeout("injected", request=request)


def dropped_connection(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """The request is sent and the connection breaks before the answer."""
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


def html_200(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """A page of a proxy in place of the API's answer, with status 200."""
    import httpx2

    return httpx2.Response(200, html="<html><body>Please sign in</body></html>")


def broken_json(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """A body that breaks off in the middle, with status 200."""
    import httpx2

    headers = {"content-type": "application/json"}
    return httpx2.Response(200, content=b'{"id": "msg_fake", "cont', headers=headers)


def refusal(category: str | None = None) -> Fault:
    """A message with stop reason "refusal" and no text; it is billed."""
    details = {"type": "refusal", "category": category, "explanation": None}

    def fault(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
        params = json.loads(request.content)
        return fake.reply(params, content=[], stop_reason="refusal", stop_details=details)

    return fault


def truncation(fake: FakeAnthropic, request: httpx2.Request) -> httpx2.Response:
    """A message that used up its tokens on thinking before the text ended; it is billed in full."""
    params = json.loads(request.content)
    usage = fake._usage(params, "") | {"output_tokens": params["max_tokens"]}
    text = '{"rationale": "It breaks o'
    return fake.reply(params, text=text, stop_reason="max_tokens", usage=usage)
