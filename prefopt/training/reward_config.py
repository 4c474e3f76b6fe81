"""The settings of `RewardTrainer`: TRL's, and what tree batches, ties and groups of answers need.

All faults of a configuration are said at once, before anything is loaded. Knows nothing of models or
data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import trl

from prefopt.losses import SoftLabels
from prefopt.reward_losses import PairModel, RewardLossSettings
from prefopt.training.preference_rows import PairChoice, Truncation
from prefopt.training.trl_config import with_own_fields

REWARD_LOSSES = (*get_args(PairModel), "plackett_luce")
"""The names that `loss_type` takes."""


@dataclass
class RewardConfig(trl.RewardConfig):
    r"""TRL's `RewardConfig` with what tree batches and the further losses need.

    Everything TRL documents holds; `per_device_train_batch_size` counts rows, and memory is bounded
    by `micro_batch_tokens` instead. `pad_to_multiple_of` changes nothing: there is no padding.

    Parameters:
        loss_type: `bradley_terry`; `rao_kupper` or `davidson`, which give ties a probability of their
            own; or `plackett_luce`, which takes the ranking of a row of K answers with scores as a
            whole (answers with the same score in the order given) and all other rows as
            `bradley_terry`.
        soft_labels: what `p_chosen` below 1 does; see `prefopt.losses.soft_label_loss`.
        margin_weight: the column `margin` times this is by how much the better answer is asked to be
            better; 1 is TRL's, 0 leaves it unread.
        group_pairs: of K answers with scores, train on all pairs (each row weighs as much as a pair
            does, Ouyang et al. 2022, arXiv:2203.02155, eq. 1) or on best against worst.
        truncation_mode: what becomes of rows longer than `max_length`: "drop" as in TRL, since an
            answer without its end is another answer; "keep_end" cuts the prompt's beginning off.
        micro_batch_tokens: tokens that go through the model at once; None takes 512 on a CPU and
            8,192 on a GPU. The gradient does not depend on it, memory does.
        group_by_prompt: let rows with the same prompt follow each other, so that the prompt is
            computed once for all of them; otherwise rows are shuffled one by one.
        rao_kupper_nu: how likely ties are in `rao_kupper`.
        davidson_nu: how likely ties are in `davidson`.
    """

    loss_type: str = field(
        default="bradley_terry",
        metadata={"help": "The law of preferences that is fitted.", "choices": REWARD_LOSSES},
    )
    soft_labels: SoftLabels = field(
        default="expected",
        metadata={
            "help": "What p_chosen below 1 does to the loss.",
            "choices": get_args(SoftLabels),
        },
    )
    margin_weight: float = field(
        default=1.0, metadata={"help": "Weight of the column margin; 0 leaves it unread."}
    )
    group_pairs: PairChoice = field(
        default="all",
        metadata={
            "help": "Of K answers with scores, train on all pairs or on best against worst.",
            "choices": get_args(PairChoice),
        },
    )
    truncation_mode: Truncation = field(
        default="drop",
        metadata={
            "help": "What becomes of rows longer than max_length.",
            "choices": get_args(Truncation),
        },
    )
    micro_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that go through the model at once. None: 512 on CPU, 8192 on GPU."
        },
    )
    group_by_prompt: bool = field(
        default=True,
        metadata={
            "help": "Let rows with the same prompt follow each other and share its computation."
        },
    )
    rao_kupper_nu: float = field(default=3.0, metadata={"help": "Ties in rao_kupper."})
    davidson_nu: float = field(default=1.0, metadata={"help": "Ties in davidson."})

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.loss_type not in REWARD_LOSSES:
            problems.append(f"loss_type must be one of {REWARD_LOSSES}, got {self.loss_type!r}")
        for name, allowed in (("group_pairs", PairChoice), ("truncation_mode", Truncation)):
            if getattr(self, name) not in get_args(allowed):
                problems.append(
                    f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}"
                )
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            problems.append(f"micro_batch_tokens must be positive, got {self.micro_batch_tokens}")
        if self.max_length is not None and self.max_length < 2:
            problems.append(f"max_length must be at least 2, got {self.max_length}")
        if self.margin_weight < 0:
            problems.append(f"margin_weight must not be negative, got {self.margin_weight}")
        if self.center_rewards_coefficient is not None and self.center_rewards_coefficient < 0:
            problems.append(
                "center_rewards_coefficient must not be negative, got "
                f"{self.center_rewards_coefficient}"
            )
        try:
            self.loss_settings()
        except ValueError as error:
            problems += str(error).split("; ")
        if problems:
            raise ValueError("RewardConfig: " + "; ".join(problems) + ".")

    def loss_settings(self) -> RewardLossSettings:
        """The law that pairs are fitted with, and its numbers."""
        return RewardLossSettings(
            pair_model=next(
                (n for n in get_args(PairModel) if n == self.loss_type), "bradley_terry"
            ),
            rao_kupper_nu=self.rao_kupper_nu,
            davidson_nu=self.davidson_nu,
            soft_labels=self.soft_labels,
        )


def own_reward_config(args: Any, name: str) -> RewardConfig:
    """The settings of a trainer: a default for None, and TRL's own config with our fields added."""
    if args is None:
        return RewardConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-Reward")
    return with_own_fields(args, RewardConfig, trl.RewardConfig)
