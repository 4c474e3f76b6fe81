"""Whether an evaluation is good enough to go on: yes, or the reasons why not.

In: an `EvalReport` and the limits that were set. Out: reasons, none where it passes. What was not
measured does not pass a limit that was set for it.
"""

from __future__ import annotations

from prefopt.evaluation.advice import interval, percent, task_value
from prefopt.evaluation.eval_report import EvalReport


def gate_failures(report: EvalReport, *, min_win_rate: float | None = None) -> list[str]:
    """Why a report does not pass.

    It does not where the tuned model is shown to be worse (the whole interval of the win rate below
    50 %), where a capability dropped by more than its report's `max_drop` or could not be measured,
    and where the lower end of the win rate's interval is below `min_win_rate`.

    Args:
        report: an evaluation.
        min_win_rate: a fraction that the lower end of the 95 % interval must reach: 0.5 asks for a
            difference that is shown. None sets no such limit.

    Raises:
        ValueError: a `min_win_rate` outside [0, 1].
    """
    if min_win_rate is not None and not 0 <= min_win_rate <= 1:
        raise ValueError(f"min_win_rate must be a fraction between 0 and 1, got {min_win_rate}.")
    rate = report.win_rate
    low, high = rate.headline_interval
    said = f"{percent(rate.win_rate)} ({interval(low, high)})"
    found = []
    if rate.verdict == "worse":
        found.append(f"the tuned model is worse: preferred on {said}")
    elif min_win_rate is not None and low < min_win_rate:
        found.append(
            f"the win rate {said} is not shown to reach {percent(min_win_rate)} on "
            f"{rate.n_prompts:,} prompts"
        )
    if report.capabilities is not None:
        found += [f"a task was not measured: {reason}" for reason in report.capabilities.left_out]
        found += [
            f"{task.title} dropped from {task_value(task, task.base)} to "
            f"{task_value(task, task.tuned)} on {task.n:,} items (p = {task.p_value:.2g})"
            for task in report.capabilities.failed
        ]
    return found
