"""Judge only as many prompts as it takes: an interval that holds however often it is looked at.

In: comparisons and a judge, or scores one by one. Out: verdicts for part of the comparisons and a
`SequentialResult` that says why judging stopped. A usual 95 % interval that is looked at after every
wave leaves 50 % out far too often; a confidence sequence does not (Waudby-Smith and Ramdas 2024,
"Estimating means of bounded random variables by betting", JRSS B 86, arXiv 2010.09686).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from prefopt.evaluation.win_rate import result_of
from prefopt.judges import Judge, judge_comparisons
from prefopt.types import Comparison, JudgedComparison

Decision = Literal["better", "worse", "equivalent", "undecided"]
"""Which the interval shows: all above 50 %, all below, all within the margin, or none of these."""

WAVE = 16
"""Prompts judged between two looks: few enough to stop soon, enough to keep a judge busy."""

_GRID = 1_000


class ConfidenceSequence:
    """An interval for the mean of scores in [0, 1], valid at every time and at any stopping time.

    For each possible mean m gamblers bet against it, half the wealth on the scores being higher and
    half on their being lower. After score x_t

        up  *= 1 + min(l_t, c/m)·(x_t - m),    down *= 1 - min(l_t, c/(1 - m))·(x_t - m),
        l_t = sqrt(2·log(2/alpha) / (v_{t-1}·t·log(1 + t))),    c = 1/2,

    v the running variance (1/4 + sum of (x_i - mean_i)²) / (t + 1). If the mean is m, neither wealth
    is likely ever to reach 1/alpha (Ville's inequality), so every m at which one does is left out,
    for good: the hedged capital process of Waudby-Smith and Ramdas, theorem 3. The scores have to be
    independent and of one mean: whole prompts, in random order.

    Where the number of scores is known beforehand (`horizon` h), the wealth is the mean of three
    gamblers', two of whom bet for a known time, l_t = sqrt(2·log(2/alpha) / (v_{t-1}·n)) with n = h/4
    and n = h (their section 3.3). A mean of such wealths is one, so the interval holds as it did; it
    shows more (benchmarks/quality_intervals.py).
    """

    def __init__(self, confidence: float = 0.95, *, horizon: int | None = None) -> None:
        """Start with no scores.

        Args:
            confidence: that all intervals together hold the mean.
            horizon: how many scores there can be. More may follow; the interval stays valid.

        Raises:
            ValueError: a confidence outside (0, 1) or a horizon below 1.
        """
        import numpy as np

        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
        if horizon is not None and horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}.")
        self.alpha = 1 - confidence
        self.n = 0
        self._sum = 0.0
        self._squares = 0.0
        self._times = () if horizon is None else (max(horizon / 4, 1.0), float(horizon))
        self._means = np.arange(_GRID + 1) / _GRID
        # Log of each gambler's wealth over its start, at each possible mean.
        self._up = np.zeros((1 + len(self._times), _GRID + 1))
        self._down = np.zeros_like(self._up)
        self._possible = np.ones(_GRID + 1, dtype=bool)

    def add(self, score: float) -> None:
        """Take one more score. Raises ValueError outside [0, 1]."""
        import numpy as np

        if not 0 <= score <= 1:
            raise ValueError(f"a score must lie in [0, 1], got {score}.")
        t, m = self.n + 1, self._means
        variance = (0.25 + self._squares) / t
        times = np.array([t * np.log(1 + t), *self._times])
        bets = np.sqrt(2 * np.log(2 / self.alpha) / (variance * times))[:, None]
        with np.errstate(divide="ignore"):
            self._up += np.log1p(np.minimum(bets, 0.5 / m) * (score - m))
            self._down += np.log1p(-np.minimum(bets, 0.5 / (1 - m)) * (score - m))
        wealth = np.maximum(np.logaddexp.reduce(self._up), np.logaddexp.reduce(self._down))
        self._possible &= wealth < np.log(2 * len(times) / self.alpha)
        self.n = t
        self._sum += score
        mean = (0.5 + self._sum) / (t + 1)
        self._squares += (score - mean) ** 2

    @property
    def mean(self) -> float:
        """The mean of the scores so far; 0.5 before any."""
        return self._sum / self.n if self.n else 0.5

    @property
    def interval(self) -> tuple[float, float]:
        """The means not yet left out, rounded outwards to the next thousandth."""
        import numpy as np

        left = np.flatnonzero(self._possible)
        if len(left) == 0:  # only when the scores are no independent draws of one mean
            return self.mean, self.mean
        step = 1 / _GRID
        low, high = self._means[left[0]], self._means[left[-1]]
        return float(max(low - step, 0)) if low > 0 else 0.0, float(min(high + step, 1))


class SequentialResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where judging stopped and what that shows. Rates are fractions.

    Fields:
        decision: see `Decision`.
        low, high: the interval at the stop, which holds the win rate with this confidence whatever
            the stopping rule was.
        win_rate: the mean over the prompts with a score. A stop comes sooner when luck exaggerates a
            difference, so read the interval, not this.
        margin: of "equivalent", a fraction.
        n_prompts: prompts with a score; n_unscored: prompts judged without one.
        n_total: prompts there were; n_not_asked of them were never judged.
        n_waves: how often the interval was looked at.
    """

    decision: Decision
    low: float
    high: float
    win_rate: float | None
    confidence: float
    margin: float
    n_prompts: int
    n_unscored: int
    n_total: int
    n_not_asked: int
    n_waves: int


class SequentialJudging(NamedTuple):
    """The comparisons that were judged, in the order they were given, and where it stopped."""

    judged: list[JudgedComparison]
    result: SequentialResult


def judge_until_decided(
    comparisons: Sequence[Comparison],
    judge: Judge,
    *,
    margin: float = 0.05,
    confidence: float = 0.95,
    wave: int = WAVE,
    seed: int = 0,
    ledger: str | Path | None = None,
    progress: bool = True,
    on_wave: Callable[[SequentialResult], None] | None = None,
) -> SequentialJudging:
    """Judge prompts in random order, both orders of each pair, until the interval decides.

    It stops when the whole interval lies above 50 % ("better"), below ("worse"), or within `margin`
    of it ("equivalent"), or when no prompt is left.

    Args:
        comparisons: with the tuned model's answer as `a`. The comparisons of a prompt stay together.
        judge: any judge.
        margin: how near to 50 % counts as no difference; 0 never stops for that.
        confidence: that the interval holds the win rate at every look.
        wave: prompts between two looks.
        seed: of the order.
        ledger: as in `judge_comparisons`: called again, it asks only for what is missing.
        progress: show a bar for each wave.
        on_wave: called after each look.

    Raises:
        ValueError: no comparisons, or a margin, confidence or wave that makes no sense.
        JudgeError: as in `judge_comparisons`.
    """
    if not comparisons:
        raise ValueError("judging needs at least one comparison, got none.")
    if not 0 <= margin < 0.5 or wave < 1:
        raise ValueError(f"margin must lie in [0, 0.5) and wave be positive, got {margin}, {wave}.")
    by_prompt: dict[str, list[int]] = {}
    for i, comparison in enumerate(comparisons):
        by_prompt.setdefault(comparison.prompt.prompt_id, []).append(i)
    order = sorted(by_prompt)
    random.Random(seed).shuffle(order)
    sequence = ConfidenceSequence(confidence, horizon=len(order))
    found: dict[int, JudgedComparison] = {}
    asked = unscored = waves = 0
    while True:
        part = order[asked : asked + wave]
        rows = [i for prompt in part for i in by_prompt[prompt]]
        answers = judge_comparisons(
            [comparisons[i] for i in rows], judge, ledger=ledger, progress=progress
        )
        found.update(zip(rows, answers, strict=True))
        for prompt in part:
            scores = [s for i in by_prompt[prompt] if (s := _points(found[i])) is not None]
            if scores:
                sequence.add(sum(scores) / len(scores))
            else:
                unscored += 1
        asked, waves = asked + len(part), waves + 1
        low, high = sequence.interval
        result = SequentialResult(
            decision=decide(low, high, margin),
            low=low,
            high=high,
            win_rate=sequence.mean if sequence.n else None,
            confidence=confidence,
            margin=margin,
            n_prompts=sequence.n,
            n_unscored=unscored,
            n_total=len(order),
            n_not_asked=len(order) - asked,
            n_waves=waves,
        )
        if on_wave is not None:
            on_wave(result)
        if result.decision != "undecided" or asked == len(order):
            return SequentialJudging([found[i] for i in sorted(found)], result)


def decide(low: float, high: float, margin: float) -> Decision:
    """What an interval of a win rate shows."""
    if low > 0.5:
        return "better"
    if high < 0.5:
        return "worse"
    return "equivalent" if max(0.5 - low, high - 0.5) <= margin else "undecided"


def _points(judged: JudgedComparison) -> float | None:
    return {"win": 1.0, "tie": 0.5, "loss": 0.0, "unscored": None}[result_of(judged)]
