"""`CalibrationReport` as one HTML page with a reliability diagram; it works out nothing itself."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from prefopt.page_template import page_environment

if TYPE_CHECKING:
    from prefopt.judges.calibrate import CalibrationReport


def calibration_page(report: CalibrationReport) -> str:
    """The report as HTML."""
    from prefopt.judges.calibrate import FIGURES
    from prefopt.judges.calibration import UNINFORMATIVE

    shown = report.sets if len(report.sets) == 1 else (report.overall, *report.sets)
    return (
        page_environment("judges")
        .get_template("calibration_report.html.j2")
        .render(
            report=report,
            shown=[
                (found, [(words, getattr(found, field)) for field, words in FIGURES.items()])
                for found in shown
            ],
            uninformative=UNINFORMATIVE,
            diagram=reliability_diagram(report) if report.calibration else "",
        )
    )


def reliability_diagram(report: CalibrationReport) -> str:
    """The fitted probability against how often people agree, one point a grade, as SVG text."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.plot([0.5, 1], [0.5, 1], color="#888888", linewidth=1, linestyle="--")
    points = [b for b in report.bins if b.grade > 0]
    most = max((b.n for b in points), default=1)
    for i, b in enumerate(points):
        # To the left and to the right in turn, since points may lie close together.
        offset = (10, -14) if i % 2 else (-40, 10)
        error = (b.wins * (1 - b.wins) / b.n) ** 0.5
        axes.plot([b.fitted] * 2, [b.wins - error, b.wins + error], color="#0072b2", linewidth=1.5)
        axes.scatter([b.fitted], [b.wins], s=25 + 150 * b.n / most, color="#0072b2", zorder=3)
        axes.annotate(f"|g| = {b.grade:g}", (b.fitted, b.wins), offset,
                      textcoords="offset points", fontsize=9, color="#808080")  # fmt: skip
    axes.set_xlabel("fitted probability that the label is right")
    axes.set_ylabel("how often people agree")
    axes.set_xlim(0.48, 1.02)
    for part in (
        axes.xaxis.label,
        axes.yaxis.label,
        *axes.get_xticklabels(),
        *axes.get_yticklabels(),
    ):
        part.set_color("#808080")
    for spine in axes.spines.values():
        spine.set_color("#808080")
    axes.tick_params(colors="#808080")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)
