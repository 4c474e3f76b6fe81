"""Sampled answers and a scorer -> the best answer of each prompt, and what best-of-n is worth.

Best-of-n is the plainest way to use a reward model: sample n answers, keep the one that scores highest
(Stiennon et al. 2020, arXiv:2009.01325). It moves away from the policy by at most
log n - (n - 1) / n nats (Beirami et al. 2024, arXiv:2401.01879), which makes it the yardstick for
trained policies at the same distance. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from prefopt.types import Candidate, Prompt, group_by_prompt


class HasScore(Protocol):
    """Anything that scores answers as `RewardModel.score` does."""

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """The scores of each prompt's answers."""
        ...


Scorer = HasScore | Callable[[Sequence[Prompt], Sequence[Sequence[str]]], Any]
"""A reward model, or a function with the signature of its `score`; None is a score that failed."""


class BestAnswer(NamedTuple):
    """A prompt's best answer, its score, and what its answers scored, in order; None failed."""

    candidate: Candidate
    score: float
    scores: tuple[float | None, ...]


def best_of_n(
    candidates: Sequence[Candidate], scorer: Scorer, *, n: int | None = None
) -> list[BestAnswer]:
    """The highest-scoring answer to each prompt, in order of first appearance.

    Of answers with the same score the first is taken. A score that failed (None, NaN) cannot win.

    Args:
        candidates: answers, as `sample_candidates` returns them.
        scorer: a reward model or a function.
        n: take the first n answers to each prompt only; None takes all.

    Raises:
        ValueError: n is below 1, a prompt has fewer answers than n, or the scorer did not return one
            score for each answer; or every score of a prompt failed.
    """
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    groups = [answers[:n] for answers in group_by_prompt(candidates).values()]
    short = sum(n is not None and len(answers) < n for answers in groups)
    if short:
        raise ValueError(f"{short} of {len(groups)} prompts have fewer than {n} answers.")
    score = scorer if callable(scorer) and not hasattr(scorer, "score") else scorer.score
    found = score(
        [answers[0].prompt for answers in groups],
        [[answer.text for answer in answers] for answers in groups],
    )
    if [len(row) for row in found] != [len(answers) for answers in groups]:
        raise ValueError("the scorer must return one score for each answer of each prompt.")
    best = []
    for answers, given in zip(groups, found, strict=True):
        scores = tuple(None if s is None or math.isnan(s) else float(s) for s in given)
        there = [(s, -i) for i, s in enumerate(scores) if s is not None]
        if not there:
            raise ValueError(f"no answer to prompt {answers[0].prompt.prompt_id} got a score.")
        top, place = max(there)
        best.append(BestAnswer(answers[-place], top, scores))
    return best


def best_of_n_kl(n: int) -> float:
    """How far best-of-n can move from the policy, in nats: log n - (n - 1) / n.

    Exact where no two answers are the same and an upper bound elsewhere (Beirami et al. 2024,
    arXiv:2401.01879, theorem 1).

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    return math.log(n) - (n - 1) / n


def expected_best_of_n(
    scores: Sequence[float], n: int, *, gold: Sequence[float] | None = None
) -> float:
    """What the answer that scores highest among n is worth on average, from N >= n sampled answers.

        sum over i of  C(i - 1, n - 1) / C(N, n)  gold_(i),      scores ascending

    Unbiased: the mean over all choices of n of the N answers (Nakano et al. 2021, WebGPT,
    arXiv:2112.09332, appendix I). Equal scores share their places.

    Args:
        scores: of one prompt's answers, by the model that chooses.
        n: answers it chooses among.
        gold: what the answers are truly worth; None takes the scores themselves.

    Raises:
        ValueError: n is not between 1 and the number of answers, or the lists differ in length.
    """
    gold = scores if gold is None else gold
    total = len(scores)
    if len(gold) != total:
        raise ValueError(f"expected one gold value a score, got {len(gold)} for {total}.")
    if not 1 <= n <= total:
        raise ValueError(f"n must be between 1 and {total}, the number of answers; got {n}.")
    order = sorted(range(total), key=lambda i: scores[i])
    value, start = 0.0, 0
    while start < total:
        end = start
        while end < total and scores[order[end]] == scores[order[start]]:
            end += 1
        # The chance that the best of n lies among these equals.
        share = (math.comb(end, n) - math.comb(start, n)) / math.comb(total, n)
        value += share * sum(gold[i] for i in order[start:end]) / (end - start)
        start = end
    return value
