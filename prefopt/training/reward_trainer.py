"""A preference dataset -> a trained reward model: TRL's `RewardTrainer`, on tree batches.

    from prefopt import RewardConfig, RewardTrainer        # instead of: from trl import ...

Columns and metrics are TRL's, and K answers to a prompt cost the prompt once; the optimiser steps are
`tree_trainer`'s, which divide by true counts. What is trained is a `RewardModel`, whose head lies
beside the adapter; checkpoints are its folders. Losses are `prefopt.reward_losses`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from torch import Tensor

from prefopt.chat import ids_after_end
from prefopt.errors import TrainingError
from prefopt.losses import plackett_luce_loss
from prefopt.reward_losses import centering_penalty, reward_pair_loss
from prefopt.training.fused_model import AS_IT_IS
from prefopt.training.policy_setup import (
    check_sharding,
    disable_dropout,
    load_policy,
    loading_options,
    neftune_problems,
    offloading_context,
    text_tokenizer,
)
from prefopt.training.preference_rows import MicroBatch
from prefopt.training.reward_config import RewardConfig as RewardConfig
from prefopt.training.reward_config import own_reward_config
from prefopt.training.reward_model import RewardModel
from prefopt.training.tree_model import Scoring, answer_states, base_model, choose_scoring
from prefopt.training.tree_trainer import PlannedBatch, TreeTrainer, ranked_groups

logger = logging.getLogger(__name__)


class RewardTrainer(TreeTrainer):
    """Trains a reward model on preferences (Bradley-Terry; Stiennon et al. 2020, arXiv:2009.01325).

    Args:
        model: a name, a causal language model, a `PeftModel`, or a `RewardModel` to train further.
        args: a `RewardConfig`, or TRL's.
        data_collator: None for token rows.
        train_dataset: rows as `prefopt.training.preference_rows` lists them; a column `margin` too.
        eval_dataset: the same, one or several.
        processing_class: the tokenizer.
        callbacks: as for `transformers.Trainer`.
        optimizers: as for `transformers.Trainer`.
        peft_config: adapter to train.

    Raises:
        ValueError: settings that exclude each other.
        DataError: no row of a dataset can be used.
        TrainingError: a loss is not finite.
    """

    _tag_names = ("prefopt", "reward-trainer")

    def __init__(
        self,
        model: Any,
        args: trl.RewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        name = model if isinstance(model, str) else model.config._name_or_path
        args = own_reward_config(args, str(name or "model"))
        _check_arguments(model, train_dataset, peft_config, args)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # a score depends on all that trains
        transformers.set_seed(args.seed)
        given = model if isinstance(model, RewardModel) else None
        if isinstance(model, str):
            model = load_policy(model, loading_options(args, None))
        if given is not None and processing_class is None:
            processing_class = given.tokenizer
        language_model = given.model if given is not None else model
        tokenizer = text_tokenizer(processing_class, language_model, args, None)
        reward = given or RewardModel.new(model, tokenizer, peft_config, seed=args.seed)
        if given is None and isinstance(name, str) and name:
            reward.base = name
        # Preferences say nothing about the level of scores; without the penalty that sets it, rounding
        # alone would move the head's bias.
        reward.head.bias.requires_grad_(bool(args.center_rewards_coefficient))
        if args.disable_dropout:
            disable_dropout(reward.model)
        if args.gradient_checkpointing and reward.adapter is not None:
            reward.model.enable_input_require_grads()
        super().__init__(
            tokenizer=tokenizer,
            row_options={
                "max_length": args.max_length,
                "truncation": args.truncation_mode,
                "pair_choice": args.group_pairs,
            },
            model=reward,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class or tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_sharding(args, self.sharding, base_model(self.reward.model))
        self._offload = offloading_context(self.reward.model, args)
        self.scoring = self._scoring_of_reward()

    def _scoring_of_reward(self) -> Scoring:
        """How the model is scored, found out while its weights are whole."""
        if not self.sharding.parameters:
            return self.reward.scoring
        # Weights are on the CPU until they are sharded, so what only a GPU can do cannot be tried.
        on_cpu = self.args.device.type == "cpu"
        found = choose_scoring(self.reward.model, compiled=not on_cpu)
        return replace(found, fused=AS_IT_IS, parted=True)

    @property
    def reward(self) -> RewardModel:
        """The model that is trained."""
        model: RewardModel = self.model
        return model

    def _prepared(self, dataset: Any, name: str, args: Any) -> Any:
        tokenized = super()._prepared(dataset, name, args)
        surplus = ids_after_end(self._text_processor)
        if not surplus or "prompt_ids" in next(iter(dataset)):
            return tokenized
        # A policy stops at its end token, so that is where its answers will be scored.
        return tokenized.map(_cut_after_end, fn_kwargs={"surplus": surplus})

    @property
    def _language_model(self) -> Any:
        return self.reward.model

    # --- Loss ------------------------------------------------------------------------------------

    def _micro_batch_loss(
        self, model: Any, micro_batch: MicroBatch, step: PlannedBatch, mode: str
    ) -> Tensor:
        device = self.args.device
        batch = self.scoring.batch(micro_batch.trees, self._pad_token_id, feed_last=True)
        batch = batch.to(device)
        scores = answer_states(model, batch, self.scoring, batch.ends)  # (A,)
        pairs = _Pairs(micro_batch, scores)
        losses = self._pair_losses(pairs, micro_batch)
        groups = self._group_losses(scores, micro_batch)
        if not bool(torch.isfinite(losses.sum() + groups.sum())):
            raise TrainingError(
                f"the loss is not finite at step {self.state.global_step + 1}; the weights are as "
                f"they were after step {self.state.global_step}. Lower the learning rate, or train in "
                "float32."
            )
        loss = ((losses * pairs.weight).sum() + groups.sum()) / step.n_rows
        with torch.no_grad():
            self._measure(mode, pairs, loss * step.n_rows)
        return loss

    def _pair_losses(self, pairs: _Pairs, micro_batch: MicroBatch) -> Tensor:
        """Losses of all pairs (N,); those of rows whose ranking is taken as a whole are 0."""
        margin = pairs.margin * self.args.margin_weight
        losses = reward_pair_loss(
            pairs.chosen, pairs.rejected, pairs.p_chosen, margin, self.args.loss_settings()
        )
        if self.args.loss_type == "plackett_luce":
            ranked = {group.row for group in micro_batch.groups}
            apart = [pair.row not in ranked for pair in micro_batch.pairs]
            losses = losses * torch.tensor(apart, device=losses.device)
        if self.args.center_rewards_coefficient:
            penalty = centering_penalty(pairs.chosen, pairs.rejected)
            losses = losses + self.args.center_rewards_coefficient * penalty
        return losses

    def _group_losses(self, scores: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Losses of whole rankings (G,), or an empty tensor."""
        if self.args.loss_type != "plackett_luce" or not micro_batch.groups:
            return scores.new_zeros(0)
        ranked = [(group.answers, group.scores) for group in micro_batch.groups]
        index, _, mask = ranked_groups(ranked, scores.device)
        return plackett_luce_loss(scores[index], mask)

    def _measure(self, mode: str, pairs: _Pairs, loss: Tensor) -> None:
        add, weight = self._averages[mode].add, pairs.weight
        difference = pairs.chosen - pairs.rejected
        sign = torch.sign(pairs.p_chosen - 0.5)  # a tie has no right answer
        add("accuracy", (difference * sign > 0).double(), weight * sign.abs())
        add("margin", difference, weight)
        add("mean_reward", (pairs.chosen + pairs.rejected) / 2, weight)
        if mode == "eval":
            rows = weight.sum()[None]
            add("loss", loss.expand(1) / rows, rows)

    # --- Saving ----------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.reward.write(folder, state_dict)

    def _is_saved(self, name: str, parameter: Any) -> bool:
        trains = parameter.requires_grad or name.startswith("head.") or "lora_" in name
        return self.reward.adapter is None or trains

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.reward.read_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.reward.read_weights(self.state.best_model_checkpoint)


def _cut_after_end(row: dict[str, Any], surplus: list[int]) -> dict[str, Any]:
    def cut(ids: list[int]) -> list[int]:
        return ids[: -len(surplus)] if ids[-len(surplus) :] == surplus else ids

    if "answer_ids" in row:
        return {"answer_ids": [cut(ids) for ids in row["answer_ids"]]}
    return {"chosen_ids": cut(row["chosen_ids"]), "rejected_ids": cut(row["rejected_ids"])}


class _Pairs:
    """The scores (N,) of both sides of a micro-batch's pairs, and what is known of each pair."""

    def __init__(self, micro_batch: MicroBatch, scores: Tensor) -> None:
        pairs, device = micro_batch.pairs, scores.device
        self.chosen = scores[torch.tensor([p.chosen for p in pairs], device=device)]
        self.rejected = scores[torch.tensor([p.rejected for p in pairs], device=device)]
        self.p_chosen = torch.tensor([p.p_chosen for p in pairs], device=device)
        self.weight = torch.tensor([p.weight for p in pairs], device=device)
        self.margin = torch.tensor([p.margin for p in pairs], device=device)


def _check_arguments(model: Any, dataset: Any, peft_config: Any, args: Any) -> None:
    problems = neftune_problems(args)
    if dataset is None:
        problems.append("`train_dataset` is required")
    ready = isinstance(model, RewardModel) or hasattr(model, "peft_config")
    if peft_config is not None and ready:
        problems.append(
            "peft_config was given with a model that is trained as it is; merge its adapter first, "
            "or leave peft_config out"
        )
    if problems:
        raise ValueError("; ".join(problems) + ".")
