"""Demonstrations: which answers, from where, what was left out, and how general data is mixed in."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.demonstrations import (
    Demonstration,
    demonstrations,
    load_demonstrations,
    mix_replay,
)
from prefopt.data.records import read_records, write_records
from prefopt.errors import DataError
from prefopt.types import Candidate, Preference, PreferenceGroup, Prompt


def group(texts, preferences, prompt="What is it?", finish="stop"):
    """Preferences as (chosen, rejected) or (chosen, rejected, p)."""
    asked = Prompt.from_text(prompt)
    return PreferenceGroup(
        prompt=asked,
        answers=tuple(
            Candidate(prompt=asked, text=t, model=f"m{i}", finish_reason=finish)
            for i, t in enumerate(texts)
        ),
        preferences=tuple(
            Preference(chosen=c, rejected=r, p_chosen=p[0] if p else 0.9)
            for c, r, *p in preferences
        ),
    )


def texts(groups, **options):
    return [row.text for row in demonstrations(groups, **options).rows]


def test_the_chosen_side_of_a_pair_is_the_demonstration_and_says_where_it_came_from():
    (row,) = demonstrations([group(["bad", "good"], [(1, 0)])]).rows
    assert row.text == "good"
    assert row.complete
    assert row.source == "preference group 0: answer 1 by m1, preferred to 1 of 1"


def test_of_several_answers_only_those_that_nobody_beat():
    ranked = group(["a", "b", "c"], [(0, 1), (1, 2), (0, 2)])
    assert texts([ranked]) == ["a"]
    two_ends = group(["a", "b", "c", "d"], [(0, 1), (2, 3)])
    assert texts([two_ends]) == ["a", "c"]


def test_a_probability_below_one_half_speaks_for_the_other_side():
    assert texts([group(["a", "b"], [(0, 1, 0.2)])]) == ["b"]


def test_what_gives_no_demonstration_is_counted_with_its_reason():
    groups = [
        group(["a", "b"], []),
        group(["a", "b"], [(0, 1, 0.5)]),
        group(["a", "b"], [(0, 1, 0.6)]),
        group(["a", "b", "c"], [(0, 1), (1, 2), (2, 0)]),
        group(["  ", "b"], [(0, 1)]),
        group(["a", "b"], [(0, 1)]),
        group(["a", "c"], [(0, 1)]),
    ]
    found = demonstrations(groups, min_p=0.7)
    assert [row.text for row in found.rows] == ["a"]
    assert found.reasons() == dict.fromkeys(
        ["no_preference", "tie", "uncertain", "contradicted", "empty_answer", "repeated"], 1
    )
    assert str(found).startswith("1 demonstrations; left out: 1 no_preference, 1 tie")
    with pytest.raises(ValueError, match="min_p"):
        demonstrations(groups, min_p=0.4)


def test_an_answer_that_was_cut_off_is_left_out_or_has_no_end():
    cut = [group(["a", "b"], [(0, 1)], finish="length")]
    assert demonstrations(cut).reasons() == {"cut_off": 1}
    (row,) = demonstrations(cut, cut_off="keep").rows
    assert not row.complete


def test_every_form_of_row_is_read_and_round_trips(tmp_path):
    rows = [
        {"text": "Plain text."},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"prompt": "Q", "completion": "A"},
        {"prompt": [{"role": "user", "content": "Q"}], "response": "Ä 🌱"},
        {"prompt": "Q", "answer": [{"role": "assistant", "content": "A"}], "output": None},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    found = load_demonstrations(path)
    assert [row.text for row in found] == ["Plain text.", "A", "A", "Ä 🌱", "A"]
    assert [row.prompt and row.prompt.text for row in found] == [None, "Q", "Q", "Q", "Q"]
    assert found[1].source == f"{path}, line 2"
    write_records(tmp_path / "again.jsonl", found)
    assert load_demonstrations(tmp_path / "again.jsonl") == found
    assert read_records(tmp_path / "again.jsonl", Demonstration) == found


def test_text_files_and_parquet_are_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_text("One passage.\n\nAnother one.\n", encoding="utf-8")
    table = pyarrow.Table.from_pylist([{"prompt": "Q", "completion": "A"}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    plain = load_demonstrations(tmp_path / "a.txt")
    assert [(row.text, row.complete) for row in plain] == [
        ("One passage.", False),
        ("Another one.", False),
    ]
    assert load_demonstrations(tmp_path / "a.parquet")[0].text == "A"


def test_all_bad_rows_are_told_at_once():
    with pytest.raises(DataError) as error:
        load_demonstrations(
            [
                {"prompt": "Q", "completion": "A", "answer": "B"},
                {"prompt": "Q", "completion": " "},
                {"prompt": "Q"},
                {"messages": [{"role": "user", "content": "Q"}]},
                {"prompt": "Q", "completion": [{"role": "user", "content": "A"}]},
                "",
                7,
                "good",
            ]
        )
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        f"row {i}" for i in range(7)
    ]
    assert "several answers in one row: completion, answer" in str(error.value)


def plain(n, name="general"):
    return [Demonstration(prompt=None, text=f"{name} {i}", source=name) for i in range(n)]


def test_a_tenth_of_the_rows_is_ten_in_a_hundred():
    mixed = mix_replay(plain(90, "own"), plain(500), share=0.1, seed=0)
    assert Counter(row.source for row in mixed) == {"own": 90, "general": 10}
    assert mixed[:90] == plain(90, "own")
    assert len({row.text for row in mixed}) == 100


@given(
    n=st.integers(1, 300),
    m=st.integers(1, 60),
    share=st.sampled_from([0.0, 0.05, 0.1, 1 / 3, 0.5, 0.9]),
    seed=st.integers(0, 3),
)
def test_the_share_is_as_near_as_whole_rows_allow_and_rows_are_taken_equally_often(
    n, m, share, seed
):
    mixed = mix_replay(plain(n, "own"), plain(m), share=share, seed=seed)
    k = len(mixed) - n
    assert abs(k - n * share / (1 - share)) <= 0.5 + 1e-9
    counts = Counter(row.text for row in mixed[n:])
    if k >= m:
        assert max(counts.values()) - min(counts.values()) <= 1
        assert len(counts) == m
    else:
        assert set(counts.values()) <= {1}


def test_the_draw_depends_on_the_seed_and_not_on_the_order():
    own, general = plain(20, "own"), plain(200)
    one = mix_replay(own, general, share=0.2, seed=0)
    assert one == mix_replay(own, general[::-1], share=0.2, seed=0)
    assert one != mix_replay(own, general, share=0.2, seed=1)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="there is none"):
        mix_replay(plain(9), [], share=0.1, seed=0)
    with pytest.raises(ValueError, match="share must be"):
        mix_replay(plain(9), plain(9), share=1.0, seed=0)
