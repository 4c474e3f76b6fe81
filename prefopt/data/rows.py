"""Rows with their place, from wherever a table lies: a file, the Hub, a Dataset or a sequence.

In: a path (.jsonl, .json, .parquet, .csv, .tsv, .txt; .jsonl.gz), a folder of shards, a Hub dataset
id, a `datasets.Dataset` or a sequence.
Out: `Rows`, each row with the words that find it again, plus every line that could not be read, so
that the caller reports these together with the rows it cannot use. Knows no meaning of any column.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec

from prefopt.errors import DataError

Source: TypeAlias = str | os.PathLike[str] | Iterable[Any]
"""What rows can be read from; a `datasets.Dataset` is an iterable of rows."""

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_GZIP = ".gz"
_BOM_UTF8 = b"\xef\xbb\xbf"

MOST_UNPACKED_RATIO = 200
"""How many times larger than its file a compressed source may unpack. Real text packs 3 to 20 times,
the same row over and over 100 times; a file made to fill the memory packs 1,000 times and more."""

SMALLEST_LIMIT_BYTES = 64 << 20
"""What a compressed source may unpack to in any case."""

_CHUNK_BYTES = 1 << 20
_PARQUET_ROWS = 64


class Row(NamedTuple):
    """One row and where it is: "line 3" of a text file (from 1), "row 2" elsewhere (from 0)."""

    where: str
    value: Any


class Rows(NamedTuple):
    """The rows of `name`, what could not be read, and how to mend that."""

    name: str
    rows: list[Row]
    problems: list[str]
    remedy: str = ""

    def columns(self) -> list[str]:
        """The column names that occur in any row, in order of first appearance."""
        found: dict[str, None] = {}
        for row in self.rows:
            if isinstance(row.value, Mapping):
                found.update(dict.fromkeys(str(name) for name in row.value))
        return list(found)

    def bad(self, what: str, problems: list[str]) -> DataError:
        """The error for rows that are not `what`: those unreadable and those unusable at once."""
        listed = [*self.problems, *problems]
        advice = f" {self.remedy}" if self.remedy else ""
        return DataError(
            f"{self.name}: {len(listed)} row(s) are not {what}; nothing was read.{advice}", listed
        )


def read_rows(source: Source, *, split: str = "train") -> Rows:
    """Read all rows of `source`.

    Args:
        source: a path, a folder of shards (`prefopt.data.shards`), a Hub dataset id
            ("organisation/name"), a `datasets.Dataset` or `DatasetDict`, or any iterable. A `.json`
            file holds one list of rows, or a row a line. A .csv or .tsv file has its column names in
            the first line, is separated by whichever of comma, semicolon and tab makes most columns
            of it, and holds texts: an empty cell is a missing value.
        split: which split of a Hub dataset or `DatasetDict`; the slices of `datasets`, such as
            "train[:100]", work for the Hub.

    Raises:
        DataError: the source is missing, of an unknown kind, unreadable as a whole, or empty.
    """
    if isinstance(source, str | os.PathLike):
        rows = _read_named(os.fspath(source), is_path=not isinstance(source, str), split=split)
    else:
        rows = _read_iterable(source, split)
    if not rows.rows and not rows.problems:
        raise DataError(f"{rows.name} is empty: expected at least one row.")
    return rows


def _read_named(name: str, *, is_path: bool, split: str) -> Rows:
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix == _GZIP:
        suffix = Path(path.stem).suffix.lower()
    if (path / "manifest.json").is_file():
        return Rows(name, list(_stream_shards(path)), [])
    if path.is_dir():
        raise DataError(
            f"{name} is a folder; expected one file ({', '.join(SUFFIXES)}). A folder written by "
            "`Dataset.save_to_disk` can be read with `datasets.load_from_disk` and passed on."
        )
    if path.exists() or is_path or suffix in SUFFIXES:
        return _read_file(path, suffix)
    if _HUB_ID.fullmatch(name):
        return _read_hub(name, split)
    raise DataError(
        f"no source {name!r}: it is not an existing file ({', '.join(SUFFIXES)}) and not a Hub "
        "dataset id of the form organisation/name. Check the spelling and the working folder."
    )


def stream_rows(source: Source, *, split: str = "train") -> Iterator[Row]:
    """`read_rows` for a source that does not fit the memory.

    A .jsonl or .parquet file, a folder of shards, and a folder of .parquet files (in the order of
    their names) are read piece by piece, others as a whole. Where lines cannot be read, the error is
    raised after the last row, so that it lists all of them.

    Raises:
        DataError: as in `read_rows`.
    """
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    if path is not None and path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if (path / "manifest.json").is_file():
            yield from _stream_shards(path)
            return
        if files:
            for file in files:
                for row in _stream_parquet(file):
                    yield row._replace(where=f"{file.name}, {row.where}")
            return
    if path is not None and path.is_file() and path.suffix.lower() == ".parquet":
        yield from _stream_parquet(path)
    elif path is not None and path.is_file() and path.suffix.lower() == ".jsonl":
        problems: list[str] = []
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                one = _read_file_line(path, line, number)
                yield from one.rows
                problems += one.problems
        if problems:
            raise Rows(str(path), [], problems).bad("usable", [])
    else:
        rows = read_rows(source, split=split)
        yield from rows.rows
        if rows.problems:
            raise rows.bad("usable", [])


def _read_file_line(path: Path, line: bytes, number: int) -> Rows:
    if number == 1:
        _refuse_utf16(path, line)
        line = line.removeprefix(_BOM_UTF8)
    rows = _read_lines(path, line, as_json=True)
    return rows._replace(
        rows=[row._replace(where=f"line {number}") for row in rows.rows],
        problems=[problem.replace("line 1", f"line {number}", 1) for problem in rows.problems],
    )


def _stream_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = n_bytes = 0
    try:
        most = _most_bytes(path)
        with pyarrow.parquet.ParquetFile(path) as file:
            shape = file.metadata
            stated = sum(shape.row_group(i).total_byte_size for i in range(shape.num_row_groups))
            if stated > most:
                raise _too_large(path, most)
            # Not in one piece: a long text that a million rows share is small in the file alone.
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                n_bytes += sum(_decoded_bytes(column) for column in batch.columns)
                if n_bytes > most:
                    raise _too_large(path, most)
                for value in batch.to_pylist():
                    yield Row(f"row {number}", value)
                    number += 1
    except FileNotFoundError as error:
        raise DataError(f"cannot read {path}: No such file or directory.") from error
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path} as Parquet: {error}") from error


def _stream_shards(folder: Path) -> Iterator[Row]:
    from prefopt.data.shards import read_manifest, read_table

    manifest = read_manifest(folder)
    if manifest is None or not manifest.complete:
        raise DataError(
            f"{folder} is not a complete folder of shards. Run the command that makes it again; it "
            "goes on from there."
        )
    for shard in manifest.shards:
        for number, value in enumerate(read_table(folder, shard).to_pylist()):
            yield Row(f"{shard.name}, row {number}", value)


def _read_iterable(source: Iterable[Any], split: str) -> Rows:
    name = "the given rows"
    # Only someone who has imported `datasets` can hand over one of its objects.
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(source, datasets.DatasetDict):
        if split not in source:
            raise DataError(f"the DatasetDict has no split {split!r}; it has {', '.join(source)}.")
        source, name = source[split], f"split {split!r} of the given DatasetDict"
    if isinstance(source, Mapping):
        raise DataError("expected a sequence of rows, got one mapping; put it in a list.")
    return Rows(name, [Row(f"row {i}", value) for i, value in enumerate(source)], [])


def _read_hub(repo_id: str, split: str) -> Rows:
    import datasets

    try:
        dataset = datasets.load_dataset(repo_id, split=split)
    except Exception as error:  # The Hub, the network and dataset builders fail in many classes.
        raise DataError(
            f"cannot load split {split!r} of the Hub dataset {repo_id!r} (there is no such file "
            f"either): {type(error).__name__}: {error}. Check the name, the split and the "
            "connection; for a dataset with several configurations, load it with "
            "`datasets.load_dataset` and pass the Dataset."
        ) from error
    rows = _read_iterable(dataset, split)
    return rows._replace(name=f"{repo_id} (split {split})")


def _read_file(path: Path, suffix: str) -> Rows:
    if suffix not in SUFFIXES:
        raise DataError(f"cannot read {path}: expected one of {', '.join(SUFFIXES)}.")
    if suffix == ".parquet" and path.suffix.lower() != _GZIP:
        return Rows(str(path), list(_stream_parquet(path)), [])
    try:
        content = _unpacked(path) if path.suffix.lower() == _GZIP else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read {path}: {getattr(error, 'strerror', '') or error}."
        ) from error
    _refuse_utf16(path, content)
    content = content.removeprefix(_BOM_UTF8)
    if suffix == ".json" and content.lstrip().startswith(b"["):
        return _read_array(path, content)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, content)
    return _read_lines(path, content, as_json=suffix != ".txt")


def _refuse_utf16(path: Path, content: bytes) -> None:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{path} is UTF-16 text, expected UTF-8. Convert it: "
            f"iconv -f UTF-16 -t UTF-8 {path} > utf8{path.suffix}"
        )


def _most_bytes(path: Path) -> int:
    return max(SMALLEST_LIMIT_BYTES, MOST_UNPACKED_RATIO * path.stat().st_size)


def _too_large(path: Path, most: int) -> DataError:
    return DataError(
        f"{path} unpacks to more than {most:,} bytes, over {MOST_UNPACKED_RATIO} times its own size, "
        "as files made to fill the memory do. If it is meant so, unpack it yourself and give the "
        "plain .jsonl file."
    )


def _unpacked(path: Path) -> bytes:
    most = _most_bytes(path)
    content = bytearray()
    with gzip.open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            content += chunk
            if len(content) > most:
                raise _too_large(path, most)
    return bytes(content)


def _decoded_bytes(column: Any) -> int:
    """What a column takes with every value written out; of shared ones, `nbytes` counts one."""
    import pyarrow

    plain = column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
    return int(plain.nbytes)


def _read_array(path: Path, content: bytes) -> Rows:
    try:
        # The standard library's parser names line and column; `msgspec` then is the strict one.
        json.loads(content)
        values = msgspec.json.decode(content)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return Rows(str(path), [], [_not_utf8(line, error.start, content)], _utf8_remedy(path))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        return Rows(str(path), [], [f"{place}: malformed JSON: {error.msg}"])
    except RecursionError:
        return Rows(str(path), [], [f"malformed JSON: {_TOO_DEEP}"])
    except (msgspec.DecodeError, ValueError) as error:  # such as a number of 5,000 digits
        return Rows(str(path), [], [f"malformed JSON: {error}"])
    return Rows(str(path), [Row(f"row {i}", value) for i, value in enumerate(values)], [])


def _read_lines(path: Path, content: bytes, *, as_json: bool) -> Rows:
    rows: list[Row] = []
    problems: list[str] = []
    remedy = ""
    offset = 0
    for number, line in enumerate(content.split(b"\n"), start=1):
        start, offset = offset, offset + len(line) + 1
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8").rstrip("\r")
            rows.append(Row(f"line {number}", msgspec.json.decode(text) if as_json else text))
        except UnicodeDecodeError as error:
            problems.append(_not_utf8(number, start + error.start, content))
            remedy = _utf8_remedy(path)
        except RecursionError:
            problems.append(f"line {number}: malformed JSON: {_TOO_DEEP}")
        except (msgspec.DecodeError, ValueError) as error:
            problems.append(f"line {number}: malformed JSON: {error}")
    return Rows(str(path), rows, problems, remedy)


def _read_csv(path: Path, content: bytes) -> Rows:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return Rows(str(path), [], [_not_utf8(line, error.start, content)], _utf8_remedy(path))
    # A cell may be as long as its file; the module's own limit is one for all of the process.
    before = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        return _csv_rows(path, text)
    finally:
        csv.field_size_limit(before)


def _csv_rows(path: Path, text: str) -> Rows:
    # Any: the class of the module's readers has no public name.
    def reader(delimiter: str, *, strict: bool) -> Any:
        return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)

    rows: list[Row] = []
    problems: list[str] = []
    delimiter = max(",;\t", key=lambda mark: len(next(reader(mark, strict=False), [])))
    table = reader(delimiter, strict=True)
    line = 1
    try:
        names: list[str] = next(table, [])
        twice = sorted(name for name in set(names) if names.count(name) > 1)
        if twice:
            return Rows(str(path), [], [f"line 1: there are two columns {twice[0]!r}"])
        line = table.line_num + 1
        for values in table:
            if values and len(values) != len(names):
                problems.append(
                    f"line {line}: has {len(values)} value(s) for {len(names)} column(s), separated "
                    f"by {delimiter!r}; text with a separator or a line break must stand in quotes"
                )
            elif values:
                row = {name: value or None for name, value in zip(names, values, strict=True)}
                rows.append(Row(f"line {line}", row))
            line = table.line_num + 1
    except csv.Error as error:
        problems.append(f"line {line}: malformed CSV: {error}")
    return Rows(str(path), rows, problems)


_TOO_DEEP = "nested too deeply to be read"


def _not_utf8(line: int, offset: int, content: bytes) -> str:
    return f"line {line}: not UTF-8 at byte {offset} of the text (0x{content[offset]:02x})"


def _utf8_remedy(path: Path) -> str:
    return (
        "Convert the file to UTF-8; if it is Latin-1: "
        f"iconv -f ISO-8859-1 -t UTF-8 {path} > utf8{path.suffix}"
    )
