"""A dataset of prompts -> token ids, and the order in which PPO samples answers to them.

Rows have `prompt` (a text, or messages), or `prompt_ids` / `prompt_input_ids` (token ids), or both;
other columns are kept for reward functions. Knows nothing of models, answers or rewards.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
from torch.utils.data import Dataset, Sampler

from prefopt.errors import DataError
from prefopt.types import Prompt

logger = logging.getLogger(__name__)


class PromptRow(NamedTuple):
    """One prompt: its token ids, the conversation where it is known, and the dataset's whole row."""

    ids: tuple[int, ...]
    prompt: Prompt | None
    row: Mapping[str, Any]


class PromptSet(Dataset[int]):
    """The prompts of a dataset. Its items are row numbers: `rows` reads them when they are needed.

    Args:
        dataset: a `datasets.Dataset`.
        tokenizer: of the texts; not needed where all rows have token ids.
        max_length: longer prompts are left out, and told; None keeps all.
        name: of the split, for messages.

    Raises:
        DataError: no prompts, or rows that cannot be read.
    """

    def __init__(
        self, dataset: Any, tokenizer: Any, *, max_length: int | None = None, name: str = "train"
    ) -> None:
        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(
                f"the {name} dataset must be a datasets.Dataset, got {type(dataset).__name__}. "
                "datasets.Dataset.from_list makes one from a list of rows."
            )
        columns = dataset.column_names
        given = next((c for c in ("prompt_ids", "prompt_input_ids") if c in columns), None)
        if not len(dataset):
            raise DataError(f"the {name} dataset is empty.")
        if given is None and "prompt" not in columns:
            raise DataError(
                f"the {name} dataset has the columns {', '.join(columns)}. Expected: prompt (a "
                "text, or messages), or prompt_ids."
            )
        if given is None and tokenizer is None:
            raise DataError("prompts as texts need a tokenizer as processing_class.")
        if given is None:
            self._ids = [_tokenize(tokenizer, prompt) for prompt in dataset["prompt"]]
        else:
            self._ids = [tuple(ids) for ids in dataset[given]]
        lengths = [len(ids) for ids in self._ids]
        if not all(lengths):
            raise DataError(f"row {lengths.index(0)} of the {name} dataset has an empty prompt.")
        self._kept = [i for i, n in enumerate(lengths) if max_length is None or n <= max_length]
        self.n_left_out = len(lengths) - len(self._kept)
        if not self._kept:
            raise DataError(
                f"all prompts of the {name} dataset are longer than {max_length} tokens. Raise "
                "max_prompt_length, or lower max_new_tokens, which the context must hold too."
            )
        if self.n_left_out:
            logger.warning(
                "%d of %d prompts of the %s dataset are longer than %d tokens and are left out",
                self.n_left_out, len(lengths), name, max_length,
            )  # fmt: skip
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> int:
        return index

    def rows(self, indices: Sequence[int]) -> list[PromptRow]:
        """The rows of some numbers."""
        places = [self._kept[i] for i in indices]
        columns = self._dataset[places]
        found = []
        for k, place in enumerate(places):
            row = {name: values[k] for name, values in columns.items()}
            found.append(PromptRow(self._ids[place], _conversation(row.get("prompt")), row))
        return found


class RolloutSampler(Sampler[int]):
    """Prompts in a seeded random order, in rollout batches that are repeated for each optimiser step.

    Where the last batch of an epoch is not full, prompts of another shuffle fill it, so that every
    prompt is answered at least once an epoch and all batches are of one size. Epoch e of a seed
    always has the same order.

    Args:
        n_prompts: how many there are.
        batch: prompts of a rollout batch, on all processes.
        repeats: optimiser steps it is used for.
        seed: of the order.
    """

    def __init__(self, n_prompts: int, batch: int, repeats: int, seed: int) -> None:
        self._n, self._batch, self._repeats, self._seed = n_prompts, batch, repeats, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self._n // self._batch) * self._batch * self._repeats

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed}/{self._epoch}")
        order: list[int] = []
        while len(order) < self._n or len(order) % self._batch:
            more = list(range(self._n))
            draw.shuffle(more)
            room = -(-self._n // self._batch) * self._batch - len(order)
            order += more[:room]
        for start in range(0, len(order), self._batch):
            for _ in range(self._repeats):
                yield from order[start : start + self._batch]


def _tokenize(tokenizer: Any, prompt: Any) -> tuple[int, ...]:
    if isinstance(prompt, str):  # a plain text, for which no template is asked
        ids = tokenizer(text=prompt)["input_ids"]
        ends = tokenizer.eos_token_id
        if ids[-1:] == [ends] and not prompt.endswith(str(tokenizer.eos_token)):
            ids = ids[:-1]
        return tuple(ids)
    encoded = tokenizer.apply_chat_template(
        prompt, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    return tuple(encoded["input_ids"])


def _conversation(prompt: Any) -> Prompt | None:
    if prompt is None:
        return None
    return Prompt.from_text(prompt) if isinstance(prompt, str) else Prompt.from_messages(prompt)
