"""What `prefopt plan` predicts for a GPU against a DPO training there. `benchmarks/gpu.py` runs it.

The plan reads the model's configuration and nothing else, and measures the device's speed on a few
layers, as `prefopt plan --gpus auto` does; beside it stands what it would say of a device it does not
have (a share of the vendor's figure). All rows have the planned lengths. Memory is
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


def predict(
    config: Any, tokens: int, prompt: int, answer: int, rows: int, batch: int, checkpointing: bool
) -> dict[str, Any]:
    """Bytes and seconds, the latter measured here and assumed."""
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


def compare(
    predicted: dict[str, Any], peak_gb: float | None, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Both, and how far they are apart."""
    assumed = predicted["assumed_s"]
    memory = None if peak_gb is None else predicted["memory_gb"] / peak_gb - 1
    result = {
        **predicted,
        "measured_gb": peak_gb,
        "measured_s": seconds,
        "memory_error": memory,
        "time_error": predicted["seconds"] / seconds - 1,
        "assumed_error": None if assumed is None else assumed / seconds - 1,
    }
    shown = "-" if memory is None else f"{memory:+.0%}"
    say(f"  plan at {result['tokens']} tokens: memory {shown}, time {result['time_error']:+.0%}")
    return result


def lines(key: str, machine: str, entry: dict[str, Any]) -> list[str]:
    """The section as Markdown."""
    found = [
        f"## What `prefopt plan` said: {key}", "", machine, "",
        "| tokens at once | peak GB: predicted / measured | off by | s: predicted / measured | off by "
        "| from the vendor's figure alone |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for r in entry["cases"]:
        memory, assumed = "- | -", "-"
        if r["assumed_error"] is not None:
            assumed = f"{r['assumed_error']:+.0%}"
        if r["measured_gb"] is not None:
            memory = f"{r['memory_gb']:.1f} / {r['measured_gb']:.1f} | {r['memory_error']:+.0%}"
        found.append(
            f"| {r['tokens']:,} | {memory} | {r['seconds']:.1f} / {r['measured_s']:.1f} | "
            f"{r['time_error']:+.0%} | {assumed} |"
        )
    return [*found, "", f"Target: within {TARGET:.0%}.", ""]
