"""How a reward model is trained; apart from what trains it, so that it loads at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.training.loop_settings import loop_problems

RewardLossName = Literal["bradley_terry", "rao_kupper", "davidson"]


@dataclass(frozen=True)
class RewardSettings:
    """How a reward model is trained.

    Args:
        learning_rate: peak rate; None takes 2e-4 below one billion parameters, 1e-4 below four,
            5e-5 below fifteen, 2e-5 above.
        epochs: passes over the data. More than one soon makes a reward model too sure of itself.
        batch_size: prompts an optimiser step; all preferences among a prompt's answers count as one.
        micro_batch_tokens: tokens that go through the model at once; None takes 512 on a CPU and
            8,192 on a GPU. It decides about memory and never about the result.
        max_length: tokens of prompt and answer together. Prompts with a longer answer are left out
            and counted: an answer without its end is another answer.
        loss: the law of preferences that is fitted; see `prefopt.reward_losses`.
        soft_labels: what a pair's `p_chosen` below 1 does: the loss expected under it ("expected"),
            or nothing ("ignore"), and see `prefopt.losses.soft_label_loss`.
        margin_weight: a preference's margin (its mean grade, up to 2) times this is by how much the
            better answer is asked to be better. Scores are then no longer log-odds.
        centering_penalty: weight of (r_chosen + r_rejected)^2, which holds the scores' level during
            training; 0.01 where it matters.
        centre_on: prompts whose answers have the mean score 0 in the end; 0 leaves the level open.
        warmup: share of the steps over which the rate rises from 0.
        schedule: how the rate falls after that.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        gradient_checkpointing: recompute activations in the backward pass; less memory, slower.
        checkpoint_every: optimiser steps between checkpoints; None takes a tenth of the run.
        seed: of the initial weights and the order of the prompts.
        report_to: trackers that transformers knows ("tensorboard", "wandb", "trackio").
    """

    learning_rate: float | None = None
    epochs: float = 1.0
    batch_size: int = 16
    micro_batch_tokens: int | None = None
    max_length: int = 1024
    loss: RewardLossName = "bradley_terry"
    soft_labels: Literal["expected", "geometric", "robust", "ignore"] = "expected"
    margin_weight: float = 0.0
    centering_penalty: float = 0.0
    centre_on: int = 256
    warmup: float = 0.1
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    checkpoint_every: int | None = None
    seed: int = 0
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = loop_problems(self)
        for name in ("margin_weight", "centering_penalty", "centre_on"):
            if not getattr(self, name) >= 0:
                problems.append(f"{name} must not be negative, got {getattr(self, name)}")
        if problems:
            raise ValueError("reward settings: " + "; ".join(problems) + ".")
