"""What the tests of the DPO trainer share: rows of token ids, a tiny model, a trainer of both.

Also a module of cases for `processes.run_cases`.
"""

import copy
import json
import random

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt import DPOConfig, DPOTrainer
from prefopt.training.sharding import whole_weights
from tests.tiny_models import tiny_tokenizer
from tests.training.processes import fork_cases

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def tiny_policy(seed=0):
    """A random Llama of 20,000 parameters whose output head is its own."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    )


def perturbed(model, seed=7, scale=0.05):
    noise = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=noise)
    return twin


def pair_rows(n=12, prompts=5, seed=0):
    """Pairs over a few prompts; answers of one to seven tokens, some of them the same."""
    draw = random.Random(seed)

    def ids(most):
        return [draw.randrange(10, 300) for _ in range(draw.randint(1, most))]

    of = [ids(6) for _ in range(prompts)]
    shared = [ids(7) for _ in range(prompts)]
    return [
        {
            "prompt_ids": of[i % prompts],
            "chosen_ids": shared[i % prompts] if i % 3 == 0 else ids(7),
            "rejected_ids": ids(7),
        }
        for i in range(n)
    ]


def group_rows(n=6, seed=0):
    """K answers with scores, K from 2 to 4, ties among them."""
    draw = random.Random(seed)

    def ids(most):
        return [draw.randrange(10, 300) for _ in range(draw.randint(1, most))]

    rows = []
    for i in range(n):
        k = 2 + i % 3
        scores = [float(draw.randrange(3)) for _ in range(k)]
        scores[0], scores[-1] = 3.0, -1.0  # never all the same
        rows.append(
            {"prompt_ids": ids(5), "answer_ids": [ids(6) for _ in range(k)], "scores": scores}
        )
    return rows


def make_trainer(
    folder,
    rows,
    *,
    model=None,
    ref_model=None,
    eval_rows=None,
    peft_config=LORA,
    callbacks=None,
    kind=DPOTrainer,
    replay_dataset=None,
    **settings,
):
    arguments = {
        "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "seed": 1,
        "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False, "max_length": 32,
        "per_device_eval_batch_size": 4, **settings,
    }  # fmt: skip
    return kind(
        model=tiny_policy() if model is None else model,
        ref_model=ref_model,
        args=DPOConfig(str(folder), **arguments),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tiny_tokenizer(),
        peft_config=copy.deepcopy(peft_config),
        callbacks=callbacks,
        replay_dataset=replay_dataset,
    )


def trained(*args, **options):
    trainer = make_trainer(*args, **options)
    trainer.train()
    return trainer


def weights(trainer):
    """What trains, whole; all processes must call it."""
    return whole_weights(trainer.model, lambda name, parameter: parameter.requires_grad)


def metrics(trainer):
    """All that was logged but for the clock, and the work, which trees spare."""
    skip = ("runtime", "per_second", "flos")
    return [
        {k: v for k, v in line.items() if not any(part in k for part in skip)}
        for line in trainer.state.log_history
    ]


def train_case(folder, settings):
    """Train, and write what came out; all processes do it together."""
    trainer = trained(folder / "run", pair_rows(14), ddp_backend="gloo", **settings)
    found = weights(trainer)
    if trainer.is_world_process_zero():
        torch.save(found, folder / "weights.pt")
        (folder / "metrics.json").write_text(json.dumps(metrics(trainer)))


if __name__ == "__main__":
    fork_cases(train_case)
