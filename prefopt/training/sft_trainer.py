"""TRL's SFT trainer with a step on tree batches: rows of token ids -> optimiser steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import trl
from torch import Tensor

from prefopt.errors import TrainingError
from prefopt.training.policy_setup import check_sharding
from prefopt.training.sharding import counted_once, most, pass_of_step
from prefopt.training.tree_model import (
    Scoring,
    add_answer_scoring,
    base_model,
    choose_scoring,
    n_parameters,
    score_answers,
    tree_attention,
)
from prefopt.training.whole_checkpoints import WholeCheckpoints
from prefopt.trees import AnswerTree, default_micro_batch_tokens, split_by_tokens

if TYPE_CHECKING:
    from prefopt.training.token_rows import TokenRow

_NOT_LEARNED = -100  # TRL's label of a token without loss


@dataclass(frozen=True)
class StepRows:
    """The rows of an optimiser step. Opaque to accelerate, which leaves it as it is."""

    trees: tuple[AnswerTree, ...]


class SFTTrainer(WholeCheckpoints, trl.SFTTrainer):
    """TRL's, on rows of `input_ids` and `labels` whose learned tokens are the end of the row.

    What is other than in TRL 1.16, and why:

    - Rows come with token ids and labels. TRL's own tokenization also teaches what a chat template
      writes after the end token, teaches no end where the template writes none, and teaches an end to
      answers that were cut off.
    - The step is on tree batches: no padding, and only learned tokens reach the output head. TRL
      pads, and on a CPU sends every token through the head: 1.7 to 2.1 times the CPU time for LoRA
      on the demo model (benchmarks/speed_sft.py).
    - `batch_size` rows make one step whatever fits into memory at once; the metrics are over all
      tokens of the step. TRL's are means of micro-batches' means.
    - A loss that is not finite ends the run before the optimiser steps. TRL's goes on, and shows the
      mean of the losses before.
    - TRL's count of tokens begins at 0 again in a run that is continued; it is left out.
    - Nothing is reported to anyone, and checkpoints hold no model card.
    """

    _tag_names = ("prefopt", "sft")

    def __init__(self, *, micro_batch_tokens: int | None, **arguments: Any) -> None:
        if arguments["args"].gradient_accumulation_steps != 1:
            raise ValueError(
                "a batch is one step here, however little fits into memory at once; leave "
                "gradient_accumulation_steps at 1 and set micro_batch_tokens."
            )
        super().__init__(data_collator=collate_rows, **arguments)
        check_sharding(self.args, self._set_up_sharding(), base_model(self.model))
        self._scoring: Scoring | None = None
        if self.sharding.parameters:
            add_answer_scoring(base_model(self.model))  # before a wrapper minds the precision
        else:
            self._settled_scoring()
        default = default_micro_batch_tokens(self.args.device.type)
        self._budget = micro_batch_tokens or default

    def training_step(
        self, model: Any, inputs: Mapping[str, StepRows], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of all rows of the step, micro-batch by micro-batch."""
        model.train()
        scoring, device = self._settled_scoring(), self.args.device
        given, processes = inputs["batch"].trees, self.accelerator.num_processes
        trees = counted_once(
            self.accelerator, given, self._train_batch_size, self._rows_of_training
        )
        n_tokens = torch.tensor(float(sum(len(tree.answers[0]) for tree in trees)), device=device)
        if processes > 1:
            n_tokens = self.accelerator.reduce(n_tokens, reduction="sum")
        sums = torch.zeros(3, device=device)  # of losses, entropies and foreseen tokens
        plan = split_by_tokens([tree.n_tokens for tree in trees], self._budget)
        passes = [[trees[i] for i in members] for members in plan]
        n_own = len(passes)
        # What processes do together, one with less to do does for nothing.
        n_all = most(self.accelerator, n_own) if self.sharding.gradients else max(1, n_own)
        passes += [[min(given, key=lambda tree: tree.n_tokens)]] * (n_all - n_own)
        for index, rows in enumerate(passes):
            with (
                pass_of_step(self.accelerator, model, self.sharding, last=index == len(passes) - 1),
                self.maybe_activation_offload_context,
                tree_attention(self.model, scoring),
            ):
                batch = scoring.batch(rows, self.processing_class.pad_token_id or 0)
                with self.compute_loss_context_manager():
                    tokens, balance = score_answers(
                        model, batch.to(device), scoring, aux_loss=self.aux_loss_enabled
                    )
                    losses = -tokens.logprobs
                    self._check(losses.detach(), rows)
                    # Processes average their gradients; the mean is over the tokens of all of them.
                    loss = losses.sum() * processes / n_tokens
                    if balance is not None:  # of a mixture of experts, as TRL weighs it
                        share = len(losses) * processes / n_tokens
                        loss = loss + self.router_aux_loss_coef * share * balance
                self.accelerator.backward(loss if index < n_own else loss * 0.0)
            if index < n_own:
                parts = (losses, tokens.entropy, tokens.is_top1.float())
                sums += torch.stack([part.detach().sum() for part in parts])
        if processes > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        mean_loss, entropy, accuracy = (sums / n_tokens).unbind()
        self._metrics["train"]["entropy"].append(entropy.item())
        self._metrics["train"]["mean_token_accuracy"].append(accuracy.item())
        return mean_loss

    def _settled_scoring(self) -> Scoring:
        """How the model is scored, found out once its weights are where they stay."""
        if self._scoring is None:
            half = self.sharding.parameters and self.args.mixed_precision != "no"
            self._scoring = choose_scoring(self.model, low_precision=half)
        return self._scoring

    def _check(self, losses: Tensor, rows: Sequence[AnswerTree]) -> None:
        if bool(torch.isfinite(losses).all()):
            return
        answer_of = torch.repeat_interleave(
            torch.arange(len(rows)), torch.tensor([len(row.answers[0]) for row in rows])
        )
        bad = answer_of[~torch.isfinite(losses).cpu()].unique().tolist()
        texts = [self.processing_class.decode(rows[i].answers[0][:20]) for i in bad[:3]]
        raise TrainingError(
            f"the loss of {len(bad)} of {len(rows)} rows is not finite at step "
            f"{self.state.global_step + 1}; nothing was learned from this step. The rows begin with "
            f"{', '.join(repr(text) for text in texts)}. If it is the first step, the model's weights "
            "overflow or hold NaN: load it in float32. Later on, lower the learning rate."
        )

    def floating_point_ops(self, inputs: Mapping[str, StepRows]) -> int:
        """Six a parameter and token fed, the usual estimate."""
        fed = sum(tree.n_tokens for tree in inputs["batch"].trees)
        return 6 * fed * n_parameters(base_model(self.model))

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """None; `train_sft` writes its own."""

    def _send_telemetry(self) -> None:
        pass


def collate_rows(examples: Sequence[Mapping[str, Any]]) -> dict[str, StepRows]:
    """The rows of a step as trees of one answer."""
    trees = []
    for example in examples:
        ids, labels = example["input_ids"], example["labels"]
        n = next(i for i, label in enumerate(labels) if label != _NOT_LEARNED)
        trees.append(AnswerTree(tuple(ids[:n]), (tuple(ids[n:]),)))
    return {"batch": StepRows(tuple(trees))}


def token_columns(row: TokenRow) -> dict[str, list[int]]:
    """A row in TRL's columns; what is read only has the label without loss."""
    return {
        "input_ids": [*row.prompt_ids, *row.answer_ids],
        "labels": [_NOT_LEARNED] * len(row.prompt_ids) + list(row.answer_ids),
    }
