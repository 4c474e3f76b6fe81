"""Length control: by hand, by symmetry, against AlpacaEval's figures, and on simulated judges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from prefopt.evaluation.length_control import (
    Anchors,
    fit_length_control,
    length_controlled_win_rate,
    length_imbalance,
    moved_far,
    predicted_win_rate,
)
from prefopt.types import JudgedComparison
from tests.evaluation.judgements import exchanged, scored


def of_length(score: float | None, a: int, b: int, prompt: int) -> JudgedComparison:
    return scored(score, prompt=str(prompt), text_a="x" * a, text_b="y" * b)


def balanced() -> list[JudgedComparison]:
    """Longer answers win three of four, on either side; at equal length neither side is better."""
    rows = []
    for i in range(40):
        longer_is_a = i % 2 == 0
        longer_wins = i % 8 not in (0, 1)
        a, b = (30, 10) if longer_is_a else (10, 30)
        rows.append(of_length(float(longer_is_a == longer_wins), a, b, i))
    return rows


def test_a_judge_of_length_alone_leaves_half_at_equal_length() -> None:
    """Of 40, a is longer in 28: it wins 60 %, and all of that is length."""
    rows = balanced()
    extra = [of_length(float(i % 4 != 0), 30, 10, 100 + i) for i in range(16)]
    found = length_controlled_win_rate(rows + extra)
    assert found.uncontrolled == pytest.approx((20 + 12) / 56)
    assert found.win_rate == pytest.approx(0.5, abs=1e-3)
    # tanh(±20 / s) is ±c, and longer answers win 3 of 4: the effect is logit(3/4) / c.
    s = np.std([20] * 36 + [-20] * 20, ddof=1)
    assert found.length_effect == pytest.approx(logit(0.75) / np.tanh(20 / s), rel=2e-3)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.5 < found.high
    assert found.length_effect_low is not None
    assert found.length_effect_low > 0
    assert found.mean_difference == pytest.approx(20 * 16 / 56)
    assert found.share_longer == pytest.approx(36 / 56)


def test_equal_lengths_change_nothing() -> None:
    rows = [of_length(float(i % 3 != 0), 5, 5, i) for i in range(60)]
    found = length_controlled_win_rate(rows)
    assert found.win_rate == pytest.approx(2 / 3, abs=1e-3)
    assert found.length_effect is None
    assert found.length_effect_low is None
    assert (found.mean_difference, found.imbalance, found.share_longer) == (0, 0, 0.5)
    assert found.notes == ()


def test_failed_verdicts_are_counted_and_change_nothing() -> None:
    rows = balanced()
    with_failures = length_controlled_win_rate([*rows, of_length(None, 5, 500, 99)])
    alone = length_controlled_win_rate(rows)
    assert with_failures.win_rate == alone.win_rate
    assert (with_failures.n, with_failures.n_unscored) == (40, 1)
    assert with_failures.unscored_reasons == {"refused": 1}
    with pytest.raises(ValueError, match="refused: 1"):
        length_controlled_win_rate([of_length(None, 1, 2, 0)])


@pytest.mark.parametrize(("score", "word"), [(1.0, "every"), (0.0, "no")])
def test_one_sided_results_have_no_figure_and_say_why(score: float, word: str) -> None:
    found = length_controlled_win_rate([of_length(score, 5 + i, 9, i) for i in range(60)])
    assert (found.win_rate, found.low, found.high, found.length_effect) == (None,) * 4
    assert word in found.notes[0]


def test_one_prompt_has_no_figure() -> None:
    found = length_controlled_win_rate([of_length(1.0, 1, 2, 0), of_length(0.0, 3, 2, 0)])
    assert found.win_rate is None
    assert found.n_prompts == 1
    assert "one prompt" in found.notes[0]


def test_it_warns_of_lengths_that_do_not_overlap_and_of_few_prompts() -> None:
    rows = [of_length(float(i % 2), 100 + i, 10, i) for i in range(20)]
    notes = " ".join(length_controlled_win_rate(rows).notes)
    assert "reaches beyond the data" in notes
    assert "20 prompts are few" in notes


@pytest.mark.parametrize(
    ("before", "after", "far"),
    [(0.5, 0.62, False), (0.5, 0.63, True), (0.5, 0.37, True), (0.2, 0.11, False),
     (0.2, 0.09, True), (0.95, 0.84, False), (0.95, 0.7, True)],
)  # fmt: skip
def test_moves_that_alpacaeval_warns_of(before: float, after: float, far: bool) -> None:
    assert moved_far(before, after) is far


_ROWS = st.lists(
    st.tuples(
        st.sampled_from([1.0, 0.5, 0.0, None]),
        st.integers(0, 60),
        st.integers(0, 60),
        st.integers(0, 8),
    ),
    min_size=4,
    max_size=25,
).map(lambda rows: [of_length(*row) for row in rows])


@settings(max_examples=40, deadline=None)
@given(_ROWS)
def test_exchanging_the_sides_mirrors_every_figure(rows: list[JudgedComparison]) -> None:
    if all(row.mean_grade is None for row in rows):
        return
    found = length_controlled_win_rate(rows)
    mirror = length_controlled_win_rate([exchanged(row) for row in rows])
    assert mirror.uncontrolled == pytest.approx(1 - found.uncontrolled)
    assert mirror.mean_difference == pytest.approx(-found.mean_difference)
    assert mirror.share_longer == pytest.approx(1 - found.share_longer)
    assert (mirror.n, mirror.n_unscored) == (found.n, found.n_unscored)
    assert found.n + found.n_unscored == len(rows)
    if found.win_rate is None:
        assert mirror.win_rate is None
        assert found.notes
    else:
        assert found.low is not None
        assert found.high is not None
        assert 0 <= found.low <= found.win_rate <= found.high <= 1
        assert mirror.win_rate == pytest.approx(1 - found.win_rate, abs=1e-5)
        assert mirror.low == pytest.approx(1 - found.high, abs=1e-4)
    if found.length_effect is not None:
        assert mirror.length_effect == pytest.approx(found.length_effect, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 50), st.randoms(use_true_random=False))
def test_the_unit_of_length_and_the_order_of_rows_do_not_matter(scale, random) -> None:
    rng = np.random.default_rng(1)
    d, y = rng.normal(3, 10, 60), rng.choice([0, 0.5, 1.0], 60)
    prompts = np.arange(60) // 2
    one = fit_length_control(y, d, prompts)
    order = list(range(60))
    random.shuffle(order)
    other = fit_length_control(y[order], scale * d[order], prompts[order])
    assert other[:4] == pytest.approx(one[:4], abs=1e-6)


def test_predictions_by_hand() -> None:
    assert predicted_win_rate(-1.0, 0.5, np.array([0.0, 2.0])) == pytest.approx(
        (expit(-1.0) + expit(0.0)) / 2
    )
    assert predicted_win_rate(-1.0, 0.5, {"p": 2.0}) == pytest.approx(0.5)
    assert predicted_win_rate(0.0, 0.0, np.array([1.0, -3.0])) == 0.5  # a model against itself


def test_difficulty_is_averaged_over_prompts_not_set_to_its_mean() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 3, 4000)
    y = (rng.random(4000) < expit(1 + hard)).astype(float)
    found = fit_length_control(y, rng.normal(size=4000), np.arange(4000), difficulty=hard)
    assert found.difficulty_effect == pytest.approx(1, abs=0.1)
    assert found.win_rate == pytest.approx(float(expit(1 + hard).mean()), abs=0.01)
    assert abs(found.win_rate - expit(1)) > 0.05


def test_anchors_hold_the_length_effect() -> None:
    rng = np.random.default_rng(0)
    d, y = rng.normal(size=40), rng.choice([0.0, 1.0], 40)
    free = fit_length_control(y, d, np.arange(40))
    x = np.linspace(-1, 1, 4000)
    anchors = Anchors(scores=expit(2 * x), lengths=x, difficulty=np.zeros(4000), weight=1.0)
    held = fit_length_control(y, d, np.arange(40), anchors=anchors)
    assert abs(free.length_effect) < 1.5
    assert held.length_effect == pytest.approx(2, abs=0.1)


def test_imbalance_is_in_standard_deviations() -> None:
    assert length_imbalance(np.array([1.0, 3.0])) == 2
    assert length_imbalance(np.zeros(3)) == 0
    assert length_imbalance(np.array([5.0, 5.0])) == float("inf")


def _coverage(runs: int, n: int) -> float:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(runs):
        d = 0.4 + rng.standard_normal(n)
        y = (rng.random(n) < expit(0.5 + 1.2 * np.tanh(d))).astype(float)
        fit = fit_length_control(y, d, np.arange(n))
        held += fit.low <= expit(0.5) <= fit.high
    return held / runs


def test_the_interval_holds_the_truth() -> None:
    assert _coverage(150, 120) > 0.90


@pytest.mark.slow
def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    assert 0.93 < _coverage(1500, 150) < 0.97
