"""A tuned model or two answer files -> an `EvalReport` in a folder.

Puts sampling, judging, perplexity and the report in order; the figures themselves are made in
`win_rate`, `perplexity` and `eval_report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prefopt.errors import DataError
from prefopt.evaluation.eval_report import CurvePoint, EvalReport, build_report, write_report
from prefopt.evaluation.sequential import judge_until_decided
from prefopt.judges import Judge, Rubric, judge_comparisons, load_judge
from prefopt.models import Device, LanguageModel, load_model
from prefopt.sampling.candidates import SamplingSettings, sample_candidates
from prefopt.training.health import TrainingPoint
from prefopt.types import Candidate, Comparison, Prompt

Stop = Literal["never", "decided"]
"""When judging stops: when all is judged, or as soon as the result is sure."""


class PerplexityChange(NamedTuple):
    """Perplexity of the base and the tuned model on the same texts, ready for `build_report`."""

    perplexity_base: float
    perplexity_tuned: float
    perplexity_text: str


def compare_answers(tuned: Sequence[Candidate], base: Sequence[Candidate]) -> list[Comparison]:
    """Pair the two sides' answers prompt by prompt; the tuned side's answer is `a`.

    Several answers to one prompt are paired in order.

    Raises:
        DataError: a prompt without the same number of answers on both sides, all at once.
    """
    sides: dict[str, tuple[list[Candidate], list[Candidate]]] = {}
    for position, answers in enumerate((tuned, base)):
        for candidate in answers:
            sides.setdefault(candidate.prompt.prompt_id, ([], []))[position].append(candidate)
    problems = [
        f"prompt {(a or b)[0].prompt.text[:60]!r}: {len(a)} tuned and {len(b)} base answer(s)"
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
) -> EvalReport:
    """Sample answers with the adapter on and off, judge them, and write a report.

    Args:
        prompts: what to ask; prompts that training did not see. A name or a list.
        model: the base model's name.
        adapter: the tuned adapter.
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

    Raises:
        ValueError: no adapter given.
        DataError, ModelError, JudgeError: as the steps raise them.
    """
    from prefopt.data.prompts import load_prompts
    from prefopt.data.records import write_records

    if adapter is None:
        raise ValueError(
            "evaluating a model needs the tuned adapter: pass --adapter FOLDER, or compare two "
            "answer files with --tuned_answers and --base_answers."
        )
    asked = _asked(judge, rubric, max_usd, prices)
    questions = load_prompts(prompts) if isinstance(prompts, str) else list(prompts)
    out = Path(out)
    tuned = load_model(model, adapter=adapter, device=device)
    answers = {"tuned": _answers(questions, tuned, "tuned", sampling, seed, out, progress)}
    with tuned.adapter_off() as base:
        base = replace(base, name=model)
        answers["base"] = _answers(questions, base, "base", sampling, seed, out, progress)
    for side, candidates in answers.items():
        write_records(out / f"answers_{side}.jsonl", candidates)
    return _judge_and_report(
        answers["tuned"], answers["base"], out, asked, progress, stop,
        **measure_forgetting(tuned)._asdict(),
    )  # fmt: skip


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
) -> EvalReport:
    """Judge two sets of answers to the same prompts and write a report. No model is loaded.

    `stop` is that of `evaluate_model`.

    Raises:
        ValueError: one side is missing.
        DataError, JudgeError: as the steps raise them.
    """
    from prefopt.data.records import read_records

    if tuned_answers is None or base_answers is None:
        raise ValueError("comparing answers needs both sides: tuned_answers and base_answers.")
    asked = _asked(judge, rubric, max_usd, prices)
    tuned, base = (
        read_records(side, Candidate) if isinstance(side, str | Path) else list(side)
        for side in (tuned_answers, base_answers)
    )
    return _judge_and_report(tuned, base, Path(out), asked, progress, stop)


def _asked(
    judge: str | Judge, rubric: str | Rubric, max_usd: float | None, prices: str | Path | None
) -> Judge:
    if isinstance(judge, Judge):
        return judge
    return load_judge(judge, rubric=rubric, max_usd=max_usd, prices=prices)


def _answers(
    prompts: Sequence[Prompt],
    loaded: LanguageModel,
    side: str,
    sampling: SamplingSettings | None,
    seed: int,
    out: Path,
    progress: bool,
) -> list[Candidate]:
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f".answers_{side}.partial"
    found = sample_candidates(
        prompts, loaded, k=1, settings=sampling, seed=seed, partial=partial, progress=progress,
        description=f"answering ({side} model)",
    )  # fmt: skip
    partial.unlink(missing_ok=True)
    return found


def _judge_and_report(
    tuned: Sequence[Candidate],
    base: Sequence[Candidate],
    out: Path,
    judge: Judge,
    progress: bool,
    stop: Stop,
    **figures: Any,
) -> EvalReport:
    from prefopt.data.records import write_records

    comparisons, ledger = compare_answers(tuned, base), out / "judgements.sqlite"
    if stop == "decided":
        judged, figures["stopping"] = judge_until_decided(
            comparisons, judge, ledger=ledger, progress=progress
        )
    else:
        judged = judge_comparisons(comparisons, judge, ledger=ledger, progress=progress)
    write_records(out / "judged.jsonl", judged)
    report = build_report(judged, judge=judge.name, rubric=judge.rubric, **figures)
    write_report(report, out)
    return report
