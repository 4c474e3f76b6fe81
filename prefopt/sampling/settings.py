"""How answers are sampled: the one set of settings that every engine understands. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are sampled.

    The four that bend the distribution are applied in this order: temperature, top_k, top_p, min_p.
    Nothing else is: what a checkpoint's own generation settings ask for (a repetition penalty, its own
    temperature) is not.

    Args:
        temperature: logits are divided by it; 0 takes the most likely token (greedy).
        top_p: sample from the smallest set of tokens with at least this probability; 1 keeps all
            (Holtzman et al. 2020, arXiv:1904.09751).
        top_k: sample from this many most likely tokens only; 0 keeps all.
        max_new_tokens: an answer is cut off here and marked `finish_reason="length"`.
        batch_size: answers generated at once; lower it when memory runs out.
        min_p: leave out tokens less likely than this share of the most likely one; 0 keeps all
            (Nguyen et al. 2024, arXiv:2407.01082).
        batch_tokens: tokens of prompts and answers kept in memory at once; where they are long, fewer
            answers than `batch_size` are generated together.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 256
    batch_size: int = 64
    min_p: float = 0.0
    batch_tokens: int = 65_536

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature must not be negative or infinite, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            problems.append(f"top_k must not be negative, got {self.top_k}")
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.batch_size < 1:
            problems.append(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0.0 <= self.min_p < 1.0:
            problems.append(f"min_p must be in [0, 1), got {self.min_p}")
        if self.batch_tokens < 1:
            problems.append(f"batch_tokens must be at least 1, got {self.batch_tokens}")
        if problems:
            raise ValueError("sampling settings: " + "; ".join(problems) + ".")
