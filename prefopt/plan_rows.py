"""A file of preferences or demonstrations -> the numbers of tokens of its rows."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefopt.models import resolve_model_path
from prefopt.plan_config import PlanConfig

if TYPE_CHECKING:
    from prefopt.plan_time import RowSize

_SAMPLE = 2000  # prompts of a file that are tokenized


def sizes_of_data(config: PlanConfig, remarks: list[str]) -> tuple[list[RowSize], float]:
    """Row sizes of a sample of a file, and how many rows the file has.

    Args:
        config: with `data`, and the model whose tokenizer counts.
        remarks: gains what the user should know of how lengths were found.

    Raises:
        DataError: the data cannot be read.
    """
    assert config.data is not None
    tokenizer = None
    if config.shape is None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                resolve_model_path(config.model), trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError):
            tokenizer = None
    if tokenizer is None:
        remarks.append("no tokenizer is at hand: a token is taken to be four bytes of text")
    measured = _demonstration_sizes if config.method == "sft" else _preference_sizes
    rows, n = measured(config.data, tokenizer)
    if n > len(rows):
        remarks.append(f"lengths are those of {len(rows):,} of {n:,} rows, drawn at random")
    return rows, float(n)


def _drawn(items: Sequence[Any]) -> Sequence[Any]:
    return items if len(items) <= _SAMPLE else random.Random(0).sample(list(items), _SAMPLE)


def _demonstration_sizes(data: str, tokenizer: Any) -> tuple[list[RowSize], int]:
    from prefopt.chat import tokenize_answer, tokenize_text
    from prefopt.data.demonstrations import load_demonstrations

    rows = load_demonstrations(data)
    sizes: list[RowSize] = []
    for row in _drawn(rows):
        if tokenizer is None:
            before = "" if row.prompt is None else row.prompt.text
            sizes.append((_by_bytes(before), (_by_bytes(row.text),)))
            continue
        if row.prompt is None:
            ids = tokenize_text(tokenizer, row.text)
        else:
            ids = tokenize_answer(tokenizer, row.prompt, row.text, complete=row.complete)
        sizes.append((max(1, len(ids.prompt_ids)), (max(1, len(ids.answer_ids)),)))
    return sizes, len(rows)


def _preference_sizes(data: str, tokenizer: Any) -> tuple[list[RowSize], int]:
    from prefopt.chat import tokenize_candidate
    from prefopt.data.preference_data import load_preferences

    groups = load_preferences(data)
    sizes: list[RowSize] = []
    for group in _drawn(groups):
        if tokenizer is None:
            texts = [answer.text for answer in group.answers]
            sizes.append((_by_bytes(group.prompt.text), tuple(map(_by_bytes, texts))))
            continue
        ids = [tokenize_candidate(tokenizer, answer) for answer in group.answers]
        prompt = max(len(each.prompt_ids) for each in ids)
        sizes.append((max(1, prompt), tuple(max(1, len(each.answer_ids)) for each in ids)))
    return sizes, len(groups)


def _by_bytes(text: str) -> int:
    return max(1, math.ceil(len(text.encode()) / 4))
