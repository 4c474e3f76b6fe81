"""Prompts -> answers sampled by the policy as it is now: what PPO learns from.

    engine.sample(prompts, k, seed) -> for each prompt k answers, as token ids

An engine is anything with that method. `TransformersEngine` runs the policy itself, with the decoder
that all sampling shares: each prompt is read once for its k answers. Nothing but temperature bends the
distribution (no top-k, no penalties that a model's own generation settings may ask for), so that the
log-probabilities the policy is trained with are those it sampled with. An answer's end token is its
last action and part of it; one that was cut off has none. What is an answer's token is known from its
position, never from the padding token's id.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prefopt.sampling.decoding import (
    Decoder,
    DecodingSettings,
    Ids,
    SampledIds,
    TokenPrompt,
    answer_key,
)

__all__ = ["RolloutEngine", "RolloutSettings", "SampledIds", "TransformersEngine"]


class RolloutEngine(Protocol):
    """Samples from the policy as it is at the moment of the call."""

    def sample(self, prompts: Sequence[Ids], k: int, seed: int) -> list[list[SampledIds]]:
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
        asked = [
            TokenPrompt(prompt, tuple(answer_key(seed, number, answer) for answer in range(k)))
            for number, prompt in enumerate(prompts)
        ]
        return decoder.answers(asked)
