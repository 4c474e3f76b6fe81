"""Sampling on a GPU against transformers' `generate`. `benchmarks/gpu.py` runs it.

K answers of a fixed length to prompts of Anthropic-like lengths, by a model with random weights:

    one prompt   `generate` for one prompt at a time with num_return_sequences=K (a few prompts: each
                 is a call of its own, so the rate does not depend on how many there are)
    padded       `generate` for a padded batch with num_return_sequences=K, prompts sorted by length
    prefopt      the decoder that `sample_candidates` and PPO share

Same rows at once for the last two, temperature 1, no end token, in turns (A B C A B C ...). Rates are
new tokens a second of the wall's clock; the first round warms up and does not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from prefopt.training.rollouts import RolloutSettings, TransformersEngine

K = 4
TARGETS = {"one prompt": 2.0, "padded": 1.3}
# Prompts, those of them that go one at a time, new tokens, rows at once.
LOADS = {
    "tiny": (8, 2, 8, 16), "smol": (128, 4, 64, 256), "1b": (128, 4, 64, 256), "8b": (64, 3, 64, 128),
}  # fmt: skip

Ids = tuple[int, ...]


def by_generate(model: Any, prompts: Sequence[Ids], tokens: int, at_once: int) -> int:
    """transformers' own way; returns how many tokens it made."""
    ordered = sorted(prompts, key=len)
    made, size = 0, max(1, at_once // K)
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        width = max(map(len, part))
        ids = torch.tensor([(0,) * (width - len(p)) + p for p in part], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in part], device=model.device
        )
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            num_return_sequences=K,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )
        made += out.shape[0] * (out.shape[1] - width)
    return made


def by_prefopt(model: Any, prompts: Sequence[Ids], tokens: int, at_once: int, seed: int) -> int:
    """The decoder; returns how many tokens it made."""
    settings = RolloutSettings(tokens, 1.0, (), 0, at_once)
    found = TransformersEngine(model, settings).sample(prompts, K, seed)
    return sum(len(answer.ids) for answers in found for answer in answers)


def compare(
    shape: str,
    model: Any,
    prompts: Sequence[Ids],
    device: str,
    say: Callable[[str], None],
    rounds: int = 3,
) -> dict[str, Any]:
    """Tokens a second of each way."""
    n, alone, tokens, at_once = LOADS[shape]
    prompts = list(prompts[:n])
    ways: dict[str, Callable[[int], int]] = {
        "one prompt": lambda _: by_generate(model, prompts[:alone], tokens, K),
        "padded": lambda _: by_generate(model, prompts, tokens, at_once),
        "prefopt": lambda seed: by_prefopt(model, prompts, tokens, at_once, seed),
    }
    model.eval()
    with torch.no_grad():
        by_generate(model, prompts[:1], 2, K)
        by_prefopt(model, prompts[:1], 2, at_once, 0)
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds):
            for way, run in ways.items():
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                made = run(turn + 1)
                if device == "cuda":
                    torch.cuda.synchronize()
                rates[way].append(made / (time.perf_counter() - start))
                say(f"{shape}, sampling, {way}: {rates[way][-1]:.0f} tokens/s")
    mean = {way: statistics.mean(found[1:]) for way, found in rates.items()}
    return {
        "prompts": n,
        "alone": alone,
        "new_tokens": tokens,
        "at_once": at_once,
        "k": K,
        "mean_prompt": statistics.mean(map(len, prompts)),
        "rates": rates,
        "ratios": {way: mean["prefopt"] / mean[way] for way in TARGETS},
    }


def lines(key: str, machine: str, entry: dict[str, Any]) -> list[str]:
    """The section as Markdown."""
    found = [
        f"## Sampling: {key}", "", machine, "",
        f"{entry['prompts']} prompts of {entry['mean_prompt']:.0f} tokens on average, {entry['k']} "
        f"answers of {entry['new_tokens']} tokens each, {entry['at_once']} rows at once; the first "
        f"{entry['alone']} prompts one at a time.", "",
        "| | new tokens/s by round, the first not counted | prefopt / this | target |",
        "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for way, rates in entry["rates"].items():
        shown = ", ".join(f"{r:.0f}" for r in rates)
        ratio, target = entry["ratios"].get(way), TARGETS.get(way)
        cells = "- | -" if ratio is None else f"{ratio:.2f} | {target}"
        found.append(f"| {way} | {shown} | {cells} |")
    return [*found, ""]
