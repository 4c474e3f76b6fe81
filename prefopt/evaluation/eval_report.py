"""The end of the flow: one `EvalReport`, and the four files it is read in.

In: comparisons of tuned and baseline answers with their verdicts, and whatever else is known
(people's labels, a ranking, capabilities, distance, perplexity, training curve). Out: `report.json`
(the record, typed), `report.md`, `report.html` (one file, no script, nothing loaded) and
`report.png`. What is not given is left out of the report or named as not measured; it is never shown
as zero. It runs no model and no judge.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from prefopt.data.records import write_bytes
from prefopt.evaluation.advice import (
    advice_for,
    doubts_about,
    interval,
    measured_on,
    percent,
    signed_percent,
)
from prefopt.evaluation.capability_report import CapabilityReport
from prefopt.evaluation.figure import picture_bytes, svg_panels
from prefopt.evaluation.human_labels import HumanCheck
from prefopt.evaluation.length_control import LengthControl, length_controlled_win_rate
from prefopt.evaluation.model_figures import (
    AnswerFigures,
    FrontierPoint,
    PolicyShift,
    answer_figures,
)
from prefopt.evaluation.ranking import Ranking
from prefopt.evaluation.report_tables import capability_rows, model_rows, ranking_rows
from prefopt.evaluation.sequential import SequentialResult
from prefopt.evaluation.style_control import StyleControl, style_controlled_win_rate
from prefopt.evaluation.win_rate import Result, WinRate, result_of, win_rate
from prefopt.judges.rubric import Rubric
from prefopt.page_template import page_environment
from prefopt.training.health import HealthNote
from prefopt.types import JudgedComparison, LeftOut, PreferenceGroup, Prompt

ANSWERS_SHOWN = 8
"""How many answer pairs are open in the report; the rest are behind one click."""

_VERSIONED = ("prefopt", "torch", "transformers", "trl", "peft", "scipy")


class AnswerPair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt, the baseline's answer (before), the tuned model's (after), and who won.

    `rationales` holds one text per verdict, empty where the judge gave none: first the verdict with
    the tuned model's answer shown first, then the one with the baseline's first. `failures` says
    why a verdict is missing. An answer that is cut off ended at the token limit.
    """

    prompt: Prompt
    before: str
    after: str
    result: Result
    flipped: bool = False
    rationales: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    before_cut_off: bool = False
    after_cut_off: bool = False


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What training logged at one optimizer step; None where it logged nothing.

    `margin` is the mean implicit reward of the chosen minus that of the rejected answers (nats
    times beta), `accuracy` the share of pairs with a positive margin, `chosen_logp` and
    `rejected_logp` the mean log-probability of a whole answer in nats.
    """

    step: int
    epoch: float | None = None
    loss: float | None = None
    margin: float | None = None
    accuracy: float | None = None
    chosen_logp: float | None = None
    rejected_logp: float | None = None
    learning_rate: float | None = None


class LabelCounts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the training labels came from: pairs used, comparisons left out by reason.

    `flip_rate` is the share of comparisons judged in both orders whose two verdicts named opposite
    winners; None when it is not known.
    """

    n_prompts: int
    n_pairs: int
    left_out: dict[str, int] = {}
    flip_rate: float | None = None


class EvalReport(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.eval_report/1",
):
    """Everything the report shows. Only the title, the models, the judge and the rate are needed.

    `length_control` is the win rate at equal length, `style_control` at equal length and formatting,
    `stopping` where judging stopped before all prompts were asked. `human` is what people's labels
    say, `ranking` the place among more than two models, `ranking_at_equal_style` the same with style
    held equal. `answer_figures` are of the answers, `shift` is how far tuning moved the model, and
    `frontier` further models in the picture of win rate against KL. `capabilities` are the tasks that
    were not tuning's aim. `perplexity_change` is the fraction by which perplexity on `perplexity_text`
    rose. `cost_usd` is what judging cost in all, in US dollars, None when not known; `n_verdicts`
    and `verdicts_usd` are of the verdicts behind this report alone. `details` are further lines of
    "how it was made", `prompts_name` what the prompts are called in sentences ("held-out prompts").
    """

    title: str
    base_model: str
    tuned_model: str
    judge: str
    win_rate: WinRate
    answers: tuple[AnswerPair, ...]
    rubric_name: str = ""
    rubric_text: str = ""
    judge_note: str = ""
    prompts_name: str = "prompts"
    length_control: LengthControl | None = None
    style_control: StyleControl | None = None
    stopping: SequentialResult | None = None
    human: HumanCheck | None = None
    ranking: Ranking | None = None
    ranking_at_equal_style: Ranking | None = None
    answer_figures: AnswerFigures | None = None
    shift: PolicyShift | None = None
    frontier: tuple[FrontierPoint, ...] = ()
    capabilities: CapabilityReport | None = None
    perplexity_base: float | None = None
    perplexity_tuned: float | None = None
    perplexity_change: float | None = None
    perplexity_text: str = "unrelated text"
    training: tuple[CurvePoint, ...] = ()
    health: tuple[HealthNote, ...] = ()
    labels: LabelCounts | None = None
    preflight: tuple[str, ...] = ()
    cost_usd: float | None = None
    n_verdicts: int | None = None
    verdicts_usd: float | None = None
    seeds: dict[str, int] = {}
    details: dict[str, str] = {}
    created_with: dict[str, str] = {}
    created_at: str = ""


def build_report(
    judged: Sequence[JudgedComparison],
    *,
    title: str = "What the tuning changed",
    base_model: str | None = None,
    tuned_model: str | None = None,
    judge: str | None = None,
    rubric: Rubric | None = None,
    judge_note: str = "",
    prompts_name: str = "prompts",
    perplexity_base: float | None = None,
    perplexity_tuned: float | None = None,
    perplexity_text: str = "unrelated text",
    training: Sequence[CurvePoint] = (),
    health: Sequence[HealthNote] = (),
    labels: LabelCounts | None = None,
    preflight: Sequence[str] = (),
    cost_usd: float | None = None,
    seeds: Mapping[str, int] | None = None,
    details: Mapping[str, str] | None = None,
    created_at: str = "",
    seed: int = 0,
    stopping: SequentialResult | None = None,
    human: HumanCheck | None = None,
    ranking: Ranking | None = None,
    ranking_at_equal_style: Ranking | None = None,
    shift: PolicyShift | None = None,
    frontier: Sequence[FrontierPoint] = (),
    capabilities: CapabilityReport | None = None,
) -> EvalReport:
    """Gather an evaluation into one report.

    Args:
        judged: comparisons with the tuned model's answer as `a` and the baseline's as `b`.
        title: the report's heading.
        base_model: the baseline's name; by default the model named in the answers.
        tuned_model: likewise for the tuned model.
        judge: the judge's name; by default the one named in the verdicts.
        rubric: what the judge was told to prefer.
        judge_note: what a reader should know about the judge, such as its agreement with people.
        prompts_name: what to call the prompts. Say "held-out prompts" only if training saw none.
        perplexity_base: of the baseline on `perplexity_text`, see `prefopt.evaluation.perplexity`.
        perplexity_tuned: of the tuned model on the same text.
        perplexity_text: what that text is, in a few words.
        training: what training logged, in order of steps.
        health: what was checked about training and data.
        labels: what became of the training comparisons, see `count_labels`.
        preflight: lines of the check made before training.
        cost_usd: what judging cost in all; by default the cost of the verdicts in `judged`.
        seeds: the seeds of the stages, by name.
        details: further facts of how it was made, by name.
        created_at: date or time to show; none is shown by default, so that the same input gives the
            same files.
        seed: of the bootstrap interval.
        stopping: where `judge_until_decided` stopped, when it judged these.
        human: people's labels, see `check_against_people`.
        ranking: of more than two models, see `rank_models`.
        ranking_at_equal_style: the same with style held equal.
        shift: how far tuning moved the model, see `measure_shift`.
        frontier: further models in the picture of win rate against KL, such as checkpoints.
        capabilities: see `measure_capabilities`.

    Raises:
        ValueError: when no comparison has a verdict, or a perplexity is impossible or alone.
    """
    early = None if stopping is None else (stopping.low, stopping.high)
    rate = win_rate(judged, seed=seed, stopped=early)
    change = _perplexity_change(perplexity_base, perplexity_tuned)
    verdicts = [v for j in judged for v in j.verdicts]
    verdicts_usd = sum(v.usage.cost_usd for v in verdicts)
    if cost_usd is None:
        cost_usd = verdicts_usd
    return EvalReport(
        title=title,
        base_model=base_model or _names(j.comparison.b.model for j in judged),
        tuned_model=tuned_model or _names(j.comparison.a.model for j in judged),
        judge=judge or _names(v.judge for v in verdicts),
        win_rate=rate,
        answers=tuple(answer_pair(j) for j in judged),
        rubric_name=rubric.name if rubric else "",
        rubric_text=rubric.text if rubric else "",
        judge_note=judge_note,
        prompts_name=prompts_name,
        length_control=length_controlled_win_rate(judged),
        style_control=style_controlled_win_rate(judged),
        stopping=stopping,
        human=human,
        ranking=ranking,
        ranking_at_equal_style=ranking_at_equal_style,
        answer_figures=answer_figures(judged),
        shift=shift,
        frontier=tuple(frontier),
        capabilities=capabilities,
        perplexity_base=perplexity_base,
        perplexity_tuned=perplexity_tuned,
        perplexity_change=change,
        perplexity_text=perplexity_text,
        training=tuple(training),
        health=tuple(health),
        labels=labels,
        preflight=tuple(preflight),
        cost_usd=cost_usd,
        n_verdicts=len(verdicts),
        verdicts_usd=verdicts_usd,
        seeds={**(seeds or {}), "bootstrap": seed},
        details=dict(details or {}),
        created_with=installed_versions(),
        created_at=created_at,
    )


def count_labels(
    groups: Sequence[PreferenceGroup],
    left_out: Sequence[LeftOut],
    judged: Sequence[JudgedComparison] = (),
) -> LabelCounts:
    """Count what became of the training comparisons; `judged` is needed for the flip rate only."""
    both = [j for j in judged if j.backward is not None and not j.failures]
    return LabelCounts(
        n_prompts=len({g.prompt.prompt_id for g in groups if g.preferences}),
        n_pairs=sum(len(g.preferences) for g in groups),
        left_out=dict(Counter(entry.reason for entry in left_out).most_common()),
        flip_rate=sum(j.flipped for j in both) / len(both) if both else None,
    )


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the packages that can change a result, where installed."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_report(report: EvalReport, folder: str | Path) -> dict[str, Path]:
    """Write `report.json`, `.md`, `.html` and `.png` into `folder`; returns their paths by ending.

    Everything is rendered before the first file is written, and each file replaces an older one in
    one step. The same report gives the same bytes. Raises DataError when the folder is unwritable.
    """
    content = {
        "json": msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n",
        "md": report_markdown(report).encode(),
        "html": report_html(report).encode(),
        "png": picture_bytes(report),
    }
    paths = {ending: Path(folder) / f"report.{ending}" for ending in content}
    for ending, path in paths.items():
        write_bytes(path, content[ending])
    return paths


def report_html(report: EvalReport) -> str:
    """The report as one HTML page: no script, no outside file, everything a model wrote escaped."""
    return _render("report.html.j2", report, autoescape=True, panels=svg_panels(report))


def report_markdown(report: EvalReport) -> str:
    """The report as GitHub-flavoured Markdown beside `report.png`."""
    return _render("report.md.j2", report, autoescape=False)


def _render(template: str, report: EvalReport, *, autoescape: bool, **extra: Any) -> str:
    environment = page_environment("evaluation", autoescape=autoescape)
    environment.filters.update(
        percent=percent,
        signed_percent=signed_percent,
        unbroken=_unbroken,
        inline=_markdown_inline,
        fenced=_markdown_fenced,
    )
    return environment.get_template(template).render(
        report=report,
        rate=report.win_rate,
        advice=advice_for(report),
        doubts=doubts_about(report),
        measured_on=measured_on(report),
        models=model_rows(report),
        capabilities=capability_rows(report),
        places=ranking_rows(report),
        interval=interval,
        shown=ANSWERS_SHOWN,
        lost=[n for n, pair in enumerate(report.answers, start=1) if pair.result == "loss"],
        cut_off={
            "before": sum(pair.before_cut_off for pair in report.answers),
            "after": sum(pair.after_cut_off for pair in report.answers),
        },
        **extra,
    )


def answer_pair(judged: JudgedComparison) -> AnswerPair:
    """A judged comparison as the report shows it; its `a` is the tuned model's answer."""
    comparison = judged.comparison
    return AnswerPair(
        prompt=comparison.prompt,
        before=comparison.b.text,
        after=comparison.a.text,
        result=result_of(judged),
        flipped=judged.flipped,
        rationales=tuple(v.rationale for v in judged.verdicts),
        failures=judged.failures,
        before_cut_off=comparison.b.finish_reason == "length",
        after_cut_off=comparison.a.finish_reason == "length",
    )


def _perplexity_change(base: float | None, tuned: float | None) -> float | None:
    for name, value in (("perplexity_base", base), ("perplexity_tuned", tuned)):
        if value is not None and not (math.isfinite(value) and value >= 1):
            raise ValueError(f"{name} must be a finite number of at least 1, got {value}.")
    if (base is None) != (tuned is None):
        raise ValueError(
            "a perplexity means something only beside the other model's, got "
            f"perplexity_base={base} and perplexity_tuned={tuned}. Give both or neither."
        )
    return None if base is None or tuned is None else tuned / base - 1


def _names(names: Any) -> str:
    return ", ".join(dict.fromkeys(names))


def _unbroken(text: str) -> str:
    """Keep a number and its percent sign on one line."""
    return re.sub(r"(?<=\d) %", "\u00a0%", text)


def _markdown_inline(text: str) -> str:
    """Text on one line in which nothing is Markdown, HTML, a formula or a mention."""
    one_line = re.sub(r"([\\`*_\[\]<>|~&$@])", r"\\\1", " ".join(text.split()))
    # At the start of a line a few more characters would open a list or a heading.
    return re.sub(r"^(\d*)([-+#.)])(?=\s|#|$)", r"\1\\\2", one_line)


def _markdown_fenced(text: str) -> str:
    """Text in a code block whose fence is longer than any fence inside it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
