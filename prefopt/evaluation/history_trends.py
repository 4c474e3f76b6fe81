"""A series' capability tasks over time, in words and points: what was lost, and when.

In: a `History` and the name of a series. Out: a `TaskTrend` a task. Nothing is tested here: verdicts
are those of the evaluations' own reports (against the base model) and of `CapabilityChange` (against
the evaluation before).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from prefopt.evaluation.advice import task_value
from prefopt.evaluation.report_tables import p_in_words

if TYPE_CHECKING:
    from prefopt.evaluation.capability_report import TaskChange
    from prefopt.evaluation.history import History


class TaskTrend(NamedTuple):
    """One task over a series.

    Fields:
        title: the task's name for people, as last measured.
        measured: each evaluation that measured it, oldest first, with its change against the base.
        since: changes against the evaluation before that measured any, by the later one's number.
        not_compared: why there is no such change, by the later one's number.
        dropped: what got worse, a sentence each, the last first; of `dropped_at`, these evaluations.
    """

    title: str
    measured: tuple[tuple[int, TaskChange], ...]
    since: dict[int, TaskChange]
    not_compared: dict[int, str]
    dropped: tuple[str, ...]
    dropped_at: tuple[int, ...]


def p_said(p_value: float) -> str:
    """A p-value in a sentence: "p = 0.03", "p under 0.001"."""
    words = p_in_words(p_value)
    return f"p {words}" if words.startswith("under") else f"p = {words}"


def task_trends(history: History, series: str) -> list[TaskTrend]:
    """Every task that any evaluation of the series measured, those that dropped first."""
    measured: dict[str, list[tuple[int, TaskChange]]] = {}
    for evaluation in history.evaluations(series):
        report = history.report(evaluation.number).capabilities
        for task in report.tasks if report is not None else ():
            measured.setdefault(task.task, []).append((evaluation.number, task))
    changes = history.capability_changes(series)
    found = []
    for name, points in measured.items():
        since, why = {}, {}
        dropped: dict[int, list[str]] = {}
        for number, task in points:
            if task.verdict == "dropped":
                dropped.setdefault(number, []).append(
                    f"Evaluation {number}: {task_value(task, task.tuned)}, the base model "
                    f"{task_value(task, task.base)} ({p_said(task.p_value)})."
                )
        for (earlier, later), change in changes.items():
            if name in change.not_compared:
                why[later] = change.not_compared[name]
            for task in change.tasks:
                if task.task != name:
                    continue
                since[later] = task
                if task.verdict == "dropped":
                    dropped.setdefault(later, []).append(
                        f"Evaluation {later}: fell from {task_value(task, task.base)} to "
                        f"{task_value(task, task.tuned)} since evaluation {earlier} "
                        f"({p_said(task.p_value)})."
                    )
        found.append(
            TaskTrend(
                points[-1][1].title, tuple(points), since, why,
                tuple(line for number in sorted(dropped, reverse=True) for line in dropped[number]),
                tuple(sorted(dropped)),
            )
        )  # fmt: skip
    return sorted(found, key=lambda trend: not trend.dropped)
