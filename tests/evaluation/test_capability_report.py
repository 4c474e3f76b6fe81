"""The statistics of capability reports: hand-worked numbers, invariants, simulated error rates."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.evaluation.capability_report import (
    CapabilityReport,
    capability_report,
    compare_items,
    holm,
    mcnemar_p,
    paired_share_interval,
    resolvable_share,
    sign_flip_p,
)


def task(base, tuned, name="t", **options):
    return compare_items(name, name.title(), "acc", base, tuned, **options)


def report(*tasks, **options):
    names = {"engine": "e", "base_model": "b", "tuned_model": "t"}
    return capability_report(tasks, **names, **options)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_lies_between_the_raw_and_bonferronis(p):
    adjusted = holm(p)
    assert all(a <= b <= min(1, len(p) * a) for a, b in zip(p, adjusted, strict=True))
    for i, j in itertools.permutations(range(len(p)), 2):
        assert p[i] >= p[j] or adjusted[i] <= adjusted[j]


def test_mcnemar_by_hand():
    assert mcnemar_p(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar_p(1, 9) == mcnemar_p(9, 1)
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(3, 3) == 1.0


def test_sign_flips_of_few_items_are_all_looked_at():
    assert sign_flip_p([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    # Of the 16 ways 8 have a mean as far from 0 as 1 + 2 + 3 - 4 = 2.
    sums = [abs(sum(s * d for s, d in zip(signs, (1, 2, 3, 4), strict=True)))
            for signs in itertools.product((1, -1), repeat=4)]  # fmt: skip
    expected = sum(s >= 2 for s in sums) / 16
    assert sign_flip_p([1.0, 2.0, 3.0, -4.0]) == pytest.approx(expected)
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_the_paired_interval_by_hand():
    # n = 98, 14 up and 4 down: p = .15, q = .05, .1 ± 1.96·sqrt((.2 - .01)/100)
    low, high = paired_share_interval(14, 4, 98)
    assert (low, high) == pytest.approx((0.1 - 0.08543, 0.1 + 0.08543), abs=1e-4)
    assert paired_share_interval(0, 0, 50)[1] > 0.03


scores = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=40
)


@settings(max_examples=50, deadline=None)
@given(scores, st.booleans())
def test_exchanging_the_models_mirrors_everything(pairs, higher):
    base, tuned = map(list, zip(*pairs, strict=True))
    there = task(base, tuned, higher_is_better=higher)
    back = task(tuned, base, higher_is_better=higher)
    assert there.change == -back.change
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.low <= there.change <= there.high or there.n < 5
    assert (there.n_worse, there.n_better) == (back.n_better, back.n_worse)
    assert there.p_value == back.p_value
    names = {"dropped": "gained", "gained": "dropped", "no change shown": "no change shown"}
    assert names[there.verdict] == back.verdict
    assert there.n_better - there.n_worse == pytest.approx(
        (1 if higher else -1) * there.change * there.n
    )


def test_which_way_is_down():
    fewer = task([1.0] * 20, [1.0] * 10 + [0.0] * 10)
    assert (fewer.verdict, fewer.n_worse, fewer.change, fewer.drop) == ("dropped", 10, -0.5, 0.5)
    rng = np.random.default_rng(0)
    base = rng.normal(1.0, 0.3, 20).tolist()
    surprised = task(base, [b + 0.1 for b in base[:-1]] + [base[-1]], higher_is_better=False)
    assert (surprised.verdict, surprised.n_worse, surprised.n_better) == ("dropped", 19, 0)
    assert surprised.drop == pytest.approx(surprised.change / surprised.base)
    assert not surprised.is_share
    relieved = task(base, [b - 0.1 for b in base[:-1]] + [base[-1]], higher_is_better=False)
    assert (relieved.verdict, relieved.drop < 0) == ("gained", True)


def draw_unchanged(rng):
    """p-values of five tasks on which two models are equally good, item by item."""
    p_values = []
    for n, rate in ((60, 0.3), (100, 0.6), (64, 0.5)):
        chance = rng.beta(2 * rate, 2 * (1 - rate), n)
        base, tuned = (rng.random((2, n)) < chance).astype(int)
        p_values.append(mcnemar_p(int((tuned < base).sum()), int((tuned > base).sum())))
    for scale in (0.02, 1.0):
        p_values.append(sign_flip_p(scale * rng.standard_t(3, 8)))
    return p_values


@pytest.mark.slow
def test_where_nothing_changed_a_report_calls_anything_at_most_alpha_of_the_time():
    rng = np.random.default_rng(1)
    drawn = [draw_unchanged(rng) for _ in range(400)]
    called = np.mean([min(holm(p)) <= 0.05 for p in drawn])
    unadjusted = np.mean([min(p) <= 0.05 for p in drawn])
    three_errors = 3 * (0.05 * 0.95 / 400) ** 0.5
    assert called <= 0.05 + three_errors
    assert unadjusted > 0.05 + three_errors  # so the test would see it if nothing were adjusted


def test_the_interval_holds_the_change_19_times_of_20():
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(1000):
        up, down, _ = rng.multinomial(60, [0.05, 0.2, 0.75])
        low, high = paired_share_interval(up, down, 60)
        held += low <= -0.15 <= high
    assert 0.935 <= held / 1000 <= 0.985


@pytest.mark.parametrize(("churn", "n"), [(0, 100), (12, 100), (20, 400)])
def test_a_drop_of_the_resolvable_size_is_seen_8_times_of_10(churn, n):
    drop = resolvable_share(churn, churn, n, alpha=0.02)
    chance = (churn + 0.5) / (n + 1)
    rng = np.random.default_rng(3)
    lost, won, _ = rng.multinomial(n, [chance + drop, chance, 1 - 2 * chance - drop], 1500).T
    seen = np.mean(
        [
            mcnemar_p(a, b) <= 0.02 and a > b
            for a, b in zip(lost.tolist(), won.tolist(), strict=True)
        ]
    )
    assert seen == pytest.approx(0.8, abs=0.035)


def test_what_cannot_be_resolved_is_none():
    assert resolvable_share(0, 0, 5) is None
    assert task([0.0] * 50, [0.0] * 50).resolvable is None  # nothing to lose
    assert task([1.0] * 50, [1.0] * 50).resolvable < 0.2
    assert task([0.5, 0.7, 0.2], [0.5, 0.7, 0.3]).resolvable is None
    same = [0.1 * i for i in range(20)]
    assert task(same, same).resolvable is None


def test_the_report_adjusts_and_gates():
    sure = task([1.0] * 40, [0.0] * 20 + [1.0] * 20, "sure")
    weak = task([1.0] * 40, [0.0] * 6 + [1.0] * 34, "weak")
    assert weak.verdict == "dropped"
    others = [task([1.0, 0.0] * 20, [1.0, 0.0] * 20, f"o{i}") for i in range(4)]
    found = report(sure, weak, *others)
    assert [t.verdict for t in found.tasks[:3]] == ["dropped", "no change shown", "no change shown"]
    assert found.tasks[1].p_value == pytest.approx(5 * weak.p_value)
    assert not found.passed
    assert [t.task for t in found.failed] == ["sure"]
    assert report(sure, max_drop=0.6).passed
    assert not report(sure, max_drop=0.4).passed
    gained = task([0.0] * 40, [1.0] * 40)
    assert report(gained).passed


def test_the_text_says_what_was_found_left_out_and_decided():
    dropped = task([1.0] * 40, [0.0] * 20 + [1.0] * 20, "sums")
    text = report(dropped, left_out=["arc_easy: no hub"]).to_text()
    for part in ("Sums", "100.0 %", "50.0 %", "-50.0", "dropped", "left out: arc_easy: no hub",
                 "gate FAILED", "Sums (50.0 %)"):  # fmt: skip
        assert part in text
    calm = report(task([1.0, 0.0] * 50, [1.0, 0.0] * 50)).to_text()
    assert "could show" in calm
    assert "gate passed" in calm


def test_the_report_round_trips():
    found = report(task([1.0] * 9, [0.0] * 9), left_out=["x: y"])
    encoded = msgspec.json.encode(found)
    assert msgspec.json.decode(encoded, type=CapabilityReport) == found
    assert b'"schema":"prefopt.capability_report/1"' in encoded


def test_bad_input_is_told_all_at_once():
    with pytest.raises(ValueError, match=r"1 base scores and 2 tuned.*score.*item 1.*alpha") as e:
        task([1.0], [0.0, float("nan")], alpha=2)
    assert "'t'" in str(e.value)
    with pytest.raises(ValueError, match="no items"):
        task([], [])
    same = task([1.0], [1.0])
    with pytest.raises(ValueError, match=r"'t' is there twice.*alpha.*max_drop"):
        report(same, same, alpha=0, max_drop=-1)
    with pytest.raises(ValueError, match=r"no task was measured; left out: x: why"):
        report(left_out=["x: why"])


def test_one_item_and_many():
    assert task([1.0], [0.0]).verdict == "no change shown"
    assert task([0.3], [0.2]).p_value == 1.0
    many = task([1.0] * 5000, [1.0] * 4900 + [0.0] * 100)
    assert (many.verdict, many.resolvable < 0.01) == ("dropped", True)
