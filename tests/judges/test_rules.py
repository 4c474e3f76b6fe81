"""The rules of the house style: each fault is found, and none where there is none."""

import pytest

from prefopt.judges import RuleJudge, judge_comparisons, load_judge
from prefopt.judges.rubric import Rubric
from prefopt.judges.rules import house_style_faults
from prefopt.types import Candidate, Comparison, Prompt

PROMPT = Prompt.from_text("Why does bread rise when you add yeast to the dough?")
GOOD = "Yeast eats the sugar in the dough and gives off gas, which blows it up like a balloon."


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("", "empty"),
        ("   \n", "empty"),
        ("Yeast.", "fewer than 3 words"),
        ("Yeast gas lifts it.", "fewer than 6 words"),
        ("Paris is the capital city of France.", "no content word"),
        ("Yeast eats the sugar in the dough and gives off", "cut off"),
        ("Sure! Yeast makes gas in the dough.", "preamble"),
        ("I'd be happy to help. Yeast makes gas in the dough.", "preamble"),
        ("Why does bread rise with yeast? Because of gas.", "restates"),
        ("As an AI, I think yeast makes gas in the dough.", "talks about the assistant"),
        ("Yeast makes gas in the dough. I hope this helps!", "filler"),
        ("Yeast makes gas. Yeast makes gas. Yeast makes gas.", "repeats"),
        (" ".join(["yeast", *[f"word{i}" for i in range(70)]]) + ".", "words over 35"),
    ],
)
def test_each_fault_is_found(answer, fault):
    assert any(fault in found.name for found in house_style_faults(PROMPT, answer))


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        'The saying is "bread rises by itself."',
        "Surely yeast is the reason: it makes gas in the dough.",
        "Heat makes the gas in the dough expand, so the bread rises!",
    ],
)
def test_a_good_answer_has_no_fault(answer):
    assert house_style_faults(PROMPT, answer) == []


def test_the_weights_follow_the_rubric_s_order():
    def weight(answer):
        return sum(f.weight for f in house_style_faults(PROMPT, answer))

    cut = "Yeast eats the sugar in the dough and"
    assert weight("") > weight(cut) > weight("Sure! " + GOOD) > weight(GOOD) == 0


def test_verdicts_do_not_depend_on_position_and_say_why():
    comparison = Comparison(
        a=Candidate(prompt=PROMPT, text="Sure! " + GOOD, model="m"),
        b=Candidate(prompt=PROMPT, text=GOOD, model="m"),
    )
    (judged,) = judge_comparisons([comparison], RuleJudge(), progress=False)
    assert judged.mean_grade == -1
    assert not judged.flipped
    assert "preamble" in judged.forward.rationale


def test_the_rule_judge_refuses_a_rubric_it_cannot_apply():
    with pytest.raises(ValueError, match="cannot apply 'mine'"):
        load_judge("rules:house_style", rubric=Rubric(name="mine", text="Rhyme."))


@pytest.mark.parametrize("spec", ["", "rules", "claude", "anthropic:", "local:"])
def test_an_unknown_judge_is_told_what_is_known(spec):
    with pytest.raises(ValueError, match="Known: rules:house_style"):
        load_judge(spec)
