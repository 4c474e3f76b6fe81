"""General rows that a preference training replays: which of them go into which optimiser step.

    loss = loss of the pairs + weight * 1/N sum_i sum_t -log pi(y_i,t | x_i, y_i,<t)

over the N learned tokens of the step's general rows. It is the pretraining term of InstructGPT
(Ouyang et al. 2022, arXiv:2203.02155, eq. 2) beside a preference loss; of the model's own answers it
is, but for a constant, the KL divergence from the model before training. Knows no losses and no
training loop.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.chat import tokenize_prompt
from prefopt.data.general import OWN_ANSWERS, load_general
from prefopt.data.rows import Source
from prefopt.errors import DataError
from prefopt.launched import refuse_processes
from prefopt.models import LanguageModel
from prefopt.training.preference_rows import MicroBatch
from prefopt.training.token_rows import TokenRow, tokenize_demonstrations
from prefopt.trees import AnswerTree, split_by_tokens
from prefopt.types import Candidate, Prompt

logger = logging.getLogger(__name__)


def rows_per_step(share: float, batch_size: float) -> int:
    """The general rows beside `batch_size` rows that make up `share` of both, rounded; at least one.

    Raises:
        ValueError: the share is not in (0, 1).
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"replay_share must be in (0, 1), got {share}")
    return max(1, round(batch_size * share / (1.0 - share)))


@dataclass(frozen=True)
class ReplayBatch(MicroBatch):
    """General rows that go through the model together; `n_learned` tokens are those of the step."""

    n_learned: int = 0


@dataclass
class ReplayStream:
    """General rows in an endless, seeded order: step by step the next ones, each pass shuffled anew.

    What a step gets follows from its number alone, so a continued run goes on where it was.

    Args:
        rows: the general rows.
        per_step: how many of them an optimiser step takes, over all processes.
        seed: of the order.
    """

    rows: Sequence[TokenRow]
    per_step: int
    seed: int
    _orders: dict[int, list[int]] = field(default_factory=dict)

    def at(self, step: int) -> list[TokenRow]:
        """The rows of a step, counted from 0."""
        places = range(step * self.per_step, (step + 1) * self.per_step)
        return [self.rows[self._order(p // len(self.rows))[p % len(self.rows)]] for p in places]

    def _order(self, number: int) -> list[int]:
        if number not in self._orders:
            # A step may begin in one pass and end in the next; older ones are not asked for again.
            self._orders = {k: v for k, v in self._orders.items() if k == number - 1}
            order = list(range(len(self.rows)))
            random.Random(f"{self.seed}/replay/{number}").shuffle(order)
            self._orders[number] = order
        return self._orders[number]


def replay_batches(
    rows: Sequence[TokenRow], max_tokens: int, *, process: int = 0, n_processes: int = 1
) -> list[ReplayBatch]:
    """A process's share of a step's general rows, as trees of one answer, in micro-batches.

    The sum of their losses over all processes is the mean over the step's tokens, whatever
    `max_tokens` and `n_processes` are.
    """
    n_learned = sum(len(row.answer_ids) for row in rows)
    trees = [AnswerTree(r.prompt_ids, (r.answer_ids,)) for r in rows[process::n_processes]]
    return [
        ReplayBatch(tuple(trees[i] for i in members), (), (), n_learned)
        for members in split_by_tokens([tree.n_tokens for tree in trees], max_tokens)
    ]


def replay_rows(
    source: Source | Sequence[TokenRow],
    tokenizer: Any,
    *,
    max_length: int | None,
    most: int | None,
    seed: int,
) -> list[TokenRow]:
    """General data -> token rows, checked; rows that are tokenized already are taken as they are.

    Args:
        source: as for `load_general`.
        tokenizer: the model's.
        max_length: tokens of prompt and answer together; longer rows are cut, which the log says.
        most: how many rows the whole training can use; None takes all.
        seed: of the draw.

    Raises:
        DataError: as `load_general` and `tokenize_demonstrations`.
    """
    if isinstance(source, Sequence) and source and all(isinstance(r, TokenRow) for r in source):
        return list(source)
    drawn = load_general(source, most=most, seed=seed)
    rows = tokenize_demonstrations(drawn, tokenizer, max_length=max_length)
    n_cut = sum(row.is_cut for row in rows)
    if n_cut:
        logger.info("%d of %d general rows are cut at %s tokens", n_cut, len(rows), max_length)
    return rows


def own_answers(
    loaded: LanguageModel,
    *,
    most: int,
    seed: int,
    prompts: Sequence[Prompt] | None = None,
    max_length: int | None = None,
    max_new_tokens: int = 128,
    partial: Path | None = None,
    progress: bool = True,
) -> list[Candidate]:
    """What a model itself answers, to be replayed while it trains: general data where there is none.

    Sampled at temperature 1 from all tokens, so that their mean NLL under the trained model is a
    constant plus the KL divergence from this model to the trained one.

    Args:
        loaded: the model before training.
        most: how many answers are needed at most. Each prompt is answered once, or oftener where
            there are too few.
        seed: of the sampling.
        prompts: what is asked; None takes the built-in "general" prompts. Those that leave no room for
            an answer are left out, which the log says.
        max_length: tokens of prompt and answer together; None is the model's context.
        max_new_tokens: longer answers are cut off and replayed without an end.
        partial: file that keeps finished answers, so that a killed call can go on.
        progress: show a bar.

    Raises:
        DataError: no prompt leaves room for an answer.
    """
    from prefopt.data.prompts import GENERAL, load_prompts
    from prefopt.sampling.candidates import SamplingSettings, sample_candidates

    given = load_prompts(GENERAL) if prompts is None else prompts
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    limit = min(n for n in (context, max_length, sys.maxsize) if n is not None)
    max_new_tokens = max(1, min(max_new_tokens, limit // 2))
    room = limit - max_new_tokens
    asked = [prompt for prompt in given if len(tokenize_prompt(loaded.tokenizer, prompt)) <= room]
    if not asked:
        raise DataError(
            f"none of {len(given)} prompts leaves room for an answer of {max_new_tokens} tokens "
            f"within {limit}. Raise max_length, or give general data of your own."
        )
    if len(asked) < len(given):
        logger.info("%d prompts are longer than %d tokens", len(given) - len(asked), room)
    settings = SamplingSettings(
        temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=max_new_tokens, batch_size=64
    )
    answers = sample_candidates(
        asked[:most], loaded, k=max(1, min(8, -(-most // len(asked)))), settings=settings, seed=seed,
        partial=partial, progress=progress, description="answering (for replay)",
    )  # fmt: skip
    told = [answer for answer in answers if answer.text.strip()]
    if len(told) < len(answers):
        logger.info("%d of %d own answers are empty", len(answers) - len(told), len(answers))
    return told


def general_rows(
    source: Source | None,
    loaded: LanguageModel,
    *,
    steps: int,
    batch_size: float,
    share: float,
    weight: float,
    max_length: int,
    seed: int,
    partial: Path,
    progress: bool,
) -> list[TokenRow]:
    """The general rows of a whole training, for "own_answers" sampled now; none where it replays none.

    Args:
        source: as for `load_general`, "own_answers", or None.
        loaded: the model before training.
        steps: optimiser steps of the training.
        batch_size: rows of a step beside which general ones are put, over all processes.
        share: of the general rows among all rows of a step, in (0, 1).
        weight: of their loss; 0 replays nothing.
        max_length: tokens of prompt and answer together; longer rows are cut.
        seed: of the draw and the sampling.
        partial: file that keeps finished answers of "own_answers", so that a killed call can go on.
        progress: show a bar.

    Raises:
        DataError: as `replay_rows` and `own_answers`.
        ValueError: "own_answers" in several processes, or the share is not in (0, 1).
    """
    if source is None or weight == 0:
        return []
    most = steps * rows_per_step(share, batch_size)
    if isinstance(source, str) and source == OWN_ANSWERS:
        refuse_processes("sampling own_answers", "give the general data as a file")
        source = own_answers(
            loaded, most=most, max_length=max_length, seed=seed, partial=partial, progress=progress
        )
    return replay_rows(source, loaded.tokenizer, max_length=max_length, most=most, seed=seed)
