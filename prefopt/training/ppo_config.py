"""The settings of `PPOTrainer`, each with its default and where that comes from.

All faults of a configuration are said at once, before anything is loaded. Knows nothing of models or
data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import transformers

AdvantageEstimator = Literal["gae", "rloo", "grpo"]
"""Where a baseline comes from: a learned value, the other answers, or the group's mean and spread."""

EngineName = Literal["transformers", "vllm"]
"""What samples the answers."""


@dataclass
class PPOConfig(transformers.TrainingArguments):
    r"""Everything `transformers.TrainingArguments` has, and what PPO needs.

    One rollout batch is `per_device_train_batch_size * gradient_accumulation_steps` prompts on each
    process with `num_generations` answers each. It is used for `num_ppo_epochs * num_mini_batches`
    optimiser steps, which is what `max_steps`, `logging_steps` and `save_steps` count; checkpoints are
    written at the end of a rollout batch only. Memory is bounded by `micro_batch_tokens`, on which,
    as on `gradient_accumulation_steps`, no gradient depends.

    Names are TRL's where TRL's last PPO (0.29.1) has them. Sources: OAI is openai/lm-human-preferences
    (Ziegler et al. 2019, arXiv:1909.08593), N+ "The N+ Implementation Details of RLHF with PPO"
    (Huang et al. 2024, arXiv:2403.17031).

    The KL penalty is k1, `log pi - log ref` of sampled tokens, in the reward, and nowhere else
    (OAI, N+, TRL). k3 in the reward pulls to the wrong policy, and a KL term in the loss beside
    whitened advantages has another strength than its coefficient says, so neither is an option; who
    wants to see that overrides `PPOTrainer.kl_penalties`.

    What is always so: old log-probabilities and the reference's are computed by the forward pass that
    trains, not taken from sampling, and the ratio is checked to be 1 before the first step of a
    rollout batch; logits are divided by the temperature in all passes; dropout is off in all models
    (N+); losses are means over all tokens of a mini-batch, on all processes; log-ratios are clamped
    to +-20 (OpenRLHF); a reward of None leaves its answer out.

    Parameters:
        learning_rate: of the policy; None takes 3e-6 for a whole model (N+, TRL) and 5e-5 for an
            adapter, about ten times more. It falls linearly to 0 (OAI, N+).
        value_learning_rate: of the value; None takes the policy's (N+, TRL).
        adam_epsilon: 1e-5 (OAI, N+); PyTorch's 1e-8 makes early steps larger.
        max_grad_norm: of the policy's gradient; the value's is clipped by itself, so that a large
            value loss does not shrink the policy's steps.
        value_max_grad_norm: None takes `max_grad_norm`.
        num_rollouts: rollout batches to train on; sets `max_steps`. None goes by `num_train_epochs`.
        num_ppo_epochs: passes over each rollout batch: 4 (OAI, N+, TRL).
        num_mini_batches: optimiser steps of each pass: 1 (OAI, N+, TRL).
        num_generations: answers a prompt, which share the prompt's computation.
        max_new_tokens: an answer is cut off here.
        temperature: of sampling; logits are divided by it wherever log-probabilities are computed.
            1 trains the model itself; OAI, N+ and TRL use 0.7.
        stop_token_ids: tokens that end an answer; None takes those of tokenizer and chat template.
            With an empty list every answer has `max_new_tokens` tokens and none counts as cut off.
        rollout_engine: what samples: `transformers`, the model itself, or `vllm`, which holds the base
            model once more and gets the policy's adapter for each rollout batch; one process on a GPU,
            with `pip install 'prefopt[vllm]'`, adapters only.
        vllm_gpu_memory_utilization: the share of the GPU's memory that vLLM takes (TRL: 0.3).
        generation_batch_size: answers generated at once; None takes 256.
        max_prompt_length: longer prompts are left out, and told; None takes what the model's context
            leaves beside `max_new_tokens`.
        missing_eos_penalty: taken off the score of an answer that was cut off (TRL's examples: 1).
            N+ sets the score to -1 instead, which assumes scores around 0. None takes off nothing.
        score_clip: scores are clipped to +- this. None (OAI, N+, TRL); OpenRLHF takes 10. Clipping
            where scores really lie changes what is optimised.
        whiten_rewards: scale token rewards to variance 1, the mean kept: off (N+, TRL; OAI has it on).
        kl_coef: beta, what a nat of KL costs: 0.05 (N+, TRL; OAI 0.15, adaptive).
        kl_target: nats an answer that `kl_coef` is adapted to hold; None keeps it fixed. OAI: 6.
        kl_horizon: how slowly it is adapted, in answers: 10,000 (OAI).
        advantage_estimator: `gae` with a value model; `rloo` (arXiv:2402.14740) and `grpo`
            (arXiv:2402.03300) compare answers to the same prompt and train no value. Their score is
            the whole answer's, KL penalty included.
        gamma: discount: 1 (all).
        lam: lambda of generalised advantage estimation: 0.95 (OAI, N+, TRL).
        whiten_advantages: to mean 0 and variance 1 over the true tokens of the rollout batch; None
            does it for `gae` (OAI and N+ by mini-batch, OpenRLHF by rollout batch).
        cliprange: of the policy's ratio: 0.2 (all).
        cliprange_value: how far a value may move on a rollout batch: 0.2 (OAI, N+, TRL). It is in
            units of the score, so raise it where scores are much larger than 1; None clips nothing.
        micro_batch_tokens: tokens that go through the model at once; None takes 512 on a CPU and
            8,192 on a GPU.
        replay_share: the share of general rows among all rows of an optimiser step (its answers and
            these), in (0, 1), where the trainer is given a `replay_dataset`; the nearest whole number
            of rows, and at least one.
        replay_weight: of their mean negative log-likelihood a token beside the policy's loss; 0 is no
            replay. The pretraining term of InstructGPT (arXiv:2203.02155, eq. 2), which has 27.8 for
            another mean.
        num_logged_answers: sampled answers that each rollout batch adds to `rollouts.jsonl` in the
            output folder.
    """

    learning_rate: float | None = field(
        default=None, metadata={"help": "Of the policy. None: 3e-6, or 5e-5 for an adapter."}
    )
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Prompts of a rollout batch (see the class)."}
    )
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Of Adam."})
    logging_steps: float = field(default=4, metadata={"help": "Optimiser steps between logs."})
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the value. None: the policy's."}
    )
    value_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Of the value's gradient. None: max_grad_norm."}
    )
    num_rollouts: int | None = field(
        default=None, metadata={"help": "Rollout batches; sets max_steps."}
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over a rollout batch."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimiser steps of each pass."})
    num_generations: int = field(default=4, metadata={"help": "Answers a prompt."})
    max_new_tokens: int = field(default=64, metadata={"help": "An answer is cut off here."})
    temperature: float = field(default=1.0, metadata={"help": "Logits are divided by it."})
    stop_token_ids: list[int] | None = field(
        default=None, metadata={"help": "End an answer. None: the tokenizer's; []: none."}
    )
    rollout_engine: EngineName = field(
        default="transformers",
        metadata={"help": "What samples.", "choices": get_args(EngineName)},
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory that vLLM takes."}
    )
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Answers generated at once. None: 256."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longer prompts are left out."}
    )
    missing_eos_penalty: float | None = field(
        default=1.0, metadata={"help": "Taken off the score of an answer that was cut off."}
    )
    score_clip: float | None = field(default=None, metadata={"help": "Bound of scores."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Token rewards of variance 1."})
    kl_coef: float = field(default=0.05, metadata={"help": "What a nat of KL costs."})
    kl_target: float | None = field(
        default=None, metadata={"help": "Nats an answer that kl_coef is adapted to hold."}
    )
    kl_horizon: float = field(default=10_000, metadata={"help": "Answers; how slowly it adapts."})
    advantage_estimator: AdvantageEstimator = field(
        default="gae",
        metadata={"help": "gae, rloo or grpo.", "choices": get_args(AdvantageEstimator)},
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of advantage estimation."})
    whiten_advantages: bool | None = field(
        default=None, metadata={"help": "Mean 0, variance 1. None: for gae."}
    )
    cliprange: float = field(default=0.2, metadata={"help": "Of the policy's ratio."})
    cliprange_value: float | None = field(default=0.2, metadata={"help": "Of the value."})
    max_steps: int = field(
        default=-1, metadata={"help": "Optimiser steps, a multiple of those of a rollout batch."}
    )
    micro_batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens through the model at once. None: 512 on CPU, 8192 on GPU."},
    )
    replay_share: float = field(
        default=0.1, metadata={"help": "Share of general rows in a step, with a replay_dataset."}
    )
    replay_weight: float = field(
        default=1.0, metadata={"help": "Weight of the general rows' NLL beside the policy's loss."}
    )
    num_logged_answers: int = field(
        default=4, metadata={"help": "Answers of each rollout batch that are written down."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name} must be at least {least}, got {getattr(self, name)}"
            for name, least in (
                ("num_ppo_epochs", 1), ("num_mini_batches", 1), ("num_generations", 1),
                ("max_new_tokens", 1), ("num_rollouts", 1), ("generation_batch_size", 1),
                ("micro_batch_tokens", 1), ("max_prompt_length", 1), ("num_logged_answers", 0),
            )
            if getattr(self, name) is not None and getattr(self, name) < least
        ]  # fmt: skip
        problems += [
            f"{name} must be positive, got {getattr(self, name)}"
            for name in (
                "temperature", "learning_rate", "value_learning_rate", "cliprange",
                "cliprange_value", "score_clip", "kl_target", "kl_horizon", "max_grad_norm",
                "value_max_grad_norm",
            )
            if getattr(self, name) is not None and not getattr(self, name) > 0
        ]  # fmt: skip
        problems += [
            f"{name} must be in [0, 1], got {getattr(self, name)}"
            for name in ("gamma", "lam")
            if not 0 <= getattr(self, name) <= 1
        ]
        if self.rollout_engine not in get_args(EngineName):
            problems.append(
                f"rollout_engine must be one of {get_args(EngineName)}, got {self.rollout_engine!r}"
            )
        if not 0.0 < self.vllm_gpu_memory_utilization < 1.0:
            problems.append(
                "vllm_gpu_memory_utilization must be in (0, 1), got "
                f"{self.vllm_gpu_memory_utilization}"
            )
        if not 0.0 < self.replay_share < 1.0:
            problems.append(f"replay_share must be in (0, 1), got {self.replay_share}")
        if not 0.0 <= self.replay_weight < math.inf:
            problems.append(
                f"replay_weight must be finite and not negative, got {self.replay_weight}"
            )
        if self.kl_coef < 0:
            problems.append(f"kl_coef must not be negative, got {self.kl_coef}")
        if self.kl_target is not None and self.kl_coef == 0:
            problems.append("kl_target adapts kl_coef by factors, so kl_coef must not be 0")
        if self.advantage_estimator not in get_args(AdvantageEstimator):
            problems.append(
                f"advantage_estimator must be one of {get_args(AdvantageEstimator)}, got "
                f"{self.advantage_estimator!r}"
            )
        elif self.advantage_estimator != "gae" and self.num_generations < 2:
            problems.append(
                f"{self.advantage_estimator} compares answers to the same prompt, so "
                f"num_generations must be at least 2, got {self.num_generations}"
            )
        if self.advantage_estimator != "gae" and self.whiten_rewards:
            problems.append("whiten_rewards needs advantage_estimator='gae'")
        if self.num_rollouts is not None:
            if self.max_steps > 0 and self.max_steps != self.num_rollouts * self.steps_per_rollout:
                problems.append("num_rollouts sets max_steps; give one of them")
            else:
                self.max_steps = self.num_rollouts * self.steps_per_rollout
        elif self.max_steps > 0 and self.max_steps % self.steps_per_rollout:
            problems.append(
                f"max_steps={self.max_steps} ends inside a rollout batch, which is used for "
                f"{self.steps_per_rollout} steps; give a multiple, or num_rollouts"
            )
        if problems:
            raise ValueError("PPOConfig: " + "; ".join(problems) + ".")

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps that a rollout batch is used for."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def needs_value(self) -> bool:
        """Whether a value model is trained."""
        return self.advantage_estimator == "gae"

    @property
    def whitens_advantages(self) -> bool:
        """`whiten_advantages`, or what None stands for."""
        return self.needs_value if self.whiten_advantages is None else self.whiten_advantages
