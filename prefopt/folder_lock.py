"""One process at a time in a folder: the lock of runs, jobs and shards, whatever is in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from prefopt.data.records import unwritable
from prefopt.errors import RunError


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """Make the folder where it is not there and lock it; the lock is the caller's to release.

    Raises:
        RunError: another process has it.
        DataError: it cannot be made or written.
    """
    lock = filelock.FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise RunError(
            f"another process is working in {folder}. Wait for it, or choose another folder."
        ) from error
    except OSError as error:
        raise unwritable(folder, error) from error
    return lock


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """`lock_folder` for the length of a `with`."""
    lock = lock_folder(folder)
    try:
        yield
    finally:
        lock.release()
