"""Every verdict that was ever given, in one SQLite file, so that none is paid for twice.

Rows are only ever added. A verdict is found by a key that covers everything that can change it; a
failure is recorded but never satisfies a key.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import msgspec

from prefopt.errors import DataError
from prefopt.types import Verdict

_SCHEMA = """
CREATE TABLE IF NOT EXISTS verdicts (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    judge TEXT NOT NULL,
    failure TEXT,
    cost_usd REAL NOT NULL,
    verdict TEXT NOT NULL,
    recorded_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX IF NOT EXISTS verdicts_by_key ON verdicts (key) WHERE failure IS NULL;
"""


class Ledger:
    """A context manager over one ledger file; with `path=None` it lives in memory only."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = path
        try:
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path or ":memory:", timeout=60.0, isolation_level=None)
            # WAL survives a killed process; FULL also survives a power cut.
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise DataError(
                f"cannot open the judgement ledger {path}: {error}. Verdicts are paid for once and "
                "kept here, so nothing is asked without it; choose a writable folder."
            ) from error

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._db.close()

    def verdicts(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """The newest successful verdict of each key that has one."""
        found: dict[str, Verdict] = {}
        for key in keys:
            row = self._db.execute(
                "SELECT verdict FROM verdicts WHERE key = ? AND failure IS NULL ORDER BY id DESC",
                (key,),
            ).fetchone()
            if row is not None:
                found[key] = msgspec.json.decode(row[0], type=Verdict)
        return found

    def record(self, key: str, judge: str, verdict: Verdict) -> None:
        """Keep one verdict; on return it is on disk."""
        try:
            self._db.execute(
                "INSERT INTO verdicts (key, judge, failure, cost_usd, verdict) VALUES (?,?,?,?,?)",
                (
                    key,
                    judge,
                    verdict.failure,
                    verdict.usage.cost_usd,
                    msgspec.json.encode(verdict).decode(),
                ),
            )
        except sqlite3.Error as error:
            raise DataError(
                f"cannot write to the judgement ledger {self.path}: {error}. Judging stops so that "
                "no further verdict is paid for and lost."
            ) from error

    def spent_usd(self) -> float:
        """The sum of what all recorded verdicts cost, failures included, in US dollars."""
        row = self._db.execute("SELECT COALESCE(SUM(cost_usd), 0) FROM verdicts").fetchone()
        return float(row[0])
