"""What callbacks have in common that let the model answer prompts while it trains.

`SampledAnswers` (`sampled_answers`) and `JudgeWinRate` (`judge_win_rate`) are such callbacks of any
Trainer. They do not change the training: modes and random generators are put back.

A metric must be in the logs before they go out to be seen by trackers, by early stopping and by the
choice of the best checkpoint. prefopt's trainers call `before_log` of their callbacks at that moment;
for any other trainer `callback.attach(trainer)` does it.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

import accelerate
import msgspec
import numpy as np
import torch
import transformers
from transformers.integrations import is_deepspeed_zero3_enabled

from prefopt.errors import TrainingError
from prefopt.models import LanguageModel
from prefopt.sampling.candidates import SamplingSettings, sample_candidates
from prefopt.types import Candidate, Prompt

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
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
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
        found: dict[str, float] = on_main_process(
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


def _prompt(prompt: AnyPrompt) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    return Prompt.from_text(prompt) if isinstance(prompt, str) else Prompt.from_messages(prompt)


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


def on_main_process(function: Callable[[], Any]) -> Any:
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


def append_lines(path: Path, records: Sequence[msgspec.Struct]) -> None:
    """Add records to a file of JSON lines; raises DataError where it cannot be written."""
    from prefopt.data.records import unwritable

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    except OSError as error:
        raise unwritable(path, error) from error


def write_lines(path: Path, records: Sequence[msgspec.Struct]) -> None:
    """Make a file of JSON lines anew; raises DataError where it cannot be written."""
    from prefopt.data.records import write_records

    path.parent.mkdir(parents=True, exist_ok=True)
    write_records(path, records)


def keep_lines(path: Path, record_type: Any, step: int) -> None:
    """Leave of an earlier run's file what a run that goes on from `step` builds on."""
    from prefopt.data.records import read_records

    if not path.exists():
        return
    if step == 0:
        path.unlink()
        return
    records = read_records(path, record_type)
    write_lines(path, [record for record in records if record.step <= step])
