"""Prompting, retrieval or tuning? What the aim, the data and a measured baseline say.

In: what is wanted, how much data there is, how often it changes, and a `PromptBaseline` where one was
measured. Out: a `TuningAdvice` with reasons, with what is missing, and with next steps. Pure text and
arithmetic: nothing is loaded or asked here.

The rules, and where they come from:

    new facts go into retrieval, not into weights     Ovadia et al. 2023, arXiv:2312.05934: retrieval
        beats training on the texts; Gekhman et al. 2024, arXiv:2405.05904: what is new to a model is
        learned slowly and makes it invent more;
    form and style can be tuned with few examples      Zhou et al. 2023, arXiv:2305.11206: a thousand
        good ones are enough;
    a prompt that does as well is cheaper to change    so it is measured first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

from prefopt.evaluation.advice import interval, percent, prompts_needed
from prefopt.evaluation.prompt_baseline import PromptBaseline

Aim = Literal["facts", "format", "style", "skill", "cost"]
"""What a tuned model is wanted for: to know things, to keep a form, to sound right, to do a task
better, or to do the same for less money."""

Changes = Literal["never", "yearly", "monthly", "weekly", "daily"]
"""How often what the model should know or do changes."""

Recommendation = Literal[
    "prompting", "retrieval", "retrieval and tuning", "tuning", "collect data", "measure prompting"
]

# Conventions, not laws: where a sentence changes.
FEW_EXAMPLES = 100
MANY_EXAMPLES = 1_000
PROMPTING_IS_ENOUGH = 0.75

_CHARACTERS_A_TOKEN = 4  # of English text; only for a cost that is called rough
_OFTEN: tuple[Changes, ...] = ("weekly", "daily")


class TuningAdvice(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="prefopt.tuning_advice/1"
):
    """Whether to tune, why, what is missing, and what to do next."""

    aims: tuple[Aim, ...]
    changes: Changes
    n_examples: int | None
    recommendation: Recommendation
    headline: str
    reasons: tuple[str, ...]
    missing: tuple[str, ...]
    next_steps: tuple[str, ...]
    baseline: PromptBaseline | None = None

    def to_text(self) -> str:
        """The advice for a terminal; Markdown as well."""
        lines = [f"# {self.headline}", ""]
        for title, items in (
            ("Why", self.reasons),
            ("Missing", self.missing),
            ("Next", self.next_steps),
        ):
            if items:
                lines += [f"## {title}", "", *(f"- {item}" for item in items), ""]
        if self.baseline is not None:
            lines += ["## What prompting alone does", "", *_table(self.baseline), ""]
        return "\n".join(lines).rstrip() + "\n"


def advise_tuning(
    aims: Sequence[Aim],
    *,
    n_examples: int | None = None,
    changes: Changes = "yearly",
    baseline: PromptBaseline | None = None,
    enough: float = PROMPTING_IS_ENOUGH,
    requests_per_month: int | None = None,
    usd_per_million_input_tokens: float | None = None,
) -> TuningAdvice:
    """Weigh prompting, retrieval and tuning.

    Args:
        aims: one or several of `Aim`.
        n_examples: pairs or demonstrations at hand; None where that is not known.
        changes: see `Changes`.
        baseline: what prompting alone does, from `measure_prompts`.
        enough: the win rate over plain asking from which prompting alone is good enough; a fraction.
        requests_per_month: how often the model is asked.
        usd_per_million_input_tokens: what input costs.

    Raises:
        ValueError: no aim, an unknown one, or numbers that cannot be; all at once.
    """
    _check(aims, n_examples, changes, enough, requests_per_month, usd_per_million_input_tokens)
    wanted = tuple(dict.fromkeys(aims))
    facts, others = "facts" in wanted, tuple(aim for aim in wanted if aim != "facts")
    reasons: list[str] = []
    missing: list[str] = []
    if facts:
        reasons.append(
            "Facts belong into retrieval: training on them teaches a model to sound as if it knew, "
            "slowly and with more invention (arXiv:2312.05934, arXiv:2405.05904), and every change "
            "would need another training."
        )
    if changes in _OFTEN and others:
        reasons.append(
            f"What is wanted changes {changes}: a prompt follows in minutes, a tuned model only "
            "after data, training and evaluation."
        )
    if "cost" in wanted:
        _say_cost(reasons, missing, baseline, requests_per_month, usd_per_million_input_tokens)
    suffices = _say_baseline(reasons, missing, baseline, enough) if others else None
    short_of_data = _say_data(reasons, missing, n_examples) if others else False
    choice = _choose(facts, others, changes, suffices, short_of_data)
    return TuningAdvice(
        aims=wanted,
        changes=changes,
        n_examples=n_examples,
        recommendation=choice,
        headline=_HEADLINES[choice],
        reasons=tuple(reasons),
        missing=tuple(missing),
        next_steps=_next_steps(choice, baseline, enough),
        baseline=baseline,
    )


_HEADLINES: dict[Recommendation, str] = {
    "prompting": "Do not tune: prompting is enough",
    "retrieval": "Do not tune: give the model the facts with each question (retrieval)",
    "retrieval and tuning": "Retrieval for the facts; tuning for the rest is worth a try",
    "tuning": "Tuning is worth a try",
    "collect data": "Collect data before you tune",
    "measure prompting": "Measure what prompting alone does first",
}


def _check(
    aims: Sequence[Aim],
    n_examples: int | None,
    changes: Changes,
    enough: float,
    requests: int | None,
    price: float | None,
) -> None:
    problems = []
    if not aims:
        problems.append(f"at least one aim of {get_args(Aim)} is needed")
    problems += [
        f"aims must be among {get_args(Aim)}, got {a!r}" for a in aims if a not in get_args(Aim)
    ]
    if changes not in get_args(Changes):
        problems.append(f"changes must be one of {get_args(Changes)}, got {changes!r}")
    if not 0.5 < enough <= 1.0:
        problems.append(f"enough must be a win rate above 0.5 and at most 1, got {enough}")
    for name, value in (
        ("n_examples", n_examples),
        ("requests_per_month", requests),
        ("usd_per_million_input_tokens", price),
    ):
        if value is not None and value < 0:
            problems.append(f"{name} must not be negative, got {value}")
    if problems:
        raise ValueError("; ".join(problems) + ".")


def _say_cost(
    reasons: list[str],
    missing: list[str],
    baseline: PromptBaseline | None,
    requests: int | None,
    price: float | None,
) -> None:
    if requests is None or price is None:
        missing.append(
            "For cost: how many requests a month (requests_per_month) and what input costs "
            "(usd_per_million_input_tokens)."
        )
        return
    if baseline is None or baseline.best is None:
        missing.append("For cost: a measured prompt, whose length tuning would save.")
        return
    tokens = baseline.n_extra_characters / _CHARACTERS_A_TOKEN
    usd = tokens * requests * price / 1e6
    reasons.append(
        f"The best prompt adds roughly {tokens:,.0f} tokens to every request: about ${usd:,.2f} a "
        "month, less where the provider caches prompts. Tuning that makes it unnecessary saves at "
        "most that."
    )


def _say_baseline(
    reasons: list[str], missing: list[str], baseline: PromptBaseline | None, enough: float
) -> bool | None:
    """Whether prompting is good enough; None where it was not measured or no verdict came."""
    if baseline is None:
        missing.append(
            "A measured baseline: run `prefopt advise` with --prompts, so that the best prompt is "
            "found and judged before anything is trained."
        )
        return None
    rated = [v for v in baseline.variants if v.win_rate is not None]
    if not rated:
        missing.append("A measured baseline: no way of asking could be scored (reasons below).")
        return None
    if baseline.best is None or baseline.confirmed is None:
        reasons.append(
            "None of the prompts tried did better than asking plainly, so what a prompt can say "
            "does not get there."
        )
        return False
    rate = baseline.confirmed
    said = (
        f"The best prompt ({baseline.best.name}) is preferred to asking plainly on "
        f"{percent(rate.win_rate)} of {rate.n_prompts} prompts that did not choose it "
        f"(95 % interval {interval(*rate.headline_interval)})"
    )
    if rate.headline_interval[0] >= enough:
        reasons.append(f"{said}: surely above the {percent(enough)} asked for.")
        return True
    if rate.headline_interval[1] < enough:
        reasons.append(f"{said}: surely below the {percent(enough)} asked for.")
        return False
    reasons.append(f"{said}: {percent(enough)} lies in that interval, so either may be true.")
    gap = max(abs(rate.win_rate - enough), 0.02)
    missing.append(
        f"Certainty about the baseline: about {2 * prompts_needed(gap):,} prompts would tell "
        f"{percent(rate.win_rate)} from {percent(enough)}."
    )
    return rate.win_rate >= enough


def _say_data(reasons: list[str], missing: list[str], n_examples: int | None) -> bool:
    if n_examples is None:
        missing.append("How many examples there are (--data, or n_examples).")
        return False
    if n_examples < FEW_EXAMPLES:
        reasons.append(f"{n_examples} examples are too few: a model learns them, not the manner.")
        missing.append(
            f"{FEW_EXAMPLES - n_examples} more examples at least; some hundred more for held-out "
            "figures that mean something. `prefopt sample` and `prefopt judge label` make "
            "preferences from prompts alone."
        )
        return True
    amount = "plenty" if n_examples >= MANY_EXAMPLES else "enough to start"
    reasons.append(f"{n_examples:,} examples are {amount} for form and style (arXiv:2305.11206).")
    return False


def _choose(
    facts: bool,
    others: tuple[Aim, ...],
    changes: Changes,
    suffices: bool | None,
    short_of_data: bool,
) -> Recommendation:
    if not others:
        return "retrieval"
    if suffices or changes in _OFTEN:
        return "retrieval" if facts else "prompting"
    if suffices is None:
        return "measure prompting"
    if short_of_data:
        return "collect data"
    return "retrieval and tuning" if facts else "tuning"


def _next_steps(
    choice: Recommendation, baseline: PromptBaseline | None, enough: float
) -> tuple[str, ...]:
    steps = {
        "prompting": (
            "Use the best prompt, and keep its answers and verdicts: they are the baseline that any "
            "later tuning has to beat.",
        ),
        "retrieval": (
            "Build retrieval over the documents and judge its answers with the same judge.",
            "Tune later only what retrieval leaves wrong in form or style.",
        ),
        "retrieval and tuning": (
            "Build retrieval first; tune on prompts that contain what it finds.",
            "Compare the tuned model with the best prompt, not with plain asking.",
        ),
        "tuning": (
            "Train: `prefopt run`, or `prefopt train dpo` on the data at hand.",
            "Compare the tuned model with the best prompt, not with plain asking, and look at what "
            "it forgot.",
        ),
        "collect data": (
            "Collect examples of the answers that are wanted, or let a judge make preferences: "
            "`prefopt judge label`.",
            "Use the best prompt meanwhile.",
        ),
        "measure prompting": (
            "Run `prefopt advise` with --prompts of your own (a hundred or more), the judge and the "
            "rubric that will judge the tuned model.",
        ),
    }[choice]
    if baseline is not None and baseline.best is None and choice in ("prompting", "retrieval"):
        return ("Write a prompt of your own and measure it: --system_prompts FILE.", *steps)
    return steps


def _table(baseline: PromptBaseline) -> list[str]:
    lines = [
        f"Judge {baseline.judge}, rubric {baseline.rubric}, model {baseline.model}; each way of "
        "asking against asking plainly.",
        "",
        "| way of asking | preferred on | 95 % interval | prompts |",
        "|---|---|---|---|",
    ]
    for variant in baseline.variants:
        rate = variant.win_rate
        lines.append(
            f"| {variant.name} | not scored: {' '.join(variant.problem.split())} | | |"
            if rate is None
            else f"| {variant.name} | {percent(rate.win_rate)} | "
            f"{interval(*rate.headline_interval)} | {rate.n_prompts} |"
        )
    if baseline.confirmed is not None and baseline.best is not None:
        rate = baseline.confirmed
        lines.append(
            f"| **{baseline.best.name}, on other prompts** | **{percent(rate.win_rate)}** | "
            f"{interval(*rate.headline_interval)} | {rate.n_prompts} |"
        )
    return lines
