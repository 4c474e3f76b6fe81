"""What a training gained and what it forgot, with and without mitigations: numbers, table, picture.

In: for each way of training its win rate over the base model, its perplexity on plain text, and both
models' scores on capability tasks item by item. Out: one `MitigationOutcome` a way, a Markdown table
and a figure. It knows no model and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from prefopt.evaluation.capability_report import TaskChange, compare_items, holm
from prefopt.evaluation.win_rate import WinRate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from prefopt.evaluation.capabilities import TaskScores

Helped = Literal["less forgotten", "more forgotten", "no difference shown"]
"""What a mitigation did to a task, by a paired test against the training without it."""


class MitigationOutcome(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.mitigation_outcome/1",
):
    """One way of training, measured.

    Fields:
        name: what is done against forgetting, for people.
        n_steps: optimiser steps.
        learning_rate: at its peak.
        win_rate: over the base model on held-out prompts: the gain.
        perplexity_base, perplexity_tuned: on plain text, before and after.
        changes: each capability task, base model against tuned; p-values adjusted over the tasks.
        against_none: the same tasks, the training without mitigation against this one, item by item;
            p-values adjusted over the tasks. Empty for that training itself.
    """

    name: str
    n_steps: int
    learning_rate: float
    win_rate: WinRate
    perplexity_base: float
    perplexity_tuned: float
    changes: tuple[TaskChange, ...]
    against_none: tuple[TaskChange, ...] = ()

    @property
    def perplexity_change(self) -> float:
        """As a share: 0.05 where plain text is 5 % more surprising than before."""
        return self.perplexity_tuned / self.perplexity_base - 1.0

    def helped(self, task: str) -> Helped:
        """What the paired test against the training without mitigation says of a task."""
        found = next((change for change in self.against_none if change.task == task), None)
        if found is None or found.verdict == "no change shown":
            return "no difference shown"
        return "less forgotten" if found.verdict == "gained" else "more forgotten"


def compare_scores(
    before: Mapping[str, TaskScores], after: Mapping[str, TaskScores], *, seed: int = 0
) -> tuple[TaskChange, ...]:
    """Two models' scores on the same tasks, item by item; Holm's method adjusts over the tasks.

    Args:
        before: the scores of the model that counts as the base, by task.
        after: those of the other one. Tasks that only one of them has are left out.
        seed: of the random flips.
    """
    changes = []
    names = [name for name in after if name in before]
    for name in names:
        first = {item.item: item.score for item in before[name].items}
        both = [item for item in after[name].items if item.item in first]
        changes.append(
            compare_items(
                name,
                after[name].title,
                after[name].metric,
                [first[item.item] for item in both],
                [item.score for item in both],
                higher_is_better=after[name].higher_is_better,
                n_tasks=len(names),
                seed=seed,
            )
        )
    adjusted = holm([change.p_value for change in changes])
    return tuple(
        msgspec.structs.replace(
            change,
            p_value=p,
            verdict=change.verdict if p <= 0.05 else "no change shown",
        )
        for change, p in zip(changes, adjusted, strict=True)
    )


def forgetting_table(outcomes: Sequence[MitigationOutcome]) -> str:
    """The outcomes as a Markdown table: gain, perplexity, and each task before and after.

    "↓" marks a task on which the tuned model is shown to be worse than the base model, "↑" one on
    which it is better; "helps" or "hurts" stands where the same items are shown to come out better,
    or worse, than without mitigation.
    """
    tasks = outcomes[0].changes
    head = ["", "steps", "rate", "win rate (95 %)", "perplexity"]
    head += [f"{t.title} ({_value(t, t.base)})" for t in tasks]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in outcomes:
        low, high = one.win_rate.headline_interval
        cells = [
            one.name,
            str(one.n_steps),
            f"{one.learning_rate:g}",
            f"{one.win_rate.win_rate:.0%} ({low:.0%} to {high:.0%})",
            f"{one.perplexity_change:+.1%}",
        ]
        for change in one.changes:
            mark = {"dropped": " ↓", "gained": " ↑", "no change shown": ""}[change.verdict]
            said = {"less forgotten": ", helps", "more forgotten": ", hurts"}.get(
                one.helped(change.task), ""
            )
            cells.append(f"{_value(change, change.tuned)}{mark}{said}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _value(change: TaskChange, value: float) -> str:
    return f"{value:.0%}" if change.is_share else f"{value:.3f}"


def forgetting_figure(outcomes: Sequence[MitigationOutcome], title: str = "") -> Figure:
    """Gain against what was forgotten: on plain text, and on the tasks that are answered.

    Up is better, left is better. The right panel's cost is the mean change over tasks that are shares
    of items, in points.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    costs = [
        ("Plain text: rise of perplexity (%)", [100 * o.perplexity_change for o in outcomes]),
        ("Tasks: mean loss (points)", [100 * _mean_loss(o) for o in outcomes]),
    ]
    for panel, (label, values) in zip(axes, costs, strict=True):
        for number, (one, x) in enumerate(zip(outcomes, values, strict=True)):
            low, high = one.win_rate.headline_interval
            y = 100 * one.win_rate.win_rate
            colour = "#d55e00" if number == 0 else "#0072b2"
            panel.plot([x, x], [100 * low, 100 * high], color=colour, alpha=0.35, linewidth=1)
            panel.plot(x, y, "s" if number == 0 else "o", color=colour, markersize=7)
            panel.annotate(one.name, (x, y), textcoords="offset points", xytext=(7, 4), fontsize=8)
        panel.axvline(0, color="#59636e", linewidth=0.8)
        panel.axhline(50, color="#59636e", linewidth=0.8)
        panel.set_xlabel(label)
        panel.margins(x=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("Preferred to the base model (%)")
    figure.suptitle(title or "What was gained, and what was forgotten", x=0.01, ha="left")
    return figure


def _mean_loss(one: MitigationOutcome) -> float:
    drops = [change.drop for change in one.changes if change.is_share]
    return sum(drops) / len(drops) if drops else 0.0
