"""What `prefopt plan` predicts for a GPU against a DPO training there. `benchmarks/gpu.py` runs it.

The plan reads the model's configuration and nothing else. It says the longer of two times, as
`prefopt plan --gpus auto` does: from the speed measured on a few layers for a moment, and from a share
of the vendor's figure. Both stand beside it. All rows have the planned lengths. Memory is
`torch.cuda.max_memory_allocated`, so the plan's allocator and runtime are left out; time is that of
the steps after two that warm up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import transformers

from prefopt import PlanConfig, plan_training
from prefopt.models import LoRASettings

TARGET = 0.15
LEFT_OUT = ("allocator", "runtime")
PROMPT_TOKENS, ANSWER_TOKENS = 164, 54  # of every row; fewer for the smallest shape
N_WARMUP, N_STEPS = 2, 3


def predict(
    config: Any, tokens: int, prompt: int, answer: int, rows: int, batch: int, checkpointing: bool
) -> dict[str, Any]:
    """Bytes and seconds, the latter from the speed measured here and from the vendor's figure."""
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        found = {}
        for measure in (True, False):
            plan = plan_training(
                PlanConfig(
                    model=folder,
                    gpus="auto",
                    method="dpo",
                    lora=LoRASettings(r=16, alpha=32),
                    prompt_tokens=prompt,
                    answer_tokens=answer,
                    longest_tokens=prompt + 2 * answer,
                    rows=rows,
                    batch_size=batch,
                    micro_batch_tokens=tokens,
                    gradient_checkpointing=checkpointing,
                    dtype="bfloat16",
                    epochs=1,
                    suggest=False,
                    measure=measure,
                    utilisation=1.0 if measure else None,  # the measured speed, whatever it is
                )
            )
            found[measure] = plan
    parts = {p.name: p.n_bytes for p in found[True].memory}
    counted = sum(n for name, n in parts.items() if name not in LEFT_OUT)
    return {
        "tokens": found[True].fullest_micro_batch,
        "memory_gb": counted / 2**30,
        "with_allocator_gb": (sum(parts.values()) - parts["runtime"]) / 2**30,
        "parts_gb": {name: n / 2**30 for name, n in parts.items()},
        "seconds": found[True].time.seconds,
        "assumed_s": None if found[False].time is None else found[False].time.seconds,
    }


def planned_s(moment_s: float | None, assumed_s: float | None) -> float:
    """What `prefopt plan --gpus auto` says: the longer of both, or the one there is."""
    return max(moment_s or 0.0, assumed_s or 0.0)


def compare(
    predicted: dict[str, Any], peak_gb: float | None, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Both, and how far they are apart."""
    memory = None if peak_gb is None else predicted["memory_gb"] / peak_gb - 1
    result = {
        **predicted,
        "measured_gb": peak_gb,
        "measured_s": seconds,
        "memory_error": memory,
    }
    shown = "-" if memory is None else f"{memory:+.0%}"
    off = planned_s(result["seconds"], result["assumed_s"]) / seconds - 1
    say(f"  plan at {result['tokens']} tokens: memory {shown}, time {off:+.0%}")
    return result


def lines(key: str, machine: str, entry: dict[str, Any]) -> list[str]:
    """The section as Markdown."""
    found = [
        f"## What `prefopt plan` said: {key}", "", machine, "",
        "| tokens at once | peak GB: predicted / measured | off by | s: predicted / measured | off by "
        "| from the speed of a moment alone | from the vendor's figure alone |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for r in entry["cases"]:
        memory = "- | -"
        if r["measured_gb"] is not None:
            memory = f"{r['memory_gb']:.1f} / {r['measured_gb']:.1f} | {r['memory_error']:+.0%}"
        said = planned_s(r["seconds"], r["assumed_s"])
        planned, moment, assumed = (
            None if seconds is None else seconds / r["measured_s"] - 1
            for seconds in (said, r["seconds"], r["assumed_s"])
        )
        found.append(
            f"| {r['tokens']:,} | {memory} | {said:.1f} / {r['measured_s']:.1f} | "
            f"{planned:+.0%} | {moment:+.0%} | {'-' if assumed is None else f'{assumed:+.0%}'} |"
        )
    return [
        *found,
        "",
        f"Target: within {TARGET:.0%}. What the plan says of these today: `quality_plan_gpu.md`.",
        "",
    ]
