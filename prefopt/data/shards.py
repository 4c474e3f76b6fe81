"""Records in a folder of Parquet files, the shards, with a manifest of checksums.

    part-00000.parquet   as many records as fit the memory easily, in columns that any tool reads
    manifest.json        the type of record, what it was made from, and of each shard its rows and hash

A shard is written whole or not at all, and read only if its hash is the manifest's. All records of one
prompt stand in one shard, so that a prompt's answers can be paired, judged and labelled by themselves.
At any time one shard is in memory. This module knows no stage.
"""

from __future__ import annotations

import hashlib
import io
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from prefopt.data.records import atomic_writer, iter_records, write_bytes
from prefopt.errors import DataError
from prefopt.types import Candidate, JudgedComparison, Prompt, content_hash

T = TypeVar("T", bound=msgspec.Struct)

MANIFEST = "manifest.json"
PREFERENCES = "prefopt.preference_rows/1"
"""The kind of shards that hold the columns of `preference_rows`, as trainers read them."""


# A folder may be somebody else's: its shards lie in it, and what is made of them in another one.
_InFolder = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_.-]*\.parquet\Z")]


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a folder. `counts` is what its maker counted."""

    name: _InFolder
    rows: int
    sha256: str
    counts: dict[str, int] = {}


class Manifest(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.shards/1",
):
    """What a folder holds. `made_from` has a hash for each thing that can change its content."""

    kind: str
    made_from: dict[str, str] = {}
    complete: bool = False
    shards: tuple[Shard, ...] = ()


class Shards(Generic[T]):
    """A complete folder of shards; iterating reads all records, a shard at a time."""

    def __init__(self, folder: Path, manifest: Manifest, record_type: type[T]) -> None:
        self.folder, self.manifest, self.record_type = folder, manifest, record_type

    def __iter__(self) -> Iterator[T]:
        for shard in self.shards:
            yield from self.read(shard)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """In order."""
        return self.manifest.shards

    @property
    def n_rows(self) -> int:
        """Of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Changes with every byte of any shard."""
        return content_hash([[shard.name, shard.sha256] for shard in self.shards])

    def read(self, shard: Shard) -> list[T]:
        """The records of one shard. Raises DataError naming it when it is damaged."""
        return read_shard(self.folder, shard, self.record_type)


def open_shards(folder: str | Path, record_type: type[T]) -> Shards[T]:
    """Open a complete folder of shards.

    Raises:
        DataError: it is no such folder, holds other records, or its making was not finished.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(
            f"{folder} is no folder of shards: it has no {MANIFEST}. `prefopt sample` and `prefopt "
            "judge label` make such folders with --scale.shard_size."
        )
    if manifest.kind != kind_of(record_type):
        raise DataError(
            f"{folder} holds {manifest.kind} records, expected {kind_of(record_type)}. Give the "
            "folder that the step before this one made."
        )
    if not manifest.complete:
        raise DataError(
            f"{folder} is not complete ({len(manifest.shards):,} shards so far). Run the command that "
            "makes it again; it goes on from there."
        )
    return Shards(folder, manifest, record_type)


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a folder of shards; None where there is none.

    Raises:
        DataError: it cannot be read.
    """
    path = Path(folder) / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as a manifest of shards: {error}. Restore it, or remove the "
            "folder to have it made again."
        ) from error


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write a folder's manifest atomically."""
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    write_bytes(Path(folder) / MANIFEST, encoded + b"\n")


def total_counts(manifest: Manifest) -> dict[str, int]:
    """What was counted in all shards together."""
    total: dict[str, int] = {}
    for shard in manifest.shards:
        for key, n in shard.counts.items():
            total[key] = total.get(key, 0) + n
    return total


def kind_of(record_type: type[msgspec.Struct]) -> str:
    """What a manifest calls shards of a type: its schema tag."""
    return str(record_type.__struct_config__.tag)


def shard_name(number: int) -> str:
    """The file name of a folder's shard, from 0."""
    return f"part-{number:05}.parquet"


# --- One shard ------------------------------------------------------------------------------------


def write_shard(folder: str | Path, name: str, records: Iterable[T], record_type: type[T]) -> Shard:
    """Write records to a file of a folder, atomically. The same records give the same bytes.

    Raises:
        DataError: it cannot be written.
    """
    import pyarrow

    rows = [msgspec.to_builtins(record) for record in records]
    return write_table(folder, name, pyarrow.Table.from_pylist(rows, schema=_schema(record_type)))


def write_table(folder: str | Path, name: str, table: Any) -> Shard:
    """Write a `pyarrow.Table` to a file of a folder, atomically."""
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    content = buffer.getbuffer()
    with atomic_writer(Path(folder) / name) as file:
        file.write(content)
    return Shard(name=name, rows=table.num_rows, sha256=hashlib.sha256(content).hexdigest())


def read_shard(folder: str | Path, shard: Shard, record_type: type[T]) -> list[T]:
    """The records of a shard, after a check of its hash. Raises DataError naming it."""
    return _records(Path(folder) / shard.name, read_table(folder, shard), record_type)


def read_table(folder: str | Path, shard: Shard, columns: list[str] | None = None) -> Any:
    """A shard as a `pyarrow.Table`, after a check of its hash. Raises DataError naming it."""
    import pyarrow
    import pyarrow.parquet

    path = Path(folder) / shard.name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the shard {path}: {error.strerror or error}. {_REMEDY}"
        ) from error
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise DataError(damaged(path, len(content)))
    try:
        return pyarrow.parquet.read_table(io.BytesIO(content), columns=columns)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read the shard {path} as Parquet: {error}. {_REMEDY}") from error


_REMEDY = "Remove it; the command that made the folder makes it again."


def damaged(path: Path, n_bytes: int) -> str:
    """What to say of a shard whose hash is not the manifest's."""
    return (
        f"the shard {path} is damaged or edited: its hash is not the manifest's ({n_bytes:,} bytes). "
        f"{_REMEDY}"
    )


def is_whole(folder: str | Path, shard: Shard) -> bool:
    """Whether a shard's file is there.

    Raises:
        DataError: it is, and is not what was written.
    """
    path = Path(folder) / shard.name
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror or error}.") from error
    if digest != shard.sha256:
        raise DataError(damaged(path, path.stat().st_size))
    return True


def _records(path: Path, table: Any, record_type: type[T]) -> list[T]:
    try:
        return msgspec.convert(table.to_pylist(), list[record_type])  # type: ignore[valid-type]  # a class at run time
    except msgspec.ValidationError as error:
        raise DataError(
            f"{path} holds rows that are not a {record_type.__name__}: {error}. {_REMEDY}"
        ) from error


def _schema(record_type: type[msgspec.Struct]) -> Any:
    import msgspec.inspect
    import pyarrow

    struct = _arrow_type(msgspec.inspect.type_info(record_type))
    return pyarrow.schema(list(struct), metadata={"prefopt.record": kind_of(record_type)})


def _arrow_type(info: Any) -> Any:
    """The Arrow type of a record's field. A record's tag is in the file's metadata, in no column."""
    import msgspec.inspect as of
    import pyarrow

    if isinstance(info, of.StructType):
        return pyarrow.struct([(f.encode_name, _arrow_type(f.type)) for f in info.fields])
    if isinstance(info, of.UnionType):
        (some,) = (t for t in info.types if not isinstance(t, of.NoneType))
        return _arrow_type(some)
    if isinstance(info, of.VarTupleType):
        return pyarrow.list_(_arrow_type(info.item_type))
    plain: dict[Any, Any] = {
        of.StrType: pyarrow.string(),
        of.LiteralType: pyarrow.string(),
        of.IntType: pyarrow.int64(),
        of.FloatType: pyarrow.float64(),
    }
    return plain[type(info)]


# --- From one stream to shards ----------------------------------------------------------------------


def prompt_id_of(record: Any) -> str:
    """The prompt that a record of the flow belongs to."""
    if isinstance(record, Prompt):
        return record.prompt_id
    if isinstance(record, JudgedComparison):
        return record.comparison.prompt.prompt_id
    return str(record.prompt.prompt_id)


def cut_into_shards(
    records: Callable[[], Iterable[T]] | Iterable[T],
    folder: str | Path,
    record_type: type[T],
    *,
    shard_size: int,
    made_from: Mapping[str, str] | None = None,
) -> Shards[T]:
    """Write a stream of records as shards; in memory are one shard and eight bytes a prompt.

    Args:
        records: those of a prompt stand together.
        folder: where to; a complete folder that was made from the same is left as it is.
        record_type: their type.
        shard_size: prompts a shard.
        made_from: for the manifest.

    Raises:
        DataError: no records, a prompt that comes back after another, or the folder cannot be written.
            No manifest is written then.
    """
    folder = Path(folder)
    asked = {**(made_from or {}), "shard_size": str(shard_size)}
    there = read_manifest(folder)
    if there is not None and there.complete and there.made_from == asked:
        return open_shards(folder, record_type)
    shards: list[Shard] = []
    seen = array("Q")
    held: list[T] = []
    n_held, last = 0, ""
    stream = records() if callable(records) else records
    for record in stream:
        prompt_id = prompt_id_of(record)
        if prompt_id != last:
            if n_held == shard_size:
                shards.append(write_shard(folder, shard_name(len(shards)), held, record_type))
                held, n_held = [], 0
            seen.append(int(content_hash(prompt_id)[:16], 16))
            n_held, last = n_held + 1, prompt_id
        held.append(record)
    if held:
        shards.append(write_shard(folder, shard_name(len(shards)), held, record_type))
    _check_together(seen, shards, shard_size)
    write_manifest(
        folder,
        Manifest(kind=kind_of(record_type), made_from=asked, complete=True, shards=tuple(shards)),
    )
    return open_shards(folder, record_type)


def _check_together(seen: array[int], shards: list[Shard], shard_size: int) -> None:
    import numpy as np

    if not seen:
        raise DataError("there are no records to write as shards.")
    _, first, counts = np.unique(
        np.frombuffer(seen, dtype=np.uint64), return_index=True, return_counts=True
    )
    again = sorted(int(place) for place in first[counts > 1])
    if again:
        raise DataError(
            f"{len(again):,} prompt(s) come back after another prompt, and the records of a prompt "
            "must stand together. Sort the file by prompt.",
            [f"the prompt that is number {place + 1:,} in the file" for place in again[:1000]],
        )


def shard_file(
    source: str | Path, folder: str | Path, record_type: type[T], *, shard_size: int
) -> Shards[T]:
    """Records from a JSONL file, as shards; a folder of shards is opened as it is.

    Args:
        source: a JSONL file of `record_type`, the records of each prompt together, or such a folder.
            Answers may be in any form that `prefopt.data.candidates` reads.
        folder: where the shards of a file go.
        record_type: `Candidate`, `Comparison` or `JudgedComparison`.
        shard_size: prompts a shard.

    Raises:
        DataError: the source cannot be used.
    """
    source = Path(source)
    if source.is_dir():
        return open_shards(source, record_type)
    if not source.exists():
        raise DataError(
            f"there is no {source}. A path is meant from the folder in which the command runs."
        )
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    def records() -> Iterator[Any]:
        if record_type is not Candidate:
            return iter_records(source, record_type)
        from prefopt.data.candidates import stream_candidates

        return stream_candidates(source)

    return cut_into_shards(
        records,
        folder,
        record_type,
        shard_size=shard_size,
        made_from={"source": digest},
    )
