"""Memory and time of labelling over shards: 10,000, 100,000 and 1,000,000 comparisons on one machine.

    python benchmarks/scale_data.py                  # all of it
    python benchmarks/scale_data.py --sizes 10000    # a look

Two made-up answers of some 40 words to each of so many prompts lie in a JSONL file. A process of its
own, started anew for each size, does all that `prefopt judge label --scale.shard_size 1000` does: cuts
the file into shards, pairs, judges in both orders, fits the judge, makes labels by rule "inferred",
and writes Parquet. The judge is `scripted:shortest`, which takes next to no time, so that what is
measured is the rest. Memory is the peak that the kernel notes for that program (VmHWM of
/proc/self/status, which begins at zero with it); time is what the processor spent on it, since other
programs may run beside, and the clock's.

Writes benchmarks/results/scale_data.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from prefopt.data.records import write_records
from prefopt.evaluation.eval_report import installed_versions
from prefopt.types import Candidate, Prompt

RESULTS = Path(__file__).parent / "results"
SIZES = (10_000, 100_000, 1_000_000)
FLAT_MB = 64
"""Peaks may lie this far apart and be called flat."""


def candidates(n_prompts: int) -> Iterator[Candidate]:
    """Two answers to each prompt, of 20 to 60 words, the same at every call."""
    words = [
        "the",
        "fox",
        "eats",
        "berries",
        "and",
        "mice",
        "when",
        "winter",
        "comes",
        "it",
        "digs",
    ]
    draw = random.Random(0)
    for number in range(n_prompts):
        prompt = Prompt.from_text(f"Question {number}: what does a fox eat in winter?")
        for index in range(2):
            text = " ".join(draw.choices(words, k=draw.randint(20, 60)))
            yield Candidate(
                prompt=prompt, text=text, model="made-up", sample_index=index, finish_reason="stop"
            )


def measured(n_comparisons: int, shard_size: int) -> dict[str, float]:
    """What a process that labels so many comparisons needs."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        write_records(Path(folder) / "candidates.jsonl", candidates(n_comparisons))
        child = subprocess.run(
            [sys.executable, __file__, "--child", folder, "--shard_size", str(shard_size)],
            capture_output=True,
            text=True,
            check=True,
        )
        found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
        if found["comparisons"] != n_comparisons:
            raise SystemExit(f"{n_comparisons} comparisons went in, {found} came out.")
        found["written_mb"] = (
            sum(file.stat().st_size for file in Path(folder, "labels").rglob("*.parquet")) / 1e6
        )
        return found


def child(folder: str, shard_size: int) -> None:
    """Label the candidates of a folder; print what it took."""
    from prefopt.label_job import LabelConfig
    from prefopt.scale.labels import label_shards
    from prefopt.scale.settings import ScaleSettings

    config = LabelConfig(
        candidates=f"{folder}/candidates.jsonl",
        out=f"{folder}/labels",
        judge="scripted:shortest",
        rule="inferred",
    )
    before, clock = time.process_time(), time.monotonic()
    labels = label_shards(config, scale=ScaleSettings(shard_size=shard_size), progress=False)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak_kb = next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)
    print(
        json.dumps(
            {
                "comparisons": labels.n_comparisons,
                "labels": labels.n_preferences,
                "peak_mb": peak_kb / 1024,
                "cpu_s": time.process_time() - before,
                "wall_s": time.monotonic() - clock,
            }
        )
    )


def table(rows: dict[str, dict[str, float]]) -> str:
    """The results as Markdown."""
    lines = [
        "| comparisons | peak memory | processor time | a comparison | by the clock | written |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        each = row["cpu_s"] / row["comparisons"] * 1e6
        lines.append(
            f"| {int(name):,} | {row['peak_mb']:.0f} MB | {row['cpu_s']:.0f} s | {each:.0f} µs | "
            f"{row['wall_s']:.0f} s | {row['written_mb']:.0f} MB |"
        )
    peaks = [row["peak_mb"] for row in rows.values()]
    apart = max(peaks) - min(peaks)
    lines.append("")
    lines.append(
        f"Peaks are {apart:.0f} MB apart ({'flat' if apart <= FLAT_MB else 'NOT flat'}: at most "
        f"{FLAT_MB} MB)."
    )
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--shard_size", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child, asked.shard_size)
        return
    rows: dict[str, dict[str, float]] = {}
    load = os.getloadavg()[0]
    for size in asked.sizes:
        rows[str(size)] = measured(size, asked.shard_size)
        print(table(rows), flush=True)
    result = {
        "rows": rows,
        "shard_size": asked.shard_size,
        "cpus": os.cpu_count(),
        "load_average_before": load,
        "versions": installed_versions(),
    }
    text = (
        "# Labelling over shards\n\n"
        f"{table(rows)}\n\n"
        f"Printed by `python benchmarks/scale_data.py` on {os.cpu_count()} CPUs, used by others too "
        f"(load average {load:.1f} before), {asked.shard_size:,} prompts a shard, two answers a "
        "prompt, both orders, judge `scripted:shortest`, labels by rule `inferred`.\n"
    )
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "scale_data.json").write_text(json.dumps(result, indent=1) + "\n")
    (asked.out / "scale_data.md").write_text(text)


if __name__ == "__main__":
    main()
