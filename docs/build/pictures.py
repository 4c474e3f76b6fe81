"""The pictures of the documentation, drawn from the committed results: docs/pictures/*.svg.

    python docs/build/pictures.py                # all of them, into docs/pictures
    python docs/build/pictures.py --out folder

Curves with figures in them read `benchmarks/results`; the others are schemes or plain functions. Lines
and letters have colours that can be read on white and on black, and nothing is filled behind them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GREY, BLUE, ORANGE, GREEN = "#808080", "#3f87d9", "#d9772b", "#2f9e77"
STYLE = {
    "svg.hashsalt": "prefopt",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
    "font.size": 11,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.transparent": True,
}


def flow() -> None:
    """The whole way, box by box."""
    axes = _canvas(8.4, 2.5)
    rows = [
        [("Prompt", "yours"), ("Candidate", "sampled"), ("Comparison", "two answers"),
         ("JudgedComparison", "both orders")],
        [("report", "is it better?"), ("adapter", "LoRA"), ("PreferenceGroup", "with p_chosen")],
    ]  # fmt: skip
    for i, (name, what) in enumerate(rows[0]):
        _box(axes, 2.6 * i, 1.6, 1.85, name, what, BLUE)
    for i, word in enumerate(("sample", "pair", "judge")):
        _arrow(axes, (2.6 * i + 1.85, 1.95), (2.6 * i + 2.6, 1.95), word)
    for i, (name, what) in zip((1, 2, 3), rows[1], strict=True):
        _box(axes, 2.6 * i, 0.0, 1.85, name, what, GREEN)
    _arrow(axes, (8.72, 1.6), (8.72, 0.7), "")
    axes.text(8.85, 1.15, "build_preferences", fontsize=9, va="center")
    _arrow(axes, (7.8, 0.35), (7.05, 0.35), "train")
    _arrow(axes, (5.2, 0.35), (4.45, 0.35), "evaluate")
    axes.set(xlim=(-0.05, 10.4), ylim=(-0.1, 2.5))


def dpo_gradient() -> None:
    """DPO's loss of a pair, and the weight of its gradient, by its margin."""
    _, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.1), layout="constrained")
    z = np.linspace(-5, 5, 201)
    left.plot(z, np.logaddexp(0, -z), color=BLUE)
    left.plot([0], [np.log(2)], "o", color=ORANGE)
    left.annotate(
        "start: margin 0, loss ln 2",
        (0, np.log(2)),
        (0.4, 2.2),
        arrowprops={"arrowstyle": "-", "color": GREY},
    )
    left.set(xlabel="margin z of the implicit rewards", ylabel="loss of the pair", ylim=(0, 5))
    right.plot(z, 1 / (1 + np.exp(z)), color=BLUE, label="certain label, p = 1")
    for p, color in ((0.8, ORANGE), (0.5, GREEN)):
        right.plot(z, p - 1 / (1 + np.exp(-z)), color=color, label=f"p_chosen = {p}")
    right.axhline(0, color=GREY, lw=0.7)
    right.set(xlabel="margin z of the implicit rewards", ylabel="pull towards the chosen answer")
    right.legend(fontsize=9)


def tree() -> None:
    """Two padded rows of one pair, and the tree of the same pair with its attention mask."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.4, 3.9), layout="constrained", width_ratios=(1.15, 1)
    )
    prompt, answers = 5, (4, 2)
    for axes in (left, right):
        axes.set_aspect("equal")
        axes.axis("off")
    for row, (n, color) in enumerate(zip(answers, (BLUE, ORANGE), strict=True)):
        y = 6.2 - 1.3 * row
        _cells(left, 0, y, prompt, GREEN, "p")
        _cells(left, prompt, y, n, color, "ab"[row])
        _cells(left, prompt + n, y, max(answers) - n, GREY, "", hatch="////")
    left.text(0, 7.5, "two padded rows: 18 places", fontsize=10)
    _cells(left, 0, 2.2, prompt, GREEN, "p")
    _cells(left, prompt, 2.2, answers[0], BLUE, "a")
    _cells(left, prompt + answers[0], 2.2, answers[1], ORANGE, "b")
    left.text(0, 3.5, "one tree: 11 places", fontsize=10)
    positions = [*range(5), *range(5, 9), *range(5, 7)]
    for x, position in enumerate(positions):
        left.text(x + 0.5, 1.75, str(position), ha="center", va="center", fontsize=8)
    left.text(0, 1.0, "positions: both answers begin after the prompt", fontsize=9)
    left.set(xlim=(-0.1, 11.2), ylim=(0.6, 8.2))
    spans = [(0, prompt, GREEN), (prompt, 9, BLUE), (9, 11, ORANGE)]
    for query in range(11):
        own = next(s for s in spans if s[0] <= query < s[1])
        for key in range(query + 1):
            if key < prompt or own[0] <= key:
                color = next(s[2] for s in spans if s[0] <= key < s[1])
                right.add_patch(
                    Rectangle((key, 10 - query), 0.92, 0.92, facecolor=color, edgecolor="none")
                )
            else:
                right.add_patch(
                    Rectangle((key, 10 - query), 0.92, 0.92, fill=False, edgecolor=GREY, lw=0.3)
                )
    right.text(0, 11.6, "who attends (rows) to whom (columns)", fontsize=10)
    right.text(9.1, 3.3, "b never\nsees a", fontsize=9, ha="left", va="bottom")
    right.set(xlim=(-0.1, 12.6), ylim=(-0.2, 12.4))
    figure.get_layout_engine().set(wspace=0.04)


def both_orders() -> None:
    """What becomes of a pair, by what the judge says in each order."""
    axes = _canvas(7.6, 3.6)
    words = ("A is better", "tie", "B is better")
    outcome = {
        (0, 0): ("A preferred", GREEN), (2, 2): ("B preferred", GREEN), (1, 1): ("tie", GREY),
        (0, 2): ("flip: the place decided", ORANGE), (2, 0): ("flip: the place decided", ORANGE),
    }  # fmt: skip
    for i, first in enumerate(words):
        axes.text(2.35 + 2.15 * i, 3.35, first, ha="center", fontsize=10)
        axes.text(1.15, 2.65 - i, first, ha="right", va="center", fontsize=10)
        for j in range(3):
            name, color = outcome.get((i, j), ("weak preference", BLUE))
            axes.add_patch(
                FancyBboxPatch(
                    (1.4 + 2.15 * j, 2.3 - i), 1.95, 0.7, boxstyle="round,pad=0.02",
                    facecolor="none", edgecolor=color, lw=1.6,
                )
            )  # fmt: skip
            axes.text(2.37 + 2.15 * j, 2.65 - i, name, ha="center", va="center", fontsize=9)
    axes.text(4.5, 3.75, "A shown second", ha="center", fontsize=11, weight="bold")
    axes.text(-0.45, 1.65, "A shown first", va="center", rotation=90, fontsize=11, weight="bold")
    axes.set(xlim=(-0.7, 7.8), ylim=(0.2, 4.0))


def length() -> None:
    """AlpacaEval's models: the win rate as judged and at equal length, against the published one."""
    models = json.loads((RESULTS / "quality_length_control.json").read_text())["models"].values()
    rows = [m for m in models if m["prefopt"] is not None]
    _, axes = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    published = [m["published"] for m in rows]
    axes.plot([0, 90], [0, 90], color=GREY, lw=0.8)
    axes.plot(published, [m["win_rate"] for m in rows], "o", color=ORANGE, ms=4, label="as judged")
    axes.plot(
        published,
        [m["prefopt"] for m in rows],
        "o",
        color=BLUE,
        ms=4,
        label="prefopt, at equal length",
    )
    axes.set(xlabel="AlpacaEval 2's published length-controlled win rate, %", ylabel="win rate, %")
    axes.legend()


def overoptimisation() -> None:
    """Gold and learned reward of best-of-n by KL, means over seeds, for four numbers of labels."""
    seeds = json.loads((RESULTS / "quality_rlhf_overopt.json").read_text())["seeds_measured"]
    _, panels = plt.subplots(1, 4, figsize=(10, 3.1), layout="constrained", sharey=True)
    for axes, labels in zip(panels, (128, 512, 2048, 8192), strict=True):
        curves = [s[f"labels_{labels}"]["best_of"] for s in seeds]
        kl = np.mean([[p["kl"] for p in c] for c in curves], axis=0)
        for what, color, name in (
            ("proxy", ORANGE, "what the reward model says"),
            ("gold", BLUE, "what it is worth"),
        ):
            values = np.array([[p[what] for p in c] for c in curves])
            axes.plot(kl, values.mean(0), "o-", color=color, ms=3, label=name)
            axes.fill_between(kl, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        axes.set(title=f"{labels:,} labels", xlabel="KL, nats")
    panels[0].set(ylabel="reward, standard deviations")
    panels[0].legend(fontsize=8)


def one_base() -> None:
    """PPO's four models as adapters on one base, beside four models."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained")
    roles = ("policy", "reference", "value", "reward")
    colors = (BLUE, GREY, GREEN, ORANGE)
    for axes in (left, right):
        axes.axis("off")
        axes.set(xlim=(-0.1, 4.4), ylim=(-0.35, 3.4))
    for i, (role, color) in enumerate(zip(roles, colors, strict=True)):
        _block(left, 1.1 * i, 0, 0.95, 2.3, role, color)
    left.text(0, 3.0, "four models", fontsize=12, weight="bold")
    _block(right, 0, 0, 4.25, 1.25, "one frozen base", GREY)
    said = (
        "adapter\npolicy",
        "adapters off:\nreference",
        "adapter value\n+ head",
        "adapter reward\n+ head",
    )
    for i, (name, color) in enumerate(zip(said, colors, strict=True)):
        _block(right, 1.1 * i, 1.4, 0.95, 0.9, name, color, dashed=i == 1)
    right.text(0, 3.0, "one base, three adapters", fontsize=12, weight="bold")


PICTURES: tuple[Callable[[], None], ...] = (
    flow, dpo_gradient, tree, both_orders, length, overoptimisation, one_base,
)  # fmt: skip


def _canvas(width: float, height: float) -> Axes:
    _, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.axis("off")
    return axes


def _box(axes: Axes, x: float, y: float, width: float, name: str, what: str, color: str) -> None:
    shape = FancyBboxPatch(
        (x, y), width, 0.7, boxstyle="round,pad=0.02", facecolor="none", edgecolor=color, lw=1.6
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + 0.46, name, ha="center", va="center", fontsize=9, weight="bold")
    axes.text(x + width / 2, y + 0.17, what, ha="center", va="center", fontsize=9)


def _block(
    axes: Axes, x: float, y: float, width: float, height: float, name: str, color: str,
    *, dashed: bool = False,
) -> None:  # fmt: skip
    axes.add_patch(
        Rectangle(
            (x, y), width, height, facecolor="none" if dashed else color, edgecolor=color,
            alpha=None if dashed else 0.28, lw=1.6, linestyle="--" if dashed else "-",
        )
    )  # fmt: skip
    axes.text(x + width / 2, y + height / 2, name, ha="center", va="center", fontsize=8.5)


def _arrow(axes: Axes, start: Sequence[float], end: Sequence[float], word: str) -> None:
    line: dict[str, Any] = {"arrowstyle": "->", "color": GREY, "lw": 1.4}
    axes.annotate("", xy=tuple(end), xytext=tuple(start), arrowprops=line)
    axes.text((start[0] + end[0]) / 2, start[1] + 0.2, word, ha="center", fontsize=8)


def _cells(
    axes: Axes, x: float, y: float, n: int, color: str, letter: str, *, hatch: str | None = None
) -> None:
    for i in range(n):
        axes.add_patch(
            Rectangle(
                (x + i + 0.04, y), 0.92, 0.92, facecolor="none" if hatch else color,
                edgecolor=color, alpha=0.8, hatch=hatch, lw=0.8,
            )
        )  # fmt: skip
        axes.text(
            x + i + 0.5, y + 0.46, letter, ha="center", va="center", fontsize=9, color="white"
        )


def main() -> None:
    """Draw every picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        with mpl.rc_context(STYLE):
            picture()
            # No date and no version: the same results give the same bytes.
            plt.savefig(out / f"{picture.__name__}.svg", metadata={"Date": None, "Creator": None})
            plt.close("all")


if __name__ == "__main__":
    main()
