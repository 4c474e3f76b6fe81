"""Prompts -> candidate answers, sampled from a transformers model in resumable chunks.

Prompts are sorted by length and taken a chunk at a time; each prompt is read once for its K
answers. A chunk's random generator depends only on the seed and the chunk's prompts, so a run that
was killed and continued gives the same answers as one that was not. Knows nothing of judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from prefopt.chat import end_token_ids, tokenize_prompt
from prefopt.errors import DataError
from prefopt.models import LanguageModel, load_model
from prefopt.progress import progress_bar
from prefopt.types import Candidate, FinishReason, Prompt, content_hash


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are sampled.

    Args:
        temperature: logits are divided by it; 0 takes the most likely token (greedy).
        top_p: sample from the smallest set of tokens with at least this probability; 1 keeps all.
            On a CPU this sorts the vocabulary at every step; `top_k` does not.
        top_k: sample from this many most likely tokens only; 0 keeps all.
        max_new_tokens: an answer is cut off here and marked `finish_reason="length"`.
        batch_size: answers generated at once; lower it when memory runs out.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 256
    batch_size: int = 64

    def __post_init__(self) -> None:
        problems = []
        if self.temperature < 0:
            problems.append(f"temperature must not be negative, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            problems.append(f"top_k must not be negative, got {self.top_k}")
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.batch_size < 1:
            problems.append(f"batch_size must be at least 1, got {self.batch_size}")
        if problems:
            raise ValueError("sampling settings: " + "; ".join(problems) + ".")


class _Chunk(msgspec.Struct, frozen=True):
    """One line of a partial file: the answers of one chunk."""

    key: str
    candidates: list[Candidate]


def sample_candidates(
    prompts: Sequence[Prompt],
    model: str | LanguageModel,
    *,
    k: int = 4,
    settings: SamplingSettings | None = None,
    seed: int = 0,
    adapter: str | Path | None = None,
    partial: str | Path | None = None,
    progress: bool = True,
    description: str = "sampling",
) -> list[Candidate]:
    """Sample K answers to each prompt; returns them in prompt order, K consecutive a prompt.

    Args:
        prompts: what to answer.
        model: a name (Hub id, folder, "demo") or an already loaded model.
        k: answers a prompt. Two or more are needed to compare them.
        settings: see `SamplingSettings`.
        seed: the same seed, prompts, settings and machine give the same answers.
        adapter: a LoRA adapter to sample with (only when `model` is a name).
        partial: a file that keeps finished chunks, so that a killed call can go on.
        progress: show a bar with answers a second and time left.
        description: the bar's label.

    Raises:
        DataError: no prompts, or prompts that leave no room for an answer in the model's context
            (all of them at once, before anything is sampled).
        ModelError: the model, adapter or device cannot be used.
    """
    settings = settings or SamplingSettings()
    if not prompts:
        raise DataError("there are no prompts to sample answers for.")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if k > 1 and settings.temperature == 0:
        raise ValueError(
            f"k={k} greedy answers to a prompt would all be the same; set a temperature above 0."
        )
    loaded = model if isinstance(model, LanguageModel) else load_model(model, adapter=adapter)
    tokens = [tokenize_prompt(loaded.tokenizer, prompt) for prompt in prompts]
    _check_lengths(prompts, tokens, loaded, settings)

    order = sorted(range(len(prompts)), key=lambda i: (len(tokens[i]), prompts[i].prompt_id))
    width = max(1, settings.batch_size // k)
    chunks = [order[start : start + width] for start in range(0, len(order), width)]
    done = _read_partial(partial)
    answers: dict[int, list[Candidate]] = {}
    with progress_bar(
        total=len(prompts) * k, description=description, unit="answer", show=progress
    ) as bar:
        for chunk in chunks:
            key = content_hash(
                [seed, k, loaded.name, msgspec.to_builtins(settings), [tokens[i] for i in chunk]]
            )
            found = done.get(key)
            if found is None:
                found = _sample_chunk(
                    [prompts[i] for i in chunk],
                    [tokens[i] for i in chunk],
                    loaded,
                    k,
                    settings,
                    int(key[:15], 16),
                )
                _append_partial(partial, _Chunk(key=key, candidates=found))
            for position, i in enumerate(chunk):
                answers[i] = found[position * k : (position + 1) * k]
            bar.update(len(found))
    return [candidate for i in range(len(prompts)) for candidate in answers[i]]


def _check_lengths(
    prompts: Sequence[Prompt],
    tokens: list[list[int]],
    loaded: LanguageModel,
    settings: SamplingSettings,
) -> None:
    context = getattr(loaded.model.config, "max_position_embeddings", None)
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
            f"{len(too_long)} prompt(s) do not fit: {loaded.name} reads {context} tokens, and "
            f"max_new_tokens={settings.max_new_tokens} leaves {room} for the prompt. Shorten or "
            "leave out these prompts, lower max_new_tokens, or use a model with a longer context.",
            too_long,
        )


def _sample_chunk(
    prompts: list[Prompt],
    tokens: list[list[int]],
    loaded: LanguageModel,
    k: int,
    settings: SamplingSettings,
    seed: int,
) -> list[Candidate]:
    import torch

    with torch.random.fork_rng(devices=[] if loaded.device.type == "cpu" else None):
        torch.manual_seed(seed)
        generated = _generate(tokens, loaded, k, settings)  # (B * K, T)
    end_tokens = end_token_ids(loaded.tokenizer, loaded.model.generation_config)
    candidates = []
    for row, ids in enumerate(generated.tolist()):
        end = next((i for i, token in enumerate(ids) if token in end_tokens), None)
        finish_reason: FinishReason = "length" if end is None else "stop"
        kept = ids if end is None else ids[:end]
        candidates.append(
            Candidate(
                prompt=prompts[row // k],
                text=loaded.tokenizer.decode(kept, skip_special_tokens=True).strip(),
                model=loaded.name,
                sample_index=row % k,
                finish_reason=finish_reason,
                n_tokens=len(kept),
            )
        )
    return candidates


def _generate(
    tokens: list[list[int]], loaded: LanguageModel, k: int, settings: SamplingSettings
) -> Any:
    """New token ids (B * K, T) for B prompts, each prompt's keys and values computed once."""
    import torch
    from transformers import DynamicCache

    model, pad = loaded.model, loaded.tokenizer.pad_token_id
    width = max(len(ids) for ids in tokens)
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in tokens])  # (B, T) left
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in tokens])  # (B, T)
    input_ids, mask = input_ids.to(loaded.device), mask.to(loaded.device)
    choice: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        choice = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
        }
    cache: Any = None
    with torch.inference_mode():
        if k > 1 and width > 1 and _has_plain_cache(model):
            # The last prompt token stays outside: generate needs one token to start from.
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            cache = DynamicCache(config=model.config)
            model(
                input_ids=input_ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.batch_repeat_interleave(k)
        output = model.generate(
            input_ids=input_ids.repeat_interleave(k, 0),
            attention_mask=mask.repeat_interleave(k, 0),
            past_key_values=cache,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(end_token_ids(loaded.tokenizer, model.generation_config)),
            **choice,
        )
    return output[:, width:]


def _has_plain_cache(model: Any) -> bool:
    """Whether keys and values are kept for every position (not sliding windows, not recurrence)."""
    types = getattr(model.config, "layer_types", None)
    return bool(getattr(model, "_supports_cache_class", True)) and (
        types is None or set(types) == {"full_attention"}
    )


def _read_partial(path: str | Path | None) -> dict[str, list[Candidate]]:
    """Finished chunks of an earlier, killed call. A torn last line is cut off the file."""
    if path is None or not Path(path).exists():
        return {}
    done: dict[str, list[Candidate]] = {}
    good = 0
    with Path(path).open("r+b") as file:
        for line in file:
            try:
                chunk = msgspec.json.decode(line, type=_Chunk)
            except (msgspec.MsgspecError, ValueError):
                break
            if not line.endswith(b"\n"):
                break
            done[chunk.key] = chunk.candidates
            good += len(line)
        file.truncate(good)
    return done


def _append_partial(path: str | Path | None, chunk: _Chunk) -> None:
    if path is None:
        return
    from prefopt.data.records import unwritable

    try:
        with Path(path).open("ab") as file:
            file.write(msgspec.json.encode(chunk) + b"\n")
    except OSError as error:
        raise unwritable(Path(path), error) from error
