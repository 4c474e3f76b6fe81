"""How PPO trains a policy; apart from what trains it, so that it loads at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PPOSettings:
    """How a policy is trained; `prefopt.PPOConfig` says where each default comes from.

    Args:
        rollouts: rollout batches: each samples, scores, and takes `epochs * mini_batches` steps.
        prompts_per_rollout: prompts of a rollout batch.
        answers_per_prompt: answers to each, which share the prompt's computation. The two multiply
            to the rollout batch's size, for which 256 and more is common.
        max_new_tokens: an answer is cut off here.
        temperature: of sampling, and of all log-probabilities.
        kl_coef: beta, what a nat of KL costs.
        kl_target: nats an answer that beta is adapted to hold; None keeps it fixed.
        advantage: `gae` with a learned value; `rloo` and `grpo` compare the answers to a prompt.
        learning_rate: of the policy; None takes 5e-5.
        value_learning_rate: None takes the policy's.
        epochs: passes over each rollout batch.
        mini_batches: optimiser steps of each pass.
        missing_eos_penalty: taken off the score of an answer that was cut off; None takes off nothing.
        cliprange_value: how far a value may move on a rollout batch, in units of the score.
        rollout_engine: what samples: `transformers`, the model itself, or `vllm`, in one process on a
            GPU.
        replay: general data against forgetting: a file or Hub id of texts, answers to prompts or
            conversations, "smoltalk" or "ultrachat", or "own_answers": what the model itself answers
            to built-in prompts before it is trained. None replays nothing.
        replay_share: the share of general rows among all rows of an optimiser step, in (0, 1), where
            there is such data.
        replay_weight: of their mean negative log-likelihood a token beside the policy's loss; 0 is no
            replay.
        micro_batch_tokens: tokens that go through the model at once; None takes 512 on a CPU and
            8,192 on a GPU. It decides about memory and never about the result.
        gradient_checkpointing: recompute activations in the backward pass; less memory, slower.
        evaluate_every: rollout batches between answers to held-out prompts; None takes a tenth of
            the run.
        checkpoint_every: rollout batches between checkpoints; None takes a tenth of the run.
        seed: of the adapters' weights, the prompts' order and the sampling.
        report_to: trackers that transformers knows ("tensorboard", "wandb", "trackio").
    """

    rollouts: int = 100
    prompts_per_rollout: int = 64
    answers_per_prompt: int = 4
    max_new_tokens: int = 64
    temperature: float = 1.0
    kl_coef: float = 0.05
    kl_target: float | None = None
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    learning_rate: float | None = None
    value_learning_rate: float | None = None
    epochs: int = 4
    mini_batches: int = 1
    missing_eos_penalty: float | None = 1.0
    cliprange_value: float | None = 0.2
    rollout_engine: Literal["transformers", "vllm"] = "transformers"
    replay: str | None = None
    replay_share: float = 0.1
    replay_weight: float = 1.0
    micro_batch_tokens: int | None = None
    gradient_checkpointing: bool = False
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    seed: int = 0
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in (
                "rollouts", "prompts_per_rollout", "answers_per_prompt", "max_new_tokens", "epochs",
                "mini_batches", "evaluate_every", "checkpoint_every",
            )
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]  # fmt: skip
        if not 0.0 < self.replay_share < 1.0:
            problems.append(f"replay_share must be in (0, 1), got {self.replay_share}")
        if not 0.0 <= self.replay_weight < math.inf:
            problems.append(
                f"replay_weight must be finite and not negative, got {self.replay_weight}"
            )
        if self.advantage != "gae" and self.answers_per_prompt < 2:
            problems.append(f"{self.advantage} needs answers_per_prompt of at least 2")
        if problems:
            raise ValueError("PPO settings: " + "; ".join(problems) + ".")
