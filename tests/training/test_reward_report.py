"""Figures of a reward model by hand."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefopt.training.reward_report import ScoredPair, measure_reward

quick = settings(max_examples=10, deadline=None)


def pair(gap, p_a=1.0, longer=0, prompt=None, category=""):
    return ScoredPair(
        prompt_id=str(id(object()) if prompt is None else prompt), category=category, score_a=gap,
        score_b=0.0, n_tokens_a=10 + longer, n_tokens_b=10, p_a=p_a,
    )  # fmt: skip


def distinct(*pairs):
    return [ScoredPair(**{**_fields(p), "prompt_id": str(i)}) for i, p in enumerate(pairs)]


def _fields(p):
    return {name: getattr(p, name) for name in p.__struct_fields__}


def test_accuracy_and_log_loss_by_hand():
    """Right, wrong, undecided (a half), and a tie of the labels, which has no right answer."""
    report = measure_reward(distinct(pair(2.0), pair(-1.0), pair(0.0), pair(3.0, p_a=0.5)))
    assert (report.n, report.n_ties) == (4, 1)
    assert report.accuracy.value == pytest.approx(1.5 / 3)
    assert report.accuracy.n == 3

    def cost(x):
        return math.log1p(math.exp(-x))

    expected = (cost(2) + cost(-1) + math.log(2) + (cost(3) + cost(-3)) / 2) / 4
    assert report.log_loss.value == pytest.approx(expected)
    assert report.mean_score == pytest.approx((2 - 1 + 0 + 3) / 8)


def test_calibration_by_hand():
    """Ten pairs stated at 0.8, eight of them right: no error. All right: an error of 0.2."""
    gap = math.log(4)
    calibrated = measure_reward(distinct(*[pair(gap)] * 8, *[pair(-gap)] * 2))
    assert calibrated.ece.value == pytest.approx(0.0, abs=1e-12)
    sure = measure_reward(distinct(*[pair(gap)] * 10))
    assert sure.ece.value == pytest.approx(0.2)
    (one,) = sure.bins
    assert (one.low, one.n, one.right) == (pytest.approx(0.8), 10, 1.0)
    assert one.stated == pytest.approx(0.8)


def test_length_by_hand():
    """Scores that follow length exactly, labels that do not."""
    pairs = distinct(*[pair(0.1 * n, p_a=n % 2, longer=n) for n in range(1, 9)])
    report = measure_reward(pairs)
    assert report.length_correlation.value == pytest.approx(1.0)
    assert abs(report.label_length_correlation.value) < 0.7
    assert report.longest_accuracy.value == pytest.approx(0.5)
    assert any("pays for longer" in note for note in report.notes)
    assert measure_reward(distinct(pair(1.0), pair(-2.0))).length_correlation is None


@given(st.lists(st.tuples(st.floats(-5, 5), st.sampled_from([0.0, 0.5, 1.0]), st.integers(-9, 9)),
                min_size=1, max_size=12))  # fmt: skip
@example([(2.220446049250313e-16, 0.0, 0)])
@quick
def test_which_answer_is_called_a_means_nothing(rows):
    pairs = distinct(*[pair(gap, p_a=p, longer=n) for gap, p, n in rows])
    mirrored = [
        ScoredPair(
            prompt_id=p.prompt_id, category=p.category, score_a=p.score_b, score_b=p.score_a,
            n_tokens_a=p.n_tokens_b, n_tokens_b=p.n_tokens_a, p_a=1 - p.p_a,
        )
        for p in pairs
    ]  # fmt: skip
    one, two = measure_reward(pairs), measure_reward(mirrored)
    for name in ("accuracy", "log_loss", "ece", "length_correlation", "label_length_correlation"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.value == pytest.approx(b.value, abs=1e-9)


def test_intervals_draw_whole_prompts():
    """Twenty copies of one pair are no more evidence than the pair: the interval says so."""
    distinct_prompts = measure_reward(distinct(*[pair(1.0), pair(-1.0)] * 20)).accuracy
    shared = measure_reward(
        [pair(1.0, prompt="x") for _ in range(20)] + [pair(-1.0, prompt="y") for _ in range(20)]
    ).accuracy
    assert shared.value == distinct_prompts.value == 0.5
    assert shared.high - shared.low > 2 * (distinct_prompts.high - distinct_prompts.low)


def test_what_the_figures_mean_is_said():
    coin = measure_reward(distinct(*[pair(1.0), pair(-1.0)] * 5))
    assert any("coin" in note for note in coin.notes)
    too_sure = measure_reward(distinct(*[pair(8.0)] * 8, *[pair(-8.0)] * 4))
    assert any("too sure" in note for note in too_sure.notes)
    longest = measure_reward(distinct(*[pair(1.0, longer=3)] * 250))
    assert any("longer answer wins" in note for note in longest.notes)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="got none"):
        measure_reward([])
    with pytest.raises(ValueError, match="finite"):
        measure_reward([pair(math.nan)])
