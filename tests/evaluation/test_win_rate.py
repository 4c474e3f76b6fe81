"""The win rate, by hand and by symmetry."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.evaluation import win_rate as win_rate_module
from prefopt.evaluation.win_rate import (
    WinRate,
    clustered_wilson_interval,
    mde_points,
    result_of,
    score_comparisons,
    spread_of,
    wilson_interval,
    win_rate,
)
from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Verdict


def verdict(grade: int | str) -> Verdict:
    """A grade in favour of a (-2 .. 2), or the name of a failure."""
    if isinstance(grade, str):
        return Verdict(judge="test", failure=grade)
    preferred = "tie" if grade == 0 else "a" if grade > 0 else "b"
    return Verdict(judge="test", preferred=preferred, strength=abs(grade))


def judged(
    forward: int | str,
    backward: int | str | None = None,
    *,
    prompt: str = "q",
    words_a: int = 2,
    words_b: int = 2,
    category: str = "",
) -> JudgedComparison:
    question = Prompt.from_text(prompt, category)
    return JudgedComparison(
        comparison=Comparison(
            a=Candidate(prompt=question, text=" ".join(["a"] * words_a), model="tuned"),
            b=Candidate(prompt=question, text=" ".join(["b"] * words_b), model="base"),
        ),
        forward=verdict(forward),
        backward=None if backward is None else verdict(backward),
    )


def exchanged(j: JudgedComparison) -> JudgedComparison:
    """The same judgement with the names of the two answers exchanged."""
    assert j.backward is not None
    return JudgedComparison(
        comparison=j.comparison.swapped(),
        forward=j.backward.swapped(),
        backward=j.forward.swapped(),
    )


def test_two_wins_a_tie_and_a_loss_make_62_and_a_half_percent() -> None:
    rate = win_rate(
        [
            judged(1, 1, prompt="1"),
            judged(2, 0, prompt="2"),
            judged(0, 0, prompt="3"),
            judged(-1, -2, prompt="4"),
        ]
    )
    assert rate.win_rate == 0.625
    assert (rate.n, rate.n_win, rate.n_tie, rate.n_loss) == (4, 2, 1, 1)
    assert (rate.n_flipped, rate.n_unscored, rate.n_prompts) == (0, 0, 4)


@pytest.mark.parametrize(("forward", "backward"), [(1, -1), (-2, 2), (2, -1), (-1, 2)])
def test_opposite_winners_are_a_flipped_tie_whatever_their_strengths(
    forward: int, backward: int
) -> None:
    rate = win_rate([judged(forward, backward)])
    assert rate.win_rate == 0.5
    assert (rate.n_tie, rate.n_flipped) == (1, 1)


def test_a_failed_verdict_is_counted_with_its_reason_and_is_no_tie() -> None:
    rate = win_rate(
        [
            judged(1, 1, prompt="1"),
            judged("refused", 1, prompt="2"),
            judged("refused", "refused", prompt="3"),
            judged("truncated", "api_error", prompt="4"),
        ]
    )
    assert (rate.win_rate, rate.n, rate.n_tie, rate.n_prompts) == (1.0, 1, 0, 1)
    assert rate.n_unscored == 3
    assert rate.unscored_reasons == {"refused": 2, "api_error + truncated": 1}


def test_result_of_names_all_four_outcomes() -> None:
    assert [result_of(judged(g)) for g in (1, 0, -2, "empty")] == ["win", "tie", "loss", "unscored"]


def test_nothing_to_score_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match="got none"):
        win_rate([])
    with pytest.raises(ValueError, match=r"all 2 failed \(malformed: 1, refused: 1\)"):
        win_rate([judged("refused"), judged("malformed")])


def test_several_answers_to_one_prompt_count_as_one_cluster() -> None:
    # Prompt 1 scores (1 + 1 + 1 + 0) / 4 = 0.75, prompt 2 scores 0: together 0.375, not 3/5.
    ones = [judged(g, g, prompt="1") for g in (1, 1, 1, -1)]
    rate = win_rate([*ones, judged(-1, -1, prompt="2")])
    assert rate.win_rate == 0.375
    assert (rate.n, rate.n_prompts) == (5, 2)
    assert rate.headline_interval == wilson_interval(0.375, 2)


def test_wilson_matches_the_textbook_value_for_8_of_10() -> None:
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_wilson_at_the_ends_stays_inside_the_unit_interval() -> None:
    # With every trial won the lower bound is n / (n + z²): 10 / 13.8415.
    low, high = wilson_interval(1.0, 10)
    assert (low, high) == (pytest.approx(0.72246, abs=1e-4), 1.0)
    assert wilson_interval(0.0, 10) == (0.0, pytest.approx(1 - low))


def test_the_smallest_difference_100_prompts_can_show_is_about_14_points() -> None:
    # 1.95996 · 10 / (2 · 100.708) + 0.84162 · sqrt(96.8669) / (2 · 100.708) = 0.13844
    assert mde_points(100) == pytest.approx(13.84, abs=0.005)


@given(st.integers(4, 100_000))
def test_the_smallest_difference_solves_its_equation(n: int) -> None:
    points = mde_points(n)
    assert points is not None
    d = points / 100
    assert 0 < d <= 0.5
    right = 1.959964 / 2 + 0.841621 * math.sqrt(0.25 - d * d)
    assert d * math.sqrt(n) == pytest.approx(right, rel=1e-5)


def test_three_prompts_can_show_nothing_and_say_so() -> None:
    assert [mde_points(n) for n in (1, 2, 3)] == [None, None, None]


def test_bootstrap_has_no_width_to_show_when_all_prompts_score_the_same() -> None:
    rate = win_rate([judged(1, 1, prompt=str(i)) for i in range(20)])
    assert (rate.bootstrap_low, rate.bootstrap_high) == (None, None)
    assert rate.headline_interval == wilson_interval(1.0, 20)
    assert rate.verdict == "better"


def test_bootstrap_memory_is_flat_and_its_batch_changes_no_figure(monkeypatch) -> None:
    """A hundred thousand prompts once took gigabytes, and minutes to have them from the system."""
    means = [1.0, 0.0, 0.5] * 10_000
    monkeypatch.setattr(win_rate_module, "_RESAMPLES", 500)
    tracemalloc.start()
    found = win_rate_module._bootstrap_interval(means, seed=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6
    monkeypatch.setattr(win_rate_module, "_DRAWN_AT_ONCE", len(means))
    assert win_rate_module._bootstrap_interval(means, seed=3) == found


def test_bootstrap_agrees_with_wilson_on_many_prompts_and_is_reproducible() -> None:
    comparisons = [judged(1 if i % 4 else -1, prompt=str(i)) for i in range(400)]
    rate = win_rate(comparisons, seed=3)
    # The standard error is sqrt(0.75 · 0.25 / 400) = 0.02165.
    assert rate.bootstrap_low == pytest.approx(0.75 - 1.96 * 0.02165, abs=0.006)
    assert rate.bootstrap_high == pytest.approx(0.75 + 1.96 * 0.02165, abs=0.006)
    assert win_rate(comparisons, seed=3) == rate
    other = win_rate(comparisons, seed=4)
    assert other.headline_interval == rate.headline_interval


def test_verdict_needs_the_whole_interval_on_one_side() -> None:
    def rate(wins: int, losses: int) -> WinRate:
        grades = [1] * wins + [-1] * losses
        return win_rate([judged(g, g, prompt=str(i)) for i, g in enumerate(grades)])

    assert [rate(9, 1).verdict, rate(1, 9).verdict, rate(6, 4).verdict] == [
        "better",
        "worse",
        "unclear",
    ]


def test_length_rules_by_hand() -> None:
    rate = win_rate(
        [
            judged(1, 1, prompt="1", words_a=1, words_b=9),  # shorter is tuned, judge agrees
            judged(-1, -1, prompt="2", words_a=3, words_b=5),  # shorter is tuned, judge does not
            judged(-1, -1, prompt="3", words_a=6, words_b=4),  # shorter is baseline, judge agrees
            judged(0, 0, prompt="4", words_a=2, words_b=7),  # the judge does not decide
            judged(1, 1, prompt="5", words_a=8, words_b=8),  # the rule does not decide
        ]
    )
    assert rate.shortest_wins_share == pytest.approx(3.5 / 5)
    assert rate.longest_wins_share == pytest.approx(1.5 / 5)
    assert rate.agrees_with_shortest == pytest.approx(2 / 3)
    assert rate.n_length_decided == 3
    assert (rate.mean_words_tuned, rate.mean_words_baseline) == (4.0, 6.6)


def test_agreement_with_a_rule_that_never_decides_is_unknown_not_zero() -> None:
    rate = win_rate([judged(1, 1)])
    assert rate.agrees_with_shortest is None
    assert rate.n_length_decided == 0


def test_first_position_share_counts_only_comparisons_shown_in_both_orders() -> None:
    # Shown first: a, then b. (1, -1) names the first twice, (1, 1) once, (0, 1) not at all.
    both = [judged(1, -1, prompt="1"), judged(1, 1, prompt="2"), judged(0, 1, prompt="3")]
    rate = win_rate([*both, judged(1, prompt="4")])
    assert rate.first_position_share == pytest.approx(3 / 5)
    assert rate.n_one_order == 1
    assert win_rate([judged(1)]).first_position_share is None


def test_categories_have_their_own_rates_and_keep_the_unscored() -> None:
    rate = win_rate(
        [
            judged(1, 1, prompt="1", category="how_to"),
            judged(0, 0, prompt="2", category="how_to"),
            judged(-1, -1, prompt="3", category="facts"),
            judged("refused", prompt="4", category="facts"),
            judged("empty", prompt="5", category="ideas"),
        ]
    )
    table = rate.by_category
    assert list(table) == ["facts", "how_to", "ideas"]
    assert (table["how_to"].n, table["how_to"].win_rate) == (2, 0.75)
    assert (table["how_to"].low, table["how_to"].high) == wilson_interval(0.75, 2)
    assert (table["facts"].n, table["facts"].n_unscored, table["facts"].win_rate) == (1, 1, 0.0)
    assert (table["ideas"].n, table["ideas"].n_unscored, table["ideas"].win_rate) == (0, 1, None)


def test_a_win_rate_survives_json_and_says_what_it_is() -> None:
    rate = win_rate([judged(1, 1, prompt="1"), judged(-1, "refused", prompt="2")])
    line = msgspec.json.encode(rate)
    assert b'"schema":"prefopt.win_rate/1"' in line
    assert msgspec.json.decode(line, type=WinRate) == rate


def test_without_ties_the_clustered_interval_is_wilsons() -> None:
    for wins in (0, 3, 20, 37, 40):
        means = [1.0] * wins + [0.0] * (40 - wins)
        assert clustered_wilson_interval(means) == pytest.approx(wilson_interval(wins / 40, 40))
    with pytest.raises(ValueError, match="at least one prompt"):
        clustered_wilson_interval([])


def test_ties_make_prompts_worth_more_by_hand() -> None:
    """Of 100 prompts 40 are ties, 30 won, 30 lost: variance (60/4 + 1/2)/101, rate 1/2."""
    means = [0.5] * 40 + [1.0] * 30 + [0.0] * 30
    worth = 100 * 0.25 / ((60 / 4 + 0.5) / 101)
    assert worth == pytest.approx(162.9, abs=0.1)
    assert clustered_wilson_interval(means) == pytest.approx(wilson_interval(0.5, worth))


def test_all_ties_are_sure_only_as_far_as_their_number_allows() -> None:
    low, high = clustered_wilson_interval([0.5] * 10)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert 0.1 < high - low < 0.3  # Wilson's alone is 0.53 wide, the plain variance's 0
    wide, narrow = (clustered_wilson_interval([0.5] * n) for n in (20, 200))
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=30))
def test_the_clustered_interval_is_inside_wilsons_and_holds_the_rate(means: list[float]) -> None:
    rate = sum(means) / len(means)
    low, high = clustered_wilson_interval(means)
    outer_low, outer_high = wilson_interval(rate, len(means))
    assert outer_low - 1e-12 <= low <= rate + 1e-12
    assert rate - 1e-12 <= high <= outer_high + 1e-12


def _coverage(runs: int, n: int, answers: int, rate: float, ties: float) -> float:
    import numpy as np

    rng = np.random.default_rng(0)
    win = (rate - ties / 2) / (1 - ties)
    held = 0
    for _ in range(runs):
        p = rng.beta(2 * win, 2 * (1 - win), (n, 1))  # a prompt's answers are alike
        scores = np.where(
            rng.random((n, answers)) < ties, 0.5, (rng.random((n, answers)) < p).astype(float)
        )
        low, high = clustered_wilson_interval(scores.mean(axis=1).tolist())
        held += low <= rate <= high
    return held / runs


_CASES = [(20, 1, 0.5, 0.4), (60, 1, 0.6, 0.6), (40, 4, 0.6, 0.2), (40, 3, 0.9, 0.0)]


@pytest.mark.parametrize("case", _CASES)
def test_the_clustered_interval_holds_the_truth(case) -> None:
    assert _coverage(400, *case) > 0.92


@pytest.mark.slow
@pytest.mark.parametrize("case", _CASES)
def test_the_clustered_interval_holds_the_truth_as_often_as_it_says(case) -> None:
    assert 0.94 < _coverage(6000, *case) < 0.985


def test_spread_by_hand() -> None:
    assert spread_of([1.0, 0.0, 1.0]) == 0.5
    assert spread_of([0.5] * 98) == pytest.approx(math.sqrt(0.5 / 100))
    assert spread_of([0.5] * 40 + [0.0, 1.0] * 30) == pytest.approx(math.sqrt(15.5 / 102))


def test_how_many_points_240_prompts_can_show() -> None:
    """9 points when all is decided; with 56 % ties 6."""
    assert mde_points(240) == pytest.approx(9.0, abs=0.1)
    assert mde_points(240, spread=math.sqrt(1 - 0.56) / 2) == pytest.approx(6.0, abs=0.1)


def test_the_smallest_difference_is_seen_with_the_power_promised() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    n, ties = 120, 0.4
    spread = math.sqrt(1 - ties) / 2
    d = mde_points(n, spread=spread)
    assert d is not None
    win = 0.5 + d / 100 - ties / 2
    seen = 0
    for scores in rng.choice([1.0, 0.5, 0.0], size=(800, n), p=[win, ties, 1 - win - ties]):
        seen += clustered_wilson_interval(scores.tolist())[0] > 0.5
    assert seen / 800 == pytest.approx(0.8, abs=0.06)


def test_scores_and_reasons_are_taken_apart() -> None:
    kept = score_comparisons([judged(1, 1), judged("refused", 1), judged(1, -1), judged(-1, 0)])
    assert kept.points == [1.0, 0.5, 0.0]
    assert (kept.n_unscored, kept.unscored_reasons) == (1, {"refused": 1})
    assert len(set(kept.prompt_ids)) == 1


def test_where_judging_stopped_early_the_headline_allows_for_it() -> None:
    rows = [judged(1, 1, prompt=str(i)) for i in range(20)]
    planned, stopped = win_rate(rows), win_rate(rows, stopped=(0.48, 1.0))
    assert planned.verdict == "better"
    assert (stopped.headline_interval, stopped.verdict) == ((0.48, 1.0), "unclear")
    assert stopped.wilson_low == planned.wilson_low


_GRADES = st.one_of(st.integers(-2, 2), st.sampled_from(["refused", "truncated"]))
_JUDGED = st.builds(
    judged,
    _GRADES,
    _GRADES,
    prompt=st.sampled_from(["1", "2", "3", "4", "5"]),
    words_a=st.integers(0, 6),
    words_b=st.integers(0, 6),
    category=st.just("c"),
)
_SOME_SCORED = st.lists(_JUDGED, min_size=1, max_size=12).filter(
    lambda js: any(j.mean_grade is not None for j in js)
)


@settings(max_examples=50, deadline=None)
@given(_SOME_SCORED)
def test_exchanging_tuned_and_baseline_everywhere_mirrors_the_rate(
    comparisons: list[JudgedComparison],
) -> None:
    rate, mirrored = win_rate(comparisons), win_rate([exchanged(j) for j in comparisons])
    assert mirrored.win_rate == pytest.approx(1 - rate.win_rate)
    assert (mirrored.n_win, mirrored.n_tie, mirrored.n_loss) == (
        rate.n_loss,
        rate.n_tie,
        rate.n_win,
    )
    assert (mirrored.n_flipped, mirrored.unscored_reasons) == (
        rate.n_flipped,
        rate.unscored_reasons,
    )
    assert mirrored.wilson_low == pytest.approx(1 - rate.wilson_high)
    assert mirrored.shortest_wins_share == pytest.approx(rate.longest_wins_share)
    assert mirrored.agrees_with_shortest == rate.agrees_with_shortest
    assert mirrored.mean_words_tuned == rate.mean_words_baseline
    if rate.first_position_share is not None:
        assert mirrored.first_position_share == pytest.approx(rate.first_position_share)
    if rate.bootstrap_high is not None:
        assert mirrored.bootstrap_low == pytest.approx(1 - rate.bootstrap_high)


@settings(max_examples=30, deadline=None)
@given(_SOME_SCORED)
def test_every_comparison_is_counted_once_and_the_rate_lies_in_its_interval(
    comparisons: list[JudgedComparison],
) -> None:
    rate = win_rate(comparisons)
    assert rate.n + rate.n_unscored == len(comparisons)
    assert rate.n_win + rate.n_tie + rate.n_loss == rate.n
    assert sum(rate.unscored_reasons.values()) == rate.n_unscored
    assert sum(row.n + row.n_unscored for row in rate.by_category.values()) == len(comparisons)
    low, high = rate.headline_interval
    assert 0 <= low <= rate.win_rate + 1e-12
    assert rate.win_rate - 1e-12 <= high <= 1
    assert rate.n_flipped <= rate.n_tie


def test_importing_evaluation_loads_no_heavy_library() -> None:
    program = (
        "import sys, prefopt.evaluation.eval_report, prefopt.evaluation.perplexity\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'matplotlib', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
