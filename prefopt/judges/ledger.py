"""Every question, reply, verdict and dollar of a judging job, in one SQLite file.

What is asked of a judge is named by a key that covers everything that can change the answer. The
ledger says whether a key is answered, hands each unanswered key to one process at a time, keeps the
money limit for all of them together, and remembers what was under way when a process died. Verdicts
and replies are only ever added; a failure is recorded but never satisfies a key. Every verdict has a
checksum, since SQLite has none: a damaged one is told and asked again, never used.

Several processes of one machine may use a ledger at once. It knows nothing of judges, prompts or
how a question is sent.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import secrets
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, NamedTuple

import msgspec
from filelock import FileLock, Timeout

from prefopt.errors import DataError
from prefopt.types import Verdict

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS questions (
    key TEXT PRIMARY KEY, judge TEXT NOT NULL, comparison_id TEXT NOT NULL, shown TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS judges (fingerprint TEXT PRIMARY KEY, judge TEXT, settings TEXT);
CREATE TABLE IF NOT EXISTS attempts (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, owner TEXT NOT NULL, outcome TEXT NOT NULL,
    transport TEXT NOT NULL, batch TEXT, request_id TEXT, stop_reason TEXT, request TEXT, reply TEXT,
    input_tokens INTEGER, output_tokens INTEGER, cost_usd REAL, unknown_usd REAL NOT NULL DEFAULT 0,
    problem TEXT, ended_at REAL NOT NULL, model TEXT
);
CREATE INDEX IF NOT EXISTS truncated_by_key ON attempts (key) WHERE outcome = 'truncated';
CREATE TABLE IF NOT EXISTS verdicts (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, judge TEXT NOT NULL, owner TEXT NOT NULL,
    failure TEXT, cost_usd REAL NOT NULL, verdict TEXT NOT NULL, recorded_at REAL NOT NULL,
    checksum INTEGER
);
CREATE INDEX IF NOT EXISTS verdicts_by_key ON verdicts (key, failure);
CREATE TABLE IF NOT EXISTS claims (
    key TEXT PRIMARY KEY, owner TEXT NOT NULL, worst_usd REAL NOT NULL, batch TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS claims_by_batch ON claims (batch) WHERE batch IS NOT NULL;
CREATE TABLE IF NOT EXISTS owners (owner TEXT PRIMARY KEY, pid INTEGER, started_at REAL);
CREATE TABLE IF NOT EXISTS batches (
    name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, owner TEXT NOT NULL, batch_id TEXT,
    state TEXT NOT NULL, n INTEGER NOT NULL, intended_at REAL NOT NULL, note TEXT
);
CREATE TABLE IF NOT EXISTS money (
    one INTEGER PRIMARY KEY CHECK (one = 1), spent_usd REAL NOT NULL, unknown_usd REAL NOT NULL,
    reserved_usd REAL NOT NULL
);
INSERT OR IGNORE INTO money VALUES (1, 0, 0, 0);
"""
_VERSION = 3

# What version 2 lacks. A verdict without a checksum is one that version 2 wrote.
_FROM_VERSION_2 = """
ALTER TABLE attempts ADD COLUMN model TEXT;
ALTER TABLE verdicts ADD COLUMN checksum INTEGER;
"""

_DAMAGED = "damaged"
"""In place of a failure: a verdict whose checksum does not fit any more."""

_WAY_OUT = (
    "Restore it from a copy. Without one, `sqlite3 FILE .recover` may save most of it; or move it "
    "away, and its questions are asked, and paid for, again."
)

Claimed = Literal["claimed", "ours", "answered", "taken", "no_money"]
"""What came of asking for a key: it is ours to ask, it is ours and under way already, it has its
answer, another process has it under way, or its worst case does not fit the limit."""

BatchState = Literal["intended", "submitted", "collected", "abandoned"]


class Question(NamedTuple):
    """One thing to ask a judge: the comparison in the order shown, under its key."""

    key: str
    comparison_id: str
    shown: str = ""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One try at a question: what the judge was shown, and what came back.

    `cost_usd` is None where the bill is not known; then `unknown_usd` is the most it can be.
    """

    outcome: str
    transport: str = "sync"
    batch: str | None = None
    request_id: str | None = None
    model: str | None = None
    stop_reason: str | None = None
    request: str | None = None
    reply: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = 0.0
    unknown_usd: float = 0.0
    problem: str | None = None


class Money(NamedTuple):
    """US dollars: known to be spent, possibly spent, and set aside for what is under way."""

    spent_usd: float
    unknown_usd: float
    reserved_usd: float


class Batch(msgspec.Struct, frozen=True):
    """A bundle of questions: intended (written down before it is sent), submitted, collected."""

    name: str
    fingerprint: str
    owner: str
    batch_id: str | None
    state: BatchState
    n: int
    intended_at: float


class Ledger:
    """A context manager over one ledger file; with `path=None` over a private temporary one.

    Raises:
        DataError: the file cannot be opened or written, is damaged, or is no ledger.
    """

    outcome_type: ClassVar[Any] = Verdict
    """What a question's outcome is; a subclass may keep another type with `failure` and `usage`."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = path
        self.owner = secrets.token_hex(8)
        self._lock = threading.RLock()
        self._alive: FileLock | None = None
        self._inside = False
        self._careful: bool | None = None
        self._any_truncated = False
        try:
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            # An empty name is a private file of SQLite's own, deleted at the end: a job of a million
            # pairs does not have to fit the memory.
            self._db = sqlite3.connect(
                path or "", timeout=60.0, isolation_level=None, check_same_thread=False
            )
            try:
                self._open(path)
            except BaseException:
                self._db.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise DataError(
                f"cannot open the judgement ledger {path}: {error}. Verdicts are paid for once "
                "and kept here, so nothing is asked without it; free space or choose a writable "
                f"folder. Is the file itself damaged? {_WAY_OUT}"
            ) from error
        try:
            if path is not None:
                self._alive = FileLock(self._life_sign(self.owner))
                self._alive.acquire()
            with self._writing():
                self._db.execute(
                    "INSERT INTO owners VALUES (?,?,?)", (self.owner, os.getpid(), time.time())
                )
            self.bury_the_dead()
        except BaseException:
            self.close()
            raise

    def _open(self, path: str | Path | None) -> None:
        # In this order: another process may be making the tables just now.
        tables = {row[0] for row in self._db.execute("SELECT name FROM sqlite_master")}
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if tables and version == 2:
            with self._writing():
                # Another process may have been first.
                if self._db.execute("PRAGMA user_version").fetchone()[0] == 2:
                    for statement in _FROM_VERSION_2.strip().split("\n"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {_VERSION}")
        elif tables and version != _VERSION:
            what = "an older ledger" if "verdicts" in tables else "another program's database"
            raise DataError(
                f"{path} is {what} (version {version}, expected {_VERSION}). Move it away, or give "
                "another ledger file."
            )
        if path is not None:
            self._db.execute("PRAGMA journal_mode=WAL")
        if not tables:
            with self._writing():
                for statement in _SCHEMA.strip().split(";\n"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
            if path is not None:
                # A ledger of this name is never an empty file from here on.
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def check(self) -> int:
        """Look for damage before anything is asked; returns how many verdicts are to be asked again.

        Those whose checksum does not fit count as failed from now on, and the log says so.

        Raises:
            DataError: the file is damaged in its structure.
        """
        if self.path is None:
            return 0
        problems = self._read("PRAGMA integrity_check(1)", ())
        if problems != [("ok",)]:
            said = str(problems[0][0]).replace("\n", " ") if problems else "no answer"
            raise DataError(f"the judgement ledger {self.path} is damaged ({said}). {_WAY_OUT}")
        with self._lock:
            rows = self._db.execute(
                "SELECT id, key, verdict, checksum FROM verdicts WHERE failure IS NULL "
                "AND checksum IS NOT NULL"
            )
            damaged = [row[0] for row in rows if _checksum(row[1], row[2]) != row[3]]
        if damaged:
            with self._writing():
                self._db.executemany(
                    "UPDATE verdicts SET failure = ? WHERE id = ?",
                    [(_DAMAGED, row) for row in damaged],
                )
            logger.warning(
                "%d verdict(s) in %s were edited or damaged (their checksums do not fit) and are "
                "asked again. Restore the file from a copy, if there is one, to keep them.",
                len(damaged),
                self.path,
            )
        return len(damaged)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back what is still claimed and close the file."""
        with self._lock:
            with contextlib.suppress(sqlite3.Error, DataError), self._writing():
                self._release(self.owner, "the asking ended before the answer came")
            self._db.close()
        if self._alive is not None:
            self._alive.release()
            Path(self._alive.lock_file).unlink(missing_ok=True)
            self._alive = None

    # --- What is known ------------------------------------------------------------------------

    def verdicts(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """The newest successful verdict of each key that has one."""
        return self._newest(keys, "failure IS NULL", ())

    def outcomes(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """Like `verdicts`, and this process's own failure where a key has no success."""
        keys = list(keys)
        failed = self._newest(keys, "failure IS NOT NULL AND owner = ?", (self.owner,))
        return {**failed, **self.verdicts(keys)}

    def failed_here(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that this process has asked in vain."""
        found: set[str] = set()
        for some in _some(keys):
            marks = ",".join("?" * len(some))
            rows = self._read(
                f"SELECT key FROM verdicts WHERE key IN ({marks}) AND failure IS NOT NULL "
                "AND owner = ?",
                (*some, self.owner),
            )
            found.update(row[0] for row in rows)
        return found

    def answered(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that have a successful verdict."""
        found: set[str] = set()
        for some in _some(keys):
            marks = ",".join("?" * len(some))
            rows = self._read(
                f"SELECT key FROM verdicts WHERE key IN ({marks}) AND failure IS NULL", some
            )
            found.update(row[0] for row in rows)
        return found

    def _newest(
        self, keys: Iterable[str], where: str, values: tuple[Any, ...]
    ) -> dict[str, Verdict]:
        found: dict[str, Verdict] = {}
        for some in _some(keys):
            marks = ",".join("?" * len(some))
            rows = self._read(
                f"SELECT key, verdict FROM verdicts WHERE key IN ({marks}) AND {where} ORDER BY id",
                (*some, *values),
            )
            for key, verdict in rows:
                found[key] = msgspec.json.decode(verdict, type=self.outcome_type)
        return found

    def was_truncated(self, key: str) -> bool:
        """Whether a reply to this question was cut off by its token limit before."""
        if not self._any_truncated:
            return False
        rows = self._read("SELECT 1 FROM attempts WHERE key = ? AND outcome = 'truncated'", (key,))
        return bool(rows)

    def money(self) -> Money:
        """What the ledger's questions have cost and may cost, in US dollars."""
        row = self._read("SELECT spent_usd, unknown_usd, reserved_usd FROM money", ())[0]
        return Money(*row)

    def spent_usd(self) -> float:
        """The sum of what all answers cost, unusable ones included, in US dollars."""
        return self.money().spent_usd

    # --- Asking -------------------------------------------------------------------------------

    def claim(
        self,
        question: Question,
        judge: str,
        *,
        worst_usd: float = 0.0,
        max_usd: float | None = None,
    ) -> Claimed:
        """Make a question ours to ask, setting its worst case aside, unless it is not to be asked."""
        with self._writing(careful=False):
            return self._claim(question, judge, worst_usd, max_usd, None)

    def claim_all(self, questions: Iterable[Question], judge: str) -> list[Claimed]:
        """`claim` for many questions that cost nothing, in one transaction."""
        with self._writing(careful=False):
            return [self._claim(question, judge, 0.0, None, None) for question in questions]

    def _claim(
        self,
        question: Question,
        judge: str,
        worst_usd: float,
        max_usd: float | None,
        batch: str | None,
    ) -> Claimed:
        key = question.key
        # One by one, what a batch of ours holds is not under way: its results may be long in coming.
        answered, ours, spent, unknown, reserved = self._db.execute(
            "SELECT EXISTS (SELECT 1 FROM verdicts WHERE key = :key AND failure IS NULL), "
            "(SELECT owner = :owner AND (batch IS NULL OR :batched) FROM claims WHERE key = :key), "
            "spent_usd, unknown_usd, reserved_usd FROM money",
            {"key": key, "owner": self.owner, "batched": batch is not None},
        ).fetchone()
        if answered:
            return "answered"
        if ours is not None:
            return "ours" if ours else "taken"
        money = Money(spent, unknown, reserved)
        if worst_usd and max_usd is not None and not _fits(money, worst_usd, max_usd):
            return "no_money"
        self._db.execute("INSERT INTO claims VALUES (?,?,?,?)", (key, self.owner, worst_usd, batch))
        if worst_usd:
            self._db.execute("UPDATE money SET reserved_usd = reserved_usd + ?", (worst_usd,))
        if batch is not None:  # its results come back without the requests
            self._db.execute(
                "INSERT OR IGNORE INTO questions VALUES (?,?,?,?)",
                (key, judge, question.comparison_id, question.shown),
            )
        return "claimed"

    def fits(self, usd: float, max_usd: float) -> bool:
        """Whether `usd` more stays within the limit, counting all that is spent and set aside."""
        return _fits(self.money(), usd, max_usd)

    def reserve(self, key: str, worst_usd: float, max_usd: float | None) -> bool:
        """Set aside `worst_usd` in all for a question of ours; False where it does not fit.

        Raises:
            DataError: this process has not claimed the question.
        """
        with self._writing(careful=False):
            held = self._db.execute(
                "SELECT worst_usd FROM claims WHERE key = ? AND owner = ?", (key, self.owner)
            ).fetchone()
            if held is None:
                raise DataError(f"the question {key[:16]} is not claimed by this process.")
            more = worst_usd - held[0]
            if more > 0 and max_usd is not None and not _fits(self.money(), more, max_usd):
                return False
            self._set_aside(key, worst_usd)
            return True

    def attempt(self, key: str, attempt: Attempt) -> None:
        """Keep a try that did not end the question; the next one needs money of its own."""
        with self._writing():
            self._attempt(key, attempt)
            self._set_aside(key, 0.0)

    def record(
        self,
        key: str,
        judge: str,
        verdict: Verdict,
        attempts: Sequence[Attempt] | None = None,
    ) -> None:
        """Keep the outcome of a question and free what was set aside; on return it is on disk.

        `attempts` are the tries not kept yet, whose costs are added up; with None the cost is the
        verdict's own.
        """
        self.record_all([(key, judge, verdict, attempts)])

    def record_all(
        self, outcomes: Iterable[tuple[str, str, Verdict, Sequence[Attempt] | None]]
    ) -> None:
        """`record` for many questions in one transaction.

        A question that has a successful verdict already keeps it: the same result read twice is
        counted once.
        """
        with self._writing():
            for key, judge, verdict, attempts in outcomes:
                if self._db.execute(
                    "SELECT 1 FROM verdicts WHERE key = ? AND failure IS NULL", (key,)
                ).fetchone():
                    self._unclaim(key)
                    continue
                for attempt in attempts or ():
                    self._attempt(key, attempt)
                if attempts is None and verdict.usage.cost_usd:
                    self._db.execute(
                        "UPDATE money SET spent_usd = spent_usd + ?", (verdict.usage.cost_usd,)
                    )
                self._db.execute(
                    "INSERT INTO verdicts (key, judge, owner, failure, cost_usd, verdict, "
                    "recorded_at, checksum) VALUES (?,?,?,?,?,?,?,?)",
                    (
                        key,
                        judge,
                        self.owner,
                        verdict.failure,
                        verdict.usage.cost_usd,
                        encoded := msgspec.json.encode(verdict).decode(),
                        time.time(),
                        _checksum(key, encoded),
                    ),
                )
                self._unclaim(key)

    def unclaim(self, key: str) -> None:
        """Give a question back that was not sent."""
        with self._writing(careful=False):
            self._unclaim(key)

    def _attempt(self, key: str, attempt: Attempt) -> None:
        self._any_truncated |= attempt.outcome == "truncated"
        self._db.execute(
            "INSERT INTO attempts (key, owner, outcome, transport, batch, request_id, stop_reason, "
            "request, reply, input_tokens, output_tokens, cost_usd, unknown_usd, problem, ended_at, "
            "model) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                key,
                self.owner,
                attempt.outcome,
                attempt.transport,
                attempt.batch,
                _storable(attempt.request_id),
                _storable(attempt.stop_reason),
                attempt.request,
                _storable(attempt.reply),
                attempt.input_tokens,
                attempt.output_tokens,
                attempt.cost_usd,
                attempt.unknown_usd,
                _storable(attempt.problem),
                time.time(),
                _storable(attempt.model),
            ),
        )
        self._db.execute(
            "UPDATE money SET spent_usd = spent_usd + ?, unknown_usd = unknown_usd + ?",
            (attempt.cost_usd or 0.0, attempt.unknown_usd),
        )

    def _set_aside(self, key: str, worst_usd: float) -> None:
        held = self._db.execute("SELECT worst_usd FROM claims WHERE key = ?", (key,)).fetchone()
        if held is not None:
            self._db.execute("UPDATE claims SET worst_usd = ? WHERE key = ?", (worst_usd, key))
            self._db.execute(
                "UPDATE money SET reserved_usd = reserved_usd + ?", (worst_usd - held[0],)
            )

    def _unclaim(self, key: str) -> None:
        gone = self._db.execute(
            "DELETE FROM claims WHERE key = ? RETURNING worst_usd", (key,)
        ).fetchall()
        if gone and gone[0][0]:
            self._db.execute("UPDATE money SET reserved_usd = reserved_usd - ?", gone[0])

    # --- Those who died -----------------------------------------------------------------------

    def bury_the_dead(self) -> int:
        """Give back the questions of processes that are gone; returns how many were under way.

        What such a process had sent may be on the bill, so its worst case counts as possibly spent.
        Questions in a message batch stay claimed: the batch goes on without its process, and
        `adopt_batches` hands it to the next.
        """
        if self.path is None:
            return 0
        self._any_truncated = bool(
            self._read("SELECT 1 FROM attempts WHERE outcome = 'truncated' LIMIT 1", ())
        )
        lost = 0
        for (owner,) in self._read("SELECT owner FROM owners WHERE owner != ?", (self.owner,)):
            if self._is_alive(owner):
                continue
            with self._writing():
                lost += self._release(owner, "the process ended while the request was under way")
            Path(self._life_sign(owner)).unlink(missing_ok=True)
        return lost

    def _release(self, owner: str, problem: str) -> int:
        claims = self._db.execute(
            "SELECT key, worst_usd FROM claims WHERE owner = ? AND batch IS NULL", (owner,)
        ).fetchall()
        for key, worst_usd in claims:
            if worst_usd > 0:
                lost = Attempt(
                    outcome="lost", cost_usd=None, unknown_usd=worst_usd, problem=problem
                )
                self._attempt(key, lost)
            self._unclaim(key)
        self._db.execute("DELETE FROM owners WHERE owner = ?", (owner,))
        return sum(worst_usd > 0 for _, worst_usd in claims)

    def _life_sign(self, owner: str) -> str:
        # The system frees the lock of a process however it ends, so a held lock is a living process.
        return f"{self.path}.{owner}.alive"

    def _is_alive(self, owner: str) -> bool:
        lock = FileLock(self._life_sign(owner))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    # --- Batches ------------------------------------------------------------------------------

    def intend_batch(
        self,
        name: str,
        fingerprint: str,
        questions: Sequence[tuple[Question, float]],
        judge: str,
        *,
        max_usd: float | None,
    ) -> tuple[list[Question], int, int]:
        """Write down that a batch is about to be sent.

        Returns the questions that go into it, how many of those given are dealt with, and how many
        of them other processes have under way. Left out are those that are answered or taken; the
        first that does not fit the limit ends it. With none left nothing is written.
        """
        with self._writing():
            ours: list[Question] = []
            seen = taken = 0
            for question, worst_usd in questions:
                claimed = self._claim(question, judge, worst_usd, max_usd, name)
                if claimed == "no_money":
                    break
                seen += 1
                taken += claimed == "taken"
                if claimed == "claimed":
                    ours.append(question)
            if ours:
                self._db.execute(
                    "INSERT INTO batches VALUES (?,?,?,NULL,'intended',?,?,NULL)",
                    (name, fingerprint, self.owner, len(ours), time.time()),
                )
            return ours, seen, taken

    def set_batch(
        self, name: str, state: BatchState, *, batch_id: str | None = None, note: str | None = None
    ) -> None:
        """Move a batch on; an abandoned one gives its questions back, costing nothing."""
        with self._writing():
            self._db.execute(
                "UPDATE batches SET state = ?, batch_id = COALESCE(?, batch_id), "
                "note = COALESCE(?, note) WHERE name = ?",
                (state, batch_id, note, name),
            )
            if state in ("abandoned", "collected"):
                for (key,) in self._db.execute(
                    "SELECT key FROM claims WHERE batch = ?", (name,)
                ).fetchall():
                    self._unclaim(key)

    def leave_batch(self, key: str, attempt: Attempt) -> None:
        """Keep what a batch said of a question and take it out, still ours, to ask it by itself."""
        with self._writing():
            self._attempt(key, attempt)
            self._set_aside(key, 0.0)
            self._db.execute(
                "UPDATE claims SET batch = NULL, owner = ? WHERE key = ?", (self.owner, key)
            )

    def adopt_batches(self, fingerprint: str) -> list[Batch]:
        """The open batches of this judge that are ours, those of dead processes included."""
        with self._writing():
            rows = self._db.execute(
                "SELECT name, fingerprint, owner, batch_id, state, n, intended_at FROM batches "
                "WHERE fingerprint = ? AND state IN ('intended', 'submitted') ORDER BY intended_at",
                (fingerprint,),
            ).fetchall()
            adopted = []
            for row in rows:
                batch = Batch(*row)
                if batch.owner != self.owner and self.path is not None:
                    if self._is_alive(batch.owner):
                        continue
                    self._db.execute(
                        "UPDATE batches SET owner = ? WHERE name = ?", (self.owner, batch.name)
                    )
                    self._db.execute(
                        "UPDATE claims SET owner = ? WHERE batch = ?", (self.owner, batch.name)
                    )
                adopted.append(batch)
            return adopted

    def batch_keys(self, name: str) -> list[str]:
        """The questions of a batch that have no outcome yet."""
        return [row[0] for row in self._read("SELECT key FROM claims WHERE batch = ?", (name,))]

    def known_batch_ids(self) -> set[str]:
        """The ids of all batches that were ever submitted from here."""
        rows = self._read("SELECT batch_id FROM batches WHERE batch_id IS NOT NULL", ())
        return {row[0] for row in rows}

    def shown(self, keys: Iterable[str]) -> dict[str, str]:
        """What was shown to the judge, by key, as it was written down when it was claimed."""
        found: dict[str, str] = {}
        for some in _some(keys):
            marks = ",".join("?" * len(some))
            rows = self._read(f"SELECT key, shown FROM questions WHERE key IN ({marks})", some)
            found.update(rows)
        return found

    # --- Looking back -------------------------------------------------------------------------

    def describe_judge(self, fingerprint: str, judge: str, settings: Any) -> None:
        """Keep what all questions of a judge share: its model, wording and settings."""
        with self._writing():
            self._db.execute(
                "INSERT OR IGNORE INTO judges VALUES (?,?,?)",
                (fingerprint, judge, json.dumps(settings, ensure_ascii=False)),
            )

    def count(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a reading query, for reports over the ledger's tables."""
        return self._read(sql, values)

    def _read(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise DataError(
                    f"cannot read the judgement ledger {self.path}: {error}. {_WAY_OUT}"
                ) from error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """One transaction for everything written inside: all of it or nothing."""
        with self._writing():
            yield

    @contextlib.contextmanager
    def _writing(self, *, careful: bool = True) -> Iterator[None]:
        """One transaction. With `careful=False` a power cut may undo it; a kill may not."""
        with self._lock:
            if self._inside:
                yield
                return
            self._inside = True
            try:
                if careful != self._careful:
                    self._db.execute(f"PRAGMA synchronous={'FULL' if careful else 'NORMAL'}")
                    self._careful = careful
                # IMMEDIATE: what is read inside is still true when it is written.
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise DataError(
                    f"cannot write to the judgement ledger {self.path}: {error}. Judging stops "
                    "so that no further verdict is paid for and lost. Free space or make the folder "
                    f"writable, then run again. Is the file itself damaged? {_WAY_OUT}"
                ) from error
            finally:
                self._inside = False


def _checksum(key: str, encoded: str) -> int:
    return zlib.crc32(f"{key}{encoded}".encode())


def _fits(money: Money, usd: float, max_usd: float) -> bool:
    # A limit on a sum of doubles: a billionth of a dollar is rounding, not money.
    spent, unknown, reserved = money
    return spent + unknown + max(reserved, 0.0) + usd <= max_usd + 1e-9


def _storable(text: str | None) -> str | None:
    """Without halves of surrogate pairs, which JSON from a service may hold and SQLite does not."""
    return text if text is None else text.encode("utf-8", "replace").decode()


def _some(keys: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Keys in portions that fit into one statement."""
    rest = iter(keys)
    while portion := tuple(itertools.islice(rest, 500)):
        yield portion
