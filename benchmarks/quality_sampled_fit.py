"""What it costs that labels over shards fit their judges to 20,000 comparisons, not to all.

    python benchmarks/quality_sampled_fit.py          # about 2 minutes; prints and writes results/

Simulated judges grade 200,000 pairs in both orders. Each label's p_chosen is worked out with the
judges' parameters fitted to all pairs, and fitted to the first `FIT_ON` (which is as good as any draw
here, as pairs are independent): how far apart are they? Lower numbers of pairs show the trend. Worlds
and judges are `quality_labels.py`'s.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.quality_labels import WORLDS, World
from prefopt.label_model import LabelModel, fit_label_model
from prefopt.labelling.observations import Observations, observe
from prefopt.scale.labels import FIT_ON

RESULTS = Path(__file__).parent / "results"
NAMES = (
    "slope 1.5, bias 0.6",
    "slope 0.8, bias 1.2",
    "slope 3.0, bias 0.0",
    "heavy tails (t, 2 df)",
)
SIZES = (500, 2_000, FIT_ON)


def verdicts(name: str, n: int, seed: int) -> Observations:
    """Grades of n pairs in both orders."""
    world = World((WORLDS[name],), n, 2, seed)
    prompt = np.repeat(np.arange(n), 2)
    first = np.tile([0, 1], n)
    grade = world.ask(prompt, first, 1 - first)
    return observe(prompt, first, 1 - first, np.zeros(2 * n, dtype=np.int64), grade)


def first_pairs(found: Observations, n: int) -> Observations:
    """The verdicts of the first n pairs."""
    columns = (found.prompt, found.first, found.second, found.judge, found.grade)
    return observe(*(column[: 2 * n] for column in columns))


def p_chosen(model: LabelModel, found: Observations, n: int) -> Any:
    """P(answer 0 is better) of each pair."""
    pairs = np.stack([np.arange(n), np.zeros(n, int), np.ones(n, int)], axis=1)
    return model.p_prefer(found, pairs).p


def measure(n: int, seeds: range) -> list[dict[str, Any]]:
    """A row a world and size."""
    rows = []
    for name in NAMES:
        apart: dict[int, list[Any]] = {size: [] for size in SIZES}
        for seed in seeds:
            found = verdicts(name, n, seed)
            exact = p_chosen(fit_label_model(found), found, n)
            for size in SIZES:
                model = fit_label_model(first_pairs(found, min(size, n)))
                apart[size].append(np.abs(p_chosen(model, found, n) - exact))
        for size, each in apart.items():
            rows.append(
                {
                    "world": name,
                    "fitted_on": size,
                    "mean": float(np.mean([x.mean() for x in each])),
                    "worst": float(max(x.max() for x in each)),
                }
            )
            print(rows[-1], flush=True)
    return rows


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "# Judges fitted to a part of the comparisons",
        "",
        f"`{report['command']}`: {report['pairs']:,} pairs in both orders, {report['seeds']} seeds. "
        "How far p_chosen is from what the fit to all pairs gives; labels over shards fit to "
        f"{FIT_ON:,}.",
        "",
        "| world | fitted on | mean difference | worst of all labels |",
        "|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['world']} | {row['fitted_on']:,} | {row['mean']:.4f} | {row['worst']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="no files")
    options = parser.parse_args()
    report = {
        "command": f"python benchmarks/quality_sampled_fit.py --pairs {options.pairs} "
        f"--seeds {options.seeds}",
        "pairs": options.pairs,
        "seeds": options.seeds,
        "rows": measure(options.pairs, range(options.seeds)),
    }
    print(table(report))
    if not options.quick:
        (RESULTS / "quality_sampled_fit.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / "quality_sampled_fit.md").write_text(table(report))


if __name__ == "__main__":
    main()
