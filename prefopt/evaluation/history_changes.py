"""Whether a later evaluation is better or worse than an earlier one, and what it forgot since.

In: the prompts' mean scores of two evaluations, or two models' scores on the same capability tasks.
Out: a `Change`, a `CapabilityChange`. The tests are those of a single evaluation: a sign test over
prompts, and `capability_report`'s paired tests over items. It knows no file and draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Literal, NamedTuple

from prefopt.evaluation.capability_report import TaskChange, capability_report, compare_items

if TYPE_CHECKING:
    from prefopt.evaluation.capability_scores import TaskScores

SURE_P = 0.01
"""Below this a change counts as shown; of a hundred evaluations without one, one raises alarm."""

_PREFERRED = "preferred"  # the metric of judged tasks: how often an answer beats the base model's


class Change(NamedTuple):
    """How an evaluation differs from an earlier one.

    `verdict` is "not comparable" with a reason where another judge, rubric or baseline was used, or no
    prompt was asked in both. Otherwise a sign test over the prompts whose score differs: under no
    change, better and worse are equally likely (`p_value`, two-sided). `difference` is the change of
    the mean score on the shared prompts, a fraction.
    """

    verdict: Literal["better", "worse", "unclear", "not comparable"]
    reason: str = ""
    n_shared: int = 0
    n_better: int = 0
    n_worse: int = 0
    difference: float = 0.0
    p_value: float = 1.0


class MeasuredTasks(NamedTuple):
    """A tuned model's score on each item of its capability tasks.

    `names` are all tasks that were measured, `items` the scores of those that kept them.
    """

    engine: str
    base_model: str
    names: Sequence[str]
    items: Mapping[str, TaskScores]


class CapabilityChange(NamedTuple):
    """What the tuned model of an evaluation can do against that of an earlier one.

    `tasks` hold the earlier model's scores as `base` and the later one's as `tuned`, with p-values
    adjusted over them (Holm) and verdicts at `SURE_P`. `not_compared` says why for the others, by
    task; tasks that neither evaluation measured are not named.
    """

    tasks: tuple[TaskChange, ...] = ()
    not_compared: dict[str, str] = {}  # noqa: RUF012  a NamedTuple's default, never changed

    @property
    def dropped(self) -> tuple[TaskChange, ...]:
        """The tasks that are shown to have got worse."""
        return tuple(t for t in self.tasks if t.verdict == "dropped")


def change_of_scores(earlier: Mapping[str, float], later: Mapping[str, float]) -> Change:
    """A sign test over the prompts that both evaluations scored.

    Args:
        earlier, later: each prompt's mean score (win 1, tie ½, loss 0), by its id.
    """
    differences = [later[prompt] - score for prompt, score in earlier.items() if prompt in later]
    if not differences:
        return Change("not comparable", "no prompt was scored in both")
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    p = 1.0
    if better + worse:
        from scipy.stats import binomtest

        p = float(binomtest(better, better + worse).pvalue)
    verdict: Literal["better", "worse", "unclear"] = "unclear"
    if p < SURE_P:
        verdict = "better" if better > worse else "worse"
    return Change(verdict, "", len(differences), better, worse, fmean(differences), p)


def change_of_capabilities(earlier: MeasuredTasks, later: MeasuredTasks) -> CapabilityChange:
    """Each task that both evaluations measured, item by item, the tuned models against each other."""
    pairs, why = [], {}
    for task in dict.fromkeys((*later.names, *earlier.names)):
        reason = _not_compared(task, earlier, later)
        if reason is not None:
            why[task] = reason
            continue
        new, before = later.items[task], _by_item(earlier.items[task])
        items = [item for item in new.items if item.item in before]
        pairs.append((new, [before[item.item] for item in items], [item.score for item in items]))
    if not pairs:
        return CapabilityChange((), why)
    changes = [
        compare_items(
            new.task, new.title, new.metric, then, now,
            higher_is_better=new.higher_is_better, alpha=SURE_P, n_tasks=len(pairs),
        )
        for new, then, now in pairs
    ]  # fmt: skip
    report = capability_report(
        changes, engine=later.engine, base_model="earlier", tuned_model="later", alpha=SURE_P
    )
    return CapabilityChange(report.tasks, why)


def _not_compared(task: str, earlier: MeasuredTasks, later: MeasuredTasks) -> str | None:
    for side, measured in (("earlier", earlier), ("later", later)):
        if task not in measured.names:
            return f"not measured in the {side} evaluation"
    for side, measured in (("earlier", earlier), ("later", later)):
        if task not in measured.items:
            return f"the scores of its items were not kept in the {side} evaluation"
    if earlier.engine != later.engine:
        return f"asked by {earlier.engine}, then by {later.engine}"
    old, new = earlier.items[task], later.items[task]
    if (old.title, old.metric) != (new.title, new.metric):
        return f"it was {old.title}, {old.metric}; then {new.title}, {new.metric}"
    if new.metric == _PREFERRED and earlier.base_model != later.base_model:
        return "judged against another base model"
    if not _by_item(old).keys() & _by_item(new).keys():
        return "no item was asked in both"
    return None


def _by_item(scores: TaskScores) -> dict[str, float]:
    return {item.item: item.score for item in scores.items}
