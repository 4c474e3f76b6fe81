"""Files from somebody else: too large, too deep, cut short, or made to run something."""

import gzip
import os
import sys
from typing import Any

import msgspec
import pyarrow
import pyarrow.parquet
import pytest

from prefopt.cli import main
from prefopt.config_file import check_config_file
from prefopt.data import rows
from prefopt.data.preference_data import load_preferences
from prefopt.data.prompts import load_prompts
from prefopt.data.records import read_records
from prefopt.errors import DataError

DEEP = b"[" * 50_000 + b"]" * 50_000
LARGER = 3 << 20


class Loose(msgspec.Struct):
    x: Any


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(rows, "SMALLEST_LIMIT_BYTES", 2 << 20)


@pytest.fixture
def make(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.mark.parametrize("name", ["deep.jsonl", "deep.json"])
@pytest.mark.parametrize("content", [DEEP, b'{"prompt": "a", "x": ' + DEEP + b"}"])
def test_json_that_is_nested_without_end_is_an_error_with_its_place(make, name, content):
    with pytest.raises(DataError, match="nested too deeply"):
        load_prompts(make(name, content))
    with pytest.raises(DataError, match="nested too deeply"):
        load_prompts(make(name, b"[" + content + b"]"))


def test_a_record_that_is_nested_without_end_is_an_error_with_its_line(make):
    path = make("x.jsonl", b"\n" + b'{"x": ' + DEEP + b"}\n")
    with pytest.raises(DataError, match="line 2: nested too deeply"):
        read_records(path, Loose)


def test_a_number_with_too_many_digits_is_an_error(make):
    for name in ("x.json", "x.jsonl"):
        with pytest.raises(DataError, match="not usable"):
            load_preferences(
                make(name, b'[{"prompt": "a", "chosen": "b", "margin": ' + b"9" * 5000)
            )


@pytest.mark.parametrize("where", [12, 20, 200])
def test_a_damaged_gzip_file_is_an_error(make, where):
    content = bytearray(gzip.compress(os.urandom(300)))
    content[where] ^= 0xFF
    with pytest.raises(DataError, match=r"cannot read|not UTF-8|not usable"):
        load_prompts(make("x.jsonl.gz", bytes(content)))


def test_a_gzip_file_that_fills_the_memory_is_left_packed(make, small_limit):
    packed = gzip.compress(bytes(LARGER), compresslevel=1)
    with pytest.raises(DataError, match="unpacks to more than"):
        load_prompts(make("bomb.jsonl.gz", packed))


def test_a_gzip_file_of_real_size_is_read_however_well_it_packs(make):
    lines = b"".join(b'{"prompt": "Question %d"}\n' % i for i in range(2000))
    assert len(load_prompts(make("x.jsonl.gz", gzip.compress(lines)))) == 2000


@pytest.mark.parametrize("shared", [True, False])
def test_a_parquet_file_that_fills_the_memory_is_left_packed(tmp_path, shared, small_limit):
    path = tmp_path / "bomb.parquet"
    if shared:  # one long text, named a hundred times
        column = pyarrow.DictionaryArray.from_arrays([0] * 100, pyarrow.array(["x" * 100_000]))
        pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), path)
    else:
        table = pyarrow.table({"prompt": ["a" * LARGER]})
        pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match="unpacks to more than"):
        load_prompts(path)
    with pytest.raises(DataError, match="unpacks to more than"):
        list(rows.stream_rows(path))


def bomb():
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]" for b, c in zip("abcdefg", "bcdefgh", strict=True)
    ]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (bomb(), "aliases written out"),
        ("out: &x [*x]", "holds itself"),
        ("out: " + "[" * 5000 + "]" * 5000, "nest"),
        ("out: " + "[" * 60 + "]" * 60, "more than 50 deep"),
        ("out: x\nlora:\n  class_path: evil.Thing", "class_path"),
        ("out: !!python/object/apply:os.system ['true']", "python/object"),
        ("seed: " + "9" * 5000, "is no value"),
        ("held_out: !!float x", "is no value"),
        ("out: a\nout: b", "`out` is given twice"),
        ("config: /etc/passwd", "cannot name another"),
        ("", "is empty"),
        ("- out", "no list of options"),
        ("out: '", "is not YAML"),
        ("out: \x00", "is not YAML"),
        (b"out: \xff", "is not YAML"),
        ("x: " + "y" * 1_000_001, "larger than"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_a_file_of_options_is_plain_data(make, content, problem):
    with pytest.raises(DataError, match=problem):
        check_config_file(make("x.yaml", content))


def test_plain_options_pass_with_aliases_and_merges(make):
    check_config_file(
        make("x.yaml", "base: &b {r: 4, alpha: 8}\nlora:\n  <<: *b\nseed: 1\nout: y\n")
    )


def test_the_command_line_imports_nothing_that_a_file_of_options_names(
    make, tmp_path, monkeypatch, capsys
):
    marker = tmp_path / "imported"
    make("evil_options.py", f"open({str(marker)!r}, 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = make("x.yaml", "out: x\nlora:\n  class_path: evil_options.Thing\n")
    with pytest.raises(SystemExit):
        main(["run", "--config", str(options)])
    assert "class cannot be named" in capsys.readouterr().err
    assert not marker.exists()
    assert "evil_options" not in sys.modules
