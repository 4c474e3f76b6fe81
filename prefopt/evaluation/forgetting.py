"""What a training gained and what it forgot, with and without mitigations: numbers, table, picture.

In: scores of the base model and of the tuned ones on the same items of the same tasks, each way of
training one tuned model. Out: a `MitigationOutcome` a way, a Markdown table and a figure. It knows no
model and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from prefopt.evaluation.capability_report import TaskChange, compare_items, holm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from prefopt.evaluation.capability_scores import TaskScores

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
        key, name: what is done against forgetting, for files and for people.
        n_steps: optimiser steps.
        learning_rate: at its peak.
        gain: the narrow task that was trained, base model against tuned, on held-out items.
        changes: each task that was not trained, base model against tuned; p-values adjusted over them.
        against_none: the same tasks, the training without mitigation against this one, item by item;
            p-values adjusted over them. Empty for that training itself.
    """

    key: str
    name: str
    n_steps: int
    learning_rate: float
    gain: TaskChange
    changes: tuple[TaskChange, ...]
    against_none: tuple[TaskChange, ...] = ()

    def helped(self, task: str) -> Helped:
        """What the paired test against the training without mitigation says of a task."""
        found = next((change for change in self.against_none if change.task == task), None)
        if found is None or found.verdict == "no change shown":
            return "no difference shown"
        return "less forgotten" if found.verdict == "gained" else "more forgotten"


def compare_scores(
    before: Mapping[str, TaskScores], after: Mapping[str, TaskScores], *, alpha: float = 0.05
) -> tuple[TaskChange, ...]:
    """Two models' scores on the same tasks, item by item; Holm's method adjusts over the tasks.

    Args:
        before: the scores of the model that counts as the base, by task.
        after: those of the other one. Tasks that only one of them has are left out.
        alpha: the chance to call any change where nothing changed.
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
                alpha=alpha,
                n_tasks=len(names),
            )
        )
    adjusted = holm([change.p_value for change in changes])
    return tuple(
        msgspec.structs.replace(
            change,
            p_value=p,
            verdict=change.verdict if p <= alpha else "no change shown",
        )
        for change, p in zip(changes, adjusted, strict=True)
    )


def forgetting_table(outcomes: Sequence[MitigationOutcome]) -> str:
    """The outcomes as a Markdown table: the narrow task and the others, before and after.

    The base model's figures are in the header. "↓" marks a task on which the tuned model is shown to
    be worse than the base model, "↑" one on which it is better; "helps" or "hurts" stands where the
    same items are shown to come out better, or worse, than without mitigation.
    """
    first = outcomes[0]
    head = ["", "steps", "rate"]
    head += [f"{t.title} ({_value(t, t.base)})" for t in (first.gain, *first.changes)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in outcomes:
        cells = [one.name, str(one.n_steps), f"{one.learning_rate:g}"]
        cells += [marked(t, one.helped(t.task)) for t in (one.gain, *one.changes)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def marked(change: TaskChange, helped: Helped) -> str:
    """The tuned model's figure with the marks of `forgetting_table`."""
    arrow = {"dropped": " ↓", "gained": " ↑", "no change shown": ""}[change.verdict]
    said = {"less forgotten": ", helps", "more forgotten": ", hurts"}.get(helped, "")
    return f"{_value(change, change.tuned)}{arrow}{said}"


def _value(change: TaskChange, value: float) -> str:
    return f"{value:.0%}" if change.is_share else f"{value:.3f}"


def forgetting_figure(runs: Sequence[Sequence[MitigationOutcome]]) -> Figure:
    """Success at the narrow task against what each other task lost, a panel a task.

    Up is better, left is better. A task's loss is in points where it counts right answers, else in
    percent of the base's figure. Of several runs each is a small mark and their mean a large one.

    Args:
        runs: the outcomes of each run, the same ways of training in the same order; the first is
            the one without mitigation.
    """
    from matplotlib.figure import Figure

    tasks = runs[0][0].changes
    figure = Figure(figsize=(5.6 * len(tasks), 4.8), layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for place, (panel, task) in enumerate(zip(axes, tasks, strict=True)):
        for number, several in enumerate(zip(*runs, strict=True)):
            look: dict[str, Any] = {"color": "#d55e00" if number == 0 else "#0072b2"}
            xs = [100 * one.changes[place].drop for one in several]
            ys = [100 * one.gain.tuned for one in several]
            middle = (fmean(xs), fmean(ys))
            if len(runs) > 1:
                panel.plot(xs, ys, ".", alpha=0.4, markersize=5, **look)
            panel.plot(*middle, "s" if number == 0 else "o", markersize=8, **look)
            offset = ((7, 4), (7, -11), (7, 11))[number % 3]  # ways that end close to each other
            panel.annotate(
                several[0].name, middle, textcoords="offset points", xytext=offset, fontsize=8
            )
        panel.axvline(0, color="#59636e", linewidth=0.8)
        panel.set_xlabel(f"{task.title}: lost ({'points' if task.is_share else '%'})")
        panel.margins(x=0.25, y=0.1)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"{runs[0][0].gain.title} (%)")
    several_runs = f" ({len(runs)} seeds and their means)" if len(runs) > 1 else ""
    figure.suptitle(f"What was gained, and what was forgotten{several_runs}", x=0.01, ha="left")
    return figure
