"""What the win rate would be if both sides' answers were equally long and equally formatted.

In: judged comparisons with the tuned answer as `a`. Out: a `StyleControl`. It is the style control of
Arena-Hard and LMSYS's leaderboard (`prefopt.evaluation.ranking`) for two models; the features are
those of `prefopt.evaluation.style`. How near it comes to Arena-Hard's own:
benchmarks/quality_style_control.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import msgspec

from prefopt.evaluation.length_control import FEW_PROMPTS, LOPSIDED, length_imbalance
from prefopt.evaluation.ranking import StyleEffect, rank_models
from prefopt.evaluation.style import STYLE_FEATURES, StyleFeature, style_difference, text_style
from prefopt.evaluation.win_rate import score_comparisons
from prefopt.types import Comparison, JudgedComparison

_TUNED, _BASE = "tuned", "base"


class StyleCount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One feature's mean count an answer on both sides ("length" in words), scored pairs only."""

    feature: StyleFeature
    before: float
    after: float


class StyleControl(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The win rate at equal style. Rates are fractions.

    Fields:
        win_rate: None where it cannot be told, and then `notes` says why.
        low, high: its 95 % interval, by prompt.
        uncontrolled: the win rate as judged, over the same comparisons.
        effects: what one standard deviation more of each feature adds, in logits; a feature in which
            no two answers differ is not among them.
        counts: how both sides look.
        n, n_prompts: scored comparisons and their prompts.
        notes: what a reader should know before believing the figure.
    """

    win_rate: float | None
    low: float | None
    high: float | None
    uncontrolled: float
    effects: tuple[StyleEffect, ...]
    counts: tuple[StyleCount, ...]
    n: int
    n_prompts: int
    notes: tuple[str, ...]


def style_controlled_win_rate(judged: Sequence[JudgedComparison]) -> StyleControl:
    """The win rate of `a` over `b` with length, headers, lists and bold text held equal.

    See `rank_models` for the model. The names in the answers do not matter: a is the one side, b the
    other.

    Raises:
        ValueError: when no comparison has a score, with the reasons.
    """
    import numpy as np

    kept = score_comparisons(judged)
    sides = [(j.comparison.a.text, j.comparison.b.text) for j in kept.comparisons]
    looks = [(text_style(a), text_style(b)) for a, b in sides]
    n_prompts = len(set(kept.prompt_ids))
    by_prompt: dict[str, list[float]] = {}
    for prompt_id, points in zip(kept.prompt_ids, kept.points, strict=True):
        by_prompt.setdefault(prompt_id, []).append(points)
    rate = fmean(fmean(points) for points in by_prompt.values())
    counts = tuple(
        StyleCount(
            feature=feature,
            before=fmean(getattr(b, _count(feature)) for _, b in looks),
            after=fmean(getattr(a, _count(feature)) for a, _ in looks),
        )
        for feature in STYLE_FEATURES
    )
    notes: list[str] = []
    ranking = None
    if n_prompts < 2:
        notes.append("With one prompt nothing can be said about style.")
    elif rate in (0.0, 1.0):
        side = "every" if rate == 1 else "no"
        notes.append(
            f"The tuned model won {side} comparison: the effect of style cannot be told from that of "
            "the model."
        )
    else:
        ranking = rank_models([_renamed(j) for j in kept.comparisons], control=STYLE_FEATURES)
        if n_prompts < FEW_PROMPTS:
            notes.append(f"{n_prompts} prompts are few for telling style and model apart.")
        differences = [style_difference(a, b) for a, b in sides]
        lopsided = [
            feature
            for feature in STYLE_FEATURES
            if length_imbalance(np.array([d[feature] for d in differences])) > LOPSIDED
        ]
        if lopsided:
            notes.append(
                f"One side has so much more {' and '.join(_WORDS[f] for f in lopsided)} throughout "
                "that equal style is hardly ever seen: the figure reaches beyond the data and may be "
                "far off."
            )
    pair = None if ranking is None else ranking.win_rate_of(_TUNED, _BASE)
    return StyleControl(
        win_rate=None if pair is None else pair.win_rate,
        low=None if pair is None else pair.low,
        high=None if pair is None else pair.high,
        uncontrolled=rate,
        effects=() if ranking is None else ranking.style,
        counts=counts,
        n=len(kept.points),
        n_prompts=n_prompts,
        notes=tuple(notes),
    )


_WORDS: dict[StyleFeature, str] = {
    "length": "text",
    "headers": "headers",
    "lists": "list items",
    "bold": "bold text",
}


def _count(feature: StyleFeature) -> str:
    return "words" if feature == "length" else feature


def _renamed(judged: JudgedComparison) -> JudgedComparison:
    """The same judgement between two models of different names."""
    comparison = judged.comparison
    return msgspec.structs.replace(
        judged,
        comparison=Comparison(
            a=msgspec.structs.replace(comparison.a, model=_TUNED),
            b=msgspec.structs.replace(comparison.b, model=_BASE),
        ),
    )
