"""A report's tables in words: the two models' figures, capabilities, the ranking.

In: an `EvalReport`. Out: rows of text, ready for HTML or Markdown. A figure that was not measured is
named so, with the reason, and is never a zero. Pure text; nothing is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from prefopt.evaluation.advice import counted, percent, task_value

if TYPE_CHECKING:
    from prefopt.evaluation.capability_report import TaskChange
    from prefopt.evaluation.eval_report import EvalReport
    from prefopt.evaluation.model_figures import Mean


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of both models; "not measured" where it was not, with the reason in `meaning`."""

    name: str
    before: str
    after: str
    measured_on: str
    meaning: str


class CapabilityRow(msgspec.Struct, frozen=True, kw_only=True):
    """One task of the capability table, in words."""

    title: str
    n: str
    before: str
    after: str
    change: str
    p_value: str
    verdict: str
    level: Literal["ok", "problem"]


class RankingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the ranking table, in words. `at_equal_style` is a dash where it is not known."""

    place: str
    model: str
    win_rate: str
    elo: str
    record: str
    at_equal_style: str


def model_rows(report: EvalReport) -> list[ModelRow]:
    """What both models' answers are like, and how far tuning moved the model."""
    rate, figures, shift = report.win_rate, report.answer_figures, report.shift
    rows = [
        ModelRow(
            name="Words an answer",
            before=f"{rate.mean_words_baseline:.0f}",
            after=f"{rate.mean_words_tuned:.0f}",
            measured_on=counted(rate.n, "answer"),
            meaning="Mean over the answers that have a verdict.",
        )
    ]
    if figures is None:
        rows += [
            _unmeasured("Different words (distinct-1)", "not part of this report"),
            _unmeasured("Different word pairs (distinct-2)", "not part of this report"),
            _unmeasured("Refusals", "not part of this report"),
        ]
    else:
        words = f"{figures.n_words_compared:,} words a side"
        for name, before, after in (
            ("words (distinct-1)", figures.distinct_1_before, figures.distinct_1_after),
            ("word pairs (distinct-2)", figures.distinct_2_before, figures.distinct_2_after),
        ):
            rows.append(
                ModelRow(
                    name=f"Different {name}",
                    before="not measured" if before is None else percent(before),
                    after="not measured" if after is None else percent(after),
                    measured_on=words,
                    meaning="Share of all, with each pair of answers cut to the shorter one. A fall "
                    "means that answers repeat themselves or each other."
                    if before is not None
                    else "There is too little text.",
                )
            )
        rows.append(
            ModelRow(
                name="Refusals",
                before=f"{figures.refused_before} ({percent(figures.refused_before / figures.n)})",
                after=f"{figures.refused_after} ({percent(figures.refused_after / figures.n)})",
                measured_on=counted(figures.n, "answer"),
                meaning="Answers that begin by saying they cannot or will not help: a rule on their "
                f"first sentence, for English. Paired test: p = {p_in_words(figures.refused_p)}.",
            )
        )
        if figures.empty_before or figures.empty_after:
            rows.append(
                ModelRow(
                    name="Empty answers",
                    before=str(figures.empty_before),
                    after=str(figures.empty_after),
                    measured_on=counted(figures.n, "answer"),
                    meaning="Answers without a word.",
                )
            )
    if shift is None:
        why = "it needs the models, and here only their answers were given"
        rows += [
            _unmeasured("KL to the base model (nats an answer)", why),
            _unmeasured("Implicit reward", why),
        ]
    else:
        left_out = f"; {shift.n_too_long} were too long for the model" if shift.n_too_long else ""
        taken = f"{counted(shift.n_answers - shift.n_too_long, 'answer')}{left_out}"
        sampled = f" Sampled {shift.sampled}." if shift.sampled else ""
        rows.append(
            ModelRow(
                name="KL to the base model (nats an answer)",
                before="0",
                after=_mean(shift.kl),
                measured_on=taken,
                meaning="How much more likely the tuned model finds its own answers than the base "
                f"model does: mean log-ratio (k1), {shift.kl_per_token:.2f} nats a token.{sampled}",
            )
        )
        if shift.reward is None:
            base = shift.on_base_answers
            there = "" if base is None else f" and {base.value:+.1f} on the base model's"
            rows.append(
                _unmeasured(
                    "Implicit reward",
                    f"beta is not known (--beta); log-ratios are {shift.kl.value:+.1f} nats on the "
                    f"tuned model's answers{there}",
                )
            )
        else:
            rows.append(
                ModelRow(
                    name="Implicit reward",
                    before="not measured"
                    if shift.reward_on_base_answers is None
                    else _signed(shift.reward_on_base_answers, 2),
                    after=_signed(shift.reward, 2),
                    measured_on=taken,
                    meaning=f"Beta ({shift.beta:g}) times the mean log-ratio of each side's answers.",
                )
            )
    margins = [
        (point.step, point.margin, point.accuracy)
        for point in report.training
        if point.margin is not None and math.isfinite(point.margin)
    ]
    if margins:
        (first, before, _), (last, after, right) = margins[0], margins[-1]
        accuracy = "" if right is None else f", right on {percent(right)} of pairs"
        rows.append(
            ModelRow(
                name="Margin, chosen over rejected",
                before=_signed(before, 2),
                after=_signed(after, 2),
                measured_on=f"training pairs, steps {first} and {last}",
                meaning="Lead of the chosen answers in implicit reward, as training logged "
                f"it{accuracy}.",
            )
        )
    else:
        rows.append(_unmeasured("Margin, chosen over rejected", "no training log was given"))
    if report.perplexity_base is not None and report.perplexity_tuned is not None:
        rows.append(
            ModelRow(
                name="Perplexity",
                before=f"{report.perplexity_base:.2f}",
                after=f"{report.perplexity_tuned:.2f}",
                measured_on=report.perplexity_text,
                meaning="How surprised the model is by other text; lower is better.",
            )
        )
    else:
        rows.append(
            _unmeasured("Perplexity", "it needs the models, and here only their answers were given")
        )
    return rows


def capability_rows(report: EvalReport) -> list[CapabilityRow]:
    """The capability table; empty where capabilities were not measured."""
    return [] if report.capabilities is None else task_rows(report.capabilities.tasks)


def task_rows(tasks: Sequence[TaskChange]) -> list[CapabilityRow]:
    """Tasks with their changes and intervals, those that dropped first."""
    order = {"dropped": 0, "gained": 1, "no change shown": 2}
    return [
        CapabilityRow(
            title=task.title,
            n=f"{task.n:,}",
            before=task_value(task, task.base),
            after=task_value(task, task.tuned),
            change=f"{_task_change(task, task.change)} ({_task_change(task, task.low)} to "
            f"{_task_change(task, task.high)})",
            p_value=p_in_words(task.p_value),
            verdict=_task_verdict(task),
            level="problem" if task.verdict == "dropped" else "ok",
        )
        for task in sorted(tasks, key=lambda t: order[t.verdict])
    ]


def ranking_rows(report: EvalReport) -> list[RankingRow]:
    """The ranking's table, strongest first; empty where fewer than three models were compared."""
    from prefopt.evaluation.ranking import ELO_PER_LOGIT

    if report.ranking is None:
        return []
    equal = {}
    if report.ranking_at_equal_style is not None:
        equal = {m.model: m for m in report.ranking_at_equal_style.models}
    rows = []
    for m in report.ranking.models:
        places = str(m.rank_low) if m.rank_low == m.rank_high else f"{m.rank_low}–{m.rank_high}"
        low, middle, high = (ELO_PER_LOGIT * x for x in (m.low, m.strength, m.high))
        bounds = f" ({_signed(low)} to {_signed(high)})" if math.isfinite(low) else ""
        rows.append(
            RankingRow(
                place=places,
                model=m.model,
                win_rate=percent(m.win_rate),
                elo=f"{_signed(middle)}{bounds}{' *' if m.unbounded else ''}",
                record=f"{m.wins} / {m.ties} / {m.losses}",
                at_equal_style=percent(equal[m.model].win_rate) if m.model in equal else "–",
            )
        )
    return rows


def _task_verdict(task: TaskChange) -> str:
    if task.verdict != "no change shown":
        return task.verdict
    if task.resolvable is None:
        return "no change shown; too few items to show any"
    size = f"{100 * task.resolvable:.0f} points" if task.is_share else f"{task.resolvable:.2g}"
    if not task.is_share and task.base:
        size = percent(task.resolvable / abs(task.base))
    return f"no change shown; {task.n:,} items can show {size}"


def _task_change(task: TaskChange, value: float) -> str:
    """In points where the metric is a share, else in percent of the base's figure."""
    if task.is_share:
        text = f"{100 * value:+.1f}"
    elif task.base:
        text = f"{100 * value / abs(task.base):+.1f} %"
    else:
        text = f"{value:+.3g}"
    return text.replace("-", "\u2212")


def _unmeasured(name: str, why: str) -> ModelRow:
    sentence = f"{why[0].upper()}{why[1:]}."
    return ModelRow(
        name=name, before="not measured", after="not measured", measured_on="–", meaning=sentence
    )


def _mean(mean: Mean) -> str:
    largest = max(abs(x) for x in (mean.value, mean.low, mean.high) if x is not None)
    digits = 1 if largest >= 1 else 2
    if mean.low is None or mean.high is None:
        return f"{mean.value:.{digits}f}".replace("-", "\u2212")
    text = f"{mean.value:.{digits}f} ({mean.low:.{digits}f} to {mean.high:.{digits}f})"
    return text.replace("-", "\u2212")


def p_in_words(p_value: float) -> str:
    """A p-value with two or three digits that mean something."""
    return (
        "under 0.001"
        if p_value < 0.001
        else f"{p_value:.3f}"
        if p_value < 0.1
        else f"{p_value:.2f}"
    )


def _signed(value: float, digits: int = 0) -> str:
    return f"{value:+.{digits}f}".replace("-", "\u2212")
