"""A preference dataset -> a trained policy: TRL's `DPOTrainer`, on tree batches.

    from prefopt import DPOConfig, DPOTrainer        # instead of: from trl import ...

Constructor, columns, metrics and checkpoints are TRL's; the loop is `transformers.Trainer`'s. The
optimiser steps on tree batches are `tree_trainer`'s.

Where to look: rows `preference_rows`, models `tree_model`, reference `reference`, losses
`prefopt.losses`.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from huggingface_hub import ModelCardData
from torch import Tensor

from prefopt.cache_folder import cache_folder
from prefopt.errors import TrainingError
from prefopt.logprobs import TokenScores, by_answer, discounted_logps, sum_by_answer
from prefopt.losses import (
    PAIR_LOSSES,
    PairBatch,
    infonca_loss,
    nca_loss,
    pair_losses,
    plackett_luce_loss,
    wpo_weights,
)
from prefopt.progress import progress_bar
from prefopt.training.dpo_config import DPOConfig as DPOConfig
from prefopt.training.dpo_config import own_config
from prefopt.training.policy_setup import (
    balancing_loss_weight,
    check_arguments,
    check_sharding,
    disable_dropout,
    load_policy,
    loading_options,
    offloading_context,
    prepare_reference,
    text_tokenizer,
    with_adapter,
)
from prefopt.training.preference_rows import (
    MicroBatch,
    PreferenceRow,
    RowCollator,
    plan_micro_batches,
)
from prefopt.training.reference import (
    Reference,
    ReferenceCache,
    ReferenceScorer,
    weights_fingerprint,
)
from prefopt.training.replay import (
    ReplayBatch,
    ReplayStream,
    replay_batches,
    replay_rows,
    rows_per_step,
)
from prefopt.training.sharding import most
from prefopt.training.tree_model import (
    AnswerScores,
    Scoring,
    add_answer_scoring,
    base_model,
    choose_scoring,
    score_answers,
)
from prefopt.training.tree_trainer import PlannedBatch, TreeTrainer, batch_rows, ranked_groups

logger = logging.getLogger(__name__)


class DPOTrainer(TreeTrainer):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) on tree batches.

    A drop-in for `trl.DPOTrainer`: the same arguments, columns, metrics and checkpoints.

    Args:
        model: a name, a causal language model, or a `PeftModel`.
        ref_model: the reference; None takes the policy as it is before training: the base model
            with the adapter off, a frozen copy of an adapter that came with `model`, or a copy of
            the whole model.
        args: a `DPOConfig`, or TRL's.
        data_collator: None for token rows; TRL's collator is understood.
        train_dataset: rows as `prefopt.training.preference_rows` lists them.
        eval_dataset: the same, one or several.
        processing_class: the tokenizer.
        compute_metrics: as for `transformers.Trainer`; costs another forward pass with all logits.
        callbacks: as for `transformers.Trainer`.
        optimizers: as for `transformers.Trainer`.
        quantization_config: for a model given by name.
        peft_config: adapter to train.
        replay_dataset: general data against forgetting, as `prefopt.data.general.load_general` reads
            it: each step adds the mean NLL a token of `args.replay_share` rows of it, weighted.

    Raises:
        ValueError: settings that exclude each other; said before anything is loaded.
        DataError: no row of a dataset can be used.
        TrainingError: policy and reference differ before the first step, or a loss is not finite.
    """

    _tag_names = ("prefopt", "dpo")

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: trl.DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        replay_dataset: Any = None,
    ) -> None:
        args = own_config(args, model)
        check_arguments(model, ref_model, args, train_dataset, peft_config)
        transformers.set_seed(args.seed)  # before the adapter's weights are drawn
        revision = None
        if isinstance(model, str):
            options = loading_options(args, quantization_config)
            revision = options.get("revision")
            model = load_policy(model, options)
        elif quantization_config is not None:
            raise ValueError("quantization_config needs the model by name; got a loaded model.")
        elif args.model_init_kwargs is not None:
            logger.warning("model_init_kwargs are not used: the model is loaded already")
        tokenizer = text_tokenizer(processing_class, model, args, revision)
        self._refuse_images(train_dataset)
        self._replay = self._replay_stream(replay_dataset, tokenizer, train_dataset, args)
        for config in (model.config.get_text_config(), model.generation_config):
            if config is not None:
                config.pad_token_id = tokenizer.pad_token_id

        model, kind = with_adapter(model, ref_model, peft_config, args)
        if args.disable_dropout:
            disable_dropout(model)
        if args.gradient_checkpointing and hasattr(model, "peft_config"):
            model.enable_input_require_grads()
        if not args.needs_reference:
            kind = "none"
        initial = copy.deepcopy(model) if self._needs_copy(kind, args) else None

        super().__init__(
            tokenizer=tokenizer,
            row_options={
                "max_length": args.max_length,
                "truncation": args.truncation_mode,
                "pair_choice": args.group_pairs,
            },
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class or tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_sharding(args, self.sharding, base_model(self.model))
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(self._tag_names))
        self._offload = offloading_context(self.model, args)
        self.aux_loss_enabled, self._aux_loss_weight = balancing_loss_weight(self.model, args)
        self._set_up_scoring()
        self.ref_model = None if kind.startswith("adapter") else (ref_model or initial)
        self._step_zero_checked = self._release_reference = False
        self._set_up_reference(kind, ref_model)
        if args.sync_ref_model:
            self.add_callback(
                trl.SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator)
            )
        if args.precompute_ref_log_probs and not self.sharding.parameters:
            self._precompute()

    # --- Setting up ------------------------------------------------------------------------------

    @staticmethod
    def _refuse_images(dataset: Any) -> None:
        columns = next(iter(dataset), ())
        if "image" in columns or "images" in columns:
            raise ValueError(
                "the dataset is vision-related (it has an image column), and this trainer takes "
                "text only. Train a vision-language model with trl.DPOTrainer."
            )

    @staticmethod
    def _replay_stream(
        source: Any, tokenizer: Any, train_dataset: Any, args: DPOConfig
    ) -> ReplayStream | None:
        if source is None or args.replay_weight == 0:
            return None
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        per_step = rows_per_step(args.replay_share, batch)
        most = None
        if isinstance(train_dataset, datasets.Dataset) or args.max_steps > 0:
            steps = args.max_steps
            if steps <= 0:
                steps = math.ceil(args.num_train_epochs * math.ceil(len(train_dataset) / batch))
            most = steps * per_step
        seed = args.seed if args.data_seed is None else args.data_seed
        rows = replay_rows(source, tokenizer, max_length=args.max_length, most=most, seed=seed)
        return ReplayStream(rows, per_step, seed)

    @staticmethod
    def _needs_copy(kind: str, args: Any) -> bool:
        return kind == "model copy" and not args.precompute_ref_log_probs

    def _set_up_reference(self, kind: Any, given: Any) -> None:
        args = self.args
        if kind == "model copy" and self.sharding.parameters and self.ref_model is None:
            # The reference is precomputed when weights are parted, and a run that goes on has read
            # its checkpoint by then.
            self.ref_model = copy.deepcopy(self.model)
        if self.ref_model is not None:
            if args.disable_dropout:
                disable_dropout(self.ref_model)
            self.ref_model.requires_grad_(False)
        reference = Reference(kind, self.model if self.ref_model is None else self.ref_model)
        folder = args.reference_cache
        if folder is None and args.precompute_ref_log_probs:
            folder = str(cache_folder() / "reference")
        fingerprint = ""
        if folder is not None and kind != "none":
            fingerprint = weights_fingerprint(reference, autocast=args.mixed_precision)
        again = args.num_train_epochs > 1 or args.max_steps > 0 or args.eval_strategy != "no"
        cache = ReferenceCache(
            folder,
            fingerprint,
            in_memory=not args.sync_ref_model and (again or args.precompute_ref_log_probs),
        )
        scoring = self._scoring
        if self.ref_model is not None:
            # Before anything shards it: how it is scored is found out on whole weights.
            scoring = None if self.sharding.parameters else self._scoring_of_reference()
            add_answer_scoring(base_model(self.ref_model))
            self.ref_model = prepare_reference(self, self.ref_model)
            reference = Reference(kind, self.ref_model)
        self.reference = ReferenceScorer(
            reference,
            scoring,
            cache,
            pad_token_id=self._pad_token_id,
            autocast=self.accelerator.autocast,
            most=partial(most, self.accelerator) if self.sharding.parameters else None,
        )
        logger.info("the reference is %s", reference)

    def _scoring_of_reference(self) -> Scoring:
        scoring = choose_scoring(self.ref_model, low_precision=self._multiplies_in_half)
        if self.scoring.fused.norms:
            return scoring
        # The policy's norms train and are not fused. The same arithmetic on both sides keeps the
        # margin at exactly 0 before the first step.
        return replace(scoring, fused=scoring.fused._replace(norms=()))

    def _settle(self) -> None:
        super()._settle()
        if not self.sharding.parameters:
            return
        own = self.ref_model is None
        self.reference.scoring = self.scoring if own else self._scoring_of_reference()
        if self.args.precompute_ref_log_probs:
            self._precompute()

    def _before_passes(self, micro_batches: Sequence[MicroBatch]) -> None:
        if self.reference.reference.kind != "none":
            self.reference.prepare([m.trees for m in micro_batches], self.args.device)

    def _plan(self, rows: Sequence[PreferenceRow]) -> list[MicroBatch]:
        # A loss that sorts its batch is one number of all pairs: they go through the model at once.
        at_once = any(PAIR_LOSSES[name].sorts_batch for name in self.args.pairwise()[0])
        return plan_micro_batches(rows, sys.maxsize) if at_once else super()._plan(rows)

    def _precompute(self) -> None:
        if self.reference.reference.kind == "none":
            return
        self.train_dataset = self._with_reference(self.train_dataset, "train")
        if isinstance(self.eval_dataset, Mapping):
            self.eval_dataset = {
                name: self._with_reference(part, name) for name, part in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_reference(self.eval_dataset, "eval")
        # An adapter's reference is always at hand; any other model is let go once training starts.
        self._release_reference = not self.reference.reference.shares_weights

    def _with_reference(self, dataset: Any, name: str) -> Any:
        """Compute the reference of all answers of a dataset; pairs get TRL's columns with sums."""
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(
                "precompute_ref_log_probs=True is not supported with IterableDataset. Give a "
                "datasets.Dataset, or set precompute_ref_log_probs=False."
            )
        rows = RowCollator(**self._row_options)(dataset).rows
        plan = plan_micro_batches(rows, self._budget)
        bar = progress_bar(
            total=sum(len(batch.trees) for batch in plan),
            description=f"reference ({name})",
            unit="prompt",
            show=self.accelerator.is_main_process and not self.args.disable_tqdm,
        )
        # Each process takes its share; what the others computed comes through the cache on disk.
        processes = self.accelerator.num_processes
        sums = torch.zeros(len(rows), 2, dtype=torch.float64)
        with bar:
            for start in range(0, len(plan), processes):
                of_all = plan[start : start + processes]
                mine = of_all[self.accelerator.process_index : self.accelerator.process_index + 1]
                self.reference.prepare(
                    [batch.trees for batch in mine or plan[:1]], self.args.device
                )
                for batch in mine:
                    self._reference_sums(batch, sums)
                bar.update(sum(len(batch.trees) for batch in of_all))
        if self.accelerator.num_processes > 1:
            on_device = sums.to(self.args.device)
            sums = self.accelerator.reduce(on_device, reduction="sum").cpu()
        if any(len(row.sequences) > 2 for row in rows):
            return dataset
        taken = [c for c in ("ref_chosen_logps", "ref_rejected_logps") if c in dataset.column_names]
        dataset = dataset.remove_columns(taken)
        dataset = dataset.add_column("ref_chosen_logps", sums[:, 0].tolist())
        return dataset.add_column("ref_rejected_logps", sums[:, 1].tolist())

    def _reference_sums(self, batch: MicroBatch, sums: Tensor) -> None:
        logps = self.reference.token_logps(batch.trees, self.args.device)
        lengths = torch.tensor([len(a) for tree in batch.trees for a in tree.answers])
        answer_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        totals = sum_by_answer(logps.double().cpu(), answer_of, len(lengths))
        for pair in batch.pairs:
            sums[pair.row, 0], sums[pair.row, 1] = totals[pair.chosen], totals[pair.rejected]

    # --- Loss ------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[PlannedBatch], None]:
        """As `TreeTrainer`'s, with the general rows of the step in its first call."""
        planned, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._replay is None or not planned:
            return planned, None
        rows = self._replay.at(self.state.global_step)
        first, process = planned[0], self.accelerator.process_index
        batches = replay_batches(
            rows, self._budget, process=process, n_processes=self.accelerator.num_processes
        )
        # A process that has none of the rows reports the metric too: all add up the same ones.
        nothing = torch.zeros(0, device=device)
        self._averages["train"].add("replay/nll", nothing, nothing)
        n_tokens = sum(len(row.prompt_ids) + len(row.answer_ids) for row in rows)
        # Before the pairs: with the last micro-batch of a step processes add up their gradients, and
        # every process has one with pairs.
        planned[0] = replace(
            first,
            micro_batches=(*batches, *first.micro_batches),
            n_tokens=first.n_tokens + n_tokens,
        )
        return planned, None

    def training_step(
        self, model: Any, inputs: PlannedBatch, num_items_in_batch: Any = None
    ) -> Tensor:
        """As `TreeTrainer`'s; a reference that was precomputed is let go before the first."""
        if self._release_reference:
            self._release_reference = False
            self.reference.release_model()
            self.ref_model = None
        return super().training_step(model, inputs, num_items_in_batch)

    def _micro_batch_loss(
        self, model: Any, micro_batch: MicroBatch, step: PlannedBatch, mode: str
    ) -> Tensor:
        """The micro-batch's share of the step's mean loss."""
        if isinstance(micro_batch, ReplayBatch):
            return self._replay_loss(model, micro_batch)
        args, device = self.args, self.args.device
        batch = self.scoring.batch(micro_batch.trees, self._pad_token_id).to(device)
        reference = torch.zeros(batch.targets.shape, device=device)
        if self.reference.reference.kind != "none":
            # First, while nothing is kept for a backward pass.
            reference = self.reference.token_logps(micro_batch.trees, device)
        scores = score_answers(
            model,
            batch,
            self.scoring,
            log_sum_sq=args.use_weighting,
            aux_loss=self.aux_loss_enabled,
        )
        answers = _Answers(scores.tokens, batch.answer_of, batch.lengths)
        self._check_step_zero(answers.tokens.logprobs, reference, mode)
        pairs = _Pairs.of(micro_batch, device)
        compared = self._compared(answers, reference, pairs, step.mean_chosen_length)
        losses = self._pair_losses(compared, answers, pairs)
        groups = self._group_losses(answers, reference, micro_batch)
        if not bool(torch.isfinite(losses.sum() + groups.sum())):
            self._stop_at(micro_batch, pairs, losses, answers)
        loss = ((losses * pairs.weight).sum() + groups.sum()) / step.n_rows
        if scores.aux_loss is not None:
            share = pairs.weight.sum() / step.n_rows
            loss = loss + self._aux_loss_weight * share * scores.aux_loss
        with torch.no_grad():
            self._measure(mode, compared, answers, pairs, scores, loss * step.n_rows)
        return loss

    def _replay_loss(self, model: Any, general: ReplayBatch) -> Tensor:
        """The share of general rows in the step's weighted mean NLL a token.

        A mixture of experts is balanced over the pairs alone.
        """
        batch = self.scoring.batch(general.trees, self._pad_token_id).to(self.args.device)
        nll = -score_answers(model, batch, self.scoring).tokens.logprobs
        if not bool(torch.isfinite(nll.detach()).all()):
            bad = batch.answer_of[~torch.isfinite(nll.detach())].unique().tolist()
            texts = [self._text_processor.decode(general.trees[i].answers[0][:20]) for i in bad[:3]]
            raise TrainingError(
                f"the loss of {len(bad)} general rows is not finite at step "
                f"{self.state.global_step + 1}; the weights are as they were after step "
                f"{self.state.global_step}. Lower the learning rate, or train in float32. The rows "
                f"begin with {', '.join(repr(text) for text in texts)}."
            )
        self._averages["train"].add("replay/nll", nll.detach(), torch.ones_like(nll))
        return self.args.replay_weight * nll.sum() / general.n_learned

    def _compared(
        self, answers: _Answers, reference: Tensor, pairs: _Pairs, mean_chosen_length: float
    ) -> PairBatch:
        """What the losses read: sums over answers, discounted where LD-DPO asks for it."""
        lengths = answers.lengths
        plain = answers.sums(answers.tokens.logprobs)
        if self.args.ld_alpha is None:
            policy, ref = plain, answers.sums(reference)
            sides = [x[i] for x in (policy, ref) for i in (pairs.chosen, pairs.rejected)]
        else:
            shared = torch.minimum(lengths[pairs.chosen], lengths[pairs.rejected])
            sides = [
                discounted_logps(rows, i, shared, self.args.ld_alpha)
                for rows in (answers.rows(answers.tokens.logprobs), answers.rows(reference))
                for i in (pairs.chosen, pairs.rejected)
            ]
        chosen, rejected, ref_chosen, ref_rejected = sides
        return PairBatch(
            chosen_logps=chosen,
            rejected_logps=rejected,
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
            chosen_lengths=lengths[pairs.chosen],
            rejected_lengths=lengths[pairs.rejected],
            p_chosen=pairs.p_chosen,
            chosen_nll=-plain[pairs.chosen],
            mean_chosen_length=mean_chosen_length,
        )

    def _pair_losses(self, compared: PairBatch, answers: _Answers, pairs: _Pairs) -> Tensor:
        names, weights = self.args.pairwise()
        if not names:
            return torch.zeros_like(pairs.weight)
        losses = pair_losses(names, weights, compared, self.args.loss_settings())
        if self.args.use_weighting:
            aligned = answers.tokens.logprobs.detach() - answers.tokens.log_sum_sq
            weight = wpo_weights(answers.sums(aligned), answers.lengths)
            losses = losses * weight[pairs.chosen] * weight[pairs.rejected]
        return losses

    def _group_losses(
        self, answers: _Answers, reference: Tensor, micro_batch: MicroBatch
    ) -> Tensor:
        """Losses of whole groups (G,), or an empty tensor when none is asked for."""
        names, weights = self.args.listwise()
        if not names:
            return answers.tokens.logprobs.new_zeros(0)
        groups = [(g.answers, g.scores, 1.0) for g in micro_batch.groups]
        paired = {g.row for g in micro_batch.groups}
        # A pair is a group of two with a better and a worse answer.
        groups += [
            ((p.chosen, p.rejected), (1.0, 0.0), p.weight)
            for p in micro_batch.pairs
            if p.row not in paired
        ]
        device = reference.device
        index, given, mask = ranked_groups([group[:2] for group in groups], device)
        ratios = answers.sums(answers.tokens.logprobs - reference)
        rewards = self.args.beta * ratios[index]
        losses: dict[str, Callable[[], Tensor]] = {
            "plackett_luce": lambda: plackett_luce_loss(rewards, mask),
            "infonca": lambda: infonca_loss(
                rewards, given, mask, temperature=self.args.infonca_temperature
            ),
            "nca": lambda: nca_loss(
                rewards, given, mask, temperature=self.args.infonca_temperature
            ),
        }
        total = torch.stack([w * losses[n]() for n, w in zip(names, weights, strict=True)]).sum(0)
        return total * torch.tensor([weight for _, _, weight in groups], device=device)

    def _check_step_zero(self, policy: Tensor, reference: Tensor, mode: str) -> None:
        """Before the first step the policy is the reference; anything else is another experiment."""
        if self._step_zero_checked or mode != "train":
            return
        self._step_zero_checked = True
        if self.state.global_step > 0 or not self.reference.reference.is_initial_policy:
            return
        half = self.args.bf16 or self.args.fp16 or self._multiplies_in_half
        low = half or next(self.model.parameters()).dtype.itemsize < 4
        allowed = (5e-2 if low else 1e-3) * (1.0 + policy.detach().abs())
        off = (policy.detach() - reference).abs()
        if bool((off > allowed).any()):
            raise TrainingError(
                f"before the first step policy and reference differ by up to {float(off.max()):.3g} "
                f"nats a token, so training would pull the model towards another one. The reference "
                f"is {self.reference.reference}. Usual causes: adapter weights whose initial update "
                "is not 0 (PiSSA, OLoRA, gaussian B), or dropout that is on. Give ref_model to "
                "choose the reference yourself."
            )

    def _stop_at(
        self, micro_batch: MicroBatch, pairs: _Pairs, losses: Tensor, answers: _Answers
    ) -> None:
        totals = answers.sums(answers.tokens.logprobs.detach())
        # The loss of a whole group is in no pair; what its answers got is.
        numbers = torch.stack((losses.detach(), totals[pairs.chosen], totals[pairs.rejected]))
        bad = (~numbers.isfinite()).any(0).nonzero()[:, 0].tolist()
        lines = []
        prompt_of = [t.prompt_ids for t in micro_batch.trees for _ in t.answers]
        for i in bad[:5]:
            pair = micro_batch.pairs[i]
            prompt = self._text_processor.decode(prompt_of[pair.chosen])
            lines.append(
                f"prompt {prompt[-80:]!r}: loss {losses[i].item():g}, log-probability of chosen "
                f"{totals[pair.chosen].item():g}, of rejected {totals[pair.rejected].item():g}"
            )
        listed = "\n  - ".join(["", *lines])
        raise TrainingError(
            f"the loss is not finite at step {self.state.global_step + 1}; the weights are as they "
            f"were after step {self.state.global_step}. Lower the learning rate, train in float32, "
            f"or leave out the rows:{listed}"
        )

    # --- Metrics ---------------------------------------------------------------------------------

    def _measure(
        self,
        mode: str,
        compared: PairBatch,
        answers: _Answers,
        pairs: _Pairs,
        scores: AnswerScores,
        loss: Tensor,
    ) -> None:
        add, weight = self._averages[mode].add, pairs.weight
        beta = self.args.beta
        chosen = beta * compared.chosen_logratios
        rejected = beta * compared.rejected_logratios
        add("rewards/chosen", chosen, weight)
        add("rewards/rejected", rejected, weight)
        add("rewards/accuracies", (chosen > rejected).double(), weight)
        add("rewards/margins", chosen - rejected, weight)
        add("logps/chosen", compared.chosen_logps, weight)
        add("logps/rejected", compared.rejected_logps, weight)
        lengths = answers.lengths.double()
        n_chosen, n_rejected = lengths[pairs.chosen], lengths[pairs.rejected]
        logits = answers.sums(answers.tokens.mean_logit)
        add("logits/chosen", logits[pairs.chosen] / n_chosen, weight * n_chosen)
        add("logits/rejected", logits[pairs.rejected] / n_rejected, weight * n_rejected)
        entropy = answers.sums(answers.tokens.entropy)
        both = entropy[pairs.chosen] + entropy[pairs.rejected]
        add("entropy", both / (n_chosen + n_rejected), weight * (n_chosen + n_rejected))
        right = answers.sums(answers.tokens.is_top1.float())
        add("mean_token_accuracy", right[pairs.chosen] / n_chosen, weight * n_chosen)
        if scores.aux_loss is not None:
            add("aux_loss", scores.aux_loss.expand(1), weight.sum()[None])
        if mode == "eval":
            rows = weight.sum()[None]
            add("loss", loss.expand(1) / rows, rows)

    def _check_evaluable(self, parts: Mapping[str, Any]) -> None:
        if not self.args.precompute_ref_log_probs:
            return
        reference = self.reference.reference
        for part in parts.values():
            if not isinstance(part, datasets.Dataset):
                raise ValueError(
                    "precompute_ref_log_probs=True is not supported with IterableDataset. Give a "
                    "datasets.Dataset, or set precompute_ref_log_probs=False."
                )
        at_hand = reference.shares_weights or reference.kind == "none"
        if self.state.global_step > 0 and not at_hand:
            raise ValueError(
                "Cannot compute reference log-probs for a dataset passed to evaluate() after "
                "training has started: the reference was released once it was precomputed. Give the "
                "dataset as eval_dataset when the trainer is made, or set "
                "precompute_ref_log_probs=False."
            )

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss of one batch, and for `compute_metrics` the logits of its rows, padded."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        if prediction_loss_only:
            return loss, None, None
        from prefopt.trees import AnswerTree, pad_trees

        rows = [
            AnswerTree(prompt, (answer,))
            for side in (0, 1)
            for row in batch_rows(inputs).rows
            for prompt, answer in row.sequences[side : side + 1]
        ]
        batch = pad_trees(rows, self._pad_token_id).to(self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
        return loss, logits, batch.input_ids

    # --- Saving ----------------------------------------------------------------------------------

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Write README.md into the output folder, with TRL's arguments.

        Args:
            model_name: its title; None takes the folder's name.
            dataset_name: on the Hub, of what was trained on.
            tags: beside "prefopt" and "dpo".
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        base = getattr(self.model.config, "_name_or_path", "") or ""
        given = [tags] if isinstance(tags, str) else list(tags or ())
        data = ModelCardData(
            base_model=base if base and not Path(base).is_dir() else None,
            datasets=dataset_name,
            library_name="peft" if hasattr(self.model, "peft_config") else "transformers",
            pipeline_tag="text-generation",
            tags=list(dict.fromkeys([*self._tag_names, *given])),
        )
        losses, beta = ", ".join(self.args.loss_type), self.args.beta
        card = f"""---
{data.to_yaml()}
---
# {model_name or folder.name}

{base or "A model"}, trained with DPO ([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290))
by [prefopt](https://pypi.org/project/prefopt/): loss {losses}, beta {beta:g}.
"""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = self.args.hub_model_id or Path(self.args.output_dir).name
        self.create_model_card(model_name=name.split("/")[-1])
        super()._save_checkpoint(model, trial)


class _Answers:
    """The scored tokens of a micro-batch, and how to add them up."""

    def __init__(self, tokens: TokenScores, answer_of: Tensor, lengths: Tensor) -> None:
        self.tokens, self.answer_of, self.lengths = tokens, answer_of, lengths

    def sums(self, values: Tensor) -> Tensor:
        """(R,) -> (A,)."""
        return sum_by_answer(values, self.answer_of, self.lengths.numel())

    def rows(self, values: Tensor) -> Tensor:
        """(R,) -> (A, L)."""
        return by_answer(values, self.answer_of, self.lengths)


@dataclass(frozen=True)
class _Pairs:
    chosen: Tensor  # (N,)
    rejected: Tensor  # (N,)
    p_chosen: Tensor  # (N,)
    weight: Tensor  # (N,)

    @classmethod
    def of(cls, batch: MicroBatch, device: torch.device) -> _Pairs:
        index = torch.tensor([p[:2] for p in batch.pairs], device=device)
        numbers = torch.tensor([p[2:4] for p in batch.pairs], device=device, dtype=torch.float32)
        return cls(index[:, 0], index[:, 1], numbers[:, 0], numbers[:, 1])
