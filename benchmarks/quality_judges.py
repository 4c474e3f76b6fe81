"""The judges that run without a key, against people, on four public sets of labelled pairs.

    python benchmarks/quality_judges.py                # 50 pairs of each set, ten minutes and more
    python benchmarks/quality_judges.py --max_rows 0   # all 1,053 pairs, more than an hour on CPU

The sets are LLMBar, PandaLM, LLMBar's processed human pairs and HHH alignment, read from
$PREFOPT_DATA/<set>/dev.jsonl; they are not part of the repository. The sample is drawn by subset with
seed 0, the same for every judge; the judges that are no models are then held against all pairs too.
Writes benchmarks/results/quality_judges.{json,md}.

A model of 135M parameters is a weak judge. That is the point of the table: before a judge's labels
are trained on, it is held against people, beside the rule that only looks at length.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from prefopt.evaluation.eval_report import installed_versions
from prefopt.judges import load_judge
from prefopt.judges.agreement import Agreement, Interval
from prefopt.judges.calibrate import CalibrationReport, calibrate_judge

SAMPLE = 50
"""Pairs of each set; drawn with seed 0, evenly over its subsets."""

RESULTS = Path(__file__).parent / "results"
SETS = ("llmbar", "pandalm", "human_pairs_processed", "hhh_alignment")
INSTANT = ("rules:house_style", "scripted:longest", "scripted:shortest")
JUDGES = ("local:demo", "likelihood:demo", *INSTANT)


def row(judge: str, found: Agreement) -> str:
    """One line of the table."""

    def show(value: Interval | None) -> str:
        return "–" if value is None else f"{value.value:.2f} ({value.low:.2f}–{value.high:.2f})"

    return (
        f"| {found.name} | {judge} | {found.n} | {found.n_failed} | {show(found.accuracy)} | "
        f"{show(found.kappa)} | {show(found.kappa_decided)} | {show(found.flip_rate)} | "
        f"{show(found.first_place)} | {show(found.longer_wins)} | {show(found.longest_accuracy)} |"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max_rows", type=int, default=SAMPLE, help="of each set; 0 takes all")
    parser.add_argument("--judges", nargs="+", default=list(JUDGES))
    parser.add_argument("--ledger", help="keep verdicts here, so that a stopped run goes on")
    options = parser.parse_args()
    folder = Path(os.environ.get("PREFOPT_DATA", "../shared/data"))
    files = [folder / name / "dev.jsonl" for name in SETS]
    if missing := [str(path) for path in files if not path.exists()]:
        sys.exit(
            f"the labelled sets are not there: {', '.join(missing)}. Set PREFOPT_DATA to the folder "
            f"that holds {', '.join(SETS)}, each with a dev.jsonl."
        )
    header = [
        "| set | judge | pairs | no verdict | accuracy | kappa (3 ways) | kappa (decided) | flips | "
        "first place wins | longer wins | 'longer wins' accuracy |",
        "|" + "---|" * 11,
    ]
    reports: dict[str, CalibrationReport] = {}

    def table(judges: Sequence[str], max_rows: int | None, name: str) -> list[str]:
        lines: list[str] = []
        print("\n".join(header), flush=True)
        for spec in judges:
            start = time.perf_counter()
            report = reports[f"{spec}, {name}"] = calibrate_judge(
                files, load_judge(spec), ledger=options.ledger, max_rows=max_rows, progress=False
            )
            for found in (*report.sets, report.overall):
                lines.append(row(spec, found))
                print(lines[-1], flush=True)
            print(f"({spec}: {time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
        order = [*SETS, "all"]
        lines.sort(key=lambda line: order.index(line.split(" | ")[0].strip("| ")))
        return [*header, *lines]

    sampled = table(options.judges, options.max_rows or None, "sample")
    whole = table([j for j in options.judges if j in INSTANT], None, "all pairs")
    fits = [
        f"| {spec.partition(',')[0]} | {r.calibration.method} | {r.calibration.n_labels} | "
        f"{r.calibration.log_loss:.3f} "
        f"(coin {r.calibration.log_loss_uninformed:.3f}) | {r.calibration.ece:.3f} |"
        for spec, r in reports.items()
        if r.calibration is not None and not spec.endswith("all pairs")
    ]
    RESULTS.mkdir(exist_ok=True)
    plain = {spec: json.loads(msgspec.json.encode(report)) for spec, report in reports.items()}
    (RESULTS / "quality_judges.json").write_text(
        json.dumps({"versions": installed_versions(), "reports": plain}, indent=1) + "\n"
    )
    command = "python benchmarks/quality_judges.py"
    if options.max_rows != SAMPLE:
        command += f" --max_rows {options.max_rows}"
    sample = f"{options.max_rows} pairs of each set" if options.max_rows else "all pairs"
    text = [
        "# Judges without a key, against people",
        "",
        f"Printed by `{command}`: {sample} (seed 0, evenly over its subsets).",
        "95 % intervals: Wilson; for kappa a bootstrap over prompts. Accuracy is over pairs that",
        "people decide; a judge's tie or flip counts one half. A coin has accuracy 0.50, kappa 0.",
        "`local:demo` is SmolLM2-135M-Instruct asked which answer is better, `likelihood:demo` the",
        "same model comparing how likely each answer is. Neither is a judge to train on: read the",
        "rows beside 'longer wins'. `rules:house_style` checks the form of the house style, which is",
        "not what these people were asked about.",
        "",
        *sampled,
        "",
        "## All pairs, for the judges that are no models",
        "",
        *whole,
        "",
        "## Probabilities fitted to the labels (cross-validated)",
        "",
        "| judge | method | labels | log loss | calibration error |",
        "|---|---|---|---|---|",
        *fits,
    ]
    (RESULTS / "quality_judges.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
