"""Prompts and a reward -> a LoRA adapter in a folder, trained with PPO.

    objective: E[score(x, y)] - beta KL(pi || ref)

(Ziegler et al. 2019, arXiv:1909.08593). The loop and the roles are `PPOTrainer`'s; this module
gives it token ids whose boundaries `prefopt.chat` decided, puts policy, value and reward on one
base model, writes adapter, card and log, and continues a killed run from its last whole checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from prefopt.chat import tokenize_prompt
from prefopt.errors import DataError
from prefopt.judges import Judge
from prefopt.launched import (
    is_first_process,
    rows_of_each,
    shards,
    trains_in_bfloat16,
)
from prefopt.models import (
    Device,
    DType,
    LanguageModel,
    LoRASettings,
    adapter_fingerprint,
    load_model,
    lora_config,
    model_fingerprint,
)
from prefopt.out_of_memory import without_memory_settings
from prefopt.training.card_parts import front_matter, general_data, notes_list
from prefopt.training.checkpoints import resume_point, whole_folder
from prefopt.training.health import HealthNote
from prefopt.training.ppo_health import PPOPoint, ppo_points
from prefopt.training.ppo_settings import PPOSettings as PPOSettings
from prefopt.types import Prompt, content_hash

if TYPE_CHECKING:
    from prefopt.data.rows import Source
    from prefopt.training.reward_model import RewardModel
    from prefopt.training.token_rows import TokenRow

logger = logging.getLogger(__name__)

# General rows are cut there, or at the end of the model's context.
_GENERAL_TOKENS = 1024


class PPOResult(msgspec.Struct, frozen=True, kw_only=True):
    """A finished training: where the adapter is and what the log says.

    `n_replay` is how many general rows there were to replay.
    """

    adapter: Path
    reference: str
    n_prompts: int
    n_answers: int
    n_parameters_trained: int
    learning_rate: float
    points: tuple[PPOPoint, ...]
    health: tuple[HealthNote, ...]
    n_replay: int = 0


def train_ppo(
    prompts: Sequence[Prompt],
    model: str | LanguageModel,
    reward: RewardModel | str | Path | Judge | Callable[..., Sequence[float | None]],
    out: str | Path,
    *,
    held_out: Sequence[Prompt] = (),
    replay: Source | None = None,
    settings: PPOSettings | None = None,
    lora: LoRASettings | None = None,
    device: Device = "auto",
    dtype: DType = "auto",
    checkpoints: str | Path | None = None,
    progress: bool = True,
) -> PPOResult:
    """Train a LoRA adapter with PPO and save it in `out`.

    The reference is the base model (adapter off), or, when `lora.continue_from` is given, a frozen
    copy of that adapter as it was before training. The value is saved in `out/value`, a sample of
    the answers that were learned from in `out/rollouts.jsonl`.

    Args:
        prompts: what is answered.
        model: a name, or a loaded model (which gets the adapters attached).
        reward: a `RewardModel` or its folder, a judge, or a function of prompts and answers; see
            `prefopt.training.answer_rewards.reward_source`.
        out: folder for the adapter, its model card and `training_log.jsonl`.
        held_out: prompts that are answered and scored at times; training does not see them.
        replay: general data that no name in `settings.replay` can say, such as rows.
        settings: see `PPOSettings`.
        lora: see `LoRASettings`; `continue_from` is usually the adapter that `train_sft` made.
        device: where to train when `model` is a name.
        dtype: of the base weights when `model` is a name; adapters are float32.
        checkpoints: folder for checkpoints, default `<out>.checkpoints`. A call with the same
            arguments continues from the last whole one and ends with the same weights.
        progress: show a bar with prompts a second, score, KL and time left.

    Raises:
        DataError: no prompts, or none that leaves room for an answer, or general rows with nothing to
            learn from.
        ValueError: general data in both places, or processes that cannot share
            `settings.prompts_per_rollout` evenly.
        TrainingError: a number is no longer finite, or no answer got a score.
        ModelError: model, adapter, reward or device cannot be used.
    """
    settings, lora, out = settings or PPOSettings(), lora or LoRASettings(), Path(out)
    if replay is not None and settings.replay is not None:
        raise ValueError("general data is given twice, as replay and as settings.replay.")
    replay = settings.replay if replay is None else replay
    if not prompts:
        raise DataError("there are no prompts to answer.")
    checkpoint_dir = Path(checkpoints) if checkpoints else out.with_name(out.name + ".checkpoints")
    identity = [
        "ppo",
        model_fingerprint(model if isinstance(model, str) else model.base),
        _reward_identity(reward),
        [p.prompt_id for p in prompts],
        [p.prompt_id for p in held_out],
        without_memory_settings(msgspec.to_builtins(settings)),
        msgspec.to_builtins(lora),
        lora.continue_from and adapter_fingerprint(lora.continue_from),
    ]
    loaded = model
    if isinstance(loaded, str):
        loaded = load_model(
            loaded, adapter=lora.continue_from, device=device, dtype=dtype, trainable=True,
            quantization=lora.quantization,
        )  # fmt: skip
    if isinstance(reward, str | Path):
        reward = _load_reward(reward, loaded)
    own_answers = out.with_name(out.name + ".own_answers")

    from prefopt.training.replay import general_rows
    from prefopt.training.sharding import n_elements

    n_answers = settings.prompts_per_rollout * settings.answers_per_prompt
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    general = general_rows(
        replay,
        loaded,
        steps=settings.rollouts * settings.epochs * settings.mini_batches,
        batch_size=n_answers // settings.mini_batches,
        share=settings.replay_share,
        weight=settings.replay_weight,
        max_length=min(_GENERAL_TOKENS, context or _GENERAL_TOKENS),
        seed=settings.seed,
        partial=own_answers,
        progress=progress,
    )
    trainer, watch = _make_trainer(
        loaded, reward, prompts, held_out, general, settings, lora, checkpoint_dir, progress
    )
    resume = resume_point(trainer.accelerator, checkpoint_dir, [*identity, general])
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)

    roles = trainer.roles
    result = PPOResult(
        adapter=out,
        reference=str(roles.reference),
        n_prompts=len(trainer.train_dataset),
        n_answers=trainer.n_answers,
        n_parameters_trained=sum(
            n_elements(p) for p in (*roles.policy_parameters(), *roles.value_parameters())
        ),
        learning_rate=trainer.args.learning_rate,
        points=ppo_points(trainer.state.log_history),
        health=watch.diagnosis(trainer.args),
        n_replay=len(general),
    )
    weights = trainer.whole_weights()
    if is_first_process():
        _save(trainer, weights, loaded, result, settings)
        shutil.rmtree(checkpoint_dir, ignore_errors=True)
        own_answers.unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()
    return result


def load_ppo_log(adapter: str | Path) -> tuple[PPOPoint, ...]:
    """The rollout batches that `train_ppo` wrote beside an adapter."""
    from prefopt.data.records import read_records

    return tuple(read_records(Path(adapter) / "training_log.jsonl", PPOPoint))


def _load_reward(folder: str | Path, loaded: LanguageModel) -> RewardModel:
    """On the policy's base where its file says that it was trained on it."""
    from prefopt.training.reward_model import RewardModel

    file = Path(folder) / "reward_model.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    same = said.get("base") is not None and said["base"] == loaded.base
    if same:
        return RewardModel.load(folder, base=loaded.model)
    device: Any = loaded.device.type
    return RewardModel.load(folder, device=device)


def _reward_identity(reward: Any) -> str:
    """Something that changes with the reward, as far as that can be known."""
    from prefopt.training.reward_model import RewardModel

    if isinstance(reward, str | Path):
        return adapter_fingerprint(str(reward))
    if isinstance(reward, Judge):
        return reward.fingerprint
    if isinstance(reward, RewardModel):
        return content_hash([reward.base, reward.bias, reward.head.weight.tolist()])
    return f"{getattr(reward, '__module__', '')}.{getattr(reward, '__qualname__', type(reward))}"


def _make_trainer(
    loaded: LanguageModel,
    reward: Any,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    general: list[TokenRow],
    settings: PPOSettings,
    lora: LoRASettings,
    checkpoint_dir: Path,
    progress: bool,
) -> tuple[Any, Any]:
    from prefopt.training.ppo_callbacks import PPOHealthWatch
    from prefopt.training.ppo_trainer import PPOConfig, PPOTrainer
    from prefopt.training.progress_bar import ProgressBar
    from prefopt.training.tree_model import is_wrapped

    per_rollout = settings.epochs * settings.mini_batches
    tenth = max(1, settings.rollouts // 10)
    on_cpu = loaded.device.type == "cpu" and not shards()
    args = PPOConfig(
        output_dir=str(checkpoint_dir),
        num_rollouts=settings.rollouts,
        per_device_train_batch_size=rows_of_each(settings.prompts_per_rollout),
        num_generations=settings.answers_per_prompt,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        kl_coef=settings.kl_coef,
        kl_target=settings.kl_target,
        advantage_estimator=settings.advantage,
        learning_rate=settings.learning_rate,
        value_learning_rate=settings.value_learning_rate,
        num_ppo_epochs=settings.epochs,
        num_mini_batches=settings.mini_batches,
        missing_eos_penalty=settings.missing_eos_penalty,
        cliprange_value=settings.cliprange_value,
        rollout_engine=settings.rollout_engine,
        replay_share=settings.replay_share,
        replay_weight=settings.replay_weight,
        micro_batch_tokens=settings.micro_batch_tokens,
        gradient_checkpointing=settings.gradient_checkpointing,
        lr_scheduler_type="linear",
        eval_strategy="steps" if held_out else "no",
        eval_steps=(settings.evaluate_every or tenth) * per_rollout,
        save_strategy="steps",
        save_steps=(settings.checkpoint_every or tenth) * per_rollout,
        save_total_limit=2,
        logging_steps=per_rollout,
        seed=settings.seed,
        bf16=trains_in_bfloat16(loaded.model),
        fp16=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        report_to=list(settings.report_to) or "none",
    )
    watch = PPOHealthWatch()
    trainer = PPOTrainer(
        model=loaded.model,
        reward=reward,
        args=args,
        train_dataset=_rows(prompts, loaded.tokenizer),
        eval_dataset=_rows(held_out, loaded.tokenizer) if held_out else None,
        processing_class=loaded.tokenizer,
        peft_config=None if is_wrapped(loaded.model) else lora_config(lora),
        callbacks=[watch],
        replay_dataset=general or None,
    )
    ProgressBar(description="training (PPO)", unit="prompt", show=progress).attach(trainer)
    logger.info("the PPO reference is %s; %d prompts", trainer.roles.reference, len(prompts))
    return trainer, watch


def _rows(prompts: Sequence[Prompt], tokenizer: Any) -> Any:
    import datasets

    return datasets.Dataset.from_list(
        [
            {
                "prompt_ids": tokenize_prompt(tokenizer, prompt),
                "prompt": [{"role": m.role, "content": m.content} for m in prompt.messages],
                "prompt_id": prompt.prompt_id,
                "category": prompt.category,
            }
            for prompt in prompts
        ]
    )


def _save(
    trainer: Any, weights: Any, loaded: LanguageModel, result: PPOResult, settings: PPOSettings
) -> None:
    from prefopt.data.records import write_bytes, write_records
    from prefopt.training.rollout_log import ROLLOUTS_FILE

    with whole_folder(result.adapter) as folder:
        trainer.roles.save(folder, weights)
        loaded.tokenizer.save_pretrained(folder)
        write_records(folder / "training_log.jsonl", result.points)
        write_bytes(folder / "README.md", _model_card(loaded.base, result, settings).encode())
        sampled = Path(trainer.args.output_dir) / ROLLOUTS_FILE
        if sampled.is_file():
            shutil.copy(sampled, folder / ROLLOUTS_FILE)


def _model_card(base: str, result: PPOResult, settings: PPOSettings) -> str:
    first, last = result.points[0], result.points[-1]
    beta = f"{settings.kl_coef:g}"
    general = general_data(result.n_replay, settings.replay_share, settings.replay_weight)
    if settings.kl_target is not None:
        beta += f", adapted to a KL of {settings.kl_target:g} nats"
    head = front_matter(
        base, library="peft", task="text-generation", tags=["prefopt", "ppo", "rlhf", "lora"]
    )
    return f"""{head}
# A LoRA adapter for {base}, tuned with PPO

Trained with [prefopt](https://pypi.org/project/prefopt/) on {result.n_answers:,} answers that it gave
itself to {result.n_prompts} prompts.

| setting | value |
|---|---|
| reference | {result.reference} |
| beta | {beta} |
| advantages | {settings.advantage} |
| rollout batch | {settings.prompts_per_rollout} prompts x {settings.answers_per_prompt} answers, \
{settings.epochs} epochs |
| general data | {general} |
| parameters trained | {result.n_parameters_trained:,}, value included |
| learning rate | {result.learning_rate:g}, linear |
| seed | {settings.seed} |

The score went from {first.score:.3f} to {last.score:.3f} at a KL of {last.kl:.2f} nats an answer.

## What the log says

{notes_list(result.health)}

## Use

```python
from prefopt import load_model

model = load_model({base!r}, adapter="path/to/this/folder")
```
"""
