"""Preference losses: log-probabilities of answers in, one loss per pair (or per group) out.

    r(x, y) = beta log [pi(y|x) / pi_ref(y|x)]        the implicit reward of an answer

Pure functions of tensors; the caller reduces. Nothing here knows models, tokens, texts or devices.
Log-probabilities are in nats and summed over the answer's tokens unless a name says `mean`. Every
pairwise loss reads one number for each side of a pair (its log-ratio, a divergence score, a mean
log-probability), so swapping the sides, soft labels and ties are written once for all of them; so
they share a file, long as their equations and sources make it.

N is pairs, G groups, K answers of a group, A answers. In equations w is the chosen answer, l the
rejected one, h = log-ratio of w minus log-ratio of l, s is the logistic function.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "LOSS_NAMES",
    "PAIR_LOSSES",
    "FDivergence",
    "LossSettings",
    "PairBatch",
    "PairLoss",
    "SoftLabels",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_pair_loss",
    "cdpo_loss",
    "check_losses",
    "davidson_loss",
    "davidson_tie_loss",
    "discopop_loss",
    "dpop_loss",
    "exo_pair_loss",
    "f_divergence_scores",
    "gdpo_loss",
    "hinge_loss",
    "infonca_loss",
    "ipo_loss",
    "nca_loss",
    "nca_pair_loss",
    "nll_loss",
    "odds_ratio_loss",
    "orpo_loss",
    "pair_losses",
    "plackett_luce_loss",
    "rao_kupper_loss",
    "rao_kupper_tie_loss",
    "rdpo_loss",
    "robust_loss",
    "sft_loss",
    "sigmoid_loss",
    "sigmoid_norm_loss",
    "simpo_loss",
    "soft_label_loss",
    "sppo_hard_loss",
    "tie_aware_loss",
    "wpo_weights",
]

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
"""The regulariser between policy and reference; reverse KL is ordinary DPO."""

SoftLabels = Literal["expected", "geometric", "robust", "ignore"]
"""What a pair's probability p does to its loss; see `soft_label_loss`."""


class PairBatch(NamedTuple):
    """Everything a pairwise loss may read about N preference pairs."""

    chosen_logps: Tensor  # (N,) log pi(chosen | x), summed over answer tokens
    rejected_logps: Tensor  # (N,)
    ref_chosen_logps: Tensor  # (N,) under the reference; read only if the loss needs a reference
    ref_rejected_logps: Tensor  # (N,)
    chosen_lengths: Tensor  # (N,) answer tokens
    rejected_lengths: Tensor  # (N,)
    p_chosen: Tensor  # (N,) in [0, 1]: probability that chosen is preferred; 1 certain, .5 a tie
    chosen_nll: Tensor  # (N,) -log pi(chosen | x) over all its tokens, also where LD-DPO is on
    mean_chosen_length: float | Tensor  # scalar: chosen tokens a pair, over the optimiser batch

    @property
    def chosen_logratios(self) -> Tensor:
        """log [pi / pi_ref] of the chosen answers, (N,)."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """log [pi / pi_ref] of the rejected answers, (N,)."""
        return self.rejected_logps - self.ref_rejected_logps

    def swapped(self) -> PairBatch:
        """The same pairs with the sides exchanged and p -> 1 - p.

        The negative log-likelihood of what is now chosen is not known here, so it and the mean
        length become NaN: no imitation loss can be read off a swapped batch by accident.
        """
        return PairBatch(
            chosen_logps=self.rejected_logps,
            rejected_logps=self.chosen_logps,
            ref_chosen_logps=self.ref_rejected_logps,
            ref_rejected_logps=self.ref_chosen_logps,
            chosen_lengths=self.rejected_lengths,
            rejected_lengths=self.chosen_lengths,
            p_chosen=1 - self.p_chosen,
            chosen_nll=torch.full_like(self.chosen_nll, math.nan),
            mean_chosen_length=math.nan,
        )


@dataclass(frozen=True)
class LossSettings:
    """The numbers of all losses; each loss reads the few its docstring names.

    Args:
        beta: strength of the pull to the reference (tau in IPO and, inverted, eta in SPPO; the
            reward scale in SimPO, whose authors use 2 to 10, and in `sigmoid_norm`, about 5).
        label_smoothing: assumed rate of flipped labels in `cdpo`, `robust`, `aot`,
            `aot_unpaired`; the smoothing of `exo_pair`, where 0.001 is usual. Others ignore it.
        f_divergence: regulariser of the losses that support one.
        f_alpha: order of "alpha_divergence"; 1 is reverse KL.
        discopop_tau: temperature of the DiscoPOP blend.
        simpo_gamma: target margin of SimPO, in units of the reward. SimPO's own code asks for
            gamma / beta instead, 0.3 to 0.5 being usual: 1.0 here is its 0.5 at beta = 2.
        orpo_lambda: weight of ORPO's odds-ratio term beside the likelihood term.
        dpop_lambda: DPO-Positive's price of a nat that the chosen answer lost; 50 in the paper.
        rdpo_alpha: R-DPO's reward per token of length, in units of the reward.
        rao_kupper_nu: tie parameter, above 1. At 3 equal answers tie half of the time.
        davidson_nu: tie parameter, above 0. At 1 equal answers tie half of the time.
        soft_labels: what the pairs' probabilities p do. All modes agree where p is 1.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence: FDivergence = "reverse_kl"
    f_alpha: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    orpo_lambda: float = 0.1
    dpop_lambda: float = 50.0
    rdpo_alpha: float = 0.01
    rao_kupper_nu: float = 3.0
    davidson_nu: float = 1.0
    soft_labels: SoftLabels = "expected"


def _require(*rules: tuple[bool, str]) -> None:
    """Raise one ValueError with the text of every rule that does not hold."""
    problems = [text for holds, text in rules if not holds]
    if problems:
        raise ValueError("; ".join(problems))


def _positive(name: str, value: float) -> tuple[bool, str]:
    return value > 0, f"{name} must be positive, got {value}"


def _same_shape(**tensors: Tensor) -> tuple[bool, str]:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return len(set(shapes.values())) <= 1, f"shapes must agree, got {shapes}"


def _margins(chosen: Tensor, rejected: Tensor, beta: float, *rules: tuple[bool, str]) -> Tensor:
    """beta h, if the arguments make sense."""
    _require(_positive("beta", beta), *rules, _same_shape(chosen=chosen, rejected=rejected))
    return beta * (chosen - rejected)


def _rewards(chosen: Tensor, rejected: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """r(w) and r(l), if the arguments make sense."""
    _require(_positive("beta", beta), _same_shape(chosen=chosen, rejected=rejected))
    return beta * chosen, beta * rejected


def _share(name: str, value: float) -> tuple[bool, str]:
    return 0 <= value <= 1, f"{name} must be in [0, 1], got {value}"


# --- Scores: what replaces the log-ratio under another divergence -------------------------------


def f_divergence_scores(
    logratios: Tensor, divergence: FDivergence = "reverse_kl", alpha: float = 0.5
) -> Tensor:
    """f'(pi / pi_ref) without constants that cancel in a margin: the reward over beta.

        reverse KL  log t        forward KL  1 - 1/t        JS  log [2 t / (1 + t)]
        alpha       (t^(alpha - 1) - 1) / (alpha - 1)

    Wang et al. 2023, f-DPO, arXiv:2309.16240. With reverse KL the log-ratios themselves. Exponents
    are cut at 80, so that a vanishing ratio gives a large score, not infinity; where there are
    exponents, half precision is widened to float32.

    Args:
        logratios: log [pi / pi_ref], any shape.
        divergence: one of `FDivergence`.
        alpha: order of the alpha divergence; its limit at 1 is reverse KL.

    Returns:
        The shape of `logratios`.

    Raises:
        ValueError: no such divergence.
    """
    if divergence == "reverse_kl":
        return logratios
    if divergence == "forward_kl":
        return -_expm1_cut(-logratios)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if divergence == "alpha_divergence":
        if abs(alpha - 1) < 1e-6:
            return logratios
        return _expm1_cut((alpha - 1) * logratios) / (alpha - 1)
    raise ValueError(f"f_divergence must be one of {get_args(FDivergence)}, got {divergence!r}")


def _expm1_cut(exponents: Tensor) -> Tensor:
    wide = exponents.float() if exponents.dtype.itemsize < 4 else exponents
    return torch.expm1(wide.clamp(max=80.0))


# --- Losses of a margin -------------------------------------------------------------------------


def sigmoid_loss(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float) -> Tensor:
    """Direct preference optimization, (N,).

        -log s(beta h)

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7. ln 2 while policy and reference agree.

    Args:
        chosen_scores: log-ratios, or `f_divergence_scores` of them, (N,).
        rejected_scores: the same of the rejected answers, (N,).
        beta: strength of the pull to the reference.

    Raises:
        ValueError: beta is not positive, or the shapes differ.
    """
    return -F.logsigmoid(_margins(chosen_scores, rejected_scores, beta))


def cdpo_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """Conservative DPO: DPO on labels that are flipped with a known probability e, (N,).

        -(1 - e) log s(beta h) - e log s(-beta h)

    Mitchell 2023, "A note on DPO with noisy preferences", eq. 3. Smallest at beta h = log [(1-e)/e],
    so the margin stops growing. e = 0 is `sigmoid_loss`.

    Raises:
        ValueError: label_smoothing is outside [0, 1], or as `sigmoid_loss`.
    """
    rule = _share("label_smoothing", label_smoothing)
    return _smoothed(_margins(chosen_scores, rejected_scores, beta, rule), label_smoothing)


def _smoothed(margins: Tensor, label_smoothing: float) -> Tensor:
    forward, backward = F.logsigmoid(margins), F.logsigmoid(-margins)
    return -(1 - label_smoothing) * forward - label_smoothing * backward


def robust_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """Robust DPO: an unbiased estimate of DPO's clean loss from noisy labels, (N,).

        [-(1 - e) log s(beta h) + e log s(-beta h)] / (1 - 2 e)

    Chowdhury et al. 2024, arXiv:2403.00409. Its mean over labels flipped at rate e is the loss of
    the true labels. Not bounded below for single pairs. e = 0 is `sigmoid_loss`.

    Raises:
        ValueError: label_smoothing is outside [0, 0.5), or as `sigmoid_loss`.
    """
    problem = f"label_smoothing of robust must be in [0, 0.5), got {label_smoothing}"
    rule = (0 <= label_smoothing < 0.5, problem)
    margins = _margins(chosen_scores, rejected_scores, beta, rule)
    clean = -(1 - label_smoothing) * F.logsigmoid(margins)
    flipped = -label_smoothing * F.logsigmoid(-margins)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def gdpo_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, p_chosen: Tensor, *, beta: float
) -> Tensor:
    """DPO between the geometric averages of both answers' likelihoods, (N,).

        -log s(beta (2 p - 1) h)

    Furuta et al. 2024, GDPO, arXiv:2409.06691. The gradient vanishes at p = 1/2, where `cdpo_loss`
    instead pulls the margin to zero. p = 1 is `sigmoid_loss`.
    """
    return soft_label_loss(
        lambda chosen, rejected: sigmoid_loss(chosen, rejected, beta=beta),
        chosen_scores,
        rejected_scores,
        p_chosen,
        "geometric",
    )


def hinge_loss(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float) -> Tensor:
    """The hinge on the margin, (N,).

        max(0, 1 - beta h)

    Zhao et al. 2023, SLiC-HF, arXiv:2305.10425, with the reference inside the margin as in Liu et
    al. 2023, RSO, arXiv:2309.06657. 1 while policy and reference agree.
    """
    return torch.relu(1 - _margins(chosen_scores, rejected_scores, beta))


def ipo_loss(chosen_mean_scores: Tensor, rejected_mean_scores: Tensor, *, beta: float) -> Tensor:
    """Identity preference optimization: the margin is regressed on 1 / (2 beta), (N,).

        (h - 1 / (2 beta))^2

    Azar et al. 2023, arXiv:2310.12036, eq. 17, its tau written beta. Scores are means over each
    answer's tokens, as its authors trained it, so that beta does not depend on length.
    """
    margins = _margins(chosen_mean_scores, rejected_mean_scores, 1.0, _positive("beta", beta))
    return torch.square(margins - 1 / (2 * beta))


def sigmoid_norm_loss(
    chosen_mean_scores: Tensor, rejected_mean_scores: Tensor, *, beta: float
) -> Tensor:
    """DPO on means over tokens instead of sums, (N,).

        -log s(beta [log-ratio(w) / |w| - log-ratio(l) / |l|])

    Length-normalised DPO as in Lambert et al. 2024, Tulu 3, arXiv:2411.15124, with beta about 5.
    """
    return sigmoid_loss(chosen_mean_scores, rejected_mean_scores, beta=beta)


def exo_pair_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """Reverse KL from the smoothed label to the policy's preference, (N,).

        q log [q / (1 - e)] + (1 - q) log [(1 - q) / e],    q = s(beta h)

    Ji et al. 2024, EXO, arXiv:2402.00856, eq. 16. Zero where q is 1 - e. Infinite at e = 0.

    Raises:
        ValueError: label_smoothing is outside (0, 1), or as `sigmoid_loss`.
    """
    problem = f"label_smoothing of exo_pair must be in (0, 1), as 0.001, got {label_smoothing}"
    rule = (0 < label_smoothing < 1, problem)
    margins = _margins(chosen_scores, rejected_scores, beta, rule)
    chosen_term = F.logsigmoid(margins) - math.log1p(-label_smoothing)
    rejected_term = F.logsigmoid(-margins) - math.log(label_smoothing)
    return torch.sigmoid(margins) * chosen_term + torch.sigmoid(-margins) * rejected_term


def discopop_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, tau: float
) -> Tensor:
    """The log-ratio modulated blend of the logistic and the exponential loss, (N,).

        (1 - m) (-log s(d)) + m exp(-d),    d = beta h,  m = s(d / tau)

    Lu et al. 2024, DiscoPOP, arXiv:2406.08414, eq. 5. (ln 2 + 1) / 2 at a margin of zero. The second
    term is taken as exp(log m - d), which stays finite where exp(-d) alone overflows (tau <= 1).

    Raises:
        ValueError: tau is not positive, or as `sigmoid_loss`.
    """
    margins = _margins(chosen_scores, rejected_scores, beta, _positive("discopop_tau", tau))
    logistic = torch.sigmoid(-margins / tau) * -F.logsigmoid(margins)
    exponential = torch.exp(F.logsigmoid(margins / tau) - margins)
    return logistic + exponential


def simpo_loss(
    chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, beta: float, gamma: float
) -> Tensor:
    """Simple preference optimization: no reference, mean log-probabilities, a target margin, (N,).

        -log s(beta log pi(w) / |w| - beta log pi(l) / |l| - gamma)

    Meng et al. 2024, arXiv:2405.14734, eq. 6. beta is 2 to 10 there and gamma 0.3 to 0.5 times it.
    """
    return -F.logsigmoid(_margins(chosen_mean_logps, rejected_mean_logps, beta) - gamma)


def odds_ratio_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor) -> Tensor:
    """ORPO's preference term, (N,).

        -log s(log [odds(w) / odds(l)]),    odds = P / (1 - P),    log P = mean log-probability

    Hong et al. 2024, arXiv:2403.07691, eq. 7.
    """
    _require(
        _same_shape(chosen_mean_logps=chosen_mean_logps, rejected_mean_logps=rejected_mean_logps)
    )
    return -F.logsigmoid(_log_odds(chosen_mean_logps) - _log_odds(rejected_mean_logps))


def _log_odds(logps: Tensor) -> Tensor:
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)  # P = 1 has no odds
    return logps - torch.log(-torch.expm1(logps))


def orpo_loss(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    chosen_mean_nll: Tensor,
    *,
    orpo_lambda: float,
) -> Tensor:
    """Odds ratio preference optimization: likelihood of the chosen and its odds, (N,).

        -log pi(w) / |w| + lambda odds_ratio_loss

    Hong et al. 2024, arXiv:2403.07691, eq. 6; lambda is 0.1 in its recipes. No reference.
    """
    _require(_same_shape(chosen_mean_logps=chosen_mean_logps, chosen_mean_nll=chosen_mean_nll))
    return chosen_mean_nll + orpo_lambda * odds_ratio_loss(chosen_mean_logps, rejected_mean_logps)


def dpop_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, dpop_lambda: float
) -> Tensor:
    """DPO-Positive: DPO that pays when the chosen answer loses likelihood, (N,).

        -log s(beta [h - lambda max(0, log pi_ref(w) - log pi(w))])

    Pal et al. 2024, Smaug, arXiv:2402.13228; lambda is 50 and beta 0.3 there. lambda = 0 is DPO.

    Raises:
        ValueError: dpop_lambda is negative, or as `sigmoid_loss`.
    """
    rule = (dpop_lambda >= 0, f"dpop_lambda must not be negative, got {dpop_lambda}")
    margins = _margins(chosen_logratios, rejected_logratios, beta, rule)
    return -F.logsigmoid(margins - beta * dpop_lambda * torch.relu(-chosen_logratios))


def rdpo_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    alpha: float,
) -> Tensor:
    """Length-regularised DPO: a longer chosen answer is partly explained by its length, (N,).

        -log s(beta h + alpha (|w| - |l|))

    Park et al. 2024, R-DPO, arXiv:2403.19159. It follows from maximising r(x, y) - alpha |y|.
    alpha = 0 is DPO.
    """
    chosen = _length_rewards(chosen_scores, chosen_lengths, beta, alpha)
    rejected = _length_rewards(rejected_scores, rejected_lengths, beta, alpha)
    return sigmoid_loss(chosen, rejected, beta=1.0)


def _length_rewards(scores: Tensor, lengths: Tensor, beta: float, alpha: float) -> Tensor:
    _require(_positive("beta", beta), _same_shape(scores=scores, lengths=lengths))
    return beta * scores + alpha * lengths.to(scores.dtype)


# --- Losses of each side on its own -------------------------------------------------------------


def nca_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Noise contrastive alignment of a pair, (N,).

        -log s(r(w)) - 1/2 log s(-r(w)) - 1/2 log s(-r(l))

    Chen et al. 2024, arXiv:2402.05369. `nca_loss` with K = 2 and all weight on the chosen answer;
    2 ln 2 while policy and reference agree.
    """
    chosen, rejected = _rewards(chosen_logratios, rejected_logratios, beta)
    noise = 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))
    return -F.logsigmoid(chosen) - noise


def bco_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Binary classifier optimization on the two sides of a pair, without reward shift, (N,).

        -log s(r(w)) - log s(-r(l))

    Jung et al. 2024, arXiv:2404.04656. 2 ln 2 while policy and reference agree.
    """
    chosen, rejected = _rewards(chosen_logratios, rejected_logratios, beta)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Self-play preference optimization with hard labels, (N,).

        [(r(w) - 1/2)^2 + (r(l) + 1/2)^2] / beta^2

    Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with P = 1 for the winner; beta is 1 / eta. Soft labels
    in the "expected" mode give the gradient of its soft form.
    """
    chosen, rejected = _rewards(chosen_logratios, rejected_logratios, beta)
    return (torch.square(chosen - 0.5) + torch.square(rejected + 0.5)) / beta**2


def apo_zero_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Anchored preference optimization: up with the chosen, down with the rejected, (N,).

        1 - s(r(w)) + s(r(l))

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7: for pairs whose chosen answer is better than
    what the model writes.
    """
    chosen, rejected = _rewards(chosen_logratios, rejected_logratios, beta)
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Anchored preference optimization: down with both, with the rejected more, (N,).

        s(r(w)) + 1 - s(r(w) - r(l))

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8: for pairs whose chosen answer is worse than
    what the model writes.
    """
    chosen, rejected = _rewards(chosen_logratios, rejected_logratios, beta)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


# --- Losses of sorted batches -------------------------------------------------------------------


def aot_loss(
    policy_margins: Tensor, ref_margins: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Alignment via optimal transport on paired data: margins dominate the reference's, (N,).

        smoothed -log s(beta [sort(policy margins)_i - sort(reference margins)_i])

    Melnyk et al. 2024, arXiv:2406.05882. Entry i belongs to quantile i, not to pair i.

    Args:
        policy_margins: log pi(w) - log pi(l), (N,).
        ref_margins: the same under the reference, (N,).
        beta: strength of the pull to the reference.
        label_smoothing: as e in `cdpo_loss`.
    """
    rule = _share("label_smoothing", label_smoothing)
    policy, reference = policy_margins.sort(dim=0).values, ref_margins.sort(dim=0).values
    return _smoothed(_margins(policy, reference, beta, rule), label_smoothing)


def aot_unpaired_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Alignment via optimal transport: chosen log-ratios dominate the rejected, (N,).

        smoothed -log s(beta [sort(log-ratios of w)_i - sort(log-ratios of l)_i])

    Melnyk et al. 2024, arXiv:2406.05882. Who was compared with whom does not matter.
    """
    return aot_loss(
        chosen_logratios, rejected_logratios, beta=beta, label_smoothing=label_smoothing
    )


# --- Imitation of the chosen answer -------------------------------------------------------------


def sft_loss(chosen_nll: Tensor, mean_chosen_length: float | Tensor) -> Tensor:
    """Each pair's share of the token mean of -log pi(chosen), (N,).

        -log pi(w) / mean |w|

    The mean of the N values is the mean over all their tokens if `mean_chosen_length` is that of
    the same pairs; taken over the optimiser batch, it is exact for any split into micro-batches.
    """
    return chosen_nll / mean_chosen_length


def nll_loss(chosen_nll: Tensor, chosen_lengths: Tensor) -> Tensor:
    """The mean over an answer's tokens of -log pi(chosen), (N,).

        -log pi(w) / |w|

    The likelihood term of Pang et al. 2024, iterative reasoning preference optimization,
    arXiv:2404.19733 (weight 1 there). Each pair counts alike, where in `sft_loss` each token does.
    """
    _require(_same_shape(chosen_nll=chosen_nll, chosen_lengths=chosen_lengths))
    return _per_token(chosen_nll, chosen_lengths)


def _per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    return sums / lengths.clamp(min=1)


# --- Ties ---------------------------------------------------------------------------------------


def rao_kupper_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, nu: float
) -> Tensor:
    """-log of the probability that w beats l where ties are possible, (N,).

        -log s(beta h - log nu)

    Chen et al. 2024, DPO-RK, arXiv:2409.17431, after Rao and Kupper 1967. With P(l wins) =
    s(-beta h - log nu) and `rao_kupper_tie_loss` the three probabilities sum to 1.

    Raises:
        ValueError: nu is not above 1, or as `sigmoid_loss`.
    """
    rule = (nu > 1, f"rao_kupper_nu must be above 1, got {nu}")
    return -F.logsigmoid(_margins(chosen_scores, rejected_scores, beta, rule) - math.log(nu))


def rao_kupper_tie_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, nu: float
) -> Tensor:
    """-log of the probability that w and l tie, (N,); pulls the margin to zero.

    -log [(nu^2 - 1) s(beta h - log nu) s(-beta h - log nu)]

    Chen et al. 2024, DPO-RK, arXiv:2409.17431, after Rao and Kupper 1967.
    """
    wins = rao_kupper_loss(chosen_scores, rejected_scores, beta=beta, nu=nu)
    losses = rao_kupper_loss(rejected_scores, chosen_scores, beta=beta, nu=nu)
    return wins + losses - math.log(nu**2 - 1)


def davidson_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, nu: float
) -> Tensor:
    """-log of the probability that w beats l where ties are possible, (N,).

        log [1 + exp(-d) + 2 nu exp(-d / 2)],    d = beta h

    Chen et al. 2024, DPO-D, arXiv:2409.17431, after Davidson 1970. Ties stay likely between good
    answers of different quality for longer than under Rao and Kupper.

    Raises:
        ValueError: nu is not positive, or as `sigmoid_loss`.
    """
    d = _margins(chosen_scores, rejected_scores, beta, _positive("davidson_nu", nu))
    return torch.logsumexp(torch.stack((torch.zeros_like(d), -d, math.log(2 * nu) - d / 2)), dim=0)


def davidson_tie_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, nu: float
) -> Tensor:
    """-log of the probability that w and l tie, (N,); pulls the margin to zero.

        davidson_loss - log(2 nu) + beta h / 2

    Chen et al. 2024, DPO-D, arXiv:2409.17431, after Davidson 1970.
    """
    wins = davidson_loss(chosen_scores, rejected_scores, beta=beta, nu=nu)
    return wins - math.log(2 * nu) + _margins(chosen_scores, rejected_scores, beta) / 2


# --- Soft labels --------------------------------------------------------------------------------

_SidesLoss = Callable[[Tensor, Tensor], Tensor]


def _probabilities(p_chosen: Tensor, like: Tensor) -> Tensor:
    """p in the dtype of the scores; NaN, and so a NaN loss, where it is no probability."""
    p = p_chosen.to(like.dtype)
    return torch.where((p >= 0) & (p <= 1), p, math.nan)


def soft_label_loss(
    loss: _SidesLoss, chosen: Tensor, rejected: Tensor, p_chosen: Tensor, mode: SoftLabels
) -> Tensor:
    """A pairwise loss under labels that hold with probability p, (N,).

        expected    p L(w, l) + (1 - p) L(l, w)
        geometric   L(p w + (1 - p) l, p l + (1 - p) w), that is, the margin times 2 p - 1
        robust      [p L(w, l) - (1 - p) L(l, w)] / (2 p - 1)
        ignore      L(w, l)

    "expected" is the loss on average over the label: of DPO it is conservative DPO pair by pair, and
    p = 1/2 pulls the margin to zero. "geometric" (Furuta et al. 2024, arXiv:2409.06691) averages the
    answers' log-ratios, so p = 1/2 teaches nothing. "robust" (Chowdhury et al. 2024,
    arXiv:2403.00409) treats the label as drawn, and flipped with probability 1 - p; its mean over
    such draws is the loss of the true label. Where p = 1 all are L(w, l), bit for bit. A p outside
    [0, 1] gives NaN.

    Args:
        loss: maps the two sides, (N,) each, to (N,); must treat pairs independently.
        chosen: the score of each chosen answer, (N,).
        rejected: the score of each rejected answer, (N,).
        p_chosen: probability that the chosen answer is the better one, (N,).
        mode: one of `SoftLabels`.

    Raises:
        ValueError: mode is unknown; or it is "robust" and some p is not above 1/2.
    """
    if mode == "ignore":
        return loss(chosen, rejected)
    _require(_same_shape(chosen=chosen, rejected=rejected, p_chosen=p_chosen))
    p = _probabilities(p_chosen, chosen)
    if mode == "geometric":
        return loss(p * chosen + (1 - p) * rejected, p * rejected + (1 - p) * chosen)
    # Certain rows get their own loss with weight 0, which is finite whenever the loss itself is.
    certain = p == 1
    backward = loss(torch.where(certain, chosen, rejected), torch.where(certain, rejected, chosen))
    if mode == "expected":
        return p * loss(chosen, rejected) + (1 - p) * backward
    if mode == "robust":
        if bool((p <= 0.5).any()):
            rows = (p <= 0.5).nonzero().flatten().tolist()
            raise ValueError(
                f'soft_labels="robust" needs p above 0.5, but rows {rows[:10]} have '
                f"{p[rows[:10]].tolist()}; leave ties out, swap the sides, or use another mode"
            )
        return (p * loss(chosen, rejected) - (1 - p) * backward) / (2 * p - 1)
    raise ValueError(f"soft_labels must be one of {get_args(SoftLabels)}, got {mode!r}")


def tie_aware_loss(
    win: _SidesLoss, tie: _SidesLoss, chosen: Tensor, rejected: Tensor, p_chosen: Tensor
) -> Tensor:
    """A loss with a likelihood for ties, under labels that hold with probability p, (N,).

        max(0, 2p - 1) L(w wins) + (1 - |2p - 1|) L(tie) + max(0, 1 - 2p) L(l wins)

    p = 1 is a win and p = 1/2 a tie, as in Chen et al. 2024, arXiv:2409.17431. Between them the
    weights are those of the mixture of a win and a tie whose expected score, a tie counting half,
    is p. A p outside [0, 1] gives NaN.
    """
    _require(_same_shape(chosen=chosen, rejected=rejected, p_chosen=p_chosen))
    lead = 2 * _probabilities(p_chosen, chosen) - 1
    sure = lead == 1  # as in `soft_label_loss`
    lost = win(torch.where(sure, chosen, rejected), torch.where(sure, rejected, chosen))
    decided = torch.relu(lead) * win(chosen, rejected) + torch.relu(-lead) * lost
    return decided + (1 - lead.abs()) * tie(chosen, rejected)


# --- The registry -------------------------------------------------------------------------------

Sides = tuple[Tensor, Tensor]
_PER_PAIR = ("logps", "lengths", "p_chosen", "nll")  # ends of the names of the (N,) fields


@dataclass(frozen=True)
class PairLoss:
    """A named pairwise loss and the facts a trainer needs; call it on a batch for (N,) losses.

    It is a function of one number a side, plus perhaps an imitation term that no soft label touches.

    Args:
        name: what users write.
        sides: reads both sides' numbers off a batch, (N,) each; None for pure imitation.
        of_sides: the loss of the two sides, (N,).
        of_tie: the loss of the two sides if they tie; such a loss reads p in its own way.
        imitation: a term on the chosen answer alone, (N,).
        needs_reference: whether it reads the reference's log-probabilities.
        supports_divergence: whether it may be combined with a divergence other than reverse KL.
        sorts_batch: whether entry i is not pair i: needs the whole batch at once, hard labels, and
            no weights per pair.
        soft_labels: its own mode whatever the settings say; "ignore" in the settings still wins.
    """

    name: str
    sides: Callable[[PairBatch, LossSettings], Sides] | None
    of_sides: Callable[[Tensor, Tensor, LossSettings], Tensor] | None = None
    of_tie: Callable[[Tensor, Tensor, LossSettings], Tensor] | None = None
    imitation: Callable[[PairBatch], Tensor] | None = None
    needs_reference: bool = True
    supports_divergence: bool = False
    sorts_batch: bool = False
    soft_labels: SoftLabels | None = None

    def __call__(self, batch: PairBatch, settings: LossSettings) -> Tensor:
        """The loss of each pair, (N,).

        Raises:
            ValueError: a setting the loss reads is out of range or not supported, its labels are,
                or the batch's fields have different shapes.
        """
        if settings.f_divergence != "reverse_kl" and not self.supports_divergence:
            raise ValueError(
                f"{self.name} has no form under {settings.f_divergence}; only reverse_kl"
            )
        _require(_same_shape(**{k: v for k, v in batch._asdict().items() if k.endswith(_PER_PAIR)}))
        terms = []
        if self.sides is not None:
            terms.append(self._preference(batch, settings, *self.sides(batch, settings)))
        if self.imitation is not None:
            terms.append(self.imitation(batch))
        return sum(terms[1:], start=terms[0])

    def _preference(
        self, batch: PairBatch, settings: LossSettings, chosen: Tensor, rejected: Tensor
    ) -> Tensor:
        assert self.of_sides is not None
        of_sides, of_tie = self.of_sides, self.of_tie

        def win(a: Tensor, b: Tensor) -> Tensor:
            return of_sides(a, b, settings)

        if settings.soft_labels == "ignore":
            return win(chosen, rejected)
        if self.sorts_batch:
            if bool((batch.p_chosen != 1).any()):
                raise ValueError(
                    f"{self.name} sorts the batch, so a pair's own probability has no place in it: "
                    'every p_chosen must be 1, or soft_labels "ignore"'
                )
            return win(chosen, rejected)
        if of_tie is not None:
            return tie_aware_loss(
                win, lambda a, b: of_tie(a, b, settings), chosen, rejected, batch.p_chosen
            )
        mode = self.soft_labels or settings.soft_labels
        return soft_label_loss(win, chosen, rejected, batch.p_chosen, mode)


def _scores(batch: PairBatch, settings: LossSettings) -> Sides:
    kind, alpha = settings.f_divergence, settings.f_alpha
    return (
        f_divergence_scores(batch.chosen_logratios, kind, alpha),
        f_divergence_scores(batch.rejected_logratios, kind, alpha),
    )


def _mean_scores(batch: PairBatch, settings: LossSettings) -> Sides:
    chosen, rejected = _scores(batch, settings)
    return (
        _per_token(chosen, batch.chosen_lengths),
        _per_token(rejected, batch.rejected_lengths),
    )


def _mean_logps(batch: PairBatch, settings: LossSettings) -> Sides:
    return (
        _per_token(batch.chosen_logps, batch.chosen_lengths),
        _per_token(batch.rejected_logps, batch.rejected_lengths),
    )


def _rewards_with_length(batch: PairBatch, settings: LossSettings) -> Sides:
    beta, alpha = settings.beta, settings.rdpo_alpha
    chosen, rejected = _scores(batch, settings)
    return (
        _length_rewards(chosen, batch.chosen_lengths, beta, alpha),
        _length_rewards(rejected, batch.rejected_lengths, beta, alpha),
    )


def _margins_of_both_models(batch: PairBatch, settings: LossSettings) -> Sides:
    return (
        batch.chosen_logps - batch.rejected_logps,
        batch.ref_chosen_logps - batch.ref_rejected_logps,
    )


def _mean_nll(batch: PairBatch) -> Tensor:
    return nll_loss(batch.chosen_nll, batch.chosen_lengths)


# fmt: off
_ALL = (
    # Those that TRL's DPOTrainer knows.
    PairLoss("sigmoid", _scores, lambda c, r, s: sigmoid_loss(c, r, beta=s.beta),
             supports_divergence=True),
    PairLoss("hinge", _scores, lambda c, r, s: hinge_loss(c, r, beta=s.beta),
             supports_divergence=True),
    PairLoss("ipo", _mean_scores, lambda c, r, s: ipo_loss(c, r, beta=s.beta),
             supports_divergence=True),
    PairLoss("exo_pair", _scores, lambda c, r, s: exo_pair_loss(
                 c, r, beta=s.beta, label_smoothing=s.label_smoothing),
             supports_divergence=True),
    PairLoss("nca_pair", _scores, lambda c, r, s: nca_pair_loss(c, r, beta=s.beta)),
    PairLoss("robust", _scores, lambda c, r, s: robust_loss(
                 c, r, beta=s.beta, label_smoothing=s.label_smoothing),
             supports_divergence=True),
    PairLoss("bco_pair", _scores, lambda c, r, s: bco_pair_loss(c, r, beta=s.beta)),
    PairLoss("sppo_hard", _scores, lambda c, r, s: sppo_hard_loss(c, r, beta=s.beta)),
    PairLoss("aot", _margins_of_both_models, lambda c, r, s: aot_loss(
                 c, r, beta=s.beta, label_smoothing=s.label_smoothing),
             sorts_batch=True),
    PairLoss("aot_unpaired", _scores, lambda c, r, s: aot_unpaired_loss(
                 c, r, beta=s.beta, label_smoothing=s.label_smoothing),
             sorts_batch=True),
    PairLoss("apo_zero", _scores, lambda c, r, s: apo_zero_loss(c, r, beta=s.beta)),
    PairLoss("apo_down", _scores, lambda c, r, s: apo_down_loss(c, r, beta=s.beta)),
    PairLoss("discopop", _scores, lambda c, r, s: discopop_loss(
                 c, r, beta=s.beta, tau=s.discopop_tau),
             supports_divergence=True),
    PairLoss("sft", None, imitation=lambda b: sft_loss(b.chosen_nll, b.mean_chosen_length),
             needs_reference=False, supports_divergence=True),
    PairLoss("sigmoid_norm", _mean_scores, lambda c, r, s: sigmoid_norm_loss(c, r, beta=s.beta),
             supports_divergence=True),
    # Those it does not.
    PairLoss("cdpo", _scores, lambda c, r, s: cdpo_loss(
                 c, r, beta=s.beta, label_smoothing=s.label_smoothing),
             supports_divergence=True),
    PairLoss("gdpo", _scores, lambda c, r, s: sigmoid_loss(c, r, beta=s.beta),
             supports_divergence=True, soft_labels="geometric"),
    PairLoss("simpo", _mean_logps, lambda c, r, s: simpo_loss(
                 c, r, beta=s.beta, gamma=s.simpo_gamma),
             needs_reference=False),
    PairLoss("orpo", _mean_logps, lambda c, r, s: s.orpo_lambda * odds_ratio_loss(c, r),
             imitation=_mean_nll, needs_reference=False),
    PairLoss("dpop", _scores, lambda c, r, s: dpop_loss(
                 c, r, beta=s.beta, dpop_lambda=s.dpop_lambda)),
    PairLoss("rdpo", _rewards_with_length, lambda c, r, s: sigmoid_loss(c, r, beta=1.0),
             supports_divergence=True),
    PairLoss("rao_kupper", _scores,
             lambda c, r, s: rao_kupper_loss(c, r, beta=s.beta, nu=s.rao_kupper_nu),
             lambda c, r, s: rao_kupper_tie_loss(c, r, beta=s.beta, nu=s.rao_kupper_nu),
             supports_divergence=True),
    PairLoss("davidson", _scores,
             lambda c, r, s: davidson_loss(c, r, beta=s.beta, nu=s.davidson_nu),
             lambda c, r, s: davidson_tie_loss(c, r, beta=s.beta, nu=s.davidson_nu),
             supports_divergence=True),
    PairLoss("nll", None, imitation=_mean_nll, needs_reference=False, supports_divergence=True),
)
# fmt: on

PAIR_LOSSES: dict[str, PairLoss] = {loss.name: loss for loss in _ALL}
"""Every pairwise loss by name."""

LOSS_NAMES: tuple[str, ...] = tuple(PAIR_LOSSES)
"""The names of all pairwise losses, TRL's fifteen first."""


def pair_losses(
    names: Sequence[str],
    weights: Sequence[float] | None,
    batch: PairBatch,
    settings: LossSettings,
) -> Tensor:
    """The weighted sum of the named losses of each pair, (N,); the caller takes the mean.

    Only the sum over pairs has a meaning where a loss sorts the batch. Check names and settings
    once with `check_losses`; this raises on the first fault it meets.

    Args:
        names: of `LOSS_NAMES`.
        weights: one for each name; None weighs all 1.
        batch: the pairs.
        settings: the losses' numbers.

    Raises:
        ValueError: unknown names, wrong counts, or settings and labels a loss cannot take.
    """
    if weights is None:
        weights = [1.0] * len(names)
    _require(*_name_rules(names, weights))
    first, *rest = (
        weight * PAIR_LOSSES[name](batch, settings)
        for name, weight in zip(names, weights, strict=True)
    )
    return sum(rest, start=first)


def _name_rules(names: Sequence[str], weights: Sequence[float]) -> list[tuple[bool, str]]:
    rules = [
        (bool(names), f"at least one loss is needed, of {', '.join(LOSS_NAMES)}"),
        (
            len(weights) == len(names),
            f"each loss needs one weight, got {len(weights)} weights for {len(names)} losses",
        ),
    ]
    for name in names:
        near = difflib.get_close_matches(name, LOSS_NAMES, n=3, cutoff=0.6) or LOSS_NAMES
        rules.append((name in PAIR_LOSSES, f"unknown loss {name!r}: try {', '.join(near)}"))
    return rules


def check_losses(
    names: Sequence[str],
    weights: Sequence[float] | None,
    settings: LossSettings,
    *,
    weighted_pairs: bool = False,
) -> None:
    """Nothing, if these losses can be computed with these settings.

    Args:
        names: of `LOSS_NAMES`.
        weights: one for each name; None weighs all 1.
        settings: the losses' numbers.
        weighted_pairs: whether pairs will be weighted (WPO), which sorted batches cannot take.

    Raises:
        ValueError: names every problem, one a line.
    """
    weights = [1.0] * len(names) if weights is None else weights
    rules = _name_rules(names, weights)
    rules += [(math.isfinite(w), f"weights must be finite, got {w}") for w in weights]
    rules += [
        (
            settings.f_divergence in get_args(FDivergence),
            f"f_divergence must be one of {get_args(FDivergence)}, got {settings.f_divergence!r}",
        ),
        (
            settings.soft_labels in get_args(SoftLabels),
            f"soft_labels must be one of {get_args(SoftLabels)}, got {settings.soft_labels!r}",
        ),
    ]
    problems = [text for holds, text in rules if not holds]
    probe_settings = replace(settings, f_divergence="reverse_kl", soft_labels="ignore")
    for loss in (PAIR_LOSSES[name] for name in names if name in PAIR_LOSSES):
        if settings.f_divergence != "reverse_kl" and not loss.supports_divergence:
            problems.append(f"{loss.name} supports no f_divergence but reverse_kl")
        if weighted_pairs and loss.sorts_batch:
            problems.append(f"{loss.name} sorts the batch, so pairs cannot be weighted")
        try:
            loss(_PROBE, probe_settings)
        except ValueError as error:
            problems += str(error).split("; ")
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))


# One pair on which every loss is defined: settings out of range fail on it as they would later.
_ONE = torch.ones(1, dtype=torch.float64)
_PROBE = PairBatch(-_ONE, -_ONE, -_ONE, -_ONE, _ONE, _ONE, _ONE, _ONE, 1.0)


# --- Groups of K answers ------------------------------------------------------------------------


def _check_group(rewards: Tensor, mask: Tensor, **others: Tensor) -> None:
    _require(
        (rewards.dim() == 2, f"rewards must be (G, K), got {tuple(rewards.shape)}"),
        (mask.dtype == torch.bool, f"mask must be bool, got {mask.dtype}"),
        _same_shape(rewards=rewards, mask=mask, **others),
    )


def plackett_luce_loss(rewards: Tensor, mask: Tensor) -> Tensor:
    """-log of the probability of a whole ranking, (G,).

        sum over k of  log [sum over j >= k of exp r_j] - r_k

    Plackett 1975 and Luce 1959; for implicit rewards Rafailov et al. 2023, arXiv:2305.18290,
    appendix A.3. With two answers it is `sigmoid_loss`; an answer alone costs nothing.

    Args:
        rewards: implicit rewards beta (log pi - log pi_ref), best answer first, (G, K).
        mask: True where there is an answer, (G, K).

    Raises:
        ValueError: shapes differ or are not (G, K), or the mask is not boolean.
    """
    _check_group(rewards, mask)
    k = rewards.shape[1]
    not_before = torch.ones(k, k, dtype=torch.bool, device=rewards.device).triu()
    remaining = not_before & mask[:, None, :]  # (G, K, K): row k, those still to choose from
    choices = rewards[:, None, :].masked_fill(~remaining, -math.inf)
    return (torch.logsumexp(choices, dim=-1) - rewards).where(mask, 0).sum(-1)


def infonca_loss(
    rewards: Tensor, scores: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Cross-entropy from the softmax of given scores to the softmax of implicit rewards, (G,).

        -sum over i of  softmax(scores / temperature)_i  log softmax(r)_i

    Chen et al. 2024, InfoNCA, arXiv:2402.05369, whose alpha is the temperature. As the temperature
    goes to 0 only the best answer counts, and with two answers it becomes `sigmoid_loss`.

    Args:
        rewards: implicit rewards beta (log pi - log pi_ref), (G, K).
        scores: what a judge or reward model gave the answers, (G, K).
        mask: True where there is an answer, (G, K). A group without answers has loss 0.
        temperature: of the scores.

    Raises:
        ValueError: temperature is not positive, or as `plackett_luce_loss`.
    """
    targets = _targets(rewards, scores, mask, temperature)
    log_policy = torch.log_softmax(_fill(rewards, mask), dim=-1)
    return -(targets * log_policy).where(mask, 0).sum(-1)


def nca_loss(rewards: Tensor, scores: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Noise contrastive alignment of K answers with given scores, (G,).

        -sum over i of  softmax(scores / temperature)_i log s(r_i) + 1/K log s(-r_i)

    Chen et al. 2024, NCA, arXiv:2402.05369, K being the answers that are there. Unlike InfoNCA it
    sets the level of each reward, not only their differences. Arguments as `infonca_loss`.
    """
    targets = _targets(rewards, scores, mask, temperature)
    counts = mask.sum(-1, keepdim=True).clamp(min=1)
    terms = targets * F.logsigmoid(rewards) + F.logsigmoid(-rewards) / counts
    return -terms.where(mask, 0).sum(-1)


def _fill(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, torch.finfo(values.dtype).min)


def _targets(rewards: Tensor, scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    _require(_positive("temperature", temperature))
    _check_group(rewards, mask, scores=scores)
    scores = scores.to(rewards.dtype)
    return torch.softmax(_fill(scores / temperature, mask), dim=-1)


# --- Weights ------------------------------------------------------------------------------------


def wpo_weights(aligned_logps: Tensor, lengths: Tensor) -> Tensor:
    """How likely each answer is under the policy that trains on it, without gradient, (A,).

        exp [1/|y| sum over t of (log pi(y_t) - log sum over v of pi(v)^2)]

    Zhou et al. 2024, WPO with sampled alignment, arXiv:2406.11827, eq. 2. A pair's loss is
    multiplied by the weights of both its answers.

    Args:
        aligned_logps: the sum over t above, (A,).
        lengths: answer tokens, (A,).

    Raises:
        ValueError: the shapes differ.
    """
    _require(_same_shape(aligned_logps=aligned_logps, lengths=lengths))
    return torch.exp(_per_token(aligned_logps.detach(), lengths))
