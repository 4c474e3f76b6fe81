"""The losses of PPO: log-probabilities, values and advantages in, one loss a token out.

    L_policy = max(-A rho, -A clip(rho, 1 - e, 1 + e)),   rho = pi / pi_old
    L_value  = max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2) / 2

(Schulman et al. 2017, arXiv:1707.06347, eq. 7; the clipped value loss is OpenAI's baselines'.) Pure
functions of tensors; the caller takes the mean over the tokens of the whole step. R is tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# exp(20) is far beyond any clip range and still a float32 whose product with an advantage is finite.
_LARGEST_LOG_RATIO = 20.0


class PolicyLosses(NamedTuple):
    """Only `losses` carries a gradient."""

    losses: Tensor  # (R,)
    ratio: Tensor  # (R,) pi / pi_old
    clipped: Tensor  # (R,) bool: the token contributes no gradient any more
    approx_kl: Tensor  # (R,) k3's estimate of KL(pi_old || pi), never negative


def clipped_policy_losses(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip: float
) -> PolicyLosses:
    """PPO's clipped surrogate, negated.

    Args:
        logps: (R,) under the policy as it is now.
        old_logps: (R,) under the policy that sampled, computed by the same forward pass.
        advantages: (R,), without gradient.
        clip: e, how far the ratio may move before a token stops to count.
    """
    log_ratio = (logps - old_logps).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip, 1.0 + clip)
    with torch.no_grad():
        # k3 with samples of the old policy: pi/pi_old - 1 - log(pi/pi_old).
        approx_kl = ratio - 1.0 - log_ratio
    return PolicyLosses(
        torch.maximum(plain, bounded), ratio.detach(), (bounded > plain).detach(), approx_kl
    )


class ValueLosses(NamedTuple):
    """Only `losses` carries a gradient."""

    losses: Tensor  # (R,)
    clipped: Tensor  # (R,) bool


def clipped_value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None
) -> ValueLosses:
    """Half the squared error of values, which a step may not move far at a time.

    Args:
        values: (R,) as they are now.
        old_values: (R,) when the answers were sampled.
        returns: (R,) what to learn: advantages + old values.
        clip: e; None clips nothing.
    """
    plain = (values - returns).square()
    if clip is None:
        return ValueLosses(0.5 * plain, torch.zeros_like(plain, dtype=torch.bool))
    near = torch.clamp(values, old_values - clip, old_values + clip)
    bounded = (near - returns).square()
    return ValueLosses(0.5 * torch.maximum(plain, bounded), (bounded > plain).detach())
