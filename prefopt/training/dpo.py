"""Preference groups -> a LoRA adapter, by direct preference optimization.

    loss = -log sigmoid(r_chosen - r_rejected),   r = beta * log [pi(y|x) / pi_ref(y|x)]

(Rafailov et al. 2023, arXiv:2305.18290, eq. 7). The loop and the losses are `DPOTrainer`'s; this
module gives it token ids whose boundaries `prefopt.chat` decided, writes the adapter with its card
and log, and continues a killed run from its last whole checkpoint.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from prefopt.chat import tokenize_preference
from prefopt.data.rows import Source
from prefopt.errors import DataError, ModelError
from prefopt.launched import is_first_process, trains_in_bfloat16
from prefopt.models import (
    Device,
    DType,
    LanguageModel,
    LoRASettings,
    adapter_fingerprint,
    load_model,
    lora_config,
    model_fingerprint,
)
from prefopt.out_of_memory import without_memory_settings
from prefopt.training.card_parts import front_matter, general_data, notes_list
from prefopt.training.checkpoints import resume_point, whole_folder
from prefopt.training.health import HealthNote, TrainingPoint, diagnose, training_points
from prefopt.training.loop_settings import loop_arguments, loop_problems
from prefopt.training.token_rows import TokenRow
from prefopt.types import PreferenceGroup

logger = logging.getLogger(__name__)

LossName = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "cdpo", "gdpo",
    "simpo", "orpo", "dpop", "rdpo", "rao_kupper", "davidson", "nll",
]  # fmt: skip
"""The losses of `prefopt.losses`, repeated here so that settings can be read without torch."""


@dataclass(frozen=True)
class DPOSettings:
    """How DPO trains.

    Args:
        beta: strength of the pull to the reference; implicit rewards are beta times log-ratios.
        learning_rate: peak rate of the adapter; None takes 5e-5 below one billion parameters,
            2e-5 below four, 1e-5 below fifteen, 5e-6 above.
        epochs: passes over the pairs.
        batch_size: pairs an optimiser step.
        micro_batch_tokens: tokens that go through the model at once; None takes 512 on a CPU and
            8,192 on a GPU. It decides about memory and never about the result.
        max_length: tokens of prompt and answer together; longer answers are cut at the end.
        loss: one or several losses (`prefopt.losses` says what each is), added up with
            `loss_weights`.
        loss_weights: a weight for each loss; None weighs all 1.
        label_smoothing: for the losses that use it (robust, exo_pair, cdpo).
        soft_labels: what a pair's `p_chosen` below 1 does: the loss expected under it ("expected"),
            the margin scaled by it ("geometric"), the unbiased estimate for flipped labels
            ("robust"), or nothing ("ignore").
        ld_alpha: LD-DPO (Liu et al. 2024, arXiv:2409.06411): weight in [0, 1] of the tokens by which
            the longer answer of a pair exceeds the shorter; None is ordinary DPO, as is 1.
        replay: general data against forgetting: a file or Hub id of texts, answers to prompts or
            conversations (see `prefopt.data.general.load_general`), or "own_answers" for what the
            model itself answers to built-in prompts before it is trained. None replays nothing.
        replay_share: the share of general rows among all rows of a step, in (0, 1), where there is
            general data: the nearest whole number of rows, and at least one.
        replay_weight: of their mean negative log-likelihood a token beside the loss of the pairs; 0
            is no replay.
        reference: what an adapter that is trained further (`lora.continue_from`) is compared with: a
            frozen copy of it at the "start", or the "base" model under it, which stays the same over
            rounds of iterative DPO.
        warmup: share of the steps over which the rate rises from 0.
        schedule: how the rate falls after that.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        gradient_checkpointing: recompute activations in the backward pass; less memory, slower.
        checkpoint_every: optimiser steps between checkpoints; None takes a tenth of the run.
        seed: of the adapter's initial weights and the order of the pairs.
        report_to: trackers that transformers knows ("tensorboard", "wandb", "trackio").
    """

    beta: float = 0.1
    learning_rate: float | None = None
    epochs: float = 1.0
    batch_size: int = 16
    micro_batch_tokens: int | None = None
    max_length: int = 1024
    loss: list[LossName] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    label_smoothing: float = 0.0
    soft_labels: Literal["expected", "geometric", "robust", "ignore"] = "expected"
    ld_alpha: float | None = None
    replay: str | None = None
    replay_share: float = 0.1
    replay_weight: float = 1.0
    reference: Literal["start", "base"] = "start"
    warmup: float = 0.1
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    checkpoint_every: int | None = None
    seed: int = 0
    report_to: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        problems = loop_problems(self)
        if not self.beta > 0:
            problems.append(f"beta must be positive, got {self.beta}")
        if not self.loss:
            problems.append("loss needs at least one name")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss):
            problems.append(
                f"loss_weights needs one weight for each of the {len(self.loss)} losses, got "
                f"{len(self.loss_weights)}"
            )
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            problems.append(f"ld_alpha must be in [0, 1], got {self.ld_alpha}")
        if not 0.0 < self.replay_share < 1.0:
            problems.append(f"replay_share must be in (0, 1), got {self.replay_share}")
        if not 0.0 <= self.replay_weight < math.inf:
            problems.append(
                f"replay_weight must be finite and not negative, got {self.replay_weight}"
            )
        if problems:
            raise ValueError("DPO settings: " + "; ".join(problems) + ".")


class DPOResult(msgspec.Struct, frozen=True, kw_only=True):
    """A finished training: where the adapter is and what the log says.

    `n_replay` is how many general rows there were to replay, and `n_replay_cut` how many of them were
    cut at `max_length`.
    """

    adapter: Path
    reference: str
    n_pairs: int
    n_parameters_trained: int
    learning_rate: float
    points: tuple[TrainingPoint, ...]
    health: tuple[HealthNote, ...]
    n_replay: int = 0
    n_replay_cut: int = 0


def default_learning_rate(n_parameters: int) -> float:
    """The peak rate for LoRA DPO by size of the base model (its parameters, not the adapter's)."""
    for below, rate in ((1e9, 5e-5), (4e9, 2e-5), (15e9, 1e-5)):
        if n_parameters < below:
            return rate
    return 5e-6


def train_dpo(
    groups: Sequence[PreferenceGroup],
    model: str | LanguageModel,
    out: str | Path,
    *,
    replay: Source | None = None,
    settings: DPOSettings | None = None,
    lora: LoRASettings | None = None,
    device: Device = "auto",
    dtype: DType = "auto",
    checkpoints: str | Path | None = None,
    progress: bool = True,
) -> DPOResult:
    """Train a LoRA adapter on preferences and save it in `out`.

    The reference is the base model (adapter off), or, when `lora.continue_from` is given, a frozen
    copy of that adapter as it was before training, unless `settings.reference` is "base". Every
    preference of every group is one pair.

    Args:
        groups: preferences, as `build_preferences` or `load_preferences` return them.
        model: a name, or a loaded model (which gets the adapter attached).
        out: folder for the adapter, its model card and `training_log.jsonl`.
        replay: general data that no name in `settings.replay` can say, such as rows.
        settings: see `DPOSettings`.
        lora: see `LoRASettings`.
        device: where to train when `model` is a name.
        dtype: of the base weights when `model` is a name; the adapter is float32.
        checkpoints: folder for checkpoints, default `<out>.checkpoints`. A call with the same
            arguments continues from the last whole one and ends with the same weights.
        progress: show a bar with pairs a second, loss and time left.

    Raises:
        DataError: no pairs, pairs or general rows with nothing to learn from, or general rows on which
            forgetting is measured.
        ValueError: general data in both places.
        TrainingError: policy and reference differ at step 0, or the loss is no longer finite.
        ModelError: the model, adapter or device cannot be used.
    """
    settings, lora, out = settings or DPOSettings(), lora or LoRASettings(), Path(out)
    if replay is not None and settings.replay is not None:
        raise ValueError("general data is given twice, as replay and as settings.replay.")
    replay = settings.replay if replay is None else replay
    checkpoint_dir = Path(checkpoints) if checkpoints else out.with_name(out.name + ".checkpoints")
    if lora.continue_from is None or settings.reference == "base":
        reference = "the base model (adapter off)"
    else:
        reference = f"a frozen copy of the adapter {lora.continue_from}"
    if isinstance(model, LanguageModel):
        loaded = model
        if lora.continue_from is not None and not hasattr(loaded.model, "peft_config"):
            raise ModelError(
                "lora.continue_from needs the model by name, so that the adapter can be loaded for "
                "training; got a loaded model without an adapter."
            )
    else:
        loaded = load_model(
            model, adapter=lora.continue_from, device=device, dtype=dtype, trainable=True,
            quantization=lora.quantization,
        )  # fmt: skip
    rows = _tokenized_rows(groups, loaded.tokenizer, settings.max_length)
    own_answers = out.with_name(out.name + ".own_answers")

    from prefopt.training.replay import general_rows
    from prefopt.training.sharding import n_trained

    general = general_rows(
        replay,
        loaded,
        steps=math.ceil(settings.epochs * math.ceil(len(rows) / settings.batch_size)),
        batch_size=settings.batch_size,
        share=settings.replay_share,
        weight=settings.replay_weight,
        max_length=settings.max_length,
        seed=settings.seed,
        partial=own_answers,
        progress=progress,
    )
    identity = [
        model_fingerprint(loaded.base),
        rows,
        general,
        without_memory_settings(msgspec.to_builtins(settings)),
        msgspec.to_builtins(lora),
        lora.continue_from and adapter_fingerprint(lora.continue_from),
    ]
    trainer = _make_trainer(loaded, rows, general, settings, lora, checkpoint_dir, progress)
    logger.info("training on %d pairs, and %d general rows", len(rows), len(general))

    resume = resume_point(trainer.accelerator, checkpoint_dir, identity)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)

    points = training_points(trainer.state.log_history)
    trained = n_trained(trainer.model)
    health = diagnose(
        points,
        beta=settings.beta,
        words_chosen=_mean_words(groups, 0),
        words_rejected=_mean_words(groups, 1),
    )
    result = DPOResult(
        adapter=out,
        reference=reference,
        n_pairs=len(rows),
        n_parameters_trained=trained,
        learning_rate=trainer.args.learning_rate,
        points=points,
        health=health,
        n_replay=len(general),
        n_replay_cut=sum(row.is_cut for row in general),
    )
    weights = trainer.whole_weights()
    if is_first_process():
        _save(trainer.model, weights, loaded, result, settings, lora)
        shutil.rmtree(checkpoint_dir, ignore_errors=True)
        own_answers.unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()
    return result


def load_training_log(adapter: str | Path) -> tuple[TrainingPoint, ...]:
    """The logged steps that `train_dpo` wrote beside an adapter."""
    from prefopt.data.records import read_records

    return tuple(read_records(Path(adapter) / "training_log.jsonl", TrainingPoint))


def _tokenized_rows(
    groups: Sequence[PreferenceGroup], tokenizer: Any, max_length: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for group in groups:
        for chosen, rejected, preference in group.pairs():
            ids = tokenize_preference(tokenizer, chosen, rejected)
            room = max_length - len(ids.prompt_ids)
            where = f"pair {len(rows) + len(problems) + 1} ({group.prompt.text[:50]!r})"
            if room < 1:
                problems.append(f"{where}: the prompt alone has {len(ids.prompt_ids)} tokens")
            elif ids.chosen_ids[:room] == ids.rejected_ids[:room]:
                problems.append(f"{where}: both answers are the same within max_length")
            else:
                rows.append(
                    {
                        "prompt_ids": list(ids.prompt_ids),
                        "chosen_ids": list(ids.chosen_ids[:room]),
                        "rejected_ids": list(ids.rejected_ids[:room]),
                        "p_chosen": preference.p_chosen,
                    }
                )
    if problems:
        raise DataError(
            f"{len(problems)} pair(s) have nothing to learn from at max_length={max_length}. Raise "
            "max_length or leave them out; the preflight report lists every kind of problem.",
            problems,
        )
    if not rows:
        raise DataError("there are no preference pairs to train on.")
    return rows


def _make_trainer(
    loaded: LanguageModel,
    rows: list[dict[str, Any]],
    general: list[TokenRow],
    settings: DPOSettings,
    lora: LoRASettings,
    checkpoint_dir: Path,
    progress: bool,
) -> Any:
    import datasets

    from prefopt.training.dpo_trainer import DPOConfig, DPOTrainer
    from prefopt.training.progress_bar import ProgressBar

    n_parameters = sum(p.numel() for p in loaded.model.parameters())
    args = DPOConfig(
        beta=settings.beta,
        loss_type=list(settings.loss),
        loss_weights=settings.loss_weights,
        label_smoothing=settings.label_smoothing,
        ld_alpha=settings.ld_alpha,
        adapter_reference=settings.reference,
        replay_share=settings.replay_share,
        replay_weight=settings.replay_weight,
        soft_labels=settings.soft_labels,
        micro_batch_tokens=settings.micro_batch_tokens,
        max_length=settings.max_length,
        **loop_arguments(
            settings,
            len(rows),
            checkpoint_dir,
            learning_rate=default_learning_rate(n_parameters),
            on_cpu=loaded.device.type == "cpu",
            bf16=trains_in_bfloat16(loaded.model),
        ),
    )
    is_peft = hasattr(loaded.model, "peft_config")
    trainer = DPOTrainer(
        model=loaded.model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=loaded.tokenizer,
        peft_config=None if is_peft else lora_config(lora),
        replay_dataset=general or None,
    )
    ProgressBar(description="training (DPO)", show=progress).attach(trainer)
    return trainer


def _mean_words(groups: Sequence[PreferenceGroup], side: Literal[0, 1]) -> float:
    lengths = [len(pair[side].text.split()) for group in groups for pair in group.pairs()]
    return sum(lengths) / len(lengths)


def _save(
    model: Any,
    weights: Any,
    loaded: LanguageModel,
    result: DPOResult,
    settings: DPOSettings,
    lora: LoRASettings,
) -> None:
    """Write the adapter folder, whole or not at all."""
    from prefopt.data.records import write_bytes, write_records

    with whole_folder(result.adapter) as folder:
        model.save_pretrained(folder, selected_adapters=["default"], state_dict=weights)
        loaded.tokenizer.save_pretrained(folder)
        write_records(folder / "training_log.jsonl", result.points)
        card = _model_card(loaded.base, result, settings, lora)
        write_bytes(folder / "README.md", card.encode())


def _model_card(base: str, result: DPOResult, settings: DPOSettings, lora: LoRASettings) -> str:
    last = result.points[-1]
    adapter = (
        f"continued from {lora.continue_from}"
        if lora.continue_from
        else f"r={lora.r}, alpha={lora.alpha:g}, targets {lora.target_modules}"
    )
    general = general_data(result.n_replay, settings.replay_share, settings.replay_weight)
    head = front_matter(
        base, library="peft", task="text-generation", tags=["prefopt", "dpo", "lora"]
    )
    return f"""{head}
# A LoRA adapter for {base}, tuned with DPO

Trained with [prefopt](https://pypi.org/project/prefopt/) on {result.n_pairs} preference pairs.

| setting | value |
|---|---|
| reference | {result.reference} |
| loss | {", ".join(settings.loss)}, beta {settings.beta:g} |
| adapter | {adapter}; {result.n_parameters_trained:,} parameters |
| learning rate | {result.learning_rate:g}, {settings.schedule}, warm-up {settings.warmup:g} |
| batch | {settings.batch_size} pairs, {settings.epochs:g} epoch(s), {last.step} steps |
| general data | {general} |
| seed | {settings.seed} |

Last logged step: loss {last.loss:.4f}, margin {last.margin:.3f}, accuracy {last.accuracy:.2f}.

## What the log says

{notes_list(result.health)}

## Use

```python
from prefopt import load_model

model = load_model({base!r}, adapter="path/to/this/folder")
```
"""
