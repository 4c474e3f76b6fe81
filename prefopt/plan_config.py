"""What `prefopt plan` is asked: a configuration, all of whose faults are said at once.

Apart from `prefopt.plan`, so that a command line can be built without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prefopt.models import LoRASettings
from prefopt.plan_hardware import parse_devices
from prefopt.plan_model import ModelShape

Method = Literal["dpo", "sft", "reward", "ppo"]
Strategy = Literal["ddp", "fsdp2", "zero2", "zero3"]


@dataclass(frozen=True)
class PlanConfig:
    """What is planned. Options have the names that training has.

    Args:
        model: "demo", a folder, or a Hub id; of its files only config.json is read.
        shape: a model that has no configuration yet, by its size: --shape.params 8B. Takes the place
            of `model`.
        method: dpo, sft, reward or ppo.
        tune: "lora" trains an adapter, "full" all weights.
        lora: which adapter, and whether the base model is held in 4 bits under it
            (lora.quantization).
        dtype: of the base weights; "auto" is bfloat16 on GPUs and float32 on a CPU, and float32 with
            tune="full".
        autocast: whether training runs under bfloat16 autocast (a trainer's bf16=True); None is what
            the training commands do, which is on a GPU.
        data: preferences (or demonstrations, for sft) whose lengths are planned for, as the training
            commands read them; they are tokenized with the model's tokenizer where it is at hand, and
            else counted as one token for each four bytes.
        prompt_tokens: mean length of a prompt, chat template included; without `data`.
        answer_tokens: mean length of an answer; without `data`.
        longest_tokens: prompt and answers of the longest row, all together; None takes twice the mean
            row. Without `data`.
        answers: K, how many answers a prompt has: 2 for pairs, 1 for sft.
        rows: how many prompts with answers there are; without `data`.
        max_length: tokens of prompt and one answer; what is longer is cut.
        epochs: passes over the rows (for ppo: over each rollout batch).
        batch_size: rows an optimiser step, on all devices together (for ppo: prompts of a rollout
            batch).
        micro_batch_tokens: tokens that go through the model at once; None takes 512 on a CPU and
            8,192 on a GPU.
        gradient_checkpointing: recompute activations in the backward pass.
        activation_offloading: keep activations in the host's memory.
        optimizer: adamw, adamw_8bit, paged_adamw_8bit or sgd (without momentum).
        rollouts: ppo's rollout batches.
        gpus: 8xH100-80GB, 4x48GB (any GPU of that memory), cpu, cpu-64GB, or auto for this machine.
        strategy: how several GPUs share the work: ddp, fsdp2, zero2 or zero3.
        suggest: work out the largest micro-batch that fits, and what helps where nothing does.
        measure: measure this machine's rate on a few layers of the model (seconds to a minute), where
            it is this machine that is planned for. Without it there is no time for a CPU.
        utilisation: share of a GPU's rate, as its vendor states it, that is assumed where it is not
            measured, and the most that is believed of what is; None takes 0.42.
        usd_per_gpu_hour: price of one device for one hour, in US dollars.
    """

    model: str = "demo"
    shape: ModelShape | None = None
    method: Method = "dpo"
    tune: Literal["lora", "full"] = "lora"
    lora: LoRASettings = field(default_factory=LoRASettings)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    autocast: bool | None = None
    data: str | None = None
    prompt_tokens: int = 200
    answer_tokens: int = 200
    longest_tokens: int | None = None
    answers: int | None = None
    rows: int = 1000
    max_length: int | None = None
    epochs: float = 1.0
    batch_size: int = 16
    micro_batch_tokens: int | None = None
    gradient_checkpointing: bool = False
    activation_offloading: bool = False
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd"] = "adamw"
    rollouts: int = 100
    gpus: str = "auto"
    strategy: Strategy = "ddp"
    suggest: bool = True
    measure: bool = True
    utilisation: float | None = None
    usd_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        problems = []
        for name in (
            "prompt_tokens", "answer_tokens", "longest_tokens", "answers", "rows", "max_length",
            "batch_size", "micro_batch_tokens", "rollouts",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1, got {value}")
        if not self.epochs > 0:
            problems.append(f"epochs must be positive, got {self.epochs}")
        if self.utilisation is not None and not 0 < self.utilisation <= 1:
            problems.append(f"utilisation must be in (0, 1], got {self.utilisation}")
        if self.usd_per_gpu_hour is not None and not self.usd_per_gpu_hour >= 0:
            problems.append(f"usd_per_gpu_hour must not be negative, got {self.usd_per_gpu_hour}")
        quantized = self.lora.quantization != "none"
        if self.tune == "full" and quantized:
            problems.append("4-bit weights cannot be trained; lora.quantization needs tune=lora")
        if self.method == "sft" and self.answers not in (None, 1):
            problems.append(f"sft has one answer a prompt, got answers={self.answers}")
        try:
            devices = parse_devices(self.gpus)
        except ValueError as error:
            problems.append(str(error).rstrip("."))
        else:
            if self.strategy != "ddp" and devices.count < 2:
                problems.append(
                    f"strategy={self.strategy} shares weights among GPUs, and {self.gpus} is one: "
                    "give several, such as 2xH100-80GB, or leave strategy at ddp"
                )
            if quantized and self.strategy == "zero3":
                problems.append("zero3 cannot shard 4-bit weights; take fsdp2 or ddp")
        if problems:
            raise ValueError("plan: " + "; ".join(problems) + ".")

    @property
    def n_answers(self) -> int:
        """Answers a prompt: 1 for sft, 4 for ppo, else 2, unless the user says otherwise."""
        return self.answers or {"sft": 1, "ppo": 4}.get(self.method, 2)
