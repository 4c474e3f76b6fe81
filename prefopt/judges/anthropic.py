"""A judge that asks a Claude model through the Anthropic API, within a money limit.

How one request is made, sent, priced and read; the only file, with `anthropic_batches`, that knows the
Anthropic SDK. When to send and when to try again is `prefopt.judges.api_judge`'s; orders and
datasets are nobody's business here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

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
from prefopt.judges.base import Asked, CostEstimate
from prefopt.judges.ledger import Ledger
from prefopt.judges.prices import PRICES, PRICES_AS_OF, ModelPrice
from prefopt.judges.rubric import HOUSE_STYLE, Rubric
from prefopt.judges.wording import PLAIN_JSON, REPLY_SCHEMA, instructions, question
from prefopt.types import Candidate, Comparison, Prompt, Usage, Verdict, content_hash

logger = logging.getLogger(__name__)

Effort = Literal["low", "medium", "high", "xhigh", "max"]
EFFORTS = ("low", "medium", "high", "xhigh", "max")

Transport = Literal["auto", "sync", "batch"]

MAX_TOKENS = 2_048
RETRY_MAX_TOKENS = 8_192
"""Reasoning counts against the token limit, so a reply that hits it gets one larger try."""

BATCH_FROM = 500
"""From this many calls on, "auto" takes message batches, which cost half and take up to a day."""

BATCH_DISCOUNT = 0.5

# A tokenizer of bytes never makes more tokens than bytes; the API adds a text of its own for the
# reply's schema, which is not counted in the request.
_HIDDEN_TOKENS = 1_000


class AnthropicJudge(ApiJudge):
    """Asks a Claude model which of two answers is better under a rubric. Costs money.

    Args:
        model: a model id, such as "claude-sonnet-5-5".
        rubric: what "better" means.
        max_usd: the most that all questions of a ledger may cost together, in US dollars. No
            request is sent whose worst case could break it. A request that was sent but never
            answered counts in full, since it may be on the bill. Without a ledger it is the most
            this judge object may ever spend.
        effort: how much the model thinks: "low", "medium", "high", "xhigh" or "max". Thinking is
            billed as output.
        transport: "sync" asks one by one and is done in minutes; "batch" sends message batches,
            at half the price and within a day; "auto" takes batches from 500 calls on.
        concurrency: the most requests under way at once. It begins at 8 and follows what the API
            allows.
        prices: overrides `PRICES`, and is needed for models that are not in it.
        client: an `anthropic.AsyncAnthropic`, `AsyncAnthropicBedrock`, `AsyncAnthropicVertex` or
            another asynchronous client of the SDK; by default one is made from the environment
            (ANTHROPIC_API_KEY or ANTHROPIC_AUTH_TOKEN, ANTHROPIC_BASE_URL).
        timeout_s: how long one request may take.
        max_attempts: tries per request where the API is busy, breaks off or answers nonsense.
        retry_after_cap_s: the longest wait the API may ask for; beyond it judging stops.
        batch_poll_s: how often an open batch is looked at.
        reconcile_s: how long a batch whose sending broke off may take to appear in the API's list.
        sleep: waits a number of seconds; `asyncio.sleep` by default.

    Raises:
        ValueError: no `max_usd`, no known price for the model, an argument out of range.
        JudgeUnavailable: no credentials.
    """

    def __init__(
        self,
        model: str,
        *,
        rubric: Rubric = HOUSE_STYLE,
        max_usd: float | None,
        effort: str = "low",
        transport: Transport = "auto",
        concurrency: int = 64,
        prices: ModelPrice | None = None,
        client: Any | None = None,
        timeout_s: float = 600.0,
        max_attempts: int = 6,
        retry_after_cap_s: float = 120.0,
        batch_poll_s: float = 60.0,
        reconcile_s: float = 120.0,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> None:
        if max_usd is None:
            raise ValueError(
                f"{model} is a paid judge and needs max_usd, the most it may spend in US dollars; "
                "got None. `estimate` says what to expect."
            )
        problems = []
        if effort not in EFFORTS:
            problems.append(f"effort must be one of {', '.join(EFFORTS)}; got {effort!r}.")
        if transport not in ("auto", "sync", "batch"):
            problems.append(f"transport must be auto, sync or batch; got {transport!r}.")
        price = prices or PRICES.get(model)
        if price is None:
            problems.append(
                f"there is no price for model {model!r}, so max_usd could not be kept. Pass "
                "prices=ModelPrice(...) in dollars per million tokens (in a command --prices, a "
                "file), or use one of "
                f"{', '.join(PRICES)} (prices of {PRICES_AS_OF})."
            )
        super().__init__(
            f"anthropic:{model}",
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
        assert price is not None
        if client is None:
            _require_credentials()
        elif not type(client).__name__.startswith("Async"):
            raise ValueError(
                f"client must be an anthropic.AsyncAnthropic, got a {type(client).__name__}."
            )
        self.effort = effort
        self.transport = transport
        self.price = price
        self.batch_poll_s = batch_poll_s
        self.reconcile_s = reconcile_s
        self.batches_never_made = 0
        self._client = client
        self._known_abilities: Abilities | None = None
        self._shared = self._shared_params()
        self._shared_bytes = _bytes(self._shared)

    @property
    def fingerprint(self) -> str:
        """Changes with the model, the rubric, the effort and every word or limit of a request."""
        # What is asked about a fixed comparison stands for the wording of all requests. As text,
        # since the order of the schema's fields matters.
        prompt = Prompt.from_text("prompt")
        fixed = Comparison(
            a=Candidate(prompt=prompt, text="a", model=""),
            b=Candidate(prompt=prompt, text="b", model=""),
        )
        asked = json.dumps([self._shared_params(), question(fixed, salt="")])
        return content_hash([self.name, self.rubric.rubric_hash, asked])

    def settings(self) -> dict[str, Any]:
        """What all requests share, for the ledger's records."""
        return self._shared

    def _shared_params(self) -> dict[str, Any]:
        cached = {"cache_control": {"type": "ephemeral"}}
        return {
            "model": self.model,
            "max_tokens": MAX_TOKENS,
            "system": [{"type": "text", "text": instructions(self.rubric), **cached}],
            "output_config": {
                "effort": self.effort,
                "format": {"type": "json_schema", "schema": REPLY_SCHEMA},
            },
        }

    def request(self, comparison: Comparison) -> Request:
        """The arguments of one `messages.create` call that shows answer a as response_1."""
        return self.request_showing(question(comparison, self._salt))

    def request_showing(self, shown: str) -> Request:
        """The same for a message that was made before."""
        params = {**self._shared, "messages": [{"role": "user", "content": shown}]}
        return Request(params, shown, self.worst_usd(shown, MAX_TOKENS))

    def larger(self, request: Request) -> Request | None:
        """The request with room for a reply four times as long; None where it had that."""
        if request.params["max_tokens"] >= RETRY_MAX_TOKENS:
            return None
        return Request(
            {**request.params, "max_tokens": RETRY_MAX_TOKENS},
            request.shown,
            self.worst_usd(request.shown, RETRY_MAX_TOKENS),
        )

    def worst_usd(self, shown: str, max_tokens: int) -> float:
        """The most one request can cost: a token per byte, all put in a cache, all output used."""
        tokens = self.worst_tokens(shown)
        return max(
            self.price.cost_usd(input_tokens=tokens, output_tokens=max_tokens),
            self.price.cost_usd(cache_write_tokens=tokens, output_tokens=max_tokens),
        )

    def worst_tokens(self, shown: str) -> int:
        """The most tokens a request that shows this can have."""
        return self._shared_bytes + len(shown.encode()) + _HIDDEN_TOKENS

    def estimate(self, comparisons: Iterable[Comparison]) -> CostEstimate:
        """What asking all of these would cost, guessed from the length of the texts; asks nothing.

        A token is taken as 3.5 bytes of text (5 for the low end, 2.5 for the high end) and a reply
        as 250 tokens (100 to 700; up to the limit of 2,048 at an effort above "low"). The low end
        also takes the rubric, which all requests share, as read from the prompt cache.
        """
        shared = self._shared_bytes
        calls, in_bytes, low, high, worst = 0, 0, 0.0, 0.0, 0.0
        most_out = 700 if self.effort == "low" else MAX_TOKENS
        # The fences and the sentences around the texts, by an example.
        frame = len(question(_example(""), "").encode())
        turn = len(question(_example("", turns=2), "").encode()) - frame
        for comparison in comparisons:
            messages = comparison.prompt.messages
            own = frame + turn * (len(messages) - 1)
            own += sum(len(m.content.encode()) for m in messages)
            own += len(comparison.a.text.encode()) + len(comparison.b.text.encode())
            calls += 1
            in_bytes += shared + own
            low += self.price.cost_usd(
                input_tokens=own / 5, cache_read_tokens=shared / 5, output_tokens=100
            )
            high += self.price.cost_usd(input_tokens=(shared + own) / 2.5, output_tokens=most_out)
            worst += self.price.cost_usd(
                cache_write_tokens=shared + own + _HIDDEN_TOKENS, output_tokens=MAX_TOKENS
            )
        return CostEstimate(
            calls=calls,
            input_tokens=math.ceil(in_bytes / 3.5),
            output_tokens=250 * calls,
            low_usd=low,
            high_usd=high,
            worst_usd=worst,
            batch_discount=BATCH_DISCOUNT,
        )

    def check_ready(self) -> None:
        """Raise JudgeUnavailable without credentials."""
        if self._client is None:
            _require_credentials()

    async def ask(
        self,
        client: Any,
        asked: Iterator[Asked],
        book: Ledger,
        told: Callable[[str, Verdict], Any],
    ) -> int:
        """Ask in batches or one by one, after a look at what the model can do.

        Batches that an earlier process left open are fetched in any case: they are paid for.
        """
        from prefopt.judges.anthropic_batches import BatchAsking

        abilities = await self._abilities(client)
        self._fit_to(abilities)
        open_batches = book.adopt_batches(self.fingerprint)
        first = list(itertools.islice(asked, BATCH_FROM)) if self.transport == "auto" else []
        batch = self.transport == "batch" or len(first) >= BATCH_FROM
        if batch and not (abilities.batch and await self._offers_batches(client)):
            if self.transport == "batch":
                raise JudgeUnavailable(
                    f"{self.name}: message batches are not offered for this model or by this "
                    "service. Use transport='sync'."
                )
            batch = False
        rest = itertools.chain(first, asked)
        if not batch and not open_batches:
            return await super().ask(client, rest, book, told)
        batches = BatchAsking(self, client, book, told)
        left = await batches.finish(open_batches, rest if batch else iter(()))
        return left if batch else left + await super().ask(client, rest, book, told)

    async def _offers_batches(self, client: Any) -> bool:
        """Whether the service has message batches: clouds and gateways often have not."""
        import anthropic

        try:
            await client.messages.batches.list(limit=1)
        except anthropic.APIStatusError as error:
            return error.status_code not in (404, 405, 501)
        except anthropic.APIConnectionError:
            return True  # a break says nothing about what is offered
        except (anthropic.AnthropicError, AttributeError):
            return False
        except ValueError:
            return True
        return True

    async def _abilities(self, client: Any) -> Abilities:
        """What the API says the model can do; everything, where it does not say."""
        if self._known_abilities is None:
            try:
                info = await client.models.retrieve(self.model)
                plain = info.model_dump(warnings=False)
            except Exception as error:
                trouble = self.trouble(error)
                if (
                    isinstance(trouble, JudgeUnavailable)
                    and getattr(error, "status_code", 0) == 401
                ):
                    raise trouble from None
                # Gateways and clouds often lack this call; a real problem shows at the first request.
                logger.debug("what %s can do is not known: %s", self.model, trouble)
                plain = {}
            self._known_abilities = Abilities.read(plain)
        return self._known_abilities

    def _fit_to(self, abilities: Abilities) -> None:
        """Ask only for what the model can do; refuse what cannot be had."""
        if abilities.retired:
            raise JudgeUnavailable(f"{self.name}: the API lists this model as retired.")
        if (
            abilities.efforts is not None
            and abilities.efforts
            and (self.effort not in abilities.efforts)
        ):
            raise JudgeUnavailable(
                f"{self.name}: this model knows the efforts {', '.join(sorted(abilities.efforts))}, "
                f"got {self.effort!r}."
            )
        output: dict[str, Any] = {}
        if abilities.efforts is None or abilities.efforts:
            output["effort"] = self.effort
        if abilities.structured_outputs:
            output["format"] = {"type": "json_schema", "schema": REPLY_SCHEMA}
        shared = self._shared_params()
        del shared["output_config"]
        system = shared["system"][0]
        if not abilities.structured_outputs:
            system["text"] += PLAIN_JSON
        self._shared = {**shared, "output_config": output} if output else shared
        self._shared_bytes = _bytes(self._shared)

    @contextlib.asynccontextmanager
    async def open_client(self) -> AsyncIterator[Any]:
        """The given client or one of the environment's, without the SDK's own retries.

        Those wait as long as a server says and cannot tell a spent account from a busy service.
        """
        options = {"max_retries": 0, "timeout": self.timeout_s}
        if self._client is not None:
            yield self._client.with_options(**options)
            return
        from anthropic import AsyncAnthropic

        async with AsyncAnthropic(**options) as client:
            yield client

    async def send(self, client: Any, request: Request) -> Reply:
        """One `messages.create`; what comes back is checked here, since the SDK does not."""
        import httpx2

        try:
            # The plain response: its headers are needed, and the SDK's models are slow and unchecked.
            response = await client.post(
                "/v1/messages",
                body=request.params,
                cast_to=httpx2.Response,
                options={"timeout": self.timeout_s},
            )
            content, headers = response.content, response.headers
        except Exception as error:
            trouble = self.trouble(error)
            if trouble is error:
                raise
            # Without its cause: that one may hold request headers, and with them the key.
            raise trouble from None
        message = self._decoded(content)
        return self.read_message(
            message,
            self.worst_tokens(request.shown),
            request.params["max_tokens"],
            request_id=headers.get("request-id"),
            remaining=_count(headers.get("anthropic-ratelimit-requests-remaining")),
        )

    def _decoded(self, content: bytes) -> Message:
        plain = readable_json(content, self.hide_secrets)
        try:
            return msgspec.convert(plain, Message)
        except (msgspec.ValidationError, UnicodeEncodeError) as error:  # half a character as a name
            raise Unanswered(f"The API's answer is no message: {error}.", billed=None) from None

    def read_message(
        self,
        message: Message,
        worst_tokens: int,
        max_tokens: int,
        *,
        discount: float = 1.0,
        request_id: str | None = None,
        remaining: int | None = None,
    ) -> Reply:
        """What a message of the API says and cost."""
        ends: dict[str | None, ReplyEnd] = {
            "refusal": "refused",
            "max_tokens": "truncated",
            "model_context_window_exceeded": "too_long",
        }
        end = ends.get(message.stop_reason, "done")
        detail = f"{max_tokens:,} tokens, on the second and larger try"
        if end == "refused":
            detail = (message.stop_details or {}).get("category") or "none given"
        return Reply(
            text=message.text,
            end=end,
            detail=detail,
            usage=self._usage(message.usage, worst_tokens, max_tokens, discount),
            stop_reason=message.stop_reason,
            request_id=request_id,
            model=model_name(message.model),
            remaining=remaining,
        )

    def _usage(
        self, reported: MessageUsage | None, worst_tokens: int, max_tokens: int, discount: float
    ) -> Usage:
        if reported is None:
            # Answered and therefore billed, but not saying how much: never a zero.
            cost_usd = self.price.cost_usd(
                cache_write_tokens=worst_tokens, output_tokens=max_tokens
            )
            return Usage(
                input_tokens=worst_tokens, output_tokens=max_tokens, cost_usd=cost_usd * discount
            )
        cached = reported.cache_read_input_tokens or 0
        written = reported.cache_creation_input_tokens or 0
        cost_usd = self.price.cost_usd(
            input_tokens=reported.input_tokens,
            output_tokens=reported.output_tokens,
            cache_read_tokens=cached,
            cache_write_tokens=written,
        )
        return Usage(
            input_tokens=reported.input_tokens + cached + written,
            output_tokens=reported.output_tokens,
            cost_usd=cost_usd * discount,
        )

    def hide_secrets(self, text: str) -> str:
        """`text` without the client's key."""
        for secret in _secrets_of(self._client):
            text = text.replace(secret, "[hidden]")
        return re.sub(r"sk-ant-[\w-]+", "[hidden]", text)

    def trouble(self, error: Exception) -> Exception:
        """What an SDK exception means for asking."""
        return sdk_trouble(error, self.hide_secrets, self.retry_after_cap_s)


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a model can do, as the API's list of models says. `efforts` is None where unknown."""

    structured_outputs: bool = True
    batch: bool = True
    efforts: frozenset[str] | None = None
    retired: bool = False

    @classmethod
    def read(cls, info: dict[str, Any]) -> Abilities:
        """From the API's description of a model; what it does not say is taken as given."""
        said = info.get("capabilities") or {}

        def supports(name: str, default: bool) -> bool:
            value = (said.get(name) or {}).get("supported")
            return value if isinstance(value, bool) else default

        efforts = None
        if "effort" in said:
            levels = said["effort"] or {}
            efforts = frozenset(
                level for level in EFFORTS if (levels.get(level) or {}).get("supported")
            )
        return cls(
            structured_outputs=supports("structured_outputs", True),
            batch=supports("batch", True),
            efforts=efforts,
            retired=info.get("lifecycle") == "retired",
        )


# --- What comes back --------------------------------------------------------------------------

_Count = Annotated[int, msgspec.Meta(ge=0)]


class MessageUsage(msgspec.Struct, frozen=True):
    """The part of a message's usage that is billed."""

    input_tokens: _Count
    output_tokens: _Count
    cache_creation_input_tokens: _Count | None = None
    cache_read_input_tokens: _Count | None = None


class Message(msgspec.Struct, frozen=True):
    """The part of an API message that is read, checked."""

    type: Literal["message"]
    content: list[dict[str, Any]]
    model: Any = None
    stop_reason: str | None = None
    stop_details: dict[str, Any] | None = None
    usage: MessageUsage | None = None

    @property
    def text(self) -> str:
        """The first text block, which a thinking block may precede; empty where there is none."""
        for block in self.content:
            if block.get("type") == "text":
                text = block.get("text")
                # A lone surrogate cannot be written to any file; the rest of the text can.
                return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""
        return ""


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _bytes(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode())


def _example(text: str, turns: int = 1) -> Comparison:
    said = [{"role": "user", "content": "x"}] * turns
    prompt = Prompt.from_messages(said)
    return Comparison(
        a=Candidate(prompt=prompt, text=text, model=""),
        b=Candidate(prompt=prompt, text=text, model=""),
    )


# --- What can go wrong ------------------------------------------------------------------------

_NO_MORE_MONEY = {
    "enforced_spend_limit_reached",
    "contract_spend_limit_reached",
    "ramp_limit_exceeded",
}
_NO_MORE_MONEY_WORDS = ("specified api usage limits", "credit balance is too low")


def sdk_trouble(
    error: Exception, hide: Callable[[str], str], retry_after_cap_s: float
) -> Exception:
    """What an SDK exception means here: `JudgeUnavailable`, `Unanswered`, or itself (a bug)."""
    import anthropic

    if isinstance(error, anthropic.APIStatusError):
        said = hide(f"{error.status_code}: {error.api_message or error.message}")[:500]
        return _status_trouble(error, said, retry_after_cap_s)
    if isinstance(error, anthropic.APIConnectionError):
        return connection_trouble(error)
    if isinstance(error, json.JSONDecodeError):
        return Unanswered("The API's answer was not readable JSON.", billed=None)
    if isinstance(error, anthropic.CredentialsError) or (
        isinstance(error, TypeError) and "authentication" in str(error)
    ):
        return JudgeUnavailable(_NO_CREDENTIALS)
    if isinstance(error, anthropic.AnthropicError):
        message = hide(f"{type(error).__name__}: {error}")
        return Unanswered(message, passing=False, billed=None)
    return error


def _status_trouble(error: Any, said: str, retry_after_cap_s: float) -> Exception:
    lowered = said.casefold()
    return status_trouble(
        error.status_code,
        said,
        error.response.headers,
        retry_after_cap_s=retry_after_cap_s,
        credentials="ANTHROPIC_API_KEY (or ANTHROPIC_AUTH_TOKEN)",
        address="ANTHROPIC_BASE_URL",
        out_of_money=error.error_code in _NO_MORE_MONEY
        or any(words in lowered for words in _NO_MORE_MONEY_WORDS),
        too_long=error.status_code == 400 and "prompt is too long" in lowered,
    )


_NO_CREDENTIALS = (
    "no credentials for the Anthropic API. Set ANTHROPIC_API_KEY (or ANTHROPIC_AUTH_TOKEN), pass "
    "client=anthropic.AsyncAnthropic(...), or use a judge that needs no key."
)


_KEY_NAMES = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")


def _require_credentials() -> None:
    if not any(os.environ.get(name) for name in _KEY_NAMES):
        raise JudgeUnavailable(_NO_CREDENTIALS)
    for name in _KEY_NAMES:
        if os.environ.get(name, "") != os.environ.get(name, "").strip():
            raise JudgeUnavailable(f"{name} has spaces or a line break around it; remove them.")


def _secrets_of(client: Any) -> list[str]:
    values = [getattr(client, name, None) for name in ("api_key", "auth_token")]
    if client is None:
        values = [os.environ.get(name) for name in _KEY_NAMES]
    # Anything shorter is a placeholder, and hiding it would garble the message.
    return [v for v in values if isinstance(v, str) and len(v) >= 8]
