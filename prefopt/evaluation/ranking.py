"""Comparisons among any number of models -> a ranking with intervals, style held equal if asked.

In: judged comparisons between any of the models. Out: a `Ranking`. Bradley and Terry's model (1952,
Biometrika 39) by maximum likelihood, ties as half a win for either side, errors by prompt. With
style features it is the style control of Arena-Hard and LMSYS. It judges nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from prefopt.evaluation.style import STYLE_FEATURES, StyleFeature, style_difference
from prefopt.evaluation.win_rate import score_comparisons
from prefopt.types import JudgedComparison

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prefopt.evaluation.logistic import Floats, LogitFit

    Places = NDArray[np.int64]

ELO_PER_LOGIT = 400 / math.log(10)
"""Points of the Elo scale in one logit."""


class RankedModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model's place.

    Fields:
        strength, low, high: in logits, 0 is the mean of the models; 95 % interval. Multiply by
            `ELO_PER_LOGIT` for Elo points.
        win_rate: the mean probability of winning against each of the other models, ties half.
        rank_low, rank_high: the best and the worst place that the pairwise intervals leave: one more
            than the models shown to be stronger, and the number of models less those shown weaker.
        n: scored comparisons with this model.
        wins, ties, losses: what they were.
        unbounded: this model won (lost) so one-sidedly that its strength has no upper (lower) limit
            in these data; the number is then a matter of the prior.
    """

    model: str
    strength: float
    low: float
    high: float
    win_rate: float
    rank_low: int
    rank_high: int
    n: int
    wins: int
    ties: int
    losses: int
    unbounded: bool


class PairRate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model's probability that `a` beats `b`, ties half, with its 95 % interval; `n` direct."""

    a: str
    b: str
    win_rate: float
    low: float
    high: float
    n: int


class StyleEffect(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one standard deviation more of a feature adds, in logits, with its 95 % interval.

    `deviation` is that standard deviation, in the units of `style_difference`.
    """

    feature: StyleFeature
    effect: float
    low: float
    high: float
    deviation: float


class Ranking(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.ranking/1",
):
    """Models, strongest first.

    `controlled` are the features held equal, `style` what they do; a feature in which no two answers
    differ has no effect and is named in `notes`. Intervals are per pair: with many models some pair
    will seem apart by chance.
    """

    models: tuple[RankedModel, ...]
    pairs: tuple[PairRate, ...]
    controlled: tuple[StyleFeature, ...]
    style: tuple[StyleEffect, ...]
    n: int
    n_prompts: int
    n_unscored: int
    unscored_reasons: dict[str, int]
    notes: tuple[str, ...]

    def win_rate_of(self, a: str, b: str) -> PairRate:
        """The pair in the order asked for. Raises KeyError for a model that is not ranked."""
        for pair in self.pairs:
            if (pair.a, pair.b) == (a, b):
                return pair
            if (pair.b, pair.a) == (a, b):
                return PairRate(
                    a=a, b=b, win_rate=1 - pair.win_rate, low=1 - pair.high, high=1 - pair.low,
                    n=pair.n,
                )  # fmt: skip
        raise KeyError(f"no pair {a!r}, {b!r} in this ranking.")


def rank_models(
    judged: Sequence[JudgedComparison], *, control: Sequence[StyleFeature] = ()
) -> Ranking:
    """Rank the models named in the answers.

        logit P(a beats b) = strength_a - strength_b + sum of effect_k · x_k / s_k

    with x_k of `style_difference` and s_k its standard deviation over all comparisons. Unlike
    Arena-Hard's, the features are scaled and not centred, so that strengths are compared at equal
    style, not at the style difference that happens to be the mean. A prompt's comparisons of one
    pair of models share one vote. Ties are half a win for each side, as in LMSYS's leaderboards: the
    strengths then reproduce each model's share of points.

    Args:
        judged: comparisons, the models' names in `comparison.a.model` and `comparison.b.model`. A
            model may be `a` here and `b` there.
        control: style features to hold equal: any of `STYLE_FEATURES`.

    Raises:
        ValueError: no comparison has a score, a model is compared with itself, a feature is unknown,
            or comparisons do not link all models.
    """
    import numpy as np

    from prefopt.evaluation.logistic import equal_shares, fit_logit, interval, number_clusters

    if unknown := [name for name in control if name not in STYLE_FEATURES]:
        raise ValueError(f"style features are {', '.join(STYLE_FEATURES)}, got {unknown}.")
    kept = score_comparisons(judged)
    sides = [(j.comparison.a.model, j.comparison.b.model) for j in kept.comparisons]
    if same := [a for a, b in sides if a == b]:
        raise ValueError(
            f"a ranking compares different models, got {same[0]!r} against itself. Give the answers "
            "to compare different model names."
        )
    names = sorted({name for pair in sides for name in pair})
    place = {name: i for i, name in enumerate(names)}
    a, b = (np.array([place[pair[side]] for pair in sides]) for side in (0, 1))
    points = np.array(kept.points)
    _check_linked(names, a, b)

    rows = np.zeros((len(sides), len(names)))
    rows[np.arange(len(sides)), a] = 1.0
    rows[np.arange(len(sides)), b] = -1.0
    looks = [style_difference(j.comparison.a.text, j.comparison.b.text) for j in kept.comparisons]
    features = np.array([[look[name] for name in control] for look in looks], dtype=np.float64)
    features = features.reshape(len(sides), len(control))
    deviations = _deviations(features)
    used = [k for k in range(len(control)) if deviations[k] > 0]
    rows = np.hstack([rows, features[:, used] / deviations[used]])

    prompts = number_clusters(kept.prompt_ids)
    votes = number_clusters(
        [f"{p} {min(x, y)} {max(x, y)}" for p, x, y in zip(prompts, a, b, strict=True)]
    )
    fit = fit_logit(rows, points, prompts, weights=equal_shares(votes))
    n_prompts = int(prompts.max()) + 1
    pairs = _pairs(names, fit, a, b, n_prompts)
    ends = _unbounded(len(names), a, b, points)
    style = []
    for column, k in enumerate(used, start=len(names)):
        effect = float(fit.coefficients[column])
        low, high = interval(
            effect, fit.standard_error(np.eye(len(fit.coefficients))[column]), n_prompts
        )
        style.append(
            StyleEffect(
                feature=control[k],
                effect=effect,
                low=low,
                high=high,
                deviation=float(deviations[k]),
            )
        )
    models = [
        _ranked(name, i, names, fit, pairs, (a, b, points), n_prompts, i in ends)
        for i, name in enumerate(names)
    ]
    return Ranking(
        models=tuple(sorted(models, key=lambda m: (-m.strength, m.model))),
        pairs=tuple(pairs),
        controlled=tuple(control),
        style=tuple(style),
        n=len(points),
        n_prompts=n_prompts,
        n_unscored=kept.n_unscored,
        unscored_reasons=kept.unscored_reasons,
        notes=tuple(_notes(control, used, [names[i] for i in sorted(ends)], n_prompts)),
    )


def _deviations(features: Floats) -> Floats:
    """Root mean square about 0 rather than about the mean: it does not depend on who is called a."""
    import numpy as np

    found: Floats = np.sqrt((features**2).mean(axis=0))
    return found


def _pairs(names: list[str], fit: LogitFit, a: Places, b: Places, n_prompts: int) -> list[PairRate]:
    import numpy as np
    from scipy.special import expit

    from prefopt.evaluation.logistic import interval

    found = []
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            direction = np.zeros(len(fit.coefficients))
            direction[i], direction[j] = 1.0, -1.0
            apart = float(fit.coefficients @ direction)
            low, high = interval(apart, fit.standard_error(direction), n_prompts)
            found.append(
                PairRate(
                    a=names[i],
                    b=names[j],
                    win_rate=float(expit(apart)),
                    low=float(expit(low)),
                    high=float(expit(high)),
                    n=int((((a == i) & (b == j)) | ((a == j) & (b == i))).sum()),
                )
            )
    return found


def _ranked(
    name: str,
    i: int,
    names: list[str],
    fit: LogitFit,
    pairs: list[PairRate],
    rows: tuple[Places, Places, Floats],
    n_prompts: int,
    unbounded: bool,
) -> RankedModel:
    import numpy as np

    from prefopt.evaluation.logistic import interval

    a, b, points = rows
    k = len(names)
    direction = np.zeros(len(fit.coefficients))
    direction[:k] = -1 / k
    direction[i] += 1
    strength = float(fit.coefficients @ direction)
    low, high = interval(strength, fit.standard_error(direction), n_prompts)
    own = np.concatenate([points[a == i], 1 - points[b == i]])
    mine = [p for p in pairs if name in (p.a, p.b)]
    chances = [p.win_rate if p.a == name else 1 - p.win_rate for p in mine]
    above = sum(p.high < 0.5 if p.a == name else p.low > 0.5 for p in mine)
    below = sum(p.low > 0.5 if p.a == name else p.high < 0.5 for p in mine)
    return RankedModel(
        model=name,
        strength=strength,
        low=low,
        high=high,
        win_rate=float(np.mean(chances)),
        rank_low=1 + above,
        rank_high=k - below,
        n=len(own),
        wins=int((own == 1).sum()),
        ties=int((own == 0.5).sum()),
        losses=int((own == 0).sum()),
        unbounded=unbounded,
    )


def _check_linked(names: list[str], a: Places, b: Places) -> None:
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    shape = (len(names), len(names))
    count, group = connected_components(coo_array((np.ones(len(a)), (a, b)), shape), directed=False)
    if count > 1:
        parts = [[n for n, g in zip(names, group, strict=True) if g == i] for i in range(count)]
        raise ValueError(
            "no comparison links these groups of models, so they cannot stand in one ranking: "
            + "; ".join(", ".join(part) for part in parts)
            + ". Compare a model of each with one of another."
        )


def _unbounded(k: int, a: Places, b: Places, points: Floats) -> set[int]:
    """Models whose strength has no finite maximum-likelihood value (Ford 1957).

    Point x to y where x took points from y. Strengths are finite among models that reach each other;
    with more than one such group, those outside the largest are named (all of them, if none is).
    """
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    winner = np.concatenate([a[points > 0], b[points < 1]])
    loser = np.concatenate([b[points > 0], a[points < 1]])
    graph = coo_array((np.ones(len(winner)), (winner, loser)), (k, k))
    _, group = connected_components(graph, directed=True, connection="strong")
    sizes = np.bincount(group)
    largest = np.flatnonzero(sizes == sizes.max())
    settled = largest[0] if len(largest) == 1 else -1
    return {int(i) for i in np.flatnonzero(group != settled)} if len(sizes) > 1 else set()


def _notes(
    control: Sequence[StyleFeature], used: list[int], ends: list[str], n_prompts: int
) -> list[str]:
    found = []
    if n_prompts < 2:
        found.append("With one prompt no interval can be given.")
    if idle := [name for k, name in enumerate(control) if k not in used]:
        found.append(f"No two compared answers differ in {', '.join(idle)}: nothing to hold equal.")
    if ends:
        found.append(
            f"{', '.join(ends)}: won or lost against the others without exception, so how much "
            "stronger or weaker cannot be told; the strength shown is held finite by a faint prior, "
            "and its interval is too narrow."
        )
    return found
