"""Prompts with several answers -> tree batches: every prompt's tokens once, no padding.

    prompt ─┬─ answer 0        one flat row:   prompt | answer 0 | answer 1 | next prompt | ...
            └─ answer 1

An answer attends to its prompt and to itself, and its positions go on from the prompt's end, so its
log-probabilities are those it has alone behind the prompt. K answers cost K + 1 segments, whatever
the number of pairs among them. The last token of an answer predicts nothing, so it is fed only where
its hidden state is asked for: a reward model reads its score there.

Pure tensors: knows nothing of models, tokenizers or losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AnswerTree(NamedTuple):
    """The token ids of one prompt and of K different answers to it."""

    prompt_ids: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def n_tokens(self) -> int:
        """Tokens that are fed: the prompt, and each answer but for its last token."""
        return len(self.prompt_ids) + sum(len(answer) - 1 for answer in self.answers)


class TreeSpan(NamedTuple):
    """Where one tree lies in the flat row. `answer_lengths` are those of the fed tokens."""

    start: int
    prompt_length: int
    answer_lengths: tuple[int, ...]

    @property
    def end(self) -> int:
        """One past the tree's last token."""
        return self.start + self.prompt_length + sum(self.answer_lengths)


class TreeBatch(NamedTuple):
    """Several trees in one flat row. T tokens are fed, R answer tokens are scored, A answers."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    spans: tuple[TreeSpan, ...]
    predictor: Tensor  # (R,) index in the row of the token that predicts each answer token
    targets: Tensor  # (R,) the answer tokens, answer after answer
    answer_of: Tensor  # (R,) which of the A answers each token belongs to, ascending
    lengths: Tensor  # (A,) tokens of each answer
    ends: Tensor  # (A,) index in the row of each answer's last token; (0,) where that is not fed

    @property
    def n_answers(self) -> int:
        """How many answers the batch holds."""
        return int(self.lengths.numel())

    @property
    def n_tokens(self) -> int:
        """How many tokens are fed."""
        return int(self.input_ids.shape[1])

    def to(self, device: torch.device | str) -> TreeBatch:
        """The same batch with its tensors on `device`."""
        moved = (x.to(device) if isinstance(x, Tensor) else x for x in self)
        return TreeBatch(*moved)


def pack_trees(trees: Sequence[AnswerTree], *, feed_last: bool = False) -> TreeBatch:
    """Lay trees one after the other into one flat row.

    Answers are numbered through all trees in order.

    Args:
        trees: the prompts with their answers.
        feed_last: whether the last token of each answer is fed too.

    Raises:
        ValueError: no trees, or a tree with an empty prompt, no answers or an empty answer: then no
            token would predict the answer's first one.
    """
    if not trees:
        raise ValueError("a tree batch needs at least one tree, got none.")
    ids: list[int] = []
    positions: list[int] = []
    predictor: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    ends: list[int] = []
    spans: list[TreeSpan] = []
    unfed = 0 if feed_last else 1
    for index, (prompt, answers) in enumerate(trees):
        if not prompt or not answers or not all(answers):
            raise ValueError(
                f"tree {index} needs a prompt and answers of at least one token each, got a prompt "
                f"of {len(prompt)} and answers of {[len(a) for a in answers]} tokens."
            )
        start, n = len(ids), len(prompt)
        ids.extend(prompt)
        positions.extend(range(n))
        for answer in answers:
            at = len(ids)
            fed = len(answer) - unfed
            ids.extend(answer[:fed])
            positions.extend(range(n, n + fed))
            predictor.append(start + n - 1)
            predictor.extend(range(at, at + len(answer) - 1))
            targets.extend(answer)
            lengths.append(len(answer))
            ends.append(len(ids) - 1)
        spans.append(TreeSpan(start, n, tuple(len(a) - unfed for a in answers)))
    counts = torch.tensor(lengths)
    return TreeBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        spans=tuple(spans),
        predictor=torch.tensor(predictor),
        targets=torch.tensor(targets),
        answer_of=torch.repeat_interleave(torch.arange(len(lengths)), counts),
        lengths=counts,
        ends=torch.tensor(ends if feed_last else [], dtype=torch.long),
    )


class TreeSegments(NamedTuple):
    """For each token of the flat row: its tree, its segment, and whether that is a prompt."""

    tree: Tensor  # (T,)
    segment: Tensor  # (T,) numbered through the whole row
    in_prompt: Tensor  # (T,) bool


def tree_segments(spans: Sequence[TreeSpan], device: torch.device | str = "cpu") -> TreeSegments:
    """The segment map of a flat row, from which every form of attention mask can be made."""
    sizes, trees, prompts = [], [], []
    for index, span in enumerate(spans):
        for place, size in enumerate((span.prompt_length, *span.answer_lengths)):
            sizes.append(size)
            trees.append(index)
            prompts.append(place == 0)
    counts = torch.tensor(sizes)
    return TreeSegments(
        tree=torch.repeat_interleave(torch.tensor(trees), counts).to(device),
        segment=torch.repeat_interleave(torch.arange(len(sizes)), counts).to(device),
        in_prompt=torch.repeat_interleave(torch.tensor(prompts), counts).to(device),
    )


def tree_mask(spans: Sequence[TreeSpan], device: torch.device | str = "cpu") -> Tensor:
    """Which token may attend to which, for attention that takes a dense mask.

    Token q sees token k when k is not later, of the same tree, and of q's own segment or the prompt.

    Returns:
        (1, 1, T, T) bool, True where attention is allowed. Memory grows with T squared.
    """
    tree, segment, in_prompt = tree_segments(spans, device)
    place = torch.arange(tree.numel(), device=device)
    same_segment = segment[:, None] == segment[None, :]
    prompt_of_tree = (tree[:, None] == tree[None, :]) & in_prompt[None, :]
    return ((place[:, None] >= place[None, :]) & (same_segment | prompt_of_tree))[None, None]


class PaddedAnswers(NamedTuple):
    """The same answers as `TreeBatch`, each in a row of its own behind a copy of its prompt."""

    input_ids: Tensor  # (A, L) padded on the right
    attention_mask: Tensor  # (A, L) 1 for tokens, 0 for padding
    predictor: Tensor  # (R,) index into the flattened (A * L) positions
    targets: Tensor  # (R,)
    answer_of: Tensor  # (R,)
    lengths: Tensor  # (A,)
    ends: Tensor  # (A,) index of each answer's last token into the flattened positions

    @property
    def n_answers(self) -> int:
        """How many answers the batch holds."""
        return int(self.lengths.numel())

    @property
    def n_tokens(self) -> int:
        """How many tokens are fed, padding included."""
        return int(self.input_ids.numel())

    def to(self, device: torch.device | str) -> PaddedAnswers:
        """The same batch on `device`."""
        return PaddedAnswers(*(x.to(device) for x in self))


def pad_trees(trees: Sequence[AnswerTree], pad_token_id: int) -> PaddedAnswers:
    """One padded row an answer, for models that cannot take trees.

    Masks come from positions, never from token ids, so an answer may hold the padding token.

    Raises:
        ValueError: as `pack_trees`.
    """
    flat = pack_trees(trees)  # the checks, and the numbering of answers
    rows = [(prompt, answer) for prompt, answers in trees for answer in answers]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    predictor: list[int] = []
    ends: list[int] = []
    for row, (prompt, answer) in enumerate(rows):
        n = len(prompt) + len(answer)
        ids[row, :n] = torch.tensor(prompt + answer)
        mask[row, :n] = 1
        first = row * width + len(prompt) - 1
        predictor.extend(range(first, first + len(answer)))
        ends.append(row * width + n - 1)
    return PaddedAnswers(
        input_ids=ids,
        attention_mask=mask,
        predictor=torch.tensor(predictor),
        targets=flat.targets,
        answer_of=flat.answer_of,
        lengths=flat.lengths,
        ends=torch.tensor(ends),
    )


def default_micro_batch_tokens(device_type: str) -> int:
    """Tokens that go through a model at once in training where nobody says: 512 on a CPU, whose caches
    more would leave, and 8,192 elsewhere, where an 8B model with an adapter still fits into 80 GB.
    """
    return 512 if device_type == "cpu" else 8192


def split_by_tokens(sizes: Iterable[int], max_tokens: int) -> list[list[int]]:
    """Distribute trees over as few micro-batches of at most `max_tokens` tokens as first-fit finds.

    First-fit decreasing, then back in the given order within a micro-batch; one tree larger than
    `max_tokens` gets a micro-batch of its own. The result depends on nothing but the arguments.

    Args:
        sizes: tokens of each tree.
        max_tokens: the budget of one micro-batch.

    Returns:
        for each micro-batch the indices of its trees, ascending.
    """
    sizes = list(sizes)
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for place, (used, members) in enumerate(bins):
            if used + sizes[index] <= max_tokens:
                bins[place] = (used + sizes[index], [*members, index])
                break
        else:
            bins.append((sizes[index], [index]))
    return sorted(sorted(members) for _, members in bins)
