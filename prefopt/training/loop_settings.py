"""What the settings of DPO, reward models and SFT share: their checks, and the loop's arguments.

Knows no method, no loss and no model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.launched import rows_of_each, shards

if TYPE_CHECKING:
    from prefopt.training.dpo import DPOSettings
    from prefopt.training.reward_settings import RewardSettings
    from prefopt.training.sft import SFTSettings

_SCHEDULES = ("cosine", "linear", "constant_with_warmup")


def loop_problems(settings: DPOSettings | RewardSettings | SFTSettings) -> list[str]:
    """What is wrong with them, each in a sentence without a full stop; NaN is never right."""
    problems = []
    for name in ("learning_rate", "epochs", "max_grad_norm"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            problems.append(f"{name} must be positive, got {value}")
    for name, least in (
        ("batch_size", 1), ("micro_batch_tokens", 1), ("checkpoint_every", 1), ("max_length", 2),
    ):  # fmt: skip
        value = getattr(settings, name)
        if value is not None and value < least:
            problems.append(f"{name} must be at least {least}, got {value}")
    if not 0.0 <= settings.warmup < 1.0:
        problems.append(f"warmup must be a share in [0, 1), got {settings.warmup}")
    if settings.schedule not in _SCHEDULES:
        problems.append(
            f"schedule must be one of {', '.join(_SCHEDULES)}, got {settings.schedule!r}"
        )
    if not 0.0 <= settings.weight_decay < math.inf:
        problems.append(f"weight_decay must not be negative, got {settings.weight_decay}")
    return problems


def loop_arguments(
    settings: DPOSettings | RewardSettings | SFTSettings,
    n_rows: int,
    folder: Path,
    *,
    learning_rate: float,
    on_cpu: bool,
    bf16: bool,
) -> dict[str, Any]:
    """Arguments of `transformers.TrainingArguments`: checkpoints in tenths, no bar of its own.

    Args:
        settings: the user's.
        n_rows: of an epoch.
        folder: for checkpoints.
        learning_rate: peak rate, where the settings leave it open.
        on_cpu: whether the model lies there, and nothing moves it.
        bf16: whether products are taken in bfloat16.

    Raises:
        ValueError: the processes that were launched cannot share `settings.batch_size` evenly.
    """
    steps = math.ceil(n_rows / settings.batch_size) * settings.epochs
    logged = max(1, int(steps / 200))
    saved = settings.checkpoint_every or max(1, steps / 10)
    on_cpu = on_cpu and not shards()
    return {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate or learning_rate,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": rows_of_each(settings.batch_size),
        "warmup_steps": settings.warmup,
        "lr_scheduler_type": settings.schedule,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "save_strategy": "steps",
        # A logged mean begins anew where a run is continued, so checkpoints follow logged steps.
        "save_steps": logged * math.ceil(saved / logged),
        "save_total_limit": 2,
        "logging_steps": logged,
        "logging_first_step": True,
        "seed": settings.seed,
        "bf16": bf16,
        "fp16": False,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "disable_tqdm": True,
        "report_to": list(settings.report_to) or "none",
    }
