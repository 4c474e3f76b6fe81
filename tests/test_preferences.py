"""Verdicts to labels: signs, thresholds, and a reason for everything left out."""

import math
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.errors import DataError
from prefopt.preferences import build_preferences, infer, pair_candidates
from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Verdict

PROMPT = Prompt.from_text("Name a colour.")


def candidate(text, prompt=PROMPT, index=0):
    return Candidate(prompt=prompt, text=text, model="m", sample_index=index)


def verdict(grade):
    if grade is None:
        return Verdict(judge="j", failure="refused")
    preferred = "tie" if grade == 0 else "a" if grade > 0 else "b"
    return Verdict(judge="j", preferred=preferred, strength=abs(grade))


def judged(forward, backward, a="red", b="blue"):
    return JudgedComparison(
        comparison=Comparison(a=candidate(a), b=candidate(b)),
        forward=verdict(forward),
        backward=verdict(backward),
    )


@pytest.mark.parametrize(
    ("forward", "backward", "chosen", "reason"),
    [
        (2, 2, "red", None),
        (1, 1, "red", None),
        (2, 0, "red", None),
        (-1, -1, "blue", None),
        (1, 0, None, "weak"),
        (0, 0, None, "tie"),
        (1, -1, None, "flipped"),
        (2, -1, None, "flipped"),
        (1, None, None, "judge_failed"),
        (None, None, None, "judge_failed"),
    ],
)
def test_each_pair_of_grades_has_its_outcome(forward, backward, chosen, reason):
    found = build_preferences([judged(forward, backward)])
    if chosen:
        ((got, _, preference),) = found.groups[0].pairs()
        assert got.text == chosen
        assert preference.margin == abs(forward + backward) / 2
        assert found.left_out == ()
    else:
        assert found.groups == ()
        assert [item.reason for item in found.left_out] == [reason]


def test_identical_and_empty_answers_never_become_pairs():
    found = build_preferences([judged(2, 2, a="same", b="same "), judged(2, 2, a=" ", b="blue")])
    assert found.groups == ()
    assert found.reasons() == {"identical_answers": 1, "empty_answer": 1}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(*[st.none() | st.integers(-2, 2)] * 2), min_size=1, max_size=8))
def test_nothing_is_lost_and_swapping_answers_swaps_labels(grades):
    items = [judged(f, b, a=f"answer {i}", b=f"other {i}") for i, (f, b) in enumerate(grades)]
    swapped = [
        JudgedComparison(
            comparison=item.comparison.swapped(),
            forward=item.forward.swapped(),
            backward=item.backward.swapped(),
        )
        for item in items
    ]
    found, mirrored = build_preferences(items), build_preferences(swapped)
    assert found.n_preferences + len(found.left_out) == len(items)
    pairs = [(c.text, r.text, p.margin) for g in found.groups for c, r, p in g.pairs()]
    assert pairs == [(c.text, r.text, p.margin) for g in mirrored.groups for c, r, p in g.pairs()]


def decided(*answers):
    """Every pair of the answers, given best first, each decided in favour of the better one."""
    made = [candidate(text, index=i) for i, text in enumerate(answers)]
    return [
        JudgedComparison(comparison=Comparison(a=x, b=y), forward=verdict(g), backward=verdict(g))
        for i, x in enumerate(made)
        for j, y in enumerate(made[i + 1 :], start=i + 1)
        for g in [2 if j - i > 1 else 1]
    ]


def test_one_pair_a_prompt_is_the_best_against_the_worst_and_the_rest_is_accounted_for():
    found = build_preferences(decided("best", "mid", "worst"), pairs_per_prompt=1)
    ((chosen, rejected, _),) = found.groups[0].pairs()
    assert (chosen.text, rejected.text) == ("best", "worst")
    assert found.reasons() == {"not_selected": 2}


def test_two_pairs_a_prompt_use_four_different_answers_where_there_are_four():
    found = build_preferences(decided("1st", "2nd", "3rd", "4th"), pairs_per_prompt=2)
    pairs = {(c.text, r.text) for c, r, _ in found.groups[0].pairs()}
    assert pairs == {("1st", "4th"), ("2nd", "3rd")}
    more = build_preferences(decided("1st", "2nd", "3rd", "4th"), pairs_per_prompt=10)
    assert more.n_preferences == 6


def test_all_pairs_of_k_answers_are_compared_once_and_the_order_shown_is_balanced():
    candidates = [
        candidate(f"answer {i}", Prompt.from_text(f"prompt {n}"), i)
        for n in range(50)
        for i in range(4)
    ]
    comparisons = pair_candidates(candidates)
    assert len(comparisons) == 50 * 6
    assert len({c.comparison_id for c in comparisons}) == 300
    first_sampled_shown_first = sum(c.a.sample_index < c.b.sample_index for c in comparisons)
    assert 110 < first_sampled_shown_first < 190  # 150 +- 4.6 standard deviations
    assert len(pair_candidates(candidates, scheme="chain")) == 50 * 4


def test_a_prompt_with_one_answer_is_refused_and_named():
    with pytest.raises(DataError, match="Name a colour"):
        pair_candidates([candidate("red")])


def biased_run(n=300, seed=0, bias=1.5, slope=2.0):
    """Pairs of known order, graded in both orders by a judge that leans to the first place."""
    rng = random.Random(seed)

    def grade(latent):
        u = rng.random()
        x = latent + math.log(u / (1 - u))
        return 0 if abs(x) < 0.5 else int(math.copysign(2 if abs(x) > 2 else 1, x))

    items, truth = [], []
    for i in range(n):
        gap = rng.gauss(0, math.sqrt(2))
        forward = verdict(grade(slope * gap + bias))
        backward = verdict(grade(-slope * gap + bias)).swapped()
        prompt = Prompt.from_text(f"Question {i}?")
        comparison = Comparison(a=candidate(f"a{i}", prompt), b=candidate(f"b{i}", prompt, index=1))
        items.append(JudgedComparison(comparison=comparison, forward=forward, backward=backward))
        truth.append(gap > 0)
    return items, truth


def test_a_judges_position_bias_is_found_and_taken_out():
    items, truth = biased_run()
    found = infer(items)
    p = found.p_a(items)
    assert found.judges == ("j",)
    assert found.model.judges[0].position_bias == pytest.approx(1.5, abs=0.5)
    right = [(x > 0.5) == t for x, t in zip(p, truth, strict=True)]
    assert sum(right) / len(right) > 0.8
    # One order alone, the answer in the first place favoured: p knows better than the grade.
    first_says = [j.forward.grade > 0 for j in items if j.forward.grade]
    assert sum(first_says) / len(first_says) > 0.6
    assert abs(sum(p) / len(p) - sum(truth) / len(truth)) < 0.06


def test_the_inferred_rule_keeps_what_is_sure_whatever_the_grades_look_like():
    items, _ = biased_run()
    strict = build_preferences(items)
    found = build_preferences(items, rule="inferred", min_p=0.9)
    assert found.n_preferences + len(found.left_out) == len(items)
    assert set(found.reasons()) <= {"uncertain"}
    assert all(x.p_chosen >= 0.9 for g in found.groups for _, _, x in g.pairs())
    assert found.n_preferences > 50
    assert strict.n_preferences > 50
    assert {x.p_source for g in found.groups for _, _, x in g.pairs()} == {"inferred"}


def test_a_failed_verdict_leaves_the_other_order_to_speak():
    items, _ = biased_run(100)
    broken = msgspec.structs.replace(
        items[0], forward=verdict(None), backward=verdict(-2).swapped()
    )
    found = build_preferences([broken, *items[1:]], rule="inferred")
    assert broken.comparison.comparison_id not in {x.comparison_id for x in found.left_out}
    strict = build_preferences([broken, *items[1:]])
    assert {x.comparison_id: x.reason for x in strict.left_out}[
        broken.comparison.comparison_id
    ] == "judge_failed"


@pytest.mark.parametrize(
    "wrong", [{"rule": "best"}, {"min_p": 0.2}, {"min_p": 1.0}, {"min_margin": 0.0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        build_preferences([], **wrong)


def test_the_best_and_the_worst_may_never_have_met():
    prompts = [Prompt.from_text(f"Question {i}?") for i in range(20)]
    items = []
    for prompt in prompts:
        best, mid, worst = (candidate(t, prompt, i) for i, t in enumerate(("best", "mid", "worst")))
        for x, y in ((best, mid), (mid, worst)):
            items.append(
                JudgedComparison(
                    comparison=Comparison(a=x, b=y),
                    forward=verdict(2),
                    backward=verdict(-2).swapped(),
                )
            )
    found = build_preferences(items, rule="inferred", pairs_per_prompt=1)
    assert {(c.text, r.text) for g in found.groups for c, r, _ in g.pairs()} == {("best", "worst")}
    assert found.n_preferences == 20
    assert found.reasons() == {"not_selected": 40}
