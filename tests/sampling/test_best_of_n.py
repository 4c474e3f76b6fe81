"""Best-of-n: who wins, what failed, and what it is worth on average."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.sampling.best_of_n import best_of_n, best_of_n_kl, expected_best_of_n
from prefopt.types import Candidate, Prompt

quick = settings(max_examples=40, deadline=None)
PROMPTS = [Prompt.from_text("first"), Prompt.from_text("second")]


def candidates(*texts):
    return [
        Candidate(prompt=prompt, text=text, model="m", sample_index=i)
        for prompt, own in zip(PROMPTS, texts, strict=False)
        for i, text in enumerate(own)
    ]


def by_length(prompts, answers):
    return [[float(len(text)) for text in texts] for texts in answers]


class Scores:
    """Has a method `score`, as reward models do."""

    score = staticmethod(by_length)


@pytest.mark.parametrize("scorer", [by_length, Scores()])
def test_the_highest_score_wins_and_the_first_of_equals(scorer):
    best = best_of_n(candidates(["aa", "aaa", "bbb"], ["c"]), scorer)
    assert [b.candidate.text for b in best] == ["aaa", "c"]
    assert best[0].scores == (2.0, 3.0, 3.0)
    assert [b.score for b in best] == [3.0, 1.0]
    assert best_of_n(candidates(["aa", "aaa"]), scorer, n=1)[0].candidate.text == "aa"


def test_a_failed_score_cannot_win():
    def score(prompts, answers):
        return [[None, math.nan, -5.0][: len(texts)] for texts in answers]

    (best,) = best_of_n(candidates(["a", "b", "c"]), score)
    assert best.candidate.text == "c"
    assert best.scores == (None, None, -5.0)
    with pytest.raises(ValueError, match="no answer to prompt"):
        best_of_n(candidates(["a", "b"]), score)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n(candidates(["a"]), by_length, n=0)
    with pytest.raises(ValueError, match="1 of 2 prompts have fewer than 2"):
        best_of_n(candidates(["a", "b"], ["c"]), by_length, n=2)
    with pytest.raises(ValueError, match="one score for each"):
        best_of_n(candidates(["a", "b"]), lambda prompts, answers: [[1.0]])
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl(0)
    with pytest.raises(ValueError, match="between 1 and 2"):
        expected_best_of_n([1.0, 2.0], 3)
    with pytest.raises(ValueError, match="one gold value"):
        expected_best_of_n([1.0, 2.0], 1, gold=[1.0])


def test_the_divergence_by_hand():
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)


def test_the_expectation_by_hand():
    """Best of 2 of scores 1, 2, 3: the pairs' winners are 2, 3, 3."""
    assert expected_best_of_n([3.0, 1.0, 2.0], 2) == pytest.approx(8 / 3)
    assert expected_best_of_n([3.0, 1.0, 2.0], 2, gold=[0.0, 5.0, 9.0]) == pytest.approx(9 / 3)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.data())
@quick
def test_it_is_the_mean_over_all_choices_equal_scores_sharing(scores, data):
    n = data.draw(st.integers(1, len(scores)))
    gold = [float(i * i) for i in range(len(scores))]
    means = []
    for chosen in itertools.combinations(range(len(scores)), n):
        top = max(scores[i] for i in chosen)
        tied = [gold[i] for i in chosen if scores[i] == top]
        means.append(sum(tied) / len(tied))
    expected = sum(means) / len(means)
    found = expected_best_of_n([float(s) for s in scores], n, gold=gold)
    assert found == pytest.approx(expected)
