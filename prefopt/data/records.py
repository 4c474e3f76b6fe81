"""Typed records <-> JSONL files: validated on the way in, atomic on the way out.

A file is written beside its target and renamed, so a reader never sees half of one. Reading reports
every bad line at once, with its number. This module knows no stage and no meaning of any type.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from prefopt.errors import DataError

T = TypeVar("T")


@contextlib.contextmanager
def atomic_writer(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block ends without an error.

    The content is on the disk before the rename, and the rename before this returns. Raises DataError
    naming the file when it cannot be written (read-only, full disk).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~current_umask())
        os.replace(name, path)
        _keep(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it has another name, or the disk gave way
            os.unlink(name)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` when the block ends without error.

    What was written is on the disk by then, whichever library wrote it.

    Raises:
        DataError: it cannot be written.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    with disk_errors_told(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            keep_files(temporary)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
            _keep(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def keep_files(folder: Path) -> None:
    """Have everything in a folder on the disk, so that a power cut finds it whole.

    Raises:
        OSError: the disk is full, or gives way.
    """
    for path in folder.rglob("*"):
        _keep(path)
    _keep(folder)


def _keep(path: Path) -> None:
    """Flush one file, or the names in one folder, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # not everywhere may a folder be opened
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a file system that has no such thing
            raise
    finally:
        os.close(handle)


_DISK_TROUBLE = tuple(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "EACCES", "EPERM", "EFBIG", "ESTALE")
    if hasattr(errno, name)
)


_TORCH_SAYS = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")
"""What torch.save says when a disk is full or broken, with no word about why."""


@contextlib.contextmanager
def disk_errors_told(path: str | Path) -> Iterator[None]:
    """Turn a disk's errors in the block into DataError, whichever library meets them.

    Args:
        path: what the block writes, where the error does not name a file.

    Raises:
        DataError: the disk is full, read-only or broken. All other errors are passed on.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        raise unwritable(Path(trouble.filename or path), trouble) from error


def disk_trouble(error: BaseException) -> OSError | None:
    """The error as the system's own, where it says that a disk is full, read-only or broken."""
    if isinstance(error, OSError):
        return error if error.errno in _DISK_TROUBLE else None
    said = str(error)
    for number in _DISK_TROUBLE:
        # Libraries written in other languages pass on the system's words and no number.
        if os.strerror(number) in said:
            return OSError(number, os.strerror(number))
    if any(words in said for words in _TORCH_SAYS):
        return OSError(f"the disk is full, read-only or broken ({said.splitlines()[0][:120]})")
    return None


def unwritable(path: str | Path, error: OSError) -> DataError:
    """The error for a file that could not be written, with what to do about it."""
    return DataError(
        f"cannot write {path}: {error.strerror or error}. What was finished before is kept; free "
        "space or choose a writable folder, then run the same command again."
    )


def current_umask() -> int:
    """The process's umask (mkstemp ignores it and makes files private)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_writer(path) as file:
        file.write(content)


def write_records(path: str | Path, records: Iterable[msgspec.Struct]) -> int:
    """Write one record a line to `path` atomically; returns how many."""
    count = 0
    with atomic_writer(path) as file:
        for record in records:
            file.write(msgspec.json.encode(record) + b"\n")
            count += 1
    return count


def read_records(path: str | Path, record_type: type[T]) -> list[T]:
    """Read every line of `path` as `record_type`; raises DataError listing all bad lines."""
    return list(iter_records(path, record_type))


def iter_records(path: str | Path, record_type: type[T]) -> Iterator[T]:
    """Yield records line by line with flat memory.

    Bad lines are collected and raised as one DataError at the end, so the reader of the message
    sees all of them; nothing that came from a file with a bad line may be used before that.
    """
    path = Path(path)
    decoder = msgspec.json.Decoder(record_type)
    problems: list[str] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield decoder.decode(line)
                except RecursionError:
                    problems.append(f"line {number}: nested too deeply to be read")
                except (msgspec.MsgspecError, ValueError) as error:
                    problems.append(f"line {number}: {error}")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error
    if problems:
        raise DataError(
            f"{path} holds {len(problems)} line(s) that are not a {record_type.__name__}. "
            "The file may be cut short or edited; remove it to make the stage again.",
            problems,
        )
