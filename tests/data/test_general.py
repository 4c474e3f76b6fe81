"""General data: what is read, what is drawn, and that nobody rehearses the examination."""

import json

import pytest

from prefopt.data.demonstrations import Demonstration, load_demonstrations
from prefopt.data.general import load_general, refuse_measured
from prefopt.data.prompts import load_prompts, plain_texts
from prefopt.data.records import write_records
from prefopt.errors import DataError
from prefopt.types import Candidate, Prompt

TEXTS = [f"The sky over town number {i} is blue." for i in range(30)]


def test_files_rows_and_answers_of_a_model_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("The sky is blue.\n", encoding="utf-8")
    prompt = Prompt.from_text("Wozu? 🌱")
    answers = [
        Candidate(prompt=prompt, text="Darum.", model="m", finish_reason="stop"),
        Candidate(prompt=prompt, text="Weil es so", model="m", finish_reason="length"),
    ]
    write_records(tmp_path / "candidates.jsonl", answers)
    assert [row.text for row in load_general(tmp_path / "a.txt")] == ["The sky is blue."]
    for source in (tmp_path / "candidates.jsonl", answers):
        found = load_general(source)
        assert [(row.prompt, row.text, row.complete) for row in found] == [
            (prompt, "Darum.", True),
            (prompt, "Weil es so", False),
        ]
    with pytest.raises(DataError, match=r"row 0.*no text"):
        load_demonstrations([Candidate(prompt=prompt, text=" ", model="m")])


def test_a_draw_has_no_row_twice_and_depends_on_the_seed_alone():
    drawn = load_general(TEXTS, most=7, seed=1)
    assert len({row.text for row in drawn}) == 7
    assert {r.text for r in drawn} == {r.text for r in load_general(TEXTS[::-1], most=7, seed=1)}
    assert {r.text for r in drawn} != {r.text for r in load_general(TEXTS, most=7, seed=2)}
    assert len(load_general(TEXTS, most=99)) == len(load_general(TEXTS)) == 30


def test_text_on_which_forgetting_is_measured_is_refused_wherever_it_hides():
    prose = plain_texts()
    held_out = [Prompt.from_text("Hello!"), Prompt.from_text("What is the colour of the old barn?")]
    middle = " ".join(prose[3].split()[20:40])
    rows = [
        *TEXTS,
        prose[0],
        f"He wrote: {middle.upper()}!",
        {"prompt": middle, "completion": "Yes."},
        {"prompt": "what is the colour of the old BARN", "completion": "Red."},
        {"prompt": "Hello!", "completion": "Hello to you."},
    ]
    with pytest.raises(DataError, match="on which forgetting is measured") as error:
        load_general(rows, held_out=held_out)
    assert len(error.value.problems) == 5
    assert all(f"row {i}" in p for i, p in enumerate(error.value.problems, start=30))
    assert len(load_general(rows[:30] + rows[33:])) == 32  # held out by nobody


def test_few_words_in_common_and_short_messages_are_no_rehearsal():
    words = plain_texts()[1].split()
    rows = [
        " ".join(words[5:17]) + " and then it was another river altogether.",
        {"prompt": "Hello!", "completion": "Yes."},
    ]
    assert len(load_general(rows, held_out=[Prompt.from_text("Hello there, Yes")])) == 2
    with pytest.raises(DataError):
        load_general([" ".join(words[5:18]) + " and then it was another river altogether."])


def test_the_built_in_prompts_are_no_others_and_hold_nothing_that_is_measured():
    general, everyday = load_prompts("general"), load_prompts("everyday")
    assert len(general) >= 90
    assert not {p.prompt_id for p in general} & {p.prompt_id for p in everyday}
    rows = [Demonstration(prompt=p, text="An answer.", source="test") for p in general]
    refuse_measured(rows, held_out=everyday)
    assert len({p.category for p in general[:11]}) > 8  # any beginning of the list is mixed


def test_malformed_rows_are_told_all_at_once(tmp_path):
    path = tmp_path / "g.jsonl"
    path.write_text(
        json.dumps({"text": "good"}) + '\n{"text": ""}\n{"a": 1}\n{\n', encoding="utf-8"
    )
    with pytest.raises(DataError) as error:
        load_general(path)
    assert [p.split(":")[0] for p in error.value.problems] == ["line 4", "line 2", "line 3"]
