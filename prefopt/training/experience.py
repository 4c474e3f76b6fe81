"""A rollout batch with all that PPO learns from it, and its parts as the models take them.

Holds numbers and says how answers are laid out; knows no model, no loss and no loop.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt.training.answer_rewards import SampledBatch
from prefopt.training.replay import ReplayBatch
from prefopt.training.tree_model import Scoring
from prefopt.trees import AnswerTree, PaddedAnswers, TreeBatch, split_by_tokens


class MicroBatch(NamedTuple):
    """Some answers of a rollout batch, as the models take them."""

    batch: TreeBatch | PaddedAnswers  # on the device
    tokens: Tensor  # (R,) their tokens' places among those of the whole rollout batch
    answers: tuple[int, ...]


@dataclass
class Experience:
    """A rollout batch with all that PPO learns from it. A is answers, R their tokens."""

    prompt_ids: list[tuple[int, ...]]
    prompt_of: list[int]  # (A,)
    answer_ids: list[tuple[int, ...]]  # (A,)
    lengths: Tensor  # (A,)
    answer_of: Tensor  # (R,)
    starts: list[int]  # (A,) place of each answer's first token
    logps: Tensor  # (R,) of the policy that sampled
    values: Tensor  # (R,) before the first step
    advantages: Tensor  # (R,)
    returns: Tensor  # (R,)
    whole: tuple[MicroBatch, ...]  # all answers once
    epochs: dict[int, list[tuple[MicroBatch, ...]]] = field(default_factory=dict)

    def groups(self) -> Tensor:
        """A number for each answer (A,), the same for answers to the same prompt, from 0."""
        ids: dict[tuple[int, ...], int] = {}
        group = [ids.setdefault(self.prompt_ids[i], len(ids)) for i in self.prompt_of]
        return torch.tensor(group, device=self.lengths.device)


class PlannedStep(NamedTuple):
    """What one call of `training_step` does, and the counts of the whole optimiser step."""

    micro_batches: tuple[MicroBatch, ...]
    general: tuple[ReplayBatch, ...]  # of the step's general rows, in its first call
    n_tokens: float  # answer tokens of the whole step, on all processes
    n_fed: int  # tokens that go through the policy for it; 0 but in the step's first call
    is_first: bool
    is_last: bool
    policy_unchanged: bool  # no step was taken since the answers were sampled


def empty_experience(sampled: SampledBatch, kept: Sequence[int], device: Any) -> Experience:
    """The answers `kept` of those sampled, with zeros for all that is to be worked out."""
    lengths = [len(sampled.answer_ids[i]) for i in kept]
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    counts = torch.tensor(lengths)
    zeros = functools.partial(torch.zeros, starts[-1], device=device)
    return Experience(
        prompt_ids=list(sampled.prompt_ids),
        prompt_of=[sampled.prompt_of[i] for i in kept],
        answer_ids=[sampled.answer_ids[i] for i in kept],
        lengths=counts.to(device),
        answer_of=torch.repeat_interleave(torch.arange(len(kept)), counts).to(device),
        starts=starts[:-1],
        logps=zeros(),
        values=zeros(),
        advantages=zeros(),
        returns=zeros(),
        whole=(),
    )


def micro_batches(
    experience: Experience,
    answers: Sequence[int],
    scoring: Scoring,
    *,
    budget: int,
    pad_token_id: int,
    device: Any,
) -> tuple[MicroBatch, ...]:
    """Answers merged by prompt and distributed over micro-batches of at most `budget` tokens."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in answers:
        groups.setdefault(experience.prompt_ids[experience.prompt_of[i]], []).append(i)
    trees: list[tuple[tuple[int, ...], list[int], int]] = []  # prompt, answers, tokens
    for prompt, members in groups.items():
        size, part = len(prompt), list[int]()
        for i in members:
            n = len(experience.answer_ids[i])
            if part and size + n > budget:
                trees.append((prompt, part, size))
                size, part = len(prompt), []
            size += n
            part.append(i)
        trees.append((prompt, part, size))
    found = []
    for members in split_by_tokens([size for _, _, size in trees], budget):
        picked = [i for t in members for i in trees[t][1]]
        batch = scoring.batch(
            [
                AnswerTree(trees[t][0], tuple(experience.answer_ids[i] for i in trees[t][1]))
                for t in members
            ],
            pad_token_id,
        )
        starts = torch.tensor([experience.starts[i] for i in picked])
        before = batch.lengths.cumsum(0) - batch.lengths
        tokens = torch.arange(batch.targets.numel()) + (starts - before)[batch.answer_of]
        found.append(MicroBatch(batch.to(device), tokens.to(device), tuple(picked)))
    return tuple(found)
