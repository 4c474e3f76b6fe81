"""`rollouts.jsonl`: answers that PPO learned from, to read; kept in step with checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import transformers

ROLLOUTS_FILE = "rollouts.jsonl"


class LoggedAnswer(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag="prefopt.rollout/1",
):
    """One line of `rollouts.jsonl`: an answer that PPO learned from.

    `step` is the optimiser step before which it was sampled, `kl` its log-ratio to the reference in
    nats, and `score` None where the reward gave none.
    """

    step: int
    prompt: str
    answer: str
    n_tokens: int
    ended: bool
    score: float | None
    kl: float | None = None


def append_answers(folder: str | Path, answers: Sequence[LoggedAnswer]) -> None:
    """Add to the file in a training's folder."""
    path = Path(folder) / ROLLOUTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(b"".join(msgspec.json.encode(answer) + b"\n" for answer in answers))


class CheckpointsBetweenRollouts(transformers.TrainerCallback):
    """Puts off a checkpoint until the rollout batch is used up: no checkpoint holds answers."""

    def __init__(self) -> None:
        self._wanted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave of an earlier run's answers those that this run builds on."""
        path = Path(args.output_dir) / ROLLOUTS_FILE
        if path.exists() and args.should_save:
            kept = []
            for line in path.read_bytes().splitlines(keepends=True):
                with contextlib.suppress(msgspec.MsgspecError):  # a kill may tear the last one
                    if msgspec.json.decode(line, type=LoggedAnswer).step < state.global_step:
                        kept.append(line)
            path.write_bytes(b"".join(kept))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save at a rollout batch's last step what was to be saved within it."""
        if state.global_step % args.steps_per_rollout:
            self._wanted |= control.should_save
            control.should_save = False
        else:
            control.should_save |= self._wanted
            self._wanted = False
