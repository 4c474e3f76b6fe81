"""What the offline capability tasks measure, what they cost, and how often they cry wolf.

    python benchmarks/quality_capabilities.py                   # five CPU minutes
    python benchmarks/quality_capabilities.py --folder scores   # goes on there if it is stopped

1. SmolLM2-135M-Instruct's score on each task and kind of item: away from 0 and from 100 %, so that
   there is something to lose. Time, and the smallest drop that the items can show.
2. A damaged model: an adapter of random weights, at growing scale. Which tasks are called dropped?
3. Reports on simulated answers. Nothing changed: how often is anything called? One task dropped by
   what the report says it can show: how often is it called?

Writes benchmarks/results/quality_capabilities.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from prefopt.data.records import read_records, write_records
from prefopt.evaluation import capability_tasks
from prefopt.evaluation.capabilities import measure_capabilities
from prefopt.evaluation.capability_report import (
    CapabilityReport,
    TaskChange,
    capability_report,
    compare_items,
)
from prefopt.evaluation.capability_scores import SCORES_FILE, TaskScores
from prefopt.evaluation.eval_report import installed_versions
from prefopt.models import (
    LanguageModel,
    LoRASettings,
    load_model,
    lora_config,
    wrap_with_adapter,
)

RESULTS = Path(__file__).parent / "results"
DAMAGE = {1.0: "offline", 16.0: "prefopt_arithmetic,prefopt_plain_text"}
"""Scale of the random adapter's weights, a little damage and much, and the tasks that are asked."""


def damaged(scale: float) -> LanguageModel:
    """The demo model with an adapter of random weights; the larger the scale, the more is broken."""
    base = load_model("demo")
    torch.manual_seed(0)
    model = wrap_with_adapter(base.model, lora_config(LoRASettings(r=8, alpha=8)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale * 1e-2)
    return LanguageModel(f"demo, random x{scale:g}", model.eval(), base.tokenizer, "demo")


def by_kind(scores: TaskScores) -> dict[str, tuple[int, float]]:
    """Items and mean score of each kind of a task's items, in the order of its file."""
    path = Path(capability_tasks.__file__).with_name(
        f"{scores.task.removeprefix('prefopt_')}.jsonl"
    )
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = defaultdict(list)
    for item in scores.items:
        found[rows[int(item.item.partition("-")[0])]["kind"]].append(item.score)
    return {kind: (len(s), fmean(s)) for kind, s in sorted(found.items())}


def measured(
    folder: Path,
) -> tuple[list[TaskScores], list[tuple[float, CapabilityReport, float]]]:
    """The base model's scores, and a report with its CPU seconds for each scale of damage.

    A call that was stopped goes on in `folder`, which keeps the seconds too.
    """
    reports = []
    for scale, tasks in DAMAGE.items():
        tuned = damaged(scale)
        started = time.process_time()
        report = measure_capabilities(tuned, tasks=tasks, out=folder / f"{scale:g}")
        # What the folder had already costs nothing now; the dearest call is the one that did the work.
        path = folder / f"{scale:g}" / "cpu_seconds.txt"
        before = float(path.read_text()) if path.exists() else 0.0
        reports.append((scale, report, max(before, time.process_time() - started)))
        path.write_text(f"{reports[-1][2]:.1f}\n")
        print(report.to_text(), f"\n{reports[-1][2]:.0f} CPU seconds\n", flush=True)
        # The base's scores serve every scale.
        kept = read_records(folder / f"{min(DAMAGE):g}" / SCORES_FILE, TaskScores)
        base = [scores for scores in kept if scores.side == "base"]
        for other in DAMAGE:
            path = folder / f"{other:g}" / SCORES_FILE
            if not path.exists():
                write_records(path, base)
    return base, reports


def simulated_report(
    rng: np.random.Generator, base: Sequence[TaskScores], agreement: float, drops: dict[str, float]
) -> CapabilityReport:
    """A report on drawn answers.

    Each item keeps its measured answer with the chance `agreement` and else is drawn from the task's
    rate, for both models alike; then a share of the tuned model's right answers is lost. Losses per
    byte differ by noise that falls off slowly, as differences between models do.
    """
    tasks = []
    for scores in base:
        real = np.array([item.score for item in scores.items])
        drop = drops.get(scores.task, 0.0)
        if scores.higher_is_better:
            kept = rng.random((2, len(real))) < agreement
            before, after = np.where(kept, real, rng.random((2, len(real))) < real.mean())
            after = np.where(rng.random(len(real)) < drop / real.mean(), 0.0, after)
        else:
            before, after = real, real + 0.02 * rng.standard_t(4, len(real)) + drop
        tasks.append(
            compare_items(
                scores.task,
                scores.title,
                scores.metric,
                before.astype(float).tolist(),
                after.astype(float).tolist(),
                higher_is_better=scores.higher_is_better,
                n_tasks=len(base),
            )
        )
    return capability_report(tasks, engine="simulation", base_model="a", tuned_model="b")


def false_alarms(base: Sequence[TaskScores], runs: int) -> list[tuple[float, float, float]]:
    """For several agreements: the share of reports that call anything, and that call a drop."""
    rows = []
    for agreement in (0.0, 0.5, 0.9):
        rng = np.random.default_rng(int(10 * agreement))
        reports = [simulated_report(rng, base, agreement, {}) for _ in range(runs)]
        anything = fmean(any(t.verdict != "no change shown" for t in r.tasks) for r in reports)
        rows.append((agreement, anything, fmean(not r.passed for r in reports)))
    return rows


def power(base: Sequence[TaskScores], runs: int) -> list[tuple[str, float, float]]:
    """For each task of right and wrong answers: a drop, and how often it is called.

    The drop is what a first report, in which nothing changed, says it could show.
    """
    rows = []
    for number, scores in enumerate(s for s in base if s.higher_is_better):
        rng = np.random.default_rng(100 + number)
        sizes = [
            next(t for t in simulated_report(rng, base, 0.7, {}).tasks if t.task == scores.task)
            for _ in range(5)
        ]
        drop = fmean(t.resolvable for t in sizes if t.resolvable is not None)
        called = [
            any(t.task == scores.task and t.verdict == "dropped" for t in r.tasks)
            for r in (simulated_report(rng, base, 0.7, {scores.task: drop}) for _ in range(runs))
        ]
        rows.append((scores.title, drop, fmean(called)))
    return rows


def main() -> None:
    """Measure, simulate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=300, help="simulated reports a row")
    parser.add_argument("--folder", type=Path, help="keeps the scores, to go on after a stop")
    arguments = parser.parse_args()
    runs = arguments.runs
    with TemporaryDirectory() as temporary:
        base, reports = measured(arguments.folder or Path(temporary))
    alarms = false_alarms(base, runs)
    seen = power(base, runs)
    text = render(base, reports, alarms, seen, runs)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality_capabilities.md").write_text(text)
    plain: dict[str, Any] = {
        "versions": installed_versions(),
        "threads": torch.get_num_threads(),
        "base": {s.task: {"seconds": s.seconds, "kinds": by_kind(s)} for s in base},
        "damage": [
            {"scale": s, "cpu_seconds": c, "report": json.loads(encoded(r))} for s, r, c in reports
        ],
        "runs": runs,
        "false_alarms": alarms,
        "power": seen,
    }
    (RESULTS / "quality_capabilities.json").write_text(json.dumps(plain, indent=1) + "\n")


def encoded(report: CapabilityReport) -> bytes:
    """The report as JSON."""
    import msgspec

    return msgspec.json.encode(report)


def _change(task: TaskChange | None) -> str:
    if task is None:
        return "not asked"
    size = f"{100 * task.change:+.1f} points" if task.is_share else f"loss {100 * task.drop:+.1f} %"
    return size if task.verdict == "no change shown" else f"{size}, {task.verdict}"


def render(
    base: Sequence[TaskScores],
    reports: Sequence[tuple[float, CapabilityReport, float]],
    alarms: Sequence[tuple[float, float, float]],
    seen: Sequence[tuple[str, float, float]],
    runs: int,
) -> str:
    """The results as Markdown."""
    first = {t.task: t for t in reports[0][1].tasks}
    lines = [
        "# What the offline capability tasks measure",
        "",
        f"Printed by `python benchmarks/quality_capabilities.py --runs {runs}` with"
        f" SmolLM2-135M-Instruct on {torch.get_num_threads()} CPU thread(s), {reports[0][1].engine}.",
        "",
        f"Base and adapter together took {reports[0][2]:.0f} CPU seconds.",
        "",
        "| task | items | base | could show a drop of |",
        "|---|---|---|---|",
    ]
    for scores in base:
        t = first[scores.task]
        value = f"{100 * t.base:.1f} %" if t.is_share else f"{t.base:.3f} {t.metric}"
        others = [
            c.resolvable
            for _, r, _ in reports
            for c in r.tasks
            if c.task == scores.task and c.resolvable is not None
        ]
        size = min(others, default=0.0) if t.resolvable is None else t.resolvable
        shown = f"{100 * size:.1f} points" if t.is_share else f"{size:.3f}"
        lines.append(f"| {t.title} | {t.n} | {value} | {shown} |")
    lines += ["", "| task | kind of item | items | base |", "|---|---|---|---|"]
    for scores in base:
        for kind, (n, mean) in by_kind(scores).items():
            lines.append(f"| {scores.title} | {kind} | {n} | {100 * mean:.0f} % |")
    lines += [
        "",
        "## A model that is damaged",
        "",
        "An adapter of random weights, at two scales. Change of each task:",
        "",
        "| scale | " + " | ".join(t.title for t in reports[0][1].tasks) + " | gate |",
        "|---" * (len(first) + 2) + "|",
    ]
    for scale, report, _ in reports:
        changes = {t.task: t for t in report.tasks}
        cells = [_change(changes.get(name)) for name in first]
        gate = "passed" if report.passed else "failed"
        lines.append(f"| {scale:g} | " + " | ".join(cells) + f" | {gate} |")
    lines += [
        "",
        "## How often a report is wrong",
        "",
        f"{runs} simulated reports a row, alpha .05 over all tasks. Nothing changed; each item keeps"
        " its answer with the chance in the first column, else both models draw it anew.",
        "",
        "| agreement | calls any change | calls a drop |",
        "|---|---|---|",
        *(f"| {a:.1f} | {100 * x:.1f} % | {100 * d:.1f} % |" for a, x, d in alarms),
        "",
        "One task dropped by what its report says it can show with 80 % power (agreement 0.7):",
        "",
        "| task | drop | called |",
        "|---|---|---|",
        *(f"| {t} | {100 * d:.1f} points | {100 * c:.0f} % |" for t, d, c in seen),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
