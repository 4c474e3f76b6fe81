"""The settings of `DPOTrainer`: TRL's, and what tree batches and further losses need.

All faults of a configuration are said at once, before anything is loaded. Knows nothing of models or
data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import trl

from prefopt.losses import PAIR_LOSSES, LossSettings, SoftLabels, check_losses
from prefopt.training.trl_config import with_own_fields

LISTWISE_LOSSES = ("plackett_luce", "infonca", "nca")


@dataclass
class DPOConfig(trl.DPOConfig):
    r"""TRL's `DPOConfig` with what tree batches and the further losses need.

    Everything TRL documents holds; `per_device_train_batch_size` counts rows, and memory is bounded
    by `micro_batch_tokens` instead. `padding_free` is always so and changes nothing.

    Parameters:
        loss_type: besides TRL's, any of `prefopt.losses.LOSS_NAMES`, and for rows of K answers
            `plackett_luce`, `infonca` and `nca`.
        micro_batch_tokens: tokens that go through the model at once; None takes 512 on a CPU and
            8,192 on a GPU. The gradient does not depend on it, memory does. Losses that sort
            their batch (`aot`, `aot_unpaired`) take all rows of a step at once.
        group_by_prompt: let rows with the same prompt follow each other, so that the prompt is
            computed once for all of them; otherwise rows are shuffled one by one. Of one prompt at
            most 8 rows, or a quarter of a step's, follow each other, so that no step is about a single
            prompt.
        group_pairs: of K answers with scores, train on all pairs or on best against worst.
        soft_labels: what `p_chosen` below 1 does; see `prefopt.losses.LossSettings`.
        adapter_reference: the reference of a model that comes with an adapter: a frozen copy of the
            adapter as it is at the "start", or the "base" model under it, as in later rounds of
            iterative DPO.
        reference_cache: folder in which reference log-probabilities are kept for other runs. With
            `precompute_ref_log_probs` and None it lies in prefopt's cache folder.
        simpo_gamma: target margin of the `simpo` loss.
        orpo_lambda: weight of the odds ratio in the `orpo` loss.
        dpop_lambda: weight of the penalty in the `dpop` loss.
        rdpo_alpha: reward taken off for each token in the `rdpo` loss.
        rao_kupper_nu: how likely ties are in the `rao_kupper` loss.
        davidson_nu: how likely ties are in the `davidson` loss.
        infonca_temperature: of the scores in the `infonca` and `nca` losses.
        replay_share: the share of general rows among all rows of a step, in (0, 1), where the trainer
            is given a `replay_dataset`; the nearest whole number of rows, and at least one.
        replay_weight: of their mean negative log-likelihood a token beside the loss of the pairs; 0
            is no replay.
    """

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
    group_pairs: str = field(
        default="all",
        metadata={
            "help": "Of K answers with scores, train on all pairs or on best against worst.",
            "choices": ["all", "best_worst"],
        },
    )
    soft_labels: SoftLabels = field(
        default="expected",
        metadata={
            "help": "What p_chosen below 1 does to a loss.",
            "choices": get_args(SoftLabels),
        },
    )
    adapter_reference: str = field(
        default="start",
        metadata={
            "help": "What a continued adapter is compared with: itself at the start, or its base.",
            "choices": ["start", "base"],
        },
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for reference log-probabilities that other runs can use."},
    )
    simpo_gamma: float = field(default=0.5, metadata={"help": "Target margin of the simpo loss."})
    orpo_lambda: float = field(default=0.1, metadata={"help": "Weight of the odds ratio in orpo."})
    dpop_lambda: float = field(default=50.0, metadata={"help": "Weight of the penalty in dpop."})
    rdpo_alpha: float = field(default=0.01, metadata={"help": "Reward a token costs in rdpo."})
    rao_kupper_nu: float = field(default=3.0, metadata={"help": "Ties in the rao_kupper loss."})
    davidson_nu: float = field(default=1.0, metadata={"help": "Ties in the davidson loss."})
    infonca_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the scores in infonca and nca."}
    )
    replay_share: float = field(
        default=0.1, metadata={"help": "Share of general rows in a step, with a replay_dataset."}
    )
    replay_weight: float = field(
        default=1.0, metadata={"help": "Weight of the general rows' NLL beside the loss."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            problems.append(f"micro_batch_tokens must be positive, got {self.micro_batch_tokens}")
        if self.group_pairs not in ("all", "best_worst"):
            problems.append(f"group_pairs must be all or best_worst, got {self.group_pairs!r}")
        if self.adapter_reference not in ("start", "base"):
            problems.append(
                f"adapter_reference must be start or base, got {self.adapter_reference!r}"
            )
        if self.max_length is not None and self.max_length < 2:
            problems.append(f"max_length must be at least 2, got {self.max_length}")
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            problems.append(f"ld_alpha must be in [0, 1], got {self.ld_alpha}")
        if not 0.0 < self.replay_share < 1.0:
            problems.append(f"replay_share must be in (0, 1), got {self.replay_share}")
        if not 0.0 <= self.replay_weight < math.inf:
            problems.append(
                f"replay_weight must be finite and not negative, got {self.replay_weight}"
            )
        try:
            self._check_losses()
        except ValueError as error:
            problems += str(error).splitlines()
        if problems:
            raise ValueError("DPOConfig: " + "; ".join(problems) + ".")

    def pairwise(self) -> tuple[list[str], list[float]]:
        """The pairwise losses with their weights."""
        return self._part(lambda name: name not in LISTWISE_LOSSES)

    def listwise(self) -> tuple[list[str], list[float]]:
        """The losses on whole groups of answers with their weights."""
        return self._part(lambda name: name in LISTWISE_LOSSES)

    def _part(self, belongs: Callable[[str], bool]) -> tuple[list[str], list[float]]:
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        both = [(n, w) for n, w in zip(self.loss_type, weights, strict=True) if belongs(n)]
        return [n for n, _ in both], [w for _, w in both]

    def loss_settings(self) -> LossSettings:
        """The numbers of the losses."""
        return LossSettings(
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            f_divergence=self.f_divergence_type,
            f_alpha=self.f_alpha_divergence_coef,
            discopop_tau=self.discopop_tau,
            simpo_gamma=self.simpo_gamma,
            orpo_lambda=self.orpo_lambda,
            dpop_lambda=self.dpop_lambda,
            rdpo_alpha=self.rdpo_alpha,
            rao_kupper_nu=self.rao_kupper_nu,
            davidson_nu=self.davidson_nu,
            soft_labels=self.soft_labels,
        )

    def _check_losses(self) -> None:
        names, weights = self.pairwise()
        listwise, _ = self.listwise()
        if names or not listwise:
            check_losses(names, weights, self.loss_settings(), weighted_pairs=self.use_weighting)
        if listwise and self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if listwise and self.use_weighting:
            raise ValueError(f"{', '.join(listwise)} takes no use_weighting, which weighs pairs")
        if listwise and self.f_divergence_type != "reverse_kl":
            raise ValueError(f"{', '.join(listwise)} supports no f_divergence but reverse_kl")
        if listwise and self.infonca_temperature <= 0:
            raise ValueError(
                f"infonca_temperature must be positive, got {self.infonca_temperature}"
            )

    @property
    def needs_reference(self) -> bool:
        """False for losses that replace the reference (SimPO, ORPO), alone or with each other."""
        names, _ = self.pairwise()
        free = [
            name for name in names if name in PAIR_LOSSES and not PAIR_LOSSES[name].needs_reference
        ]
        replaced = any(name in ("simpo", "orpo") for name in free)
        return bool(self.listwise()[0]) or len(free) < len(names) or not replaced


def own_config(args: Any, model: Any) -> DPOConfig:
    """The settings of a trainer: a default for None, and TRL's own config with our fields added."""
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "model")
        return DPOConfig(f"{str(name).rstrip('/').split('/')[-1] or 'model'}-DPO")
    return with_own_fields(args, DPOConfig, trl.DPOConfig)
