"""Candidates -> comparisons -> preference groups, with a reason for everything left out.

`pair_candidates` says what to compare; `build_preferences` turns verdicts into labels. Text only:
no model, no tensor, no file.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

from prefopt.errors import DataError
from prefopt.types import (
    Candidate,
    Comparison,
    JudgedComparison,
    LeftOut,
    LeftOutReason,
    Preference,
    PreferenceGroup,
    content_hash,
    group_by_prompt,
)

# Uncalibrated default P(label right) by |mean grade| of both orders; replaced by a calibration
# against human labels where there is one.
_PRIOR_P = ((2.0, 0.95), (1.5, 0.90), (1.0, 0.80), (0.0, 0.65))


class Preferences(msgspec.Struct, frozen=True, kw_only=True):
    """What `build_preferences` returns: the groups, and every comparison that gave no preference."""

    groups: tuple[PreferenceGroup, ...]
    left_out: tuple[LeftOut, ...]
    n_comparisons: int
    n_flipped: int

    @property
    def n_preferences(self) -> int:
        """The number of (chosen, rejected) pairs over all groups."""
        return sum(len(group.preferences) for group in self.groups)

    def reasons(self) -> dict[str, int]:
        """How many comparisons were left out, by reason, most frequent first."""
        return dict(Counter(item.reason for item in self.left_out).most_common())

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.reasons().items()) or "none"
        return (
            f"{self.n_preferences} preferences over {len(self.groups)} prompts from "
            f"{self.n_comparisons} comparisons; left out: {reasons}"
        )


def pair_candidates(
    candidates: Sequence[Candidate], *, scheme: Literal["all", "chain"] = "all"
) -> list[Comparison]:
    """Comparisons among the candidates of each prompt.

    Args:
        candidates: answers, any number a prompt, in any order.
        scheme: "all" gives the K(K-1)/2 pairs of each prompt; "chain" gives K pairs in a ring, so
            that every answer is compared twice (for K > 2 at less cost).

    Which answer of a pair is shown first is decided by a hash, so it is random with respect to
    quality and the same in every run.

    Raises:
        DataError: when a prompt has fewer than two candidates, all such prompts at once.
    """
    comparisons = []
    lonely = []
    for prompt_id, group in group_by_prompt(candidates).items():
        if len(group) < 2:
            lonely.append(f"prompt {prompt_id} ({group[0].prompt.text[:60]!r})")
            continue
        if scheme == "all" or len(group) == 2:
            pairs = list(itertools.combinations(group, 2))
        else:
            pairs = list(zip(group, group[1:] + group[:1], strict=True))
        for a, b in pairs:
            comparison = Comparison(a=a, b=b)
            first = int(content_hash([a.candidate_id, b.candidate_id])[:8], 16) % 2
            comparisons.append(comparison.swapped() if first else comparison)
    if lonely:
        raise DataError(
            f"{len(lonely)} prompt(s) have one candidate only, and a comparison needs two. Sample "
            "with k >= 2 or leave these prompts out.",
            lonely,
        )
    return comparisons


def build_preferences(
    judged: Sequence[JudgedComparison],
    *,
    min_margin: float = 1.0,
    pairs_per_prompt: int | None = None,
) -> Preferences:
    """Turn judged comparisons into preference groups.

    A comparison becomes a preference when no verdict failed and the mean signed grade g of its
    orders has |g| >= `min_margin`; the sign names the chosen answer. Ties, flips (the two orders
    name opposite winners), weak and failed ones are left out with their reason.

    Args:
        judged: comparisons with verdicts.
        min_margin: the least |g|, in (0, 2]. With grades of 1 ("better") and 2 ("much better"), 1.0
            asks that both orders agree or one says "much better" and the other "better".
        pairs_per_prompt: keep at most this many preferences a prompt, between the answers that lie
            furthest apart (1: the best and the worst); None keeps all.

    Returns:
        Preferences with groups in order of first appearance. `p_chosen` is an uncalibrated prior.
    """
    if not 0.0 < min_margin <= 2.0:
        raise ValueError(f"min_margin must be in (0, 2], got {min_margin}.")
    if pairs_per_prompt is not None and pairs_per_prompt < 1:
        raise ValueError(f"pairs_per_prompt must be at least 1 or None, got {pairs_per_prompt}.")
    by_prompt: dict[str, list[JudgedComparison]] = {}
    for item in judged:
        by_prompt.setdefault(item.comparison.prompt.prompt_id, []).append(item)

    groups, left_out = [], []
    for items in by_prompt.values():
        usable: list[JudgedComparison] = []
        for item in items:
            reason = _why_left_out(item, min_margin)
            if reason is None:
                usable.append(item)
            else:
                left_out.append(reason)
        if pairs_per_prompt is not None and len(usable) > pairs_per_prompt:
            kept = _widest(usable, pairs_per_prompt)
            left_out += [_left_out(item, "not_selected") for item in usable if item not in kept]
            usable = kept
        if usable:
            groups.append(_group(usable))
    return Preferences(
        groups=tuple(groups),
        left_out=tuple(left_out),
        n_comparisons=len(judged),
        n_flipped=sum(item.flipped for item in judged),
    )


def _why_left_out(item: JudgedComparison, min_margin: float) -> LeftOut | None:
    a, b = item.comparison.a.text, item.comparison.b.text
    if a.strip() == b.strip():
        return _left_out(item, "identical_answers")
    if item.failures:
        return _left_out(item, "judge_failed", ", ".join(item.failures))
    grade = item.mean_grade
    assert grade is not None, "a comparison without failures has a grade"
    if item.flipped:
        return _left_out(item, "flipped")
    if grade == 0:
        return _left_out(item, "tie")
    if abs(grade) < min_margin:
        return _left_out(item, "weak", f"mean grade {grade:+.1f}")
    chosen = a if grade > 0 else b
    if not chosen.strip():
        return _left_out(item, "empty_answer", "the preferred answer is empty")
    return None


def _left_out(
    item: JudgedComparison,
    reason: LeftOutReason,
    detail: str = "",
) -> LeftOut:
    return LeftOut(
        prompt_id=item.comparison.prompt.prompt_id,
        comparison_id=item.comparison.comparison_id,
        reason=reason,
        detail=detail,
    )


def _widest(usable: list[JudgedComparison], n: int) -> list[JudgedComparison]:
    """The n decided comparisons whose answers lie furthest apart, each answer used once if possible.

    Answers are placed by their mean grade over all decided comparisons they took part in. Of equals
    the first is taken, so the choice is repeatable; the order of `usable` is kept.
    """
    grades: dict[str, list[float]] = {}
    for item in usable:
        grade = item.mean_grade or 0.0
        grades.setdefault(item.comparison.a.candidate_id, []).append(grade)
        grades.setdefault(item.comparison.b.candidate_id, []).append(-grade)
    mean = {key: sum(values) / len(values) for key, values in grades.items()}

    def gap(item: JudgedComparison) -> float:
        between = mean[item.comparison.a.candidate_id] - mean[item.comparison.b.candidate_id]
        return between if (item.mean_grade or 0.0) > 0 else -between

    kept: list[JudgedComparison] = []
    used: set[str] = set()

    def rank(item: JudgedComparison) -> tuple[int, float]:
        return (-len(_answer_ids(item) & used), gap(item))

    for _ in range(n):
        best = max((item for item in usable if item not in kept), key=rank)
        kept.append(best)
        used.update(_answer_ids(best))
    return [item for item in usable if item in kept]


def _answer_ids(item: JudgedComparison) -> set[str]:
    return {item.comparison.a.candidate_id, item.comparison.b.candidate_id}


def _group(usable: list[JudgedComparison]) -> PreferenceGroup:
    answers: dict[str, Candidate] = {}
    for item in usable:
        for candidate in (item.comparison.a, item.comparison.b):
            answers.setdefault(candidate.candidate_id, candidate)
    index = {key: position for position, key in enumerate(answers)}
    preferences = []
    for item in usable:
        grade = item.mean_grade or 0.0
        a, b = index[item.comparison.a.candidate_id], index[item.comparison.b.candidate_id]
        chosen, rejected = (a, b) if grade > 0 else (b, a)
        preferences.append(
            Preference(
                chosen=chosen,
                rejected=rejected,
                p_chosen=next(p for least, p in _PRIOR_P if abs(grade) >= least),
                margin=abs(grade),
            )
        )
    return PreferenceGroup(
        prompt=usable[0].comparison.prompt,
        answers=tuple(answers.values()),
        preferences=tuple(preferences),
    )
