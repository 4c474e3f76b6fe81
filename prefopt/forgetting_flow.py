"""One training, and again with each mitigation: what each gains, and what each forgets.

    prompts -> preferences -> DPO, seven ways -> win rate, perplexity, tasks -> table, picture

All ways learn from the same pairs in the same order, and are measured on the same held-out prompts,
texts and task items. `recipes/forgetting.py` is this function. Every stage is resumable.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from prefopt.flow import FlowConfig
from prefopt.flow_stages import (
    Lazy,
    answer_stage,
    comparison_stage,
    preference_stages,
)
from prefopt.models import LanguageModel, LoRASettings
from prefopt.training.dpo import DPOSettings

if TYPE_CHECKING:
    from prefopt.data.demonstrations import Demonstration
    from prefopt.evaluation.capabilities import TaskScores
    from prefopt.evaluation.forgetting import MitigationOutcome
    from prefopt.judges import Judge
    from prefopt.runs import Run
    from prefopt.types import Candidate, JudgedComparison, PreferenceGroup, Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForgettingConfig(FlowConfig):
    """`FlowConfig`, whose `dpo` is the training without mitigation, and what is measured.

    Args:
        tasks: capability tasks, as `measure_capabilities` takes them.
        task_limit: the first so many items of each; None takes all.
        replay: general data to replay, as in `DPOSettings`.
        lower_rate: what the lower learning rate is, as a share of that of `dpo`.
    """

    tasks: list[str] = field(
        default_factory=lambda: ["prefopt_arithmetic", "prefopt_reasoning", "prefopt_plain_text"]
    )
    task_limit: int | None = None
    replay: str = "own_answers"
    lower_rate: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dpo.replay is not None:
            raise ValueError("dpo is the training without mitigation: leave dpo.replay out.")
        if self.dpo.learning_rate is None:
            raise ValueError("dpo.learning_rate must be given, as the lower one is a share of it.")
        if not 0.0 < self.lower_rate < 1.0:
            raise ValueError(f"lower_rate must be in (0, 1), got {self.lower_rate}.")


class Way(NamedTuple):
    """One way of training: `key` names its stages, `name` is for people."""

    key: str
    name: str
    dpo: DPOSettings
    lora: LoRASettings


def ways(config: ForgettingConfig) -> list[Way]:
    """The training without mitigation, and what may be done about it, one thing at a time.

    Replay and the NLL term take as many steps of the same size; lower rate, fewer steps and lower rank
    are what one would try without general data.
    """
    dpo, lora = config.dpo, config.lora
    weights = dpo.loss_weights or [1.0] * len(dpo.loss)
    rate = (dpo.learning_rate or 0.0) * config.lower_rate
    nll = replace(dpo, loss=[*dpo.loss, "nll"], loss_weights=[*weights, 1.0])
    rank = max(1, lora.r // 8)
    return [
        Way("none", "no mitigation", dpo, lora),
        Way("replay10", "replay 10 %", replace(dpo, replay_share=0.1), lora),
        Way("replay20", "replay 20 %", replace(dpo, replay_share=0.2), lora),
        Way("nll", "NLL of chosen", nll, lora),
        Way("rate", f"rate x {config.lower_rate:g}", replace(dpo, learning_rate=rate), lora),
        Way("steps", "half the steps", replace(dpo, epochs=dpo.epochs / 2), lora),
        Way(
            "rank", f"LoRA rank {rank}", dpo,
            replace(lora, r=rank, alpha=lora.alpha * rank / lora.r),
        ),
    ]  # fmt: skip


def run_forgetting_flow(
    config: ForgettingConfig,
    *,
    on_change: Literal["refuse", "redo"] = "refuse",
    progress: bool = True,
) -> list[MitigationOutcome]:
    """Train and measure every way, or continue, and return a `MitigationOutcome` for each.

    The folder then holds beside the stages of `run_flow` for each way `adapter_<key>/`,
    `answers_<key>.jsonl`, `judged_<key>.jsonl` and `scores_<key>.jsonl`; and `outcomes.jsonl`,
    `forgetting.md` and `forgetting.png`.

    Raises:
        DataError, ModelError, JudgeError, TrainingError, PrefoptError: see the stage that raised it.
        RunError: the folder holds another run, is in use, or was changed from outside.
    """
    from prefopt.data.general import OWN_ANSWERS, load_general
    from prefopt.data.preflight import preflight
    from prefopt.data.prompts import load_prompts, split_by_prompt
    from prefopt.data.records import write_bytes
    from prefopt.evaluation.forgetting import forgetting_figure, forgetting_table
    from prefopt.judges import load_judge
    from prefopt.models import load_model, model_fingerprint, resolve_device
    from prefopt.runs import Run
    from prefopt.training.replay import own_answers, rows_per_step
    from prefopt.types import Candidate, Prompt

    judge = load_judge(
        config.judge, rubric=config.rubric, max_usd=config.max_usd, transport=config.transport,
        prices=config.prices,
    )  # fmt: skip
    prompts = load_prompts(config.prompts)
    share_or_count = config.held_out if config.held_out < 1 else int(config.held_out)
    train, held_out = split_by_prompt(prompts, held_out=share_or_count, seed=config.seed)
    given = None
    if config.replay != OWN_ANSWERS:
        given = load_general(config.replay, held_out=held_out)
    resolve_device(config.device)
    weights = model_fingerprint(config.model)
    plain = msgspec.to_builtins(config)
    for free in ("out", "max_usd", "prices", "transport"):
        plain.pop(free)
    with Run(config.out, plain, on_change=on_change) as run:
        train = run.records("train_prompts", Prompt, lambda _: train, depends_on={"prompts": train})
        held_out = run.records(
            "held_out_prompts", Prompt, lambda _: held_out, depends_on={"prompts": held_out}
        )
        base = Lazy(lambda: load_model(config.model, device=config.device))
        _, preferences = preference_stages(
            run, config, train, judge, base, weights, progress=progress
        )
        groups = preferences.groups
        checked = preflight(
            groups, base().tokenizer, max_length=config.dpo.max_length, held_out=held_out
        )
        checked.raise_for_errors()
        n_pairs = sum(len(group.preferences) for group in groups)
        batch = config.dpo.batch_size
        n_steps = math.ceil(config.dpo.epochs * math.ceil(n_pairs / batch))
        if given is None:
            told = run.records(
                "own_answers",
                Candidate,
                lambda partial: own_answers(
                    base(), most=n_steps * rows_per_step(0.2, batch), seed=config.seed,
                    max_length=config.dpo.max_length, partial=partial, progress=progress,
                ),
                depends_on={"model": weights, "pairs": n_pairs, "dpo": config.dpo,
                            "seed": config.seed},
            )  # fmt: skip
            given = load_general(told, held_out=held_out)
        answers_base = answer_stage(
            run, config, "answers_base", held_out, base, weights, progress=progress,
            description="answering (base model)",
        )  # fmt: skip
        base.forget()  # each training attaches an adapter to a model of its own

        measure = functools.partial(
            _measured, run, config, groups, weights, held_out, answers_base, judge, progress
        )
        first, *others = ways(config)
        outcome, unmitigated = measure(first, None, None)
        outcomes = [outcome]
        for way in others:
            replay = given if way.key.startswith("replay") else None
            outcomes.append(measure(way, replay, unmitigated)[0])
        table = forgetting_table(outcomes)
        write_bytes(run.folder / "forgetting.md", f"{table}\n".encode())
        forgetting_figure(outcomes).savefig(run.folder / "forgetting.png", dpi=150)
        return outcomes


def _measured(
    run: Run,
    config: ForgettingConfig,
    groups: Sequence[PreferenceGroup],
    weights: str,
    held_out: Sequence[Prompt],
    answers_base: Sequence[Candidate],
    judge: Judge,
    progress: bool,
    way: Way,
    replay: Sequence[Demonstration] | None,
    unmitigated: Sequence[TaskScores] | None,
) -> tuple[MitigationOutcome, list[TaskScores]]:
    """Train one way and measure it, each step a stage of the run."""
    from prefopt.evaluation.capabilities import TaskScores
    from prefopt.evaluation.forgetting import MitigationOutcome
    from prefopt.models import load_model
    from prefopt.training.dpo import train_dpo

    key, dpo = way.key, replace(way.dpo, seed=config.seed)
    adapter = run.path(
        f"adapter_{key}",
        f"adapter_{key}",
        lambda folder: train_dpo(
            groups, config.model, folder, replay=replay, settings=dpo, lora=way.lora,
            device=config.device, checkpoints=run.folder / ".partial" / f"checkpoints_{key}",
            progress=progress,
        ),
        depends_on={
            "model": weights,
            "preferences": run.sha256_of("preferences"),
            "dpo": dpo,
            "lora": way.lora,
            "replay": replay,
        },
    )  # fmt: skip
    needs = {"adapter": run.sha256_of(f"adapter_{key}")}

    def load() -> LanguageModel:
        loaded = load_model(config.model, adapter=adapter, device=config.device)
        return replace(loaded, name=f"{config.model}, {way.name}")

    tuned = Lazy(load)
    answers = answer_stage(
        run, config, f"answers_{key}", held_out, tuned, weights, progress=progress,
        description=f"answering ({way.name})", depends_on=needs,
    )  # fmt: skip
    judged = comparison_stage(
        run, f"judged_{key}", answers, answers_base, judge, progress=progress,
        sources=(f"answers_{key}", "answers_base"),
    )  # fmt: skip
    scores = run.records(
        f"scores_{key}",
        TaskScores,
        lambda _: _task_scores(tuned(), config, run.folder / ".partial" / "tasks", progress),
        depends_on={**needs, "tasks": config.tasks, "limit": config.task_limit},
    )
    against = {} if unmitigated is None else {"none": run.sha256_of("scores_none")}
    (outcome,) = run.records(
        f"outcome_{key}",
        MitigationOutcome,
        lambda _: [_outcome(way, tuned(), adapter, judged, scores, unmitigated)],
        depends_on={
            **needs,
            **against,
            "judged": run.sha256_of(f"judged_{key}"),
            "scores": run.sha256_of(f"scores_{key}"),
        },
    )
    logger.info(
        "%s: win rate %.0f %%, perplexity %+.1f %%",
        way.name, 100 * outcome.win_rate.win_rate, 100 * outcome.perplexity_change,
    )  # fmt: skip
    return outcome, scores


def _task_scores(
    tuned: LanguageModel, config: ForgettingConfig, folder: Path, progress: bool
) -> list[TaskScores]:
    """Both models' scores, item by item; the base model is asked once for all ways."""
    from prefopt.data.records import read_records
    from prefopt.evaluation.capabilities import SCORES_FILE, TaskScores, measure_capabilities

    measure_capabilities(
        tuned, tasks=config.tasks, limit=config.task_limit, out=folder, progress=progress
    )
    return read_records(folder / SCORES_FILE, TaskScores)


def _outcome(
    way: Way,
    tuned: LanguageModel,
    adapter: Path,
    judged: Sequence[JudgedComparison],
    scores: Sequence[TaskScores],
    unmitigated: Sequence[TaskScores] | None,
) -> MitigationOutcome:
    from prefopt.evaluation.evaluate import measure_forgetting
    from prefopt.evaluation.forgetting import MitigationOutcome, compare_scores
    from prefopt.evaluation.win_rate import win_rate
    from prefopt.training.dpo import load_training_log

    sides = {side: {s.task: s for s in scores if s.side == side} for side in ("base", "tuned")}
    without = {s.task: s for s in unmitigated or () if s.side == "tuned"}
    log = load_training_log(adapter)
    surprise = measure_forgetting(tuned)
    return MitigationOutcome(
        name=way.name,
        n_steps=log[-1].step,
        learning_rate=way.dpo.learning_rate or max(point.learning_rate for point in log),
        win_rate=win_rate(judged),
        perplexity_base=surprise.perplexity_base,
        perplexity_tuned=surprise.perplexity_tuned,
        changes=compare_scores(sides["base"], sides["tuned"]),
        against_none=compare_scores(without, sides["tuned"]),
    )
