"""Evaluations over time in one file: what was measured, every judged pair, and what changed.

A history is one SQLite file. `History.add` copies an evaluation's report and judged pairs into it;
adding the same twice changes nothing, and the folder it came from is not needed again. Evaluations of
one series follow each other; whether one is better or worse than the one before is a test over the
prompts both asked (`Change`). It draws nothing and judges nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import msgspec

from prefopt.data.records import iter_records
from prefopt.errors import DataError
from prefopt.evaluation.eval_report import AnswerPair, EvalReport
from prefopt.evaluation.win_rate import Result
from prefopt.types import JudgedComparison

_SCHEMA = """
CREATE TABLE IF NOT EXISTS evaluations (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, series TEXT NOT NULL, added_at TEXT NOT NULL,
    source TEXT NOT NULL, title TEXT NOT NULL, base_model TEXT NOT NULL, tuned_model TEXT NOT NULL,
    judge TEXT NOT NULL, rubric TEXT NOT NULL, rubric_hash TEXT NOT NULL, n_prompts INTEGER NOT NULL,
    n INTEGER NOT NULL, n_unscored INTEGER NOT NULL, win_rate REAL NOT NULL, low REAL NOT NULL,
    high REAL NOT NULL, perplexity_change REAL, cost_usd REAL, report BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS pairs (
    evaluation INTEGER NOT NULL, number INTEGER NOT NULL, prompt_id TEXT NOT NULL,
    category TEXT NOT NULL, result TEXT NOT NULL, points REAL, flipped INTEGER NOT NULL,
    prompt TEXT NOT NULL, before TEXT NOT NULL, after TEXT NOT NULL, pair BLOB NOT NULL, judged BLOB,
    PRIMARY KEY (evaluation, number)
);
CREATE INDEX IF NOT EXISTS pairs_by_prompt ON pairs (evaluation, prompt_id, points);
"""
_VERSION = 1
_POINTS: dict[Result, float | None] = {"win": 1.0, "tie": 0.5, "loss": 0.0, "unscored": None}

SURE_P = 0.01
"""Below this a change counts as shown; of a hundred evaluations without one, one raises alarm."""


class Evaluation(NamedTuple):
    """One evaluation's figures. Rates are fractions, `cost_usd` US dollars."""

    number: int
    id: str
    series: str
    added_at: str
    source: str
    title: str
    base_model: str
    tuned_model: str
    judge: str
    rubric: str
    rubric_hash: str
    n_prompts: int
    n: int
    n_unscored: int
    win_rate: float
    low: float
    high: float
    perplexity_change: float | None
    cost_usd: float | None


class StoredPair(NamedTuple):
    """One judged pair in a list."""

    number: int
    prompt_id: str
    category: str
    result: Result
    flipped: bool
    prompt: str
    before: str
    after: str


class Change(NamedTuple):
    """How an evaluation differs from an earlier one.

    `verdict` is "not comparable" with a reason where another judge, rubric or baseline was used, or no
    prompt was asked in both. Otherwise a sign test over the prompts whose score differs: under no
    change, better and worse are equally likely (`p_value`, two-sided). `difference` is the change of
    the mean score on the shared prompts, a fraction.
    """

    verdict: Literal["better", "worse", "unclear", "not comparable"]
    reason: str = ""
    n_shared: int = 0
    n_better: int = 0
    n_worse: int = 0
    difference: float = 0.0
    p_value: float = 1.0


class PairFilter(NamedTuple):
    """Which pairs of an evaluation are wanted; empty fields take all."""

    text: str = ""
    result: str = ""
    category: str | None = None
    flipped: bool = False


ALL_PAIRS = PairFilter()


class AnswerChange(NamedTuple):
    """The tuned answers of two evaluations to one prompt, with their scores (None: no verdict)."""

    prompt: str
    earlier_number: int
    later_number: int
    earlier: str
    later: str
    earlier_points: float | None
    later_points: float | None


class History:
    """The evaluations kept in one file.

    Args:
        path: the SQLite file.
        create: whether to make it if it is not there.

    Raises:
        DataError: there is no such file, it is no history, or it was written by a newer prefopt.
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise DataError(
                f"there is no history {self.path}. `prefopt history add` makes one from an "
                "evaluation's folder."
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > _VERSION:
                raise DataError(f"{self.path} was written by a newer prefopt (form {version}).")
            if version == 0:
                if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise DataError(f"{self.path} is a database, but no history of prefopt's.")
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.executescript(_SCHEMA)
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
        except (sqlite3.Error, OSError) as error:
            raise DataError(f"cannot use {self.path} as a history: {error}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # --- In --------------------------------------------------------------------------------------

    def add(self, folder: str | Path, *, series: str = "") -> Evaluation:
        """Keep an evaluation: its report, and every judged pair with the verdicts in both orders.

        Args:
            folder: what `prefopt evaluate` wrote, or the folder of a run.
            series: what it belongs to, such as the name of the model that is being improved; only
                evaluations of one series are compared with each other.

        Returns:
            the evaluation as it is kept, also when it was there already.

        Raises:
            DataError: there is no report, or report and verdicts do not belong together.
        """
        folder = Path(folder)
        report_file, judged_file = _files(folder)
        content = report_file.read_bytes()
        name = hashlib.sha256(series.encode() + b"\0" + content).hexdigest()[:16]
        known = self._one("SELECT number FROM evaluations WHERE id = ?", name)
        if known is not None:
            return self.evaluation(known[0])
        try:
            report = msgspec.json.decode(content, type=EvalReport)
        except (msgspec.DecodeError, ValueError) as error:
            raise DataError(f"{report_file} is no report of an evaluation: {error}.") from error
        verdicts: Iterator[JudgedComparison | None] = (
            iter_records(judged_file, JudgedComparison) if judged_file else iter(())
        )
        rate = report.win_rate
        low, high = rate.headline_interval
        kept = msgspec.json.encode(msgspec.structs.replace(report, answers=()))
        rubric_hash = hashlib.sha256(report.rubric_text.encode()).hexdigest()[:16]
        with self._writing():
            number = self._db.execute(
                "INSERT INTO evaluations VALUES (NULL,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    name, series, datetime.now(UTC).isoformat(timespec="seconds"), folder.name,
                    report.title, report.base_model, report.tuned_model, report.judge,
                    report.rubric_name, rubric_hash, rate.n_prompts, rate.n, rate.n_unscored,
                    rate.win_rate, low, high, report.perplexity_change, report.cost_usd, kept,
                ),
            ).lastrowid  # fmt: skip
            self._db.executemany(
                "INSERT INTO pairs VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    (number, place, *row)
                    for place, row in enumerate(
                        _pair_rows(report.answers, verdicts, judged_file), start=1
                    )
                ),
            )
        return self.evaluation(int(number or 0))

    def remove(self, number: int) -> None:
        """Forget an evaluation.

        Raises:
            DataError: there is none with this number.
        """
        self.evaluation(number)
        with self._writing():
            self._db.execute("DELETE FROM pairs WHERE evaluation = ?", (number,))
            self._db.execute("DELETE FROM evaluations WHERE number = ?", (number,))

    # --- Out -------------------------------------------------------------------------------------

    def series(self) -> list[str]:
        """The names of all series, the one added to last first."""
        rows = self._all("SELECT series FROM evaluations GROUP BY series ORDER BY max(number) DESC")
        return [row[0] for row in rows]

    def evaluations(self, series: str | None = None) -> list[Evaluation]:
        """The evaluations of one series or of all, oldest first."""
        where = "" if series is None else "WHERE series = ? "
        rows = self._all(
            f"SELECT {', '.join(Evaluation._fields)} FROM evaluations {where}ORDER BY number",
            *([] if series is None else [series]),
        )
        return [Evaluation(*row) for row in rows]

    def evaluation(self, number: int) -> Evaluation:
        """One evaluation.

        Raises:
            DataError: there is none with this number.
        """
        row = self._one(
            f"SELECT {', '.join(Evaluation._fields)} FROM evaluations WHERE number = ?", number
        )
        if row is None:
            raise DataError(f"{self.path} holds no evaluation {number}.")
        return Evaluation(*row)

    def report(self, number: int) -> EvalReport:
        """An evaluation's report, without its answers.

        Raises:
            DataError: there is none with this number.
        """
        self.evaluation(number)
        row = self._one("SELECT report FROM evaluations WHERE number = ?", number)
        return msgspec.json.decode(row[0], type=EvalReport)

    def categories(self, number: int) -> list[str]:
        """The categories of an evaluation's prompts."""
        rows = self._all(
            "SELECT DISTINCT category FROM pairs WHERE evaluation = ? ORDER BY category", number
        )
        return [row[0] for row in rows]

    def pairs(
        self, number: int, wanted: PairFilter = ALL_PAIRS, *, offset: int = 0, limit: int = 50
    ) -> tuple[list[StoredPair], int]:
        """Some of an evaluation's pairs, and how many the filter leaves in all.

        Text is looked for in prompts and both answers; in ASCII, case makes no difference.
        """
        where, values = "evaluation = ?", [number]
        conditions: list[tuple[bool, str, list[Any]]] = [
            (bool(wanted.result), "result = ?", [wanted.result]),
            (wanted.category is not None, "category = ?", [wanted.category]),
            (wanted.flipped, "flipped = 1", []),
            (
                bool(wanted.text),
                "(prompt LIKE ? ESCAPE '\\' OR before LIKE ? ESCAPE '\\' OR after LIKE ? ESCAPE '\\')",
                [_pattern(wanted.text)] * 3,
            ),
        ]
        for holds, condition, given in conditions:
            if holds:
                where, values = f"{where} AND {condition}", values + given
        total = self._one(f"SELECT count(*) FROM pairs WHERE {where}", *values)[0]
        rows = self._all(
            f"SELECT {', '.join(StoredPair._fields)} FROM pairs WHERE {where} "
            "ORDER BY number LIMIT ? OFFSET ?",
            *values, limit, offset,
        )  # fmt: skip
        return [StoredPair(*row)._replace(flipped=bool(row[4])) for row in rows], total

    def pair(self, number: int, place: int) -> tuple[AnswerPair, JudgedComparison | None]:
        """One pair, and its verdicts in both orders where they were kept.

        Raises:
            DataError: there is none.
        """
        row = self._one(
            "SELECT pair, judged FROM pairs WHERE evaluation = ? AND number = ?", number, place
        )
        if row is None:
            raise DataError(f"evaluation {number} holds no pair {place}.")
        judged = None if row[1] is None else msgspec.json.decode(row[1], type=JudgedComparison)
        return msgspec.json.decode(row[0], type=AnswerPair), judged

    def change(self, earlier: int, later: int) -> Change:
        """Whether a later evaluation is better or worse than an earlier one."""
        old, new = self.evaluation(earlier), self.evaluation(later)
        for what, a, b in (
            ("judge", old.judge, new.judge),
            ("rubric", old.rubric_hash, new.rubric_hash),
            ("baseline", old.base_model, new.base_model),
        ):
            if a != b:
                return Change("not comparable", f"another {what}")
        row = self._one(
            f"SELECT count(*), total(later > earlier), total(later < earlier), avg(later - earlier) "
            f"FROM ({_SHARED})",
            earlier,
            later,
        )
        n_shared, better, worse, difference = int(row[0]), int(row[1]), int(row[2]), row[3]
        if not n_shared:
            return Change("not comparable", "no prompt was scored in both")
        from scipy.stats import binomtest

        n = better + worse
        p = float(binomtest(better, n).pvalue) if n else 1.0
        verdict: Literal["better", "worse", "unclear"] = "unclear"
        if p < SURE_P:
            verdict = "better" if better > worse else "worse"
        return Change(verdict, "", n_shared, better, worse, float(difference), p)

    def changes(self, series: str) -> dict[int, Change]:
        """Each evaluation of a series against the one before it, by number; none for the first."""
        found = self.evaluations(series)
        return {b.number: self.change(a.number, b.number) for a, b in itertools.pairwise(found)}

    def answer_changes(
        self,
        earlier: int,
        later: int,
        *,
        which: Literal["worse", "better", "all"] = "all",
        offset: int = 0,
        limit: int = 20,
    ) -> tuple[list[AnswerChange], int]:
        """The tuned answers of two evaluations to the same prompts, those that got worse first."""
        self.evaluation(earlier), self.evaluation(later)
        where = {"worse": "WHERE d < 0", "better": "WHERE d > 0", "all": ""}[which]
        order = "d DESC" if which == "better" else "d IS NULL, d"
        inner = f"({_ANSWERS}) {where}"
        total = self._one(f"SELECT count(*) FROM {inner}", earlier, later)[0]
        rows = self._all(
            f"SELECT prompt, a_number, b_number, a_after, b_after, a_points, b_points FROM {inner} "
            f"ORDER BY {order}, a_number LIMIT ? OFFSET ?",
            earlier, later, limit, offset,
        )  # fmt: skip
        return [AnswerChange(*row) for row in rows], total

    # --- The file --------------------------------------------------------------------------------

    def _all(self, query: str, *values: Any) -> list[Any]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise DataError(f"cannot read the history {self.path}: {error}.") from error

    def _one(self, query: str, *values: Any) -> Any:
        rows = self._all(query, *values)
        return rows[0] if rows else None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """All or nothing: a kill in between leaves the file as it was."""
        try:
            with self._db:
                yield
        except sqlite3.Error as error:
            raise DataError(f"cannot write the history {self.path}: {error}.") from error


# A prompt's score is the mean over its comparisons.
_SHARED = """
    SELECT a.p AS earlier, b.p AS later
    FROM (SELECT prompt_id, avg(points) AS p FROM pairs
          WHERE evaluation = ? AND points IS NOT NULL GROUP BY prompt_id) a
    JOIN (SELECT prompt_id, avg(points) AS p FROM pairs
          WHERE evaluation = ? AND points IS NOT NULL GROUP BY prompt_id) b USING (prompt_id)
"""
# Several answers to a prompt are paired in their order.
_ANSWERS = """
    SELECT a.prompt, a.number AS a_number, b.number AS b_number, a.after AS a_after,
           b.after AS b_after, a.points AS a_points, b.points AS b_points, b.points - a.points AS d
    FROM (SELECT *, row_number() OVER (PARTITION BY prompt_id ORDER BY number) AS place
          FROM pairs WHERE evaluation = ?) a
    JOIN (SELECT *, row_number() OVER (PARTITION BY prompt_id ORDER BY number) AS place
          FROM pairs WHERE evaluation = ?) b USING (prompt_id, place)
"""


def _files(folder: Path) -> tuple[Path, Path | None]:
    """Where a folder has its report and, if it is there, its judged pairs."""
    for report, judged in (
        (folder / "report.json", folder / "judged.jsonl"),
        (folder / "report" / "report.json", folder / "judged_held_out.jsonl"),
    ):
        if report.is_file():
            return report, judged if judged.is_file() else None
    raise DataError(
        f"{folder} holds no evaluation: neither report.json, as `prefopt evaluate` writes it, nor "
        "report/report.json, as `prefopt run` does."
    )


def _pair_rows(
    pairs: Sequence[AnswerPair],
    verdicts: Iterator[JudgedComparison | None],
    judged_file: Path | None,
) -> Iterator[tuple[Any, ...]]:
    for pair, judged in itertools.zip_longest(pairs, verdicts):
        if judged_file is not None and not _belong(pair, judged):
            raise DataError(
                f"{judged_file} does not hold the pairs of the report beside it: one of the two was "
                "changed or is of another evaluation. Evaluate again."
            )
        yield (
            pair.prompt.prompt_id,
            pair.prompt.category,
            pair.result,
            _POINTS[pair.result],
            int(pair.flipped),
            "\n\n".join(message.content for message in pair.prompt.messages),
            pair.before,
            pair.after,
            msgspec.json.encode(pair),
            None if judged is None else msgspec.json.encode(judged),
        )


def _belong(pair: AnswerPair | None, judged: JudgedComparison | None) -> bool:
    if pair is None or judged is None:
        return False
    answers = (judged.comparison.a.text, judged.comparison.b.text)
    return judged.comparison.prompt == pair.prompt and answers == (pair.after, pair.before)


def _pattern(text: str) -> str:
    for sign in ("\\", "%", "_"):
        text = text.replace(sign, f"\\{sign}")
    return f"%{text}%"
