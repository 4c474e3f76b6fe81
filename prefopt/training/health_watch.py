"""`HealthWatch`: reads a training's log as it is written and says what is wrong with the run.

What is looked for, and the words for it, are those of `prefopt.training.health`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import transformers

from prefopt.training.health import (
    HealthNote,
    diagnose,
    evaluation_points,
    findings_so_far,
    training_points,
)

logger = logging.getLogger(__name__)

_RANK = {"ok": 0, "warning": 1, "problem": 2}


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
