"""Online DPO: at each step the policy answers, the answers are scored or judged, and it learns.

The rollouts, rewards and checkpoints are `PPOTrainer`'s; only what is learned from them differs. For
rounds of many steps, each with a dataset that is kept, see `prefopt.online_flow`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefopt.advantages import online_dpo_pairs
from prefopt.training.experience import Experience
from prefopt.training.ppo_config import PPOConfig
from prefopt.training.ppo_trainer import PPOTrainer

logger = logging.getLogger(__name__)


@dataclass
class OnlineDPOConfig(PPOConfig):
    """`PPOConfig` with the defaults of online DPO (Guo et al. 2024, arXiv:2402.04792).

    A rollout batch is one optimiser step, so `num_ppo_epochs` and `num_mini_batches` are 1: the
    policy has not moved since it answered, and the gradient is exactly DPO's. There is no value, no
    KL penalty in the reward, and no clipping.

    Parameters:
        beta: the strength of the pull to the reference, as in DPO.
        num_generations: answers a prompt; the best and the worst are the pair. Groups whose answers
            all score the same give none, and are told.
    """

    beta: float = field(default=0.1, metadata={"help": "Strength of the pull to the reference."})
    num_generations: int = field(default=2, metadata={"help": "Answers a prompt."})
    num_ppo_epochs: int = field(default=1, metadata={"help": "1: the gradient is DPO's only then."})
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Prompts of a rollout batch (see `PPOConfig`)."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Optimiser steps between logs."})

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {wanted!r} for online DPO, got {getattr(self, name)!r}"
            for name, wanted in (
                ("num_ppo_epochs", 1), ("num_mini_batches", 1), ("kl_target", None),
                ("whiten_advantages", None), ("whiten_rewards", False),
            )
            if getattr(self, name) != wanted
        ]  # fmt: skip
        if not self.beta > 0:
            problems.append(f"beta must be positive, got {self.beta}")
        if problems:
            raise ValueError("OnlineDPOConfig: " + "; ".join(problems) + ".")
        self.kl_coef = self.beta
        self.advantage_estimator = "rloo"  # answers are compared with each other: no value
        super().__post_init__()


class OnlineDPOTrainer(PPOTrainer):
    """DPO on pairs that the policy makes at each step, chosen by a reward or a judge.

    Takes what `PPOTrainer` takes; `reward` is a `RewardModel`, a function, or a judge, which compares
    the answers to a prompt with each other. Logged besides the rollouts' figures: `online_dpo/loss`,
    `online_dpo/margin` (nats times beta), `online_dpo/accuracy` (pairs whose margin is above 0) and
    `online_dpo/tied` (the share of prompts without a pair).

    Raises:
        TypeError: `args` is no `OnlineDPOConfig`.
    """

    _tag_names = ("prefopt", "online-dpo")

    def __init__(self, model: Any, reward: Any, args: OnlineDPOConfig, *more: Any, **named: Any):
        if not isinstance(args, OnlineDPOConfig):
            raise TypeError(f"args must be an OnlineDPOConfig, got {type(args).__name__}.")
        super().__init__(model, reward, args, *more, **named)

    def _set_advantages(
        self, experience: Experience, rewards: Tensor, scores: Tensor, log_ratios: Tensor
    ) -> None:
        groups = experience.groups()
        pairs = online_dpo_pairs(scores, log_ratios, groups, self.kl_coef)
        n_groups = float(groups.max()) + 1
        counts = torch.tensor(
            [float(pairs.losses.numel()), float(experience.answer_of.numel()), n_groups],
            dtype=torch.float64, device=scores.device,
        )  # fmt: skip
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        n_pairs, n_tokens, n_groups = counts.tolist()
        if n_pairs == 0:
            logger.warning(
                "no prompt of step %d has a better and a worse answer, so nothing is learned from it",
                self.state.global_step + 1,
            )
        # The policy's loss is a mean over tokens; DPO's is one over pairs.
        scale = n_tokens / max(n_pairs, 1.0)
        experience.advantages = scale * pairs.weights[experience.answer_of]
        one = torch.ones_like(pairs.losses)
        self._averages.add("online_dpo/loss", pairs.losses, one)
        self._averages.add("online_dpo/margin", pairs.margins, one)
        self._averages.add("online_dpo/accuracy", (pairs.margins > 0).double(), one)
        tied = torch.full((1,), 1 - n_pairs / n_groups, device=scores.device)
        self._averages.add("online_dpo/tied", tied, torch.ones_like(tied))
