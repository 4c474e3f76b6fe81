"""What the tests of the PPO trainer share: prompts, a reward that can be learned, a tiny trainer.

Also a module of cases for `processes.run_cases`.
"""

import copy
import json
import os

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt import PPOConfig, PPOTrainer, RewardModel
from prefopt.models import LoRASettings
from prefopt.training.ppo import PPOSettings, train_ppo
from prefopt.training.rlhf_model import TrainedRoles
from prefopt.training.sharding import holds_parts, whole_weights
from prefopt.training.token_rows import TokenRow
from prefopt.types import Prompt
from tests.training.processes import fork_cases

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
N_SYMBOLS, END = 8, 7


def tiny_policy(seed=0, **more):
    """A random Llama over eight symbols, the last of which ends an answer."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=N_SYMBOLS + 4,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=END,
            **more,
        )
    )
    return model.eval()


GENERAL = [
    TokenRow(prompt, answer, False)
    for prompt, answer in (
        ((8,), (1, 2, END)), ((9, 10), (3,)), ((11,), (4, 4, 5, END)), ((8, 8), (6, END)),
        ((10,), (2, 3, 4, 5, 6)),
    )
]  # fmt: skip
PROMPTS = [{"prompt_ids": ids} for ids in ([8, 9, 10], [9], [11, 8], [10, 10, 9, 8], [8], [11])]


def ones(prompts, answers, answer_ids):
    """The share of symbol 1: something a policy can learn in a few steps."""
    return [sum(token == 1 for token in ids) / len(ids) for ids in answer_ids]


def make_trainer(
    folder,
    *,
    model=None,
    reward=ones,
    rows=PROMPTS,
    peft_config=None,
    kind=PPOTrainer,
    ref_model=None,
    value_model=None,
    eval_rows=None,
    callbacks=None,
    processing_class=None,
    engine=None,
    replay=None,
    **settings,
):
    arguments = {
        "per_device_train_batch_size": 3, "num_generations": 4, "num_rollouts": 2,
        "num_ppo_epochs": 2, "max_new_tokens": 5, "seed": 1, "learning_rate": 0.05,
        "logging_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False, "lr_scheduler_type": "constant",
        **settings,
    }  # fmt: skip
    return kind(
        model=tiny_policy() if model is None else model,
        reward=reward,
        args=PPOConfig(str(folder), **arguments),
        train_dataset=Dataset.from_list(rows),
        ref_model=ref_model,
        value_model=value_model,
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=processing_class,
        peft_config=copy.deepcopy(peft_config),
        callbacks=callbacks,
        engine=engine,
        replay_dataset=replay,
    )


def trained(*args, **options):
    trainer = make_trainer(*args, **options)
    trainer.train()
    return trainer


def weights(trainer):
    """All that trains, of policy and value."""
    parameters = [*trainer.roles.policy_parameters(), *trainer.roles.value_parameters()]
    return [p.detach().clone() for p in parameters]


def logged(trainer):
    """All that was logged but for the clock."""
    skip = ("runtime", "per_second", "flos", "time/")
    return [
        {k: v for k, v in line.items() if not any(part in k for part in skip)}
        for line in trainer.state.log_history
    ]


def learned_reward(tune):
    """A reward model, for adapters one on the policy's base."""
    peft_config = copy.deepcopy(LORA) if tune == "lora" else None
    reward = RewardModel.new(tiny_policy(), None, peft_config, seed=3)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in reward.model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    return reward


def whole_trained(trainer):
    """All that trains, whole, by its name in a module that every arrangement has; all must call it."""
    found = whole_weights(TrainedRoles(trainer.roles), lambda name, p: p.requires_grad)
    return {name: found[name] for name in sorted(found)}


def train_case(folder, settings):
    """Train, and write what came out; all processes do it together.

    `tune` is what trains, `resume` names the checkpoint to go on from, `sharded` says whether weights
    must be.
    """
    if "model" in settings:
        run_flow(folder, settings["model"])
        return
    tune, resume = settings.pop("tune", "full"), settings.pop("resume", None)
    sharded = settings.pop("sharded", False)
    peft_config = LORA if tune == "lora" else None
    if "RANK" in os.environ:
        settings["ddp_backend"] = "gloo"
        settings["bf16"] = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    trainer = make_trainer(
        folder / "run",
        engine=ByPrompt(),
        reward=learned_reward(tune),
        peft_config=peft_config,
        eval_rows=PROMPTS[:3],
        replay=GENERAL,
        **settings,
    )
    trainer.train(resume_from_checkpoint=resume)
    assert holds_parts(trainer.model) == sharded
    found, evaluated = whole_trained(trainer), trainer.evaluate()
    with trainer._whole_weights_at_hand():
        prompts = [tuple(row["prompt_ids"]) for row in PROMPTS]
        sampled = trainer._transformers_engine((END,)).sample(prompts, 3, seed=5)
    trainer.save_model(str(folder / "saved"))
    if trainer.is_world_process_zero():
        torch.save(found, folder / "weights.pt")
        (folder / "logged.json").write_text(json.dumps(logged(trainer)))
        (folder / "sampled.json").write_text(json.dumps([sampled, evaluated["eval_scores"]]))


def run_flow(folder, model):
    """What `prefopt train ppo` calls, with prompts that the processes share."""
    settings = PPOSettings(
        rollouts=2, prompts_per_rollout=4, answers_per_prompt=2, max_new_tokens=6, epochs=2,
        learning_rate=5e-3, checkpoint_every=1,
    )  # fmt: skip
    prompts = [Prompt.from_text(f"What is thing {i}?") for i in range(5)]
    result = train_ppo(
        prompts, model, lambda prompts, answers: [len(set(a)) / 10 for a in answers],
        folder / "adapter", replay=GENERAL, settings=settings, lora=LoRASettings(r=4, alpha=8),
        held_out=prompts[:1],
    )  # fmt: skip
    said = [[point.score, point.kl] for point in result.points]
    (folder / f"points{os.environ.get('RANK', '')}.json").write_text(json.dumps(said))


class ByPrompt:
    """An engine whose answers depend on the prompt only, so that processes cannot change them."""

    def sample(self, prompts, k, seed):
        """Symbols and lengths that follow from the prompt."""
        from prefopt.training.rollouts import SampledIds

        def answer(prompt, i):
            ids = tuple(
                (3 * sum(prompt) + 5 * i + j * j) % END for j in range(1 + (i + prompt[0]) % 4)
            )
            return SampledIds((*ids, END), True) if i % 2 else SampledIds(ids, False)

        return [[answer(prompt, i) for i in range(k)] for prompt in prompts]


if __name__ == "__main__":
    fork_cases(train_case)
