"""Demonstrations -> a model that answers like them, by supervised fine-tuning.

    loss = -1/N sum_i sum_t log pi(y_i,t | x_i, y_i,<t)

over the N learned tokens of an optimiser step: those of the answers, their end token included, and
none of the prompts (Ouyang et al. 2022, arXiv:2203.02155, step 1). General data may be replayed
against forgetting (Rolnick et al. 2019, arXiv:1811.11682). Loop, adapter and log are TRL's; see
`sft_trainer` for what is not.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from prefopt.data.demonstrations import Demonstration, load_demonstrations, mix_replay
from prefopt.data.general import OWN_ANSWERS, refuse_measured
from prefopt.data.rows import Source
from prefopt.errors import DataError, ModelError
from prefopt.launched import (
    is_first_process,
    refuse_processes,
    shards,
    trains_in_bfloat16,
)
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
from prefopt.training.card_parts import front_matter, notes_list
from prefopt.training.checkpoints import resume_point, whole_folder
from prefopt.training.health import (
    HealthNote,
    by_level,
    diagnose,
    optional_figure,
    training_points,
)
from prefopt.training.loop_settings import loop_arguments, loop_problems
from prefopt.training.token_rows import TokenRow, tokenize_demonstrations

logger = logging.getLogger(__name__)

# Share of tokens foreseen from which on there is next to nothing left to learn but by heart.
_BY_HEART = 0.97


@dataclass(frozen=True)
class SFTSettings:
    """How demonstrations are learned.

    Args:
        tune: "lora" trains an adapter, "full" all weights of the model.
        learning_rate: peak rate; None takes 2e-4 below four billion parameters and 1e-4 above for
            an adapter, a tenth of that for all weights (Schulman et al. 2025, "LoRA Without Regret").
        epochs: passes over the rows.
        batch_size: rows an optimiser step.
        micro_batch_tokens: tokens that go through the model at once; None takes 512 on a CPU and
            8,192 on a GPU. It decides about memory and never about the result.
        max_length: tokens of prompt and answer together; longer ones are cut at the end and then
            learned without an end token.
        replay_share: the share of general rows among all rows, in [0, 1), where general data is
            given: 0.1 makes 10 of 100 rows general. Of the learned tokens they may be another share,
            which `SFTResult` tells.
        warmup: share of the steps over which the rate rises from 0.
        schedule: how the rate falls after that.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        gradient_checkpointing: recompute activations in the backward pass; less memory, slower.
        checkpoint_every: optimiser steps between checkpoints; None takes a tenth of the run.
        seed: of the adapter's initial weights, the draw of general rows and the order of all.
        report_to: trackers that transformers knows ("tensorboard", "wandb", "trackio").
    """

    tune: Literal["lora", "full"] = "lora"
    learning_rate: float | None = None
    epochs: float = 1.0
    batch_size: int = 16
    micro_batch_tokens: int | None = None
    max_length: int = 1024
    replay_share: float = 0.1
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
        if self.tune not in ("lora", "full"):
            problems.append(f"tune must be lora or full, got {self.tune!r}")
        if not 0.0 <= self.replay_share < 1.0:
            problems.append(f"replay_share must be in [0, 1), got {self.replay_share}")
        if problems:
            raise ValueError("SFT settings: " + "; ".join(problems) + ".")


class SFTPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One logged step: loss and entropy in nats a learned token, `accuracy` the share foreseen."""

    step: int
    epoch: float
    loss: float
    accuracy: float
    entropy: float
    learning_rate: float
    grad_norm: float | None


class SFTResult(msgspec.Struct, frozen=True, kw_only=True):
    """A finished training.

    `folder` holds the adapter, or with `tune="full"` the whole model. `n_demonstrations` and
    `n_replay` are rows, `n_tokens` the learned tokens of an epoch and `replay_token_share` how many
    of them are general ones. `n_cut` rows were cut at `max_length`.
    """

    folder: Path
    n_demonstrations: int
    n_replay: int
    n_tokens: int
    replay_token_share: float
    n_cut: int
    n_parameters_trained: int
    learning_rate: float
    points: tuple[SFTPoint, ...]
    health: tuple[HealthNote, ...]


def default_sft_learning_rate(n_parameters: int, tune: Literal["lora", "full"]) -> float:
    """The peak rate by size of the base model, for an adapter or for all weights."""
    rate = 2e-4 if n_parameters < 4e9 else 1e-4
    return rate if tune == "lora" else rate / 10


def train_sft(
    rows: Sequence[Demonstration],
    model: str | LanguageModel,
    out: str | Path,
    *,
    replay: Source | None = None,
    settings: SFTSettings | None = None,
    lora: LoRASettings | None = None,
    device: Device = "auto",
    dtype: DType = "auto",
    checkpoints: str | Path | None = None,
    progress: bool = True,
) -> SFTResult:
    """Teach a model to answer as in demonstrations, and save the adapter or the model in `out`.

    Args:
        rows: what shall be learned; `demonstrations` makes them of preferences, `load_demonstrations`
            of files.
        model: a name, or a loaded model (which is trained itself).
        out: folder for the adapter or model, its card and `training_log.jsonl`.
        replay: general data, of the kind that shall not be forgotten, as for `load_demonstrations`, or
            "own_answers" for what the model itself answers to built-in prompts before it is trained;
            mixed in at `settings.replay_share` of all rows. None mixes nothing in.
        settings: see `SFTSettings`.
        lora: see `LoRASettings`; only with `tune="lora"`.
        device: where to train when `model` is a name.
        dtype: of the weights when `model` is a name; "auto" is float32 with `tune="full"`. An adapter
            is float32.
        checkpoints: folder for checkpoints, default `<out>.checkpoints`. A call with the same
            arguments continues from the last whole one and ends with the same weights.
        progress: show a bar with rows a second, loss and time left.

    Raises:
        DataError: no rows, rows with nothing to learn, or general rows that hold what forgetting is
            measured on; all are listed.
        TrainingError: the loss is no longer finite.
        ModelError: the model, adapter or device cannot be used.
        ValueError: settings that exclude each other.
    """
    settings, out = settings or SFTSettings(), Path(out)
    checkpoint_dir = Path(checkpoints) if checkpoints else out.with_name(out.name + ".checkpoints")
    if not rows:
        raise DataError("there are no demonstrations to learn from.")
    if settings.tune == "full" and lora is not None:
        raise ValueError("tune='full' trains all weights, so lora has no meaning; leave it out.")
    share, seed = settings.replay_share, settings.seed
    from_itself = isinstance(replay, str) and replay == OWN_ANSWERS
    # What lies in a file is read before a model is loaded.
    general = [] if replay is None or from_itself else load_demonstrations(replay)
    mixed = mix_replay(rows, general, share=share, seed=seed) if general else list(rows)
    refuse_measured(mixed[len(rows) :])
    lora = lora or LoRASettings()
    loaded = _load(model, settings, lora, device, dtype)
    partial = out.with_name(out.name + ".own_answers")
    if from_itself and share:
        refuse_processes("sampling own_answers", "give the general data as a file")
        from prefopt.training.replay import own_answers

        most = math.ceil(len(rows) * share / (1 - share))
        told = own_answers(
            loaded, most=most, max_length=settings.max_length, seed=seed, partial=partial,
            progress=progress,
        )  # fmt: skip
        mixed = mix_replay(rows, load_demonstrations(told), share=share, seed=seed)
    tokenized = tokenize_demonstrations(mixed, loaded.tokenizer, max_length=settings.max_length)
    identity = [
        "sft",
        model_fingerprint(loaded.base),
        tokenized,
        without_memory_settings(msgspec.to_builtins(settings)),
        msgspec.to_builtins(lora),
        lora.continue_from and adapter_fingerprint(lora.continue_from),
    ]
    trainer = _make_trainer(loaded, tokenized, settings, lora, checkpoint_dir, progress)
    from prefopt.training.sharding import n_trained

    resume = resume_point(trainer.accelerator, checkpoint_dir, identity)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)

    history = trainer.state.log_history
    points = _points(history)
    n_replay = len(tokenized) - len(rows)
    n_tokens = sum(len(row.answer_ids) for row in tokenized)
    replay_tokens = sum(len(row.answer_ids) for row in tokenized[len(rows) :])
    result = SFTResult(
        folder=out,
        n_demonstrations=len(rows),
        n_replay=n_replay,
        n_tokens=n_tokens,
        replay_token_share=replay_tokens / n_tokens,
        n_cut=sum(row.is_cut for row in tokenized),
        n_parameters_trained=n_trained(trainer.model),
        learning_rate=trainer.args.learning_rate,
        points=points,
        health=diagnose_sft(points, history),
    )
    weights = trainer.whole_weights()
    if is_first_process():
        _save(trainer.model, weights, loaded, result, settings, lora)
        shutil.rmtree(checkpoint_dir, ignore_errors=True)
        partial.unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()
    return result


def load_sft_log(folder: str | Path) -> tuple[SFTPoint, ...]:
    """The logged steps that `train_sft` wrote beside an adapter or model."""
    from prefopt.data.records import read_records

    return tuple(read_records(Path(folder) / "training_log.jsonl", SFTPoint))


def diagnose_sft(
    points: Sequence[SFTPoint], log_history: Iterable[Mapping[str, Any]] = ()
) -> tuple[HealthNote, ...]:
    """What the log of a finished run says, the most serious first.

    Args:
        points: logged steps in order.
        log_history: the trainer's own log, for what all trainings share: the gradient.
    """
    # Of the checks that preferences and demonstrations share; the others are about pairs.
    shared = ("gradient_zero", "gradient_not_finite", "gradient_growing")
    found = diagnose(training_points(log_history), beta=None)
    notes = [note for note in found if note.check in shared]
    if points:
        notes.append(_learned(points))
    return by_level(notes)


def _learned(points: Sequence[SFTPoint]) -> HealthNote:
    n = max(1, len(points) // 5)
    before = sum(p.loss for p in points[:n]) / n
    after = sum(p.loss for p in points[-n:]) / n
    foreseen = points[-1].accuracy
    seen = f"The loss went from {before:.3f} to {after:.3f} nats a token"
    if foreseen > _BY_HEART:
        return HealthNote(
            level="warning",
            check="by_heart",
            message=f"{seen}, and {foreseen:.0%} of the tokens are foreseen: the demonstrations are "
            "known by heart. Train fewer epochs, lower the learning rate, or give more of them.",
        )
    if len(points) >= 2 and after >= before:
        return HealthNote(
            level="warning",
            check="not_learned",
            message=f"{seen}: nothing that shows was learned. Raise the learning rate or train "
            "longer, unless the demonstrations are the model's own answers.",
        )
    return HealthNote(level="ok", check="learned", message=f"{seen}.")


def _load(
    model: str | LanguageModel,
    settings: SFTSettings,
    lora: LoRASettings,
    device: Device,
    dtype: DType,
) -> LanguageModel:
    if isinstance(model, LanguageModel):
        wrapped = hasattr(model.model, "peft_config")
        if lora.continue_from is not None and not wrapped:
            raise ModelError(
                "lora.continue_from needs the model by name, so that the adapter can be loaded for "
                "training; got a loaded model without an adapter."
            )
        if settings.tune == "full" and wrapped:
            raise ModelError(f"{model.name} has an adapter; merge it before training all weights.")
        return model
    if settings.tune == "full" and dtype == "auto":
        dtype = "float32"  # AdamW's steps are smaller than what bfloat16 weights can take
    return load_model(
        model, adapter=lora.continue_from, device=device, dtype=dtype, trainable=True,
        quantization=lora.quantization,
    )  # fmt: skip


def _make_trainer(
    loaded: LanguageModel,
    rows: Sequence[TokenRow],
    settings: SFTSettings,
    lora: LoRASettings,
    checkpoint_dir: Path,
    progress: bool,
) -> Any:
    import datasets
    import torch
    import trl

    from prefopt.training.progress_bar import ProgressBar
    from prefopt.training.sft_trainer import SFTTrainer, token_columns

    n_parameters = sum(p.numel() for p in loaded.model.parameters())
    # Adapters train beside weights in the model's own dtype; weights that train stay float32 and are
    # multiplied in bfloat16.
    mixed = settings.tune == "full" and loaded.device.type == "cuda" and not shards()
    args = trl.SFTConfig(
        **loop_arguments(
            settings,
            len(rows),
            checkpoint_dir,
            learning_rate=default_sft_learning_rate(n_parameters, settings.tune),
            on_cpu=loaded.device.type == "cpu",
            bf16=trains_in_bfloat16(loaded.model) or (mixed and torch.cuda.is_bf16_supported()),
        )
        | {
            "max_length": None,  # rows come cut
            "accelerator_config": {"dispatch_batches": False},
        }
    )
    wants_adapter = settings.tune == "lora" and not hasattr(loaded.model, "peft_config")
    trainer = SFTTrainer(
        micro_batch_tokens=settings.micro_batch_tokens,
        model=loaded.model,
        args=args,
        train_dataset=datasets.Dataset.from_list([token_columns(row) for row in rows]),
        processing_class=loaded.tokenizer,
        peft_config=lora_config(lora) if wants_adapter else None,
    )
    ProgressBar(description="training (SFT)", unit="row", show=progress).attach(trainer)
    return trainer


def _points(log_history: Iterable[Mapping[str, Any]]) -> tuple[SFTPoint, ...]:
    return tuple(
        SFTPoint(
            step=int(entry["step"]),
            epoch=float(entry["epoch"]),
            loss=float(entry["loss"]),
            accuracy=float(entry["mean_token_accuracy"]),
            entropy=float(entry["entropy"]),
            learning_rate=float(entry["learning_rate"]),
            grad_norm=optional_figure(entry, "grad_norm"),
        )
        for entry in log_history
        if "loss" in entry
    )


def _save(
    model: Any,
    weights: Any,
    loaded: LanguageModel,
    result: SFTResult,
    settings: SFTSettings,
    lora: LoRASettings,
) -> None:
    """Write the folder, whole or not at all."""
    from prefopt.data.records import write_bytes, write_records

    with whole_folder(result.folder) as folder:
        adapter_only = {"selected_adapters": ["default"]} if settings.tune == "lora" else {}
        model.save_pretrained(folder, state_dict=weights, **adapter_only)
        loaded.tokenizer.save_pretrained(folder)
        write_records(folder / "training_log.jsonl", result.points)
        card = _model_card(loaded.base, result, settings, lora)
        write_bytes(folder / "README.md", card.encode())


def _model_card(base: str, result: SFTResult, settings: SFTSettings, lora: LoRASettings) -> str:
    last = result.points[-1]
    if settings.tune == "full":
        library, trained, load = "transformers", "all weights", 'load_model("path/to/this/folder")'
        title = f"{base}, tuned on demonstrations"
    else:
        library = "peft"
        trained = (
            f"an adapter continued from {lora.continue_from}"
            if lora.continue_from
            else f"an adapter with r={lora.r}, alpha={lora.alpha:g}, targets {lora.target_modules}"
        )
        load = f'load_model({base!r}, adapter="path/to/this/folder")'
        title = f"A LoRA adapter for {base}, tuned on demonstrations"
    head = front_matter(base, library=library, task="text-generation", tags=["prefopt", "sft"])
    return f"""{head}
# {title}

Trained with [prefopt](https://pypi.org/project/prefopt/) on {result.n_demonstrations} demonstrations
and {result.n_replay} rows of general data ({result.replay_token_share:.0%} of the learned tokens).

| setting | value |
|---|---|
| trained | {trained}; {result.n_parameters_trained:,} parameters |
| loss | on the answers' tokens only, end token included; {result.n_tokens:,} tokens an epoch |
| learning rate | {result.learning_rate:g}, {settings.schedule}, warm-up {settings.warmup:g} |
| batch | {settings.batch_size} rows, {settings.epochs:g} epoch(s), {last.step} steps |
| cut at | {settings.max_length} tokens: {result.n_cut} row(s) |
| seed | {settings.seed} |

Last logged step: loss {last.loss:.4f} nats a token, {last.accuracy:.0%} of the tokens foreseen.

## What the log says

{notes_list(result.health)}

## Use

```python
from prefopt import load_model

model = {load}
```
"""
