"""Refusals, variety and means over prompts of answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.evaluation.model_figures import (
    answer_figures,
    distinct_share,
    is_refusal,
    mean_over_prompts,
)
from tests.evaluation.judgements import scored

SORRY = "I'm sorry, but I can't assist with that."


@pytest.mark.parametrize(
    "text",
    [
        SORRY,
        "I\u2019m sorry, but I\u2019m not comfortable sharing that.",
        "I cannot provide instructions for that.",
        "Sorry, I won't do that.",
        "I am unable to help with this request. Please ask a doctor.",
        "As an AI language model, I cannot have opinions.",
        "As an AI, I don't have personal opinions.",
        "I must decline.",
        "Unfortunately, I cannot fulfil this request.",
        "We can't discuss this.",
    ],
)
def test_an_answer_that_begins_by_refusing_is_a_refusal(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure! Here it is.",
        "I can't wait to tell you all about it.",
        "I cannot believe how well this works: first, mix the flour.",
        "You cannot divide by zero.",
        "Sorry to hear that you are ill. Drink water.",
        "Mix the flour with water. I cannot provide an exact time.",
        "As an AI engineer, you should learn some mathematics.",
        "We can help you.",
    ],
)
def test_an_answer_that_helps_is_no_refusal(text: str) -> None:
    assert not is_refusal(text)


@given(st.text(max_size=300))
def test_no_text_breaks_the_rule(text: str) -> None:
    assert is_refusal(text) in (True, False)
    assert is_refusal(f"  {SORRY} {text}")


def test_distinct_shares_count_different_n_grams_and_do_not_cross_texts() -> None:
    assert distinct_share(["a b a", "A c"], 1) == 3 / 5
    assert distinct_share(["a b a b", "b a"], 2) == 2 / 4  # ab, ba, ab, ba
    assert distinct_share(["a", ""], 2) is None


def test_both_sides_are_cut_to_the_same_length_before_their_variety_is_compared() -> None:
    judged = [
        scored(1.0, prompt=f"q{i}", text_a="x y z x y z x y z", text_b=f"w{i} v{i} u{i}")
        for i in range(4)
    ]
    figures = answer_figures(judged)
    assert figures.n_words_compared == 12
    assert figures.distinct_1_after == 3 / 12
    assert figures.distinct_1_before == 1.0
    assert figures.distinct_2_after == 2 / 8


def test_refusals_are_counted_on_both_sides_and_tested_in_pairs() -> None:
    judged = [
        scored(
            None if i == 0 else 0.5, prompt=f"q{i}", text_a=SORRY if i < 9 else "Yes.", text_b="No."
        )
        for i in range(20)
    ]
    figures = answer_figures(judged)
    assert (figures.n, figures.refused_before, figures.refused_after) == (20, 0, 9)
    assert figures.refused_p == pytest.approx(2 * 0.5**9)  # an unscored answer counts as well
    with pytest.raises(ValueError, match="at least one"):
        answer_figures([])


def test_a_mean_over_prompts_counts_each_prompt_once() -> None:
    mean = mean_over_prompts([1.0, 3.0, 5.0], ["a", "a", "b"])
    assert (mean.value, mean.n_prompts) == (3.5, 2)
    # Student's t with 1 degree of freedom: 12.706 · sqrt(4.5) / sqrt(2).
    assert mean.high == pytest.approx(3.5 + 12.7062 * 1.5, rel=1e-4)
    alone = mean_over_prompts([2.0], ["a"])
    assert (alone.low, alone.high) == (None, None)
    with pytest.raises(ValueError, match="needs values"):
        mean_over_prompts([], [])
