"""The main job on one laptop: teach a small model a house style, and see whether it worked.

    prefopt quickstart                                        # offline, no key, no GPU
    prefopt quickstart --judge anthropic:claude-sonnet-5-5 --max_usd 5   # Claude judges

SmolLM2-135M answers 124 everyday requests four times each. The judge compares the answers under a
written rubric (answers at once, complete, concise, no filler); DPO trains a LoRA adapter on what it
preferred; and the tuned model meets the base model on 60 requests that training has not seen. Every
file is in `runs/quickstart`; running the command again continues there.

Expected figures: README.md; `python benchmarks/quality_quickstart.py` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prefopt.flow import FlowConfig
from prefopt.models import LoRASettings
from prefopt.sampling.candidates import SamplingSettings
from prefopt.training.dpo import DPOSettings


@dataclass(frozen=True)
class Quickstart(FlowConfig):
    """`FlowConfig` with the settings for the built-in model and prompts."""

    out: str = "runs/quickstart"
    held_out: float = 60
    min_margin: float = 2.0  # train only where both orders say "much better"
    sampling: SamplingSettings = field(
        default_factory=lambda: SamplingSettings(
            top_p=1.0, top_k=40, max_new_tokens=64, batch_size=128
        )
    )
    lora: LoRASettings = field(default_factory=lambda: LoRASettings(r=16, alpha=32))
    # A handful of steps on a tiny model: the rate is far above what a large one would bear. LD-DPO
    # (ld_alpha=0) compares the two answers over their common length only; plain DPO at this rate
    # pushes down every long answer until replies have a few words.
    dpo: DPOSettings = field(
        default_factory=lambda: DPOSettings(
            beta=0.3,
            ld_alpha=0.0,
            soft_labels="ignore",  # only pairs that both orders call "much better" are left
            learning_rate=1.55e-3,
            batch_size=8,
            max_length=256,
        )
    )
