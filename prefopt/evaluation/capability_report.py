"""What a model could do before tuning and can do after it, and whether the difference is real.

In: one score an item for the base and for the tuned model, the same items on both sides. Out: a
`TaskChange` a task and a `CapabilityReport` over all of them, with a gate for CI. It knows no model,
no engine and no file. A drop is called only when a paired test shows it after allowing for the number
of tasks; what the items at hand could not have shown is said beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    import numpy as np

Drop = Literal["dropped", "gained", "no change shown"]
"""What the paired test says about a task."""

_RESAMPLES = 9_999
_BATCH = 200
_POWER = 0.8


class TaskChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One task, answered by both models. Scores are in the metric's own unit.

    Fields:
        task, title, metric: the task's name, its name for people, what is averaged.
        higher_is_better: False for losses such as "nll_per_byte".
        n: items that both models answered.
        base, tuned, change: the metric's mean over the items, and tuned - base.
        low, high: 95 % paired interval of the change, of this task alone; see `compare_items`.
        p_value: of the paired test, two-sided; adjusted over the tasks of the report (Holm).
        n_worse, n_better: items that the tuned model answered worse, and better.
        verdict: "dropped" or "gained" where p_value is at most the report's alpha.
        resolvable: the smallest worsening that this many items would show with 80 % power; None
            where none would, be it for few items or for a base that has less to lose, and where the
            items say nothing about how scores vary.
    """

    task: str
    title: str
    metric: str
    higher_is_better: bool
    n: int
    base: float
    tuned: float
    change: float
    low: float
    high: float
    p_value: float
    n_worse: int
    n_better: int
    verdict: Drop
    resolvable: float | None

    @property
    def is_share(self) -> bool:
        """Whether the metric reads as a share of items, so that changes are percentage points."""
        return self.higher_is_better and 0 <= self.base <= 1 and 0 <= self.tuned <= 1

    @property
    def drop(self) -> float:
        """How much worse the tuned model is; negative where it is better.

        Points (0.05 for five of them) where the metric is a share, else the change as a share of the
        base's figure: 0.05 where perplexity's logarithm rose by 5 %.
        """
        worse = -self.change if self.higher_is_better else self.change
        if self.is_share or self.base == 0:
            return worse
        return worse / abs(self.base)


class CapabilityReport(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.capability_report/1",
):
    """What tuning did to the tasks that were not its aim.

    Fields:
        engine: what asked and scored, with its version.
        base_model, tuned_model: their names.
        tasks: one entry a task.
        alpha: the chance to call a drop or gain anywhere in the report where nothing changed.
        max_drop: the worsening that the gate lets pass; see `TaskChange.drop` for its unit.
        left_out: tasks that could not run, each with its reason.
    """

    engine: str
    base_model: str
    tuned_model: str
    tasks: tuple[TaskChange, ...]
    alpha: float
    max_drop: float
    left_out: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[TaskChange, ...]:
        """The tasks that the gate fails on: a drop that is shown, and larger than `max_drop`."""
        return tuple(t for t in self.tasks if t.verdict == "dropped" and t.drop > self.max_drop)

    @property
    def passed(self) -> bool:
        """Whether no task dropped by more than `max_drop`. Tasks left out are not looked at."""
        return not self.failed

    def to_text(self) -> str:
        """The report as a table for a terminal."""
        rows = [("task", "items", "base", "tuned", "change", "95 % interval", "p", "verdict")]
        rows += [
            (
                t.title,
                str(t.n),
                _value(t, t.base),
                _value(t, t.tuned),
                _signed(t, t.change),
                f"{_signed(t, t.low)} to {_signed(t, t.high)}",
                f"{t.p_value:.3f}" if t.p_value >= 0.001 else "<0.001",
                t.verdict if t.verdict != "no change shown" else _not_shown(t),
            )
            for t in self.tasks
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(
                cell.ljust(w) if i in (0, len(widths) - 1) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines = [f"{self.tuned_model} against {self.base_model} ({self.engine})", "", *table, ""]
        lines += [f"left out: {reason}" for reason in self.left_out]
        lines.append(self._gate_line())
        return "\n".join(lines)

    def _gate_line(self) -> str:
        allowed = f"more than {100 * self.max_drop:g} %" if self.max_drop else "any amount"
        if self.passed:
            return f"gate passed: no task is shown to have dropped by {allowed}."
        names = ", ".join(f"{t.title} ({100 * t.drop:.1f} %)" for t in self.failed)
        return f"gate FAILED: dropped by {allowed}: {names}."


def compare_items(
    task: str,
    title: str,
    metric: str,
    base_scores: Sequence[float],
    tuned_scores: Sequence[float],
    *,
    higher_is_better: bool = True,
    alpha: float = 0.05,
    n_tasks: int = 1,
    seed: int = 0,
) -> TaskChange:
    """The paired comparison of one task; the i-th score on both sides belongs to the same item.

    Scores that are all 0 or 1 are tested by McNemar's exact test (binomial over the items on which
    the models differ); the interval is Bonett and Price's (2012, J. Educ. Behav. Stat. 37), a Wald
    interval with one item more of each kind. Other scores are tested by flipping the signs of the
    differences (exact up to 13 items, else 9,999 random flips), which assumes that without a change
    a difference is as likely one way as the other; the interval is Student's over the differences.

    Args:
        task, title, metric: names, see `TaskChange`.
        base_scores: of the base model, one an item.
        tuned_scores: of the tuned model, the same items in the same order.
        higher_is_better: False for losses.
        alpha: the level of the verdict.
        n_tasks: how many tasks will be reported together: `resolvable` allows for them. The p-value
            and the verdict are this task's own; `capability_report` adjusts them.
        seed: of the random flips.

    Raises:
        ValueError: no items, sides of different length, scores that are no numbers, or an alpha
            outside (0, 1).
    """
    import numpy as np

    problems = []
    if len(base_scores) != len(tuned_scores):
        problems.append(f"{len(base_scores)} base scores and {len(tuned_scores)} tuned ones")
    if not base_scores:
        problems.append("no items")
    for side, scores in (("base", base_scores), ("tuned", tuned_scores)):
        odd = [i for i, s in enumerate(scores) if not math.isfinite(s)]
        if odd:
            problems.append(
                f"{len(odd)} {side} score(s) are no numbers, the first is item {odd[0]}"
            )
    if not 0 < alpha < 1:
        problems.append(f"alpha must be between 0 and 1, got {alpha}")
    if n_tasks < 1:
        problems.append(f"n_tasks must be at least 1, got {n_tasks}")
    if problems:
        raise ValueError(f"task {task!r} cannot be compared: " + "; ".join(problems) + ".")

    base, tuned = np.asarray(base_scores, dtype=float), np.asarray(tuned_scores, dtype=float)
    differences = tuned - base
    n_up, n_down = int((differences > 0).sum()), int((differences < 0).sum())
    n_better, n_worse = (n_up, n_down) if higher_is_better else (n_down, n_up)
    if set(np.unique(np.concatenate([base, tuned]))) <= {0.0, 1.0}:
        p_value = mcnemar_p(n_worse, n_better)
        low, high = paired_share_interval(n_up, n_down, len(base))
        resolvable = resolvable_share(n_worse, n_better, len(base), alpha=alpha / n_tasks)
        to_lose = base.mean() if higher_is_better else 1 - base.mean()
        if resolvable is not None and resolvable > to_lose:
            resolvable = None
    else:
        p_value = sign_flip_p(differences, seed=seed)
        low, high = _student_interval(differences)
        resolvable = _resolvable_mean(differences, alpha=alpha / n_tasks)
    change = fmean(differences.tolist())
    return TaskChange(
        task=task,
        title=title,
        metric=metric,
        higher_is_better=higher_is_better,
        n=len(base),
        base=fmean(base.tolist()),
        tuned=fmean(tuned.tolist()),
        change=change,
        low=low,
        high=high,
        p_value=p_value,
        n_worse=n_worse,
        n_better=n_better,
        verdict=_verdict(change, higher_is_better, p_value, alpha),
        resolvable=resolvable,
    )


def capability_report(
    tasks: Sequence[TaskChange],
    *,
    engine: str,
    base_model: str,
    tuned_model: str,
    alpha: float = 0.05,
    max_drop: float = 0.0,
    left_out: Sequence[str] = (),
) -> CapabilityReport:
    """All tasks together: p-values adjusted by Holm's method, verdicts by the adjusted ones.

    Args:
        tasks: as `compare_items` returns them.
        engine, base_model, tuned_model, left_out: see `CapabilityReport`.
        alpha: the chance to call any drop or gain where nothing changed.
        max_drop: the worsening that the gate lets pass, at least 0.

    Raises:
        ValueError: no tasks, as a gate that measured nothing must not pass; a task twice; alpha or
            max_drop out of range.
    """
    problems = []
    if not tasks:
        problems.append("no task was measured" + "".join(f"; left out: {r}" for r in left_out))
    names = [t.task for t in tasks]
    problems += [f"task {n!r} is there twice" for n in sorted(set(names)) if names.count(n) > 1]
    if not 0 < alpha < 1:
        problems.append(f"alpha must be between 0 and 1, got {alpha}")
    if not 0 <= max_drop < math.inf:
        problems.append(f"max_drop must be a share of at least 0, got {max_drop}")
    if problems:
        raise ValueError("no capability report: " + "; ".join(problems) + ".")
    adjusted = holm([t.p_value for t in tasks])
    return CapabilityReport(
        engine=engine,
        base_model=base_model,
        tuned_model=tuned_model,
        tasks=tuple(
            msgspec.structs.replace(
                t, p_value=p, verdict=_verdict(t.change, t.higher_is_better, p, alpha)
            )
            for t, p in zip(tasks, adjusted, strict=True)
        ),
        alpha=alpha,
        max_drop=max_drop,
        left_out=tuple(left_out),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): reject where the result is at most alpha.

    The i-th smallest of m p-values is multiplied by m - i + 1; none becomes smaller than one before
    it, or larger than 1. The chance of any false rejection is at most alpha however the tests depend
    on each other.
    """
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = floor
    return adjusted


def mcnemar_p(n_worse: int, n_better: int) -> float:
    """McNemar's exact two-sided test: are lost and won items equally likely? 1 where none differ."""
    if n_worse + n_better == 0:
        return 1.0
    from scipy import stats

    return float(stats.binomtest(n_worse, n_worse + n_better, 0.5).pvalue)


def sign_flip_p(differences: Sequence[float] | np.ndarray[Any, Any], *, seed: int = 0) -> float:
    """Two-sided sign-flip permutation test that the mean of paired differences is 0."""
    import numpy as np
    from scipy import stats

    d = np.asarray(differences, dtype=float)
    if not d.any() or len(d) < 2:
        return 1.0
    return float(
        stats.permutation_test(
            (d,),
            lambda x, axis: x.mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=_RESAMPLES,
            batch=_BATCH,
            random_state=np.random.default_rng(seed),
        ).pvalue
    )


def paired_share_interval(
    n_up: int, n_down: int, n: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Bonett and Price's interval for the difference of two paired shares, as (low, high).

    p - q ± z·sqrt((p + q - (p - q)²)/(n + 2)) with p = (n_up + 1)/(n + 2), q = (n_down + 1)/(n + 2),
    cut at -1 and 1. It has a width where no item differs.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, q = (n_up + 1) / (n + 2), (n_down + 1) / (n + 2)
    reach = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return max(-1.0, p - q - reach), min(1.0, p - q + reach)


def resolvable_share(n_worse: int, n_better: int, n: int, *, alpha: float = 0.05) -> float | None:
    """The smallest drop of a share that `n` items would show with 80 % power; None where none would.

    Items that change for no reason do so equally often both ways, at the rate c = (min(n_worse,
    n_better) + 1/2)/(n + 1) each; a drop d makes items lost at c + d. The power of McNemar's exact
    test at level `alpha` is summed over how many items differ.
    """
    import numpy as np
    from scipy import optimize, stats

    chance = min((min(n_worse, n_better) + 0.5) / (n + 1), 0.5)
    differ = np.arange(n + 1)
    # The fewest losses among `differ` items that the test calls a drop.
    needed = stats.binom.isf(alpha / 2, differ, 0.5) + 1

    def power(drop: float) -> float:
        total = 2 * chance + drop
        seen = stats.binom.sf(needed - 1, differ, (chance + drop) / total)
        return float((stats.binom.pmf(differ, n, min(total, 1.0)) * seen).sum())

    largest = 1.0 - 2 * chance
    if largest <= 0 or power(largest) < _POWER:
        return None
    return float(optimize.brentq(lambda d: power(d) - _POWER, 0.0, largest, xtol=1e-4))


def _student_interval(differences: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The 95 % interval of the mean difference; one item gives no spread, so 0 is never left out."""
    from scipy import stats

    mean = float(differences.mean())
    n = len(differences)
    if n < 2:
        return mean - abs(mean), mean + abs(mean)
    reach = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    return mean - reach, mean + reach


def _resolvable_mean(differences: np.ndarray[Any, Any], *, alpha: float) -> float | None:
    """(t_{1-alpha/2} + t_{0.8})·s/sqrt(n), the usual power calculation of a paired t-test."""
    from scipy import stats

    n = len(differences)
    # With n items no test of signs reaches a p-value below 2^(1 - n).
    if n < 2 or 2.0 ** (1 - n) > alpha or differences.std() == 0:
        return None
    quantiles = stats.t.ppf([1 - alpha / 2, _POWER], n - 1).sum()
    return float(quantiles * differences.std(ddof=1) / math.sqrt(n))


def _verdict(change: float, higher_is_better: bool, p_value: float, alpha: float) -> Drop:
    if p_value > alpha or change == 0:
        return "no change shown"
    return "gained" if (change > 0) == higher_is_better else "dropped"


def _value(task: TaskChange, value: float) -> str:
    return f"{100 * value:.1f} %" if task.is_share else f"{value:.4g}"


def _signed(task: TaskChange, value: float) -> str:
    return f"{100 * value:+.1f}" if task.is_share else f"{value:+.3g}"


def _not_shown(task: TaskChange) -> str:
    if task.resolvable is None:
        return "no change shown (could not show any)"
    size = f"{100 * task.resolvable:.0f} points" if task.is_share else f"{task.resolvable:.2g}"
    return f"no change shown (could show {size})"
