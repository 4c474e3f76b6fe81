"""Losses of a reward model: scores of answers in, one loss per pair out.

    P(w is preferred to l) = s(r_w - r_l)        Bradley and Terry 1952

Pure functions of tensors; the caller reduces. Nothing here knows models, tokens, texts or devices.
N is pairs; w is the chosen answer, l the rejected one, s the logistic function. Whole rankings are
`prefopt.losses.plackett_luce_loss`'s, which takes scores as well as implicit rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.losses import (
    SoftLabels,
    davidson_loss,
    davidson_tie_loss,
    rao_kupper_loss,
    rao_kupper_tie_loss,
    soft_label_loss,
    tie_aware_loss,
)

__all__ = [
    "PairModel",
    "RewardLossSettings",
    "bradley_terry_loss",
    "centering_penalty",
    "davidson_reward_loss",
    "rao_kupper_reward_loss",
    "reward_pair_loss",
]

PairModel = Literal["bradley_terry", "rao_kupper", "davidson"]
"""The law by which scores become preferences; the last two give ties a probability of their own."""


@dataclass(frozen=True)
class RewardLossSettings:
    """Which law of preferences is fitted, and its numbers.

    Args:
        pair_model: one of `PairModel`.
        rao_kupper_nu: above 1; at 3 equal answers tie half of the time.
        davidson_nu: above 0; at 1 equal answers tie half of the time.
        soft_labels: what a pair's probability p does in "bradley_terry"; see
            `prefopt.losses.soft_label_loss`. The other two read p = 0.5 as a tie.
    """

    pair_model: PairModel = "bradley_terry"
    rao_kupper_nu: float = 3.0
    davidson_nu: float = 1.0
    soft_labels: SoftLabels = "expected"

    def __post_init__(self) -> None:
        problems = []
        if self.pair_model not in get_args(PairModel):
            problems.append(
                f"pair_model must be one of {get_args(PairModel)}, got {self.pair_model!r}"
            )
        if self.rao_kupper_nu <= 1:
            problems.append(f"rao_kupper_nu must be above 1, got {self.rao_kupper_nu}")
        if self.davidson_nu <= 0:
            problems.append(f"davidson_nu must be positive, got {self.davidson_nu}")
        if self.soft_labels not in get_args(SoftLabels):
            problems.append(
                f"soft_labels must be one of {get_args(SoftLabels)}, got {self.soft_labels!r}"
            )
        if problems:
            raise ValueError("; ".join(problems))


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    p_chosen: Tensor | None = None,
    margin: Tensor | None = None,
    *,
    soft_labels: SoftLabels = "expected",
) -> Tensor:
    """-log of the probability that the chosen answer is preferred, (N,).

        -p log s(r_w - r_l - m) - (1 - p) log s(r_l - r_w - m)

    Stiennon et al. 2020, arXiv:2009.01325, with labels that hold with probability p; the margin m is
    that of Touvron et al. 2023, Llama 2, arXiv:2307.09288, eq. 2, and asks of whichever answer is the
    better one to be better by m. ln 2 at equal scores and m = 0. With m = 0 the best r_w - r_l is
    log [p / (1 - p)], so a tie, p = 1/2, pulls the scores together and the loss stays proper; a
    margin moves that point, and s(r_w - r_l) is then no longer the probability.

    Args:
        chosen: scores of the chosen answers, (N,).
        rejected: scores of the rejected answers, (N,).
        p_chosen: probability that chosen is preferred, (N,); None takes 1.
        margin: by how much the better answer is asked to be better, (N,); None takes 0.
        soft_labels: what p does, see `prefopt.losses.soft_label_loss`; "expected" is the equation.

    Raises:
        ValueError: the shapes differ, or as `soft_label_loss`.
    """
    p = torch.ones_like(chosen) if p_chosen is None else p_chosen
    m = torch.zeros_like(chosen) if margin is None else margin
    shapes = {tuple(x.shape) for x in (chosen, rejected, p, m)}
    if len(shapes) > 1:
        raise ValueError(f"scores, probabilities and margins must have one shape, got {shapes}.")
    return soft_label_loss(
        lambda better, worse: -F.logsigmoid(better - worse - m), chosen, rejected, p, soft_labels
    )


def rao_kupper_reward_loss(
    chosen: Tensor, rejected: Tensor, p_chosen: Tensor, *, nu: float
) -> Tensor:
    """Preferences with ties by a threshold, (N,): P(w wins) = s(r_w - r_l - log nu).

    Rao and Kupper 1967, doi:10.1080/01621459.1967.10482901. p = 1 is a win, p = 1/2 a tie, between
    them `prefopt.losses.tie_aware_loss` mixes the two.

    Raises:
        ValueError: nu is not above 1, or the shapes differ.
    """
    return tie_aware_loss(
        lambda a, b: rao_kupper_loss(a, b, beta=1.0, nu=nu),
        lambda a, b: rao_kupper_tie_loss(a, b, beta=1.0, nu=nu),
        chosen,
        rejected,
        p_chosen,
    )


def davidson_reward_loss(
    chosen: Tensor, rejected: Tensor, p_chosen: Tensor, *, nu: float
) -> Tensor:
    """Preferences with ties by their geometric mean, (N,): P(tie) = 2 nu sqrt[P(w wins) P(l wins)].

    Davidson 1970, doi:10.1080/01621459.1970.10481082. p as in `rao_kupper_reward_loss`.

    Raises:
        ValueError: nu is not positive, or the shapes differ.
    """
    return tie_aware_loss(
        lambda a, b: davidson_loss(a, b, beta=1.0, nu=nu),
        lambda a, b: davidson_tie_loss(a, b, beta=1.0, nu=nu),
        chosen,
        rejected,
        p_chosen,
    )


def reward_pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    p_chosen: Tensor,
    margin: Tensor | None,
    settings: RewardLossSettings,
) -> Tensor:
    """The loss of each pair under the settings' law, (N,).

    Raises:
        ValueError: the shapes differ, or a law with ties is given a margin, which it has no place
            for.
    """
    if settings.pair_model == "bradley_terry":
        return bradley_terry_loss(
            chosen, rejected, p_chosen, margin, soft_labels=settings.soft_labels
        )
    if margin is not None and bool((margin != 0).any()):
        raise ValueError(f"{settings.pair_model} takes no margins; use bradley_terry.")
    if settings.pair_model == "rao_kupper":
        return rao_kupper_reward_loss(chosen, rejected, p_chosen, nu=settings.rao_kupper_nu)
    return davidson_reward_loss(chosen, rejected, p_chosen, nu=settings.davidson_nu)


def centering_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_w + r_l)^2, (N,): pulls the mean of a pair's scores to 0 and leaves its difference alone.

    Preferences say nothing about the level of scores. Eisenstein et al. 2023, arXiv:2312.09244,
    eq. 2, with weight 0.01.

    Raises:
        ValueError: the shapes differ.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(f"shapes must agree, got {tuple(chosen.shape)}, {tuple(rejected.shape)}.")
    return torch.square(chosen + rejected)
