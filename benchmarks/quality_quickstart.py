"""The quickstart's promises, measured: three seeds, time, win rate, perplexity, and the length rule.

    python benchmarks/quality_quickstart.py                  # prints the table, writes results/
    python benchmarks/quality_quickstart.py --seeds 0 1 2 --fresh_model

Each seed runs `recipes/quickstart.py` in a process of its own and an empty folder, as a user would.
`--fresh_model` unpacks the demo model again for the first seed, so that the time includes it. The
targets are checked and named where they are missed; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGETS = {"minutes": 6.0, "win_rate": 0.75, "low": 0.60, "perplexity_change": 0.05}


def measure(seed: int, folder: Path, cache: Path | None) -> dict[str, float]:
    """Run the quickstart with one seed; returns its figures."""
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    if cache is not None:
        environment["PREFOPT_CACHE"] = str(cache)
    started = time.monotonic()
    subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "quickstart.py"),
         "--out", str(folder), "--seed", str(seed)],
        check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    seconds = time.monotonic() - started
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    rate = report["win_rate"]
    stages = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["stages"]
    return {
        "seed": seed,
        "minutes": seconds / 60,
        "pairs": report["labels"]["n_pairs"],
        "win_rate": rate["win_rate"],
        "low": rate["wilson_low"],
        "high": rate["wilson_high"],
        "wins": rate["n_win"],
        "ties": rate["n_tie"],
        "losses": rate["n_loss"],
        "perplexity_change": report["perplexity_change"],
        "shortest_wins": rate["shortest_wins_share"],
        "agrees_with_shortest": rate["agrees_with_shortest"],
        "words_before": rate["mean_words_baseline"],
        "words_after": rate["mean_words_tuned"],
        **{f"{name}_s": stages[name]["seconds"] for name in ("candidates", "adapter")},
    }


def misses(row: dict[str, float]) -> list[str]:
    """The targets that one seed did not reach."""
    found = []
    if row["minutes"] > TARGETS["minutes"]:
        found.append(f"seed {row['seed']}: {row['minutes']:.1f} minutes")
    if row["win_rate"] < TARGETS["win_rate"]:
        found.append(f"seed {row['seed']}: win rate {row['win_rate']:.1%}")
    if row["low"] <= TARGETS["low"]:
        found.append(f"seed {row['seed']}: interval from {row['low']:.1%}")
    if row["perplexity_change"] > TARGETS["perplexity_change"]:
        found.append(f"seed {row['seed']}: perplexity {row['perplexity_change']:+.1%}")
    return found


def table(rows: list[dict[str, float]]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| seed | minutes | pairs | win rate (95 % interval) | won / tied / lost | perplexity "
        '| words before → after | "shortest wins" would say | judge agrees with it |',
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['seed']} | {r['minutes']:.1f} | {r['pairs']} "
            f"| {r['win_rate']:.1%} ({r['low']:.0%}–{r['high']:.0%}) "
            f"| {r['wins']} / {r['ties']} / {r['losses']} | {r['perplexity_change']:+.1%} "
            f"| {r['words_before']:.0f} → {r['words_after']:.0f} "
            f"| {r['shortest_wins']:.0%} | {r['agrees_with_shortest']:.0%} |"
        )
    return "\n".join(lines)


def commit() -> str:
    """The commit that is measured, with a mark when the tree differs from it."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def main() -> int:
    """Measure, print, write `results/quality_quickstart.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fresh_model", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder to keep the run folders in")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, seed in enumerate(options.seeds):
            cache = Path(temporary) / "cache" if options.fresh_model and number == 0 else None
            folder = (options.keep or Path(temporary)) / f"seed{seed}"
            rows.append(measure(seed, folder, cache))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    import torch
    import transformers
    import trl

    missed = [line for row in rows for line in misses(row)]
    result = {
        "command": "python benchmarks/quality_quickstart.py",
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "fresh_model": options.fresh_model,
        "targets": TARGETS,
        "missed": missed,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality_quickstart.json").write_text(json.dumps(result, indent=2) + "\n")
    text = (
        f"`{result['command']}` at {result['commit']}, {result['machine']}, Python "
        f"{result['python']}, torch {result['torch']}, transformers {result['transformers']}, "
        f"trl {result['trl']}.\n\n{table(rows)}\n\n"
        + ("Every target was reached.\n" if not missed else "Missed: " + "; ".join(missed) + ".\n")
    )
    (RESULTS / "quality_quickstart.md").write_text(text, encoding="utf-8")
    print("\n" + text)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
