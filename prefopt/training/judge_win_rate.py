"""`JudgeWinRate`: how often a judge prefers the model in training to a baseline."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import msgspec

from prefopt.errors import JudgeError, TrainingError
from prefopt.evaluation.win_rate import WinRate, win_rate
from prefopt.judges import Judge, judge_comparisons, load_judge
from prefopt.training.answer_callback import (
    AnswerCallback,
    AnswerSettings,
    AnyPrompt,
    append_lines,
    keep_lines,
    on_main_process,
    write_lines,
)
from prefopt.types import Candidate, Comparison

logger = logging.getLogger(__name__)


class WinRateAtStep(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.win_rate_at_step/1",
):
    """One line of `win_rates.jsonl`: the win rate at a step, or why there is none."""

    step: int
    win_rate: WinRate | None = None
    failure: str = ""


class _Baseline(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.win_rate_baseline/1",
):
    """The baseline's answers with what they were sampled by."""

    settings: dict[str, float]
    seed: int
    answers: tuple[Candidate, ...]


class JudgeWinRate(AnswerCallback):
    """The win rate of the model as it is now against a baseline, by one of prefopt's judges.

    Each answer is compared with the baseline's answer to the same prompt, in both orders. With the
    same weights both answers are the same, which is a tie and costs nothing, so training starts at
    0.5. Each result goes to `<output_dir>/win_rates.jsonl` as a `WinRateAtStep`.

    Metrics, so that `metric_for_best_model="win_rate"` and `EarlyStoppingCallback` can use them:
        eval_win_rate: see `prefopt.win_rate`.
        eval_win_rate_low, eval_win_rate_high: its 95 % interval. Fifty prompts leave it 0.27 wide.
        eval_win_rate_failed: comparisons without a verdict; they are no ties and no losses.

    When the judge cannot go on (money, key, server) or no comparison got a verdict, the first three
    are NaN and a warning says why; training goes on. When the best checkpoint is chosen by them, a
    judge that cannot go on ends the training with its error instead.

    Args:
        prompts: what is asked; prompts that training does not see.
        judge: a judge, or its text form (`prefopt.load_judge`).
        baseline: "start" is the model before its first step; "adapter_off" is the base model of an
            adapter; or the answers themselves, one to each prompt. Sampled once, and kept in
            `<output_dir>/win_rate_baseline.jsonl` for a resumed run.
        max_usd: the most a paid judge may spend on this ledger, when `judge` is a text.
        rubric: what better means, when `judge` is a text.
        ledger: file that keeps every verdict, so that none is paid for twice; None is
            `<output_dir>/win_rate_judgements.sqlite`.
        settings: `every`, `max_new_tokens`, `temperature`, `top_p`, `batch_size`, `seed` and
            `tokenizer`, as `AnswerCallback` has them.

    Raises:
        ValueError: as `AnswerCallback` and `load_judge`; baseline answers that do not fit the prompts.
        JudgeError: the judge cannot go on, and the best checkpoint is chosen by the win rate.
        TrainingError: a resumed run without the baseline it began with.
        DataError: a prompt too long for the model, or a file that cannot be used.
    """

    metric = "eval_win_rate"
    file = "win_rates.jsonl"
    baseline_file = "win_rate_baseline.jsonl"

    def __init__(
        self,
        prompts: Sequence[AnyPrompt],
        judge: str | Judge,
        *,
        baseline: Literal["start", "adapter_off"] | Sequence[str | Candidate] = "start",
        max_usd: float | None = None,
        rubric: Any = "house_style",
        ledger: str | Path | None = None,
        **settings: Unpack[AnswerSettings],
    ) -> None:
        super().__init__(prompts, **settings)
        if isinstance(judge, str):
            judge = load_judge(judge, rubric=rubric, max_usd=max_usd)
        self.judge = judge
        self.ledger = ledger
        self.baseline = baseline if isinstance(baseline, str) else "given"
        if self.baseline not in ("start", "adapter_off", "given"):
            raise ValueError(
                f'baseline must be "start", "adapter_off" or a list of answers, got {baseline!r}.'
            )
        self._baseline: tuple[Candidate, ...] | None = None
        if not isinstance(baseline, str):
            self._baseline = self._given(baseline)

    def _given(self, answers: Sequence[str | Candidate]) -> tuple[Candidate, ...]:
        if len(answers) != len(self.prompts):
            raise ValueError(
                f"baseline needs one answer to each of the {len(self.prompts)} prompts, in their "
                f"order, got {len(answers)}."
            )
        found = [
            a if isinstance(a, Candidate) else Candidate(prompt=p, text=a, model="baseline")
            for p, a in zip(self.prompts, answers, strict=True)
        ]
        wrong = [
            i + 1
            for i, (p, c) in enumerate(zip(self.prompts, found, strict=True))
            if c.prompt.prompt_id != p.prompt_id
        ]
        if wrong:
            raise ValueError(
                f"baseline answers must follow the order of the prompts; answer {wrong[0]} is to "
                f"another prompt ({found[wrong[0] - 1].prompt.text[:50]!r})."
            )
        return tuple(found)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Sample the baseline, or take up the one that the run began with."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.baseline != "given":
            self._baseline = None

        def begin() -> None:
            keep_lines(Path(args.output_dir) / self.file, WinRateAtStep, state.global_step)
            self._baseline_answers(args, state, model, processing_class)

        on_main_process(begin)

    def _baseline_answers(
        self, args: Any, state: Any, model: Any, processing_class: Any
    ) -> tuple[Candidate, ...]:
        if self._baseline is not None:
            return self._baseline
        path = Path(args.output_dir) / self.baseline_file
        adapter_off = self.baseline == "adapter_off"
        made_by = {
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "max_new_tokens": self.settings.max_new_tokens,
        }
        if state.global_step == 0 or adapter_off:
            answers = self.answers(args, model, processing_class, adapter_off=adapter_off)
            found = _Baseline(
                settings=made_by,
                seed=self.seed,
                answers=tuple(msgspec.structs.replace(a, model="baseline") for a in answers),
            )
            write_lines(path, [found])
        else:
            found = self._read_baseline(path, state.global_step)
            asked = [p.prompt_id for p in self.prompts]
            if (found.settings, found.seed) != (made_by, self.seed) or [
                a.prompt.prompt_id for a in found.answers
            ] != asked:
                raise TrainingError(
                    f"the baseline in {path} was sampled for other prompts, another seed or other "
                    "settings than JudgeWinRate has now, so win rates before and after the resumption "
                    "could not be compared. Resume with the same ones, or give baseline answers."
                )
        self._baseline = found.answers
        return found.answers

    def _read_baseline(self, path: Path, step: int) -> _Baseline:
        from prefopt.data.records import read_records

        if not path.exists():
            raise TrainingError(
                f"JudgeWinRate compares with the model before its first step, but this run goes on "
                f"from step {step} and {path} is not there. Put the file back, give baseline="
                '"adapter_off" if training began with a new adapter, or give the answers themselves.'
            )
        (found,) = read_records(path, _Baseline)
        return found

    def measure(self, args: Any, state: Any, model: Any, processing_class: Any) -> dict[str, float]:
        """Sample, judge in both orders, and count."""
        baseline = self._baseline_answers(args, state, model, processing_class)
        now = self.answers(args, model, processing_class)
        comparisons = [
            Comparison(a=msgspec.structs.replace(a, model=f"step {state.global_step}"), b=b)
            for a, b in zip(now, baseline, strict=True)
        ]
        ledger = self.ledger or Path(args.output_dir) / "win_rate_judgements.sqlite"
        rate, failure = None, ""
        try:
            judged = judge_comparisons(comparisons, self.judge, ledger=ledger, progress=False)
            if any(j.mean_grade is not None for j in judged):
                rate = win_rate(judged, seed=self.seed)
            else:
                reasons = sorted({reason for j in judged for reason in j.failures})
                failure = f"none of {len(judged)} comparisons got a verdict ({', '.join(reasons)})"
        except JudgeError as error:
            best = str(args.metric_for_best_model or "").removeprefix("eval_")
            if best.startswith("win_rate"):
                raise
            failure = str(error)
        found = WinRateAtStep(step=state.global_step, win_rate=rate, failure=failure)
        append_lines(Path(args.output_dir) / self.file, [found])
        if rate is None:
            logger.warning("no win rate at step %d: %s", state.global_step, failure)
            nothing = dict.fromkeys(("", "_low", "_high"), math.nan) | {"_failed": len(comparisons)}
            return {f"eval_win_rate{name}": float(value) for name, value in nothing.items()}
        if rate.n_unscored:
            logger.warning(
                "%d of %d comparisons at step %d got no verdict and are left out (%s)",
                rate.n_unscored,
                len(comparisons),
                state.global_step,
                ", ".join(f"{k}: {v}" for k, v in rate.unscored_reasons.items()),
            )
        low, high = rate.headline_interval
        return {
            "eval_win_rate": rate.win_rate,
            "eval_win_rate_low": low,
            "eval_win_rate_high": high,
            "eval_win_rate_failed": float(rate.n_unscored),
        }
