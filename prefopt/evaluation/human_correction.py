"""The win rate people would give, from a judge's verdicts on all prompts and people's on some.

In: judged comparisons with the tuned answer as `a`, and people's labels for part of them. Out: a
`CorrectedWinRate`. Prediction-powered inference (Angelopoulos, Bates, Fannjiang, Jordan and Zrnic
2023, Science 382, arXiv 2301.09633) and its power-tuned form, PPI++ (Angelopoulos, Duchi and Zrnic
2023, arXiv 2311.01453), with whole prompts as the draws. It corrects the rate and no single verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Literal

import msgspec

from prefopt.evaluation.win_rate import score_comparisons
from prefopt.types import JudgedComparison, Winner

if TYPE_CHECKING:
    from prefopt.evaluation.logistic import Floats

Method = Literal["ppi++", "ppi"]

FEWEST_LABELLED = 20
"""Below this many labelled prompts the interval's normal approximation means little."""

_POINTS: dict[Winner, float] = {"a": 1.0, "tie": 0.5, "b": 0.0}


class CorrectedWinRate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The win rate by people's standard. Rates are fractions; intervals are 95 %, by prompt.

    Fields:
        win_rate, low, high: the corrected rate, clipped to [0, 1].
        judge_only: the judge's own rate, over all prompts with a verdict.
        people_only, people_low, people_high: what the labelled prompts alone say.
        judge_bias: judge minus people over the labelled prompts.
        weight: how far the judge was trusted, in [0, 1]: 1 is PPI, 0 leaves the judge out.
        worth: how many labelled prompts would have told as much without the judge; more than
            n_labelled is what the judge adds.
        n_labelled, n_unlabelled: prompts with and without a label that have a verdict.
        n_without_verdict: labelled comparisons whose verdict failed, in no figure above; unlabelled
            ones are in n_unscored.
        n_unscored, unscored_reasons: all comparisons with a failed verdict.
        notes: what a reader should know.
    """

    win_rate: float
    low: float
    high: float
    judge_only: float
    people_only: float
    people_low: float
    people_high: float
    judge_bias: float
    weight: float
    worth: float
    n_labelled: int
    n_unlabelled: int
    n_without_verdict: int
    n_unscored: int
    unscored_reasons: dict[str, int]
    notes: tuple[str, ...]


def human_corrected_win_rate(
    judged: Sequence[JudgedComparison],
    labels: Mapping[str, Winner],
    *,
    method: Method = "ppi++",
) -> CorrectedWinRate:
    """Correct a judge's win rate by people's labels of some of the comparisons.

    With f the judge's and y people's mean score of a prompt, n labelled and N other prompts,

        rate = w·mean(f, other) + mean(y - w·f, labelled),
        error² = w²·Var(f, other)/N + Var(y - w·f, labelled)/n,
        w = Cov(y, f) / ((1 + n/N)·Var f) within [0, 1]   (PPI++, example 6.1);   w = 1 (PPI),

    and a t interval with n - 1 degrees of freedom. The labelled prompts must be a random draw of all
    of them: labels of the hard ones alone would bias the rate.

    Args:
        judged: comparisons with verdicts.
        labels: what people say, in the comparison's own names a and b, by `comparison_id`.
        method: "ppi++" weighs the judge by how well it foretells the labels; "ppi" trusts it fully.

    Raises:
        ValueError: no comparison has a score, a label is for none of the comparisons, or fewer than
            two labelled prompts or no other prompt have a verdict.
    """
    import numpy as np

    from prefopt.evaluation.logistic import interval

    ids = {j.comparison.comparison_id for j in judged}
    if strange := [name for name in labels if name not in ids]:
        raise ValueError(
            f"{len(strange)} label(s) are for none of the comparisons, such as {strange[0]!r}: labels "
            "go by `comparison_id`."
        )
    if len(ids) < len(judged):
        twice = Counter(j.comparison.comparison_id for j in judged).most_common(1)[0][0]
        raise ValueError(f"comparison {twice} is there twice; a label would count twice.")
    kept = score_comparisons(judged)
    scored_ids = {j.comparison.comparison_id for j in kept.comparisons}
    labelled: dict[str, list[tuple[float, float]]] = {}
    everything: dict[str, list[float]] = {}
    for item, points in zip(kept.comparisons, kept.points, strict=True):
        prompt = item.comparison.prompt.prompt_id
        everything.setdefault(prompt, []).append(points)
        label = labels.get(item.comparison.comparison_id)
        if label is not None:
            labelled.setdefault(prompt, []).append((points, _POINTS[label]))
    other = np.array([fmean(v) for p, v in everything.items() if p not in labelled])
    f = np.array([fmean(s for s, _ in rows) for rows in labelled.values()])
    y = np.array([fmean(s for _, s in rows) for rows in labelled.values()])
    if len(y) < 2 or len(other) < 1:
        raise ValueError(
            "a correction needs at least two labelled prompts and one other, each with a verdict; got "
            f"{len(y)} and {len(other)}."
        )
    weight = 1.0 if method == "ppi" else tuned_weight(f, y, other)
    rate, error = corrected_mean(f, y, other, weight)
    low, high = interval(rate, error, len(y))
    alone, alone_error = corrected_mean(f, y, other, 0.0)
    people_low, people_high = interval(alone, alone_error, len(y))
    # Without spread on either side there is nothing to compare; the judge then adds nothing.
    worth = len(y) * (alone_error / error) ** 2 if error > 0 and alone_error > 0 else float(len(y))
    return CorrectedWinRate(
        win_rate=_share(rate),
        low=_share(low),
        high=_share(high),
        judge_only=float(np.mean([fmean(v) for v in everything.values()])),
        people_only=alone,
        people_low=_share(people_low),
        people_high=_share(people_high),
        judge_bias=float((f - y).mean()),
        weight=weight,
        worth=worth,
        n_labelled=len(y),
        n_unlabelled=len(other),
        n_without_verdict=sum(name not in scored_ids for name in labels),
        n_unscored=kept.n_unscored,
        unscored_reasons=kept.unscored_reasons,
        notes=tuple(_notes(len(y), float(y.std()), weight, method)),
    )


def tuned_weight(f: Floats, y: Floats, other: Floats) -> float:
    """PPI++'s weight for a mean: Cov(y, f) / ((1 + n/N)·Var f) within [0, 1]; 0 for a constant judge.

    The variance is over all prompts, the covariance over the labelled ones.
    """
    import numpy as np

    variance = float(np.var(np.concatenate([f, other])))
    if variance == 0:
        return 0.0
    covariance = float(np.cov(y, f, bias=True)[0, 1])
    return float(np.clip(covariance / ((1 + len(y) / len(other)) * variance), 0.0, 1.0))


def corrected_mean(f: Floats, y: Floats, other: Floats, weight: float) -> tuple[float, float]:
    """The prediction-powered mean and its standard error, see `human_corrected_win_rate`."""
    import numpy as np

    rest = y - weight * f
    spread = float(np.var(other, ddof=1)) if len(other) > 1 else 0.25
    error = np.sqrt(weight**2 * spread / len(other) + float(np.var(rest, ddof=1)) / len(y))
    return weight * float(other.mean()) + float(rest.mean()), float(error)


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _notes(n: int, spread: float, weight: float, method: Method) -> list[str]:
    found = []
    if n < FEWEST_LABELLED:
        found.append(f"{n} labelled prompts are few; the interval may be too narrow.")
    if spread == 0:
        found.append(
            "People gave every labelled prompt the same score: that says nothing about how far they "
            "vary, and the interval is too narrow. Label more."
        )
    if method == "ppi++" and weight == 0:
        found.append("On the labelled prompts the judge does not foretell people: it was left out.")
    return found
