"""Preference rows -> optimiser steps on tree batches: the loop that trainers of preferences share.

One optimiser step takes all its rows at once, merges those that share a prompt, distributes the trees
over micro-batches by tokens, and divides by the true counts of the whole step, so the gradient is
the same for every split over micro-batches, accumulation steps and processes. A subclass gives the
loss of a micro-batch; the loop is `transformers.Trainer`'s.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
import transformers
from accelerate.utils import gather_object
from torch import Tensor

from prefopt.errors import TrainingError
from prefopt.out_of_memory import is_out_of_memory, memory_words
from prefopt.training.answer_callback import AnswerCallback
from prefopt.training.preference_rows import (
    TOKEN_COLUMNS,
    MicroBatch,
    PreferenceRow,
    PreferenceRows,
    PromptGroupSampler,
    RowCollator,
    plan_micro_batches,
    rows_from_padded,
    tokenize_preferences,
    usable_rows,
)
from prefopt.training.progress_bar import ProgressBar
from prefopt.training.sharding import counted_once, most, pass_of_step
from prefopt.training.tree_model import (
    Scoring,
    add_answer_scoring,
    base_model,
    choose_scoring,
    n_parameters,
    tree_attention,
)
from prefopt.training.whole_checkpoints import WholeCheckpoints
from prefopt.trees import default_micro_batch_tokens

# So many rows of a prompt may follow each other in any case; of more, a quarter of a step at most.
_FEW_OF_A_PROMPT = 8


@dataclass(frozen=True)
class PlannedBatch:
    """The micro-batches of one call of `training_step`, and the counts of the whole optimiser step.

    `spare` is one that a process runs for nothing, where others have more than it has.
    """

    micro_batches: tuple[MicroBatch, ...]
    n_rows: float
    mean_chosen_length: float
    n_tokens: int
    spare: MicroBatch | None = None


class Averages:
    """Weighted sums of metrics, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Add values (N,) with their weights (N,)."""
        pair = torch.stack(((values.double() * weights).sum(), weights.double().sum()))
        self._sums.setdefault(name, []).append(pair)

    def read(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes; the sums start anew."""
        names = sorted(self._sums)
        if accelerator.num_processes > 1:
            # Of the last rows of a data set a process may have had none, and so nothing to measure.
            names = sorted(set(gather_object(names)))
        if not names:
            return {}
        nothing = [torch.zeros(2, dtype=torch.float64, device=accelerator.device)]
        sums = torch.stack([torch.stack(self._sums.get(name, nothing)).sum(0) for name in names])
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="sum")
        self._sums.clear()
        return {
            name: float(total / count) if count else 0.0
            for name, (total, count) in zip(names, sums.tolist(), strict=True)
        }


class _Unread(Averages):
    """Of passes that only keep step with other processes."""

    def add(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Nothing."""


class TreeTrainer(WholeCheckpoints):
    """The loop; `_micro_batch_loss` is a subclass's, which calls `_set_up_scoring` once it is made.

    Args:
        tokenizer: of the rows' texts.
        row_options: how rows are read, see `read_row`.
        arguments: as for `transformers.Trainer`.
    """

    train_dataset: Any
    eval_dataset: Any
    _signature_columns: Any

    def __init__(self, *, tokenizer: Any, row_options: dict[str, Any], **arguments: Any) -> None:
        self._row_options, self._text_processor = row_options, tokenizer
        args, eval_dataset = arguments["args"], arguments["eval_dataset"]
        # Every process collates its own rows: what the collator makes is no tensor to send around.
        args.accelerator_config.dispatch_batches = False
        # Buffers are constants of the architecture. Sending them around before a forward pass would
        # have processes wait for each other that have unlike numbers of micro-batches.
        if args.ddp_broadcast_buffers is None:
            args.ddp_broadcast_buffers = False
        arguments["train_dataset"] = self._prepared(arguments["train_dataset"], "train", args)
        if isinstance(eval_dataset, Mapping):
            arguments["eval_dataset"] = {
                name: self._prepared(part, name, args) for name, part in eval_dataset.items()
            }
        elif eval_dataset is not None:
            arguments["eval_dataset"] = self._prepared(eval_dataset, "eval", args)
        arguments["data_collator"] = arguments["data_collator"] or RowCollator(**row_options)
        super().__init__(**arguments)
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs are visible to one process, which nn.DataParallel would use. Start with "
                "accelerate launch or torchrun, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        for callback in tuple(self.callback_handler.callbacks):
            if isinstance(callback, ProgressBar):
                callback.attach(self)
        # What training_step returns is the share of the whole step's loss; nothing divides it again.
        self.loss_is_scaled_for_ga = True
        self._averages = {"train": Averages(), "eval": Averages(), "spare": _Unread()}
        self._offload: Any = contextlib.nullcontext()
        self._set_up_sharding()
        self._scoring: Scoring | None = None
        self._rows_of_step: list[PreferenceRow] = []

    @property
    def _language_model(self) -> Any:
        """The model that attends along trees."""
        return self.model

    @property
    def scoring(self) -> Scoring:
        """How the model is scored; known from the first step on where its weights are parted."""
        if self._scoring is None:
            raise RuntimeError("the model's weights are parted, and have not been looked at yet.")
        return self._scoring

    @scoring.setter
    def scoring(self, scoring: Scoring) -> None:
        self._scoring = scoring

    def _set_up_scoring(self) -> None:
        """Find out how the model is scored: now, or once its weights are where they will be."""
        if self.sharding.parameters:
            # Before anything wraps the forward: precision is the wrapper's matter.
            add_answer_scoring(base_model(self._language_model))
        else:
            self._settle()

    def _settle(self) -> None:
        self._scoring = choose_scoring(
            self._language_model,
            compiled=self.args.torch_compile,
            low_precision=self._multiplies_in_half,
        )

    @property
    def _multiplies_in_half(self) -> bool:
        """Whether FSDP multiplies float32 weights in half precision, which no dtype shows."""
        return self.sharding.parameters and self.args.mixed_precision != "no"

    def _prepared(self, dataset: Any, name: str, args: Any) -> Any:
        if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
            raise TypeError(
                f"the {name} dataset must be a datasets.Dataset or IterableDataset, got "
                f"{type(dataset).__name__}. datasets.Dataset.from_list makes one from a list of rows."
            )
        tokenized = tokenize_preferences(
            dataset, self._text_processor, num_proc=args.dataset_num_proc, name=name
        )
        return usable_rows(tokenized, name=name, **self._row_options)

    @property
    def _pad_token_id(self) -> int:
        return int(self._text_processor.pad_token_id or 0)

    @property
    def _budget(self) -> int:
        default = default_micro_batch_tokens(self.args.device.type)
        return int(self.args.micro_batch_tokens or default)

    def _plan(self, rows: Sequence[PreferenceRow]) -> list[MicroBatch]:
        return plan_micro_batches(rows, self._budget)

    # --- Batches ---------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(TOKEN_COLUMNS)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if (
            not isinstance(dataset, datasets.Dataset)
            or self.args.train_sampling_strategy != "random"
        ):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        prompts: Sequence[Any] = range(len(dataset))
        if self.args.group_by_prompt:
            prompts = [tuple(ids) for ids in dataset["prompt_ids"]]
        batch = self._train_batch_size * self.args.gradient_accumulation_steps
        limit = max(_FEW_OF_A_PROMPT, batch * self.args.world_size // 4)
        return PromptGroupSampler(prompts, seed, limit)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[PlannedBatch], None]:
        """All rows of one optimiser step, merged and distributed anew over its calls."""
        batches = []
        for _ in range(num_batches):
            with contextlib.suppress(StopIteration):
                batches.append(next(epoch_iterator))
        if not batches:
            return [], None
        read = [batch_rows(batch).rows for batch in batches]
        last = counted_once(
            self.accelerator, read[-1], self._train_batch_size, self._rows_of_training
        )
        rows = [row for part in (*read[:-1], last) for row in part]
        self._rows_of_step = rows
        plan = self._plan(rows)
        spare = smallest(plan or self._plan(read[-1]))
        n_rows = float(len(rows))
        n_tokens: float = sum(row.n_tokens for row in rows)
        chosen = sum(
            pair.weight * len(row.sequences[pair.chosen].answer_ids)
            for row in rows
            for pair in row.pairs
        )
        if self.accelerator.num_processes > 1:
            # All counts here, where every process is once a step: the calls that follow may do
            # nothing on one process and something on another.
            counts = torch.tensor([n_rows, chosen, n_tokens], dtype=torch.float64, device=device)
            n_rows, chosen, n_tokens = self.accelerator.reduce(counts, reduction="sum").tolist()
        # The last call should not be empty: it is the one in which processes add up their gradients.
        shares = [plan[len(plan) * i // len(batches) : len(plan) * (i + 1) // len(batches)]
                  for i in range(len(batches))]  # fmt: skip
        if plan and not shares[-1]:
            shares[-1] = [next(share for share in reversed(shares) if share).pop()]
        return [
            PlannedBatch(
                tuple(share), n_rows, chosen / n_rows, int(n_tokens) if i == 0 else 0, spare
            )
            for i, share in enumerate(shares)
        ], None

    def _plan_alone(self, inputs: Any) -> PlannedBatch:
        """A batch that is a whole step by itself, as in evaluation."""
        if isinstance(inputs, PlannedBatch):
            return inputs
        given = batch_rows(inputs).rows
        rows = counted_once(self.accelerator, given, self.args.eval_batch_size)
        if not rows:
            return PlannedBatch((), 1.0, 0.0, 0, smallest(self._plan(given)))
        chosen = sum(
            pair.weight * len(row.sequences[pair.chosen].answer_ids)
            for row in rows
            for pair in row.pairs
        )
        plan = self._plan(rows)
        n_tokens = sum(row.n_tokens for row in rows)
        mean_length = chosen / len(rows)
        return PlannedBatch(tuple(plan), float(len(rows)), mean_length, n_tokens, smallest(plan))

    # --- Loss ------------------------------------------------------------------------------------

    def _micro_batch_loss(
        self, model: Any, micro_batch: MicroBatch, step: PlannedBatch, mode: str
    ) -> Tensor:
        """The micro-batch's share of the step's mean loss."""
        raise NotImplementedError

    def training_step(
        self, model: Any, inputs: PlannedBatch, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of some micro-batches; the gradients of the step add up to its mean.

        Raises:
            TrainingError: the memory does not suffice; says which setting does, measured.
        """
        try:
            return self._forward_and_backward(model, inputs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = memory_words(error)
        # Only here, where nothing holds the tensors of what failed.
        raise TrainingError(self._what_fits(model, inputs, said))

    def _what_fits(self, model: Any, inputs: PlannedBatch, said: str) -> str:
        """What to say of a step that did not fit the memory: the setting with which it does."""
        step, budget = self.state.global_step + 1, self._budget
        problem = (
            f"out of memory at step {step} ({said}), with micro_batch_tokens {budget:,} on "
            f"{self.args.device.type}."
        )
        longest = max((tree.n_tokens for b in inputs.micro_batches for tree in b.trees), default=1)
        most = max((sum(t.n_tokens for t in b.trees) for b in inputs.micro_batches), default=budget)
        again = (
            "It decides about memory and not about the result: run again with it, and training goes "
            "on from its last checkpoint."
        )
        if self.accelerator.num_processes > 1 or not self._rows_of_step:
            return f"{problem} Lower micro_batch_tokens. {again}"
        tried = min(budget, most)
        while tried > longest:
            tried = max(tried // 2, longest)
            if self._fits(model, inputs, tried):
                return (
                    f"{problem} Measured: this step fits with micro_batch_tokens {tried}. {again}"
                )
        cannot = f"its longest row alone has {longest:,} tokens, which go through the model at once"
        if not self.args.gradient_checkpointing and hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if self._fits(model, inputs, longest):
                return (
                    f"{problem} No smaller micro-batch fits: {cannot}. Measured: the step fits with "
                    f"gradient_checkpointing true and micro_batch_tokens {longest}. {again}"
                )
        return (
            f"{problem} Nothing smaller fits, {cannot}. Lower max_length, take a smaller model or "
            "adapter, or hold the base model in 4 bits; `prefopt plan` says what fits where."
        )

    def _fits(self, model: Any, inputs: PlannedBatch, budget: int) -> bool:
        """Whether the step's largest micro-batch goes through at this size, twice in a row."""
        given, self.args.micro_batch_tokens = self.args.micro_batch_tokens, budget
        try:
            self._free(model)
            plan = self._plan(self._rows_of_step)
            largest = max(plan, key=lambda m: sum(tree.n_tokens for tree in m.trees))
            for _ in range(2):  # the second time the gradients are there already
                self._before_passes([largest])
                with tree_attention(self._language_model, self.scoring):
                    loss = self._micro_batch_loss(model, largest, inputs, "spare")
                    self.accelerator.backward(loss)
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self.args.micro_batch_tokens = given
            self._free(model)

    @staticmethod
    def _free(model: Any) -> None:
        model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _forward_and_backward(self, model: Any, inputs: PlannedBatch) -> Tensor:
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        if self._scoring is None:
            self._settle()
        total = torch.zeros((), device=self.args.device)
        processes, options = self.accelerator.num_processes, dict[str, Any]()
        if (
            self.accelerator.distributed_type
            == transformers.training_args.DistributedType.DEEPSPEED
        ):
            options["scale_wrt_gas"] = False
        # Where gradients are added up only once, it is in the last call, which nobody may miss.
        least = int(self.accelerator.sync_gradients)
        passes = self._passes(inputs, "train", together=self.sharding.gradients, least=least)
        for index, (micro_batch, mode) in enumerate(passes):
            last = index == len(passes) - 1
            with (
                pass_of_step(self.accelerator, model, self.sharding, last=last),
                self._offload,
                tree_attention(self._language_model, self.scoring),
            ):
                loss = self._micro_batch_loss(model, micro_batch, inputs, mode)
                # Processes average their gradients; the step's mean is over the rows of all of them.
                share = processes if mode == "train" else 0.0
                self.accelerator.backward(loss * share, **options)
            if mode == "train":
                total += loss.detach()
        return total * processes

    def _passes(
        self, step: PlannedBatch, mode: str, *, together: bool, least: int = 0
    ) -> list[tuple[MicroBatch, str]]:
        """A step's micro-batches, and spare ones up to as many as any process has."""
        n = max(least, len(step.micro_batches))
        if together:
            n = most(self.accelerator, n)
        passes = [(micro_batch, mode) for micro_batch in step.micro_batches]
        if len(passes) < n:
            spare = step.spare or smallest(step.micro_batches)
            passes += [(spare, "spare")] * (n - len(passes))
        self._before_passes([micro_batch for micro_batch, _ in passes])
        return passes

    def _before_passes(self, micro_batches: Sequence[MicroBatch]) -> None:
        """What a subclass computes for all micro-batches before the first goes through the model."""

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss of a batch of rows."""
        if self._scoring is None:
            self._settle()
        planned = self._plan_alone(inputs)
        mode = "train" if model.training else "eval"
        passes = self._passes(planned, mode, together=self.sharding.parameters)
        with tree_attention(self._language_model, self.scoring):
            losses = [
                self._micro_batch_loss(model, micro_batch, planned, kind)
                * (0.0 if kind == "spare" else 1.0)
                for micro_batch, kind in passes
            ]
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=self.args.device)
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last call to what the loop logs."""
        if self.model.training:
            logs.update(self._averages["train"].read(self.accelerator))
            logs["num_tokens"] = float(self.state.num_input_tokens_seen)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, AnswerCallback):  # what it measures must be there in time
                callback.before_log(self, logs)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `transformers.Trainer.evaluate`; a dataset given here is prepared like the others."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            if isinstance(eval_dataset, Mapping):
                parts = {n: self._prepared(d, n, self.args) for n, d in eval_dataset.items()}
            else:
                parts = {"": self._prepared(eval_dataset, "eval", self.args)}
            self._check_evaluable(parts)
            metrics: dict[str, float] = {}
            for name, part in parts.items():
                prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
                metrics.update(super().evaluate(part, ignore_keys, prefix))
            return metrics
        found: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return found

    def _check_evaluable(self, parts: Mapping[str, Any]) -> None:
        """Raise ValueError where data sets given to `evaluate` cannot be used."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class, with means over the true counts."""
        self._averages["eval"] = Averages()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        for name, value in self._averages["eval"].read(self.accelerator).items():
            output.metrics[f"{prefix}_{name}"] = value
        output.metrics[f"{prefix}_num_tokens"] = float(self.state.num_input_tokens_seen)
        return output

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss of one batch; its metrics are `_micro_batch_loss`'s."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, inputs)
        return loss, None, None

    # --- What the loop asks of a batch -----------------------------------------------------------

    def _track_num_input_tokens(self, inputs: PlannedBatch) -> None:
        self.state.num_input_tokens_seen += inputs.n_tokens  # saved, so a resumed count goes on

    def floating_point_ops(self, inputs: PlannedBatch) -> int:
        """Six a parameter and token fed, the usual estimate."""
        fed = sum(tree.n_tokens for batch in inputs.micro_batches for tree in batch.trees)
        return 6 * fed * n_parameters(base_model(self._language_model))


def smallest(micro_batches: Sequence[MicroBatch]) -> MicroBatch:
    """The one that feeds the fewest tokens."""
    return min(micro_batches, key=lambda m: sum(tree.n_tokens for tree in m.trees))


def batch_rows(batch: Any) -> PreferenceRows:
    """The rows of a batch, whichever collator made it."""
    return batch if isinstance(batch, PreferenceRows) else rows_from_padded(batch)


def ranked_groups(
    groups: Sequence[tuple[Sequence[int], Sequence[float]]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of answers with their scores, best first, as what losses on whole groups take.

    Returns:
        the answers' indices, their scores, and True where there is an answer; each (G, K).
    """
    width = max(len(members) for members, _ in groups)
    index = torch.zeros(len(groups), width, dtype=torch.long)
    given = torch.zeros(len(groups), width)
    mask = torch.zeros(len(groups), width, dtype=torch.bool)
    for row, (members, scores) in enumerate(groups):
        order = sorted(range(len(members)), key=lambda i: -scores[i])
        index[row, : len(members)] = torch.tensor([members[i] for i in order])
        given[row, : len(members)] = torch.tensor([scores[i] for i in order])
        mask[row, : len(members)] = True
    return index.to(device), given.to(device), mask.to(device)
