"""`SampledAnswers`: what the model answers at steps of its training, to read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import msgspec
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from prefopt.progress import print_above_bars
from prefopt.training.answer_callback import (
    AnswerCallback,
    AnswerSettings,
    AnyPrompt,
    append_lines,
    keep_lines,
    on_main_process,
)
from prefopt.types import FinishReason


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
            keep_lines(Path(args.output_dir) / self.file, SampledAnswer, state.global_step)
            if state.global_step == 0:
                self.measure(args, state, model, processing_class)

        on_main_process(begin)

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
        append_lines(Path(args.output_dir) / self.file, self._newest)
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
