"""How good a small reward model gets in minutes: trained on human pairs, held against five sets.

    python benchmarks/quality_reward.py                    # 100 pairs of each set
    python benchmarks/quality_reward.py --max_pairs 0      # all of them: 1,403 pairs, an hour and more

Trains as `recipes/reward_model.py` does (SmolLM2-135M, LoRA, $PREFOPT_DATA/hh_helpful/train.jsonl.gz,
conversations of at most 128 tokens) and evaluates on the sets that the recipe names, all of which are
read from $PREFOPT_DATA; they are not part of the repository. A stopped run goes on where it was.
Writes benchmarks/results/quality_reward.{json,md} after every set. Intervals are 95 %, over pairs or
prompts (`prefopt.training.reward_report`); training has one seed unless `--seeds` asks for more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from prefopt import evaluate_reward_model, load_preferences, train_reward
from prefopt.evaluation.eval_report import installed_versions
from prefopt.judges.agreement import Interval
from prefopt.models import LoRASettings
from prefopt.training.reward import RewardSettings, load_reward_log
from prefopt.training.reward_report import RewardReport

RESULTS = Path(__file__).parent / "results"
SETS = ("hh_helpful", "llmbar", "pandalm", "human_pairs_processed", "hhh_alignment")


def show(value: Interval | None) -> str:
    """A figure with its interval."""
    return "–" if value is None else f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def row(seed: int, report: RewardReport) -> str:
    """One line of the table."""
    return (
        f"| {report.name} | {seed} | {report.n} | {show(report.accuracy)} | "
        f"{show(report.longest_accuracy)} | {show(report.log_loss)} | {show(report.ece)} | "
        f"{show(report.length_correlation)} | {show(report.label_length_correlation)} | "
        f"{report.mean_score:.2f} | {report.score_sd:.2f} |"
    )


def write(facts: dict[str, Any], reports: list[tuple[int, RewardReport]], command: str) -> None:
    """Both result files, from what is known so far."""
    RESULTS.mkdir(exist_ok=True)
    plain = [{"seed": s, "report": json.loads(msgspec.json.encode(r))} for s, r in reports]
    (RESULTS / "quality_reward.json").write_text(
        json.dumps({"command": command, **facts, "reports": plain}, indent=1) + "\n"
    )
    trained = "; ".join(
        f"seed {t['seed']}: {t['pairs']} pairs, {t['steps']} steps, loss {t['first_loss']:.3f} to "
        f"{t['last_loss']:.3f}, bias {t['bias']:.3f}"
        for t in facts["training"]
    )
    lines = [
        "# A reward model of 135M parameters, trained for minutes, against people",
        "",
        f"Printed by `{command}` on {facts['device']}. Training: {trained} "
        f"(learning rate {facts['learning_rate']:g}, LoRA r=16, one epoch, batches of 16).",
        "",
        "Accuracy is over pairs that people decide; log loss ln 2 = 0.69 is what no model has. The",
        "length correlations are Spearman's between differences within pairs: scores', labels'.",
        "",
        "| set | seed | pairs | accuracy | 'longer wins' | log loss | ECE | length corr. | "
        "labels' length corr. | mean score | sd |",
        "|" + "---|" * 11,
        *(row(seed, report) for seed, report in reports),
        "",
        *(f"- {r.name}, seed {s}: {note}" for s, r in reports for note in r.notes),
    ]
    (RESULTS / "quality_reward.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max_pairs", type=int, default=100, help="of each set; 0 takes all")
    parser.add_argument("--max_length", type=int, default=128, help="tokens, of the training set")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", default="runs/quality_reward", help="folder of the reward models")
    options = parser.parse_args()
    data = Path(os.environ.get("PREFOPT_DATA", "../shared/data"))
    train = data / "hh_helpful" / "train.jsonl.gz"
    files = [train, *(data / name / "dev.jsonl" for name in SETS)]
    if missing := [str(path) for path in files if not path.exists()]:
        sys.exit(
            f"not there: {', '.join(missing)}. Set PREFOPT_DATA to the folder that holds them."
        )
    facts: dict[str, Any] = {
        "device": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        "versions": installed_versions(),
        "learning_rate": options.learning_rate,
        "training": [],
    }
    reports: list[tuple[int, RewardReport]] = []
    command = " ".join(["python", "benchmarks/quality_reward.py", *sys.argv[1:]])
    for seed in options.seeds:
        folder = Path(options.out) / f"seed{seed}-{options.max_length}-{options.learning_rate:g}"
        if not folder.exists():
            settings = RewardSettings(
                learning_rate=options.learning_rate, max_length=options.max_length, seed=seed
            )
            start = time.perf_counter()
            train_reward(
                load_preferences(train), "demo", folder, settings=settings, lora=LoRASettings(r=16)
            )
            print(f"(trained in {time.perf_counter() - start:.0f} s)", flush=True)
        points = load_reward_log(folder)
        said = json.loads((folder / "reward_model.json").read_text())
        facts["training"].append(
            {
                "seed": seed, "steps": points[-1].step, "bias": said["bias"],
                "pairs": _pairs_of(folder), "first_loss": points[0].loss,
                "last_loss": sum(p.loss for p in points[-5:]) / len(points[-5:]),
            }
        )  # fmt: skip
        for name in SETS:
            report = evaluate_reward_model(
                folder, data / name / "dev.jsonl", max_pairs=options.max_pairs or None
            )
            print(report.to_text(), flush=True)
            reports.append((seed, report))
            write(facts, reports, command)


def _pairs_of(folder: Path) -> int:
    """How many pairs the model card says it was trained on."""
    found = re.search(r"on (\d+) preferences", (folder / "README.md").read_text())
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    main()
