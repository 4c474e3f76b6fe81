"""How often a judge prefers the tuned model's answer to the baseline's, and how sure that is.

In: judged comparisons whose `a` is the tuned model's answer and whose `b` is the baseline's.
Out: one `WinRate`: the rate, its intervals, and the figures that keep it honest (flips, failures,
position, answer length). It knows no judge and no file, and never makes a failed verdict a tie.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean
from typing import Literal

import msgspec

from prefopt.types import JudgedComparison

Result = Literal["win", "tie", "loss", "unscored"]
"""What one judged comparison says about the tuned model."""

_POINTS: dict[Result, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}
_RESAMPLES = 10_000


class CategoryRate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The win rate inside one prompt category; rate and interval are None where n is 0."""

    n: int
    n_unscored: int = 0
    win_rate: float | None = None
    low: float | None = None
    high: float | None = None


class WinRate(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.win_rate/1",
):
    """The win rate of the tuned model over the baseline. Rates and shares are fractions in [0, 1].

    Fields:
        win_rate: the mean over prompts of each prompt's mean score (win 1, tie 0.5, loss 0). With
            one comparison per prompt this is (n_win + n_tie / 2) / n.
        n, n_win, n_tie, n_loss: scored comparisons; n is the sum of the other three.
        n_flipped: the ties in which the two orders named opposite winners (part of n_tie).
        n_one_order: scored comparisons asked in one order only, where a preference for a position
            cannot be told from a preference for an answer.
        n_unscored, unscored_reasons: comparisons with a failed verdict, in none of the figures
            above. The reasons add up to n_unscored.
        n_prompts: distinct prompts with a scored comparison, the unit of both intervals.
        wilson_low, wilson_high: see `wilson_interval`, over n_prompts.
        bootstrap_low, bootstrap_high: percentile bootstrap over the prompts' mean scores; None
            when all prompts score the same, where resampling has nothing to show.
        first_position_share: the share of non-tie verdicts that name the answer shown first, among
            comparisons asked in both orders. 0.5 is a judge blind to position; None without any.
        shortest_wins_share, longest_wins_share: the win rate the rule "the answer with fewer (more)
            words wins" would give on the same comparisons.
        agrees_with_shortest: the share of comparisons decided by both the judge and that rule in
            which they agree (n_length_decided of them); None without any.
        mean_words_tuned, mean_words_baseline: mean answer length in words, scored comparisons only.
        mde_points: the smallest distance from 50 %, in percentage points, that this many prompts
            would show with 80 % power; None when even 100 % would not show. See `mde_points`.
        by_category: the same rate inside each prompt category, "" for prompts without one.
    """

    win_rate: float
    n: int
    n_win: int
    n_tie: int
    n_flipped: int
    n_loss: int
    n_one_order: int
    n_unscored: int
    unscored_reasons: dict[str, int]
    n_prompts: int
    wilson_low: float
    wilson_high: float
    bootstrap_low: float | None
    bootstrap_high: float | None
    first_position_share: float | None
    shortest_wins_share: float
    longest_wins_share: float
    agrees_with_shortest: float | None
    n_length_decided: int
    mean_words_tuned: float
    mean_words_baseline: float
    mde_points: float | None
    by_category: dict[str, CategoryRate]

    @property
    def headline_interval(self) -> tuple[float, float]:
        """The 95 % interval to quote: Wilson's, counting prompts.

        A score in [0, 1] never varies more than a yes/no outcome with the same mean, so this
        interval errs on the wide side when there are ties or several answers to a prompt, and it
        stays sensible at 0 % and 100 %, where the bootstrap has no width.
        """
        return (self.wilson_low, self.wilson_high)

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """Which side of 50 % the whole headline interval lies on."""
        low, high = self.headline_interval
        return "better" if low > 0.5 else "worse" if high < 0.5 else "unclear"


def result_of(judged: JudgedComparison) -> Result:
    """Win, tie or loss of `a`; "unscored" when a verdict failed.

    Two orders that name opposite winners are a tie whatever their strengths: the position decided,
    not the answer.
    """
    grade = judged.mean_grade
    if grade is None:
        return "unscored"
    if grade == 0 or judged.flipped:
        return "tie"
    return "win" if grade > 0 else "loss"


def win_rate(judged: Sequence[JudgedComparison], *, seed: int = 0) -> WinRate:
    """The win rate of `a` (tuned) over `b` (baseline) with everything needed to doubt it.

    Args:
        judged: comparisons with the tuned model's answer as `a`. Several comparisons of one prompt
            count as one cluster: they are averaged before anything else.
        seed: of the bootstrap; the same comparisons and seed give the same figures.

    Raises:
        ValueError: when no comparison has a score, with the reasons.
    """
    results = [result_of(j) for j in judged]
    reasons = Counter(_reason(j) for j, r in zip(judged, results, strict=True) if r == "unscored")
    scored = [(j, _POINTS[r]) for j, r in zip(judged, results, strict=True) if r != "unscored"]
    if not scored:
        raise ValueError(_nothing_to_score(judged, reasons))

    means = _prompt_means((j.comparison.prompt.prompt_id, points) for j, points in scored)
    rate = fmean(means)
    low, high = wilson_interval(rate, len(means))
    boot_low, boot_high = _bootstrap_interval(means, seed)
    shorter = [_shorter_wins(j) for j, _ in scored]
    shorter_rate = fmean(
        _prompt_means(
            (j.comparison.prompt.prompt_id, s) for (j, _), s in zip(scored, shorter, strict=True)
        )
    )
    both_decide = [
        (points, s)
        for (_, points), s in zip(scored, shorter, strict=True)
        if 0.5 not in (points, s)
    ]
    counts = Counter(results)
    return WinRate(
        win_rate=rate,
        n=len(scored),
        n_win=counts["win"],
        n_tie=counts["tie"],
        n_flipped=sum(j.flipped for j, _ in scored),
        n_loss=counts["loss"],
        n_one_order=sum(j.backward is None for j, _ in scored),
        n_unscored=counts["unscored"],
        unscored_reasons=dict(sorted(reasons.items())),
        n_prompts=len(means),
        wilson_low=low,
        wilson_high=high,
        bootstrap_low=boot_low,
        bootstrap_high=boot_high,
        first_position_share=_first_position_share([j for j, _ in scored]),
        shortest_wins_share=shorter_rate,
        longest_wins_share=1.0 - shorter_rate,
        agrees_with_shortest=fmean(p == s for p, s in both_decide) if both_decide else None,
        n_length_decided=len(both_decide),
        mean_words_tuned=fmean(word_count(j.comparison.a.text) for j, _ in scored),
        mean_words_baseline=fmean(word_count(j.comparison.b.text) for j, _ in scored),
        mde_points=mde_points(len(means)),
        by_category=_by_category(judged, results),
    )


def word_count(text: str) -> int:
    """Length in words, split at white space: the measure of all length figures."""
    return len(text.split())


def wilson_interval(rate: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) for a fraction `rate` of `n` trials, as (low, high).

    With z the normal quantile: (rate + z²/2n ± z·sqrt(rate(1-rate)/n + z²/4n²)) / (1 + z²/n).
    It inverts the score test, so it leaves 50 % out exactly when that test rejects 50 %.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = rate + z * z / (2 * n)
    reach = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the bound is the rate itself; rounding would miss it by a hair.
    low = (middle - reach) / scale if rate > 0 else 0.0
    high = (middle + reach) / scale if rate < 1 else 1.0
    return low, high


def mde_points(n: int, *, power: float = 0.8, confidence: float = 0.95) -> float | None:
    """The smallest distance from 50 % that `n` prompts would show, in percentage points.

    The distance d solves d·sqrt(n) = z_confidence/2 + z_power·sqrt(1/4 - d²): the two-sided score
    test of 50 % against a win rate of 50 % + d, normal approximation. None when no d up to 50
    points solves it.
    """
    z_c = NormalDist().inv_cdf(0.5 + confidence / 2)
    z_p = NormalDist().inv_cdf(power)
    under_root = n + z_p**2 - z_c**2
    if under_root < 0 or math.sqrt(n) < z_c:
        return None
    d = (z_c * math.sqrt(n) + z_p * math.sqrt(under_root)) / (2 * (n + z_p**2))
    return 100 * d


def _prompt_means(scores: Iterable[tuple[str, float]]) -> list[float]:
    by_prompt: dict[str, list[float]] = {}
    for prompt_id, score in scores:
        by_prompt.setdefault(prompt_id, []).append(score)
    return [fmean(values) for values in by_prompt.values()]


def _bootstrap_interval(means: list[float], seed: int) -> tuple[float | None, float | None]:
    if len(set(means)) < 2:
        return None, None
    import numpy as np
    from scipy import stats

    interval = stats.bootstrap(
        (np.asarray(means),),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=500,  # flat memory however many prompts there are
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _shorter_wins(judged: JudgedComparison) -> float:
    a, b = word_count(judged.comparison.a.text), word_count(judged.comparison.b.text)
    return 0.5 if a == b else float(a < b)


def _first_position_share(scored: list[JudgedComparison]) -> float | None:
    # With one order only, "first" and "tuned" are the same answer and the share says nothing.
    named_first = [
        verdict.preferred == first
        for j in scored
        if j.backward is not None
        for verdict, first in ((j.forward, "a"), (j.backward, "b"))
        if verdict.preferred != "tie"
    ]
    return fmean(named_first) if named_first else None


def _by_category(
    judged: Sequence[JudgedComparison], results: Sequence[Result]
) -> dict[str, CategoryRate]:
    rows: dict[str, list[tuple[str, Result]]] = {}
    for j, result in zip(judged, results, strict=True):
        prompt = j.comparison.prompt
        rows.setdefault(prompt.category, []).append((prompt.prompt_id, result))
    table = {}
    for category, row in sorted(rows.items()):
        scores = [(prompt_id, _POINTS[r]) for prompt_id, r in row if r != "unscored"]
        n_unscored = len(row) - len(scores)
        if not scores:
            table[category] = CategoryRate(n=0, n_unscored=n_unscored)
            continue
        means = _prompt_means(scores)
        low, high = wilson_interval(fmean(means), len(means))
        table[category] = CategoryRate(
            n=len(scores), n_unscored=n_unscored, win_rate=fmean(means), low=low, high=high
        )
    return table


def _reason(judged: JudgedComparison) -> str:
    return " + ".join(sorted(set(judged.failures)))


def _nothing_to_score(judged: Sequence[JudgedComparison], reasons: Counter[str]) -> str:
    if not judged:
        return "a win rate needs at least one judged comparison, got none."
    why = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
    return (
        f"a win rate needs at least one comparison with a verdict; all {len(judged)} failed "
        f"({why}). Ask the judge again: failed verdicts are asked for anew."
    )
