"""What is shown, measured and watched while a model trains, as callbacks of any Trainer.

    trainer = DPOTrainer(..., callbacks=[ProgressBar(), HealthWatch(), SampledAnswers(prompts)])

`ProgressBar` shows, `SampledAnswers` and `JudgeWinRate` measure the model as it is now, `HealthWatch`
reads the log. None of them changes the training: modes and random generators are put back.

A metric must be in the logs before they go out to be seen by trackers, by early stopping and by the
choice of the best checkpoint. `prefopt.DPOTrainer` calls `before_log` of its callbacks at that moment;
for any other trainer `callback.attach(trainer)` does it.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack

import accelerate
import msgspec
import numpy as np
import torch
import transformers
from transformers.integrations import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    is_deepspeed_zero3_enabled,
)

from prefopt.errors import JudgeError, TrainingError
from prefopt.evaluation.win_rate import WinRate, win_rate
from prefopt.judges import Judge, judge_comparisons, load_judge
from prefopt.models import LanguageModel
from prefopt.progress import print_above_bars, progress_bar
from prefopt.sampling.candidates import SamplingSettings, sample_candidates
from prefopt.training.health import (
    HealthNote,
    diagnose,
    evaluation_points,
    findings_so_far,
    training_points,
)
from prefopt.types import Candidate, Comparison, FinishReason, Prompt

logger = logging.getLogger(__name__)

Every = Literal["eval"] | int
"""When to measure: at each evaluation, or every so many optimiser steps."""

AnyPrompt = Prompt | str | Sequence[Mapping[str, str]]
"""A prompt, the text of a user message, or a conversation as {"role", "content"} turns."""


class AnswerSettings(TypedDict, total=False):
    """The keyword arguments of `AnswerCallback`, which say what they are."""

    every: Every
    max_new_tokens: int
    temperature: float
    top_p: float
    batch_size: int
    seed: int
    tokenizer: Any


_RANK = {"ok": 0, "warning": 1, "problem": 2}


class ProgressBar(transformers.TrainerCallback):
    """Rows a second, loss, margin, held-out accuracy and time left, in prefopt's own bar.

    Shown by the main process only; a resumed run's bar starts where the run does. In
    `prefopt.DPOTrainer` it takes the place of the Trainer's own bar and printed logs; elsewhere
    `attach` does that.

    Args:
        description: the bar's label.
        unit: what a row of the data set is called.
        show: False counts silently.
    """

    def __init__(
        self, *, description: str = "training", unit: str = "pair", show: bool = True
    ) -> None:
        self.description, self.unit, self.show = description, unit, show
        self._bar: Any = None
        self._rows_a_step = 0.0
        self._notes: dict[str, str] = {}

    def attach(self, trainer: Any) -> Self:
        """Show this bar in `trainer` instead of its own bar and printed logs."""
        _add(trainer, self)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.remove_callback(transformers.ProgressCallback)
        return self

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Open the bar, filled up to the step that the run continues from."""
        self._close()
        self._notes.clear()
        self._rows_a_step = _rows_a_step(args, train_dataloader)
        self._bar = progress_bar(
            total=round(state.max_steps * self._rows_a_step),
            initial=round(state.global_step * self._rows_a_step),
            description=self.description,
            unit=self.unit,
            show=self.show and state.is_world_process_zero,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move on by the rows of one optimiser step."""
        if self._bar is not None:
            self._bar.update(round(state.global_step * self._rows_a_step) - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the newest loss, margin and held-out accuracy."""
        if self._bar is None or not logs:
            return
        shown = {
            "loss": "loss {:.3f}",
            "rewards/margins": "margin {:.2f}",
            "objective/scores": "score {:.2f}",
            "objective/kl": "KL {:.1f}",
            "eval_rewards/accuracies": "held-out {:.0%}",
        }
        self._notes.update({k: text.format(logs[k]) for k, text in shown.items() if k in logs})
        self._bar.set_postfix_str(", ".join(self._notes[k] for k in shown if k in self._notes))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def _rows_a_step(args: Any, dataloader: Any) -> float:
    """Rows of all processes that one optimiser step takes, on average over an epoch."""
    full = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    try:
        n_rows, n_batches = len(dataloader.dataset), len(dataloader)
    except (TypeError, AttributeError):  # a stream has no length, so its last batch is not known
        return float(full)
    steps = math.ceil(n_batches / args.gradient_accumulation_steps)
    return float(min(full, n_rows / max(1, steps)))


class SampledAnswer(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.sampled_answer/1",
):
    """One line of `sampled_answers.jsonl`: what the model answered at a step of its training.

    `prompt` is the text of the prompt's last message.
    """

    step: int
    prompt_id: str
    prompt: str
    answer: str
    n_tokens: int
    finish_reason: FinishReason


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


class AnswerCallback(transformers.TrainerCallback, abc.ABC):
    """What callbacks have in common that let the model answer prompts and log metrics about it.

    Subclasses implement `measure` and name one of its metrics in `metric`. With several processes the
    main one answers while the others wait, and all of them get the metrics.

    Args:
        prompts: what is asked; prompts that training does not see.
        every: at each evaluation, or every so many optimiser steps.
        max_new_tokens: an answer is cut off here.
        temperature: of the sampling; 0 takes the most likely token.
        top_p: see `SamplingSettings`.
        batch_size: answers generated at once.
        seed: of the sampling. The same at every step, so that a change comes from the model.
        tokenizer: None takes the trainer's processing class.

    Raises:
        ValueError: no prompts, or a setting out of range.
    """

    metric: str

    def __init__(
        self,
        prompts: Sequence[AnyPrompt],
        *,
        every: Every = "eval",
        max_new_tokens: int = 128,
        temperature: float = 0.7,
        top_p: float = 0.95,
        batch_size: int = 16,
        seed: int = 0,
        tokenizer: Any = None,
    ) -> None:
        name = type(self).__name__
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"{name} needs a list with at least one prompt, got {prompts!r}.")
        if every != "eval" and (not isinstance(every, int) or every < 1):
            raise ValueError(
                f'{name}: every must be "eval" or a number of steps from 1, got {every!r}.'
            )
        self.prompts = [_prompt(p) for p in prompts]
        self.every, self.seed, self.tokenizer = every, seed, tokenizer
        self.settings = SamplingSettings(
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        self._hooked = False
        self._evaluated = (-1, "")
        self._pending: dict[str, float] = {}

    @abc.abstractmethod
    def measure(self, args: Any, state: Any, model: Any, processing_class: Any) -> dict[str, float]:
        """Let the model answer and return metrics under their full names; main process only."""

    def attach(self, trainer: Any) -> Self:
        """Let any trainer log this callback's metrics like its own; adds the callback if need be.

        Not needed with `prefopt.DPOTrainer`. Without it another trainer's early stopping and choice
        of the best checkpoint still see the metrics (if this callback stands before
        EarlyStoppingCallback in the list), but trackers do not.
        """
        _add(trainer, self)
        log = trainer.log

        def with_metrics(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
            self.before_log(trainer, logs)
            return log(logs, *args, **kwargs)

        trainer.log = with_metrics
        return self

    def before_log(self, trainer: Any, logs: dict[str, float]) -> None:
        """Add metrics to `logs` in place, before trackers, history and other callbacks see them."""
        self._hooked = True
        if self._add_metrics(
            trainer.args, trainer.state, logs, trainer.model, trainer.processing_class
        ):
            self.tell_trackers(trainer)

    def tell_trackers(self, trainer: Any) -> None:
        """Called after new metrics were added, where there is something else to log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse what cannot work, before training starts."""
        self._pending.clear()
        self._evaluated = (-1, "")
        sharded = accelerate.state.AcceleratorState().distributed_type
        if is_deepspeed_zero3_enabled() or sharded == accelerate.DistributedType.FSDP:
            raise ValueError(
                f"{type(self).__name__} lets the main process generate alone, which cannot work with "
                "weights that are sharded over processes (FSDP, ZeRO-3). Leave it out, and sample "
                "from checkpoints with prefopt.sample_candidates."
            )
        if self.every == "eval" and args.eval_strategy == "no":
            logger.warning(
                "%s measures at each evaluation, and eval_strategy is 'no'. Set eval_strategy, or "
                "give `every` a number of steps.",
                type(self).__name__,
            )

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        """Measure every so many steps; what was measured is logged with this step's log."""
        if self.every != "eval" and state.global_step % self.every == 0:
            self._pending = self._measured(args, state, model, processing_class)
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """In a trainer that does not call `before_log`, log what was measured at this step."""
        if self._hooked or not self._pending:
            return
        for target in (logs, state.log_history[-1]):
            target.update(self._pending)
        self._pending = {}

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: Any = None,
        model: Any = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        """In a trainer that does not call `before_log`, add to what evaluation found."""
        if self._hooked or metrics is None:
            return
        before = set(metrics)
        if self._add_metrics(args, state, metrics, model, processing_class):
            new = {name: value for name, value in metrics.items() if name not in before}
            state.log_history[-1].update(new)

    def _add_metrics(
        self, args: Any, state: Any, logs: Any, model: Any, processing_class: Any
    ) -> bool:
        if self.metric in logs:
            return False
        if self._pending:
            logs.update(self._pending)
            self._pending = {}
            return True
        prefix = next((k for k in logs if k.startswith("eval_") and k.endswith("_runtime")), None)
        if self.every != "eval" or prefix is None:
            return False
        step, first = self._evaluated
        # Of several evaluation sets at one step, only the first: early stopping counts each of them.
        if step == state.global_step and prefix != first:
            return False
        self._evaluated = (state.global_step, prefix)
        logs.update(self._measured(args, state, model, processing_class))
        return True

    def _measured(
        self, args: Any, state: Any, model: Any, processing_class: Any
    ) -> dict[str, float]:
        found: dict[str, float] = _on_main_process(
            lambda: self.measure(args, state, model, processing_class)
        )
        return found

    def answers(
        self, args: Any, model: Any, processing_class: Any, *, adapter_off: bool = False
    ) -> list[Candidate]:
        """One answer to each prompt by the model as it is now; leaves it and all seeds as they were.

        Raises:
            ModelError: `adapter_off` without an adapter.
            DataError: prompts that leave no room for an answer in the model's context.
        """
        tokenizer = self.tokenizer if self.tokenizer is not None else processing_class
        loaded = LanguageModel(
            name="the model in training",
            model=model,
            tokenizer=_with_padding(tokenizer, type(self).__name__),
            base="",
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(_undisturbed(model))
            if args.bf16 or args.fp16:
                dtype = torch.bfloat16 if args.bf16 else torch.float16
                stack.enter_context(torch.autocast(args.device.type, dtype=dtype))
            if adapter_off:
                stack.enter_context(loaded.adapter_off())
            return sample_candidates(
                self.prompts, loaded, k=1, settings=self.settings, seed=self.seed, progress=False
            )


class SampledAnswers(AnswerCallback):
    """Answers to a few prompts by the model as it is now, to read while it trains.

    Before the first step and whenever `every` says. The answers go to
    `<output_dir>/sampled_answers.jsonl`, one `SampledAnswer` a line; a table is printed; TensorBoard,
    W&B and trackio get it as text. A fresh run begins the file anew, a resumed one goes on from its
    checkpoint's step.

    Metrics:
        eval_sampled/length_tokens: mean length of the answers in tokens.
        eval_sampled/distinct_2: share of two-word sequences, over all answers, that are different
            (Li et al. 2016, arXiv:1510.03055); NaN when no answer has two words. A fall says that
            answers become alike or repeat themselves.
        eval_sampled/finished: share of answers that ended before `max_new_tokens`.

    Args:
        prompts: what is asked; prompts that training does not see.
        show: is called with the table, for example `logger.info`; None shows nothing.
        settings: `every`, `max_new_tokens`, `temperature`, `top_p`, `batch_size`, `seed` and
            `tokenizer`, as `AnswerCallback` has them.

    Raises:
        ValueError: as `AnswerCallback`.
        DataError: a prompt too long for the model, or a file that cannot be written.
    """

    metric = "eval_sampled/length_tokens"
    file = "sampled_answers.jsonl"

    def __init__(
        self,
        prompts: Sequence[AnyPrompt],
        *,
        show: Callable[[str], None] | None = print_above_bars,
        **settings: Unpack[AnswerSettings],
    ) -> None:
        super().__init__(prompts, **settings)
        self.show = show
        self._newest: list[SampledAnswer] = []

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin the file, with the answers before training."""
        super().on_train_begin(args, state, control, **kwargs)

        def begin() -> None:
            _keep_lines(Path(args.output_dir) / self.file, SampledAnswer, state.global_step)
            if state.global_step == 0:
                self.measure(args, state, model, processing_class)

        _on_main_process(begin)

    def measure(self, args: Any, state: Any, model: Any, processing_class: Any) -> dict[str, float]:
        """Sample, write, show, and sum up."""
        candidates = self.answers(args, model, processing_class)
        self._newest = [
            SampledAnswer(
                step=state.global_step,
                prompt_id=c.prompt.prompt_id,
                prompt=c.prompt.text,
                answer=c.text,
                n_tokens=c.n_tokens or 0,
                finish_reason=c.finish_reason,
            )
            for c in candidates
        ]
        _append_lines(Path(args.output_dir) / self.file, self._newest)
        if self.show is not None:
            self.show(_table(self._newest))
        n = len(self._newest)
        return {
            "eval_sampled/length_tokens": sum(a.n_tokens for a in self._newest) / n,
            "eval_sampled/distinct_2": distinct_n([a.answer for a in self._newest], 2),
            "eval_sampled/finished": sum(a.finish_reason == "stop" for a in self._newest) / n,
        }

    def tell_trackers(self, trainer: Any) -> None:
        """Give the table to the trackers that take text; metrics and history stay numbers."""
        if not trainer.state.is_world_process_zero or not self._newest:
            return
        text = {"eval_sampled/answers": _markdown(self._newest)}
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback | WandbCallback | TrackioCallback):
                callback.on_log(
                    trainer.args, trainer.state, trainer.control, logs=text, model=trainer.model
                )


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
            _keep_lines(Path(args.output_dir) / self.file, WinRateAtStep, state.global_step)
            self._baseline_answers(args, state, model, processing_class)

        _on_main_process(begin)

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
            _write_lines(path, [found])
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
        _append_lines(Path(args.output_dir) / self.file, [found])
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


class HealthWatch(transformers.TrainerCallback):
    """Says in plain language, as soon as the log shows it, what is wrong with a run.

    Each finding of `prefopt.training.health.findings_so_far` is logged once as a warning, and again if
    it becomes a problem; at the end what only a whole run shows is added. `notes` has all of them.

    Args:
        beta: strength of the pull to the reference; None takes the trainer's `args.beta`.
        stop_on_problem: end training at the first problem: a loss or gradients that are not finite,
            gradients of 0, a margin that exploded or grows the wrong way. The weights stay as they are
            then; no checkpoint is written for it.
        prefix: of the held-out metrics, for example "eval_helpful" with several evaluation sets.
    """

    def __init__(
        self, *, beta: float | None = None, stop_on_problem: bool = False, prefix: str = "eval"
    ) -> None:
        self.beta, self.stop_on_problem, self.prefix = beta, stop_on_problem, prefix
        self.notes: tuple[HealthNote, ...] = ()
        self._told: dict[str, HealthNote] = {}
        self._points: list[Any] = []
        self._evaluations: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin with the log of the steps before, if the run is resumed."""
        self._points = list(training_points(state.log_history))
        self._evaluations = list(evaluation_points(state.log_history, self.prefix))
        self._told, self.notes = {}, ()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Take in what was logged, and say what it shows."""
        entry = {"step": state.global_step, "epoch": state.epoch or 0.0, **(logs or {})}
        points = training_points([entry])
        evaluations = evaluation_points([entry], self.prefix)
        if not points and not evaluations:
            return
        self._points += points
        self._evaluations += evaluations
        # Every finding reads the whole log; in a long one a new point changes little.
        n = len(self._points)
        if points and n > 500 and n % (n // 250) and math.isfinite(points[0].loss):
            return
        found = findings_so_far(self._points, beta=self._beta(args), evaluations=self._evaluations)
        new = self._tell(found, state)
        problem = next((note for note in new if note.level == "problem"), None)
        if problem is not None and self.stop_on_problem:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.error("training stops at step %d: %s", state.global_step, problem.check)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what only the whole run shows."""
        if len(self._points) >= 5:
            found = diagnose(self._points, beta=self._beta(args), evaluations=self._evaluations)
            self._tell(found, state)

    def _beta(self, args: Any) -> float | None:
        beta = self.beta if self.beta is not None else getattr(args, "beta", None)
        return beta if isinstance(beta, int | float) and beta > 0 else None

    def _tell(self, found: Sequence[HealthNote], state: Any) -> list[HealthNote]:
        new = []
        for note in found:
            told = self._told.get(note.check)
            if told is not None and _RANK[told.level] >= _RANK[note.level]:
                continue
            self._told[note.check] = note
            new.append(note)
            if state.is_world_process_zero:
                level = logging.INFO if note.level == "ok" else logging.WARNING
                logger.log(level, "step %d, %s: %s", state.global_step, note.level, note.message)
        self.notes = tuple(sorted(self._told.values(), key=lambda n: -_RANK[n.level]))
        return new


def distinct_n(texts: Sequence[str], n: int) -> float:
    """The share of sequences of `n` words, over all texts, that are different; NaN without any.

    Distinct-n of Li et al. 2016 (arXiv:1510.03055); words are split at white space.
    """
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else math.nan


def _prompt(prompt: AnyPrompt) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    return Prompt.from_text(prompt) if isinstance(prompt, str) else Prompt.from_messages(prompt)


def _add(trainer: Any, callback: Any) -> None:
    if callback not in trainer.callback_handler.callbacks:
        trainer.add_callback(callback)


def _with_padding(processing_class: Any, who: str) -> Any:
    """The tokenizer of a processing class, with a padding token; the given one stays as it is."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not hasattr(tokenizer, "pad_token_id"):
        raise ValueError(
            f"{who} needs a tokenizer to ask the model, got {tokenizer!r} as the trainer's "
            "processing_class. Give the trainer one, or pass tokenizer=."
        )
    if tokenizer.pad_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)  # a shallow one shares the special tokens
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode with a key-value cache; modes, settings and seeds are put back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    configs: list[Any] = [getattr(model, "config", None), getattr(model, "generation_config", None)]
    caching = [(c, c.use_cache) for c in configs if hasattr(c, "use_cache")]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        model.eval()
        for config, _ in caching:
            config.use_cache = True
        yield
    finally:
        for config, value in caching:
            config.use_cache = value
        for module, training in modes:
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _on_main_process(function: Callable[[], Any]) -> Any:
    """What `function` returns on the main process, in all processes; so is an error."""
    processes = accelerate.PartialState()
    if processes.num_processes == 1:
        return function()
    result: tuple[Any, str] = (None, "")
    error: Exception | None = None
    if processes.is_main_process:
        try:
            result = (function(), "")
        except Exception as problem:
            result, error = (None, f"{type(problem).__name__}: {problem}"), problem
    (result,) = accelerate.utils.broadcast_object_list([result])
    if error is not None:
        raise error
    if result[1]:
        raise TrainingError(f"the main process stopped with {result[1]}")
    return result[0]


def _append_lines(path: Path, records: Sequence[msgspec.Struct]) -> None:
    from prefopt.data.records import unwritable

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    except OSError as error:
        raise unwritable(path, error) from error


def _write_lines(path: Path, records: Sequence[msgspec.Struct]) -> None:
    from prefopt.data.records import write_records

    path.parent.mkdir(parents=True, exist_ok=True)
    write_records(path, records)


def _keep_lines(path: Path, record_type: Any, step: int) -> None:
    """Leave of an earlier run's file what a run that goes on from `step` builds on."""
    from prefopt.data.records import read_records

    if not path.exists():
        return
    if step == 0:
        path.unlink()
        return
    records = read_records(path, record_type)
    _write_lines(path, [record for record in records if record.step <= step])


def _table(answers: Sequence[SampledAnswer]) -> str:
    lines = [f"answers at step {answers[0].step}", f"  {'prompt':32}{'tokens':>6}  {'end':8}answer"]
    lines += [
        f"  {_short(a.prompt, 30):32}{a.n_tokens:6}  {a.finish_reason:8}{_short(a.answer, 60)}"
        for a in answers
    ]
    return "\n".join(lines)


def _markdown(answers: Sequence[SampledAnswer]) -> str:
    lines = ["| prompt | tokens | end | answer |", "|---|---|---|---|"]
    lines += [
        f"| {_cell(a.prompt)} | {a.n_tokens} | {a.finish_reason} | {_cell(a.answer)} |"
        for a in answers
    ]
    return "\n".join(lines)


def _short(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _cell(text: str) -> str:
    """Text that cannot break out of its cell or be taken for markup."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return "<br>".join(text.splitlines())
