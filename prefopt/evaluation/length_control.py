"""What the win rate would be if both sides' answers were equally long.

In: judged comparisons with the tuned answer as `a`. Out: a `LengthControl`. The model is AlpacaEval
2's (Dubois, Galambosi, Liang and Hashimoto 2024, "Length-Controlled AlpacaEval", arXiv 2404.04475,
section 3), with errors by prompt. It judges nothing and says nothing about other matters of style: for
those, and for more than two models, see `prefopt.evaluation.ranking`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from prefopt.evaluation.win_rate import score_comparisons
from prefopt.types import JudgedComparison

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prefopt.evaluation.logistic import Floats

    Places = NDArray[np.int64]

FEW_PROMPTS = 50
LOPSIDED = 0.5
"""Above this |mean / standard deviation| of the length differences, equal lengths are too far from
what was seen: on AlpacaEval's models the figure without difficulties is within 1 point of the
published one below it, and up to 27 points off above (benchmarks/quality_length_control.py)."""


class LengthControl(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The win rate at equal length. Rates are fractions in [0, 1], lengths in characters.

    Fields:
        win_rate: at equal length; None where it cannot be told, and then `notes` says why.
        low, high: its 95 % interval, by prompt; it holds the error of the fit and of the prompts.
        uncontrolled: the win rate as it was judged, over the same comparisons.
        length_effect, length_effect_low, length_effect_high: the coefficient of
            tanh(difference / its standard deviation), in logits; above 0 longer answers win.
        mean_difference: the tuned model's length minus the baseline's.
        imbalance: |mean_difference| over the standard deviation of the differences; None where all
            differences are the same.
        share_longer: how often the tuned model's answer is the longer one, equal lengths half.
        n, n_prompts: scored comparisons and their prompts.
        n_unscored, unscored_reasons: comparisons with a failed verdict, in no other figure.
        notes: what a reader should know before believing the figure.
    """

    win_rate: float | None
    low: float | None
    high: float | None
    uncontrolled: float
    length_effect: float | None
    length_effect_low: float | None
    length_effect_high: float | None
    mean_difference: float
    imbalance: float | None
    share_longer: float
    n: int
    n_prompts: int
    n_unscored: int
    unscored_reasons: dict[str, int]
    notes: tuple[str, ...]


class Anchors(NamedTuple):
    """Rows that hold the length effect (and that of difficulty) near a known value.

    AlpacaEval takes its baseline's answers when told to be verbose and concise, judged against the
    baseline, with weight 0.1 a row (lambda = 0.2 over two such sets). `lengths` are
    tanh(difference / standard deviation) already.
    """

    scores: Floats
    lengths: Floats
    difficulty: Floats
    weight: float = 0.1


class LengthFit(NamedTuple):
    """What `fit_length_control` finds; the coefficients are in logits.

    `difficulty_effect` is 0 where no difficulty was given.
    """

    win_rate: float
    low: float
    high: float
    model_effect: float
    length_effect: float
    length_effect_error: float
    difficulty_effect: float


def length_controlled_win_rate(judged: Sequence[JudgedComparison]) -> LengthControl:
    """The win rate of `a` over `b` at equal length.

    With d the difference of the answers' lengths in characters and s its standard deviation,

        logit P(a wins) = model_effect + length_effect · tanh(d / s),

    fitted to win 1, tie 1/2, loss 0, each prompt counting once; the result is P at d = 0. AlpacaEval
    adds the difficulty of its 805 instructions, known from other models; see `fit_length_control`.

    Raises:
        ValueError: when no comparison has a score, with the reasons.
    """
    import numpy as np

    from prefopt.evaluation.logistic import equal_shares, interval, number_clusters

    kept = score_comparisons(judged)
    sides = [(j.comparison.a.text, j.comparison.b.text) for j in kept.comparisons]
    difference = np.array([len(a) - len(b) for a, b in sides], dtype=np.float64)
    scores = np.array(kept.points)
    prompts = number_clusters(kept.prompt_ids)
    weights = equal_shares(prompts)
    n_prompts = int(prompts.max()) + 1
    uncontrolled = float(weights @ scores / weights.sum())
    longer = float(np.mean(np.where(difference > 0, 1.0, np.where(difference < 0, 0.0, 0.5))))
    imbalance = length_imbalance(difference)
    fit = None
    if n_prompts > 1 and 0 < uncontrolled < 1:
        fit = fit_length_control(scores, difference, prompts)
    effect_low = effect_high = None
    if fit is not None and difference.std() > 0:
        effect_low, effect_high = interval(fit.length_effect, fit.length_effect_error, n_prompts)
    return LengthControl(
        win_rate=None if fit is None else fit.win_rate,
        low=None if fit is None else fit.low,
        high=None if fit is None else fit.high,
        uncontrolled=uncontrolled,
        length_effect=None if fit is None or effect_low is None else fit.length_effect,
        length_effect_low=effect_low,
        length_effect_high=effect_high,
        mean_difference=float(difference.mean()),
        imbalance=imbalance if math.isfinite(imbalance) else None,  # JSON has no infinity
        share_longer=longer,
        n=len(scores),
        n_prompts=n_prompts,
        n_unscored=kept.n_unscored,
        unscored_reasons=kept.unscored_reasons,
        notes=tuple(length_notes(fit, uncontrolled, imbalance, n_prompts)),
    )


def fit_length_control(
    scores: Floats,
    length_differences: Floats,
    prompts: Places,
    *,
    difficulty: Floats | None = None,
    anchors: Anchors | None = None,
    confidence: float = 0.95,
) -> LengthFit:
    """AlpacaEval's regression on plain arrays (Dubois et al. 2024, section 3).

        logit p = model_effect + length_effect · tanh(d / s) + difficulty_effect · difficulty

    The win rate is the mean over prompts of p at d = 0. Its interval is a stacked sandwich: what
    each prompt adds to the mean, and what it adds to the coefficients. Instead of AlpacaEval's L1
    penalty chosen by cross-validation there is the fixed prior of `prefopt.evaluation.logistic`.

    Args:
        scores: (N,) of `a`, in [0, 1]; not all 0 and not all 1.
        length_differences: (N,) of `a` minus `b`, in characters (any unit gives the same result).
        prompts: (N,) numbers from 0; each prompt counts once.
        difficulty: (N,) of each row's instruction, in logits. None leaves it out.
        anchors: rows that steady the length effect. None leaves them out.
        confidence: of the interval.
    """
    import numpy as np
    from scipy.special import expit

    from prefopt.evaluation.logistic import (
        NOT_SAMPLED,
        equal_shares,
        fit_logit,
        share_interval,
        standard_error,
    )

    clusters = prompts
    weights = equal_shares(clusters)
    n_prompts = int(clusters.max()) + 1
    spread = float(length_differences.std(ddof=1))
    lengths = np.tanh(length_differences / spread) if spread > 0 else np.zeros(len(scores))
    hard = np.zeros(len(scores)) if difficulty is None else difficulty
    rows = np.column_stack([np.ones(len(scores)), lengths, hard])
    if anchors is None:
        fit = fit_logit(rows, scores, clusters, weights=weights)
    else:
        n = len(anchors.scores)
        fit = fit_logit(
            np.vstack([rows, np.column_stack([np.zeros(n), anchors.lengths, anchors.difficulty])]),
            np.concatenate([scores, anchors.scores]),
            np.concatenate([clusters, np.full(n, NOT_SAMPLED)]),
            weights=np.concatenate([weights, np.full(n, anchors.weight)]),
        )
    level = np.column_stack([np.ones(len(scores)), np.zeros(len(scores)), hard])
    p = expit(level @ fit.coefficients)
    rate = float(weights @ p / n_prompts)
    slope = (weights * p * (1 - p)) @ level / n_prompts
    by_prompt = (np.bincount(clusters, weights * p) - rate) / n_prompts
    error = standard_error(by_prompt + fit.influence @ slope)
    low, high = share_interval(rate, error, n_prompts, confidence=confidence)
    return LengthFit(
        win_rate=rate,
        low=low,
        high=high,
        model_effect=float(fit.coefficients[0]),
        length_effect=float(fit.coefficients[1]),
        length_effect_error=fit.standard_error(np.array([0.0, 1.0, 0.0])),
        difficulty_effect=float(fit.coefficients[2]),
    )


def predicted_win_rate(
    model_effect: float, difficulty_effect: float, difficulty: Floats | Mapping[str, float]
) -> float:
    """The length-controlled win rate that coefficients give: mean of 1 / (1 + exp(-(m + e·x))).

    The coefficients of two models fitted against one baseline, subtracted, give the win rate of one
    over the other (Dubois et al. 2024, section 3).
    """
    import numpy as np
    from scipy.special import expit

    values = difficulty.values() if isinstance(difficulty, Mapping) else difficulty
    x = np.array(list(values), dtype=np.float64)
    return float(np.mean(expit(model_effect + difficulty_effect * x)))


def length_imbalance(differences: Floats) -> float:
    """|mean| / standard deviation of the length differences; 0 where all are 0."""
    import numpy as np

    mean, spread = abs(float(differences.mean())), float(differences.std())
    return mean / spread if spread > 0 else float(np.inf if mean > 0 else 0)


def moved_far(before: float, after: float) -> bool:
    """AlpacaEval's sign that the regression may have failed, for rates in [0, 1].

    A move of more than 10 points and more than a quarter of the way to 0 or 1.
    """
    down = min(before - before / 4, before - 0.10)
    up = max(before + (1 - before) / 4, before + 0.10)
    return not down <= after <= up


def length_notes(
    fit: LengthFit | None, before: float, imbalance: float, n_prompts: int
) -> list[str]:
    """What to know before believing a length-controlled win rate.

    Args:
        fit: the regression, None where there was none.
        before: the win rate as judged.
        imbalance: of the lengths, see `length_imbalance`.
        n_prompts: distinct prompts.
    """
    if n_prompts < 2:
        return ["With one prompt nothing can be said about length."]
    if fit is None:
        side = "every" if before == 1 else "no"
        return [
            f"The tuned model won {side} comparison: the effect of length cannot be told from that "
            "of the model."
        ]
    found = []
    if n_prompts < FEW_PROMPTS:
        found.append(f"{n_prompts} prompts are few for telling length and model apart.")
    if imbalance > LOPSIDED:
        found.append(
            "One side's answers are so much longer throughout that equal lengths are seen only on "
            "some kinds of prompts: the figure reaches beyond the data and may be far off."
        )
    if moved_far(before, fit.win_rate):
        found.append(
            "The figure moved so far from the win rate as judged that the regression may have "
            "failed (AlpacaEval's warning)."
        )
    return found
