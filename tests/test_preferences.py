"""Verdicts to labels: signs, thresholds, and a reason for everything left out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.errors import DataError
from prefopt.preferences import build_preferences, pair_candidates
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


@given(st.lists(st.tuples(*[st.none() | st.integers(-2, 2)] * 2), min_size=1, max_size=30))
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
