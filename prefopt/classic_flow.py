"""The classic path in one call: preferences -> SFT -> reward model -> PPO -> report.

    prompts ──▶ candidates ──▶ judged ──▶ preferences ──▶ demonstrations ──▶ SFT model
                                               └────────▶ reward model          │
                                                               └──────▶ PPO ◀───┘──▶ report

(Ouyang et al. 2022, arXiv:2203.02155.) Each arrow is one public function of prefopt; this module only
puts them in order, inside a run folder that can be killed and continued, as `prefopt.flow` for DPO.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from prefopt.flow_stages import (
    LEDGER,
    AdapterOff,
    Lazy,
    answer_stage,
    checked_inputs,
    comparison_stage,
    flow_problems,
    opened_run,
    preference_stages,
    spent_usd,
)
from prefopt.models import Device, LanguageModel, LoRASettings
from prefopt.sampling.candidates import SamplingSettings
from prefopt.training.ppo import PPOSettings
from prefopt.training.ppo_health import PPOPoint
from prefopt.training.reward import RewardSettings
from prefopt.training.sft import SFTSettings
from prefopt.types import JudgedComparison, PreferenceGroup

if TYPE_CHECKING:
    from prefopt.evaluation.model_figures import FrontierPoint, PolicyShift

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassicConfig:
    """Everything the classic path needs to know.

    Args:
        out: the run's folder; the same folder continues the same run.
        prompts: "everyday" (built in), a file (.jsonl, .json, .parquet, .csv, .txt) or a Hub dataset.
            PPO trains on them, but for those held out.
        held_out: prompts kept away from training for the report: a number (60) or a share (0.3).
        model: the base model: "demo", a folder, or a Hub id.
        preferences: a file or Hub dataset with preferences of your own, as `load_preferences` takes
            them; None samples answers to the prompts and has the judge compare them.
        replay: general data to mix into SFT, as `load_general` takes it.
        judge: "rules:house_style", "anthropic:<model>", "openai:<model>@<base_url>",
            "local:<model>", "scripted:shortest". It labels, and it compares for the report.
        rubric: what better means: "house_style", "helpful", or a text file.
        max_usd: the most a paid judge may spend in this run, however often it is continued; required
            for one.
        prices: JSON file with prices by model, for paid models whose prices are not built in.
        transport: for Anthropic: "sync" (minutes), "batch" (half the price, within a day), or "auto"
            (batches from 500 calls on).
        k: answers sampled a prompt, at least 2.
        pairs_per_prompt: preferences kept a prompt, the widest apart first; None keeps all.
        min_margin: the least mean grade over both orders, in (0, 2], that counts as a preference.
        cut_off: what becomes of answers that ended at the token limit when demonstrations are made.
        reward_held_out: the share of prompts whose preferences the reward model is measured on
            instead of trained.
        sampling: how answers are sampled, for training and for the report.
        sft: how demonstrations are learned.
        sft_lora: the adapter of SFT, which is merged before the next stage.
        reward: how the reward model is trained.
        reward_lora: its adapter.
        ppo: how PPO trains.
        ppo_lora: the policy's adapter, and the value's.
        device: "auto" takes a GPU where there is one.
        seed: of everything random.
    """

    out: str
    prompts: str = "everyday"
    held_out: float = 60
    model: str = "demo"
    preferences: str | None = None
    replay: str | None = None
    judge: str = "rules:house_style"
    rubric: str = "house_style"
    max_usd: float | None = None
    prices: str | None = None
    transport: Literal["auto", "sync", "batch"] = "auto"
    k: int = 4
    pairs_per_prompt: int | None = None
    min_margin: float = 1.0
    cut_off: Literal["leave_out", "keep"] = "leave_out"
    reward_held_out: float = 0.2
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    sft: SFTSettings = field(default_factory=SFTSettings)
    sft_lora: LoRASettings = field(default_factory=LoRASettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    reward_lora: LoRASettings = field(default_factory=LoRASettings)
    ppo: PPOSettings = field(default_factory=PPOSettings)
    ppo_lora: LoRASettings = field(default_factory=LoRASettings)
    device: Device = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        problems = flow_problems(self)
        if not 0.0 < self.reward_held_out < 1.0:
            problems.append(f"reward_held_out must be in (0, 1), got {self.reward_held_out}")
        for name in ("sft_lora", "reward_lora", "ppo_lora"):
            if getattr(self, name).continue_from is not None:
                problems.append(f"{name}.continue_from: each stage here begins a new adapter")
        if problems:
            raise ValueError("classic flow settings: " + "; ".join(problems) + ".")


def run_classic_flow(
    config: ClassicConfig,
    *,
    on_change: Literal["refuse", "redo"] = "refuse",
    progress: bool = True,
) -> Any:
    """Go the classic path, or go on with it, and return its `EvalReport`.

    All input is checked before anything is sampled or paid for. The folder then holds, in order:
    `train_prompts.jsonl`, `held_out_prompts.jsonl`, `candidates.jsonl`, `judged.jsonl`,
    `left_out.jsonl` (these three not with preferences of your own), `preferences.jsonl`,
    `demonstrations.jsonl`, `sft_adapter/`, `sft/` (the whole model), `reward/`, `reward_report.jsonl`,
    `ppo/`, `answers_base.jsonl`, `answers_sft.jsonl`, `answers_tuned.jsonl`, `judged_held_out.jsonl`
    (PPO against the base model), `judged_sft.jsonl` (SFT against it), `judged_ppo.jsonl` (PPO against
    SFT) and `report/`.

    Raises:
        DataError, ModelError, JudgeError, TrainingError: see the stage that raised it.
        RunError: the folder holds another run, is in use, or was changed from outside.
    """
    from prefopt.data.demonstrations import Demonstration, demonstrations
    from prefopt.data.general import load_general
    from prefopt.data.preference_data import load_preferences
    from prefopt.data.preflight import preflight
    from prefopt.data.prompts import plain_texts
    from prefopt.errors import DataError
    from prefopt.evaluation.eval_report import (
        EvalReport,
        build_report,
        count_labels,
        write_report,
    )
    from prefopt.evaluation.perplexity import perplexity
    from prefopt.evaluation.policy_shift import answer_logps, shift_of
    from prefopt.models import load_model, merge_adapter
    from prefopt.training.checkpoints import whole_folder
    from prefopt.training.ppo import load_ppo_log, train_ppo
    from prefopt.training.ppo_health import diagnose_ppo
    from prefopt.training.reward import evaluate_reward_model, train_reward
    from prefopt.training.reward_report import RewardReport
    from prefopt.training.sft import train_sft

    judge, train, held_out, weights = checked_inputs(config)
    own = None if config.preferences is None else load_preferences(config.preferences)
    replay = None if config.replay is None else load_general(config.replay, held_out=held_out)
    with opened_run(config, train, held_out, on_change) as run:
        base = Lazy(lambda: load_model(config.model, device=config.device))
        labels = None
        if own is None:
            judged, made = preference_stages(
                run, config, train, judge, base, weights, progress=progress
            )
            groups = list(made.groups)
            labels = count_labels(groups, made.left_out, judged)
        else:
            groups = _kept(run, own)
        checked = preflight(
            groups, base().tokenizer, max_length=config.reward.max_length, held_out=held_out
        )
        checked.raise_for_errors()
        base.forget()  # each training attaches its adapter to a model of its own

        shown = demonstrations(groups, cut_off=config.cut_off)
        logger.info("%s", shown)
        if not shown.rows:
            raise DataError(
                f"no preference gave a demonstration: {shown.reasons()}. More "
                "sampling.max_new_tokens let more answers end, and cut_off=keep takes the others."
            )
        run.records(
            "demonstrations",
            Demonstration,
            lambda _: shown.rows,
            depends_on={
                "preferences": run.sha256_of("preferences"),
                "cut_off": config.cut_off,
            },
        )
        partial = run.folder / ".partial"
        sft_settings = replace(config.sft, seed=config.seed)
        lora = config.sft_lora if config.sft.tune == "lora" else None

        def teach(folder: Path) -> object:
            return train_sft(
                shown.rows, config.model, folder, replay=replay, settings=sft_settings, lora=lora,
                device=config.device, checkpoints=partial / "sft", progress=progress,
            )  # fmt: skip

        def merge(folder: Path) -> None:
            with whole_folder(folder) as temporary:
                merge_adapter(config.model, run.folder / "sft_adapter", temporary)

        learned_from = {
            "model": weights,
            "demonstrations": run.sha256_of("demonstrations"),
            "replay": replay,
            "settings": sft_settings,
            "lora": lora,
        }
        if lora is None:
            sft = run.path("sft", "sft", teach, depends_on=learned_from)
        else:
            run.path("sft_adapter", "sft_adapter", teach, depends_on=learned_from)
            needs = {"model": weights, "adapter": run.sha256_of("sft_adapter")}
            # Whole weights: PPO's reference is then the SFT model with PPO's own adapter off.
            sft = run.path("sft", "sft", merge, depends_on=needs)
        sft_weights = run.sha256_of("sft")

        learned, measured = _split(groups, config)
        reward_settings = replace(config.reward, seed=config.seed)
        reward = run.path(
            "reward",
            "reward",
            lambda folder: train_reward(
                learned, str(sft), folder, settings=reward_settings, lora=config.reward_lora,
                device=config.device, checkpoints=partial / "reward", progress=progress,
            ),
            depends_on={
                "model": sft_weights,
                "preferences": run.sha256_of("preferences"),
                "held_out": config.reward_held_out,
                "settings": reward_settings,
                "lora": config.reward_lora,
            },
        )  # fmt: skip
        (quality,) = run.records(
            "reward_report",
            RewardReport,
            lambda _: [
                evaluate_reward_model(
                    reward, measured, name="held-out preferences", device=config.device,
                    progress=progress,
                )
            ],
            depends_on={"reward": run.sha256_of("reward")},
        )  # fmt: skip
        logger.info("%s", quality.to_text())

        ppo_settings = replace(config.ppo, seed=config.seed)
        policy = run.path(
            "ppo",
            "ppo",
            lambda folder: train_ppo(
                train, str(sft), reward, folder, settings=ppo_settings, lora=config.ppo_lora,
                device=config.device, checkpoints=partial / "ppo", progress=progress,
            ),
            depends_on={
                "model": sft_weights,
                "reward": run.sha256_of("reward"),
                "prompts": run.sha256_of("train_prompts"),
                "settings": ppo_settings,
                "lora": config.ppo_lora,
            },
        )  # fmt: skip

        def load_tuned() -> LanguageModel:
            loaded = load_model(str(sft), adapter=policy, device=config.device)
            return replace(loaded, name=f"{config.model}+SFT+PPO")

        tuned = Lazy(load_tuned)
        models: dict[str, tuple[Lazy | AdapterOff, dict[str, str]]] = {
            "tuned": (tuned, {"sft": sft_weights, "ppo": run.sha256_of("ppo")}),
            "sft": (AdapterOff(tuned, f"{config.model}+SFT"), {"sft": sft_weights}),
            "base": (base, {}),
        }
        answers = {}
        for name, (model, needs) in models.items():
            if name == "base":
                tuned.forget()  # one model in memory at a time
            answers[name] = answer_stage(
                run, config, f"answers_{name}", held_out, model, weights, progress=progress,
                description=f"answering ({name} model)", depends_on=needs,
            )  # fmt: skip
        base.forget()
        compared: dict[str, list[JudgedComparison]] = {
            stage: comparison_stage(
                run, stage, answers[new], answers[old], judge, progress=progress,
                sources=(f"answers_{new}", f"answers_{old}"),
            )
            for stage, new, old in (
                ("judged_held_out", "tuned", "base"),
                ("judged_sft", "sft", "base"),
                ("judged_ppo", "tuned", "sft"),
            )
        }  # fmt: skip

        def make_report(folder: Path) -> None:
            texts = plain_texts()
            surprise, likely = {}, {}
            for name, (model, _) in models.items():
                if name == "base":
                    tuned.forget()
                with model.ready() as loaded:
                    surprise[name] = perplexity(loaded.model, loaded.tokenizer, texts)
                    # How likely an answer is to the model that gave it, and to the base model.
                    for side in ("tuned", "sft"):
                        if name in (side, "base"):
                            likely[name, side] = answer_logps(loaded, answers[side])
            shifts = {
                side: shift_of(
                    likely[side, side],
                    likely["base", side],
                    [answer.prompt.prompt_id for answer in answers[side]],
                    sampling=config.sampling,
                )
                for side in ("tuned", "sft")
            }
            points = load_ppo_log(policy)
            notes = diagnose_ppo(points, kl_target=ppo_settings.kl_target)
            report = build_report(
                compared["judged_held_out"],
                title="The classic path against its base model",
                base_model=config.model,
                tuned_model=f"{config.model} + SFT + PPO",
                judge=judge.name,
                rubric=judge.rubric,
                prompts_name="held-out prompts",
                perplexity_base=surprise["base"],
                perplexity_tuned=surprise["tuned"],
                perplexity_text=f"{len(texts)} paragraphs of plain prose",
                shift=shifts["tuned"],
                frontier=_frontier_point("SFT", shifts["sft"], compared["judged_sft"]),
                health=notes,
                labels=labels,
                preflight=checked.to_text().splitlines(),
                cost_usd=spent_usd(run.folder / LEDGER),
                seeds={"run": config.seed},
                details={
                    "SFT against the base model": _rate(compared["judged_sft"]),
                    "PPO against SFT": _rate(compared["judged_ppo"]),
                    "PPO": _course(points),
                    "perplexity after SFT": f"{surprise['sft']:.2f}",
                    "demonstrations": str(shown),
                    "reward model": _quality(quality),
                },
            )
            write_report(report, folder)

        folder = run.path(
            "report",
            "report",
            make_report,
            depends_on={
                **{name: run.sha256_of(name) for name in compared},
                "ppo": run.sha256_of("ppo"),
                "reward": run.sha256_of("reward_report"),
            },
        )
        return msgspec.json.decode((folder / "report.json").read_bytes(), type=EvalReport)


def _kept(run: Any, groups: list[PreferenceGroup]) -> list[PreferenceGroup]:
    kept: list[PreferenceGroup] = run.records(
        "preferences", PreferenceGroup, lambda _: groups, depends_on={"preferences": groups}
    )
    return kept


def _split(
    groups: list[PreferenceGroup], config: ClassicConfig
) -> tuple[list[PreferenceGroup], list[PreferenceGroup]]:
    """Groups for the reward model to learn from, and to be measured on; no prompt is in both."""
    from prefopt.data.prompts import split_by_prompt

    _, held_out = split_by_prompt(
        [group.prompt for group in groups], held_out=config.reward_held_out, seed=config.seed
    )
    measured = {prompt.prompt_id for prompt in held_out}
    return (
        [group for group in groups if group.prompt.prompt_id not in measured],
        [group for group in groups if group.prompt.prompt_id in measured],
    )


def _frontier_point(
    name: str, shift: PolicyShift | None, judged: list[JudgedComparison]
) -> list[FrontierPoint]:
    """A model between the base and the tuned one; none where its distance is not known."""
    from prefopt.evaluation.model_figures import FrontierPoint
    from prefopt.evaluation.win_rate import win_rate

    if shift is None:
        return []
    rate = win_rate(judged)
    low, high = rate.headline_interval
    return [FrontierPoint(name=name, kl=shift.kl, win_rate=rate.win_rate, low=low, high=high)]


def _rate(judged: list[JudgedComparison]) -> str:
    from prefopt.evaluation.win_rate import win_rate

    rate = win_rate(judged)
    low, high = rate.headline_interval
    return f"preferred in {rate.win_rate:.0%} ({low:.0%} to {high:.0%}) of {rate.n} comparisons"


def _course(points: Sequence[PPOPoint]) -> str:
    if not points:
        return "nothing was logged"
    first, last = points[0], points[-1]
    return (
        f"score {first.score:+.2f} to {last.score:+.2f} at a KL of {last.kl:.1f} nats an answer, "
        f"{first.length:.0f} to {last.length:.0f} tokens"
    )


def _quality(report: Any) -> str:
    if report.accuracy is None:
        return f"no decided pair among {report.n} held-out ones"
    accuracy, length = report.accuracy, report.length_correlation
    pull = "" if length is None else f"; correlation with length {length.value:+.2f}"
    return (
        f"right on {accuracy.value:.0%} ({accuracy.low:.0%} to {accuracy.high:.0%}) of {report.n} "
        f"held-out pairs{pull}"
    )
