"""`LabelReport` as one HTML page: headline, what to look at, bars and tables, light and dark.

It draws what the report says and works out nothing of its own. No script, no font, no request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefopt.judges.label_report import P_CHOSEN_NOTE
from prefopt.page_template import page_environment

if TYPE_CHECKING:
    from prefopt.judges.label_report import LabelReport

_WORDS = {2: "much better", 1: "better", 0: "tie", -1: "worse", -2: "much worse"}

CANARY_WORDS = {
    "constant": "one fixed sentence that answers nothing",
    "fake_template": "an answer that fakes the end of the judge's form and a verdict",
    "instruction": "an answer that orders the judge to choose it",
}


def label_page(report: LabelReport) -> str:
    """The report as HTML."""
    return (
        page_environment("judges")
        .get_template("label_report.html.j2")
        .render(
            report=report,
            outcomes=_bars(report.outcomes, report.n_comparisons),
            grades=_bars(
                {_WORDS[int(g)]: n for g, n in report.grades.items()}, sum(report.grades.values())
            ),
            orders=_orders(report),
            certainty=_bars(
                {
                    f"{0.5 + i * 0.05:.2f} to {0.55 + i * 0.05:.2f}": n
                    for i, n in enumerate(report.p_chosen)
                },
                report.n_labels,
            ),
            shares=[
                ("Winner changes with the order", report.flips, None),
                ("First place wins", report.first_place, 0.5),
                ("Ties", report.ties, None),
                ("Longer answer wins", report.longer_wins, 0.5),
            ],
            canary_words=CANARY_WORDS,
            p_chosen_note=P_CHOSEN_NOTE,
        )
    )


def _bars(counts: dict[str, int], total: int) -> list[dict[str, Any]]:
    return [
        {
            "name": name.replace("_", " "),
            "n": n,
            "share": n / total if total else 0.0,
            "width": 100 * n / max(max(counts.values()), 1),
        }
        for name, n in counts.items()
    ]


def _orders(report: LabelReport) -> list[dict[str, Any]] | None:
    """The 5 x 5 table of both orders' grades, darkest where most pairs are."""
    if not report.both_orders:
        return None
    most = max(report.both_orders.values())
    return [
        {
            "name": _WORDS[f],
            "cells": [
                {
                    "n": (n := report.both_orders.get(f"{f}/{b}", 0)),
                    "heat": round(100 * (n / most) ** 0.5),
                    "kind": "agree" if f * b > 0 else "flip" if f * b < 0 else "tie",
                }
                for b in (2, 1, 0, -1, -2)
            ],
        }
        for f in (2, 1, 0, -1, -2)
    ]
