"""Scores of answers -> per-token rewards and advantages, as PPO and its group-baseline kin take them.

    r_t = -beta (log pi(y_t) - log ref(y_t)) + [t is the last token] score
    A_t = sum_l (gamma lambda)^l delta_{t+l},   delta_t = r_t + gamma V_{t+1} - V_t

Pure functions of tensors; nothing here knows models, texts or devices. R is tokens, answer after
answer and without padding; A is answers; L is the longest answer's tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Of k3's exponent: exp(20) is far outside of anything a policy may do, and still a number.
_LARGEST_LOG_RATIO = 20.0
# Added to a group's standard deviation, as DeepSeekMath's authors and TRL do.
_GROUP_EPS = 1e-4


def kl_k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """log pi - log ref at sampled tokens: the unbiased estimate of KL(pi || ref), of either sign.

    The one to put into rewards: with it the policy gradient is that of E[score] - beta KL.

    Args:
        logps: (R,) under the policy that sampled.
        ref_logps: (R,) under the reference.
    """
    return logps - ref_logps


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """ref/pi - 1 - log(ref/pi): never negative and unbiased, so a good figure to look at.

    In rewards it is wrong: it punishes tokens for becoming rare, not for becoming frequent, and the
    policy leaves the reference (Tang and Munos 2025, arXiv:2506.09477).
    """
    log_ratio = (ref_logps - logps).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    return log_ratio.exp() - 1.0 - log_ratio


def token_rewards(penalties: Tensor, scores: Tensor, lengths: Tensor) -> Tensor:
    """Each token's penalty taken off, and an answer's score given at its last token.

    Args:
        penalties: (R,) what each token costs, such as beta times `kl_k1`.
        scores: (A,) of whole answers.
        lengths: (A,) tokens of each answer, at least one.

    Returns:
        (R,).
    """
    return (-penalties).index_add(0, lengths.cumsum(0) - 1, scores.to(penalties.dtype))


def generalised_advantages(
    rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    An answer ends behind its last token, where the value is 0, also if it was cut off there.

    Args:
        rewards: (A, L), nothing read behind an answer's end.
        values: (A, L) of the state before each token.
        lengths: (A,) tokens of each answer.
        gamma: discount; 1 for language models, where reward comes at the end.
        lam: 0 trusts the value, 1 the sampled return.

    Returns:
        (A, L), 0 behind an answer's end. Returns to learn values from are advantages + values.
    """
    width = rewards.shape[1]
    inside = torch.arange(width, device=rewards.device)[:, None] < lengths[None, :]  # (L, A)
    v = torch.where(inside, values.t(), 0.0)
    following = torch.cat((v[1:], torch.zeros_like(v[:1])))
    delta = torch.where(inside, rewards.t() + gamma * following - v, 0.0)
    advantages = torch.empty_like(delta)
    last = torch.zeros_like(delta[0])
    for step in range(width - 1, -1, -1):
        last = torch.add(delta[step], last, alpha=gamma * lam)
        advantages[step] = last
    return advantages.t()


def moments(values: Tensor) -> Tensor:
    """(3,) float64: how many values, their sum and the sum of their squares. Add over processes."""
    wide = values.double()
    count = torch.full((), float(values.numel()), dtype=torch.float64, device=values.device)
    return torch.stack((count, wide.sum(), wide.square().sum()))


def whiten(values: Tensor, total: Tensor | None = None, *, shift_mean: bool = True) -> Tensor:
    """Values with mean 0 and variance 1, over true tokens only: padding is never among them.

    Args:
        values: (R,).
        total: `moments` over all processes; None takes those of `values`.
        shift_mean: False keeps the mean.
    """
    count, first, second = (moments(values) if total is None else total).unbind()
    mean = first / count.clamp(min=1)
    variance = (second - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
    white = (values - mean) * (variance + 1e-8).rsqrt()
    return (white if shift_mean else white + mean).to(values.dtype)


def leave_one_out_advantages(scores: Tensor, group: Tensor) -> Tensor:
    """A score less the mean of the others in its group: RLOO (Ahmadian et al. 2024, arXiv:2402.14740).

        A_i = r_i - 1/(K-1) sum_{j != i} r_j

    Args:
        scores: (A,).
        group: (A,) number of each answer's group, from 0.

    Returns:
        (A,); 0 for an answer that is alone, which has nothing to be compared with.
    """
    count, mean = _group_means(scores, group)
    return (scores - mean[group]) * (count / (count - 1).clamp(min=1))[group]


def normalised_group_advantages(scores: Tensor, group: Tensor) -> Tensor:
    """A score less its group's mean, over its standard deviation: GRPO (Shao et al. 2024).

        A_i = (r_i - mean) / (std + 1e-4)                      arXiv:2402.03300, sec. 4.1.2

    Args:
        scores: (A,).
        group: (A,) number of each answer's group, from 0.

    Returns:
        (A,); 0 for an answer that is alone.
    """
    count, mean = _group_means(scores, group)
    off = scores - mean[group]
    variance = torch.zeros_like(mean).index_add(0, group, off.square()) / (count - 1).clamp(min=1)
    return off / (variance.sqrt() + _GROUP_EPS)[group]


def _group_means(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    n = int(group.max()) + 1 if group.numel() else 0
    count = scores.new_zeros(n).index_add(0, group, torch.ones_like(scores))
    mean = scores.new_zeros(n).index_add(0, group, scores) / count.clamp(min=1)
    return count, mean


def adapted_kl_coef(
    coef: float, kl: float, *, target: float, horizon: float, n_answers: int
) -> float:
    """The next coefficient of a KL penalty that is to hold KL at a target.

        e = clip(KL / target - 1, -0.2, 0.2),   beta <- beta (1 + e n / horizon)

    (Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2.)

    Args:
        coef: the coefficient that was used.
        kl: the KL that was seen, nats an answer.
        target: nats an answer.
        horizon: answers after which a constant error of 0.2 has changed the coefficient by a fifth.
        n_answers: answers that `kl` is the mean of.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * max(1.0 + error * n_answers / horizon, 0.0)


class OnlinePairs(NamedTuple):
    """What DPO makes of groups of scored answers: one pair a group, its best against its worst."""

    weights: Tensor  # (A,) what the gradient of an answer's log-probability is multiplied with
    losses: Tensor  # (P,) of the pairs
    margins: Tensor  # (P,) implicit reward of the better answer minus that of the worse


def online_dpo_pairs(scores: Tensor, log_ratios: Tensor, group: Tensor, beta: float) -> OnlinePairs:
    """DPO on the best and the worst answer of each group (Guo et al. 2024, arXiv:2402.04792, eq. 2).

        L = -log sigmoid(m),   m = beta (h_best - h_worst),   h = log pi - log ref
        dL/dtheta = -w (grad log pi(best) - grad log pi(worst)),   w = beta sigmoid(-m)

    So where the policy has not moved since it answered, its DPO gradient is a policy gradient whose
    advantages are +w for the best answer, -w for the worst, and 0 for the others.

    Args:
        scores: (A,); of equal scores the first answer counts.
        log_ratios: (A,) of whole answers, in nats.
        group: (A,) number of each answer's group, from 0.
        beta: the strength of the pull to the reference, above 0.

    Returns:
        Groups whose scores are all the same have no pair, and their answers the weight 0.
    """
    weights = torch.zeros_like(log_ratios)
    best, worst = [], []
    for number in range(int(group.max()) + 1 if group.numel() else 0):
        members = (group == number).nonzero()[:, 0]
        if members.numel() == 0:
            continue
        mine = scores[members]
        high, low = members[mine.argmax()], members[mine.argmin()]
        if scores[high] > scores[low]:
            best.append(high)
            worst.append(low)
    if not best:
        return OnlinePairs(weights, log_ratios.new_zeros(0), log_ratios.new_zeros(0))
    high, low = torch.stack(best), torch.stack(worst)
    margins = beta * (log_ratios[high] - log_ratios[low])
    pull = beta * torch.sigmoid(-margins)
    weights[high], weights[low] = pull, -pull
    return OnlinePairs(weights, -torch.nn.functional.logsigmoid(margins), margins)
