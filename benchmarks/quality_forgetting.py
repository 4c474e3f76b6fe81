"""What tuning forgets and what helps, measured: `recipes/forgetting.py` with several seeds.

    python benchmarks/quality_forgetting.py                  # prints the tables, writes results/
    python benchmarks/quality_forgetting.py --seeds 0 1 2 --runs runs/quality_forgetting

Each seed runs the recipe in a process of its own, in a folder that is kept: a stopped benchmark goes
on where it was, and `--collect` only reads what is finished. The verdict on a mitigation is over all
seeds: it helped where the same task items or texts came out better than without it, by a paired test
over the items' means over the seeds. The claims are checked and those that fail are named; the exit
code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import msgspec

from prefopt.data.records import read_records
from prefopt.data.reviews import Review, label_scores
from prefopt.evaluation.capability_report import compare_items
from prefopt.evaluation.capability_scores import ItemScore, TaskScores
from prefopt.evaluation.forgetting import (
    MitigationOutcome,
    compare_scores,
    forgetting_figure,
    forgetting_table,
)
from prefopt.types import Candidate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MINUTES = 15.0


class Work(msgspec.Struct):
    """What a seed's runs took, and the commit at which the first one began."""

    commit: str
    cpu_seconds: float = 0.0


def work_of(folder: Path) -> Work:
    """What was noted beside a seed's folder."""
    record = folder.with_name(f"{folder.name}_work.json")
    if not record.exists():
        return Work(commit())
    return msgspec.json.decode(record.read_bytes(), type=Work)


def run_recipe(seed: int, folder: Path) -> None:
    """Run, or continue, the recipe with one seed, and note beside its folder what it took."""
    work, before = work_of(folder), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "forgetting.py"),
         "--out", str(folder), "--seed", str(seed)],
        check=False, cwd=ROOT, env={**os.environ, "TQDM_DISABLE": "1"},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    work.cpu_seconds += (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    folder.with_name(f"{folder.name}_work.json").write_bytes(msgspec.json.encode(work))
    done.check_returncode()


def outcomes_of(folder: Path) -> list[MitigationOutcome]:
    """What each way of training came to, in their order."""
    stages = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["stages"]
    names = [name for name in stages if name.startswith("outcome_")]
    return [read_records(folder / f"{name}.jsonl", MitigationOutcome)[0] for name in names]


def scores_of(folder: Path, key: str, side: str) -> dict[str, TaskScores]:
    """One model's scores by task."""
    rows = read_records(folder / f"scores_{key}.jsonl", TaskScores)
    return {row.task: row for row in rows if row.side == side}


def mean_scores(several: Sequence[dict[str, TaskScores]]) -> dict[str, TaskScores]:
    """The items' mean scores over the seeds."""
    means = {}
    for task, first in several[0].items():
        columns = zip(*(scores[task].items for scores in several), strict=True)
        means[task] = msgspec.structs.replace(
            first,
            items=tuple(
                ItemScore(item=column[0].item, score=fmean(item.score for item in column))
                for column in columns
            ),
        )
    return means


def over_seeds(folders: Sequence[Path]) -> list[MitigationOutcome]:
    """All seeds together: each way's tasks with the items' means over the seeds, tested by item.

    Held-out reviews differ from seed to seed, so the gain's items are those of all seeds.
    """
    runs = [outcomes_of(folder) for folder in folders]
    base = mean_scores([scores_of(folder, "none", "base") for folder in folders])
    none = mean_scores([scores_of(folder, "none", "tuned") for folder in folders])
    found = []
    for several in zip(*runs, strict=True):
        key = several[0].key
        now = mean_scores([scores_of(folder, key, "tuned") for folder in folders])
        labels = [labels_of(folder, key) for folder in folders]
        found.append(
            msgspec.structs.replace(
                several[0],
                gain=compare_items(
                    "reviews", several[0].gain.title, several[0].gain.metric,
                    [score for before, _ in labels for score in before],
                    [score for _, after in labels for score in after],
                ),
                changes=compare_scores(base, now),
                against_none=() if key == "none" else compare_scores(none, now),
            )
        )  # fmt: skip
    return found


def labels_of(folder: Path, key: str) -> tuple[list[float], list[float]]:
    """The held-out reviews' scores, of the base model and of a way."""
    held_out = read_records(folder / "held_out.jsonl", Review)
    before, after = (
        label_scores(held_out, read_records(folder / f"labels_{name}.jsonl", Candidate))
        for name in ("base", key)
    )
    return before, after


def missed_claims(outcomes: Sequence[MitigationOutcome]) -> list[str]:
    """What is claimed of forgetting and its mitigations, and not borne out by the figures."""
    none, *others = outcomes
    missed = []
    if not any(change.verdict == "dropped" for change in none.changes):
        missed.append("without mitigation no task is shown to drop: nothing was forgotten")
    for one in others:
        verdicts = {change.title: one.helped(change.task) for change in one.changes}
        hurt = [title for title, verdict in verdicts.items() if verdict == "more forgotten"]
        if hurt:
            missed.append(f"{one.name}: forgets more of {', '.join(hurt)} than without mitigation")
        if "less forgotten" not in verdicts.values():
            missed.append(f"{one.name}: is not shown to reduce forgetting of any task")
    return missed


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
    """Measure, print, write `results/quality_forgetting.json`, `.md` and `.png`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality_forgetting")
    parser.add_argument("--collect", action="store_true", help="only read finished runs")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    folders, minutes = [], []
    for seed in options.seeds:
        folder = options.runs / f"seed{seed}"
        if not options.collect:
            run_recipe(seed, folder)
        minutes.append(work_of(folder).cpu_seconds / 60)
        folders.append(folder)
    import torch
    import transformers
    import trl

    together, runs = over_seeds(folders), [outcomes_of(folder) for folder in folders]
    missed = missed_claims(together)
    missed += [
        f"seed {seed}: {m:.1f} CPU minutes (target {MINUTES:g})"
        for seed, m in zip(options.seeds, minutes, strict=True)
        if m > MINUTES
    ]
    result = {
        "command": "python benchmarks/quality_forgetting.py",
        "commit": ", ".join(sorted({work_of(folder).commit for folder in folders})),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "seeds": options.seeds,
        "cpu_minutes": minutes,
        "missed": missed,
        "together": msgspec.to_builtins(together),
        "runs": msgspec.to_builtins(runs),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality_forgetting.json").write_text(json.dumps(result, indent=2) + "\n")
    by_seed = "\n\n".join(
        f"Seed {seed} ({m:.1f} CPU minutes):\n\n" + forgetting_table(run)
        for seed, run, m in zip(options.seeds, runs, minutes, strict=True)
    )
    text = (
        f"`{result['command']}` at {result['commit']}, {result['machine']}, Python "
        f"{result['python']}, torch {result['torch']}, transformers {result['transformers']}, trl "
        f"{result['trl']}.\n\nAll seeds together. ↓: shown to be worse than the base model, ↑: "
        "better; helps, hurts: the same items are shown to come out better, or worse, than without "
        "mitigation (paired tests over the items' means, Holm over the tasks, 5 %).\n\n"
        f"{forgetting_table(together)}\n\n![](quality_forgetting.png)\n\n{by_seed}\n\n"
        + (
            "Every claim holds: forgetting happens, each mitigation is shown to reduce it, none to "
            "add to it.\n"
            if not missed
            else "Not borne out:\n\n" + "".join(f"- {line}.\n" for line in missed)
        )
    )
    (RESULTS / "quality_forgetting.md").write_text(text, encoding="utf-8")
    forgetting_figure(runs).savefig(RESULTS / "quality_forgetting.png", dpi=130)
    print("\n" + text)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
