"""One narrow training, and again with each mitigation: what each gains, and what each forgets.

    reviews -> preference pairs -> DPO, seven ways -> right labels, capability tasks -> table, picture

The narrow task is to call a review positive or negative in one word, which is right or wrong without
a judge. All ways learn from the same pairs in the same order, and are measured on the same held-out
reviews and task items. `recipes/forgetting.py` is this function. Every stage is resumable.
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

from prefopt.flow_stages import Lazy
from prefopt.models import Device, LanguageModel, LoRASettings
from prefopt.training.dpo import DPOSettings

if TYPE_CHECKING:
    from prefopt.data.demonstrations import Demonstration
    from prefopt.data.reviews import Review
    from prefopt.evaluation.capability_scores import TaskScores
    from prefopt.evaluation.forgetting import MitigationOutcome
    from prefopt.runs import Run
    from prefopt.types import Candidate, PreferenceGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForgettingConfig:
    """What is trained, how, and on what forgetting is measured.

    Args:
        out: the run's folder; the same folder continues the same run.
        model: the base model: "demo", a folder, or a Hub id.
        n_train: reviews that are learned, two pairs each.
        n_held_out: others that the tuned model labels. There are 104 in all.
        dpo: the training without mitigation.
        lora: its adapter.
        replay: general data to replay, as in `DPOSettings`.
        lower_rate: what the lower learning rate is, as a share of that of `dpo`.
        tasks: capability tasks, as `measure_capabilities` takes them.
        task_limit: the first so many items of each; None takes all.
        device: "auto" takes a GPU where there is one.
        seed: of the split, the adapter, the order of training and the replayed answers.
    """

    out: str
    model: str = "demo"
    n_train: int = 32
    n_held_out: int = 40
    dpo: DPOSettings = field(default_factory=lambda: DPOSettings(learning_rate=1e-3))
    lora: LoRASettings = field(default_factory=LoRASettings)
    replay: str = "own_answers"
    lower_rate: float = 0.3
    tasks: list[str] = field(default_factory=lambda: ["prefopt_format", "prefopt_plain_text"])
    task_limit: int | None = 24
    device: Device = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.dpo.replay is not None:
            problems.append("dpo is the training without mitigation: leave dpo.replay out")
        if self.dpo.learning_rate is None:
            problems.append("dpo.learning_rate is needed, as the lower one is a share of it")
        if not 0.0 < self.lower_rate < 1.0:
            problems.append(f"lower_rate must be in (0, 1), got {self.lower_rate}")
        if problems:
            raise ValueError("forgetting settings: " + "; ".join(problems) + ".")


class Way(NamedTuple):
    """One way of training: `key` names its stages, `name` is for people."""

    key: str
    name: str
    dpo: DPOSettings
    lora: LoRASettings


def ways(config: ForgettingConfig) -> list[Way]:
    """The training without mitigation, and what may be done about it, one thing at a time.

    All but "half the steps" take as many steps on the same pairs.
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
        Way("rate", f"rate x {config.lower_rate:g}", replace(dpo, learning_rate=rate), lora),
        Way("nll", "NLL of chosen", nll, lora),
        Way("steps", "half the steps", replace(dpo, epochs=dpo.epochs / 2), lora),
        Way("rank", f"rank {rank}", dpo, replace(lora, r=rank, alpha=lora.alpha * rank / lora.r)),
    ]


def run_forgetting_flow(
    config: ForgettingConfig,
    *,
    on_change: Literal["refuse", "redo"] = "refuse",
    progress: bool = True,
) -> list[MitigationOutcome]:
    """Train and measure every way, or continue, and return its outcomes, one a way.

    The folder then holds `preferences.jsonl`, `held_out.jsonl`, `labels_base.jsonl` and, if the model
    answers for replay, `own_answers.jsonl`; for each way `adapter_<key>/`, `labels_<key>.jsonl`,
    `scores_<key>.jsonl` and `outcome_<key>.jsonl`; and `forgetting.md` and `forgetting.png`.

    Raises:
        DataError, ModelError, TrainingError, PrefoptError: see the stage that raised it.
        RunError: the folder holds another run, is in use, or was changed from outside.
    """
    from prefopt.data.general import OWN_ANSWERS, load_general
    from prefopt.data.records import write_bytes
    from prefopt.data.reviews import Review, load_reviews, review_preferences, split_reviews
    from prefopt.evaluation.forgetting import forgetting_figure, forgetting_table
    from prefopt.models import load_model, model_fingerprint, resolve_device
    from prefopt.runs import Run
    from prefopt.training.replay import own_answers, rows_per_step
    from prefopt.types import Candidate, PreferenceGroup

    learned, measured = split_reviews(
        load_reviews(), n_train=config.n_train, n_held_out=config.n_held_out, seed=config.seed
    )
    own = config.replay == OWN_ANSWERS
    general = [] if own else load_general(config.replay, held_out=[r.prompt() for r in measured])
    resolve_device(config.device)
    weights = model_fingerprint(config.model)
    plain = msgspec.to_builtins(config)
    plain.pop("out")
    with Run(config.out, plain, on_change=on_change) as run:
        groups = run.records(
            "preferences",
            PreferenceGroup,
            lambda _: review_preferences(learned),
            depends_on={"reviews": learned},
        )
        held_out = run.records(
            "held_out", Review, lambda _: measured, depends_on={"reviews": measured}
        )
        base = Lazy(lambda: load_model(config.model, device=config.device))
        batch = config.dpo.batch_size
        n_steps = math.ceil(config.dpo.epochs * math.ceil(2 * len(groups) / batch))
        if own:
            most = n_steps * rows_per_step(0.2, batch)
            told = run.records(
                "own_answers",
                Candidate,
                lambda partial: own_answers(
                    base(), most=most, seed=config.seed, max_length=config.dpo.max_length,
                    max_new_tokens=48, partial=partial, progress=progress,
                ),
                depends_on={
                    "model": weights, "most": most, "seed": config.seed,
                    "max_length": config.dpo.max_length,
                },
            )  # fmt: skip
            general = load_general(told)
        before = _labels(run, "labels_base", held_out, base, {"model": weights}, progress)
        base.forget()  # each training attaches an adapter to a model of its own
        measure = functools.partial(
            _measured, run, config, groups, held_out, before, weights, progress
        )
        first, *others = ways(config)
        outcome, unmitigated = measure(first, None, None)
        outcomes = [outcome]
        for way in others:
            replay = general if way.key.startswith("replay") else None
            outcomes.append(measure(way, replay, unmitigated)[0])
        table = forgetting_table(outcomes)
        write_bytes(run.folder / "forgetting.md", f"{table}\n".encode())
        forgetting_figure([outcomes]).savefig(run.folder / "forgetting.png", dpi=130)
        return outcomes


def _measured(
    run: Run,
    config: ForgettingConfig,
    groups: Sequence[PreferenceGroup],
    held_out: Sequence[Review],
    before: Sequence[Candidate],
    weights: str,
    progress: bool,
    way: Way,
    replay: Sequence[Demonstration] | None,
    unmitigated: Sequence[TaskScores] | None,
) -> tuple[MitigationOutcome, list[TaskScores]]:
    """Train one way and measure it, each step a stage of the run."""
    from prefopt.data.reviews import label_scores
    from prefopt.evaluation.capability_report import compare_items
    from prefopt.evaluation.capability_scores import TaskScores
    from prefopt.evaluation.forgetting import MitigationOutcome, compare_scores
    from prefopt.models import load_model
    from prefopt.training.dpo import load_training_log, train_dpo

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
    tuned = Lazy(
        lambda: _named(load_model(config.model, adapter=adapter, device=config.device), way)
    )
    after = _labels(run, f"labels_{key}", held_out, tuned, needs, progress)
    scores = run.records(
        f"scores_{key}",
        TaskScores,
        lambda _: _task_scores(tuned(), config, run.folder / ".partial" / "tasks", progress),
        depends_on={**needs, "tasks": config.tasks, "limit": config.task_limit},
    )
    base_side, tuned_side = (
        {s.task: s for s in scores if s.side == side} for side in ("base", "tuned")
    )
    log = load_training_log(adapter)
    outcome = MitigationOutcome(
        key=key,
        name=way.name,
        n_steps=log[-1].step,
        learning_rate=dpo.learning_rate or 0.0,
        gain=compare_items(
            "reviews", "Reviews labelled right", "exact_match", label_scores(held_out, before),
            label_scores(held_out, after),
        ),
        changes=compare_scores(base_side, tuned_side),
        against_none=compare_scores(
            {s.task: s for s in unmitigated or () if s.side == "tuned"}, tuned_side
        ),
    )  # fmt: skip
    run.records(
        f"outcome_{key}",
        MitigationOutcome,
        lambda _: [outcome],
        depends_on={
            "labels": run.sha256_of(f"labels_{key}"),
            "scores": run.sha256_of(f"scores_{key}"),
            "none": run.sha256_of("scores_none"),
        },
    )
    logger.info(
        "%s: %s", way.name, ", ".join(
            f"{t.title} {t.base:.3f} to {t.tuned:.3f}" for t in (outcome.gain, *outcome.changes)
        ),
    )  # fmt: skip
    return outcome, scores


def _named(loaded: LanguageModel, way: Way) -> LanguageModel:
    return replace(loaded, name=f"{loaded.base}, {way.name}")


def _labels(
    run: Run,
    stage: str,
    held_out: Sequence[Review],
    model: Lazy,
    needs: dict[str, str],
    progress: bool,
) -> list[Candidate]:
    """What a model calls the held-out reviews, as a stage of the run."""
    from prefopt.sampling.candidates import SamplingSettings, sample_candidates
    from prefopt.types import Candidate

    greedy = SamplingSettings(temperature=0.0, top_p=1.0, max_new_tokens=4)
    return run.records(
        stage,
        Candidate,
        lambda partial: sample_candidates(
            [review.prompt() for review in held_out], model(), k=1, settings=greedy,
            partial=partial, progress=progress, description=f"labelling ({stage[7:]})",
        ),
        depends_on={**needs, "held_out": run.sha256_of("held_out")},
    )  # fmt: skip


def _task_scores(
    tuned: LanguageModel, config: ForgettingConfig, folder: Path, progress: bool
) -> list[TaskScores]:
    """Both models' scores, item by item; the base model is asked once for all ways."""
    from prefopt.data.records import read_records
    from prefopt.evaluation.capabilities import measure_capabilities
    from prefopt.evaluation.capability_scores import SCORES_FILE, TaskScores

    measure_capabilities(
        tuned, tasks=config.tasks, limit=config.task_limit, out=folder, progress=progress
    )
    return read_records(folder / SCORES_FILE, TaskScores)
