"""What tuning makes a small model forget, and what helps: one training, seven ways.

    python recipes/forgetting.py                                  # offline, no key, no GPU
    python recipes/forgetting.py --replay general.jsonl           # replay general data of your own
    python recipes/forgetting.py --tasks '[offline]'              # measure more of what may be lost

SmolLM2-135M learns to call a review positive or negative in one word, from 32 reviews by DPO, at a
learning rate that is too high for it. Then again from the same pairs with one thing done against
forgetting: replay of its own answers to other prompts (10 and 20 % of the rows), a lower rate, the NLL
of the chosen answers, half the steps, a lower rank. Each is measured on reviews that training has not
seen, and on what it was not about: keeping to a form that was asked for, and plain prose. Table,
picture and every adapter are in `runs/forgetting`; running the command again continues there.

Expected figures: docs/forgetting.md; `python benchmarks/quality_forgetting.py` measures them.
"""

from dataclasses import dataclass, field

from prefopt.cli import run_recipe
from prefopt.forgetting_flow import ForgettingConfig
from prefopt.models import LoRASettings
from prefopt.training.dpo import DPOSettings


@dataclass(frozen=True)
class Forgetting(ForgettingConfig):
    """`ForgettingConfig` with the settings for the built-in model and reviews."""

    out: str = "runs/forgetting"
    lora: LoRASettings = field(default_factory=lambda: LoRASettings(r=16, alpha=32))
    dpo: DPOSettings = field(
        default_factory=lambda: DPOSettings(
            learning_rate=3e-3, batch_size=8, max_length=256, soft_labels="ignore"
        )
    )


if __name__ == "__main__":
    raise SystemExit(run_recipe(Forgetting))
