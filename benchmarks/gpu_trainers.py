"""Every trainer on a GPU against itself on a CPU. `benchmarks/gpu.py` runs it.

SFT, reward, DPO and PPO, with LoRA and with all weights, train a tiny model in float32 by plain
gradient descent, from the same start, on the same rows. PPO's answers are sampled from the same
uniform numbers, which both devices draw on the CPU; where rounding moves a sample across a token's
border the answers differ, so PPO runs two rollout batches of short ones. Compared are the weights that
training changed: the norm of the difference over the norm of the change.
"""

from __future__ import annotations

import copy
import random
import tempfile
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig

import prefopt
from prefopt.training.sft_trainer import SFTTrainer

KINDS = ("sft", "reward", "dpo", "ppo")
ALLOWED = 1e-3
_SHAPE = {
    "vocab_size": 211, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
    "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def rows(n: int = 8) -> list[dict[str, Any]]:
    """Prompts with two answers each, as token ids."""
    draw = random.Random(0)

    def ids(size: int) -> list[int]:
        return [draw.randrange(2, 211) for _ in range(size)]

    return [
        {"prompt_ids": ids(9 + i), "chosen_ids": ids(12 - i), "rejected_ids": ids(4 + i)}
        for i in range(n)
    ]


def score(prompts: Any, answers: Any) -> list[float]:
    """A reward that only looks at tokens, and has them as text."""
    return [float(sum(map(ord, answer)) % 97) / 97 for answer in answers]


def make(kind: str, lora: bool, device: str, model: Any, tokenizer: Any, folder: str) -> Any:
    """The trainer."""
    shared = {
        "output_dir": folder, "per_device_train_batch_size": 4, "bf16": False, "seed": 0,
        "gradient_checkpointing": False, "use_cpu": device == "cpu", "learning_rate": 0.1,
        "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
        "dataloader_pin_memory": device == "cuda", "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    adapter = None
    if lora:
        adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    data = rows()
    if kind == "sft":
        columns = [
            {
                "input_ids": r["prompt_ids"] + r["chosen_ids"],
                "labels": [-100] * len(r["prompt_ids"]) + r["chosen_ids"],
            }
            for r in data
        ]
        return SFTTrainer(
            micro_batch_tokens=256, model=model, processing_class=tokenizer, peft_config=adapter,
            args=trl.SFTConfig(max_length=None, num_train_epochs=2, **shared),
            train_dataset=Dataset.from_list(columns),
        )  # fmt: skip
    if kind == "ppo":
        shared["logging_steps"] = 2
        config = prefopt.PPOConfig(
            num_rollouts=2, num_ppo_epochs=2, stop_token_ids=[], num_generations=2,
            max_new_tokens=5, micro_batch_tokens=256, num_logged_answers=0,
            value_learning_rate=0.1, **shared,
        )  # fmt: skip
        prompts = [{"prompt_ids": r["prompt_ids"]} for r in data]
        return prefopt.PPOTrainer(
            model, score, config, Dataset.from_list(prompts), processing_class=tokenizer,
            peft_config=adapter,
        )  # fmt: skip
    trainer, config = {
        "dpo": (prefopt.DPOTrainer, prefopt.DPOConfig),
        "reward": (prefopt.RewardTrainer, prefopt.RewardConfig),
    }[kind]
    return trainer(
        model, args=config(micro_batch_tokens=256, max_length=None, num_train_epochs=2, **shared),
        train_dataset=Dataset.from_list(data), processing_class=tokenizer, peft_config=adapter,
    )  # fmt: skip


def trained(
    kind: str, lora: bool, device: str, model: Any, tokenizer: Any
) -> dict[str, torch.Tensor]:
    """The parameters that training changed, by name, less what they were before."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(kind, lora, device, copy.deepcopy(model).to(device), tokenizer, folder)
        trainer.remove_callback(transformers.PrinterCallback)
        parameters = dict(trainer.model.named_parameters())
        before = {n: p.detach().cpu().clone() for n, p in parameters.items()}
        trainer.train()
        assert next(iter(parameters.values())).device.type == device
        after = {n: p.detach().cpu() - before[n] for n, p in parameters.items()}
    return {n: change for n, change in after.items() if bool(change.any())}


def check(device: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Every trainer on the device beside itself on a CPU."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SHAPE)).float()
    results = []
    for kind in KINDS:
        for lora in (True, False):
            own, other = (trained(kind, lora, d, model, tokenizer) for d in (device, "cpu"))
            names = own.keys() | other.keys()
            flat = [torch.cat([c[n].flatten() for n in sorted(names)]) for c in (own, other)]
            apart = float((flat[0] - flat[1]).norm() / flat[1].norm())
            results.append(
                {
                    "trainer": kind,
                    "trains": "LoRA" if lora else "all weights",
                    "changed": len(other),
                    "apart": apart,
                    "right": own.keys() == other.keys() and len(other) > 0 and apart <= ALLOWED,
                }
            )
    return results


def lines(entry: dict[str, Any], machine: str) -> list[str]:
    """The section as Markdown."""
    found = [
        "## Every trainer, here and on a CPU", "", machine, "",
        f"float32, plain gradient descent. Allowed: {ALLOWED:g} of the change.", "",
        "| trainer | trains | tensors changed | difference / change | right |",
        "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for r in entry["trainers"]:
        found.append(
            f"| {r['trainer']} | {r['trains']} | {r['changed']} | {r['apart']:.1e} | "
            f"{'yes' if r['right'] else '**no**'} |"
        )
    return [*found, ""]
