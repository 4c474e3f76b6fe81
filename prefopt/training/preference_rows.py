"""Rows of a preference dataset -> token ids, and batches of them -> trees.

    prompt, chosen, rejected [, p_chosen, margin]   TRL's columns, plain or conversational
    prompt, answers, scores | preferences           K answers; higher scores are better
    prompt_ids, chosen_ids, rejected_ids | answer_ids   tokenized already, and left as they are

Rows that share a prompt become one tree, and answers that are the same become one answer. Knows
nothing of models, losses or the training loop.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import datasets
from torch.utils.data import Sampler
from trl.data_utils import extract_prompt

from prefopt.errors import DataError
from prefopt.trees import AnswerTree, split_by_tokens

logger = logging.getLogger(__name__)

PairChoice = Literal["all", "best_worst"]
Truncation = Literal["keep_start", "keep_end", "drop"]
"""What becomes of a row with a sequence longer than `max_length`; "drop" leaves the row out."""

TOKEN_COLUMNS = (
    "prompt_ids", "chosen_ids", "rejected_ids", "p_chosen", "margin", "answer_ids", "scores",
    "preferences", "ref_chosen_logps", "ref_rejected_logps",
)  # fmt: skip


class TokenSequence(NamedTuple):
    """A prompt and one answer, as token ids."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


class RowPair(NamedTuple):
    """One preference inside a row; the indices are into the row's sequences."""

    chosen: int
    rejected: int
    p_chosen: float
    weight: float  # a row's weights sum to 1
    margin: float = 0.0  # by how much chosen is asked to be better; read by the reward trainer only


@dataclass(frozen=True)
class PreferenceRow:
    """One row of the dataset, the unit that batch sizes count.

    `scores` orders the answers of a K-way row (higher is better); it is None for a pair.
    """

    sequences: tuple[TokenSequence, ...]
    pairs: tuple[RowPair, ...]
    scores: tuple[float, ...] | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of every pair written out in full, as a trainer without trees would feed them."""
        return sum(
            len(ids) for pair in self.pairs for side in pair[:2] for ids in self.sequences[side]
        )


@dataclass(frozen=True)
class PreferenceRows:
    """A collated batch. Opaque to accelerate, which leaves what it does not know on its place."""

    rows: tuple[PreferenceRow, ...]


# --- Text to token ids --------------------------------------------------------------------------


def tokenize_preferences(
    dataset: Any, tokenizer: Any, *, num_proc: int | None = None, name: str = "train"
) -> Any:
    """Tokenize a preference dataset as TRL does; one that is tokenized already is returned as it is.

    The answer starts where the tokens of the prompt alone and of prompt and answer part.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`.
        tokenizer: with a chat template if the rows are conversations.
        num_proc: processes for the mapping.
        name: of the split, for progress bars.

    Raises:
        DataError: there are no rows, or columns are missing; the message says which forms are
            understood.
    """
    columns = set(next(iter(dataset), ()))
    if not columns:
        raise DataError(f"the {name} dataset is empty.")
    if {"prompt_ids", "answer_ids"} <= columns:
        return dataset
    if {"prompt_ids", "chosen_ids", "rejected_ids"} <= columns:
        return dataset
    if not ({"prompt", "answers"} <= columns or {"chosen", "rejected"} <= columns):
        raise DataError(
            f"the {name} dataset has the columns {', '.join(sorted(columns))}. Expected: "
            "chosen and rejected (with prompt, or beginning alike), or prompt and answers with "
            "scores or preferences, or prompt_ids with chosen_ids and rejected_ids."
        )
    options: dict[str, Any] = {}
    if isinstance(dataset, datasets.Dataset):
        options = {"num_proc": num_proc, "desc": f"Tokenizing {name} dataset"}
    return dataset.map(
        _tokenize_row,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, "name": name},
        **options,
    )


def _check_row(row: dict[str, Any], where: str) -> None:
    """Raise DataError where prompt and answers are not all texts, or messages."""
    k_way = "answers" in row
    answers = row["answers"] if k_way else [row["chosen"], row["rejected"]]
    if not isinstance(answers, list) or not answers:
        raise DataError(f"{where}: `answers` must be a list of answers, got {answers!r:.60}.")
    names = [f"answers[{i}]" for i in range(len(answers))] if k_way else ["chosen", "rejected"]
    given = dict(zip(names, answers, strict=True))
    if "prompt" in row:
        given = {"prompt": row["prompt"], **given}
    for name, value in given.items():
        if not isinstance(value, str | list):
            raise DataError(f"{where}: `{name}` must be a text or messages, got {value!r:.60}.")
    if isinstance(given.get("prompt"), str) and any(isinstance(a, list) for a in answers):
        raise DataError(
            f"{where}: has a plain prompt and answers that are messages; give both as text, or both "
            "as messages."
        )


def _tokenize_row(row: dict[str, Any], index: int, tokenizer: Any, name: str) -> dict[str, Any]:
    _check_row(row, f"row {index} of the {name} dataset")
    if "prompt" not in row:
        row = {**row, **extract_prompt(row)}
    k_way = "answers" in row
    answers = row["answers"] if k_way else [row["chosen"], row["rejected"]]
    prompt = row["prompt"]
    tools = row.get("tools")
    template = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    if isinstance(prompt, list):
        answers = [
            [{"role": "assistant", "content": a}] if isinstance(a, str) else a for a in answers
        ]
        alone = _template_ids(tokenizer, prompt, add_generation_prompt=True, **template)
        whole = [_template_ids(tokenizer, prompt + answer, **template) for answer in answers]
    else:
        end = tokenizer.eos_token
        answers = [a if a.endswith(end) else a + end for a in answers]
        alone = tokenizer(text=prompt)["input_ids"]
        whole = [tokenizer(text=prompt + answer)["input_ids"] for answer in answers]
    n = min(shared_length(alone, ids) for ids in whole)
    if n < len(alone):
        _warn_of_boundary(tokenizer.decode(alone[n:]))
    ids = [each[n:] for each in whole]
    if k_way:
        return {"prompt_ids": alone[:n], "answer_ids": ids}
    return {"prompt_ids": alone[:n], "chosen_ids": ids[0], "rejected_ids": ids[1]}


def _template_ids(tokenizer: Any, messages: list[Any], **options: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, **options
    )["input_ids"]
    return ids


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences share from the beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


_WARNED_OF_BOUNDARY = False


def _warn_of_boundary(lost: str) -> None:
    global _WARNED_OF_BOUNDARY
    if not _WARNED_OF_BOUNDARY:
        _WARNED_OF_BOUNDARY = True
        logger.warning(
            "tokens merge across the end of a prompt, or the chat template writes it otherwise "
            "once an answer follows: %r is left out of the prompt. Training then sees another "
            "prompt than sampling does. Said once; it may hold for all rows.",
            lost,
        )


# --- Token ids to rows --------------------------------------------------------------------------


def read_row(
    row: Mapping[str, Any],
    *,
    max_length: int | None,
    truncation: Truncation = "keep_start",
    pair_choice: PairChoice = "all",
) -> PreferenceRow | str:
    """Cut a tokenized row to length and work out its pairs; or say why it teaches nothing.

    Args:
        row: with `TOKEN_COLUMNS`.
        max_length: tokens of prompt and answer together.
        truncation: keep the start of a longer sequence, or its end, or leave the row out.
        pair_choice: of K answers, all pairs with different scores (Ouyang et al. 2022,
            arXiv:2203.02155, eq. 1, weighs each by one over their number), or best against worst.

    Returns:
        the row, or the reason for which it is left out.
    """
    prompt = tuple(row["prompt_ids"])
    k_way = row.get("answer_ids") is not None
    answers = row["answer_ids"] if k_way else (row["chosen_ids"], row["rejected_ids"])
    sequences = []
    for answer in answers:
        ids = prompt + tuple(answer)
        at = len(prompt)
        if max_length is not None and len(ids) > max_length:
            if truncation == "drop":
                return "it is longer than max_length"
            cut = 0 if truncation == "keep_start" else len(ids) - max_length
            ids, at = ids[cut : cut + max_length], max(at - cut, 0)
        at = max(at, 1)  # without a prompt the first token stands in for it: nothing predicts it
        if at >= len(ids):
            return "no answer token is left within max_length" if ids else "an answer is empty"
        sequences.append(TokenSequence(ids[:at], ids[at:]))
    if not k_way:
        p = row.get("p_chosen")
        p = 1.0 if p is None else float(p)
        if not 0.0 <= p <= 1.0:
            return f"p_chosen must be in [0, 1], got {p}"
        margin = row.get("margin")
        margin = 0.0 if margin is None else float(margin)
        if not math.isfinite(margin):
            return f"margin must be a finite number, got {margin}"
        return PreferenceRow(tuple(sequences), (RowPair(0, 1, p, 1.0, margin),))
    scores = row.get("scores")
    if scores is not None and len(scores) != len(sequences):
        return f"{len(sequences)} answers have {len(scores)} scores"
    if scores is not None and any(score is None or math.isnan(score) for score in scores):
        return "a score is missing or not a number"
    pairs = _given_pairs(row, len(sequences)) if row.get("preferences") else None
    if pairs is None:
        if scores is None:
            return "neither scores nor preferences say which answer is better"
        pairs = _pairs_by_score(scores, pair_choice)
    if isinstance(pairs, str):
        return pairs
    if not pairs:
        return "no answer is better than another"
    share = 1.0 / len(pairs)
    weighted = tuple(RowPair(c, r, p, share, margin) for c, r, p, margin in pairs)
    return PreferenceRow(
        tuple(sequences), weighted, None if scores is None else tuple(map(float, scores))
    )


def _given_pairs(row: Mapping[str, Any], k: int) -> list[tuple[int, int, float, float]] | str:
    pairs = []
    for given in row["preferences"]:
        if isinstance(given, Mapping):
            chosen, rejected = given["chosen"], given["rejected"]
            p, margin = given.get("p_chosen"), given.get("margin")
        else:
            chosen, rejected, p, margin = (*given, None, None)[:4]
        p, margin = 1.0 if p is None else float(p), 0.0 if margin is None else float(margin)
        chosen, rejected = int(chosen), int(rejected)
        if not (0 <= chosen < k and 0 <= rejected < k and chosen != rejected and 0 <= p <= 1):
            return f"preference {given} does not name two of {k} answers and a p in [0, 1]"
        if not math.isfinite(margin):
            return f"the margin of preference {given} is not a finite number"
        pairs.append((chosen, rejected, p, margin))
    return pairs


def _pairs_by_score(
    scores: Sequence[float], choice: PairChoice
) -> list[tuple[int, int, float, float]]:
    indices = range(len(scores))
    if choice == "best_worst":
        best, worst = max(indices, key=lambda i: scores[i]), min(indices, key=lambda i: scores[i])
        return [(best, worst, 1.0, 0.0)] if scores[best] > scores[worst] else []
    return [(i, j, 1.0, 0.0) for i in indices for j in indices if scores[i] > scores[j]]


def usable_rows(dataset: Any, *, name: str = "train", **how: Any) -> Any:
    """The dataset without rows that teach nothing; how many and why is written to the log.

    Args:
        dataset: tokenized.
        name: of the split.
        how: as for `read_row`.

    Raises:
        DataError: no row is left.
    """
    if not isinstance(dataset, datasets.Dataset):
        return dataset.filter(functools.partial(_is_usable, name=name, how=how, said=set()))
    reasons: Counter[str] = Counter()
    keep = []
    for index, row in enumerate(dataset):
        found = read_row(row, **how)
        if isinstance(found, str):
            reasons[found] += 1
        else:
            keep.append(index)
    if not keep:
        raise DataError(
            f"no row of the {name} dataset can be used.",
            [f"{n} rows: {reason}" for reason, n in reasons.most_common()],
        )
    if reasons:
        logger.warning(
            "%d of %d rows of the %s dataset are left out: %s",
            len(dataset) - len(keep),
            len(dataset),
            name,
            "; ".join(f"{reason} ({n})" for reason, n in reasons.most_common()),
        )
        return dataset.select(keep)
    return dataset


def _is_usable(row: Mapping[str, Any], name: str, how: dict[str, Any], said: set[str]) -> bool:
    found = read_row(row, **how)
    if isinstance(found, str) and found not in said:
        said.add(found)
        logger.warning(
            "a row of the %s dataset is left out: %s. Said once; it may hold for more rows.",
            name,
            found,
        )
    return isinstance(found, PreferenceRow)


@dataclass
class RowCollator:
    """Tokenized rows -> `PreferenceRows`.

    Args:
        max_length: as for `read_row`.
        truncation: as for `read_row`.
        pair_choice: as for `read_row`.
    """

    max_length: int | None = None
    truncation: Truncation = "keep_start"
    pair_choice: PairChoice = "all"

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> PreferenceRows:
        """Raises DataError for a row that `usable_rows` would have left out."""
        rows = []
        for example in examples:
            row = read_row(
                example,
                max_length=self.max_length,
                truncation=self.truncation,
                pair_choice=self.pair_choice,
            )
            if isinstance(row, str):
                raise DataError(f"a row cannot be used for training: {row}.")
            rows.append(row)
        return PreferenceRows(tuple(rows))


def rows_from_padded(batch: Mapping[str, Any]) -> PreferenceRows:
    """Rows from what TRL's `DataCollatorForPreference` makes, for collators of a user's own.

    Args:
        batch: `input_ids`, `attention_mask` and `completion_mask`, each (2N, T): the chosen sides of N
            pairs, then their rejected sides.

    Raises:
        DataError: a row without completion tokens.
    """
    sequences = []
    for ids, attention, completion in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        kept, mask = ids[attention.bool()].tolist(), completion[attention.bool()].tolist()
        at = max(mask.index(1) if 1 in mask else len(mask), 1)
        if at >= len(kept):
            raise DataError("the collator made a row without completion tokens.")
        sequences.append(TokenSequence(tuple(kept[:at]), tuple(kept[at:])))
    half = len(sequences) // 2
    pair = (RowPair(0, 1, 1.0, 1.0),)
    return PreferenceRows(
        tuple(PreferenceRow((sequences[i], sequences[half + i]), pair) for i in range(half))
    )


# --- Rows to trees ------------------------------------------------------------------------------


class TreePair(NamedTuple):
    """One preference inside a micro-batch; the indices are into the micro-batch's answers."""

    chosen: int
    rejected: int
    p_chosen: float
    weight: float
    row: int  # index in the batch of rows
    margin: float = 0.0


class TreeGroup(NamedTuple):
    """The answers of one K-way row inside a micro-batch, with their scores."""

    answers: tuple[int, ...]
    scores: tuple[float, ...]
    row: int


@dataclass(frozen=True)
class MicroBatch:
    """Trees that go through the model together, and the preferences among their answers."""

    trees: tuple[AnswerTree, ...]
    pairs: tuple[TreePair, ...]
    groups: tuple[TreeGroup, ...]


def plan_micro_batches(
    rows: Sequence[PreferenceRow], max_tokens: int, *, merge: bool = True
) -> list[MicroBatch]:
    """Merge rows into trees and distribute the trees over micro-batches.

    The sum of the losses over all micro-batches is that of the rows one by one, whatever
    `max_tokens` and `merge` are.

    Args:
        rows: all rows of one optimiser step on this process.
        max_tokens: tokens a micro-batch may feed; a larger tree gets one of its own.
        merge: whether rows with the same prompt share a tree.
    """
    clusters = _clusters(rows, merge)
    trees: list[tuple[list[AnswerTree], list[int], dict[tuple[int, int], int]]] = []
    for members in clusters:
        prompts: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
        for index in members:
            for prompt, answer in rows[index].sequences:
                answers = prompts.setdefault(prompt, {})
                answers.setdefault(answer, len(answers))
        cluster = [AnswerTree(prompt, tuple(answers)) for prompt, answers in prompts.items()]
        starts, place = {}, 0
        for tree in cluster:
            starts[tree.prompt_ids] = place
            place += len(tree.answers)
        where = {
            (index, i): starts[s.prompt_ids] + prompts[s.prompt_ids][s.answer_ids]
            for index in members
            for i, s in enumerate(rows[index].sequences)
        }
        trees.append((cluster, members, where))
    sizes = [sum(tree.n_tokens for tree in cluster) for cluster, _, _ in trees]
    return [
        _micro_batch(rows, [trees[i] for i in chosen])
        for chosen in split_by_tokens(sizes, max_tokens)
    ]


def _clusters(rows: Sequence[PreferenceRow], merge: bool) -> list[list[int]]:
    """Rows that have to stay together, because they share a prompt."""
    if not merge:
        return [[i] for i in range(len(rows))]
    clusters: list[list[int]] = []
    home: dict[tuple[int, ...], int] = {}
    for index, row in enumerate(rows):
        prompts = {s.prompt_ids for s in row.sequences}
        # Only cut sequences of one row can have several prompts; those rows stay alone.
        key = next(iter(prompts)) if len(prompts) == 1 else None
        if key is not None and key in home:
            clusters[home[key]].append(index)
            continue
        if key is not None:
            home[key] = len(clusters)
        clusters.append([index])
    return clusters


def _micro_batch(
    rows: Sequence[PreferenceRow],
    clusters: Iterable[tuple[list[AnswerTree], list[int], dict[tuple[int, int], int]]],
) -> MicroBatch:
    trees: list[AnswerTree] = []
    pairs: list[TreePair] = []
    groups: list[TreeGroup] = []
    offset = 0
    for cluster, members, where in clusters:
        for index in members:
            row = rows[index]
            place = [offset + where[index, i] for i in range(len(row.sequences))]
            pairs.extend(
                TreePair(place[p.chosen], place[p.rejected], p.p_chosen, p.weight, index, p.margin)
                for p in row.pairs
            )
            if row.scores is not None:
                groups.append(TreeGroup(tuple(place), row.scores, index))
        trees.extend(cluster)
        offset += sum(len(tree.answers) for tree in cluster)
    return MicroBatch(tuple(trees), tuple(pairs), tuple(groups))


class PromptGroupSampler(Sampler[int]):
    """All rows in a seeded random order of their prompts, rows of one prompt one after the other.

    So rows that share a prompt meet in a batch and share a tree there. Where no two rows share a
    prompt this is an ordinary shuffle. Epoch e of a seed always has the same order.

    Args:
        prompts: for each row something that is equal for equal prompts.
        seed: of the order.
        most: how many rows of a prompt follow each other; of more, others follow elsewhere. A batch
            of one prompt would be a step for that prompt alone.
    """

    def __init__(self, prompts: Sequence[Any], seed: int, most: int = sys.maxsize) -> None:
        groups: dict[Any, list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(index)
        self._groups = list(groups.values())
        self._n, self._seed, self._epoch, self._most = len(prompts), seed, 0, most

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed}/{self._epoch}")
        order: list[list[int]] = []
        for group in self._groups:
            rows = group
            if len(group) > self._most:
                rows = draw.sample(group, len(group))
            order += [rows[i : i + self._most] for i in range(0, len(rows), self._most)]
        draw.shuffle(order)
        return (index for part in order for index in part)
