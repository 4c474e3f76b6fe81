"""DPO in rounds: the policy answers, the answers are judged, the policy learns, and again.

    round 1:  base model ──▶ candidates ──▶ judged ──▶ preferences ──▶ DPO ──▶ adapter 1
    round 2:  adapter 1  ──▶ candidates ──▶ judged ──▶ preferences ──▶ DPO ──▶ adapter 2 ...

Labels on the policy's own answers teach more than as many labels on the base model's (Xiong et al.
2023, arXiv:2312.11456; Dong et al. 2024, arXiv:2405.07863, section 3). Each arrow is one public
function of prefopt; this module only puts them in order, inside a run folder that can be killed and
continued, as `prefopt.flow` does for one round. No verdict is paid for twice: the rounds share one
ledger.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from prefopt.errors import DataError
from prefopt.evaluation.model_figures import FrontierPoint, PolicyShift
from prefopt.evaluation.win_rate import WinRate, win_rate
from prefopt.flow import FlowConfig
from prefopt.flow_stages import (
    LEDGER,
    Inputs,
    Lazy,
    answer_stage,
    checked_inputs,
    comparison_stage,
    flow_problems,
    opened_run,
    preference_stages,
    spent_usd,
)
from prefopt.training.dpo import DPOSettings
from prefopt.types import (
    Candidate,
    Comparison,
    JudgedComparison,
    PreferenceGroup,
    group_by_prompt,
)

if TYPE_CHECKING:
    from prefopt.preferences import Preferences
    from prefopt.runs import Run

logger = logging.getLogger(__name__)

_ALL_DONE = "all rounds done"

Pairing = Literal["all", "confident", "uncertain"]
"""Which pairs of a prompt's answers a judge is asked about, see `OnlineConfig.pairing`."""


@dataclass(frozen=True)
class OnlineConfig(FlowConfig):
    """`FlowConfig` with what happens from round to round.

    Args:
        rounds: at most so many.
        replay_rounds: earlier rounds whose preferences are learned from again; None takes all.
        pairing: which answers to a prompt are compared from the second round on. "all" asks about
            every pair; the other two ask about one: where the policy's own implicit rewards lie
            furthest apart ("confident": its best against its worst), or closest ("uncertain").
        stop: "no_gain" stops after a round that does not beat the round before on the held-out
            prompts; the round before is then the result. "never" goes through all rounds.
        max_kl: stops after a round further than this from the base model, in nats an answer.
        dpo: how each round trains. Its `reference` is the base model by default in all rounds; with
            "start" it moves to the last round's policy.
    """

    rounds: int = 3
    replay_rounds: int | None = None
    pairing: Pairing = "all"
    stop: Literal["no_gain", "never"] = "no_gain"
    max_kl: float | None = None
    dpo: DPOSettings = field(default_factory=lambda: DPOSettings(reference="base"))

    def __post_init__(self) -> None:
        problems = flow_problems(self)
        if self.rounds < 1:
            problems.append(f"rounds must be at least 1, got {self.rounds}")
        if self.replay_rounds is not None and self.replay_rounds < 0:
            problems.append(f"replay_rounds must not be negative, got {self.replay_rounds}")
        if self.max_kl is not None and self.max_kl <= 0:
            problems.append(f"max_kl must be positive, got {self.max_kl}")
        if self.lora.continue_from is not None:
            problems.append("lora.continue_from: the first round begins a new adapter")
        if problems:
            raise ValueError("online settings: " + "; ".join(problems) + ".")


class RoundResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one round gave, on the held-out prompts.

    Fields:
        round: from 1.
        n_new_pairs, n_pairs: preferences that the round found, and that it learned from.
        over_base, over_last: win rates over the base model, and over the round before (None in the
            first, where that is the base model).
        shift: how far the policy is from the base model; None where that could not be measured.
        stopped: why no round follows; empty where one does.
    """

    round: int
    n_new_pairs: int
    n_pairs: int
    over_base: WinRate
    over_last: WinRate | None
    shift: PolicyShift | None
    stopped: str

    def __str__(self) -> str:
        said = (
            f"round {self.round}: {_rate(self.over_base)} over the base model, "
            f"{self.n_new_pairs} new pairs, {self.n_pairs} learned from"
        )
        if self.over_last is not None:
            said += f", {_rate(self.over_last)} over the round before"
        if self.shift is not None:
            said += f", KL {self.shift.kl.value:.2f} nats an answer"
        return said + (f"; stopped: {self.stopped}" if self.stopped else "")


def run_online_flow(
    config: OnlineConfig,
    *,
    on_change: Literal["refuse", "redo"] = "refuse",
    progress: bool = True,
) -> Any:
    """Go through the rounds, or go on with them, and return the last good one's `EvalReport`.

    All input is checked before anything is sampled or paid for. For each round r the folder holds
    `round<r>_candidates.jsonl`, `..._judged.jsonl`, `..._preferences.jsonl`, `..._left_out.jsonl`,
    `..._adapter/`, `..._answers.jsonl`, `..._over_base.jsonl`, `..._over_last.jsonl` and
    `..._result.jsonl`; then `answers_base.jsonl`, `adapter/` (the result, a copy of its round's) and
    `report/`.

    Raises:
        DataError, ModelError, JudgeError, TrainingError: see the stage that raised it.
        RunError: the folder holds another run, is in use, or was changed from outside.
    """
    from prefopt.data.general import OWN_ANSWERS, load_general
    from prefopt.evaluation.capabilities import check_tasks

    inputs = checked_inputs(config)
    if config.capabilities != "none":
        check_tasks(config.capabilities, inputs.judge)
    general: Any = config.dpo.replay
    if general is not None and general != OWN_ANSWERS:
        general = load_general(general, held_out=inputs.held_out)
    with opened_run(config, inputs.train, inputs.held_out, on_change) as run:
        rounds = _Rounds(run, config, inputs, general, progress)
        result = rounds.play()
        while not result.stopped:
            result = rounds.play()
        return rounds.report()


class _Rounds:
    """The rounds of one run, played one after the other."""

    def __init__(
        self, run: Run, config: OnlineConfig, inputs: Inputs, general: Any, progress: bool
    ) -> None:
        from prefopt.models import load_model

        self._run, self._config, self._inputs = run, config, inputs
        self._general, self._progress = general, progress
        self._base = Lazy(lambda: load_model(config.model, device=config.device))
        self._policy = self._base
        self._answers_base = answer_stage(
            run, config, "answers_base", inputs.held_out, self._base, inputs.weights,
            progress=progress, description="answering (base model)",
        )  # fmt: skip
        self._answers = self._answers_base
        self._adapters: list[Path] = []
        self._preferences: list[Preferences] = []
        self._results: list[RoundResult] = []

    def play(self) -> RoundResult:
        """One more round."""
        run, config, number = self._run, self._config, len(self._results) + 1
        name = f"round{number}_"
        groups = self._label(number, name)
        adapter = self._learn(number, name, groups)
        before, before_stage = self._answers, f"round{number - 1}_answers"
        self._answers = answer_stage(
            run, config, f"{name}answers", self._inputs.held_out, self._policy,
            self._inputs.weights, progress=self._progress,
            description=f"answering (round {number})",
            depends_on={"adapter": run.sha256_of(adapter.name)},
        )  # fmt: skip
        over_base = self._compare(f"{name}over_base", name, self._answers_base, "answers_base")
        over_last = None
        if number > 1:
            over_last = self._compare(f"{name}over_last", name, before, before_stage)

        def measure(_: Path) -> list[RoundResult]:
            from prefopt.evaluation.policy_shift import measure_shift

            result = RoundResult(
                round=number,
                n_new_pairs=self._preferences[-1].n_preferences,
                n_pairs=sum(len(group.preferences) for group in groups),
                over_base=win_rate(over_base),
                over_last=None if over_last is None else win_rate(over_last),
                shift=measure_shift(
                    self._policy(), self._answers, self._answers_base, beta=config.dpo.beta,
                    sampling=config.sampling, progress=self._progress,
                ),
                stopped="",
            )  # fmt: skip
            return [msgspec.structs.replace(result, stopped=why_stop(result, config))]

        (result,) = run.records(
            f"{name}result", RoundResult, measure,
            depends_on={
                "over_base": run.sha256_of(f"{name}over_base"),
                "over_last": None if number == 1 else run.sha256_of(f"{name}over_last"),
                "adapter": run.sha256_of(adapter.name),
                "stop": [config.stop, config.max_kl, config.rounds],
            },
        )  # fmt: skip
        logger.info("%s", result)
        self._results.append(result)
        return result

    def _label(self, number: int, name: str) -> list[PreferenceGroup]:
        """New answers and their labels; returns what the round learns from, earlier rounds' too."""
        from prefopt.data.preflight import preflight

        config, came_from = self._config, self._came_from()
        _, made = preference_stages(
            self._run, config, self._inputs.train, self._inputs.judge, self._policy,
            self._inputs.weights,
            prefix=name,
            seed=config.seed + 1000 * (number - 1),
            choose=self._choose if number > 1 and config.pairing != "all" else None,
            depends_on={**came_from, "pairing": config.pairing} if number > 1 else None,
            progress=self._progress,
        )  # fmt: skip
        if not made.groups:
            raise DataError(
                f"round {number} gave no preference: {made}. A smaller min_margin or a larger k "
                "gives more."
            )
        self._preferences.append(made)
        groups = [
            group
            for i in rounds_learned(number, config.replay_rounds)
            for group in self._preferences[i - 1].groups
        ]
        self._checked = preflight(
            groups,
            self._policy().tokenizer,
            max_length=config.dpo.max_length,
            held_out=self._inputs.held_out,
        )
        self._checked.raise_for_errors()
        return groups

    def _learn(self, number: int, name: str, groups: Sequence[PreferenceGroup]) -> Path:
        from prefopt.models import load_model
        from prefopt.training.dpo import train_dpo

        run, config, came_from = self._run, self._config, self._came_from()
        self._policy.forget()  # training attaches an adapter to a model of its own
        dpo = replace(config.dpo, seed=config.seed + number - 1, replay=None)
        start = str(self._adapters[-1]) if self._adapters else None
        adapter = run.path(
            f"{name}adapter",
            f"{name}adapter",
            lambda folder: train_dpo(
                groups, config.model, folder, replay=self._general, settings=dpo,
                lora=replace(config.lora, continue_from=start), device=config.device,
                checkpoints=run.folder / ".partial" / f"{name}checkpoints",
                progress=self._progress,
            ),
            depends_on={
                "model": self._inputs.weights,
                "preferences": [
                    run.sha256_of(f"round{i}_preferences")
                    for i in rounds_learned(number, config.replay_rounds)
                ],
                "dpo": dpo,
                "replay": self._general,
                "lora": config.lora,
                **came_from,
            },
        )  # fmt: skip
        self._adapters.append(adapter)
        self._policy = Lazy(lambda: load_model(config.model, adapter=adapter, device=config.device))
        return adapter

    def _came_from(self) -> dict[str, Any]:
        """What a stage depends on that the last round's policy makes."""
        return {"adapter": self._run.sha256_of(self._adapters[-1].name)} if self._adapters else {}

    def _compare(
        self, stage: str, name: str, against: Sequence[Candidate], against_stage: str
    ) -> list[JudgedComparison]:
        return comparison_stage(
            self._run, stage, self._answers, against, self._inputs.judge, progress=self._progress,
            sources=(f"{name}answers", against_stage),
        )  # fmt: skip

    def _choose(self, candidates: list[Candidate]) -> list[Comparison]:
        """Which comparisons are asked about, by the policy's implicit rewards."""
        from prefopt.evaluation.policy_shift import answer_logps

        policy, show = self._policy(), self._progress
        on = answer_logps(policy, candidates, progress=show, description="implicit rewards")
        with policy.adapter_off() as base:
            off = answer_logps(
                base, candidates, progress=show, description="implicit rewards (base)"
            )
        rewards = [
            None if x is None or y is None else self._config.dpo.beta * (x.nats - y.nats)
            for x, y in zip(on, off, strict=True)
        ]
        return widest_pairs(candidates, rewards, self._config.pairing)

    def report(self) -> Any:
        """Copy the best round's adapter, and report on it."""
        from prefopt.evaluation.eval_report import EvalReport
        from prefopt.training.checkpoints import whole_folder

        run, best = self._run, best_round(self._results)
        chosen = self._adapters[best - 1]
        self._policy.forget()

        def copy(folder: Path) -> None:
            with whole_folder(folder) as temporary:
                shutil.copytree(chosen, temporary, dirs_exist_ok=True)

        adapter = run.path(
            "adapter", "adapter", copy, depends_on={"adapter": run.sha256_of(chosen.name)}
        )
        folder = run.path(
            "report",
            "report",
            lambda folder: self._write_report(best, adapter, folder),
            depends_on={
                "adapter": run.sha256_of("adapter"),
                "results": [run.sha256_of(f"round{r.round}_result") for r in self._results],
                "capabilities": self._config.capabilities,
            },
        )
        return msgspec.json.decode((folder / "report.json").read_bytes(), type=EvalReport)

    def _write_report(self, best: int, adapter: Path, folder: Path) -> None:
        from prefopt.data.records import read_records
        from prefopt.evaluation.capabilities import measure_capabilities
        from prefopt.evaluation.eval_report import build_report, write_report
        from prefopt.evaluation.evaluate import measure_forgetting, training_curve
        from prefopt.models import load_model
        from prefopt.training.dpo import load_training_log
        from prefopt.training.health import diagnose

        config, judge, points = self._config, self._inputs.judge, load_training_log(adapter)
        tuned = load_model(config.model, adapter=adapter, device=config.device)
        kept = None
        if config.capabilities != "none":
            kept = measure_capabilities(
                tuned, tasks=config.capabilities, judge=judge, seed=config.seed,
                progress=self._progress, out=self._run.folder / ".partial" / "capabilities",
            )  # fmt: skip
        report = build_report(
            read_records(self._run.folder / f"round{best}_over_base.jsonl", JudgedComparison),
            title="DPO in rounds against its base model",
            base_model=config.model,
            tuned_model=f"{config.model} + LoRA (DPO, round {best})",
            judge=judge.name,
            rubric=judge.rubric,
            prompts_name="held-out prompts",
            training=training_curve(points),
            health=diagnose(points, beta=config.dpo.beta),
            preflight=self._checked.to_text().splitlines(),
            cost_usd=spent_usd(self._run.folder / LEDGER),
            seeds={"run": config.seed},
            details={f"round {r.round}": str(r).partition(": ")[2] for r in self._results},
            shift=self._results[best - 1].shift,
            capabilities=kept,
            frontier=_frontier(self._results, best),
            **measure_forgetting(tuned)._asdict(),
        )
        write_report(report, folder)


def widest_pairs(
    candidates: Sequence[Candidate], rewards: Sequence[float | None], pairing: Pairing
) -> list[Comparison]:
    """One comparison a prompt, chosen by rewards that no judge has seen.

    Args:
        candidates: answers, any number a prompt.
        rewards: of each answer; None where it has none, which leaves the answer out.
        pairing: "confident" takes the largest difference of a prompt, "uncertain" the smallest, and
            "all" every pair.

    Prompts with fewer than two answers left are asked about in full. Equal texts are no pair where
    others are to be had.
    """
    from prefopt.preferences import pair_candidates

    by_id = {c.candidate_id: r for c, r in zip(candidates, rewards, strict=True)}
    chosen: list[Comparison] = []
    for answers in group_by_prompt(candidates).values():
        pairs = pair_candidates(answers)
        known = [
            (abs(a - b), pair)
            for pair in pairs
            if pair.a.text != pair.b.text
            and (a := by_id[pair.a.candidate_id]) is not None
            and (b := by_id[pair.b.candidate_id]) is not None
        ]
        if pairing == "all" or not known:
            chosen += pairs
        else:
            pick = max if pairing == "confident" else min
            chosen.append(pick(known, key=lambda found: found[0])[1])
    return chosen


def rounds_learned(number: int, replay_rounds: int | None) -> range:
    """Which rounds' preferences round `number` learns from, itself among them; all count from 1."""
    first = 1 if replay_rounds is None else max(1, number - replay_rounds)
    return range(first, number + 1)


def why_stop(result: RoundResult, config: OnlineConfig) -> str:
    """Why no round follows; empty where one does."""
    if config.max_kl is not None and result.shift is not None:
        kl = result.shift.kl.value
        if kl > config.max_kl:
            return f"KL {kl:.2f} nats is above max_kl={config.max_kl:g}"
    gain = result.over_last or result.over_base
    if config.stop == "no_gain" and gain.win_rate <= 0.5:
        return f"no gain over the round before: {_rate(gain)}"
    return _ALL_DONE if result.round == config.rounds else ""


def best_round(results: Sequence[RoundResult]) -> int:
    """The last round, or the one before where the last was stopped for what it did."""
    last = results[-1]
    return last.round if last.stopped in ("", _ALL_DONE) else max(1, last.round - 1)


def _frontier(results: Sequence[RoundResult], best: int) -> list[FrontierPoint]:
    points = []
    for result in results:
        if result.round == best or result.shift is None:
            continue
        low, high = result.over_base.headline_interval
        points.append(
            FrontierPoint(
                name=f"round {result.round}", kl=result.shift.kl,
                win_rate=result.over_base.win_rate, low=low, high=high,
            )
        )  # fmt: skip
    return points


def _rate(rate: WinRate) -> str:
    low, high = rate.headline_interval
    return f"{rate.win_rate:.0%} ({low:.0%} to {high:.0%})"
