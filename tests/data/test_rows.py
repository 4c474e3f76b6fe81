"""Tables out of a spreadsheet: separators, quotes, and what is refused."""

import csv
import gzip
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prefopt
from prefopt.data.rows import read_rows, stream_rows
from prefopt.errors import DataError

TEXT = 'prompt,answer,model\n"Hello, you",a,m\n"two\nlines","say ""hi""",\n\nlast,;,x\n'
ROWS = [
    ("line 2", {"prompt": "Hello, you", "answer": "a", "model": "m"}),
    ("line 3", {"prompt": "two\nlines", "answer": 'say "hi"', "model": None}),
    ("line 6", {"prompt": "last", "answer": ";", "model": "x"}),
]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_table_is_read(tmp_path, bom, ends):
    path = tmp_path / "t.csv"
    path.write_bytes((bom + TEXT.replace("\n", ends)).encode())
    expected = [(w, {k: v and v.replace("\n", ends) for k, v in row.items()}) for w, row in ROWS]
    assert read_rows(path).rows == expected
    assert list(stream_rows(path)) == expected
    with gzip.open(tmp_path / "t.csv.gz", "wb") as file:
        file.write(path.read_bytes())
    assert read_rows(tmp_path / "t.csv.gz").rows == expected


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.CSV"])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_the_separator_is_the_one_that_makes_columns(tmp_path, mark, name):
    with (tmp_path / name).open("w", newline="") as file:
        writer = csv.writer(file, delimiter=mark)
        writer.writerows([["prompt", "answer"], ["x;y\tz,w", "1"]])
    expected = {"prompt": "x;y\tz,w", "answer": "1"}
    assert [row.value for row in read_rows(tmp_path / name).rows] == [expected]


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("prompt\nHello, you\nyes\n", ["line 2: has 2 value(s) for 1 column(s)"]),
        ("a,b\n1\n1,2\n1,2,3\n", ["line 2: has 1 value(s)", "line 4: has 3 value(s)"]),
        ('a,b\n1,2\n"open,2\n', ["line 3: malformed CSV"]),
        ('a,b\n"x"y,2\n', ["line 2: malformed CSV"]),
        ("a,b,a\n1,2,3\n", ["line 1: there are two columns 'a'"]),
        ("a,b\n1,\udce4\n", ["line 2: not UTF-8"]),
    ],
)
def test_what_cannot_be_read_is_told_by_line(tmp_path, text, problems):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    found = read_rows(path).problems
    assert [p[: len(start)] for p, start in zip(found, problems, strict=True)] == problems


def test_a_table_without_rows_is_empty(tmp_path):
    for text in ("", "prompt,answer\n", "\n\n"):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(DataError, match="is empty"):
            read_rows(tmp_path / "t.csv")


def test_a_cell_may_be_long_and_the_limit_of_others_stays(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "t.csv").write_text("prompt\n" + "x" * (before + 1) + "\n")
    (row,) = read_rows(tmp_path / "t.csv").rows
    assert len(row.value["prompt"]) == before + 1
    assert csv.field_size_limit() == before


def test_prompts_answers_and_preferences_come_from_tables(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt,chosen,rejected\nq,good,bad\n")
    assert [p.text for p in prefopt.load_prompts(path)] == ["q"]
    assert [c.text for c in prefopt.load_candidates(path)] == ["good", "bad"]
    (group,) = prefopt.load_preferences(path)
    assert group.answers[group.preferences[0].chosen].text == "good"


@given(
    st.lists(
        st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=2, max_size=2),
        min_size=1,
    ),
    st.sampled_from(",;\t"),
)
def test_what_a_spreadsheet_writes_is_what_is_read(tmp_path_factory, table, mark):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=mark, quoting=csv.QUOTE_ALL).writerows(
        [["prompt", "answer"], *table]
    )
    path.write_bytes(text.getvalue().encode())
    found = [list(row.value.values()) for row in read_rows(path).rows]
    assert found == table
