"""A tuned model, or the answers of two or more models -> an `EvalReport` in a folder.

Puts sampling, judging, people's labels, capabilities and the report in order; the figures themselves
are made in the modules beside this one. What is expensive is kept in the folder: called again, also
with more options, it samples nothing twice and pays for nothing twice.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from prefopt.errors import DataError
from prefopt.evaluation.eval_report import CurvePoint, EvalReport, build_report, write_report
from prefopt.evaluation.human_labels import check_against_people, write_to_label
from prefopt.evaluation.sequential import judge_until_decided
from prefopt.judges import Judge, Rubric, judge_comparisons, load_judge
from prefopt.judges.asking import estimate_missing
from prefopt.models import (
    Device,
    LanguageModel,
    adapter_fingerprint,
    load_model,
    model_fingerprint,
)
from prefopt.sampling.candidates import SamplingSettings, sample_candidates
from prefopt.training.health import TrainingPoint
from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, content_hash

logger = logging.getLogger(__name__)

Pairs = Literal["all", "baseline"]
"""Which of more than two models are compared: every two, or each with the baseline."""

Stop = Literal["never", "decided"]
"""When judging stops: when all is judged, or as soon as the result is sure."""


TO_LABEL = "to_label.jsonl"
"""The file of an evaluation's folder in which people label pairs."""


class PerplexityChange(NamedTuple):
    """Perplexity of the base and the tuned model on the same texts, ready for `build_report`."""

    perplexity_base: float
    perplexity_tuned: float
    perplexity_text: str


def compare_answers(
    tuned: Sequence[Candidate],
    base: Sequence[Candidate],
    *,
    names: tuple[str, str] = ("tuned", "base"),
) -> list[Comparison]:
    """Pair the two sides' answers prompt by prompt; the tuned side's answer is `a`.

    Several answers to one prompt are paired in order. `names` are what the sides are called in errors.

    Raises:
        DataError: a prompt without the same number of answers on both sides, all at once.
    """
    sides: dict[str, tuple[list[Candidate], list[Candidate]]] = {}
    for position, answers in enumerate((tuned, base)):
        for candidate in answers:
            sides.setdefault(candidate.prompt.prompt_id, ([], []))[position].append(candidate)
    problems = [
        f"prompt {(a or b)[0].prompt.text[:60]!r}: {len(a)} {names[0]} and {len(b)} {names[1]} "
        "answer(s)"
        for a, b in sides.values()
        if len(a) != len(b)
    ]
    if problems or not sides:
        raise DataError(
            "both sides need the same number of answers to each prompt, and at least one prompt.",
            problems,
        )
    return [Comparison(a=x, b=y) for a, b in sides.values() for x, y in zip(a, b, strict=True)]


def measure_forgetting(tuned: LanguageModel) -> PerplexityChange:
    """Perplexity on the built-in plain texts with the adapter on and off."""
    from prefopt.data.prompts import plain_texts
    from prefopt.evaluation.perplexity import perplexity

    texts = plain_texts()
    after = perplexity(tuned.model, tuned.tokenizer, texts)
    with tuned.adapter_off() as base:
        before = perplexity(base.model, base.tokenizer, texts)
    return PerplexityChange(before, after, f"{len(texts)} paragraphs of plain prose")


def training_curve(points: Sequence[TrainingPoint]) -> list[CurvePoint]:
    """A DPO log as the report draws it."""
    return [
        CurvePoint(
            step=p.step,
            epoch=p.epoch,
            loss=p.loss,
            margin=p.margin,
            accuracy=p.accuracy,
            chosen_logp=p.chosen_logp,
            rejected_logp=p.rejected_logp,
            learning_rate=p.learning_rate,
        )
        for p in points
    ]


def evaluate_model(
    prompts: str | Sequence[Prompt],
    model: str,
    adapter: str | Path | None,
    out: str | Path,
    *,
    judge: str | Judge = "rules:house_style",
    rubric: str | Rubric = "house_style",
    max_usd: float | None = None,
    prices: str | Path | None = None,
    sampling: SamplingSettings | None = None,
    seed: int = 1,
    device: Device = "auto",
    progress: bool = True,
    stop: Stop = "never",
    human_labels: str | Path | None = None,
    to_label: int = 0,
    beta: float | None = None,
    checkpoints: str | Path | Sequence[str | Path] = (),
    capabilities: str | Sequence[str] = "none",
    max_drop: float = 0.0,
) -> EvalReport:
    """Sample answers with the adapter on and off, judge them, and write a report.

    Args:
        prompts: what to ask; prompts that training did not see. A name or a list.
        model: the base model's name.
        adapter: the tuned adapter. Its training log is read where it lies in the folder.
        out: folder for the report, the answers and the judgements.
        judge: a judge, or its text form.
        rubric: what better means, when `judge` is a text.
        max_usd: the most a paid judge may spend, when `judge` is a text.
        prices: a file of prices for models that have none built in, when `judge` is a text.
        sampling: how answers are sampled, the same for both sides.
        seed: of the sampling.
        device: where the model runs.
        progress: show bars.
        stop: "decided" judges prompts in random order until the result is sure, which saves calls
            to a paid judge; see `prefopt.evaluation.sequential.judge_until_decided`.
        human_labels: people's labels of some of these pairs; see `check_against_people`.
        to_label: write this many pairs to `to_label.jsonl` for people to label; a file that is there
            already is left alone.
        beta: of DPO or PPO, for implicit rewards; None takes it from the adapter's record, see
            `prefopt.evaluation.trained_beta`.
        checkpoints: further adapters of the same base model for the picture of win rate against KL:
            folders of adapters, or folders that hold them; see `find_checkpoints`.
        capabilities: "none", "offline" (the built-in tasks) or names of tasks, to see what was
            forgotten; see `prefopt.evaluation.capabilities`.
        max_drop: the worsening of a task that its gate lets pass.

    Raises:
        ValueError: no adapter given, or a beta that is not positive.
        DataError, ModelError, JudgeError: as the steps raise them.
    """
    from prefopt.data.prompts import load_prompts
    from prefopt.data.records import write_records
    from prefopt.evaluation.capabilities import check_tasks, measure_capabilities
    from prefopt.evaluation.frontier import find_checkpoints, measure_frontier
    from prefopt.evaluation.policy_shift import measure_shift
    from prefopt.evaluation.trained_beta import trained_beta

    if adapter is None:
        raise ValueError(
            "evaluating a model needs the tuned adapter: pass --adapter FOLDER, or compare answer "
            "files with --tuned_answers and --base_answers, or with --answers."
        )
    if beta is not None and not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive, as in training, got {beta}.")
    asked = _asked(judge, rubric, max_usd, prices)
    _check_labels(human_labels, to_label)
    further = find_checkpoints(checkpoints) if checkpoints else []
    _check_adapter(adapter)
    if beta is None:
        beta, reason = trained_beta(adapter)
        if beta is None:
            logger.info("no implicit rewards: %s; --beta gives it.", reason)
        else:
            logger.info("beta %g, from %s.", beta, reason)
    if capabilities != "none":
        check_tasks(capabilities, asked)
    questions = load_prompts(prompts) if isinstance(prompts, str) else list(prompts)
    out = Path(out)
    weights = content_hash([model_fingerprint(model), adapter_fingerprint(str(adapter))])
    tuned = load_model(model, adapter=adapter, device=device)

    def answer(side: str, loaded: LanguageModel) -> list[Candidate]:
        return sample_candidates(
            questions, loaded, k=1, settings=sampling, seed=seed, progress=progress,
            partial=out / f".answers_{side}.{weights[:12]}.partial",
            description=f"answering ({side} model)",
        )  # fmt: skip

    out.mkdir(parents=True, exist_ok=True)
    measured = None
    if capabilities != "none":
        measured = measure_capabilities(
            tuned, tasks=capabilities, max_drop=max_drop, judge=asked, seed=seed, progress=progress,
            out=out / "capabilities",
        )  # fmt: skip
    answers = {"tuned": answer("tuned", tuned)}
    with tuned.adapter_off() as base:
        answers["base"] = answer("base", replace(base, name=model))
    for side, candidates in answers.items():
        write_records(out / f"answers_{side}.jsonl", candidates)
    judged, figures = _judge(
        compare_answers(answers["tuned"], answers["base"]),
        out, asked, progress, stop, human_labels, to_label,
    )  # fmt: skip
    if measured is not None:
        figures["capabilities"] = measured
    figures |= measure_forgetting(tuned)._asdict()
    figures |= _training(adapter, beta)
    figures["shift"] = measure_shift(
        tuned, answers["tuned"], answers["base"], beta=beta,
        sampling=sampling or SamplingSettings(), progress=progress,
    )  # fmt: skip
    del tuned, base  # checkpoints are loaded one at a time, in its place
    if further:
        scored = {j.comparison.b.prompt.prompt_id for j in judged}  # fewer where judging stopped
        frontier = measure_frontier(
            further, model, [a for a in answers["base"] if a.prompt.prompt_id in scored], out, asked,
            sampling=sampling, seed=seed, device=device, progress=progress,
        )  # fmt: skip
        figures["frontier"] = frontier.points
        figures["details"] = {
            f"Further model {name}": line for name, line in frontier.lines.items()
        }
        figures["cost_usd"] = frontier.cost_usd + sum(
            v.usage.cost_usd for j in judged for v in j.verdicts
        )
    return _report(judged, out, asked, **figures)


def evaluate_answers(
    tuned_answers: str | Path | Sequence[Candidate] | None,
    base_answers: str | Path | Sequence[Candidate] | None,
    out: str | Path,
    *,
    judge: str | Judge = "rules:house_style",
    rubric: str | Rubric = "house_style",
    max_usd: float | None = None,
    prices: str | Path | None = None,
    progress: bool = True,
    stop: Stop = "never",
    human_labels: str | Path | None = None,
    to_label: int = 0,
) -> EvalReport:
    """Judge two sets of answers to the same prompts and write a report. No model is loaded.

    `stop`, `human_labels` and `to_label` are those of `evaluate_model`.

    Raises:
        ValueError: one side is missing.
        DataError, JudgeError: as the steps raise them.
    """
    if tuned_answers is None or base_answers is None:
        raise ValueError("comparing answers needs both sides: tuned_answers and base_answers.")
    asked = _asked(judge, rubric, max_usd, prices)
    _check_labels(human_labels, to_label)
    comparisons = compare_answers(_read(tuned_answers), _read(base_answers))
    out = Path(out)
    judged, figures = _judge(comparisons, out, asked, progress, stop, human_labels, to_label)
    return _report(judged, out, asked, **figures)


def compare_models(
    answers: Mapping[str, str | Path | Sequence[Candidate]],
    out: str | Path,
    *,
    baseline: str | None = None,
    tuned: str | None = None,
    pairs: Pairs = "all",
    judge: str | Judge = "rules:house_style",
    rubric: str | Rubric = "house_style",
    max_usd: float | None = None,
    prices: str | Path | None = None,
    progress: bool = True,
    stop: Stop = "never",
    human_labels: str | Path | None = None,
    to_label: int = 0,
) -> EvalReport:
    """Judge any number of models' answers to the same prompts, rank the models and write a report.

    How many verdicts that takes, and what they cost, is logged before any is asked for. The report
    is about one pair, `tuned` against `baseline`, with the ranking of all models in it.
    `judged.jsonl` holds that pair's comparisons, `judged_all.jsonl` all.

    Args:
        answers: for each model's name its answers, or a JSONL file of them. Each has the same number
            of answers to every prompt.
        out: folder for the report and the judgements.
        baseline: the model that the others are held against; by default the first.
        tuned: the model that the report is about; by default the last.
        pairs: "all" compares every two models, "baseline" each with the baseline: fewer calls, and
            less known of the others' order.
        judge, rubric, max_usd, prices, progress, human_labels, to_label: see `evaluate_model`. Labels
            are of the pair that the report is about.
        stop: "decided" is for two models only.

    Raises:
        ValueError: fewer than two models, names that are not among them, or `stop` with more than two.
        DataError, JudgeError: as the steps raise them.
    """
    from prefopt.data.records import write_records
    from prefopt.evaluation.ranking import rank_models
    from prefopt.evaluation.style import STYLE_FEATURES

    names = list(answers)
    problems = []
    if len(names) < 2:
        problems.append(f"comparing needs the answers of at least two models, got {len(names)}")
    for what, name in (("baseline", baseline), ("tuned", tuned)):
        if name is not None and name not in names:
            problems.append(f"{what} {name!r} is none of the models {', '.join(names)}")
    if stop != "never" and len(names) > 2:
        problems.append("stopping once the result is sure is for two models; leave out --stop")
    if not problems:
        others = [name for name in names if name != (baseline or names[0])]
        baseline, tuned = baseline or names[0], tuned or others[-1]
        if baseline == tuned:
            problems.append(f"baseline and tuned model are both {baseline!r}")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    assert baseline is not None
    assert tuned is not None
    asked = _asked(judge, rubric, max_usd, prices)
    _check_labels(human_labels, to_label)
    named = {
        name: [msgspec.structs.replace(c, model=name) for c in _read(given)]
        for name, given in answers.items()
    }
    # The pair that the report is about comes first; in each pair the later model is `a`.
    order = [baseline, *(n for n in names if n not in (baseline, tuned)), tuned]
    wanted = [
        (a, b) for b, a in itertools.combinations(order, 2) if pairs == "all" or b == baseline
    ]
    wanted.sort(key=lambda pair: pair != (tuned, baseline))
    comparisons = {(a, b): compare_answers(named[a], named[b], names=(a, b)) for a, b in wanted}
    out = Path(out)
    _announce(comparisons, asked, out)
    every: list[JudgedComparison] = []
    if len(names) > 2:
        out.mkdir(parents=True, exist_ok=True)
        every = judge_comparisons(
            [c for found in comparisons.values() for c in found],
            asked, ledger=out / "judgements.sqlite", progress=progress,
        )  # fmt: skip
        write_records(out / "judged_all.jsonl", every)
    judged, figures = _judge(
        comparisons[tuned, baseline], out, asked, progress, stop, human_labels, to_label
    )
    if every:
        details = {"Compared": f"{len(names)} models, {len(wanted)} pairs"}
        try:
            figures["ranking"] = rank_models(every)
            figures["ranking_at_equal_style"] = rank_models(every, control=STYLE_FEATURES)
        except ValueError as error:  # verdicts that failed may leave models without any
            details["Ranking"] = f"none: {error}"
        figures |= {
            "details": details,
            "title": f"{tuned} against {baseline}, and {len(names)} models ranked",
            "cost_usd": sum(v.usage.cost_usd for j in every for v in j.verdicts),
        }
    return _report(judged, out, asked, base_model=baseline, tuned_model=tuned, **figures)


def _asked(
    judge: str | Judge, rubric: str | Rubric, max_usd: float | None, prices: str | Path | None
) -> Judge:
    if isinstance(judge, Judge):
        return judge
    return load_judge(judge, rubric=rubric, max_usd=max_usd, prices=prices)


def _read(given: str | Path | Sequence[Candidate]) -> list[Candidate]:
    if not isinstance(given, str | Path):
        return list(given)
    from prefopt.data.candidates import load_candidates

    return load_candidates(given)


def _check_adapter(adapter: str | Path) -> None:
    """Fail before a model is loaded for what is no adapter and cannot be on the Hub either."""
    folder = Path(adapter).expanduser()
    if (folder / "adapter_config.json").is_file():
        return
    if folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(adapter)):
        raise DataError(
            f"{adapter} {'holds no adapter' if folder.is_dir() else 'is not there'}. An adapter is a "
            "folder with adapter_config.json and adapter_model.safetensors, such as "
            "`prefopt train dpo` and `prefopt run` write."
        )


def _check_labels(human_labels: str | Path | None, to_label: int) -> None:
    """Fail for what cannot be used now rather than after an hour of judging."""
    if to_label < 0:
        raise ValueError(f"to_label is a number of pairs, got {to_label}.")
    if human_labels is not None:
        from prefopt.data.rows import read_rows

        rows = read_rows(human_labels)
        if rows.problems:
            raise rows.bad("labelled pairs", [])


def _announce(
    comparisons: Mapping[tuple[str, str], Sequence[Comparison]], judge: Judge, out: Path
) -> None:
    ledger = out / "judgements.sqlite"
    flat = [c for found in comparisons.values() for c in found]
    n_prompts = len({c.prompt.prompt_id for c in flat})
    n_models = len({name for pair in comparisons for name in pair})
    cost = estimate_missing(flat, judge, ledger=ledger)
    logger.info(
        "%d models, %d pairs, %d prompts: %s verdicts in both orders%s",
        n_models, len(comparisons), n_prompts, f"{2 * len(flat):,}",
        "" if cost is None else f"; still to be asked: {cost}",
    )  # fmt: skip


def _judge(
    comparisons: Sequence[Comparison],
    out: Path,
    judge: Judge,
    progress: bool,
    stop: Stop,
    human_labels: str | Path | None,
    to_label: int,
) -> tuple[list[JudgedComparison], dict[str, Any]]:
    """The verdicts, kept in `judged.jsonl`, and what else of the report comes with them."""
    from prefopt.data.records import write_records

    figures: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    ledger = out / "judgements.sqlite"
    if stop == "decided":
        judged, figures["stopping"] = judge_until_decided(
            comparisons, judge, ledger=ledger, progress=progress
        )
    else:
        judged = judge_comparisons(comparisons, judge, ledger=ledger, progress=progress)
    write_records(out / "judged.jsonl", judged)
    path = out / TO_LABEL
    if to_label and path.exists():
        logger.info("%s is there already, perhaps with labels in it, and is left as it is.", path)
    elif to_label:
        n = write_to_label([j.comparison for j in judged], path, n=to_label)
        logger.info(
            "%d pairs to label in %s: fill in `label` (A, B or tie), then the same command with "
            "--human_labels %s instead of --to_label.", n, path, path,
        )  # fmt: skip
    if human_labels is not None:
        figures["human"] = check_against_people(judged, human_labels)
    return judged, figures


def _training(adapter: str | Path, beta: float | None) -> dict[str, Any]:
    """The training curve and health notes of a DPO adapter; nothing where it has no such log."""
    from prefopt.training.dpo import load_training_log
    from prefopt.training.health import diagnose

    if not (Path(adapter) / "training_log.jsonl").is_file():
        return {}
    try:
        points = load_training_log(adapter)
    except DataError:  # the log of another trainer, which has other columns
        return {}
    if not points:
        return {}
    return {"training": training_curve(points), "health": diagnose(points, beta=beta)}


def _report(
    judged: Sequence[JudgedComparison], out: Path, judge: Judge, **figures: Any
) -> EvalReport:
    report = build_report(judged, judge=judge.name, rubric=judge.rubric, **figures)
    write_report(report, out)
    return report
