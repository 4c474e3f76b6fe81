"""PPI and PPI++: by hand, against ppi_py, by symmetry, and on simulated judges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.evaluation.human_correction import (
    corrected_mean,
    human_corrected_win_rate,
    tuned_weight,
)
from prefopt.types import JudgedComparison, Winner
from tests.evaluation.judgements import exchanged, scored

F = np.array([1, 0, 0.5, 1, 0, 1, 0.5, 0, 1, 1])
Y = np.array([1, 0, 0, 1, 0.5, 1, 1, 0, 0.5, 1])
OTHER = np.array([1, 1, 0, 0.5, 1, 0, 1, 1, 0.5, 0.5, 0, 1, 1, 0, 1, 0.5, 1, 0, 1, 1])
WINNERS: dict[float, Winner] = {1.0: "a", 0.5: "tie", 0.0: "b"}


def case(f=F, y=Y, other=OTHER) -> tuple[list[JudgedComparison], dict[str, Winner]]:
    rows = [scored(float(s), prompt=str(i)) for i, s in enumerate([*f, *other])]
    labels = {rows[i].comparison.comparison_id: WINNERS[float(s)] for i, s in enumerate(y)}
    return rows, labels


def test_ppi_by_hand() -> None:
    rows, labels = case()
    found = human_corrected_win_rate(rows, labels, method="ppi")
    # The judge gives 0.65 over the others, and people as much as it (0.6) over the labelled.
    assert found.win_rate == pytest.approx(0.65)
    assert (found.weight, found.judge_bias) == (1, pytest.approx(0))
    assert found.judge_only == pytest.approx((6 + 13) / 30)
    assert found.people_only == pytest.approx(0.6)
    error = math.sqrt(OTHER.var(ddof=1) / 20 + (Y - F).var(ddof=1) / 10)
    assert found.high - found.win_rate == pytest.approx(2.262157 * error, rel=1e-6)
    assert (found.n_labelled, found.n_unlabelled, found.n_without_verdict) == (10, 20, 0)


def test_it_agrees_with_ppi_py() -> None:
    """ppi_py 0.2: ppi_mean_pointestimate(Y, F, OTHER) and ppi_mean_ci, with lam=1 and tuned.

    Its variances divide by n, and its covariance is over another mean: the weights differ by 3 %.
    """
    rate, error = corrected_mean(F, Y, OTHER, 1.0)
    assert rate == pytest.approx(0.65)
    assert error * math.sqrt(0.9) == pytest.approx(
        (0.91927223 - 0.38072777) / 2 / 1.959964, rel=0.02
    )
    weight = tuned_weight(F, Y, OTHER)
    rate, error = corrected_mean(F, Y, OTHER, weight)
    assert rate == pytest.approx(0.6247561, abs=1e-3)
    assert error * math.sqrt(0.9) == pytest.approx(
        (0.83919105 - 0.41032114) / 2 / 1.959964, rel=0.02
    )


def test_the_tuned_weight_by_hand() -> None:
    covariance = np.mean(Y * F) - Y.mean() * F.mean()
    variance = np.concatenate([F, OTHER]).var()
    assert tuned_weight(F, Y, OTHER) == pytest.approx(covariance / (1.5 * variance))
    assert tuned_weight(np.ones(4), np.array([0, 1, 0, 1.0]), np.ones(9)) == 0
    assert tuned_weight(F, 1 - F, OTHER) == 0  # a judge that is always wrong is left out
    assert 0 < tuned_weight(F, F, np.tile(F, 50)) <= 1


def test_a_perfect_judge_is_worth_almost_all_its_verdicts() -> None:
    rng = np.random.default_rng(0)
    y = rng.choice([0.0, 1.0], 40)
    found = human_corrected_win_rate(*case(f=y, y=y, other=rng.choice([0.0, 1.0], 400)))
    assert found.weight == pytest.approx(400 / 440, abs=0.1)
    assert found.worth > 300
    assert found.notes == ()


def test_a_judge_that_says_nothing_is_left_out_and_named() -> None:
    y = np.array([1.0, 0.0] * 20)
    found = human_corrected_win_rate(*case(f=np.ones(40), y=y, other=np.ones(60)))
    assert (found.win_rate, found.weight) == (0.5, 0)
    assert found.worth == pytest.approx(40)
    assert (found.low, found.high) == (found.people_low, found.people_high)
    assert "left out" in found.notes[0]


def test_several_answers_of_a_prompt_are_one_draw() -> None:
    rows, labels = case()
    more = [scored(1.0, prompt="0", index=i) for i in (1, 2)]
    more_labels = {row.comparison.comparison_id: "a" for row in more}
    one = human_corrected_win_rate(rows, labels)
    many = human_corrected_win_rate(rows + more, labels | more_labels)
    assert (many.win_rate, many.low, many.n_labelled) == (one.win_rate, one.low, one.n_labelled)


def test_failed_verdicts_are_counted_and_leave_the_figures_alone() -> None:
    rows, labels = case()
    lost = [scored(None, prompt="lost"), scored(None, prompt="lost too")]
    found = human_corrected_win_rate(rows + lost, labels | {lost[0].comparison.comparison_id: "a"})
    plain = human_corrected_win_rate(rows, labels)
    assert (found.win_rate, found.low, found.high) == (plain.win_rate, plain.low, plain.high)
    assert (found.n_without_verdict, found.n_unscored) == (1, 2)
    assert found.unscored_reasons == {"refused": 2}


def test_senseless_requests_are_refused() -> None:
    rows, labels = case()
    with pytest.raises(ValueError, match="none of the comparisons"):
        human_corrected_win_rate(rows, labels | {"elsewhere": "a"})
    with pytest.raises(ValueError, match="got 1 and 29"):
        human_corrected_win_rate(rows, dict(list(labels.items())[:1]))
    with pytest.raises(ValueError, match="got 10 and 0"):
        human_corrected_win_rate(rows[:10], labels)
    with pytest.raises(ValueError, match="twice"):
        human_corrected_win_rate([*rows, rows[0]], labels)


def test_few_labels_and_labels_without_spread_are_named() -> None:
    found = human_corrected_win_rate(*case(y=np.ones(10)))
    assert "10 labelled prompts are few" in found.notes[0]
    assert "same score" in found.notes[1]


_SCORES = st.sampled_from([0.0, 0.5, 1.0])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(_SCORES, _SCORES), min_size=2, max_size=15),
    st.lists(_SCORES, min_size=1, max_size=15),
    st.sampled_from(["ppi", "ppi++"]),
)
def test_exchanging_the_sides_mirrors_the_rate(labelled, other, method) -> None:
    f, y = zip(*labelled, strict=True)
    rows, labels = case(f, y, other)
    found = human_corrected_win_rate(rows, labels, method=method)
    other_side: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}
    mirror = human_corrected_win_rate(
        [exchanged(row) for row in rows],
        {name: other_side[label] for name, label in labels.items()},
        method=method,
    )
    assert mirror.win_rate == pytest.approx(1 - found.win_rate)
    assert mirror.low == pytest.approx(1 - found.high)
    assert mirror.weight == pytest.approx(found.weight)
    assert 0 <= found.low <= found.win_rate <= found.high <= 1
    assert 0 <= found.weight <= 1


def _coverage(runs: int) -> tuple[float, float]:
    """Of a judge with a lean, and its mean width over that of labels alone."""
    rng = np.random.default_rng(0)
    held, widths = 0, []
    for _ in range(runs):
        y = (rng.random(300) < 0.6).astype(float)
        f = np.where(rng.random(300) < 0.85, y, 1 - y)
        f = np.where((f == 0) & (rng.random(300) < 0.25), 1.0, f)
        weight = tuned_weight(f[:60], y[:60], f[60:])
        rate, error = corrected_mean(f[:60], y[:60], f[60:], weight)
        held += abs(rate - 0.6) <= 2.001 * error  # t with 59 degrees of freedom
        widths.append(error / corrected_mean(f[:60], y[:60], f[60:], 0.0)[1])
    return held / runs, float(np.mean(widths))


def test_the_interval_holds_the_truth_and_is_narrower_than_labels_alone() -> None:
    held, width = _coverage(300)
    assert 0.91 < held < 0.98
    assert width < 0.9


@pytest.mark.slow
def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    assert 0.94 < _coverage(5000)[0] < 0.96
