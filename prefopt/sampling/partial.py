"""Finished answers of a call that may be killed, kept until the whole is done.

A line of the file holds the answers of one batch under a key that covers everything they depend on, so
that a file of another call is of no effect. A line torn by a kill is cut off, and so is all from a
damaged line on, which its checksum tells.
"""

from __future__ import annotations

import logging
import zlib
from pathlib import Path

import msgspec

from prefopt.types import Candidate

logger = logging.getLogger(__name__)


class _Batch(msgspec.Struct, frozen=True):
    key: str
    candidates: list[Candidate]
    checksum: int

    @classmethod
    def of(cls, key: str, candidates: list[Candidate]) -> _Batch:
        return cls(key, candidates, zlib.crc32(msgspec.json.encode([key, candidates])))


class PartialAnswers:
    """The batches in a file; with `path=None` nothing is kept.

    Raises:
        DataError: the file cannot be read or written.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._done = {} if self._path is None else _read(self._path)

    def get(self, key: str) -> list[Candidate] | None:
        """The answers of a finished batch."""
        return self._done.get(key)

    def add(self, key: str, candidates: list[Candidate]) -> None:
        """Keep the answers of a batch."""
        self._done[key] = candidates
        if self._path is None:
            return
        from prefopt.data.records import unwritable

        try:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(_Batch.of(key, candidates)) + b"\n")
        except OSError as error:
            raise unwritable(self._path, error) from error


def _read(path: Path) -> dict[str, list[Candidate]]:
    from prefopt.data.records import unwritable

    done: dict[str, list[Candidate]] = {}
    good = 0
    try:
        path.touch()  # what cannot be kept is told before it is made
        with path.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # torn by a kill
                try:
                    batch = msgspec.json.decode(line, type=_Batch)
                except (msgspec.MsgspecError, ValueError):
                    batch = None
                if batch is None or batch != _Batch.of(batch.key, batch.candidates):
                    logger.warning(
                        "%s was edited or damaged: what it holds from byte %d on is sampled again",
                        path,
                        good,
                    )
                    break
                done[batch.key] = batch.candidates
                good += len(line)
            file.truncate(good)
    except OSError as error:
        raise unwritable(path, error) from error
    return done
