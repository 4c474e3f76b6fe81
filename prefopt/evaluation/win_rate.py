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
from typing import Literal, NamedTuple

import msgspec

from prefopt.types import JudgedComparison

Result = Literal["win", "tie", "loss", "unscored"]
"""What one judged comparison says about the tuned model."""

_POINTS: dict[Result, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}
_RESAMPLES = 10_000
_DRAWN_AT_ONCE = 2_000_000  # numbers of eight bytes; the batch changes no figure


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
        wilson_low, wilson_high: see `clustered_wilson_interval`, over the prompts' mean scores.
        bootstrap_low, bootstrap_high: percentile bootstrap over the prompts' mean scores; None
            when all prompts score the same, where resampling has nothing to show.
        first_position_share: the share of non-tie verdicts that name the answer shown first, among
            comparisons asked in both orders. 0.5 is a judge blind to position; None without any.
        shortest_wins_share, longest_wins_share: the win rate the rule "the answer with fewer (more)
            words wins" would give on the same comparisons.
        agrees_with_shortest: the share of comparisons decided by both the judge and that rule in
            which they agree (n_length_decided of them); None without any.
        mean_words_tuned, mean_words_baseline: mean answer length in words, scored comparisons only.
        spread: how far the prompts' mean scores lie from 1/2, see `spread_of`; 0.5 without ties.
        mde_points: the smallest distance from 50 %, in percentage points, that this many prompts of
            this spread would show with 80 % power; None when none would show. See `mde_points`.
        by_category: the same rate inside each prompt category, "" for prompts without one.
        stopped_low, stopped_high: where judging stopped once it was decided, the interval that
            allows for that (`prefopt.evaluation.sequential`); None where all was judged as planned.
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
    spread: float = 0.5
    stopped_low: float | None = None
    stopped_high: float | None = None

    @property
    def headline_interval(self) -> tuple[float, float]:
        """The 95 % interval to quote: Wilson's over prompts, see `clustered_wilson_interval`.

        It stays sensible at 0 % and 100 %, where the bootstrap has no width. Where judging stopped
        early, the interval that allows for it.
        """
        if self.stopped_low is not None and self.stopped_high is not None:
            return (self.stopped_low, self.stopped_high)
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


class Scored(NamedTuple):
    """Comparisons with a score for `a` (win 1, tie 0.5, loss 0), and why the others have none."""

    comparisons: list[JudgedComparison]
    points: list[float]
    unscored_reasons: dict[str, int]

    @property
    def n_unscored(self) -> int:
        """How many comparisons have a failed verdict."""
        return sum(self.unscored_reasons.values())

    @property
    def prompt_ids(self) -> list[str]:
        """The prompt of each scored comparison: comparisons of one prompt are one cluster."""
        return [j.comparison.prompt.prompt_id for j in self.comparisons]


def score_comparisons(judged: Sequence[JudgedComparison]) -> Scored:
    """Take the scored comparisons apart from those with a failed verdict, which are counted.

    Raises:
        ValueError: when no comparison has a score, with the reasons.
    """
    results = [result_of(j) for j in judged]
    reasons = Counter(_reason(j) for j, r in zip(judged, results, strict=True) if r == "unscored")
    scored = [(j, _POINTS[r]) for j, r in zip(judged, results, strict=True) if r != "unscored"]
    if not scored:
        raise ValueError(_nothing_to_score(judged, reasons))
    return Scored([j for j, _ in scored], [p for _, p in scored], dict(sorted(reasons.items())))


def win_rate(
    judged: Sequence[JudgedComparison],
    *,
    seed: int = 0,
    stopped: tuple[float, float] | None = None,
) -> WinRate:
    """The win rate of `a` (tuned) over `b` (baseline) with everything needed to doubt it.

    Args:
        judged: comparisons with the tuned model's answer as `a`. Several comparisons of one prompt
            count as one cluster: they are averaged before anything else.
        seed: of the bootstrap; the same comparisons and seed give the same figures.
        stopped: the interval of `judge_until_decided`, where judging stopped early.

    Raises:
        ValueError: when no comparison has a score, with the reasons.
    """
    kept = score_comparisons(judged)
    results = [result_of(j) for j in judged]
    scored = list(zip(kept.comparisons, kept.points, strict=True))

    means = _prompt_means((j.comparison.prompt.prompt_id, points) for j, points in scored)
    rate = fmean(means)
    low, high = clustered_wilson_interval(means)
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
        unscored_reasons=kept.unscored_reasons,
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
        mde_points=mde_points(len(means), spread=spread_of(means)),
        spread=spread_of(means),
        stopped_low=None if stopped is None else stopped[0],
        stopped_high=None if stopped is None else stopped[1],
        by_category=_by_category(judged, results),
    )


def word_count(text: str) -> int:
    """Length in words, split at white space: the measure of all length figures."""
    return len(text.split())


def wilson_interval(rate: float, n: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) for a fraction `rate` of `n` trials, as (low, high).

    With z the normal quantile: (rate + z²/2n ± z·sqrt(rate(1-rate)/n + z²/4n²)) / (1 + z²/n).
    It inverts the score test, so it leaves 50 % out exactly when that test rejects 50 %. `n` need not
    be whole: see `clustered_wilson_interval`.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = rate + z * z / (2 * n)
    reach = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the bound is the rate itself; rounding would miss it by a hair.
    low = (middle - reach) / scale if rate > 0 else 0.0
    high = (middle + reach) / scale if rate < 1 else 1.0
    return low, high


def clustered_wilson_interval(
    means: Sequence[float], *, confidence: float = 0.95
) -> tuple[float, float]:
    """Wilson's interval for the mean of the prompts' mean scores, as (low, high).

    A prompt with a tie, or with the mean of several answers or judges, varies less than a yes/no
    outcome. With v the variance of the means, the n prompts are worth n·rate·(1 - rate)/v yes/no
    outcomes (Kish's design effect, as Korn and Graubard 1998, Survey Methodology 24), and that number
    takes n's place in `wilson_interval`; never less than n, which it is without ties. So that few
    prompts do not look surer than they can be, v counts two more prompts, one won and one lost.
    How often it holds the truth: benchmarks/quality_intervals.py.

    Raises:
        ValueError: no means.
    """
    if not means:
        raise ValueError("an interval needs at least one prompt, got none.")
    n, rate = len(means), fmean(means)
    variance = (sum((m - rate) ** 2 for m in means) + 2 * 0.25) / (n + 1)
    return wilson_interval(rate, max(n, n * rate * (1 - rate) / variance), confidence=confidence)


def spread_of(means: Sequence[float]) -> float:
    """Root mean square distance of prompts' mean scores from 1/2, two won or lost ones added.

    0.5 where every prompt is won or lost; sqrt(1 - share of ties)/2 with one answer a prompt.
    """
    return math.sqrt((sum((m - 0.5) ** 2 for m in means) + 2 * 0.25) / (len(means) + 2))


def mde_points(
    n: int, *, spread: float = 0.5, power: float = 0.8, confidence: float = 0.95
) -> float | None:
    """The smallest distance from 50 % that `n` prompts would show, in percentage points.

    The distance d solves d·sqrt(n) = z_confidence·s + z_power·sqrt(s² - d²): the two-sided score test
    of 50 % against a win rate of 50 % + d, normal approximation, where s is the spread of the
    prompts' scores about 50 %. None when no d up to s solves it.

    Args:
        n: prompts.
        spread: 0.5 without ties; with a share t of ties sqrt(1 - t)/2, see `spread_of`.
        power: the chance to see a difference of that size.
        confidence: of the interval that has to leave 50 % out.
    """
    z_c = NormalDist().inv_cdf(0.5 + confidence / 2)
    z_p = NormalDist().inv_cdf(power)
    under_root = n + z_p**2 - z_c**2
    if under_root < 0 or math.sqrt(n) < z_c:
        return None
    d = spread * (z_c * math.sqrt(n) + z_p * math.sqrt(under_root)) / (n + z_p**2)
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
        batch=max(1, _DRAWN_AT_ONCE // len(means)),  # flat memory however many prompts there are
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
        low, high = clustered_wilson_interval(means)
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
