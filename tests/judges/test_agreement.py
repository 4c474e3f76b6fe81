"""A judge against people: figures by hand, intervals that cover, failures that stay visible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.judges.agreement import (
    CLASSES,
    cohen_kappa,
    gwet_ac1,
    judge_class,
    measure_agreement,
    wilson,
)
from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Verdict


def verdict(preferred, first="a"):
    if preferred is None:
        return Verdict(judge="j", failure="refused", shown_first=first)
    return Verdict(
        judge="j", preferred=preferred, strength=int(preferred != "tie"), shown_first=first
    )


def judged(forward, backward="same", i=0, a="one two three", b="one", category=""):
    prompt = Prompt.from_text(f"Question {i}?", category=category)
    return JudgedComparison(
        comparison=Comparison(
            a=Candidate(prompt=prompt, text=a, model="m"),
            b=Candidate(prompt=prompt, text=b, model="m", sample_index=1),
        ),
        forward=verdict(forward),
        backward=verdict(forward if backward == "same" else backward, "b"),
    )


def test_kappa_and_ac1_of_known_tables():
    # Cohen's own kind of example: 20 + 15 of 50 agree, chance 0.5.
    assert cohen_kappa(np.array([[20.0, 5.0], [10.0, 15.0]])) == pytest.approx(0.4)
    assert gwet_ac1(np.array([[20.0, 5.0], [10.0, 15.0]])) == pytest.approx(0.4059405940594059)
    # Nearly all in one class: kappa collapses, AC1 does not (the paradox of high agreement).
    skewed = np.array([[90.0, 5.0], [5.0, 0.0]])
    assert cohen_kappa(skewed) == pytest.approx(-0.0526, abs=1e-4)
    assert gwet_ac1(skewed) > 0.88
    assert gwet_ac1(np.zeros((2, 2))) is None


def test_every_figure_by_hand():
    items = [
        judged("a", i=0),  # right
        judged("b", i=1),  # wrong, and the shorter
        judged("a", "b", i=2),  # flipped: half
        judged("tie", i=3),  # people tie as well
        judged(None, i=4),
        judged("b", i=5),  # right
    ]
    labels = ["a", "a", "b", "tie", "a", "b"]
    found = measure_agreement(items, labels, name="set")
    assert (found.n, found.n_failed, found.failures) == (6, 1, {"refused": 2})
    assert (found.agreement.value, found.agreement.n) == (pytest.approx(3 / 5), 5)
    assert (found.accuracy.value, found.accuracy.n) == (pytest.approx(2.5 / 4), 4)
    assert (found.accuracy_decided.value, found.accuracy_decided.n) == (pytest.approx(2 / 3), 3)
    assert found.worst_case == pytest.approx(3 / 6)
    assert found.confusion == {
        "a": {"a": 1, "tie": 0, "b": 1},
        "tie": {"a": 0, "tie": 1, "b": 0},
        "b": {"a": 0, "tie": 1, "b": 1},
    }
    assert found.flip_rate.value == pytest.approx(1 / 5)
    assert found.labels_longer.value == pytest.approx(3 / 5)
    assert found.longest_accuracy.value == pytest.approx(3 / 5)
    assert any("labels are few" in w for w in found.warnings)
    assert any("failed verdict" in w for w in found.warnings)


def test_a_judge_that_always_names_the_first_place_has_no_kappa_to_speak_of():
    items = [judged("a", "b", i) for i in range(50)]
    found = measure_agreement(items, ["a", "b"] * 25)
    assert found.first_place.value == 1.0
    assert found.flip_rate.value == 1.0
    assert found.kappa_decided is None  # it decides nothing
    assert found.accuracy.value == 0.5


@pytest.mark.slow
def test_the_bootstrap_interval_of_kappa_covers_what_it_should():
    rng = np.random.default_rng(0)
    covered, truth = 0, 0.6  # right in 80 % of evenly spread pairs
    for trial in range(40):
        labels = rng.choice(["a", "b"], size=150)
        right = rng.random(150) < 0.8
        said = np.where(right, labels, np.where(labels == "a", "b", "a"))
        items = [judged(s, i=i) for i, s in enumerate(said.tolist())]
        kappa = measure_agreement(items, labels.tolist(), seed=trial).kappa
        covered += kappa.low <= truth <= kappa.high
    assert covered >= 33  # 95 % of 40 is 38; this is 3.6 standard deviations below


def test_annotators_give_a_ceiling():
    items = [judged("a", i=i) for i in range(4)]
    annotators = [["a", "a", "b"], ["a", "a", "a"], ["a", "b", "tie"], ["b"]]
    found = measure_agreement(items, ["a"] * 4, annotators=annotators)
    # aab: only b faces two that agree, and does not; aaa: three times yes; ab-tie: nobody agrees.
    assert (found.annotator_agreement.value, found.annotator_agreement.n) == (0.75, 4)


def test_categories_are_shown_where_there_are_any():
    items = [judged("a", i=i, category="sums" if i % 2 else "") for i in range(4)]
    found = measure_agreement(items, ["a", "b", "a", "a"])
    assert [(c.category, c.n, c.accuracy.value) for c in found.categories] == [
        ("(none)", 2, 1.0), ("sums", 2, 0.5),
    ]  # fmt: skip


def test_one_label_a_comparison_or_an_error():
    with pytest.raises(ValueError, match="one label for each"):
        measure_agreement([judged("a")], [])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*CLASSES, None]), st.sampled_from([*CLASSES, None]),
            st.sampled_from(CLASSES),
        ),
        min_size=1,
        max_size=20,
    )
)  # fmt: skip
def test_swapping_all_answers_changes_no_figure(rows):
    items = [judged(f, b, i) for i, (f, b, _) in enumerate(rows)]
    labels = [label for _, _, label in rows]
    swapped = [
        JudgedComparison(
            comparison=j.comparison.swapped(),
            forward=j.backward.swapped(),
            backward=j.forward.swapped(),
        )
        for j in items
    ]
    other = {"a": "b", "b": "a", "tie": "tie"}
    one = measure_agreement(items, labels)
    two = measure_agreement(swapped, [other[x] for x in labels])
    for field in ("agreement", "accuracy", "flip_rate", "first_place", "longer_wins", "tie_rate"):
        assert getattr(one, field) == getattr(two, field)
    assert one.n == len(rows) == one.n_failed + (one.agreement.n if one.agreement else 0)
    assert sum(sum(r.values()) for r in one.confusion.values()) == one.n - one.n_failed
    assert [judge_class(j) for j in items] == [
        None if judge_class(j) is None else other[judge_class(j)] for j in swapped
    ]


def test_wilson_is_the_known_interval():
    found = wilson(5, 10)
    assert (found.low, found.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 0) is None
