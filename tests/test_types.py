"""The text types: ids, symmetry, validation, and their lossless trip through JSON."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.types import (
    Candidate,
    Comparison,
    JudgedComparison,
    Message,
    Preference,
    PreferenceGroup,
    Prompt,
    Usage,
    Verdict,
)

texts = st.text(max_size=40)
prompts = st.builds(Prompt.from_text, st.text(min_size=1, max_size=40).filter(str.strip), texts)
verdicts = st.one_of(
    st.builds(
        lambda preferred, strength, p: Verdict(
            judge="j", preferred=preferred, strength=strength, p_a=p, usage=Usage(cost_usd=0.5)
        ),
        st.sampled_from(["a", "b", "tie"]),
        st.integers(0, 2),
        st.none() | st.floats(0, 1),
    ),
    st.builds(lambda: Verdict(judge="j", failure="refused")),
)


@st.composite
def judged_comparisons(draw: st.DrawFn) -> JudgedComparison:
    prompt = draw(prompts)
    a, b = (Candidate(prompt=prompt, text=draw(texts), model=m) for m in ("m1", "m2"))
    return JudgedComparison(
        comparison=Comparison(a=a, b=b),
        forward=draw(verdicts),
        backward=draw(st.none() | verdicts),
    )


@given(judged_comparisons())
def test_records_survive_the_trip_through_json(judged):
    encoded = msgspec.json.encode(judged)
    assert msgspec.json.decode(encoded, type=JudgedComparison) == judged


@given(verdicts)
def test_swapping_a_verdict_twice_gives_it_back_and_once_negates_its_grade(verdict):
    swapped = verdict.swapped()
    if verdict.grade is None:
        assert swapped.grade is None
    else:
        assert swapped.grade == -verdict.grade
    assert swapped.swapped().preferred == verdict.preferred


def test_a_prompt_has_the_same_id_wherever_it_is_built():
    by_text = Prompt.from_text("Why is the sky blue?")
    by_messages = Prompt.from_messages([{"role": "user", "content": "Why is the sky blue?"}])
    assert by_text == by_messages
    assert by_text.prompt_id != Prompt.from_text("Why is the sky blue").prompt_id


def test_a_comparison_keeps_its_id_when_it_is_swapped():
    prompt = Prompt.from_text("p")
    comparison = Comparison(
        a=Candidate(prompt=prompt, text="x", model="m"),
        b=Candidate(prompt=prompt, text="y", model="m"),
    )
    assert comparison.comparison_id == comparison.swapped().comparison_id


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least one message"),
        ([Message("user", "  ")], "needs some text"),
        ([Message("user", "hi"), Message("assistant", "hello")], "must end with a user"),
    ],
)
def test_an_unusable_prompt_says_what_is_wrong(messages, says):
    with pytest.raises(ValueError, match=says):
        Prompt.from_messages(messages)


def test_a_verdict_is_either_a_preference_or_a_failure():
    with pytest.raises(ValueError, match="either a preference or a failure"):
        Verdict(judge="j")
    with pytest.raises(ValueError, match="either a preference or a failure"):
        Verdict(judge="j", preferred="a", failure="refused")


def test_answers_to_different_prompts_cannot_be_compared():
    a, b = (Candidate(prompt=Prompt.from_text(t), text="x", model="m") for t in ("p", "q"))
    with pytest.raises(ValueError, match="same prompt"):
        Comparison(a=a, b=b)


def test_a_group_refuses_a_preference_for_an_answer_it_does_not_have():
    prompt = Prompt.from_text("p")
    answers = tuple(Candidate(prompt=prompt, text=t, model="m") for t in "xy")
    for chosen, rejected in ((0, 2), (1, 1), (-1, 0)):
        with pytest.raises(ValueError, match="two different answers"):
            PreferenceGroup(
                prompt=prompt,
                answers=answers,
                preferences=(Preference(chosen=chosen, rejected=rejected, p_chosen=0.9),),
            )


def test_opposite_winners_in_the_two_orders_are_a_flip_and_failures_are_not_ties():
    prompt = Prompt.from_text("p")
    comparison = Comparison(
        a=Candidate(prompt=prompt, text="x", model="m"),
        b=Candidate(prompt=prompt, text="y", model="m"),
    )

    def judged(forward, backward):
        return JudgedComparison(comparison=comparison, forward=forward, backward=backward)

    win_a = Verdict(judge="j", preferred="a", strength=1)
    win_b = Verdict(judge="j", preferred="b", strength=1)
    failed = Verdict(judge="j", failure="malformed")
    assert judged(win_a, win_b).flipped
    assert judged(win_a, win_b).mean_grade == 0
    assert not judged(win_a, win_a).flipped
    assert judged(win_a, failed).mean_grade is None
    assert judged(win_a, failed).failures == ("malformed",)
