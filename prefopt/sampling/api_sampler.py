"""Samplers behind an API: Claude, and any server that speaks OpenAI's protocol.

One request an answer, since a killed call then loses at most what is under way, and each answer has a
seed of its own where the server has seeds; servers that keep prefixes (vLLM, llama.cpp) still read a
prompt once. Requests, retries, concurrency, prices and the ledger are the judges' (`prefopt.judges`):
an answer that was paid for is never asked for again. This file knows what to ask, not how it is sent.
"""

from __future__ import annotations

import abc
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from prefopt.errors import BudgetExceeded, DataError, JudgeUnavailable, ModelError
from prefopt.judges.anthropic import AnthropicJudge
from prefopt.judges.api_judge import ApiJudge, Asking, Job, Reply, Request, failed, run_async
from prefopt.judges.base import CostEstimate
from prefopt.judges.ledger import Ledger
from prefopt.judges.openai import OpenAIJudge
from prefopt.judges.prices import ModelPrice
from prefopt.sampling.sampler import Told
from prefopt.sampling.settings import SamplingSettings
from prefopt.types import Candidate, FinishReason, Prompt, Usage, VerdictFailure, content_hash

logger = logging.getLogger(__name__)

_TURN_S = 1.0

# A server adds its chat template; a tokenizer of bytes never makes more tokens than bytes.
_HIDDEN_TOKENS = 1_000

THINKING_TOKENS = 2_048
"""What Claude may think beside its answer: thinking counts against the API's limit of tokens."""


class ApiAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer as the ledger keeps it, or why there is none."""

    text: str = ""
    finish_reason: FinishReason = "stop"
    failure: VerdictFailure | None = None
    detail: str = ""
    usage: Usage = Usage()


class AnswerLedger(Ledger):
    """A ledger of answers to prompts instead of verdicts."""

    outcome_type: ClassVar[Any] = ApiAnswer


class ApiSampler(abc.ABC):
    """What samplers behind an API have in common; see `AnthropicSampler` and `OpenAISampler`."""

    def __init__(self, service: ApiJudge) -> None:
        # The judge of that service, as the one who knows its SDK; nothing is judged.
        self._service = service
        self.name = service.name
        self.model = service.model
        self.concurrency, self.max_attempts = service.concurrency, service.max_attempts
        self.max_usd, self.sleep = service.max_usd, service.sleep
        self.spent_usd = 0.0

    @property
    @abc.abstractmethod
    def price(self) -> ModelPrice | None:
        """Of the model; None where it costs nothing."""

    @abc.abstractmethod
    def params(self, prompt: Prompt, settings: SamplingSettings, key: str) -> dict[str, Any]:
        """The arguments of one request."""

    @abc.abstractmethod
    def identity(self, settings: SamplingSettings) -> Any:
        """Everything but prompt and seed that can change an answer."""

    # --- Sampling -----------------------------------------------------------------------------

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        k: int,
        settings: SamplingSettings,
        seed: int,
        partial: Path | None,
        told: Told,
    ) -> list[list[Candidate]]:
        """See `Sampler.answers`. What was had and paid for is kept beside `partial`, in a ledger.

        Raises:
            DataError: prompts with a tool's message; a ledger that cannot be written.
            BudgetExceeded: the next request could break `max_usd`. What was bought is kept.
            ModelError: the service cannot be used, or some answers could not be had; the rest is
                kept, and the same call asks for those alone.
        """
        _check_roles(prompts)
        identity = self.identity(settings)
        keys = [
            content_hash([identity, [[m.role, m.content] for m in prompt.messages], seed, number])
            for prompt in prompts
            for number in range(k)
        ]
        asked = {
            key: prompt
            for key, prompt in zip(keys, (p for p in prompts for _ in range(k)), strict=True)
        }
        with AnswerLedger(None if partial is None else f"{partial}.sqlite") as book:
            book.check()
            known = book.answered(asked)
            told(len(known))
            missing = {key: prompt for key, prompt in asked.items() if key not in known}
            self._announce(list(missing.values()), settings)
            try:
                self._ask(missing, settings, book, told)
            except JudgeUnavailable as error:
                raise ModelError(str(error)) from error
            found: dict[str, Any] = dict(book.outcomes(keys))
        self._check(found, asked)
        return [
            [self._candidate(prompt, number, found[keys[i * k + number]]) for number in range(k)]
            for i, prompt in enumerate(prompts)
        ]

    def _ask(
        self,
        missing: Mapping[str, Prompt],
        settings: SamplingSettings,
        book: Ledger,
        told: Told,
    ) -> None:
        if not missing:
            return
        self._service.check_ready()
        book.describe_judge(
            content_hash(self.identity(settings)), self.name, self.identity(settings)
        )

        def jobs() -> Iterator[Job]:
            known = book.answered(missing) | book.failed_here(missing)
            for key, prompt in missing.items():
                if key not in known:
                    yield Job(key, prompt.prompt_id, self._request(prompt, settings, key))

        left_to_others = 1
        while left_to_others:

            async def ask_all() -> None:
                nonlocal left_to_others
                async with self._service.open_client() as client:
                    asking = Asking(self, client, jobs(), book, lambda key, answer: told(1))
                    left_to_others = await asking.finish()

            run_async(ask_all)
            if left_to_others:  # another process has them under way, which may end or die
                time.sleep(_TURN_S)
                book.bury_the_dead()

    def _request(self, prompt: Prompt, settings: SamplingSettings, key: str) -> Request:
        shown = "\n\n".join(m.content for m in prompt.messages)
        params = self.params(prompt, settings, key)
        return Request(params, shown, self._worst_usd(prompt, settings))

    def _check(self, found: Mapping[str, ApiAnswer], asked: Mapping[str, Prompt]) -> None:
        failures = [
            f"{prompt.text[:50]!r}: {found[key].detail}"
            if key in found
            else f"{prompt.text[:50]!r}"
            for key, prompt in asked.items()
            if key not in found or found[key].failure is not None
        ]
        if failures:
            told = DataError("", failures)
            raise ModelError(
                f"{self.name} gave {len(asked) - len(failures):,} of {len(asked):,} answers, which "
                "are kept; the same call asks for the others again. Leave out prompts that it refuses:"
                f"{told}"
            )

    def _candidate(self, prompt: Prompt, number: int, answer: ApiAnswer) -> Candidate:
        return Candidate(
            prompt=prompt,
            text=answer.text.strip(),
            model=self.name,
            sample_index=number,
            finish_reason=answer.finish_reason,
        )

    # --- Money --------------------------------------------------------------------------------

    def estimate(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> CostEstimate | None:
        """What an answer to each of these would cost; None for a service without prices.

        A token is taken as 3.5 bytes of text (5 for the low end, 2.5 for the high end), and an answer
        as half of `max_new_tokens` (a tenth, and all that the request allows).
        """
        if self.price is None:
            return None
        price, most_out = self.price, self.most_tokens(settings)
        sizes = [sum(len(m.content.encode()) for m in p.messages) for p in prompts]
        expected = settings.max_new_tokens / 2

        def cost(bytes_per_token: float, output_tokens: float) -> float:
            return math.fsum(
                price.cost_usd(input_tokens=n / bytes_per_token, output_tokens=output_tokens)
                for n in sizes
            )

        return CostEstimate(
            calls=len(sizes),
            input_tokens=math.ceil(sum(sizes) / 3.5),
            output_tokens=math.ceil(expected * len(sizes)),
            low_usd=cost(5, settings.max_new_tokens / 10),
            high_usd=cost(2.5, most_out),
            worst_usd=math.fsum(self._worst_usd(p, settings) for p in prompts),
        )

    def most_tokens(self, settings: SamplingSettings) -> int:
        """The most tokens one reply may have."""
        return settings.max_new_tokens

    def _worst_usd(self, prompt: Prompt, settings: SamplingSettings) -> float:
        if self.price is None:
            return 0.0
        tokens = _HIDDEN_TOKENS + sum(len(m.content.encode()) for m in prompt.messages)
        most = self.most_tokens(settings)
        return max(
            self.price.cost_usd(input_tokens=tokens, output_tokens=most),
            self.price.cost_usd(cache_write_tokens=tokens, output_tokens=most),
        )

    def _announce(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> None:
        cost = self.estimate(prompts, settings)
        if cost is not None and cost.calls:
            logger.warning("%s is paid for its answers: %s.", self.name, cost)

    # --- What `Asking` needs --------------------------------------------------------------------

    def larger(self, request: Request) -> Request | None:
        """None: an answer that reaches the limit is one that was cut off."""
        return None

    async def send(self, client: Any, request: Request) -> Reply:
        """As the service's judge sends."""
        return await self._service.send(client, request)

    def said_by(self, reply: Reply) -> dict[str, Any]:
        """The answer in a reply."""
        if reply.end == "refused":
            return failed("refused", f"The model refused; category: {reply.detail}.", reply.text)
        if reply.end == "too_long":
            return failed("too_long", "The prompt does not fit the context window.", reply.text)
        if reply.end == "truncated" and not reply.text.strip():
            return failed("truncated", "The limit of tokens was reached before the answer began.")
        return {
            "text": reply.text,
            "finish_reason": "length" if reply.end == "truncated" else "stop",
        }

    def outcome(self, usage: Usage, said: dict[str, Any]) -> ApiAnswer:
        """An answer, or the failure that came instead."""
        if "failure" in said:
            return ApiAnswer(
                failure=said["failure"], detail=said["rationale"], text=said["reply"], usage=usage
            )
        return ApiAnswer(usage=usage, **said)

    def stopped_at_limit(self, book: Ledger, needed_usd: float, finished: int) -> BudgetExceeded:
        """The error that says what was spent, what is kept, and how to go on."""
        spent, unknown, _ = book.money()
        lost = f" and up to ${unknown:.4f} on requests never answered" if unknown else ""
        return BudgetExceeded(
            f"{self.name} stopped at its limit: ${spent:.4f} spent{lost}, of max_usd "
            f"${self.max_usd:.4f}; the next request may cost up to ${needed_usd:.4f}. {finished:,} "
            "answers had just now. All are kept: run again with a higher max_usd to ask only for the "
            "rest."
        )


class AnthropicSampler(ApiSampler):
    """Claude as a generator of answers, within a money limit.

    The API takes no temperature, top_p, top_k, min_p and no seed: of the settings only
    `max_new_tokens` is sent, with 2,048 tokens more in which the model may think. Answers are
    therefore not repeatable, and are kept in a ledger.

    Args:
        model: a model id, such as "claude-haiku-5-5".
        max_usd: the most that all answers of a ledger may cost together, in US dollars. No request is
            sent whose worst case could break it.
        effort: how much the model thinks; None leaves it to the API.
        prices: overrides `prefopt.judges.prices.PRICES`, and is needed for models not in it.
        **options: further arguments of `AnthropicJudge`: client, concurrency, timeout_s, max_attempts.

    Raises:
        ValueError: no `max_usd`, no known price, an argument out of range.
        JudgeUnavailable: no credentials.
    """

    def __init__(
        self,
        model: str,
        *,
        max_usd: float | None,
        effort: str | None = "low",
        prices: ModelPrice | None = None,
        **options: Any,
    ) -> None:
        self._judge = AnthropicJudge(
            model, max_usd=max_usd, effort=effort or "low", prices=prices, **options
        )
        self._effort = effort
        super().__init__(self._judge)

    @property
    def price(self) -> ModelPrice:
        """Of the model."""
        return self._judge.price

    def most_tokens(self, settings: SamplingSettings) -> int:
        """Of answer and thinking."""
        return settings.max_new_tokens + THINKING_TOKENS

    def identity(self, settings: SamplingSettings) -> Any:
        """The model, its effort and its limit: nothing else is sent."""
        return [self.name, self._effort, self.most_tokens(settings)]

    def params(self, prompt: Prompt, settings: SamplingSettings, key: str) -> dict[str, Any]:
        """The body of one message."""
        system = "\n\n".join(m.content for m in prompt.messages if m.role == "system")
        params: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.most_tokens(settings),
            "messages": [
                {"role": m.role, "content": m.content}
                for m in prompt.messages
                if m.role != "system"
            ],
        }
        if system:
            params["system"] = system
        if self._effort is not None:
            params["output_config"] = {"effort": self._effort}
        return params


class OpenAISampler(ApiSampler):
    """A model on a server that speaks OpenAI's protocol: vLLM, llama.cpp, Ollama, OpenAI.

    Every answer has a seed of its own, made from the call's seed, its prompt and its number; whether
    the same seed gives the same answer is the server's affair. top_k and min_p are sent where they are
    set; vLLM, llama.cpp and Ollama know them, OpenAI does not and refuses them.

    Args:
        model: the model's name on that server; for vLLM's LoRA adapters, the adapter's.
        base_url: the server's address up to "/v1"; by default OPENAI_BASE_URL, or OpenAI's own.
        max_usd: the most that all answers of a ledger may cost together, in US dollars. Goes with
            `prices`; a host that is known to charge needs both.
        prices: in dollars per million tokens.
        extra_body: more fields of the request, such as {"chat_template_kwargs": {...}}.
        **options: further arguments of `OpenAIJudge`: api_key, client, concurrency, timeout_s,
            max_attempts, limit_field.

    Raises:
        ValueError: an argument out of range, or money without prices.
        JudgeUnavailable: no key for the default address, or no OpenAI SDK.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        max_usd: float | None = None,
        prices: ModelPrice | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._judge = OpenAIJudge(
            model,
            base_url=base_url,
            max_usd=max_usd,
            prices=prices,
            output="plain",
            extra_body=extra_body,
            **options,
        )
        self._extra_body = dict(extra_body or {})
        super().__init__(self._judge)

    @property
    def price(self) -> ModelPrice | None:
        """Of the model; None for a server of one's own."""
        return self._judge.price

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        k: int,
        settings: SamplingSettings,
        seed: int,
        partial: Path | None,
        told: Told,
    ) -> list[list[Candidate]]:
        """See `ApiSampler.answers`."""
        # The SDK knows no such fields, so they go where fields of the user's own go.
        more = {"top_k": settings.top_k, "min_p": settings.min_p}
        self._judge.extra_body = {**{n: v for n, v in more.items() if v}, **self._extra_body}
        return super().answers(
            prompts, k=k, settings=settings, seed=seed, partial=partial, told=told
        )

    def identity(self, settings: SamplingSettings) -> Any:
        """The model, its server and all that is sent but the prompt and the seed."""
        return [self.name, self._judge.base_url, self._sent(settings), self._judge.extra_body]

    def params(self, prompt: Prompt, settings: SamplingSettings, key: str) -> dict[str, Any]:
        """The arguments of one chat completion."""
        return {
            "model": self.model,
            "messages": [{"role": m.role, "content": m.content} for m in prompt.messages],
            "seed": int(key[:7], 16),  # 28 bits: some servers take no more than 31
            **self._sent(settings),
        }

    def _sent(self, settings: SamplingSettings) -> dict[str, Any]:
        sent: dict[str, Any] = {
            self._judge.limit_field: settings.max_new_tokens,
            "temperature": settings.temperature,
        }
        if settings.top_p < 1:
            sent["top_p"] = settings.top_p
        return sent


def _check_roles(prompts: Sequence[Prompt]) -> None:
    problems = [
        f"prompt {index + 1} ({prompt.text[:50]!r})"
        for index, prompt in enumerate(prompts)
        if any(m.role == "tool" for m in prompt.messages)
    ]
    if problems:
        raise DataError(
            f"{len(problems)} prompt(s) hold a tool's message, which an API takes only as the answer "
            "to a call that it made. Leave them out, or sample with a local model.",
            problems,
        )
