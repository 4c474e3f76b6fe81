import json

import datasets
import huggingface_hub
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.dataset_card import COLUMNS
from prefopt.data.preference_data import (
    dataset_card,
    load_preferences,
    preference_rows,
    push_preferences,
    save_preferences,
    to_dataset,
)
from prefopt.data.records import write_records
from prefopt.errors import DataError
from prefopt.types import Candidate, LeftOut, Message, Preference, PreferenceGroup, Prompt

USER = {"role": "user", "content": "What colour is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
SKY = Prompt.from_text("What colour is the sky?")


def only_pair(source):
    (group,) = load_preferences(source)
    ((chosen, rejected, preference),) = group.pairs()
    return group.prompt, chosen, rejected, preference


def group_of(prompt, answers, *preferences, **candidate):
    made = tuple(Candidate(prompt=prompt, text=t, model="m", **candidate) for t in answers)
    return PreferenceGroup(
        prompt=prompt,
        answers=made,
        preferences=tuple(
            Preference(chosen=c, rejected=r, p_chosen=p, margin=2.0) for c, r, p in preferences
        ),
    )


# --- the formats


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER["content"], "chosen": "It is blue.", "rejected": "It is green."},
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [USER], "chosen": "It is blue.", "rejected": "It is green."},
        {"prompt": USER["content"], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": None, "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": USER["content"], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
    ],
    ids=[
        "texts",
        "messages",
        "messages and texts",
        "text and messages",
        "null prompt",
        "implied prompt",
        "prompt repeated as text",
        "prompt repeated",
    ],
)
def test_every_trl_preference_format_gives_the_same_pair(row):
    prompt, chosen, rejected, preference = only_pair([row])
    assert prompt == SKY
    assert (chosen.text, rejected.text) == ("It is blue.", "It is green.")
    assert preference == Preference(chosen=0, rejected=1, p_chosen=1.0, p_source="given")
    assert (chosen.model, chosen.finish_reason) == ("unknown", "unknown")


def test_a_system_message_repeated_before_the_prompt_belongs_to_it():
    system = {"role": "system", "content": "Be brief."}
    row = {
        "prompt": USER["content"],
        "chosen": [system, USER, BLUE],
        "rejected": [system, USER, GREEN],
    }
    prompt, *_ = only_pair([row])
    assert [m.role for m in prompt.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("The sky is blue", "The sky is blue and wide", "The sky is"),
        (
            "\n\nHuman: Hi\n\nAssistant: I am well",
            "\n\nHuman: Hi\n\nAssistant: I am not",
            "\n\nHuman: Hi\n\nAssistant:",
        ),
        (
            "Human: a\nAssistant: b\nHuman: c\nAssistant: d",
            "Human: a\nAssistant: b\nHuman: c\nAssistant: e",
            "Human: a\nAssistant: b\nHuman: c\nAssistant:",
        ),
        ("Ask an Assistant: one\nyes, I can", "Ask an Assistant: one\nyes, we can", None),
    ],
)
def test_an_implied_text_prompt_is_cut_back_to_where_a_person_would_cut(chosen, rejected, prompt):
    if prompt is None:  # a line break, not the word in the middle of a line
        prompt = "Ask an Assistant: one\n"
    found, first, second, _ = only_pair([{"chosen": chosen, "rejected": rejected}])
    assert found.text == prompt
    assert first.text == chosen.removeprefix(prompt)
    assert second.text == rejected.removeprefix(prompt)


words = st.text(st.sampled_from("ab \n"), max_size=12)


@given(prompt=words, chosen=words, rejected=words)
def test_an_implied_text_prompt_loses_no_character(prompt, chosen, rejected):
    row = {"chosen": "start " + prompt + chosen, "rejected": "start " + prompt + rejected}
    if "start " in (row["chosen"], row["rejected"]):
        # An answer must be left, and before "start" there is no place to cut.
        with pytest.raises(DataError, match="share no beginning"):
            only_pair([row])
        return
    found, first, second, _ = only_pair([row])
    assert found.text + first.text == row["chosen"]
    assert found.text + second.text == row["rejected"]
    assert first.text
    assert second.text


def test_optional_columns_are_kept():
    row = {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "p_chosen": 0.75,
        "margin": 1,
        "category": "ideas",
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "length",
        "chosen_model": "big",
        "rejected_model": None,
        "score": "a column of someone else's",
        "prompt_id": "someone else's id",
    }
    prompt, chosen, rejected, preference = only_pair([row])
    assert prompt == Prompt.from_text("p", "ideas")
    assert (chosen.finish_reason, rejected.finish_reason) == ("stop", "length")
    assert (chosen.model, rejected.model) == ("big", "unknown")
    assert preference == Preference(
        chosen=0, rejected=1, p_chosen=0.75, p_source="given", margin=1.0
    )


def test_rows_with_the_same_prompt_become_one_group_wherever_they_are():
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "b", "rejected": "c"},
        {"prompt": "p", "chosen": "c", "rejected": "a"},
    ]
    first, second = load_preferences(rows)
    assert [a.text for a in first.answers] == ["a", "b", "c"]
    assert [(p.chosen, p.rejected) for p in first.preferences] == [(0, 1), (1, 2), (2, 0)]
    assert second.prompt.text == "q"


def test_answers_are_one_only_if_everything_they_carry_is_equal():
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_finish_reason": "length"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_finish_reason": "stop"},
    ]
    (group,) = load_preferences(rows)
    assert [(a.text, a.finish_reason) for a in group.answers] == [
        ("a", "length"),
        ("b", "unknown"),
        ("a", "stop"),
    ]


def test_identical_answers_are_loaded_so_that_preflight_can_report_them():
    row = {"prompt": "p", "chosen": "a", "rejected": "a"}
    (group,) = load_preferences([row, row])
    assert len(group.answers) == 2
    assert [(p.chosen, p.rejected) for p in group.preferences] == [(0, 1), (0, 1)]


# --- sources


def test_files_datasets_and_records_are_read(tmp_path):
    row = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}
    expected = load_preferences([row])
    dataset = datasets.Dataset.from_list([row])
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    (tmp_path / "p.json").write_text(json.dumps([row]))
    dataset.to_parquet(tmp_path / "p.parquet")
    write_records(tmp_path / "groups.jsonl", expected)
    for name in ("p.jsonl", "p.json", "p.parquet", "groups.jsonl"):
        assert load_preferences(tmp_path / name) == expected
    assert load_preferences(dataset) == expected
    assert load_preferences(expected) == expected


def test_a_hub_id_goes_to_datasets(monkeypatch):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_preferences("someone/pairs", split="train_prefs") == load_preferences([row])
    assert asked == [("someone/pairs", "train_prefs")]


# --- bad rows


def test_all_bad_rows_are_listed_at_once_with_their_lines(tmp_path):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    other = Prompt.from_text("other")
    stranger = msgspec.structs.replace(
        group_of(SKY, ["a", "b"], (0, 1, 1.0)),
        answers=tuple(Candidate(prompt=other, text=t, model="m") for t in "ab"),
    )
    cases = [
        (good, None),
        ({"prompt": "p", "chosen": "a"}, "no `rejected`; the row has `prompt`, `chosen`"),
        ({**good, "chosen": None}, "no `chosen`"),
        ({**good, "chosen": 7}, "`chosen`: expected text or a list of messages, got int (7)"),
        ({**good, "prompt": ""}, "only empty messages"),
        ({**good, "prompt": [BLUE]}, "must end with a user"),
        ({**good, "p_chosen": 1.5}, "<= 1.0"),
        ({**good, "p_chosen": "high"}, "$.p_chosen"),
        ({**good, "chosen_finish_reason": "eos"}, "'eos'"),
        ({**good, "category": "x"}, "category 'x', but an earlier row"),
        ({**good, "chosen": [USER], "rejected": [GREEN]}, "must end with an assistant message"),
        ({"prompt": [USER], "chosen": [BLUE, USER, BLUE], "rejected": [GREEN]}, "3 and 1 messages"),
        (
            {
                "prompt": [USER],
                "chosen": [GREEN, USER, BLUE],
                "rejected": [GREEN, USER, GREEN],
            },
            None,
        ),
        (
            {"prompt": [USER], "chosen": [BLUE, BLUE], "rejected": [BLUE, GREEN]},
            "hold 2 messages after the prompt",
        ),
        ({"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, GREEN]}, "4 and 2 messages"),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "holds nothing before the answer"),
        ({"chosen": "blue", "rejected": "green"}, "share no beginning"),
        ({"chosen": "", "rejected": ""}, "share no beginning"),
        (msgspec.to_builtins(SKY), "prefopt.prompt/1 record"),
        (msgspec.to_builtins(stranger), "answer to another prompt"),
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in cases) + "{broken\n[]\n")
    with pytest.raises(DataError) as caught:
        load_preferences(path)
    said = dict(problem.split(": ", 1) for problem in caught.value.problems)
    expected = {f"line {n}": words for n, (_, words) in enumerate(cases, start=1) if words}
    expected |= {f"line {len(cases) + 1}": "malformed JSON"}
    expected |= {f"line {len(cases) + 2}": "expected an object with `chosen`"}
    assert said.keys() == expected.keys()
    for line, words in expected.items():
        assert words in said[line], line


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(number):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for column in ("p_chosen", "margin"):
        with pytest.raises(DataError, match=rf"row 0: .*{column}|row 0: Expected .*{column}"):
            load_preferences([{**row, column: number}])


def test_a_table_without_the_columns_lists_those_it_has():
    with pytest.raises(DataError, match="found `prompt`, `better`, `worse`"):
        load_preferences([{"prompt": "p", "better": "a", "worse": "b"}])


def test_an_empty_or_missing_file_is_an_error(tmp_path):
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        load_preferences(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match="No such file"):
        load_preferences(tmp_path / "q.jsonl")


# --- out and back

any_text = st.text(st.characters(codec="utf-8"), max_size=15)


@st.composite
def pair_groups(draw):
    """Groups of two answers with distinct prompts, the chosen answer of the first pair first."""
    prompts = draw(
        st.lists(
            any_text.filter(str.strip).map(lambda t: (Message("user", t),))
            | st.just((Message("system", "s"), Message("user", "a"), Message("user", "b"))),
            unique=True,
            min_size=1,
            max_size=4,
        )
    )
    groups = []
    for messages in prompts:
        prompt = Prompt.from_messages(messages, draw(st.sampled_from(["", "ideas"])))
        answers = tuple(
            Candidate(
                prompt=prompt,
                text=draw(any_text),
                model=draw(st.sampled_from(["m", "unknown"])),
                sample_index=draw(st.integers(0, 3)),
                finish_reason=draw(st.sampled_from(["stop", "length", "unknown"])),
                n_tokens=draw(st.none() | st.integers(0, 9)),
            )
            for _ in range(2)
        )
        orders = draw(st.sampled_from([[(0, 1)], [(0, 1), (1, 0)], [(0, 1), (0, 1)]]))
        if answers[0] == answers[1]:
            orders = [(0, 1)]
        preferences = tuple(
            Preference(
                chosen=c,
                rejected=r,
                p_chosen=draw(st.floats(0, 1)),
                p_source=draw(st.sampled_from(["prior", "calibrated", "human", "given"])),
                margin=draw(st.floats(0, 2, exclude_min=True)),
            )
            for c, r in orders
        )
        groups.append(PreferenceGroup(prompt=prompt, answers=answers, preferences=preferences))
    return groups


@given(groups=pair_groups())
def test_groups_of_two_answers_lose_nothing_as_rows(groups):
    assert load_preferences(preference_rows(groups)) == groups


@given(groups=pair_groups())
@settings(max_examples=15, deadline=None)
def test_groups_of_two_answers_lose_nothing_in_files_and_datasets(tmp_path_factory, groups):
    folder = tmp_path_factory.mktemp("out")
    for name in ("p.jsonl", "p.parquet"):
        n = save_preferences(groups, folder / name)
        assert n == sum(len(g.preferences) for g in groups)
        assert load_preferences(folder / name) == groups
    assert load_preferences(to_dataset(groups)) == groups


def test_a_group_of_three_answers_becomes_a_row_a_preference_and_is_found_again():
    group = group_of(SKY, ["a", "b", "c"], (0, 1, 0.9), (1, 2, 0.8), (0, 2, 0.7))
    rows = preference_rows([group])
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows] == [
        ("a", "b"),
        ("b", "c"),
        ("a", "c"),
    ]
    assert [r["p_chosen"] for r in rows] == [0.9, 0.8, 0.7]
    assert load_preferences(rows) == [group]


def test_rows_are_trl_s_conversational_preference_format():
    from trl import data_utils

    row = preference_rows([group_of(SKY, ["a", "b"], (0, 1, 0.9))])[0]
    assert data_utils.is_conversational(row)
    assert row["prompt"] == [USER]
    assert row["chosen"] == [{"role": "assistant", "content": "a"}]
    assert list(row) == list(COLUMNS)


def test_the_dataset_s_column_types_do_not_depend_on_the_data():
    short = group_of(SKY, ["a", "b"], (0, 1, 1.0))
    long = group_of(SKY, ["a", "b"], (0, 1, 1.0), n_tokens=3)
    assert to_dataset([short]).features == to_dataset([long]).features


def test_saving_nothing_or_to_an_unknown_kind_of_file_is_refused(tmp_path):
    for name in ("p.jsonl", "p.parquet"):
        with pytest.raises(DataError, match="no preferences to write"):
            save_preferences([group_of(SKY, ["a", "b"])], tmp_path / name)
    with pytest.raises(ValueError, match=r"\.jsonl or \.parquet, got 'p\.csv'"):
        save_preferences([group_of(SKY, ["a", "b"], (0, 1, 1.0))], tmp_path / "p.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "p.parquet"
    save_preferences([group_of(SKY, ["a", "b"], (0, 1, 1.0))], path)
    before = path.read_bytes()
    import pyarrow.parquet

    def full(table, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(DataError, match="No space left"):
        save_preferences([group_of(SKY, ["a", "b"], (0, 1, 0.5))], path)
    assert path.read_bytes() == before


# --- the Hub


class Hub:
    """Records what would be sent."""

    def __init__(self, is_private):
        self.is_private = is_private
        self.sent = []

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        assert (repo_type, exist_ok) == ("dataset", True)
        self.sent.append(("repo", private))

    def repo_info(self, repo_id, *, repo_type):
        return huggingface_hub.DatasetInfo(
            id=repo_id, private=self.is_private, downloads=0, likes=0, tags=[]
        )

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, repo_type, commit_message):
        self.sent.append((path_in_repo, path_or_fileobj.decode()))


@pytest.fixture
def hub(monkeypatch):
    hub = Hub(is_private=True)

    def push(self, repo_id, *, private):
        hub.sent.append((repo_id, private, self.to_list()))

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(datasets.Dataset, "push_to_hub", push)
    return hub


def test_a_push_sends_the_card_and_then_the_rows_to_a_private_repository(hub):
    groups = [group_of(SKY, ["a", "b"], (0, 1, 0.9))]
    address = push_preferences(groups, "someone/pairs")
    assert address == "https://huggingface.co/datasets/someone/pairs"
    assert hub.sent == [
        ("repo", True),
        ("README.md", dataset_card(groups)),
        ("someone/pairs", True, preference_rows(groups)),
    ]


def test_a_push_takes_another_card(hub):
    push_preferences([group_of(SKY, ["a", "b"], (0, 1, 0.9))], "someone/pairs", card="# Mine")
    assert ("README.md", "# Mine") in hub.sent


def test_nothing_private_goes_to_a_public_repository(hub):
    hub.is_private = False
    groups = [group_of(SKY, ["a", "b"], (0, 1, 0.9))]
    with pytest.raises(DataError, match=r"is public.*Nothing was uploaded"):
        push_preferences(groups, "someone/pairs")
    assert hub.sent == [("repo", True)]
    push_preferences(groups, "someone/pairs", private=False)
    assert len(hub.sent) == 4


def test_what_the_hub_refuses_is_a_data_error_that_says_how_to_log_in(hub):
    def refuse(*_, **__):
        raise ConnectionError("401 Unauthorized")

    hub.create_repo = refuse
    with pytest.raises(DataError, match=r"401 Unauthorized.*hf auth login"):
        push_preferences([group_of(SKY, ["a", "b"], (0, 1, 0.9))], "someone/pairs")
    with pytest.raises(DataError, match="no preferences"):
        push_preferences([], "someone/pairs")


# --- the card


def test_the_card_counts_what_the_data_holds():
    ideas = Prompt.from_text("Ideas?", "ideas")
    groups = [
        group_of(SKY, ["one two three", "one", "x y"], (0, 1, 0.9), (0, 2, 0.7)),
        group_of(ideas, ["a b", "a b c d"], (0, 1, 0.8), finish_reason="length"),
    ]
    left_out = [
        LeftOut(prompt_id="p", comparison_id=str(i), reason=reason)
        for i, reason in enumerate(["tie", "flipped", "tie"])
    ]
    card = dataset_card(groups, judge="a | judge", left_out=left_out, cost_usd=0.125, source="me")
    lines = card.splitlines()
    # 3 pairs; words chosen 3, 3, 2 and rejected 1, 2, 4: longer wins 2 of 3
    for line in [
        "| pairs (rows) | 3 |",
        "| prompts | 2 |",
        "| groups with 2 answers | 1 |",
        "| groups with 3 answers | 1 |",
        "| answers by m | 5 |",
        "| groups of category (none) | 1 |",
        "| groups of category ideas | 1 |",
        "| chosen | 2.67 | 3 | 2 | 3 |",
        "| rejected | 2.33 | 2 | 1 | 4 |",
        "| prior | 3 | 0.8 |",
        "| tie | 2 |",
        "| flipped | 1 |",
        "| all | 3 |",
        "Source of the prompts: me.",
        "Judge: a | judge. Cost: $0.12.",
    ]:
        assert line in lines, line
    assert "the chosen one in 2 (67%) of the pairs, the shorter one in 1 (33%)." in card
    assert "3 pair(s) carry an uncalibrated `p_chosen`" in card
    assert "1 pair(s) hold an answer that was cut off" in card
    assert "In 2 pair(s) it is not known" in card
    for column in COLUMNS:
        assert f"| `{column}` |" in card


def test_the_card_has_front_matter_the_hub_understands():
    card = huggingface_hub.DatasetCard(dataset_card([group_of(SKY, ["a", "b"], (0, 1, 1.0))]))
    data = card.data.to_dict()
    assert data["size_categories"] == ["n<1K"]
    assert data["task_categories"] == ["text-generation"]
    assert "dpo" in data["tags"]


def test_the_card_says_what_it_was_not_told_and_what_is_in_no_row():
    card = dataset_card([group_of(SKY, ["a", "b c d", "c"], (1, 0, 1.0))])
    for words in [
        "Judge: not stated. Cost: not stated.",
        "Source of the prompts: not stated.",
        "No record of comparisons left out",
        "1 answer(s) take part in no preference",
        "One length wins in four pairs of five or more",
    ]:
        assert words in card


def test_a_card_of_nothing_is_still_a_card():
    card = dataset_card([])
    assert "| pairs (rows) | 0 |" in card
    assert "| chosen | - | - | - | - |" in card
