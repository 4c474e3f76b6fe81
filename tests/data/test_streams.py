"""Prompts that are read piece by piece are those that are read as a whole."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from prefopt.data.prompts import load_prompts, stream_prompts
from prefopt.data.shards import cut_into_shards
from prefopt.errors import DataError
from prefopt.types import Prompt

ROWS = [
    {"prompt": "One?", "category": "a"},
    {"prompt": [{"role": "user", "content": "Two? 日本"}], "category": "b"},
    {"prompt": "One?", "category": "later"},
    {"prompt": "Three?", "category": ""},
]
TEXTS = [{"prompt": f"Question {i % 40}?"} for i in range(50)]


def jsonl(path, rows, start=b""):
    path.write_bytes(start + b"\n".join(json.dumps(row).encode() + b"\r" for row in rows) + b"\n\n")
    return path


def test_a_stream_is_the_list(tmp_path, caplog):
    files = [
        jsonl(tmp_path / "p.jsonl", ROWS),
        jsonl(tmp_path / "bom.jsonl", ROWS, b"\xef\xbb\xbf"),
        tmp_path / "t.parquet",
        tmp_path / "t.txt",
        tmp_path / "t.json",
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TEXTS), files[2])
    files[3].write_text("One?\n\nTwo?\nOne?\n")
    files[4].write_text(json.dumps(ROWS))
    for file in files:
        assert list(stream_prompts(file)) == load_prompts(file), file
        assert list(stream_prompts(str(file))) == load_prompts(file)
    assert "1 row(s) repeat an earlier prompt" in caplog.text
    assert list(stream_prompts("everyday")) == load_prompts("everyday")
    assert list(stream_prompts(iter(ROWS))) == load_prompts(ROWS)


def test_folders_are_streams_too(tmp_path):
    for number in (1, 0):  # in the order of their names
        table = pyarrow.Table.from_pylist(TEXTS[number * 25 : number * 25 + 25])
        pyarrow.parquet.write_table(table, tmp_path / f"part-{number}.parquet")
    expected = load_prompts(TEXTS)
    assert list(stream_prompts(tmp_path)) == expected
    cut_into_shards(expected, tmp_path / "shards", Prompt, shard_size=7)
    assert list(stream_prompts(tmp_path / "shards")) == expected


def test_all_bad_rows_are_named_before_the_first_prompt_comes(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "One?"}\n{"prompt": 3}\n{"prompt": ""}\n')
    with pytest.raises(DataError, match=r"p\.jsonl: 2 row(?s:.*)line 2(?s:.*)line 3"):
        next(stream_prompts(path))
    path.write_bytes(b'{"prompt": "One?"}\n{"prompt": \n\xff\n')
    with pytest.raises(DataError, match=r"(?s)2 row.*line 2: malformed.*line 3: not UTF-8"):
        next(stream_prompts(path))
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="UTF-16"):
        next(stream_prompts(path))
    path.write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        next(stream_prompts(path))
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"t\.parquet as Parquet"):
        next(stream_prompts(tmp_path / "t.parquet"))
    with pytest.raises(DataError, match="No such file"):
        next(stream_prompts(tmp_path / "missing.jsonl"))
