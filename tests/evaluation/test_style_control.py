"""The win rate at equal style: known effects, the figure's limits, and what no style can be "
"held."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from prefopt.evaluation.style_control import style_controlled_win_rate
from prefopt.types import JudgedComparison
from tests.evaluation.judgements import exchanged, scored


def simulated(n: int, *, strength: float, per_item: float, seed: int) -> list[JudgedComparison]:
    """Tuned answers have more list items; the judge's logit is strength + per_item · difference."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        more, fewer = (int(rng.poisson(level)) for level in (4, 3))
        a, b = ("one two three\n" + "- item\n" * count for count in (more, fewer))
        won = rng.random() < expit(strength + per_item * (more - fewer))
        found.append(scored(float(won), prompt=f"q{i}", text_a=a, text_b=b))
    return found


def test_what_formatting_won_is_taken_out() -> None:
    control = style_controlled_win_rate(simulated(800, strength=0.0, per_item=0.6, seed=1))
    assert control.uncontrolled > 0.58
    assert control.win_rate is not None
    assert control.low is not None
    assert control.high is not None
    assert control.low < 0.5 < control.high
    assert abs(control.win_rate - 0.5) < abs(control.uncontrolled - 0.5)
    counts = {c.feature: (c.before, c.after) for c in control.counts}
    assert counts["lists"][0] < counts["lists"][1]
    assert counts["headers"] == (0.0, 0.0)
    # Headers and bold text are nowhere, so nothing is said of them.
    assert {e.feature for e in control.effects} == {"length", "lists"}


def test_a_better_model_stays_better_at_equal_style() -> None:
    control = style_controlled_win_rate(simulated(600, strength=1.0, per_item=0.0, seed=2))
    assert control.low is not None
    assert control.low > 0.6


def test_exchanging_the_sides_turns_the_figure_around() -> None:
    judged = simulated(80, strength=0.4, per_item=0.2, seed=3)
    one = style_controlled_win_rate(judged)
    other = style_controlled_win_rate([exchanged(j) for j in judged])
    assert one.win_rate is not None
    assert other.win_rate == pytest.approx(1 - one.win_rate, abs=1e-6)


def test_equal_names_on_both_sides_are_no_obstacle() -> None:
    judged = [
        scored(float(i % 2), prompt=f"q{i}", a="same", b="same", text_a="x " * (i % 7))
        for i in range(60)
    ]
    assert style_controlled_win_rate(judged).win_rate is not None


@pytest.mark.parametrize(("score", "side"), [(1.0, "every"), (0.0, "no")])
def test_a_model_that_always_wins_has_no_such_figure(score: float, side: str) -> None:
    control = style_controlled_win_rate([scored(score, prompt=f"q{i}") for i in range(30)])
    assert control.win_rate is None
    assert f"won {side} comparison" in control.notes[0]


def test_one_prompt_and_one_sided_style_are_said() -> None:
    assert style_controlled_win_rate([scored(1.0)]).win_rate is None
    rng = np.random.default_rng(0)
    judged = [
        scored(
            float(rng.random() < 0.6),
            prompt=f"q{i}",
            text_a="- a\n" * int(rng.integers(4, 8)) + "word",
            text_b="word " * int(rng.integers(4, 8)),
        )
        for i in range(60)
    ]
    notes = " ".join(style_controlled_win_rate(judged).notes)
    assert "list items" in notes
    assert "beyond the data" in notes
