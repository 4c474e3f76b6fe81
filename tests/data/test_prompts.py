import hashlib
import json
import logging

import datasets
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.prompts import load_prompts, plain_texts, split_by_prompt
from prefopt.data.records import write_records
from prefopt.errors import DataError
from prefopt.types import Candidate, Message, Prompt

SKY = Prompt.from_text("Why is the sky blue?", "explain")
SEA = Prompt.from_text("Is the sea deep?")


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(prompts):
    return [p.text for p in prompts]


# --- sources


def test_the_built_in_prompts_are_distinct_and_all_have_a_category():
    prompts = load_prompts("everyday")
    assert len(prompts) > 100
    assert len({p.prompt_id for p in prompts}) == len(prompts)
    assert all(p.category for p in prompts)


def test_the_built_in_texts_are_prose():
    passages = plain_texts()
    assert len(passages) >= 10
    assert all(len(passage.split()) > 50 for passage in passages)


ROWS = [
    {"prompt": "Why is the sky blue?", "category": "explain"},
    {"prompt": [{"role": "user", "content": "Is the sea deep?"}], "category": None},
]


def test_jsonl_and_json_files_hold_rows(tmp_path):
    jsonl = write_lines(tmp_path / "p.jsonl", *ROWS)
    array = tmp_path / "p.json"
    array.write_text(json.dumps(ROWS, indent=1))
    lines = tmp_path / "lines.json"
    lines.write_bytes(jsonl.read_bytes())
    for path in (jsonl, str(jsonl), array, lines):
        assert load_prompts(path) == [SKY, SEA]
        assert load_prompts(path)[0].category == "explain"


def test_a_text_file_holds_a_prompt_a_line_and_blank_lines_separate(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfWhy is the sky blue?\r\n\n  \nIs the sea\xe2\x80\xa8deep?\n")
    assert texts(load_prompts(path)) == ["Why is the sky blue?", "Is the sea\u2028deep?"]


def test_parquet_files_and_datasets_hold_rows(tmp_path):
    turns = [
        [{"role": "user", "content": "Why is the sky blue?", "name": None}],
        [
            {"role": "user", "content": "Is the sea deep?", "name": None},
            {"role": "assistant", "content": "Yes.", "name": None},
        ],
    ]
    dataset = datasets.Dataset.from_dict({"messages": turns, "category": ["explain", ""]})
    path = tmp_path / "p.parquet"
    dataset.to_parquet(path)
    for source in (dataset, path, datasets.DatasetDict(train=dataset)):
        assert load_prompts(source) == [SKY, SEA]


def test_sequences_hold_texts_messages_prompts_or_rows():
    source = [
        SKY,
        "Is the sea deep?",
        [{"role": "system", "content": "Be kind."}, Message("user", "Hello!")],
        {"prompt": "One more?"},
    ]
    loaded = load_prompts(source)
    assert loaded[:2] == [SKY, SEA]
    assert [m.role for m in loaded[2].messages] == ["system", "user"]
    assert loaded[3] == Prompt.from_text("One more?")


def test_prefopt_s_own_records_come_back_as_they_were(tmp_path):
    path = tmp_path / "p.jsonl"
    write_records(path, [SKY, SEA])
    assert load_prompts(path) == [SKY, SEA]


def test_a_hub_id_goes_to_datasets_with_its_split(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS[:1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_prompts("someone/prompts", split="test[:10]") == [SKY]
    assert asked == [("someone/prompts", "test[:10]")]


def test_what_the_hub_refuses_is_a_data_error_with_its_words(monkeypatch):
    def load_dataset(name, split):
        raise ValueError("Config name is missing: ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"someone/prompts.*Config name is missing.*pass the Dat"):
        load_prompts("someone/prompts")


def test_a_missing_split_of_a_dataset_dict_names_those_there_are():
    source = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[:1]))
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        load_prompts(source, split="test")


def test_limit_counts_distinct_prompts():
    assert texts(load_prompts(["a", "a", "b", "c"], limit=2)) == ["a", "b"]
    with pytest.raises(ValueError, match="at least 1"):
        load_prompts(["a"], limit=0)


# --- bad sources


def test_a_missing_file_is_named(tmp_path):
    for source in (tmp_path / "nowhere.jsonl", str(tmp_path / "x.parquet"), tmp_path / "folder"):
        with pytest.raises(DataError, match="cannot read"):
            load_prompts(source)


@pytest.mark.parametrize("name", ["everydya", "a name with spaces", "prompts.xls", "a/b/c"])
def test_a_name_that_is_no_source_says_what_would_be_one(name):
    with pytest.raises(DataError, match=r"not an existing file .* and not a Hub dataset id"):
        load_prompts(name)


def test_a_file_of_an_unknown_kind_and_a_folder_are_refused(tmp_path):
    (tmp_path / "p.xls").write_text("prompt\nHello\n")
    with pytest.raises(DataError, match=r"expected one of \.jsonl"):
        load_prompts(tmp_path / "p.xls")
    with pytest.raises(DataError, match="is a folder"):
        load_prompts(tmp_path)
    with pytest.raises(DataError, match="put it in a list"):
        load_prompts({"prompt": "Hello"})


@pytest.mark.parametrize(
    ("name", "content"), [("p.jsonl", b""), ("p.txt", b"\n \n"), ("p.json", b"[]")]
)
def test_an_empty_file_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="is empty"):
        load_prompts(tmp_path / name)
    with pytest.raises(DataError, match="the given rows is empty"):
        load_prompts([])


def test_a_broken_parquet_file_is_an_error(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="as Parquet"):
        load_prompts(tmp_path / "p.parquet")


def test_text_in_another_encoding_says_where_and_how_to_convert(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "ok"}\n{"prompt": "caf\xe9"}\n')
    # line 1 has 16 characters and a line break, then 15 characters come before the byte
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    assert caught.value.problems == ["line 2: not UTF-8 at byte 32 of the text (0xe9)"]
    assert "iconv -f ISO-8859-1 -t UTF-8" in str(caught.value)

    array = tmp_path / "p.json"
    array.write_bytes(b'[{"prompt": "ok"},\n{"prompt": "caf\xe9"}]')
    with pytest.raises(DataError, match=r"line 2: not UTF-8 at byte 34") as caught:
        load_prompts(array)
    assert "iconv -f ISO-8859-1" in str(caught.value)

    wide = tmp_path / "wide.txt"
    wide.write_text("Hello", encoding="utf-16")
    with pytest.raises(DataError, match=r"UTF-16 text.*iconv -f UTF-16"):
        load_prompts(wide)


def test_a_broken_json_array_says_where(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('[{"prompt": "a"},\n {"prompt" "b"}]')
    with pytest.raises(DataError, match="line 2, column 12: malformed JSON"):
        load_prompts(path)


def test_a_table_without_a_prompt_column_lists_the_columns_it_has():
    with pytest.raises(DataError, match="found `question`, `answer`"):
        load_prompts([{"question": "Why?", "answer": "So."}, {"question": "How?"}])


def test_all_bad_rows_are_listed_at_once_with_their_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [
        '{"prompt": "fine"}',
        "{broken",
        '{"prompt": "  "}',
        "",
        '{"prompt": 7}',
        '{"text": "wrong column"}',
        '{"prompt": "a", "category": 3}',
        '{"prompt": [{"role": "assistant", "content": "Hi"}]}',
        '{"prompt": [{"role": "user"}]}',
        '{"prompt": [{"role": "user", "content": "a", "tool_calls": [1]}]}',
        '{"messages": [{"role": "assistant", "content": "Hi"}]}',
        '{"prompt": null}',
        "[]",
        "7",
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    said = dict(problem.split(": ", 1) for problem in caught.value.problems)
    bad_lines = [2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert sorted(said, key=lambda s: int(s.split()[1])) == [f"line {n}" for n in bad_lines]
    assert "malformed JSON" in said["line 2"]
    assert "only empty messages" in said["line 3"]
    assert "got int (7)" in said["line 5"]
    assert "`text`" in said["line 6"]
    assert "category must be text" in said["line 7"]
    assert "must end with a user" in said["line 8"]
    assert "message 0" in said["line 9"]
    assert "content" in said["line 9"]
    assert "tool_calls" in said["line 10"]
    assert "at least one message" in said["line 11"]
    assert "no prompt in this row" in said["line 12"]
    assert "12 row(s)" in str(caught.value)


def test_a_record_of_another_kind_or_with_a_wrong_id_is_refused(tmp_path):
    candidate = Candidate(prompt=SKY, text="Light.", model="m")
    edited = msgspec.to_builtins(SKY) | {"prompt_id": "0" * 16}
    path = write_lines(tmp_path / "p.jsonl", msgspec.to_builtins(candidate), edited)
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    assert "prefopt.candidate/1" in caught.value.problems[0]
    assert "does not belong to the messages" in caught.value.problems[1]


def test_text_that_cannot_be_written_to_a_file_is_a_bad_row():
    with pytest.raises(DataError, match=r"row 0.*surrogates"):
        load_prompts(["half a \ud800 pair"])


def test_repeated_prompts_are_kept_once_and_their_rows_named(caplog):
    with caplog.at_level(logging.WARNING):
        prompts = load_prompts(["a", "b", "a", {"prompt": "b", "category": "x"}])
    assert texts(prompts) == ["a", "b"]
    assert "2 row(s) repeat an earlier prompt and were left out: row 2, row 3." in caplog.text


def test_no_warning_without_repetition(caplog):
    load_prompts(["a", "b"])
    assert caplog.text == ""


# --- splitting

distinct_prompts = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from(["", "x", "y"])),
    min_size=2,
    max_size=40,
    unique_by=lambda pair: pair[0],
).map(lambda pairs: [Prompt.from_text(f"prompt {n}", category) for n, category in pairs])


def numbered(n, category=""):
    return [Prompt.from_text(f"{category} prompt {i}", category) for i in range(n)]


@given(prompts=distinct_prompts, seed=st.integers(0, 3), data=st.data())
def test_a_split_keeps_every_prompt_once_in_order_and_holds_out_the_count(prompts, seed, data):
    count = data.draw(st.integers(1, len(prompts) - 1))
    train, held_out = split_by_prompt(prompts, held_out=count, seed=seed)
    assert len(held_out) == count
    assert {p.prompt_id for p in train} | {p.prompt_id for p in held_out} == {
        p.prompt_id for p in prompts
    }
    assert len(train) + len(held_out) == len(prompts)
    assert sorted(train, key=prompts.index) == train
    assert sorted(held_out, key=prompts.index) == held_out


@given(prompts=distinct_prompts, order=st.randoms(use_true_random=False))
def test_the_order_of_the_prompts_does_not_change_the_split(prompts, order):
    _, held_out = split_by_prompt(prompts, held_out=1, seed=0)
    shuffled = list(prompts)
    order.shuffle(shuffled)
    assert split_by_prompt(shuffled, held_out=1, seed=0)[1] == held_out


@given(n=st.integers(3, 40), count=st.integers(1, 2), new=st.integers(1000, 2000))
def test_adding_a_prompt_moves_at_most_one_other_and_only_into_training(n, count, new):
    prompts = numbered(n)
    _, before = split_by_prompt(prompts, held_out=count, seed=5)
    more = [*prompts, Prompt.from_text(f"prompt {new}")]
    _, after = split_by_prompt(more, held_out=count, seed=5)
    old = [p for p in after if p in prompts]
    assert all(p in before for p in old)
    assert len(before) - len(old) <= 1


def test_the_seed_changes_the_split_and_the_split_is_the_same_everywhere():
    prompts = numbered(20)
    splits = {tuple(texts(split_by_prompt(prompts, held_out=5, seed=seed)[1])) for seed in range(5)}
    assert len(splits) == 5
    # Worked out by hand from the documented hash, so that no other process can split otherwise.
    by_hash = sorted(
        prompts, key=lambda p: hashlib.sha256(f'[7,"{p.prompt_id}"]'.encode()).hexdigest()
    )
    _, held_out = split_by_prompt(prompts, held_out=3, seed=7)
    assert set(held_out) == set(by_hash[:3])


def test_every_category_gives_its_share():
    prompts = numbered(40, "a") + numbered(20, "b") + numbered(10, "c")
    _, held_out = split_by_prompt(prompts, held_out=0.1, seed=3)
    counts = {name: sum(p.category == name for p in held_out) for name in "abc"}
    assert counts == {"a": 4, "b": 2, "c": 1}


def test_copies_of_a_prompt_stay_on_one_side():
    prompts = numbered(6) * 3
    train, held_out = split_by_prompt(prompts, held_out=2, seed=0)
    assert len(held_out) == 6
    assert not {p.prompt_id for p in train} & {p.prompt_id for p in held_out}


@pytest.mark.parametrize("held_out", [0, -1, 0.0, 1.0, 1.5])
def test_a_senseless_held_out_is_a_wrong_argument(held_out):
    with pytest.raises(ValueError, match="held_out must be"):
        split_by_prompt(numbered(4), held_out=held_out, seed=0)


@pytest.mark.parametrize(
    ("n", "held_out", "side"), [(4, 4, "training"), (4, 9, "training"), (4, 0.1, "held-out")]
)
def test_an_empty_side_is_an_error(n, held_out, side):
    with pytest.raises(DataError, match=f"the {side} side of the split would be empty"):
        split_by_prompt(numbered(n), held_out=held_out, seed=0)
