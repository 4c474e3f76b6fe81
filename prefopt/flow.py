"""The main job in one call: prompts -> candidates -> judged -> preferences -> DPO -> report.

Each arrow is one public function of prefopt; this module only puts them in order, inside a run
folder that can be killed and continued. `prefopt run` and `recipes/quickstart.py` are this function.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from prefopt.flow_stages import (
    LEDGER,
    AdapterOff,
    Lazy,
    answer_stage,
    checked_inputs,
    comparison_stage,
    flow_problems,
    judge_changes,
    opened_run,
    preference_stages,
    spent_usd,
)
from prefopt.models import Device, LoRASettings
from prefopt.out_of_memory import without_memory_settings
from prefopt.sampling.candidates import SamplingSettings
from prefopt.training.dpo import DPOSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlowConfig:
    """Everything the main job needs to know.

    Args:
        out: the run's folder; the same folder continues the same run.
        prompts: "everyday" (built in), a file (.jsonl, .json, .parquet, .csv, .txt) or a Hub dataset.
        held_out: prompts kept away from training for the report: a number (60) or a share (0.3).
        model: the base model: "demo", a folder, or a Hub id.
        judge: "rules:house_style", "anthropic:<model>", "openai:<model>@<base_url>",
            "local:<model>", "scripted:shortest".
        rubric: what better means: "house_style", "helpful", or a text file.
        max_usd: the most a paid judge may spend in this run, however often it is continued; required
            for one.
        prices: JSON file with prices by model, for paid models whose prices are not built in or have
            changed: {"<model>": {"input_usd_per_mtok": ..., ...}}.
        transport: for Anthropic: "sync" (minutes), "batch" (half the price, within a day), or "auto"
            (batches from 500 calls on).
        k: answers sampled a prompt, at least 2.
        pairs_per_prompt: preferences trained on a prompt, the widest apart first; None takes all.
        min_margin: the least mean grade over both orders, in (0, 2], that counts as a preference.
        sampling: how answers are sampled, for training and for the report.
        lora: which adapter is trained.
        dpo: how it is trained.
        capabilities: what else the model must still do: "offline" for the built-in tasks, or names of
            tasks, separated by commas, answered before and after; "none" measures nothing.
        device: "auto" takes a GPU where there is one.
        seed: of the split, the sampling, the adapter and the order of training.
    """

    out: str
    prompts: str = "everyday"
    held_out: float = 60
    model: str = "demo"
    judge: str = "rules:house_style"
    rubric: str = "house_style"
    max_usd: float | None = None
    prices: str | None = None
    transport: Literal["auto", "sync", "batch"] = "auto"
    k: int = 4
    pairs_per_prompt: int | None = 1
    min_margin: float = 1.0
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    lora: LoRASettings = field(default_factory=LoRASettings)
    dpo: DPOSettings = field(default_factory=DPOSettings)
    capabilities: str = "none"
    device: Device = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        problems = flow_problems(self)
        if problems:
            raise ValueError("flow settings: " + "; ".join(problems) + ".")


def run_flow(
    config: FlowConfig,
    *,
    on_change: Literal["refuse", "redo"] = "refuse",
    progress: bool = True,
) -> Any:
    """Do the main job, or continue it, and return its `EvalReport`.

    All input is checked before anything is sampled or paid for. The folder then holds, in order:
    `train_prompts.jsonl`, `held_out_prompts.jsonl`, `candidates.jsonl`, `judged.jsonl`,
    `preferences.jsonl`, `left_out.jsonl`, `dataset/`, `adapter/`, `answers_base.jsonl`,
    `answers_tuned.jsonl`, `judged_held_out.jsonl` and `report/`.

    Raises:
        DataError, ModelError, JudgeError, TrainingError: see the stage that raised it.
        RunError: the folder holds another run, is in use, or was changed from outside.
    """
    from prefopt.data.dataset_card import dataset_card
    from prefopt.data.general import OWN_ANSWERS, load_general
    from prefopt.data.preference_data import save_preferences
    from prefopt.data.preflight import preflight
    from prefopt.data.records import write_bytes
    from prefopt.evaluation.capabilities import check_tasks, measure_capabilities
    from prefopt.evaluation.eval_report import (
        EvalReport,
        build_report,
        count_labels,
        write_report,
    )
    from prefopt.evaluation.evaluate import measure_forgetting, training_curve
    from prefopt.evaluation.policy_shift import measure_shift
    from prefopt.models import load_model
    from prefopt.training.dpo import load_training_log, train_dpo
    from prefopt.training.health import diagnose

    ledger = Path(config.out) / LEDGER
    judge, train, held_out, weights = checked_inputs(config)
    if config.capabilities != "none":
        check_tasks(config.capabilities, judge)
    general: Any = config.dpo.replay  # a name, or the rows that it names
    if general is not None and general != OWN_ANSWERS:
        general = load_general(general, held_out=held_out)
    with opened_run(config, train, held_out, on_change) as run:
        base = Lazy(lambda: load_model(config.model, device=config.device))
        judged, preferences = preference_stages(
            run, config, train, judge, base, weights, progress=progress
        )
        groups = preferences.groups

        def make_dataset(folder: Path) -> None:
            save_preferences(groups, folder / "train.jsonl")
            card = dataset_card(
                groups,
                judge=judge.name,
                left_out=preferences.left_out,
                # Of these verdicts, not of the ledger: the same whenever the card is made.
                cost_usd=math.fsum(v.usage.cost_usd for item in judged for v in item.verdicts),
                source=f"{config.k} answers a prompt sampled from {config.model}",
            )
            write_bytes(folder / "README.md", card.encode())

        run.path(
            "dataset",
            "dataset",
            make_dataset,
            depends_on={"preferences": run.sha256_of("preferences")},
        )

        checked = preflight(
            groups, base().tokenizer, max_length=config.dpo.max_length, held_out=held_out
        )
        checked.raise_for_errors()

        dpo = replace(config.dpo, seed=config.seed, replay=None)
        adapter_needs = {
            "model": weights,
            "preferences": run.sha256_of("preferences"),
            "dpo": without_memory_settings(msgspec.to_builtins(dpo)),
            "replay": general,
            "lora": config.lora,
        }
        base.forget()  # training attaches an adapter to a model of its own
        adapter = run.path(
            "adapter",
            "adapter",
            lambda folder: train_dpo(
                groups, config.model, folder, replay=general, settings=dpo, lora=config.lora,
                device=config.device, checkpoints=run.folder / ".partial" / "checkpoints",
                progress=progress,
            ),
            depends_on=adapter_needs,
        )  # fmt: skip

        tuned = Lazy(lambda: load_model(config.model, adapter=adapter, device=config.device))
        answers_tuned = answer_stage(
            run, config, "answers_tuned", held_out, tuned, weights, progress=progress,
            description="answering (tuned model)",
            depends_on={"adapter": run.sha256_of("adapter")},
        )  # fmt: skip
        answers_base = answer_stage(
            run, config, "answers_base", held_out, AdapterOff(tuned, config.model), weights,
            progress=progress, description="answering (base model)",
        )  # fmt: skip
        judged_held_out = comparison_stage(
            run, "judged_held_out", answers_tuned, answers_base, judge, progress=progress
        )

        def make_report(folder: Path) -> None:
            points = load_training_log(adapter)
            report = build_report(
                judged_held_out,
                title="DPO against its base model",
                base_model=config.model,
                tuned_model=f"{config.model} + LoRA (DPO)",
                judge=judge.name,
                rubric=judge.rubric,
                prompts_name="held-out prompts",
                training=training_curve(points),
                health=diagnose(points, beta=dpo.beta),
                labels=count_labels(groups, preferences.left_out, judged),
                preflight=[*judge_changes(ledger), *checked.to_text().splitlines()],
                cost_usd=spent_usd(ledger, [*judged, *judged_held_out]),
                seeds={"run": config.seed},
                shift=measure_shift(
                    tuned(), answers_tuned,
                    beta=dpo.beta if config.lora.continue_from is None else None,
                    sampling=config.sampling,
                ),
                capabilities=None if config.capabilities == "none" else measure_capabilities(
                    tuned(), tasks=config.capabilities, judge=judge, seed=config.seed,
                    progress=progress, out=run.folder / ".partial" / "capabilities",
                ),
                **measure_forgetting(tuned())._asdict(),
            )  # fmt: skip
            write_report(report, folder)

        folder = run.path(
            "report",
            "report",
            make_report,
            depends_on={
                "judged": run.sha256_of("judged_held_out"),
                "adapter": run.sha256_of("adapter"),
                **({} if config.capabilities == "none" else {"capabilities": config.capabilities}),
            },
        )
        return msgspec.json.decode((folder / "report.json").read_bytes(), type=EvalReport)
