"""What the tests of sharded training run: methods, in every arrangement of processes."""

import json
import os

import torch
import trl
from datasets import Dataset

from prefopt import RewardConfig, RewardTrainer
from prefopt.models import LoRASettings
from prefopt.training.dpo import DPOSettings, train_dpo
from prefopt.training.reward import RewardSettings, train_reward
from prefopt.training.sft_trainer import SFTTrainer, token_columns
from prefopt.training.sharding import holds_parts
from prefopt.training.token_rows import TokenRow
from tests.tiny_models import tiny_tokenizer
from tests.training import dpo_cases
from tests.training.processes import fork_cases
from tests.training.test_dpo import groups

SETTINGS = {
    "train_sampling_strategy": "sequential", "max_steps": 4, "logging_steps": 1, "seed": 1,
    "learning_rate": 0.01, "lr_scheduler_type": "linear", "optim": "adamw_torch", "bf16": False,
    "weight_decay": 0.1, "max_grad_norm": 0.5, "gradient_checkpointing": False, "report_to": [],
    "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip


def make_trainer(folder, method, tune, **settings):
    """A trainer of a tiny model on 14 rows, the last of which fill no batch; `tune` is what trains."""
    rows = dpo_cases.pair_rows(14)
    settings = {"micro_batch_tokens": 20, **SETTINGS, **settings}
    peft_config = dpo_cases.LORA if tune == "lora" else None
    if method == "dpo":
        return dpo_cases.make_trainer(folder, rows, peft_config=peft_config, **settings)
    shared = {
        "model": dpo_cases.tiny_policy(),
        "processing_class": tiny_tokenizer(),
        "peft_config": peft_config,
    }
    if method == "reward":
        args = RewardConfig(str(folder), max_length=32, **settings)
        return RewardTrainer(args=args, train_dataset=Dataset.from_list(rows), **shared)
    budget = settings.pop("micro_batch_tokens")
    tokens = [TokenRow(tuple(r["prompt_ids"]), tuple(r["chosen_ids"]), False) for r in rows]
    return SFTTrainer(
        micro_batch_tokens=budget,
        args=trl.SFTConfig(
            str(folder),
            max_length=None,
            accelerator_config={"dispatch_batches": False},
            **settings,
        ),
        train_dataset=Dataset.from_list([token_columns(row) for row in tokens]),
        **shared,
    )


def train_case(folder, settings):
    """Train, and write what came out; all processes do it together.

    `resume` names the checkpoint to go on from, `sharded` says whether weights must be.
    """
    if settings.get("method") in FLOWS:
        FLOWS[settings["method"]](folder, settings["model"])
        return
    resume, sharded = settings.pop("resume", None), settings.pop("sharded", False)
    if "RANK" in os.environ:
        settings["ddp_backend"] = "gloo"
    trainer = make_trainer(folder / "run", **settings)
    trainer.train(resume_from_checkpoint=resume)
    assert holds_parts(trainer.model) == sharded
    found = dpo_cases.weights(trainer)
    if trainer.is_world_process_zero():
        torch.save(found, folder / "weights.pt")
        (folder / "metrics.json").write_text(json.dumps(dpo_cases.metrics(trainer)))
    trainer.save_model(str(folder / "saved"))


def run_dpo(folder, model):
    """What `prefopt train dpo` calls, with a batch that the processes share."""
    settings = DPOSettings(learning_rate=1e-2, batch_size=4, max_length=128, checkpoint_every=1)
    lora = LoRASettings(r=4, alpha=8)
    result = train_dpo(groups(14), model, folder / "adapter", settings=settings, lora=lora)
    (folder / f"points{os.environ.get('RANK', '')}.json").write_text(
        json.dumps([(point.loss, point.margin) for point in result.points])
    )


def run_reward(folder, model):
    """What `prefopt train reward` calls, with a batch that the processes share."""
    settings = RewardSettings(learning_rate=1e-2, batch_size=4, max_length=128, checkpoint_every=1)
    lora = LoRASettings(r=4, alpha=8)
    result = train_reward(groups(14), model, folder / "adapter", settings=settings, lora=lora)
    (folder / f"points{os.environ.get('RANK', '')}.json").write_text(
        json.dumps([(point.loss, point.margin) for point in result.points] + [result.bias])
    )


FLOWS = {"train_dpo": run_dpo, "train_reward": run_reward}


if __name__ == "__main__":
    fork_cases(train_case)
