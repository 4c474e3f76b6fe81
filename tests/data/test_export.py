"""Files for other stacks: rows as their documentation shows, their rules, what is left out and why."""

import json
from typing import get_args

import datasets
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.export import REASONS, check_export, export_preferences
from prefopt.data.export_formats import FORMATS, FormatName, encode_row, row_problems
from prefopt.data.preference_data import load_preferences
from prefopt.data.records import write_records
from prefopt.errors import DataError
from prefopt.types import (
    Candidate,
    LeftOut,
    Message,
    Preference,
    PreferenceGroup,
    Prompt,
)
from tests.tiny_models import tiny_tokenizer

TURNS = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hello!"),
    Message("user", "What is 2+2? ❄️ 日本"),
)
CHAT = [{"role": m.role, "content": m.content} for m in TURNS]
BLOCKS = [{"role": m.role, "content": [{"text": m.content}]} for m in TURNS[1:]]
YES = {"role": "assistant", "content": "4."}
NO = {"role": "assistant", "content": "Five,\nI believe."}
CONVERSE = {"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "Be brief."}]}
EXPECTED = {
    "sft": {"messages": [*CHAT, YES]},
    "trl": {"prompt": CHAT, "chosen": [YES], "rejected": [NO]},
    "axolotl": {"messages": CHAT, "chosen": YES, "rejected": NO},
    "llama-factory": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello!"},
            {"from": "human", "value": "What is 2+2? ❄️ 日本"},
        ],
        "chosen": {"from": "gpt", "value": "4."},
        "rejected": {"from": "gpt", "value": "Five,\nI believe."},
    },
    "openai-sft": {"messages": [*CHAT, YES]},
    "openai-preference": {
        "input": {"messages": CHAT},
        "preferred_output": [YES],
        "non_preferred_output": [NO],
    },
    "bedrock-claude": {"system": "Be brief.", "messages": [*CHAT[1:], YES]},
    "bedrock-llama": {
        **CONVERSE,
        "messages": [*BLOCKS, {"role": "assistant", "content": [{"text": "4."}]}],
    },
    "bedrock-nova": {
        **CONVERSE,
        "messages": [*BLOCKS, {"role": "assistant", "content": [{"text": "4."}]}],
    },
    "nova-preference": {
        **CONVERSE,
        "messages": [
            *BLOCKS,
            {
                "role": "assistant",
                "candidates": [
                    {"content": [{"text": "4."}], "preferenceLabel": "preferred"},
                    {"content": [{"text": NO["content"]}], "preferenceLabel": "non-preferred"},
                ],
            },
        ],
    },
}
TEXTS = {"trl-text"}


def rows(count=120, **changed):
    return [
        {"prompt": f"Question {i}?", "chosen": f"Answer {i}.", "rejected": "Well.", **changed}
        for i in range(count)
    ]


def group(prompt, answers, *preferences, finish_reasons=None):
    prompt = Prompt.from_text(prompt)
    ends = finish_reasons or ["stop"] * len(answers)
    return PreferenceGroup(
        prompt=prompt,
        answers=tuple(
            Candidate(prompt=prompt, text=text, model="m", finish_reason=end)
            for text, end in zip(answers, ends, strict=True)
        ),
        preferences=tuple(Preference(chosen=c, rejected=r, p_chosen=p) for c, r, p in preferences),
    )


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def problems_of(data, path, form, **options):
    with pytest.raises(DataError) as refused:
        export_preferences(data, path, format=form, **options)
    assert not path.exists()
    return refused.value.problems


# --- the rows ----------------------------------------------------------------------------------------


def test_every_format_but_the_plain_one_has_an_expected_row():
    assert set(EXPECTED) | TEXTS == set(FORMATS) == set(get_args(FormatName))


@pytest.mark.parametrize("form", EXPECTED)
def test_a_row_is_what_the_stack_documents(form):
    row = FORMATS[form].make(TURNS, "4.", NO["content"])
    line = encode_row(row)
    assert json.loads(line) == EXPECTED[form]
    assert b"\n" not in line
    assert row_problems(FORMATS[form], line) == []
    said = FORMATS[form].read(msgspec.json.decode(line, type=FORMATS[form].row))
    assert said.turns == TURNS
    texts = ["4."] if FORMATS[form].kind == "sft" else ["4.", NO["content"]]
    assert [answer.content for answer in said.answers] == texts


@pytest.mark.parametrize("form", ["bedrock-claude", "bedrock-llama", "nova-preference"])
def test_without_a_system_message_the_key_is_not_there(form):
    line = encode_row(FORMATS[form].make(TURNS[1:], "a", "b"))
    assert "system" not in json.loads(line)
    assert row_problems(FORMATS[form], line) == []


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=3, max_size=3))
def test_every_text_survives(form, texts):
    prompt, chosen, rejected = texts
    line = encode_row(FORMATS[form].make((Message("user", prompt),), chosen, rejected))
    assert b"\n" not in line
    said = FORMATS[form].read(msgspec.json.decode(line, type=FORMATS[form].row))
    kept = texts[:2] if FORMATS[form].kind == "sft" else texts
    assert [m.content for m in (*said.turns, *said.answers)] == kept


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_written_checked_and_read_by_datasets(form, tmp_path):
    path = tmp_path / "out.jsonl"
    made = export_preferences(rows(), path, format=form)
    assert (made.rows, made.left_out, made.format) == (120, {}, form)
    assert check_export(path, format=form) == 120
    loaded = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(loaded) == 120


@pytest.mark.parametrize("form", ["trl", "trl-text"])
def test_trl_files_come_back_as_the_same_preferences(form, tmp_path):
    path = tmp_path / "out.jsonl"
    export_preferences(rows(3, p_chosen=0.8), path, format=form)
    groups = load_preferences(path)
    assert [g.prompt.text for g in groups] == [f"Question {i}?" for i in range(3)]
    ((chosen, rejected, preference),) = groups[0].pairs()
    assert (chosen.text, rejected.text) == ("Answer 0.", "Well.")
    assert preference.p_source == "given"


@pytest.mark.parametrize("form", ["trl", "trl-text", "sft"])
def test_trl_s_own_data_utilities_take_the_file(form, tmp_path):
    from trl.data_utils import (
        apply_chat_template,
        is_conversational,
        maybe_apply_chat_template,
        maybe_extract_prompt,
    )

    path = tmp_path / "out.jsonl"
    export_preferences(rows(3), path, format=form)
    loaded = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    tokenizer = tiny_tokenizer("chatml")
    example = loaded[0]
    assert is_conversational(example) == (form != "trl-text")
    if form == "sft":
        text = apply_chat_template(example, tokenizer)["text"]
        assert text.endswith("Answer 0.<|im_end|>\n")
        return
    assert maybe_extract_prompt(example) == example  # the prompt is explicit already
    told = maybe_apply_chat_template(example, tokenizer)
    assert set(told) == {"prompt", "chosen", "rejected"}
    assert "Question 0?" in told["prompt"]
    assert told["chosen"].startswith("Answer 0.")
    assert told["rejected"].startswith("Well.")


def test_a_huge_line_is_written_whole_and_read_again(tmp_path):
    path = tmp_path / "out.jsonl"
    long = "word " * 2_500_000
    export_preferences(rows(2, rejected=long), path, format="trl")
    loaded = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded[1]["rejected"][0]["content"] == long


# --- LLaMA-Factory's list ----------------------------------------------------------------------------


def test_llama_factory_gets_its_entry_beside_those_that_are_there(tmp_path):
    info = tmp_path / "dataset_info.json"
    info.write_text('{"mine": {"file_name": "älter.json"}}')
    for count in (3, 4):
        made = export_preferences(rows(count), tmp_path / "prefs.jsonl", format="llama-factory")
    assert made.also_wrote == (str(info),)
    found = json.loads(info.read_text(encoding="utf-8"))
    assert found["mine"] == {"file_name": "älter.json"}
    entry = found["prefs"]
    assert (entry["file_name"], entry["formatting"], entry["ranking"]) == (
        "prefs.jsonl",
        "sharegpt",
        True,
    )
    first = lines(tmp_path / "prefs.jsonl")[0]
    assert set(entry["columns"].values()) == set(first)
    turn = first[entry["columns"]["messages"]][0]
    assert turn[entry["tags"]["role_tag"]] == entry["tags"]["user_tag"]


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"prefs": {"file_name": "other.jsonl"}}', '{"prefs": {"hf_hub_url": "a/b"}}'],
)
def test_a_list_that_cannot_be_added_to_is_left_alone(content, tmp_path):
    info = tmp_path / "dataset_info.json"
    info.write_text(content)
    with pytest.raises(DataError, match=r"dataset_info\.json"):
        export_preferences(rows(3), tmp_path / "prefs.jsonl", format="llama-factory")
    assert info.read_text() == content
    assert not (tmp_path / "prefs.jsonl").exists()


# --- what is left out --------------------------------------------------------------------------------


def test_what_has_no_winner_is_left_out_and_counted(tmp_path):
    path = tmp_path / "out.jsonl"
    groups = [
        group("one", ["a", "b"], (0, 1, 0.9)),
        group("two", ["a", "b"], (0, 1, 0.5)),
        group("three", ["a", "b"], (0, 1, 0.2)),
        group("four", ["a", "b"], (0, 1, 0.6)),
        group("five", ["same", "same"], (0, 1, 0.9)),
        group("six", ["a", "b"]),
    ]
    made = export_preferences(groups, path, format="trl", min_p=0.7)
    assert made.left_out == {
        "tie": 1,
        "more_likely_wrong": 1,
        "below_min_p": 1,
        "identical_answers": 1,
        "no_preference": 1,
    }
    assert [row["prompt"][0]["content"] for row in lines(path)] == ["one"]
    assert "left out, tie: 1 (p_chosen is 0.5" in str(made)
    assert set(made.left_out) <= set(REASONS)


def test_only_answers_worth_imitating_are_examples(tmp_path):
    path = tmp_path / "out.jsonl"
    groups = [
        group("one", ["best", "middle", "worst"], (0, 1, 0.9), (1, 2, 0.9), (0, 2, 0.9)),
        group("two", ["long", "b"], (0, 1, 1.0), finish_reasons=["length", "stop"]),
        group("three", ["a", "b"], (0, 1, 0.9), (1, 0, 0.4)),
    ]
    made = export_preferences(groups, path, format="sft")
    assert [row["messages"][-1]["content"] for row in lines(path)] == ["best", "a"]
    assert made.left_out == {
        "also_rejected": 1,
        "already_written": 1,
        "cut_off": 1,
        "more_likely_wrong": 1,
    }
    assert export_preferences(groups, path, format="trl").rows == 5


@pytest.mark.parametrize("records", [True, False], ids=["a run's groups", "a job's rows"])
def test_the_folder_of_a_run_or_a_job_tells_what_was_left_out_before(records, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    if records:
        write_records(folder / "preferences.jsonl", [group("q", ["a", "b"], (0, 1, 0.9))])
    else:
        (folder / "preferences.jsonl").write_text(json.dumps(rows(1)[0]))
    write_records(
        folder / "left_out.jsonl",
        [
            LeftOut(prompt_id="p", comparison_id=str(i), reason=reason)
            for i, reason in enumerate(["tie", "flipped", "tie"])
        ],
    )
    made = export_preferences(folder, tmp_path / "out.jsonl", format="axolotl")
    assert made.rows == 1
    assert made.left_out_before == {"tie": 2, "flipped": 1}
    assert "left out when the labels were made, tie: 2" in str(made)


def test_a_folder_without_labels_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no preferences\.jsonl"):
        export_preferences(tmp_path, tmp_path / "out.jsonl", format="trl")


# --- what a stack would not take ---------------------------------------------------------------------


def test_all_problems_are_told_at_once_and_nothing_is_written(tmp_path):
    data = [
        {
            "prompt": [*CHAT[:2], {"role": "user", "content": "And?"}],
            "chosen": "a",
            "rejected": "b",
        },
        {"prompt": "q", "chosen": " ", "rejected": "b"},
        {"prompt": "User: q", "chosen": "a [EOS]", "rejected": "b"},
    ]
    path = tmp_path / "out.jsonl"
    found = problems_of(data, path, "bedrock-nova")
    assert len(found) == 5
    assert found[0].startswith("preference 1 (prompt ")
    assert '"And?")' in found[0]
    assert "user and assistant in turn" in found[0]
    assert "message 2 (assistant) is empty" in found[1]
    assert "message 1 (user) holds User:, reserved by bedrock-nova" in found[2]
    assert "[EOS]" in found[3]
    assert "takes 8 rows or more, got 3" in found[4]


def test_unfit_rows_can_be_left_out_and_are_counted(tmp_path, caplog):
    path = tmp_path / "out.jsonl"
    data = [*rows(3), {"prompt": "q", "chosen": "", "rejected": "b"}]
    made = export_preferences(data, path, format="axolotl", unfit="leave_out")
    assert (made.rows, made.left_out) == (3, {"unfit": 1})
    assert "preference 4" in caplog.text


@pytest.mark.parametrize(
    ("form", "prompt", "said"),
    [
        ("trl-text", CHAT, "a plain text has no roles"),
        ("llama-factory", [CHAT[1], {"role": "tool", "content": "3"}], "tool message"),
        ("openai-sft", [CHAT[1], {"role": "tool", "content": "3"}], "openai-sft takes system, user"),
        ("bedrock-claude", [CHAT[1], CHAT[0]], "has a system message after the first one"),
        ("bedrock-claude", [CHAT[1], CHAT[1]], "user and assistant in turn"),
        ("bedrock-claude", [CHAT[0]], "got no message"),
        ("llama-factory", [CHAT[2], CHAT[1]], "user and assistant in turn"),
        ("llama-factory", [CHAT[1], CHAT[0], *CHAT[2:]], "system message after the first"),
        ("openai-preference", [{"role": "user", "content": "x"}, {"role": "user", "content": ""}],
         "message 2 (user) is empty"),
    ],
)  # fmt: skip
def test_prompts_that_a_stack_has_no_form_for(form, prompt, said, tmp_path):
    data = [*rows(), {"prompt": prompt, "chosen": "a", "rejected": "b"}]
    (problem,) = problems_of(data, tmp_path / "out.jsonl", form)
    assert problem.startswith("preference 121")
    assert said in problem


@pytest.mark.parametrize(
    ("form", "count", "said"),
    [
        ("openai-sft", 9, "10 rows or more, got 9"),
        ("openai-preference", 9, "10 rows or more, got 9"),
        ("bedrock-claude", 31, "32 rows or more, got 31"),
        ("bedrock-claude", 10_001, "at most 10,000 rows, got 10,001"),
        ("bedrock-llama", 99, "100 rows or more, got 99"),
        ("bedrock-nova", 20_001, "at most 20,000 rows, got 20,001"),
    ],
)
def test_the_number_of_rows_that_a_stack_takes(form, count, said, tmp_path):
    (problem,) = problems_of(rows(count), tmp_path / "out.jsonl", form)
    assert said in problem


def test_a_row_that_is_surely_too_long_for_claude(tmp_path):
    data = rows(40)
    data[7]["chosen"] = "x" * 200_000
    (problem,) = problems_of(data, tmp_path / "out.jsonl", "bedrock-claude")
    assert problem.startswith("preference 8 ")
    assert "at most 192,000 (32,000 tokens of 6)" in problem


def test_a_file_that_is_too_big_for_openai(tmp_path, monkeypatch):
    small = FORMATS["openai-sft"]._replace(max_file_bytes=1_000)
    monkeypatch.setitem(FORMATS, "openai-sft", small)
    (problem,) = problems_of(rows(20), tmp_path / "out.jsonl", "openai-sft")
    assert "at most 1,000 bytes" in problem


def test_half_a_surrogate_pair_is_told_not_written(tmp_path):
    data = [group("q", ["a \ud83d b", "c"], (0, 1, 0.9))]
    (problem,) = problems_of(data, tmp_path / "out.jsonl", "trl")
    assert "not Unicode" in problem


def test_nothing_to_write_is_an_error_that_says_what_was_left_out(tmp_path):
    data = [group("q", ["a", "b"], (0, 1, 0.5))]
    with pytest.raises(DataError, match=r"Left out: tie 1\.") as refused:
        export_preferences(data, tmp_path / "out.jsonl", format="trl")
    assert "takes 1 row or more, got 0" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "trll"}, "no export format 'trll'; there are sft, trl"),
        ({"format": "trl", "min_p": 0.4}, "min_p must be in"),
        ({"format": "trl", "min_p": float("nan")}, "min_p must be in"),
        ({"format": "trl", "unfit": "drop"}, "unfit must be"),
    ],
)
def test_wrong_arguments(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        export_preferences(rows(1), tmp_path / "out.jsonl", **options)
    with pytest.raises(ValueError, match=r"\.jsonl files"):
        export_preferences(rows(1), tmp_path / "out.json", format="trl")


def test_a_folder_that_cannot_be_written_to(locked_folder):
    with pytest.raises(DataError, match="cannot write"):
        export_preferences(rows(1), locked_folder / "out.jsonl", format="trl")


# --- somebody's own files ----------------------------------------------------------------------------


def test_a_file_is_checked_line_by_line(tmp_path):
    path = tmp_path / "own.jsonl"
    good = json.dumps(EXPECTED["bedrock-claude"])
    bad = [
        "{",
        "[]",
        good.replace('"system"', '"System"'),
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": []}',
        '{"messages": [{"role": "human", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": [{"text": "a"}]}]}',
    ]
    path.write_text("\n".join([good] * 31 + ["", *bad]) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as refused:
        check_export(path, format="bedrock-claude")
    found = refused.value.problems
    assert {p.split(":")[0] for p in found} == {f"line {n}" for n in range(33, 40)}
    assert any("Object contains unknown field `System`" in p for p in found)
    assert any("expected an assistant message last, got user" in p for p in found)
    path.write_bytes(b"\n".join([good.encode()] * 32).replace(b"\n", b"\r\n"))
    assert check_export(path, format="bedrock-claude") == 32


def test_a_file_that_is_empty_missing_or_not_text(tmp_path):
    path = tmp_path / "own.jsonl"
    with pytest.raises(DataError, match="No such file"):
        check_export(path, format="sft")
    path.write_text("\n\n")
    with pytest.raises(DataError, match="takes 1 row or more, got 0"):
        check_export(path, format="sft")
    path.write_bytes(b'\xff\xfe{"messages"')
    with pytest.raises(DataError, match="line 1: "):
        check_export(path, format="sft")
    with pytest.raises(ValueError, match="no export format"):
        check_export(path, format="x")


@pytest.mark.parametrize(
    "candidates", [["preferred"], ["preferred", "preferred"], ["non-preferred"] * 2, None]
)
def test_nova_s_candidates_are_one_of_each(candidates):
    turn = {"role": "assistant", "content": [{"text": "a"}]}
    if candidates is not None:
        turn = {
            "role": "assistant",
            "candidates": [{"content": [{"text": "a"}], "preferenceLabel": c} for c in candidates],
        }
    line = json.dumps({**CONVERSE, "messages": [BLOCKS[0], turn]}).encode()
    (problem,) = row_problems(FORMATS["nova-preference"], line)
    assert "candidate" in problem
