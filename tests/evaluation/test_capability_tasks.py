"""prefopt's own tasks: items that are right and reproducible, checks that decide as people would."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.evaluation import capability_tasks
from prefopt.evaluation.capability_engine import OFFLINE, WRITING
from prefopt.evaluation.capability_tasks import generate
from prefopt.evaluation.capability_tasks.checks import CHECKS, follows, process_results

FOLDER = Path(capability_tasks.__file__).parent


def committed(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def test_the_committed_items_are_what_the_generator_writes():
    made = generate.all_items()
    assert {name: committed(name) for name in made} == made
    assert {f"prefopt_{name}" for name in made} == {*OFFLINE, WRITING} - {"prefopt_plain_text"}


@pytest.mark.parametrize("name", ["arithmetic", "reasoning", "format", "writing"])
def test_no_item_is_there_twice(name):
    questions = [row["question"] + row.get("stem", "") for row in committed(name)]
    assert len(set(questions)) == len(questions)


def test_every_calculation_has_its_result():
    for row in committed("arithmetic"):
        assert set(row["question"]) <= set("0123456789 +-*()")
        assert eval(row["question"]) == int(row["answer"])


def test_any_beginning_of_the_items_is_a_mixture():
    assert len({row["kind"] for row in committed("arithmetic")[:30]}) >= 6
    assert len({row["kind"] for row in committed("reasoning")[:30]}) >= 6


def test_reasoning_has_one_right_choice_anywhere():
    rows = committed("reasoning")
    for row in rows:
        assert len(set(row["choices"])) == len(row["choices"]) >= 2
        assert 0 <= row["answer"] < len(row["choices"])
    places = Counter(row["answer"] for row in rows)
    assert max(places.values()) < 0.5 * len(rows)  # always naming the first gets few


def test_orders_and_counts_are_answered_right():
    """Solved again from the text of the question."""
    solved = 0
    for row in committed("reasoning"):
        right = row["choices"][row["answer"]]
        words = row["question"].replace(".", "").replace("?", "").split()
        if row["kind"] == "order":
            above = [(words[0], words[4]), (words[5], words[9])]
            top = ({a for a, _ in above} - {b for _, b in above}).pop()
            bottom = ({b for _, b in above} - {a for a, _ in above}).pop()
            assert right == (
                top if words[-1] in ("tallest", "oldest", "fastest", "richest") else bottom
            )
        elif row["kind"] == "counting":
            a, b = (int(w) for w in words if w.isdigit())
            assert int(right) == (a + b if "gets" in words else a - b)
        elif row["kind"] == "sequence":
            shown = [int(w.strip(",")) for w in words if w.strip(",").isdigit()]
            assert int(right) == 2 * shown[-1] - shown[-2]
        else:
            continue
        solved += 1
    assert solved == 40


# A check: answers that pass it, and answers that do not.
EXAMPLES = {
    "upper_case": ("", ["ROME", "ROME, OF COURSE!", "ÇA VA"], ["Rome", "12"]),
    "lower_case": ("", ["the sea is wide.", "été"], ["The sea", "42"]),
    "starts_with": ("Once", ["Once upon a time", "once"], ["There was once", '"Once']),
    "ends_with": ("the end", ["They slept. The end.", "THE END!"], ["The end of it"]),
    "contains": ('["bread", "milk"]', ["Milk and bread."], ["Milk and breadth.", "milk"]),
    "avoids": (",", ["A cat eats fish."], ["A cat, it eats"]),
    "bullets": ("2", ["- a\n- b", "Here:\n* a\n• b"], ["- a", "- a\n- b\n- c", "-a\n-b"]),
    "numbered": ("2", ["1. a\n2. b", "1) a\n\n2) b"], ["1. a", "a\nb"]),
    "comma_list": ("3", ["red, green, blue", "a, b, and c"], ["red, green", "a, b,\nc"]),
    "json_object": (
        '["name"]',
        ['{"name": "Bob"}', '```json\n{"name": 1, "x": 2}\n```'],
        ['{"Name": 1}', '["name"]', "{name: Bob}", 'Sure: {"name": 1}', "[" * 100_000],
    ),
    "one_word": ("", ["Blue", "Blue."], ["It is blue", ""]),
    "at_most_words": ("3", ["water from clouds", "water"], ["water that falls from clouds", ""]),
    "one_sentence": ("", ["It is a place."], ["It is. A place.", "It is a place", "Yes."]),
    "quoted": ("", ['"Thanks"', "“Thanks”"], ["Thanks", '"Thanks', '""']),
    "yes_or_no": ("", ["Yes", "no."], ["Yes, it is", "maybe"]),
    "question": ("", ["How was it?"], ["How was it", "Tell me."]),
    "number_only": ("", ["8", "-3.5", "1,000"], ["8 legs", "eight"]),
}  # fmt: skip


@pytest.mark.parametrize("check", sorted(CHECKS))
def test_each_check_tells_answers_apart(check):
    argument, good, bad = EXAMPLES[check]
    for answer in good:
        assert follows(check, argument, answer), answer
        assert follows(check, argument, f"\n {answer} \n"), answer
    for answer in bad:
        assert not follows(check, argument, answer), answer


@given(st.sampled_from(committed("format")), st.text(max_size=80))
def test_no_answer_breaks_a_check(row, answer):
    assert process_results(row, [answer])["followed"] in (0.0, 1.0)


def test_every_instruction_has_a_check():
    assert {row["kind"] for row in committed("format")} == set(CHECKS)
    with pytest.raises(KeyError):
        follows("shouting", "", "HELLO")
