"""Preference groups -> a reward model in a folder, and how good it is on labelled pairs.

    loss = -log s(r_chosen - r_rejected)

(Stiennon et al. 2020, arXiv:2009.01325). The loop and the losses are `RewardTrainer`'s; this module
gives it token ids whose boundaries `prefopt.chat` decided, sets the scores' level when training is
done, writes model, card and log, and continues a killed run from its last whole checkpoint.
"""

from __future__ import annotations

import logging
import math
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from prefopt.chat import tokenize_candidate
from prefopt.data.labelled import LabelledPair, load_labelled
from prefopt.data.preference_data import load_preferences
from prefopt.data.rows import read_rows
from prefopt.errors import DataError
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
from prefopt.progress import progress_bar
from prefopt.training.card_parts import front_matter
from prefopt.training.checkpoints import resume_point, whole_folder
from prefopt.training.health import optional_figure
from prefopt.training.loop_settings import loop_arguments
from prefopt.training.reward_report import RewardReport, ScoredPair, measure_reward
from prefopt.training.reward_settings import RewardLossName as RewardLossName
from prefopt.training.reward_settings import RewardSettings as RewardSettings
from prefopt.types import Candidate, PreferenceGroup

if TYPE_CHECKING:
    from prefopt.training.reward_model import RewardModel

logger = logging.getLogger(__name__)


class RewardPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One logged training step; `margin` and `mean_reward` are before the bias is subtracted."""

    step: int
    epoch: float
    loss: float
    accuracy: float
    margin: float
    mean_reward: float
    learning_rate: float
    grad_norm: float | None


class RewardResult(msgspec.Struct, frozen=True, kw_only=True):
    """A finished training: where the reward model is and what the log says."""

    folder: Path
    bias: float
    n_prompts: int
    n_pairs: int
    n_left_out: int
    n_parameters_trained: int
    learning_rate: float
    points: tuple[RewardPoint, ...]


def default_reward_learning_rate(n_parameters: int) -> float:
    """The peak rate for a LoRA reward model by the size of its base model."""
    for below, rate in ((1e9, 2e-4), (4e9, 1e-4), (15e9, 5e-5)):
        if n_parameters < below:
            return rate
    return 2e-5


def train_reward(
    groups: Sequence[PreferenceGroup],
    model: str | LanguageModel,
    out: str | Path,
    *,
    settings: RewardSettings | None = None,
    lora: LoRASettings | None = None,
    device: Device = "auto",
    dtype: DType = "auto",
    checkpoints: str | Path | None = None,
    progress: bool = True,
) -> RewardResult:
    """Train a reward model (LoRA and head) on preferences and save it in `out`.

    Under `accelerate launch` the processes share every step, and the first one writes the files.

    All preferences among a prompt's answers are learned from, for the price of the prompt and its
    answers once, and count as one together (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

    Args:
        groups: preferences, as `build_preferences` or `load_preferences` return them.
        model: a name, or a loaded model (which gets the adapter attached).
        out: folder for `RewardModel.load`, with a model card and `training_log.jsonl`.
        settings: see `RewardSettings`.
        lora: see `LoRASettings`; `continue_from` is the folder of a reward model to train further.
        device: where to train when `model` is a name.
        dtype: of the base weights when `model` is a name; adapter and head are float32.
        checkpoints: folder for checkpoints, default `<out>.checkpoints`. A call with the same
            arguments continues from the last whole one and ends with the same weights.
        progress: show a bar with prompts a second, loss and time left.

    Raises:
        DataError: no preferences, or none that fit into `max_length`.
        TrainingError: the loss is no longer finite.
        ModelError: the model, adapter or device cannot be used.
        ValueError: the processes cannot share `settings.batch_size` evenly.
    """
    settings, lora, out = settings or RewardSettings(), lora or LoRASettings(), Path(out)
    checkpoint_dir = Path(checkpoints) if checkpoints else out.with_name(out.name + ".checkpoints")
    reward = _initial(model, lora, settings, device, dtype)
    rows, too_long = _rows(groups, reward.tokenizer, settings.max_length)
    identity = [
        "reward model",
        model_fingerprint(model if isinstance(model, str) else model.base),
        rows,
        without_memory_settings(msgspec.to_builtins(settings)),
        msgspec.to_builtins(lora),
        lora.continue_from and adapter_fingerprint(lora.continue_from),
    ]
    trainer = _make_trainer(reward, rows, settings, checkpoint_dir, progress)

    from prefopt.training.sharding import n_trained

    resume = resume_point(trainer.accelerator, checkpoint_dir, identity)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    reward.scoring = trainer.scoring  # found out while the weights were whole
    _centre(reward, rows, settings)
    result = RewardResult(
        folder=out,
        bias=reward.bias,
        n_prompts=len(rows),
        n_pairs=sum(len(row["preferences"]) for row in rows),
        n_left_out=too_long,
        n_parameters_trained=n_trained(trainer.model),
        learning_rate=trainer.args.learning_rate,
        points=_points(trainer.state.log_history),
    )
    weights = trainer.whole_weights()
    if is_first_process():
        _save(reward, weights, result, settings)
        shutil.rmtree(checkpoint_dir, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return result


def load_reward_log(folder: str | Path) -> tuple[RewardPoint, ...]:
    """The logged steps that `train_reward` wrote beside a reward model."""
    from prefopt.data.records import read_records

    return tuple(read_records(Path(folder) / "training_log.jsonl", RewardPoint))


def evaluate_reward_model(
    model: RewardModel | str | Path,
    data: str | Path | Sequence[PreferenceGroup | LabelledPair],
    *,
    name: str = "",
    max_pairs: int | None = None,
    device: Device = "auto",
    seed: int = 0,
    progress: bool = True,
) -> RewardReport:
    """Accuracy, calibration and the pull of length of a reward model on labelled pairs.

    Args:
        model: a reward model, or its folder.
        data: preference groups, labelled pairs, or a file of either, as `load_preferences` and
            `load_labelled` read them.
        name: of the data, for the report; that of a file's folder where it is left out.
        max_pairs: take a random sample of this many pairs; None takes all.
        device: where to load a model that is named.
        seed: of the sample and the intervals.
        progress: show a bar.

    Raises:
        DataError: there are no pairs, or an answer is longer than the model reads.
        ModelError: the model cannot be loaded.
    """
    from prefopt.training.reward_model import RewardModel

    if isinstance(data, str | Path):
        path = Path(data)
        stem = path.name.partition(".")[0]
        name = name or (path.parent.name if stem in ("dev", "test", "train") else stem)
        data = _read(path)
    pairs = [pair for item in data for pair in _labelled(item)]
    if not pairs:
        raise DataError("there are no labelled pairs to hold the reward model against.")
    if max_pairs is not None and max_pairs < len(pairs):
        pairs = random.Random(seed).sample(pairs, max_pairs)
    reward = model if isinstance(model, RewardModel) else RewardModel.load(model, device=device)
    by_prompt: dict[str, dict[tuple[str, bool], Candidate]] = {}
    for a, b, _ in pairs:
        answers = by_prompt.setdefault(a.prompt.prompt_id, {})
        answers |= {_key(a): a, _key(b): b}
    found: dict[tuple[str, tuple[str, bool]], tuple[float, int]] = {}
    bar = progress_bar(total=len(by_prompt), description="scoring", unit="prompt", show=progress)
    with bar:
        for start in range(0, len(by_prompt), _CHUNK):
            part = list(by_prompt.items())[start : start + _CHUNK]
            ids = [
                [reward.tokenize(a.prompt, a.text, complete=_key(a)[1]) for a in answers.values()]
                for _, answers in part
            ]
            for (prompt, answers), sides, scores in zip(
                part, ids, reward.score_ids(ids), strict=True
            ):
                for key, (_, answer_ids), score in zip(answers, sides, scores, strict=True):
                    found[prompt, key] = (score, len(answer_ids))
            bar.update(len(part))
    scored = []
    for a, b, p_a in pairs:
        asked = a.prompt
        (score_a, n_a), (score_b, n_b) = (found[asked.prompt_id, _key(x)] for x in (a, b))
        scored.append(
            ScoredPair(
                prompt_id=asked.prompt_id, category=asked.category, score_a=score_a,
                score_b=score_b, n_tokens_a=n_a, n_tokens_b=n_b, p_a=p_a,
            )
        )  # fmt: skip
    return measure_reward(scored, name=name, seed=seed)


_CHUNK = 64  # prompts scored between two updates of the bar


def _key(answer: Candidate) -> tuple[str, bool]:
    return answer.text, answer.finish_reason != "length"


def _labelled(
    item: PreferenceGroup | LabelledPair,
) -> Iterable[tuple[Candidate, Candidate, float]]:
    if isinstance(item, LabelledPair):
        p_a = {"a": 1.0, "tie": 0.5, "b": 0.0}[item.label]
        return [(item.comparison.a, item.comparison.b, p_a)]
    return [(chosen, rejected, p.p_chosen) for chosen, rejected, p in item.pairs()]


def _read(path: Path) -> Sequence[PreferenceGroup | LabelledPair]:
    table = read_rows(path)
    if {"response_a", "answer_a"} & set(table.columns()):
        return load_labelled(path)
    return load_preferences(path)


def _initial(
    model: str | LanguageModel,
    lora: LoRASettings,
    settings: RewardSettings,
    device: Device,
    dtype: DType,
) -> RewardModel:
    from prefopt.training.reward_model import RewardModel

    loaded = model
    if isinstance(loaded, str):
        loaded = load_model(
            loaded, device=device, dtype=dtype, trainable=True, quantization=lora.quantization
        )
    if lora.continue_from is not None:
        return RewardModel.load(
            lora.continue_from, base=loaded, adapter_name="default", trainable=True
        )
    return RewardModel.new(loaded, peft_config=lora_config(lora), seed=settings.seed)


def _rows(
    groups: Sequence[PreferenceGroup], tokenizer: Any, max_length: int
) -> tuple[list[dict[str, Any]], int]:
    """One row of token ids for each group, and how many were too long."""
    rows: list[dict[str, Any]] = []
    too_long = 0
    for group in groups:
        used = sorted({i for p in group.preferences for i in (p.chosen, p.rejected)})
        if not used:
            continue
        ids = [tokenize_candidate(tokenizer, group.answers[i]) for i in used]
        n = min(len(answer.prompt_ids) for answer in ids)
        answers = [[*a.prompt_ids[n:], *a.answer_ids] for a in ids]
        if n + max(map(len, answers)) > max_length:
            too_long += 1
            continue
        place = {index: i for i, index in enumerate(used)}
        rows.append(
            {
                "prompt_ids": list(ids[0].prompt_ids[:n]),
                "answer_ids": answers,
                "preferences": [
                    [place[p.chosen], place[p.rejected], p.p_chosen, p.margin]
                    for p in group.preferences
                ],
            }
        )
    if too_long:
        logger.warning(
            "%d of %d prompts are left out: with an answer they are longer than max_length=%d",
            too_long,
            too_long + len(rows),
            max_length,
        )
    if not rows:
        raise DataError(
            f"there are no preferences to train on; {too_long} prompts were longer than "
            f"max_length={max_length}."
        )
    return rows, too_long


def _make_trainer(
    reward: RewardModel,
    rows: list[dict[str, Any]],
    settings: RewardSettings,
    checkpoint_dir: Path,
    progress: bool,
) -> Any:
    import datasets

    from prefopt.training.progress_bar import ProgressBar
    from prefopt.training.reward_trainer import RewardConfig, RewardTrainer

    n_parameters = sum(p.numel() for p in reward.model.parameters())
    args = RewardConfig(
        loss_type=settings.loss,
        soft_labels=settings.soft_labels,
        margin_weight=settings.margin_weight,
        center_rewards_coefficient=settings.centering_penalty or None,
        micro_batch_tokens=settings.micro_batch_tokens,
        max_length=settings.max_length,
        **loop_arguments(
            settings,
            len(rows),
            checkpoint_dir,
            learning_rate=default_reward_learning_rate(n_parameters),
            on_cpu=reward.device.type == "cpu",
            bf16=trains_in_bfloat16(reward),
        ),
    )
    trainer = RewardTrainer(model=reward, args=args, train_dataset=datasets.Dataset.from_list(rows))
    ProgressBar(description="training (reward)", unit="prompt", show=progress).attach(trainer)
    return trainer


def _centre(reward: RewardModel, rows: list[dict[str, Any]], settings: RewardSettings) -> None:
    from prefopt.trees import AnswerTree

    if settings.centre_on:
        reward.bias = 0.0
        chosen = random.Random(settings.seed).sample(rows, min(settings.centre_on, len(rows)))
        reward.centre(
            [AnswerTree(tuple(r["prompt_ids"]), tuple(map(tuple, r["answer_ids"]))) for r in chosen]
        )


def _points(log_history: Iterable[Mapping[str, Any]]) -> tuple[RewardPoint, ...]:
    return tuple(
        RewardPoint(
            step=int(entry.get("step", 0)),
            grad_norm=optional_figure(entry, "grad_norm"),
            **{
                name: float(entry.get(name, math.nan))
                for name in ("epoch", "loss", "accuracy", "margin", "mean_reward", "learning_rate")
            },
        )
        for entry in log_history
        if "loss" in entry
    )


def _save(
    reward: RewardModel,
    weights: dict[str, Any] | None,
    result: RewardResult,
    settings: RewardSettings,
) -> None:
    from prefopt.data.records import write_bytes, write_records

    with whole_folder(result.folder) as folder:
        reward.write(folder, weights)
        write_records(folder / "training_log.jsonl", result.points)
        write_bytes(folder / "README.md", _model_card(reward, result, settings).encode())


def _model_card(reward: RewardModel, result: RewardResult, settings: RewardSettings) -> str:
    base, last = reward.base or "", result.points[-1]
    tags = ["prefopt", "reward-model", "lora"]
    return f"""{front_matter(base, library="peft", task="text-classification", tags=tags)}
# A reward model on {base}

Trained with [prefopt](https://pypi.org/project/prefopt/) on {result.n_pairs} preferences among the
answers to {result.n_prompts} prompts ({result.n_left_out} prompts left out as too long).

| setting | value |
|---|---|
| loss | {settings.loss}, soft labels {settings.soft_labels} |
| parameters trained | {result.n_parameters_trained:,}, head included |
| learning rate | {result.learning_rate:g}, {settings.schedule}, warm-up {settings.warmup:g} |
| batch | {settings.batch_size} prompts, {settings.epochs:g} epoch(s), {last.step} steps |
| bias | {result.bias:.6g}, subtracted from every score |
| seed | {settings.seed} |

Last logged step: loss {last.loss:.4f}, accuracy {last.accuracy:.2f}, on answers it was trained with;
`prefopt.evaluate_reward_model` says how good it is on others.

## Use

```python
from prefopt import Prompt, RewardModel

reward = RewardModel.load("path/to/this/folder")
reward.score([Prompt.from_text("Why is the sky blue?")], [["Air scatters blue light.", "No idea."]])
```
"""
