"""A sampler that runs a transformers model in memory: the default.

Prompts are tokenized, sorted by length and given to `prefopt.sampling.decoding` a batch at a time; a
batch is a few times as many answers as are generated at once, and what is kept when a call is killed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from prefopt.chat import end_token_ids, tokenize_prompt
from prefopt.errors import DataError
from prefopt.models import LanguageModel
from prefopt.sampling.partial import PartialAnswers
from prefopt.sampling.sampler import Told
from prefopt.sampling.settings import SamplingSettings
from prefopt.types import Candidate, Prompt, content_hash

logger = logging.getLogger(__name__)

# At its end a batch runs with fewer and fewer answers, so it has many times those generated at once.
_ROUNDS = 8

_NOT_APPLIED = {
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "min_new_tokens": (None, 0),
    "forced_eos_token_id": (None,),
}


class TransformersSampler:
    """Samples from a loaded model.

    Args:
        model: as it is at the moment of each call; its active adapter counts.
        source: what else, beside the model's name, tells unfinished work of this model from another's.
    """

    def __init__(self, model: LanguageModel, *, source: Any = None) -> None:
        self.model = model
        self._source = source

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.name

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
        """See `Sampler.answers`."""
        tokens = [tuple(tokenize_prompt(self.model.tokenizer, prompt)) for prompt in prompts]
        self._check_lengths(prompts, tokens, settings)
        self._tell_of_own_settings()
        kept = PartialAnswers(partial)
        found: list[list[Candidate]] = [[] for _ in prompts]
        for batch in _batches(tokens, k, settings):
            asked = [(prompts[i].prompt_id, tokens[i]) for i in batch]
            key = content_hash(
                [seed, k, self.name, self._source, msgspec.to_builtins(settings), asked]
            )
            answers = kept.get(key)
            if answers is None:
                answers = self._sample(
                    [prompts[i] for i in batch], [tokens[i] for i in batch], k, settings, seed, told
                )
                kept.add(key, answers)
            else:
                told(len(answers))
            for place, i in enumerate(batch):
                found[i] = answers[place * k : (place + 1) * k]
        return found

    def _sample(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[tuple[int, ...]],
        k: int,
        settings: SamplingSettings,
        seed: int,
        told: Told,
    ) -> list[Candidate]:
        from prefopt.sampling.decoding import Decoder, DecodingSettings, TokenPrompt, answer_key

        model, tokenizer = self.model.model, self.model.tokenizer
        stops = end_token_ids(tokenizer, model.generation_config)
        decoder = Decoder(
            model,
            DecodingSettings(
                max_new_tokens=settings.max_new_tokens,
                stop_token_ids=tuple(sorted(stops)),
                pad_token_id=tokenizer.pad_token_id,
                batch_size=settings.batch_size,
                batch_tokens=settings.batch_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                min_p=settings.min_p,
            ),
        )
        asked = [
            TokenPrompt(ids, tuple(answer_key(seed, prompt.prompt_id, n) for n in range(k)))
            for prompt, ids in zip(prompts, tokens, strict=True)
        ]
        candidates = []
        for prompt, answers in zip(prompts, decoder.answers(asked, told), strict=True):
            for number, (ids, ended) in enumerate(answers):
                kept = ids[:-1] if ended else ids
                candidates.append(
                    Candidate(
                        prompt=prompt,
                        text=tokenizer.decode(kept, skip_special_tokens=True).strip(),
                        model=self.name,
                        sample_index=number,
                        finish_reason="stop" if ended else "length",
                        n_tokens=len(kept),
                    )
                )
        return candidates

    def _check_lengths(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[tuple[int, ...]],
        settings: SamplingSettings,
    ) -> None:
        context = getattr(self.model.model.config, "max_position_embeddings", None)
        if context is None:
            return
        room = context - settings.max_new_tokens
        too_long = [
            f"prompt {index + 1} ({prompt.text[:50]!r}): {len(ids)} tokens"
            for index, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True))
            if len(ids) > room
        ]
        if too_long:
            raise DataError(
                f"{len(too_long)} prompt(s) do not fit: {self.name} reads {context} tokens, and "
                f"max_new_tokens={settings.max_new_tokens} leaves {room} for the prompt. Shorten or "
                "leave out these prompts, lower max_new_tokens, or use a model with a longer context.",
                too_long,
            )

    def _tell_of_own_settings(self) -> None:
        own = self.model.model.generation_config
        asked = {
            name: getattr(own, name, nothing[0])
            for name, nothing in _NOT_APPLIED.items()
            if getattr(own, name, nothing[0]) not in nothing
        }
        if asked:
            logger.warning(
                "%s asks for %s in its generation settings, which is not applied: answers are sampled "
                "from the model's own distribution.",
                self.name,
                ", ".join(f"{name}={value}" for name, value in asked.items()),
            )


def _batches(
    tokens: Sequence[tuple[int, ...]], k: int, settings: SamplingSettings
) -> list[list[int]]:
    """Which prompts are sampled and kept together: of like lengths, the longest first."""
    order = sorted(range(len(tokens)), key=lambda i: (-len(tokens[i]), tokens[i]))
    width = max(1, _ROUNDS * settings.batch_size // k)
    return [order[start : start + width] for start in range(0, len(order), width)]
