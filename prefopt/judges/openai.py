"""A judge behind any server that speaks OpenAI's chat completions: OpenAI, vLLM, llama.cpp, Ollama.

How one request is made, sent, priced and read; the only file that knows the OpenAI SDK. When to
send and when to try again is `prefopt.judges.api_judge`'s; orders and datasets are nobody's
business here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import json
import logging
import math
import os
import re
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Literal

import msgspec

from prefopt.errors import JudgeUnavailable
from prefopt.judges.api_errors import connection_trouble, readable_json, status_trouble
from prefopt.judges.api_judge import (
    ApiJudge,
    Reply,
    ReplyEnd,
    Request,
    Unanswered,
    model_name,
)
from prefopt.judges.base import CostEstimate
from prefopt.judges.prices import ModelPrice
from prefopt.judges.rubric import HOUSE_STYLE, Rubric
from prefopt.judges.wording import PLAIN_JSON, REPLY_SCHEMA, instructions, question
from prefopt.types import Candidate, Comparison, Prompt, Usage, content_hash

logger = logging.getLogger(__name__)

Output = Literal["json_schema", "json_object", "plain"]
LimitField = Literal["max_tokens", "max_completion_tokens"]

OPENAI_URL = "https://api.openai.com/v1"

MAX_TOKENS = 2_048
RETRY_FACTOR = 4
"""Reasoning counts against the token limit, so a reply that hits it gets one larger try."""

PAID_HOSTS = (
    "openai.com",
    "azure.com",
    "openrouter.ai",
    "anthropic.com",
    "googleapis.com",
    "groq.com",
    "mistral.ai",
    "deepseek.com",
    "together.xyz",
    "fireworks.ai",
    "x.ai",
)
"""Hosts, with all below them, that are known to charge: a judge there needs prices and a limit."""

# A tokenizer of bytes never makes more tokens than bytes; a server adds its chat template, and
# sometimes the reply's schema once more.
_HIDDEN_TOKENS = 1_000

# No language is written at ten characters a token, once runs of one character are set aside.
_MOST_CHARACTERS_PER_TOKEN = 10
_RUN = re.compile(r"(.)\1{4,}", re.DOTALL)

_OWN_FIELDS = {
    "model": "model",
    "messages": "rubric",
    "response_format": "output",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temperature": "temperature",
    "seed": "seed",
    "n": "one reply a request",
    "stream": "one reply a request",
}


class OpenAIJudge(ApiJudge):
    """Asks a model on a server that speaks OpenAI's protocol which of two answers is better.

    A server of your own (vLLM, llama.cpp, Ollama, LiteLLM) costs nothing and needs neither prices
    nor a limit. A host in `PAID_HOSTS` needs both. What a server without prices says a reply cost
    is counted all the same.

    Start the server with a context window that holds two answers and the conversation. Some servers
    cut what is longer without a word; a reply whose reported prompt is far too short for the text
    that was sent is therefore the failure "too_long" and no verdict. A smaller cut is not seen.

    Args:
        model: the model's name on that server.
        rubric: what "better" means.
        base_url: the server's address up to "/v1", such as "http://localhost:8000/v1"; by default
            OPENAI_BASE_URL of the environment, or else OpenAI's own.
        api_key: by default OPENAI_API_KEY of the environment, for the default address only: no
            other server is ever sent that key.
        max_usd: the most that all questions of a ledger may cost together, in US dollars. No
            request is sent whose worst case could break it.
        prices: in dollars per million tokens. Goes with `max_usd`.
        output: how the reply is held to its form. "json_schema" has the server enforce the schema;
            "json_object" has it enforce JSON and asks for the fields in words; "plain" only asks.
            There is no change from one to another during a run. Where a server ignores what it does
            not know, replies under "json_schema" come as prose, which is "malformed" and no verdict:
            choose "plain" there.
        temperature: of sampling; by default the server's.
        seed: of sampling, where the server has one.
        max_tokens: the most tokens of a reply, reasoning included. A reply that reaches it gets one
            try with four times as many.
        limit_field: under which name `max_tokens` is sent. By default "max_completion_tokens" to
            OpenAI and Azure, whose newer models know no other, and "max_tokens" elsewhere.
        extra_body: more fields of the request, such as {"reasoning_effort": "low"}.
        concurrency: the most requests under way at once. It begins at 8 and follows what the
            server allows.
        client: an `openai.AsyncOpenAI`, `AsyncAzureOpenAI` or another asynchronous client of the
            SDK, with its own address and key.
        timeout_s: how long one request may take.
        max_attempts: tries per request where the server is busy, breaks off or answers nonsense.
        retry_after_cap_s: the longest wait the server may ask for; beyond it judging stops.
        sleep: waits a number of seconds; `asyncio.sleep` by default.

    Raises:
        ValueError: an argument out of range; prices without a limit, a limit without prices, or
            neither for a host that charges.
        JudgeUnavailable: no key for the default address, or the OpenAI SDK is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        rubric: Rubric = HOUSE_STYLE,
        base_url: str | None = None,
        api_key: str | None = None,
        max_usd: float | None = None,
        prices: ModelPrice | None = None,
        output: Output = "json_schema",
        temperature: float | None = None,
        seed: int | None = None,
        max_tokens: int = MAX_TOKENS,
        limit_field: LimitField | None = None,
        extra_body: Mapping[str, Any] | None = None,
        concurrency: int = 64,
        client: Any | None = None,
        timeout_s: float = 600.0,
        max_attempts: int = 6,
        retry_after_cap_s: float = 120.0,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> None:
        own_server = base_url is not None or client is not None
        address = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        problems = []
        if client is not None:
            address = str(getattr(client, "base_url", ""))
            if not type(client).__name__.startswith("Async"):
                problems.append(
                    f"client must be an openai.AsyncOpenAI, got a {type(client).__name__}."
                )
            if base_url is not None or api_key is not None:
                problems.append("a client has its own address and key: leave out the other two.")
        self.base_url = address.rstrip("/")
        problems += _address_problems(self.base_url)
        self._host = "" if problems else urllib.parse.urlsplit(address).hostname or ""
        problems += _price_problems(self._host, model, prices, max_usd)
        if not model:
            problems.append("model must be the model's name on the server, got an empty text.")
        if output not in ("json_schema", "json_object", "plain"):
            problems.append(f"output must be json_schema, json_object or plain; got {output!r}.")
        if limit_field not in (None, "max_tokens", "max_completion_tokens"):
            problems.append(
                f"limit_field must be max_tokens or max_completion_tokens; got {limit_field!r}."
            )
        if temperature is not None and not 0 <= temperature < math.inf:
            problems.append(f"temperature must be 0 or more, got {temperature}.")
        if max_tokens < 1:
            problems.append(f"max_tokens must be 1 or more, got {max_tokens}.")
        problems += [
            f"extra_body must not set {field!r}: that is settled by {_OWN_FIELDS[field]}."
            for field in extra_body or {}
            if field in _OWN_FIELDS
        ]
        super().__init__(
            f"openai:{model}",
            model,
            rubric=rubric,
            max_usd=max_usd,
            concurrency=concurrency,
            timeout_s=timeout_s,
            max_attempts=max_attempts,
            retry_after_cap_s=retry_after_cap_s,
            sleep=sleep,
            problems=problems,
        )
        self.price = prices
        self.output = output
        self.temperature = temperature
        self.seed = seed
        self.max_tokens = max_tokens
        self.extra_body = dict(extra_body or {})
        by_host: LimitField = (
            "max_completion_tokens"
            if _is_under(self._host, ("openai.com", "azure.com"))
            else "max_tokens"
        )
        self.limit_field = limit_field or by_host
        self._own_server = own_server
        self._given_key = api_key
        self._client = client
        if prices is None and not _is_local_host(self._host):
            logger.warning(
                "%s: no prices for %s, so only costs that it reports are counted, and nothing "
                "limits them.",
                self.name,
                self._host,
            )
        self.check_ready()
        self._shared = self._shared_params()
        self._shared_bytes = len(
            json.dumps([self._shared, self.extra_body], ensure_ascii=False).encode()
        )

    @property
    def fingerprint(self) -> str:
        """Changes with the model, its server, the rubric and every word or setting of a request."""
        # What is asked about a fixed comparison stands for the wording of all requests. As text,
        # since the order of the schema's fields matters.
        prompt = Prompt.from_text("prompt")
        fixed = Comparison(
            a=Candidate(prompt=prompt, text="a", model=""),
            b=Candidate(prompt=prompt, text="b", model=""),
        )
        asked = json.dumps([self._shared_params(), self.extra_body, question(fixed, salt="")])
        return content_hash([self.name, self.base_url, self.rubric.rubric_hash, asked])

    def settings(self) -> dict[str, Any]:
        """What all requests share, for the ledger's records."""
        return {**self._shared, "base_url": self.base_url, "extra_body": self.extra_body}

    def _shared_params(self) -> dict[str, Any]:
        said = instructions(self.rubric)
        shared: dict[str, Any] = {"model": self.model, self.limit_field: self.max_tokens}
        if self.output == "json_schema":
            schema = {"name": "verdict", "strict": True, "schema": REPLY_SCHEMA}
            shared["response_format"] = {"type": "json_schema", "json_schema": schema}
        else:
            said += PLAIN_JSON
        if self.output == "json_object":
            shared["response_format"] = {"type": "json_object"}
        if self.temperature is not None:
            shared["temperature"] = self.temperature
        if self.seed is not None:
            shared["seed"] = self.seed
        return {**shared, "messages": [{"role": "system", "content": said}]}

    def request(self, comparison: Comparison) -> Request:
        """The arguments of one chat completion that shows answer a as response_1."""
        shown = question(comparison, self._salt)
        messages = [*self._shared["messages"], {"role": "user", "content": shown}]
        params = {**self._shared, "messages": messages}
        return Request(params, shown, self._worst_usd(shown, self.max_tokens))

    def larger(self, request: Request) -> Request | None:
        """The request with room for a reply four times as long; None where it had that."""
        if request.params[self.limit_field] > self.max_tokens:
            return None
        max_tokens = RETRY_FACTOR * self.max_tokens
        return Request(
            {**request.params, self.limit_field: max_tokens},
            request.shown,
            self._worst_usd(request.shown, max_tokens),
        )

    def _worst_tokens(self, shown: str) -> int:
        return self._shared_bytes + len(shown.encode()) + _HIDDEN_TOKENS

    def _worst_usd(self, shown: str, max_tokens: int) -> float:
        """The most one request can cost: a token per byte, all put in a cache, all output used."""
        return self._most_usd(self._worst_tokens(shown), max_tokens)

    def _most_usd(self, input_tokens: int, output_tokens: int) -> float:
        if self.price is None:
            return 0.0
        return max(
            self.price.cost_usd(input_tokens=input_tokens, output_tokens=output_tokens),
            self.price.cost_usd(cache_write_tokens=input_tokens, output_tokens=output_tokens),
        )

    def estimate(self, comparisons: Iterable[Comparison]) -> CostEstimate | None:
        """What asking all of these would cost, guessed from the length of the texts; asks nothing.

        A token is taken as 3.5 bytes of text (5 for the low end, 2.5 for the high end) and a reply
        as 250 tokens (100 to `max_tokens`). None where there are no prices.
        """
        if self.price is None:
            return None
        calls, in_bytes, low, high, worst = 0, 0, 0.0, 0.0, 0.0
        for comparison in comparisons:
            shown = question(comparison, "")
            n_bytes = self._shared_bytes + len(shown.encode())
            calls += 1
            in_bytes += n_bytes
            low += self.price.cost_usd(input_tokens=n_bytes / 5, output_tokens=100)
            high += self.price.cost_usd(
                input_tokens=n_bytes / 2.5, output_tokens=max(100, self.max_tokens)
            )
            worst += self._worst_usd(shown, self.max_tokens)
        return CostEstimate(
            calls=calls,
            input_tokens=math.ceil(in_bytes / 3.5),
            output_tokens=250 * calls,
            low_usd=low,
            high_usd=high,
            worst_usd=worst,
        )

    def check_ready(self) -> None:
        """Raise JudgeUnavailable without the SDK, or without a key for the default address."""
        if importlib.util.find_spec("openai") is None:
            raise JudgeUnavailable(
                f"{self.name} needs the OpenAI SDK: pip install 'prefopt[openai]'."
            )
        if self._client is None:
            key, name = self._key(), "api_key" if self._given_key else "OPENAI_API_KEY"
            if key != key.strip():
                raise JudgeUnavailable(f"{name} has spaces or a line break around it; remove them.")

    def _key(self) -> str:
        if self._given_key:
            return self._given_key
        if self._own_server:
            return "none"  # the SDK wants some text
        key = os.environ.get("OPENAI_API_KEY")
        if not key:
            raise JudgeUnavailable(
                f"no credentials for {self.base_url}. Set OPENAI_API_KEY, pass api_key=..., or give "
                "the base_url of a server that needs no key."
            )
        return key

    @contextlib.asynccontextmanager
    async def open_client(self) -> AsyncIterator[Any]:
        """The given client or one for the address, without the SDK's own retries.

        Those wait as long as a server says and cannot tell a spent account from a busy service.
        """
        options: dict[str, Any] = {"max_retries": 0, "timeout": self.timeout_s}
        if self._client is not None:
            yield self._client.with_options(**options)
            return
        from openai import AsyncOpenAI

        key = self._key()
        if self._own_server:
            # Given here, it keeps out one that the environment may hold for OpenAI.
            options["default_headers"] = {"Authorization": f"Bearer {key}"}
        async with AsyncOpenAI(api_key=key, base_url=self.base_url, **options) as client:
            if self._own_server:
                client.organization = client.project = None  # the environment's, for OpenAI
            yield client

    async def send(self, client: Any, request: Request) -> Reply:
        """One chat completion; what comes back is checked here, since the SDK does not."""
        try:
            # The plain response: its headers are needed, and the SDK's models are unchecked.
            response = await client.chat.completions.with_raw_response.create(
                **request.params, extra_body=self.extra_body or None, timeout=self.timeout_s
            )
            content, headers = response.content, response.headers
        except Exception as error:
            trouble = self.trouble(error)
            if trouble is error:
                raise
            # Without its cause: that one may hold request headers, and with them the key.
            raise trouble from None
        plain = readable_json(content, self.hide_secrets)
        if isinstance(plain, dict) and plain.get("error") and not plain.get("choices"):
            # Gateways tell errors of the model behind them with status 200.
            raise self._told_trouble(_ErrorBody.read(plain["error"]), headers)
        try:
            completion = msgspec.convert(plain, _Completion)
        except (msgspec.ValidationError, UnicodeEncodeError) as error:  # half a character as a name
            raise Unanswered(
                f"The API's answer is no chat completion: {error}.", billed=None
            ) from None
        return self._read(
            completion,
            request,
            request_id=headers.get("x-request-id") or completion.id,
            remaining=_remaining(headers.get("x-ratelimit-remaining-requests")),
        )

    def _read(
        self,
        completion: _Completion,
        request: Request,
        *,
        request_id: str | None,
        remaining: int | None,
    ) -> Reply:
        choice = completion.choices[0]
        max_tokens = request.params[self.limit_field]
        said = _Said.read(completion.usage)
        usage = self._usage(said, self._worst_tokens(request.shown), max_tokens)
        if choice.finish_reason == "error":
            raise Unanswered("The model broke off with an error.", billed=None)
        ends: dict[str | None, ReplyEnd] = {"length": "truncated", "content_filter": "refused"}
        end = ends.get(choice.finish_reason, "done")
        detail = f"{max_tokens:,} tokens, on the second and larger try"
        if choice.message.refusal:
            end, detail = "refused", "the model's own refusal"
        elif end == "refused":
            detail = "content_filter"
        elif end == "done" and _was_cut(request.shown, said):
            end = "too_long"
        return Reply(
            text=choice.message.text,
            end=end,
            detail=detail,
            usage=usage,
            stop_reason=choice.finish_reason,
            request_id=request_id,
            model=model_name(completion.model),
            remaining=remaining,
        )

    def _usage(self, said: _Said, worst_tokens: int, max_tokens: int) -> Usage:
        # Answered and therefore counted, even by a server that does not say how much: never a zero.
        known = said.prompt_tokens and said.completion_tokens is not None
        input_tokens = said.prompt_tokens or worst_tokens
        output_tokens = max_tokens if said.completion_tokens is None else said.completion_tokens
        cost_usd = self._most_usd(input_tokens, output_tokens)
        if known and self.price is not None:
            cached = min(said.cached_tokens, input_tokens)
            written = min(said.cache_write_tokens, input_tokens - cached)
            cost_usd = self.price.cost_usd(
                input_tokens=input_tokens - cached - written,
                output_tokens=output_tokens,
                cache_read_tokens=cached,
                cache_write_tokens=written,
            )
        return Usage(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            cost_usd=max(cost_usd, said.cost_usd),
        )

    def hide_secrets(self, text: str) -> str:
        """`text` without the key, and without anything that looks like one of OpenAI's."""
        secrets = [self._given_key, getattr(self._client, "api_key", None)]
        if not self._own_server:
            secrets.append(os.environ.get("OPENAI_API_KEY"))
        for secret in secrets:
            # Anything shorter is a placeholder, and hiding it would garble the message.
            if isinstance(secret, str) and len(secret) >= 8:
                text = text.replace(secret, "[hidden]")
        return re.sub(r"\bsk-[\w-]{8,}", "[hidden]", text)

    # --- What can go wrong --------------------------------------------------------------------

    def trouble(self, error: Exception) -> Exception:
        """What an SDK exception means: `JudgeUnavailable`, `Unanswered`, or itself (a bug)."""
        import openai

        if isinstance(error, openai.APIStatusError):
            body = _ErrorBody.read(error.body, error.message)
            return self._status_trouble(error.status_code, body, error.response.headers)
        if isinstance(error, openai.APIConnectionError):
            return connection_trouble(error, self.base_url)
        if isinstance(error, openai.OpenAIError):
            message = self.hide_secrets(f"{type(error).__name__}: {error}")
            return Unanswered(message, passing=False, billed=None)
        return error

    def _told_trouble(self, body: _ErrorBody, headers: Mapping[str, str]) -> Exception:
        """The same for an error told with status 200; its code is often an HTTP status."""
        status = next((int(code) for code in body.codes if re.fullmatch(r"[45]\d\d", code)), 0)
        if status or body.codes & (_NO_MORE_MONEY | _TOO_LONG | _FILTERED):
            trouble = self._status_trouble(status or 400, body, headers)
        else:
            said = self.hide_secrets(body.message)[:500]
            trouble = Unanswered(f"The API answered with an error ({said}).")
        if isinstance(trouble, Unanswered):
            trouble.billed = None  # the model may have answered in part
        return trouble

    def _status_trouble(
        self, status: int, body: _ErrorBody, headers: Mapping[str, str]
    ) -> Exception:
        said = self.hide_secrets(f"{status}: {body.message}")[:500]
        lowered = body.message.casefold()
        filtered = body.codes & _FILTERED if status in (400, 403) else frozenset()
        if filtered or (status == 403 and body.flagged):
            return Unanswered(
                f"The service's filter refused the request ({said}).",
                failure="refused",
                passing=False,
            )
        # A message may quote the answers that were sent, so its words alone never stop a run.
        trouble = status_trouble(
            status,
            said,
            headers,
            retry_after_cap_s=self.retry_after_cap_s,
            credentials="the client's key" if self._client is not None else self._key_name,
            address="base_url",
            out_of_money=bool(body.codes & _NO_MORE_MONEY),
            too_long=bool(body.codes & _TOO_LONG)
            or (status in (400, 422, 500) and any(words in lowered for words in _TOO_LONG_WORDS)),
        )
        if isinstance(trouble, Unanswered) and trouble.failure == "api_error" and status < 429:
            advice = self._advice(body.param or lowered)
            if advice and not trouble.passing:
                return Unanswered(f"{trouble} {advice}", passing=False)
        return trouble

    @property
    def _key_name(self) -> str:
        return "api_key" if self._given_key or self._own_server else "OPENAI_API_KEY"

    def _advice(self, about: str) -> str:
        """What to change where a server does not know a field of the request; often empty."""
        if any(words in about for words in _OUTPUT_WORDS) and self.output != "plain":
            others = "output='plain'"
            if self.output == "json_schema":
                others = f"output='json_object' or {others}"
            return f"If this server does not know output={self.output!r}, choose {others}."
        if self.limit_field in about:
            other = "max_completion_tokens" if self.limit_field == "max_tokens" else "max_tokens"
            return (
                f"If this server does not know {self.limit_field}, choose limit_field={other!r}; "
                "if the number is too large for it, a smaller max_tokens."
            )
        for field in ("temperature", "seed"):
            if field in about and getattr(self, field) is not None:
                return f"If this model takes no {field}, leave it out."
        return ""


_NO_MORE_MONEY = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "budget_exceeded",
    }
)
_TOO_LONG = frozenset(
    {"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"}
)
_TOO_LONG_WORDS = (
    "maximum context length",
    "context length exceeded",
    "model's context length",
    "available context size",
    "maximum model length",
    "contextwindowexceeded",
    "prompt is too long",
)
_FILTERED = frozenset({"content_filter", "invalid_prompt", "content_policy_violation"})
_OUTPUT_WORDS = ("response_format", "json_schema", "json_object", "structured output", "grammar")


# --- Arguments --------------------------------------------------------------------------------


def _address_problems(address: str) -> list[str]:
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        shown = address.rpartition("@")[2]
        return [f"base_url must be like http://localhost:8000/v1, got {shown!r}."]
    if parts.username or parts.password:
        return ["base_url must hold no user and no password: pass api_key instead."]
    if parts.path.endswith("/chat/completions"):
        return ["base_url must end before /chat/completions, mostly with /v1."]
    return []


def _price_problems(
    host: str, model: str, prices: ModelPrice | None, max_usd: float | None
) -> list[str]:
    if prices is not None and max_usd is None:
        return [
            f"{model} has prices and so needs max_usd, the most it may spend in US dollars; got None."
        ]
    if prices is None and (max_usd is not None or _is_under(host, PAID_HOSTS)):
        why = "max_usd could not be kept" if max_usd is not None else f"{host} charges"
        also = "" if max_usd is not None else " and max_usd, the most it may spend in US dollars"
        return [
            f"there is no price for model {model!r}, and {why}. Pass prices=ModelPrice(...) in "
            f"dollars per million tokens (in a command --prices, a file){also}."
        ]
    return []


def _is_under(host: str, parents: Iterable[str]) -> bool:
    return any(host == parent or host.endswith(f".{parent}") for parent in parents)


def split_address(argument: str) -> tuple[str, str | None]:
    """The model and the address in "<model>@<base_url>"; without an address it is None.

    Raises:
        ValueError: an address that does not begin with http:// or https://.
    """
    # A model's name may hold an "@" of its own.
    model, at, rest = argument.rpartition("@http")
    if at:
        return model, "http" + rest
    if re.search(r"@([^@/]+:\d+|localhost)(/|$)", argument):
        raise ValueError(
            f"the address of a server begins with http:// or https://, got 'openai:{argument}'. Write "
            "it as openai:<model>@http://localhost:8000/v1."
        )
    return argument, None


def is_local(base_url: str | None) -> bool:
    """Whether a judge of this address asks a machine of one's own or of one's network."""
    address = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    return _is_local_host(urllib.parse.urlsplit(address).hostname or "")


def _is_local_host(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or _is_under(host, ("localhost", "local", "internal", "lan"))


# --- What comes back --------------------------------------------------------------------------


class _Message(msgspec.Struct, frozen=True):
    content: str | None = None
    refusal: str | None = None

    @property
    def text(self) -> str:
        # A lone surrogate cannot be written to any file; the rest of the text can.
        return (self.content or self.refusal or "").encode("utf-8", "replace").decode()


class _Choice(msgspec.Struct, frozen=True):
    message: _Message
    finish_reason: str | None = None


class _Completion(msgspec.Struct, frozen=True):
    """The part of a chat completion that is read, checked."""

    choices: list[_Choice]
    id: str | None = None
    model: Any = None
    usage: Any = None

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("it has no choices")


class _Said(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says it used. None where it does not say, or says what cannot be."""

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int
    cache_write_tokens: int
    cost_usd: float

    @classmethod
    def read(cls, usage: Any) -> _Said:
        """From the usage of a completion, whatever that is."""
        usage = usage if isinstance(usage, dict) else {}
        details = usage.get("prompt_tokens_details")
        details = details if isinstance(details, dict) else {}
        cost = usage.get("cost")
        is_cost = isinstance(cost, int | float) and not isinstance(cost, bool)
        return cls(
            prompt_tokens=_tokens(usage.get("prompt_tokens")),
            completion_tokens=_tokens(usage.get("completion_tokens")),
            cached_tokens=_tokens(details.get("cached_tokens")) or 0,
            cache_write_tokens=_tokens(details.get("cache_write_tokens")) or 0,
            cost_usd=float(cost) if is_cost and 0 <= cost < math.inf else 0.0,
        )


def _tokens(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if is_count else None


def _was_cut(shown: str, said: _Said) -> bool:
    """Whether the server read so few tokens that it cannot have read the whole message."""
    if not said.prompt_tokens or len(shown) <= _MOST_CHARACTERS_PER_TOKEN * said.prompt_tokens:
        return False
    # Runs of one character, as in a ruler of dashes, take very few tokens.
    return len(_RUN.sub(r"\1", shown)) > _MOST_CHARACTERS_PER_TOKEN * said.prompt_tokens


def _remaining(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


class _ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """An error as servers tell it: in words, and in codes that are no words of an answer's."""

    message: str
    codes: frozenset[str] = frozenset()
    param: str = ""
    flagged: bool = False

    @classmethod
    def read(cls, body: Any, otherwise: str = "no reason given") -> _ErrorBody:
        """From the "error" of a body, which may also be a text or missing."""
        if not isinstance(body, dict):
            return cls(message=str(body) if body else otherwise)
        message = body.get("message") or body.get("detail") or otherwise
        metadata = body.get("metadata")
        return cls(
            message=message if isinstance(message, str) else json.dumps(message),
            codes=frozenset(
                str(body[key]) for key in ("code", "type") if isinstance(body.get(key), str | int)
            ),
            param=body["param"] if isinstance(body.get("param"), str) else "",
            flagged=isinstance(metadata, dict)
            and bool(metadata.get("flagged_input") or metadata.get("reasons")),
        )
