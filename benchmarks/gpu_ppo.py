"""PPO on a GPU: one base model with adapters beside four models. `benchmarks/gpu.py` runs it.

Three arrangements of the same PPO, by `prefopt.PPOTrainer`, on prompts of one length:

    one base        policy, value and reward are adapters of one model, which without them is the
                    reference
    four models     policy and value are adapters, each on a model of its own; the reference and the
                    reward are models of their own
    four, trained   policy and value are trained whole, as in InstructGPT

Peaks are `torch.cuda.max_memory_allocated`, models included. Seconds are the wall's of a rollout batch
with all its optimiser steps, after one that warms up. Answers have a fixed length: no end token.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model

import prefopt

PARTS = ("generation", "scoring", "update")
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
MEMORY_TARGET = 0.45
ARRANGEMENTS = ("one base", "four models", "four, trained")


@dataclass(frozen=True)
class Load:
    """How much is run."""

    prompts: int  # of a rollout batch
    answers: int  # to each of them
    prompt_tokens: int
    answer_tokens: int
    epochs: int
    micro_batch_tokens: int
    arrangements: tuple[str, ...]


LOADS = {
    "tiny": Load(4, 2, 12, 6, 2, 512, ARRANGEMENTS),
    "smol": Load(64, 4, 160, 64, 4, 8192, ARRANGEMENTS),
    "1b": Load(32, 4, 160, 128, 2, 4096, ARRANGEMENTS),
    "8b": Load(16, 4, 160, 128, 2, 2048, ARRANGEMENTS[:2]),
}


class Clock(transformers.TrainerCallback):
    """Seconds of each rollout batch, by part."""

    def __init__(self, epochs: int, device: str) -> None:
        self.batches: list[dict[str, float]] = []
        self._epochs, self._device = epochs, device
        self._part: str | None = None
        self._since = 0.0

    def enter(self, part: str | None) -> None:
        """End the part that runs and begin another; None ends the rollout batch."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._part is not None:
            self.batches[-1][self._part] += now - self._since
        elif part is not None:
            self.batches.append(dict.fromkeys(PARTS, 0.0))
        self._part, self._since = part, now

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last optimiser step of a rollout batch ends it."""
        if state.global_step % self._epochs == 0:
            self.enter(None)


def models(
    arrangement: str, make: Callable[[], Any], tokenizer: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Policy, reward and the trainer's other models."""
    lora = LoraConfig(**ADAPTER)
    if arrangement == "one base":
        base = make()
        reward = prefopt.RewardModel.new(
            get_peft_model(base, lora, adapter_name="reward"), tokenizer, seed=0
        )
        return base, reward, {"peft_config": lora}
    reward = prefopt.RewardModel.new(make(), tokenizer, seed=0)
    policy, reference, value = make(), make(), make()
    if arrangement == "four models":
        value = get_peft_model(value, lora)
        return policy, reward, {"peft_config": lora, "ref_model": reference, "value_model": value}
    return policy, reward, {"ref_model": reference, "value_model": value}


def run(
    arrangement: str, make: Callable[[], Any], tokenizer: Any, load: Load, device: str
) -> dict[str, Any]:
    """One arrangement's figures: two rollout batches, of which the second counts."""
    gc.collect()
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    policy, reward, more = models(arrangement, make, tokenizer)
    draw = torch.Generator().manual_seed(0)
    vocabulary = len(tokenizer)
    shape = (2 * load.prompts, load.prompt_tokens)
    prompts = torch.randint(2, vocabulary, shape, generator=draw).tolist()
    clock = Clock(load.epochs, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = prefopt.PPOTrainer(
            policy,
            reward,
            prefopt.PPOConfig(
                folder,
                bf16=on_gpu,
                use_cpu=not on_gpu,
                gradient_checkpointing=False,
                per_device_train_batch_size=load.prompts,
                num_generations=load.answers,
                num_mini_batches=1,
                num_ppo_epochs=load.epochs,
                num_rollouts=2,
                max_new_tokens=load.answer_tokens,
                stop_token_ids=[],
                generation_batch_size=load.prompts * load.answers,
                micro_batch_tokens=load.micro_batch_tokens,
                logging_steps=load.epochs,
                num_logged_answers=0,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            Dataset.from_dict({"prompt_ids": prompts}),
            processing_class=tokenizer,
            callbacks=[clock],
            **more,
        )
        shared = trainer.roles.value.model is trainer.roles.policy
        assert (
            shared == (arrangement == "one base") == (trainer.reward.model is trainer.roles.policy)
        )
        trainer.remove_callback(transformers.PrinterCallback)
        sample, step = trainer.engine.sample, trainer.training_step

        def timed_sample(*args: Any) -> Any:
            clock.enter("generation")
            found = sample(*args)
            clock.enter("scoring")
            return found

        def timed_step(*args: Any) -> Any:
            clock.enter("update")
            return step(*args)

        trainer.engine.sample, trainer.training_step = timed_sample, timed_step
        trainer.train()
        kl = [h["objective/kl"] for h in trainer.state.log_history if "objective/kl" in h]
    parts = clock.batches[-1]
    seconds = sum(parts.values())
    answers = load.prompts * load.answers
    return {
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "parts_s": parts,
        "seconds": seconds,
        "answer_tokens_a_s": answers * load.answer_tokens / seconds,
        "kl": kl,
    }


def compare(
    shape: str, make: Callable[[], Any], tokenizer: Any, device: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """All arrangements of one shape, the sparing one first."""
    load, found = LOADS[shape], {}
    for arrangement in load.arrangements:
        try:
            found[arrangement] = run(arrangement, make, tokenizer, load, device)
        except torch.cuda.OutOfMemoryError:
            say(f"{shape}, {arrangement}: out of memory")
            continue
        peak = found[arrangement]["peak_gb"]
        shown = "" if peak is None else f", {peak:.1f} GB"
        say(f"{shape}, PPO, {arrangement}: {found[arrangement]['seconds']:.1f} s{shown}")
    return {"load": vars(load) | {"arrangements": list(load.arrangements)}, "runs": found}


def lines(key: str, machine: str, entry: dict[str, Any]) -> list[str]:
    """The section as Markdown."""
    load, runs = entry["load"], entry["runs"]
    found = [
        f"## PPO: {key}", "", machine, "",
        f"{load['prompts']} prompts of {load['prompt_tokens']} tokens with {load['answers']} answers "
        f"of {load['answer_tokens']} tokens a rollout batch, {load['epochs']} epochs of one step, "
        f"{load['micro_batch_tokens']:,} tokens at once, no checkpointing, LoRA r = 16, bfloat16. "
        "Arrangements: `benchmarks/gpu_ppo.py`.", "",
        "| | generation, s | scoring, s | update, s | answer tokens/s | peak GB | one base / this |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    spare = runs["one base"]["peak_gb"]
    for name, r in runs.items():
        cells = " | ".join(f"{r['parts_s'][part]:.2f}" for part in PARTS)
        peak = "-" if r["peak_gb"] is None else f"{r['peak_gb']:.1f}"
        ratio = "-" if r["peak_gb"] is None else f"{spare / r['peak_gb']:.2f}"
        found.append(f"| {name} | {cells} | {r['answer_tokens_a_s']:.0f} | {peak} | {ratio} |")
    return [*found, "", f"Memory target: at most {MEMORY_TARGET} of four models.", ""]
