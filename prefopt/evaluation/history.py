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
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import msgspec

from prefopt.data.records import iter_records
from prefopt.errors import DataError
from prefopt.evaluation.capability_scores import SCORES_FILE, TaskScores
from prefopt.evaluation.eval_report import AnswerPair, EvalReport, answer_pair
from prefopt.evaluation.history_changes import (
    CapabilityChange,
    Change,
    MeasuredTasks,
    change_of_capabilities,
    change_of_scores,
)
from prefopt.evaluation.win_rate import Result
from prefopt.types import JudgedComparison

# What a page filters and sorts by is apart from the texts, and the texts from the verdicts: a search
# through a hundred thousand pairs reads no more than it needs.
_SCHEMA = """
CREATE TABLE evaluations (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, series TEXT NOT NULL, added_at TEXT NOT NULL,
    source TEXT NOT NULL, title TEXT NOT NULL, base_model TEXT NOT NULL, tuned_model TEXT NOT NULL,
    judge TEXT NOT NULL, rubric TEXT NOT NULL, rubric_hash TEXT NOT NULL, n_prompts INTEGER NOT NULL,
    n INTEGER NOT NULL, n_unscored INTEGER NOT NULL, win_rate REAL NOT NULL, low REAL NOT NULL,
    high REAL NOT NULL, perplexity_change REAL, cost_usd REAL, report BLOB NOT NULL
);
CREATE TABLE pairs (
    evaluation INTEGER NOT NULL, number INTEGER NOT NULL, prompt_id TEXT NOT NULL,
    place INTEGER NOT NULL, category TEXT NOT NULL, result TEXT NOT NULL, points REAL,
    flipped INTEGER NOT NULL, PRIMARY KEY (evaluation, number)
) WITHOUT ROWID;
CREATE INDEX pairs_by_prompt ON pairs (evaluation, prompt_id, place, points);
CREATE TABLE texts (
    evaluation INTEGER NOT NULL, number INTEGER NOT NULL, prompt TEXT NOT NULL, before TEXT NOT NULL,
    after TEXT NOT NULL, PRIMARY KEY (evaluation, number)
);
CREATE TABLE verdicts (
    evaluation INTEGER NOT NULL, number INTEGER NOT NULL, pair BLOB, judged BLOB,
    PRIMARY KEY (evaluation, number)
);
CREATE TABLE task_scores (
    evaluation INTEGER NOT NULL, task TEXT NOT NULL, scores BLOB NOT NULL,
    PRIMARY KEY (evaluation, task)
);
CREATE TABLE changes (
    earlier INTEGER NOT NULL, later INTEGER NOT NULL, scores BLOB NOT NULL,
    capabilities BLOB NOT NULL, PRIMARY KEY (earlier, later)
);
"""
_VERSION = 2
_FROM_VERSION_1 = """
ALTER TABLE pairs RENAME TO pairs_1;
ALTER TABLE evaluations RENAME TO evaluations_1;
DROP INDEX pairs_by_prompt;
"""
_COPY_VERSION_1 = """
INSERT INTO evaluations SELECT * FROM evaluations_1;
INSERT INTO pairs SELECT evaluation, number, prompt_id,
    row_number() OVER (PARTITION BY evaluation, prompt_id ORDER BY number),
    category, result, points, flipped FROM pairs_1;
INSERT INTO texts SELECT evaluation, number, prompt, before, after FROM pairs_1;
INSERT INTO verdicts SELECT evaluation, number, iif(judged IS NULL, pair, NULL), judged FROM pairs_1;
DROP TABLE pairs_1;
DROP TABLE evaluations_1;
"""
_TABLES = ("pairs", "texts", "verdicts")
_ROWS_AT_ONCE = 1000
_POINTS: dict[Result, float | None] = {"win": 1.0, "tie": 0.5, "loss": 0.0, "unscored": None}


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
            self._db = sqlite3.connect(
                self.path, timeout=60, check_same_thread=False, isolation_level=None
            )
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise DataError(f"cannot use {self.path} as a history: {error}.") from error

    def _open(self) -> None:
        """Make the tables, or bring those of an older prefopt to today's form, all or nothing."""
        version = self._version()
        if version == _VERSION:
            return
        if version > _VERSION:
            raise DataError(f"{self.path} was written by a newer prefopt (form {version}).")
        if version == 0 and self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise DataError(f"{self.path} is a database, but no history of prefopt's.")
        self._db.execute("PRAGMA journal_mode = WAL")
        with self._writing():
            version = self._version()  # another process may have been quicker
            steps = {0: _SCHEMA, 1: _FROM_VERSION_1 + _SCHEMA + _COPY_VERSION_1}.get(version, "")
            for step in steps.split(";\n"):
                self._db.execute(step)
            self._db.execute(f"PRAGMA user_version = {_VERSION}")

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

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
        known = self._known(name)
        if known is not None:
            return known
        try:
            report = msgspec.json.decode(content, type=EvalReport)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise DataError(f"{report_file} is no report of an evaluation: {error}.") from error
        del content  # half a gigabyte for a hundred thousand long answers
        verdicts: Iterator[JudgedComparison | None] = (
            iter_records(judged_file, JudgedComparison) if judged_file else iter(())
        )
        scores = _scores_beside(folder, report)
        rate = report.win_rate
        low, high = rate.headline_interval
        kept = msgspec.json.encode(msgspec.structs.replace(report, answers=()))
        rubric_hash = hashlib.sha256(report.rubric_text.encode()).hexdigest()[:16]
        with self._writing():
            if (known := self._known(name)) is not None:  # another process was quicker
                return known
            number = self._db.execute(
                "INSERT INTO evaluations VALUES (NULL,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    name, series, datetime.now(UTC).isoformat(timespec="seconds"), folder.name,
                    report.title, report.base_model, report.tuned_model, report.judge,
                    report.rubric_name, rubric_hash, rate.n_prompts, rate.n, rate.n_unscored,
                    rate.win_rate, low, high, report.perplexity_change, report.cost_usd, kept,
                ),
            ).lastrowid  # fmt: skip
            assert number is not None
            rows = _rows(number, report.answers, verdicts, judged_file)
            while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
                for table, values in zip(_TABLES, zip(*some, strict=True), strict=True):
                    signs = ",".join("?" * len(values[0]))
                    self._db.executemany(f"INSERT INTO {table} VALUES ({signs})", values)
            self._db.executemany(
                "INSERT INTO task_scores VALUES (?,?,?)",
                [(number, task, msgspec.json.encode(kept)) for task, kept in scores.items()],
            )
        self.changes(series)  # so that no page waits for them
        return self.evaluation(number)

    def remove(self, number: int) -> None:
        """Forget an evaluation.

        Raises:
            DataError: there is none with this number.
        """
        self.evaluation(number)
        with self._writing():
            for table in (*_TABLES, "task_scores"):
                self._db.execute(f"DELETE FROM {table} WHERE evaluation = ?", (number,))
            # A number is given again once the last evaluation is gone.
            self._db.execute("DELETE FROM changes WHERE ? IN (earlier, later)", (number,))
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

        Text is looked for in prompts and both answers, in small letters, capitals, and as given.
        """
        where, values = ["evaluation = ?"], [number]
        conditions: list[tuple[bool, str, list[Any]]] = [
            (bool(wanted.result), "result = ?", [wanted.result]),
            (wanted.category is not None, "category = ?", [wanted.category]),
            (wanted.flipped, "flipped = 1", []),
        ]
        source = "pairs"
        if wanted.text:
            source = "pairs JOIN texts USING (evaluation, number)"
            patterns = [_pattern(text) for text in _cases(wanted.text)]
            places = [(column, p) for column in ("prompt", "before", "after") for p in patterns]
            found = " OR ".join(f"{column} LIKE ? ESCAPE '\\'" for column, _ in places)
            conditions.append((True, f"({found})", [p for _, p in places]))
        for holds, condition, given in conditions:
            if holds:
                where.append(condition)
                values += given
        # Once through the pairs: how many there are, and which are on this page.
        numbers = self._all(
            f"SELECT number FROM {source} WHERE {' AND '.join(where)} ORDER BY number", *values
        )
        page = [row[0] for row in numbers[offset : offset + limit]]
        rows = self._all(
            f"SELECT {', '.join(StoredPair._fields)} FROM pairs JOIN texts USING (evaluation, number) "
            "WHERE evaluation = ? AND number IN (SELECT value FROM json_each(?)) ORDER BY number",
            number, msgspec.json.encode(page).decode(),
        )  # fmt: skip
        return [StoredPair(*row)._replace(flipped=bool(row[4])) for row in rows], len(numbers)

    def pair(self, number: int, place: int) -> tuple[AnswerPair, JudgedComparison | None]:
        """One pair, and its verdicts in both orders where they were kept.

        Raises:
            DataError: there is none.
        """
        row = self._one(
            "SELECT pair, judged FROM verdicts WHERE evaluation = ? AND number = ?", number, place
        )
        if row is None:
            raise DataError(f"evaluation {number} holds no pair {place}.")
        if row[1] is None:
            return msgspec.json.decode(row[0], type=AnswerPair), None
        judged = msgspec.json.decode(row[1], type=JudgedComparison)
        return answer_pair(judged), judged

    def change(self, earlier: int, later: int) -> Change:
        """Whether a later evaluation is better or worse than an earlier one."""
        return self._compared(earlier, later)[0]

    def capability_change(self, earlier: int, later: int) -> CapabilityChange:
        """What a later evaluation's tuned model can do against that of an earlier one."""
        return self._compared(earlier, later)[1]

    def _compared(self, earlier: int, later: int) -> tuple[Change, CapabilityChange]:
        """The two changes, worked out once and kept where the file can be written."""
        row = self._one(
            "SELECT scores, capabilities FROM changes WHERE earlier = ? AND later = ?",
            earlier, later,
        )  # fmt: skip
        if row is not None:
            return (
                msgspec.json.decode(row[0], type=Change),
                msgspec.json.decode(row[1], type=CapabilityChange),
            )
        found = (
            self._score_change(earlier, later),
            change_of_capabilities(self._measured(earlier), self._measured(later)),
        )
        with contextlib.suppress(DataError), self._writing():
            self._db.execute(
                "INSERT OR REPLACE INTO changes VALUES (?,?,?,?)",
                (earlier, later, *map(msgspec.json.encode, found)),
            )
        return found

    def _score_change(self, earlier: int, later: int) -> Change:
        old, new = self.evaluation(earlier), self.evaluation(later)
        for what, a, b in (
            ("judge", old.judge, new.judge),
            ("rubric", old.rubric_hash, new.rubric_hash),
            ("baseline", old.base_model, new.base_model),
        ):
            if a != b:
                return Change("not comparable", f"another {what}")
        return change_of_scores(self._prompt_scores(earlier), self._prompt_scores(later))

    def _prompt_scores(self, number: int) -> dict[str, float]:
        """Each prompt's score, the mean over its comparisons."""
        return dict(
            self._all(
                "SELECT prompt_id, avg(points) FROM pairs "
                "WHERE evaluation = ? AND points IS NOT NULL GROUP BY prompt_id",
                number,
            )
        )

    def _measured(self, number: int) -> MeasuredTasks:
        report = self.report(number).capabilities
        if report is None:
            return MeasuredTasks("", "", (), {})
        rows = self._all("SELECT task, scores FROM task_scores WHERE evaluation = ?", number)
        return MeasuredTasks(
            report.engine,
            report.base_model,
            [task.task for task in report.tasks],
            {task: msgspec.json.decode(scores, type=TaskScores) for task, scores in rows},
        )

    def changes(self, series: str) -> dict[int, Change]:
        """Each evaluation of a series against the one before it, by number; none for the first."""
        found = self.evaluations(series)
        return {b.number: self.change(a.number, b.number) for a, b in itertools.pairwise(found)}

    def capability_changes(self, series: str) -> dict[tuple[int, int], CapabilityChange]:
        """The same of capabilities, by (earlier, later): each evaluation that measured any against
        the last one before it that did.
        """
        found = [e.number for e in self.evaluations(series) if self.report(e.number).capabilities]
        return {(a, b): self.capability_change(a, b) for a, b in itertools.pairwise(found)}

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
        where = {"worse": "AND d < 0", "better": "AND d > 0", "all": ""}[which]
        order = "d DESC" if which == "better" else "d IS NULL, d"
        # Several answers to a prompt are paired in their order.
        matched = self._all(
            "SELECT a.number, b.number, a.points, b.points, b.points - a.points AS d "
            "FROM pairs a JOIN pairs b ON b.prompt_id = a.prompt_id AND b.place = a.place "
            f"WHERE a.evaluation = ? AND b.evaluation = ? {where} ORDER BY {order}, a.number",
            earlier, later,
        )  # fmt: skip
        found = []
        for a, b, a_points, b_points, _ in matched[offset : offset + limit]:
            prompt, before = self._one(
                "SELECT prompt, after FROM texts WHERE evaluation = ? AND number = ?", earlier, a
            )
            (after,) = self._one(
                "SELECT after FROM texts WHERE evaluation = ? AND number = ?", later, b
            )
            found.append(AnswerChange(prompt, a, b, before, after, a_points, b_points))
        return found, len(matched)

    # --- The file --------------------------------------------------------------------------------

    def _all(self, query: str, *values: Any) -> list[Any]:
        try:
            return self._db.execute(query, values).fetchall()
        except OverflowError as error:  # of the numbers asked for
            raise DataError(f"{self.path} holds nothing with so large a number.") from error
        except sqlite3.Error as error:
            raise DataError(f"cannot read the history {self.path}: {error}.") from error

    def _one(self, query: str, *values: Any) -> Any:
        rows = self._all(query, *values)
        return rows[0] if rows else None

    def _known(self, name: str) -> Evaluation | None:
        row = self._one("SELECT number FROM evaluations WHERE id = ?", name)
        return None if row is None else self.evaluation(row[0])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """All or nothing: a kill in between leaves the file as it was."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:
                yield
        except sqlite3.Error as error:
            raise DataError(f"cannot write the history {self.path}: {error}.") from error


def check_evaluations(folders: Sequence[str | Path]) -> None:
    """Raise what `History.add` would raise for folders that hold no evaluation, for all at once.

    Raises:
        DataError: some hold none.
    """
    problems = []
    for folder in folders:
        try:
            _files(Path(folder))
        except DataError:
            what = "holds no report" if Path(folder).is_dir() else "is not there"
            problems.append(f"{folder} {what}")
    if problems:
        raise DataError(_NO_EVALUATION, problems)


_NO_EVALUATION = (
    "an evaluation is a folder with report.json, as `prefopt evaluate` writes it, or "
    "report/report.json, as `prefopt run` does."
)


def _files(folder: Path) -> tuple[Path, Path | None]:
    """Where a folder has its report and, if it is there, its judged pairs."""
    for report, judged in (
        (folder / "report.json", folder / "judged.jsonl"),
        (folder / "report" / "report.json", folder / "judged_held_out.jsonl"),
    ):
        if report.is_file():
            return report, judged if judged.is_file() else None
    raise DataError(f"{folder} holds no evaluation: {_NO_EVALUATION}")


def _rows(
    number: int,
    pairs: Sequence[AnswerPair],
    verdicts: Iterator[JudgedComparison | None],
    judged_file: Path | None,
) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]]:
    """The rows of `pairs`, `texts` and `verdicts` for each pair."""
    places: Counter[str] = Counter()
    both = itertools.zip_longest(pairs, verdicts)
    for place, (pair, judged) in enumerate(both, start=1):
        if judged_file is not None and not _belong(pair, judged):
            raise DataError(
                f"{judged_file} does not hold the pairs of the report beside it: one of the two was "
                "changed or is of another evaluation. Evaluate again."
            )
        prompt = pair.prompt
        places[prompt.prompt_id] += 1
        yield (
            (
                number, place, prompt.prompt_id, places[prompt.prompt_id], prompt.category,
                pair.result, _POINTS[pair.result], int(pair.flipped),
            ),
            (
                number, place, "\n\n".join(message.content for message in prompt.messages),
                pair.before, pair.after,
            ),
            # The verdicts hold all that the pair says.
            (number, place, msgspec.json.encode(pair), None)
            if judged is None
            else (number, place, None, msgspec.json.encode(judged)),
        )  # fmt: skip


def _scores_beside(folder: Path, report: EvalReport) -> dict[str, TaskScores]:
    """The tuned model's score on each item of the report's capability tasks, where they were kept."""
    if report.capabilities is None:
        return {}
    last: dict[tuple[str, str], TaskScores] = {}
    for place in (folder / "capabilities", folder / ".partial" / "capabilities"):
        if (place / SCORES_FILE).is_file():
            for scores in iter_records(place / SCORES_FILE, TaskScores):
                last[scores.side, scores.task] = scores
            break
    found = {}
    for task in report.capabilities.tasks:
        tuned, base = last.get(("tuned", task.task)), last.get(("base", task.task))
        if tuned is None or base is None:
            continue
        asked = {item.item for item in base.items}
        items = [msgspec.structs.replace(i, answer="") for i in tuned.items if i.item in asked]
        if len(items) != task.n or not math.isclose(fmean(i.score for i in items), task.tuned):
            raise DataError(
                f"{place / SCORES_FILE} does not hold the scores of {task.title} in the report beside "
                "it: one of the two is of another evaluation. Evaluate again."
            )
        found[task.task] = msgspec.structs.replace(tuned, items=tuple(items))
    return found


def _belong(pair: AnswerPair | None, judged: JudgedComparison | None) -> bool:
    if pair is None or judged is None:
        return False
    answers = (judged.comparison.a.text, judged.comparison.b.text)
    return judged.comparison.prompt == pair.prompt and answers == (pair.after, pair.before)


def _cases(text: str) -> list[str]:
    """How a text may be written; SQLite ignores case in ASCII only, other letters need each form."""
    forms = (text, text.lower(), text.upper(), text[:1].upper() + text[1:].lower())
    return list({_ascii_lower(form): form for form in forms}.values())


def _ascii_lower(text: str) -> str:
    return "".join(sign.lower() if sign.isascii() else sign for sign in text)


def _pattern(text: str) -> str:
    for sign in ("\\", "%", "_"):
        text = text.replace(sign, f"\\{sign}")
    return f"%{text}%"
