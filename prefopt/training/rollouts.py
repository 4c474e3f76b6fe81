"""Prompts -> answers sampled by the policy as it is now: what PPO learns from.

    engine.sample(prompts, k, seed) -> for each prompt k answers, as token ids

An engine is anything with that method. `TransformersEngine` runs the policy itself: each prompt is
read once for its k answers. Nothing but temperature bends the distribution (no top-k, no penalties
that a model's own generation settings may ask for), so that the log-probabilities the policy is
trained with are those it sampled with. An answer's end token is its last action and part of it; one
that was cut off has none. What is an answer's token is known from its position, never from the
padding token's id.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from prefopt.models import fused_lora
from prefopt.training.tree_model import base_model

Ids = tuple[int, ...]


class SampledIds(NamedTuple):
    """One answer: its tokens, the end token included, and whether it ended by itself."""

    ids: Ids
    ended: bool


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
    """Samples with transformers' `generate` from a model that is in memory.

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
        """See `RolloutEngine`. Prompts of like lengths are generated together."""
        width = max(1, self.settings.batch_size // k)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: list[list[SampledIds]] = [[] for _ in prompts]
        device = next(self.model.parameters()).device
        devices = [] if device.type == "cpu" else [device]
        with (
            torch.random.fork_rng(devices=devices, device_type=device.type),
            _ready_to_generate(self.model),
            self._autocast(),
        ):
            torch.manual_seed(seed)
            for start in range(0, len(order), width):
                members = order[start : start + width]
                rows = self._generate([prompts[i] for i in members], k, device)
                for place, answer in enumerate(self._cut(rows)):
                    found[members[place // k]].append(answer)
        return found

    def _generate(self, prompts: Sequence[Ids], k: int, device: torch.device) -> Tensor:
        """New tokens (B * k, T), each prompt's keys and values computed once."""
        from transformers import DynamicCache, GenerationConfig

        said, model = self.settings, base_model(self.model)
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), said.pad_token_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):  # padded on the left
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        cache = None
        if k > 1 and width > 1 and _has_plain_cache(model):
            # The last prompt token stays outside: generate needs one token to start from.
            cache = DynamicCache(config=model.config)
            model(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :-1],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.batch_repeat_interleave(k)
        output: Tensor = model.generate(
            input_ids=ids.repeat_interleave(k, 0),
            attention_mask=mask.repeat_interleave(k, 0),
            past_key_values=cache,
            generation_config=GenerationConfig(
                max_new_tokens=said.max_new_tokens,
                do_sample=True,
                temperature=said.temperature,
                top_k=0,
                top_p=1.0,
                pad_token_id=said.pad_token_id,
                eos_token_id=list(said.stop_token_ids) or None,
            ),
        )
        return output[:, width:]

    def _cut(self, rows: Tensor) -> Iterator[SampledIds]:
        """Rows without what follows their end token."""
        stops = set(self.settings.stop_token_ids)
        for row in rows.tolist():
            end = next((i for i, token in enumerate(row) if token in stops), None)
            yield SampledIds(tuple(row if end is None else row[: end + 1]), end is not None)


@contextlib.contextmanager
def _ready_to_generate(model: Any) -> Iterator[None]:
    """Evaluation mode without gradient, and without generation settings of the model's own."""
    from transformers import GenerationConfig

    base = base_model(model)
    modes = [m for m in model.modules() if m.training]
    own, caching = base.generation_config, base.config.use_cache
    base.generation_config, base.config.use_cache = GenerationConfig(), True
    for module in modes:
        module.training = False
    try:
        with torch.no_grad(), fused_lora(model):
            yield
    finally:
        base.generation_config, base.config.use_cache = own, caching
        for module in modes:
            module.training = True


def _has_plain_cache(model: Any) -> bool:
    """Whether keys and values are kept for every position (not sliding windows, not recurrence)."""
    types = getattr(model.config.get_text_config(), "layer_types", None)
    return bool(getattr(model, "_supports_cache_class", True)) and (
        types is None or set(types) == {"full_attention"}
    )
