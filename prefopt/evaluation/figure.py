"""The pictures of a report: one for the README, and single panels for the HTML page.

In: an `EvalReport`. Out: a matplotlib `Figure`, PNG bytes, or SVG text whose colours are CSS
variables, so that one drawing fits a light and a dark page. It never touches pyplot's global state,
computes no statistics, and draws no text a model wrote.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from prefopt.evaluation.advice import interval, percent
from prefopt.evaluation.model_figures import Mean
from prefopt.evaluation.ranking import ELO_PER_LOGIT
from prefopt.evaluation.win_rate import word_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from prefopt.evaluation.eval_report import EvalReport

# Blue and vermilion of Okabe and Ito's palette stay apart in all common colour blindness; position
# and words repeat what colour says.
INK, MUTED, LINE, PAPER = "#1c2128", "#59636e", "#d5dae0", "#fffffe"
WIN, TIE, LOSS = "#0072b2", "#a9b1ba", "#d55e00"
_CSS_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAPER: "--paper",
    WIN: "--win",
    TIE: "--tie",
    LOSS: "--loss",
}


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """One drawing of the HTML page: SVG text, a title, how to read it, and what it shows."""

    title: str
    svg: str
    note: str
    description: str


def report_figure(report: EvalReport) -> Figure:
    """The whole result as one picture, 10 by 5.6 inches: who won, answer lengths, training."""
    curves = [c for c in _CURVES if c[0] in ("margin", "accuracy") and _has_curve(report, c[0])]
    figure = _figure(10, 5.6)
    top = figure.add_gridspec(1, 1, left=0.03, right=0.97, top=0.825, bottom=0.56)
    grid = figure.add_gridspec(
        1, 2, left=0.09, right=0.97, top=0.42, bottom=0.095, wspace=0.2, width_ratios=[1.1, 1]
    )
    rate = report.win_rate
    _write(
        figure, 0.03, 0.955,
        f"Tuned model preferred on {percent(rate.win_rate)} of {rate.n_prompts:,} "
        f"{_plain(report.prompts_name, 40)}",
        size=17, weight="bold", color=INK, va="top",
    )  # fmt: skip
    _write(
        figure, 0.03, 0.885,
        f"95 % interval {interval(*rate.headline_interval)}, ties count half   ·   "
        f"Baseline: {_plain(report.base_model, 34)}   ·   Judge: {_plain(report.judge, 34)}",
        size=10, color=MUTED, va="top",
    )  # fmt: skip
    draw_result(_dressed(figure.add_subplot(top[0])), report)
    lengths = _dressed(figure.add_subplot(grid[0] if curves else grid[:]))
    draw_lengths(lengths, report)
    _title(lengths, "Answer length")
    if curves:
        stack = grid[1].subgridspec(len(curves), 1, hspace=0.75)
        for row, (_, title, _, draw) in enumerate(curves):
            axes = _dressed(figure.add_subplot(stack[row]))
            draw(axes, report)
            _title(axes, title)
            if row < len(curves) - 1:
                axes.tick_params(labelbottom=False)
                axes.set_xlabel("")
    return figure


def picture_bytes(report: EvalReport) -> bytes:
    """`report_figure` as a PNG of 1600 by 896 pixels; the same report gives the same bytes."""
    buffer = io.BytesIO()
    report_figure(report).savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def svg_panels(report: EvalReport) -> dict[str, Panel]:
    """The panels by name: "result", "lengths", "ranking" and "frontier" where there is one, and one
    per training curve that was logged.
    """
    rate = report.win_rate
    panels = {
        "result": Panel(
            title="Who won",
            svg=_svg("result", 4.3, 2.1, draw_result, report),
            note="The dot is the win rate, ties counting half; the line through it is the 95 % "
            "interval. If it stays clear of 50 %, a difference is shown.",
            description=f"Tuned better {rate.n_win}, tied {rate.n_tie}, baseline better "
            f"{rate.n_loss}. Win rate {percent(rate.win_rate)}, 95 % interval "
            f"{interval(*rate.headline_interval)}.",
        ),
        "lengths": Panel(
            title="Answer length",
            svg=_svg("lengths", 4.3, 2.1, draw_lengths, report),
            note="One dot per answer that has a verdict.",
            description="One dot per answer, by number of words. Before tuning "
            f"{rate.mean_words_baseline:.0f} words on average, after {rate.mean_words_tuned:.0f}.",
        ),
    }
    if report.ranking is not None:
        panels["ranking"] = Panel(
            title="Strength of the models",
            svg=_svg("ranking", 4.3, 0.4 + 0.46 * len(report.ranking.models), draw_ranking, report),
            note="Elo points, 0 is the models' mean; the line is the 95 % interval. 100 points are a "
            "win rate of 64 %. A hollow dot marks a strength without a limit in these data.",
            description="; ".join(
                f"{_plain(m.model, 40)} {ELO_PER_LOGIT * m.strength:+.0f}"
                for m in report.ranking.models
            )
            + ".",
        )
    points = frontier_points(report)
    if len(points) > 1:
        panels["frontier"] = Panel(
            title="Win rate against distance from the base model",
            svg=_svg("frontier", 4.3, 2.5, draw_frontier, report),
            note="Each dot is a model: how far it moved from the base model (KL, nats an answer) and "
            "how often it is preferred to it, with 95 % intervals. Of two models that win as often, "
            "the one further left changed less.",
            description="; ".join(
                f"{_plain(name, 40)}: KL {kl.value:.1f}, win rate {percent(rate)}"
                for name, kl, rate, _, _ in points
            )
            + ".",
        )
    for name, title, meaning, draw in _CURVES:
        if _has_curve(report, name):
            panels[name] = Panel(
                title=title,
                svg=_svg(name, 4.3, 2.0, draw, report),
                note=meaning,
                description=_ends(report, name),
            )
    return panels


def trend_svg(rates: Sequence[tuple[float, float, float]]) -> str:
    """Win rates over time as SVG: (rate, low, high) of each evaluation, oldest first."""

    def draw(axes: Any, _: Any) -> None:
        places = range(1, len(rates) + 1)
        axes.axhline(0.5, color=MUTED, linewidth=1.2, linestyle=(0, (3, 2)))
        room = min(1.0, 25 / len(rates))
        for place, (_rate, low, high) in zip(places, rates, strict=True):
            axes.plot([place, place], [low, high], color=WIN, linewidth=max(2 * room, 0.5))
        values = [rate for rate, _, _ in rates]
        axes.plot(places, values, color=INK, linewidth=1.2, marker="o", markersize=5 * room)
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        axes.set_xlim(0.5, len(rates) + 0.5)
        axes.set_xticks([])
        axes.grid(visible=False)

    return _svg("trend", 5.2, 1.5, draw, None)


def task_trend_svg(
    tuned: Sequence[tuple[int, float]], base: Sequence[tuple[int, float]], dropped: Sequence[int]
) -> str:
    """A capability task over time as SVG: (evaluation, score), oldest first, the base model dashed.

    Evaluations in `dropped` are marked by a triangle that points down.
    """

    def draw(axes: Any, _: Any) -> None:
        places = {number: place for place, (number, _) in enumerate(tuned)}
        axes.plot(
            [places[n] for n, _ in base], [score for _, score in base],
            color=MUTED, linewidth=1.2, linestyle=(0, (3, 2)),
        )  # fmt: skip
        axes.plot(list(places.values()), [score for _, score in tuned], color=INK, linewidth=1.4)
        room = min(1.0, 12 / len(tuned))
        for number, score in tuned:
            fell = number in dropped
            axes.plot(
                [places[number]], [score], "v" if fell else "o", color=LOSS if fell else INK,
                markersize=max(9 * room, 5) if fell else 5 * room, clip_on=False, zorder=3 + fell,
            )  # fmt: skip
        scores = [score for _, score in (*tuned, *base)]
        room = 0.2 * (max(scores) - min(scores)) or 1.0
        axes.set_ylim(min(scores) - room, max(scores) + room)
        axes.set_xlim(-0.3, len(tuned) - 0.7)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    return _svg("task-trend", 2.6, 0.55, draw, None)


def draw_result(axes: Any, report: EvalReport) -> None:
    """A bar of wins, ties and losses above the win rate with its interval and the 50 % line."""
    rate = report.win_rate
    parts = [
        (rate.n_win, WIN, PAPER, "Tuned better"),
        (rate.n_tie, TIE, INK, "Tied"),
        (rate.n_loss, LOSS, PAPER, "Baseline better"),
    ]
    start = 0.0
    for count, colour, on_colour, name in parts:
        share = count / rate.n
        axes.barh(
            1.0,
            share,
            left=start,
            height=0.62,
            color=colour,
            edgecolor=PAPER,
            linewidth=1.5,
            label=f"{name}: {count}",
        )
        if share >= 0.09:
            _write(axes, start + share / 2, 1.0, percent(share), size=11, weight="bold",
                   color=on_colour, ha="center", va="center")  # fmt: skip
        start += share
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 0.84), borderaxespad=0, ncols=3, frameon=False,
        fontsize=10, labelcolor=INK, handlelength=0.9, handleheight=0.9, borderpad=0,
        handletextpad=0.5, columnspacing=1.2,
    )  # fmt: skip
    low, high = rate.headline_interval
    axes.plot([0.5, 0.5], [-0.42, 0.52], color=MUTED, linewidth=1.2, linestyle=(0, (3, 2)))
    axes.plot([low, high], [0.22, 0.22], color=INK, linewidth=3, solid_capstyle="butt")
    for end in (low, high):
        axes.plot([end, end], [0.09, 0.35], color=INK, linewidth=1.6)
    axes.plot([rate.win_rate], [0.22], "o", color=INK, markersize=8, clip_on=False, zorder=3)
    middle = min(max((low + high) / 2, 0.14), 0.86)
    # Beside the 50 % line, not on it.
    if abs(middle - 0.5) < 0.14:
        middle = 0.66 if rate.win_rate >= 0.5 else 0.34
    _write(axes, middle, -0.2, f"{percent(rate.win_rate)} ({interval(low, high)})",
           size=10, color=INK, ha="center", va="center")  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.45, 1.75)
    axes.set_yticks([])
    labels = ["0 %", "25 %", "50 %: no difference", "75 %", "100 %"]
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], labels)
    # The outer labels stay inside the bar's ends.
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    axes.get_xticklabels()[-1].set_horizontalalignment("right")
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)


def draw_lengths(axes: Any, report: EvalReport) -> None:
    """One dot per answer by its number of words, before above after, with the mean of each."""
    import numpy as np

    pairs = [p for p in report.answers if p.result != "unscored"]
    rate = report.win_rate
    jitter = np.random.default_rng(0).uniform(-0.2, 0.2, len(pairs))
    alpha = 0.55 if len(pairs) <= 150 else 0.25
    rows = [
        (1.0, LOSS, [word_count(p.before) for p in pairs], rate.mean_words_baseline),
        (0.0, WIN, [word_count(p.after) for p in pairs], rate.mean_words_tuned),
    ]
    longest = max([1, *rows[0][2], *rows[1][2]])
    for y, colour, words, mean in rows:
        axes.scatter(words, y + jitter, s=22, color=colour, alpha=alpha, linewidths=0)
        axes.plot([mean, mean], [y - 0.3, y + 0.3], color=INK, linewidth=2.2)
        _write(axes, mean, y + 0.34, f"mean {mean:.0f}", size=10, weight="bold", color=INK,
               ha="center" if mean > 0.06 * longest else "left", va="bottom")  # fmt: skip
    axes.set_yticks([1, 0], ["Before", "After"])
    axes.set_ylim(-0.45, 1.68)
    axes.set_xlim(0, longest * 1.04)
    axes.set_xlabel("words", color=MUTED, fontsize=10)
    axes.tick_params(axis="y", labelsize=11, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=True, axis="x", color=LINE, linewidth=0.8)


class _Point(NamedTuple):
    name: str
    kl: Mean
    win_rate: float
    low: float
    high: float


def frontier_points(report: EvalReport) -> list[_Point]:
    """The base model, further models in order of KL, and the tuned model; none without its KL."""
    if report.shift is None:
        return []
    rate = report.win_rate
    tuned = _Point("tuned", report.shift.kl, rate.win_rate, *rate.headline_interval)
    more = [_Point(p.name, p.kl, p.win_rate, p.low, p.high) for p in report.frontier]
    start = Mean(value=0.0, low=0.0, high=0.0, n_prompts=report.shift.kl.n_prompts)
    base = _Point("base", start, 0.5, 0.5, 0.5)
    return [base, *sorted(more, key=lambda p: p.kl.value), tuned]


def draw_ranking(axes: Any, report: EvalReport) -> None:
    """A dot with its interval a model, strongest on top, in Elo points."""
    assert report.ranking is not None
    models = report.ranking.models
    axes.axvline(0, color=MUTED, linewidth=1.1, linestyle=(0, (3, 2)))
    ends = [ELO_PER_LOGIT * x for m in models for x in (m.low, m.high) if math.isfinite(x)]
    strengths = [ELO_PER_LOGIT * m.strength for m in models]
    # A model that always won has an interval as wide as the prior; the others would shrink to dots.
    reach = 1.15 * min(
        max(map(abs, [*ends, *strengths, 50.0])), 2.5 * max([*map(abs, strengths), 50.0])
    )
    for place, (m, strength) in enumerate(zip(models, strengths, strict=True)):
        y = len(models) - 1 - place
        if math.isfinite(m.low) and math.isfinite(m.high):
            low, high = (min(max(ELO_PER_LOGIT * x, -reach), reach) for x in (m.low, m.high))
            axes.plot([low, high], [y, y], color=WIN, linewidth=2.4, solid_capstyle="butt")
        axes.plot([strength], [y], "o", color=WIN, markersize=8, zorder=3,
                  markerfacecolor=PAPER if m.unbounded else WIN, markeredgewidth=1.8)  # fmt: skip
        _write(axes, 0, y + 0.3, _plain(m.model, 44), size=10.5, color=INK, va="center",
               transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-0.45, len(models) - 0.4)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=True, axis="x", color=LINE, linewidth=0.8)
    axes.set_xlabel("Elo points", color=MUTED, fontsize=10)


def draw_frontier(axes: Any, report: EvalReport) -> None:
    """Win rate over the base model by KL to it, with both intervals."""
    points = frontier_points(report)
    axes.axhline(0.5, color=MUTED, linewidth=1.1, linestyle=(0, (3, 2)))
    axes.plot([p.kl.value for p in points], [p.win_rate for p in points], color=LINE, linewidth=1.4)
    ends = [x for p in points for x in (p.kl.value, p.kl.low, p.kl.high) if x is not None]
    width = max(max(ends) - min(0.0, *ends), 1e-9)
    for p in points:
        colour = MUTED if p.name == "base" else WIN
        if p.kl.low is not None and p.kl.high is not None:
            axes.plot([p.kl.low, p.kl.high], [p.win_rate] * 2, color=colour, linewidth=1.6)
        axes.plot([p.kl.value] * 2, [p.low, p.high], color=colour, linewidth=1.6)
        axes.plot([p.kl.value], [p.win_rate], "o", color=colour, markersize=8, zorder=3)
        on_right = p.kl.value > min(0.0, *ends) + 0.75 * width
        axes.annotate(
            _plain(p.name, 24), (p.kl.value, p.win_rate), xytext=(-9 if on_right else 9, 7),
            textcoords="offset points", ha="right" if on_right else "left", va="bottom",
            fontsize=10.5, color=INK, parse_math=False,
        )  # fmt: skip
    axes.set_xlim(min(0.0, *ends) - 0.05 * width, max(ends) + 0.06 * width)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("KL to the base model (nats an answer)", color=MUTED, fontsize=10)
    axes.grid(visible=True, axis="y", color=LINE, linewidth=0.8)


def _draw_curve(axes: Any, report: EvalReport, name: str, reference: float | None = None) -> None:
    steps, values = _curve(report, name)
    if reference is not None:
        axes.axhline(reference, color=MUTED, linewidth=1.1, linestyle=(0, (3, 2)))
    _line(axes, steps, values, WIN)
    _style_steps(axes, steps)


def _draw_loss(axes: Any, report: EvalReport) -> None:
    _draw_curve(axes, report, "loss")


def _draw_margin(axes: Any, report: EvalReport) -> None:
    _draw_curve(axes, report, "margin", 0.0)


def _draw_accuracy(axes: Any, report: EvalReport) -> None:
    _draw_curve(axes, report, "accuracy", 0.5)
    axes.set_ylim(0, 1.06)
    axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])


def _draw_logps(axes: Any, report: EvalReport) -> None:
    ends = []
    for name, colour, label in (
        ("chosen_logp", WIN, "chosen"),
        ("rejected_logp", LOSS, "rejected"),
    ):
        steps, values = _curve(report, name)
        if len(values) > 1:
            _line(axes, steps, values, colour)
            ends.append((steps, values, colour, label))
    _style_steps(axes, [s for steps, *_ in ends for s in steps])
    for steps, values, colour, label in ends:
        above = values[-1] >= max(v[-1] for _, v, _, _ in ends)
        axes.annotate(label, (steps[-1], values[-1]), xytext=(0, 7 if above else -7),
                      textcoords="offset points", ha="right", va="bottom" if above else "top",
                      fontsize=10, color=colour, weight="bold")  # fmt: skip
    axes.margins(y=0.28)


_Draw = Callable[[Any, Any], None]
_CURVES: tuple[tuple[str, str, str, _Draw], ...] = (
    (
        "margin",
        "Margin: lead of the chosen answers",
        "The implicit reward of chosen minus rejected answers. It should rise from 0.",
        _draw_margin,
    ),
    (
        "accuracy",
        "Accuracy: pairs ranked the right way",
        "The share of pairs in which the chosen answer leads. 50 % is guessing.",
        _draw_accuracy,
    ),
    ("loss", "Loss", "DPO starts at 0.69, which is guessing, and should fall.", _draw_loss),
    (
        "chosen_logp",
        "Log-probability of the answers",
        "Rejected answers should fall. If chosen answers fall as far, the model is drifting.",
        _draw_logps,
    ),
)


def _curve(report: EvalReport, name: str) -> tuple[list[int], list[float]]:
    points = [(p.step, getattr(p, name)) for p in report.training]
    kept = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def _has_curve(report: EvalReport, name: str) -> bool:
    return len(set(_curve(report, name)[0])) > 1


def _ends(report: EvalReport, name: str) -> str:
    steps, values = _curve(report, name)
    show = percent if name == "accuracy" else "{:.2f}".format
    return f"From {show(values[0])} at step {steps[0]} to {show(values[-1])} at step {steps[-1]}."


def _line(axes: Any, steps: list[int], values: list[float], colour: str) -> None:
    marker = "o" if len(steps) <= 40 else None
    axes.plot(steps, values, color=colour, linewidth=2, marker=marker, markersize=3.5)


def _style_steps(axes: Any, steps: list[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(min(steps), max(steps))
    axes.margins(y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.set_xlabel("training step", color=MUTED, fontsize=10)
    axes.grid(visible=True, axis="y", color=LINE, linewidth=0.8)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _dressed(axes: Any) -> Any:
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_color(LINE)
        spine.set_visible(side not in ("top", "right"))
    axes.tick_params(color=LINE, labelcolor=MUTED, labelsize=10, length=0)
    return axes


def _svg(name: str, width: float, height: float, draw: _Draw, report: EvalReport | None) -> str:
    import matplotlib

    figure = _figure(width, height)
    draw(_dressed(figure.add_axes((0.0, 0.0, 1.0, 1.0))), report)
    buffer = io.StringIO()
    # A fixed salt and no date: the same report gives the same text.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.06,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )  # fmt: skip
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Several drawings share a page, so their ids must differ.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(
        r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg
    )
    return svg


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=8)


def _write(place: Any, x: float, y: float, text: str, **style: Any) -> None:
    # parse_math would read dollar signs in a model's name as a formula.
    place.text(x, y, text, parse_math=False, **style)


def _plain(text: str, length: int) -> str:
    """`text` in characters that every font has, shortened if need be."""
    shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    return shown if len(shown) <= length else shown[: length - 1] + "…"
