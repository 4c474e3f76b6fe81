"""What the plan of today says of the DPO trainings that `benchmarks/gpu.py` measured. Needs no GPU.

    python benchmarks/quality_plan_gpu.py    # prints and writes benchmarks/results/quality_plan_gpu.md

The time is what `prefopt plan` assumes of that GPU by its vendor's figure, from the mean lengths of
the rows that were counted; they are drawn again from the same seed, and must have the tokens of then.
Where the speed of a few layers was measured too (the cases of one length), the plan says the longer.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu, gpu_plan
from prefopt import PlanConfig, plan_training
from prefopt.models import LoRASettings
from prefopt.plan_time import UTILISATION

RESULTS = Path(__file__).parent / "results"


class Case(NamedTuple):
    """A training, and how long its counted steps took."""

    name: str
    tokens: int
    assumed_s: float
    moment_s: float | None
    measured_s: float

    @property
    def planned_s(self) -> float:
        """What the plan says."""
        return gpu_plan.planned_s(self.moment_s, self.assumed_s)

    @property
    def error(self) -> float:
        """Of the plan, as a share of what was measured."""
        return self.planned_s / self.measured_s - 1


def assumed_s(
    shape: str, prompt: int, answer: int, k: int, rows: int, batch: int, checkpointing: bool
) -> float:
    """Seconds of a training on an H200, by its vendor's figure."""
    config = transformers.LlamaConfig(max_position_embeddings=8192, **gpu.SHAPES[shape])
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        plan = plan_training(
            PlanConfig(
                model=folder, method="dpo", gpus="H200", lora=LoRASettings(r=16, alpha=32),
                prompt_tokens=prompt, answer_tokens=answer, answers=k, rows=rows, batch_size=batch,
                gradient_checkpointing=checkpointing, dtype="bfloat16", epochs=1, suggest=False,
            )
        )  # fmt: skip
    assert plan.time is not None
    return plan.time.seconds


def drawn(entry: dict[str, Any]) -> Case:
    """A comparison of speed, whose rows have many lengths."""
    shape, name = entry["shape"], entry["lengths"]
    plan, lengths = gpu.PLANS[shape], gpu.LENGTHS[name]
    batch = entry["pairs_a_step"] // (lengths.k * (lengths.k - 1) // 2)
    rows = gpu.draw_rows(name, (plan.n_warmup + plan.n_steps) * batch, shorter=plan.shorter)
    rows = rows[plan.n_warmup * batch :]
    if gpu.tokens_of(rows) != entry["tokens"]:
        raise SystemExit(f"{name}: other rows were measured than are drawn now; measure again.")
    return Case(
        f"{shape}, lengths of {name}",
        entry["prefopt"]["size"],
        assumed_s(
            shape,
            round(statistics.fmean(len(r.prompt) for r in rows)),
            round(statistics.fmean(len(a) + 1 for r in rows for a in r.answers)),
            lengths.k,
            len(rows),
            batch,
            entry["checkpointing"] == "on",
        ),
        None,
        entry["prefopt"]["seconds"],
    )


def planned(shape: str, checkpointing: bool, entry: dict[str, Any]) -> Iterator[Case]:
    """The trainings on rows of one length, as `gpu.py --only plan` runs them."""
    sizes = gpu.PLANS[shape]
    prompt = gpu_plan.PROMPT_TOKENS // sizes.shorter
    answer = gpu_plan.ANSWER_TOKENS // sizes.shorter
    batch = sizes.pairs_a_step
    rows = gpu_plan.N_STEPS * batch
    assumed = assumed_s(shape, prompt, answer, 2, rows, batch, checkpointing)
    for case in entry["cases"]:
        yield Case(
            f"{shape}, one length", case["tokens"], assumed, case["seconds"], case["measured_s"]
        )


def measured(results: dict[str, Any]) -> Iterator[Case]:
    """All of them that ran on an H200."""
    for entry in results.get("speed", {}).values():
        if "H200" in entry["environment"]["device"]:
            yield drawn(entry)
    for key, entry in results.get("plan", {}).items():
        if "H200" in entry["environment"]["device"]:
            shape, checkpointing = key.split("/")
            yield from planned(shape, checkpointing.endswith("on"), entry)


def markdown(cases: Sequence[Case]) -> str:
    """The table, and whether the target is met."""
    met = all(abs(case.error) <= gpu_plan.TARGET for case in cases)
    found = [
        "# What `prefopt plan` says of trainings measured on an H200", "",
        "Printed by `python benchmarks/quality_plan_gpu.py` from the times in `gpu.json`. "
        f"Assumed are {UTILISATION:.0%} of the vendor's figure.", "",
        "| DPO with LoRA | tokens at once | planned, s | measured, s | off by "
        "| from the speed of a moment alone |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for case in cases:
        moment = "-" if case.moment_s is None else f"{case.moment_s / case.measured_s - 1:+.0%}"
        found.append(
            f"| {case.name} | {case.tokens:,} | {case.planned_s:.2f} | "
            f"{case.measured_s:.2f} | {case.error:+.0%} | {moment} |"
        )
    return "\n".join(
        [*found, "", f"Target: within {gpu_plan.TARGET:.0%}. {'Met' if met else '**Missed**'}.", ""]
    )


def main() -> None:
    """Print and write."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results = json.loads((RESULTS / "gpu.json").read_text(encoding="utf-8"))
    text = markdown(list(measured(results)))
    (RESULTS / "quality_plan_gpu.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
