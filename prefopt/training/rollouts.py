"""Prompts -> answers sampled by the policy as it is now: what PPO learns from.

    engine.sample(prompts, k, seed) -> for each prompt k answers, as token ids

An engine is anything with that method. `TransformersEngine` runs the policy itself, with the decoder
that all sampling shares: each prompt is read once for its k answers. `VLLMEngine` has vLLM, which
holds the base model once more, sample with the policy's adapter as it is now. Nothing but temperature
bends the distribution (no top-k, no penalties that a model's own generation settings may ask for), so
that the log-probabilities the policy is trained with are those it sampled with. An answer's end token
is its last action and part of it; one that was cut off has none. What is an answer's token is known
from its position, never from the padding token's id.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from prefopt.sampling.decoding import (
    Decoder,
    DecodingSettings,
    Ids,
    SampledIds,
    ScoredIds,
    TokenPrompt,
    answer_key,
)

__all__ = [
    "RolloutEngine",
    "RolloutSettings",
    "SampledIds",
    "ScoredIds",
    "TransformersEngine",
    "VLLMEngine",
]


class RolloutEngine(Protocol):
    """Samples from the policy as it is at the moment of the call."""

    def sample(
        self, prompts: Sequence[Ids], k: int, seed: int
    ) -> Sequence[Sequence[SampledIds | ScoredIds]]:
        """k answers to each prompt, of at least one token each; the same for the same seed."""


@dataclass(frozen=True)
class RolloutSettings:
    """How answers are sampled.

    Args:
        max_new_tokens: an answer is cut off here.
        temperature: logits are divided by it, here and in all log-probabilities.
        stop_token_ids: an answer ends with the first of these; with none it has exactly
            `max_new_tokens` tokens.
        pad_token_id: what fills up shorter prompts.
        batch_size: answers generated at once.
    """

    max_new_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    pad_token_id: int
    batch_size: int


class TransformersEngine:
    """Samples from a model that is in memory, as `prefopt.sampling.decoding` does for all of prefopt.

    Args:
        model: the policy, perhaps in a PEFT wrapper; its active adapter counts.
        settings: see `RolloutSettings`.
        autocast: makes the context in which training computes, so that both passes round alike.
    """

    def __init__(
        self, model: Any, settings: RolloutSettings, autocast: Any = contextlib.nullcontext
    ) -> None:
        self.model, self.settings, self._autocast = model, settings, autocast

    def sample(self, prompts: Sequence[Ids], k: int, seed: int) -> list[list[SampledIds]]:
        """See `RolloutEngine`. An answer depends on the seed, its number and its prompt's number."""
        said = self.settings
        decoder = Decoder(
            self.model,
            DecodingSettings(
                max_new_tokens=said.max_new_tokens,
                stop_token_ids=said.stop_token_ids,
                pad_token_id=said.pad_token_id,
                batch_size=said.batch_size,
                batch_tokens=sys.maxsize,
                temperature=said.temperature,
            ),
            self._autocast,
        )
        return decoder.answers(_with_keys(prompts, k, seed))


class VLLMEngine:
    """Samples with vLLM, into which the policy's adapter is swapped before every call.

    The adapter of each call lies in a folder of its own, because vLLM keeps what it has read under a
    path; the folder before it is removed. Which tokens a seed gives is vLLM's matter: it promises
    no two runs the same.

    Args:
        model: name or folder of the base model.
        write_adapter: writes the policy's adapter, as it is now, into a folder, as PEFT does.
        settings: see `RolloutSettings`; padding and batches are vLLM's own matter.
        folder: for these adapters; what is in it is removed.
        rank: of the adapter.
        **options: further arguments of `vllm.LLM`.

    Raises:
        ModelError: vLLM is not installed, or cannot load the model.
    """

    def __init__(
        self,
        model: str,
        write_adapter: Callable[[Path], None],
        settings: RolloutSettings,
        folder: Path,
        *,
        rank: int,
        **options: Any,
    ) -> None:
        from prefopt.sampling.vllm_sampler import VLLMSampler

        self.settings, self._write_adapter = settings, write_adapter
        # With the temperature in them, as in the trainer's own.
        options = {"logprobs_mode": "processed_logprobs", **options}
        self._sampler = VLLMSampler(model, max_lora_rank=rank, **options)
        self._folder, self._n_written = folder, 0
        shutil.rmtree(folder, ignore_errors=True)

    def sample(self, prompts: Sequence[Ids], k: int, seed: int) -> list[list[ScoredIds]]:
        """See `RolloutEngine`; the same for the same seed as far as vLLM keeps it."""
        self._n_written += 1
        folder = self._folder / str(self._n_written)
        self._write_adapter(folder)
        self._sampler.use_adapter(folder)
        shutil.rmtree(folder.with_name(str(self._n_written - 1)), ignore_errors=True)
        return self._sampler.sampled_ids(
            _with_keys(prompts, k, seed),
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            stop_token_ids=self.settings.stop_token_ids,
        )


def _with_keys(prompts: Sequence[Ids], k: int, seed: int) -> list[TokenPrompt]:
    return [
        TokenPrompt(prompt, tuple(answer_key(seed, number, answer) for answer in range(k)))
        for number, prompt in enumerate(prompts)
    ]
