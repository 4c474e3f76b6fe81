"""What tuning makes a small model forget, and what helps: one training, seven ways.

    python recipes/forgetting.py                                      # offline, no key, no GPU
    python recipes/forgetting.py --replay general.jsonl               # replay general data of your own
    python recipes/forgetting.py --judge anthropic:claude-sonnet-5-5 --max_usd 5   # Claude judges

SmolLM2-135M learns a house style from a few pairs, by DPO at a rate that is too high for it. Then
again from the same pairs with one thing done against forgetting: replay of its own answers to other
prompts (10 and 20 % of the rows), the NLL of the chosen answers, a lower rate, half the steps, a lower
rank. Each is set against the base model on 60 prompts that training has not seen, and on what the
training was not about: arithmetic, reasoning, plain prose. Table and picture: `runs/forgetting`.

Expected figures: docs/forgetting.md; `python benchmarks/quality_forgetting.py` measures them.
"""

from dataclasses import dataclass, field

from prefopt.cli import run_recipe
from prefopt.forgetting_flow import ForgettingConfig
from prefopt.models import LoRASettings
from prefopt.sampling.candidates import SamplingSettings
from prefopt.training.dpo import DPOSettings


@dataclass(frozen=True)
class Forgetting(ForgettingConfig):
    """`ForgettingConfig` with the settings for the built-in model and prompts."""

    out: str = "runs/forgetting"
    k: int = 2
    min_margin: float = 2.0  # train only where both orders say "much better"
    sampling: SamplingSettings = field(
        default_factory=lambda: SamplingSettings(
            top_p=1.0, top_k=40, max_new_tokens=48, batch_size=128
        )
    )
    lora: LoRASettings = field(default_factory=lambda: LoRASettings(r=16, alpha=32))
    dpo: DPOSettings = field(
        default_factory=lambda: DPOSettings(
            beta=0.1, learning_rate=4e-3, batch_size=8, max_length=256, soft_labels="ignore"
        )
    )


if __name__ == "__main__":
    raise SystemExit(run_recipe(Forgetting))
