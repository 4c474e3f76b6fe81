import errno
import os
import stat

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.records import (
    atomic_writer,
    iter_records,
    read_records,
    write_bytes,
    write_records,
)
from prefopt.errors import DataError
from prefopt.types import (
    Candidate,
    Comparison,
    JudgedComparison,
    LeftOut,
    Message,
    Preference,
    PreferenceGroup,
    Prompt,
    Usage,
    Verdict,
)

PROMPT = Prompt.from_messages(
    [Message("system", "Be kind."), Message("user", 'Grüße "日本" \u2028 \n?')], category="ideas"
)
A = Candidate(prompt=PROMPT, text="Ja.", model="m", finish_reason="stop", n_tokens=2)
B = Candidate(prompt=PROMPT, text="", model="m", sample_index=1, finish_reason="length")
VERDICT = Verdict(judge="j", preferred="a", strength=2, p_a=0.75, usage=Usage(cost_usd=0.1))
FAILED = Verdict(judge="j", failure="malformed", reply="?")
RECORDS = [
    PROMPT,
    A,
    Comparison(a=A, b=B),
    VERDICT,
    FAILED,
    JudgedComparison(comparison=Comparison(a=A, b=B), forward=VERDICT, backward=FAILED),
    PreferenceGroup(
        prompt=PROMPT,
        answers=(A, B),
        preferences=(Preference(chosen=0, rejected=1, p_chosen=0.9, p_source="human"),),
    ),
    LeftOut(prompt_id="p", comparison_id="c", reason="tie", detail="both"),
]


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_every_type_round_trips_through_a_file_of_one_record_a_line(tmp_path, record):
    path = tmp_path / "made" / "records.jsonl"
    assert write_records(path, [record, record]) == 2
    assert path.read_bytes().count(b"\n") == 2
    assert read_records(path, type(record)) == [record, record]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_every_line_says_by_itself_what_it_is(tmp_path, record):
    path = tmp_path / "records.jsonl"
    write_records(path, [record])
    schema = msgspec.json.decode(path.read_bytes())["schema"]
    assert schema.startswith("prefopt.")
    assert schema.endswith("/1")
    other = Prompt if not isinstance(record, Prompt) else Candidate
    with pytest.raises(DataError, match="line 1"):
        read_records(path, other)


@given(texts=st.lists(st.text(st.characters(codec="utf-8")), max_size=5))
def test_any_text_survives(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("any") / "answers.jsonl"
    records = [Candidate(prompt=PROMPT, text=text, model="m") for text in texts]
    write_records(path, records)
    assert read_records(path, Candidate) == records


def test_all_bad_lines_are_reported_with_their_numbers_and_blank_lines_counted(tmp_path):
    path = tmp_path / "prompts.jsonl"
    good = msgspec.json.encode(PROMPT)
    path.write_bytes(good + b"\n\n{broken\n" + good + b'\n{"schema": "x"}\n\xff\n' + good[:20])
    with pytest.raises(DataError) as caught:
        read_records(path, Prompt)
    assert [p.split(":")[0] for p in caught.value.problems] == [
        "line 3",
        "line 5",
        "line 6",
        "line 7",
    ]
    assert str(path) in str(caught.value)


def test_reading_line_by_line_gives_the_good_ones_and_then_the_error(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"{broken\n" + msgspec.json.encode(PROMPT) + b"\n")
    records = iter_records(path, Prompt)
    assert next(records) == PROMPT
    with pytest.raises(DataError, match="1 line"):
        next(records)


def test_an_unknown_field_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    row = msgspec.to_builtins(PROMPT) | {"catgory": "ideas"}
    path.write_bytes(msgspec.json.encode(row))
    with pytest.raises(DataError, match="catgory"):
        read_records(path, Prompt)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.jsonl: No such file"):
        read_records(tmp_path / "nowhere.jsonl", Prompt)


def test_a_file_is_whole_or_untouched_when_writing_breaks_off(tmp_path):
    path = tmp_path / "prompts.jsonl"
    write_records(path, [PROMPT])

    def breaks_off():
        yield PROMPT
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_records(path, breaks_off())
    assert read_records(path, Prompt) == [PROMPT]
    assert leftovers(tmp_path) == []


def test_a_reader_sees_the_old_content_until_the_writer_is_done(tmp_path):
    path = tmp_path / "report.txt"
    write_bytes(path, b"old")
    with atomic_writer(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_full_disk_keeps_the_old_file_and_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "report.txt"
    write_bytes(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left on device.*free space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_a_file_where_a_folder_should_be_is_an_error_that_names_the_path(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match=r"cannot write .*taken/x\.txt"):
        write_bytes(tmp_path / "taken" / "x.txt", b"new")


def test_a_read_only_folder_is_an_error_that_names_the_path(locked_folder):
    with pytest.raises(DataError, match=r"cannot write .*locked/x\.txt: Permission denied"):
        write_bytes(locked_folder / "x.txt", b"new")


def test_a_refused_temporary_file_is_an_error_that_names_the_path(tmp_path, monkeypatch):
    def refused(**_):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkstemp", refused)
    with pytest.raises(DataError, match=r"cannot write .*x\.txt: Read-only file system"):
        write_bytes(tmp_path / "x.txt", b"new")


def test_files_get_the_permissions_the_umask_leaves(tmp_path):
    path = tmp_path / "x.txt"
    before = os.umask(0o027)
    try:
        write_bytes(path, b"new")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
