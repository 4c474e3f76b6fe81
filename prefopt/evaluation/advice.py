"""What a report means, in sentences a reader can act on.

In: an `EvalReport`. Out: an `Advice` (a light, a headline, next steps) and a list of `Doubt`s (the
figures that could explain the result away). Pure text and arithmetic; the limits are named below.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from prefopt.evaluation.capability_report import TaskChange
    from prefopt.evaluation.eval_report import EvalReport
    from prefopt.evaluation.human_labels import HumanCheck
    from prefopt.evaluation.length_control import LengthControl
    from prefopt.evaluation.sequential import SequentialResult
    from prefopt.evaluation.style_control import StyleControl

# Conventions, not laws: where a sentence changes. All are fractions.
FORGOT_LITTLE = 0.02
FORGOT_MUCH = 0.10
MANY_FLIPS = 0.20
MANY_UNSCORED = 0.10
ONLY_LENGTH = 0.95
SURE_P = 0.05
_MOST_PROMPTS_ADVISED = 5_000


Light = Literal["good", "caution", "stop"]


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict in words. `level` is the light: good (go on), caution, stop.

    `power` says which difference this evaluation could have shown.
    """

    level: Light
    label: str
    headline: str
    power: str
    forgetting: str
    next_steps: tuple[str, ...]


class Doubt(msgspec.Struct, frozen=True, kw_only=True):
    """One figure that could explain the result away, and how to read it."""

    name: str
    value: str
    meaning: str


def advice_for(report: EvalReport) -> Advice:
    """The light, the headline and what to do next."""
    verdict = report.win_rate.verdict
    cautions = _cautions(report)
    level: Light
    if verdict == "worse":
        level, label = "stop", "Do not use this model"
        steps = [
            "Do not use this model: the judge prefers the answers from before tuning.",
            "Read the answers below, then the labels that were trained on: do the chosen answers "
            "follow the rubric?",
            "If the labels are right, train more gently: lower learning rate, higher beta, fewer "
            "epochs.",
            *cautions,
        ]
    elif verdict == "unclear":
        level, label = "caution", "No difference shown"
        steps = [_more_prompts(report), _more_effect(), *cautions]
    elif cautions:
        level, label = "caution", "Better, but check first"
        steps = [*cautions, _read_losses(report)]
    else:
        level, label = "good", "Better"
        steps = [
            _read_losses(report),
            "Then try the tuned model on prompts of your own: this test says nothing about "
            "prompts unlike these.",
        ]
    return Advice(
        level=level,
        label=label,
        headline=_headline(report),
        power=_power(report),
        forgetting=_forgetting(report),
        next_steps=tuple(steps),
    )


def doubts_about(report: EvalReport) -> list[Doubt]:
    """What a sceptic would ask, with the answers this evaluation can give."""
    rate = report.win_rate
    judged_both = rate.n - rate.n_one_order
    rows = [
        Doubt(
            name="If the shorter answer always won",
            value=percent(rate.shortest_wins_share),
            meaning="The tuned model's win rate under a rule that only counts words. Answers went "
            f"from {rate.mean_words_baseline:.0f} to {rate.mean_words_tuned:.0f} words on average.",
        ),
        Doubt(
            name="If the longer answer always won",
            value=percent(rate.longest_wins_share),
            meaning="The same for the opposite rule.",
        ),
    ]
    if report.length_control is not None:
        rows.append(_at_equal_length(report.length_control))
    if report.style_control is not None:
        rows.append(_at_equal_style(report.style_control))
    rows.append(_by_people(report.human))
    if rate.agrees_with_shortest is not None:
        rows.append(
            Doubt(
                name="Judge agrees with “shorter wins”",
                value=f"{percent(rate.agrees_with_shortest)} of {rate.n_length_decided}",
                meaning="Near 100 % the judge may only be rewarding short answers, near 0 % only "
                "long ones. 50 % means that length played no part.",
            )
        )
    if judged_both:
        rows.append(
            Doubt(
                name="Winner changed with the order shown",
                value=f"{rate.n_flipped} of {judged_both}",
                meaning="Position decided there, not quality. They count as ties.",
            )
        )
    if rate.first_position_share is not None:
        rows.append(
            Doubt(
                name="Judge named the answer shown first",
                value=percent(rate.first_position_share),
                meaning="50 % is a judge without a favourite position.",
            )
        )
    if rate.n_one_order:
        rows.append(
            Doubt(
                name="Judged in one order only",
                value=f"{rate.n_one_order} of {rate.n}",
                meaning="The tuned model's answer was always shown first there, so a judge that "
                "likes the first answer would look like a better model.",
            )
        )
    reasons = ", ".join(f"{name.replace('_', ' ')}: {k}" for name, k in _reasons(report))
    rows += [
        Doubt(
            name="Ties",
            value=f"{rate.n_tie} of {rate.n}",
            meaning="Each counts as half a win.",
        ),
        Doubt(
            name="No verdict",
            value=f"{rate.n_unscored} of {rate.n + rate.n_unscored}",
            meaning=f"Left out of every figure, not counted as ties ({reasons})."
            if reasons
            else "Every comparison got a verdict.",
        ),
    ]
    if report.stopping is not None:
        rows.append(_stopped(report.stopping))
        return rows  # the two figures below hold for a number of prompts that was set beforehand
    rows.append(
        Doubt(
            name="Smallest difference this test can show",
            value="none" if rate.mde_points is None else f"{_points(rate.mde_points)} points",
            meaning=f"Win rates closer to 50 % than that would usually look like chance with "
            f"{rate.n_prompts} prompts (80 % power).",
        )
    )
    if rate.bootstrap_low is not None and rate.bootstrap_high is not None:
        rows.append(
            Doubt(
                name="The 95 % interval, computed another way",
                value=interval(rate.bootstrap_low, rate.bootstrap_high),
                meaning="Resampling the prompts (bootstrap). Far from the headline's interval "
                "would mean that neither is to be trusted.",
            )
        )
    return rows


def measured_on(report: EvalReport) -> str:
    """What stands behind every figure of the judge: sample, judge quality, cost."""
    rate = report.win_rate
    both = rate.n - rate.n_one_order
    parts = [counted(rate.n_prompts, "prompt")]
    if rate.n != rate.n_prompts:
        parts[0] = f"{counted(rate.n, 'comparison')} of {parts[0]}"
    parts[0] += ", judged in both orders" if both == rate.n else ", judged in one order only"
    if 0 < both < rate.n:
        parts[0] = f"{counted(rate.n, 'comparison')}, {both} of them judged in both orders"
    if both:
        parts.append(f"the order decided in {percent(rate.n_flipped / both)}")
    if rate.first_position_share is not None:
        parts.append(f"first answer named {percent(rate.first_position_share)}")
    accuracy = None if report.human is None else report.human.agreement.accuracy
    if accuracy is None:
        parts.append("judge not checked against people here")
    else:
        parts.append(
            f"judge right on {percent(accuracy.value)} ({interval(accuracy.low, accuracy.high)}) of "
            f"{counted(accuracy.n, 'human label')}"
        )
    if report.n_verdicts is not None and report.verdicts_usd is not None:
        price = f"${report.verdicts_usd:.2f}" if report.verdicts_usd else "no charge"
        parts.append(f"{report.n_verdicts:,} verdicts, {price}")
    return " · ".join(parts)


def _at_equal_length(control: LengthControl) -> Doubt:
    name = "If the answers were equally long"
    if control.win_rate is None or control.low is None or control.high is None:
        return Doubt(name=name, value="not known", meaning=" ".join(control.notes))
    meaning = "The win rate with the effect of length taken out (AlpacaEval's regression)."
    return Doubt(
        name=name,
        value=f"{percent(control.win_rate)} ({interval(control.low, control.high)})",
        meaning=" ".join([meaning, *control.notes]),
    )


def _at_equal_style(control: StyleControl) -> Doubt:
    name = "If the answers also looked alike"
    if control.win_rate is None or control.low is None or control.high is None:
        return Doubt(name=name, value="not known", meaning=" ".join(control.notes))
    counts = ", ".join(
        f"{'bold passages' if c.feature == 'bold' else c.feature} {c.before:.1f} → {c.after:.1f}"
        for c in control.counts
        if c.feature != "length"
    )
    meaning = (
        "The win rate with length, headers, lists and bold text held equal (Arena-Hard's style "
        f"control). Mean an answer: {counts}."
    )
    return Doubt(
        name=name,
        value=f"{percent(control.win_rate)} ({interval(control.low, control.high)})",
        meaning=" ".join([meaning, *control.notes]),
    )


def _by_people(human: HumanCheck | None) -> Doubt:
    name = "By people's standard"
    if human is None:
        return Doubt(
            name=name,
            value="not measured",
            meaning="Nobody checked the judge on these answers. Have 30 or more pairs labelled "
            "(--to_label 30 writes them, --human_labels reads them).",
        )
    corrected = human.corrected
    if corrected is None:
        return Doubt(
            name=name,
            value=f"{percent(human.people_rate)} ({interval(human.people_low, human.people_high)})",
            meaning=f"The labels alone, {counted(human.n_prompts, 'prompt')}. The judge's verdicts "
            f"could not be corrected by them: {human.why_not}",
        )
    meaning = (
        f"The judge's {percent(corrected.judge_only)} corrected by people's labels of "
        f"{counted(corrected.n_labelled, 'prompt')} (PPI++): it errs by "
        f"{100 * corrected.judge_bias:+.0f} points there. The labels alone say "
        f"{percent(corrected.people_only)} "
        f"({interval(corrected.people_low, corrected.people_high)})."
    )
    return Doubt(
        name=name,
        value=f"{percent(corrected.win_rate)} ({interval(corrected.low, corrected.high)})",
        meaning=" ".join([meaning, *corrected.notes]),
    )


def _stopped(stopping: SequentialResult) -> Doubt:
    why = {
        "better": "the difference was sure",
        "worse": "the difference was sure",
        "equivalent": f"a difference of more than {100 * stopping.margin:.0f} points was ruled out",
        "undecided": "no prompt was left",
    }[stopping.decision]
    return Doubt(
        name="Judging stopped after",
        value=f"{stopping.n_total - stopping.n_not_asked} of {stopping.n_total} prompts",
        meaning=f"It stopped because {why}; the others were not judged. The headline's interval "
        f"allows for looking {stopping.n_waves} times. The win rate itself leans away from 50 % a "
        "little, since luck can bring a stop forward.",
    )


def percent(fraction: float) -> str:
    """A fraction as "88 %"; never rounded to 0 % or 100 % unless it is exactly that."""
    for digits in (0, 1):
        text = f"{100 * fraction:.{digits}f}"
        if float(text) not in (0.0, 100.0) or fraction in (0.0, 1.0):
            return f"{text} %"
    return "under 0.1 %" if fraction < 0.5 else "over 99.9 %"


def signed_percent(fraction: float) -> str:
    """A change as "+1.2 %", or with a true minus sign when it fell."""
    return f"{100 * fraction:+.1f} %".replace("-", "\u2212")


def interval(low: float, high: float) -> str:
    """An interval of fractions in percent, as "79 to 94 %" with an en dash.

    A bound gets a decimal where whole numbers would put it on 0, 50 or 100 % and it is not there,
    so that "9 to 50 %" never stands for an interval that leaves 50 % out.
    """

    def bound(fraction: float) -> str:
        blurred = round(100 * fraction) in (0, 50, 100) and 100 * fraction not in (0, 50, 100)
        return f"{100 * fraction:.{1 if blurred else 0}f}"

    return f"{bound(low)}\u2013{bound(high)} %"


def prompts_needed(
    distance: float, *, spread: float = 0.5, power: float = 0.8, confidence: float = 0.95
) -> int:
    """How many prompts would show a win rate `distance` (a fraction) away from 50 %.

    n = ((z_confidence·s + z_power·sqrt(s² - d²)) / d)², the inverse of `win_rate.mde_points`, with s
    the spread of the prompts' scores.
    """
    z_c = NormalDist().inv_cdf(0.5 + confidence / 2)
    z_p = NormalDist().inv_cdf(power)
    under_root = max(spread**2 - distance**2, 0.0)
    return math.ceil(((z_c * spread + z_p * math.sqrt(under_root)) / distance) ** 2)


def _headline(report: EvalReport) -> str:
    rate = report.win_rate
    over = f"{rate.n_prompts:,} {report.prompts_name}"
    if rate.n != rate.n_prompts:
        over = f"{rate.n:,} comparisons over {over}"
    detail = f"95 % interval {interval(*rate.headline_interval)}"
    if rate.n_tie:
        detail += ", ties count half"
    preferred = f"preferred on {percent(rate.win_rate)} of {over} ({detail})"
    if rate.verdict == "better":
        return f"The tuned model is {preferred}."
    if rate.verdict == "worse":
        return f"The tuned model is worse: it is {preferred}."
    return f"No difference shown: the tuned model is {preferred}, and that interval includes 50 %."


def _power(report: EvalReport) -> str:
    if report.stopping is not None:
        return ""  # what it could show depends on when it stopped
    rate = report.win_rate
    if rate.mde_points is None:
        return f"{counted(rate.n_prompts, 'prompt').capitalize()} can show no difference at all."
    points = _points(rate.mde_points)
    return (
        f"{counted(rate.n_prompts, 'prompt').capitalize()} can show {points} points: a win rate of "
        f"{50 - points} % or less, or {50 + points} % or more, would be told from chance four times "
        "in five."
    )


def _points(mde_points: float) -> int:
    """Whole points that can be shown for sure: rounded up."""
    return max(1, math.ceil(mde_points - 1e-9))


def _forgetting(report: EvalReport) -> str:
    tasks = _capabilities(report)
    if report.perplexity_change is None:
        return tasks or "Whether it forgot anything was not measured."
    return f"{tasks} {_surprise(report)}".strip() if tasks else _surprise(report)


def _capabilities(report: EvalReport) -> str:
    if report.capabilities is None:
        return ""
    tasks = report.capabilities.tasks
    lost = [t for t in tasks if t.verdict == "dropped"]
    unclear = sum(t.verdict == "no change shown" for t in tasks)
    if lost:
        named = " and ".join(_task_loss(t) for t in lost)
        rest = f" {counted(unclear, 'other task')} show no change." if unclear else ""
        return f"It lost {named}.{rest.replace('1 other task show', '1 other task shows')}"
    if unclear == len(tasks):
        return f"No loss shown on {counted(len(tasks), 'task')} that were not its aim."
    return f"No loss shown on {counted(len(tasks), 'task')}; {len(tasks) - unclear} got better."


def _surprise(report: EvalReport) -> str:
    change = report.perplexity_change
    assert change is not None
    amount = percent_of_change(change)
    on = f"perplexity on {report.perplexity_text}"
    if change <= 0:
        return f"It forgot nothing that shows: {on} {amount}."
    how_much = "little" if change <= FORGOT_LITTLE else "some" if change <= FORGOT_MUCH else "a lot"
    return f"It forgot {how_much}: {on} {amount}."


def percent_of_change(change: float) -> str:
    """A change of perplexity as "rose 1.2 %", "fell 0.4 %" or "did not change"."""
    size = f"{100 * abs(change):.1f}"
    return "did not change" if size == "0.0" else f"{'rose' if change > 0 else 'fell'} {size} %"


def _cautions(report: EvalReport) -> list[str]:
    rate = report.win_rate
    found = []
    problems = sum(note.level == "problem" for note in report.health)
    if problems:
        found.append(
            f"The health notes below name {problems} problem{'s' if problems > 1 else ''}. "
            "Settle that before trusting the model."
        )
    if report.perplexity_change is not None and report.perplexity_change > FORGOT_LITTLE:
        found.append(
            "It writes other text worse than before. Test what else the model must still do; to "
            "forget less, train with a lower learning rate, a higher beta or fewer epochs."
        )
    found += _capability_cautions(report)
    found += _people_cautions(report)
    style = report.style_control
    if rate.verdict == "better" and style is not None and style.low is not None and not style.notes:
        assert style.win_rate is not None
        assert style.high is not None
        if style.low <= 0.5:
            found.append(
                "At equal length and formatting no difference is shown: "
                f"{percent(style.win_rate)} ({interval(style.low, style.high)}). The judge may be "
                "rewarding how answers look."
            )
    figures = report.answer_figures
    if (
        figures is not None
        and figures.refused_after > figures.refused_before
        and figures.refused_p < SURE_P
    ):
        found.append(
            f"It refuses more often: {figures.refused_after} of {figures.n} answers, before "
            f"{figures.refused_before}. Read those answers."
        )
    both = rate.n - rate.n_one_order
    if both == 0:
        found.append(
            "The judge saw each pair in one order only, the tuned model's answer first. Judge both "
            "orders: a preference for the first answer would look the same as a better model."
        )
    elif rate.n_flipped > MANY_FLIPS * both:
        found.append(
            f"In {rate.n_flipped} of {both} comparisons the judge changed its mind with the order. "
            "Use a stronger judge or a sharper rubric."
        )
    agreement = rate.agrees_with_shortest
    if agreement is not None and rate.n_length_decided >= 10:
        for share, word in ((agreement, "shorter"), (1 - agreement, "longer")):
            if share >= ONLY_LENGTH:
                found.append(
                    f"The judge picked the {word} answer in {percent(share)} of the decided "
                    "comparisons: counting words would give the same result. Read some answers and "
                    "ask whether they are better or only "
                    f"{word}."
                )
    total = rate.n + rate.n_unscored
    if rate.n_unscored > MANY_UNSCORED * total:
        found.append(
            f"There is no verdict for {rate.n_unscored} of {total} comparisons. Judge again to "
            "fill them in: they may be the hard ones."
        )
    return found


def _capability_cautions(report: EvalReport) -> list[str]:
    if report.capabilities is None:
        return []
    lost = [t for t in report.capabilities.tasks if t.verdict == "dropped"]
    if not lost:
        return []
    named = " and ".join(_task_loss(t) for t in lost)
    return [
        f"It lost {named}. If that matters, mix general data into training (replay), or train more "
        "gently; see docs/forgetting.md."
    ]


def _people_cautions(report: EvalReport) -> list[str]:
    human = report.human
    if human is None:
        return []
    found = []
    accuracy = human.agreement.accuracy
    if accuracy is not None and accuracy.low <= 0.5:
        found.append(
            f"The judge agrees with people on {percent(accuracy.value)} "
            f"({interval(accuracy.low, accuracy.high)}) of {counted(accuracy.n, 'labelled pair')}: "
            "not shown to be better than a coin. Label more, or take another judge."
        )
    corrected = human.corrected
    if corrected is not None and report.win_rate.verdict == "better" and corrected.low <= 0.5:
        what = "it is worse" if corrected.high < 0.5 else "no difference is shown"
        found.append(
            f"By people's standard {what}: {percent(corrected.win_rate)} "
            f"({interval(corrected.low, corrected.high)}). Where people and the judge differ, people "
            "are right."
        )
    return found


def _task_loss(task: TaskChange) -> str:
    """Such as "arithmetic: 61 % to 44 %", in a sentence."""
    return f"{task.title.lower()} ({task_value(task, task.base)} to {task_value(task, task.tuned)})"


def task_value(task: TaskChange, value: float) -> str:
    """A task's metric as people read it: percent for shares."""
    return percent(value) if task.is_share else f"{value:.4g}"


def counted(n: int, what: str) -> str:
    """A number with its noun, as "1 prompt" or "2,000 prompts"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _more_prompts(report: EvalReport) -> str:
    rate = report.win_rate
    distance = abs(rate.win_rate - 0.5)
    shows = (
        f"With {rate.n_prompts} prompts no difference at all can be shown."
        if rate.mde_points is None
        else f"With {rate.n_prompts} prompts only a win rate about {_points(rate.mde_points)} points "
        "away from 50 % would reliably show."
    )
    if distance == 0:
        return f"{shows} Evaluate on more prompts if a smaller difference matters to you."
    needed = prompts_needed(distance, spread=rate.spread)
    if needed > _MOST_PROMPTS_ADVISED:
        return f"{shows} The difference seen is too small to be worth confirming."
    scale = 10 ** max(0, len(str(needed)) - 2)
    rounded = math.ceil(needed / scale) * scale  # two digits: it rests on a noisy estimate
    return f"{shows} To settle whether {percent(rate.win_rate)} is real, use about {rounded:,}."


def _more_effect() -> str:
    return (
        "For a larger effect: more labelled pairs, labels with a clearer difference, or longer "
        "training (watch that the margin rises)."
    )


def _read_losses(report: EvalReport) -> str:
    lost = sum(pair.result == "loss" for pair in report.answers)
    if lost == 0:
        return "Read some of the answers below with your own eyes before you use the model."
    return (
        f"Read the {lost} answer{'s' if lost > 1 else ''} below that got worse: if they share a "
        "fault, fix it with more prompts of that kind."
    )


def _reasons(report: EvalReport) -> list[tuple[str, int]]:
    return sorted(report.win_rate.unscored_reasons.items(), key=lambda item: -item[1])
