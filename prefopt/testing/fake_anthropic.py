"""An offline stand-in for the Anthropic API, for tests of code that uses a paid judge.

In: a function that answers requests. Out: a real `anthropic.AsyncAnthropic` whose requests never
leave the process, or a server on a socket of this machine. Messages, token counts, models and
message batches are as strict as the real API about what they accept, report what was used, and can
fail in the ways the real ones do. It knows nothing of streams, of what tools do, or of whether a
judge is any good.

    fake = FakeAnthropic(lambda params: verdict_reply("first"))
    judge = AnthropicJudge("claude-sonnet-5-5", max_usd=1.0, client=fake.client())
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefopt.testing.answers import Answer, shown_responses, verdict_reply
from prefopt.testing.batches import Batch, BatchResult, BatchStore, errored
from prefopt.testing.billing import Bill, BillLog, request_hash
from prefopt.testing.catalogue import CATALOGUE, ModelSpec, find_model, model_info
from prefopt.testing.faults import Fault, FaultPlan
from prefopt.testing.rate_limits import RateLimits
from prefopt.testing.validation import (
    Rejected,
    check_batch,
    check_batch_params,
    check_count_tokens,
    check_message,
)
from prefopt.testing.wire_format import ERROR_TYPES, endpoint_of, error_body, json_response

if TYPE_CHECKING:
    import httpx2
    from anthropic import AsyncAnthropic

__all__ = ["Answer", "FakeAnthropic", "Fault", "shown_responses", "verdict_reply"]

_THINKING_TOKENS = 40
_BILLED_TOKENS = (
    *("input_tokens", "output_tokens"),
    *("cache_creation_input_tokens", "cache_read_input_tokens"),
)
_CACHE_SECONDS = {"5m": 300.0, "1h": 3600.0}


class _Prompt(NamedTuple):
    """The size of a request in tokens, and where its marked system text is kept, if it is."""

    message_tokens: int
    system_tokens: int
    cache_key: tuple[str, str] | None
    cache_ttl: str
    cached: bool

    @property
    def uncached_tokens(self) -> int:
        """What counts toward the limit of input tokens."""
        return self.message_tokens + (0 if self.cached else self.system_tokens)


class FakeAnthropic:
    """Answers with what `answer(params)` returns, after a thinking block.

    Any key is accepted but "bad". A model whose name does not begin with "claude-" is not found.
    Tokens are counted as a quarter of the characters; a marked system text long enough to be
    cached is written to a cache once and read from it while it lasts.

    Args:
        answer: from a request's body to the reply; one that raises makes the request fail with
            status 400 and the reason.
        seed: decides the order of batch results.
        clock: Unix time in seconds; every time the fake tells or measures comes from here.
        latency_s: how long an answer takes. It is billed when its request arrives, so a client that
            is killed while it waits has paid.
        batch_polls: a batch ends at this retrieval of it.
        batch_time_s: if given, a batch ends this long after it was made, however often it is asked
            for.
        batch_result: decides the outcome of every request of a batch; all succeed by default.
        finished_at_cancel: share of a batch's requests that are done when it is canceled.
        requests_per_minute: if given, a token bucket of this size for each family of endpoints
            (messages, token counts, models, batches); what does not fit is answered with 429.
        input_tokens_per_minute: the same for tokens of messages that are not read from a cache.
        output_tokens_per_minute: the same for tokens of replies, known only afterwards.
        log: a file to which a `Bill` is appended for every billed answer; see `read_bills`.
        models: specs of models to add to `CATALOGUE` or to replace there.
        keep: whether `requests`, `messages`, `bills` and `calls` are kept; a benchmark of many
            requests saves memory without them. The numbers are counted in any case.

    Attributes:
        requests: the body of every request for a message that came, in order, those that failed
            included, those inside batches not.
        messages: every message that would be billed, in order, those of batches included.
        bills: a `Bill` for every one of `messages`.
        batches: every batch that was made, by id, in order, deleted ones included.
        calls: the name of the endpoint of every request that came ("messages.create",
            "batches.results", ...), in order.
        n_calls: how many requests of any kind came.
        n_billed: how many answers were billed.
        faults: consumed one per request but for those about models: a `Fault`, or None for an
            ordinary answer. Or
            a `FaultPlan`, which never ends.
        max_batch_requests: the most requests in a batch.
        max_batch_bytes: the largest body that makes a batch.
        max_request_bytes: the largest other body.
    """

    max_batch_requests = 100_000
    max_batch_bytes = 256 * 2**20
    max_request_bytes = 32 * 2**20

    def __init__(
        self,
        answer: Answer,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.time,
        latency_s: float = 0.0,
        batch_polls: int = 2,
        batch_time_s: float | None = None,
        batch_result: BatchResult | None = None,
        finished_at_cancel: float = 0.0,
        requests_per_minute: float | None = None,
        input_tokens_per_minute: float | None = None,
        output_tokens_per_minute: float | None = None,
        log: str | Path | None = None,
        models: Mapping[str, ModelSpec] | None = None,
        keep: bool = True,
    ) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.messages: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.n_calls = 0
        self.n_billed = 0
        self.faults: list[Fault | None] | FaultPlan = []
        self._clock = clock
        self._latency_s = latency_s
        self._catalogue = {**CATALOGUE, **(models or {})}
        self._keep = keep
        self._billed: list[
            tuple[float, dict[str, Any], dict[str, Any], str | None, str | None]
        ] = []
        self._log = None if log is None else BillLog(log)
        self._lock = threading.RLock()
        self._message_ids = itertools.count(1)
        self._request_ids = itertools.count(1)
        self._cached_until: dict[tuple[str, str], float] = {}
        self._limits = {
            family: RateLimits(
                requests_per_minute=requests_per_minute,
                input_tokens_per_minute=input_tokens_per_minute if family == "messages" else None,
                output_tokens_per_minute=output_tokens_per_minute if family == "messages" else None,
                clock=clock,
            )
            for family in ("messages", "count_tokens", "models", "batches")
        }
        self._batch_store = BatchStore(
            self._batch_item,
            clock=clock,
            polls=batch_polls,
            time_s=batch_time_s,
            result=batch_result,
            finished_at_cancel=finished_at_cancel,
            seed=seed,
        )

    @property
    def batches(self) -> dict[str, Batch]:
        """Every batch that was made, by id, in order, deleted ones included."""
        return self._batch_store.by_id

    @property
    def bills(self) -> list[Bill]:
        """A `Bill` for every one of `messages`, made when asked for."""
        return [_bill(*billed) for billed in self._billed]

    def end_batches(self) -> None:
        """End (and bill) every open batch now, as the real API would without being asked."""
        with self._lock:
            self._batch_store.end_all()

    # --- Ways in ------------------------------------------------------------------------------

    def client(self, **options: Any) -> AsyncAnthropic:
        """A client of the Anthropic SDK that talks to this fake; `options` are the client's own."""
        import httpx2
        from anthropic import AsyncAnthropic

        transport = httpx2.MockTransport(self.respond)
        options = {"api_key": "fake-key", **options}
        return AsyncAnthropic(http_client=httpx2.AsyncClient(transport=transport), **options)

    def serve(
        self, *, unix_path: str | Path | None = None, port: int | None = None
    ) -> contextlib.AbstractContextManager[str]:
        """Serve on a Unix socket, or on a port of 127.0.0.1 (0: any free one), from a thread.

        Yields the base URL to give to a client. One for a Unix socket also needs the path: see
        `socket_client`.
        """
        from prefopt.testing.serving import serve_in_thread

        return serve_in_thread(self.respond, unix_path=unix_path, port=port)

    async def respond(self, request: httpx2.Request) -> httpx2.Response:
        """Answer one HTTP request, after `latency_s`, with the next fault if one is due.

        Raises:
            httpx2.TransportError: where the fault is one of the connection.
        """
        endpoint = endpoint_of(request.method, request.url.path)
        with self._lock:
            fault = self._next_fault(endpoint.name)
            self.n_calls += 1
            if self._keep:
                self.calls.append(endpoint.name)
                if endpoint.name == "messages.create":
                    self.requests.append(_body(request))
        if fault is None:
            response = self.handle(request)
        else:
            made = fault(self, request)
            response = await made if isinstance(made, Awaitable) else made
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        return response

    def handle(self, request: httpx2.Request) -> httpx2.Response:
        """The ordinary answer to one HTTP request: no fault, no wait."""
        with self._lock:
            try:
                return self._handle(request)
            except Rejected as rejected:
                return self.error_response(rejected.status, rejected.message)

    def _next_fault(self, endpoint: str) -> Fault | None:
        if isinstance(self.faults, FaultPlan):
            return self.faults.draw(endpoint)
        # A list is written for the requests a test counts; looking up a model is not one of them.
        if endpoint.startswith("models.") or not self.faults:
            return None
        return self.faults.pop(0)

    # --- Endpoints ----------------------------------------------------------------------------

    def _handle(self, request: httpx2.Request) -> httpx2.Response:
        headers = request.headers
        key = headers.get("x-api-key") or headers.get("authorization", "")
        if not key or key.removeprefix("Bearer ") == "bad":
            raise Rejected(401, "invalid x-api-key" if key else "x-api-key header is required")
        name, item_id, prefix = endpoint_of(request.method, request.url.path)
        if not name:
            raise Rejected(404, f"Not found: {request.method} {request.url.path}")
        if not headers.get("anthropic-version"):
            raise Rejected(400, "anthropic-version: header is required")
        most = self.max_batch_bytes if name == "batches.create" else self.max_request_bytes
        if len(request.content) > most:
            raise Rejected(413, f"Request exceeds the maximum size of {most} bytes")
        if name == "messages.create":
            return self._create_message(_body(request))
        family = "count_tokens" if name == "messages.count_tokens" else name.split(".")[0]
        if limited := self._limited(family, 0):
            return limited
        match name:
            case "messages.count_tokens":
                params = _body(request)
                check_count_tokens(params, self._catalogue)
                prompt = self._prompt(params, find_model(params["model"], self._catalogue))
                tokens = prompt.message_tokens + prompt.system_tokens
                return self._json({"input_tokens": tokens}, family)
            case "models.list":
                infos = [model_info(model, spec) for model, spec in self._catalogue.items()]
                return self._json(_page(infos, False), family)
            case "models.retrieve":
                spec = find_model(item_id, self._catalogue)
                if spec is None:
                    raise Rejected(404, f"model: {item_id}")
                return self._json(model_info(item_id, spec), family)
        base_url = f"{request.url.scheme}://{request.url.netloc.decode()}{prefix}"
        store = self._batch_store
        match name:
            case "batches.create":
                batch = store.create(check_batch(_body(request), self.max_batch_requests))
            case "batches.list":
                batches, has_more = store.page(request.url.params)
                views = [store.view(batch, base_url) for batch in batches]
                return self._json(_page(views, has_more), family)
            case "batches.retrieve":
                batch = store.retrieve(item_id)
            case "batches.cancel":
                batch = store.cancel(item_id)
            case "batches.delete":
                store.delete(item_id)
                return self._json({"id": item_id, "type": "message_batch_deleted"}, family)
            case _:
                lines = [json.dumps(line) + "\n" for line in store.results(item_id)]
                headers = self._headers(family) | {"content-type": "application/x-jsonl"}
                return json_response("".join(lines).encode(), headers)
        return self._json(store.view(batch, base_url), family)

    def _create_message(self, params: Any) -> httpx2.Response:
        spec = check_message(params, self._catalogue)
        prompt = self._prompt(params, spec)
        if limited := self._limited("messages", prompt.uncached_tokens):
            return limited
        return self._json(self._message(params, spec, prompt, {}), "messages")

    def reply(self, params: dict[str, Any], **changes: Any) -> httpx2.Response:
        """The response to a request taken as accepted; `changes` replace fields of the message.

        "text" among them stands for the text block, "output_tokens" for those of the usage.
        """
        with self._lock:
            spec = find_model(params["model"], self._catalogue) or ModelSpec()
            prompt = self._prompt(params, spec)
            try:
                message = self._message(params, spec, prompt, changes)
            except Rejected as rejected:
                return self.error_response(rejected.status, rejected.message)
            return self._json(message, "messages")

    def error_response(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx2.Response:
        """An error as the API sends it: `code` is its "error_code", `headers` come on top."""
        own = self._headers("messages")
        body = error_body(status, message, code, own["request-id"])
        return json_response(json.dumps(body).encode(), {**own, **(headers or {})}, status)

    def _limited(self, family: str, input_tokens: int) -> httpx2.Response | None:
        limits = self._limits[family]
        refused = limits.admit(input_tokens)
        if refused is None:
            return None
        name, wait_s = refused
        body = f"This request would exceed your rate limit of {name.replace('-', ' ')} per minute."
        headers = {**limits.headers(), "retry-after": str(math.ceil(wait_s))}
        return self.error_response(429, body, None, headers)

    def _headers(self, family: str) -> dict[str, str]:
        return {
            "request-id": f"req_fake{next(self._request_ids)}",
            **self._limits[family].headers(),
        }

    def _json(self, body: dict[str, Any], family: str) -> httpx2.Response:
        # Escaped to ASCII, as half a character in a text could not be sent otherwise.
        return json_response(json.dumps(body).encode(), self._headers(family))

    # --- Messages -----------------------------------------------------------------------------

    def _batch_item(self, batch_id: str, custom_id: str, params: dict[str, Any]) -> dict[str, Any]:
        try:
            spec = check_batch_params(params, self._catalogue)
            prompt = self._prompt(params, spec)
            message = self._message(params, spec, prompt, {}, batch_id, custom_id)
        except Rejected as rejected:
            return errored(ERROR_TYPES.get(rejected.status, "api_error"), rejected.message)
        return {"type": "succeeded", "message": message}

    def _message(
        self,
        params: dict[str, Any],
        spec: ModelSpec,
        prompt: _Prompt,
        changes: dict[str, Any],
        batch_id: str | None = None,
        custom_id: str | None = None,
    ) -> dict[str, Any]:
        """Make the message that answers `params`, and bill it."""
        n_input = prompt.message_tokens + prompt.system_tokens
        if n_input > spec.max_input_tokens:
            raise Rejected(
                400, f"prompt is too long: {n_input} tokens > {spec.max_input_tokens} maximum"
            )
        try:
            answer = self.answer(params)
        except Exception as error:
            # The SDK would take an exception for a broken connection and hide it behind retries.
            said = f"the fake's answer function raised {type(error).__name__}: {error}"
            raise Rejected(400, said) from error
        fields = {"text": answer} if isinstance(answer, str) else dict(answer)
        fields |= changes
        text = fields.pop("text", "")
        thinks = (params.get("thinking") or {}).get("type") not in ("disabled", "between_tools")
        n_thinking = _THINKING_TOKENS if thinks else 0
        n_output = n_thinking + len(text) // 4
        if "output_tokens" in fields:
            n_output = int(fields.pop("output_tokens"))
            fields.pop("usage", None)  # an answer's own usage would hide it
        if n_output > params["max_tokens"]:
            n_output = params["max_tokens"]
            text = text[: 4 * max(n_output - n_thinking, 0)]
            fields.setdefault("stop_reason", "max_tokens")
        content = [{"type": "thinking", "thinking": "", "signature": "fake"}] if thinks else []
        tier = "standard" if batch_id is None else "batch"
        message = {
            "id": f"msg_fake{next(self._message_ids)}",
            "type": "message",
            "role": "assistant",
            "model": params["model"],
            "content": [*content, {"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "stop_details": None,
            "usage": {
                **self._input_usage(prompt),
                "output_tokens": n_output,
                "output_tokens_details": {"thinking_tokens": min(n_thinking, n_output)},
                "service_tier": tier,
            },
            **fields,
        }
        if batch_id is None:
            self._limits["messages"].produced(n_output)
        self.n_billed += 1
        billed = self._clock(), params, message, batch_id, custom_id
        if self._keep:
            self.messages.append(message)
            self._billed.append(billed)
        if self._log is not None:
            self._log.write(_bill(*billed))
        return message

    def _prompt(self, params: dict[str, Any], spec: ModelSpec | None) -> _Prompt:
        system = params.get("system") or ""
        system_json = system if isinstance(system, str) else json.dumps(system)
        n_messages = len(json.dumps(params["messages"])) // 4
        n_system = len(system_json) // 4
        marks = (
            [block["cache_control"] for block in system if block.get("cache_control")]
            if isinstance(system, list)
            else []
        )
        key = None
        if marks and spec is not None and n_system >= spec.min_cacheable_tokens:
            key = (params["model"], system_json)
        return _Prompt(
            message_tokens=n_messages,
            system_tokens=n_system,
            cache_key=key,
            cache_ttl=marks[-1].get("ttl", "5m") if marks else "5m",
            cached=key is not None and self._cached_until.get(key, -math.inf) > self._clock(),
        )

    def _input_usage(self, prompt: _Prompt) -> dict[str, Any]:
        uncached, written, read = prompt.message_tokens + prompt.system_tokens, 0, 0
        if prompt.cache_key is not None:
            uncached = prompt.message_tokens
            read = prompt.system_tokens if prompt.cached else 0
            written = prompt.system_tokens - read
            # Reading it keeps it for as long again.
            lasts_s = _CACHE_SECONDS[prompt.cache_ttl]
            self._cached_until[prompt.cache_key] = self._clock() + lasts_s
        return {
            "input_tokens": uncached,
            "cache_creation_input_tokens": written,
            "cache_read_input_tokens": read,
            "cache_creation": {
                "ephemeral_5m_input_tokens": written if prompt.cache_ttl == "5m" else 0,
                "ephemeral_1h_input_tokens": written if prompt.cache_ttl == "1h" else 0,
            },
        }


def _bill(
    time_s: float,
    params: dict[str, Any],
    message: dict[str, Any],
    batch_id: str | None,
    custom_id: str | None,
) -> Bill:
    # A test may have the fake send any usage, none among them.
    usage = message["usage"] if isinstance(message["usage"], dict) else {}
    return Bill(
        time_s=time_s,
        request_hash=request_hash(params),
        model=params["model"],
        message_id=message["id"],
        stop_reason=message["stop_reason"],
        service_tier="standard" if batch_id is None else "batch",
        **{name: usage[name] if isinstance(usage.get(name), int) else 0 for name in _BILLED_TOKENS},
        batch_id=batch_id,
        custom_id=custom_id,
    )


_PARSED = "prefopt.parsed_body"


def _body(request: httpx2.Request) -> Any:
    """The request's JSON, parsed once; an empty object for no body, None for a broken one."""
    if _PARSED not in request.extensions:
        try:
            body = json.loads(request.content) if request.content else {}
        except ValueError:
            body = None
        request.extensions[_PARSED] = body
    return request.extensions[_PARSED]


def _page(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {
        "data": data,
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
