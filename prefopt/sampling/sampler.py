"""The one interface of everything that answers prompts. `load_sampler` makes one from a short text.

A sampler gets prompts and returns K answers to each; it keeps what it has in a file of its own, so
that a call that was killed can go on. Which samplers' answers go into one pool is
`prefopt.sampling.candidates`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from prefopt.models import Device
from prefopt.sampling.settings import SamplingSettings
from prefopt.types import Candidate, Prompt

Told = Callable[[int], None]
"""Is told how many answers are there since it was told last."""


@runtime_checkable
class Sampler(Protocol):
    """Answers prompts; `name` is shown to people and written beside every answer."""

    @property
    def name(self) -> str:
        """Such as "demo" or "anthropic:claude-haiku-5-5"."""

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
        """K answers to each prompt, in order.

        Args:
            prompts: one or more.
            k: answers a prompt.
            settings: how they are sampled.
            seed: where a sampler has a seed for each answer, an answer depends on this, its prompt and
                its number only.
            partial: a file, perhaps of an earlier and killed call, for what is finished.
            told: is told of answers as they are there, those of an earlier call included.

        Raises:
            DataError: prompts that leave no room for an answer, all of them at once and before
                anything is sampled; or a file that cannot be used.
            ModelError: the model cannot be used.
        """


def load_sampler(
    spec: str,
    *,
    adapter: str | Path | None = None,
    device: Device = "auto",
    max_usd: float | None = None,
    prices: str | Path | None = None,
) -> Sampler:
    """Make a sampler from a text: a model's name alone is run by transformers.

    Args:
        spec: one of
            "<model>"    "demo", a folder or a Hub id, run by transformers;
            "vllm:<model>"    the same, run by vLLM in this process;
            "openai:<model>@<base_url>"    a server that speaks OpenAI's protocol (vLLM, llama.cpp,
                Ollama); one that costs money needs `prices` and `max_usd`;
            "anthropic:<model>"    Claude through the Anthropic API; needs a key and `max_usd`.
        adapter: a LoRA adapter to sample with, for transformers and vLLM.
        device: where transformers runs; "auto" takes a GPU where there is one.
        max_usd: the most that a paid model's answers may cost together, in US dollars.
        prices: a file of prices by model (`prefopt.judges.prices.load_prices`).

    Raises:
        ValueError: an adapter for an API, or a paid model without `max_usd` or without prices.
        ModelError: the model, adapter or device cannot be used, or vLLM is not installed.
        JudgeUnavailable: no key.
        DataError: the file of prices cannot be used.
    """
    kind, _, argument = spec.partition(":")
    if is_remote(spec):
        if adapter is not None:
            raise ValueError(
                f"{spec} cannot be given an adapter from here. A server such as vLLM's loads it under "
                "a name of its own, which is then the model's name."
            )
        return _api_sampler(kind, argument, max_usd=max_usd, prices=prices)
    if kind == "vllm" and argument:
        from prefopt.sampling.vllm_sampler import VLLMSampler

        return VLLMSampler(argument, adapter=adapter)
    from prefopt.models import load_model
    from prefopt.sampling.transformers_sampler import TransformersSampler

    loaded = load_model(spec, adapter=adapter, device=device)
    return TransformersSampler(loaded, source=(spec, None if adapter is None else str(adapter)))


def is_remote(spec: str) -> bool:
    """Whether a spec names a model behind an API."""
    kind, _, argument = spec.partition(":")
    return kind in ("openai", "anthropic") and bool(argument)


def _api_sampler(
    kind: str, argument: str, *, max_usd: float | None, prices: str | Path | None
) -> Sampler:
    from prefopt.judges.openai import is_local, split_address
    from prefopt.judges.prices import load_prices
    from prefopt.sampling.api_sampler import AnthropicSampler, OpenAISampler

    own_prices = {} if prices is None else load_prices(prices)
    if kind == "anthropic":
        return AnthropicSampler(argument, max_usd=max_usd, prices=own_prices.get(argument))
    model, base_url = split_address(argument)
    price = own_prices.get(model)
    if price is None and is_local(base_url):
        max_usd = None  # nothing to limit: the limit is for another model of the pool
    return OpenAISampler(model, base_url=base_url, max_usd=max_usd, prices=price)
