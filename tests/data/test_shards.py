"""Folders of Parquet shards: what is written is read back, and what is not whole is named."""

import msgspec
import pyarrow.parquet
import pytest

from prefopt.data.prompts import load_prompts
from prefopt.data.shards import (
    Manifest,
    cut_into_shards,
    open_shards,
    read_manifest,
    read_shard,
    shard_file,
    write_manifest,
    write_shard,
)
from prefopt.errors import DataError
from prefopt.types import Candidate, Comparison, JudgedComparison, Message, Prompt, Usage, Verdict


def answers(n_prompts=5, k=2):
    return [
        Candidate(prompt=prompt, text=f"Answer {j} — née 日本 🦊\n\0", model="m", sample_index=j)
        for i in range(n_prompts)
        for prompt in [Prompt.from_text(f"Question {i}?", category="c")]
        for j in range(k)
    ]


def judged():
    talk = Prompt.from_messages([Message("system", ""), Message("user", "u"), Message("tool", "t")])
    a, b = (
        Candidate(prompt=talk, text=t, model="m", n_tokens=n) for t, n in (("x", 3), ("", None))
    )
    good = Verdict(judge="j", preferred="a", strength=2, p_a=0.1 + 0.2, rationale="r", reply="{}")
    bad = Verdict(judge="j", shown_first="b", failure="refused", usage=Usage(cost_usd=1e-9))
    comparison = Comparison(a=a, b=b)
    return [
        JudgedComparison(comparison=comparison, forward=good),
        JudgedComparison(comparison=comparison, forward=bad, backward=good, more=(bad, good)),
    ]


@pytest.mark.parametrize(
    ("records", "record_type"),
    [
        ([a.prompt for a in answers()], Prompt),
        (answers(), Candidate),
        ([j.comparison for j in judged()], Comparison),
        (judged(), JudgedComparison),
        ([], JudgedComparison),
    ],
)
def test_records_come_back_as_they_were_and_twice_give_the_same_bytes(
    records, record_type, tmp_path
):
    shard = write_shard(tmp_path, "one.parquet", records, record_type)
    assert read_shard(tmp_path, shard, record_type) == records
    assert shard.rows == len(records)
    again = write_shard(tmp_path / "again", "one.parquet", records, record_type)
    assert again == shard


def test_any_tool_reads_the_columns(tmp_path):
    shard = write_shard(tmp_path, "one.parquet", answers(1, 1), Candidate)
    table = pyarrow.parquet.read_table(tmp_path / shard.name)
    assert table["text"].to_pylist() == ["Answer 0 — née 日本 🦊\n\0"]
    assert table["prompt"].to_pylist()[0]["messages"] == [
        {"role": "user", "content": "Question 0?"}
    ]
    assert table.schema.metadata[b"prefopt.record"] == b"prefopt.candidate/1"


def test_a_stream_is_cut_between_prompts_and_cut_once(tmp_path):
    shards = cut_into_shards(iter(answers()), tmp_path, Candidate, shard_size=2)
    assert [shard.rows for shard in shards.shards] == [4, 4, 2]
    assert list(shards) == answers()
    assert shards.n_rows == 10

    def not_again():
        raise AssertionError("was read again")

    assert list(cut_into_shards(not_again, tmp_path, Candidate, shard_size=2)) == answers()
    cut_into_shards(iter(answers()), tmp_path, Candidate, shard_size=3)
    assert len(open_shards(tmp_path, Candidate).shards) == 2


def test_what_cannot_be_cut_is_refused_and_leaves_no_manifest(tmp_path):
    one, two = answers(2, 1)
    with pytest.raises(DataError, match=r"1 prompt\(s\) come back.*\n.*number 1 in the file"):
        cut_into_shards([one, two, one], tmp_path, Candidate, shard_size=1)
    with pytest.raises(DataError, match="no records"):
        cut_into_shards([], tmp_path, Candidate, shard_size=1)
    with pytest.raises(DataError, match=r"there is no .*missing"):
        shard_file(tmp_path / "missing.jsonl", tmp_path / "out", Candidate, shard_size=1)
    (tmp_path / "bad.jsonl").write_bytes(msgspec.json.encode(one) + b"\n{}\n")
    with pytest.raises(DataError, match="line 2"):
        shard_file(tmp_path / "bad.jsonl", tmp_path / "out", Candidate, shard_size=1)
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "out") is None


@pytest.mark.parametrize("harm", ["one bit", "cut short", "empty", "gone", "another's"])
def test_a_damaged_shard_is_named(harm, tmp_path):
    shards = cut_into_shards(answers(), tmp_path, Candidate, shard_size=2)
    path = tmp_path / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    if harm == "one bit":
        content[len(content) // 2] ^= 1
    harmed = {
        "cut short": content[:-1],
        "empty": b"",
        "another's": (tmp_path / "part-00000.parquet").read_bytes(),
    }
    path.write_bytes(harmed.get(harm, content))
    if harm == "gone":
        path.unlink()
    with pytest.raises(DataError, match=r"part-00001\.parquet"):
        list(shards)
    with pytest.raises(DataError, match=r"part-00001\.parquet"):
        load_prompts(tmp_path)


def test_a_folder_that_is_not_the_right_one_is_refused(tmp_path):
    with pytest.raises(DataError, match="no folder of shards"):
        open_shards(tmp_path, Candidate)
    manifest = Manifest(kind="prefopt.candidate/1")
    write_manifest(tmp_path, manifest)
    with pytest.raises(DataError, match="not complete"):
        open_shards(tmp_path, Candidate)
    with pytest.raises(DataError, match="not a complete folder"):
        load_prompts(tmp_path)
    with pytest.raises(DataError, match=r"holds prefopt\.candidate/1.*expected prefopt\.prompt/1"):
        open_shards(tmp_path, Prompt)
    (tmp_path / "manifest.json").write_text('{"kind": ')
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        open_shards(tmp_path, Prompt)


def test_prompts_in_shards_are_a_source_of_prompts(tmp_path):
    prompts = [Prompt.from_text(f"Question {i}?", category=str(i)) for i in range(5)]
    cut_into_shards(prompts, tmp_path, Prompt, shard_size=2)
    assert load_prompts(tmp_path) == prompts
    assert load_prompts(str(tmp_path)) == prompts
