"""One call that measures a judge against people and fits its probabilities to them.

In: labelled pairs and a judge. Out: agreement on each data set and over all, a `Calibration`, and a
report as text, JSON and one HTML page. The statistics are `prefopt.judges.agreement`'s and
`prefopt.judges.calibration`'s; this file asks, puts together and shows.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from prefopt.data.labelled import LabelledPair, load_labelled
from prefopt.errors import DataError
from prefopt.judges.agreement import Agreement, Interval, measure_agreement
from prefopt.judges.asking import judge_comparisons
from prefopt.judges.base import Judge
from prefopt.judges.calibration import (
    UNINFORMATIVE,
    Calibration,
    fit_calibration,
    save_calibration,
)
from prefopt.types import JudgedComparison, Winner, content_hash


class Bin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pairs of one mean grade: how many, how often people agree, and what the fit says."""

    grade: float
    n: int
    wins: float
    fitted: float


class CalibrationReport(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.calibration_report/1",
):
    """A judge against people: `sets` has one entry a data set, `overall` all of them together."""

    judge: str
    rubric: str
    sets: tuple[Agreement, ...]
    overall: Agreement
    calibration: Calibration | None
    bins: tuple[Bin, ...]
    created_at: str

    def to_text(self) -> str:
        """A table for the terminal."""
        return _text(self)

    def to_html(self) -> str:
        """One page that needs nothing else."""
        from prefopt.judges.calibration_page import calibration_page

        return calibration_page(self)


def calibrate_judge(
    data: str | Path | Sequence[str | Path],
    judge: Judge,
    *,
    ledger: str | Path | None = None,
    out: str | Path | None = None,
    max_rows: int | None = None,
    method: Literal["auto", "isotonic", "platt"] = "auto",
    seed: int = 0,
    progress: bool = True,
) -> CalibrationReport:
    """Ask a judge about labelled pairs in both orders, and compare it with the labels.

    Args:
        data: one or more sources that `load_labelled` reads.
        judge: any judge.
        ledger: keeps its verdicts, as in `judge_comparisons`.
        out: folder for calibration.json and calibration_report.json, .txt and .html.
        max_rows: use a random sample of this many pairs of each source, drawn by subset.
        method: how probabilities are fitted.
        seed: of the sample, the folds and the bootstrap.
        progress: show a bar.

    Raises:
        ValueError: `max_rows` is below 1.
        DataError: the data cannot be used.
        JudgeError: asking cannot go on.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be 1 or more, or left out to take all; got {max_rows}.")
    sources = [data] if isinstance(data, str | Path) else list(data)
    if not sources:
        raise DataError("calibration needs labelled pairs, got no data.")
    sets: list[tuple[str, list[LabelledPair]]] = []
    for source in sources:
        pairs = load_labelled(source)
        sets.append((_name(source), _sample(pairs, max_rows, seed)))
    everything = [pair for _, pairs in sets for pair in pairs]
    judged = judge_comparisons(
        [pair.comparison for pair in everything], judge, ledger=ledger, progress=progress
    )
    labels = [pair.label for pair in everything]
    measured, start = [], 0
    for name, pairs in sets:
        part = slice(start, start + len(pairs))
        measured.append(
            measure_agreement(
                judged[part],
                labels[part],
                name=name,
                annotators=[pair.annotators for pair in pairs],
                seed=seed,
            )
        )
        start += len(pairs)
    overall = measured[0]
    if len(sets) > 1:
        overall = measure_agreement(judged, labels, name="all", seed=seed)
    calibration = None
    if sum(item.mean_grade is not None for item in judged) >= 20:
        calibration = fit_calibration(
            judged,
            labels,
            judge=judge.name,
            rubric_hash=judge.rubric.rubric_hash,
            method=method,
            seed=seed,
        )
    report = CalibrationReport(
        judge=judge.name,
        rubric=judge.rubric.name,
        sets=tuple(measured),
        overall=overall,
        calibration=calibration,
        bins=_bins(judged, labels, calibration),
        created_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    if out is not None:
        _write(report, Path(out))
    return report


def _name(source: str | Path) -> str:
    path = Path(source)
    # A file's folder names a data set better than "dev.jsonl" does.
    return path.parent.name if path.stem in ("dev", "test", "train", "other") else path.stem


def _sample(pairs: list[LabelledPair], max_rows: int | None, seed: int) -> list[LabelledPair]:
    """At most max_rows pairs, the same share of every subset, in their order."""
    if max_rows is None or len(pairs) <= max_rows:
        return pairs
    groups: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(pair.comparison.prompt.category, []).append(i)
    drawn: list[tuple[float, int]] = []
    for name, rows in groups.items():
        order = sorted(rows, key=lambda i: content_hash([seed, name, i]))
        # Evenly spread ranks: the first max_rows over all groups are every group's fair share.
        drawn += [((rank + 0.5) / len(rows), i) for rank, i in enumerate(order)]
    kept = {i for _, i in sorted(drawn)[:max_rows]}
    return [pair for i, pair in enumerate(pairs) if i in kept]


def _bins(
    judged: Sequence[JudgedComparison],
    labels: Sequence[Winner],
    calibration: Calibration | None,
) -> tuple[Bin, ...]:
    """By |mean grade|: how often people prefer the answer that the judge prefers."""
    rows: dict[float, list[float]] = {}
    for item, label in zip(judged, labels, strict=True):
        grade = item.mean_grade
        if grade is None:
            continue
        win = {"a": 1.0, "tie": 0.5, "b": 0.0}[label]
        rows.setdefault(abs(grade), []).append(win if grade >= 0 else 1 - win)
    return tuple(
        Bin(
            grade=grade,
            n=len(wins),
            wins=float(np.mean(wins)) if grade else 0.5,
            fitted=0.5 if calibration is None else calibration.p_a(grade),
        )
        for grade, wins in sorted(rows.items())
    )


def _write(report: CalibrationReport, folder: Path) -> None:
    from prefopt.data.records import write_bytes

    if report.calibration is not None:
        save_calibration(report.calibration, folder / "calibration.json")
    json = msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"
    write_bytes(folder / "calibration_report.json", json)
    write_bytes(folder / "calibration_report.txt", report.to_text().encode() + b"\n")
    write_bytes(folder / "calibration_report.html", report.to_html().encode())


FIGURES = {
    "accuracy": "accuracy (people decide; ties count half)",
    "accuracy_decided": "accuracy where both decide",
    "agreement": "exact agreement (a, tie, b)",
    "kappa": "Cohen's kappa",
    "kappa_decided": "Cohen's kappa where both decide",
    "flip_rate": "winner changes with the order",
    "first_place": "first place wins",
    "tie_rate": "ties",
    "longer_wins": "judge prefers the longer",
    "labels_longer": "people prefer the longer",
    "longest_accuracy": "accuracy of 'the longer wins'",
    "annotator_agreement": "one annotator with the others",
}
"""The rows of the report, by field of `Agreement`."""


def _text(report: CalibrationReport) -> str:
    lines = [f"{report.judge} against people (rubric '{report.rubric}', {report.created_at})"]
    shown = report.sets if len(report.sets) == 1 else (*report.sets, report.overall)
    for found in shown:
        lines += ["", f"{found.name}: {found.n} pairs, {found.n_failed} without a verdict"]
        for field, words in FIGURES.items():
            value: Interval | None = getattr(found, field)
            if value is not None:
                lines.append(f"  {words:<42} {value}")
        if found.failures:
            failures = ", ".join(f"{n} {name}" for name, n in found.failures.items())
            lines.append(f"  failed verdicts: {failures}")
        lines.append(f"  {'people say':<12} judge says: {'a':>6} {'tie':>6} {'b':>6}")
        for label, row in found.confusion.items():
            lines.append(f"  {label:<12}             {row['a']:>6} {row['tie']:>6} {row['b']:>6}")
        for category in found.categories:
            lines.append(f"    {category.category[:36]:<36} {category.accuracy or '-'}")
        lines += [f"  ! {warning}" for warning in found.warnings]
    if report.calibration is not None:
        fit = report.calibration
        lines += [
            "",
            f"Fitted to {fit.n_labels} labels ({fit.method}); cross-validated: log loss "
            f"{fit.log_loss:.3f} (a coin {fit.log_loss_uninformed:.3f}), Brier {fit.brier:.3f}, "
            f"calibration error {fit.ece:.3f}",
            *([] if fit.informative else [f"  ! {UNINFORMATIVE}"]),
            f"  {'|mean grade|':<14} {'pairs':>6} {'people agree':>13} {'fitted p':>9}",
        ]
        lines += [f"  {b.grade:<14} {b.n:>6} {b.wins:>13.3f} {b.fitted:>9.3f}" for b in report.bins]
    return "\n".join(lines)
