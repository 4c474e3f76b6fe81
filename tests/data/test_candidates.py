"""Answers from elsewhere: every spelling, what is refused, and that nothing is lost or made up."""

import json

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

import prefopt
from prefopt.data.candidates import load_candidates, stream_candidates
from prefopt.data.shards import shard_file
from prefopt.errors import DataError
from prefopt.preferences import pair_candidates
from prefopt.types import Candidate, Preference, PreferenceGroup, Prompt

SKY = Prompt.from_text("Why is the sky blue?")
TURNS = [{"role": "user", "content": "Why is the sky blue?"}]


def said(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why is the sky blue?", "answer": "Air."},
        {"prompt": TURNS, "response": "Air."},
        {"instruction": "Why is the sky blue?", "output": "Air.", "input_tokens": 7},
        {"question": "Why is the sky blue?", "completion": [said("Air.")]},
        {"messages": [*TURNS, said("Air.")]},
        {"prompt": "the title", "messages": [*TURNS, said("Air.")]},
        {"prompt": "Why is the sky blue?", "answers": ["Air."]},
        # Parquet and `datasets` fill what a row lacks with None.
        {"prompt": "Why is the sky blue?", "answer": "Air.", "messages": None, "model": None},
    ],
)
def test_one_answer_in_every_spelling(row):
    assert load_candidates([row]) == [Candidate(prompt=SKY, text="Air.", model="unknown")]


@pytest.mark.parametrize(
    ("row", "models"),
    [
        ({"answers": ["Air.", "God."]}, ["mine", "mine"]),
        ({"generations": ["Air.", "God."], "models": ["x", "y"]}, ["x", "y"]),
        ({"generations": ["Air.", "God."], "generation_models": ["x", "y"]}, ["x", "y"]),
        ({"responses": ["Air.", [said("God.")]], "model": "x"}, ["x", "x"]),
        ({"response_a": "Air.", "response_b": "God."}, ["mine", "mine"]),
        ({"answer_a": "Air.", "answer_b": "God.", "model_a": "x", "model_b": "y"}, ["x", "y"]),
        ({"chosen": "Air.", "rejected": "God."}, ["mine", "mine"]),
        ({"chosen": [*TURNS, said("Air.")], "rejected": [*TURNS, said("God.")]}, ["mine", "mine"]),
        ({"chosen": "Air.", "rejected": "God.", "chosen_model": "x"}, ["x", "mine"]),
    ],
)
def test_several_answers_in_every_spelling(row, models):
    found = load_candidates([{"prompt": "Why is the sky blue?", **row}], model="mine")
    assert [(c.prompt, c.text, c.model) for c in found] == [
        (SKY, "Air.", models[0]),
        (SKY, "God.", models[1]),
    ]
    assert len({c.candidate_id for c in found}) == 2


def test_what_else_a_row_says_is_kept():
    row = {"prompt": "p", "answer": "a", "model": "m", "finish_reason": "length", "category": "c"}
    (found,) = load_candidates([row])
    assert (found.model, found.finish_reason, found.prompt.category) == ("m", "length", "c")


def test_answers_of_a_model_to_a_prompt_are_numbered_over_all_rows():
    rows = [
        {"prompt": "p", "answer": "1", "model": "x"},
        {"prompt": "p", "answer": "2", "model": "y"},
        {"prompt": "q", "answer": "3", "model": "x"},
        {"prompt": "p", "answers": ["4", "4"], "model": "x"},
    ]
    assert [c.sample_index for c in load_candidates(rows)] == [0, 0, 0, 1, 2]


def test_the_answers_of_several_pairs_are_counted_once():
    rows = [
        {"prompt": "p", "chosen": "1", "rejected": "2"},
        {"prompt": "p", "chosen": "1", "rejected": "3"},
        {"prompt": "p", "chosen": "2", "rejected": "3"},
        {"prompt": "q", "chosen": "1", "rejected": "2"},
    ]
    found = load_candidates(rows)
    assert [c.text for c in found] == ["1", "2", "3", "1", "2"]
    assert len(pair_candidates(found)) == 4


def test_a_pair_of_equal_answers_stays_two_and_a_single_answer_is_never_merged():
    rows = [
        {"prompt": "p", "chosen": "same", "rejected": "same", "answer": None},
        {"prompt": "q", "answer": "twice", "chosen": None, "rejected": None},
        {"prompt": "q", "answer": "twice", "chosen": None, "rejected": None},
    ]
    found = load_candidates(rows)
    assert [(c.prompt.text, c.text, c.sample_index) for c in found] == [
        ("p", "same", 0), ("p", "same", 1), ("q", "twice", 0), ("q", "twice", 1),
    ]  # fmt: skip


def test_prefopts_own_records_stay_as_they_are(tmp_path):
    answers = [
        Candidate(prompt=SKY, text=text, model="m", sample_index=i + 5, n_tokens=3)
        for i, text in enumerate(["Air.", "", "Air."])
    ]
    group = PreferenceGroup(
        prompt=SKY,
        answers=tuple(answers),
        preferences=(Preference(chosen=0, rejected=1, p_chosen=1.0, p_source="given"),),
    )
    prefopt.write_records(tmp_path / "c.jsonl", answers)
    prefopt.write_records(tmp_path / "g.jsonl", [group])
    for source in (answers, [group], tmp_path / "c.jsonl", tmp_path / "g.jsonl"):
        assert load_candidates(source, model="another") == answers


def test_what_is_written_as_preferences_comes_back_as_its_answers(tmp_path):
    answers = [
        Candidate(prompt=SKY, text=t, model="m", sample_index=i) for i, t in enumerate("abc")
    ]
    pairs = [(0, 1), (0, 2), (1, 2)]
    group = PreferenceGroup(
        prompt=SKY,
        answers=tuple(answers),
        preferences=tuple(
            Preference(chosen=i, rejected=j, p_chosen=1.0, p_source="given") for i, j in pairs
        ),
    )
    for name in ("p.jsonl", "p.parquet"):
        prefopt.save_preferences([group], tmp_path / name)
        assert load_candidates(tmp_path / name) == answers


def test_files_and_datasets(tmp_path):
    rows = [{"prompt": f"p{i}", "answers": [f"{i}a \u2028 ü", f"{i}b"]} for i in range(5)]
    expected = load_candidates(rows)
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    sources = [lines, str(lines), tmp_path / "a.json", tmp_path / "a.parquet"]
    for source in [*sources, Dataset.from_list(rows)]:
        assert load_candidates(source) == expected
    shards = shard_file(lines, tmp_path / "shards", Candidate, shard_size=2)
    assert [c for s in shards.shards for c in shards.read(s)] == expected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p"}, "no answer: it has `prompt`"),
        ({"answer": "a"}, "no prompt: it has `answer`"),
        ({}, "no prompt: it has no columns"),
        (
            {"prompt": "p", "answer": "a", "response": "b"},
            "several columns for one thing: `response`, `answer`; keep one",
        ),
        ({"prompt": "p", "question": "q", "answer": "a"}, "`prompt`, `question`; keep one"),
        ({"prompt": "p", "response_a": "a"}, "no answer"),
        ({"prompt": "p", "answers": "ab"}, "`answers` must be a list"),
        ({"prompt": "p", "answers": []}, "`answers` must be a list"),
        ({"prompt": "p", "answers": ["a", 1]}, "got int"),
        ({"prompt": "p", "answers": ["a", None]}, "got null"),
        ({"prompt": "p", "answers": ["a", "b"], "models": ["x"]}, "`models` names 1 for 2"),
        ({"prompt": "p", "answer": "a", "model": 3}, "Expected `str | null`, got `int`"),
        ({"prompt": "p", "answer": "a", "finish_reason": "eos"}, "Invalid enum value 'eos'"),
        ({"prompt": "p", "answer": [{"role": "user", "content": "a"}]}, "got user"),
        ({"prompt": "", "answer": "a"}, "needs some text"),
        ({"messages": TURNS}, "at least one message"),
        ({"messages": [said("a")]}, "at least one message"),
        ({"schema": "prefopt.prompt/1", "prompt": "p"}, "is a prefopt.prompt/1 record"),
        ({"schema": "prefopt.candidate/1", "text": "a"}, "missing required field"),
        ("a text", "expected an object"),
        (None, "got null"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(row, words):
    rows = [{"prompt": "p", "answer": "good"}, row]
    with pytest.raises(DataError, match=r"1 row\(s\) are not usable answers") as refused:
        load_candidates(rows)
    (problem,) = refused.value.problems
    assert problem.startswith("row 1: ")
    assert words in problem


def test_an_id_that_belongs_to_another_prompt_is_refused():
    prompt = Prompt(prompt_id="0" * 16, messages=SKY.messages)
    with pytest.raises(DataError, match="not usable answers"):
        load_candidates([Candidate(prompt=prompt, text="a", model="m")])


def test_all_bad_rows_are_told_at_once_with_lines_that_are_no_json(tmp_path):
    file = tmp_path / "a.jsonl"
    good = '{"prompt": "p", "answer": "a"}\n'
    file.write_text(good + "{broken\n" + good + '{"prompt": "p"}\n' + good)
    with pytest.raises(DataError) as refused:
        load_candidates(file)
    assert [problem[:6] for problem in refused.value.problems] == ["line 2", "line 4"]
    streamed = stream_candidates(file)
    assert [next(streamed).text for _ in range(3)] == ["a"] * 3
    with pytest.raises(DataError):
        next(streamed)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "nowhere"])
def test_a_source_that_is_not_there_is_named(source):
    with pytest.raises(DataError, match="nowhere"):
        load_candidates(source)


def test_an_empty_source_holds_no_answers(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    for source in (tmp_path / "a.jsonl", []):
        with pytest.raises(DataError, match="is empty"):
            load_candidates(source)


@given(
    st.lists(
        st.tuples(st.sampled_from("pqr"), st.lists(st.text(max_size=5), min_size=1, max_size=4)),
        min_size=1,
        max_size=6,
    )
)
def test_no_answer_is_lost_changed_or_counted_twice(rows):
    found = load_candidates([{"prompt": p, "answers": answers} for p, answers in rows])
    assert [(c.prompt.text, c.text) for c in found] == [(p, a) for p, some in rows for a in some]
    assert len({c.candidate_id for c in found}) == len(found)
